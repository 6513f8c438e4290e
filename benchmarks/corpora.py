"""The corpora of the comparison: texts to train on, and how a model trained on them is measured.

Each measure goes through the metric of a library: V-measure of scikit-learn, accuracy under the best matching, the
evaluators of sentence-transformers for Spearman's correlation and mean average precision. Each distinct text is
embedded once for all evaluators of a corpus.

Data: a folder with `clustering/NAME.tsv.gz` (columns label, text), `sts/NAME.tsv.gz` (columns split, score, sentence1,
sentence2), `search/NAME/`, `askubuntu/` and `corpus/wiki_1m.txt.gz`; without it, Wikipedia and the STS sets come from
the hub.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    RerankingEvaluator,
)

from st_clusterns.clustering.vectors import Floats
from st_clusterns.columns import read_table
from st_clusterns.evaluation.scores import neighbour_purity, pair_average_precision, score_clustering
from st_clusterns.evaluation.search import Collection, read_collection, search_evaluator
from st_clusterns.evaluation.sts import SICK, STS_TESTS, check_pairs, find_sts_file, load_sts, read_pairs

CLUSTERING = ("StackOverflow", "SearchSnippets", "Biomedical", "AgNews8000", "Clinc150")
SEARCH = ("cranfield", "npl")
# A clustering set, some of its classes, or the set with one half for training and the other for scoring.
PART = re.compile(rf"({'|'.join(CLUSTERING)})(?: classes (\d+)-(\d+)|( held out))?")
SEVEN = tuple(test.file for test in STS_TESTS.values())
SICK_PAIRS = 9927  # mteb scores the pairs of all splits
WIKI_ON_HUB = "hf://datasets/princeton-nlp/datasets-for-simcse/wiki1m_for_simcse.txt"
SOURCES = {
    "clustering": "StackOverflow, SearchSnippets, Biomedical: github.com/jacoxu/STC2; Clinc150: clinc/oos-eval there; "
    "AgNews8000: 8,000 titles of AG News chosen by Rakib et al. (2020), as SCCL scores them",
    "search": "Cranfield and NPL: ir.dcs.gla.ac.uk/resources/test_collections",
    "askubuntu": "the titles, and queries with candidates: github.com/taolei87/askubuntu",
}

Embed = Callable[[Sequence[str]], Floats]
Scores = dict[str, float]


@dataclass(frozen=True)
class Corpus:
    """Texts to train on, and the measure of a model, given as a function that embeds; only it knows labels."""

    texts: list[str]
    score: Callable[[Embed], Scores]


@dataclass(frozen=True)
class Column:
    """One number of a corpus in the tables."""

    title: str
    corpus: str
    score: str


def columns(corpus: str) -> list[Column]:
    """Return the columns that a corpus has in the main table."""
    if corpus.startswith("wiki"):
        return [Column(f"{corpus}: STS-B dev", corpus, "sts_dev"), Column(f"{corpus}: 7 STS", corpus, "sts_mean")]
    if corpus == "AskUbuntu":
        return [Column("AskUbuntu: MAP", corpus, "map")]
    if corpus in SEARCH:
        return [Column(f"{corpus}: nDCG@10", corpus, "ndcg")]
    return [Column(f"{corpus}: V", corpus, "v_measure")]


def load(name: str, data: Path | None, limit: int | None = None, restarts: int = 10) -> Corpus:
    """Load a corpus and its measure.

    Args:
        name: one of `CLUSTERING`, of `SEARCH`, "AskUbuntu", or "wikiN" for the first N Wikipedia sentences.
            "StackOverflow classes 1-5" is the part of a clustering set that has these classes, "StackOverflow held out"
            the set of which a random half is for training and the other half for scoring.
        data: the data folder; without it, the hub.
        limit: of the texts, and of each evaluation set, at most as many rows, evenly spaced.
        restarts: k-means runs of a clustering score.
    """
    if name.startswith("wiki"):
        texts = read_wiki(int(name.removeprefix("wiki")), data)
        pairs = {"sts_dev": _thin(_sts("STSB", data, "dev"), limit)}
        pairs |= {test: _thin(_sts(test, data), limit) for test in SEVEN}
        return Corpus(_thin(texts, limit), lambda embed: score_sts(pairs, embed))
    if name == "AskUbuntu":
        folder = _local(data, "askubuntu")
        texts = _lines(folder / "titles_unlabelled.txt.gz")
        queries = _thin([json.loads(line) for line in _lines(folder / "derived_rerank_dev.jsonl.gz")], limit)
        return Corpus(_thin(texts, limit), lambda embed: score_reranking(queries, embed))
    if name in SEARCH:
        return load_search(_local(data, "search") / name, limit)
    part = PART.fullmatch(name)
    if part is None:
        raise SystemExit(f"There is no corpus {name!r}: choose {', '.join(CLUSTERING + SEARCH)}, AskUbuntu or wikiN.")
    whole, first, last, held_out = part.groups()
    rows = list(zip(*load_classes(whole, data), strict=True))
    if first is not None:
        rows = [(text, label) for text, label in rows if int(first) <= int(label) <= int(last)]
    rows = _thin(rows, limit)
    training = rows
    if held_out:  # of the distinct texts: copies of a text fall on one side
        distinct = list(dict.fromkeys(text for text, _ in rows))
        order = np.random.default_rng(0).permutation(len(distinct))
        chosen = {distinct[place] for place in order[: len(order) // 2]}
        training, rows = ([row for row in rows if (row[0] in chosen) == half] for half in (True, False))
    texts, classes = (list(column) for column in zip(*rows, strict=True))
    return Corpus([text for text, _ in training], lambda embed: score_classes(embed(texts), classes, restarts))


def load_classes(name: str, data: Path | None) -> tuple[list[str], list[str]]:
    """Return the texts and the classes of a clustering set."""
    table = read_table(_local(data, "clustering") / f"{name}.tsv.gz", ("text", "label"))
    return table["text"], table["label"]


def is_clustering(name: str) -> bool:
    """Whether a corpus is a clustering set, or a part of one."""
    return PART.fullmatch(name) is not None


def score_classes(embeddings: Floats, classes: list[str], restarts: int) -> Scores:
    """Return the scores of k-means with the true number of classes, and those of neighbours and of pairs."""
    return {
        **score_clustering(embeddings, classes, restarts),
        "neighbour_purity": neighbour_purity(embeddings, classes),
        "pair_average_precision": pair_average_precision(embeddings, classes, n_rows=5_000),
    }


def load_search(folder: Path, limit: int | None = None) -> Corpus:
    """Load a collection for search: documents to train on, queries with relevant documents to score.

    A limit holds for the training texts and the queries: the search goes through all documents.
    """
    whole = read_collection(folder)
    collection = replace(whole, queries=dict(_thin(list(whole.queries.items()), limit)))
    return Corpus(_thin(list(whole.documents.values()), limit), lambda embed: score_search(collection, embed))


def score_search(collection: Collection, embed: Embed) -> Scores:
    """Return nDCG@10, MAP@100 and recall@100 (x100)."""
    evaluator = search_evaluator(collection, "")
    found = evaluator(Known(embed, [*collection.queries.values(), *collection.documents.values()]))
    names = {"ndcg": "cosine_ndcg@10", "map": "cosine_map@100", "recall": "cosine_recall@100"}
    return {name: 100 * float(found[key]) for name, key in names.items()}


def score_sts(pairs: dict[str, list[dict[str, Any]]], embed: Embed) -> Scores:
    """Return Spearman's correlation (x100) of cosine and gold score per set, and the mean of the seven tests."""
    known = Known(embed, [row[side] for rows in pairs.values() for row in rows for side in ("sentence1", "sentence2")])
    scores = {}
    for name, rows in pairs.items():
        first, second, gold = ([row[field] for row in rows] for field in ("sentence1", "sentence2", "score"))
        evaluator = EmbeddingSimilarityEvaluator(
            first, second, [float(g) for g in gold], similarity_fn_names=["cosine"]
        )
        scores[name] = 100 * float(evaluator(known)["spearman_cosine"])
    return {**scores, "sts_mean": float(np.mean([scores[test] for test in SEVEN]))}


def score_reranking(queries: list[dict[str, Any]], embed: Embed) -> Scores:
    """Return mean average precision (x100)."""
    texts = [text for q in queries for text in (q["query"], *q["positive"], *q["negative"])]
    return {"map": 100 * float(RerankingEvaluator(queries, write_csv=False)(Known(embed, texts))["map"])}


class Known:
    """Stands in for the model in an evaluator: hands out embeddings that were made once for each distinct text."""

    similarity_fn_name = "cosine"
    model_card_data = SimpleNamespace(set_evaluation_metrics=lambda *_: None)

    def __init__(self, embed: Embed, texts: Sequence[str]) -> None:
        self.place = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        self.rows = embed(list(self.place))

    def encode(self, texts: Sequence[str], convert_to_tensor: bool = False, **_: Any) -> Any:
        rows = self.rows[[self.place[text] for text in texts]]
        return torch.tensor(rows) if convert_to_tensor else rows

    encode_query = encode_document = encode


def _sts(file: str, data: Path | None, split: str = "test") -> list[dict[str, Any]]:
    """Read one split of a test, as mteb scores it."""
    name = next(name for name, test in STS_TESTS.items() if test.file == file)
    if name != SICK:
        return list(load_sts(name, split, data))
    test = STS_TESTS[SICK]
    if data is None:
        pairs = load_dataset(test.path, revision=test.revision, split="test")
    else:
        pairs = read_pairs(find_sts_file(SICK, data), None)
    check_pairs(name, len(pairs), SICK_PAIRS, data or test.path)
    return list(pairs)


def read_wiki(count: int, data: Path | None) -> list[str]:
    """Return the first sentences of Wikipedia."""
    if data is None:
        return list(load_dataset("text", data_files=WIKI_ON_HUB, split=f"train[:{count}]")["text"])
    return _lines(data / "corpus" / "wiki_1m.txt.gz", count)


def _local(data: Path | None, part: str) -> Path:
    if data is None:
        raise SystemExit(f"{part} has no canonical copy on the hub: pass --data-dir. Sources: {SOURCES[part]}.")
    return data / part


def _lines(path: Path, count: int | None = None) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.strip() for line, _ in zip(file, range(count or 10**9), strict=False)]


def _thin(rows: list[Any], limit: int | None) -> list[Any]:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[place * len(rows) // limit] for place in range(limit)]
