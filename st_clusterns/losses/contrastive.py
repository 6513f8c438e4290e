"""What both ClusterNS losses share: embed the columns, gather, normalise, and score positives against a batch.

`ContrastiveLoss` is `MultipleNegativesRankingLoss` in which copies of one text are no negatives of each other.
Subclasses override `prepare` (once a batch) and `terms` (once a batch, or once a chunk of rows under GradCache).

Shapes: `B` rows of this process, `M` rows of all processes, `R` rows of a chunk, `D` dimension, `n` negative columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from st_clusterns.checks import check_number
from st_clusterns.losses import distributed
from st_clusterns.losses.lengths import embed_by_length, is_padded, per_row
from st_clusterns.losses.text_hashes import repeats_text, text_hashes
from st_clusterns.models import check_trainable, device_of, dimension_of, unwrap

logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """One batch, as the terms of a loss read it. All rows are unit vectors."""

    anchors: Tensor  # this process's rows, (B, D)
    positives: Tensor  # of all processes, (M, D)
    negatives: Tensor  # explicit negatives of all processes, column after column, (n*M, D)
    own: Tensor  # index of each anchor's positive among the M, (B,)
    texts: list[Tensor] | None  # hashes of the texts of all processes by column, each (M,); None: cannot be compared

    leaves: ClassVar[tuple[str, ...]] = ("anchors", "positives", "negatives")  # what gradients flow through

    def cut(self) -> Batch:
        """Return a copy that gradients stop at: its rows are leaves, for `backward_from`."""
        return replace(self, **{name: getattr(self, name).detach().requires_grad_() for name in self.leaves})

    def backward_from(self, leaves: Batch) -> None:
        """Back-propagate the gradients that a `cut` copy has gathered through what made this batch's rows, once."""
        pairs = [(getattr(self, name), getattr(leaves, name).grad) for name in self.leaves]
        pairs = [(rows, gradient) for rows, gradient in pairs if rows.requires_grad and gradient is not None]
        torch.autograd.backward([rows for rows, _ in pairs], [gradient for _, gradient in pairs])


class TrainingHead(nn.Module):
    """A linear layer and tanh between the model and the loss, (B, D) -> (B, D); SimCSE's "MLP, only in training".

    It belongs to the loss: the optimiser trains it, `ClusterStateCallback` keeps it in checkpoints, and the saved model
    does not hold it.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dimension, dimension)
        nn.init.normal_(self.dense.weight, std=0.02)  # as BERT initialises its layers
        nn.init.zeros_(self.dense.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Pass embeddings on; ValueError if they are narrower than the model's."""
        if embeddings.shape[1] != self.dense.in_features:
            raise ValueError(
                f"head=True reads embeddings of {self.dense.in_features} dimensions, got {embeddings.shape[1]}: pass "
                "head=False inside MatryoshkaLoss."
            )
        projected: Tensor = self.dense(embeddings.to(self.dense.weight.dtype))  # a frozen base may be in bfloat16
        return projected.tanh()


class ContrastiveLoss(nn.Module):
    """In-batch contrastive loss (InfoNCE) that accepts one text column, pairs, or tuples with negatives.

    Arguments and errors are those of `ClusterNSLoss`; `head` is that of `PublishedClusterNSLoss`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float,
        gather_across_devices: bool = False,
        head: bool = False,
    ) -> None:
        super().__init__()
        check_number("temperature", temperature, above=0)
        check_trainable(model)
        self.model = model
        self.temperature = temperature
        self.gather_across_devices = gather_across_devices
        self.head = TrainingHead(dimension_of(model)).to(device_of(model)) if head else None
        if self.head is not None:
            distributed.share_weights(self.head)
        self.compared_views = self.saw_labels = False  # so that each is said once
        self.observer: Callable[[Batch], None] | None = None  # is shown each prepared batch; `log_clusters` sets it

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Embed the columns and return the loss, a scalar; labels are not used."""
        self.check_labels(labels)
        columns = list(sentence_features)
        texts = [text_hashes(column) for column in columns]  # before embedding, which may change the features
        if len(columns) == 1:
            embeddings, texts = self.embed_twice(columns[0]), texts * 2
        else:
            embeddings = [self.embed(column) for column in columns]
        return self.compute_loss_from_embeddings(embeddings, texts)

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """Embed a column: (B, D)."""
        if at_layer(self.model) is None:
            embeddings = embed_by_length(self.model, features)
        else:  # the layers of one forward pass a column are remembered
            embeddings = self.model(features)["sentence_embedding"]
        return embeddings if self.head is None else self.head(embeddings)

    def embed_twice(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Embed one column twice with independent dropout, together where rows are padded sequences."""
        if at_layer(self.model) is not None:
            raise ValueError(
                "AdaptiveLayerLoss and Matryoshka2dLoss need the text column twice, as (anchor, positive): "
                "dataset.add_column('positive', dataset['sentence'])."
            )
        if is_padded(features):
            twice = {name: torch.cat([value, value]) for name, value in per_row(features).items()}
            views = [{**features, **twice}]
        else:
            views = [dict(features), dict(features)]
        first, second = torch.cat([self.embed(view) for view in views]).chunk(2)
        self.check_views(first, second)
        return [first, second]

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], texts: list[Tensor | None] | None = None
    ) -> Tensor:
        """Compute the loss of a batch, a scalar.

        Args:
            embeddings: anchors, positives and any number of negatives, each (B, D); ValueError for less than a pair.
            texts: a hash of each row's text for each column, each (B,); equal texts are no negatives of each other.
        """
        with full_precision(embeddings[0]):
            return self.terms(self.prepare_observed(embeddings, texts), slice(None))

    def prepare_observed(self, embeddings: list[Tensor], texts: list[Tensor | None] | None = None) -> Batch:
        """Prepare a batch, and show it to the observer."""
        batch = self.prepare(embeddings, texts)
        if self.observer is not None:
            self.observer(batch)
        return batch

    def prepare(self, embeddings: list[Tensor], texts: list[Tensor | None] | None = None) -> Batch:
        """Gather and normalise the columns."""
        if len(embeddings) < 2:
            raise ValueError(f"Expected an anchor and a positive at least, got {len(embeddings)} column(s).")
        anchors, *others = (column.to(torch.promote_types(column.dtype, torch.float32)) for column in embeddings)
        size, offset = len(anchors), 0
        if self.gather_across_devices:
            distributed.check_same_size(size, anchors.device)
            others = [distributed.gather_with_grad(column) for column in others]
            offset = distributed.rank() * size
        return Batch(
            anchors=F.normalize(anchors, dim=1),
            positives=F.normalize(others[0], dim=1),
            negatives=F.normalize(torch.cat(others[1:]), dim=1) if others[1:] else anchors[:0].detach(),
            own=torch.arange(offset, offset + size, device=anchors.device),
            texts=self._gather_texts(texts),
        )

    def _gather_texts(self, texts: list[Tensor | None] | None) -> list[Tensor] | None:
        known = [text for text in texts or [] if text is not None]
        if not known or len(known) < len(texts or []):
            return None
        if not self.gather_across_devices:
            return known
        gathered = {id(text): distributed.gather(text) for text in known}  # views of one column share their hashes
        return [gathered[id(text)] for text in known]

    def terms(self, batch: Batch, rows: slice) -> Tensor:
        """Return what some of this process's rows add to the loss, a scalar: over all rows the parts sum up to it."""
        cosine, no_negatives = self.candidate_cosines(batch, rows), self.no_negatives(batch, rows)
        cosine = cosine if no_negatives is None else cosine.masked_fill(no_negatives, -torch.inf)
        return self.contrast(batch, rows, cosine)

    def no_negatives(self, batch: Batch, rows: slice) -> Tensor | None:
        """Return which candidates are no negatives of rows, (R, M + n*M), without their positives; None: all are."""
        return None if batch.texts is None else repeats_text(batch.texts, batch.own[rows])

    def candidate_cosines(self, batch: Batch, rows: slice) -> Tensor:
        """Return the cosines of rows with all candidates, positives and explicit negatives: (R, M + n*M)."""
        candidates = torch.cat([batch.positives, batch.negatives]) if len(batch.negatives) else batch.positives
        return batch.anchors[rows] @ candidates.T

    def contrast(self, batch: Batch, rows: slice, cosine: Tensor) -> Tensor:
        """Return the cross-entropy of the positives among all candidates, over `B`."""
        loss = F.cross_entropy(cosine / self.temperature, batch.own[rows], reduction="sum")
        return loss / len(batch.anchors)

    def check_views(self, first: Tensor, second: Tensor) -> None:
        """Warn once if both views of a sentence are equal."""
        if self.compared_views or not self.is_training():
            return
        self.compared_views = True  # once: it makes a GPU wait
        if torch.equal(first, second):
            logger.warning(
                "Both views of a sentence are equal, because the model has no dropout in training: the contrastive "
                "term has little to teach. Pass views from the text: views_dataset(sentences, clusters, 'deletion')."
            )

    def check_labels(self, labels: Tensor | None) -> None:
        """Say once that a label column is not used."""
        if labels is None or self.saw_labels:
            return
        self.saw_labels = True
        if labels.any():  # `old_fit` makes up zeros where there are no labels
            logger.warning(
                f"{type(self).__name__} finds the clusters of sentences itself: the label column is not used."
            )

    def is_training(self) -> bool:
        """Whether this is a training step. `trainer.evaluate()` leaves the loss itself in training mode."""
        return self.model.training and torch.is_grad_enabled()

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the model card."""
        return {"temperature": self.temperature, "gather_across_devices": self.gather_across_devices}


def full_precision(embeddings: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off: bfloat16 would round cosines to 1 part in 256."""
    device = embeddings.device.type
    return nullcontext() if device == "mps" else torch.autocast(device, enabled=False)


def at_layer(model: Any) -> Any | None:
    """Return what `AdaptiveLayerLoss` or `Matryoshka2dLoss` puts in the transformer's place while it runs, if any."""
    inner = unwrap(model)
    forward = inner[0].forward if isinstance(inner, nn.Sequential) else None
    return forward if hasattr(forward, "layer_idx") else None
