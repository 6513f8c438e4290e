"""Cluster a whole corpus, and measure how far its clusters are to be trusted.

k-means on unit vectors (scikit-learn) gives the clusters: of the embeddings, joined, where the sentences are at hand,
with vectors of the words that they share (`st_clusterns.words`). Whether "same cluster" also means "same meaning"
differs from corpus to corpus: on short texts about a few things it nearly does, on encyclopaedia sentences it does
not. That is measured, without labels, by *prediction strength* (Tibshirani & Walther 2005): split the sentences in
two halves, cluster one half on its own, and ask which share of a cluster's pairs in the other half this independent
clustering puts together as well. Corrected for chance, this share is the cluster's *trust*: 1 if the pairs always
stay together, 0 if they do so no more often than any two sentences. A corpus in which no number of clusters repeats
is not made of clusters, and none of its clusters is trusted: training on it is plain contrastive learning. Clusters
that repeat bring a `TopicLayer` along. Whether the model is the one to ask at all is found out in
`st_clusterns.word_overlap`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix
from sentence_transformers import SentenceTransformer
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import normalize
from torch import Tensor

from st_clusterns.embeddings import Rows, describe_model, embed_or_read
from st_clusterns.spelling import SpellingLayer, can_spell, fit_spelling
from st_clusterns.topic_layer import TopicLayer, fit_topic_layer, fit_whitening
from st_clusterns.word_overlap import learn_token_weights
from st_clusterns.words import word_vectors

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

LARGE = 50_000  # rows above which k-means sees a sample, and embeddings are never in memory as a whole in float32
SAMPLE_PER_CLUSTER, SAMPLE_ITERATIONS = 128, 10  # of that k-means
START_ROWS = 2000  # rows that its first centroids are taken from, at least
BLOCK = 16384  # rows that a pass over all of them takes at a time
REPEATS = 0.5  # mean trust from which on a pair of one cluster is more likely than not to stay together
TOPICAL = 0.57  # mean trust of the coarsest clusters from which on they are topics; see `most_repeatable_clusters`
TRUST_ROWS = 10_000  # rows on which prediction strength is measured
MANY_ROWS = 8000  # rows below which less trust is asked for: halves of few rows repeat each other's clusters less
WORDS = 0.7  # length of a sentence's word vector beside its embedding, which has length 1
WORDS_OVER_MODEL = 7.0  # the same, where words judge better than the model
WORDS_ROWS = 5000  # sentences below which word vectors shrink in proportion: few say little of what goes together


@dataclass(frozen=True, eq=False)
class CorpusClusters:
    """The clusters of a corpus of `N` sentences.

    Attributes:
        ids: the cluster of each sentence, 0 to K-1, (N,).
        centroids: the mean of each cluster's unit vectors, behind the layer if there is one, (K, D).
        trust: how far each cluster is to be trusted, 0 to 1, (K,).
        layer: what `ClusterNSLoss` puts at the end of the model, if anything (`st_clusterns.topic_layer`).
        spelling: what it puts behind that, if anything (`st_clusterns.spelling`); the centroids are those before it.
        words: length of the word vectors that were joined to embeddings of length 1 to find the clusters.
        token_weights: of each of the model's tokens, where no cluster is trusted and shared words judge better than
            the model (`st_clusterns.word_overlap`), (V,).
    """

    ids: Ints
    centroids: Floats
    trust: Floats
    layer: TopicLayer | None = None
    spelling: SpellingLayer | None = None
    words: float = 0.0
    token_weights: Floats | None = None

    @property
    def n_clusters(self) -> int:
        """The number of clusters `K`."""
        return len(self.centroids)

    def numbers_like(self, other: CorpusClusters) -> bool:
        """Whether a cluster number means the same sentences in both."""
        return self is other or np.array_equal(self.ids, other.ids)

    def append_layers_to(self, model: Any) -> None:
        """Put the layers, if any, at the end of a model that does not have them yet."""
        for layer in (self.layer, self.spelling):
            if layer is not None:
                layer.append_to(model)

    def tensors(self) -> dict[str, Tensor]:
        """Return what `Clusters.seed` takes."""
        return {"centroids": torch.tensor(self.centroids), "trust": torch.tensor(self.trust)}

    @property
    def sizes(self) -> Ints:
        """The number of sentences in each cluster, (K,)."""
        return np.bincount(self.ids, minlength=self.n_clusters)


def cluster_corpus(
    embeddings: npt.ArrayLike,
    n_clusters: int | None = None,
    seed: int = 0,
    *,
    sentences: Sequence[str] | None = None,
    model: SentenceTransformer | None = None,
    topic_layer: bool = True,
) -> CorpusClusters:
    """Cluster a corpus by k-means on unit vectors, and measure each cluster's trust.

    Above 50,000 rows, k-means runs on a random sample of them (128 a cluster, 50,000 at least), by faiss if it is
    installed, else by scikit-learn; ids, centroids and trust are those of all rows.

    Args:
        embeddings: one row a sentence, (N, D); they are normalised here. Of a large corpus, float16 and memory-mapped
            arrays are read in blocks and never copied as a whole.
        n_clusters: number of clusters `K`. Without it, the largest that repeats (`most_repeatable_clusters`), or the
            finest of that grid if none does.
        seed: of every random choice.
        sentences: the texts, (N,). With them, sentences are clustered by their embeddings and their words at once
            (`st_clusterns.words`), which is better; without, and where no cluster is trusted, by their embeddings.
        model: what made the embeddings. With it and the sentences, a model whose clusters are not trusted and that
            judges worse than shared words (`st_clusterns.word_overlap`) gets clusters of words, or if these are not to
            be trusted either, words as a teacher, a layer that whitens, and one that spells.
        topic_layer: compute the layer that trusted clusters suggest, or those that such a model needs.

    Raises:
        ValueError: if there are fewer than 4 rows, fewer rows than 2 a cluster, not as many sentences, or a value is
            not finite.
    """
    rows = open_rows(embeddings)
    _check_sentences(rows, sentences)
    view = _find_view(rows, sentences, model, seed)
    if n_clusters is None:
        n_clusters = view.repeatable or _grid(len(rows))[-1]
    if not 2 <= n_clusters <= len(rows) // 2:
        raise ValueError(
            f"n_clusters={n_clusters} does not fit {len(rows)} sentences: choose 2 to {max(2, len(rows) // 2)}, so "
            "that a cluster has two sentences on average, or leave it out."
        )
    centroids = _kmeans(view.rows, n_clusters, seed)
    clusters = _finish(rows, view.rows, centroids, seed, trusted=view.repeatable is not None)
    clusters = replace(clusters, words=view.words, token_weights=view.token_weights)
    if not topic_layer or (view.repeatable is None and view.token_weights is None):
        return clusters
    clusters = _with_layer(rows, clusters, seed)
    if view.token_weights is None or sentences is None or not can_spell(model):
        return clusters
    return _with_spelling(rows, clusters, sentences, model, view.token_weights, seed)


class _View(NamedTuple):
    rows: Floats | UnitRows  # what is clustered
    repeatable: int | None  # the largest number of clusters that repeats, if any
    words: float = 0.0
    token_weights: Floats | None = None


def _find_view(
    rows: Floats | UnitRows, sentences: Sequence[str] | None, model: SentenceTransformer | None, seed: int
) -> _View:
    """Decide by what sentences are clustered, and whether these clusters repeat."""
    repeatable = most_repeatable_clusters(rows, seed)  # not of the joined rows, of which too fine clusters repeat, too
    if sentences is None:
        return _View(rows, repeatable)
    if repeatable:
        length = WORDS * min(1.0, len(rows) / WORDS_ROWS)
        return _View(_with_words(rows, sentences, seed, length), repeatable, length)
    token_weights = None if model is None else learn_token_weights(sentences, model, seed)
    if token_weights is None:
        return _View(rows, None)
    joined = _with_words(rows, sentences, seed, WORDS_OVER_MODEL)  # words judge better: they find the clusters
    repeatable = most_repeatable_clusters(joined, seed)
    if repeatable:
        return _View(joined, repeatable, WORDS_OVER_MODEL)
    return _View(rows, None, token_weights=token_weights)


def _with_layer(rows: Floats | UnitRows, clusters: CorpusClusters, seed: int) -> CorpusClusters:
    places = slice(None) if len(rows) <= LARGE else np.random.default_rng(seed).permutation(len(rows))[:LARGE]
    if clusters.token_weights is None:
        layer = fit_topic_layer(rows[places], clusters.ids[places], clusters.n_clusters)
    else:
        layer = fit_whitening(rows[places])
    mapped = layer(rows) if isinstance(rows, np.ndarray) else UnitRows(rows, layer)
    return replace(clusters, centroids=_means(mapped, clusters.ids, layer(normalize(clusters.centroids))), layer=layer)


def _with_spelling(
    rows: Floats | UnitRows,
    clusters: CorpusClusters,
    sentences: Sequence[str],
    model: SentenceTransformer,
    token_weights: Floats,
    seed: int,
) -> CorpusClusters:
    sample = rows[np.random.default_rng(seed).permutation(len(rows))[:LARGE]]
    sample = sample if clusters.layer is None else clusters.layer(sample)
    return replace(clusters, spelling=fit_spelling(sample, sentences, model, token_weights, seed))


def follow_corpus(
    embeddings: npt.ArrayLike, clusters: CorpusClusters, seed: int = 0, *, sentences: Sequence[str] | None = None
) -> CorpusClusters:
    """Cluster a corpus anew after its model has changed; cluster numbers keep their meaning.

    k-means goes on from the means of the previous clusters' members.

    Args:
        embeddings: the new embeddings of the same sentences in the same order, (N, D).
        clusters: the previous clusters.
        seed: of every random choice.
        sentences: the texts, if the previous clusters are of their words as well.

    Raises:
        ValueError: if the embeddings are not of as many sentences and dimensions, or not finite.
    """
    rows = open_rows(embeddings)
    expected = (len(clusters.ids), clusters.centroids.shape[1])
    if rows.shape != expected:
        raise ValueError(
            f"embeddings have the shape {rows.shape}, but the clusters are of {expected[0]} sentences in {expected[1]} "
            "dimensions: embed the same sentences, in the same order, by the same model."
        )
    _check_sentences(rows, sentences)
    views = _with_words(rows, sentences, seed, clusters.words) if sentences is not None and clusters.words else rows
    no_words = ((0, 0), (0, views.shape[1] - rows.shape[1]))
    before = _means(views, clusters.ids, np.pad(clusters.centroids, no_words))
    centroids = _kmeans(views, clusters.n_clusters, seed, before)
    after = _finish(rows, views, centroids, seed, trusted=bool(clusters.trust.any()))
    return replace(clusters, ids=after.ids, centroids=after.centroids, trust=after.trust)


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
    for n_clusters in _grid(len(sample)):
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
        ids = nearest(rows, _kmeans(rows, n_clusters, clustering))
        trusts.append(cluster_trust(rows, ids, n_clusters, clustering)[ids].mean())
    return float(np.mean(trusts))


def _grid(n_rows: int) -> list[int]:
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
        others = nearest(rows[judged], _kmeans(rows[judges], min(n_clusters, len(judges)), seed))
        table = np.zeros((n_clusters, n_clusters))  # [cluster, the judges' cluster]
        np.add.at(table, (ids[judged], others), 1)
        sizes = table.sum(1)
        together += (table * (table - 1)).sum(1)
        chance = float(((table.sum(0) / len(judged)) ** 2).sum())
        expected += chance * sizes * (sizes - 1)
        pairs += sizes * (sizes - 1)
    strength = (together - expected) / np.maximum(pairs - expected, 1e-9)
    return np.where(pairs > 0, strength, 0).clip(0, 1).astype(np.float32)


def nearest(rows: Floats | UnitRows, centroids: Floats) -> Ints:
    """Return the most cosine-similar centroid of each row, in blocks to keep memory small: (N, D) -> (N,)."""
    directions = normalize(centroids).T
    blocks = [(rows[i : i + BLOCK] @ directions).argmax(1) for i in range(0, len(rows), BLOCK)]
    return np.concatenate(blocks).astype(np.int64)


def unit_rows(embeddings: npt.ArrayLike) -> Floats:
    """Return the rows as float32 unit vectors.

    Raises:
        ValueError: if they are not a matrix, fewer than 4, or not finite.
    """
    rows = np.asarray(embeddings, dtype=np.float32)
    _check_matrix(rows)
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise ValueError(
            f"embeddings hold NaN or Inf in row {int(bad.argmax())} ({int(bad.sum())} of {len(rows)} rows): "
            "is the model broken, or loaded in half precision on a device that lacks it?"
        )
    unit: Floats = normalize(rows)
    return unit


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
        layer: TopicLayer | None = None,
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


def _join(rows: Floats, words: npt.NDArray[Any]) -> Floats:
    joined: Floats = normalize(np.hstack([rows, words.astype(np.float32)]), copy=False)
    return joined


def _check_sentences(rows: Floats | UnitRows, sentences: Sequence[str] | None) -> None:
    if sentences is not None and len(sentences) != len(rows):
        raise ValueError(f"There are {len(rows)} embeddings, but {len(sentences)} sentences: pass those embedded.")


def _with_words(rows: Floats | UnitRows, sentences: Sequence[str], seed: int, length: float) -> Floats | UnitRows:
    """Join the embeddings of sentences with the vectors of their words, of this length: (N, D) -> (N, D + W)."""
    words = word_vectors(sentences, seed)
    if words is None:
        return rows
    words *= length
    return _join(rows, words) if isinstance(rows, np.ndarray) else UnitRows(rows, words=words)


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
            raise ValueError(
                f"embeddings hold NaN or Inf in row {bad}: is the model broken, or loaded in half precision on a "
                "device that lacks it?"
            )
    return UnitRows(matrix)


def _check_matrix(rows: npt.NDArray[Any]) -> None:
    if rows.ndim != 2 or len(rows) < 4:
        raise ValueError(f"embeddings must be a matrix of 4 rows or more, got the shape {rows.shape}.")


def _kmeans(rows: Floats | UnitRows, n_clusters: int, seed: int, start: Floats | None = None) -> Floats:
    if isinstance(rows, UnitRows):
        return _kmeans_of_sample(rows, n_clusters, seed, start)
    init, n_init = ("k-means++", 2) if start is None else (start, 1)
    return _scikit_kmeans(rows, n_clusters, seed, init=init, n_init=n_init, max_iter=100)


def _kmeans_of_sample(rows: UnitRows, n_clusters: int, seed: int, start: Floats | None) -> Floats:
    """k-means on a sample: its size, not the corpus's, sets the time and memory."""
    size = min(len(rows), max(LARGE, SAMPLE_PER_CLUSTER * n_clusters))
    sample = rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:size])]
    if start is None:  # on a sample of the sample: all of it would take longer than the k-means
        some = sample[:: size // min(size, max(START_ROWS, 4 * n_clusters))]
        start, _ = kmeans_plusplus(some, n_clusters, random_state=seed)
    try:
        import faiss
    except ImportError:
        return _scikit_kmeans(sample, n_clusters, seed, init=start, n_init=1, max_iter=SAMPLE_ITERATIONS)
    method = faiss.Kmeans(
        sample.shape[1],
        n_clusters,
        niter=SAMPLE_ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,  # else it prints a warning
        max_points_per_centroid=size,
    )
    method.train(sample, init_centroids=start)
    return np.asarray(method.centroids, dtype=np.float32)


def _scikit_kmeans(rows: Floats, n_clusters: int, seed: int, **settings: Any) -> Floats:
    method = KMeans(n_clusters, random_state=seed, **settings)
    with warnings.catch_warnings():
        # Fewer different sentences than clusters: some clusters stay empty, which all that follows can bear.
        warnings.simplefilter("ignore", ConvergenceWarning)
        centroids: Floats = method.fit(rows).cluster_centers_.astype(np.float32)
    return centroids


def _finish(
    rows: Floats | UnitRows, views: Floats | UnitRows, centroids: Floats, seed: int, trusted: bool
) -> CorpusClusters:
    """Assign the rows by all views of them; the centroids that a model can use are means of the embeddings."""
    ids = nearest(views, centroids)
    means = _means(rows, ids, centroids[:, : rows.shape[1]])
    trust = cluster_trust(views, ids, len(centroids), seed) if trusted else np.zeros(len(centroids), np.float32)
    return CorpusClusters(ids, means, trust)


def _means(rows: Floats | UnitRows, ids: Ints, fallback: Floats) -> Floats:
    sums = np.zeros_like(fallback)
    block = len(rows) if isinstance(rows, np.ndarray) else BLOCK
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        member = csr_matrix(
            (np.ones_like(part[:, 0]), (ids[start : start + block], np.arange(len(part)))), (len(sums), len(part))
        )
        sums += member @ part
    counts = np.bincount(ids, minlength=len(fallback))[:, None]
    return np.where(counts > 0, sums / np.maximum(counts, 1), fallback).astype(np.float32)


def _halves(n_rows: int, seed: int, splits: int) -> Iterator[tuple[Ints, Ints]]:
    generator = np.random.default_rng(seed)
    for _ in range(splits):
        order = generator.permutation(n_rows)[:TRUST_ROWS]
        middle = len(order) // 2
        yield order[:middle], order[middle:]
        yield order[middle:], order[:middle]


def embed_corpus(
    sentences: Sequence[str],
    model: SentenceTransformer,
    batch_size: int = 64,
    show_progress_bar: bool = True,
    bf16: bool = False,
    cache: str | Path | None = None,
) -> Rows:
    """Embed a corpus with `model.encode`.

    Args:
        sentences: `N` texts.
        model: embeds them.
        batch_size: texts in a batch.
        show_progress_bar: while embedding.
        bf16: in bfloat16 mixed precision, for processors that have it (`results/speed` states gain and loss).
        cache: a folder that keeps the embeddings: the same call reads them there, or goes on where a killed one
            stopped (`st_clusterns.embeddings`).

    Returns:
        Unit vectors, (N, D), in float32. With `cache` they are memory-mapped and read-only, and of more than 50,000
        sentences in float16.
    """

    def embed(texts: Sequence[str]) -> Rows:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            rows: Rows = model.encode(
                list(texts),
                batch_size=batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=show_progress_bar,
            )
        return rows.astype(np.float32)

    if cache is None:
        return embed(sentences)
    dtype = np.float32 if len(sentences) <= LARGE else np.float16
    return embed_or_read(sentences, embed, describe_model(model, bf16=bf16), cache, dtype)


_CORPUS_OF_MODEL: WeakKeyDictionary[object, CorpusClusters] = WeakKeyDictionary()  # the last one noted
_READERS_OF_MODEL: WeakKeyDictionary[object, WeakKeyDictionary[object, CorpusClusters]] = WeakKeyDictionary()


def remember_corpus(model: object, clusters: CorpusClusters, reader: object = None) -> None:
    """Note the clusters of the corpus that a model is about to be trained on.

    `model.fit` carries nothing but texts and labels from a loader to a loss; this note lets the loss find the
    centroids that the labels are numbers of.

    Args:
        model: the model.
        clusters: of the corpus.
        reader: what numbers sentences by these clusters, for as long as it lives.
    """
    model = unwrap(model)
    _CORPUS_OF_MODEL[model] = clusters
    if reader is not None:
        _READERS_OF_MODEL.setdefault(model, WeakKeyDictionary())[reader] = clusters


def recall_corpus(model: object) -> CorpusClusters | None:
    """Return the clusters noted for a model, if any: those of its living reader, else the last.

    Raises:
        ValueError: if living readers number sentences differently: a label does not tell whose number it is.
    """
    model = unwrap(model)
    living = list(_READERS_OF_MODEL.get(model, {}).values())
    if any(not living[-1].numbers_like(other) for other in living):
        raise ValueError(
            f"{len(living)} data loaders have clustered a corpus for this model, and labels do not tell whose cluster "
            "numbers they are. Say it when making each loss, ClusterNSLoss(model, clusters=loader.clusters), or drop "
            "the loaders that are not trained with (del loader)."
        )
    return living[-1] if living else _CORPUS_OF_MODEL.get(model)


def unwrap(model: Any) -> Any:
    """Return the model inside the wrappers of several processes (`module`) and of `torch.compile` (`_orig_mod`)."""
    while inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None):
        model = inner
    return model
