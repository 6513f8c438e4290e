"""The main job: from a list of sentences and a model to a better model, resumable at any time.

Everything unfinished lies in `<output>.partial`: the settings, the corpus embeddings, the trainer's checkpoints. The
same call goes on from there; the output folder appears at the end, whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from transformers import PrinterCallback, TrainerState

from st_clusterns.callbacks import STATE_FILE, ClusterStateCallback, load_state, save_state
from st_clusterns.corpus import CorpusClusters, cluster_corpus
from st_clusterns.embeddings import embed_corpus
from st_clusterns.loss import ClusterNSLoss
from st_clusterns.report import describe_clusters, describe_embeddings, draw_report, write_json
from st_clusterns.sampler import ClusterBatchSampler
from st_clusterns.sentences import check_sentences

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run that are not the loss's.

    Attributes:
        batch_size: sentences in a batch.
        epochs: passes over the corpus; may be a fraction.
        max_steps: at most as many optimiser steps; more than 40 have not been measured. 0 is no limit.
        learning_rate: of AdamW, decaying linearly to 0.
        max_length: tokens that training reads of a sentence, at most; the saved model reads as many as before.
        bf16: train in bfloat16 mixed precision, on devices that are faster so.
        seed: of every random choice.
    """

    batch_size: int = 96
    epochs: float = 1.0
    max_steps: int = 20
    learning_rate: float = 2e-5
    max_length: int = 64
    bf16: bool = False
    seed: int = 0


RECIPE = Recipe()
SETTINGS_FILE = "settings.json"


def train(
    sentences: Sequence[str],
    model_name: str,
    output: str | Path,
    n_clusters: int | None = None,
    recipe: Recipe = RECIPE,
    show_progress: bool = True,
    topic_layer: bool = True,
) -> dict[str, Any]:
    """Train a model on plain sentences and save it with its report.

    Writes into `output`: the model (loadable by plain `SentenceTransformer(output)`) with its card, the cluster state
    (`clusterns_state.safetensors`), `report.json` and `report.png`. Exact duplicates are trained on once.

    Args:
        sentences: the corpus.
        model_name: name on the hub, or path.
        output: a folder that does not exist yet.
        n_clusters: number of clusters `K`; chosen from the corpus without it.
        recipe: the numbers of the run.
        show_progress: progress bars.
        topic_layer: put a layer at the end of the model, if the clusters are to be trusted, or the model judges worse
            than shared words (`st_clusterns.topic_layer`).

    Returns:
        The report.

    Raises:
        FileExistsError: if `output` exists.
        ValueError: if the sentences cannot be trained on, or an interrupted run for `output` had other settings.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"output={str(output)!r} exists already: choose another folder, or remove it first.")
    if not isinstance(sentences, str):
        given, sentences = len(sentences), list(dict.fromkeys(sentences))
        if len(sentences) < given:
            logger.info(f"{given - len(sentences)} exact duplicates are left out: {len(sentences)} sentences remain.")
    check_sentences(sentences, recipe.batch_size, n_clusters)
    model = SentenceTransformer(model_name)
    work = _open_work_folder(output, sentences, model_name, recipe, n_clusters=n_clusters, topic_layer=topic_layer)

    before = embed_corpus(sentences, model, show_progress_bar=show_progress, cache=work / "embeddings")
    clusters = cluster_corpus(
        before, n_clusters, recipe.seed, sentences=sentences, model=model, topic_layer=topic_layer
    )
    loss = ClusterNSLoss(model, clusters=clusters)
    logger.info(f"{len(sentences)} sentences, {clusters.n_clusters} clusters, mean trust {clusters.trust.mean():.2f}.")
    history = run_trainer(model, loss, sentences, clusters, recipe, work / "checkpoints", show_progress)
    after = embed_corpus(sentences, model, show_progress_bar=show_progress, cache=work / "embeddings")

    report = {
        "model": model_name,
        "sentences": len(sentences),
        "recipe": asdict(recipe),
        "loss": loss.get_config_dict(),
        "clusters": describe_clusters(clusters, recipe.batch_size, loss.min_trust),
        "before": describe_embeddings(before, clusters),
        "after": describe_embeddings(after, clusters),
        "log": history,
    }
    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    model.save(str(finished))
    save_state(loss, finished / STATE_FILE)
    write_json(report, finished / "report.json")
    draw_report(before, after, clusters, loss.min_trust, finished / "report.png")
    os.replace(finished, output)
    del before, after  # files of the folder, which not every system removes while they are open
    shutil.rmtree(work)
    return report


def run_trainer(
    model: SentenceTransformer,
    loss: Any,
    sentences: Sequence[str],
    clusters: CorpusClusters | None,
    recipe: Recipe,
    folder: Path,
    show_progress: bool = True,
    *,
    positives: Sequence[str] | None = None,
    negatives: Sequence[str] | None = None,
    group_size: int = 1,
) -> list[dict[str, float]]:
    """Train with `SentenceTransformerTrainer`, going on from the last whole checkpoint in `folder`.

    Args:
        model: changed in place.
        loss: `ClusterNSLoss`, or any loss for one text column or two equal ones.
        sentences: the corpus.
        clusters: sent along as labels; None for a loss that knows no clusters.
        recipe: the numbers of the run.
        folder: for checkpoints.
        show_progress: a progress bar.
        positives: a second text column; without it, losses other than `ClusterNSLoss` get the sentences twice.
        negatives: a third text column, of a hard negative for each sentence.
        group_size: rows of one of the clusters that meet in a batch, see `ClusterBatchSampler`.

    Returns:
        The trainer's log.
    """
    dataset = Dataset.from_dict({"sentence": list(sentences)})
    one_column = positives is None and negatives is None
    if not (one_column and isinstance(loss, ClusterNSLoss)):  # the others want the two views as two columns
        dataset = dataset.add_column("positive", list(sentences if positives is None else positives))
    if negatives is not None:
        dataset = dataset.add_column("negative", list(negatives))
    if clusters is not None:
        dataset = dataset.add_column("label", clusters.ids + 1)
    steps = _count_steps(len(sentences), recipe)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        bf16=recipe.bf16,
        use_cpu=model.device.type == "cpu",  # otherwise bf16 asks for a GPU
        seed=recipe.seed,
        data_seed=recipe.seed,
        batch_sampler=partial(_batches, group_size=group_size),
        dataloader_drop_last=True,
        logging_steps=max(1, steps // 20),
        save_steps=max(1, steps // 4),
        save_total_limit=2,
        report_to="none",
        disable_tqdm=not show_progress,
    )
    callbacks = [ClusterStateCallback(loss)] if isinstance(loss, ClusterNSLoss) else []
    trainer = SentenceTransformerTrainer(model, args, dataset, loss=loss, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)  # stands in for the progress bar, and prints every log
    checkpoint = _last_whole_checkpoint(folder)
    if checkpoint and _step_of(checkpoint) >= steps:  # the trainer would take one more step from there
        return _take_over(checkpoint, model, loss)
    full_length, model.max_seq_length = model.max_seq_length, _shorter(model.max_seq_length, recipe.max_length)
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    finally:
        model.max_seq_length = full_length
    return list(trainer.state.log_history)


def _batches(
    dataset: Any, batch_size: int, drop_last: bool, *, group_size: int, **settings: Any
) -> ClusterBatchSampler:
    # Not the trainer's default: ours is deterministic from (seed, epoch), so a resumed run sees the same batches.
    labels = settings["valid_label_columns"]
    return ClusterBatchSampler(
        dataset, batch_size, drop_last, labels, seed=settings["seed"] or 0, group_size=group_size
    )


def _count_steps(n_sentences: int, recipe: Recipe) -> int:
    steps = max(1, round(n_sentences // recipe.batch_size * recipe.epochs))
    return min(steps, recipe.max_steps) if recipe.max_steps else steps


def _shorter(length: int | None, limit: int) -> int:
    return limit if length is None else min(length, limit)


def _last_whole_checkpoint(folder: Path) -> Path | None:
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def _take_over(checkpoint: Path, model: SentenceTransformer, loss: ClusterNSLoss) -> list[dict[str, float]]:
    """Put the model and the loss into the state at the end of a training; return its log."""
    model.load_state_dict(SentenceTransformer(str(checkpoint), device="cpu").state_dict())
    load_state(loss, checkpoint / STATE_FILE)
    return list(TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history)


def work_folder(output: Path) -> Path:
    """Return where the unfinished work for an output lies."""
    return output.with_name(f"{output.name}.partial")


def is_interrupted(output: Path) -> bool:
    """Whether there is unfinished work that the same call goes on from."""
    return (work_folder(output) / SETTINGS_FILE).is_file()


def _open_work_folder(output: Path, sentences: Sequence[str], model_name: str, recipe: Recipe, **others: Any) -> Path:
    """Make the folder of unfinished work, or check that the one found belongs to the same run."""
    work = work_folder(output)
    corpus = hashlib.sha256("\n".join(sentences).encode()).hexdigest()
    settings = {"model": model_name, "corpus": corpus, **others, **asdict(recipe)}
    note = work / SETTINGS_FILE
    if not note.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_json(settings, note)
        return work
    found = json.loads(note.read_text(encoding="utf-8"))
    differing = [name for name in settings if found.get(name) != settings[name]]
    if differing:
        raise ValueError(
            f"{str(work)!r} holds an interrupted run with other settings ({', '.join(differing)}): repeat its command "
            "to go on with it, or remove the folder to start anew."
        )
    logger.info(f"Going on with the interrupted run in {work}.")
    return work
