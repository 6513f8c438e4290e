"""When and from which rows the clusters start, if no corpus clusters were given.

Rows are collected once the mean in-batch cosine has fallen to the threshold (before that, all embeddings of a raw
language model look alike and clusters would mean nothing), over as many batches as it takes.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_clusterns import distributed
from st_clusterns.clusters import Clusters, pick_spread_rows
from st_clusterns.corpus import cluster_corpus

logger = logging.getLogger(__name__)

ROWS_PER_CLUSTER = 32  # rows for a first k-means: enough for a mean of some worth ...
MOST_ROWS = 8192  # ... and never more than these
PATIENCE = 500  # forward passes without a start, after which the user is told why


class Start(nn.Module):
    """Collects rows until the clusters can start, then starts them.

    Buffers: `rows` (2, R, D), the two views of the rows collected so far; `n_rows`; `n_waited` forward passes.

    Args:
        n_clusters: number of clusters `K`.
        dimension: width of the embeddings `D`.
        similarity: the mean in-batch cosine to wait for.
        from_one_batch: start from a chain of unlike rows as the authors' code does (from several batches only if K
            is larger than one); else from k-means over 32 rows a cluster, at most 8,192 (or K, if that is more).
    """

    rows: Tensor
    n_rows: Tensor
    n_waited: Tensor

    def __init__(self, n_clusters: int, dimension: int, similarity: float, from_one_batch: bool) -> None:
        super().__init__()
        self.similarity = similarity
        self.from_one_batch = from_one_batch
        self.needed = (
            n_clusters if from_one_batch else max(2 * n_clusters, min(ROWS_PER_CLUSTER * n_clusters, MOST_ROWS))
        )
        self.register_buffer("rows", torch.zeros(2, self.needed, dimension))
        self.register_buffer("n_rows", torch.zeros((), dtype=torch.long))
        self.register_buffer("n_waited", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def offer(self, anchors: Tensor, positives: Tensor, clusters: Clusters) -> None:
        """Look at one batch; start the clusters if it completes what is needed.

        Args:
            anchors: the first views, (M, D).
            positives: the second views, (M, D).
            clusters: started in place.
        """
        mean_cosine = float((F.normalize(anchors, dim=1).mean(0) * F.normalize(positives, dim=1).mean(0)).sum())
        if mean_cosine <= self.similarity:
            held = int(self.n_rows)
            views = torch.cat([self.rows[:, :held], torch.stack([anchors, positives]).to(self.rows)], dim=1)
            if views.shape[1] >= self.needed:
                self._start(clusters, *views)
                self.reset()
                return
            self.rows[:, : views.shape[1]] = views
            self.n_rows.fill_(views.shape[1])
        self.n_waited += 1
        if int(self.n_waited) == PATIENCE:
            self._tell(mean_cosine)

    def _start(self, clusters: Clusters, anchors: Tensor, positives: Tensor) -> None:
        if self.from_one_batch:
            similarity = F.normalize(anchors, dim=1) @ F.normalize(positives, dim=1).T
            chosen = pick_spread_rows(similarity, clusters.n_clusters, self._draw(len(anchors)))
            clusters.seed(anchors[chosen])
        else:
            rows, seed = anchors.cpu().numpy(), self._draw(2**31)
            found = cluster_corpus(rows, clusters.n_clusters, seed, topic_layer=False)  # too late for a new layer
            clusters.seed(**found.tensors())
        for buffer in clusters.buffers():  # the same on every process, to the last bit
            distributed.broadcast(buffer)

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, ()))

    def _tell(self, mean_cosine: float) -> None:
        if mean_cosine > self.similarity:
            reason = (
                f"the mean in-batch cosine is {mean_cosine:.2f} and has to fall to start_similarity="
                f"{self.similarity}. Raise start_similarity, or start from corpus clusters (clusters=...)."
            )
        else:
            reason = f"{int(self.n_rows)} of {self.needed} rows are collected. Lower n_clusters, or train for longer."
        logger.warning(f"The clusters have not started after {PATIENCE} forward passes: {reason}")

    def reset(self) -> None:
        """Forget the rows collected so far."""
        self.rows.zero_()
        self.n_rows.zero_()
        self.n_waited.zero_()
