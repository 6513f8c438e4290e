"""`CachedClusterNSLoss`: `ClusterNSLoss` for batches larger than the memory.

GradCache (Gao et al. 2021), by sentence-transformers' `CachedLossMixin`: embed the batch in mini-batches without
graphs, back-propagate the loss to the embeddings, embed each mini-batch again (same dropout) and send its gradients
on. This file adds what the loss does with the embeddings in between:

1. Once a batch: gather and normalise the rows, let the clusters follow, look the batch up in them.
2. For each chunk of `mini_batch_size` rows: its terms, and their gradients to the prepared rows.
3. Once a batch: the gradients of the prepared rows on to the embeddings. Gathering has a collective in its backward
   pass, so it must not run once a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
from torch import Tensor

from st_clusterns.batch import Batch
from st_clusterns.components import LossComponents
from st_clusterns.loss import ClusterNSLoss, layer_decorator

CITATION = """
@misc{gao2021scaling,
    title = {Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author = {Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year = {2021},
    eprint = {2101.06983},
    archivePrefix = {arXiv},
    primaryClass = {cs.LG},
}
"""


class CachedClusterNSLoss(CachedLossMixin, ClusterNSLoss):  # type: ignore[misc]  # the host library is not typed
    """`ClusterNSLoss` at the memory of a mini-batch, for one more forward pass.

    Values and gradients are those of `ClusterNSLoss` on the whole batch; inputs too. One text column is embedded in
    two passes, each with its own dropout.

    Args:
        model: the model to train; not one with static embeddings, whose features have no rows to cut.
        args: as `ClusterNSLoss`.
        mini_batch_size: rows that are embedded, and scored, at a time. Bounds the memory; the speed grows with it.
        show_progress_bar: while embedding.
        settings: as `ClusterNSLoss`.

    Raises:
        ValueError: if a number is out of its range, or the model has static embeddings.

    References:
        Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021.

    Example:
        ::

            loss = CachedClusterNSLoss(model, mini_batch_size=64)
            args = SentenceTransformerTrainingArguments(..., per_device_train_batch_size=1024)
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *args: Any,
        mini_batch_size: int = 32,
        show_progress_bar: bool = False,
        **settings: Any,
    ) -> None:
        if mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be 1 or more, got {mini_batch_size}.")
        if has_static_embedding_input(model):
            raise ValueError(
                "CachedClusterNSLoss cannot cut the features of a StaticEmbedding model into mini-batches. Such a "
                "model needs little memory: use ClusterNSLoss."
            )
        super().__init__(model, *args, **settings)
        self.mini_batch_size = mini_batch_size
        self.show_progress_bar = show_progress_bar
        self._two_views = False
        self._false_negative_part = torch.zeros(())

    def forward(  # type: ignore[override]
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> LossComponents | Tensor:
        """Embed the columns and return `{"contrastive": ..., "false_negative": ...}`, both scalars.

        The gradient of the whole loss hangs on `contrastive`. Inside `MatryoshkaLoss` a single scalar is returned:
        it replaces `calculate_loss` by a weighted sum over dimensions, whose parts cannot be told apart here.

        Raises:
            ValueError: inside `AdaptiveLayerLoss` or `Matryoshka2dLoss`.
        """
        if layer_decorator(self.model) is not None:
            raise ValueError(
                "AdaptiveLayerLoss and Matryoshka2dLoss read all layers of one forward pass, which a cached loss does "
                "not keep: use ClusterNSLoss inside them."
            )
        columns = list(sentence_features)
        self._two_views = len(columns) == 1
        if self._two_views:
            columns = [dict(columns[0]), dict(columns[0])]
        with self._reading(columns[0]):
            total: Tensor = CachedLossMixin.forward_cached(self, columns, labels)
        if "calculate_loss" in vars(self):
            return total
        part = self._false_negative_part
        return LossComponents(contrastive=total - part, false_negative=part)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Compute the loss of a batch; in training, the clusters follow it, once.

        Args:
            reps: the embeddings of each column, in mini-batches of (mini_batch_size, D).
            labels: cluster numbers from 1, 0 for unknown, (B,).
            with_backward: back-propagate to `reps`, chunk by chunk, and return the loss without its graph.
        """
        with self._full_precision():
            columns = [torch.cat(column) for column in reps]
            batch = self._prepare(columns, labels)
            if self._two_views:
                self._check_views(*columns)
            rows = batch.cut() if with_backward else batch
            size = self.mini_batch_size
            chunks = (slice(start, start + size) for start in range(0, len(batch.anchors), size))
            parts = sum((self._chunk(rows, chunk, with_backward) for chunk in chunks), start=LossComponents())
            if with_backward:
                batch.backward_from(rows)
        self._false_negative_part = parts["false_negative"].detach()
        return parts.total()

    def _chunk(self, batch: Batch, rows: slice, with_backward: bool) -> LossComponents:
        """Return the share of some rows in the loss; with `with_backward`, free of the graph it has gone through."""
        parts = self._terms(batch, rows)
        if with_backward:
            parts.backward()
            parts = LossComponents({name: value.detach() for name, value in parts.items()})
        return parts

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the model card."""
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}

    @property
    def citation(self) -> str:
        """The BibTeX entries of both papers, for the model card."""
        return super().citation + CITATION
