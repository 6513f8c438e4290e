"""Callbacks for `SentenceTransformerTrainer`: keep the clusters' state in checkpoints, and re-cluster on a schedule."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from st_clusterns import distributed
from st_clusterns.corpus import CorpusClusters, follow_corpus
from st_clusterns.embeddings import embed_corpus
from st_clusterns.loss import ClusterNSLoss
from st_clusterns.rows import Ints

STATE_FILE = "clusterns_state.safetensors"
CORPUS_FILE = "clusterns_corpus.safetensors"
FORMAT = "st_clusterns 1"
Losses = nn.Module | dict[str, nn.Module]


def save_state(loss: Losses, path: Path) -> None:
    """Write the loss's own state (clusters and start, not the model) to a safetensors file, whole or not at all.

    Raises:
        OSError: if it cannot be written, as on a full disk.
    """
    settings = {name: part.get_config_dict() for name, part in _cluster_losses(loss).items()}
    _write(_own_state(loss), path, {"settings": json.dumps(settings.get("", settings))})


def load_state(loss: Losses, path: Path) -> None:
    """Read a state that `save_state` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is broken, of another program, or of other clusters than the loss's.
    """
    saved, own = _read(path), _own_state(loss)
    saved_shapes, shapes = _shapes(saved), _shapes(own)
    if saved_shapes != shapes:
        raise ValueError(
            f"{path} holds the state of other clusters than the loss's: {saved_shapes} instead of {shapes}. Make the "
            "loss with the settings that the checkpoint was trained with (n_clusters, model, preset)."
        )
    for name, value in own.items():
        value.copy_(saved[name])


def _cluster_losses(loss: Losses) -> dict[str, ClusterNSLoss]:
    """Find the `ClusterNSLoss` in a loss or a wrapper (named ""), or in each of a dict of losses."""
    parts = loss if isinstance(loss, dict) else {"": loss}
    found = {
        name: next((module for module in part.modules() if isinstance(module, ClusterNSLoss)), None)
        for name, part in parts.items()
    }
    return {name: module for name, module in found.items() if module is not None}


def _own_state(loss: Losses) -> dict[str, Tensor]:
    return {
        f"{key}.{name}".lstrip("."): value
        for key, part in _cluster_losses(loss).items()
        for name, value in part.named_buffers()
        if not name.startswith("model.")
    }


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in sorted(state.items())}


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    copies = {name: value.clone() for name, value in tensors.items()}  # one loss may serve two data sets
    try:
        save_file(copies, partial, metadata={"format": FORMAT, **(metadata or {})})
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path} could not be written ({error}), so this checkpoint is not whole; the one before it is. Make room "
            "and resume from that."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so training cannot go on where it stopped: the checkpoint was written without the "
            "callback that writes it, or the file was lost. Resume from an earlier checkpoint, start anew, or copy "
            "the file back."
        )
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"{path} was not written by st_clusterns ({FORMAT}).")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}). Resume from an earlier checkpoint.") from error


class _CheckpointCallback(TrainerCallback):  # type: ignore[misc]  # the host library is not typed
    """Keeps one file of tensors in each checkpoint.

    Subclasses give `write(path)`, `read(path)` and the file's name.
    """

    file_name: str

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = resume_from

    def write(self, path: Path) -> None:
        """Write the file."""
        raise NotImplementedError

    def read(self, path: Path) -> None:
        """Take over what the file holds."""
        raise NotImplementedError

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the file into the checkpoint's folder."""
        if args.should_save:
            name = f"checkpoint-{state.global_step}"
            folders = (*Path(args.output_dir).glob(name), *Path(args.output_dir).glob(f"*/{name}"))  # */: of a trial
            self.write(max(folders, key=lambda folder: folder.stat().st_mtime) / self.file_name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the file if training goes on from a checkpoint."""
        if state.global_step > 0:
            self.read(self._find_checkpoint(args, state) / self.file_name)

    def _find_checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        # The trainer does not tell from which folder it has resumed; the log it has taken over does.
        here = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        places = [Path(place) for place in (self.resume_from, args.resume_from_checkpoint, here) if place]
        for place in places:
            note = place / "trainer_state.json"
            if note.is_file() and _same_run(TrainerState.load_from_json(str(note)), state):
                return place
        raise FileNotFoundError(
            f"Training goes on from step {state.global_step} of a run that did not write "
            f"{' or '.join(map(str, places))}. Pass the folder that is resumed from: "
            f"{type(self).__name__}(..., resume_from=folder)."
        )


def _same_run(saved: TrainerState, state: TrainerState) -> bool:
    logs = (json.dumps([s.global_step, s.log_history]) for s in (saved, state))  # as text: NaN does not equal NaN
    return len(set(logs)) == 1


class ClusterStateCallback(_CheckpointCallback):
    """Writes the clusters beside each checkpoint and reads them back on resuming.

    Resumed training then equals uninterrupted training. To that end it also tells the batch sampler the epoch, which
    the trainer forgets on several processes when it resumes within an epoch.

    Args:
        loss: the loss that is trained with, as the trainer gets it: also a wrapper around a `ClusterNSLoss`, or a
            dict of losses.
        resume_from: the checkpoint's folder, if training is resumed from one outside `args.output_dir`.

    Raises:
        ValueError: if there is no `ClusterNSLoss` in the loss.

    Example:
        ::

            trainer = SentenceTransformerTrainer(..., loss=loss, callbacks=[ClusterStateCallback(loss)])
            trainer.train(resume_from_checkpoint=True)
    """

    file_name = STATE_FILE

    def __init__(self, loss: Losses, resume_from: str | Path | None = None) -> None:
        super().__init__(resume_from)
        if not _cluster_losses(loss):
            raise ValueError(f"There is no ClusterNSLoss in the loss ({type(loss).__name__}), so nothing to save.")
        self.loss = loss

    def write(self, path: Path) -> None:
        """Write the clusters' state."""
        save_state(self.loss, path)

    def read(self, path: Path) -> None:
        """Take over the clusters' state."""
        load_state(self.loss, path)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Tell the batch sampler the epoch."""
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None and not hasattr(sampler, "set_epoch"):  # inside the one that deals out batches
            sampler = getattr(sampler, "batch_sampler", None)
        if sampler is not None:
            sampler.set_epoch(int(state.epoch or 0))


class ReclusterCallback(_CheckpointCallback):
    """Embeds and clusters the corpus anew at the start of epochs, since the model has changed.

    The loss gets the new centroids and trusts; cluster numbers keep their meaning. Without a label column the loss
    looks rows up itself. A `ClusterBatchSampler(ids=ids)` sees the new clusters in the same array. The clusters are
    kept in each checkpoint (beside the state, which is `ClusterStateCallback`'s) and read back on resuming.

    Args:
        loss: made with `clusters=...`.
        sentences: the corpus, `N` texts.
        ids: the array that the sampler reads, rewritten in place, (N,).
        every: epochs between two clusterings, 1 or more.
        resume_from: the checkpoint's folder, if training is resumed from one outside `args.output_dir`.

    Raises:
        ValueError: if the loss has no corpus clusters, or their number of rows is not that of the sentences.
    """

    file_name = CORPUS_FILE

    def __init__(
        self,
        loss: ClusterNSLoss,
        sentences: Sequence[str],
        ids: Ints | None = None,
        every: int = 1,
        resume_from: str | Path | None = None,
    ) -> None:
        super().__init__(resume_from)
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

    def write(self, path: Path) -> None:
        """Write the corpus clusters."""
        _write({name: torch.tensor(value) for name, value in _arrays(self.corpus).items()}, path)

    def read(self, path: Path) -> None:
        """Take over corpus clusters."""
        corpus = _with_arrays(self.corpus, _read(path))
        if (len(corpus.ids), corpus.n_clusters) != (len(self.sentences), self.corpus.n_clusters):
            raise ValueError(
                f"{path} holds {corpus.n_clusters} clusters of {len(corpus.ids)} sentences, but there are "
                f"{self.corpus.n_clusters} clusters and {len(self.sentences)} sentences."
            )
        self._take(corpus)

    def _take(self, corpus: CorpusClusters) -> None:
        self.corpus = corpus
        if self.ids is not None:
            np.copyto(self.ids, corpus.ids)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: SentenceTransformer | None = None,
        **kwargs: Any,
    ) -> None:
        """Re-cluster before epochs `every`, `2 * every`, ..."""
        epoch = state.epoch or 0
        if model is None or epoch == 0 or epoch % self.every:  # a fraction: resumed within an epoch
            return
        training = model.training
        embeddings = embed_corpus(self.sentences, model, show_progress_bar=False)
        corpus = follow_corpus(embeddings, self.corpus, sentences=self.sentences)
        model.train(training)
        self._take(_of_rank_0(corpus, self.loss.clusters.centroids.device))
        self.loss.clusters.seed(**self.corpus.tensors())


def _of_rank_0(corpus: CorpusClusters, device: torch.device) -> CorpusClusters:
    # Embeddings may differ in the last bits from device to device; batches must not.
    tensors = {name: torch.tensor(value, device=device) for name, value in _arrays(corpus).items()}
    for tensor in tensors.values():
        distributed.broadcast(tensor)
    return _with_arrays(corpus, tensors)


def _arrays(corpus: CorpusClusters) -> dict[str, Any]:
    # Not the layer, which never changes and is in the model.
    return {"ids": corpus.ids, "centroids": corpus.centroids, "trust": corpus.trust}


def _with_arrays(corpus: CorpusClusters, tensors: dict[str, Tensor]) -> CorpusClusters:
    arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    return replace(corpus, **arrays)
