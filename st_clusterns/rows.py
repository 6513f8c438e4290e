"""The embeddings of a corpus as unit vectors: all at once, or of a large corpus in blocks, on demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.preprocessing import normalize

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

LARGE = 50_000  # rows above which k-means sees a sample, and embeddings are never in memory as a whole in float32
BLOCK = 16384  # rows that a pass over all of them takes at a time


class UnitRows:
    """Rows of a large matrix, made float32 unit vectors when they are asked for.

    Args:
        embeddings: (N, D), of any float type, in memory or memory-mapped.
        layer: what they go through then, if anything.
        words: what is then joined to them, if anything, (N, W).
    """

    def __init__(
        self,
        embeddings: npt.NDArray[Any] | UnitRows,
        layer: Callable[[Floats], Floats] | None = None,
        words: npt.NDArray[Any] | None = None,
    ) -> None:
        self._embeddings = embeddings
        self._layer = layer
        self._words = words
        self.shape: tuple[int, int] = (len(embeddings), embeddings.shape[1] + (0 if words is None else words.shape[1]))

    def __len__(self) -> int:
        return len(self._embeddings)

    def __getitem__(self, places: slice | Ints) -> Floats:
        rows: Floats = normalize(self._embeddings[places].astype(np.float32), copy=False)
        rows = self._layer(rows) if self._layer else rows
        return rows if self._words is None else _join(rows, self._words[places])


def open_rows(embeddings: npt.ArrayLike) -> Floats | UnitRows:
    """Return the rows as float32 unit vectors: at once, or of a large corpus on demand.

    Raises:
        ValueError: if they are not a matrix, fewer than 4, or not finite.
    """
    matrix = np.asarray(embeddings)
    _check_matrix(matrix)
    if len(matrix) <= LARGE:
        return unit_rows(matrix)
    for start in range(0, len(matrix), BLOCK):
        block = matrix[start : start + BLOCK]
        if not np.isfinite(block.sum(dtype=np.float64)):
            bad = start + int((~np.isfinite(block).all(axis=1)).argmax())
            raise _not_finite(f"row {bad}")
    return UnitRows(matrix)


def unit_rows(embeddings: npt.ArrayLike) -> Floats:
    """Return the rows as float32 unit vectors.

    Raises:
        ValueError: if they are not a matrix, fewer than 4, or not finite.
    """
    rows = np.asarray(embeddings, dtype=np.float32)
    _check_matrix(rows)
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise _not_finite(f"row {int(bad.argmax())} ({int(bad.sum())} of {len(rows)} rows)")
    unit: Floats = normalize(rows)
    return unit


def map_rows(rows: Floats | UnitRows, layer: Callable[[Floats], Floats]) -> Floats | UnitRows:
    """Send unit vectors through a layer: at once, or those of a large corpus when they are asked for."""
    return layer(rows) if isinstance(rows, np.ndarray) else UnitRows(rows, layer)


def join_rows(rows: Floats | UnitRows, words: npt.NDArray[Any]) -> Floats | UnitRows:
    """Join unit vectors with word vectors: (N, D), (N, W) -> unit vectors, (N, D + W)."""
    return _join(rows, words) if isinstance(rows, np.ndarray) else UnitRows(rows, words=words)


def _join(rows: Floats, words: npt.NDArray[Any]) -> Floats:
    joined: Floats = normalize(np.hstack([rows, words.astype(np.float32)]), copy=False)
    return joined


def _check_matrix(rows: npt.NDArray[Any]) -> None:
    if rows.ndim != 2 or len(rows) < 4:
        raise ValueError(f"embeddings must be a matrix of 4 rows or more, got the shape {rows.shape}.")


def _not_finite(where: str) -> ValueError:
    return ValueError(
        f"embeddings hold NaN or Inf in {where}: is the model broken, or loaded in half precision on a device that "
        "lacks it?"
    )
