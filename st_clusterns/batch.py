"""One batch as the terms of the loss see it: its rows as unit vectors, and what the clusters say of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROWS = ("anchors", "positives", "negatives")  # what of a `Batch` gradients flow through


@dataclass
class Batch:
    """What one step's terms are made of; rows are unit vectors, `M = W*B` rows of all processes.

    Attributes:
        anchors: this process's rows, (B, D).
        positives: (M, D).
        negatives: explicit hard negatives, (n*M, D).
        own: the place of this process's rows among the M, (B,).
        temperature: divides the cosines.
        clusters: the cluster of all rows, (M,); None before the start.
        trusted: whether each row's cluster is trusted, (M,); None before the start.
        hard_negatives: the second most similar centroid of all rows, (M, D); None before the start.
        centroids: all centroids, (K, D); None before the start.
        words: vectors of the tokens of this process's rows, (B, U); None unless shared words are the teacher.
    """

    anchors: Tensor
    positives: Tensor
    negatives: Tensor
    own: Tensor
    temperature: float
    clusters: Tensor | None = None
    trusted: Tensor | None = None
    hard_negatives: Tensor | None = None
    centroids: Tensor | None = None
    words: Tensor | None = None

    def false_negatives(self, rows: slice) -> Tensor | None:
        """Return which of the M rows are false negatives of each of `rows`: in one trusted cluster, (R, M)."""
        if self.clusters is None or self.trusted is None:
            return None
        own = self.own[rows]
        trusted = self.clusters[own].where(self.trusted[own], -1)  # no cluster has the number -1
        same = trusted[:, None] == self.clusters
        return same.scatter_(1, own[:, None], False)  # a row is not its own false negative

    def cut(self) -> Batch:
        """Return a copy that gradients stop at: its rows are leaves, for `backward_from`."""
        return replace(self, **{name: getattr(self, name).detach().requires_grad_() for name in ROWS})

    def backward_from(self, leaves: Batch) -> None:
        """Send the gradients that a `cut` copy has gathered on, once, through what made this batch's rows."""
        made = [name for name in ROWS if getattr(self, name).requires_grad]  # no explicit negatives: made from nothing
        torch.autograd.backward([getattr(self, name) for name in made], [getattr(leaves, name).grad for name in made])
