"""Cluster a whole corpus: the clusters, how far they are to be trusted, and the layers that they suggest.

k-means on unit vectors gives the clusters: of the embeddings, joined, where the sentences are at hand, with vectors of
the words that they share (`st_clusterns.words`). How far each is to be trusted is measured (`st_clusterns.trust`). A
corpus in which no number of clusters repeats is not made of clusters, and none of its clusters is trusted: training on
it is plain contrastive learning. Clusters that repeat bring a `TopicLayer` along. Whether the model is the one to ask
at all is found out in `st_clusterns.word_overlap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sklearn.preprocessing import normalize
from torch import Tensor

from st_clusterns.kmeans import cluster_means, kmeans, nearest
from st_clusterns.rows import LARGE, Floats, Ints, UnitRows, join_rows, map_rows, open_rows
from st_clusterns.spelling import SpellingLayer, can_spell, fit_spelling
from st_clusterns.topic_layer import TopicLayer, fit_topic_layer, fit_whitening
from st_clusterns.trust import cluster_numbers, cluster_trust, most_repeatable_clusters
from st_clusterns.word_overlap import learn_token_weights
from st_clusterns.words import word_vectors

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
        n_clusters = view.repeatable or cluster_numbers(len(rows))[-1]
    if not 2 <= n_clusters <= len(rows) // 2:
        raise ValueError(
            f"n_clusters={n_clusters} does not fit {len(rows)} sentences: choose 2 to {max(2, len(rows) // 2)}, so "
            "that a cluster has two sentences on average, or leave it out."
        )
    centroids = kmeans(view.rows, n_clusters, seed)
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
    centroids = cluster_means(map_rows(rows, layer), clusters.ids, layer(normalize(clusters.centroids)))
    return replace(clusters, centroids=centroids, layer=layer)


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
    before = cluster_means(views, clusters.ids, np.pad(clusters.centroids, no_words))
    centroids = kmeans(views, clusters.n_clusters, seed, before)
    after = _finish(rows, views, centroids, seed, trusted=bool(clusters.trust.any()))
    return replace(clusters, ids=after.ids, centroids=after.centroids, trust=after.trust)


def _check_sentences(rows: Floats | UnitRows, sentences: Sequence[str] | None) -> None:
    if sentences is not None and len(sentences) != len(rows):
        raise ValueError(f"There are {len(rows)} embeddings, but {len(sentences)} sentences: pass those embedded.")


def _with_words(rows: Floats | UnitRows, sentences: Sequence[str], seed: int, length: float) -> Floats | UnitRows:
    """Join the embeddings of sentences with the vectors of their words, of this length: (N, D) -> (N, D + W)."""
    words = word_vectors(sentences, seed)
    if words is None:
        return rows
    words *= length
    return join_rows(rows, words)


def _finish(
    rows: Floats | UnitRows, views: Floats | UnitRows, centroids: Floats, seed: int, trusted: bool
) -> CorpusClusters:
    """Assign the rows by all views of them; the centroids that a model can use are means of the embeddings."""
    ids = nearest(views, centroids)
    means = cluster_means(rows, ids, centroids[:, : rows.shape[1]])
    trust = cluster_trust(views, ids, len(centroids), seed) if trusted else np.zeros(len(centroids), np.float32)
    return CorpusClusters(ids, means, trust)


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
