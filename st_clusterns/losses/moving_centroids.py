"""Centroids that follow a model while it trains, as published (Deng et al. 2023, section 3.1, and the authors' code).

1. *Start.* Once the mean in-batch cosine has fallen to a threshold, K rows of the batch become the centroids: the first
   at random, each next one the row least similar to the last pick.
2. *Assign.* A row belongs to the centroid of highest cosine.
3. *Move.* `c <- (1 - momentum) * c + momentum * SUM of the batch's members`.

Shapes: `M` rows, `K` clusters, `D` dimension.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_clusterns.losses import distributed

logger = logging.getLogger(__name__)

PATIENCE = 500  # batches without a start, after which the user is told why


def pick_spread_rows(similarity: Tensor, count: int, first: int) -> Tensor:
    """Choose `count` different rows from `first` on, each the least similar to the one before: (M, M) -> (count,).

    similarity[i, j] is that of the pick i with the candidate j.
    """
    taken = torch.zeros(len(similarity), dtype=torch.bool, device=similarity.device)
    picks = [first]
    for _ in range(count - 1):
        taken[picks[-1]] = True
        picks.append(int(similarity[picks[-1]].masked_fill(taken, torch.inf).argmin()))
    return torch.tensor(picks, device=similarity.device)


def move_centroids(centroids: Tensor, embeddings: Tensor, ids: Tensor, momentum: float) -> Tensor:
    """Move every centroid that has members towards their sum: (K, D), (M, D), (M,) -> (K, D).

    The others stay, and so do all if an embedding is not finite.
    """
    counts = torch.zeros(len(centroids), device=ids.device).index_add_(0, ids, torch.ones_like(ids, dtype=torch.float))
    step = momentum * (counts > 0).to(centroids)  # (K,)
    moved = (centroids * (1 - step)[:, None]).index_add_(0, ids, momentum * embeddings)
    return torch.where(torch.isfinite(embeddings.sum()), moved, centroids)


class MovingCentroids(nn.Module):
    """`K` centroids that start from one batch and follow the next ones.

    Until `K` rows have been seen at a low enough similarity, they are collected over several batches.

    Args:
        n_clusters: number of clusters `K`, 2 or more.
        dimension: width of the embeddings `D`.
        momentum: share of the way that a centroid moves at each batch, 0 to 1.
        start_similarity: the mean in-batch cosine at which the centroids start, -1 to 1.

    Attributes:
        centroids: (K, D), zeros before the start.
        rows: both views of the rows collected so far, (2, K, D).
        started: whether there are centroids. Kept in Python, and in the extra state, so that a GPU need not wait.
    """

    centroids: Tensor
    rows: Tensor

    def __init__(self, n_clusters: int, dimension: int, momentum: float, start_similarity: float) -> None:
        super().__init__()
        if n_clusters < 2:
            raise ValueError(f"n_clusters must be 2 or more, got {n_clusters}.")
        self.momentum = momentum
        self.start_similarity = start_similarity
        self.register_buffer("centroids", torch.zeros(n_clusters, dimension))
        self.register_buffer("rows", torch.zeros(2, n_clusters, dimension))
        self.started, self.n_rows, self.n_waited = False, 0, 0

    @property
    def n_clusters(self) -> int:
        """The number of clusters `K`."""
        return len(self.centroids)

    @torch.no_grad()
    def similarity(self, embeddings: Tensor) -> Tensor:
        """Return the cosine of each row with each centroid, (M, D) -> (M, K)."""
        return F.normalize(embeddings, dim=1) @ self.directions(embeddings).T

    def directions(self, embeddings: Tensor) -> Tensor:
        """Return the centroids as unit vectors, as precise and (in Matryoshka training) narrow as the rows: (K, D)."""
        return F.normalize(self.centroids[:, : embeddings.shape[1]].to(embeddings.dtype), dim=1)

    @torch.no_grad()
    def follow(self, anchors: Tensor, positives: Tensor) -> None:
        """Move towards the rows of one batch or, before the start, see whether it can be made: (M, D), (M, D)."""
        if self.started:
            ids = self.similarity(anchors).argmax(dim=1)
            rows = anchors.to(self.centroids.dtype)
            self.centroids.copy_(move_centroids(self.centroids, rows, ids, self.momentum))
        else:
            self._collect(anchors, positives)

    def _collect(self, anchors: Tensor, positives: Tensor) -> None:
        mean_cosine = float((F.normalize(anchors, dim=1).mean(0) * F.normalize(positives, dim=1).mean(0)).sum())
        if mean_cosine <= self.start_similarity:
            views = torch.cat([self.rows[:, : self.n_rows], torch.stack([anchors, positives]).to(self.rows)], dim=1)
            if views.shape[1] >= self.n_clusters:
                self._start(*views)
                return
            self.rows[:, : views.shape[1]] = views
            self.n_rows = views.shape[1]
        self.n_waited += 1
        if self.n_waited == PATIENCE:
            reason = f"{self.n_rows} of {self.n_clusters} rows are collected. Lower n_clusters, or train for longer."
            if mean_cosine > self.start_similarity:
                reason = (
                    f"the mean in-batch cosine is {mean_cosine:.2f} and has to fall to start_similarity="
                    f"{self.start_similarity}. Raise start_similarity."
                )
            logger.warning(f"The centroids have not started after {PATIENCE} batches: {reason}")

    def _start(self, anchors: Tensor, positives: Tensor) -> None:
        similarity = F.normalize(anchors, dim=1) @ F.normalize(positives, dim=1).T
        chosen = pick_spread_rows(similarity, self.n_clusters, self.draw(len(anchors)))
        self.reset()
        self.centroids.copy_(anchors[chosen])
        distributed.broadcast(self.centroids)  # the same on every process, to the last bit
        self.started = True

    def draw(self, below: int) -> int:
        """Draw the first row."""
        return int(torch.randint(below, ()))

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything, as after construction."""
        self.centroids.zero_()
        self.rows.zero_()
        self.started, self.n_rows, self.n_waited = False, 0, 0

    def get_extra_state(self) -> Tensor:
        """Return what is no buffer, for `state_dict`."""
        return torch.tensor([int(self.started), self.n_rows, self.n_waited])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` returned."""
        started, self.n_rows, self.n_waited = state.tolist()
        self.started = bool(started)

    def extra_repr(self) -> str:
        """Show the sizes and whether the centroids have started."""
        k, d = self.centroids.shape
        return f"n_clusters={k}, dimension={d}, momentum={self.momentum}, started={self.started}"
