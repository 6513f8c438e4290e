"""Compare methods on corpora over seeds, from one declarative file; resumable, and safe to start several times.

    python benchmarks/compare.py benchmarks/evidence.json --data-dir DIR --output results/evidence

A plan is a JSON file:

    model      path or name of the starting model; the packaged all-MiniLM-L6-v2 without it
    pooling    "mean" or "cls": puts another pooling on a plain backbone
    recipe     the fields of `st_clusterns.Recipe`; its defaults without it
    scoring    {"restarts": k-means runs of a clustering score, "bf16": embed in mixed precision, which is faster
               and moved no STS test of all-MiniLM-L6-v2 by more than 0.014 points from float32; default false}
    corpora    names, see corpora.py
    seeds      numbers
    baseline   the row that differences are tested against; `start` the row they are drawn against
    methods    the rows of the table: a name in methods.py, or an object with `name` (of the row), `method` (default
               "ClusterNS"), the arguments `loss`, `n_clusters`, `group_size`, `tfidf`, `views` of methods.Job, and
               any of the above for this row only (its `recipe` is merged with the plan's)
    about      a paragraph for the README

Each run (row x corpus x seed) writes one JSON file with its settings, versions and seconds. Runs that have one are
skipped, and so are runs that another process works on; the lock of a process that died is free. A file made with other
settings than the plan's stops the program. At the end, and with `--tables` at once, README.md and differences.png are
written. `--limit N` tries everything out on N rows a corpus; its results go to OUTPUT-firstN. No labels are used in
training; test labels choose nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import set_seed
from transformers.utils import logging as transformers_logging

import corpora
from methods import METHODS, START, Job
from st_clusterns import Recipe, embed_corpus
from st_clusterns.clustering.embedding import describe_model
from st_clusterns.clustering.vectors import Floats
from st_clusterns.files import write_json
from st_clusterns.training.quickstart import packaged_model
from st_clusterns.training.views import Kind
from tables import write_tables

PACKAGED = "packaged all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Row:
    """A row of the table, with all that its runs depend on but the corpus and the seed."""

    name: str
    method: str = "ClusterNS"
    loss: dict[str, Any] = field(default_factory=dict)
    n_clusters: int | float | None = None
    group_size: int = 1
    tfidf: bool = True
    views: Kind | None = None
    model: str = PACKAGED
    pooling: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    scoring: dict[str, Any] = field(default_factory=lambda: {"restarts": 10, "bf16": False})
    corpora: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    baseline: str | None = None
    start: str = START

    def runs(self) -> list[tuple[str, int]]:
        """Return its (corpus, seed) pairs; the starting model has nothing random in it."""
        seeds = self.seeds[:1] if self.method == START else self.seeds
        return [(corpus, seed) for seed in seeds for corpus in self.corpora]

    def settings(self, corpus: str, seed: int, limit: int | None) -> dict[str, Any]:
        """Return all that a run's result depends on, as it is written into its file."""
        names = ("method", "loss", "n_clusters", "group_size", "tfidf", "views", "model", "pooling", "scoring")
        parts = {name: value for name, value in asdict(self).items() if name in names}
        recipe = None if self.method == START else asdict(Recipe(**{**self.recipe, "seed": seed}))
        return {**parts, "recipe": recipe, "corpus": corpus, "seed": seed, "limit": limit}


def read_plan(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Read a plan; what it says for all rows holds for each that says nothing else."""
    plan = json.loads(path.read_text(encoding="utf-8"))
    common = {name: value for name, value in plan.items() if name not in ("methods", "about")}
    rows = []
    for entry in plan["methods"]:
        entry = {"name": entry, "method": entry} if isinstance(entry, str) else entry
        merged = {**common, **entry, "recipe": {**plan.get("recipe", {}), **entry.get("recipe", {})}}
        try:
            row = Row(**{k: tuple(v) if k in ("corpora", "seeds") else v for k, v in merged.items()})
            Recipe(**row.recipe)
        except TypeError as error:
            raise SystemExit(f"{path}, {entry.get('name', entry)!r}: {error}.") from error
        if row.method not in METHODS:
            raise SystemExit(f"{path}: there is no method {row.method!r}. Known: {', '.join(METHODS)}.")
        rows.append(row)
    if len({slug(row.name) for row in rows}) < len(rows):
        raise SystemExit(f"{path}: two rows have the same name, or names that differ in signs only.")
    return plan, rows


def slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name).strip("_")


def result_path(folder: Path, row: Row, corpus: str, seed: int) -> Path:
    return folder / f"{slug(corpus)}-{slug(row.name)}-{seed}.json"


def read_results(folder: Path, rows: list[Row], limit: int | None) -> dict[str, list[dict[str, Any]]]:
    """Return the finished runs of each row; a file made with other settings is an error, not a number."""
    found: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for row in rows:
        for corpus, seed in row.runs():
            path = result_path(folder, row, corpus, seed)
            if path.exists():
                run = json.loads(path.read_text(encoding="utf-8"))
                _check_settings(path, run, row.settings(corpus, seed, limit))
                found[row.name].append(run)
    return found


def _check_settings(path: Path, run: dict[str, Any], planned: dict[str, Any]) -> None:
    made = run.get("settings", {})
    differing = [name for name in planned if name not in made or made[name] != json.loads(json.dumps(planned[name]))]
    if differing:
        raise SystemExit(
            f"{path} was made with another {', '.join(differing)} than the plan's: move it away to run it again, or "
            "give the row another name."
        )


def load_model(row: Row) -> SentenceTransformer:
    model = SentenceTransformer(packaged_model() if row.model == PACKAGED else row.model)
    if row.pooling is None:
        return model
    return SentenceTransformer(modules=[model[0], Pooling(model.get_embedding_dimension(), row.pooling)])


def run(row: Row, corpus_name: str, seed: int, data: Path | None, limit: int | None, cache: Path) -> dict[str, Any]:
    """Train and score once."""
    began = time.monotonic()
    corpus = corpora.load(corpus_name, data, limit, row.scoring["restarts"])
    set_seed(seed)
    model = load_model(row)
    start = describe_model(model)

    def embed(texts: Sequence[str], folder: Path | None = None) -> Floats:
        return embed_corpus(texts, model, show_progress_bar=False, bf16=row.scoring["bf16"], cache=folder)

    def embed_start(texts: Sequence[str] = corpus.texts) -> Floats:  # once for all runs
        return embed(texts, cache / "embeddings")

    set_seed(seed)
    with tempfile.TemporaryDirectory(dir=cache) as work:  # a fresh one, or a run would go on from another's checkpoint
        recipe = Recipe(**{**row.recipe, "seed": seed})
        job = Job(
            model,
            corpus.texts,
            embed_start,
            recipe,
            Path(work),
            row.loss,
            row.n_clusters,
            row.group_size,
            row.tfidf,
            row.views,
        )
        training = time.monotonic()
        notes = METHODS[row.method](job)
        training = time.monotonic() - training
    scores = corpus.score(embed_start if row.method == START else embed)
    return {
        "row": row.name,
        "settings": row.settings(corpus_name, seed, limit),
        "scores": scores,
        "notes": notes,
        "sentences": len(corpus.texts),
        "starting_model": start,
        "seconds": round(time.monotonic() - began, 1),
        "seconds_training": round(training, 1),
        "threads": torch.get_num_threads(),
        "device": model.device.type,
        "machine": platform.processor() or platform.machine(),
        "versions": versions(),
        "command": command(),
    }


def write_missing(
    folder: Path, names: Sequence[str], seeds: Sequence[int], run: Callable[[str, int], dict[str, Any]]
) -> None:
    """Write a JSON file for each corpus and seed that has none."""
    for seed in seeds:
        for name in names:
            path = folder / f"{name}-{seed}.json"
            if not path.exists():
                write_json(run(name, seed), path)


def versions() -> dict[str, str]:
    """Return the versions that a number may depend on, with this repository's commit."""
    names = ("st-clusterns", "sentence-transformers", "torch", "transformers", "scikit-learn")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {**{name: version(name) for name in names}, "commit": commit}


def command() -> str:
    """Return the command line that made this run; of absolute paths, which mean nothing elsewhere, the last part."""
    words = [option + equals + _short(value) for option, equals, value in (word.rpartition("=") for word in sys.argv)]
    return shlex.join(["python", *words])


def _short(word: str) -> str:
    if not os.path.isabs(word):
        return word
    here = os.path.relpath(word)
    return f".../{Path(word).name}" if here.startswith("..") else here


def choose_runs(rows: list[Row], args: argparse.Namespace) -> list[tuple[Row, str, int]]:
    """Return the runs that the command line asks for, seed by seed and corpus by corpus: the table fills evenly."""
    runs = [(row, corpus, seed) for row in rows for corpus, seed in row.runs()]
    for wanted, known in (
        (args.rows, {row.name for row in rows}),
        (args.corpora, {corpus for _, corpus, _ in runs}),
        (args.seeds, {seed for _, _, seed in runs}),
    ):
        if unknown := set(wanted or []) - known:
            raise SystemExit(f"The plan has no {', '.join(map(repr, unknown))}, only {', '.join(map(repr, known))}.")
    chosen = [
        (row, corpus, seed)
        for row, corpus, seed in runs
        if (args.rows is None or row.name in args.rows)
        and (args.corpora is None or corpus in args.corpora)
        and (args.seeds is None or seed in args.seeds)
    ]
    names = list(dict.fromkeys(corpus for _, corpus, _ in runs))
    return sorted(chosen, key=lambda run: (run[0].seeds.index(run[2]), names.index(run[1])))


def run_all(
    todo: list[tuple[Row, str, int]], folder: Path, data: Path | None, limit: int | None, cache: Path, console: Console
) -> list[str]:
    """Do the runs that nobody has done or is doing; return the names of those that failed."""
    failed = []
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("", total=len(todo))
        for row, corpus, seed in todo:
            path = result_path(folder, row, corpus, seed)
            progress.update(task, description=f"{row.name}, {corpus}, seed {seed}")
            try:
                with FileLock(path.with_suffix(".lock"), timeout=0):  # the system frees it when its process ends
                    if not path.exists():
                        result = run(row, corpus, seed, data, limit, cache)
                        write_json(result, path)
                        console.print(f"{path.stem}: {_brief(result)}", highlight=False, soft_wrap=True)
                    path.with_suffix(".lock").unlink(missing_ok=True)
            except Timeout:
                console.print(f"{path.stem}: another process works on it", soft_wrap=True)
            except Exception:
                failed.append(path.stem)
                console.print_exception()
            progress.advance(task)
    return failed


def _brief(result: dict[str, Any]) -> str:
    scores = ", ".join(f"{name} {value:.1f}" for name, value in result["scores"].items())
    return f"{scores} in {result['seconds']} s"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "st_clusterns_benchmarks")
    parser.add_argument("--limit", type=int, help="try out on so many rows a corpus, in a folder of its own")
    parser.add_argument("--tables", action="store_true", help="only write the tables anew")
    parser.add_argument("--rows", nargs="*", help="only these rows of the plan")
    parser.add_argument("--corpora", nargs="*", help="only these corpora")
    parser.add_argument("--seeds", nargs="*", type=int, help="only these seeds")
    args = parser.parse_args(words)
    plan, rows = read_plan(args.plan)
    console = Console()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = args.output if args.limit is None else args.output.with_name(f"{args.output.name}-first{args.limit}")
    folder.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    read_results(folder, rows, args.limit)  # complain now, not after hours
    failed = []
    if not args.tables:
        failed = run_all(choose_runs(rows, args), folder, args.data_dir, args.limit, args.cache, console)
    write_tables(folder, args.plan.name, plan, rows, read_results(folder, rows, args.limit), args.limit, START)
    console.print(f"Tables: {folder / 'README.md'}", soft_wrap=True)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(failed)}. The same command tries them again.")


if __name__ == "__main__":
    main()
