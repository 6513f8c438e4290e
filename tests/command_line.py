"""Runs `st-clusterns train` on a tiny model and a corpus with topics, for the tests."""

from __future__ import annotations

import random
from pathlib import Path

from tiny_bert import TOPICS, WORDS, load_model, save_bert
from typer.testing import CliRunner

from st_clusterns.cli import app

STEPS = 8  # with a checkpoint at every second one
REPEATED = 5  # sentences that the corpus holds twice


def topic_sentences(count: int, seed: int = 0) -> list[str]:
    """Distinct sentences, each from the three words of a topic: few enough that even a random model finds topics."""
    draw = random.Random(seed)
    sentences: dict[str, None] = {}
    while len(sentences) < count:
        first = draw.randrange(TOPICS) * len(WORDS) // TOPICS
        sentences[" ".join(draw.choices(WORDS[first : first + 3], k=draw.randint(7, 11)))] = None
    return list(sentences)


DISTINCT = topic_sentences(320)
SENTENCES = DISTINCT + DISTINCT[:REPEATED]


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
