"""`adapt`: from a list of sentences and a model to a better model, resumable at any time.

Everything unfinished lies in `<output>.partial`: the settings, the embeddings, the trainer's checkpoints. The same call
goes on from there. The output folder appears at the end, whole; the report is drawn into it last.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_clusterns.clustering import sample as sampling
from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.clustering.embedding import describe_model, each_text, embed_corpus
from st_clusterns.clustering.sample import check_counts
from st_clusterns.evaluation.evaluators import SpanRetrievalEvaluator
from st_clusterns.files import write_json
from st_clusterns.losses.clusterns import ClusterNSLoss
from st_clusterns.models import (
    add_lora,
    check_trainable,
    copy_weights,
    default_route,
    half_precision_of,
    in_float32,
    load_model,
    reading_at_most,
    set_default_prompt,
    unfreeze_adapters,
)
from st_clusterns.training.callbacks import STATE_FILE, save_state
from st_clusterns.training.model_card import describe_training
from st_clusterns.training.report import REPORT_ROWS, describe_clusters, describe_embeddings, write_files
from st_clusterns.training.sentences import check_batch_size, store_distinct
from st_clusterns.training.trainer import Recipe, check_report_to, count_steps, run_trainer
from st_clusterns.training.views import choose_kind, views_dataset

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
JUDGED, FEW = 500, 50  # documents that judge a training, at most; fewer than `FEW` would judge by chance
RECIPE = Recipe()
Evaluator = Callable[[SentenceTransformer], Any]  # an evaluator of sentence-transformers; returns scores by name


def adapt(
    model: SentenceTransformer | str,
    sentences: Iterable[str],
    output: str | Path,
    n_clusters: int | None = None,
    recipe: Recipe = RECIPE,
    show_progress: bool = True,
    prompt: str | None = None,
    prompt_name: str | None = None,
    trust_remote_code: bool = False,
    lora: int | None = None,
    report_to: str | list[str] = "none",
    evaluator: Evaluator | None = None,
    push_to_hub: str | None = None,
    embed_devices: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Train a model on plain sentences with `ClusterNSLoss`, and save it with a report.

    Writes into `output`: the model with its card, the loss's state (`clusterns_state.safetensors`), and the report: its
    numbers (`report.json`), a page for the browser (`report.html`), a picture (`report.png`, `report.svg`) and a table
    (`map.parquet`). Page and table hold up to 20,000 of the sentences. Exact duplicates are trained on once. Of more
    than 50,000 distinct sentences, a random sample is clustered; if the run reads no more rows than that, it trains on
    the sample, else on all, from a file in the work folder. Memory does not grow with the corpus, if that is streamed
    (`SentenceFile`). A model whose weights are in half precision is trained in float32 and saved in its own format. A
    model with adapters trains these alone.

    The positives are those of `views_dataset`. After a training on documents, the weights are the mean of those before
    and after. Of 500 documents or more, a tenth is held out of training, 500 at most; unless spans of these find their
    document more often afterwards (`SpanRetrievalEvaluator`), the starting model is saved.

    Args:
        model: a model, which is trained in place, or its name on the hub or path.
        sentences: the corpus: a list, a column of a table, a generator, a `SentenceFile`.
        output: a folder that does not exist yet.
        n_clusters: number of clusters `K`. Default: chosen from the corpus (`CorpusClusters.fit`).
        recipe: the settings of the run.
        show_progress: whether to show progress bars.
        prompt: put before each sentence, in the clusters, the training and the report. It becomes the default prompt of
            the model, which `encode` uses; "" takes that away.
        prompt_name: its name among `model.prompts`, in place of `prompt`. Default: the model's default prompt.
        trust_remote_code: whether code that comes with a model given by its name may be run.
        lora: rank of a new LoRA adapter, which is trained and saved in place of all weights; needs `peft`.
        report_to: where the trainer's logs go, with the cluster diagnostics of `log_clusters`: "tensorboard", "wandb",
            "trackio" or others of `TrainingArguments.report_to`. The logs of TensorBoard end in `output/runs`.
        evaluator: scores the starting and the saved model, for the report. It decides nothing: it may use labels.
        push_to_hub: name of a repository on the hub, where the folder is uploaded when all is done; a new repository is
            private. If that fails, the model stays on disk.
        embed_devices: devices that embed at a time, a process for each (`embed_corpus`). Default: that of the model.

    Returns:
        The report.

    Raises:
        FileExistsError: if `output` exists.
        ImportError: if a library that `report_to` or `lora` needs is missing.
        ValueError: if the corpus or the model is unsuitable, or an interrupted run for `output` had other settings.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"output={str(output)!r} exists already: choose another folder, or remove it first.")
    check_report_to(report_to)
    if push_to_hub is not None:
        _check_repository(push_to_hub)
    if isinstance(sentences, Iterator) and not 0 < recipe.max_steps * recipe.batch_size <= sampling.SAMPLE:
        sentences = list(sentences)  # a generator can be read once, and a long run reads a large corpus twice
    sample = sampling.sample_distinct(each_text(sentences), recipe.seed)
    if sample.is_whole and (copies := sample.n_texts - sample.n_distinct):
        logger.info(f"{copies:,} exact duplicates are left out: {sample.n_distinct:,} remain.")
    check_counts(len(sample.texts), sample.n_texts, n_clusters)  # now, before a work folder notes a wrong setting
    check_batch_size(recipe.batch_size, sample.n_distinct)
    name = model if isinstance(model, str) else None
    model = load_model(model, trust_remote_code) if isinstance(model, str) else model
    if lora is not None:
        add_lora(model, lora, recipe.seed)
    unfreeze_adapters(model)
    if half := half_precision_of(model):
        logger.info(f"The model's weights are in {half}: they are trained in float32 and saved in {half}.")
    with in_float32(model):
        check_trainable(model)
        default_route(model)  # or a complaint
    prompt = set_default_prompt(model, prompt, prompt_name)
    name = name or describe_model(model)  # with its prompt: the same call on the same model goes on
    evaluation = {} if evaluator is None else {"before": _evaluate(evaluator, model)}
    n_clusters = None if n_clusters is None else int(n_clusters)  # of numpy, it could not be noted
    work = _open_work_folder(output, sample.digest, name, recipe, n_clusters=n_clusters, prompt=prompt, lora=lora)

    folder, cache = work / "checkpoints", work / "embeddings"
    embed: dict[str, Any] = {
        "batch_size": recipe.embed_batch_size or recipe.batch_size,
        "show_progress_bar": show_progress,
        "cache": cache,
        "devices": embed_devices,
    }
    texts, n_sentences = Dataset.from_dict({"sentence": sample.texts}), sample.n_distinct
    if not sample.is_whole and count_steps(n_sentences, recipe) * recipe.batch_size > len(texts):
        texts = store_distinct(sentences, work / "sentences.arrow")
        n_sentences = len(texts)
    # One length for clusters, loss, training and report.
    with reading_at_most(model, recipe.max_length, prompt), _usable_again(work, folder):
        with in_float32(model):
            clusters = CorpusClusters.fit(sample.texts, model, n_clusters, recipe.seed, **embed)
            loss = ClusterNSLoss(model, clusters)
            kind = choose_kind(sample.texts, clusters.has_topics)
            recipe = recipe.for_views(kind)
            rest, judge = _hold_out(texts, recipe) if kind == "span" else (texts, None)
            steps = count_steps(n_sentences - len(texts) + len(rest), recipe)
            dataset = views_dataset(rest, clusters, kind, recipe.seed)
            settings: dict[str, Any] = {"steps": steps, "kind": kind, "show_progress": show_progress, "prompt": prompt}
            train = partial(run_trainer, model, loss, dataset, recipe, folder, **settings, report_to=report_to)
            history, search = (train(), {}) if judge is None else _train_judged(model, train, judge)
        shown = clusters.sample(REPORT_ROWS, recipe.seed)
        with in_float32(model):  # the weights as they are saved, rounded to the format that came in
            after = embed_corpus(shown.sentences, model, **embed)
    del texts, rest, dataset, train  # which keep a file of the work folder open

    if evaluator is not None:
        try:
            evaluation["after"] = _evaluate(evaluator, model)
        except Exception as error:  # the model is trained, and must not be lost by what it is judged by
            logger.warning(f"The trained model could not be evaluated ({type(error).__name__}: {error}).")
    report = {
        "model": name,
        "sentences": n_sentences,
        "recipe": asdict(recipe),
        "prompt": prompt,
        "loss": loss.get_config_dict(),
        "views": kind,
        "search": search,
        "kept": "start" if search and search["after"] <= search["before"] else "trained",
        "evaluation": evaluation,
        "clusters": describe_clusters(clusters, recipe.batch_size),
        "shown": len(shown.sentences),
        "before": describe_embeddings(shown.embeddings, shown.ids),
        "after": describe_embeddings(after, shown.ids),
        "log": history,
    }
    describe_training(model, clusters, report)
    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    model.save(str(finished), model_name=push_to_hub)
    _compare_saved(model, finished)
    save_state(loss, finished / STATE_FILE)
    write_json(report, finished / "report.json")
    if (folder / "runs").is_dir():  # of TensorBoard
        os.replace(folder / "runs", finished / "runs")
    os.replace(finished, output)
    try:
        shutil.rmtree(work)
    except OSError as error:  # as of a file that is still open, on Windows or NFS
        logger.warning(f"The work folder could not be removed ({error}): remove {work} by hand.")
    if push_to_hub is not None:
        _push(model, push_to_hub, output)  # before the report, which holds sentences of the corpus
    try:
        write_files(report, shown, after, output / "report.html", recipe.seed)
    except Exception as error:  # whatever a library fails at, the model is trained and saved
        logger.warning(f"The report could not be drawn ({type(error).__name__}: {error}); the model is in {output}.")
    return report


@contextmanager
def _usable_again(work: Path, checkpoints: Path) -> Iterator[None]:
    """Remove the work folder after a `ValueError` before any checkpoint: it would refuse the corrected call."""
    try:
        yield
    except ValueError:
        if not any(checkpoints.glob("checkpoint-*")):
            shutil.rmtree(work)
        raise


def _hold_out(texts: Dataset, recipe: Recipe) -> tuple[Dataset, SpanRetrievalEvaluator | None]:
    """Hold a tenth of the documents out of training, 500 at most, to judge it by; none if too few are left."""
    order = np.random.default_rng(recipe.seed).permutation(len(texts))
    count = min(JUDGED, len(texts) // 10)
    if count < FEW or len(texts) - count < recipe.batch_size:
        return texts, None
    held, rest = (texts.select(np.sort(part)) for part in (order[:count], order[count:]))
    return rest, SpanRetrievalEvaluator(
        held["sentence"], batch_size=recipe.embed_batch_size or recipe.batch_size, seed=recipe.seed
    )


def _train_judged(
    model: SentenceTransformer, train: Callable[[], list[dict[str, float]]], judge: SpanRetrievalEvaluator
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Train, and keep the start unless the judge finds more afterwards; return the trainer's log and both scores."""
    start = copy_weights(model)
    scores = judge(model, epoch=0, steps=0)
    history = train()
    before, after = scores[judge.primary_metric], judge(model, steps=int(history[-1]["step"]))[judge.primary_metric]
    if after <= before:
        model.load_state_dict(start)
        model.model_card_data.eval_results_dict[judge] = scores  # the card has those of the weights that are saved
        logger.warning(
            f"{after:.1%} of spans of held-out documents found their document after training, {before:.1%} before: the "
            "starting model is kept."
        )
    return history, {"before": before, "after": after}


def _evaluate(evaluator: Evaluator, model: SentenceTransformer) -> dict[str, float]:
    with in_float32(model):
        found = evaluator(model)
    return {key: float(value) for key, value in (found if isinstance(found, dict) else {"score": found}).items()}


def _check_repository(name: str) -> None:
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"push_to_hub={name!r} is no name of a repository: {error}") from error


def _push(model: SentenceTransformer, name: str, output: Path) -> None:
    """Upload the finished folder; if that fails, say what to do."""
    try:
        url = model.push_to_hub(name, private=True, exist_ok=True, local_model_path=str(output))
        logger.info(f"Pushed to the hub: {url}")
    except Exception as error:  # no network, no token, no right to write: the model is on disk
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        logger.warning(
            f"The model could not be pushed to {name!r} ({reason}). It is whole in {output}: `hf auth login`, then "
            f"`hf upload {name} {output} --private --exclude report.html map.parquet` (these two hold sentences)."
        )


def _compare_saved(model: SentenceTransformer, folder: Path) -> None:
    """Warn of trained weights that are lost by saving and loading, as those of `WordWeights`."""
    try:
        saved = SentenceTransformer(str(folder), device="cpu", trust_remote_code=model.trust_remote_code).state_dict()
    except Exception as error:  # as of a module whose class is not to be imported; the model is trained
        logger.warning(f"The saved model cannot be loaded ({type(error).__name__}: {error}).")
        return
    trained = {name: weight.cpu() for name, weight in model.state_dict().items() if isinstance(weight, Tensor)}
    lost = [name for name, weight in trained.items() if name not in saved or not torch.equal(saved[name], weight)]
    if lost:
        logger.warning(
            f"{len(lost)} trained weights are lost in the saved model ({', '.join(lost[:3])}): their module does not "
            "save or load them. Freeze them before the training: requires_grad_(False)."
        )


def work_folder(output: Path) -> Path:
    """Return where the unfinished work for an output lies."""
    return output.with_name(f"{output.name}.partial")


def is_interrupted(output: Path) -> bool:
    """Whether there is unfinished work that the same call goes on from."""
    return (work_folder(output) / SETTINGS_FILE).is_file()


def _open_work_folder(output: Path, corpus: str, model_name: str, recipe: Recipe, **others: Any) -> Path:
    """Make the folder of unfinished work, or check that the one found belongs to the same run."""
    work = work_folder(output)
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
