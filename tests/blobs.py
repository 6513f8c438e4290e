"""Rows with clusters and rows without, for the tests of the corpus and of trust."""

from __future__ import annotations

import numpy as np

from st_clusterns.clustering.vectors import unit_rows

N_BLOBS = 16


def blobs(noise: float, n_rows: int = 800, n_blobs: int = N_BLOBS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around random unit vectors, and the blob of each row; rows differ in length."""
    rng = np.random.default_rng(seed)
    centers = unit_rows(rng.normal(size=(n_blobs, 16)))
    ids = rng.integers(n_blobs, size=n_rows)
    rows = centers[ids] + noise * rng.normal(size=(n_rows, 16))
    return rows * rng.uniform(0.1, 10, size=(n_rows, 1)), ids


def directions(n_rows: int = 800, seed: int = 0) -> np.ndarray:
    """No clusters at all."""
    return np.random.default_rng(seed).normal(size=(n_rows, 16))


TIGHT, TRUE_IDS = blobs(noise=0.05)
LOOSE, _ = blobs(noise=0.3)
