"""The report of a training run: what the clusters and the embeddings look like before and after, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.preprocessing import normalize

from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.clustering.vectors import ROUNDING, Floats
from st_clusterns.evaluation.scores import false_negative_share, mean_cosine, uniformity

REPORT_ROWS = 10_000  # sentences that a report describes, at most
PAIRS = 20_000  # random pairs that a picture of cosines shows


def describe_clusters(clusters: CorpusClusters, batch_size: int) -> dict[str, Any]:
    """Describe the clusters that a run starts from, with batches of `batch_size` sentences.

    `false_negatives_in_batch` is the share of a row's in-batch negatives that belong to its own, trusted, cluster in a
    random batch.
    """
    shares = clusters.sizes / clusters.sizes.sum()
    false_negatives = false_negative_share(clusters.ids, clusters.trusted[clusters.ids])
    return {
        "verdict": clusters.verdict,
        "n_clusters": clusters.n_clusters,
        "has_topics": clusters.has_topics,
        "trust_by_n_clusters": clusters.curve,
        "sizes": sorted(clusters.sizes.tolist(), reverse=True),
        "mean_trust": clusters.mean_trust,
        "sentences_in_trusted_clusters": float(shares[clusters.trusted].sum()),
        "false_negatives_in_batch": false_negatives,
        "false_negatives_of_a_row": false_negatives * (batch_size - 1),
    }


def describe_embeddings(embeddings: npt.ArrayLike, ids: npt.NDArray[np.int64], seed: int = 0) -> dict[str, float]:
    """Describe embeddings (N, D) by the clusters of the start, `ids` (N,).

    Returns `mean_cosine` of any two sentences (anisotropy), `mean_cosine_same_cluster`, their difference (`contrast`),
    and `uniformity` (Wang and Isola 2020: log of the mean of exp(-2 * squared distance); lower is more uniform).
    """
    any_pair, same_pair = mean_cosine(embeddings), mean_cosine(embeddings, ids)
    return {
        "mean_cosine": any_pair,
        "mean_cosine_same_cluster": same_pair,
        "contrast": same_pair - any_pair,
        "uniformity": uniformity(embeddings, seed),
    }


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


def draw_report(after: Floats, clusters: CorpusClusters, path: Path) -> None:
    """Draw the maps before and after, the cosines of pairs, and the cluster sizes, into a PNG file.

    `after` holds the embeddings of the clustered sentences after training, (N, D); `clusters` those before.
    """
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2)
    order = np.argsort(-clusters.sizes)
    draw_map(panels[0, 0], clusters.embeddings, clusters.ids, order[:10], "Sentences before training")
    draw_map(panels[0, 1], after, clusters.ids, order[:10], "Sentences after training")
    _draw_cosines(panels[1, 0], after, clusters)
    trusted = clusters.trusted[order]
    panels[1, 1].bar(np.arange(len(order)), clusters.sizes[order], color=np.where(trusted, "C2", "lightgrey"))
    panels[1, 1].set(title=f"{int(trusted.sum())} of {len(order)} clusters are trusted (green)")
    panels[1, 1].set(xlabel="cluster, by size", ylabel="sentences")
    figure.savefig(path, dpi=120)


def draw_map(axes: Any, rows: Floats, ids: npt.NDArray[np.int64], shown: npt.NDArray[Any], title: str) -> None:
    """Scatter at most 1,500 sentences, near ones side by side (t-SNE); the clusters `shown` in colour."""
    from sklearn.manifold import TSNE

    sample = np.random.default_rng(0).permutation(len(rows))[:1500]
    if np.ptp(rows[sample], axis=0).max() < ROUNDING:
        raise ValueError("All embeddings are equal: there is no map to draw.")  # scikit-learn's t-SNE would crash
    nearness = min(30, len(sample) / 4)
    points = TSNE(2, perplexity=nearness, metric="cosine", init="pca", random_state=0).fit_transform(rows[sample])
    colours = {int(cluster): f"C{place}" for place, cluster in enumerate(shown)}
    axes.scatter(*points.T, s=7, c=[colours.get(int(i), "lightgrey") for i in ids[sample]], linewidths=0)
    axes.set(title=title, xticks=[], yticks=[])
    axes.set_xlabel(f"t-SNE; the {len(shown)} largest clusters in colour")


def _draw_cosines(axes: Any, after: Floats, clusters: CorpusClusters) -> None:
    before = clusters.embeddings
    bins = np.linspace(-0.3, 1, 66)
    pairs = {"same cluster": same_cluster_pairs(clusters, 0), "any two": random_pairs(len(before), 0)}
    for colour, (name, pair) in zip(("C1", "C0"), pairs.items(), strict=True):
        style = {"bins": bins, "density": True, "histtype": "step", "color": colour}
        axes.hist(pair_cosines(before, *pair), **style, linestyle=":", label=f"{name}, before")
        axes.hist(pair_cosines(after, *pair), **style, label=f"{name}, after")
    axes.set(title="Cosine of two sentences", xlabel="cosine", ylabel="density")
    axes.legend(loc="upper right")
