"""Training a tiny real model, by `fit`, `old_fit` and the trainer: what the loader knows reaches the loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, TrainerState

from st_clusterns import ClusterBatchSampler, ClusterDataLoader, ClusterNSLoss, ReclusterCallback, embed_corpus
from st_clusterns import corpus as corpus_module
from st_clusterns import loader as loader_module

# `fit` leaves pinned memory on, and torch tells machines without an accelerator that it has no effect.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

K, TOPIC_WORDS, BATCH = 4, 6, 8
SENTENCES = [
    " ".join(f"w{topic * TOPIC_WORDS + (i * j + i // TOPIC_WORDS) % TOPIC_WORDS}" for j in range(1, 5)) + f" x{i}"
    for topic in range(K)
    for i in range(24)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of two layers with random weights, whose vocabulary is the words of the sentences."""
    path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", *sorted({word for sentence in SENTENCES for word in sentence.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(path)
    return str(path)


@pytest.fixture
def model(folder: str) -> SentenceTransformer:
    return SentenceTransformer(folder, device="cpu")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # `fit` writes ./checkpoints


def make_loader(model: SentenceTransformer, **settings: Any) -> ClusterDataLoader:
    settings = {"batch_size": BATCH, "n_clusters": K, "show_progress_bar": False, **settings}
    return ClusterDataLoader(SENTENCES, model, **settings)


Seen = list[tuple[list[int], list[int] | None]]


@pytest.fixture
def seen(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Each batch that reached the loss in training: the places of its sentences in the corpus, and the labels."""
    places = {tuple(model.tokenizer(sentence)["input_ids"]): i for i, sentence in enumerate(SENTENCES)}
    assert len(places) == len(SENTENCES)
    batches, original = [], ClusterNSLoss.forward

    def record(self: ClusterNSLoss, columns: Any, labels: Tensor | None = None) -> Any:
        columns = list(columns)
        if self.model.training:
            rows = [tuple(row[row != 0].tolist()) for row in columns[0]["input_ids"]]
            batches.append(([places[row] for row in rows], None if labels is None else labels.tolist()))
        return original(self, columns, labels)

    monkeypatch.setattr(ClusterNSLoss, "forward", record)
    return batches


def assert_labels_are_clusters(seen: Seen, ids: np.ndarray, epochs: int = 1) -> None:
    assert sorted(row for rows, _ in seen for row in rows) == sorted(epochs * list(range(len(SENTENCES))))
    for rows, labels in seen:
        assert labels == (ids[rows] + 1).tolist()


def weights(model: SentenceTransformer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def fit(model: SentenceTransformer, loader: ClusterDataLoader, loss: ClusterNSLoss, **settings: Any) -> None:
    torch.manual_seed(7)
    settings = {"warmup_steps": 0, "optimizer_params": {"lr": 1e-3}, "show_progress_bar": False, **settings}
    model.fit(train_objectives=[(loader, loss)], **settings)


def old_fit(model: SentenceTransformer, loader: ClusterDataLoader, loss: ClusterNSLoss, epochs: int) -> None:
    settings = {"warmup_steps": 0, "optimizer_params": {"lr": 1e-3}, "show_progress_bar": False}
    model.old_fit(train_objectives=[(loader, loss)], epochs=epochs, **settings)


# model.fit


def test_the_two_line_call_trains(model: SentenceTransformer, seen: Seen) -> None:
    """As the class shows it, with nothing but defaults."""
    before = weights(model)
    loader = ClusterDataLoader(SENTENCES, model, batch_size=BATCH, show_progress_bar=False)
    model.fit(train_objectives=[(loader, ClusterNSLoss(model))], epochs=1, show_progress_bar=False)
    assert_labels_are_clusters(seen, loader.clusters.ids)
    assert [len(rows) for rows, _ in seen] == [BATCH] * (len(SENTENCES) // BATCH)
    assert not same(before, weights(model))


def test_clusters_found_by_the_model_and_given_clusters_train_alike_to_the_last_bit(folder: str) -> None:
    results = {}
    for way in ("found", "given", "given, no margin"):
        model = SentenceTransformer(folder, device="cpu")
        loader = make_loader(model)
        if way == "found":
            loss = ClusterNSLoss(model, min_trust=0.05)
        else:
            corpus_module._CORPUS_OF_MODEL.pop(model)
            corpus_module._READERS_OF_MODEL.pop(model)
            settings = {"margin_weight": 0.0} if "no margin" in way else {}
            loss = ClusterNSLoss(model, clusters=loader.clusters, min_trust=0.05, **settings)
        assert loss.corpus is loader.clusters
        assert loss.clusters.trust.max() >= loss.min_trust, "a cluster must be trusted for this test to say anything"
        fit(model, loader, loss)
        results[way] = weights(model), loss.clusters.centroids
    found, given, no_margin = results.values()
    assert same(found[0], given[0])
    assert torch.equal(found[1], given[1])
    assert not same(given[0], no_margin[0])


def test_clusters_follow_the_training(model: SentenceTransformer) -> None:
    loader = make_loader(model)
    loss = ClusterNSLoss(model, momentum=0.1, margin_weight=0.0)  # nothing pulls the rows to where the centroids were
    fit(model, loader, loss, epochs=2)
    trained = torch.as_tensor(model.encode(SENTENCES, normalize_embeddings=True))

    def fitting(centroids: Tensor) -> float:
        return torch.cosine_similarity(trained, centroids[loader.clusters.ids]).mean().item()

    assert fitting(loss.clusters.centroids.cpu()) > fitting(torch.as_tensor(loader.clusters.centroids)) + 0.01


def test_the_published_preset_starts_under_fit(model: SentenceTransformer) -> None:
    loss = ClusterNSLoss.from_preset(model, "paper/bert-base", n_clusters=K, start_similarity=1.0)
    torch.manual_seed(7)
    fit(model, make_loader(model), loss)
    assert loss.clusters.started


def test_a_loss_made_before_the_loader_adopts_its_clusters(model: SentenceTransformer, seen: Seen) -> None:
    loss = ClusterNSLoss(model, n_clusters=K)
    assert not loss.clusters.started
    loader = make_loader(model)
    fit(model, loader, loss)
    assert loss.corpus is loader.clusters
    assert loss.clusters.started


def test_a_loss_made_before_the_loader_with_other_clusters_is_refused(model: SentenceTransformer) -> None:
    loss = ClusterNSLoss(model)
    loader = make_loader(model)
    with pytest.raises(ValueError, match=f"made with 128 clusters .*into {K}: make the ClusterDataLoader first"):
        fit(model, loader, loss)


# Several loaders for one model


def other_loader(model: SentenceTransformer) -> ClusterDataLoader:
    """As many clusters, of other sentences."""
    sentences = [sentence.replace("x", "x1") for sentence in SENTENCES[:60]]
    return ClusterDataLoader(sentences, model, batch_size=BATCH, n_clusters=K, show_progress_bar=False)


@pytest.mark.parametrize("keep", [True, False], ids=["both alive", "the first gone"])
def test_labels_of_another_loader_are_not_read_as_the_losss_own(model: SentenceTransformer, keep: bool) -> None:
    """Both number their clusters from 1 to K, and a label does not tell whose number it is."""
    loader = make_loader(model)
    loss = ClusterNSLoss(model)
    before, kept, loader = state_of(loss), [loader] if keep else [], other_loader(model)
    message = "2 data loaders have clustered a corpus" if keep else "labels come that may be the numbers of another"
    with pytest.raises(ValueError, match=rf"{message}.*clusters=loader\.clusters"):
        fit(model, loader, loss)
    assert same(before, state_of(loss))
    del kept


def test_a_new_loss_does_not_guess_between_two_loaders(model: SentenceTransformer) -> None:
    loaders = [make_loader(model), other_loader(model)]
    with pytest.raises(ValueError, match="2 data loaders have clustered a corpus for this model"):
        ClusterNSLoss(model)
    assert all(ClusterNSLoss(model, clusters=loader.clusters).corpus is loader.clusters for loader in loaders)


def test_two_loaders_with_their_own_losses_train_together(model: SentenceTransformer) -> None:
    objectives = [
        (loader, ClusterNSLoss(model, clusters=loader.clusters, momentum=0.5))
        for loader in (make_loader(model), other_loader(model))
    ]
    before = [state_of(loss) for _, loss in objectives]
    settings = {"warmup_steps": 0, "epochs": 1, "show_progress_bar": False}
    model.fit(train_objectives=objectives, **settings)
    for (loader, loss), state in zip(objectives, before, strict=True):
        assert not same(state, state_of(loss))
        assert loss.corpus is loader.clusters


def test_a_loader_that_takes_anothers_name_takes_its_place(model: SentenceTransformer) -> None:
    """The two lines of the example, run again with other sentences, as in a notebook."""
    for make in (make_loader, other_loader):
        loader = make(model)
        loss = ClusterNSLoss(model)
        assert loss.corpus is loader.clusters
        fit(model, loader, loss)


def test_loaders_of_the_same_clusters_are_one(model: SentenceTransformer) -> None:
    first, second = make_loader(model), make_loader(model, batch_size=4)
    loss = ClusterNSLoss(model)
    fit(model, first, loss)
    fit(model, second, loss)


# model.old_fit


@pytest.mark.parametrize("use_amp", [False, True])
def test_old_fit_in_mixed_precision_is_refused_with_the_remedy(model: SentenceTransformer, use_amp: bool) -> None:
    """torch's scaler iterates over a dict of losses, and would fail with: 'map' object has no attribute 'backward'."""
    before = weights(model)
    loader = make_loader(model)
    settings = {"show_progress_bar": False, "use_amp": use_amp}
    refused = pytest.raises(TypeError, match=r"cannot scale a dict of losses.*total\(\).*call `fit\(use_amp=True\)`")
    with refused if use_amp else nullcontext():
        model.old_fit(train_objectives=[(loader, ClusterNSLoss(model))], epochs=1, **settings)
    assert same(before, weights(model)) == use_amp


def planned(ids: np.ndarray, epoch: int, group_size: int) -> list[list[int]]:
    sampler = ClusterBatchSampler(range(len(ids)), BATCH, ids=ids, group_size=group_size)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_old_fit_keeps_the_batches_of_the_sampler(model: SentenceTransformer, seen: Seen) -> None:
    loader = make_loader(model, group_size=4)
    ids = loader.clusters.ids
    old_fit(model, loader, ClusterNSLoss(model), epochs=2)
    assert_labels_are_clusters(seen, ids, epochs=2)
    assert [rows for rows, _ in seen] == planned(ids, 0, group_size=4) + planned(ids, 1, group_size=4)


def test_fit_does_not_keep_them(model: SentenceTransformer, seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    """And the loader says so."""
    loader = make_loader(model, group_size=BATCH)
    assert "does not keep group_size=8" in caplog.text
    fit(model, loader, ClusterNSLoss(model))
    assert_labels_are_clusters(seen, loader.clusters.ids)
    assert [rows for rows, _ in seen] != planned(loader.clusters.ids, 0, group_size=BATCH)


@pytest.mark.parametrize(("recluster", "expected"), [(True, [96, 96, 96]), (False, [96])])
def test_recluster_embeds_the_corpus_before_every_epoch(
    recluster: bool, expected: list[int], model: SentenceTransformer, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New clusters reach the labels and the batches of the same epoch; the model goes on in training mode."""
    embedded, history = [], []

    def embed(sentences: list[str], *args: Any, **settings: Any) -> np.ndarray:
        embedded.append(len(sentences))
        return embed_corpus(sentences, *args, **settings)

    def follow(embeddings: np.ndarray, clusters: Any, seed: int, sentences: list[str]) -> Any:
        assert sentences is SENTENCES
        followed = corpus_module.follow_corpus(embeddings, clusters, seed, sentences=sentences)
        history.append((followed.ids + 1) % K)  # turned, so that old labels would be wrong
        return replace(followed, ids=history[-1])

    monkeypatch.setattr(loader_module, "embed_corpus", embed)
    monkeypatch.setattr(loader_module, "follow_corpus", follow)
    loader = make_loader(model, group_size=4, recluster=recluster)
    history.append(loader.clusters.ids)
    old_fit(model, loader, ClusterNSLoss(model), epochs=3)
    assert embedded == expected
    assert len(seen) == 3 * len(loader)
    for epoch in range(3):
        batches = seen[epoch * len(loader) : (epoch + 1) * len(loader)]
        ids = history[epoch if recluster else 0]
        assert_labels_are_clusters(batches, ids)
        assert [rows for rows, _ in batches] == planned(ids, epoch, group_size=4)


# SentenceTransformerTrainer


def train(
    model: SentenceTransformer,
    loss: ClusterNSLoss,
    ids: np.ndarray,
    batch_sampler: Any = ClusterBatchSampler,
    epochs: int = 1,
    labelled: bool = True,
    callbacks: Any = None,
) -> SentenceTransformerTrainer:
    dataset = Dataset.from_dict({"sentence": SENTENCES, **({"label": ids + 1} if labelled else {})})
    arguments = SentenceTransformerTrainingArguments(
        output_dir="out",
        batch_sampler=batch_sampler,
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
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=dataset, eval_dataset=dataset, loss=loss, callbacks=callbacks
    )
    trainer.train()
    return trainer


def clusters_a_batch(seen: Seen) -> float:
    return float(np.mean([len(set(labels)) for _, labels in seen]))


def test_the_trainer_keeps_groups_logs_both_terms_and_writes_the_card(model: SentenceTransformer, seen: Seen) -> None:
    loader = make_loader(model)
    trainer = train(model, ClusterNSLoss(model), loader.clusters.ids, epochs=2)
    assert_labels_are_clusters(seen, loader.clusters.ids, epochs=2)
    for rows, labels in seen[:10]:  # whole groups of 4; leftovers come with them now and then
        assert len(set(labels)) <= BATCH // 2, rows

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(seen) // 2
    for entry in logs:
        assert math.isclose(entry["contrastive"] + entry["false_negative"], entry["loss"], rel_tol=1e-2, abs_tol=2e-4)
    assert max(entry["false_negative"] for entry in logs) > 0

    model.save_pretrained("saved")
    card = Path("saved/README.md").read_text()
    assert "ClusterNSLoss" in card
    assert "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation" in card
    assert '"start_similarity": 0.4' in card
    again = SentenceTransformer("saved", device="cpu")
    np.testing.assert_allclose(again.encode(SENTENCES[:3]), model.encode(SENTENCES[:3]), atol=1e-6)


@pytest.mark.parametrize(("group_size", "lowest", "highest"), [(1, 2.8, 4.0), (BATCH, 1.0, 1.5)])
def test_the_trainer_takes_a_sampler_with_settings(
    group_size: int, lowest: float, highest: float, model: SentenceTransformer, seen: Seen
) -> None:
    loader = make_loader(model)
    sampler = functools.partial(ClusterBatchSampler, group_size=group_size)
    train(model, ClusterNSLoss(model), loader.clusters.ids, batch_sampler=sampler)
    assert lowest <= clusters_a_batch(seen) <= highest


def test_without_labels_the_nearest_centroids_serve(model: SentenceTransformer, seen: Seen) -> None:
    loader = make_loader(model)
    trainer = train(model, ClusterNSLoss(model), loader.clusters.ids, labelled=False)
    assert {labels for _, labels in seen} == {None}
    assert max(entry.get("false_negative", 0) for entry in trainer.state.log_history) > 0


def state_of(loss: ClusterNSLoss) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loss.named_buffers() if not name.startswith("model.")}


@pytest.mark.parametrize(
    "make",
    [
        ClusterNSLoss,
        lambda model: ClusterNSLoss.from_preset(model, "paper/bert-base", n_clusters=500, start_similarity=1.0),
    ],
    ids=["started", "collecting"],
)
def test_evaluating_leaves_the_state_untouched(
    make: Callable[[SentenceTransformer], ClusterNSLoss], model: SentenceTransformer
) -> None:
    loader = make_loader(model)
    loss = make(model)
    start = state_of(loss)
    trainer = train(model, loss, loader.clusters.ids, labelled=loss.corpus is not None)
    before = state_of(loss)
    assert not same(start, before), "training does move it"
    assert loss.training
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert same(before, state_of(loss))


# ReclusterCallback


def test_recluster_callback_moves_centroids_and_ids_at_the_second_epoch(
    model: SentenceTransformer, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(model)
    loss = ClusterNSLoss(model, momentum=0.0)  # so that nothing else moves them
    ids, first = loader.clusters.ids.copy(), loader.clusters
    callback = ReclusterCallback(loss, SENTENCES, ids)
    array, batches_before = ids, []

    def follow(embeddings: np.ndarray, clusters: Any, sentences: list[str]) -> Any:
        assert torch.equal(loss.clusters.centroids, torch.as_tensor(first.centroids)), "not before the second epoch"
        batches_before.append(len(seen))
        followed = corpus_module.follow_corpus(embeddings, clusters, sentences=sentences)
        return replace(followed, ids=followed.ids[::-1].copy())

    monkeypatch.setattr("st_clusterns.callbacks.follow_corpus", follow)
    train(model, loss, first.ids, epochs=2, labelled=False, callbacks=[callback])
    assert batches_before == [len(SENTENCES) // BATCH]
    assert not np.allclose(loss.clusters.centroids, first.centroids, atol=1e-3)
    np.testing.assert_array_equal(loss.clusters.centroids, callback.corpus.centroids)
    np.testing.assert_array_equal(loss.clusters.trust, callback.corpus.trust)
    assert ids is array
    np.testing.assert_array_equal(ids, callback.corpus.ids)
    assert not np.array_equal(ids, first.ids)


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3]), (2, [2]), (3, [3]), (4, [])])
def test_recluster_callback_comes_every_so_many_epochs(
    every: int, expected: list[int], model: SentenceTransformer, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(model)
    loss, epochs = ClusterNSLoss(model), []

    def follow(embeddings: np.ndarray, clusters: Any, sentences: list[str]) -> Any:
        assert not model.training
        epochs.append(len(seen) * BATCH // len(SENTENCES))
        return clusters

    monkeypatch.setattr("st_clusterns.callbacks.follow_corpus", follow)
    callback = ReclusterCallback(loss, SENTENCES, every=every)
    train(model, loss, loader.clusters.ids, epochs=4, labelled=False, callbacks=[callback])
    assert epochs == expected


@pytest.mark.parametrize("training", [True, False])
def test_recluster_callback_leaves_the_model_in_its_mode(training: bool, model: SentenceTransformer) -> None:
    make_loader(model)
    callback = ReclusterCallback(ClusterNSLoss(model), SENTENCES)
    before = callback.corpus
    model.train(training)
    callback.on_epoch_begin(None, TrainerState(epoch=1.0), None, model=model)
    assert callback.corpus is not before
    assert model.training == training


def test_recluster_callback_refuses_what_does_not_fit(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="no corpus clusters to go on from"):
        ReclusterCallback(ClusterNSLoss(model, n_clusters=K), SENTENCES)
    make_loader(model)
    loss = ClusterNSLoss(model)
    with pytest.raises(ValueError, match="know 96 sentences, got 95 sentences"):
        ReclusterCallback(loss, SENTENCES[:-1])
    with pytest.raises(ValueError, match="got 96 sentences and 3 ids"):
        ReclusterCallback(loss, SENTENCES, np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match="every must be 1 epoch or more, got 0"):
        ReclusterCallback(loss, SENTENCES, every=0)
