"""The audit: what it counts is what a loop counts, and what it says is useful on any corpus."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import cli, topic_sentences
from sentence_transformers import SentenceTransformer
from sklearn.preprocessing import normalize
from tiny_bert import make_sentences

from st_clusterns import audit
from st_clusterns.evaluation import negatives as module
from st_clusterns.evaluation.negatives import KINDS, Rows, look_at_batches, number_words
from st_clusterns.evaluation.scores import false_negative_share
from st_clusterns.losses.clusterns import ClusterNSLoss
from st_clusterns.training.quickstart import load_utterances
from st_clusterns.training.report import describe_clusters, describe_embeddings

CORPUS = topic_sentences(300)
SAME = [*CORPUS, *CORPUS[:6], *(" ".join(reversed(text.split())).upper() + "!" for text in CORPUS[6:12])]


def random_rows(n_rows: int = 60, seed: int = 0) -> Rows:
    """Rows of every kind: 50 texts, some with the words of another, six topics and some without."""
    draw = np.random.default_rng(seed)
    embeddings = normalize(draw.normal(size=(50, 6)).astype(np.float32))
    topics = np.where(draw.random(50) < 0.3, -1, draw.integers(6, size=50))
    texts = np.append(np.arange(50), draw.integers(50, size=n_rows - 50))
    return Rows(embeddings, texts, draw.integers(-1, 25, size=50), topics, 0.8, 0.6, draw.integers(4, size=n_rows))


def count_by_loop(rows: Rows) -> dict[str, Any]:
    """The negatives of a batch of all rows."""
    n = len(rows.texts)
    found = dict.fromkeys((*KINDS, "masked", "left", "guessed", "right", "same label"), 0)
    meets = set()
    assert rows.labels is not None
    for i, j in itertools.permutations(range(n), 2):
        a, b = rows.texts[i], rows.texts[j]
        copy, topic = a == b, rows.topics[a] == rows.topics[b] != -1
        cosine = float(rows.embeddings[a] @ rows.embeddings[b])
        if copy:
            kind = "exact copies"
        elif rows.words[a] == rows.words[b] != -1:
            kind = "same words"
        elif topic:
            kind = "same topic"
        elif cosine >= rows.near:
            kind = "as similar as a positive"
        else:
            kind = "hard" if cosine >= rows.hard else "easy"
        false, same = kind not in ("hard", "easy"), rows.labels[i] == rows.labels[j]
        found[kind] += 1
        found["masked"] += copy or topic
        found["left"] += false and not (copy or topic)
        found["guessed"] += false
        found["right"] += false and same
        found["same label"] += same
        meets |= {i} if false else set()
    return {**found, "meets": len(meets)}


def test_a_batch_of_everything_holds_what_a_loop_counts() -> None:
    rows = random_rows()
    found, pairs = look_at_batches(rows, 60)
    expected = count_by_loop(rows)
    assert all(expected[kind] > 0 for kind in KINDS), "a canary: every kind is there"
    for kind in KINDS:
        assert found.kinds[kind] == pytest.approx((expected[kind] / 60,) * 3)
    assert found.false.mean == pytest.approx(expected["guessed"] / 60)
    assert found.masked.mean == pytest.approx(expected["masked"] / 60)
    assert found.left.mean == pytest.approx(expected["left"] / 60)
    assert found.rows_with_false.mean == pytest.approx(expected["meets"] / 60)
    assert found.precision == pytest.approx(expected["right"] / expected["guessed"])
    assert found.recall == pytest.approx(expected["right"] / expected["same label"])
    for pair in pairs:
        assert pair.kind in KINDS[1:4], "no exact copies"
        assert pair.cosine == pytest.approx(rows.embeddings[pair.first] @ rows.embeddings[pair.second], abs=1e-6)
    false = [pair.cosine for pair in pairs if pair.masked]
    cosines = rows.embeddings @ rows.embeddings.T
    topic = (rows.topics[:, None] == rows.topics) & (rows.topics >= 0) & ~np.eye(50, dtype=bool)
    assert max(false) == pytest.approx(cosines[topic].max(), abs=1e-6)


def test_intervals_hold_the_share_of_all_pairs_as_often_as_they_say() -> None:
    held = []
    for seed in range(60):
        rows = random_rows(2000)
        topics = rows.topics[rows.texts]
        expected = 31 * false_negative_share(topics, topics >= 0)
        copies = 31 * false_negative_share(rows.texts)
        found = look_at_batches(Rows(rows.embeddings, rows.texts, rows.words * 0 - 1, rows.topics, 2, 2), 32, seed)[0]
        both = 31 * false_negative_share(rows.texts * 10 + topics, topics >= 0)
        masked = expected + copies - both  # a copy without a topic is masked as well
        held.append(found.masked.low <= masked <= found.masked.high)
    assert 0.85 <= np.mean(held) < 1


def test_of_a_huge_batch_some_rows_are_compared_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(400)
    whole = look_at_batches(rows, 400)[0]
    monkeypatch.setattr(module, "ANCHORS", 16)
    part = look_at_batches(rows, 400)[0]
    assert part.false.low < whole.false.mean < part.false.high
    assert part.false.low < part.false.high
    assert part.precision == pytest.approx(whole.precision, abs=0.05)


def test_words_are_compared_without_case_punctuation_and_order() -> None:
    words = number_words(["How are you?", "you ARE how", "how are they", "!!!", "?", "how how are you"])
    assert words[0] == words[1]
    assert words[3] == words[4] == -1
    assert len(set(words.tolist())) == 4


# The whole audit


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tiny_bert import load_model, save_bert

    model = load_model(save_bert(tmp_path_factory.mktemp("bert")))
    return audit(model, SAME, [16, 64], n_clusters=8, show_progress_bar=False)


def test_repeats_are_counted_and_worth_a_word(found: Any) -> None:
    assert (found.n_sentences, found.n_repeated, found.n_sampled) == (312, 6, 312)
    texts = [" ".join(sorted(text.lower().strip("!").split())) for text in found.clusters.sentences]
    assert found.n_same_words == sum(texts.count(text) > 1 for text in texts) >= 12
    assert "6 sentences repeat another one exactly: train on each once." in found.verdict
    assert f"{found.n_same_words} sentences have the words of another one" in found.verdict
    assert any(pair.kind == "same words" for pair in found.pairs)


def test_topics_are_masked_as_the_loss_does(found: Any, model: SentenceTransformer) -> None:
    assert found.clusters.has_topics
    assert [one.batch_size for one in found.negatives] == [16, 64]
    expected = describe_clusters(found.clusters, 64)["false_negatives_of_a_row"]
    assert found.negatives[1].masked.mean == pytest.approx(expected, rel=0.1)
    loss = ClusterNSLoss(model, found.clusters)
    known = dict(zip(loss.known_texts.tolist(), loss.known_ids.tolist(), strict=True))
    trusted = loss.trusted.tolist()
    assert sum(trusted[i] for i in known.values()) > 200
    for pair in found.pairs:
        ids = found.clusters.ids[[pair.first, pair.second]]
        assert pair.masked == (ids[0] == ids[1] and trusted[ids[0]])


def test_audit_and_report_call_the_same_pairs_hard(found: Any) -> None:
    clusters = found.clusters
    pairs = [
        float(clusters.embeddings[i] @ clusters.embeddings[j])
        for i, j in itertools.combinations(range(len(clusters.ids)), 2)
        if clusters.ids[i] == clusters.ids[j]
    ]
    in_report = describe_embeddings(clusters.embeddings, clusters.ids)["mean_cosine_same_cluster"]
    assert found.hard == pytest.approx(np.mean(pairs), abs=1e-4)
    assert found.hard == pytest.approx(in_report, abs=1e-4)


def test_topics_have_names_sizes_and_examples(found: Any) -> None:
    assert sum(topic["size"] for topic in found.topics) == len(found.clusters.sentences)
    assert [topic["size"] for topic in found.topics] == sorted(found.clusters.sizes, reverse=True)
    for topic in found.topics:
        place = found.clusters.names.index(topic["name"])
        assert topic["examples"] == found.clusters.examples(3)[place]
        assert topic["trust"] == pytest.approx(found.clusters.trust[place])


def test_the_text_and_the_record_say_the_same(found: Any) -> None:
    text, record = str(found), json.loads(json.dumps(found.to_dict()))
    assert text.startswith("Audit of ")
    assert found.verdict in text
    assert record["verdict"] == found.verdict
    assert "train with ClusterNSLoss and K=8" in text
    for kind in KINDS[:5]:
        assert f"{kind} " in text
    assert record["negatives"][1]["false"][0] == found.negatives[1].false.mean
    assert len(record["pairs"]) == len(found.pairs) > 0
    assert record["pairs"][0]["texts"][0] in found.clusters.sentences
    assert repr(found) == text, "it explains itself at a prompt"


def test_random_sentences_have_no_topics_and_the_audit_says_what_to_do(model: SentenceTransformer) -> None:
    draw = np.random.default_rng(0)
    sentences = [" ".join(f"w{i}" for i in draw.integers(200, size=8)) for _ in range(200)]
    found = audit(model, sentences, show_progress_bar=False)
    assert "No topics were found (highest mean trust" in found.verdict
    assert "in-batch contrastive learning" in found.verdict
    assert "Positives: views of the kind 'deletion'" in found.verdict
    assert [one.batch_size for one in found.negatives] == [32, 128], "those that fit"
    assert found.negatives[0].masked.mean == 0
    assert "none of which is used" in str(found)


def test_labels_measure_the_guess(model: SentenceTransformer) -> None:
    labels = [text.split()[0] for text in CORPUS]
    found = audit(model, CORPUS, [32], labels=labels, n_clusters=8, show_progress_bar=False)
    plain = audit(model, CORPUS, [32], n_clusters=8, show_progress_bar=False)
    assert found.negatives[0].precision is not None
    assert plain.negatives[0].precision is None
    assert found.negatives[0].kinds == plain.negatives[0].kinds, "labels change nothing"
    assert "By the labels" in found.verdict
    assert "By the labels" not in plain.verdict


def test_copies_are_not_overcounted_in_a_sample(model: SentenceTransformer) -> None:
    """A sample of the distinct texts with all of their copies would hold four times as many pairs of copies."""
    corpus = [text for text in CORPUS for _ in range(4)]
    found = audit(model, corpus, [32], sample=300, n_clusters=8, show_progress_bar=False)
    assert (found.n_sentences, found.n_sampled, found.n_repeated) == (1200, 300, 900)
    assert len(found.clusters.sentences) < 300
    assert found.negatives[0].kinds["exact copies"].mean == pytest.approx(31 * false_negative_share(corpus), rel=0.5)
    assert "a random sample of 300 of 1,200 sentences was embedded" in str(found)


def test_an_audit_leaves_the_model_as_it_is(model: SentenceTransformer) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    length = model.max_seq_length
    audit(model, CORPUS, [32], n_clusters=8, max_length=5, show_progress_bar=False)
    assert model.training
    assert model.max_seq_length == length
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("sentences", "more", "message"),
    [
        ([], {}, r"sentences holds 0 distinct text\(s\) in 0: give 4 or more"),
        (["one"], {}, r"sentences holds 1 distinct text\(s\) in 1: give 4 or more"),
        (["equal"] * 100, {}, r"sentences holds 1 distinct text\(s\) in 100: give 4 or more"),
        (CORPUS, {"labels": ["a"] * 5}, "There are 5 labels for 300 sentences: pass one each"),
        (CORPUS, {"batch_sizes": [32, 512]}, "batch_size=512 does not fit 300 sentences"),
        (CORPUS, {"batch_sizes": [1]}, "batch_size must be 2 or more, got 1"),
        (CORPUS, {"batch_sizes": []}, "batch_sizes is empty"),
        (CORPUS, {"batch_sizes": 32.5}, "batch_size must be a whole number, 0 or more, got 32.5"),
        (CORPUS, {"labels": [["a"]] * 300}, r"labels\[0\] is list \['a'\]: give a number or a text"),
        (CORPUS, {"sample": 2}, "sample=2 must be 4 to 50000"),
        (CORPUS, {"n_clusters": 200}, "n_clusters=200 does not fit 300 distinct sentences"),
    ],
)
def test_bad_input_is_one_clear_line(
    sentences: list[str], more: dict[str, Any], message: str, model: SentenceTransformer
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        audit(model, sentences, show_progress_bar=False, **more)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sizes", [32, [32], np.array([32, 32]), (32,)])
def test_one_batch_size_or_several(sizes: Any, model: SentenceTransformer) -> None:
    found = audit(model, CORPUS, sizes, n_clusters=8, show_progress_bar=False)
    assert [one.batch_size for one in found.negatives] == [32]


def test_labels_of_any_kind_and_gaps_in_them(model: SentenceTransformer) -> None:
    """A sentence without a label is no evidence of anything."""
    numbers = [len(text) % 3 for text in CORPUS]
    names = [f"class {number}" for number in numbers]

    def judged(labels: Any) -> tuple[float | None, float | None]:
        negatives = audit(model, CORPUS, 64, n_clusters=8, labels=labels, show_progress_bar=False).negatives[0]
        return negatives.precision, negatives.recall

    whole = judged(names)
    kinds = [numbers, torch.tensor(numbers), [torch.tensor(number) for number in numbers], np.array(names)]
    assert all(judged(labels) == whole for labels in kinds)
    gaps = [name if place % 2 else None for place, name in enumerate(names)]
    part = judged(gaps)
    assert part == judged([np.nan if name is None else name for name in gaps])
    assert part == judged([pd.NA if name is None else name for name in gaps])
    assert part == judged([-1 if name is None else number for name, number in zip(gaps, numbers, strict=True)])
    assert part == pytest.approx(whole, abs=0.15), "half of the pairs, not another class"


def test_a_handful_of_sentences_is_audited_as_one_batch(model: SentenceTransformer) -> None:
    found = audit(model, make_sentences(12), show_progress_bar=False)
    assert [one.batch_size for one in found.negatives] == [12]
    assert str(found)


# The command


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    from command_line import save_model

    return save_model(tmp_path_factory.mktemp("model"))


def test_the_command_prints_the_audit_and_keeps_a_record(saved: str, tmp_path: Path) -> None:
    table = tmp_path / "corpus.csv"
    table.write_text("\n".join(["text,topic", *(f"{text},{text.split()[0]}" for text in CORPUS)]))
    words = ["audit", table, "--model", saved, "--batch-size", 16, "--batch-size", 32, "--n-clusters", 8]
    words += ["--column", "text", "--label-column", "topic", "--output", tmp_path / "a new folder" / "audit.json"]
    code, output = cli(*words)
    assert code == 0, output
    assert "batch of 16 batch of 32" in output
    assert "precision by the labels" in output
    record = (tmp_path / "a new folder" / "audit.json").read_text()
    assert json.loads(record)["n_sentences"] == 300
    code, output = cli(*words)
    assert code == 2
    assert "exists already: choose another file" in output
    assert (tmp_path / "a new folder" / "audit.json").read_text() == record


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("", [], "is empty: it holds no sentence"),
        ("text,topic\nonly,a\n", ["--column", "text"], "sentences holds 1 distinct text(s) in 1: give 4 or more"),
        ("text,topic\na b,x\nc d,\n", ["--column", "text", "--label-column", "topic"], "has no value in line 3"),
        ("text,topic\na b,x\n", ["--label-column", "topic"], "label_column='topic' needs the column of the sentences"),
    ],
)
def test_the_command_says_in_a_line_what_is_wrong(
    content: str, more: list[str], message: str, saved: str, tmp_path: Path
) -> None:
    (tmp_path / "corpus.csv").write_text(content)
    code, output = cli("audit", tmp_path / "corpus.csv", "--model", saved, *more)
    assert code == 2
    assert message in output


@pytest.mark.slow
def test_intents_of_the_packaged_utterances_confirm_the_guess() -> None:
    from st_clusterns.training.quickstart import packaged_model

    texts, intents = load_utterances()
    [negatives] = audit(packaged_model(), texts, [128], labels=intents, show_progress_bar=False).negatives
    assert negatives.precision is not None
    assert negatives.recall is not None
    assert negatives.precision > 0.7
    assert negatives.recall > 0.35
    assert negatives.precision > 10 * false_negative_share(intents)
