"""`run_trainer`: one run of `SentenceTransformerTrainer` by a `Recipe`, which goes on from its last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import nn
from transformers import PrinterCallback, TrainerState
from transformers.integrations import get_reporting_integration_callbacks

from st_clusterns.checks import check_number
from st_clusterns.losses.clusterns import ClusterNSLoss
from st_clusterns.models import average_weights, copy_weights, default_route, reading_at_most
from st_clusterns.training.callbacks import STATE_FILE, ClusterStateCallback, cluster_losses, load_state
from st_clusterns.training.diagnostics import log_clusters
from st_clusterns.training.sampler import ClusterBatchSampler
from st_clusterns.training.sentences import check_batch_size
from st_clusterns.training.views import Kind

LEARNING_RATE = 2e-5
TOPICS_LEARNING_RATE = 5e-5  # of sentences with topics, taught by their clusters; too high for views alone


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run that are not the loss's. The defaults are those of the tables in the README.

    Attributes:
        batch_size: sentences per batch.
        epochs: passes over the corpus; may be a fraction.
        max_steps: optimiser steps, at most; 0 is no limit.
        learning_rate: of AdamW, decaying linearly to 0 without warm-up. Default: 5e-5 for sentences with topics, 2e-5
            for sentences without and for documents.
        max_length: tokens that clustering, training and the report read of a sentence, at most, besides the prompt. The
            saved model reads as many as before.
        bf16: whether to train in bfloat16 mixed precision.
        seed: seed of the random number generators.
        embed_batch_size: sentences per batch while embedding. Default: `batch_size`.
    """

    batch_size: int = 96
    epochs: float = 1.0
    max_steps: int = 20
    learning_rate: float | None = None
    max_length: int = 64
    bf16: bool = False
    seed: int = 0
    embed_batch_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse, by a `ValueError`, a number that is out of its range."""
        check_number("epochs", self.epochs, above=0)
        for name, least in (("max_steps", 0), ("max_length", 1), ("seed", 0)):
            check_number(name, getattr(self, name), least=least, whole=True)
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate)
        if self.embed_batch_size is not None:
            check_number("embed_batch_size", self.embed_batch_size, least=1, whole=True)

    def for_views(self, kind: Kind | None) -> Recipe:
        """Return the recipe with the learning rate that suits a kind of views (`choose_kind`), unless it has one."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=TOPICS_LEARNING_RATE if kind == "dropout" else LEARNING_RATE)


def run_trainer(
    model: SentenceTransformer,
    loss: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    folder: Path,
    *,
    steps: int | None = None,
    kind: Kind | None = None,
    group_size: int = 1,
    show_progress: bool = True,
    prompt: str = "",
    report_to: str | list[str] = "none",
) -> list[dict[str, float]]:
    """Train a model in place with `SentenceTransformerTrainer`; return the trainer's log.

    Goes on from the last whole checkpoint in `folder`. `steps` replaces the recipe's. `kind`, that of the views, gives
    the learning rate if the recipe has none (`Recipe.for_views`). After a training on spans of documents, the weights
    are the mean of those before and after (Wortsman et al. 2022). `group_size` rows of one cluster meet in a batch
    (`ClusterBatchSampler`). The loss may be any for the columns of the data set; the log of a `ClusterNSLoss` has
    cluster diagnostics (`log_clusters`). Every column gets the prompt, and goes through the default route of a Router.
    `report_to` is that of `TrainingArguments`. Fewer rows than a batch are a `ValueError`.
    """
    check_batch_size(recipe.batch_size, len(dataset))
    steps = count_steps(len(dataset), recipe) if steps is None else steps
    recipe = recipe.for_views(kind)
    start = copy_weights(model) if kind == "span" else None
    route = default_route(model)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        bf16=recipe.bf16,
        use_cpu=model.device.type == "cpu",  # otherwise bf16 asks for a GPU
        seed=recipe.seed,
        data_seed=recipe.seed,
        prompts=prompt or None,
        router_mapping={}
        if route is None
        else dict.fromkeys(dataset[0], route),  # dataset[0] has a transform's columns
        batch_sampler=partial(_batches, group_size=group_size),
        dataloader_drop_last=True,
        logging_steps=max(1, steps // 20),
        save_steps=max(1, steps // 4),
        save_total_limit=2,
        report_to=report_to,
        disable_tqdm=not show_progress,
    )
    args._n_gpu = min(args.n_gpu, 1)  # else the GPUs of one process would take a batch each (DataParallel)
    callbacks = [ClusterStateCallback(loss)] if cluster_losses(loss) else []
    trainer = SentenceTransformerTrainer(model, args, dataset, loss=loss, callbacks=callbacks)
    if any(isinstance(part, ClusterNSLoss) for part in cluster_losses(loss).values()):
        log_clusters(trainer)
    trainer.remove_callback(PrinterCallback)  # stands in for the progress bar, and prints every log
    checkpoint = last_checkpoint(folder)
    if checkpoint and _step_of(checkpoint) >= steps:  # the trainer would take one more step from there
        trainer._load_from_checkpoint(str(checkpoint))
        load_state(loss, checkpoint / STATE_FILE)
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        with reading_at_most(model, recipe.max_length, prompt):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        state = trainer.state
    if start is not None:
        average_weights(model, start)
    return list(state.log_history)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint in a folder that was written whole: `ClusterStateCallback` writes its file last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    return max(whole, key=_step_of, default=None)


def check_report_to(report_to: str | list[str]) -> None:
    """Raise now what a trainer would only after the clustering: ValueError, or ImportError if a library is missing."""
    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except (ValueError, RuntimeError) as error:
        kind = ValueError if isinstance(error, ValueError) else ImportError
        raise kind(f"report_to={report_to!r}: {error}") from error


def count_steps(n_sentences: int, recipe: Recipe) -> int:
    """Return the optimiser steps of a run over so many sentences."""
    steps = max(1, int(n_sentences // recipe.batch_size * recipe.epochs))
    return min(steps, recipe.max_steps) if recipe.max_steps else steps


def _batches(
    dataset: Any, batch_size: int, drop_last: bool, *, group_size: int, **settings: Any
) -> ClusterBatchSampler:
    # Not the trainer's default: ours is deterministic from (seed, epoch), so a resumed run sees the same batches.
    labels, seed = settings["valid_label_columns"], settings["seed"] or 0
    return ClusterBatchSampler(dataset, batch_size, drop_last, labels, seed=seed, group_size=group_size)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])
