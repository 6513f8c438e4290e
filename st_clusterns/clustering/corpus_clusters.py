"""`CorpusClusters`: the clusters of a corpus, with the measured trust of each.

1. Take the distinct sentences, of a large corpus a random sample (`st_clusterns.clustering.sample`), and embed them.
2. Choose the number of clusters `K` by prediction strength on the embeddings, which also says whether the corpus has
   topics at all (`st_clusterns.clustering.n_clusters`).
3. If it has, join each embedding with the tf-idf vector of the sentence (`st_clusterns.clustering.tfidf`).
4. Cluster by k-means, measure the trust of each cluster, and take the mean embedding of each as its centroid.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sentence_transformers import SentenceTransformer

from st_clusterns.clustering.embedding import as_texts, each_text, embed_corpus
from st_clusterns.clustering.kmeans import cluster_means, kmeans, nearest
from st_clusterns.clustering.labels import as_labels, number_labels
from st_clusterns.clustering.n_clusters import choose_n_clusters, trust_bound
from st_clusterns.clustering.sample import check_counts, embed_sample, sample_distinct
from st_clusterns.clustering.tfidf import join_tfidf
from st_clusterns.clustering.topic_layer import (
    append_topic_layer,
    fit_topic_layer,
    owner_of_topic_layer,
    remove_topic_layer,
)
from st_clusterns.clustering.topic_names import nearest_sentences, topic_names
from st_clusterns.clustering.trust import cluster_trust
from st_clusterns.clustering.vectors import Floats, Ints, unit_rows
from st_clusterns.models import dimension_of, resolve_prompt

logger = logging.getLogger(__name__)

FEW_CLUSTERS, RUNS = 32, 10  # k-means runs for so few clusters that are asked for: they have several solutions
MIN_TRUST = 0.2  # trust below which a single cluster of a corpus with topics does not count
DIMENSIONS = "{} {} dimensions, the clusters {}: fit them with this model."
NOTE = "corpus_clusters"  # the attribute of a model on which a data loader notes its clusters


@dataclass(frozen=True, eq=False)
class CorpusClusters:
    """The clusters of a corpus. Make them with `CorpusClusters.fit(sentences, model)`.

    Attributes:
        sentences: the distinct sentences that were clustered, `N`.
        embeddings: their unit vectors, (N, D).
        ids: the cluster of each, 0 to K-1, (N,).
        centroids: the mean embedding of each cluster, (K, D).
        trust: how far each cluster can be trusted, 0 to 1, (K,).
        has_topics: whether the corpus is made of clusters at all. If not, a loss takes no notice of them.
        curve: the mean trust of each number of clusters that was tried.
        bound: what the highest of them must reach for the corpus to have topics.
        prompt: what the model read before each sentence. Training must read it too: `prompts=clusters.prompt` in the
            training arguments.
        given_names: names of the clusters, `K`, in place of those found in the sentences.
    """

    sentences: list[str] = field(repr=False)
    embeddings: Floats = field(repr=False)
    ids: Ints = field(repr=False)
    centroids: Floats = field(repr=False)
    trust: Floats = field(repr=False)
    has_topics: bool
    curve: dict[int, float]
    bound: float
    prompt: str = ""
    given_names: list[str] | None = field(default=None, repr=False)

    @classmethod
    def fit(
        cls,
        sentences: Iterable[str],
        model: SentenceTransformer | None = None,
        n_clusters: int | None = None,
        seed: int = 0,
        *,
        embeddings: npt.ArrayLike | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int = 64,
        show_progress_bar: bool = True,
        cache: str | Path | None = None,
        devices: Sequence[str] | None = None,
    ) -> CorpusClusters:
        """Embed and cluster the distinct sentences, a random sample of 50,000 at most, and measure their trust.

        Args:
            sentences: the corpus: a list, a column of a table, a generator, a `SentenceFile`. It is read once, as a
                stream.
            model: embeds it.
            n_clusters: number of clusters `K`; of 32 and fewer, the k-means run of ten with the
                lowest inertia is taken. Default: chosen
                by prediction strength (`choose_n_clusters`), which also says whether there are topics, whatever the
                number.
            seed: seed of the random number generator.
            embeddings: of the sentences, in their order, in place of a model, (len(sentences), D).
            prompt: what the model reads before each sentence; "" for nothing.
            prompt_name: its name among `model.prompts`, in place of `prompt`. Default: the model's default prompt.
            batch_size: texts per batch while embedding.
            show_progress_bar: whether to show one while embedding.
            cache: a folder that keeps the embeddings (`embed_corpus`).
            devices: devices that embed at a time, a process for each (`embed_corpus`). Default: that of the model.

        Raises:
            ValueError: if the sentences are no texts, fewer than 4 distinct ones, too few for `n_clusters`, if an
                embedding is not finite, if the model does not tell the sentences apart, or if it cannot be trained as
                it is.
        """
        sample = sample_distinct(each_text(sentences), seed)
        texts = sample.texts
        check_counts(len(texts), sample.n_texts, n_clusters)
        prompt = resolve_prompt(model, prompt, prompt_name)
        how: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar, "cache": cache}
        rows = embed_sample(sample, model, embeddings, prompt=prompt, devices=devices, **how)
        clusters = cls(texts, rows, **_cluster(rows, texts, n_clusters, seed), prompt=prompt)
        logger.info(clusters.verdict)
        return clusters

    @classmethod
    def from_labels(
        cls,
        sentences: Iterable[str],
        labels: Iterable[Any],
        model: SentenceTransformer | None = None,
        seed: int = 0,
        *,
        embeddings: npt.ArrayLike | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int = 64,
        show_progress_bar: bool = True,
        cache: str | Path | None = None,
        devices: Sequence[str] | None = None,
    ) -> CorpusClusters:
        """Take clusters of your own, as of a taxonomy, BERTopic or HDBSCAN, and measure their trust.

        The trust of a cluster is the share of its pairs that k-means with as many clusters puts together as well,
        corrected for chance. `has_topics` says whether its mean suffices at these clusters. If you know better, use
        `dataclasses.replace(clusters, has_topics=True, trust=...)`.

        Args:
            sentences: the corpus. Of exact duplicates the first counts.
            labels: the cluster of each sentence: numbers, or texts, which become `names`. -1, None, NaN and NA stand
                for no cluster: these sentences make up the last cluster, whose trust is 0.

        The other arguments are those of `fit`.

        Raises:
            ValueError: as of `fit`, and if there is not one label for each sentence, only one distinct label, or labels
                of several types.
        """
        sample = sample_distinct(each_text(sentences), seed)
        texts, given = sample.texts, as_labels(labels, sample.n_texts)
        check_counts(len(texts), sample.n_texts)
        ids, names, has_outliers = number_labels([given[place] for place in sample.places])
        prompt = resolve_prompt(model, prompt, prompt_name)
        how: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar, "cache": cache}
        rows = embed_sample(sample, model, embeddings, prompt=prompt, devices=devices, **how)
        trust = cluster_trust(rows, ids, len(names), seed)
        inside = ids < len(names) - has_outliers
        trust[len(names) - has_outliers :] = 0
        mean, bound = float(trust[ids[inside]].mean()), trust_bound(int(inside.sum()))
        named = any(isinstance(label, str) for label in given)
        clusters = cls(
            texts,
            rows,
            ids,
            cluster_means(rows, ids, len(names)),
            trust,
            has_topics=mean >= bound,
            curve={len(names): mean},
            bound=bound,
            prompt=prompt,
            given_names=names if named else None,
        )
        logger.info(clusters.verdict)
        return clusters

    @property
    def n_clusters(self) -> int:
        """The number of clusters `K`."""
        return len(self.centroids)

    @property
    def sizes(self) -> Ints:
        """The number of sentences in each cluster, (K,)."""
        return np.bincount(self.ids, minlength=self.n_clusters)

    @property
    def trusted(self) -> npt.NDArray[np.bool_]:
        """Which clusters a loss uses, (K,): none if the corpus has no topics."""
        enough: npt.NDArray[np.bool_] = (self.trust >= MIN_TRUST) & self.has_topics
        return enough

    @property
    def verdict(self) -> str:
        """What was found, in a sentence."""
        found = f"{len(self.sentences):,} sentences in {self.n_clusters} clusters, "
        if not self.has_topics:
            return (
                f"{found}highest mean trust {self.highest_trust:.2f} ({self.bound:.2f} is asked for): "
                "no topics were found, so training is plain in-batch contrastive learning."
            )
        share = self.sizes[self.trusted].sum() / len(self.sentences)
        return (
            f"{found}mean trust {self.mean_trust:.2f}: the corpus has topics, and {share:.0%} of the sentences are in "
            "trusted clusters."
        )

    @property
    def mean_trust(self) -> float:
        """The mean over sentences of the trust of their cluster."""
        return float(self.trust[self.ids].mean())

    @property
    def highest_trust(self) -> float:
        """The highest mean trust of a number of clusters that was tried."""
        return max(self.curve.values())

    @cached_property
    def names(self) -> list[str]:
        """A distinct name for each cluster, `K`: its words of the highest class-based tf-idf (`topic_names`)."""
        return self.given_names or topic_names(self.sentences, self.ids, self.n_clusters)

    def examples(self, count: int = 3) -> list[list[str]]:
        """Return the sentences of each cluster that are nearest to its centroid: `K` lists of at most `count`."""
        places = nearest_sentences(self.embeddings, self.ids, self.centroids, count)
        return [[self.sentences[place] for place in of_cluster] for of_cluster in places]

    @property
    def fingerprint(self) -> str:
        """A hash of the sentences, their cluster ids and the centroids."""
        digest = hashlib.sha256(self.ids.tobytes() + self.centroids.tobytes())
        digest.update("\0".join(self.sentences).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def sample(self, count: int, seed: int = 0) -> CorpusClusters:
        """Return these clusters with their names and `count` of their sentences, drawn at random, in their order."""
        if count >= len(self.sentences):
            return self
        drawn = np.sort(np.random.default_rng(seed).choice(len(self.sentences), count, replace=False))
        return replace(
            self,
            sentences=[self.sentences[place] for place in drawn],
            embeddings=self.embeddings[drawn],
            ids=self.ids[drawn],
            given_names=self.names,
        )

    def predict(
        self,
        sentences: Iterable[str] | Floats,
        model: SentenceTransformer | None = None,
        batch_size: int = 64,
        show_progress_bar: bool = False,
    ) -> Ints:
        """Return the cluster of each sentence as a loss sees it, (N,), values 0 to K-1.

        With a model, `sentences` are texts: one that was clustered has its cluster, any other the nearest centroid.
        Without, they are embeddings, (N, D), and each has the nearest centroid. Whether a cluster counts is another
        question: `clusters.trusted[ids]`.

        Args:
            sentences: `N` texts or embeddings.
            model: the model that the clusters were made with; it reads `prompt` before each text.
            batch_size: texts per batch while embedding.
            show_progress_bar: whether to show one while embedding.
        """
        if model is None:
            rows = np.asarray(sentences)
            if rows.dtype.kind not in "fiu":
                raise ValueError("predict() of texts needs the model: clusters.predict(sentences, model).")
            rows = unit_rows(rows, least=1)
            if rows.shape[1] != self.centroids.shape[1]:
                raise ValueError(DIMENSIONS.format("The embeddings have", rows.shape[1], self.centroids.shape[1]))
            return nearest(rows, self.centroids)
        texts = as_texts(sentences)
        known = dict(zip(self.sentences, self.ids.tolist(), strict=True))
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            self.check_model(model, dimension_of(model))
            rows = embed_corpus(new, model, batch_size, show_progress_bar, prompt=self.prompt)
            known |= zip(new, nearest(rows, self.centroids).tolist(), strict=True)
        return np.array([known[text] for text in texts], dtype=np.int64)

    def add_topic_layer(self, model: SentenceTransformer) -> None:
        """Append a linear layer, which scales down within-cluster variance, to the model that was clustered with.

        No training is needed. A second call changes nothing. To train as well, train first, fit new clusters, and add
        the layer last. A `ValueError` says why a layer does not suit the corpus or the model.
        """
        if not self.has_topics:
            raise ValueError("The corpus has no topics, so no layer is to be had from its clusters.")
        layer = fit_topic_layer(self.embeddings, self.ids, self.n_clusters)
        append_topic_layer(model, layer, self.fingerprint)

    @staticmethod
    def remove_topic_layer(model: SentenceTransformer) -> None:
        """Take the layer of `add_topic_layer` off a model; one without it stays as it is."""
        remove_topic_layer(model)

    def check_model(self, model: Any, dimension: int) -> None:
        """Refuse, by a `ValueError`, a model whose embeddings are not those that were clustered."""
        if dimension != self.centroids.shape[1]:
            raise ValueError(DIMENSIONS.format("The model has", dimension, self.centroids.shape[1]))
        if owner_of_topic_layer(model) == self.fingerprint:
            raise ValueError(
                "The model has the topic layer of these clusters, which were fitted without it: call "
                "clusters.remove_topic_layer(model), or fit new clusters."
            )

    def note_on(self, model: Any) -> None:
        """Note the clusters on a model, for `ClusterNSLoss(model)` to find; the next note replaces this one."""
        setattr(model, NOTE, self)

    @staticmethod
    def noted_on(model: Any) -> CorpusClusters | None:
        """Return the clusters noted on a model, if any."""
        return getattr(model, NOTE, None)

    def __deepcopy__(self, memo: Any) -> CorpusClusters:
        """Return itself, which nothing changes: a copy of a model shares its note."""
        return self


def _cluster(rows: Floats, sentences: Sequence[str], n_clusters: int | None, seed: int) -> dict[str, Any]:
    count = choose_n_clusters(rows, seed, n_clusters)
    # K and the verdict come from the embeddings alone: too fine clusters of joined vectors repeat as well.
    views = join_tfidf(rows, sentences, seed) if count.has_topics else rows
    runs = RUNS if n_clusters is not None and n_clusters <= FEW_CLUSTERS else 1
    ids = nearest(views, kmeans(views, count.n_clusters, seed, runs))
    return {
        "ids": ids,
        "centroids": cluster_means(rows, ids, count.n_clusters),
        "trust": cluster_trust(views, ids, count.n_clusters, seed),
        "has_topics": count.has_topics,
        "curve": count.curve,
        "bound": count.bound,
    }
