"""How far the clusters of a corpus can be trusted, measured without labels.

Whether "same cluster" also means "same topic" differs from corpus to corpus. *Prediction strength* (Tibshirani &
Walther 2005) measures it: split the sentences into two halves, cluster each half on its own, and ask which share of the
pairs in a cluster of one half the centroids of the other half put together as well. Corrected for chance, this share is
the cluster's *trust*: 1 if the pairs always stay together, 0 if they do so no more often than any two sentences.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from st_clusterns.clustering.kmeans import kmeans, nearest
from st_clusterns.clustering.vectors import Floats, Ints

TRUST_ROWS = 10_000  # rows on which trust is measured
SPLITS = 2  # splits into halves that a corpus's mean trust is averaged over


def mean_trust(rows: Floats, n_clusters: int, seed: int = 0) -> float:
    """Return the mean trust over sentences if they are put into `n_clusters` clusters, 0 to 1.

    Of the unit vectors, (N, D), at most 10,000 are used.
    """
    trusts = []
    for first, second in _halves(len(rows), seed, SPLITS):
        centroids = [kmeans(rows[half], min(n_clusters, len(half)), seed) for half in (first, second)]
        for half, own, judge in ((first, centroids[0], centroids[1]), (second, centroids[1], centroids[0])):
            ids = nearest(rows[half], own)
            trust = _share(*_pairs(ids, nearest(rows[half], judge), n_clusters))
            trusts.append(float(trust[ids].mean()))
    return float(np.mean(trusts))


def cluster_trust(rows: Floats, ids: Ints, n_clusters: int, seed: int = 0) -> Floats:
    """Return the trust of each cluster, 0 to 1, (K,); 0 for a cluster of which no pair was seen.

    Of the unit vectors, (N, D), with the clusters `ids`, (N,), at most 10,000 are used.
    """
    [(first, second)] = _halves(len(rows), seed, 1)
    others = np.empty(len(rows), dtype=np.int64)
    for half, judge in ((first, second), (second, first)):
        others[half] = nearest(rows[half], kmeans(rows[judge], min(n_clusters, len(judge)), seed))
    tables = [_pairs(ids[half], others[half], n_clusters) for half in (first, second)]
    together, expected, pairs = (sum(values) for values in zip(*tables, strict=True))
    return _share(together, expected, pairs)


def _halves(n_rows: int, seed: int, splits: int) -> Iterator[tuple[Ints, Ints]]:
    generator = np.random.default_rng(seed)
    for _ in range(splits):
        order = generator.permutation(n_rows)[:TRUST_ROWS]
        middle = len(order) // 2
        yield order[:middle], order[middle:]


def _pairs(ids: Ints, others: Ints, n_clusters: int) -> tuple[Floats, Floats, Floats]:
    """Count, for each cluster, its pairs that `others` puts together, those expected by chance, and all: each (K,)."""
    table = np.zeros((n_clusters, n_clusters))  # [cluster, cluster according to `others`]
    np.add.at(table, (ids, others), 1)
    sizes = table.sum(axis=1)
    pairs = sizes * (sizes - 1)
    chance = float(((table.sum(axis=0) / len(ids)) ** 2).sum())
    return (table * (table - 1)).sum(axis=1), chance * pairs, pairs


def _share(together: Floats, expected: Floats, pairs: Floats) -> Floats:
    strength = (together - expected) / np.maximum(pairs - expected, 1e-9)
    return np.where(pairs > 0, strength, 0).clip(0, 1).astype(np.float32)
