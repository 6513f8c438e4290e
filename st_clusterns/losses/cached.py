"""`CachedClusterNSLoss`: `ClusterNSLoss` for batches larger than the memory.

GradCache (Gao et al. 2021), by sentence-transformers' `CachedLossMixin`: embed the batch in mini-batches without
graphs, back-propagate the loss to the embeddings, embed each mini-batch again (same dropout) and send its gradients
on. This file adds what the loss does with the embeddings in between:

1. Once a batch: `prepare` the rows.
2. For each chunk of rows: its terms, and their gradients to the prepared rows.
3. Once a batch: the gradients of the prepared rows on to the embeddings. Gathering has a collective in its backward
   pass, so it must not run once a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
from torch import Tensor

from st_clusterns import citations
from st_clusterns.checks import check_number
from st_clusterns.losses.clusterns import ClusterNSLoss
from st_clusterns.losses.contrastive import ContrastiveLoss, at_layer, full_precision
from st_clusterns.losses.distributed import world_size
from st_clusterns.losses.lengths import by_length, is_padded, per_row
from st_clusterns.losses.presets import find_preset
from st_clusterns.losses.published import PublishedClusterNSLoss
from st_clusterns.losses.text_hashes import text_hashes
from st_clusterns.models import unwrap


class Texts(NamedTuple):
    """What `CachedLossMixin` hands through to `calculate_loss` in the place of labels."""

    hashes: list[Tensor | None]  # of each row's text for each column, each (B,)
    two_views: bool  # whether both columns are views of one
    places: list[Tensor | None]  # of the rows of each column among its embeddings, each (B,); None: they are in order


class _Cached(CachedLossMixin, ContrastiveLoss):  # type: ignore[misc]  # the host library is not typed
    """GradCache for a subclass of `ContrastiveLoss`; stands before it among the base classes."""

    def __init__(
        self,
        model: SentenceTransformer,
        *args: Any,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **settings: Any,
    ) -> None:
        check_number("mini_batch_size", mini_batch_size, least=1, whole=True)
        if mini_batch_num_tokens is not None:
            check_number("mini_batch_num_tokens", mini_batch_num_tokens, least=1, whole=True)
        if has_static_embedding_input(unwrap(model)):
            raise ValueError(
                "CachedClusterNSLoss cannot cut the features of a StaticEmbedding model into mini-batches. Such a "
                "model needs little memory: use ClusterNSLoss."
            )
        super().__init__(model, *args, **settings)
        if self.head is not None and mini_batch_num_tokens is not None and world_size() > 1:
            raise ValueError(  # the head's gradients are averaged once a mini-batch
                "head=True needs as many mini-batches on each process: pass mini_batch_size, and no "
                "mini_batch_num_tokens."
            )
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Embed the columns and return the loss, a scalar; ValueError inside `AdaptiveLayerLoss` and its kind."""
        if at_layer(self.model) is not None:
            raise ValueError(
                "AdaptiveLayerLoss and Matryoshka2dLoss read all layers of one forward pass, which a cached loss does "
                "not keep: use ClusterNSLoss inside them."
            )
        self.check_labels(labels)
        columns = list(sentence_features)
        two_views = len(columns) == 1
        hashes = [text_hashes(column) for column in columns] * (1 + two_views)
        if two_views:
            columns = [dict(columns[0]), dict(columns[0])]
        places: list[Tensor | None] = [None] * len(columns)
        if self.mini_batch_num_tokens is not None:
            columns, places = map(list, zip(*map(_sort_by_length, columns), strict=True))
        loss: Tensor = CachedLossMixin.forward_cached(self, columns, Texts(hashes, two_views, places))
        return loss

    def embed_minibatch(self, *args: Any, with_grad: bool, **settings: Any) -> tuple[Tensor, Any]:
        """Embed a mini-batch, through the head if there is one."""
        embeddings, random_state = super().embed_minibatch(*args, with_grad=with_grad, **settings)
        if self.head is not None:
            with nullcontext() if with_grad else torch.no_grad():
                embeddings = self.head(embeddings)
        return embeddings, random_state

    def calculate_loss(self, reps: list[list[Tensor]], labels: Texts, *, with_backward: bool = False) -> Tensor:
        """Compute the loss of a batch from `reps`, the embeddings of each column in mini-batches.

        `with_backward` back-propagates to `reps`, chunk by chunk, and returns the loss without its graph.
        """
        columns = [torch.cat(column) for column in reps]
        columns = [c if places is None else c[places] for c, places in zip(columns, labels.places, strict=True)]
        if labels.two_views:
            self.check_views(*columns)
        with full_precision(columns[0]):
            batch = self.prepare_observed(columns, labels.hashes)
            leaves = batch.cut() if with_backward else batch
            total = columns[0].new_zeros((), dtype=batch.anchors.dtype)
            for start in range(0, len(batch.anchors), self.mini_batch_size):
                part = self.terms(leaves, slice(start, start + self.mini_batch_size))
                if with_backward:
                    torch.autograd.backward(part)
                    part = part.detach()
                total = total + part
            if with_backward:
                batch.backward_from(leaves)
        return total

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the model card."""
        sizes = {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return {**super().get_config_dict(), **sizes}

    @property
    def citation(self) -> str:
        """The BibTeX entries of the papers, for the model card."""
        return f"{super().citation}{citations.GRADCACHE}"


class CachedClusterNSLoss(_Cached, ClusterNSLoss):
    """`ClusterNSLoss` at the memory of a mini-batch, for one more forward pass.

    Values, gradients and inputs are those of `ClusterNSLoss` on the whole batch. One text column is embedded in two
    passes, each with its own dropout.

    Args:
        model: the model to train; not one with static embeddings, whose features have no rows to cut.
        args, settings: as `ClusterNSLoss`.
        mini_batch_size: rows that are embedded and scored at a time. Bounds the memory; the speed grows with it.
        mini_batch_num_tokens: tokens that are embedded at a time, in place of `mini_batch_size` rows. Rows are embedded
            in the order of their lengths, so that hardly any padding is: the faster, the more their lengths differ.
        show_progress_bar: whether to show one while embedding.

    Raises:
        ValueError: if a number is out of its range, or the model has static embeddings.
    """

    @classmethod
    def from_preset(cls, model: SentenceTransformer, name: str, **overrides: Any) -> ContrastiveLoss:
        """Make the published loss, cached; arguments as `ClusterNSLoss.from_preset`, and those of this class."""
        return CachedPublishedClusterNSLoss(model, **{**find_preset(name).settings, **overrides})


class CachedPublishedClusterNSLoss(_Cached, PublishedClusterNSLoss):
    """`PublishedClusterNSLoss` at the memory of a mini-batch; arguments as there and in `CachedClusterNSLoss`."""


def _sort_by_length(features: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Sort padded rows by their number of tokens; return the new place of each row, (B,). Others stay as they are."""
    if not is_padded(features):
        return features, None
    order = by_length(features)
    return {**features, **{name: value[order] for name, value in per_row(features).items()}}, order.argsort()
