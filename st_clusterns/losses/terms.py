"""The terms that ClusterNS adds to a contrastive loss: tensors in, tensors out.

Shapes: `B` rows, `N` other rows, `K` clusters, `D` dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NO_CLUSTER = -1  # the cluster id of a row that belongs to no cluster, or to one that is not trusted


def soft_targets(centroids: Tensor, temperature: float) -> Tensor:
    """Return how near centroid `k` is to each centroid `m`, as shares that add up to 1 over `m`: (K, D) -> (K, K).

    They are soft labels by the similarity of classes (Bertinetto et al., CVPR 2020).

    Args:
        centroids: unit vectors, (K, D).
        temperature: divides the cosines, above 0. The lower it is, the more of a row's share is its own.
    """
    return torch.softmax(centroids @ centroids.T / temperature, dim=1)


def centroid_pull(to_centroids: Tensor, ids: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of each row's soft target among all centroids, summed over rows.

    With one-hot targets, it is that of the row's own centroid (ProtoNCE; Li et al. 2021, equation 11).

    Args:
        to_centroids: cosines of the rows with all centroids, (B, K).
        ids: the cluster of each row, (B,); rows with `NO_CLUSTER` count as 0.
        targets: the target of the rows of each cluster, (K, K).
        temperature: divides the cosines, above 0.
    """
    shares = targets[ids.clamp(min=0)].to(to_centroids.dtype) * (ids != NO_CLUSTER)[:, None]
    return F.cross_entropy(to_centroids / temperature, shares, reduction="sum")


def same_cluster(ids: Tensor, own: Tensor) -> Tensor:
    """Return which other rows are in the cluster of each row `own`, without itself: (N,), (B,) -> mask (B, N).

    A row with `NO_CLUSTER` shares its cluster with no other.
    """
    alone = NO_CLUSTER - torch.arange(len(ids), device=ids.device)  # a number of its own for a row without a cluster
    ids = ids.where(ids != NO_CLUSTER, alone)
    return (ids == ids[own, None]).scatter_(1, own[:, None], False)


def bidirectional_margin(similarity: Tensor, positive_similarity: Tensor, alpha: float, beta: float) -> Tensor:
    """Penalise pairs unless they lie `alpha` to `beta` below the row's positive pair (Deng et al. 2023, equation 7).

    With `delta = similarity - positive_similarity`, the penalty is `relu(delta + alpha) + relu(-delta - beta)`.

    Args:
        similarity: cosines of each row with other rows, (B, N), the shape of what is returned.
        positive_similarity: cosine of each row with its own positive, (B,).
        alpha: how far below the positive a false negative must stay at least (cosine, 0 or more).
        beta: how far below the positive it may fall at most (cosine, `alpha` or more).
    """
    delta = similarity - positive_similarity[:, None]  # (B, N)
    return (delta + alpha).relu() + (-delta - beta).relu()
