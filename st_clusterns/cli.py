"""The command line: `st-clusterns audit`, `train`, `report`, `quickstart`, `evaluate` and `import-checkpoint`."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

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
PAGE_SAVED = "Open the report in a browser; it holds the sentences that it shows"

FORMATS = "Text (one sentence a line), csv, tsv, jsonl or parquet file."
EVAL = (
    "What start and result are scored on, never trained on: a table with the columns label, text, or sentence1, "
    "sentence2, score; or a collection for search, as of evaluate --search."
)
Corpus = Annotated[Path, typer.Argument(help=FORMATS)]
Column = Annotated[str | None, typer.Option(help="The column of a table that holds the sentences.")]
NClusters = Annotated[int | None, typer.Option(help="Number of clusters; chosen from the corpus without.")]
Seed = Annotated[int, typer.Option(help="Seed of the random number generators.")]
Prompt = Annotated[
    str | None, typer.Option(help='Put before each sentence; "" for nothing. The model\'s default prompt without.')
]
PromptName = Annotated[str | None, typer.Option(help="The name of one of the model's prompts, in place of --prompt.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


@app.command()
def train(
    corpus: Annotated[Path, typer.Option(help=FORMATS)],
    model: Annotated[str, typer.Option(help="The model to start from: a name on the hub, or a path.")],
    output: Annotated[Path, typer.Option(help="A new folder for the trained model.")],
    column: Column = None,
    n_clusters: NClusters = None,
    batch_size: Annotated[int, typer.Option(help="Sentences in a batch.")] = 96,
    epochs: Annotated[float, typer.Option(help="Passes over the corpus, at most.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Optimiser steps, at most; 0 is no limit.")] = 20,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 5e-5 with topics, else 2e-5.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens that are read of a sentence, at most.")] = 64,
    bf16: Annotated[bool, typer.Option(help="Train in bfloat16 mixed precision.")] = False,
    seed: Seed = 0,
    embed_batch_size: Annotated[
        int | None, typer.Option(help="Sentences in a batch while embedding; as many as in training without.", min=1)
    ] = None,
    prompt: Prompt = None,
    prompt_name: PromptName = None,
    trust_remote_code: TrustRemoteCode = False,
    lora: Annotated[int | None, typer.Option(help="Train a new LoRA adapter of this rank; needs peft.")] = None,
    report_to: Annotated[str, typer.Option(help="Where logs go: tensorboard, wandb, trackio or the like.")] = "none",
    eval_file: Annotated[Path | None, typer.Option("--eval", help=EVAL)] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the result to this repository of the hub; a new one is private.")
    ] = None,
    embed_device: Annotated[
        list[str] | None, typer.Option(help="Embed on this device, such as cuda:0; may be repeated, for several.")
    ] = None,
) -> None:
    """Train a model on a file of sentences. The same command goes on after an interrupt."""
    _set_up_logging()
    from st_clusterns.evaluation.labelled import read_evaluator
    from st_clusterns.training.adapt import adapt
    from st_clusterns.training.report import compare
    from st_clusterns.training.sentences import SentenceFile
    from st_clusterns.training.trainer import Recipe

    with _plain_errors(output):
        recipe = Recipe(batch_size, epochs, max_steps, learning_rate, max_length, bf16, seed, embed_batch_size)
        evaluator = read_evaluator(eval_file, embed_batch_size or batch_size) if eval_file else None
        report = adapt(
            model,
            SentenceFile(corpus, column),
            output,
            n_clusters,
            recipe,
            prompt=prompt,
            prompt_name=prompt_name,
            trust_remote_code=trust_remote_code,
            lora=lora,
            report_to=report_to,
            evaluator=evaluator,
            push_to_hub=push_to_hub,
            embed_devices=embed_device,
        )
    console.print(report["clusters"]["verdict"], highlight=False)
    used = (
        f"Labels of {eval_file.resolve().name} were used for these scores only" if eval_file else "No labels were used"
    )
    _print_table(used, ("measure", "starting model", "saved model"), compare(report))
    if report["kept"] == "start":
        console.print("The starting model is saved: training gained nothing.", highlight=False, soft_wrap=True)
    load = f"SentenceTransformer({str(output)!r})"
    console.print(f"Saved: {output}. Load it with {load}.", soft_wrap=True)
    if (page := output / "report.html").exists():
        console.print(f"{PAGE_SAVED}: {page}", soft_wrap=True)


@app.command()
def report(
    corpus: Corpus,
    before: Annotated[str, typer.Option(help="A model: a name on the hub, or a path. Its embeddings are clustered.")],
    after: Annotated[str, typer.Option(help="The model to compare with it.")],
    output: Annotated[Path, typer.Option(help="The page; pictures and a table lie beside it.")] = Path("report.html"),
    column: Column = None,
    n_rows: Annotated[int, typer.Option(help="Sentences to show, at most 100,000; of more, a random sample.")] = 20_000,
    n_clusters: NClusters = None,
    batch_size: Annotated[int, typer.Option(help="Sentences in a batch.", min=2)] = 96,
    max_length: Annotated[int, typer.Option(help="Tokens that are read of a sentence, at most.", min=1)] = 64,
    seed: Seed = 0,
    prompt: Prompt = None,
    prompt_name: PromptName = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare two models on a file of sentences, in one page for the browser. Nothing is trained or overwritten."""
    _set_up_logging()
    from st_clusterns.training.report import write_report
    from st_clusterns.training.sentences import read_sentences

    with _plain_errors(None):
        numbers = write_report(
            read_sentences(corpus, column),
            before,
            after,
            output,
            n_rows=n_rows,
            n_clusters=n_clusters,
            seed=seed,
            max_length=max_length,
            batch_size=batch_size,
            prompt=prompt,
            prompt_name=prompt_name,
            trust_remote_code=trust_remote_code,
        )
    console.print(numbers["clusters"]["verdict"], highlight=False)
    console.print(f"{PAGE_SAVED}: {output}", soft_wrap=True)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="A new folder for the pictures and the table.")] = Path("quickstart"),
    model: Annotated[str | None, typer.Option(help="The model to start from; the packaged MiniLM without.")] = None,
    seed: Seed = 0,
) -> None:
    """Compare plain contrastive training with ClusterNS on 1,200 packaged utterances, offline, in minutes."""
    _set_up_logging()
    from st_clusterns.training.quickstart import run

    with _plain_errors(output):
        rows = run(output, model, seed, say=console.print)
    cells = [["-" if v is None else v if isinstance(v, str) else f"{v:.1f}" for v in row.values()] for row in rows]
    _print_table("1,200 utterances, 24 intents (used for scoring only)", list(rows[0]), cells)
    console.print(f"The picture that explains why: {output / 'quickstart.png'}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="The model to evaluate: a name on the hub, or a path.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="An mteb task or benchmark, or STS: the seven tests under both protocols. May be repeated. "
            "STS without, unless --clustering or --search is given."
        ),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Has sts/STS12.tsv.gz and so on, instead of the hub's.")] = None,
    clustering: Annotated[
        list[Path] | None,
        typer.Option(help="A table (csv, tsv, jsonl, parquet) of short texts: label, text. May be repeated."),
    ] = None,
    search: Annotated[
        list[Path] | None,
        typer.Option(help="A folder with corpus.jsonl, queries.jsonl, qrels/test.tsv, as of BEIR. May be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder of this model's results; evaluation/MODEL without. Resumed.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What to call the model in the tables; MODEL without.")] = None,
    restarts: Annotated[int, typer.Option(help="k-means runs for --clustering; scores are their means.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the first k-means run; each further run adds one.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts in a batch.", min=1)] = 32,
    prompt: Prompt = None,
    prompt_name: PromptName = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score a model on STS, any mteb task or benchmark, and texts or a search of yours. Existing scores are kept."""
    _set_up_logging()
    from st_clusterns.evaluation.evaluate import evaluate as run
    from st_clusterns.evaluation.mteb_tasks import import_mteb, mteb_name
    from st_clusterns.evaluation.tables import STS
    from st_clusterns.models import load_model, set_default_prompt

    name = mteb_name(name or model)
    output = output or Path("evaluation") / name.replace("/", "__")
    with _plain_errors(output, task_by_task=True):
        import_mteb()
        encoder = load_model(model, trust_remote_code)
        set_default_prompt(encoder, prompt, prompt_name)
        run(
            encoder,
            name,
            output,
            tasks or ([] if clustering or search else [STS]),
            data_dir,
            clustering or (),
            restarts,
            seed,
            batch_size,
            command=shlex.join(["st-clusterns", *sys.argv[1:]]),
            say=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
            search=search or (),
        )
        console.print(f"Tables: {output / 'results.md'}, .csv, .json", soft_wrap=True)


@app.command()
def audit(
    corpus: Corpus,
    model: Annotated[str, typer.Option(help="The model to train: a name on the hub, or a path.")],
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Sentences in a batch. May be repeated; 32, 128 and 512 without.")
    ] = None,
    column: Column = None,
    label_column: Annotated[
        str | None, typer.Option(help="The column that holds labels, to measure the audit by; needs --column.")
    ] = None,
    n_clusters: NClusters = None,
    sample: Annotated[int, typer.Option(help="Sentences that are embedded: a random sample of more.")] = 50_000,
    max_length: Annotated[int, typer.Option(help="Tokens that are read of a sentence, at most.")] = 64,
    seed: Seed = 0,
    embed_batch_size: Annotated[int, typer.Option(help="Sentences in a batch while embedding.", min=1)] = 64,
    prompt: Prompt = None,
    prompt_name: PromptName = None,
    output: Annotated[Path | None, typer.Option(help="A new JSON file for all of it.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Tell how many in-batch negatives of a corpus are probably false, what its topics are, and what to train with."""
    _set_up_logging()
    from st_clusterns.files import write_json
    from st_clusterns.training.audit import audit as run
    from st_clusterns.training.sentences import read_labelled

    with _plain_errors(output):
        if output is not None and output.exists():
            raise FileExistsError(f"output={str(output)!r} exists already: choose another file, or remove it first.")
        sentences, labels = read_labelled(corpus, column, label_column)
        found = run(
            model,
            sentences,
            batch_size or None,
            labels=labels,
            n_clusters=n_clusters,
            sample=sample,
            max_length=max_length,
            seed=seed,
            prompt=prompt,
            prompt_name=prompt_name,
            embed_batch_size=embed_batch_size,
            trust_remote_code=trust_remote_code,
        )
        console.print(str(found), highlight=False, markup=False, soft_wrap=True)
        if output is not None:
            write_json(found.to_dict(), output)
            console.print(f"Saved: {output}", soft_wrap=True)


@app.command()
def import_checkpoint(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of the authors' code.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the model.")],
    preset: Annotated[str, typer.Option(help="The published row it is of, such as paper/prompt-bert-base.")],
    template: Annotated[str | None, typer.Option(help="Another template than the row's first one.")] = None,
    standard: Annotated[
        bool, typer.Option("--standard", help="Save a prompt model so that sentence-transformers alone loads it.")
    ] = False,
) -> None:
    """Convert a checkpoint in the layout of the authors' code to a sentence-transformers model."""
    _set_up_logging()
    from st_clusterns.import_checkpoint import import_checkpoint as convert

    with _plain_errors(output):
        model = convert(source, output, preset, template, standard)
    names = " + ".join(type(module).__name__ for module in model)
    trust = ", trust_remote_code=True" if "PromptTransformer" in names else ""
    load = f"SentenceTransformer({str(output)!r}{trust})"
    console.print(f"Saved: {output} ({names}). Load it with {load}.", highlight=False, soft_wrap=True)


@contextmanager
def _plain_errors(output: Path | None, *, task_by_task: bool = False) -> Iterator[None]:
    """Turn the errors that a person can act on into one line, and an interrupt into what to do next."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    try:
        yield
    except (ValueError, ImportError, FileExistsError, FileNotFoundError) as error:
        say(f"[bold red]Error:[/] {escape(str(error))}")
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        say(f"Interrupted. {_what_is_left(output, task_by_task)}")
        raise typer.Exit(130) from error
    except (OSError, SafetensorError) as error:  # as on a full disk
        reason = escape(str(error)).rstrip(".")
        left = _what_is_left(output, task_by_task)
        say(f"[bold red]Error:[/] a file could not be read or written: {reason}. {left}")
        raise typer.Exit(2) from error
    except BaseException:
        say(f"Stopped by an error. {_what_is_left(output, task_by_task)}")  # its trace follows
        raise


def _what_is_left(output: Path | None, task_by_task: bool) -> str:
    from st_clusterns.training.adapt import is_interrupted, work_folder

    if output is None:
        return "Nothing is kept: the same command begins anew."
    if task_by_task:
        return f"The tasks that were finished are kept in {output}: the same command goes on."
    if output.exists():
        return f"{output} is finished."
    if is_interrupted(output):
        return f"What was finished is kept in {work_folder(output)}: the same command goes on."
    return "Nothing was finished: the same command begins anew."


def _set_up_logging() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    logging.getLogger("st_clusterns").setLevel(logging.INFO)


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    app()
