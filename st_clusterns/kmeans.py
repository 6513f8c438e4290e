"""k-means on unit vectors: by scikit-learn, or of a large corpus on a sample of it, by faiss if that is installed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import normalize

from st_clusterns.rows import BLOCK, LARGE, Floats, Ints, UnitRows

SAMPLE_PER_CLUSTER, SAMPLE_ITERATIONS = 128, 10  # of the k-means of a large corpus
START_ROWS = 2000  # rows that its first centroids are taken from, at least


def kmeans(rows: Floats | UnitRows, n_clusters: int, seed: int, start: Floats | None = None) -> Floats:
    """Return the centroids of unit vectors.

    Args:
        rows: unit vectors, (N, D).
        n_clusters: number of clusters `K`.
        seed: of every random choice.
        start: centroids to go on from, (K, D).

    Returns:
        (K, D), of any length.
    """
    if isinstance(rows, UnitRows):
        return _kmeans_of_sample(rows, n_clusters, seed, start)
    init, n_init = ("k-means++", 2) if start is None else (start, 1)
    return _scikit_kmeans(rows, n_clusters, seed, init=init, n_init=n_init, max_iter=100)


def _kmeans_of_sample(rows: UnitRows, n_clusters: int, seed: int, start: Floats | None) -> Floats:
    """k-means on a sample: its size, not the corpus's, sets the time and memory."""
    size = min(len(rows), max(LARGE, SAMPLE_PER_CLUSTER * n_clusters))
    sample = rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:size])]
    if start is None:  # on a sample of the sample: all of it would take longer than the k-means
        some = sample[:: size // min(size, max(START_ROWS, 4 * n_clusters))]
        start, _ = kmeans_plusplus(some, n_clusters, random_state=seed)
    try:
        import faiss
    except ImportError:
        return _scikit_kmeans(sample, n_clusters, seed, init=start, n_init=1, max_iter=SAMPLE_ITERATIONS)
    method = faiss.Kmeans(
        sample.shape[1],
        n_clusters,
        niter=SAMPLE_ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,  # else it prints a warning
        max_points_per_centroid=size,
    )
    method.train(sample, init_centroids=start)
    return np.asarray(method.centroids, dtype=np.float32)


def _scikit_kmeans(rows: Floats, n_clusters: int, seed: int, **settings: Any) -> Floats:
    method = KMeans(n_clusters, random_state=seed, **settings)
    with warnings.catch_warnings():
        # Fewer different sentences than clusters: some clusters stay empty, which all that follows can bear.
        warnings.simplefilter("ignore", ConvergenceWarning)
        centroids: Floats = method.fit(rows).cluster_centers_.astype(np.float32)
    return centroids


def nearest(rows: Floats | UnitRows, centroids: Floats) -> Ints:
    """Return the most cosine-similar centroid of each row, in blocks to keep memory small: (N, D) -> (N,)."""
    directions = normalize(centroids).T
    blocks = [(rows[i : i + BLOCK] @ directions).argmax(1) for i in range(0, len(rows), BLOCK)]
    return np.concatenate(blocks).astype(np.int64)


def cluster_means(rows: Floats | UnitRows, ids: Ints, fallback: Floats) -> Floats:
    """Return the mean of each cluster's rows, of an empty one its row of `fallback`: (N, D), (N,), (K, D) -> (K, D)."""
    sums = np.zeros_like(fallback)
    block = len(rows) if isinstance(rows, np.ndarray) else BLOCK
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        member = csr_matrix(
            (np.ones_like(part[:, 0]), (ids[start : start + block], np.arange(len(part)))), (len(sums), len(part))
        )
        sums += member @ part
    counts = np.bincount(ids, minlength=len(fallback))[:, None]
    return np.where(counts > 0, sums / np.maximum(counts, 1), fallback).astype(np.float32)
