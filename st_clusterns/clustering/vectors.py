"""Embeddings as float32 unit vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.preprocessing import normalize

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

BLOCK = 16_384  # rows that a pass over many rows takes at a time
FEWEST = 4  # rows that can be clustered
ROUNDING = 1e-5  # by which the embeddings of one text differ with the batch that it is in


def unit_rows(embeddings: npt.ArrayLike, numbers: Sequence[int] | None = None, least: int = FEWEST) -> Floats:
    """Return the rows as float32 unit vectors, (N, D) -> (N, D).

    Args:
        embeddings: (N, D).
        numbers: what an error calls the rows. Default: their positions.
        least: number of rows that there must be.

    Raises:
        ValueError: if they are not a matrix of `least` rows or more, or not finite.
    """
    rows = np.asarray(embeddings, dtype=np.float32)
    if rows.ndim != 2 or len(rows) < least:
        raise ValueError(f"embeddings must be a matrix of {least} rows or more, got the shape {rows.shape}.")
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"embeddings hold NaN or Inf in row {first if numbers is None else numbers[first]} ({int(bad.sum())} of "
            f"{len(rows)} rows): is the model broken, or loaded in half precision on a device that lacks it?"
        )
    unit: Floats = normalize(rows)
    return unit


def as_unit_rows(embeddings: npt.ArrayLike) -> Floats:
    """Return float32 unit vectors as they are, to the last bit, and anything else as `unit_rows` does."""
    rows = np.asarray(embeddings)
    fits = rows.dtype == np.float32 and rows.ndim == 2 and len(rows) >= FEWEST
    if fits and np.abs(np.linalg.norm(rows, axis=1) - 1).max() < ROUNDING:
        return rows
    return unit_rows(rows)


def equal_rows(rows: Floats) -> tuple[int, int]:
    """Return how many unit vectors, (N, D), equal another one up to rounding, and how many different ones there are."""
    order = np.argsort(rows @ np.random.default_rng(0).normal(size=rows.shape[1]))  # equal rows side by side
    same = np.abs(np.diff(rows[order], axis=0)).max(axis=1) < ROUNDING
    return int((np.append(same, False) | np.append(False, same)).sum()), int((~same).sum()) + 1
