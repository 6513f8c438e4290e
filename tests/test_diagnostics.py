"""The trainer's logs say what the clusters do, and training is the same to the last bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batches import LOSSES, K, corpus, default, views
from scipy.stats import entropy
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from tiny_bert import DIMENSION, load_model, make_sentences
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from st_clusterns import CachedClusterNSLoss, ClusterNSLoss, CorpusClusters, log_clusters, views_dataset
from st_clusterns.losses.contrastive import Batch
from st_clusterns.losses.diagnostics import ROWS, describe_batch, describe_use
from st_clusterns.losses.terms import NO_CLUSTER
from st_clusterns.training.diagnostics import ROWS_PER_CLUSTER, Watch

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")
PAIRS = {"positive_similarity", "other_similarity", "masked_pairs"}
CLUSTERED = {"same_cluster_similarity", "rows_nearer_another_cluster", "used_centroids", "cluster_balance"}


@pytest.mark.parametrize("kind", ["default", "no topics"])
@pytest.mark.parametrize("n_columns", [2, 3])
@pytest.mark.parametrize("n_rows", [30, ROWS + 30])
def test_pairs_against_a_count_of_each(kind: str, n_columns: int, n_rows: int) -> None:
    loss = LOSSES[kind]()
    columns = views(n_rows, n_columns)
    texts = [torch.arange(n_rows) + 1000 * place for place in range(n_columns)]
    texts[0][7] = texts[0][3]  # a copy
    batch = loss.prepare(columns, texts)
    if kind == "default":
        batch.ids[5] = NO_CLUSTER
    with torch.no_grad():
        anchors, positives = (F.normalize(column, dim=1) for column in columns[:2])
    found: dict[str, list[float]] = {name: [] for name in PAIRS | CLUSTERED}
    for i in range(min(n_rows, ROWS)):
        for j in range(n_rows):
            cosine = float(anchors[i] @ positives[j])
            if i == j:
                found["positive_similarity"].append(cosine)
                continue
            same = kind == "default" and bool(batch.ids[i] == batch.ids[j] != NO_CLUSTER)
            masked = same or {i, j} == {3, 7}
            found["masked_pairs"].append(masked)
            if same:
                found["same_cluster_similarity"].append(cosine)
            if not masked:
                found["other_similarity"].append(cosine)
        if kind == "default" and i != 5:
            found["rows_nearer_another_cluster"].append(bool(batch.to_centroids[i].argmax() != batch.ids[i]))
    expected = {name: sum(values) / len(values) for name, values in found.items() if values}
    described = {name: float(value) for name, value in describe_batch(loss, batch).items()}
    assert described == pytest.approx(expected, abs=1e-6)


def test_rows_that_left_their_cluster_are_counted() -> None:
    loss = default()
    columns = [torch.tensor(corpus().centroids).repeat(3, 1)] * 2
    batch = loss.prepare(columns)
    assert describe_batch(loss, batch)["rows_nearer_another_cluster"] == 0
    batch.to_centroids[:3] = batch.to_centroids[:3].roll(1, dims=1)
    assert describe_batch(loss, batch)["rows_nearer_another_cluster"] == 3 / 12


def test_the_use_of_centroids_against_scipy() -> None:
    ids = torch.tensor([0] * 5 + [1] * 3 + [3] * 2)
    values = describe_use(F.one_hot(ids, 5).float())
    assert float(values["used_centroids"]) == pytest.approx(3 / 5)
    assert float(values["cluster_balance"]) == pytest.approx(entropy([5, 3, 2]) / math.log(5))
    alike = describe_use(torch.eye(5))
    assert [float(value) for value in alike.values()] == pytest.approx([1, 1])
    assert float(describe_use(torch.eye(5)[:1])["cluster_balance"]) == 0


class Reporter(TrainerCallback):
    """Stands in for TensorBoard: what it is given, when it is given it."""

    logs: list[dict[str, Any]]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


WRAPPERS: dict[str, Callable[[Any, Any], nn.Module]] = {
    "plain": lambda model, clusters: ClusterNSLoss(model, clusters),
    "cached": lambda model, clusters: CachedClusterNSLoss(model, clusters, mini_batch_size=5),
    "matryoshka": lambda model, clusters: MatryoshkaLoss(model, ClusterNSLoss(model, clusters), [8, DIMENSION]),
    "cached matryoshka": lambda model, clusters: MatryoshkaLoss(
        model, CachedClusterNSLoss(model, clusters, mini_batch_size=5), [DIMENSION, 8]
    ),
    "layers": lambda model, clusters: AdaptiveLayerLoss(model, ClusterNSLoss(model, clusters)),
}


def train(
    model: SentenceTransformer, wrapper: str, folder: Path, watch: bool = True, **settings: Any
) -> tuple[SentenceTransformerTrainer, nn.Module, list[Batch]]:
    """Train six steps; return also the loss and each batch that it has prepared."""
    sentences = make_sentences(96)
    clusters = CorpusClusters.fit(sentences, model, n_clusters=2, show_progress_bar=False)
    assert clusters.has_topics
    loss = WRAPPERS[wrapper](model, clusters)
    [inner] = [module for module in loss.modules() if isinstance(module, ClusterNSLoss)]
    batches: list[Batch] = []
    prepare = inner.prepare
    inner.prepare = lambda *args: batches.append(prepare(*args)) or batches[-1]  # type: ignore[method-assign]
    args = SentenceTransformerTrainingArguments(
        str(folder),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 12,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "recorder",
            **settings,
        },
    )
    trainer = SentenceTransformerTrainer(model, args, views_dataset(sentences, clusters, "deletion"), loss=loss)
    if watch:
        log_clusters(trainer)
    trainer.train()
    return trainer, inner, batches


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch) -> type[Reporter]:
    monkeypatch.setattr(Reporter, "logs", [], raising=False)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Reporter)
    return Reporter


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_reporters_and_history_have_the_values_of_the_last_step(
    wrapper: str, accumulated: int, model: SentenceTransformer, reporter: type[Reporter], tmp_path: Path
) -> None:
    trainer, loss, batches = train(model, wrapper, tmp_path, gradient_accumulation_steps=accumulated)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    given = [entry for entry in reporter.logs if "loss" in entry]
    assert len(given) == len(history) == 3
    for entry, kept in zip(given, history, strict=True):
        assert entry.keys() >= PAIRS | {"used_centroids", "cluster_balance", "rows_nearer_another_cluster"}
        assert entry == {name: value for name, value in kept.items() if name != "step"}
    calls = len(batches) // (6 * accumulated)  # of the loss for one batch
    assert calls == {"plain": 1, "cached": 1, "layers": 2}.get(wrapper, 2)
    first = batches[-accumulated * calls]  # of the last step
    assert first.anchors.shape == (12, DIMENSION)
    assert isinstance(loss, ClusterNSLoss)
    expected = {name: float(value) for name, value in describe_batch(loss, first).items() if not value.isnan()}
    assert {name: given[-1][name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert loss.observer is None, "nothing is kept after the training"


@pytest.mark.parametrize("wrapper", ["plain", "cached matryoshka"])
def test_training_is_the_same_to_the_last_bit(
    wrapper: str, bert: Path, reporter: type[Reporter], tmp_path: Path
) -> None:
    results: list[dict[str, Tensor]] = []
    for watch in (False, True):
        model = load_model(bert)
        trainer, *_ = train(model, wrapper, tmp_path, watch)
        results.append(model.state_dict())
        assert ("masked_pairs" in trainer.state.log_history[0]) == watch
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_the_window_holds_the_last_rows() -> None:
    loss = default()
    watch = Watch(loss)
    for _ in range(20):
        watch.batch = None
        watch(loss.prepare(views(6)))
    rows = sum(map(len, watch.window))
    assert ROWS_PER_CLUSTER * K <= rows < ROWS_PER_CLUSTER * K + 6
    assert not any(part.requires_grad for part in watch.window)


def test_without_our_loss_there_is_nothing_to_log(model: SentenceTransformer, tmp_path: Path) -> None:
    args = SentenceTransformerTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = SentenceTransformerTrainer(model, args, loss=MultipleNegativesRankingLoss(model))
    with pytest.raises(ValueError, match=r"no ClusterNSLoss in trainer\.loss \(MultipleNegativesRankingLoss\)"):
        log_clusters(trainer)
