"""Callbacks for `SentenceTransformerTrainer`: keep the clusters' state in checkpoints, and re-cluster on a schedule."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from st_clusterns.corpus import CorpusClusters, Ints, embed_corpus, follow_corpus
from st_clusterns.loss import ClusterNSLoss

STATE_FILE = "clusterns_state.safetensors"
FORMAT = "st_clusterns 1"


def save_state(loss: ClusterNSLoss, path: Path) -> None:
    """Write the loss's own state (clusters and start, not the model) to a safetensors file, whole or not at all."""
    tensors = {name: value.contiguous() for name, value in _own_state(loss).items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file(tensors, partial, metadata={"format": FORMAT, "settings": json.dumps(loss.get_config_dict())})
    os.replace(partial, path)


def load_state(loss: ClusterNSLoss, path: Path) -> None:
    """Read a state that `save_state` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is broken, of another program, or of other clusters than the loss's.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so training cannot go on where it stopped: the checkpoint was written without "
            "ClusterStateCallback, or the file was lost. Start anew, or copy the file back."
        )
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"{path} was not written by st_clusterns ({FORMAT}).")
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}). Resume from an earlier checkpoint.") from error
    own = _own_state(loss)
    saved_shapes, shapes = _shapes(saved), _shapes(own)
    if saved_shapes != shapes:
        raise ValueError(
            f"{path} holds the state of other clusters than the loss's: {saved_shapes} instead of {shapes}. Make the "
            "loss with the settings that the checkpoint was trained with (n_clusters, model, preset)."
        )
    for name, value in own.items():
        value.copy_(saved[name])


def _own_state(loss: ClusterNSLoss) -> dict[str, Tensor]:
    return {name: value for name, value in loss.named_buffers() if not name.startswith("model.")}


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in sorted(state.items())}


class ClusterStateCallback(TrainerCallback):  # type: ignore[misc]  # the host library is not typed
    """Writes the clusters beside each checkpoint and reads them back on resuming.

    Args:
        loss: the loss that is trained with.

    Example:
        ::

            trainer = SentenceTransformerTrainer(..., loss=loss, callbacks=[ClusterStateCallback(loss)])
            trainer.train(resume_from_checkpoint=True)
    """

    def __init__(self, loss: ClusterNSLoss) -> None:
        self.loss = loss

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state file into the checkpoint's folder."""
        if state.is_world_process_zero:
            save_state(self.loss, _checkpoint(args, state.global_step) / STATE_FILE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the state file if training goes on from a checkpoint."""
        if state.global_step > 0:
            load_state(self.loss, _checkpoint(args, state.global_step) / STATE_FILE)


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"


class ReclusterCallback(TrainerCallback):  # type: ignore[misc]  # the host library is not typed
    """Embeds and clusters the corpus anew at the start of epochs, since the model has changed.

    The loss gets the new centroids and trusts; cluster numbers keep their meaning. Without a label column the loss
    looks rows up itself. A `ClusterBatchSampler(ids=ids)` sees the new clusters in the same array.

    Args:
        loss: made with `clusters=...`.
        sentences: the corpus, `N` texts.
        ids: the array that the sampler reads, rewritten in place, (N,).
        every: epochs between two clusterings, 1 or more.

    Raises:
        ValueError: if the loss has no corpus clusters, or their number of rows is not that of the sentences.
    """

    def __init__(self, loss: ClusterNSLoss, sentences: Sequence[str], ids: Ints | None = None, every: int = 1) -> None:
        if loss.corpus is None:
            raise ValueError("loss has no corpus clusters to go on from: make it with clusters=cluster_corpus(...).")
        if len(sentences) != len(loss.corpus.ids) or (ids is not None and len(ids) != len(sentences)):
            raise ValueError(
                f"The clusters know {len(loss.corpus.ids)} sentences, got {len(sentences)} sentences"
                + (f" and {len(ids)} ids." if ids is not None else ".")
            )
        if every < 1:
            raise ValueError(f"every must be 1 epoch or more, got {every}.")
        self.loss = loss
        self.sentences = sentences
        self.ids = ids
        self.every = every
        self.corpus: CorpusClusters = loss.corpus

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: SentenceTransformer | None = None,
        **kwargs: Any,
    ) -> None:
        """Re-cluster before epochs `every`, `2 * every`, ..."""
        epoch = round(state.epoch or 0)
        if model is None or epoch == 0 or epoch % self.every:
            return
        training = model.training
        self.corpus = follow_corpus(embed_corpus(self.sentences, model, show_progress_bar=False), self.corpus)
        model.train(training)
        self.loss.clusters.seed(torch.as_tensor(self.corpus.centroids), torch.as_tensor(self.corpus.trust))
        if self.ids is not None:
            np.copyto(self.ids, self.corpus.ids)
