"""Measures of embeddings, most of them against known classes: for measuring only, never for training.

Mean cosines and what follows from them are exact over all pairs: the cosines of unit vectors x_1 ... x_N sum to
|x_1 + ... + x_N|^2 - N, so no pair has to be looked at.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score, v_measure_score
from sklearn.metrics.cluster import contingency_matrix

from st_clusterns.clustering.vectors import BLOCK, unit_rows

PERCENTAGES = ("v_measure", "nmi", "accuracy")  # of score_clustering
MEASURES = ("alignment", "uniformity", "mean_cosine", "false_negative_share")  # of describe_classes
UNIFORMITY_ROWS = 5_000  # the one measure that looks at all pairs does so of at most so many rows


def score_clustering(
    embeddings: npt.ArrayLike, classes: npt.ArrayLike, restarts: int = 3, seed: int = 0
) -> dict[str, float]:
    """Cluster by k-means with the true number of classes and compare.

    Args:
        embeddings: one row a text, (N, D).
        classes: the true class of each text, (N,).
        restarts: k-means runs, each with one random start; the scores are their means.
        seed: of the first run; the others count on.

    Returns:
        `v_measure`, `nmi` (mutual information over the geometric mean of the entropies, as the short-text literature
        has it; with the arithmetic mean it would be the V-measure) and `accuracy` (under the best matching of clusters
        to classes), all times 100.
    """
    rows = unit_rows(embeddings)
    truth = _numbered(classes)
    found = [
        KMeans(int(truth.max()) + 1, n_init=1, random_state=seed + run).fit_predict(rows) for run in range(restarts)
    ]
    return {
        "v_measure": 100 * float(np.mean([v_measure_score(truth, ids) for ids in found])),
        "nmi": 100
        * float(np.mean([normalized_mutual_info_score(truth, ids, average_method="geometric") for ids in found])),
        "accuracy": 100 * float(np.mean([matched_accuracy(truth, ids) for ids in found])),
    }


def matched_accuracy(truth: npt.ArrayLike, ids: npt.ArrayLike) -> float:
    """Return the accuracy under the best one-to-one matching of clusters to classes."""
    table = contingency_matrix(truth, ids)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / table.sum())


def alignment(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Return the mean squared distance of pairs that mean the same; 0 is perfect (Wang and Isola 2020, alpha = 2).

    Args:
        first: one embedding of each pair, (N, D).
        second: the other, (N, D).
    """
    return float(np.square(unit_rows(first) - unit_rows(second)).sum(axis=1).mean())


def uniformity(embeddings: npt.ArrayLike, seed: int = 0) -> float:
    """Return the log of the mean of exp(-2 * squared distance) over all pairs; lower is more uniform.

    Wang and Isola (2020), t = 2.

    Args:
        embeddings: one row a text, (N, D); at most 5,000 of them are used.
        seed: of the choice among more.
    """
    rows = unit_rows(embeddings)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:UNIFORMITY_ROWS]
    rows = rows[chosen if len(rows) > UNIFORMITY_ROWS else slice(None)]
    blocks = (np.exp(4 * (rows[i : i + 1024] @ rows.T) - 4).sum(dtype=np.float64) for i in range(0, len(rows), 1024))
    pairs = len(rows) * (len(rows) - 1)
    return float(np.log((sum(blocks) - len(rows)) / pairs))  # a row and itself, at distance 0, is no pair


def mean_cosine(embeddings: npt.ArrayLike, classes: npt.ArrayLike | None = None) -> float:
    """Return the mean cosine of any two rows: the anisotropy, 0 for directions that point everywhere.

    Args:
        embeddings: one row a text, (N, D).
        classes: if given, only pairs of one class count, (N,); NaN if no class has two rows.
    """
    rows = unit_rows(embeddings)
    groups = np.zeros(len(rows), dtype=np.int64) if classes is None else _numbered(classes)
    pairs, squares = _pairs_of_one_class(groups), 0.0
    sums = np.zeros((int(groups.max()) + 1, rows.shape[1]))
    for start in range(0, len(rows), BLOCK):
        block, members = rows[start : start + BLOCK], groups[start : start + BLOCK]
        sums += csr_matrix((np.ones(len(block)), (members, np.arange(len(block)))), (len(sums), len(block))) @ block
        squares += float(np.square(block).sum(dtype=np.float64))
    return float((np.square(sums).sum() - squares) / pairs) if pairs else float("nan")


def false_negative_share(classes: npt.ArrayLike) -> float:
    """Return the share of a row's in-batch negatives that have its own class, expected over random batches.

    It does not depend on the batch size: any two rows of a random batch are a random pair.
    """
    groups = _numbered(classes)
    return _pairs_of_one_class(groups) / (len(groups) * (len(groups) - 1))


def describe_classes(embeddings: npt.ArrayLike, classes: npt.ArrayLike) -> dict[str, float]:
    """Describe embeddings of classified texts.

    Returns:
        `alignment` (of all pairs of one class), `uniformity`, `mean_cosine` and `false_negative_share`.
    """
    return {
        "alignment": 2 - 2 * mean_cosine(embeddings, classes),
        "uniformity": uniformity(embeddings),
        "mean_cosine": mean_cosine(embeddings),
        "false_negative_share": false_negative_share(classes),
    }


def _numbered(classes: npt.ArrayLike) -> npt.NDArray[np.int64]:
    array = np.asarray(classes)
    numbers: npt.NDArray[np.int64] = np.unique(
        array if array.dtype.kind in "iu" else array.astype(str), return_inverse=True
    )[1]
    return numbers


def _pairs_of_one_class(groups: npt.NDArray[np.int64]) -> int:
    sizes = np.bincount(groups)
    return int((sizes * (sizes - 1)).sum())
