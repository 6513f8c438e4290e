"""Measures of embeddings, most of them with known classes: for evaluation only, never for training.

Mean cosines are exact over all pairs without looking at each: the cosines of unit vectors x_1 ... x_N, a vector with
itself included, sum to |x_1 + ... + x_N|^2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.metrics import average_precision_score, normalized_mutual_info_score, v_measure_score
from sklearn.metrics.cluster import contingency_matrix

from st_clusterns.clustering.vectors import Ints, unit_rows

UNIFORMITY_ROWS = 5_000  # rows whose pairs `uniformity` looks at, at most
PAIR_BLOCK = 512  # rows that are compared with all others at a time


def score_clustering(
    embeddings: npt.ArrayLike, classes: npt.ArrayLike, restarts: int = 3, seed: int = 0
) -> dict[str, float]:
    """Cluster by k-means with the true number of classes, and compare clusters with classes.

    `embeddings` are (N, D), `classes` (N,). Each of the `restarts` runs has one random start. `seed` is the seed of the
    first run; each further run adds one. Returns, all times 100, means over the runs: `v_measure`; `nmi`, normalised by
    the geometric mean of the entropies (the V-measure uses the arithmetic mean); `accuracy` as in `matched_accuracy`.
    `v_measure_best`, `nmi_best` and `accuracy_best` are the scores of the run with the lowest inertia.
    """
    rows, truth = unit_rows(embeddings), _numbered(classes)
    runs = [KMeans(int(truth.max()) + 1, n_init=1, random_state=seed + run).fit(rows) for run in range(restarts)]
    scores = {
        "v_measure": [v_measure_score(truth, run.labels_) for run in runs],
        "nmi": [normalized_mutual_info_score(truth, run.labels_, average_method="geometric") for run in runs],
        "accuracy": [matched_accuracy(truth, run.labels_) for run in runs],
    }
    best = int(np.argmin([run.inertia_ for run in runs]))
    means = {name: 100 * float(np.mean(values)) for name, values in scores.items()}
    return means | {f"{name}_best": 100 * float(values[best]) for name, values in scores.items()}


def matched_accuracy(truth: npt.ArrayLike, ids: npt.ArrayLike) -> float:
    """Return the accuracy under the best one-to-one matching of clusters to classes, 0 to 1."""
    table = contingency_matrix(truth, ids)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / table.sum())


def neighbour_purity(embeddings: npt.ArrayLike, classes: npt.ArrayLike, n_neighbours: int = 10) -> float:
    """Return the share, times 100, of each row's nearest neighbours by cosine that have the row's class.

    `embeddings` are (N, D), `classes` (N,); a row is not its own neighbour. Raises a ValueError if there are fewer than
    `n_neighbours` other rows.
    """
    rows, groups = unit_rows(embeddings), _numbered(classes)
    if not 1 <= n_neighbours < len(rows):
        raise ValueError(f"n_neighbours={n_neighbours} does not fit {len(rows)} rows: choose 1 to {len(rows) - 1}.")
    same = 0
    for start in range(0, len(rows), PAIR_BLOCK):
        cosines = rows[start : start + PAIR_BLOCK] @ rows.T
        own = np.arange(len(cosines))
        cosines[own, start + own] = -np.inf
        neighbours = np.argpartition(cosines, -n_neighbours, axis=1)[:, -n_neighbours:]
        same += int((groups[neighbours] == groups[start + own, None]).sum())
    return 100 * same / (len(rows) * n_neighbours)


def pair_average_precision(
    embeddings: npt.ArrayLike, classes: npt.ArrayLike, seed: int = 0, n_rows: int = 2_000
) -> float:
    """Return the average precision, times 100, of the pairs of one class among all pairs of rows, sorted by cosine.

    It says how well one threshold finds duplicates of a kind. Chance is the share of pairs that are of one class.
    `embeddings` are (N, D), `classes` (N,). If there are more than `n_rows`, a random sample of so many is used; 5,000
    take 1 GB. NaN if no two of them are of one class.
    """
    rows, groups = unit_rows(embeddings), _numbered(classes)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:n_rows]
    first, second = np.triu_indices(len(chosen), 1)
    same = groups[chosen[first]] == groups[chosen[second]]
    if not same.any():
        return float("nan")
    cosines = (rows[chosen] @ rows[chosen].T)[first, second]
    return 100 * float(average_precision_score(same, cosines))


def alignment(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Return the mean squared distance of pairs of rows, (N, D) each; 0 is perfect (Wang and Isola 2020, alpha = 2)."""
    return float(np.square(unit_rows(first) - unit_rows(second)).sum(axis=1).mean())


def uniformity(embeddings: npt.ArrayLike, seed: int = 0) -> float:
    """Return the log of the mean of exp(-2 * squared distance) over all pairs; lower is more uniform.

    Wang and Isola (2020), t = 2. If there are more than 5,000 rows, a random sample of 5,000 is used.
    """
    rows = unit_rows(embeddings)
    rows = rows[np.random.default_rng(seed).permutation(len(rows))[:UNIFORMITY_ROWS]]
    starts = range(0, len(rows), PAIR_BLOCK)
    total = sum(np.exp(4 * (rows[i : i + PAIR_BLOCK] @ rows.T) - 4).sum(dtype=np.float64) for i in starts)
    return float(np.log((total - len(rows)) / (len(rows) * (len(rows) - 1))))  # without each row and itself


def mean_cosine(embeddings: npt.ArrayLike, classes: npt.ArrayLike | None = None) -> float:
    """Return the mean cosine of any two rows (anisotropy): 0 if directions are spread evenly.

    With `classes`, only pairs of one class count; the result is NaN if no class has two rows.
    """
    rows = unit_rows(embeddings)
    groups = np.zeros(len(rows), dtype=np.int64) if classes is None else _numbered(classes)
    pairs = _pairs_of_one_class(groups)
    sums = csr_matrix((np.ones(len(rows)), (groups, np.arange(len(rows))))) @ rows  # one row per class
    own = np.square(rows).sum(dtype=np.float64)
    return float((np.square(sums).sum() - own) / pairs) if pairs else float("nan")


def false_negative_share(classes: npt.ArrayLike, counted: npt.ArrayLike | None = None) -> float:
    """Return the expected share of a row's in-batch negatives that have its class, 0 to 1, whatever the batch size.

    `counted`, (N,) of bool, says which rows have a class at all; the others are negatives of all rows.
    """
    groups = _numbered(classes)
    inside = groups if counted is None else groups[np.asarray(counted)]
    return _pairs_of_one_class(inside) / (len(groups) * (len(groups) - 1))


def describe_classes(embeddings: npt.ArrayLike, classes: npt.ArrayLike) -> dict[str, float]:
    """Return `alignment` (of all pairs of one class), `uniformity`, `mean_cosine` and `false_negative_share`."""
    return {
        "alignment": 2 - 2 * mean_cosine(embeddings, classes),
        "uniformity": uniformity(embeddings),
        "mean_cosine": mean_cosine(embeddings),
        "false_negative_share": false_negative_share(classes),
    }


def _numbered(classes: npt.ArrayLike) -> Ints:
    ids: Ints = np.unique(np.asarray(classes), return_inverse=True)[1]
    return ids


def _pairs_of_one_class(groups: Ints) -> int:
    sizes = np.bincount(groups)
    return int((sizes * (sizes - 1)).sum())
