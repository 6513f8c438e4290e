"""The pretrained backbone: small, plain, the same again after an interrupt, and it does learn."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny_bert import make_sentences

import pretrain

TINY = [
    "--sentences",
    1400,
    "--layers",
    1,
    "--width",
    64,
    "--batch-size",
    8,
    "--vocabulary",
    400,
    "--learning-rate",
    5e-3,
]


class Interrupt:
    """A function that is interrupted at its n-th call."""

    def __init__(self, function: Callable[..., Any], calls: int) -> None:
        self.function = function
        self.calls = calls

    def __call__(self, *args: object) -> Any:
        self.calls -= 1
        if self.calls == 0:
            raise KeyboardInterrupt
        return self.function(*args)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "corpus").mkdir(parents=True)
    lines = "\n".join(text.replace(" ", " the ") for text in make_sentences(1400))  # half of it is easy to guess
    (tmp_path / "data" / "corpus" / "wiki_1m.txt.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path / "data"


def main(data: Path, output: Path, *words: object) -> None:
    pretrain.main([str(word) for word in ("--data-dir", data, "--output", output, *TINY, *words)])


@pytest.mark.slow
def test_a_run_that_was_interrupted_makes_the_same_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(data, tmp_path / "whole", "--steps", 40)
    for broken, calls in (("learning_rate", 25), ("save", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, broken, Interrupt(getattr(pretrain, broken), calls))
            with pytest.raises(KeyboardInterrupt):
                main(data, tmp_path / "again", "--steps", 40)
        assert not (tmp_path / "again").exists()
    with pytest.raises(SystemExit, match="other settings"):
        main(data, tmp_path / "again", "--steps", 41)
    main(data, tmp_path / "again", "--steps", 40)
    whole, again = (SentenceTransformer(str(tmp_path / name)) for name in ("whole", "again"))
    ours, theirs = whole.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not (tmp_path / "again.partial").exists()

    assert {weight.dtype for weight in ours.values() if weight.is_floating_point()} == {torch.float32}
    assert whole[0].auto_model.config.hidden_dropout_prob == 0.1
    reports = [json.loads((tmp_path / name / "pretraining.json").read_text()) for name in ("whole", "again")]
    assert reports[0]["held_out"] == reports[1]["held_out"]
    losses = [loss for _, loss in reports[0]["held_out"]]
    assert losses[-1] < losses[0] - 0.5, "nothing was learnt"
    assert reports[0]["step"] == 40
    assert (tmp_path / "whole" / "pretraining.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="exists already"):
        main(data, tmp_path / "whole", "--steps", 40)


def test_a_model_too_large_for_a_repository_is_refused() -> None:
    with pytest.raises(SystemExit, match="layers=12, width=256"):
        pretrain.make_model(12, 256, 8000, 0)


def test_batches_follow_from_seed_and_step_and_share_a_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 5000)
    one = pretrain.rows_of_step(70, lengths, 16, 0)
    assert np.array_equal(one, pretrain.rows_of_step(70, lengths, 16, 0))
    assert not np.array_equal(one, pretrain.rows_of_step(70, lengths, 16, 1))
    chunk = [pretrain.rows_of_step(step, lengths, 16, 0) for step in range(pretrain.CHUNK)]
    assert len(np.unique(np.concatenate(chunk))) == 16 * pretrain.CHUNK, "a row comes twice before others come once"
    assert np.mean([np.ptp(lengths[rows]) for rows in chunk]) < 3


def test_padding() -> None:
    tokens = pretrain.Tokens(np.arange(10, 20, dtype=np.uint16), np.array([3, 4, 10]))
    assert tokens.batch(np.array([2, 1]), 0).tolist() == [[14, 15, 16, 17, 18, 19], [13, 0, 0, 0, 0, 0]]


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    rates = [pretrain.learning_rate(done, 2.0) for done in (0, 0.025, 0.05, 0.525, 1)]
    assert rates == pytest.approx([0, 1, 2, 1, 0])
