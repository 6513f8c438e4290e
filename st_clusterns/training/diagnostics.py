"""`log_clusters`: what the clusters do while a model trains, in the trainer's logs."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from math import isnan
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from st_clusterns.losses.clusterns import ClusteredBatch, ClusterNSLoss
from st_clusterns.losses.contrastive import Batch
from st_clusterns.losses.diagnostics import describe_batch, describe_use
from st_clusterns.training.callbacks import cluster_losses

ROWS_PER_CLUSTER = 16  # of the last rows that tell which centroids are used: fewer would miss some by chance


def log_clusters(trainer: Trainer) -> None:
    """Add cluster diagnostics to the logs of a trainer, and so to TensorBoard, W&B, trackio (`report_to`).

    Call it once, before `trainer.train()`. Each log of a training loss then holds the values of `describe_batch` for
    the first batch since the step began, and those of `describe_use` for the last rows, 16 per cluster. The values are
    computed when they are logged; the other steps keep a few tensors. Inside `MatryoshkaLoss` the full dimension is
    described, inside `AdaptiveLayerLoss` the last layer. Of several processes, each describes its own rows, and the
    logs show those of the first. With a dict of losses, a name is preceded by that of its data set. `model.fit` has no
    such logs.

    Args:
        trainer: a trainer whose loss is a `ClusterNSLoss`, a wrapper around one, or a dict of losses; else ValueError.
    """
    if not _watched(trainer):
        raise ValueError(f"There is no ClusterNSLoss in trainer.loss ({type(trainer.loss).__name__}): nothing to log.")
    # First, as reporters read the same dict of logs; `add_callback` would put it behind them.
    trainer.callback_handler.callbacks.insert(0, _ClusterLog(trainer))


class Watch:
    """Observer of a loss: keeps the first batch of a step, and the cosines of the last rows with the centroids.

    Args:
        loss: the loss, whose `observer` this becomes.
    """

    def __init__(self, loss: ClusterNSLoss) -> None:
        self.loss = loss
        self.batch: Batch | None = None
        self.window: deque[Tensor] = deque()
        self.rows = 0

    def __call__(self, batch: Batch) -> None:
        """Keep a prepared batch, unless the step has one already."""
        if self.batch is not None:  # a wrapper's lower dimension or earlier layer, or an accumulated batch
            return
        self.batch = replace(batch, **{name: getattr(batch, name).detach() for name in batch.leaves})
        if isinstance(self.batch, ClusteredBatch):
            self.window.append(self.batch.to_centroids)
            self.rows += len(self.window[-1])
            while self.rows - len(self.window[0]) >= ROWS_PER_CLUSTER * self.window[0].shape[1]:
                self.rows -= len(self.window.popleft())

    def describe(self) -> dict[str, float]:
        """Return the values that are not NaN; one read from the device for all."""
        if self.batch is None:
            return {}
        values = describe_batch(self.loss, self.batch)
        if self.window:
            values |= describe_use(torch.cat(list(self.window)))
        numbers = torch.stack([value.float() for value in values.values()]).tolist()
        return {name: round(number, 4) for name, number in zip(values, numbers, strict=True) if not isnan(number)}


class _ClusterLog(TrainerCallback):  # type: ignore[misc]  # the host library is not typed
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.watches: dict[str, Watch] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the losses; now, as `model_init` makes new ones."""
        self.watches = {name: Watch(loss) for name, loss in _watched(self.trainer).items()}
        for watch in self.watches.values():
            watch.loss.observer = watch

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the losses and the batches."""
        for watch in self.watches.values():
            watch.loss.observer = None
        self.watches = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the batch of the step before."""
        for watch in self.watches.values():
            watch.batch = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to the log of a training loss, for the reporters and in `log_history`."""
        if logs is None or "loss" not in logs:
            return
        for key, watch in self.watches.items():
            values = {f"{key}_{name}" if key else name: value for name, value in watch.describe().items()}
            logs.update(values)
            state.log_history[-1].update(values)


def _watched(trainer: Trainer) -> dict[str, ClusterNSLoss]:
    return {name: loss for name, loss in cluster_losses(trainer.loss).items() if isinstance(loss, ClusterNSLoss)}
