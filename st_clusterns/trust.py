"""How far clusters are to be trusted, measured without labels.

Whether "same cluster" also means "same meaning" differs from corpus to corpus: on short texts about a few things it
nearly does, on encyclopaedia sentences it does not. *Prediction strength* (Tibshirani & Walther 2005) tells: split the
sentences in two halves, cluster one half on its own, and ask which share of a cluster's pairs in the other half this
independent clustering puts together as well. Corrected for chance, this share is the cluster's *trust*: 1 if the pairs
always stay together, 0 if they do so no more often than any two sentences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from st_clusterns.kmeans import kmeans, nearest
from st_clusterns.rows import Floats, Ints, UnitRows

REPEATS = 0.5  # mean trust from which on a pair of one cluster is more likely than not to stay together
TOPICAL = 0.57  # mean trust of the coarsest clusters from which on they are topics; see `most_repeatable_clusters`
TRUST_ROWS = 10_000  # rows on which prediction strength is measured
MANY_ROWS = 8000  # rows below which less trust is asked for: halves of few rows repeat each other's clusters less


def most_repeatable_clusters(rows: Floats | UnitRows, seed: int = 0) -> int | None:
    """Find the largest number of clusters that still repeats on other sentences.

    Goes up a geometric grid (16, 24, 32, 48, ... 256, with 20 sentences a cluster or more) while the mean trust over
    the sentences is at least one half: a pair of one cluster is then more likely than not to stay together. One K
    may fail; two in a row end the search.

    Clusters can repeat and be no topics that a user means. So the two coarsest must have a mean trust of 0.57, midway
    between the corpora nearest to it on either side of those measured: news (0.62), whose clusters are worth training
    on, and questions about one operating system (0.53), where it harmed the search for duplicates.

    Of fewer than 8,000 rows less is asked, because the same corpus shows less: by two fifths of every bound for a
    tenth of the rows, down to two thirds; and they are clustered more than once. (Mean trust of 1,000, 2,500,
    5,000, 10,000 web snippets: 0.43, 0.53, 0.61, 0.69; of those questions: 0.36, 0.42, 0.50, 0.56; of encyclopaedia
    sentences: 0.19, 0.27, 0.37, 0.46.)

    Args:
        rows: unit vectors, (N, D); at most 10,000 of them are used.
        seed: of every random choice.

    Returns:
        The number of clusters `K`, or None for a corpus that is not made of clusters.
    """
    sample = rows[np.random.default_rng(seed).permutation(len(rows))[:TRUST_ROWS]]
    scale = scale_for_few(len(sample))
    best, failures, trusts = None, 0, []
    for n_clusters in cluster_numbers(len(sample)):
        trusts.append(mean_trust(sample, n_clusters, seed))
        best, failures = (n_clusters, 0) if trusts[-1] >= scale * REPEATS else (best, failures + 1)
        if failures == 2 or (len(trusts) > 1 and np.mean(trusts[:2]) < scale * TOPICAL):
            break
    return best if np.mean(trusts[:2]) >= scale * TOPICAL else None


def scale_for_few(n_rows: int) -> float:
    """Return what is asked of a trust measured on few rows, as a share of what is asked on 8,000 and more.

    Args:
        n_rows: on which it was measured.

    Returns:
        1 for 8,000 rows or more, two fifths less for each tenth of them, never below two thirds.
    """
    return min(1, max(2 / 3, 1 - 0.4 * math.log10(MANY_ROWS / n_rows)))


def mean_trust(rows: Floats | UnitRows, n_clusters: int, seed: int = 0) -> float:
    """Return the mean trust of a row's cluster.

    Args:
        rows: unit vectors, (N, D).
        n_clusters: number of clusters `K`.
        seed: of every random choice.

    Returns:
        0 to 1; of fewer than 5,000 rows, where it depends on the clustering, the mean over up to 5 of them.
    """
    repeats = min(5, max(1, round(MANY_ROWS / len(rows))))
    trusts = []
    for clustering in range(seed, seed + repeats):
        ids = nearest(rows, kmeans(rows, n_clusters, clustering))
        trusts.append(cluster_trust(rows, ids, n_clusters, clustering)[ids].mean())
    return float(np.mean(trusts))


def cluster_numbers(n_rows: int) -> list[int]:
    """Return the numbers of clusters that are tried for so many rows, in rising order."""
    return [k for k in (16, 24, 32, 48, 64, 96, 128, 192, 256) if 20 * k <= n_rows] or [max(2, n_rows // 20)]


def cluster_trust(rows: Floats | UnitRows, ids: Ints, n_clusters: int, seed: int = 0, splits: int = 2) -> Floats:
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
        others = nearest(rows[judged], kmeans(rows[judges], min(n_clusters, len(judges)), seed))
        table = np.zeros((n_clusters, n_clusters))  # [cluster, the judges' cluster]
        np.add.at(table, (ids[judged], others), 1)
        sizes = table.sum(1)
        together += (table * (table - 1)).sum(1)
        chance = float(((table.sum(0) / len(judged)) ** 2).sum())
        expected += chance * sizes * (sizes - 1)
        pairs += sizes * (sizes - 1)
    strength = (together - expected) / np.maximum(pairs - expected, 1e-9)
    return np.where(pairs > 0, strength, 0).clip(0, 1).astype(np.float32)


def _halves(n_rows: int, seed: int, splits: int) -> Iterator[tuple[Ints, Ints]]:
    generator = np.random.default_rng(seed)
    for _ in range(splits):
        order = generator.permutation(n_rows)[:TRUST_ROWS]
        middle = len(order) // 2
        yield order[:middle], order[middle:]
        yield order[middle:], order[:middle]
