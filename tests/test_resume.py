"""Training that is stopped and resumed is training that was never stopped, to the last bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import StubModel
from datasets import Dataset
from safetensors.torch import save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from tiny_bert import load_model, make_sentences, save_bert
from torch import nn
from train_script import BATCH, ROWS, STEPS_AN_EPOCH, StopAfter, train
from two_processes import launch

from st_clusterns import (
    CachedClusterNSLoss,
    ClusterBatchSampler,
    ClusterNSLoss,
    ClusterStateCallback,
    CorpusClusters,
    ReclusterCallback,
    cluster_corpus,
)
from st_clusterns.callbacks import CORPUS_FILE, STATE_FILE, load_state, save_state

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("train_script.py")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def assert_resumed(whole: dict[str, Any], resumed: dict[str, Any], step: int) -> None:
    """Everything after `step` is as in the run that was never stopped."""
    assert 0 < len(resumed["values"]) == len(whole["values"]) - step, "training must have gone on, not begun anew"
    assert resumed["values"] == whole["values"][step:]
    assert resumed["log"] == whole["log"]
    for part in ("weights", "state"):
        for name, value in whole[part].items():
            assert torch.equal(resumed[part][name], value), name
    assert torch.equal(resumed["rows"], whole["rows"])


@pytest.mark.parametrize(
    ("loss", "sampler", "step"),
    [
        ("plain", "default", 7),  # while rows are collected for the start
        ("plain", "clusters", 20),  # after the start, within epoch 1
        ("plain", "clusters", 2 * STEPS_AN_EPOCH),  # between two epochs
        ("cached", "default", 20),
        ("cached", "clusters", 31),
    ],
)
def test_fresh_objects_resume_bit_for_bit(bert: Path, tmp_path: Path, loss: str, sampler: str, step: int) -> None:
    run: dict[str, Any] = {"loss": loss, "sampler": sampler}
    whole = train(bert, tmp_path / "whole", **run)
    assert whole["state"]["started"]
    stopped = train(bert, tmp_path / "stopped", stop_after=step, **run)
    assert len(stopped["values"]) == step
    torch.manual_seed(12345)
    assert_resumed(whole, train(bert, tmp_path / "stopped", resume=True, **run), step)


def test_without_the_callback_a_resumed_run_differs(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A canary: it is the state file that makes the runs equal."""
    whole = train(bert, tmp_path / "whole")
    train(bert, tmp_path / "stopped", stop_after=20)
    monkeypatch.setattr("st_clusterns.callbacks.load_state", lambda *args: None)
    resumed = train(bert, tmp_path / "stopped", resume=True)
    assert resumed["values"] != whole["values"][20:]


def test_gradient_accumulation_resumes(bert: Path, tmp_path: Path) -> None:
    run: dict[str, Any] = {"train_settings": {"gradient_accumulation_steps": 2}, "sampler": "clusters"}
    whole = train(bert, tmp_path / "whole", **run)
    train(bert, tmp_path / "stopped", stop_after=8, **run)
    assert_resumed(whole, train(bert, tmp_path / "stopped", resume=True, **run), 16)


def test_a_fresh_process_resumes_bit_for_bit(bert: Path, tmp_path: Path) -> None:
    whole = train(bert, tmp_path / "whole", sampler="clusters")
    train(bert, tmp_path / "stopped", stop_after=20, sampler="clusters")
    settings = json.dumps({"sampler": "clusters", "resume": True})
    subprocess.run([sys.executable, SCRIPT, bert, tmp_path / "stopped", settings], check=True, capture_output=True)
    assert_resumed(whole, torch.load(tmp_path / "stopped" / "result-0.pt"), 20)


def test_two_processes_resume_bit_for_bit(bert: Path, tmp_path: Path) -> None:
    """In epoch 1: the trainer itself would replay the order of epoch 0."""
    for name, settings in (("whole", {}), ("stopped", {"stop_after": 20}), ("stopped", {"resume": True})):
        (tmp_path / name).mkdir(exist_ok=True)
        launch(SCRIPT, str(bert), str(tmp_path / name), json.dumps({"sampler": "clusters", **settings}))
    for rank in range(2):
        whole, resumed = (torch.load(tmp_path / name / f"result-{rank}.pt") for name in ("whole", "stopped"))
        resumed["log"] = whole["log"] if rank else resumed["log"]  # only rank 0 keeps one
        assert_resumed(whole, resumed, 20)


# Where the checkpoint lies


def test_a_checkpoint_elsewhere_is_asked_for_and_found(bert: Path, tmp_path: Path) -> None:
    whole = train(bert, tmp_path / "whole")
    train(bert, tmp_path / "stopped", stop_after=20)
    moved = tmp_path / "elsewhere" / "best"
    shutil.copytree(tmp_path / "stopped" / "checkpoint-20", moved)
    with pytest.raises(FileNotFoundError, match=r"Pass the folder .*ClusterStateCallback\(\.\.\., resume_from=folder"):
        train(bert, tmp_path / "empty", resume=str(moved))
    resumed = train(bert, tmp_path / "by_callback", resume=str(moved), callback={"resume_from": moved})
    assert_resumed(whole, resumed, 20)
    by_arguments = train(
        bert, tmp_path / "by_args", resume=str(moved), train_settings={"resume_from_checkpoint": str(moved)}
    )
    assert_resumed(whole, by_arguments, 20)


def test_the_same_step_of_another_run_is_not_taken_for_it(bert: Path, tmp_path: Path) -> None:
    """Both folders hold a checkpoint-20; only one is resumed from."""
    train(bert, tmp_path / "one", stop_after=20)
    train(bert, tmp_path / "other", stop_after=20, train_settings={"learning_rate": 1e-4})
    with pytest.raises(FileNotFoundError, match="of a run that did not write"):
        train(bert, tmp_path / "other", resume=str(tmp_path / "one" / "checkpoint-20"))


# Files that are not what they should be


@pytest.fixture(scope="module")
def stopped(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    train(bert, folder, stop_after=3)
    return folder


@pytest.fixture
def checkpoint(stopped: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(stopped, tmp_path / "run")) / "checkpoint-3"


def test_a_missing_file_is_told(bert: Path, checkpoint: Path) -> None:
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"{STATE_FILE} is missing, so training cannot go on"):
        train(bert, checkpoint.parent, resume=True)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_file_is_told(bert: Path, checkpoint: Path, size: int) -> None:
    whole = (checkpoint / STATE_FILE).read_bytes()
    (checkpoint / STATE_FILE).write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"is truncated or damaged .* Resume from an earlier checkpoint"):
        train(bert, checkpoint.parent, resume=True)


def test_a_foreign_file_is_told(bert: Path, checkpoint: Path) -> None:
    save_file({"centroids": torch.zeros(4, 32)}, checkpoint / STATE_FILE)
    with pytest.raises(ValueError, match="was not written by st_clusterns"):
        train(bert, checkpoint.parent, resume=True)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import st_clusterns.callbacks as callbacks
from train_script import train

torch.set_num_threads(1)  # as the tests have it: sums are split over threads, and the last bit with them

def die_half_way(tensors, path, metadata):
    real(tensors, path, metadata=metadata)
    if "checkpoint-20" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

real, callbacks.save_file = callbacks.save_file, die_half_way
train(Path(sys.argv[1]), Path(sys.argv[2]), train_settings={"save_strategy": "steps", "save_steps": 10})
"""


def test_a_kill_while_the_file_is_written_spares_the_checkpoint_before(bert: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = [sys.executable, "-c", KILLED, str(bert), str(run)]
    done = subprocess.run(program, cwd=SCRIPT.parent, env=environment(), capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert (run / "checkpoint-20").is_dir()
    assert not (run / "checkpoint-20" / STATE_FILE).exists(), "half a file must not pass for a whole one"
    with pytest.raises(FileNotFoundError, match="Resume from an earlier checkpoint"):
        train(bert, run, resume=True)
    whole = train(bert, tmp_path / "whole")
    assert_resumed(whole, train(bert, run, resume=str(run / "checkpoint-10")), 10)


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)}


# What is saved


def test_the_state_of_a_wrapped_loss_and_of_a_dict_is_saved(tmp_path: Path) -> None:
    wrapped = MatryoshkaLoss(stub := StubModel(8), ClusterNSLoss(stub, 3), [8, 4])
    plain = ClusterNSLoss(StubModel(8), 3)
    wrapped.loss.clusters.seed(torch.randn(3, 8))
    save_state(wrapped, tmp_path / "one")
    load_state(plain, tmp_path / "one")
    assert torch.equal(plain.clusters.centroids, wrapped.loss.clusters.centroids)

    both: dict[str, nn.Module] = {"a": wrapped, "b": ClusterNSLoss(StubModel(8), 5), "c": nn.Identity()}
    both["b"].clusters.seed(torch.randn(5, 8))
    save_state(both, tmp_path / "two")
    fresh: dict[str, nn.Module] = {"a": ClusterNSLoss(StubModel(8), 3), "b": ClusterNSLoss(StubModel(8), 5)}
    load_state(fresh, tmp_path / "two")
    assert torch.equal(fresh["a"].clusters.centroids, wrapped.loss.clusters.centroids)
    assert torch.equal(fresh["b"].clusters.centroids, both["b"].clusters.centroids)


def test_the_state_lies_in_the_checkpoint_of_a_trial(tmp_path: Path) -> None:
    """A hyperparameter search writes its checkpoints one folder deeper."""
    from transformers import TrainerControl, TrainerState

    folder = tmp_path / "run-0" / "checkpoint-3"
    folder.mkdir(parents=True)
    args = SentenceTransformerTrainingArguments(str(tmp_path), use_cpu=True)
    ClusterStateCallback(ClusterNSLoss(StubModel(8), 3)).on_save(args, TrainerState(global_step=3), TrainerControl())
    assert (folder / STATE_FILE).is_file()


def test_a_loss_without_clusters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"There is no ClusterNSLoss in the loss \(Identity\)"):
        ClusterStateCallback(nn.Identity())


# Re-clustering


def train_with_reclustering(bert: Path, output: Path, *, stop_after: int = 0, resume: bool = False) -> dict[str, Any]:
    """Batches follow the clusters (the sampler's ids), which follow the model once an epoch."""
    sentences = make_sentences(ROWS)
    model = load_model(bert)
    corpus = cluster_corpus(model.encode(sentences), 4)
    loss = CachedClusterNSLoss(model, clusters=corpus, momentum=0.1, min_trust=0.0, mini_batch_size=3)
    ids = corpus.ids.copy()
    seen: list[float] = []
    loss.register_forward_hook(lambda module, inputs, parts: seen.append(float(parts.total().detach())))
    args = SentenceTransformerTrainingArguments(
        str(output),
        num_train_epochs=3,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        batch_sampler=partial(ClusterBatchSampler, ids=ids, group_size=4),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
    )
    recluster = ReclusterCallback(loss, sentences, ids)
    callbacks = [recluster, ClusterStateCallback(loss), StopAfter(stop_after)]
    trainer = SentenceTransformerTrainer(
        model, args, Dataset.from_dict({"text": sentences}), loss=loss, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": model.state_dict(),
        "state": loss.clusters.state_dict(),
        "rows": torch.tensor(ids),
        "values": seen,
        "log": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "first": corpus,
        "last": recluster.corpus,
    }


@pytest.mark.parametrize("step", [5, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 5, 2 * STEPS_AN_EPOCH + 9])
def test_reclustering_resumes_bit_for_bit(bert: Path, tmp_path: Path, step: int) -> None:
    """Neither clustered anew in mid-epoch, nor sampled by the clusters of the beginning."""
    whole = train_with_reclustering(bert, tmp_path / "whole")
    assert not np.array_equal(whole["first"].ids, whole["last"].ids), "a canary: the clusters must have changed"
    assert np.array_equal(whole["rows"], whole["last"].ids), "and the sampler must have seen it"
    train_with_reclustering(bert, tmp_path / "stopped", stop_after=step)
    resumed = train_with_reclustering(bert, tmp_path / "stopped", resume=True)
    assert_resumed(whole, resumed, step)
    for part in ("ids", "centroids", "trust"):
        np.testing.assert_array_equal(getattr(resumed["last"], part), getattr(whole["last"], part))


def test_reclustering_refuses_a_file_of_another_corpus(tmp_path: Path) -> None:
    def callback(rows: int) -> ReclusterCallback:
        corpus = CorpusClusters(np.arange(rows) % 3, np.ones((3, 8), np.float32), np.ones(3, np.float32))
        return ReclusterCallback(ClusterNSLoss(StubModel(8), clusters=corpus), ["text"] * rows)

    callback(10).write(tmp_path / CORPUS_FILE)
    callback(10).read(tmp_path / CORPUS_FILE)
    with pytest.raises(ValueError, match="holds 3 clusters of 10 sentences, but there are 3 clusters and 12 sentences"):
        callback(12).read(tmp_path / CORPUS_FILE)


def test_models_of_the_tests_have_dropout(bert: Path) -> None:
    """A canary: without it, the random state would not be tested."""
    model: SentenceTransformer = load_model(bert)
    model.train()
    features = model.preprocess(["w1 w2"])
    assert not torch.equal(*(model(dict(features))["sentence_embedding"] for _ in range(2)))
