"""The measuring instrument: STS under both protocols, any mteb task or benchmark, short-text clustering.

Nothing here computes a score that a library has: mteb's own task classes and sentence-transformers'
`EmbeddingSimilarityEvaluator` do. This module brings them the data, sees to it that a score found on disk is the score
of *this* model on *this* data, and leaves the random state of a training alone. mteb is imported where it is used: it
takes seconds, and is an extra.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import platform
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer

from st_clusterns.clustering.embedding import describe_model, embed_corpus
from st_clusterns.evaluation.scores import (
    MEASURES,
    PERCENTAGES,
    alignment,
    describe_classes,
    mean_cosine,
    score_clustering,
    uniformity,
)
from st_clusterns.evaluation.sts import (
    SICK,
    STS_TESTS,
    STSB,
    check_pairs,
    file_source,
    find_sts_file,
    load_sts,
    read_pairs,
    read_table,
    sts_evaluator,
    sts_source,
)
from st_clusterns.evaluation.tables import MTEB, SHORT_TEXTS, SIMCSE, STS, write_tables
from st_clusterns.files import write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, and what tells it from every other.

    Attributes:
        model: the model.
        name: what it is called, `organisation/model`.
        revision: hash of all that decides its embeddings.
        batch_size: texts in a batch.
    """

    model: SentenceTransformer
    name: str
    revision: str
    batch_size: int


@dataclass(frozen=True)
class Job:
    """Scores to compute together, and all that decides them besides the model.

    Attributes:
        task: what is measured.
        protocol: how.
        settings: which data, splits, seeds; scores on disk with other settings are refused.
        run: returns `values` (what the tables show), `rows`, and more worth keeping.
        groups: what the caller asked for that this is a part of.
    """

    task: str
    protocol: str
    settings: dict[str, Any]
    run: Callable[[Subject], dict[str, Any]]
    groups: tuple[str, ...] = ()


def evaluate(
    model: SentenceTransformer,
    name: str,
    output: str | Path,
    tasks: Sequence[str] = (STS,),
    data_dir: str | Path | None = None,
    clustering: Sequence[str | Path] = (),
    restarts: int = 3,
    seed: int = 0,
    batch_size: int = 32,
    command: str = "",
    say: Callable[[str], Any] = logger.info,
) -> list[dict[str, Any]]:
    """Evaluate a model; write one JSON file a task and the tables `results.md`, `results.csv` and `results.json`.

    Tasks that `output` holds already are not run again. The state of the random number generators stays as it is.

    Args:
        model: the model; it stays on its device.
        name: what to call it, such as its name on the hub.
        output: the folder of one model's results.
        tasks: names of mteb tasks or benchmarks, or "STS": the seven tests under both protocols, and alignment,
            uniformity and mean cosine on STS-B dev.
        data_dir: holds the STS tests as `load_sts` describes; without it they come from the hub, as all else does.
        clustering: tables of short texts, as `clustering_task` describes.
        restarts: of k-means for `clustering`, each with one random start; scores are their means.
        seed: of the first restart; the others count on.
        batch_size: texts in a batch.
        command: noted in the results.
        say: told about each score.

    Returns:
        One record a task, of the tasks asked for.

    Raises:
        ImportError: if mteb is not installed.
        FileNotFoundError: if a file is missing.
        ValueError: if a task is unknown, a file lacks a column or rows, or `output` holds results of another model
            or other data; and at the end, if tasks failed.
    """
    folder = Path(output) / "tasks"
    with preserved_random_state():
        jobs = collect_jobs(tasks, data_dir, clustering, restarts, seed)
        subject = Subject(model, mteb_name(name), describe_model(model)[:16], batch_size)
        found = [_read_record(folder, job, subject) for job in jobs]  # refuse what does not fit before any work
        folder.mkdir(parents=True, exist_ok=True)
        records, failures = [], {}
        for number, (job, record) in enumerate(zip(jobs, found, strict=True), 1):
            try:
                record = record or _run(job, subject)
            except Exception as error:  # one data set that cannot be had must not stop the other forty
                failures[job.task] = error
                say(f"{number}/{len(jobs)} {job.task}, {job.protocol}: failed, {error}")
                continue
            record["groups"] = sorted({*record["groups"], *job.groups})
            write_json(record, _record_path(folder, job))
            values = ", ".join(f"{metric} {value:.2f}" for metric, value in record["values"].items())
            say(f"{number}/{len(jobs)} {job.task}, {job.protocol}: {values}")
            records.append(record)
    if records:
        write_tables(Path(output), command)
    if failures:
        reasons = "; ".join(f"{task}: {type(error).__name__}: {error}" for task, error in failures.items())
        raise ValueError(
            f"{len(failures)} of {len(jobs)} tasks failed, the same call tries them again. {reasons}"
        ) from next(iter(failures.values()))
    return records


def collect_jobs(
    tasks: Sequence[str],
    data_dir: str | Path | None = None,
    clustering: Sequence[str | Path] = (),
    restarts: int = 3,
    seed: int = 0,
) -> list[Job]:
    """List what `evaluate` was asked for, each task once."""
    data = None if data_dir is None else Path(data_dir)
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"data_dir={str(data)!r} is no folder.")
    found = [
        replace(job, groups=(group,))
        for group in tasks
        for job in (_sts_jobs(data) if group == STS else [_mteb_job(task, data) for task in mteb_tasks(group)])
    ]
    found += [_mteb_job(clustering_task(path, restarts, seed)) for path in clustering]
    jobs: dict[tuple[str, str], Job] = {}
    for job in found:
        known = jobs.setdefault((job.task, job.protocol), job)
        if known.settings != job.settings:
            raise ValueError(f"{job.task!r} was asked for twice, with different data or settings: rename one file.")
        if known is not job:
            jobs[job.task, job.protocol] = replace(job, groups=known.groups + job.groups)
    return list(jobs.values())


# mteb ------------------------------------------------------------------------------------------------------------


def import_mteb() -> Any:
    """Import mteb, which seeds the random number generators, without that.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        with preserved_random_state():
            import mteb
    except ModuleNotFoundError as error:
        raise ImportError(f"mteb is not installed ({error}): pip install 'st-clusterns[mteb]'.") from error
    return mteb


def mteb_tasks(name: str) -> list[Any]:
    """Return the mteb tasks of a task's or a benchmark's name.

    Raises:
        ValueError: with close names, if there is none of this name.
    """
    mteb = import_mteb()
    with suppress(KeyError):
        return [mteb.get_task(name)]
    with suppress(KeyError):
        return list(mteb.get_benchmark(name).tasks)
    known = [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)]
    known += [STS, *(benchmark.name for benchmark in mteb.get_benchmarks())]
    lower = {one.lower(): one for one in known}
    close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)]
    raise ValueError(f"tasks={name!r} is no mteb task or benchmark. Close names: {', '.join(close) or 'none'}.")


def run_mteb(subject: Subject, tasks: Sequence[Any]) -> list[Any]:
    """Run mteb tasks without any cache, leave the random number generators as they were, return mteb's results."""
    options = {"batch_size": subject.batch_size, "show_progress_bar": False}
    with preserved_random_state(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is superseded by.*")  # the caller has named the version
        encoder = mteb_encoder(subject.model, subject.name, subject.revision)
        results = import_mteb().evaluate(
            encoder, tasks, cache=None, encode_kwargs=options, show_progress_bar=False, co2_tracker=False
        )
    if results.exceptions:  # such as a private data set; others are raised
        raise ValueError("; ".join(f"{one.task_name}: {one.exception}" for one in results.exceptions))
    return list(results.task_results)


def mteb_encoder(model: SentenceTransformer, name: str, revision: str | None = None) -> Any:
    """Wrap a model for `mteb.evaluate`, so that no cache of mteb's can take it for another model.

    mteb files results under a model's name and revision, and calls every local model by one and the same name.

    Args:
        model: the model.
        name: what to call it.
        revision: the hash of the model; computed without it.

    Raises:
        ValueError: if the model compares embeddings in a way that mteb does not know.
    """
    if model.similarity_fn_name not in (None, "cosine", "dot"):
        raise ValueError(
            f"model.similarity_fn_name={model.similarity_fn_name!r} is unknown to mteb: set it to 'cosine' or 'dot'."
        )
    wrapper = import_mteb().SentenceTransformerEncoderWrapper
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # mteb calls deprecated methods, its own and others'
        warnings.simplefilter("ignore", DeprecationWarning)
        encoder = wrapper(model)
    identity = {"name": mteb_name(name), "revision": revision or describe_model(model)[:16]}
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=identity)
    return encoder


def mteb_name(name: str) -> str:
    """Return a model's name in mteb's form, `organisation/model`: what is not a name on the hub is "local"."""
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists()
    return name if on_hub else f"local/{Path(name).resolve().name}"


def bring_local_data(task: Any, data_dir: Path) -> Any:
    """Return one of mteb's seven STS tasks with the pairs of a local file; other tasks as they are.

    Only the loading is replaced. The revision of the data says that they are not the hub's.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if its pairs are not as many as mteb's.
    """
    name = task.metadata.name
    if name not in STS_TESTS:
        return task
    path = find_sts_file(name, data_dir)
    pairs = read_pairs(path, None if name == SICK else "test")
    check_pairs(name, len(pairs), task.metadata.n_samples["test"], path)
    task = copy.copy(task)  # a benchmark's tasks are shared by all who ask for it
    task.metadata = task.metadata.model_copy(update={"dataset": file_source(path)})
    task.dataset = DatasetDict(test=pairs)
    task.dataset_transform()
    task.data_loaded = True
    return task


def clustering_task(path: str | Path, restarts: int = 3, seed: int = 0) -> Any:
    """Make an mteb task of a table of short texts with classes, for `mteb.evaluate` and the like.

    Its main score is the V-measure; its scores are those of `score_clustering` (as fractions) and `describe_classes`.

    Args:
        path: an unquoted `.tsv` or `.tsv.gz` file with the columns `label` and `text`.
        restarts: of k-means, each with one random start; scores are their means.
        seed: of the first restart; the others count on.

    Raises:
        ImportError: if mteb is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if a column is missing, or there are not two classes.
    """
    source = Path(path)
    table = read_table(source, ("label", "text"))
    if len(set(table["label"])) < 2:
        raise ValueError(f"{str(path)!r} has one label only: there is nothing to compare clusters with.")
    import_mteb()
    from mteb.abstasks import AbsTaskClusteringLegacy
    from mteb.abstasks.task_metadata import TaskMetadata
    from torch.utils.data import DataLoader

    class ShortTextClustering(AbsTaskClusteringLegacy):  # type: ignore[misc]
        metadata = TaskMetadata(
            name=source.name.split(".")[0],
            dataset=file_source(source),
            description=f"Short texts of {source.name}, {restarts} runs of k-means from seed {seed}.",
            type="Clustering",
            eval_langs=["eng-Latn"],  # mteb wants some; nothing here depends on it
            main_score="v_measure",
        )
        settings = {"restarts": restarts, "seed": seed}  # noqa: RUF012
        shown = {**dict.fromkeys(PERCENTAGES, 100), **dict.fromkeys(MEASURES, 1)}  # noqa: RUF012
        input_column_name, label_column_name = "text", "label"

        def _evaluate_subset(self, model: Any, data_split: Any, *, encode_kwargs: Any, **where: Any) -> Any:
            texts = DataLoader(data_split.select_columns("text"), batch_size=encode_kwargs.get("batch_size", 32))
            where = {key: where[key] for key in ("hf_split", "hf_subset")}
            rows = model.encode(texts, task_metadata=self.metadata, **where, **encode_kwargs)
            scores = score_clustering(rows, data_split["label"], restarts, seed)
            fractions = {metric: scores[metric] / 100 for metric in PERCENTAGES}
            return {**fractions, **describe_classes(rows, data_split["label"]), "rows": len(rows)}

    task = ShortTextClustering()
    task.dataset = DatasetDict(test=Dataset.from_dict(table))
    task.data_loaded = True
    return task


def _mteb_job(task: Any, data: Path | None = None) -> Job:
    if data is not None:
        task = bring_local_data(task, data)
    settings = {
        "data": dict(task.metadata.dataset),
        "splits": list(task.eval_splits),
        "subsets": list(task.hf_subsets),
        "mteb": version("mteb"),
        **getattr(task, "settings", {}),
    }
    parts = [*task.hf_subsets] if set(task.hf_subsets) != set(task.metadata.hf_subsets) else []
    parts += [*task.eval_splits] if set(task.eval_splits) != set(task.metadata.eval_splits) else []
    label = f"{task.metadata.name} ({_short(parts)})" if parts else task.metadata.name
    shown = getattr(task, "shown", {})

    def run(subject: Subject) -> dict[str, Any]:
        [result] = run_mteb(subject, [task])
        if shown:
            [scores] = result.scores["test"]
            values, rows = {metric: factor * scores[metric] for metric, factor in shown.items()}, scores["rows"]
        else:
            sizes = {} if parts else task.metadata.n_samples or {}
            values = {task.metadata.main_score: 100 * float(result.get_score())}
            rows = sum(sizes.get(split, 0) for split in task.eval_splits) or None
        return {"values": values, "rows": rows, "mteb_result": result.model_dump(mode="json")}

    return Job(label, SHORT_TEXTS if shown else MTEB, settings, run)


def _short(names: Sequence[str]) -> str:
    text = ", ".join(names)
    return text if len(text) < 40 else f"{len(names)} subsets, {hashlib.sha256(text.encode()).hexdigest()[:8]}"


# STS -------------------------------------------------------------------------------------------------------------


def _sts_jobs(data: Path | None) -> list[Job]:
    tasks = [task for name in STS_TESTS for task in mteb_tasks(name)]
    return [
        *(_mteb_job(task, data) for task in tasks),
        *(_simcse_job(name, data) for name in STS_TESTS),
        _dev_job(data),
    ]


def _simcse_job(name: str, data: Path | None) -> Job:
    def run(subject: Subject) -> dict[str, Any]:
        pairs = load_sts(name, "test", data)
        scores = sts_evaluator(pairs, name, subject.batch_size)(subject.model)
        return {"values": {"cosine_spearman": 100 * scores[f"{name}_spearman_cosine"]}, "rows": len(pairs)}

    return Job(name, SIMCSE, {"data": sts_source(name, data), "splits": ["test"]}, run)


def _dev_job(data: Path | None) -> Job:
    """Alignment of the pairs of STS-B dev that score above 4 (SimCSE's choice), uniformity of all its sentences."""

    def run(subject: Subject) -> dict[str, Any]:
        pairs = load_sts(STSB, "dev", data)
        sides = [list(pairs["sentence1"]), list(pairs["sentence2"])]
        first, second = (
            embed_corpus(side, subject.model, subject.batch_size, show_progress_bar=False) for side in sides
        )
        same, every = np.asarray(pairs["score"]) > 4, np.concatenate([first, second])
        values = {
            "alignment": alignment(first[same], second[same]),
            "uniformity": uniformity(every),
            "mean_cosine": mean_cosine(every),
        }
        return {"values": values, "rows": len(pairs)}

    return Job("STS-B dev", "Wang and Isola 2020", {"data": sts_source(STSB, data), "splits": ["dev"]}, run)


# records ---------------------------------------------------------------------------------------------------------


def _run(job: Job, subject: Subject) -> dict[str, Any]:
    began = time.monotonic()
    result = job.run(subject)
    return {
        **_identity(job, subject),
        "groups": [],
        **result,
        "batch_size": subject.batch_size,
        "seconds": round(time.monotonic() - began, 1),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("sentence-transformers", "torch", "transformers")},
    }


def _identity(job: Job, subject: Subject) -> dict[str, Any]:
    return {
        "model": subject.name,
        "revision": subject.revision,
        "task": job.task,
        "protocol": job.protocol,
        "settings": job.settings,
    }


def _record_path(folder: Path, job: Job) -> Path:
    return folder / (re.sub(r"[^\w.-]+", "_", f"{job.task}-{job.protocol}").strip("_") + ".json")


def _read_record(folder: Path, job: Job, subject: Subject) -> dict[str, Any] | None:
    """Read the scores of a job if they are there; refuse those of another model, other data or other settings."""
    path = _record_path(folder, job)
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key, value in _identity(job, subject).items() if record.get(key) != value]
    if differing:
        raise ValueError(
            f"{str(path)!r} holds scores of another {', '.join(differing)}: choose another output, or remove that file."
        )
    return record


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the random number generators back at the end: Python's, NumPy's, and PyTorch's on the CPU and all GPUs."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
