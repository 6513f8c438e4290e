"""The picture of a report: two maps, the cosines of pairs and the sizes of the clusters, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.preprocessing import normalize

from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.clustering.vectors import Floats, Ints
from st_clusterns.files import written_whole
from st_clusterns.training.maps import topic_colours

PAIRS = 20_000  # random pairs that a picture of cosines shows
PALETTE = ("#134d7d", "#dfa41e", "#148957", "#ab7bb5", "#1eaaff", "#953a0e", "#6338b9")  # hues of page.css
GREY = "#b4bac1"


def draw_report(shown: CorpusClusters, after: Floats, maps: tuple[Floats, Floats], *paths: Path) -> None:
    """Draw the maps before and after, the cosines of pairs, and the cluster sizes, into PNG and SVG files.

    `after` holds the embeddings of the shown sentences after training, (N, D); `maps` are (N, 2) each.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2)
    colours = topic_colours(maps[0], shown.ids, shown.sizes, shown.trusted)
    for axes, points, when in zip(panels[0], maps, ("before", "after"), strict=True):
        draw_map(axes, points, colours[shown.ids], f"Sentences {when} training")
        axes.set_xlabel("t-SNE; trusted topics in colour" if shown.has_topics else "t-SNE; no topics were found")
    _draw_cosines(panels[1, 0], after, shown)
    order = np.argsort(-shown.sizes)
    trusted = shown.trusted[order]
    panels[1, 1].bar(np.arange(len(order)), shown.sizes[order], color=np.where(trusted, PALETTE[2], GREY))
    panels[1, 1].set(title=f"{int(trusted.sum())} of {len(order)} clusters are trusted (green)")
    panels[1, 1].set(xlabel="cluster, by size", ylabel="sentences")
    for path in paths:
        # Without a salt and a date, the SVG of one figure differs from run to run.
        with rc_context({"svg.hashsalt": "st_clusterns", "svg.fonttype": "none"}), written_whole(path) as partial:
            kind = path.suffix.lstrip(".")
            figure.savefig(partial, dpi=120, format=kind, metadata={"Date": None} if kind == "svg" else None)


def draw_map(axes: Any, points: Floats, hues: Ints, title: str) -> None:
    """Scatter the points of a map, (N, 2), in their hues, (N,); those of no hue (below 0) are grey and below."""
    order = np.argsort(hues >= 0, kind="stable")
    colours = np.array([*PALETTE, GREY])[np.where(hues < 0, -1, hues % len(PALETTE))]
    size = float(np.clip(12_000 / len(points), 1.5, 12))
    axes.scatter(*points[order].T, s=size, c=colours[order], linewidths=0, alpha=0.8, rasterized=True)
    axes.set(title=title, xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")


def _draw_cosines(axes: Any, after: Floats, clusters: CorpusClusters) -> None:
    before = clusters.embeddings
    bins = np.linspace(-0.3, 1, 66)
    pairs = {"same cluster": same_cluster_pairs(clusters, 0), "any two": random_pairs(len(before), 0)}
    for colour, (name, pair) in zip(("C1", "C0"), pairs.items(), strict=True):
        for rows, when, line in ((before, "before", ":"), (after, "after", "-")):
            cosines = pair_cosines(rows, *pair)
            # Weights, not density=True: that divides by zero where no cosine is within the bins.
            weights = np.full(len(cosines), 1 / max(1, len(cosines)))
            style: dict[str, Any] = {"histtype": "step", "color": colour, "linestyle": line, "weights": weights}
            axes.hist(cosines, bins, **style, label=f"{name}, {when}")
    axes.set(title="Cosine of two sentences", xlabel="cosine", ylabel="share of pairs")
    axes.legend(loc="upper right")


def random_pairs(n_rows: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw pairs of two different rows."""
    generator = np.random.default_rng(seed)
    first = generator.integers(n_rows, size=PAIRS)
    return first, (first + generator.integers(1, n_rows, size=PAIRS)) % n_rows


def same_cluster_pairs(clusters: CorpusClusters, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw pairs of two different rows of one cluster, a cluster as often as it has rows."""
    order = np.argsort(clusters.ids, kind="stable")
    starts = np.cumsum(clusters.sizes) - clusters.sizes
    generator = np.random.default_rng(seed)
    first = generator.integers(len(order), size=PAIRS)  # places in `order`
    sizes, begins = clusters.sizes[clusters.ids[order[first]]], starts[clusters.ids[order[first]]]
    first, sizes, begins = first[sizes > 1], sizes[sizes > 1], begins[sizes > 1]
    second = begins + (first - begins + 1 + generator.integers(2**31, size=len(first)) % (sizes - 1)) % sizes
    return order[first], order[second]


def pair_cosines(rows: Floats, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> Floats:
    """Return the cosine of each pair of rows; reads these alone."""
    left, right = (normalize(rows[side].astype(np.float32)) for side in (first, second))
    cosines: Floats = np.einsum("nd,nd->n", left, right)
    return cosines
