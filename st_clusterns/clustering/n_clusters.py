"""How many clusters a corpus has, and whether it has topics at all: by prediction strength."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy.typing as npt

from st_clusterns.clustering.trust import mean_trust
from st_clusterns.clustering.vectors import as_unit_rows

TRUSTED = 0.5  # mean trust from which on two sentences of a cluster are more likely than not to stay together ...
MANY_ROWS, DECADE = 7000, 0.5  # ... and for fewer rows, whose halves repeat less, this share less per factor of ten
NEARLY = 0.7  # share of the highest mean trust that the chosen number of clusters must reach
N_CLUSTERS = (16, 24, 32, 48, 64, 96, 128, 192, 256)  # numbers of clusters that are tried
ROWS_PER_CLUSTER = 20  # a number of clusters is tried if there are so many sentences a cluster


@dataclass(frozen=True)
class ClusterCount:
    """How many clusters a corpus has, and the curve that says so.

    Attributes:
        n_clusters: the largest number of clusters whose mean trust is at least 70 % of the highest, or the given one.
        has_topics: whether the highest mean trust reaches `bound`.
        curve: the mean trust of each number of clusters that was tried.
        bound: one half; less for fewer than 7,000 sentences (`trust_bound`).
    """

    n_clusters: int
    has_topics: bool
    curve: dict[int, float]
    bound: float


def trust_bound(n_rows: int) -> float:
    """Return the mean trust that topics must reach in a corpus of so many sentences, 0.25 to 0.5.

    Two halves of few sentences repeat each other's clusters less. The highest mean trust of five corpora with topics is
    0.55 to 0.77 on 10,000 sentences, 0.43 to 0.66 on 2,500, 0.33 to 0.56 on 1,000; of two without 0.45, 0.35, 0.25. On
    800 it is 0.27 and more with topics, 0.24 and less without. It varies by 0.04 with the seed. Noise reaches 0.14, on
    40.
    """
    return TRUSTED * min(1.0, max(0.5, 1 - DECADE * math.log10(MANY_ROWS / n_rows)))


def choose_n_clusters(rows: npt.ArrayLike, seed: int = 0, n_clusters: int | None = None) -> ClusterCount:
    """Choose the number of clusters by prediction strength, and say whether there are topics.

    Args:
        rows: embeddings, as of `embed_corpus`, (N, D); at most 10,000 of them are used.
        seed: seed of the random number generator.
        n_clusters: a number that is settled. It is tried first; whether there are topics at another number is asked
            only if there are none at this one. Default: 16 to 256 are tried, with 20 sentences a cluster or more.

    Returns:
        The choice with its curve.

    Raises:
        ValueError: if the embeddings are not a matrix of 4 rows or more, or not finite.
    """
    rows = as_unit_rows(rows)
    fitting = [k for k in N_CLUSTERS if ROWS_PER_CLUSTER * k <= len(rows)]
    candidates = fitting or [max(2, len(rows) // ROWS_PER_CLUSTER)]
    bound = trust_bound(len(rows))
    curve: dict[int, float] = {}
    for k in candidates if n_clusters is None else dict.fromkeys([n_clusters, *candidates]):
        curve[k] = mean_trust(rows, k, seed)
        highest = max(curve.values())
        if highest >= bound and (n_clusters or max(list(curve.values())[-3:]) < NEARLY * highest):
            break  # the question is answered, or the trust has fallen for good
    chosen = n_clusters or max(k for k in curve if curve[k] >= NEARLY * highest)
    return ClusterCount(chosen, highest >= bound, curve, bound)
