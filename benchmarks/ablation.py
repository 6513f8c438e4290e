"""`AblatedLoss`: `ClusterNSLoss` with one of its parts removed, exchanged or added, for the ablation only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_clusterns import ClusterNSLoss, CorpusClusters
from st_clusterns.losses.clusterns import ClusteredBatch
from st_clusterns.losses.contrastive import Batch
from st_clusterns.losses.terms import NO_CLUSTER, bidirectional_margin, centroid_pull, same_cluster
from st_clusterns.losses.text_hashes import repeats_text


class AblatedLoss(ClusterNSLoss):
    """The default loss and its variants.

    Args:
        model: the model to train.
        clusters: of the corpus.
        mask: whether rows of one cluster are no negatives of each other.
        contrast_weight: weight of the contrastive term.
        margin_weight: weight of the bidirectional margin (alpha 0, beta 0.3) on rows of one cluster.
        momentum: share of the way that centroids move to the mean of a batch's members.
        recognise: whether a clustered sentence has its cluster; else all rows have that of their nearest centroid.
        hard_negatives: whether the second nearest centroid is a negative of each row.
        soft: whether near centroids share the target of the pull; else it is the row's own centroid alone.
        settings: as `ClusterNSLoss`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        clusters: CorpusClusters,
        mask: bool = True,
        contrast_weight: float = 1.0,
        margin_weight: float = 0.0,
        momentum: float = 0.0,
        recognise: bool = True,
        hard_negatives: bool = False,
        soft: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(model, clusters, **settings)
        self.mask = mask
        self.contrast_weight = contrast_weight
        self.margin_weight = margin_weight
        self.momentum = momentum
        self.recognise = recognise
        self.hard_negatives = hard_negatives
        self.soft = soft

    def prepare(self, embeddings: list[Tensor], texts: list[Tensor | None] | None = None) -> Batch:
        batch = super().prepare(embeddings, texts)
        if not isinstance(batch, ClusteredBatch):
            return batch
        if not self.soft:
            batch.targets = torch.eye(len(batch.targets), device=batch.targets.device)
        if not self.recognise:
            ids = batch.to_centroids.detach().argmax(dim=1)
            batch.ids = ids.where(self.trusted[ids], NO_CLUSTER)
        if self.momentum and self.is_training():
            with torch.no_grad():
                members = F.one_hot(batch.ids.clamp(min=0), len(self.centroids)).float() * (batch.ids >= 0)[:, None]
                counts = members.sum(dim=0)[:, None]
                means = members.T @ batch.anchors / counts.clamp(min=1)
                self.centroids.lerp_(torch.where(counts > 0, means, self.centroids), self.momentum)
            batch.to_centroids = batch.anchors @ F.normalize(self.centroids, dim=1).T
        return batch

    def terms(self, batch: Batch, rows: slice) -> Tensor:
        if not isinstance(batch, ClusteredBatch):
            return super().terms(batch, rows)
        own = batch.own[rows]
        cosine = self.candidate_cosines(batch, rows)
        width, to_centroids = cosine.shape[1], batch.to_centroids[rows]
        same = F.pad(same_cluster(batch.ids, own), (0, width - len(batch.ids)))
        copies = torch.zeros_like(same) if batch.texts is None else repeats_text(batch.texts, own)
        candidates = cosine.masked_fill(copies | same if self.mask else copies, -torch.inf)
        if self.hard_negatives:
            second = to_centroids.detach().topk(2, dim=1).indices[:, 1:]
            candidates = torch.cat([candidates, to_centroids.gather(1, second)], dim=1)
        loss = self.contrast_weight * self.contrast(batch, rows, candidates)
        if self.pull_weight:
            pull = centroid_pull(to_centroids, batch.ids[own], batch.targets, self.temperature)
            loss = loss + self.pull_weight * pull / len(batch.anchors)
        if self.margin_weight:
            pairs = same & ~copies
            positive = cosine.gather(1, own[:, None]).squeeze(1)
            penalty = bidirectional_margin(cosine, positive, 0.0, 0.3).where(pairs, 0.0)
            mean = penalty.sum(dim=1) / pairs.sum(dim=1).clamp(min=1)
            loss = loss + self.margin_weight * mean.sum() / len(batch.anchors)
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        names = ("mask", "contrast_weight", "margin_weight", "momentum", "recognise", "hard_negatives", "soft")
        return {**super().get_config_dict(), **{name: getattr(self, name) for name in names}}
