"""Evaluation of a model: STS under two protocols, any mteb task or benchmark, clustering of short texts, search.

1. `collect_jobs` turns what the caller asked for into jobs. A job computes scores that belong together.
2. `evaluate` runs the jobs and writes one JSON record for each. A record that is there already is used if it belongs to
   the same model, data and settings, and refused otherwise.
3. `write_tables` shows all records.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from st_clusterns.clustering.embedding import describe_model, embed_corpus
from st_clusterns.evaluation.mteb_tasks import (
    clustering_task,
    mteb_name,
    mteb_tasks,
    preserved_state,
    run_mteb,
    search_task,
)
from st_clusterns.evaluation.scores import alignment, mean_cosine, uniformity
from st_clusterns.evaluation.sts import STS_TESTS, STSB, load_sts, sts_evaluator, sts_source
from st_clusterns.evaluation.tables import MTEB, SEARCH, SHORT_TEXTS, SIMCSE, STS, write_tables
from st_clusterns.files import write_json
from st_clusterns.models import check_kind, default_route

logger = logging.getLogger(__name__)
SEARCH_SCORES = ("ndcg_at_10", "map_at_100", "recall_at_100")
LIBRARIES = ("sentence-transformers", "torch", "transformers")


@dataclass
class Job:
    """Scores that are computed together, and everything besides the model that decides them."""

    task: str  # what is measured
    protocol: str  # how it is measured
    settings: dict[str, Any]  # data, splits and seeds
    run: Callable[[SentenceTransformer, int], dict[str, Any]]  # of a model and a batch size; returns values, rows, more
    groups: list[str] = field(default_factory=list)  # the tasks or benchmarks that the caller asked for by name


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
    search: Sequence[str | Path] = (),
) -> list[dict[str, Any]]:
    """Evaluate a model; write one JSON file per task and the tables of `write_tables`; return the records.

    Records that `output` holds already are not computed again. Random generators and the model's modes are restored.

    Args:
        name: name of the model, such as its name on the hub.
        tasks: names of mteb tasks or benchmarks, or "STS": the seven STS tests under both protocols, and alignment,
            uniformity and mean cosine on STS-B dev.
        data_dir: folder with the STS tests, as in `load_sts`; by default all data come from the hub.
        clustering: files of short texts, as in `clustering_task`, with its `restarts` and `seed`.
        batch_size: texts per batch.
        command: command line to note in the results.
        say: prints a line of progress.
        search: folders of collections, as in `search_task`.

    Raises:
        ImportError, FileNotFoundError: if mteb or a file is missing.
        ValueError: if a task or a file is unfit, or `output` holds other results; after all tasks, if some failed.
    """
    check_kind(model)
    default_route(model)  # or a complaint
    records, failures = [], {}
    with preserved_state(model):
        jobs = collect_jobs(tasks, data_dir, clustering, restarts, seed, search)
        subject = {"model": mteb_name(name), "revision": describe_model(model)[:16]}
        # Refuse records that do not fit before any work.
        todo = [(job, *_open_record(Path(output) / "tasks", job, subject)) for job in jobs]
        for number, (job, path, record) in enumerate(todo, 1):
            place = f"{number}/{len(todo)} {job.task}, {job.protocol}"
            try:
                if "values" not in record:
                    began = time.monotonic()
                    record |= job.run(model, batch_size)
                    record |= {"seconds": round(time.monotonic() - began, 1), "threads": torch.get_num_threads()}
                    record |= {"batch_size": batch_size, "machine": platform.processor() or platform.machine()}
                    record["versions"] = {library: version(library) for library in LIBRARIES}
            except Exception as error:  # one task that cannot run must not stop the others
                failures[f"{job.task}, {job.protocol}"] = error
                say(f"{place}: failed, {error}")
                continue
            record["groups"] = sorted({*record["groups"], *job.groups})
            write_json(record, path)
            say(f"{place}: " + ", ".join(f"{metric} {value:.2f}" for metric, value in record["values"].items()))
            records.append(record)
    if records:
        write_tables(Path(output), command)
    if failures:
        reasons = "; ".join(f"{task}: {type(error).__name__}: {error}" for task, error in failures.items())
        raise ValueError(
            f"{len(failures)} of {len(jobs)} tasks failed, the same call tries them again. {reasons}"
        ) from next(iter(failures.values()))
    return records


def _open_record(folder: Path, job: Job, subject: dict[str, str]) -> tuple[Path, dict[str, Any]]:
    """Return the path and the content of a job's record; a new record has no `values`."""
    path = folder / (re.sub(r"[^\w.-]+", "_", f"{job.task}-{job.protocol}").strip("_") + ".json")
    identity = {**subject, "task": job.task, "protocol": job.protocol, "settings": job.settings}
    if not path.is_file():
        return path, {**identity, "groups": []}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key, value in identity.items() if record.get(key) != value]
    if differing:
        raise ValueError(
            f"{str(path)!r} holds scores of another {', '.join(differing)}: choose another output, or remove that file."
        )
    return path, record


def collect_jobs(
    tasks: Sequence[str],
    data_dir: str | Path | None,
    clustering: Sequence[str | Path],
    restarts: int,
    seed: int,
    search: Sequence[str | Path] = (),
) -> list[Job]:
    """List the jobs that `evaluate` was asked for, each once."""
    data = None if data_dir is None else Path(data_dir)
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"data_dir={str(data)!r} is no folder.")
    asked: list[tuple[list[str], Job]] = []
    for group in tasks:
        names = STS_TESTS if group == STS else [group]
        asked += [([group], _mteb_job(task)) for name in names for task in mteb_tasks(name, data)]
        if group == STS:
            asked += [([group], job) for job in (*(_simcse_job(name, data) for name in STS_TESTS), _dev_job(data))]
    for path in clustering:
        task = clustering_task(path, restarts, seed)
        asked.append(([], _mteb_job(task, SHORT_TEXTS, restarts=restarts, seed=seed)))
    asked += [([], _mteb_job(search_task(folder), SEARCH)) for folder in search]
    jobs: dict[tuple[str, str], Job] = {}
    for groups, job in asked:
        known = jobs.setdefault((job.task, job.protocol), job)
        if known.settings != job.settings:
            raise ValueError(
                f"{job.task!r} was asked for twice, with different data or settings: rename one file or folder."
            )
        known.groups += groups
    return list(jobs.values())


def _mteb_job(task: Any, protocol: str = MTEB, **settings: Any) -> Job:
    metadata, subsets, splits = task.metadata, list(task.hf_subsets), list(task.eval_splits)
    settings |= {"data": dict(metadata.dataset), "splits": splits, "subsets": subsets, "mteb": version("mteb")}
    # A part of a task has its own name.
    parts = [*subsets] if set(subsets) != set(metadata.hf_subsets) else []
    parts += splits if set(splits) != set(metadata.eval_splits) else []
    label = ", ".join(parts)
    if len(label) >= 40:  # it becomes a file name
        label = f"{len(parts)} subsets, {hashlib.sha256(label.encode()).hexdigest()[:8]}"

    def run(model: SentenceTransformer, batch_size: int) -> dict[str, Any]:
        result = run_mteb(model, task, batch_size)
        if protocol == SHORT_TEXTS:
            [scores] = result.scores["test"]
            values, sizes = scores["measures"], task.dataset.num_rows
        elif protocol == SEARCH:
            [scores] = result.scores["test"]
            values = {name: 100 * float(scores[name]) for name in SEARCH_SCORES}
            sizes = {"test": len(task.dataset["default"]["test"]["queries"])}
        else:
            values = {metadata.main_score: 100 * float(result.get_score())}
            sizes = {} if parts else metadata.n_samples or {}  # mteb knows the sizes of whole tasks only
        rows = sum(sizes.get(split, 0) for split in splits) or None
        return {"values": values, "rows": rows, "mteb_result": result.model_dump(mode="json")}

    return Job(f"{metadata.name} ({label})" if parts else metadata.name, protocol, settings, run)


def _simcse_job(name: str, data: Path | None) -> Job:
    def run(model: SentenceTransformer, batch_size: int) -> dict[str, Any]:
        pairs = load_sts(name, "test", data)
        scores = sts_evaluator(pairs, name, batch_size)(model)
        return {"values": {"cosine_spearman": 100 * scores[f"{name}_spearman_cosine"]}, "rows": len(pairs)}

    return Job(name, SIMCSE, {"data": sts_source(name, data), "splits": ["test"]}, run)


def _dev_job(data: Path | None) -> Job:
    """Alignment of the STS-B dev pairs with a score above 4, as in SimCSE; uniformity of all sentences."""

    def run(model: SentenceTransformer, batch_size: int) -> dict[str, Any]:
        pairs = load_sts(STSB, "dev", data)
        sentences = [*pairs["sentence1"], *pairs["sentence2"]]
        rows = embed_corpus(sentences, model, batch_size, show_progress_bar=False)
        first, second = (side[np.asarray(pairs["score"]) > 4] for side in np.split(rows, 2))
        measures = {"alignment": alignment(first, second), "uniformity": uniformity(rows)}
        return {"values": {**measures, "mean_cosine": mean_cosine(rows)}, "rows": len(pairs)}

    return Job("STS-B dev", "Wang and Isola 2020", {"data": sts_source(STSB, data), "splits": ["dev"]}, run)
