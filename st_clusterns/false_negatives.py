"""What keeps related rows together: a margin between them, as published, a pull to their centroid, or a teacher."""

from __future__ import annotations

import torch
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


def relation_divergence(
    cosine: Tensor, teacher: Tensor, own: Tensor, temperature: float, teacher_temperature: float
) -> Tensor:
    """Ask for the teacher's view of which other rows are likest each row.

    The Kullback-Leibler divergence between two distributions over the other rows, each a softmax of similarities.

    Args:
        cosine: of rows with all rows of the batch, (R, B).
        teacher: the similarities that are to be learnt, (R, B).
        own: the place of each row among the B; it is left out, (R,).
        temperature: divides the cosines, above 0.
        teacher_temperature: divides the teacher's similarities, above 0.

    Returns:
        One value a row, 0 or more, (R,).
    """
    others = torch.ones_like(cosine, dtype=torch.bool).scatter_(1, own[:, None], False)  # (R, B)
    rows, size = len(cosine), cosine.shape[1] - 1
    learnt = F.log_softmax(cosine[others].view(rows, size) / temperature, dim=1)
    wanted = F.log_softmax(teacher[others].view(rows, size) / teacher_temperature, dim=1)
    return F.kl_div(learnt, wanted, reduction="none", log_target=True).sum(dim=1)
