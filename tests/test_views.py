"""Views of texts: what they are made of, what they follow from, and that training reads them."""

from __future__ import annotations

import dataclasses
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from tiny_bert import load_model, make_sentences, save_bert
from torch import Tensor
from transformers import set_seed

from st_clusterns import ClusterDataLoader, ClusterNSLoss, ClusterStateCallback, CorpusClusters, Recipe, adapt
from st_clusterns.clustering.words import PIECES, count_words, split_pieces
from st_clusterns.evaluation.evaluators import SpanRetrievalEvaluator
from st_clusterns.losses.contrastive import ContrastiveLoss
from st_clusterns.models import copy_weights
from st_clusterns.training import adapt as adapt_module
from st_clusterns.training.trainer import run_trainer
from st_clusterns.training.views import DELETED, DOCUMENT, SPAN, TextViews, choose_kind, views_dataset

TOPICS: Any = SimpleNamespace(has_topics=True)


def distinct_words(count: int) -> str:
    return " ".join(f"w{place}" for place in random.Random(count).sample(range(10**6), count))


def views_of(kind: Any, text: str, count: int = 300) -> list[list[str]]:
    return [TextViews(kind, seed).view(text).split() for seed in range(count)]


@pytest.mark.parametrize("count", [2, 9, 57, 400])
def test_a_span_is_a_part_of_the_text(count: int) -> None:
    text = distinct_words(count)
    views = views_of("span", text)
    assert all(f" {' '.join(view)} " in f" {text} " for view in views)
    shares = [len(view) / count for view in views]
    assert min(shares) >= SPAN[0] - 0.5 / count
    assert max(shares) <= max(SPAN[1] + 0.5 / count, 1 / count)
    if count > 9:
        assert max(shares) - min(shares) > 0.8 * (SPAN[1] - SPAN[0])
    covered = {word for view in views for word in view}
    assert len(covered) > 0.95 * count, "every place of the text comes up"


@pytest.mark.parametrize("count", [2, 3, 8, 60])
def test_deletion_leaves_some_of_the_words_in_their_order(count: int) -> None:
    words = distinct_words(count).split()
    views = views_of("deletion", " ".join(words))
    for view in views:
        assert 0 < len(view) < count
        assert view == [word for word in words if word in view]
    if count > 8:
        kept = sum(map(len, views)) / (count * len(views))
        assert kept == pytest.approx(1 - DELETED, abs=0.02)


@pytest.mark.parametrize("kind", ["span", "deletion", "dropout"])
@pytest.mark.parametrize("text", ["", "   ", "word", " word ", "\n"])
def test_a_text_of_no_more_than_one_word_is_its_own_view(kind: Any, text: str) -> None:
    assert TextViews(kind).view(text) == text


def test_dropout_keeps_the_text() -> None:
    text = f"a  text with\twhite space {distinct_words(50)} "
    assert TextViews("dropout").view(text) == text
    assert list(views_dataset([text], TOPICS, "dropout")[0]) == ["sentence"]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind='crop' is no kind of view: choose one of 'span', 'dropout', 'deletion'"):
        views_dataset(["a text"], TOPICS, "crop")  # type: ignore[arg-type]


def test_documents_get_spans_and_sentences_do_not() -> None:
    documents = [distinct_words(DOCUMENT) for _ in range(3)]
    sentences = [distinct_words(DOCUMENT - 1) for _ in range(2)]
    assert choose_kind(documents + sentences, True) == choose_kind(documents, False) == "span"
    assert choose_kind(documents + sentences * 2, True) == choose_kind([], True) == "dropout"
    assert choose_kind(sentences, False) == choose_kind([], False) == "deletion"
    assert list(views_dataset(documents, TOPICS)[0]) == ["view", "sentence"]
    assert list(views_dataset(sentences, TOPICS)[0]) == ["sentence"]


@pytest.mark.parametrize(
    ("has_topics", "long", "kind"), [(True, False, "dropout"), (False, False, "deletion"), (True, True, "span")]
)
def test_the_loader_gives_the_views_that_suit_the_corpus(
    tmp_path: Path, has_topics: bool, long: bool, kind: Any
) -> None:
    texts = [distinct_words(DOCUMENT + place if long else 5 + place) for place in range(16)]
    model = load_model(save_bert(tmp_path / "bert"))
    clusters = CorpusClusters.fit(texts, embeddings=torch.eye(16, 32).numpy(), n_clusters=4)
    clusters = dataclasses.replace(clusters, has_topics=has_topics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CorpusClusters, "fit", lambda *_, **__: clusters)
        loader = ClusterDataLoader(texts, model, batch_size=4, show_progress_bar=False)
    expected = views_dataset(texts, clusters, kind)
    assert [example.texts for example in loader.dataset] == [list(row.values()) for row in expected]


def test_a_view_follows_from_seed_epoch_and_text_alone() -> None:
    texts = [distinct_words(count) for count in range(40, 120)]

    def drawn(seed: int, epoch: int, order: list[str]) -> dict[str, str]:
        views = TextViews("span", seed, "text")
        views.epoch = epoch
        rows = views({"text": order, "label": list(range(len(order)))})
        assert list(rows) == ["view", "text", "label"]
        assert rows["text"] == order
        return dict(zip(rows["text"], rows["view"], strict=True))

    first = drawn(3, 1, texts)
    random.random()
    assert drawn(3, 1, texts[::-1]) == first
    for other in (drawn(4, 1, texts), drawn(3, 2, texts)):
        assert sum(other[text] != first[text] for text in texts) > 0.9 * len(texts)


def test_a_data_set_keeps_its_views_when_it_is_shuffled_selected_split_or_sent_to_a_worker() -> None:
    sentences = [distinct_words(count) for count in range(40, 60)]
    dataset = views_dataset(sentences, TOPICS, "span", seed=5)
    expected = {text: TextViews("span", 5).view(text) for text in sentences}
    for changed in (
        dataset.shuffle(seed=1),
        dataset.select([4, 2]),
        dataset.train_test_split(0.5, seed=0)["train"],
        pickle.loads(pickle.dumps(dataset)),
    ):
        assert all(list(row) == ["view", "sentence"] and row["view"] == expected[row["sentence"]] for row in changed)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Each batch that reached a loss of ours in training, as the texts of its first column."""
    batches: list[list[str]] = []
    original = ContrastiveLoss.forward

    def record(self: ContrastiveLoss, columns: Any, labels: Tensor | None = None) -> Any:
        columns = list(columns)
        tokenizer = self.model.tokenizer
        batches.append(tokenizer.batch_decode(columns[0]["input_ids"], skip_special_tokens=True))
        return original(self, columns, labels)

    monkeypatch.setattr(ContrastiveLoss, "forward", record)
    return batches


@pytest.mark.parametrize(("several", "workers"), [(False, 0), (False, 1), (True, 0)])
def test_each_epoch_of_the_trainer_reads_the_views_of_that_epoch(
    tmp_path: Path, read: list[list[str]], several: bool, workers: int
) -> None:
    sentences = make_sentences(32, lengths=(7, 9))
    model = load_model(save_bert(tmp_path / "bert"))
    clusters = CorpusClusters.fit(sentences, model, 2, show_progress_bar=False)
    loss: Any = ClusterNSLoss(model, clusters)
    data: Any = views_dataset(sentences, clusters, "deletion")
    if several:  # the trainer puts a transform of its own around ours
        data, loss = DatasetDict({"topics": data}), {"topics": loss}
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=2,
        per_device_train_batch_size=16,
        dataloader_num_workers=workers,
        dataloader_pin_memory=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    SentenceTransformerTrainer(model, args, data, loss=loss, callbacks=[ClusterStateCallback(loss)]).train()
    views = TextViews("deletion")
    for epoch, batches in enumerate((read[:2], read[2:])):
        views.epoch = epoch
        assert sorted(view for batch in batches for view in batch) == sorted(map(views.view, sentences))


def documents(count: int) -> list[str]:
    return list(dict.fromkeys(make_sentences(count, lengths=(DOCUMENT, DOCUMENT + 9))))


@pytest.mark.parametrize("scores", [(0.5, 0.4), (0.5, 0.5), (0.4, 0.5)])
def test_adapt_keeps_the_start_unless_held_out_documents_are_found_more_often(
    tmp_path: Path, read: list[list[str]], monkeypatch: pytest.MonkeyPatch, scores: tuple[float, float]
) -> None:
    load_model(save_bert(tmp_path / "bert")).save(str(tmp_path / "start"))
    left = list(scores)
    monkeypatch.setattr(
        SpanRetrievalEvaluator, "__call__", lambda self, model, **_: {self.primary_metric: left.pop(0)}, raising=True
    )
    made: list[SpanRetrievalEvaluator] = []
    init = SpanRetrievalEvaluator.__init__
    monkeypatch.setattr(
        SpanRetrievalEvaluator, "__init__", lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1]
    )
    texts = documents(600)
    recipe = Recipe(batch_size=32, max_steps=2, learning_rate=1e-3, max_length=16)
    report = adapt(str(tmp_path / "start"), texts, tmp_path / "out", 4, recipe, show_progress=False)
    assert report["views"] == "span"
    assert report["search"] == {"before": scores[0], "after": scores[1]}
    before, after = (SentenceTransformer(str(tmp_path / name), device="cpu").state_dict() for name in ("start", "out"))
    kept = all(torch.equal(before[name], after[name]) for name in before)
    assert kept == (scores[1] <= scores[0])
    held = {" ".join(sorted(f"{a} {b}".split())) for a, b in zip(made[0].spans, made[0].rests, strict=True)}
    assert len(held) == len(texts) // 10
    trained = [view for batch in read for view in batch]
    whole = {" ".join(sorted(text.split())): f" {text} " for text in texts}
    assert len(trained) == 64
    assert all(any(f" {view} " in text for key, text in whole.items() if key not in held) for view in trained)


@pytest.mark.parametrize("texts", [documents(400), make_sentences(400)], ids=["few documents", "sentences"])
def test_adapt_judges_neither_few_documents_nor_sentences(tmp_path: Path, texts: list[str]) -> None:
    load_model(save_bert(tmp_path / "bert")).save(str(tmp_path / "start"))
    recipe = Recipe(batch_size=32, max_steps=1, max_length=16)
    report = adapt(str(tmp_path / "start"), texts, tmp_path / "out", 4, recipe, show_progress=False)
    assert report["search"] == {}


def test_span_retrieval_is_its_definition(tmp_path: Path) -> None:
    texts = [*documents(40), "word"]
    evaluator = SpanRetrievalEvaluator(texts + texts[:5], max_texts=30)
    assert len(evaluator.spans) == len(set(evaluator.rests)) == 30
    for span, rest in zip(evaluator.spans, evaluator.rests, strict=True):
        assert any(
            text == f"{rest[:cut]}{' ' * (cut > 0)}{span}{' ' * (cut < len(rest))}{rest[cut:].lstrip()}".strip()
            for text in texts
            for cut in [place for place in range(len(rest) + 1) if place in (0, len(rest)) or rest[place] == " "]
        )
    model = load_model(save_bert(tmp_path / "bert")).train()
    found = evaluator(model)
    assert model.training
    spans, rests = (model.encode(side) for side in (evaluator.spans, evaluator.rests))
    ranks = []
    for place, span in enumerate(spans):
        cosines = [float(span @ rest / (span @ span) ** 0.5 / (rest @ rest) ** 0.5) for rest in rests]
        ranks.append(sum(cosine >= cosines[place] for cosine in cosines))
    assert found["span-retrieval_accuracy"] == pytest.approx(sum(rank == 1 for rank in ranks) / 30, abs=0.04)
    assert found["span-retrieval_mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 30, abs=0.04)
    with pytest.raises(ValueError, match=r"texts holds 1 distinct text\(s\) of two words or more"):
        SpanRetrievalEvaluator(["two words", "two words", "one"])


def test_a_collapsed_model_finds_nothing(tmp_path: Path) -> None:
    """Else `adapt` would keep it."""
    model = load_model(save_bert(tmp_path / "bert"))
    for weight in model.parameters():
        weight.data.zero_()
    model[0].auto_model.encoder.layer[-1].output.LayerNorm.bias.data += torch.arange(32.0)  # one vector for all
    found = SpanRetrievalEvaluator(documents(40))(model)
    assert (found["span-retrieval_accuracy"], found["span-retrieval_mrr"]) == (0, pytest.approx(1 / 40))


@pytest.mark.parametrize(
    "text", ["我想取消我的订单并且退款因为它没有到", "ฉันต้องการยกเลิกคำสั่งซื้อของฉัน"], ids=["Chinese", "Thai"]
)
def test_views_of_texts_without_spaces_are_parts_of_them(text: str) -> None:
    for seed in range(20):
        span, rest = (TextViews(kind, seed).view(text) for kind in ("span", "deletion"))
        assert span in text
        assert 0 < len(span) < len(text) / 2
        left = iter(text)
        assert all(character in left for character in rest), "in their order"
        assert 0 < len(rest) < len(text)
    mixed = f"OK: {text} done"
    assert {view for seed in range(99) if "done" in (view := TextViews("span", seed).view(mixed))}
    assert "".join(split_pieces(f" {mixed}\n")) == mixed
    assert SpanRetrievalEvaluator([text, text[::-1]]).spans[0] in (text + text[::-1])


@pytest.mark.parametrize("text", ["", " ", "word", " two\twords ", "naïve café, ok?", "привет  мир", "안녕 하세요"])
def test_pieces_of_texts_with_spaces_are_their_words(text: str) -> None:
    pieces = split_pieces(text)
    assert pieces == PIECES.findall(" ".join(text.split())), "found without the search, and by it"
    assert [piece.strip() for piece in pieces] == text.split()
    assert count_words(text) == len(pieces)


def test_a_document_without_spaces_is_one_of_many_characters() -> None:
    assert count_words("two words") == count_words("我想取消") == 2
    assert choose_kind(["我" * 2 * DOCUMENT], True) == "span"
    assert choose_kind(["我" * (2 * DOCUMENT - 1)], True) == "dropout"


def test_the_texts_alone_are_trained_on() -> None:
    """A loss takes any other column for a positive, or for negatives."""
    dataset = Dataset.from_dict({"id": [1, 2], "sentence": ["first text", "second text"], "title": ["one", "two"]})
    assert list(views_dataset(dataset, TOPICS, "dropout")[0]) == ["sentence"]
    assert list(views_dataset(dataset, TOPICS, "deletion")[0]) == ["view", "sentence"]
    assert views_dataset(dataset, TOPICS, "deletion")[1]["sentence"] == "second text"
    with pytest.raises(ValueError, match="has the columns 'id', 'title', and no 'sentence': rename that of the texts"):
        views_dataset(dataset.remove_columns("sentence"), TOPICS)
    for wrong in ("one text", {"sentence": ["a"]}, ["a text", None], [3]):
        with pytest.raises(ValueError, match="sentences must be a list of str"):
            views_dataset(wrong, TOPICS)  # type: ignore[arg-type]


def test_workers_that_never_hear_of_an_epoch_are_refused(tmp_path: Path) -> None:
    texts = make_sentences(40, lengths=(7, 9))
    model = load_model(save_bert(tmp_path / "bert"))
    clusters = CorpusClusters.fit(texts, model, n_clusters=4, show_progress_bar=False)
    loss = ClusterNSLoss(model, clusters)
    for kind in ("deletion", "dropout"):
        args = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / kind),
            max_steps=1,
            per_device_train_batch_size=8,
            dataloader_num_workers=1,
            dataloader_persistent_workers=True,
            report_to="none",
            use_cpu=True,
        )
        callbacks = [ClusterStateCallback(loss)]
        dataset = views_dataset(texts, clusters, kind)  # type: ignore[arg-type]
        trainer = SentenceTransformerTrainer(model, args, dataset, loss=loss, callbacks=callbacks)
        if kind == "deletion":
            with pytest.raises(ValueError, match="dataloader_persistent_workers=True keeps workers that never hear"):
                trainer.train()
        else:
            trainer.train()


def test_so_few_documents_that_a_batch_would_not_be_left_judge_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt_module, "FEW", 2)
    model = load_model(save_bert(tmp_path / "bert"))
    for batch_size, judged in ((38, False), (36, True), (20, True)):
        recipe = Recipe(batch_size=batch_size, max_steps=0, learning_rate=0.0)
        report = adapt(model, documents(40), tmp_path / f"{batch_size}", 4, recipe, show_progress=False)
        assert bool(report["search"]) == judged
        assert report["log"][-1]["step"] == 1, "one pass is one batch"


def test_a_model_without_dropout_learns_from_views(model_without_dropout: SentenceTransformer) -> None:
    """Two passes of one sentence are equal there, and a view and its sentence are not."""
    model, rows = (
        model_without_dropout.train(),
        views_dataset(make_sentences(64, lengths=(7, 9)), TOPICS, "deletion")[:],
    )
    loss = ContrastiveLoss(model, 0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(10):
        values.append(loss([model.preprocess(rows[column]) for column in ("view", "sentence")]))
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    view, sentence, again = (
        model(model.preprocess(rows[column]))["sentence_embedding"] for column in ("view", "sentence", "sentence")
    )
    assert torch.equal(sentence, again)
    assert not (view == sentence).all(dim=1).any()
    assert values[-1] < 0.7 * values[0]


@pytest.fixture
def model_without_dropout(tmp_path: Path) -> SentenceTransformer:
    return load_model(save_bert(tmp_path / "bert", dropout=0.0))


def test_documents_end_halfway_between_start_and_training(tmp_path: Path) -> None:
    texts = documents(200)
    load_model(save_bert(tmp_path / "bert")).save(str(tmp_path / "start"))
    clusters = CorpusClusters.fit(texts, load_model(tmp_path / "bert"), 4, show_progress_bar=False)
    recipe = Recipe(batch_size=32, max_steps=2, learning_rate=1e-3, max_length=16)
    ends: list[dict[str, Tensor]] = []
    for kind, folder in ((None, "trained"), ("span", "mean"), ("span", "trained")):  # the last one has been finished
        model = SentenceTransformer(str(tmp_path / "start"), device="cpu")
        set_seed(0)
        loss = ClusterNSLoss(model, clusters)
        dataset = views_dataset(texts, clusters, "span")
        run_trainer(model, loss, dataset, recipe, tmp_path / folder, kind=kind, show_progress=False)  # type: ignore[arg-type]
        ends.append(copy_weights(model))
    start = SentenceTransformer(str(tmp_path / "start"), device="cpu").state_dict()
    moved = 0
    for name, value in ends[0].items():
        expected = (start[name] + value) / 2 if value.is_floating_point() else value
        moved += not torch.equal(start[name], value)
        for end in ends[1:]:
            torch.testing.assert_close(end[name], expected)
    assert moved > 10
