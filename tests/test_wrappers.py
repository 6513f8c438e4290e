"""Wrapper losses, precisions and whatever else the trainer may do to a model: it works, or is refused with a reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from model_kinds import import_peft
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
from test_cached import IndexedStub, columns_of, corpus_around, features_of, moves, with_tokens  # noqa: F401
from tiny_bert import DIMENSION, load_model, make_sentences, save_bert
from torch import Tensor, nn

from st_clusterns import CachedClusterNSLoss, ClusterNSLoss, ClusterStateCallback, CorpusClusters
from st_clusterns.losses.contrastive import ContrastiveLoss
from st_clusterns.losses.published import PublishedClusterNSLoss
from st_clusterns.training.callbacks import STATE_FILE, load_state

ROWS, WIDTH, CLUSTERS = 12, 8, 3  # of the stub's columns
LOSSES = [ClusterNSLoss, CachedClusterNSLoss]
METHODS = ["default", "published"]
PUBLISHED: dict[str, Any] = {
    "n_clusters": CLUSTERS,
    "momentum": 0.1,
    "margin_weight": 1.0,
    "hard_negative_weight": 1.5,
    "start_similarity": 1.0,
}

both_losses = pytest.mark.parametrize("loss_class", LOSSES)
both_methods = pytest.mark.parametrize("method", METHODS)


def make(method: str, loss_class: type[ClusterNSLoss], model: Any, *, started: bool = True, **settings: Any) -> Any:
    """A loss around random centroids; `started=False` leaves those of the published one to start by themselves."""
    if loss_class is CachedClusterNSLoss:
        settings = {"mini_batch_size": 5, **settings}
    width = model.get_embedding_dimension()
    centroids = torch.randn(CLUSTERS, width, generator=torch.Generator().manual_seed(5))
    if method == "default":
        return loss_class(model, corpus_around(centroids), **settings)
    loss = loss_class.from_preset(model, "paper/bert-base", **{**PUBLISHED, **settings})
    assert isinstance(loss, PublishedClusterNSLoss)
    if started:
        start(loss, centroids)
    return loss


def start(loss: PublishedClusterNSLoss, centroids: Tensor) -> None:
    loss.centroids.centroids.copy_(centroids)
    loss.centroids.started = True


def state_of(loss: ContrastiveLoss) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loss.named_buffers() if not name.startswith("model.")}


def assert_moved(loss: ContrastiveLoss, before: dict[str, Tensor]) -> None:
    """Centroids of the published method have moved; nothing of the default one ever changes."""
    same = all(torch.equal(value, before[name]) for name, value in state_of(loss).items())
    assert same != isinstance(loss, PublishedClusterNSLoss)


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
            "per_device_train_batch_size": ROWS,
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


def log_of(trainer: SentenceTransformerTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_falls(trainer: SentenceTransformerTrainer) -> None:
    """The mean of the last two steps is below that of the first two: one step is mostly its batch."""
    values = log_of(trainer)
    assert sum(values[-2:]) < sum(values[:2])


def two_columns(count: int = 72) -> Dataset:
    sentences = make_sentences(count)
    return Dataset.from_dict({"anchor": sentences, "positive": sentences})


# MatryoshkaLoss


def matryoshka_by_hand(columns: list[Tensor], loss: ContrastiveLoss, dims: dict[int, float]) -> Tensor:
    """Dimension by dimension: a loss of that width around the moved, truncated centroids."""
    total = torch.zeros(())
    for dim, weight in dims.items():
        model = IndexedStub(dim)
        if isinstance(loss, PublishedClusterNSLoss):
            narrow: Any = make("published", ClusterNSLoss, model, momentum=0.0)
            start(narrow, loss.centroids.centroids[:, :dim])
        else:
            clusters: CorpusClusters = loss.clusters  # type: ignore[assignment]
            narrow = ClusterNSLoss(model, replace(clusters, centroids=clusters.centroids[:, :dim]))
        rows = [F.normalize(column[:, :dim], dim=1) for column in columns]
        total = total + weight * narrow.compute_loss_from_embeddings(rows)
    return total


@both_losses
@both_methods
def test_matryoshka_truncates_the_centroids_and_moves_once(
    method: str,
    loss_class: type[ClusterNSLoss],
    moves: list[int],  # noqa: F811
) -> None:
    model = IndexedStub(WIDTH)
    dims = {4: 0.5, 8: 2.0, 2: 1.0}
    inner = make(method, loss_class, model)
    before = state_of(inner)
    loss = MatryoshkaLoss(model, inner, list(dims), list(dims.values()))
    columns = columns_of(3)
    total = loss(features_of(columns), None)
    total.backward()
    assert moves == ([ROWS] if method == "published" else [])
    assert_moved(inner, before)
    gradient, model.weight.grad = model.weight.grad.clone(), None
    moves.clear()
    expected = matryoshka_by_hand([column @ model.weight for column in columns], inner, dims)
    torch.testing.assert_close(total.detach(), expected.detach())
    expected.backward()
    torch.testing.assert_close(gradient, model.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_columns", [1, 2])
@both_methods
def test_matryoshka_cached_is_matryoshka_plain(method: str, n_columns: int) -> None:
    """With copies of texts, which count at every dimension, and with one column."""
    results = []
    for loss_class in LOSSES:
        torch.manual_seed(0)
        model = IndexedStub(WIDTH)
        inner = make(method, loss_class, model, temperature=0.5)
        total = MatryoshkaLoss(model, inner, [8, 4, 2])(with_tokens(features_of(columns_of(n_columns))), None)
        total.backward()
        results.append((total.detach(), model.weight.grad, state_of(inner)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@both_losses
def test_copies_of_a_text_count_inside_matryoshka(loss_class: type[ClusterNSLoss]) -> None:
    """A canary for the test above."""
    model = IndexedStub(WIDTH)
    loss = MatryoshkaLoss(model, make("default", loss_class, model, temperature=1.0), [8, 4])
    columns = features_of(columns_of(2))
    assert loss(with_tokens(columns), None).detach() < loss(columns, None).detach() - 0.002


@both_losses
def test_a_step_without_the_full_width_moves_nothing(
    loss_class: type[ClusterNSLoss],
    moves: list[int],  # noqa: F811
) -> None:
    model = IndexedStub(WIDTH)
    inner = make("published", loss_class, model)
    before = state_of(inner)
    MatryoshkaLoss(model, inner, [4, 2])(features_of(columns_of(2)), None).backward()
    assert not moves
    for name, value in state_of(inner).items():
        assert torch.equal(before[name], value), name


@pytest.mark.slow
@both_losses
@both_methods
def test_matryoshka_trains(
    method: str,
    loss_class: type[ClusterNSLoss],
    bert: Path,
    tmp_path: Path,
    moves: list[int],  # noqa: F811
) -> None:
    model = load_model(bert)
    loss = MatryoshkaLoss(model, make(method, loss_class, model, started=False), [DIMENSION, 8])
    trainer = train(model, loss, tmp_path, callbacks=[ClusterStateCallback(loss)])
    assert moves == ([ROWS] * 5 if method == "published" else []), "the first batch starts the centroids"
    assert_falls(trainer)


# AdaptiveLayerLoss and Matryoshka2dLoss


def layered(name: str, model: SentenceTransformer, inner: Any) -> nn.Module:
    if name == "AdaptiveLayerLoss":
        return AdaptiveLayerLoss(model, inner, n_layers_per_step=-1)
    return Matryoshka2dLoss(model, inner, [DIMENSION, 8], n_layers_per_step=-1, n_dims_per_step=-1)


both_layered = pytest.mark.parametrize("name", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])


@pytest.mark.slow
@both_layered
@both_methods
def test_layers_train_and_move_once_a_step(
    method: str,
    name: str,
    bert: Path,
    tmp_path: Path,
    moves: list[int],  # noqa: F811
) -> None:
    model = load_model(bert)
    inner = make(method, ClusterNSLoss, model)
    before = state_of(inner)
    trainer = train(model, layered(name, model, inner), tmp_path, data=two_columns())
    assert moves == ([ROWS] * 6 if method == "published" else [])
    assert_moved(inner, before)
    assert_falls(trainer)


@pytest.mark.slow
@both_layered
def test_layers_start_the_centroids_once(
    name: str,
    bert: Path,
    tmp_path: Path,
    moves: list[int],  # noqa: F811
) -> None:
    """After two batches' worth of rows, none of which may be counted once a layer."""
    model = load_model(bert)
    inner = make("published", ClusterNSLoss, model, started=False, n_clusters=2 * ROWS)
    train(model, layered(name, model, inner), tmp_path, data=two_columns())
    assert moves == [ROWS] * 4


def test_centroids_follow_the_last_layer(bert: Path) -> None:
    """Step by step: inside layers, the centroids move as they do without."""
    model = load_model(bert).eval()
    columns = [model.preprocess(make_sentences(ROWS, seed)) for seed in range(2)]
    states = []
    for wrap in (lambda inner: inner, lambda inner: AdaptiveLayerLoss(model, inner, n_layers_per_step=-1)):
        inner = make("published", ClusterNSLoss, model)
        inner.is_training = lambda: True  # the model without its dropout
        wrap(inner)([dict(column) for column in columns], None)
        states.append(inner.centroids.centroids)
    torch.testing.assert_close(*states)


@both_layered
@both_methods
def test_one_column_inside_layers_is_refused(name: str, method: str, bert: Path) -> None:
    model = load_model(bert)
    inner = make(method, ClusterNSLoss, model)
    features = model.preprocess(make_sentences(ROWS))
    with pytest.raises(ValueError, match=r"need the text column twice.*dataset\.add_column"):
        layered(name, model, inner)([dict(features)], None)
    inner([dict(features)]).backward()  # outside, it goes on working


@both_layered
@pytest.mark.parametrize("n_columns", [1, 2])
@both_methods
def test_the_cached_loss_is_refused_inside_layers(name: str, method: str, n_columns: int, bert: Path) -> None:
    model = load_model(bert)
    inner = make(method, CachedClusterNSLoss, model)
    columns = [model.preprocess(make_sentences(ROWS)) for _ in range(n_columns)]
    with pytest.warns(UserWarning, match="is not compatible with|AdaptiveLayerLoss"):
        loss = layered(name, model, inner)
    with pytest.raises(ValueError, match="read all layers of one forward pass, which a cached loss does not keep"):
        loss([dict(column) for column in columns], None)
    if name == "AdaptiveLayerLoss":  # Matryoshka2dLoss leaves its mark on the loss
        inner(columns).backward()


# Precisions


class Scaled(IndexedStub):
    """Without matrix products, so that autocast leaves its embeddings in float32."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["embedding"] * self.weight.sum(dim=0)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_losses
@both_methods
def test_autocast_changes_nothing_of_the_arithmetic(
    method: str, loss_class: type[ClusterNSLoss], dtype: torch.dtype
) -> None:
    results = []
    model = Scaled(WIDTH)
    for enabled in (False, True):
        loss = make(method, loss_class, model)
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            value = loss(features_of(columns_of(3)))
        value.backward()
        results.append([value.detach(), model.weight.grad.clone(), *state_of(loss).values()])
    for exact, under_autocast in zip(*results, strict=True):
        assert torch.equal(exact, under_autocast)


def test_autocast_would_change_the_arithmetic() -> None:
    """A canary for the test above."""
    a, b = (F.normalize(column, dim=1) for column in columns_of(2))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = (a @ b.T).float()
    assert not torch.allclose(rounded, a @ b.T, atol=1e-4)


@pytest.mark.slow
@both_losses
@both_methods
def test_training_under_bf16_autocast(method: str, loss_class: type[ClusterNSLoss], bert: Path, tmp_path: Path) -> None:
    model = load_model(bert)
    loss = make(method, loss_class, model)
    before = state_of(loss)
    trainer = train(model, loss, tmp_path, bf16=True, data=two_columns())
    assert_falls(trainer)
    assert_moved(loss, before)
    assert loss([model.preprocess(make_sentences(ROWS))]).dtype == torch.float32
    for name, value in state_of(loss).items():
        assert value.dtype == before[name].dtype, name


@pytest.mark.slow
@both_losses
@both_methods
def test_training_under_fp16_autocast_with_a_scaler(method: str, loss_class: type[ClusterNSLoss], bert: Path) -> None:
    """A loop of one's own, since the trainer's fp16 asks for a GPU."""
    model = load_model(bert)
    loss = make(method, loss_class, model)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024), torch.optim.AdamW(model.parameters(), 1e-3)
    before, values = state_of(loss), []
    model.train()
    for step in range(6):
        with torch.autocast("cpu", torch.float16):
            value = loss([model.preprocess(make_sentences(ROWS, seed=step % 2)) for _ in range(2)])
        assert value.dtype == torch.float32
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        values.append(float(value.detach()))
    assert sum(values[-2:]) < sum(values[:2])
    assert scaler.get_scale() == 1024, "no step may have been skipped"
    assert_moved(loss, before)


@both_losses
@both_methods
def test_a_scaler_scales_every_gradient(method: str, loss_class: type[ClusterNSLoss]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    gradients = []
    for scale in (lambda value: value, scaler.scale):
        torch.manual_seed(0)
        loss = make(method, loss_class, IndexedStub(WIDTH))
        scale(loss(features_of(columns_of(2)))).backward()
        gradients.append(loss.model.weight.grad.clone())
    torch.testing.assert_close(gradients[1], 4 * gradients[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_losses
@both_methods
def test_a_model_in_half_precision_is_refused(
    method: str, loss_class: type[ClusterNSLoss], dtype: torch.dtype, bert: Path
) -> None:
    model = load_model(bert, model_kwargs={"dtype": dtype})
    with pytest.raises(ValueError, match=rf"weights are in {dtype}.*call model\.float\(\)"):
        make(method, loss_class, model)
    make(method, loss_class, model.float())


# What the trainer does to models and losses


@pytest.mark.slow
@both_losses
@both_methods
def test_a_compiled_model(
    method: str,
    loss_class: type[ClusterNSLoss],
    bert: Path,
    tmp_path: Path,
    moves: list[int],  # noqa: F811
) -> None:
    model = load_model(bert)
    one_shape = {"mini_batch_size": 6} if loss_class is CachedClusterNSLoss else {}
    loss = make(method, loss_class, model, **one_shape)
    before = state_of(loss)
    trainer = train(model, loss, tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    assert type(loss.model).__name__ == "OptimizedModule"
    assert moves == ([ROWS] * 2 if method == "published" else [])
    assert_moved(loss, before)
    assert all(torch.isfinite(torch.tensor(log_of(trainer))))


def test_clusters_noted_on_a_model_are_found_once_it_is_compiled() -> None:
    model = IndexedStub(WIDTH)
    clusters = corpus_around(torch.randn(CLUSTERS, WIDTH))
    clusters.note_on(model)
    assert ClusterNSLoss(torch.compile(model, backend="eager")).clusters is clusters


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor calls a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
@both_losses
@both_methods
def test_a_model_compiled_by_inductor_trains_alike(method: str, loss_class: type[ClusterNSLoss]) -> None:
    """A small model, for whole transformers take minutes to compile."""
    model = Scaled(WIDTH)
    one_shape = {"mini_batch_size": 6} if loss_class is CachedClusterNSLoss else {}
    results = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="inductor")):
        model.zero_grad()
        loss = make(method, loss_class, wrap(model), **one_shape)
        value = loss(features_of(columns_of(2)))
        value.backward()
        results.append((value.detach(), model.weight.grad.clone(), *state_of(loss).values()))
    assert type(loss.model).__name__ == "OptimizedModule"
    torch.testing.assert_close(*results)


@both_losses
@both_methods
def test_a_model_in_a_wrapper_keeps_the_state(method: str, loss_class: type[ClusterNSLoss]) -> None:
    """The trainer wraps the model for several processes before the first step."""
    loss = make(method, loss_class, IndexedStub(WIDTH))
    before = state_of(loss)

    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.module = model

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return self.module(features)

    alone = loss.eval()(features_of(columns_of(2))).detach()
    loss.model = Wrapper(loss.model).eval()
    for name, value in state_of(loss).items():
        assert torch.equal(before[name], value), name
    torch.testing.assert_close(loss(features_of(columns_of(2))).detach(), alone)


@pytest.mark.slow
@both_losses
@both_methods
def test_gradient_accumulation_moves_the_centroids_at_every_forward(
    method: str,
    loss_class: type[ClusterNSLoss],
    bert: Path,
    tmp_path: Path,
    moves: list[int],  # noqa: F811
) -> None:
    model = load_model(bert)
    loss = make(method, loss_class, model)
    calls: list[float] = []
    loss.register_forward_hook(lambda module, inputs, value: calls.append(float(value.detach())))
    trainer = train(model, loss, tmp_path, gradient_accumulation_steps=3, max_steps=2)
    assert trainer.state.global_step == 2
    assert moves == ([ROWS] * 6 if method == "published" else [])
    assert log_of(trainer) == pytest.approx([sum(calls[:3]) / 3, sum(calls[3:]) / 3], abs=1e-3)


@pytest.mark.slow
def test_accumulated_gradients_of_the_cached_loss_are_those_of_the_plain_one(tmp_path: Path) -> None:
    weights = []
    bert = save_bert(tmp_path / "bert", dropout=0.0)
    for loss_class in LOSSES:
        model = load_model(bert)
        train(model, make("default", loss_class, model), tmp_path, gradient_accumulation_steps=2, max_steps=2)
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@both_losses
def test_a_dict_of_data_sets_and_losses(loss_class: type[ClusterNSLoss], bert: Path, tmp_path: Path) -> None:
    """One loss for two of the data sets, another one of the same method, one of the other method, and a built-in."""
    model = load_model(bert)
    sentences = make_sentences(48)
    shared = make("published", loss_class, model, started=False)
    own = make("published", loss_class, model)
    corpus = make("default", loss_class, model)
    losses = {
        "texts": shared,
        "more": shared,
        "pairs": own,
        "corpus": corpus,
        "plain": MultipleNegativesRankingLoss(model),
    }
    pairs = {"anchor": sentences, "positive": sentences[::-1]}
    data = DatasetDict(
        texts=Dataset.from_dict({"text": sentences}),
        more=Dataset.from_dict({"text": make_sentences(48, seed=1)}),
        pairs=Dataset.from_dict(pairs),
        corpus=Dataset.from_dict({"text": sentences}),
        plain=Dataset.from_dict(pairs),
    )
    trainer = train(
        model,
        losses,
        tmp_path,
        data=data,
        callbacks=[ClusterStateCallback(losses)],
        max_steps=20,
        save_strategy="steps",
        save_steps=20,
        multi_dataset_batch_sampler="round_robin",
    )
    assert shared.centroids.started
    assert own.centroids.started
    assert not torch.equal(shared.centroids.centroids, own.centroids.centroids)
    assert all(torch.isfinite(torch.tensor(log_of(trainer))))
    fresh = {name: make("published", loss_class, model, started=False) for name in ("texts", "more", "pairs")}
    fresh["corpus"] = make("default", loss_class, model)
    load_state(fresh, tmp_path / "checkpoint-20" / STATE_FILE)
    assert torch.equal(fresh["more"].centroids.centroids, shared.centroids.centroids)
    assert torch.equal(fresh["pairs"].centroids.centroids, own.centroids.centroids)
    fresh["corpus"] = ClusterNSLoss(model, corpus_around(torch.randn(CLUSTERS, DIMENSION)))
    with pytest.raises(ValueError, match="other clusters"):
        load_state(fresh, tmp_path / "checkpoint-20" / STATE_FILE)


@pytest.mark.slow
@both_losses
@pytest.mark.parametrize("wrapped", [False, True])
@both_methods
def test_model_init_begins_each_training_anew(
    method: str, loss_class: type[ClusterNSLoss], wrapped: bool, bert: Path, tmp_path: Path
) -> None:
    """As a hyperparameter search does: the second training must not see what the first has taught the centroids."""
    model = load_model(bert)
    inner = make(method, loss_class, model, started=False, **({"n_clusters": 24} if method == "published" else {}))
    loss = MatryoshkaLoss(model, inner, [DIMENSION, 8]) if wrapped else inner
    trainer = train(None, loss, tmp_path, model_init=lambda: load_model(bert), callbacks=[ClusterStateCallback(loss)])
    first, state, first_model = log_of(trainer), state_of(inner), inner.model
    assert len(first) == 6
    assert method == "default" or inner.centroids.started
    trainer.train()
    assert inner.model is not first_model
    assert log_of(trainer)[-6:] == first
    for name, value in state_of(inner).items():
        assert torch.equal(value, state[name]), name


@pytest.mark.slow
def test_without_the_callback_the_centroids_stay_from_one_training_to_the_next(bert: Path, tmp_path: Path) -> None:
    """A canary for the test above."""
    inner = make("published", ClusterNSLoss, load_model(bert), started=False)
    trainer = train(None, inner, tmp_path, model_init=lambda: load_model(bert))
    first = log_of(trainer)
    trainer.train()
    assert log_of(trainer)[-6:] != first


def lora(model: SentenceTransformer) -> SentenceTransformer:
    peft = import_peft()
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query", "value"]))
    return model


@pytest.mark.slow
@both_losses
@both_methods
def test_an_adapter_is_trained_alone(method: str, loss_class: type[ClusterNSLoss], bert: Path, tmp_path: Path) -> None:
    model = lora(load_model(bert))
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    loss = make(method, loss_class, model, started=False)
    before = state_of(loss)
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
    assert_moved(loss, before)
    assert all(torch.isfinite(torch.tensor(log_of(trainer))))


@pytest.mark.slow
@both_methods
def test_training_of_an_adapter_resumes(
    method: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_script

    monkeypatch.setattr(train_script, "load_model", lambda folder: lora(load_model(folder)))
    whole = train_script.train(bert, tmp_path / "whole", method=method)
    train_script.train(bert, tmp_path / "stopped", method=method, stop_after=20)
    resumed = train_script.train(bert, tmp_path / "stopped", method=method, resume=True)
    assert resumed["values"] == whole["values"][20:]
    for name, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name
