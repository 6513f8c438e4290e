"""The terms that ClusterNS adds to a contrastive loss: tensors in, tensors out.

Shapes: `B` rows, `N` other rows, `K` clusters, `D` dimension.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

NO_CLUSTER = -1  # the cluster id of a row that belongs to no cluster, or to one that is not trusted


def centroid_pull(to_centroids: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each row's own centroid among all centroids (ProtoNCE; Li et al. 2021, equation 11).

    Neighbouring centroids are the hard negatives of a row.

    Args:
        to_centroids: cosines of the rows with all centroids, (B, K).
        ids: the cluster of each row, (B,); rows with `NO_CLUSTER` count as 0.
        temperature: divides the cosines, above 0.

    Returns:
        The sum over the rows, a scalar.
    """
    return F.cross_entropy(to_centroids / temperature, ids, ignore_index=NO_CLUSTER, reduction="sum")


def same_cluster(ids: Tensor, own: Tensor) -> Tensor:
    """Return which other rows are in the cluster of each row.

    Args:
        ids: the cluster of all `N` rows, (N,); a row with `NO_CLUSTER` shares its cluster with no other.
        own: indices of the rows to compare, (B,).

    Returns:
        A mask, (B, N); a row is not marked with itself.
    """
    rows = ids[own, None]
    same = (rows == ids) & (rows != NO_CLUSTER)
    return same.scatter_(1, own[:, None], False)


def bidirectional_margin(similarity: Tensor, positive_similarity: Tensor, alpha: float, beta: float) -> Tensor:
    """Penalise pairs unless they lie `alpha` to `beta` below the row's positive pair (Deng et al. 2023, equation 7).

    With `delta = similarity - positive_similarity`, the penalty is `relu(delta + alpha) + relu(-delta - beta)`.

    Args:
        similarity: cosines of each row with other rows, (B, N).
        positive_similarity: cosine of each row with its own positive, (B,).
        alpha: how far below the positive a false negative must stay at least (cosine, 0 or more).
        beta: how far below the positive it may fall at most (cosine, `alpha` or more).

    Returns:
        The penalty of every pair, (B, N).
    """
    delta = similarity - positive_similarity[:, None]  # (B, N)
    return (delta + alpha).relu() + (-delta - beta).relu()
