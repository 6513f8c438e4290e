"""`PublishedClusterNSLoss`: the method as published, to the digit (Deng et al., Findings of ACL 2023).

One step on a batch (`B` rows of this process, `M` of all, `K` clusters, `D` dimensions):

1. Embed. One text column is encoded twice with independent dropout; the second view is the positive.
2. The centroids follow the batch (`st_clusterns.losses.moving_centroids`). Until they have started, only step 4 runs,
   without hard negatives.
3. Each row has a cluster, the nearest centroid, and a hard negative, the second nearest one.
4. Contrastive term (equation 5): cross-entropy of the positive among all positives, the explicit negatives, and the
   hard negatives of *all* rows.
5. Bidirectional margin (equations 7 and 8), times `margin_weight`: on rows of one cluster, averaged over all `M` pairs
   of a row, of which the others count `margin_alpha`, as in the authors' code.

The golden arrays in the tests come from the authors' code (github.com/djz233/ClusterNS).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_clusterns import citations
from st_clusterns.checks import check_number
from st_clusterns.losses import distributed
from st_clusterns.losses.contrastive import Batch, ContrastiveLoss, at_layer
from st_clusterns.losses.moving_centroids import MovingCentroids
from st_clusterns.losses.terms import bidirectional_margin, same_cluster
from st_clusterns.models import device_of, dimension_of


@dataclass
class PublishedBatch(Batch):
    """A batch after the start of the centroids."""

    ids: Tensor  # the nearest centroid of all rows, (M,)
    hard_negatives: Tensor  # the second nearest centroid of all rows, unit vectors, (M, D)


class PublishedClusterNSLoss(ContrastiveLoss):
    """ClusterNS as published. Made by `ClusterNSLoss.from_preset(model, "paper/bert-base")`.

    Inputs are those of `ClusterNSLoss`. The published rows were trained with `head=True` on a raw BERT or RoBERTa. The
    presets leave it out: behind an encoder of sentences, it is one more random layer.

    The centroids change in training steps only, once per forward pass. Inside `MatryoshkaLoss` they move at the full
    width, inside `AdaptiveLayerLoss` and `Matryoshka2dLoss` at the last layer. A checkpoint keeps them if a
    `ClusterStateCallback` is among the trainer's callbacks.

    Args:
        model: the model to train.
        n_clusters: number of clusters `K`, 2 or more.
        temperature: divides every cosine in a cross-entropy, above 0.
        momentum: share of the way that centroids move at each forward pass, 0 to 1.
        start_similarity: the centroids start once the mean in-batch cosine is at or below it, -1 to 1.
        margin_alpha: a false negative must stay this far below the positive, in cosine, 0 or more.
        margin_beta: and fall at most this far below it, in cosine, `margin_alpha` or more.
        margin_weight: weight of the bidirectional margin, 0 or more.
        hard_negative_weight: multiplies a row's own hard negative in its denominator, 0 or more; 0 leaves out the hard
            negatives of all rows.
        gather_across_devices: whether the rows of all processes serve as negatives.
        head: whether a `TrainingHead` stands between the model and the loss: a linear layer and tanh, trained with the
            model and absent from what is saved. Not inside `MatryoshkaLoss`.

    Raises:
        ValueError: if a number is out of its range, or the model cannot be trained as it is.

    Attributes:
        centroids: the state, a `MovingCentroids` module.
        head: the `TrainingHead`, or None.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        n_clusters: int = 128,
        temperature: float = 0.05,
        momentum: float = 1e-3,
        start_similarity: float = 0.4,
        margin_alpha: float = 0.0,
        margin_beta: float = 0.3,
        margin_weight: float = 1e-3,
        hard_negative_weight: float = 1.0,
        gather_across_devices: bool = False,
        head: bool = False,
    ) -> None:
        super().__init__(model, temperature, gather_across_devices, head)
        check_number("momentum", momentum, least=0, most=1)
        check_number("start_similarity", start_similarity, least=-1, most=1)
        check_number("margin_alpha", margin_alpha, least=0)
        check_number("margin_beta", margin_beta, least=margin_alpha)
        check_number("margin_weight", margin_weight, least=0)
        check_number("hard_negative_weight", hard_negative_weight, least=0)
        centroids = MovingCentroids(n_clusters, dimension_of(model), momentum, start_similarity)
        self.centroids = centroids.to(device_of(model))
        self.margin_alpha = margin_alpha
        self.margin_beta = margin_beta
        self.margin_weight = margin_weight
        self.hard_negative_weight = hard_negative_weight

    def prepare(self, embeddings: list[Tensor], texts: list[Tensor | None] | None = None) -> Batch:
        """Gather and normalise the columns, let the centroids follow, and look up clusters and hard negatives."""
        batch = super().prepare(embeddings)  # copies of a text stay negatives, as published
        anchors, positives = (column.detach().to(batch.anchors.dtype) for column in embeddings[:2])
        if distributed.world_size() > 1 and (self.is_training() or self.gather_across_devices):
            distributed.check_same_size(len(anchors), anchors.device)
            anchors, positives = distributed.gather(anchors), distributed.gather(positives)
        served = self.centroids.started  # from the batch after the one that starts them
        whole = anchors.shape[1] == self.centroids.centroids.shape[1]
        layer = at_layer(self.model)
        if self.is_training() and whole and (layer is None or layer.layer_idx is None):
            self.centroids.follow(anchors, positives)
        if not served:
            return batch
        if not self.gather_across_devices:
            anchors = embeddings[0].detach().to(batch.anchors.dtype)
        similarity = self.centroids.similarity(anchors)  # (M, K)
        ids = similarity.argmax(dim=1)
        second = similarity.scatter(1, ids[:, None], -torch.inf).argmax(dim=1)
        return PublishedBatch(**vars(batch), ids=ids, hard_negatives=self.centroids.directions(anchors)[second])

    def terms(self, batch: Batch, rows: slice) -> Tensor:
        """Return what some of this process's rows add to the loss, a scalar."""
        contrastive, margin = self.both_terms(batch, rows)
        return contrastive + self.margin_weight * margin

    def both_terms(self, batch: Batch, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the contrastive term and the bidirectional margin, unweighted, of some rows."""
        cosine = self.candidate_cosines(batch, rows)  # (R, M + n*M)
        if not isinstance(batch, PublishedBatch):
            return self.contrast(batch, rows, cosine), cosine.new_zeros(())
        candidates = cosine
        if self.hard_negative_weight > 0:
            candidates = torch.cat([cosine, self._hard_negative_cosines(batch, rows)], dim=1)
        return self.contrast(batch, rows, candidates), self._margin(batch, rows, cosine)

    def _hard_negative_cosines(self, batch: PublishedBatch, rows: slice) -> Tensor:
        """Return the cosines with the hard negatives of all rows; the row's own is weighted in the logit: (R, M)."""
        cosine = batch.anchors[rows] @ batch.hard_negatives.T
        is_own = F.one_hot(batch.own[rows], len(batch.hard_negatives))
        return cosine + self.temperature * math.log(self.hard_negative_weight) * is_own

    def _margin(self, batch: PublishedBatch, rows: slice, cosine: Tensor) -> Tensor:
        """Return the bidirectional margin of rows of one cluster, averaged over the batch's pairs."""
        own = batch.own[rows]
        others = cosine[:, : len(batch.positives)]  # (R, M)
        positive = others.gather(1, own[:, None]).squeeze(1)  # (R,)
        penalty = bidirectional_margin(others, positive, self.margin_alpha, self.margin_beta)
        penalty = penalty.where(same_cluster(batch.ids, own), self.margin_alpha)
        return penalty.mean(dim=1).sum() / len(batch.anchors)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the model card."""
        state = {name: getattr(self.centroids, name) for name in ("n_clusters", "momentum", "start_similarity")}
        own = ("margin_alpha", "margin_beta", "margin_weight", "hard_negative_weight")
        settings = {**state, **{name: getattr(self, name) for name in own}, **super().get_config_dict()}
        return {**settings, "head": self.head is not None}

    @property
    def citation(self) -> str:
        """The paper's BibTeX entry, for the model card."""
        return citations.CLUSTERNS
