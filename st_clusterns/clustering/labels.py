"""Labels that a user gives to sentences, as they come: numbers or texts, with gaps."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from st_clusterns.clustering.vectors import Ints

OUTLIERS = "no cluster"  # the name of the cluster of what belongs to none


def as_labels(labels: Iterable[Any], n_sentences: int) -> list[Any]:
    """Return the labels of so many sentences as a list of numbers or texts, with None for a sentence without one.

    Args:
        labels: a list, an array, a tensor, a column of a table, or another iterable. -1 (as of HDBSCAN and BERTopic),
            None, NaN and pandas' NA stand for no label.
        n_sentences: the number of labels that there must be.

    Raises:
        ValueError: if there is another number of labels, or one is neither a number nor a text.
    """
    values: Any = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    values = values if isinstance(values, list) else [values]
    if len(values) != n_sentences:
        raise ValueError(f"There are {len(values)} labels for {n_sentences} sentences: pass one each.")
    found = []
    for place, value in enumerate(values):
        label = value.item() if getattr(value, "shape", None) == () else value  # of an array or a tensor
        if not isinstance(label, Hashable):
            raise ValueError(f"labels[{place}] is {type(label).__name__} {label!r}: give a number or a text.")
        found.append(None if _is_missing(label) else label)
    return found


def _is_missing(label: Any) -> bool:
    try:
        return bool(label is None or label == -1 or label != label)
    except TypeError:  # of pandas' NA, whose comparisons are neither true nor false
        return True


def number_labels(labels: list[Any]) -> tuple[Ints, list[str], bool]:
    """Number the labels of `as_labels` from 0, in their order.

    Returns:
        The numbers, (N,); the name of each number; and whether the last number stands for sentences without a label.

    Raises:
        ValueError: if there are fewer than two labels, or labels of several types.
    """
    inside = {label for label in labels if label is not None}
    if len(inside) < 2:
        raise ValueError(f"labels holds {len(inside)} distinct label(s): clusters are 2 or more.")
    try:
        order = sorted(inside)
    except TypeError:
        kinds = sorted({type(label).__name__ for label in inside})
        raise ValueError(f"labels holds values of several types ({', '.join(kinds)}): convert them to one.") from None
    number = {label: place for place, label in enumerate(order)}
    has_outliers = None in labels
    ids = [number.get(label, len(order)) for label in labels]
    names = [str(label) for label in order] + [OUTLIERS] * has_outliers
    return np.array(ids, dtype=np.int64), names, has_outliers
