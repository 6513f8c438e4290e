"""The command line: `st-clusterns train`, `st-clusterns quickstart` and `st-clusterns evaluate`."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError

app = typer.Typer(
    help="Train sentence embeddings from plain sentences, without labels.", no_args_is_help=True, add_completion=False
)
console = Console()


@app.command()
def train(
    corpus: Annotated[Path, typer.Option(help="Text (one sentence a line), csv, tsv, jsonl or parquet file.")],
    model: Annotated[str, typer.Option(help="The model to start from: a name on the hub, or a path.")],
    output: Annotated[Path, typer.Option(help="A new folder for the trained model.")],
    column: Annotated[str | None, typer.Option(help="The column of a table that holds the sentences.")] = None,
    n_clusters: Annotated[int | None, typer.Option(help="Number of clusters; chosen from the corpus without.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sentences in a batch.")] = 96,
    epochs: Annotated[float, typer.Option(help="Passes over the corpus, at most.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Optimiser steps, at most; 0 is no limit.")] = 20,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of AdamW, decaying linearly.")] = 2e-5,
    max_length: Annotated[int, typer.Option(help="Tokens that training reads of a sentence, at most.")] = 64,
    bf16: Annotated[bool, typer.Option(help="Train in bfloat16 mixed precision.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random number generators.")] = 0,
) -> None:
    """Train a model on a file of sentences. The same command goes on after an interrupt."""
    _set_up_logging()
    from st_clusterns.training.adapt import Recipe, adapt
    from st_clusterns.training.sentences import read_sentences

    recipe = Recipe(batch_size, epochs, max_steps, learning_rate, max_length, bf16, seed)
    with _plain_errors(output):
        report = adapt(model, read_sentences(corpus, column), output, n_clusters, recipe)
    _print_report(report, output)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="A new folder for the pictures and the table.")] = Path("quickstart"),
    model: Annotated[str | None, typer.Option(help="The model to start from; the packaged MiniLM without.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random number generators.")] = 0,
) -> None:
    """Compare plain contrastive training with ClusterNS on 1,200 packaged utterances, offline, in minutes."""
    _set_up_logging()
    from st_clusterns.training.quickstart import run

    with _plain_errors(output):
        rows = run(output, model, seed, say=console.print)
    table = Table(title="1,200 utterances, 24 intents (used for scoring only)")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)
    console.print(f"The picture that explains why: {output / 'quickstart.png'}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="The model to evaluate: a name on the hub, or a path.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="An mteb task or benchmark, or STS: the seven tests under both protocols. May be repeated. "
            "STS without, unless --clustering is given."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Holds sts/STS12.tsv.gz and so on, to be used instead of the hub's.")
    ] = None,
    clustering: Annotated[
        list[Path] | None, typer.Option(help="A .tsv or .tsv.gz file of short texts: label, text. May be repeated.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder of this model's results; evaluation/MODEL without. Resumed.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What to call the model in the tables; MODEL without.")] = None,
    restarts: Annotated[int, typer.Option(help="k-means runs for --clustering; scores are their means.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the first k-means run; each further run adds one.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts in a batch.", min=1)] = 32,
) -> None:
    """Score a model on STS, on any mteb task or benchmark, and on short texts of yours. Existing scores are kept."""
    _set_up_logging()
    from sentence_transformers import SentenceTransformer

    from st_clusterns.evaluation.evaluate import evaluate as run
    from st_clusterns.evaluation.mteb_tasks import import_mteb, mteb_name
    from st_clusterns.evaluation.tables import STS

    name = mteb_name(name or model)
    output = output or Path("evaluation") / name.replace("/", "__")
    with _plain_errors(output, task_by_task=True):
        import_mteb()
        run(
            SentenceTransformer(model),
            name,
            output,
            tasks or ([] if clustering else [STS]),
            data_dir,
            clustering or (),
            restarts,
            seed,
            batch_size,
            command=shlex.join(["st-clusterns", *sys.argv[1:]]),
            say=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
        )
        console.print(f"Tables: {output / 'results.md'}, .csv, .json", soft_wrap=True)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:.1f}"


class _plain_errors:  # noqa: N801
    """Turn the errors that a person can act on into one line, and an interrupt into what to do next."""

    def __init__(self, output: Path, *, task_by_task: bool = False) -> None:
        self.output = output
        self.task_by_task = task_by_task

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        if isinstance(error, (ValueError, ImportError, FileExistsError, FileNotFoundError)):
            self._say(f"[bold red]Error:[/] {escape(str(error))}")
            raise typer.Exit(2) from error
        if isinstance(error, KeyboardInterrupt):
            self._say(f"Interrupted. {self._what_is_left()}")
            raise typer.Exit(130) from error
        if isinstance(error, (OSError, SafetensorError)):  # as on a full disk
            reason = escape(str(error)).rstrip(".")
            self._say(f"[bold red]Error:[/] a file could not be read or written: {reason}. {self._what_is_left()}")
            raise typer.Exit(2) from error
        self._say(f"Stopped by an error. {self._what_is_left()}")  # its trace follows

    def _say(self, text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    def _what_is_left(self) -> str:
        from st_clusterns.training.adapt import is_interrupted, work_folder

        if self.task_by_task:
            return f"The tasks that were finished are kept in {self.output}: the same command goes on."
        if self.output.exists():
            return f"{self.output} is finished."
        if is_interrupted(self.output):
            return f"What was finished is kept in {work_folder(self.output)}: the same command goes on."
        return "Nothing was finished: the same command begins anew."


def _set_up_logging() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    logging.getLogger("st_clusterns").setLevel(logging.INFO)


def _print_report(report: dict[str, Any], output: Path) -> None:
    console.print(report["clusters"]["verdict"], highlight=False)
    table = Table(title="No labels were used; what the clusters and cosines say")
    for name in ("measure", "before", "after"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for name, value in report["before"].items():
        table.add_row(name.replace("_", " "), f"{value:.3f}", f"{report['after'][name]:.3f}")
    console.print(table)
    console.print(
        f"Saved: {output} (report.json, report.png). Load it with SentenceTransformer({str(output)!r}).", soft_wrap=True
    )


if __name__ == "__main__":
    app()
