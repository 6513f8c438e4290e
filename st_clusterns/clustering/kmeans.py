"""K-means on unit vectors, by scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
from scipy.sparse import csr_array
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import normalize

from st_clusterns.clustering.vectors import BLOCK, Floats, Ints

MAX_ITERATIONS = 50


def kmeans(rows: Floats, n_clusters: int, seed: int, n_init: int = 1) -> Floats:
    """Return the centroids of unit vectors by k-means with a k-means++ start: (N, D) -> (K, D).

    Of `n_init` runs the one with the lowest inertia counts.
    """
    # Left to KMeans, a start would convert float32 rows to float64 once for each centroid.
    random, double = np.random.RandomState(seed), rows.astype(np.float64)
    starts = [kmeans_plusplus(double, n_clusters, random_state=random)[0].astype(rows.dtype) for _ in range(n_init)]
    del double
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters: some clusters stay empty, which all callers can handle.
        warnings.simplefilter("ignore", ConvergenceWarning)
        runs = (KMeans(n_clusters, init=start, n_init=1, max_iter=MAX_ITERATIONS).fit(rows) for start in starts)
        best = min(runs, key=lambda run: run.inertia_)
    centroids: Floats = best.cluster_centers_.astype(np.float32)
    return centroids


def nearest(rows: Floats, centroids: Floats) -> Ints:
    """Return the most cosine-similar centroid of each row, in blocks to keep memory small: (N, D) -> (N,)."""
    directions = normalize(centroids).T
    blocks = [(rows[start : start + BLOCK] @ directions).argmax(axis=1) for start in range(0, len(rows), BLOCK)]
    return np.concatenate(blocks).astype(np.int64)


def cluster_means(rows: Floats, ids: Ints, n_clusters: int) -> Floats:
    """Return the mean of each cluster's rows, of an empty one zeros: (N, D), (N,) -> (K, D)."""
    members = csr_array((np.ones(len(ids)), (ids, np.arange(len(ids)))), shape=(n_clusters, len(ids)))
    sums = members @ rows.astype(np.float64)
    counts = np.bincount(ids, minlength=n_clusters)[:, None]
    means: Floats = (sums / np.maximum(counts, 1)).astype(np.float32)
    return means
