"""Training that is stopped and resumed is training that was never stopped, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import StubModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from tiny_bert import load_model, make_sentences
from torch import Tensor, nn
from train_script import CLUSTERS, ROWS, START, STEPS_AN_EPOCH, train
from transformers import TrainerControl, TrainerState
from two_processes import launch

from st_clusterns import CachedClusterNSLoss, ClusterNSLoss, ClusterStateCallback, CorpusClusters
from st_clusterns.losses.published import PublishedClusterNSLoss
from st_clusterns.training import callbacks
from st_clusterns.training.callbacks import STATE_FILE, load_state, save_state
from st_clusterns.training.trainer import last_checkpoint

SCRIPT = Path(__file__).with_name("train_script.py")
LOSSES = [ClusterNSLoss, CachedClusterNSLoss]

slow = pytest.mark.slow
both_methods = pytest.mark.parametrize("method", ["default", "published"])


def test_the_last_whole_checkpoint_is_that_of_the_most_steps(tmp_path: Path) -> None:
    """By number, not by name; one whose state was not written yet does not count."""
    assert last_checkpoint(tmp_path) is None
    for step in (5, 9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 11:
            (tmp_path / f"checkpoint-{step}" / STATE_FILE).touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def assert_resumed(whole: dict[str, Any], resumed: dict[str, Any], step: int) -> None:
    """Everything after `step` is as in the run that was never stopped."""
    assert 0 < len(resumed["values"]) == len(whole["values"]) - step, "training must have gone on, not begun anew"
    assert resumed["values"] == whole["values"][step:]
    assert resumed["log"] == whole["log"]
    for part in ("weights", "state"):
        assert resumed[part].keys() == whole[part].keys()
        for name, value in whole[part].items():
            assert torch.equal(resumed[part][name], value), name


def assert_clusters_in_play(result: dict[str, Any]) -> None:
    assert result["settings"].get("has_topics") or result["state"]["centroids._extra_state"][0] == 1


@slow
@pytest.mark.parametrize(
    ("method", "loss", "sampler", "step"),
    [
        ("published", "plain", "default", START - 1),  # while rows are collected for the start
        ("published", "plain", "clusters", 20),  # after the start, within epoch 1
        ("published", "plain", "clusters", 2 * STEPS_AN_EPOCH),  # between two epochs
        ("published", "cached", "default", 20),
        ("published", "cached", "clusters", 31),
        ("default", "plain", "default", 20),
        ("default", "plain", "clusters", STEPS_AN_EPOCH),
        ("default", "cached", "clusters", 20),
    ],
)
def test_fresh_objects_resume_bit_for_bit(
    bert: Path, tmp_path: Path, method: str, loss: str, sampler: str, step: int
) -> None:
    run: dict[str, Any] = {"method": method, "loss": loss, "sampler": sampler}
    whole = train(bert, tmp_path / "whole", **run)
    assert_clusters_in_play(whole)
    stopped = train(bert, tmp_path / "stopped", stop_after=step, **run)
    assert len(stopped["values"]) == step
    torch.manual_seed(12345)
    assert_resumed(whole, train(bert, tmp_path / "stopped", resume=True, **run), step)


@slow
@pytest.mark.parametrize("step", [START - 1, 20])
def test_without_the_state_file_a_resumed_run_differs(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A canary: it is the state file that makes the runs equal."""
    whole = train(bert, tmp_path / "whole")
    train(bert, tmp_path / "stopped", stop_after=step)
    monkeypatch.setattr(callbacks, "load_state", lambda *args: None)
    resumed = train(bert, tmp_path / "stopped", resume=True)
    assert resumed["values"] != whole["values"][step:]


@slow
@both_methods
def test_gradient_accumulation_resumes(bert: Path, tmp_path: Path, method: str) -> None:
    run: dict[str, Any] = {
        "method": method,
        "train_settings": {"gradient_accumulation_steps": 2},
        "sampler": "clusters",
    }
    whole = train(bert, tmp_path / "whole", **run)
    train(bert, tmp_path / "stopped", stop_after=8, **run)
    assert_resumed(whole, train(bert, tmp_path / "stopped", resume=True, **run), 16)


@slow
@both_methods
def test_bf16_autocast_resumes(bert: Path, tmp_path: Path, method: str) -> None:
    run: dict[str, Any] = {"method": method, "train_settings": {"bf16": True}}
    whole = train(bert, tmp_path / "whole", **run)
    train(bert, tmp_path / "stopped", stop_after=20, **run)
    assert_resumed(whole, train(bert, tmp_path / "stopped", resume=True, **run), 20)


@slow
@both_methods
def test_a_fresh_process_resumes_bit_for_bit(bert: Path, tmp_path: Path, method: str) -> None:
    """The default loss clusters the corpus again there, to the same clusters."""
    run = {"method": method, "sampler": "clusters"}
    whole = train(bert, tmp_path / "whole", **run)
    train(bert, tmp_path / "stopped", stop_after=20, **run)
    settings = json.dumps({**run, "resume": True})
    subprocess.run([sys.executable, SCRIPT, bert, tmp_path / "stopped", settings], check=True, capture_output=True)
    assert_resumed(whole, torch.load(tmp_path / "stopped" / "result-0.pt"), 20)


@slow
@both_methods
def test_two_processes_resume_bit_for_bit(bert: Path, tmp_path: Path, method: str) -> None:
    """In epoch 1: the trainer itself would replay the order of epoch 0."""
    for name, settings in (("whole", {}), ("stopped", {"stop_after": 20}), ("stopped", {"resume": True})):
        (tmp_path / name).mkdir(exist_ok=True)
        run = json.dumps({"method": method, "sampler": "clusters", **settings})
        launch(SCRIPT, str(bert), str(tmp_path / name), run)
    for rank in range(2):
        whole, resumed = (torch.load(tmp_path / name / f"result-{rank}.pt") for name in ("whole", "stopped"))
        resumed["log"] = whole["log"] if rank else resumed["log"]  # only rank 0 keeps one
        assert_resumed(whole, resumed, 20)
        assert_clusters_in_play(whole)


# Other clusters, other settings


@slow
@pytest.mark.parametrize(
    "other",
    [
        {"n_clusters": CLUSTERS["default"] + 1},
        {"clusters": {"seed": 1}},
        {"clusters": {"sentences": make_sentences(ROWS)[::-1]}},
        {"clusters": {"sentences": make_sentences(ROWS)[:-1]}},
    ],
    ids=["n_clusters", "seed", "order", "a sentence less"],
)
@pytest.mark.parametrize("loss", ["plain", "cached"])
def test_training_does_not_go_on_with_other_clusters(
    bert: Path, tmp_path: Path, loss: str, other: dict[str, Any]
) -> None:
    run = {"method": "default", "loss": loss}
    train(bert, tmp_path, stop_after=3, **run)
    message = r"was written by a run with other clusters: the corpus, its order, the model or the seed differ"
    with pytest.raises(ValueError, match=message):
        train(bert, tmp_path, resume=True, **run, **other)
    train(bert, tmp_path, resume=True, stop_after=4, **run)


@slow
@pytest.mark.parametrize("loss", ["plain", "cached"])
def test_training_does_not_go_on_with_another_number_of_published_centroids(
    bert: Path, tmp_path: Path, loss: str
) -> None:
    train(bert, tmp_path, stop_after=3, loss=loss)
    message = r"holds the state of another loss: .*\(24, 32\).* instead of .*\(5, 32\).*n_clusters, model, preset"
    with pytest.raises(ValueError, match=message):
        train(bert, tmp_path, resume=True, n_clusters=5, loss=loss)


@slow
@pytest.mark.parametrize(("one", "other"), [("default", "published"), ("published", "default")])
def test_training_does_not_go_on_with_the_other_method(bert: Path, tmp_path: Path, one: str, other: str) -> None:
    train(bert, tmp_path, stop_after=3, method=one)
    with pytest.raises(ValueError, match="was written by a run with other clusters"):
        train(bert, tmp_path, resume=True, method=other)


@pytest.mark.parametrize("name", ["cached", "plain"])
def test_what_is_refused_changes_nothing(tmp_path: Path, name: str) -> None:
    loss_class = LOSSES[name == "cached"]
    save_state(published(4), tmp_path / "state")
    loss = published(3, loss_class)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    with pytest.raises(ValueError, match=r"\(4, 8\).* instead of .*\(3, 8\)"):
        load_state(loss, tmp_path / "state")
    for key, value in loss.state_dict().items():
        assert torch.equal(value, before[key]), key


def corpus(n_clusters: int = 3, seed: int = 0, order: int = 1, width: int = 8) -> CorpusClusters:
    """Fit clusters of 24 sentences."""
    rows = np.random.default_rng(0).normal(size=(24, width))
    sentences = [f"sentence {i}" for i in range(24)]
    return CorpusClusters.fit(
        sentences[::order], n_clusters=n_clusters, seed=seed, embeddings=rows[::order], show_progress_bar=False
    )


class LookedAt(StubModel):
    """A stub whose first module can be looked at, as the cached losses do."""

    def __getitem__(self, index: int) -> nn.Module:
        return self


def published(n_clusters: int, loss_class: type[ClusterNSLoss] = ClusterNSLoss, width: int = 8) -> Any:
    """A published loss with random centroids."""
    loss = loss_class.from_preset(LookedAt(width), "paper/bert-base", n_clusters=n_clusters)
    assert isinstance(loss, PublishedClusterNSLoss)
    loss.centroids.centroids.normal_()
    loss.centroids.started = True
    return loss


@pytest.mark.parametrize(
    "other", [{"n_clusters": 4}, {"seed": 1}, {"order": -1}, {"width": 9}], ids=lambda other: next(iter(other))
)
@pytest.mark.parametrize("loss_class", LOSSES)
def test_the_state_knows_its_clusters(loss_class: type[ClusterNSLoss], other: dict[str, int], tmp_path: Path) -> None:
    save_state(loss_class(LookedAt(8), corpus()), tmp_path / "state")
    load_state(loss_class(LookedAt(8), corpus()), tmp_path / "state")
    with pytest.raises(ValueError, match="was written by a run with other clusters"):
        load_state(loss_class(LookedAt(other.get("width", 8)), corpus(**other)), tmp_path / "state")


def test_a_cached_loss_goes_on_where_a_plain_one_stopped(tmp_path: Path) -> None:
    plain, cached = published(3), published(3, CachedClusterNSLoss)
    save_state(plain, tmp_path / "state")
    load_state(cached, tmp_path / "state")
    assert torch.equal(plain.centroids.centroids, cached.centroids.centroids)


# Where the checkpoint lies


@slow
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


@slow
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


@slow
def test_a_missing_file_is_told(bert: Path, checkpoint: Path) -> None:
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"{STATE_FILE} is missing, so training cannot go on"):
        train(bert, checkpoint.parent, resume=True)


@slow
@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_file_is_told(bert: Path, checkpoint: Path, size: int) -> None:
    whole = (checkpoint / STATE_FILE).read_bytes()
    (checkpoint / STATE_FILE).write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"is truncated or damaged .* Resume from an earlier checkpoint"):
        train(bert, checkpoint.parent, resume=True)


@slow
def test_a_foreign_file_is_told(bert: Path, checkpoint: Path) -> None:
    save_file({"centroids": torch.zeros(4, 32)}, checkpoint / STATE_FILE)
    with pytest.raises(ValueError, match=r"was not written by this version of st_clusterns"):
        train(bert, checkpoint.parent, resume=True)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import st_clusterns.training.callbacks as callbacks
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


@slow
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
    return {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)}


def full_disk(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write some, then fail as the library does."""
    path.write_bytes(b"half of it")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_disk_leaves_no_partial_file(is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = published(3)
    if is_there:
        save_state(loss, tmp_path / STATE_FILE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loss.centroids.centroids.normal_()
    monkeypatch.setattr(callbacks, "save_file", full_disk)
    with pytest.raises(OSError, match=r"could not be written .*No space left on device.*the one before it is. Make"):
        save_state(loss, tmp_path / STATE_FILE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# What is saved


def test_the_state_of_a_wrapped_loss_and_of_a_dict_is_saved(tmp_path: Path) -> None:
    inner = published(3)
    wrapped = MatryoshkaLoss(inner.model, inner, [8, 4])
    plain = published(3)
    save_state(wrapped, tmp_path / "one")
    load_state(plain, tmp_path / "one")
    assert torch.equal(plain.centroids.centroids, inner.centroids.centroids)

    five, default = published(5), ClusterNSLoss(StubModel(8), corpus())
    save_state({"a": wrapped, "b": five, "c": nn.Identity(), "d": default}, tmp_path / "two")
    fresh = {"a": published(3), "b": published(5), "d": ClusterNSLoss(StubModel(8), corpus())}
    load_state(fresh, tmp_path / "two")
    assert torch.equal(fresh["a"].centroids.centroids, inner.centroids.centroids)
    assert torch.equal(fresh["b"].centroids.centroids, five.centroids.centroids)
    with pytest.raises(ValueError, match="other clusters"):
        load_state({**fresh, "d": ClusterNSLoss(StubModel(8), corpus(seed=1))}, tmp_path / "two")


@pytest.mark.parametrize("started", [False, True])
def test_everything_of_the_published_state_is_saved(started: bool, tmp_path: Path) -> None:
    loss, fresh = published(3), published(3)
    fresh.centroids.reset()
    if not started:
        loss.centroids.reset()
        loss.centroids.rows.normal_()
        loss.centroids.n_rows, loss.centroids.n_waited = 2, 7
    save_state(loss, tmp_path / "state")
    load_state(fresh, tmp_path / "state")
    for name, value in loss.centroids.named_buffers():
        assert torch.equal(value, dict(fresh.centroids.named_buffers())[name]), name
    for name in ("started", "n_rows", "n_waited"):
        assert getattr(fresh.centroids, name) == getattr(loss.centroids, name), name


def test_the_model_is_not_saved_a_second_time(tmp_path: Path) -> None:
    model = StubModel(8)
    model.weight = nn.Parameter(torch.zeros(1000))
    loss = ClusterNSLoss.from_preset(model, "paper/bert-base", n_clusters=3)
    save_state(loss, tmp_path / "state")
    with safe_open(tmp_path / "state", framework="pt") as file:
        assert sorted(file.keys()) == ["centroids._extra_state", "centroids.centroids", "centroids.rows"]
        assert json.loads(file.metadata()["settings"])[""]["n_clusters"] == 3


def test_a_new_training_begins_with_centroids_that_know_nothing(tmp_path: Path) -> None:
    args = SentenceTransformerTrainingArguments(str(tmp_path), use_cpu=True)
    loss = published(3)
    ClusterStateCallback(loss).on_train_begin(args, TrainerState(global_step=0), TrainerControl())
    assert not loss.centroids.started
    assert not loss.centroids.centroids.any()


def test_the_state_lies_in_the_checkpoint_of_a_trial(tmp_path: Path) -> None:
    """A hyperparameter search writes its checkpoints one folder deeper."""
    folder = tmp_path / "run-0" / "checkpoint-3"
    folder.mkdir(parents=True)
    args = SentenceTransformerTrainingArguments(str(tmp_path), use_cpu=True)
    ClusterStateCallback(published(3)).on_save(args, TrainerState(global_step=3), TrainerControl())
    assert [path.name for path in folder.iterdir()] == [STATE_FILE]


def test_a_loss_without_clusters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"There is no ClusterNSLoss in the loss \(Identity\)"):
        ClusterStateCallback(nn.Identity())


def test_models_of_the_tests_have_dropout(bert: Path) -> None:
    """A canary: without it, the random state would not be tested."""
    model: SentenceTransformer = load_model(bert)
    model.train()
    features = model.preprocess(["w1 w2"])
    assert not torch.equal(*(model(dict(features))["sentence_embedding"] for _ in range(2)))
