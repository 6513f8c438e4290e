"""`ClusterNSLoss`: contrastive learning from plain sentences with clusters of the whole corpus.

One step on a batch of `B` rows (`K` clusters, `D` dimensions):

1. Embed. One text column is encoded twice with independent dropout; the second view is the positive.
2. Look up the cluster of each row: that of its anchor or positive if it was clustered, which the loss recognises by its
   tokens, else the centroid nearest to the anchor. Clusters that are not trusted do not count.
3. Contrastive term: cross-entropy of a row's positive among the batch's positives and the explicit negatives, without
   false negatives: rows of the same cluster (Deng et al., Findings of ACL 2023) and copies of the same text.
4. Pull: cross-entropy among all centroids (Li et al., Prototypical Contrastive Learning, ICLR 2021), times
   `pull_weight`. Its target is the place of the row's own centroid among all of them, so the pull ends at the centroid,
   and near clusters share the target: two halves of one topic are not pushed apart.

The published method is another class, `st_clusterns.losses.published.PublishedClusterNSLoss`.
"""

from __future__ import annotations

import logging
import reprlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_clusterns import citations
from st_clusterns.checks import check_number
from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.losses import distributed
from st_clusterns.losses.contrastive import Batch, ContrastiveLoss
from st_clusterns.losses.presets import find_preset
from st_clusterns.losses.terms import NO_CLUSTER, centroid_pull, same_cluster, soft_targets
from st_clusterns.losses.text_hashes import hash_sentences
from st_clusterns.models import device_of, dimension_of, unwrap

logger = logging.getLogger(__name__)

TOPIC_TEMPERATURE, PLAIN_TEMPERATURE = 0.1, 0.05  # with trusted clusters, and without
NO_CLUSTERS = (
    "ClusterNSLoss has no clusters. Choose one: make a ClusterDataLoader for this model first, pass "
    "clusters=CorpusClusters.fit(sentences, model), or take the published method, "
    'ClusterNSLoss.from_preset(model, "paper/bert-base").'
)


@dataclass
class ClusteredBatch(Batch):
    """A batch whose rows have clusters."""

    ids: Tensor  # the cluster of all rows, `NO_CLUSTER` where it is not trusted, (M,)
    to_centroids: Tensor  # cosines of this process's anchors with all centroids, (B, K)
    targets: Tensor  # of the pull, for each cluster, (K, K)

    leaves: ClassVar[tuple[str, ...]] = (*Batch.leaves, "to_centroids")


class ClusterNSLoss(ContrastiveLoss):
    """Contrastive loss in which sentences of one cluster are no negatives, and each is pulled to its centroid.

    Inputs are those of the built-in losses: one text column, (anchor, positive) pairs, or (anchor, positive,
    negative_1, ..., negative_n) tuples. No label is needed, and none is used.

    The loss never changes the model or the clusters. It tokenizes the clustered sentences when it is made: set
    `model.max_seq_length` before, or longer sentences are not recognised and have the nearest centroid. Sentences that
    were clustered with a prompt need it in training: `prompts=clusters.prompt` in the training arguments. If the corpus
    has no topics (`CorpusClusters.has_topics`), it is `MultipleNegativesRankingLoss` in which copies of a text are no
    negatives of each other. Works inside `MatryoshkaLoss` (lower dimensions see truncated centroids),
    `AdaptiveLayerLoss` and `Matryoshka2dLoss`. Sources: Deng et al. 2023; for the pull, Li et al. 2021.
    `docs/method.md` says what each part is worth.

    Args:
        model: the model to train.
        clusters: the clusters of the corpus. Default: those of the last `ClusterDataLoader` made for the model.
        temperature: divides every cosine in a cross-entropy, above 0. Default: 0.1 if the corpus has topics, else 0.05,
            that of `MultipleNegativesRankingLoss`.
        pull_weight: weight of the pull to centroids, 0 or more; 0 turns it off.
        gather_across_devices: whether the rows of all processes serve as negatives.

    Raises:
        ValueError: if there are no clusters, they do not fit the model, a number is out of its range, or the model
            cannot be trained as it is.

    Attributes:
        clusters: the `CorpusClusters`.
        centroids: unit vectors, (K, D), a buffer that no step changes.

    Example:
        ::

            clusters = CorpusClusters.fit(sentences, model)
            loss = ClusterNSLoss(model, clusters)
            trainer = SentenceTransformerTrainer(model, args, views_dataset(sentences, clusters), loss=loss)
    """

    centroids: Tensor
    targets: Tensor
    trusted: Tensor
    known_texts: Tensor
    known_ids: Tensor

    def __init__(
        self,
        model: SentenceTransformer,
        clusters: CorpusClusters | None = None,
        temperature: float | None = None,
        pull_weight: float = 1.0,
        gather_across_devices: bool = False,
    ) -> None:
        clusters = CorpusClusters.noted_on(unwrap(model)) if clusters is None else clusters
        if not isinstance(clusters, CorpusClusters):
            raise ValueError(NO_CLUSTERS if clusters is None else f"clusters={reprlib.repr(clusters)}: {NO_CLUSTERS}")
        if temperature is None:
            temperature = TOPIC_TEMPERATURE if clusters.has_topics else PLAIN_TEMPERATURE
        super().__init__(model, temperature, gather_across_devices)
        check_number("pull_weight", pull_weight, least=0)
        clusters.check_model(unwrap(model), dimension_of(model))
        self.clusters = clusters
        self.pull_weight = pull_weight
        self.checked_texts = False
        wanted = clusters.has_topics or clusters.prompt
        texts = hash_sentences(unwrap(model), clusters.sentences, clusters.prompt) if wanted else None
        texts, order = torch.empty(0, dtype=torch.long).sort() if texts is None else texts.sort()
        centroids = F.normalize(torch.tensor(clusters.centroids), dim=1)
        buffers = {
            "centroids": centroids,
            "targets": soft_targets(centroids, temperature),
            "trusted": torch.tensor(clusters.trusted),
            "known_texts": texts,
            "known_ids": torch.tensor(clusters.ids)[order],
        }
        for name, value in buffers.items():  # not persistent: they belong to the clusters, and change in no step
            self.register_buffer(name, value.to(device_of(model)), persistent=False)

    @classmethod
    def from_preset(cls, model: SentenceTransformer, name: str, **overrides: Any) -> ContrastiveLoss:
        """Make the published loss with the settings of one of its published rows.

        Args:
            model: the model to train.
            name: one of `st_clusterns.PRESETS`, such as "paper/bert-base"; ValueError for an unknown one.
            overrides: arguments of `PublishedClusterNSLoss`, which win over the preset.
        """
        from st_clusterns.losses.published import PublishedClusterNSLoss

        return PublishedClusterNSLoss(model, **{**find_preset(name).settings, **overrides})

    def prepare(self, embeddings: list[Tensor], texts: list[Tensor | None] | None = None) -> Batch:
        """Gather and normalise the columns, and look up the cluster of each row."""
        batch = super().prepare(embeddings, texts)
        pair = [hashes for hashes in (texts or [])[:2] if hashes is not None and len(self.known_texts)]
        if pair:
            self.check_texts(torch.cat(pair))
        if not self.clusters.has_topics:
            return batch
        width = batch.anchors.shape[1]
        centroids, targets = self.centroids.to(batch.anchors.dtype), self.targets
        if width < self.centroids.shape[1]:  # inside MatryoshkaLoss
            centroids = F.normalize(centroids[:, :width], dim=1)
            targets = soft_targets(centroids, self.temperature)
        to_centroids = batch.anchors @ centroids.T  # (B, K)
        ids = to_centroids.argmax(dim=1)
        for hashes in reversed(pair):  # an anchor that was clustered decides, else a positive
            places = torch.searchsorted(self.known_texts, hashes).clamp(max=len(self.known_texts) - 1)
            ids = torch.where(self.known_texts[places] == hashes, self.known_ids[places], ids)
        ids = ids.where(self.trusted[ids], NO_CLUSTER)
        ids = distributed.gather(ids) if self.gather_across_devices else ids
        return ClusteredBatch(**vars(batch), ids=ids, to_centroids=to_centroids, targets=targets)

    def check_texts(self, texts: Tensor) -> None:
        """Tell, at the first batch of a training, if it reads no sentence as clustering did; hashes of any shape."""
        if self.checked_texts or not self.is_training():
            return
        self.checked_texts = True
        if torch.isin(texts, self.known_texts).any():
            return
        if self.clusters.prompt:
            bare = hash_sentences(unwrap(self.model), self.clusters.sentences)
            if bare is not None and torch.isin(texts.cpu(), bare).any():
                raise ValueError(
                    f"The sentences were clustered with the prompt {self.clusters.prompt!r} and are trained on without "
                    "it: pass prompts=clusters.prompt in the training arguments, or cluster with prompt=''."
                )
        logger.warning(
            "No sentence of the first batch is one that was clustered: each has the nearest centroid. If it should be "
            "one, training reads it with another prompt (prompts=clusters.prompt) or another model.max_seq_length."
        )

    def terms(self, batch: Batch, rows: slice) -> Tensor:
        """Return what some of this process's rows add to the loss, a scalar."""
        loss = super().terms(batch, rows)
        if not isinstance(batch, ClusteredBatch) or self.pull_weight == 0:
            return loss
        pull = centroid_pull(batch.to_centroids[rows], batch.ids[batch.own[rows]], batch.targets, self.temperature)
        return loss + self.pull_weight * pull / len(batch.anchors)

    def no_negatives(self, batch: Batch, rows: slice) -> Tensor | None:
        """Return which candidates are no negatives: rows of the same cluster, and copies of a text."""
        copies = super().no_negatives(batch, rows)
        if not isinstance(batch, ClusteredBatch):
            return copies
        same = same_cluster(batch.ids, batch.own[rows])
        if len(batch.negatives):
            same = F.pad(same, (0, len(batch.negatives)))
        return same if copies is None else same.logical_or_(copies)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the model card."""
        return {
            "n_clusters": self.clusters.n_clusters,
            "has_topics": self.clusters.has_topics,
            "pull_weight": self.pull_weight,
            **super().get_config_dict(),
        }

    @property
    def citation(self) -> str:
        """The BibTeX entries of the papers that these settings use, for the model card."""
        if not self.clusters.has_topics:
            return citations.IN_BATCH_NEGATIVES
        return citations.CLUSTERNS + citations.PULL if self.pull_weight else citations.CLUSTERNS
