"""The corpora of the comparison: texts to train on, and how a model trained on them is measured.

Each measure goes through the metric of a library: V-measure of scikit-learn, accuracy under the best matching, the
evaluators of sentence-transformers for Spearman's correlation and mean average precision. Each distinct text is
embedded once for all evaluators of a corpus.

Data: a folder with `clustering/NAME.tsv.gz` (columns label, text), `sts/NAME.tsv.gz` (columns split, score, sentence1,
sentence2), `askubuntu/` and `corpus/wiki_1m.txt.gz`; without it, Wikipedia and the STS sets come from the hub.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator, RerankingEvaluator
from st_clusterns.rows import Floats
from st_clusterns.scoring import score_clustering
from st_clusterns.sts import SICK, STS_TESTS, check_pairs, find_sts_file, load_sts, read_pairs, read_table

CLUSTERING = ("StackOverflow", "SearchSnippets", "Biomedical", "AgNews8000")
PART = re.compile(rf"({'|'.join(CLUSTERING)})(?: classes (\d+)-(\d+))?")  # a clustering set, or some of its classes
SEVEN = tuple(test.file for test in STS_TESTS.values())
SICK_PAIRS = 9927  # mteb scores the pairs of all splits
WIKI_ON_HUB = "hf://datasets/princeton-nlp/datasets-for-simcse/wiki1m_for_simcse.txt"
SOURCES = {
    "clustering": "StackOverflow, SearchSnippets and Biomedical: github.com/jacoxu/STC2",
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
    """One number of a corpus in the tables; `accuracy` stands beside it in brackets if the corpus has one."""

    title: str
    corpus: str
    score: str


def columns(corpus: str) -> list[Column]:
    """Return the columns that a corpus has in the main table."""
    if corpus.startswith("wiki"):
        return [Column(f"{corpus}: STS-B dev", corpus, "sts_dev"), Column(f"{corpus}: 7 STS", corpus, "sts_mean")]
    if corpus == "AskUbuntu":
        return [Column("AskUbuntu: MAP", corpus, "map")]
    return [Column(f"{corpus}: V", corpus, "v_measure")]


def load(name: str, data: Path | None, limit: int | None = None, restarts: int = 10) -> Corpus:
    """Load a corpus and its measure.

    Args:
        name: one of `CLUSTERING`, "AskUbuntu", or "wikiN" for the first N Wikipedia sentences. "StackOverflow classes
            1-5" is the part of a clustering set that has these classes.
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
    part = PART.fullmatch(name)
    if part is None:
        raise SystemExit(f"There is no corpus {name!r}: choose {', '.join(CLUSTERING)}, AskUbuntu or wikiN.")
    whole, first, last = part.groups()
    table = read_table(_local(data, "clustering") / f"{whole}.tsv.gz", ("text", "label"))
    rows = list(zip(table["text"], table["label"], strict=True))
    if first is not None:
        rows = [(text, label) for text, label in rows if int(first) <= int(label) <= int(last)]
    texts, classes = (list(column) for column in zip(*_thin(rows, limit), strict=True))
    return Corpus(texts, lambda embed: score_clustering(embed(texts), classes, restarts))


def is_clustering(name: str) -> bool:
    """Whether a corpus is a clustering set, or a part of one."""
    return PART.fullmatch(name) is not None


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
