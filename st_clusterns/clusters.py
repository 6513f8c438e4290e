"""Clusters of embeddings that follow the model while it trains.

`Clusters` is the state of the loss: a module of full-size buffers, changed in place and never by gradients.
Beside it stand the pure functions it is made of. Shapes: `B` rows, `K` clusters, `D` dimension.

Published method (Deng et al. 2023, section 3.1, and the authors' code):

1. *Start.* K rows of one batch become the centroids: the first at random, each next one the row least similar
   to the last pick (`pick_spread_rows`).
2. *Assign.* A row belongs to the centroid of highest cosine (`Clusters.predict`).
3. *Move.* `c <- (1 - momentum) * c + momentum * SUM of the batch's members` (`move_centroids`).

Where we depart from it by default: centroids move to the *mean* of the members' unit vectors, so that a step does
not grow with the cluster; and they start from k-means over many rows, each with a *trust* between 0 and 1 (see
`st_clusterns.corpus`), because only the data can tell whether "same cluster" means "same meaning".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pick_spread_rows(similarity: Tensor, count: int, first: int) -> Tensor:
    """Choose `count` different rows, each the least similar to the one chosen before it.

    The chain of the authors' code: it looks back at the last pick only, not at all picks.

    Args:
        similarity: similarity[i, j] of the pick i with the candidate j, (B, B).
        count: number of rows to choose, at most B.
        first: the row to begin with.

    Returns:
        The indices of the chosen rows in order, (count,).
    """
    taken = torch.zeros(len(similarity), dtype=torch.bool, device=similarity.device)
    picks = [first]
    for _ in range(count - 1):
        taken[picks[-1]] = True
        picks.append(int(similarity[picks[-1]].masked_fill(taken, torch.inf).argmin()))
    return torch.tensor(picks, device=similarity.device)


def move_centroids(centroids: Tensor, embeddings: Tensor, ids: Tensor, momentum: float, *, to_sum: bool) -> Tensor:
    """Move every centroid that has members a step towards them; the others stay.

    Args:
        centroids: (K, D).
        embeddings: (B, D).
        ids: the cluster of each row, 0 to K-1, (B,).
        momentum: length of the step, 0 to 1.
        to_sum: towards the sum of the members (the authors' code) instead of their mean.

    Returns:
        The moved centroids, (K, D).
    """
    counts = torch.bincount(ids, minlength=len(centroids))  # (K,)
    step = momentum * (counts > 0).to(centroids)  # (K,)
    share = step if to_sum else step / counts.clamp(min=1)  # that each member has in the move, (K,)
    return (centroids * (1 - step)[:, None]).index_add_(0, ids, embeddings * share[ids][:, None])


class Clusters(nn.Module):
    """`K` centroids with the verbs `seed`, `predict` and `partial_fit`.

    Everything learnt is a float32 buffer of full size from construction on: `centroids` (K, D), `trust` (K,) in
    0 to 1, and `started` (bool). Before the
    start, `predict` and `partial_fit` raise.

    Args:
        n_clusters: number of clusters `K`, 2 or more.
        dimension: width of the embeddings `D`.
        momentum: share of the way that a centroid moves towards a batch's members, 0 to 1.
        to_sum: move towards the sum of the members as the authors' code does, not their mean.

    Raises:
        ValueError: if a number is out of its range.
    """

    centroids: Tensor
    trust: Tensor
    started: Tensor

    def __init__(self, n_clusters: int, dimension: int, momentum: float = 0.0, *, to_sum: bool = False) -> None:
        super().__init__()
        if n_clusters < 2:
            raise ValueError(f"n_clusters must be 2 or more, got {n_clusters}.")
        if dimension < 1:
            raise ValueError(f"dimension must be 1 or more, got {dimension}.")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie between 0 and 1, got {momentum}.")
        self.momentum = momentum
        self.to_sum = to_sum
        self.register_buffer("centroids", torch.zeros(n_clusters, dimension))
        self.register_buffer("trust", torch.zeros(n_clusters))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @property
    def n_clusters(self) -> int:
        """The number of clusters `K`."""
        return len(self.centroids)

    @torch.no_grad()
    def seed(self, centroids: Tensor, trust: Tensor | None = None) -> None:
        """Start from given centroids.

        Args:
            centroids: (K, D).
            trust: how far each cluster is to be trusted, 0 to 1, (K,); all 1 without it.

        Raises:
            ValueError: if a shape is wrong or a value is not finite.
        """
        if centroids.shape != self.centroids.shape:
            raise ValueError(
                f"centroids must have the shape {tuple(self.centroids.shape)} (n_clusters, dimension), "
                f"got {tuple(centroids.shape)}."
            )
        check_finite(centroids, "centroids")
        trust = torch.ones_like(self.trust) if trust is None else trust
        if trust.shape != self.trust.shape:
            raise ValueError(f"trust must have the shape {tuple(self.trust.shape)}, got {tuple(trust.shape)}.")
        check_finite(trust[:, None], "trust")
        self.centroids.copy_(centroids)
        self.trust.copy_(trust)
        self.started.fill_(True)

    @torch.no_grad()
    def predict(self, embeddings: Tensor) -> Tensor:
        """Return the most cosine-similar centroid of each row, (B, D) -> (B,), values 0 to K-1."""
        return (embeddings @ self.directions(embeddings).T).argmax(dim=1)  # a row's own length changes no maximum

    @torch.no_grad()
    def similarity(self, embeddings: Tensor) -> Tensor:
        """Return the cosine of each row with each centroid, (B, D) -> (B, K); raises what `directions` does."""
        return F.normalize(embeddings, dim=1) @ self.directions(embeddings).T

    @torch.no_grad()
    def directions(self, embeddings: Tensor) -> Tensor:
        """Return the centroids as unit vectors, as wide and precise as the rows they are for: (B, D) -> (K, D).

        Rows narrower than the centroids are compared with truncated centroids, as Matryoshka training needs.

        Raises:
            RuntimeError: before the start.
            ValueError: if rows are wider than the centroids.
        """
        if not self.started:
            raise RuntimeError("The clusters have not started: call seed() first.")
        width = embeddings.shape[-1]
        if width > self.centroids.shape[1]:
            raise ValueError(f"embeddings have {width} dimensions, the centroids {self.centroids.shape[1]}.")
        return F.normalize(self.centroids[:, :width].to(embeddings.dtype), dim=1)

    @torch.no_grad()
    def partial_fit(self, embeddings: Tensor, ids: Tensor | None = None) -> None:
        """Move the centroids towards their members in one batch.

        Args:
            embeddings: (B, D).
            ids: the cluster of each row, (B,); predicted without it.

        Raises:
            RuntimeError: before the start.
            ValueError: if the width is not the centroids' or a row is not finite; the state is untouched then.
        """
        if embeddings.shape[-1] != self.centroids.shape[1]:
            raise ValueError(
                f"embeddings have {embeddings.shape[-1]} dimensions, the centroids {self.centroids.shape[1]}."
            )
        if not self.started:
            raise RuntimeError("The clusters have not started: call seed() first.")
        check_finite(embeddings, "embeddings")
        ids = self.predict(embeddings) if ids is None else ids
        rows = embeddings if self.to_sum else F.normalize(embeddings, dim=1)
        rows = rows.to(self.centroids.dtype)
        self.centroids.copy_(move_centroids(self.centroids, rows, ids, self.momentum, to_sum=self.to_sum))

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything, as after construction."""
        self.centroids.zero_()
        self.trust.zero_()
        self.started.fill_(False)

    def extra_repr(self) -> str:
        """Show the sizes and whether the clusters have started."""
        k, d = self.centroids.shape
        return f"n_clusters={k}, dimension={d}, momentum={self.momentum}, started={bool(self.started)}"


def check_finite(rows: Tensor, name: str) -> None:
    """Raise a `ValueError` that names the first row with a NaN or Inf, if any: (B, D)."""
    if torch.isfinite(rows.sum()):  # the quick way; a sum that overflows goes on to the exact one
        return
    bad = ~torch.isfinite(rows).all(dim=1)
    if bad.any():
        raise ValueError(
            f"{name} holds NaN or Inf in row {int(bad.nonzero()[0])} ({int(bad.sum())} of {len(rows)} rows)."
        )
