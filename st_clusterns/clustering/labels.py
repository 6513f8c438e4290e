"""Clusters of one's own, as they come: numbers or texts, with gaps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from st_clusterns.clustering.vectors import Ints

OUTLIERS = "no cluster"  # the name of the cluster of what belongs to none


def number_labels(labels: Sequence[Hashable]) -> tuple[Ints, list[str], bool]:
    """Number labels from 0, in their order.

    Returns:
        The numbers, (N,); the name of each number; and whether the last number stands for sentences without a cluster:
        those whose label is -1 (as of HDBSCAN and BERTopic), None or NaN.

    Raises:
        ValueError: if there are fewer than two labels, or labels of several types.
    """
    outlier = [label is None or label == -1 or label != label for label in labels]
    inside = {label for label, out in zip(labels, outlier, strict=True) if not out}
    if len(inside) < 2:
        raise ValueError(f"labels holds {len(inside)} distinct label(s): clusters are 2 or more.")
    try:
        order = sorted(inside)  # type: ignore[type-var]
    except TypeError:
        kinds = sorted({type(label).__name__ for label in inside})
        raise ValueError(f"labels holds values of several types ({', '.join(kinds)}): convert them to one.") from None
    number = {label: place for place, label in enumerate(order)}
    ids = [len(order) if out else number[label] for label, out in zip(labels, outlier, strict=True)]
    names = [str(label) for label in order] + [OUTLIERS] * any(outlier)
    return np.array(ids, dtype=np.int64), names, any(outlier)
