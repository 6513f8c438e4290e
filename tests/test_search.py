"""Collections for search: both layouts are read alike, and three ways to score them agree."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import cli, save_corpus, train_words
from sentence_transformers import SentenceTransformer
from tiny_bert import load_model, make_sentences, save_bert

from st_clusterns.evaluation.labelled import read_evaluator
from st_clusterns.evaluation.search import Collection, read_collection, search_evaluator

DOCUMENTS = {f"d{place}": text for place, text in enumerate(dict.fromkeys(make_sentences(150, lengths=(6, 9))))}
# Queries have the ids of documents. The answers of a query are the documents of its topic, of which three are judged.
QUERIES = {f"d{place}": text for place, text in enumerate(make_sentences(20, seed=1))}


def topic(text: str) -> int:
    return int(text.split()[0][1:]) // 25


RELEVANT = {
    query: {key: 1 for key, found in DOCUMENTS.items() if topic(found) == topic(text)}
    for query, text in QUERIES.items()
}
RELEVANT = {query: dict(list(found.items())[:3]) for query, found in RELEVANT.items()}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_beir(folder: Path) -> Path:
    """Write the collection in the layout of BEIR, with titles, and with what does not count."""
    rows = [
        {"_id": key, "title": text.split()[0], "text": " ".join(text.split()[1:])} for key, text in DOCUMENTS.items()
    ]
    rows.append({"_id": "untitled", "title": "", "text": "w1 w2"})
    rows.append({"_id": "empty", "title": None, "text": ""})
    write_lines(folder / "corpus.jsonl", rows)
    unanswered = {"q-unjudged": "w1", "q-zero": "w2"}
    write_lines(
        folder / "queries.jsonl", [{"_id": key, "text": text} for key, text in {**QUERIES, **unanswered}.items()]
    )
    judged = [(query, key, 1) for query, found in RELEVANT.items() for key in found]
    judged += [("q-zero", "d0", 0), ("d0", "empty", 0), ("another split's", "d0", 1)]
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in judged)]
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(tmp_path_factory.mktemp("collections") / "tickets")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    return load_model(save_bert(tmp_path_factory.mktemp("model")))


def test_the_layout_of_beir(folder: Path) -> None:
    found = read_collection(folder)
    assert found == Collection({**DOCUMENTS, "untitled": "w1 w2", "empty": ""}, QUERIES, RELEVANT)


def test_other_names_and_formats(tmp_path: Path) -> None:
    number = {key: place for place, key in enumerate(DOCUMENTS)}
    write_lines(tmp_path / "docs.jsonl.gz", [{"id": number[key], "text": text} for key, text in DOCUMENTS.items()])
    (tmp_path / "queries.tsv").write_text("\n".join(["id\ttext", *map("\t".join, QUERIES.items())]))
    answers = {query: [number[key] for key in found] for query, found in RELEVANT.items()}
    (tmp_path / "qrels.json").write_text(json.dumps(answers))
    found = read_collection(tmp_path)
    assert list(found.documents.values()) == list(DOCUMENTS.values())
    assert found.queries == QUERIES
    assert found.relevant == {query: {str(number[key]): 1 for key in RELEVANT[query]} for query in QUERIES}


def test_grades_are_kept(tmp_path: Path) -> None:
    write_beir(tmp_path)
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd0\td1\t2\nd0\td2\t1.0")
    assert read_collection(tmp_path).relevant == {"d0": {"d1": 2, "d2": 1}}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", None, "has no corpus.jsonl: a collection for search has three tables"),
        ("qrels/test.tsv", None, "has no qrels/test.tsv"),
        ("corpus.jsonl", '{"_id": "a", "text": "x"}\n' * 3, "corpus.jsonl' has the id 'a' 3 times: each row has an id"),
        ("corpus.jsonl", '{"_id": "a", "text": "x"}\n{"text": "x"}', "corpus.jsonl' has a row without an id"),
        ("corpus.jsonl", '{"_id": "a", "text": ["x", "y"]}', r"column='text' .* holds \['x', 'y'\] in line 1"),
        ("queries.jsonl", '{"_id": "d0", "text": null}', "queries.jsonl' has no text for the query 'd0': drop it"),
        ("corpus.jsonl", '{"_id": "a", "body": "x"}', "column='text' is not in .*corpus.jsonl'"),
        ("queries.jsonl", '{"name": "a", "text": "x"}', "column='id' is not in .*queries.jsonl'"),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nd0\tnone\t1",
            "has no answer to a query of queries.jsonl among",
        ),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nd0\td0\t0", "has no answer to a query of queries.jsonl"),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nd0\td0\tyes",
            "query 'd0' and document 'd0' by 'yes': no whole",
        ),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nd0\td0\t0.5", "document 'd0' by '0.5': no whole number"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nd0\td0\tinf", "document 'd0' by 'inf': no whole number"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nd0\td0\t2\nd0\td0\t0", "by '0': another score of .* is 2"),
        (
            "qrels/test.tsv",
            "d0\t0\td0\t1\nd0\t0\td1\t1",
            "lacks corpus-id, query-id, score: its first line must name the columns",
        ),
        ("qrels.json", '{"d0": {"d1": 1}}', "has qrels/test.tsv and qrels.json: move all but one away"),
        ("corpus.csv", "_id,text\na,b", "has corpus.csv and corpus.jsonl: move all but one away"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    write_beir(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_collection(tmp_path)


@pytest.mark.parametrize("answers", [{"d0": ["d1", "d2"]}, {"d0": {"d1": 1, "d2": 1, "d3": 0}}])
def test_judgements_in_a_json_object(tmp_path: Path, answers: dict[str, Any]) -> None:
    write_beir(tmp_path)
    (tmp_path / "qrels" / "test.tsv").unlink()
    (tmp_path / "qrels.json").write_text(json.dumps(answers, indent=2))
    assert read_collection(tmp_path).relevant == {"d0": {"d1": 1, "d2": 1}}
    (tmp_path / "qrels.json").write_text(json.dumps({f"query {number}": "d1" for number in range(2000)}))
    with pytest.raises(ValueError, match="lacks corpus-id, query-id, score") as caught:
        read_collection(tmp_path)
    assert len(str(caught.value)) < 300


def test_judgements_of_another_split_are_named(tmp_path: Path) -> None:
    write_beir(tmp_path)
    (tmp_path / "qrels" / "test.tsv").rename(tmp_path / "qrels" / "dev.tsv")
    with pytest.raises(FileNotFoundError, match=r"has no qrels/test.tsv: copy one of dev.tsv there"):
        read_collection(tmp_path)


def test_windows_lines_quotes_and_numbers(tmp_path: Path) -> None:
    write_beir(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    (tmp_path / "corpus.tsv").write_bytes(b'_id\ttext\r\n1\tthe "red" one\r\n2\tanother\r\n')
    write_lines(tmp_path / "queries.jsonl", [{"_id": 1, "text": "w1"}])
    (tmp_path / "qrels" / "test.tsv").write_bytes(b"query-id\tcorpus-id\tscore\r\n1\t2\t1\r\n")
    assert read_collection(tmp_path) == Collection({"1": 'the "red" one', "2": "another"}, {"1": "w1"}, {"1": {"2": 1}})


def test_an_answer_that_is_no_document_counts_as_not_found(
    tmp_path: Path, model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    write_beir(tmp_path)
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd0\td1\t1\nd0\tremoved\t1")
    collection = read_collection(tmp_path)
    assert "1 of 2 answers in" in caplog.text
    scores = search_evaluator(replace(collection, documents=dict(list(DOCUMENTS.items())[:50])), "few")(model)
    assert scores["few_cosine_recall@100"] == 0.5


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere' is no folder"):
        read_collection(tmp_path / "nowhere")


def scores_by_hand(model: SentenceTransformer, collection: Collection) -> dict[str, float]:
    """nDCG@10, MAP@100 and recall@100, written out."""
    keys = list(collection.documents)
    documents, queries = (
        model.encode(list(texts.values()), normalize_embeddings=True)
        for texts in (collection.documents, collection.queries)
    )
    found: dict[str, list[float]] = {"ndcg": [], "map": [], "recall": []}
    for query, row in zip(collection.queries, queries, strict=True):
        answers = collection.relevant[query]
        ranked = [keys[place] in answers for place in np.argsort(-(documents @ row), kind="stable")[:100]]
        gains = sum(hit / math.log2(rank + 2) for rank, hit in enumerate(ranked[:10]))
        found["ndcg"].append(gains / sum(1 / math.log2(rank + 2) for rank in range(min(10, len(answers)))))
        precisions = [sum(ranked[: rank + 1]) / (rank + 1) for rank, hit in enumerate(ranked) if hit]
        found["map"].append(sum(precisions) / len(answers))
        found["recall"].append(sum(ranked) / len(answers))
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_the_evaluator_and_mteb_agree_with_scores_written_out(
    model: SentenceTransformer, folder: Path, tmp_path: Path
) -> None:
    collection = read_collection(folder)
    expected = scores_by_hand(model, collection)
    assert 0.05 < expected["ndcg"] < expected["recall"] < 1
    found = search_evaluator(collection, "tickets")(model)
    for name, key in (("ndcg", "ndcg@10"), ("map", "map@100"), ("recall", "recall@100")):
        assert found[f"tickets_cosine_{key}"] == pytest.approx(expected[name], abs=1e-6)
    pytest.importorskip("mteb")
    from st_clusterns.evaluation.evaluate import evaluate

    [record] = evaluate(model, "tiny", tmp_path / "out", tasks=[], search=[folder])
    assert record["values"] == pytest.approx(
        {f"{name}_at_{k}": 100 * expected[name] for name, k in (("ndcg", 10), ("map", 100), ("recall", 100))}, abs=1e-3
    )
    assert record["rows"] == len(QUERIES)


def test_grades_count_in_mteb_and_not_in_the_evaluator(
    model: SentenceTransformer, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mteb")
    from st_clusterns.evaluation.evaluate import evaluate

    graded = shutil.copytree(folder, tmp_path / "graded")
    lines = (graded / "qrels" / "test.tsv").read_text().splitlines()
    raised = [line[:-1] + "3" if place % 3 == 1 and line.endswith("\t1") else line for place, line in enumerate(lines)]
    (graded / "qrels" / "test.tsv").write_text("\n".join(raised))
    plain, ours = (read_evaluator(one)(model)[f"{one.name}_cosine_ndcg@10"] for one in (folder, graded))
    assert plain == ours
    [record] = evaluate(model, "tiny", tmp_path / "out", tasks=[], search=[graded])
    assert abs(record["values"]["ndcg_at_10"] - 100 * plain) > 0.1


def test_the_command_scores_a_search_and_keeps_the_scores(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("mteb")
    words = ["evaluate", save_bert(tmp_path / "bert"), "--search", folder, "--output", tmp_path / "out"]
    code, text = cli(*words)
    assert code == 0, text
    assert "1/1 tickets, search in documents: ndcg_at_10" in text
    page = (tmp_path / "out" / "results.md").read_text()
    assert page.count("| tickets | search in documents |") == 3
    [kept] = (tmp_path / "out" / "tasks").glob("*.json")
    before = kept.read_bytes()
    assert cli(*words)[0] == 0
    assert kept.read_bytes() == before, "with its seconds: it was not computed again"
    again = tmp_path / "tickets"
    write_beir(again)
    (again / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd0\td1\t1")
    code, text = cli(*["evaluate", tmp_path / "bert", "--search", again, "--output", tmp_path / "out"])
    assert code == 2
    assert "holds scores of another settings" in text, "judgements are a part of the data"
    code, text = cli("evaluate", tmp_path / "bert", "--search", tmp_path / "none", "--output", tmp_path / "out2")
    assert code == 2
    assert "none' is no folder" in text


def test_training_is_scored_by_a_search(folder: Path, tmp_path: Path) -> None:
    model_path = save_bert(tmp_path / "bert")
    words = train_words(save_corpus(tmp_path), str(model_path), tmp_path / "out", "--max-steps", 2, "--eval", folder)
    code, text = cli(*words)
    assert code == 0, text
    assert "Labels of tickets were used for these scores only" in text
    scores = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]
    for side, path in (("before", model_path), ("after", tmp_path / "out")):
        found = read_evaluator(folder)(SentenceTransformer(str(path), device="cpu"))
        assert scores[side] == pytest.approx(found, abs=1e-6)
        assert set(scores[side]) > {f"tickets_cosine_{key}" for key in ("ndcg@10", "map@100", "recall@100")}
