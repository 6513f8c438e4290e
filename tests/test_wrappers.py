"""Wrapper losses, precisions and whatever else the trainer may do to a model: it works, or is refused with a reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from test_cached import IndexedStub, columns_of, features_of
from tiny_bert import DIMENSION, load_model, make_sentences, save_bert
from torch import Tensor, nn

from st_clusterns import CachedClusterNSLoss, ClusterNSLoss, ClusterStateCallback

ROWS, WIDTH, CLUSTERS = 12, 8, 3  # of the stub's columns
LOSSES = [ClusterNSLoss, CachedClusterNSLoss]
SETTINGS: dict[str, Any] = {
    "n_clusters": CLUSTERS,
    "momentum": 0.1,
    "margin_alpha": 0.1,
    "margin_beta": 0.1,
    "hard_negative_weight": 1.5,
    "min_trust": 0.0,
    "start_similarity": 1.0,
}


def make(loss_class: type[ClusterNSLoss], model: nn.Module, started: bool = True, **settings: Any) -> ClusterNSLoss:
    extra = {"mini_batch_size": 5} if loss_class is CachedClusterNSLoss else {}
    loss = loss_class(model, **{**SETTINGS, **extra, **settings})
    if started:
        loss.clusters.seed(
            torch.randn(CLUSTERS, loss.clusters.centroids.shape[1], generator=torch.Generator().manual_seed(5))
        )
    return loss


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every move of centroids."""
    from st_clusterns.clusters import Clusters

    seen: list[int] = []
    partial_fit = Clusters.partial_fit

    def watched(self: Clusters, embeddings: Tensor, ids: Tensor | None = None) -> None:
        seen.append(len(embeddings))
        partial_fit(self, embeddings, ids)

    monkeypatch.setattr(Clusters, "partial_fit", watched)
    return seen


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def train(
    model: SentenceTransformer | None,
    loss: Any,
    output: Path,
    *,
    data: Any = None,
    callbacks: list[Any] | None = None,
    model_init: Callable[[], SentenceTransformer] | None = None,
    **settings: Any,
) -> SentenceTransformerTrainer:
    args = SentenceTransformerTrainingArguments(
        str(output),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 12,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **settings,
        },
    )
    data = Dataset.from_dict({"text": make_sentences(72)}) if data is None else data
    trainer = SentenceTransformerTrainer(model, args, data, loss=loss, callbacks=callbacks or [], model_init=model_init)
    trainer.train()
    return trainer


def log_of(trainer: SentenceTransformerTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# MatryoshkaLoss


def matryoshka_by_hand(columns: list[Tensor], loss: ClusterNSLoss, dims: dict[int, float]) -> Tensor:
    """Dimension by dimension: a loss of that width around the moved, truncated centroids."""
    total = torch.zeros(())
    for dim, weight in dims.items():
        narrow = ClusterNSLoss(IndexedStub(dim), **{**SETTINGS, "momentum": 0.0})
        narrow.clusters.seed(loss.clusters.centroids[:, :dim])
        rows = [F.normalize(column[:, :dim], dim=1) for column in columns]
        total = total + weight * narrow.compute_loss_from_embeddings(rows).total()
    return total


@pytest.mark.parametrize("loss_class", LOSSES)
def test_matryoshka_moves_once_and_truncates_the_centroids(loss_class: type[ClusterNSLoss], moves: list[int]) -> None:
    model = IndexedStub(WIDTH)
    dims = {4: 0.5, 8: 2.0, 2: 1.0}
    inner = make(loss_class, model)
    before = inner.clusters.centroids.clone()
    loss = MatryoshkaLoss(model, inner, list(dims), list(dims.values()))
    columns = columns_of(3)
    got = loss(features_of(columns), None)
    assert isinstance(got, dict) == (loss_class is ClusterNSLoss), "cached, its parts could not be told apart"
    total = sum(got.values()) if isinstance(got, dict) else got
    total.backward()
    assert moves == [ROWS]
    assert not torch.equal(before, inner.clusters.centroids)
    gradient, model.weight.grad = model.weight.grad.clone(), None
    expected = matryoshka_by_hand([column @ model.weight for column in columns], inner, dims)
    torch.testing.assert_close(total.detach(), expected.detach())
    expected.backward()
    torch.testing.assert_close(gradient, model.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_step_without_the_full_width_moves_nothing(loss_class: type[ClusterNSLoss], moves: list[int]) -> None:
    model = IndexedStub(WIDTH)
    inner = make(loss_class, model)
    before = inner.clusters.centroids.clone()
    got = MatryoshkaLoss(model, inner, [4, 2])(features_of(columns_of(2)), None)
    (sum(got.values()) if isinstance(got, dict) else got).backward()
    assert not moves
    assert torch.equal(before, inner.clusters.centroids)


@pytest.mark.slow
@pytest.mark.parametrize("loss_class", LOSSES)
def test_matryoshka_trains(loss_class: type[ClusterNSLoss], bert: Path, tmp_path: Path, moves: list[int]) -> None:
    model = load_model(bert)
    loss = MatryoshkaLoss(model, make(loss_class, model), [DIMENSION, 8])
    trainer = train(model, loss, tmp_path, callbacks=[ClusterStateCallback(loss)])
    assert moves == [12] * 6
    assert log_of(trainer)[-1] < log_of(trainer)[0]


# AdaptiveLayerLoss and Matryoshka2dLoss


def layered(name: str, model: SentenceTransformer, inner: ClusterNSLoss) -> nn.Module:
    if name == "AdaptiveLayerLoss":
        return AdaptiveLayerLoss(model, inner, n_layers_per_step=-1)
    return Matryoshka2dLoss(model, inner, [DIMENSION, 8], n_layers_per_step=-1, n_dims_per_step=-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
@pytest.mark.parametrize("started", [False, True])
def test_layers_move_once_a_step(name: str, started: bool, bert: Path, tmp_path: Path, moves: list[int]) -> None:
    model = load_model(bert)
    inner = make(ClusterNSLoss, model, started=started)
    inner.start.needed = 24  # two batches
    inner.start.rows = torch.zeros(2, 24, DIMENSION)
    trainer = train(model, layered(name, model, inner), tmp_path)
    assert moves == [12] * (6 if started else 4)
    assert all(torch.isfinite(torch.tensor(log_of(trainer))))
    assert log_of(trainer, "false_negative")[-1] > 0


def flattened(features: dict[str, Any]) -> dict[str, Any]:
    """One long row without padding, as sentence-transformers makes it for flash attention."""
    lengths = features["attention_mask"].sum(dim=1)
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    return {
        "input_ids": features["input_ids"][features["attention_mask"].bool()][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends),
        **dict.fromkeys(("max_length_q", "max_length_k"), int(lengths.max())),
    }


@pytest.mark.slow
@pytest.mark.parametrize("prepare_features", [dict, flattened])
@pytest.mark.parametrize("n_columns", [1, 2])
def test_lower_layers_have_the_clusters_of_the_last(
    n_columns: int, prepare_features: Any, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(bert)
    with torch.no_grad():  # layers that do something
        for weight in model[0].auto_model.encoder.parameters():
            weight *= 8
    inner = make(ClusterNSLoss, model)
    inner.clusters.seed(model.encode(make_sentences(CLUSTERS), convert_to_tensor=True))
    model.train()
    batches: list[Any] = []
    prepare = inner._prepare
    monkeypatch.setattr(inner, "_prepare", lambda *args: batches.append(prepare(*args)) or batches[-1])
    columns = [model.preprocess(make_sentences(ROWS, seed)) for seed in range(n_columns)]
    loss = AdaptiveLayerLoss(model, inner, n_layers_per_step=-1)
    for _ in range(2):
        batches.clear()
        loss([prepare_features(column) for column in columns], None)
        last, *lower = batches
        assert len(lower) == 2
        for batch in lower:
            assert torch.equal(batch.clusters, last.clusters)
            assert not torch.equal(batch.anchors, last.anchors)
    alone = [inner.clusters.predict(batch.anchors.detach()) for batch in lower]
    assert any(not torch.equal(ids, last.clusters) for ids in alone), "a canary: looked up there, they would differ"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_the_cached_loss_is_refused_inside_layers(name: str, bert: Path) -> None:
    model = load_model(bert)
    inner = make(CachedClusterNSLoss, model)
    with pytest.warns(UserWarning, match="is not compatible with|AdaptiveLayerLoss"):
        loss = layered(name, model, inner)
    with pytest.raises(ValueError, match="read all layers of one forward pass, which a cached loss does not keep"):
        loss([model.preprocess(make_sentences(ROWS))], None)
    inner([model.preprocess(make_sentences(ROWS))])  # outside, it goes on working


# Precisions


class Scaled(IndexedStub):
    """Without matrix products, so that autocast leaves its embeddings in float32."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["embedding"] * self.weight.sum(dim=0)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_class", LOSSES)
def test_autocast_changes_nothing_of_the_arithmetic(loss_class: type[ClusterNSLoss], dtype: torch.dtype) -> None:
    results = []
    model = Scaled(WIDTH)
    for enabled in (False, True):
        loss = make(loss_class, model)
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            parts = loss(features_of(columns_of(3)))
        parts.backward()
        results.append((parts.total().detach(), model.weight.grad.clone(), loss.clusters.centroids.clone()))
    for exact, under_autocast in zip(*results, strict=True):
        assert torch.equal(exact, under_autocast)


def test_autocast_would_change_the_arithmetic() -> None:
    """A canary for the test above."""
    a, b = (F.normalize(column, dim=1) for column in columns_of(2))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = (a @ b.T).float()
    assert not torch.allclose(rounded, a @ b.T, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("loss_class", LOSSES)
def test_training_under_bf16_autocast(loss_class: type[ClusterNSLoss], bert: Path, tmp_path: Path) -> None:
    model = load_model(bert)
    loss = make(loss_class, model)
    trainer = train(model, loss, tmp_path, bf16=True)
    assert log_of(trainer)[-1] < log_of(trainer)[0]
    assert loss.clusters.centroids.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("loss_class", LOSSES)
def test_training_under_fp16_autocast_with_a_scaler(loss_class: type[ClusterNSLoss], bert: Path) -> None:
    """A loop of one's own, since the trainer's fp16 asks for a GPU."""
    model = load_model(bert)
    loss = make(loss_class, model)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024), torch.optim.AdamW(model.parameters(), 1e-3)
    before, values = loss.clusters.centroids.clone(), []
    model.train()
    for step in range(6):
        with torch.autocast("cpu", torch.float16):
            parts = loss([model.preprocess(make_sentences(ROWS, seed=step % 2))])
        assert all(value.dtype == torch.float32 for value in parts.values())
        scaler.scale(parts.total()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        values.append(float(parts.total().detach()))
    assert sum(values[-2:]) < sum(values[:2])
    assert scaler.get_scale() == 1024, "no step may have been skipped"
    assert loss.clusters.centroids.dtype == torch.float32
    assert not torch.equal(before, loss.clusters.centroids)


@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_scaler_is_told_to_take_the_sum(loss_class: type[ClusterNSLoss]) -> None:
    loss = make(loss_class, IndexedStub(WIDTH), momentum=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pytest.raises(TypeError, match=r"cannot scale a dict of losses.*loss\(\.\.\.\)\.total\(\)"):
        scaler.scale(loss(features_of(columns_of(2))))
    gradients = []
    for scale in (lambda total: total, scaler.scale):
        loss.model.zero_grad()
        scale(loss(features_of(columns_of(2))).total()).backward()
        gradients.append(loss.model.weight.grad.clone())
    torch.testing.assert_close(gradients[1], 4 * gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_model_loaded_in_bf16(loss_class: type[ClusterNSLoss], bert: Path, tmp_path: Path) -> None:
    model = load_model(bert, model_kwargs={"dtype": torch.bfloat16})
    assert next(model.parameters()).dtype == torch.bfloat16
    loss = make(loss_class, model)
    before = loss.clusters.centroids.clone()
    trainer = train(model, loss, tmp_path, learning_rate=1e-2)
    assert log_of(trainer)[-1] < log_of(trainer)[0]
    assert loss.clusters.centroids.dtype == torch.float32
    assert not torch.equal(before, loss.clusters.centroids)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert loss([model.preprocess(make_sentences(ROWS))]).total().dtype == torch.float32


# What the trainer does to models and losses


@pytest.mark.slow
@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_compiled_model(loss_class: type[ClusterNSLoss], bert: Path, tmp_path: Path, moves: list[int]) -> None:
    model = load_model(bert)
    loss = make(loss_class, model)
    if loss_class is CachedClusterNSLoss:
        loss.mini_batch_size = 6  # one shape to compile
    state = loss.clusters.centroids.clone()
    trainer = train(model, loss, tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    assert type(loss.model).__name__ == "OptimizedModule"
    assert moves == [12] * 2
    assert not torch.equal(state, loss.clusters.centroids)
    assert all(torch.isfinite(torch.tensor(log_of(trainer))))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor calls a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_model_compiled_by_inductor_trains_alike(loss_class: type[ClusterNSLoss]) -> None:
    """A small model, for whole transformers take minutes to compile."""
    model = Scaled(WIDTH)
    results = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="inductor")):
        model.zero_grad()
        loss = make(loss_class, wrap(model))
        if loss_class is CachedClusterNSLoss:
            loss.mini_batch_size = 6  # one shape to compile
        parts = loss(features_of(columns_of(2)))
        parts.backward()
        results.append((parts.total().detach(), model.weight.grad.clone(), loss.clusters.centroids.clone()))
    assert type(loss.model).__name__ == "OptimizedModule"
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.parametrize("loss_class", LOSSES)
def test_gradient_accumulation_moves_the_state_at_every_forward(
    loss_class: type[ClusterNSLoss], bert: Path, tmp_path: Path, moves: list[int]
) -> None:
    model = load_model(bert)
    trainer = train(model, make(loss_class, model), tmp_path, gradient_accumulation_steps=3, max_steps=2)
    assert trainer.state.global_step == 2
    assert moves == [12] * 6


@pytest.mark.slow
@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_dict_of_data_sets_and_losses(loss_class: type[ClusterNSLoss], bert: Path, tmp_path: Path) -> None:
    """One loss for two of the data sets, another one, and a built-in."""
    model = load_model(bert)
    sentences = make_sentences(48)
    shared, own = make(loss_class, model), make(loss_class, model)
    losses = {"texts": shared, "more": shared, "pairs": own, "plain": MultipleNegativesRankingLoss(model)}
    pairs = {"anchor": sentences, "positive": sentences[::-1]}
    data = DatasetDict(
        texts=Dataset.from_dict({"text": sentences}),
        more=Dataset.from_dict({"text": make_sentences(48, seed=1)}),
        pairs=Dataset.from_dict(pairs),
        plain=Dataset.from_dict(pairs),
    )
    before = shared.clusters.centroids.clone()
    trainer = train(
        model,
        losses,
        tmp_path,
        data=data,
        callbacks=[ClusterStateCallback(losses)],
        max_steps=16,
        save_strategy="steps",
        save_steps=16,
        multi_dataset_batch_sampler="round_robin",
    )
    for loss in (shared, own):
        assert not torch.equal(before, loss.clusters.centroids)
    assert not torch.equal(shared.clusters.centroids, own.clusters.centroids)
    assert all(torch.isfinite(torch.tensor(log_of(trainer))))
    fresh = {name: make(loss_class, model, started=False) for name in ("texts", "more", "pairs")}
    from st_clusterns.callbacks import STATE_FILE, load_state

    load_state(fresh, tmp_path / "checkpoint-16" / STATE_FILE)
    assert torch.equal(fresh["more"].clusters.centroids, shared.clusters.centroids)
    assert torch.equal(fresh["pairs"].clusters.centroids, own.clusters.centroids)


@pytest.mark.slow
@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_model_init_begins_each_training_anew(
    loss_class: type[ClusterNSLoss], wrapped: bool, bert: Path, tmp_path: Path
) -> None:
    """As a hyperparameter search does: the second training must not see what the first has taught the clusters."""
    model = load_model(bert)
    inner = make(loss_class, model, started=False)
    inner.start.needed = 24
    inner.start.rows = torch.zeros(2, 24, DIMENSION)
    loss = MatryoshkaLoss(model, inner, [DIMENSION, 8]) if wrapped else inner
    trainer = train(None, loss, tmp_path, model_init=lambda: load_model(bert))
    first, state, first_model = log_of(trainer), inner.clusters.centroids.clone(), inner.model
    assert inner.clusters.started
    trainer.train()
    assert inner.model is not first_model
    assert log_of(trainer) == first
    assert torch.equal(inner.clusters.centroids, state)


def test_the_same_model_in_a_wrapper_keeps_the_state() -> None:
    """The trainer wraps the model for several processes, or compiles it, before the first step."""
    loss = make(ClusterNSLoss, IndexedStub(WIDTH))
    before = loss.clusters.centroids.clone()
    wrapper = nn.Module()
    wrapper.module = loss.model
    loss.model = wrapper
    assert torch.equal(before, loss.clusters.centroids)
    loss.model = IndexedStub(WIDTH)
    assert not loss.clusters.started


@pytest.mark.slow
@pytest.mark.parametrize("loss_class", LOSSES)
def test_an_adapter_is_trained_alone(loss_class: type[ClusterNSLoss], bert: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load_model(bert)
    model.add_adapter(peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query", "value"]))
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    loss = make(loss_class, model)
    state = loss.clusters.centroids.clone()
    trainer = train(
        model,
        loss,
        tmp_path,
        callbacks=[ClusterStateCallback(loss)],
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
    )
    assert frozen
    for name, value in model.named_parameters():
        assert name not in frozen or torch.equal(value, frozen[name]), name
    assert any(value.any() for name, value in model.named_parameters() if "lora_B" in name), "zero before training"
    assert not torch.equal(state, loss.clusters.centroids)
    assert all(torch.isfinite(torch.tensor(log_of(trainer))))


@pytest.mark.slow
def test_training_of_an_adapter_resumes(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_script

    peft = pytest.importorskip("peft")

    def with_adapter(folder: Path) -> SentenceTransformer:
        model = load_model(folder)
        torch.manual_seed(0)
        model.add_adapter(peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query", "value"]))
        return model

    monkeypatch.setattr(train_script, "load_model", with_adapter)
    whole = train_script.train(bert, tmp_path / "whole")
    train_script.train(bert, tmp_path / "stopped", stop_after=20)
    resumed = train_script.train(bert, tmp_path / "stopped", resume=True)
    assert resumed["values"] == whole["values"][20:]
    for name, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name
