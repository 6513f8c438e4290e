"""mteb tasks: find them, make them from local files, run them so that a model always gets the same score.

mteb is an optional dependency and takes seconds to import, so it is imported only where it is used. It seeds the global
random number generators when it is imported and when it makes a task. The functions of this module restore them.
"""

from __future__ import annotations

import copy
import difflib
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer
from transformers import set_seed

from st_clusterns.clustering.embedding import describe_model
from st_clusterns.columns import read_table
from st_clusterns.evaluation.scores import describe_classes, score_clustering
from st_clusterns.evaluation.search import find_tables, read_collection
from st_clusterns.evaluation.sts import SICK, STS_TESTS, check_pairs, file_source, find_sts_file, read_pairs
from st_clusterns.evaluation.tables import STS
from st_clusterns.models import same_modes


@contextmanager
def preserved_state(*models: torch.nn.Module) -> Iterator[None]:
    """Restore the random number generators (Python, NumPy, PyTorch) and each module's mode (training or evaluation)."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), ExitStack() as stack:
        for model in models:
            stack.enter_context(same_modes(model))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


@preserved_state()
def import_mteb() -> Any:
    """Import mteb; if it is missing, the error names the command that installs it."""
    try:
        import mteb
    except ModuleNotFoundError as error:
        raise ImportError(f"mteb is not installed ({error}): pip install 'st-clusterns[mteb]'.") from error
    return mteb


@preserved_state()
def mteb_tasks(name: str, data_dir: Path | None = None) -> list[Any]:
    """Return the task, or the tasks of the benchmark, that mteb has under a name; an unknown name is a ValueError.

    With `data_dir`, STS tests have the pairs of local files, as in `load_sts`.
    """
    mteb, tasks = import_mteb(), []
    with suppress(KeyError):
        tasks = list(mteb.get_benchmark(name).tasks)
    with suppress(KeyError):
        tasks = [mteb.get_task(name)]
    if not tasks:
        known = [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)]
        known += [STS, *(benchmark.name for benchmark in mteb.get_benchmarks())]
        lower = {one.lower(): one for one in known}
        close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)]
        raise ValueError(f"tasks={name!r} is no mteb task or benchmark. Similar names: {', '.join(close) or 'none'}.")
    return tasks if data_dir is None else [_with_local_data(task, data_dir) for task in tasks]


def _with_local_data(task: Any, data_dir: Path) -> Any:
    """Return a copy of an STS task with the pairs of a local file, which its revision shows; any other as it is."""
    name = task.metadata.name
    if name not in STS_TESTS:
        return task
    path = find_sts_file(name, data_dir)
    pairs = read_pairs(path, None if name == SICK else "test")
    check_pairs(name, len(pairs), task.metadata.n_samples["test"], path)
    task = copy.copy(task)  # mteb shares a benchmark's tasks within a process
    task.metadata = task.metadata.model_copy(update={"dataset": file_source(path)})
    task.dataset, task.data_loaded = DatasetDict(test=pairs), True
    task.dataset_transform()
    return task


@preserved_state()
def run_mteb(model: SentenceTransformer, task: Any, batch_size: int = 32) -> Any:
    """Run one mteb task without mteb's cache; return mteb's `TaskResult`.

    mteb seeds a clustering task's own random generators only when it makes the task object, which it shares within a
    process. They are seeded here before each run, so that a score does not depend on what ran before.
    """
    mteb = import_mteb()
    set_seed(task.seed)
    for part in getattr(task.metadata, "tasks", [task]):  # mteb runs an aggregate task as its parts
        part.rng_state, part.np_rng = random.Random(part.seed), np.random.default_rng(part.seed)
    encoder = mteb_encoder(model, "local/model", "unused")  # only a cache needs name and revision
    options = {"batch_size": batch_size, "show_progress_bar": False}
    quiet = {"cache": None, "show_progress_bar": False, "co2_tracker": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is superseded by.*")  # the caller chose this version
        results = mteb.evaluate(encoder, task, encode_kwargs=options, **quiet)
    if results.exceptions:  # mteb returns the error for a private data set and raises all others
        raise ValueError("; ".join(f"{one.task_name}: {one.exception}" for one in results.exceptions))
    [result] = results.task_results
    return result


def mteb_encoder(model: SentenceTransformer, name: str, revision: str | None = None) -> Any:
    """Wrap a model for `mteb.evaluate` under its own name and revision.

    mteb caches results by both, and gives all local models the same ones. The default revision is `describe_model`'s.
    """
    if model.similarity_fn_name not in (None, "cosine", "dot"):
        raise ValueError(
            f"model.similarity_fn_name={model.similarity_fn_name!r} is unknown to mteb: set it to 'cosine' or 'dot'."
        )
    mteb = import_mteb()
    with warnings.catch_warnings():
        # mteb calls deprecated methods, and warns of names of prompts that it does not look up itself.
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        encoder = mteb.SentenceTransformerEncoderWrapper(model)
    identity = {"name": mteb_name(name), "revision": revision or describe_model(model)[:16]}
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=identity)
    return encoder


def mteb_name(name: str) -> str:
    """Return a model's name in mteb's form, `organisation/model`; the organisation of a local model is "local"."""
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists()
    return name if on_hub else f"local/{Path(name).resolve().name}"


@preserved_state()
def clustering_task(path: str | Path, restarts: int = 3, seed: int = 0) -> Any:
    """Make an mteb task of short texts with classes.

    Its main score is the V-measure, 0 to 1. `measures` holds the results of `score_clustering`, with its `restarts` and
    `seed`, and of `describe_classes`. `path` is a table (`st_clusterns.columns`) with the columns `label` and
    `text`. Raises an ImportError without mteb, a FileNotFoundError without the file, and a ValueError if a column is
    missing or there are fewer than two classes.
    """
    source = Path(path)
    table = read_table(source, ("label", "text"))
    if len(set(table["label"])) < 2:
        raise ValueError(f"{str(path)!r} has only one label: clustering needs two classes or more.")
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
            eval_langs=["eng-Latn"],  # required by mteb; nothing here depends on it
            main_score="v_measure",
        )

        def _evaluate_subset(
            self, model: Any, data_split: Any, *, encode_kwargs: Any, hf_split: str, hf_subset: str, **_: Any
        ) -> Any:
            texts = DataLoader(data_split.select_columns("text"), batch_size=encode_kwargs.get("batch_size", 32))
            where = {"task_metadata": self.metadata, "hf_split": hf_split, "hf_subset": hf_subset}
            rows = model.encode(texts, **where, **encode_kwargs)
            classes = data_split["label"]
            measures = score_clustering(rows, classes, restarts, seed) | describe_classes(rows, classes)
            return {"v_measure": measures["v_measure"] / 100, "measures": measures}

    task = ShortTextClustering()
    task.dataset, task.data_loaded = DatasetDict(test=Dataset.from_dict(table)), True
    return task


@preserved_state()
def search_task(folder: str | Path) -> Any:
    """Make an mteb retrieval task of a collection (`read_collection`, with its errors).

    Its main score is nDCG@10, 0 to 1. Raises an ImportError without mteb.
    """
    collection = read_collection(folder)
    name = Path(folder).resolve().name
    import_mteb()
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    class Search(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = TaskMetadata(
            name=name,
            dataset=file_source(*find_tables(folder)) | {"path": name},
            description=f"Documents, queries and judgements of {name}.",
            type="Retrieval",
            eval_langs=["eng-Latn"],  # required by mteb; nothing here depends on it
            main_score="ndcg_at_10",
        )

    def as_dataset(texts: dict[str, str]) -> Dataset:
        return Dataset.from_dict({"id": list(texts), "text": list(texts.values())})

    task = Search()
    split = RetrievalSplitData(
        corpus=as_dataset(collection.documents),
        queries=as_dataset(collection.queries),
        relevant_docs=collection.relevant,
        top_ranked=None,
    )
    task.dataset, task.data_loaded = {"default": {"test": split}}, True
    return task
