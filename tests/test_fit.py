"""Training a tiny real model by `fit`, `old_fit` and the trainer, with the data loader and the loss."""

from __future__ import annotations

import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import topic_sentences
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from tiny_bert import load_model
from torch import Tensor

from st_clusterns import ClusterBatchSampler, ClusterDataLoader, ClusterNSLoss, CorpusClusters, Recipe
from st_clusterns.losses.contrastive import ContrastiveLoss
from st_clusterns.training.trainer import run_trainer

# `fit` leaves pinned memory on, and torch tells machines without an accelerator that it has no effect.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

K, BATCH = 8, 8
SENTENCES = topic_sentences(96)
OTHERS = topic_sentences(60, seed=1)
PRESET = functools.partial(ClusterNSLoss.from_preset, name="paper/bert-base", start_similarity=1.0)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # `fit` writes ./checkpoints


def make_loader(model: SentenceTransformer, sentences: Iterable[str] = SENTENCES, **settings: Any) -> ClusterDataLoader:
    settings = {"batch_size": BATCH, "n_clusters": K, "show_progress_bar": False, **settings}
    return ClusterDataLoader(sentences, model, **settings)


Seen = list[tuple[list[int], list[int] | None]]


@pytest.fixture
def seen(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Each batch that reached the loss in training: the places of its sentences in the corpus, and the labels."""
    places = {tuple(model.tokenizer(sentence)["input_ids"]): i for i, sentence in enumerate(SENTENCES)}
    assert len(places) == len(SENTENCES)
    batches, original = [], ContrastiveLoss.forward

    def record(self: ContrastiveLoss, columns: Any, labels: Tensor | None = None) -> Any:
        columns = list(columns)
        if self.model.training:
            rows = [tuple(row[row != 0].tolist()) for row in columns[-1]["input_ids"]]
            batches.append(([places[row] for row in rows], None if labels is None else labels.tolist()))
        return original(self, columns, labels)

    monkeypatch.setattr(ContrastiveLoss, "forward", record)
    return batches


def rows_of(seen: Seen) -> list[list[int]]:
    return [rows for rows, _ in seen]


def assert_every_row_once(seen: Seen, epochs: int = 1) -> None:
    assert [len(rows) for rows in rows_of(seen)] == [BATCH] * (epochs * len(SENTENCES) // BATCH)
    rows = np.array(rows_of(seen)).reshape(epochs, len(SENTENCES))
    assert (np.sort(rows, axis=1) == np.arange(len(SENTENCES))).all()


def weights(model: SentenceTransformer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def state_of(loss: ContrastiveLoss) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loss.named_buffers() if not name.startswith("model.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


def fit(model: SentenceTransformer, loader: ClusterDataLoader, loss: ContrastiveLoss, **settings: Any) -> None:
    torch.manual_seed(7)
    settings = {"warmup_steps": 0, "optimizer_params": {"lr": 1e-3}, "show_progress_bar": False, **settings}
    model.fit(train_objectives=[(loader, loss)], **settings)


def old_fit(model: SentenceTransformer, loader: ClusterDataLoader, loss: ContrastiveLoss, **settings: Any) -> None:
    settings = {"warmup_steps": 0, "optimizer_params": {"lr": 1e-3}, "show_progress_bar": False, **settings}
    model.old_fit(train_objectives=[(loader, loss)], **settings)


# model.fit


def run_docstring(model: SentenceTransformer, change: tuple[str, str] = ("", "")) -> None:
    doc = inspect.getdoc(ClusterDataLoader) or ""
    example = doc[doc.index("::\n") + 3 : doc.index("Without `warmup_steps=0`")]
    assert change[0] in example
    names: dict[str, Any] = {"ClusterDataLoader": ClusterDataLoader, "ClusterNSLoss": ClusterNSLoss}
    exec(textwrap.dedent(example).replace(*change), {**names, "model": model, "sentences": SENTENCES})


def test_the_docstring_example_trains(model: SentenceTransformer, bert: Path) -> None:
    """And without `warmup_steps=0` it hardly does, as the docstring says."""
    before = weights(model)
    run_docstring(model)
    warmed = load_model(bert)
    assert same(before, weights(warmed))
    run_docstring(warmed, (", warmup_steps=0", ""))
    assert distance(before, weights(model)) > 100 * distance(before, weights(warmed)) > 0
    assert not np.allclose(model.encode(SENTENCES), warmed.encode(SENTENCES), atol=1e-3)


def test_fit_trains_on_every_sentence_without_labels(
    model: SentenceTransformer, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    before = weights(model)
    loader = make_loader(model, n_clusters=None)
    fit(model, loader, ClusterNSLoss(model))
    assert_every_row_once(seen)
    assert {labels for _, labels in seen} == {None}
    assert not same(before, weights(model))
    assert "label" not in caplog.text


def test_noted_and_given_clusters_train_alike_to_the_last_bit(bert: Path) -> None:
    ways: dict[str, Callable[[SentenceTransformer, CorpusClusters], ClusterNSLoss]] = {
        "noted": lambda model, clusters: ClusterNSLoss(model),
        "given": lambda model, clusters: ClusterNSLoss(model, clusters),
        "without the pull": lambda model, clusters: ClusterNSLoss(model, clusters, pull_weight=0.0),
    }
    results = {}
    for name, make in ways.items():
        model = load_model(bert)
        loader = make_loader(model)
        assert loader.clusters.has_topics, "or the clusters would have no say"
        if name != "noted":
            del model.corpus_clusters
        loss = make(model, loader.clusters)
        assert loss.clusters is loader.clusters
        fit(model, loader, loss)
        results[name] = weights(model)
    assert same(results["noted"], results["given"])
    assert not same(results["given"], results["without the pull"])


def test_training_draws_the_sentences_of_a_cluster_together(model: SentenceTransformer) -> None:
    """More than those of different clusters, and more than with the clusters of other sentences."""
    loader = make_loader(model)
    ids = loader.clusters.ids

    def contrast() -> float:
        rows = model.encode(SENTENCES, normalize_embeddings=True)
        cosines, same_cluster = rows @ rows.T, ids[:, None] == ids
        return float(cosines[same_cluster].mean() - cosines[~same_cluster].mean())

    before = contrast()
    fit(model, loader, ClusterNSLoss(model), epochs=3)
    assert contrast() > before + 0.1


def test_the_published_preset_starts_under_fit(model: SentenceTransformer) -> None:
    loss = PRESET(model, n_clusters=K)
    assert not loss.centroids.started
    fit(model, make_loader(model), loss)
    assert loss.centroids.started


# What a loader notes on its model


def test_a_loss_without_a_loader_is_an_error_that_names_the_ways_out(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match=r"has no clusters.*ClusterDataLoader.*clusters=Corpus.*from_preset\(model, "):
        ClusterNSLoss(model)
    make_loader(model)
    ClusterNSLoss(model)


def test_running_the_two_lines_again_and_again_leaves_the_model_as_it_was(model: SentenceTransformer) -> None:
    """As a cell of a notebook is run: neither modules, nor weights, nor a bit of an embedding change."""
    modules, before, rows = list(model), weights(model), model.encode(SENTENCES[:9])
    names = [name for name, _ in model.named_modules()]
    for _ in range(3):
        ClusterNSLoss(model, make_loader(model).clusters)
        ClusterNSLoss(model)
    assert len(model) == len(modules)
    assert all(now is then for now, then in zip(model, modules, strict=True))
    assert [name for name, _ in model.named_modules()] == names
    assert same(before, weights(model))
    np.testing.assert_array_equal(model.encode(SENTENCES[:9]), rows)


def test_the_next_loader_replaces_the_note(model: SentenceTransformer) -> None:
    """The losses made before keep their clusters."""
    first = make_loader(model)
    loss = ClusterNSLoss(model)
    second = make_loader(model, OTHERS)
    assert model.corpus_clusters is second.clusters
    assert model.corpus_clusters is not first.clusters
    assert ClusterNSLoss(model).clusters is second.clusters
    assert loss.clusters is first.clusters
    assert ClusterNSLoss(model, first.clusters).clusters is first.clusters, "what is passed wins"


def test_the_note_is_not_saved_with_the_model(model: SentenceTransformer) -> None:
    make_loader(model)
    model.save_pretrained("saved")
    with pytest.raises(ValueError, match="has no clusters"):
        ClusterNSLoss(SentenceTransformer("saved", device="cpu"))


def test_two_loaders_with_their_own_losses_train_together(model: SentenceTransformer) -> None:
    before = weights(model)
    objectives = [
        (loader, ClusterNSLoss(model, loader.clusters)) for loader in (make_loader(model), make_loader(model, OTHERS))
    ]
    states = [state_of(loss) for _, loss in objectives]
    assert not same(*states)
    model.fit(train_objectives=objectives, warmup_steps=0, epochs=1, show_progress_bar=False)
    assert not same(before, weights(model))
    assert all(same(state, state_of(loss)) for (_, loss), state in zip(objectives, states, strict=True))


# The loader itself


def test_a_loader_takes_a_generator_and_embeds_in_its_own_batch_size(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, forward = [], SentenceTransformer.forward

    def watched(self: SentenceTransformer, features: dict[str, Any], **settings: Any) -> Any:
        rows.append(len(features["input_ids"]))
        return forward(self, features, **settings)

    monkeypatch.setattr(SentenceTransformer, "forward", watched)
    loader = make_loader(model, (text for text in SENTENCES), batch_size=8)
    assert [example.texts[0] for example in loader.dataset] == SENTENCES
    assert max(rows) == 8


def test_a_loader_holds_every_sentence_and_clusters_distinct_ones(model: SentenceTransformer) -> None:
    texts = SENTENCES + SENTENCES[:16]
    loader = make_loader(model, texts)
    assert len(loader) == (len(SENTENCES) + 16) // BATCH
    assert [example.texts for example in loader.dataset] == [[text] for text in texts]
    assert loader.clusters.sentences == SENTENCES


@pytest.mark.parametrize(
    ("sentences", "settings", "message"),
    [
        (SENTENCES[:20], {"n_clusters": 11}, "n_clusters=11 does not fit 20 distinct sentences: choose 2 to 10"),
        (SENTENCES[:7], {"n_clusters": None}, "batch_size=8 does not fit 7 sentences"),
        (SENTENCES, {"batch_size": 1}, "batch_size must be 2 or more, got 1"),
        ("a sentence", {}, "must be a list of str, got str 'a sentence'"),
        (["the same"] * 8, {"n_clusters": None}, r"sentences holds 1 distinct text\(s\) in 8"),
    ],
)
def test_a_loader_refuses_before_it_embeds(
    sentences: Any, settings: dict[str, Any], message: str, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(SentenceTransformer, "encode")
    with pytest.raises(ValueError, match=message):
        make_loader(model, sentences, **settings)


# model.old_fit


def test_old_fit_trains_in_the_order_of_the_loader(
    model: SentenceTransformer, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    """A new order each epoch, that of the seed. The zeros that `old_fit` invents as labels are nothing to warn of."""
    before = weights(model)
    old_fit(model, make_loader(model, seed=3), ClusterNSLoss(model), epochs=2)
    assert_every_row_once(seen, epochs=2)
    order = torch.Generator().manual_seed(3)
    draws = torch.utils.data.DataLoader(range(len(SENTENCES)), BATCH, shuffle=True, generator=order)
    assert rows_of(seen) == [batch.tolist() for _ in range(2) for batch in draws]
    assert rows_of(seen)[:12] != rows_of(seen)[12:]
    assert not same(before, weights(model))
    assert {tuple(labels or ()) for _, labels in seen} == {BATCH * (0,)}
    assert "label" not in caplog.text


@pytest.mark.filterwarnings("ignore:.*(CUDA|cuda|GradScaler|torch_dtype|lr_scheduler).*")
def test_old_fit_in_mixed_precision(model: SentenceTransformer) -> None:
    before = weights(model)
    old_fit(model, make_loader(model), ClusterNSLoss(model), epochs=1, use_amp=True)
    assert not same(before, weights(model))


# The trainer


def train(model: SentenceTransformer, loss: ContrastiveLoss, ids: Any = None, epochs: int = 1, **settings: Any) -> Any:
    torch.manual_seed(7)
    columns = {"sentence": SENTENCES} if ids is None else {"sentence": SENTENCES, "label": list(ids)}
    dataset = Dataset.from_dict(columns)
    arguments = SentenceTransformerTrainingArguments(
        output_dir="out",
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        num_train_epochs=epochs,
        learning_rate=1e-3,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
        **settings,
    )
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=dataset, eval_dataset=dataset, loss=loss)
    trainer.train()
    return trainer


def clusters_a_batch(seen: Seen, ids: np.ndarray) -> float:
    return float(np.mean([len(set(ids[rows])) for rows in rows_of(seen)]))


def test_the_trainer_logs_the_loss_and_writes_the_card(model: SentenceTransformer, seen: Seen) -> None:
    clusters = CorpusClusters.fit(SENTENCES, model, K, show_progress_bar=False)
    trainer = train(model, ClusterNSLoss(model, clusters), epochs=2)
    assert_every_row_once(seen, epochs=2)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(seen) // 2
    assert losses[-1] < losses[0]

    model.save_pretrained("saved")
    card = Path("saved/README.md").read_text()
    assert "ClusterNSLoss" in card
    assert "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation" in card
    assert f'"n_clusters": {K}' in card
    assert '"has_topics": true' in card
    again = SentenceTransformer("saved", device="cpu")
    np.testing.assert_allclose(again.encode(SENTENCES[:3]), model.encode(SENTENCES[:3]), atol=1e-6)


def test_labels_change_nothing_and_are_told_of_once(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = []
    for labels in (None, range(96), [5] * 96):
        model = load_model(bert)
        clusters = CorpusClusters.fit(SENTENCES, model, K, show_progress_bar=False)
        caplog.clear()
        train(model, ClusterNSLoss(model, clusters), labels)
        results.append(weights(model))
        told = [r.getMessage() for r in caplog.records if "the label column is not used" in r.getMessage()]
        assert len(told) == (labels is not None)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize(("group_size", "lowest", "highest"), [(1, 4.2, 6.0), (4, 2.0, 3.5), (BATCH, 1.0, 2.5)])
def test_the_trainer_keeps_the_groups_of_a_sampler(
    group_size: int, lowest: float, highest: float, model: SentenceTransformer, seen: Seen
) -> None:
    ids = make_loader(model).clusters.ids
    sampler = functools.partial(ClusterBatchSampler, group_size=group_size)
    train(model, ClusterNSLoss(model), ids, batch_sampler=sampler)
    assert_every_row_once(seen)
    assert lowest <= clusters_a_batch(seen, ids) <= highest


def test_run_trainer_keeps_groups_of_a_label_column(model: SentenceTransformer, seen: Seen, tmp_path: Path) -> None:
    ids = make_loader(model).clusters.ids
    recipe = Recipe(batch_size=BATCH, max_steps=0)
    for group_size, most in ((1, 6.0), (BATCH, 2.5)):
        seen.clear()
        dataset = Dataset.from_dict({"sentence": SENTENCES, "label": ids})
        folder = tmp_path / f"groups-of-{group_size}"
        run_trainer(model, ClusterNSLoss(model), dataset, recipe, folder, group_size=group_size, show_progress=False)
        assert_every_row_once(seen)
        assert most - 2 < clusters_a_batch(seen, ids) <= most


# Evaluating


def test_neither_training_nor_evaluating_changes_the_clusters_of_a_loss(model: SentenceTransformer) -> None:
    make_loader(model)
    loss = ClusterNSLoss(model)
    start, fingerprint = state_of(loss), loss.clusters.fingerprint
    assert start
    metrics = train(model, loss).evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert same(start, state_of(loss))
    assert loss.clusters.fingerprint == fingerprint


@pytest.mark.parametrize("n_clusters", [K, 500], ids=["started", "collecting"])
def test_evaluating_leaves_the_published_centroids_untouched(n_clusters: int, model: SentenceTransformer) -> None:
    loss = PRESET(model, n_clusters=n_clusters)
    start = state_of(loss)
    trainer = train(model, loss)
    before, counts = state_of(loss), loss.centroids.get_extra_state().tolist()
    assert not same(start, before), "training does move them"
    assert loss.centroids.started == (n_clusters == K)
    assert loss.training
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert same(before, state_of(loss))
    assert loss.centroids.get_extra_state().tolist() == counts
