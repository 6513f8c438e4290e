"""A labelled table judges a model: by its columns, against scores written differently, and never in training."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sklearn.cluster import KMeans
from sklearn.metrics import average_precision_score, v_measure_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from tiny_bert import make_sentences

from st_clusterns.evaluation.labelled import ClassEvaluator, read_evaluator

TEXTS = list(dict.fromkeys(make_sentences(60)))
CLASSES = [text.split()[0][:2] for text in TEXTS]


def save_table(path: Path, **columns: list[object]) -> Path:
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join("\t".join(map(str, row)) for row in [tuple(columns), *rows]))
    return path


def test_classes_against_scikit_learn(model: SentenceTransformer, tmp_path: Path) -> None:
    table = save_table(tmp_path / "tickets.tsv", number=list(range(len(TEXTS))), label=CLASSES, text=TEXTS)
    evaluator = read_evaluator(table)
    assert evaluator.primary_metric == "tickets_v_measure"
    model.train()
    found = evaluator(model)
    assert model.training
    rows = normalize(model.encode(TEXTS))
    runs = [KMeans(len(set(CLASSES)), n_init=1, random_state=seed).fit_predict(rows) for seed in range(3)]
    assert found["tickets_v_measure"] == pytest.approx(np.mean([v_measure_score(CLASSES, run) for run in runs]))
    near = NearestNeighbors(n_neighbors=11).fit(rows).kneighbors(rows, return_distance=False)
    same = [CLASSES[other] == CLASSES[row] for row, others in enumerate(near) for other in others if other != row]
    assert found["tickets_neighbour_purity"] == pytest.approx(np.mean(same), abs=0.01)
    upper = np.triu_indices(len(TEXTS), 1)
    together = np.equal.outer(CLASSES, CLASSES)[upper]
    expected = average_precision_score(together, (rows @ rows.T)[upper])
    assert found["tickets_pair_average_precision"] == pytest.approx(expected, abs=1e-3)  # near ties round
    assert 0 < found["tickets_accuracy"] <= 1


def test_pairs_against_scipy(model: SentenceTransformer, tmp_path: Path) -> None:
    first, second, scores = TEXTS[:20], TEXTS[20:40], [row / 7 for row in range(20)]
    table = save_table(tmp_path / "gold.csv", sentence1=first, sentence2=second, score=scores)
    table.write_text(table.read_text().replace("\t", ","))
    found = read_evaluator(table)(model)
    one, two = (normalize(model.encode(side)) for side in (first, second))
    assert found["gold_spearman_cosine"] == pytest.approx(spearmanr((one * two).sum(axis=1), scores).statistic)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text": TEXTS, "class": CLASSES},
            r"has the columns 'text', 'class': give either label and text, or sentence1",
        ),
        ({"label": ["a"] * len(TEXTS), "text": TEXTS}, r"gold\.tsv': 60 texts have 1 distinct classes"),
        ({"label": list(range(len(TEXTS))), "text": TEXTS}, r"60 texts have 60 distinct classes"),
        ({"sentence1": TEXTS, "sentence2": TEXTS, "score": ["a"] * 60}, r"holds a score that is no number"),
        ({"sentence1": TEXTS, "sentence2": TEXTS, "score": [1] * 60}, r"has one score only"),
        (
            {"label": CLASSES, "text": TEXTS, "sentence1": TEXTS, "sentence2": TEXTS, "score": [1] * 60},
            r"give either label and text, or",
        ),
    ],
)
def test_tables_that_cannot_be_scored(columns: dict[str, list[object]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_evaluator(save_table(tmp_path / "gold.tsv", **columns))


def test_texts_without_a_class_each() -> None:
    with pytest.raises(ValueError, match=re.escape("There are 60 texts and 2 classes")):
        ClassEvaluator(TEXTS, ["a", "b"])
