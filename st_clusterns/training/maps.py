"""Maps of the sentences before and after training, which the eye can compare, and the neighbours that have changed.

1. t-SNE (scikit-learn) lays out at most 10,000 sentences by their embeddings before training.
2. It lays out the same sentences by their embeddings after training, starting from the first map. So a topic stays
   about where it was, unless training has moved it away from its neighbours.
3. Any other sentence lies at the median of its 5 most similar ones among these, where openTSNE starts new points too.
"""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

from st_clusterns.clustering.kmeans import cluster_means
from st_clusterns.clustering.vectors import ROUNDING, Floats, Ints, unit_rows

LAYOUT_ROWS = 10_000  # sentences that t-SNE lays out, at most: 33 s of processor time
PERPLEXITY, ITERATIONS = 30, 500  # half of the iterations are those of early exaggeration
PLACED_BY = 5  # neighbours that place a sentence which t-SNE has not laid out
START_SPREAD = 1e-4  # standard deviation of the start of a layout, scikit-learn's own
HUES = 7  # colours of topics


def draw_maps(before: Floats, after: Floats, seed: int = 0) -> tuple[Floats, Floats]:
    """Lay out two embeddings of the same sentences, (N, D) and (N, E), as two maps, each (N, 2).

    All points of a map are zero if all embeddings are equal.
    """
    order = np.random.default_rng(seed).permutation(len(before))
    chosen, others = order[:LAYOUT_ROWS], order[LAYOUT_ROWS:]
    maps, start = [], None
    for rows in (unit_rows(before), unit_rows(after)):
        start = lay_out(rows[chosen], start, seed)
        points = np.empty((len(rows), 2), dtype=np.float32)
        points[chosen] = start
        if len(others):
            near = NearestNeighbors(n_neighbors=PLACED_BY, algorithm="brute").fit(rows[chosen])
            points[others] = np.median(start[near.kneighbors(rows[others], return_distance=False)], axis=1)
        maps.append(points)
    return maps[0], maps[1]


def lay_out(rows: Floats, start: Floats | None = None, seed: int = 0) -> Floats:
    """Lay out unit vectors by t-SNE, (N, D) -> (N, 2), from an earlier layout or the first two principal components."""
    if np.ptp(rows, axis=0).max() < ROUNDING:  # t-SNE would divide by zero
        return np.zeros((len(rows), 2), dtype=np.float32)
    if start is None or not np.ptp(start):
        start = PCA(2, random_state=seed).fit_transform(rows)
    start = np.ascontiguousarray(START_SPREAD / start.std(axis=0).max() * start, dtype=np.float32)
    method = TSNE(perplexity=min(PERPLEXITY, len(rows) / 4), init=start, max_iter=ITERATIONS, random_state=seed)
    points: Floats = method.fit_transform(rows)
    return points


def nearest_rows(rows: Floats, count: int) -> Ints:
    """Return the `count` most similar other rows of each unit vector, nearest first, (N, D) -> (N, count)."""
    near: Ints = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(rows).kneighbors(return_distance=False)
    return near


def measure_moves(before: Floats, near: Ints, near_after: Ints) -> tuple[Ints, Floats]:
    """Measure how far training has moved each sentence among the others.

    Args:
        before: unit vectors before training, (N, D).
        near: the k nearest rows of each before training, (N, k).
        near_after: those after training, (N, k).

    Returns:
        How many of the k neighbours are new, (N,); and how much less similar to the sentence, in mean cosine before
        training, the neighbours of afterwards were than those of then, (N,), 0 or more. The second tells a move to
        another place from a change among neighbours that were all equally near.
    """
    fresh = np.array([len(set(new) - set(old)) for old, new in zip(near.tolist(), near_after.tolist(), strict=True)])
    old, new = (_mean_cosines(before, rows) for rows in (near, near_after))
    return fresh, (old - new).clip(0)


def _mean_cosines(rows: Floats, others: Ints) -> Floats:
    """Return the mean cosine of each unit vector with some rows, (N, D), (N, k) -> (N,)."""
    cosines: Floats = np.mean([np.einsum("nd,nd->n", rows, rows[column]) for column in others.T], axis=0)
    return cosines


def topic_colours(points: Floats, ids: Ints, sizes: Ints, shown: np.ndarray) -> Ints:
    """Give each topic one of 7 hues, so that topics of one hue lie far apart on a map.

    Args:
        points: the map, (N, 2).
        ids: the topic of each point, 0 to K-1, (N,).
        sizes: of the topics, (K,); the largest choose first.
        shown: which topics have a hue at all, (K,).

    Returns:
        The hue of each topic, 0 to 6, or -1, (K,).
    """
    centres = cluster_means(points, ids, len(sizes))
    hues = np.full(len(sizes), -1)
    for topic in np.argsort(-sizes, kind="stable"):
        if shown[topic]:
            apart = np.linalg.norm(centres - centres[topic], axis=1)
            nearest = [apart[hues == hue].min(initial=np.inf) for hue in range(HUES)]
            hues[topic] = int(np.argmax(nearest))
    return hues
