"""`ClusterStateCallback`: keeps the state of a loss in the checkpoints of `SentenceTransformerTrainer`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from st_clusterns.losses.clusterns import ClusterNSLoss
from st_clusterns.losses.contrastive import ContrastiveLoss
from st_clusterns.losses.published import PublishedClusterNSLoss
from st_clusterns.training.views import set_epoch, views_of

STATE_FILE = "clusterns_state.safetensors"
FORMAT = "st_clusterns 2"
Losses = nn.Module | dict[str, nn.Module]


def save_state(loss: Losses, path: Path) -> None:
    """Write a loss's own state (not the model's) and its clusters' fingerprint; if that fails, leave no file behind."""
    settings = {name: part.get_config_dict() for name, part in cluster_losses(loss).items()}
    metadata = {"format": FORMAT, "settings": json.dumps(settings), "clusters": json.dumps(_fingerprints(loss))}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    copies = {name: value.clone() for name, value in _own_state(loss).items()}  # one loss may serve two data sets
    try:
        save_file(copies, partial, metadata=metadata)
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path} could not be written ({error}), so this checkpoint is not whole; the one before it is. Make room "
            "and resume from that."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def load_state(loss: Losses, path: Path) -> None:
    """Read a state that `save_state` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is broken, of another program, or of other clusters than the loss's.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so training cannot go on where it stopped: the checkpoint was written without the "
            "callback that writes it, or the file was lost. Resume from an earlier checkpoint, start anew, or copy "
            "the file back."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}). Resume from an earlier checkpoint.") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this version of st_clusterns ({FORMAT}).")
    if json.loads(metadata["clusters"]) != _fingerprints(loss):
        raise ValueError(
            f"{path} was written by a run with other clusters: the corpus, its order, the model or the seed differ. "
            "Resume with the clusters that the run began with, or start anew in another folder."
        )
    saved_shapes, shapes = (
        {name: tuple(value.shape) for name, value in sorted(state.items())} for state in (saved, _own_state(loss))
    )
    if saved_shapes != shapes:
        raise ValueError(
            f"{path} holds the state of another loss: {saved_shapes} instead of {shapes}. Make the loss with the "
            "settings that the checkpoint was trained with (n_clusters, model, preset)."
        )
    for key, part in cluster_losses(loss).items():
        prefix = f"{key}." if key else ""
        own = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
        part.load_state_dict(own, strict=False)


def cluster_losses(loss: Losses) -> dict[str, ContrastiveLoss]:
    """Find our loss in a loss or a wrapper (named ""), or in each of a dict of losses."""
    parts = loss if isinstance(loss, dict) else {"": loss}
    found = {name: [m for m in part.modules() if isinstance(m, ContrastiveLoss)] for name, part in parts.items()}
    return {name: modules[0] for name, modules in found.items() if modules}


def _own_state(loss: Losses) -> dict[str, Tensor]:
    return {
        f"{key}.{name}".lstrip("."): value
        for key, part in cluster_losses(loss).items()
        for name, value in part.state_dict().items()
        if not name.startswith("model.")
    }


def _fingerprints(loss: Losses) -> dict[str, str]:
    parts = cluster_losses(loss)
    return {name: part.clusters.fingerprint for name, part in parts.items() if isinstance(part, ClusterNSLoss)}


class ClusterStateCallback(TrainerCallback):  # type: ignore[misc]  # the host library is not typed
    """Makes a resumed training equal to an uninterrupted one.

    It writes the moving centroids of the published method beside each checkpoint and reads them back, and refuses to
    resume with other clusters than those of the interrupted run. A run that starts at step 0 starts from centroids that
    know nothing, as hyperparameter search needs. It also tells the views of the data set and the batch sampler the
    epoch. The trainer tells the sampler, but not on several processes when it resumes within an epoch.

    Args:
        loss: as the trainer gets it: also a wrapper around a `ClusterNSLoss`, or a dict of losses; else `ValueError`.
        resume_from: the checkpoint's folder, if training is resumed from one outside `args.output_dir`.
    """

    def __init__(self, loss: Losses, resume_from: str | Path | None = None) -> None:
        if not cluster_losses(loss):
            raise ValueError(f"There is no ClusterNSLoss in the loss ({type(loss).__name__}), so nothing to save.")
        self.loss = loss
        self.resume_from = resume_from

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state into the checkpoint's folder."""
        if args.should_save:
            name = f"checkpoint-{state.global_step}"
            folders = (*Path(args.output_dir).glob(name), *Path(args.output_dir).glob(f"*/{name}"))  # */: of a trial
            save_state(self.loss, max(folders, key=lambda folder: folder.stat().st_mtime) / STATE_FILE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the state if training goes on from a checkpoint, else begin anew; check what the epochs need."""
        loader = kwargs.get("train_dataloader")
        if args.dataloader_persistent_workers and views_of(getattr(loader, "dataset", None)):
            raise ValueError(
                "dataloader_persistent_workers=True keeps workers that never hear of a new epoch, so all epochs would "
                "have the same views: leave it out."
            )
        if state.global_step > 0:
            load_state(self.loss, self._find_checkpoint(args, state) / STATE_FILE)
            return
        for part in cluster_losses(self.loss).values():
            if isinstance(part, PublishedClusterNSLoss):
                part.centroids.reset()

    def _find_checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        # The trainer does not tell from which folder it has resumed; the log it has taken over does.
        here = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        places = [Path(place) for place in (self.resume_from, args.resume_from_checkpoint, here) if place]
        for place in places:
            note = place / "trainer_state.json"
            if note.is_file():
                saved = TrainerState.load_from_json(str(note))
                logs = [json.dumps([run.global_step, run.log_history]) for run in (saved, state)]  # text: NaN == NaN
                if logs[0] == logs[1]:
                    return place
        raise FileNotFoundError(
            f"Training goes on from step {state.global_step} of a run that did not write "
            f"{' or '.join(map(str, places))}. Pass the folder that is resumed from: "
            f"{type(self).__name__}(..., resume_from=folder)."
        )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the batch sampler and the views the epoch."""
        loader, epoch = kwargs.get("train_dataloader"), int(state.epoch or 0)
        set_epoch(getattr(loader, "dataset", None), epoch)
        sampler = getattr(loader, "batch_sampler", None)
        while sampler is not None and not hasattr(sampler, "set_epoch"):  # inside the one that deals out batches
            sampler = getattr(sampler, "batch_sampler", None)
        if sampler is not None:
            sampler.set_epoch(epoch)
