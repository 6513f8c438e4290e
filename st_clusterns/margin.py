"""The bidirectional margin of ClusterNS (Deng et al. 2023, section 3.3, equations 7 and 8)."""

from __future__ import annotations

from torch import Tensor


def bidirectional_margin(similarity: Tensor, positive_similarity: Tensor, alpha: float, beta: float) -> Tensor:
    """Ask a pair to lie between `alpha` and `beta` below the row's own positive pair.

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
