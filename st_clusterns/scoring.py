"""How well embeddings cluster, against known classes: for measuring only, never for training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import v_measure_score
from sklearn.metrics.cluster import contingency_matrix

from st_clusterns.corpus import unit_rows


def score_clustering(
    embeddings: npt.ArrayLike, classes: Sequence[object], restarts: int = 3, seed: int = 0
) -> dict[str, float]:
    """Cluster by k-means with the true number of classes and compare.

    Args:
        embeddings: one row a text, (N, D).
        classes: the true class of each text, (N,).
        restarts: k-means runs, each with one random start; the scores are their means.
        seed: of the first run; the others count on.

    Returns:
        `v_measure` and `accuracy` (under the best matching of clusters to classes), both times 100.
    """
    rows = unit_rows(embeddings)
    truth = np.unique(np.asarray(classes, dtype=str), return_inverse=True)[1]
    found = [
        KMeans(int(truth.max()) + 1, n_init=1, random_state=seed + run).fit_predict(rows) for run in range(restarts)
    ]
    return {
        "v_measure": 100 * float(np.mean([v_measure_score(truth, ids) for ids in found])),
        "accuracy": 100 * float(np.mean([matched_accuracy(truth, ids) for ids in found])),
    }


def matched_accuracy(truth: npt.ArrayLike, ids: npt.ArrayLike) -> float:
    """Return the accuracy under the best one-to-one matching of clusters to classes."""
    table = contingency_matrix(truth, ids)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / table.sum())
