"""The table of faults: what comes in broken, or breaks on the way, is told and spoils nothing.

| Fault | What happens |
|---|---|
| embeddings of a wrong dimension | `ValueError`; the state is untouched |
| NaN or Inf in one row | `ValueError` that names the row, on all processes; the state is untouched |
| a batch of one row | the loss is plain contrastive learning's |
| a batch of duplicates, or of one cluster, or of zeros | loss, gradients and centroids stay finite |
| clusters without members, for thousands of steps | they stay where they are, to the last bit |
| more clusters than the corpus has room for | `ValueError` that says how many fit |
| labels of a wrong length, shape, type or value | `ValueError`; the state is untouched |
| a rank that disagrees about K or the batch | `ValueError` on every rank |
| a checkpoint of other clusters or another model | `ValueError`, before anything is changed |
| a full disk | `OSError`; nothing half-written remains, and the checkpoint before resumes |
| an interrupt or a kill at any phase | the same command goes on, to the same bits |
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import SENTENCES, STEPS, cli, save_corpus, save_model, train_words
from conftest import StubModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from test_cached import IndexedStub
from tiny_bert import DIMENSION, load_model, make_sentences, save_bert
from torch import Tensor, nn
from train_script import train
from two_processes import TwoProcesses

from st_clusterns import (
    CachedClusterNSLoss,
    ClusterDataLoader,
    ClusterNSLoss,
    ClusterStateCallback,
    CorpusClusters,
    callbacks,
    cluster_corpus,
    embeddings,
    training,
)
from st_clusterns.callbacks import STATE_FILE, load_state, save_state
from st_clusterns.presets import PUBLISHED, RECOMMENDED, Choices
from st_clusterns.sentences import check_sentences

# accelerate warns about pinned memory where there is no GPU; nothing of ours decides it
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")

K, D, ROWS = 4, 8, 6
LOSSES = [ClusterNSLoss, CachedClusterNSLoss]
CHOICES = pytest.mark.parametrize("choices", [PUBLISHED, RECOMMENDED], ids=["published", "recommended"])
BOTH = pytest.mark.parametrize("loss_class", LOSSES)


def corpus(dimension: int = D) -> CorpusClusters:
    centroids = 0.1 * np.random.default_rng(0).normal(size=(K, dimension)).astype(np.float32)  # loose: any pair counts
    return CorpusClusters(np.arange(3 * K) % K, centroids, np.ones(K, dtype=np.float32))


def make(loss_class: type[ClusterNSLoss], started: bool = True, **settings: Any) -> ClusterNSLoss:
    cached = {"mini_batch_size": 4} if loss_class is CachedClusterNSLoss else {}
    loss = loss_class(IndexedStub(D), K, **{"momentum": 0.5, "min_trust": 0.0, **cached, **settings})
    if started:
        loss.clusters.seed(torch.as_tensor(corpus().centroids))
    return loss


def views(rows: int = ROWS, columns: int = 2) -> list[Tensor]:
    return [torch.randn(rows, D) for _ in range(columns)]


def step(loss: ClusterNSLoss, columns: list[Tensor], labels: Tensor | None = None) -> Tensor:
    """Forward and backward as a training step does them; return the total."""
    loss.model.zero_grad()
    parts = loss([{"embedding": column} for column in columns], labels)
    parts.backward()
    return parts.total().detach()


def state_of(loss: ClusterNSLoss) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loss.named_buffers()}


@contextmanager
def refused_untouched(loss: ClusterNSLoss, message: str) -> Iterator[None]:
    """The message comes, the state stays, and the next good batch is trained on."""
    before = state_of(loss)
    with pytest.raises(ValueError, match=message):
        yield
    for name, value in loss.named_buffers():
        assert torch.equal(value, before[name]), name
    assert step(loss, views()).isfinite()


# A wrong dimension


@BOTH
@pytest.mark.parametrize("started", [True, False])
def test_a_wrong_dimension(loss_class: type[ClusterNSLoss], started: bool) -> None:
    """Rows wider than the model has said. (Narrower ones are Matryoshka's.)"""
    loss = make(loss_class, started)
    weight = loss.model.weight
    with refused_untouched(loss, r"embeddings have 9 dimensions, the clusters 8\. A model with truncate_dim"):
        try:
            loss.model.weight = nn.Parameter(torch.eye(D, D + 1))
            step(loss, views())
        finally:
            loss.model.weight = weight


def test_a_model_that_truncates_its_output_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = load_model(save_bert(tmp_path))
    model.truncate_dim = DIMENSION // 2
    features = [model.preprocess(make_sentences(4))]
    with pytest.raises(ValueError, match=r"set model\.truncate_dim = None before training"):
        ClusterNSLoss(model, K)(features)
    model.truncate_dim = None
    assert ClusterNSLoss(model, K)(features).total().isfinite()


def test_a_corpus_of_another_dimension() -> None:
    with pytest.raises(ValueError, match=r"centroids must have the shape \(4, 8\) .*got \(4, 9\)"):
        ClusterNSLoss(StubModel(D), clusters=corpus(D + 1))


# NaN or Inf


@given(
    st.sampled_from(LOSSES),
    st.booleans(),
    st.integers(0, 1),
    st.integers(0, ROWS - 1),
    st.integers(0, D - 1),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]),
)
def test_a_row_of_nan_or_inf_is_named(
    loss_class: type[ClusterNSLoss], started: bool, column: int, row: int, dimension: int, value: float
) -> None:
    loss, columns = make(loss_class, started), views()
    columns[column][row, dimension] = value
    with refused_untouched(loss, rf"NaN or Inf in row {row} \(1 of {ROWS} rows\)"):
        step(loss, columns)


@pytest.mark.parametrize("started", [True, False])
def test_a_row_of_nan_is_named_by_the_published_method(started: bool) -> None:
    loss, columns = make(ClusterNSLoss, started, choices=PUBLISHED), views()
    columns[0][3] = torch.nan
    with refused_untouched(loss, r"NaN or Inf in row 3 \(1 of 6 rows\)"):
        step(loss, columns)


def test_nan_in_a_corpus() -> None:
    rows = np.random.default_rng(0).normal(size=(20, D))
    rows[7, 3] = np.nan
    with pytest.raises(ValueError, match=r"NaN or Inf in row 7 \(1 of 20 rows\): is the model broken"):
        cluster_corpus(rows, 2)


# Batches with little in them


@BOTH
@pytest.mark.parametrize("n_columns", [2, 3])
def test_a_batch_of_one_row_is_mnrls(loss_class: type[ClusterNSLoss], n_columns: int) -> None:
    """The last batch of an epoch may be one row; it has nothing to tell, and stops no training."""
    columns = views(1, n_columns)
    loss = make(loss_class, temperature=0.05)
    baseline = MultipleNegativesRankingLoss(loss.model, scale=20)([{"embedding": column} for column in columns], None)
    torch.testing.assert_close(step(loss, columns), baseline.detach())


@BOTH
def test_batches_of_one_row_are_enough_to_start(loss_class: type[ClusterNSLoss]) -> None:
    loss = make(loss_class, started=False, start_similarity=1.0)
    for _ in range(loss.start.needed):
        assert not loss.clusters.started
        assert step(loss, views(1)).isfinite()
    assert loss.clusters.started


DEGENERATE: dict[str, Callable[[], Tensor]] = {
    "all duplicates": lambda: torch.randn(1, D).repeat(ROWS, 1),
    "every row in one cluster": lambda: torch.as_tensor(corpus().centroids[:1]) + 0.001 * torch.randn(ROWS, D),
    "two opposite points": lambda: torch.cat([torch.ones(3, D), -torch.ones(3, D)]),
    "zeros": lambda: torch.zeros(ROWS, D),
    "huge": lambda: 1e18 * torch.randn(ROWS, D),
    "tiny": lambda: 1e-18 * torch.randn(ROWS, D),
}


@BOTH
@CHOICES
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "masked"])
@pytest.mark.parametrize("started", [True, False])
def test_degenerate_batches_stay_finite(
    loss_class: type[ClusterNSLoss], choices: Choices, kind: str, keep: bool, started: bool
) -> None:
    """From before the start on as well: after two batches clusters start, whatever the rows look like."""
    loss = make(
        loss_class,
        started,
        momentum=1.0,
        choices=replace(choices, keep_false_negatives=keep),
        hard_negative_weight=1.0,
        margin_weight=6.0,
        margin_beta=0.1,
    )
    loss.start.similarity, loss.start.needed = 2.0, 2 * K
    loss.start.rows = torch.zeros(2, 2 * K, D)
    loss.model.weight.data = torch.eye(D)
    for _ in range(4):
        rows = DEGENERATE[kind]()
        assert step(loss, [rows, rows.clone()]).isfinite()
        assert loss.model.weight.grad.isfinite().all()
        assert loss.clusters.centroids.isfinite().all()
    assert loss.clusters.started


def test_every_row_in_one_cluster_is_a_false_negative_of_every_other() -> None:
    loss = make(ClusterNSLoss, margin_beta=0.1)
    loss.model.weight.data = torch.eye(D)
    rows = DEGENERATE["every row in one cluster"]()
    assert loss.clusters.predict(rows).tolist() == [0] * ROWS
    parts = loss([{"embedding": rows}, {"embedding": -rows}])
    assert parts["false_negative"] > 0


def test_a_corpus_of_few_different_sentences_is_clustered() -> None:
    """Fewer different rows than clusters: some clusters stay empty, and no warning comes."""
    rows = np.repeat(np.eye(3, D), 10, axis=0)
    clusters = cluster_corpus(rows, 6)
    assert np.count_nonzero(clusters.sizes) == 3
    assert np.isfinite(clusters.centroids).all()
    assert ((clusters.trust >= 0) & (clusters.trust <= 1)).all()
    assert not clusters.trust[clusters.sizes == 0].any()


# Clusters without members


@CHOICES
def test_clusters_without_members_wait_for_thousands_of_steps(choices: Choices) -> None:
    """They stay where they are to the last bit, neither moved nor given to other rows.

    A centroid follows members and there are none; and its number is the label of sentences, so that seeding it anew
    from other rows, as online k-means often does, would put wrong sentences into one cluster. The price: a cluster
    that all its rows have left stays unused. It serves again as soon as a row comes near, or when a re-clustering
    (`ReclusterCallback`) finds new members for it.
    """
    loss = make(ClusterNSLoss, choices=choices, momentum=0.1)
    clusters = loss.clusters
    before = state_of(loss)
    direction = clusters.centroids[1].clone()
    for _ in range(3000):
        clusters.partial_fit(direction + 0.01 * torch.randn(ROWS, D))
    moved = (clusters.centroids != before["clusters.centroids"]).any(dim=1)
    assert moved.tolist() == [False, True, False, False]
    assert torch.equal(clusters.trust, before["clusters.trust"])
    assert clusters.centroids.isfinite().all()
    assert step(loss, views()).isfinite()
    assert clusters.predict(before["clusters.centroids"]).tolist() == list(range(K)), "they can be found again"


# More clusters than sentences


@pytest.mark.parametrize(
    ("rows", "n_clusters", "message"),
    [
        (20, 11, "n_clusters=11 does not fit 20 sentences: choose 2 to 10"),
        (20, 21, "n_clusters=21 does not fit 20 sentences: choose 2 to 10"),
        (5, 3, "n_clusters=3 does not fit 5 sentences: choose 2 to 2"),
    ],
)
def test_more_clusters_than_the_corpus_has_room_for(rows: int, n_clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_corpus(np.random.default_rng(0).normal(size=(rows, D)), n_clusters)


def test_more_clusters_than_sentences_are_told_before_anything_is_embedded(tmp_path: Path) -> None:
    message = "n_clusters=11 does not fit 20 sentences, two or more a cluster: choose 10 or fewer"
    with pytest.raises(ValueError, match=message):
        check_sentences(make_sentences(20), 4, 11)
    with pytest.raises(ValueError, match=message):
        ClusterDataLoader(make_sentences(20), None, batch_size=4, n_clusters=11)
    code, text = cli(*train_words(save_corpus(tmp_path), "no model", tmp_path / "out", "--n-clusters", 300))
    assert (code, "n_clusters=300 does not fit" in text) == (2, True), text
    assert not training.work_folder(tmp_path / "out").exists()


@BOTH
def test_more_clusters_than_a_batch_has_rows_are_fine(loss_class: type[ClusterNSLoss]) -> None:
    loss = make(loss_class)
    for rows in (1, K - 1):
        assert step(loss, views(rows)).isfinite()


# Labels


@BOTH
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1, 2, 3, 4, 1]), r"one cluster number a row, of the shape \(6,\), got \(5,\)"),
        (torch.tensor([1, 2, 3, 4, 1, 1, 1]), r"of the shape \(6,\), got \(7,\)"),
        (torch.tensor([]), r"of the shape \(6,\), got \(0,\)"),
        (torch.tensor(1), r"of the shape \(6,\), got \(\)"),
        (torch.ones(6, 1, dtype=torch.long), r"of the shape \(6,\), got \(6, 1\)"),
        (torch.tensor([1, 2, K + 1, 1, 1, 1]), f"from 1 to {K} .*from 1 to {K + 1}"),
        (torch.tensor([1, 2, -1, 1, 1, 1]), f"from 1 to {K} .*from -1 to 2"),
        (torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 1.0]), r"whole cluster numbers.*float32"),
        (torch.tensor([True, False] * 3), r"whole cluster numbers.*torch.bool values from False to True"),
    ],
    ids=["short", "long", "empty", "scalar", "column", "too large", "negative", "float", "bool"],
)
def test_labels_that_number_no_cluster(loss_class: type[ClusterNSLoss], labels: Tensor, message: str) -> None:
    loss = loss_class(IndexedStub(D), clusters=corpus(), momentum=0.5)
    with refused_untouched(loss, message):
        step(loss, views(), labels)


# Processes that disagree


def one_step(rank: int, rows: list[int], clusters: list[int], gather: bool = False, nan_on: int = -1) -> Any:
    torch.manual_seed(0)
    settings = {"start_similarity": 1.0, "gather_across_devices": gather}
    loss = ClusterNSLoss(IndexedStub(D), clusters[rank], momentum=0.5, **settings)
    columns = views(rows[rank])
    if rank == nan_on:
        columns[0][2] = torch.nan
    step(loss, columns)
    return loss.start.rows


@pytest.mark.slow
@pytest.mark.parametrize("gather", [False, True])
def test_ranks_with_unequal_batches_are_refused_on_both(pair: TwoProcesses, gather: bool) -> None:
    for text in pair.run(one_step, [6, 5], [3, 3], gather):
        assert "ValueError: The number of rows of a batch differs between the processes: [6, 5]" in text
        assert "dataloader_drop_last=True" in text
    for result in pair.run(one_step, [6, 6], [3, 3], gather):
        assert isinstance(result, Tensor), "the processes must still be in step afterwards"


@pytest.mark.slow
def test_a_rank_that_disagrees_about_k_is_refused_on_both(pair: TwoProcesses) -> None:
    for text in pair.run(one_step, [6, 6], [3, 4]):
        assert "ValueError: n_clusters differs between the processes: [3, 4]" in text


@pytest.mark.slow
def test_nan_on_one_rank_is_refused_on_both(pair: TwoProcesses) -> None:
    """Rows are counted over the processes: row 2 of rank 1 is row 8."""
    for text in pair.run(one_step, [6, 6], [3, 3], False, 1):
        assert "NaN or Inf in row 8 (1 of 12 rows)" in text


# Checkpoints of something else


@pytest.mark.parametrize(("clusters", "dimension"), [(K + 1, D), (K, D + 1)], ids=["another K", "another model"])
def test_a_checkpoint_of_other_clusters(clusters: int, dimension: int, tmp_path: Path) -> None:
    other = ClusterNSLoss(StubModel(dimension), clusters)
    other.clusters.seed(torch.randn(clusters, dimension))
    save_state(other, tmp_path / STATE_FILE)
    loss = make(ClusterNSLoss)
    shapes = rf"{STATE_FILE} holds the state of other clusters.*\({clusters}, {dimension}\).* instead of .*\({K}, {D}\)"
    with refused_untouched(loss, shapes):
        load_state(loss, tmp_path / STATE_FILE)


@pytest.mark.slow
def test_training_does_not_go_on_with_other_clusters(tmp_path: Path) -> None:
    bert = save_bert(tmp_path / "bert")
    train(bert, tmp_path / "run", stop_after=3)
    with pytest.raises(ValueError, match=r"other clusters than the loss's: .*\(4, 32\).* instead of .*\(5, 32\)"):
        train(bert, tmp_path / "run", resume=True, n_clusters=5)


# A full disk


def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write some, then fail as the library does."""
    path.write_bytes(b"half of it")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_leaves_no_half_of_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = make(ClusterNSLoss)
    save_state(loss, tmp_path / STATE_FILE)
    before = (tmp_path / STATE_FILE).read_bytes()
    step(loss, views())
    monkeypatch.setattr(callbacks, "save_file", full)
    with pytest.raises(OSError, match=r"could not be written .*No space left on device.*the one before it is. Make"):
        save_state(loss, tmp_path / STATE_FILE)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    assert (tmp_path / STATE_FILE).read_bytes() == before, "the file before stays whole"


@pytest.mark.slow
def test_after_a_full_disk_the_checkpoint_before_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert = save_bert(tmp_path / "bert")
    whole = train(bert, tmp_path / "whole")
    run, every_ten = tmp_path / "run", {"save_strategy": "steps", "save_steps": 10}
    save_file = callbacks.save_file
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "save_file", lambda *a, **k: (full if "-20" in str(a[1]) else save_file)(*a, **k))
        with pytest.raises(OSError, match=r"checkpoint-20.*could not be written"):
            train(bert, run, train_settings=every_ten)
    resumed = train(bert, run, resume=str(run / "checkpoint-10"))
    assert resumed["values"] == whole["values"][10:]


LIMITED = """
import resource, sys
from command_line import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
code, text = cli(*sys.argv[2:])
print(text)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (20_000, "a file could not be read or written: .* What was finished is kept .* the same command goes on"),
        (60_000, "a file could not be read or written: .* What was finished is kept .* the same command goes on"),
        (150_000, "Stopped by an error. What was finished is kept .* the same command goes on"),  # torch's own words
    ],
    ids=["embeddings", "model", "optimizer"],
)
def test_the_command_after_a_write_error_goes_on(
    size: int, expected: str, straight: Path, model_path: str, tmp_path: Path
) -> None:
    """The system refuses files above a size: at which phase depends on the size."""
    words = [str(word) for word in train_words(save_corpus(tmp_path), model_path, tmp_path / "out")]
    done = run_python(LIMITED, str(size), *words)
    assert done.returncode != 0
    assert_matches(expected, done.stdout)
    assert not (tmp_path / "out").exists()
    assert cli(*words)[0] == 0
    assert_same_result(tmp_path / "out", straight)


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True)


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, " ".join(text.split())), text[-2000:]


# An interrupt at any phase of the command


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def _quick_picture() -> Iterator[None]:
    """The maps take longer than all else, and have nothing to do with what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw_report", lambda *args: args[-1].write_bytes(b"a picture"))
        yield


@pytest.fixture(scope="module")
def straight(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a command that nothing has stopped."""
    folder = tmp_path_factory.mktemp("straight")
    code, text = cli(*train_words(save_corpus(folder), model_path, folder / "out"))
    assert code == 0, text
    return folder / "out"


def assert_same_result(ours: Path, theirs: Path) -> None:
    """The same weights and the same clusters, to the last bit, and nothing unfinished beside them."""
    for name in ("model.safetensors", STATE_FILE):
        one, other = load_file(ours / name), load_file(theirs / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in other), name
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    assert not training.work_folder(ours).exists()


def interrupt(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int = 1) -> None:
    """Let the interrupt come at the given call of a function, before it does anything."""
    calls = 0
    original = getattr(owner, name)

    def stand_in(*args: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*args, **settings)

    patch.setattr(owner, name, stand_in)


PHASES: dict[str, tuple[Any, str, int]] = {
    "writing the settings": (training, "write_json", 1),
    "embedding": (training, "embed_corpus", 1),
    "keeping the embeddings": (embeddings, "_append", 2),  # the rows are written, their note is not
    "clustering": (training, "cluster_corpus", 1),
    "the first step": (ClusterNSLoss, "forward", 1),
    "a later step": (ClusterNSLoss, "forward", STEPS - 1),
    "a checkpoint, before the state": (ClusterStateCallback, "on_save", 2),
    "the last step": (ClusterStateCallback, "on_train_end", 1),
    "the final embedding": (training, "embed_corpus", 2),
    "saving the model": (SentenceTransformer, "save", 1),
    "saving the state": (training, "save_state", 1),
    "writing the report": (training, "write_json", 2),
    "drawing the report": (training, "draw_report", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupt_is_followed_by_the_same_command(
    phase: str, straight: Path, model_path: str, tmp_path: Path
) -> None:
    words = train_words(save_corpus(tmp_path), model_path, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, *PHASES[phase])
        code, text = cli(*words)
    assert code == 130, text
    assert_matches(
        "Interrupted. (What was finished is kept in .*: the same command goes on|Nothing was finished)", text
    )
    assert not (tmp_path / "out").exists()
    code, text = cli(*words)
    assert code == 0, text
    assert_same_result(tmp_path / "out", straight)


@pytest.mark.slow
def test_an_interrupt_after_all_is_done_says_so(straight: Path, model_path: str, tmp_path: Path) -> None:
    words = train_words(save_corpus(tmp_path), model_path, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        rmtree, work = shutil.rmtree, training.work_folder(tmp_path / "out")

        def interrupted(path: Path, *args: Any, **settings: Any) -> None:
            if path == work:
                raise KeyboardInterrupt
            rmtree(path, *args, **settings)

        patch.setattr(shutil, "rmtree", interrupted)
        code, text = cli(*words)
    assert_matches(r"Interrupted. .*out is finished\.", text)
    assert code == 130
    code, text = cli(*words)
    assert code == 2
    assert "exists already" in text
    shutil.rmtree(work)
    assert_same_result(tmp_path / "out", straight)


@pytest.mark.slow
def test_an_interrupted_run_is_not_gone_on_with_by_other_settings(
    straight: Path, model_path: str, tmp_path: Path
) -> None:
    words = train_words(save_corpus(tmp_path), model_path, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, training, "cluster_corpus")
        assert cli(*words)[0] == 130
    for change in (["--seed", 1], ["--batch-size", 16], ["--n-clusters", 9]):
        code, text = cli(*words, *change)
        assert code == 2
        assert_matches(f"interrupted run with other settings .{change[0][2:].replace('-', '_')}.: repeat its", text)
    (tmp_path / "corpus.txt").write_text("\n".join(reversed(SENTENCES)))
    code, text = cli(*words)
    assert_matches("other settings .corpus.: repeat its command to go on with it, or remove the folder", text)


KILLED = """
import os, signal, sys
from command_line import cli
from st_clusterns import ClusterNSLoss

forward, calls = ClusterNSLoss.forward, []

def die_at_the_third(*args, **settings):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*args, **settings)

ClusterNSLoss.forward = die_at_the_third
cli(*sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_command_is_followed_by_the_same_one(straight: Path, model_path: str, tmp_path: Path) -> None:
    """Nobody is told, nothing is tidied up: and still the same command goes on."""
    words = [str(word) for word in train_words(save_corpus(tmp_path), model_path, tmp_path / "out")]
    done = run_python(KILLED, *words)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        forward = ClusterNSLoss.forward
        patch.setattr(ClusterNSLoss, "forward", lambda *args: (steps.append(1), forward(*args))[1])
        assert cli(*words)[0] == 0
    assert len(steps) == STEPS - 2, "it must have gone on, not begun anew"
    assert_same_result(tmp_path / "out", straight)
