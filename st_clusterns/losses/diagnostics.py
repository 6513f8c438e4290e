"""What a batch says about the clusters while a model trains: tensors in, numbers out.

Shapes: `R` rows looked at, `M` rows of all processes, `K` clusters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from st_clusterns.losses.clusterns import ClusteredBatch, ClusterNSLoss
from st_clusterns.losses.contrastive import Batch
from st_clusterns.losses.terms import NO_CLUSTER, same_cluster

ROWS = 256  # rows of a batch whose pairs are looked at: a cached batch of thousands stays within its memory


@torch.no_grad()
def describe_batch(loss: ClusterNSLoss, batch: Batch) -> dict[str, Tensor]:
    """Describe the pairs of a batch: the first 256 anchors with the positives of all processes.

    Returns scalars; the mean of no pairs is NaN:

    - `positive_similarity`: mean cosine of a row and its own positive.
    - `same_cluster_similarity`: mean cosine of a row and the positives of other rows of its cluster.
    - `other_similarity`: mean cosine of a row and the positives that are its negatives.
    - `masked_pairs`: share of a row's pairs with the positives of other rows that are no negatives.
    - `rows_nearer_another_cluster`: share of clustered rows whose nearest centroid is not that of their cluster.

    Without topics, the two that need clusters are left out.
    """
    rows = slice(0, ROWS)
    own, count = batch.own[rows], len(batch.positives)
    cosine = loss.candidate_cosines(batch, rows)[:, :count]  # (R, M)
    others = torch.ones_like(cosine, dtype=torch.bool).scatter_(1, own[:, None], False)
    no_negatives = loss.no_negatives(batch, rows)
    masked = torch.zeros_like(others) if no_negatives is None else no_negatives[:, :count]
    values = {
        "positive_similarity": cosine[~others].mean(),
        "other_similarity": cosine[others & ~masked].mean(),
        "masked_pairs": masked.sum() / others.sum(),
    }
    if isinstance(batch, ClusteredBatch):
        ids, nearest = batch.ids[own], batch.to_centroids[rows].argmax(dim=1)
        values["same_cluster_similarity"] = cosine[same_cluster(batch.ids, own)].mean()
        values["rows_nearer_another_cluster"] = (nearest != ids)[ids != NO_CLUSTER].float().mean()
    return values


@torch.no_grad()
def describe_use(to_centroids: Tensor) -> dict[str, Tensor]:
    """Describe how rows spread over the centroids, from their cosines, (R, K); a row uses the nearest one.

    Returns scalars: `used_centroids`, the share of centroids that some row uses, and `cluster_balance`, the entropy of
    the uses over its highest value, log K: 1 if all centroids are used alike, 0 if one takes all.
    """
    n_clusters = to_centroids.shape[1]
    shares = torch.bincount(to_centroids.argmax(dim=1), minlength=n_clusters) / len(to_centroids)
    return {
        "used_centroids": (shares > 0).float().mean(),
        "cluster_balance": torch.special.entr(shares).sum() / math.log(n_clusters),
    }
