"""Runs `st-clusterns train` on a tiny model and corpus, for the tests."""

from __future__ import annotations

from pathlib import Path

from tiny_bert import load_model, make_sentences, save_bert
from typer.testing import CliRunner

from st_clusterns.cli import app

SENTENCES = make_sentences(400)
STEPS = 4  # with a checkpoint at each


def save_model(folder: Path) -> str:
    load_model(save_bert(folder / "bert")).save(str(folder / "st"))
    return str(folder / "st")


def save_corpus(folder: Path) -> Path:
    path = folder / "corpus.txt"
    path.write_text("\n".join(SENTENCES))
    return path


def train_words(corpus: Path, model: str, output: Path, *more: object) -> list[object]:
    """The words of the command; `more` options win."""
    common = ["--batch-size", 32, "--max-steps", STEPS, "--n-clusters", 8]
    return ["train", "--corpus", corpus, "--model", model, "--output", output, *common, *more]


def cli(*words: object) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it printed, on one line."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())
