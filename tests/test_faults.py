"""The table of faults: what comes in broken, or breaks on the way, is told and spoils nothing.

| Fault | What happens |
|---|---|
| clusters of another dimension than the model's, a model that truncates | `ValueError` when the loss is made |
| rows of another width than the model has said | an error of torch; the state is untouched |
| NaN or Inf in a corpus, or a model that makes them | `ValueError` that names the sentence |
| NaN or Inf in a batch | the centroids are untouched, on all processes, and the next batch is trained on |
| a batch of one row | it has no negatives, and stops no training |
| a batch of duplicates, or of one cluster, or of zeros | loss, gradients and centroids stay finite |
| moving centroids without members, for thousands of steps | they stay where they are, to the last bit |
| more clusters than the corpus has room for | `ValueError` that says how many fit |
| labels of any shape, type or value | the loss is the same as without |
| a rank whose batch has other rows | `ValueError` on every rank |
| a checkpoint of other clusters or another loss | `ValueError`, before anything is changed |
| a full disk | `OSError`; nothing half-written remains, and the checkpoint before resumes |
| an interrupt or a kill at any phase | the same command goes on, to the same bits |
| an interrupted run, repeated with other settings | `ValueError` that names the settings |
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import DISTINCT, SENTENCES, STEPS, cli, save_corpus, save_model, train_words
from conftest import StubModel
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from model_kinds import import_peft
from programs import run_python
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from test_cached import IndexedStub
from tiny_bert import DIMENSION, load_model, make_sentences, save_bert
from torch import Tensor, nn
from two_processes import TwoProcesses

from st_clusterns import CachedClusterNSLoss, ClusterNSLoss, ClusterStateCallback, CorpusClusters, Recipe, adapt
from st_clusterns.clustering import corpus_clusters, embedding
from st_clusterns.losses.contrastive import ContrastiveLoss
from st_clusterns.losses.published import PublishedClusterNSLoss
from st_clusterns.training import adapt as training
from st_clusterns.training import callbacks
from st_clusterns.training.callbacks import STATE_FILE, load_state, save_state

# accelerate warns about pinned memory where there is no GPU; nothing of ours decides it
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")

K, D, ROWS = 4, 8, 6


@cache
def clusters_of(seed: int = 0, n_clusters: int = K, dimension: int = D) -> CorpusClusters:
    """Clusters of directions at random, all of them taken for trusted."""
    rows = np.random.default_rng(seed).normal(size=(40, dimension))
    found = CorpusClusters.fit(make_sentences(40), n_clusters=n_clusters, seed=seed, embeddings=rows)
    return replace(found, has_topics=True, trust=np.ones(n_clusters, dtype=np.float32))


CLUSTERS = clusters_of()
CENTROIDS = torch.nn.functional.normalize(torch.tensor(CLUSTERS.centroids), dim=1)


def published(cached: bool, started: bool, **settings: Any) -> PublishedClusterNSLoss:
    loss_class, size = (CachedClusterNSLoss, {"mini_batch_size": 4}) if cached else (ClusterNSLoss, {})
    settings = {"n_clusters": K, "momentum": 0.5, **size, **settings}
    loss = loss_class.from_preset(IndexedStub(D), "paper/bert-base", **settings)
    assert isinstance(loss, PublishedClusterNSLoss)
    if started:
        loss.centroids.centroids.copy_(torch.tensor(CLUSTERS.centroids))
        loss.centroids.started = True
    return loss


KINDS: dict[str, Callable[..., ContrastiveLoss]] = {
    "plain": lambda **settings: ClusterNSLoss(IndexedStub(D), CLUSTERS, **settings),
    "cached": lambda **settings: CachedClusterNSLoss(IndexedStub(D), CLUSTERS, mini_batch_size=4, **settings),
    "published, started": lambda **settings: published(False, True, **settings),
    "published, collecting": lambda **settings: published(False, False, **settings),
    "cached published, started": lambda **settings: published(True, True, **settings),
    "cached published, collecting": lambda **settings: published(True, False, **settings),
}
ALL = pytest.mark.parametrize("kind", KINDS)
STATIC = pytest.mark.parametrize("kind", ["plain", "cached"])
PUBLISHED = pytest.mark.parametrize("kind", [kind for kind in KINDS if "published" in kind])


def views(rows: int = ROWS, columns: int = 2) -> list[Tensor]:
    return [torch.randn(rows, D) for _ in range(columns)]


def step(loss: nn.Module, columns: list[Tensor], labels: Tensor | None = None) -> Tensor:
    """Forward and backward as a training step does them; return the value."""
    loss.model.zero_grad()
    value = loss([{"embedding": column} for column in columns], labels)
    value.backward()
    return value.detach()


def state_of(loss: ContrastiveLoss) -> dict[str, Tensor]:
    """All that training moves in a loss, and all that it must not."""
    state = {name: value.clone() for name, value in loss.named_buffers()}
    if isinstance(loss, PublishedClusterNSLoss):
        state["started, rows"] = loss.centroids.get_extra_state()[:2].clone()  # the third counts the batches
    return state


def assert_untouched(loss: ContrastiveLoss, before: dict[str, Tensor]) -> None:
    """The state is what it was, and the next good batch is trained on."""
    for name, value in state_of(loss).items():
        assert torch.equal(value, before[name]), name
    assert step(loss, views()).isfinite()
    assert loss.model.weight.grad.isfinite().all()


@contextmanager
def refused_untouched(loss: ContrastiveLoss, message: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    before = state_of(loss)
    with pytest.raises(kind, match=message):
        yield
    assert_untouched(loss, before)


# A wrong dimension


@pytest.mark.parametrize("kind", ["plain", "cached", "published, started", "cached published, started"])
def test_rows_wider_than_the_model_has_said(kind: str) -> None:
    """(Narrower ones are Matryoshka's.)"""
    loss = KINDS[kind]()
    weight = loss.model.weight
    with refused_untouched(loss, "8x4|9x4|shapes|size", RuntimeError):
        try:
            loss.model.weight = nn.Parameter(torch.eye(D, D + 1))
            step(loss, views())
        finally:
            loss.model.weight = weight


def test_clusters_of_another_dimension() -> None:
    with pytest.raises(ValueError, match="The model has 9 dimensions, the clusters 8: fit them with this model"):
        ClusterNSLoss(StubModel(D + 1), CLUSTERS)


@pytest.mark.parametrize("loss_class", [ClusterNSLoss, CachedClusterNSLoss])
@pytest.mark.parametrize("preset", [True, False])
def test_a_model_that_truncates_its_output_is_refused_with_the_remedy(
    loss_class: type[ClusterNSLoss], preset: bool, tmp_path: Path
) -> None:
    model = load_model(save_bert(tmp_path))
    clusters = clusters_of(dimension=DIMENSION)

    def make() -> ContrastiveLoss:
        return loss_class.from_preset(model, "paper/bert-base") if preset else loss_class(model, clusters)

    model.truncate_dim = DIMENSION // 2
    with pytest.raises(ValueError, match=r"set model\.truncate_dim = None before clustering and training"):
        make()
    if not preset:
        with pytest.raises(ValueError, match=r"set model\.truncate_dim = None before clustering and training"):
            CorpusClusters.fit(make_sentences(20), model)
    model.truncate_dim = None
    assert make()([model.preprocess(make_sentences(4))]).isfinite()


# NaN or Inf


@given(
    st.sampled_from(list(KINDS)),
    st.integers(0, 1),
    st.integers(0, ROWS - 1),
    st.integers(0, D - 1),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]),
)
def test_a_row_of_nan_or_inf_does_not_reach_the_centroids(
    kind: str, column: int, row: int, dimension: int, value: float
) -> None:
    """The loss is NaN then, which the trainer logs or leaves out. (An infinite positive alone spoils the loss only.)"""
    loss, columns = KINDS[kind](), views()
    columns[column][row, dimension] = value
    before = state_of(loss)
    assert step(loss, columns).isnan()
    if column == 0 or "started" not in kind:
        assert_untouched(loss, before)


def test_a_good_batch_does_move_the_centroids() -> None:
    """A canary for the tests that find a state untouched."""
    for kind, make in KINDS.items():
        loss = make()
        before = state_of(loss)
        step(loss, views())
        moved = any(not torch.equal(value, before[name]) for name, value in state_of(loss).items())
        assert moved == ("published" in kind), kind


def test_nan_in_a_corpus() -> None:
    rows = np.random.default_rng(0).normal(size=(20, D))
    rows[7, 3] = np.nan
    with pytest.raises(ValueError, match=r"NaN or Inf in row 7 \(1 of 20 rows\): is the model broken"):
        CorpusClusters.fit(make_sentences(20), embeddings=rows)


def test_a_model_that_embeds_as_nan_is_told_of_in_one_line(model_path: str, tmp_path: Path) -> None:
    broken = SentenceTransformer(model_path, device="cpu")
    next(broken.parameters()).data.fill_(torch.nan)
    broken.save(str(tmp_path / "broken"))
    code, text = cli(*train_words(save_corpus(tmp_path), str(tmp_path / "broken"), tmp_path / "out"))
    assert code == 2
    assert_matches(r"Error: The model embeds .* as NaN or Inf: is the model broken", text)
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


# Batches with little in them


@pytest.mark.parametrize("kind", ["plain", "cached", "published, collecting", "cached published, collecting"])
@pytest.mark.parametrize("n_columns", [2, 3])
def test_a_batch_of_one_row_is_mnrls(kind: str, n_columns: int) -> None:
    """The last batch of an epoch may be one row; it has nothing to tell, and stops no training."""
    columns = views(1, n_columns)
    loss = KINDS[kind](temperature=0.05, **({} if "published" in kind else {"pull_weight": 0.0}))
    baseline = MultipleNegativesRankingLoss(loss.model, scale=20)([{"embedding": column} for column in columns], None)
    torch.testing.assert_close(step(loss, columns), baseline.detach())
    assert (baseline > 0) == (n_columns == 3)


@pytest.mark.parametrize("cached", [False, True])
def test_batches_of_one_row_are_enough_to_start(cached: bool) -> None:
    loss = published(cached, started=False, start_similarity=1.0)
    for _ in range(K):
        assert not loss.centroids.started
        assert step(loss, views(1)).isfinite()
    assert loss.centroids.started


DEGENERATE: dict[str, Callable[[], Tensor]] = {
    "all duplicates": lambda: torch.randn(1, D).repeat(ROWS, 1),
    "every row in one cluster": lambda: CENTROIDS[:1] + 0.001 * torch.randn(ROWS, D),
    "two opposite points": lambda: torch.cat([torch.ones(3, D), -torch.ones(3, D)]),
    "zeros": lambda: torch.zeros(ROWS, D),
    "huge": lambda: 1e18 * torch.randn(ROWS, D),
    "tiny": lambda: 1e-18 * torch.randn(ROWS, D),
}


@ALL
@pytest.mark.parametrize("rows_kind", DEGENERATE)
def test_degenerate_batches_stay_finite(kind: str, rows_kind: str) -> None:
    """Also while the published method collects rows: after one batch its centroids start, whatever the rows are."""
    settings = {"momentum": 1.0, "margin_weight": 6.0, "margin_beta": 0.1, "start_similarity": 1.0}
    loss = KINDS[kind](**(settings if "published" in kind else {"pull_weight": 2.0}))
    loss.model.weight.data = torch.eye(D)
    for _ in range(4):
        rows = DEGENERATE[rows_kind]()
        assert step(loss, [rows, rows.clone()]).isfinite()
        assert loss.model.weight.grad.isfinite().all()
        assert all(value.isfinite().all() for value in loss.buffers())
    assert not isinstance(loss, PublishedClusterNSLoss) or loss.centroids.started


@STATIC
def test_rows_of_one_cluster_have_no_negatives_in_each_other(kind: str) -> None:
    loss = KINDS[kind](pull_weight=0.0)
    loss.model.weight.data = torch.eye(D)
    rows = DEGENERATE["every row in one cluster"]()
    ids = CLUSTERS.predict(rows)
    assert set(ids) == {ids[0]}
    assert step(loss, [rows, -rows]) == 0
    baseline = MultipleNegativesRankingLoss(loss.model, scale=10)
    assert step(baseline, [rows, -rows]) > 1


def test_a_corpus_of_few_different_embeddings_is_clustered() -> None:
    """Fewer different rows than clusters: some clusters stay empty, and no warning comes."""
    rows = np.repeat(np.eye(3, D), 10, axis=0)
    clusters = CorpusClusters.fit([f"sentence {i}" for i in range(30)], n_clusters=6, embeddings=rows)
    assert np.count_nonzero(clusters.sizes) == 3
    assert np.isfinite(clusters.centroids).all()
    assert ((clusters.trust >= 0) & (clusters.trust <= 1)).all()
    assert not clusters.trust[clusters.sizes == 0].any()
    loss = ClusterNSLoss(IndexedStub(D), replace(clusters, has_topics=True))
    assert step(loss, views()).isfinite()


# Moving centroids without members


def test_centroids_without_members_wait_for_thousands_of_steps() -> None:
    """They stay where they are to the last bit, neither moved nor given to other rows, and can be found again."""
    loss = published(False, started=True, momentum=0.1)
    centroids = loss.centroids
    before = state_of(loss)["centroids.centroids"]
    for _ in range(3000):
        rows = before[1] + 0.01 * torch.randn(ROWS, D)
        centroids.follow(rows, rows)
    moved = (centroids.centroids != before).any(dim=1)
    assert moved.tolist() == [False, True, False, False]
    assert centroids.centroids.isfinite().all()
    assert step(loss, views()).isfinite()
    assert centroids.similarity(before).argmax(dim=1).tolist() == list(range(K))


# More clusters than sentences


@pytest.mark.parametrize(
    ("rows", "n_clusters", "message"),
    [
        (20, 11, "n_clusters=11 does not fit 20 distinct sentences: choose 2 to 10"),
        (20, 21, "n_clusters=21 does not fit 20 distinct sentences: choose 2 to 10"),
        (5, 3, "n_clusters=3 does not fit 5 distinct sentences: choose 2 to 2"),
        (20, 1, "n_clusters=1 does not fit 20 distinct sentences: choose 2 to 10"),
    ],
)
def test_more_clusters_than_the_corpus_has_room_for(rows: int, n_clusters: int, message: str) -> None:
    embeddings = np.random.default_rng(0).normal(size=(rows, D))
    with pytest.raises(ValueError, match=message):
        CorpusClusters.fit(make_sentences(rows), n_clusters=n_clusters, embeddings=embeddings)


@STATIC
def test_more_clusters_than_a_batch_has_rows_are_fine(kind: str) -> None:
    loss = KINDS[kind]()
    for rows in (1, K - 1):
        assert step(loss, views(rows)).isfinite()


# Labels


@ALL
@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([1, 2, 3, 4, 1]),
        torch.tensor([]),
        torch.tensor(1),
        torch.ones(6, 1, dtype=torch.long),
        torch.tensor([1, 2, K + 1, 1, 1, 1]),
        torch.tensor([1, 2, -1, 1, 1, 1]),
        torch.tensor([1.0, torch.nan, 3.0, 1.0, 1.0, 1.0]),
        torch.tensor([True, False] * 3),
    ],
    ids=["short", "empty", "scalar", "column", "too large", "negative", "float", "bool"],
)
def test_labels_of_any_kind_change_nothing(kind: str, labels: Tensor) -> None:
    loss, columns = KINDS[kind](), views()
    twin = KINDS[kind]()
    twin.model.load_state_dict(loss.model.state_dict())
    for _ in range(2):
        assert torch.equal(step(loss, columns, labels), step(twin, columns))
        assert torch.equal(loss.model.weight.grad, twin.model.weight.grad)


# Processes that disagree


def one_step(rank: int, rows: list[int], kind: str, gather: bool, nan_on: int = -1) -> Any:
    torch.manual_seed(0)
    settings = {"start_similarity": 1.0} if "published" in kind else {}
    loss = KINDS[kind](gather_across_devices=gather, **settings)
    columns = views(rows[rank])
    if rank == nan_on:
        columns[0][2] = torch.nan
    step(loss, columns)
    return [value.clone() for value in loss.buffers()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "gather"), [("plain", True), ("published, started", False), ("published, collecting", True)]
)
def test_ranks_with_unequal_batches_are_refused_on_both(pair: TwoProcesses, kind: str, gather: bool) -> None:
    for text in pair.run(one_step, [6, 5], kind, gather):
        assert "ValueError: The number of rows of a batch differs between the processes: [6, 5]" in text
        assert "dataloader_drop_last=True" in text
    for result in pair.run(one_step, [6, 6], kind, gather):
        assert isinstance(result, list), "the processes must still be in step afterwards"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["published, started", "published, collecting"])
def test_nan_on_one_rank_reaches_the_centroids_of_none(pair: TwoProcesses, kind: str) -> None:
    before = [value.clone() for value in KINDS[kind]().buffers()]
    for nan_on, unmoved in ((1, True), (-1, False)):
        first, second = pair.run(one_step, [6, 6], kind, False, nan_on)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        assert all(torch.equal(one, other) for one, other in zip(first, before, strict=True)) == unmoved


# Checkpoints of something else


@pytest.mark.parametrize(("n_clusters", "dimension"), [(K + 1, D), (K, D + 1)], ids=["another K", "another model"])
def test_a_checkpoint_of_another_loss(n_clusters: int, dimension: int, tmp_path: Path) -> None:
    other = ClusterNSLoss.from_preset(StubModel(dimension), "paper/bert-base", n_clusters=n_clusters)
    save_state(other, tmp_path / STATE_FILE)
    shapes = rf"{STATE_FILE} holds the state of another loss.*\({n_clusters}, {dimension}\).* instead of .*\({K}, {D}\)"
    loss = published(False, started=True)
    with refused_untouched(loss, shapes):
        load_state(loss, tmp_path / STATE_FILE)


@pytest.mark.parametrize("other", [clusters_of(seed=1), clusters_of(n_clusters=3)], ids=["another seed", "another K"])
def test_a_checkpoint_of_other_clusters(other: CorpusClusters, tmp_path: Path) -> None:
    loss = ClusterNSLoss(IndexedStub(D), CLUSTERS)
    save_state(ClusterNSLoss(IndexedStub(D), other), tmp_path / "other")
    with refused_untouched(loss, "other was written by a run with other clusters: .* Resume with the clusters that"):
        load_state(loss, tmp_path / "other")
    save_state(ClusterNSLoss(IndexedStub(D), CLUSTERS), tmp_path / "same")
    load_state(loss, tmp_path / "same")


def test_the_two_methods_do_not_read_each_others_checkpoints(tmp_path: Path) -> None:
    both = {"ours": ClusterNSLoss(IndexedStub(D), CLUSTERS), "published": published(False, started=True)}
    for name, loss in both.items():
        save_state(loss, tmp_path / name)
    for name, other in (("ours", "published"), ("published", "ours")):
        with refused_untouched(both[name], "other clusters|another loss"):
            load_state(both[name], tmp_path / other)


# A short run, as `adapt` does it


RECIPE = Recipe(batch_size=32, max_steps=STEPS, learning_rate=1e-3)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def run(model_path: str, folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """Train in steps with checkpoints, or go on with it; return the weights."""
    model = SentenceTransformer(model_path, device="cpu")
    clusters = CorpusClusters.fit(DISTINCT, model, 8, seed, show_progress_bar=False)
    dataset = Dataset.from_dict({"sentence": DISTINCT})
    training.run_trainer(model, ClusterNSLoss(model, clusters), dataset, RECIPE, folder, show_progress=False)
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_training_does_not_go_on_with_other_clusters(model_path: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, ContrastiveLoss, "forward", 4)
        with pytest.raises(KeyboardInterrupt):
            run(model_path, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-2" / STATE_FILE).is_file()
    with pytest.raises(ValueError, match=r"checkpoint-2.* was written by a run with other clusters"):
        run(model_path, tmp_path / "run", seed=1)
    run(model_path, tmp_path / "run")


# A full disk


def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write some, then fail as the library does."""
    path.write_bytes(b"half of it")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("kind", ["plain", "published, started"])
def test_a_full_disk_leaves_no_half_of_a_state(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = KINDS[kind]()
    save_state(loss, tmp_path / STATE_FILE)
    before = (tmp_path / STATE_FILE).read_bytes()
    step(loss, views())
    monkeypatch.setattr(callbacks, "save_file", full)
    with pytest.raises(OSError, match=r"could not be written .*No space left on device.*the one before it is. Make"):
        save_state(loss, tmp_path / STATE_FILE)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    assert (tmp_path / STATE_FILE).read_bytes() == before, "the file before stays whole"


def test_after_a_full_disk_the_checkpoint_before_resumes(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model_path, tmp_path / "whole")
    save_file = callbacks.save_file
    with monkeypatch.context() as patch:
        patch.setattr(
            callbacks, "save_file", lambda *a, **k: (full if "checkpoint-4" in str(a[1]) else save_file)(*a, **k)
        )
        with pytest.raises(OSError, match=r"checkpoint-4.*could not be written"):
            run(model_path, tmp_path / "run")
    steps = count_steps(monkeypatch)
    assert_equal(run(model_path, tmp_path / "run"), whole)
    assert len(steps) == STEPS - 2, "from checkpoint-2"


def count_steps(patch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each step of a loss."""
    forward, steps = ContrastiveLoss.forward, list[int]()
    patch.setattr(ContrastiveLoss, "forward", lambda *args: (steps.append(1), forward(*args))[1])
    return steps


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


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, " ".join(text.split())), text[-2000:]


# An interrupt at any phase of the command


@pytest.fixture(scope="module", autouse=True)
def _no_report_and_small_chunks() -> Iterator[None]:
    """The maps take longer than all else; and the embeddings shall be kept in several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "write_files", lambda *args: args[3].write_bytes(b"a page"))
        patch.setattr(embedding, "CHUNK", 100)
        yield


CHUNKS = -(-len(DISTINCT) // 100)


@pytest.fixture(scope="module")
def straight(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a command that nothing has stopped."""
    folder = tmp_path_factory.mktemp("straight")
    code, text = cli(*train_words(save_corpus(folder), model_path, folder / "out"))
    assert code == 0, text
    assert "the corpus has topics" in text, "or the clusters would have no say"
    return folder / "out"


def assert_same_result(ours: Path, theirs: Path, but: str = "") -> None:
    """The same weights, and the clusters of the same run, to the last bit, and nothing unfinished beside them."""
    assert_equal(load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors"))
    assert_equal(load_file(ours / STATE_FILE), load_file(theirs / STATE_FILE))
    notes = [safe_open(folder / STATE_FILE, framework="pt").metadata() for folder in (ours, theirs)]
    assert notes[0] == notes[1], "the fingerprints of the clusters"
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()} - {but}
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
    "embedding the first sentences": (SentenceTransformer, "encode", 1),
    "embedding others": (SentenceTransformer, "encode", 3),
    "keeping the embeddings": (os, "fsync", 2),
    "clustering": (corpus_clusters, "kmeans", 1),
    "the first step": (ContrastiveLoss, "forward", 1),
    "a step after a checkpoint": (ContrastiveLoss, "forward", STEPS - 1),
    "a step between two checkpoints": (ContrastiveLoss, "forward", STEPS - 2),
    "a checkpoint, before the state": (ClusterStateCallback, "on_save", 2),
    "after the last step": (ClusterStateCallback, "on_train_end", 1),
    "the final embedding": (training, "embed_corpus", 1),
    "saving the state": (training, "save_state", 1),
    "writing the report": (training, "write_json", 2),
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


def test_an_interrupt_while_the_model_is_saved(straight: Path, model_path: str, tmp_path: Path) -> None:
    """What lies half-written in the work folder is not what appears in the end."""
    words = train_words(save_corpus(tmp_path), model_path, tmp_path / "out")
    work = training.work_folder(tmp_path / "out")
    save = SentenceTransformer.save

    def half(self: SentenceTransformer, path: str, *args: Any, **settings: Any) -> None:
        save(self, path, *args, **settings)
        if Path(path) == work / "finished":
            (Path(path) / "model.safetensors").write_bytes(b"half of it")
            (Path(path) / "stray").write_text("of a save that was broken off")
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SentenceTransformer, "save", half)
        code, text = cli(*words)
    assert code == 130, text
    assert (work / "finished" / "stray").is_file()
    assert not (tmp_path / "out").exists()
    assert cli(*words)[0] == 0
    assert_same_result(tmp_path / "out", straight)


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
    assert_same_result(tmp_path / "out", straight, but="report.html")


def test_an_interrupt_while_the_report_is_drawn_costs_the_report(
    straight: Path, model_path: str, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, training, "write_files")
        code, text = cli(*train_words(save_corpus(tmp_path), model_path, tmp_path / "out"))
    assert_matches(r"Interrupted. .*out is finished\.", text)
    assert code == 130
    assert_same_result(tmp_path / "out", straight, but="report.html")


# An interrupted run, repeated with other settings


@pytest.fixture(scope="module")
def interrupted(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus and the work of a command that was interrupted."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, corpus_clusters, "kmeans")
        assert cli(*train_words(save_corpus(folder), model_path, folder / "out"))[0] == 130
    return folder


CHANGES: list[list[object]] = [
    ["--seed", 1],
    ["--batch-size", 16],
    ["--n-clusters", 9],
    ["--max-steps", STEPS + 1],
    ["--epochs", 2],
    ["--learning-rate", 1e-3],
    ["--max-length", 8],
    ["--bf16"],
    ["--prompt", "w0 "],
    ["--lora", 2],
    ["--embed-batch-size", 16],
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[0])
def test_an_interrupted_run_is_not_gone_on_with_by_other_settings(
    change: list[object], interrupted: Path, model_path: str
) -> None:
    if "--lora" in change:
        import_peft()
    words = train_words(interrupted / "corpus.txt", model_path, interrupted / "out", *change)
    code, text = cli(*words)
    assert code == 2
    setting = str(change[0])[2:].replace("-", "_")
    assert_matches(
        rf"Error: .*interrupted run with other settings \({setting}\): repeat its command to go on with it, or", text
    )
    assert training.is_interrupted(interrupted / "out"), "its work is kept"


def test_every_setting_of_a_recipe_is_compared() -> None:
    assert {str(change[0])[2:].replace("-", "_") for change in CHANGES} == {
        *asdict(RECIPE),
        "n_clusters",
        "prompt",
        "lora",
    }


def test_an_interrupted_run_is_not_gone_on_with_by_another_corpus_or_model(
    interrupted: Path, model_path: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(reversed(SENTENCES)))
    code, text = cli(*train_words(other, model_path, interrupted / "out"))
    assert code == 2
    assert_matches(r"other settings \(corpus\): repeat its command to go on with it, or remove the folder", text)
    shutil.copytree(model_path, tmp_path / "copy")
    code, text = cli(*train_words(interrupted / "corpus.txt", str(tmp_path / "copy"), interrupted / "out"))
    assert code == 2
    assert_matches(r"other settings \(model\): repeat its", text)


def test_a_model_that_was_trained_in_part_is_not_taken_for_the_start(model_path: str, tmp_path: Path) -> None:
    """`adapt` trains a model in place, so after an interrupt the call needs the model as it was."""
    settings: dict[str, Any] = {"n_clusters": 8, "recipe": RECIPE, "show_progress": False}

    def fresh() -> SentenceTransformer:
        return SentenceTransformer(model_path, device="cpu")

    whole, model = fresh(), fresh()
    adapt(whole, SENTENCES, tmp_path / "whole", **settings)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, ContrastiveLoss, "forward", 6)
        with pytest.raises(KeyboardInterrupt):
            adapt(model, SENTENCES, tmp_path / "out", **settings)
    with pytest.raises(ValueError, match=r"interrupted run with other settings \(model\)"):
        adapt(model, SENTENCES, tmp_path / "out", **settings)
    with pytest.MonkeyPatch.context() as patch:
        steps = count_steps(patch)
        adapt(model := fresh(), SENTENCES, tmp_path / "out", **settings)
    assert len(steps) == STEPS - 4, "from checkpoint-4"
    assert_equal(model.state_dict(), whole.state_dict())
    assert_same_result(tmp_path / "out", tmp_path / "whole")


# A kill


KILLED = """
import os, signal, sys
from command_line import cli
from sentence_transformers import SentenceTransformer
from st_clusterns import ClusterStateCallback
from st_clusterns.clustering import embedding
from st_clusterns.losses.contrastive import ContrastiveLoss

embedding.CHUNK = 100
owner = {"encode": SentenceTransformer, "forward": ContrastiveLoss, "on_train_end": ClusterStateCallback}[sys.argv[1]]
original, calls = getattr(owner, sys.argv[1]), []

def die(*args, **settings):
    calls.append(1)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **settings)

setattr(owner, sys.argv[1], die)
cli(*sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "call", "embeddings", "steps"),
    [("encode", 3, CHUNKS - 2, STEPS), ("forward", 4, 0, STEPS - 2), ("on_train_end", 1, 0, 0)],
    ids=["while embedding", "between two checkpoints", "after the last step"],
)
def test_a_killed_command_is_followed_by_the_same_one(
    name: str, call: int, embeddings: int, steps: int, straight: Path, model_path: str, tmp_path: Path
) -> None:
    """Nobody is told, nothing is tidied up: and still the same command goes on, from where it was."""
    words = [str(word) for word in train_words(save_corpus(tmp_path), model_path, tmp_path / "out")]
    done = run_python(KILLED, name, str(call), *words)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    with pytest.MonkeyPatch.context() as patch:
        encode, sizes, taken = SentenceTransformer.encode, list[int](), count_steps(patch)
        patch.setattr(SentenceTransformer, "encode", lambda *a, **k: (sizes.append(len(a[1])), encode(*a, **k))[1])
        assert cli(*words)[0] == 0
    chunks = [size for size in sizes if size >= len(DISTINCT) % 100]  # the model card embeds a few sentences as well
    assert len(chunks) == embeddings + CHUNKS, "those that were missing, and all by the trained model"
    assert len(taken) == steps
    assert_same_result(tmp_path / "out", straight)
