"""`ClusterDataLoader`: embeds and clusters a corpus, then feeds it to `model.fit` with cluster numbers as labels."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sentence_transformers import InputExample, SentenceTransformer
from torch.utils.data import DataLoader, Dataset, Sampler

from st_clusterns.corpus import CorpusClusters, cluster_corpus, follow_corpus, remember_corpus
from st_clusterns.embeddings import embed_corpus
from st_clusterns.sampler import ClusterBatchSampler
from st_clusterns.sentences import check_sentences

logger = logging.getLogger(__name__)


class _Examples(Dataset[InputExample]):
    """The sentences as `InputExample`s, labelled by cluster from 1 on (`fit` drops a label column of only 0s)."""

    def __init__(self, sentences: Sequence[str], clusters: CorpusClusters) -> None:
        self.sentences = sentences
        self.clusters = clusters
        self.ids = clusters.ids.copy()  # the sampler reads it at every epoch

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> InputExample:
        return InputExample(texts=[self.sentences[index]], label=int(self.ids[index]) + 1)

    def recluster(self, model: SentenceTransformer, seed: int, show_progress_bar: bool) -> None:
        """Embed and cluster the sentences anew, since the model has changed."""
        was_training = model.training
        embeddings = embed_corpus(self.sentences, model, show_progress_bar=show_progress_bar)
        model.train(was_training)
        self.clusters = follow_corpus(embeddings, self.clusters, seed, sentences=self.sentences)
        self.ids[:] = self.clusters.ids


class _EpochOrder(Sampler[int]):
    """The rows in the order of a `ClusterBatchSampler`; each pass is a new epoch, as `old_fit` iterates."""

    def __init__(self, batches: ClusterBatchSampler, recluster: Callable[[], None] | None) -> None:
        self.batches = batches
        self.recluster = recluster
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.recluster is not None and self.epoch > 0:
            self.recluster()
        self.batches.set_epoch(self.epoch)
        self.epoch += 1
        return itertools.chain.from_iterable(self.batches)

    def __len__(self) -> int:
        return len(self.batches.dataset)


class ClusterDataLoader(DataLoader[Any]):
    """A DataLoader over plain sentences that knows their clusters.

    Under `model.fit` the cluster numbers reach `ClusterNSLoss` as labels, and the loss finds the corpus clusters by
    the model; where several loaders of one model are in use, tell each loss its own (`clusters=loader.clusters`).
    `fit` shuffles on its own, so the composition of batches (`group_size`) is kept by `old_fit`, and by
    `SentenceTransformerTrainer` with a `ClusterBatchSampler`, only.

    Args:
        sentences: the corpus, `N` texts.
        model: embeds the corpus, and is the model that will be trained.
        batch_size: sentences in a batch, 2 or more.
        n_clusters: number of clusters `K`; chosen from the corpus without it (`cluster_corpus`).
        group_size: sentences of one cluster laid side by side in a batch; 1 is a random order.
        recluster: embed and cluster the corpus anew before every pass but the first (`old_fit` only: `fit` passes
            over the loader once). Numbering goes on from the previous centroids.
        seed: of the clustering and of the order.
        show_progress_bar: while embedding.
        topic_layer: let the loss put a layer at the end of the model, if the clusters are to be trusted, or the model
            judges worse than shared words (`st_clusterns.topic_layer`).

    Raises:
        ValueError: if the sentences are not texts, or too few for a batch or for the clusters.

    Attributes:
        clusters: the `CorpusClusters`, for `ClusterNSLoss(model, clusters=loader.clusters)`.

    Example:
        ::

            loader = ClusterDataLoader(sentences, model, batch_size=128)
            model.fit(train_objectives=[(loader, ClusterNSLoss(model))], epochs=1)
    """

    def __init__(
        self,
        sentences: Sequence[str],
        model: SentenceTransformer,
        batch_size: int = 128,
        n_clusters: int | None = None,
        group_size: int = 1,
        recluster: bool = False,
        seed: int = 0,
        show_progress_bar: bool = True,
        topic_layer: bool = True,
    ) -> None:
        check_sentences(sentences, batch_size, n_clusters)
        embeddings = embed_corpus(sentences, model, show_progress_bar=show_progress_bar)
        clusters = cluster_corpus(
            embeddings, n_clusters, seed, sentences=sentences, model=model, topic_layer=topic_layer
        )
        examples = _Examples(sentences, clusters)
        # Nothing here refers back to the loader, so that it is gone, and the model's note of its corpus with it, as
        # soon as its name is given to another one.
        remember_corpus(model, examples.clusters, examples)
        batches = ClusterBatchSampler(examples, batch_size, seed=seed, ids=examples.ids, group_size=group_size)
        again = functools.partial(examples.recluster, model, seed, show_progress_bar) if recluster else None
        # A sampler, not a batch sampler: `fit` reads the loader's batch size, which a batch sampler would hide.
        super().__init__(examples, batch_size=batch_size, sampler=_EpochOrder(batches, again))
        self._examples = examples
        if group_size > 1:
            logger.warning(
                f"model.fit() shuffles on its own and does not keep group_size={group_size}; old_fit() does, and so "
                "does SentenceTransformerTrainer with batch_sampler=ClusterBatchSampler."
            )

    @property
    def clusters(self) -> CorpusClusters:
        """The clusters of the corpus as last computed."""
        return self._examples.clusters
