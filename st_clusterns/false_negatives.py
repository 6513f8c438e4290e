"""What keeps false negatives together: a margin between rows, as published, or a pull to their centroid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bidirectional_margin(similarity: Tensor, positive_similarity: Tensor, alpha: float, beta: float) -> Tensor:
    """Ask a pair to lie between `alpha` and `beta` below the row's own positive pair (Deng et al. 2023, equation 7).

    With `delta = similarity - positive_similarity`, the penalty is `relu(delta + alpha) + relu(-delta - beta)`:
    zero while `-beta <= delta <= -alpha`, linear outside.

    Args:
        similarity: cosines of each row with other rows, (B, N).
        positive_similarity: cosine of each row with its own positive, (B,).
        alpha: how far below the positive a false negative must at least stay (cosine, 0 or more).
        beta: how far below the positive it may at most fall (cosine, `alpha` or more).

    Returns:
        The penalty of every pair, (B, N), not averaged.
    """
    delta = similarity - positive_similarity[:, None]  # (B, N)
    return (delta + alpha).relu() + (-delta - beta).relu()


def centroid_pull(rows: Tensor, centroids: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each row's own centroid among all centroids.

    Args:
        rows: unit vectors, (R, D).
        centroids: unit vectors, (K, D).
        ids: the cluster of each row, (R,).
        temperature: divides the cosines, above 0.

    Returns:
        One value a row, (R,).
    """
    return F.cross_entropy(rows @ centroids.T / temperature, ids, reduction="none")
