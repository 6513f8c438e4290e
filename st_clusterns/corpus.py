"""Cluster a whole corpus, and measure how far its clusters are to be trusted.

k-means on unit vectors (scikit-learn) gives the clusters. Whether "same cluster" also means "same meaning" differs
from corpus to corpus: on short texts about a few things it nearly does, on encyclopaedia sentences it does not.
That is measured, without labels, by *prediction strength* (Tibshirani & Walther 2005): split the sentences in two
halves, cluster one half on its own, and ask which share of a cluster's pairs in the other half this independent
clustering puts together as well. Corrected for chance, this share is the cluster's *trust*: 1 if the pairs always
stay together, 0 if they do so no more often than any two sentences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.preprocessing import normalize

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FULL_KMEANS_ROWS = 50_000  # above this many rows, mini-batch k-means: the same quality in a fraction of the time
TRUSTED = 0.5  # from here on a pair of one cluster is more likely than not to stay together
TRUST_ROWS = 10_000  # rows on which prediction strength is measured; its standard error is below 0.01 then


@dataclass(frozen=True)
class CorpusClusters:
    """The clusters of a corpus of `N` sentences.

    Attributes:
        ids: the cluster of each sentence, 0 to K-1, (N,).
        centroids: the mean of each cluster's unit vectors, (K, D).
        trust: how far each cluster is to be trusted, 0 to 1, (K,).
    """

    ids: Ints
    centroids: Floats
    trust: Floats

    @property
    def n_clusters(self) -> int:
        """The number of clusters `K`."""
        return len(self.centroids)

    @property
    def sizes(self) -> Ints:
        """The number of sentences in each cluster, (K,)."""
        return np.bincount(self.ids, minlength=self.n_clusters)


def cluster_corpus(embeddings: npt.ArrayLike, n_clusters: int | None = None, seed: int = 0) -> CorpusClusters:
    """Cluster a corpus by k-means on unit vectors and measure each cluster's trust.

    Args:
        embeddings: one row a sentence, (N, D); they are normalised here.
        n_clusters: number of clusters `K`; `choose_n_clusters` decides without it.
        seed: of every random choice.

    Raises:
        ValueError: if there are fewer than 4 rows, fewer rows than 2 a cluster, or a value is not finite.
    """
    rows = unit_rows(embeddings)
    if n_clusters is None:
        n_clusters = choose_n_clusters(rows, seed)
    if not 2 <= n_clusters <= len(rows) // 2:
        raise ValueError(
            f"n_clusters={n_clusters} does not fit {len(rows)} sentences: choose 2 to {max(2, len(rows) // 2)}, so "
            "that a cluster has two sentences on average, or leave it out."
        )
    centroids = _kmeans(rows, n_clusters, seed)
    ids = nearest(rows, centroids)
    return CorpusClusters(ids, _means(rows, ids, centroids), cluster_trust(rows, ids, n_clusters, seed))


def choose_n_clusters(rows: Floats, seed: int = 0) -> int:
    """Choose the number of clusters: the most that still repeat on other sentences.

    The largest K of a geometric grid (16, 24, 32, 48, ... with 20 sentences a cluster or more) whose mean trust over
    the sentences is at least one half: a pair of one cluster is then more likely than not to stay together. A corpus
    without such a K is not made of clusters; it gets the finest of the grid, where "same cluster" claims the least.

    Args:
        rows: unit vectors, (N, D).
        seed: of every random choice.
    """
    sample = rows[np.random.default_rng(seed).permutation(len(rows))[:TRUST_ROWS]]
    grid = [k for power in range(4, 9) for k in (2**power, 2**power * 3 // 2) if k * 20 <= len(sample)] or [2]
    for n_clusters in reversed(grid):
        ids = nearest(sample, _kmeans(sample, n_clusters, seed))
        if cluster_trust(sample, ids, n_clusters, seed)[ids].mean() >= TRUSTED:
            return n_clusters
    return grid[-1]


def cluster_trust(rows: Floats, ids: Ints, n_clusters: int, seed: int = 0, splits: int = 2) -> Floats:
    """Measure the prediction strength of each cluster, corrected for chance.

    Args:
        rows: unit vectors, (N, D); at most 10,000 of them are used.
        ids: the cluster of each row, (N,).
        n_clusters: number of clusters `K`.
        seed: of every random choice.
        splits: number of times that the rows are split into two halves.

    Returns:
        The trust of each cluster, 0 to 1, (K,); 0 for a cluster of which no pair was seen.
    """
    together, expected, pairs = np.zeros(n_clusters), np.zeros(n_clusters), np.zeros(n_clusters)
    for judged, judges in _halves(len(rows), seed, splits):
        others = nearest(rows[judged], _kmeans(rows[judges], min(n_clusters, len(judges)), seed))
        table = np.zeros((n_clusters, n_clusters))  # [cluster, the judges' cluster]
        np.add.at(table, (ids[judged], others), 1)
        sizes = table.sum(1)
        together += (table * (table - 1)).sum(1)
        chance = float(((table.sum(0) / len(judged)) ** 2).sum())
        expected += chance * sizes * (sizes - 1)
        pairs += sizes * (sizes - 1)
    strength = (together - expected) / np.maximum(pairs - expected, 1e-9)
    return np.where(pairs > 0, strength, 0).clip(0, 1).astype(np.float32)


def nearest(rows: Floats, centroids: Floats) -> Ints:
    """Return the most cosine-similar centroid of each row, in blocks to keep memory small: (N, D) -> (N,)."""
    directions = normalize(centroids).T
    blocks = [(rows[i : i + 16384] @ directions).argmax(1) for i in range(0, len(rows), 16384)]
    return np.concatenate(blocks).astype(np.int64)


def unit_rows(embeddings: npt.ArrayLike) -> Floats:
    """Return the rows as float32 unit vectors.

    Raises:
        ValueError: if they are not a matrix, fewer than 4, or not finite.
    """
    rows = np.asarray(embeddings, dtype=np.float32)
    if rows.ndim != 2 or len(rows) < 4:
        raise ValueError(f"embeddings must be a matrix of 4 rows or more, got the shape {rows.shape}.")
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise ValueError(
            f"embeddings hold NaN or Inf in row {int(bad.argmax())} ({int(bad.sum())} of {len(rows)} rows): "
            "is the model broken, or loaded in half precision on a device that lacks it?"
        )
    unit: Floats = normalize(rows)
    return unit


def _kmeans(rows: Floats, n_clusters: int, seed: int) -> Floats:
    if len(rows) <= FULL_KMEANS_ROWS:
        method = KMeans(n_clusters, n_init=2, max_iter=100, random_state=seed)
    else:
        method = MiniBatchKMeans(n_clusters, batch_size=8192, n_init=1, max_iter=20, random_state=seed)
    centroids: Floats = method.fit(rows).cluster_centers_.astype(np.float32)
    return centroids


def _means(rows: Floats, ids: Ints, fallback: Floats) -> Floats:
    sums = np.zeros_like(fallback)
    np.add.at(sums, ids, rows)
    counts = np.bincount(ids, minlength=len(fallback))[:, None]
    return np.where(counts > 0, sums / np.maximum(counts, 1), fallback).astype(np.float32)


def _halves(n_rows: int, seed: int, splits: int) -> Iterator[tuple[Ints, Ints]]:
    generator = np.random.default_rng(seed)
    for _ in range(splits):
        order = generator.permutation(n_rows)[:TRUST_ROWS]
        middle = len(order) // 2
        yield order[:middle], order[middle:]
        yield order[middle:], order[:middle]


_CORPUS_OF_MODEL: WeakKeyDictionary[object, CorpusClusters] = WeakKeyDictionary()


def remember_corpus(model: object, clusters: CorpusClusters) -> None:
    """Note the clusters of the corpus that a model is about to be trained on.

    `model.fit` carries nothing but texts and labels from a loader to a loss; this note lets the loss find the
    centroids that the labels are numbers of.
    """
    _CORPUS_OF_MODEL[_unwrap(model)] = clusters


def recall_corpus(model: object) -> CorpusClusters | None:
    """Return the clusters last noted for a model, if any."""
    return _CORPUS_OF_MODEL.get(_unwrap(model))


def _unwrap(model: object) -> object:
    while inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None):
        model = inner
    return model
