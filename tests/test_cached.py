"""The cached losses are the plain losses: same values, gradients and state, for any size of the mini-batches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import StubModel
from programs import run_python
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import RandContext
from tiny_bert import load_model, make_sentences, save_bert
from torch import Tensor, nn

from st_clusterns import CachedClusterNSLoss, ClusterNSLoss, CorpusClusters, PublishedClusterNSLoss
from st_clusterns.losses.cached import CachedPublishedClusterNSLoss, Texts
from st_clusterns.losses.contrastive import ContrastiveLoss

ROWS, DIMENSION, CLUSTERS = 12, 8, 3
SIZES = [1, 5, 12, 64]  # a row, does not divide the batch, is it, exceeds it
LOSSES = [ClusterNSLoss, CachedClusterNSLoss]
TOPICS = torch.randn(CLUSTERS, DIMENSION, generator=torch.Generator().manual_seed(42))


class IndexedStub(StubModel):
    """A stub whose first module can be looked at, as the cached loss does."""

    def __init__(self, dimension: int = DIMENSION, dropout: float = 0.0) -> None:
        super().__init__(dimension, dropout)
        self.weight = nn.Parameter(torch.eye(dimension) + 0.1 * torch.randn(dimension, dimension))

    def __getitem__(self, index: int) -> nn.Module:
        return self

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        return {"sentence_embedding": self.dropout(features["embedding"] @ self.weight)}


class Reader(IndexedStub):
    """A stub that tokenizes: a sentence of numbers has those tokens."""

    def preprocess(self, sentences: list[str]) -> dict[str, Tensor]:
        rows = [torch.tensor([int(word) for word in sentence.split()]) for sentence in sentences]
        masks = [torch.ones_like(row) for row in rows]
        tokens, mask = (nn.utils.rnn.pad_sequence(parts, batch_first=True) for parts in (rows, masks))
        return {"input_ids": tokens, "attention_mask": mask}


def columns_of(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = TOPICS[torch.arange(ROWS) % CLUSTERS]
    return [rows + torch.randn(ROWS, DIMENSION, generator=generator) for _ in range(count)]


def features_of(columns: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"embedding": column} for column in columns]


def with_tokens(features: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Give every row a text of its own, but for copies: within a column, and in another column."""
    tokens = torch.arange(len(features) * ROWS * 4).reshape(len(features), ROWS, 4)
    mask = torch.ones_like(tokens)
    mask[:, ::2, 3] = 0  # rows of three tokens
    tokens[:, 7], mask[:, 7] = tokens[:, 2], mask[:, 2]  # of another cluster
    tokens[-1, 4], mask[-1, 4] = tokens[0, 9], mask[0, 9]
    return [
        {**column, "input_ids": t, "attention_mask": m} for column, t, m in zip(features, tokens, mask, strict=True)
    ]


def corpus_around(
    centroids: Tensor, has_topics: bool = True, sentences: list[str] | None = None, ids: list[int] | None = None
) -> CorpusClusters:
    """Clusters with given centroids, of which the last is not trusted. By default no batch holds the sentences."""
    rows = centroids.numpy()
    trust = np.ones(len(rows), dtype=np.float32)
    trust[-1] = 0.1
    sentences = sentences or [str(i) for i in range(len(rows))]
    chosen = np.array(ids or range(len(rows)))
    curve = {len(rows): float(trust.mean())}
    return CorpusClusters(sentences, rows[chosen], chosen, rows, trust, has_topics, curve, 0.5)


def topical(loss_class: type[ClusterNSLoss], model: Any, **settings: Any) -> ContrastiveLoss:
    return loss_class(model, corpus_around(TOPICS), **settings)


def recognised(loss_class: type[ClusterNSLoss], model: Any, **settings: Any) -> ContrastiveLoss:
    """The default loss, which knows the anchors of some rows by their tokens: their centroid is not the nearest."""
    sentences = [" ".join(str(4 * row + i) for i in range(3 + row % 2)) for row in range(6)]
    corpus = corpus_around(TOPICS, sentences=sentences, ids=[(row + 1) % CLUSTERS for row in range(6)])
    return loss_class(model, corpus, **settings)


def plain_text(loss_class: type[ClusterNSLoss], model: Any, **settings: Any) -> ContrastiveLoss:
    return loss_class(model, corpus_around(TOPICS, has_topics=False), **settings)


def published(loss_class: type[ClusterNSLoss], model: Any, **settings: Any) -> ContrastiveLoss:
    loss = waiting(loss_class, model, **settings)
    assert isinstance(loss, PublishedClusterNSLoss)
    loss.centroids.centroids.copy_(torch.randn(CLUSTERS, DIMENSION, generator=torch.Generator().manual_seed(5)))
    loss.centroids.started = True
    return loss


def waiting(loss_class: type[ClusterNSLoss], model: Any, **settings: Any) -> ContrastiveLoss:
    """The published loss before the start of its centroids."""
    numbers = {"n_clusters": CLUSTERS, "momentum": 0.1, "margin_weight": 2.0, "hard_negative_weight": 1.5}
    return loss_class.from_preset(model, "paper/bert-base", **{**numbers, **settings})


METHODS = pytest.mark.parametrize("make", [topical, plain_text, published])
Make = Callable[..., ContrastiveLoss]


def small_mini_batches(loss_class: type[ClusterNSLoss]) -> dict[str, int]:
    return {"mini_batch_size": 5} if loss_class is CachedClusterNSLoss else {}


def twins(make: Make, size: int, **settings: Any) -> tuple[ContrastiveLoss, ContrastiveLoss]:
    """The plain and the cached loss on models with equal weights."""
    plain_model, cached_model = Reader(), Reader()
    cached_model.load_state_dict(plain_model.state_dict())
    plain = make(ClusterNSLoss, plain_model, **settings)
    return plain, make(CachedClusterNSLoss, cached_model, mini_batch_size=size, **settings)


def step(loss: ContrastiveLoss, features: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Forward and backward; return the value and the gradient."""
    loss.model.zero_grad()
    value = loss(features)
    value.backward()
    return value.detach(), loss.model.weight.grad.clone()


def buffers_of(loss: ContrastiveLoss) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loss.named_buffers()}


@pytest.mark.parametrize("n_columns", [1, 2, 4])
@pytest.mark.parametrize("make", [topical, recognised, plain_text, published])
@pytest.mark.parametrize("size", SIZES)
def test_values_gradients_and_state_are_those_of_the_plain_loss(make: Make, size: int, n_columns: int) -> None:
    plain, cached = twins(make, size, temperature=0.5)  # so that every candidate weighs in
    before = buffers_of(plain)
    for seed in range(3):
        features = with_tokens(features_of(columns_of(n_columns, seed)))
        expected, got = step(plain, features), step(cached, features)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(buffers_of(cached), buffers_of(plain))
    moved = any(not torch.equal(value, before[name]) for name, value in plain.named_buffers())
    assert moved == (make is published)


@pytest.mark.parametrize("loss_class", LOSSES)
def test_the_clusters_are_in_play(loss_class: type[ClusterNSLoss]) -> None:
    """A canary for the test above: with equal temperatures, each method has its own value."""
    features = features_of(columns_of(2))
    model = IndexedStub()
    extra = small_mini_batches(loss_class)
    values = [
        float(make(loss_class, model, temperature=0.1, **extra)(features).detach())
        for make in (topical, plain_text, published)
    ]
    values.append(float(waiting(loss_class, model, temperature=0.1, **extra)(features).detach()))
    assert values.pop() == pytest.approx(values[1]), "before the start, the published loss has no clusters either"
    assert min(abs(a - b) for a, b in zip(values, values[1:] + values[:1], strict=True)) > 0.01


@pytest.mark.parametrize("n_columns", [1, 2])
@pytest.mark.parametrize("loss_class", LOSSES)
def test_sentences_of_the_corpus_are_recognised(loss_class: type[ClusterNSLoss], n_columns: int) -> None:
    """A canary for the test above: rows with a known text have other clusters than without."""
    features = with_tokens(features_of(columns_of(n_columns)))
    model = Reader()
    values = [
        float(make(loss_class, model, temperature=0.5, **small_mini_batches(loss_class))(features).detach())
        for make in (topical, recognised)
    ]
    assert abs(values[0] - values[1]) > 0.01


@METHODS
@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_every_embedding_are_those_of_the_plain_loss(make: Make, size: int) -> None:
    """Beneath the model: `calculate_loss` fills the gradient of each row of each column."""
    plain, cached = twins(make, size)
    texts: list[Tensor | None] = [torch.arange(ROWS) // 2 for _ in range(3)]
    whole = [column.requires_grad_() for column in columns_of(3)]
    cut = [[part.detach().requires_grad_() for part in column.split(size)] for column in whole]
    plain.compute_loss_from_embeddings(whole, texts).backward()
    total = cached.calculate_loss(cut, Texts(texts, False, [None] * len(cut)), with_backward=True)
    assert not total.requires_grad, "no graph may outlive its own backward pass"
    for column, parts in zip(whole, cut, strict=True):
        torch.testing.assert_close(torch.cat([part.grad for part in parts]), column.grad)


@pytest.mark.parametrize("n_columns", [1, 2, 3])
@METHODS
@pytest.mark.parametrize("loss_class", LOSSES)
def test_copies_of_a_text_count_in_both_losses(loss_class: type[ClusterNSLoss], make: Make, n_columns: int) -> None:
    """A canary for the first test: tokens change the loss, but not the published one."""
    features = features_of(columns_of(n_columns))
    loss = make(loss_class, IndexedStub(), temperature=1.0, **small_mini_batches(loss_class)).eval()
    without, masked = (float(loss(columns).detach()) for columns in (features, with_tokens(features)))
    if make is published:
        assert masked == without
    else:
        assert masked < without - 0.005


@pytest.mark.parametrize("n_columns", [1, 2, 3])
@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_row_does_not_see_copies_of_its_text(loss_class: type[ClusterNSLoss], n_columns: int) -> None:
    """Of the texts 0, 1, 2, 1: rows 1 and 3 are each other's only candidates that do not count."""
    columns = [column[:4] for column in columns_of(n_columns)]
    tokens = torch.tensor([[0], [1], [2], [1]])
    features = [
        {"embedding": column, "input_ids": tokens + 10 * i, "attention_mask": torch.ones_like(tokens)}
        for i, column in enumerate(columns)
    ]
    loss = plain_text(loss_class, IndexedStub(), **small_mini_batches(loss_class))
    rows = [F.normalize(column @ loss.model.weight.detach(), dim=1) for column in columns]
    anchors, positives, *negatives = rows * 2 if n_columns == 1 else rows
    expected = 0.0
    for i in range(4):
        seen = [j for j in range(4) if {i, j} != {1, 3}]
        candidates = torch.cat([positives[seen], *negatives])
        cosines = candidates @ anchors[i] / 0.05
        expected += float(cosines.logsumexp(0) - anchors[i] @ positives[i] / 0.05) / 4
    assert float(loss(features).detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss_class", LOSSES)
class TestBothLosses:
    """What holds for the plain and for the cached loss alike."""

    def test_centroids_move_once_a_batch(self, loss_class: type[ClusterNSLoss], moves: list[int]) -> None:
        loss = published(loss_class, IndexedStub(), **small_mini_batches(loss_class))
        for _ in range(3):
            before = buffers_of(loss)["centroids.centroids"]
            loss(features_of(columns_of(2))).backward()
            assert not torch.equal(before, loss.centroids.centroids)
        assert moves == [ROWS] * 3

    def test_rows_are_collected_once_a_batch(self, loss_class: type[ClusterNSLoss]) -> None:
        loss = waiting(
            loss_class, IndexedStub(), n_clusters=1000, start_similarity=1.0, **small_mini_batches(loss_class)
        )
        for step in range(1, 4):
            loss(features_of(columns_of(2))).backward()
            assert loss.centroids.n_rows == step * ROWS
        assert not loss.centroids.started

    @METHODS
    @pytest.mark.parametrize("how", ["eval", "no_grad"])
    def test_state_stays_outside_training(self, loss_class: type[ClusterNSLoss], make: Make, how: str) -> None:
        loss = make(loss_class, IndexedStub(), **small_mini_batches(loss_class))
        before = buffers_of(loss)
        if how == "eval":
            loss.model.eval()
        with torch.set_grad_enabled(how != "no_grad"):
            value = loss(features_of(columns_of(2)))
        assert value.shape == ()
        assert value.requires_grad == (how == "eval")
        for name, buffer in loss.named_buffers():
            assert torch.equal(before[name], buffer), name

    @METHODS
    def test_a_weight_on_the_loss_weights_every_gradient(self, loss_class: type[ClusterNSLoss], make: Make) -> None:
        gradients = []
        for weight in (1.0, 3.0):
            torch.manual_seed(0)
            loss = make(loss_class, IndexedStub(), **small_mini_batches(loss_class))
            (loss(features_of(columns_of(2))) * weight).backward()
            gradients.append(loss.model.weight.grad.clone())
        torch.testing.assert_close(gradients[1], 3 * gradients[0])

    @METHODS
    def test_two_forwards_before_the_first_backward(self, loss_class: type[ClusterNSLoss], make: Make) -> None:
        loss = make(loss_class, IndexedStub(), **small_mini_batches(loss_class))
        if make is published:
            loss.centroids.momentum = 0.0
        alone = [step(loss, features_of(columns_of(2, seed)))[1] for seed in (1, 2)]
        loss.model.zero_grad()
        first, second = (loss(features_of(columns_of(2, seed))) for seed in (1, 2))
        first.backward()
        second.backward()
        torch.testing.assert_close(loss.model.weight.grad, alone[0] + alone[1])

    @METHODS
    def test_labels_are_told_once_and_not_used(
        self, loss_class: type[ClusterNSLoss], make: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        values = []
        for labels in (None, torch.arange(ROWS) % CLUSTERS + 1):
            torch.manual_seed(0)
            loss = make(loss_class, IndexedStub(), **small_mini_batches(loss_class))
            values.append([loss(features_of(columns_of(2, seed)), labels).detach() for seed in range(2)])
        assert values[0] == values[1]
        assert caplog.text.count("the label column is not used") == 1

    def test_equal_views_are_told_once(self, loss_class: type[ClusterNSLoss], caplog: pytest.LogCaptureFixture) -> None:
        loss = topical(loss_class, IndexedStub())
        for _ in range(2):
            loss(features_of(columns_of(1)))
        assert caplog.text.count("Both views of a sentence are equal") == 1

    def test_pairs_of_equal_texts_are_not_reported(
        self, loss_class: type[ClusterNSLoss], caplog: pytest.LogCaptureFixture
    ) -> None:
        topical(loss_class, IndexedStub())(features_of(columns_of(1) * 2))
        assert not caplog.text

    def test_preset_and_card(self, loss_class: type[ClusterNSLoss]) -> None:
        loss = loss_class.from_preset(IndexedStub(), "paper/bert-base", n_clusters=CLUSTERS)
        cached = loss_class is CachedClusterNSLoss
        assert type(loss) is (CachedPublishedClusterNSLoss if cached else PublishedClusterNSLoss)
        assert loss.get_config_dict()["n_clusters"] == CLUSTERS
        assert loss.get_config_dict()["hard_negative_weight"] == 1.0
        assert "deng2023" in loss.citation


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every move of centroids."""
    from st_clusterns.losses import moving_centroids

    seen: list[int] = []
    move_centroids = moving_centroids.move_centroids

    def watched(state: Tensor, embeddings: Tensor, ids: Tensor, momentum: float) -> Tensor:
        seen.append(len(embeddings))
        return move_centroids(state, embeddings, ids, momentum)

    monkeypatch.setattr(moving_centroids, "move_centroids", watched)
    return seen


@METHODS
def test_the_card_tells_of_the_cache(make: Make) -> None:
    loss = make(CachedClusterNSLoss, IndexedStub(), mini_batch_size=7, mini_batch_num_tokens=90)
    card, plain = loss.get_config_dict(), make(ClusterNSLoss, IndexedStub())
    assert card["mini_batch_size"] == 7
    assert card["mini_batch_num_tokens"] == 90
    assert card.items() >= plain.get_config_dict().items()
    assert "gao2021scaling" in loss.citation
    assert plain.citation in loss.citation


@METHODS
@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("name", ["mini_batch_size", "mini_batch_num_tokens"])
def test_sizes_of_mini_batches_are_checked(make: Make, name: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number, 1 or more, got {size}"):
        make(CachedClusterNSLoss, IndexedStub(), **{name: size})


@METHODS
def test_other_numbers_are_checked_too(make: Make) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        make(CachedClusterNSLoss, IndexedStub(), temperature=0)


def test_the_cached_loss_finds_the_noted_clusters_or_names_the_ways_out() -> None:
    model = IndexedStub()
    with pytest.raises(ValueError, match=r"ClusterDataLoader .*CorpusClusters\.fit.*from_preset"):
        CachedClusterNSLoss(model)
    clusters = corpus_around(TOPICS)
    clusters.note_on(model)
    assert CachedClusterNSLoss(model).clusters is clusters


@METHODS
def test_static_embeddings_are_refused(make: Make, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    save_bert(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=DIMENSION)], device="cpu")
    with pytest.raises(ValueError, match=r"StaticEmbedding.*use ClusterNSLoss"):
        make(CachedClusterNSLoss, model)
    make(ClusterNSLoss, model)([model.preprocess(make_sentences(ROWS)) for _ in range(2)]).backward()


# A real transformer


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("without_dropout"), dropout=0.0)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def on_bert(name: str, loss_class: type[ClusterNSLoss], model: SentenceTransformer, **settings: Any) -> ContrastiveLoss:
    """A loss whose centroids are embeddings of the model, so that rows spread over the clusters."""
    model.eval()
    centroids = model.encode(make_sentences(CLUSTERS, seed=9), convert_to_tensor=True)
    model.train()
    if name != "published":
        known = mixed_lengths(ROWS // 2, 0), [row % CLUSTERS for row in range(ROWS // 2)]
        corpus = corpus_around(centroids, name != "plain_text", *(known if name == "recognised" else ()))
        return loss_class(model, corpus, **settings)
    loss = waiting(loss_class, model, **settings)
    assert isinstance(loss, PublishedClusterNSLoss)
    loss.centroids.centroids.copy_(centroids)
    loss.centroids.started = True
    return loss


def mixed_lengths(count: int, seed: int) -> list[str]:
    """Sentences of one to twelve words, among them a copy of another."""
    sentences = make_sentences(count, seed, lengths=(1, 12))
    return [*sentences[:-1], sentences[0]]


@pytest.mark.parametrize("mini_batches", [{"mini_batch_size": 5}, {"mini_batch_num_tokens": 20}], ids=str)
@pytest.mark.parametrize("n_columns", [1, 2, 3])
@pytest.mark.parametrize("name", ["topical", "recognised", "plain_text", "published"])
def test_sentences_of_mixed_lengths(
    without_dropout: Path, name: str, n_columns: int, mini_batches: dict[str, int]
) -> None:
    """The whole batch is padded to the longest sentence, each mini-batch to its own longest."""
    results = []
    for loss_class, settings in ((ClusterNSLoss, {}), (CachedClusterNSLoss, mini_batches)):
        model = load_model(without_dropout)
        columns = [model.preprocess(mixed_lengths(ROWS, seed)) for seed in range(n_columns)]
        loss = on_bert(name, loss_class, model, **settings)
        value = loss(columns)
        value.backward()
        results.append((value.detach(), gradients_of(model), buffers_of(loss)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_tokens_bound_the_mini_batches(without_dropout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(without_dropout)
    loss = on_bert("topical", CachedClusterNSLoss, model, mini_batch_num_tokens=20)
    seen, padded = list[int](), list[int]()
    forward = model.forward

    def watched(features: dict[str, Tensor]) -> Any:
        seen.append(int(features["attention_mask"].sum()))
        padded.append(features["attention_mask"].numel())
        return forward(features)

    monkeypatch.setattr(model, "forward", watched)
    features = model.preprocess(mixed_lengths(ROWS, 0))
    tokens = int(features["attention_mask"].sum())
    loss([features])
    assert sum(seen) == 2 * tokens
    assert max(seen) <= 20 < tokens
    short, long = (make_sentences(6, lengths=(words, words)) for words in (4, 10))  # and two tokens more
    loss.mini_batch_num_tokens = 36
    padded.clear()
    loss([model.preprocess([text for pair in zip(short, long, strict=True) for text in pair])])
    assert sum(padded) == 2 * (6 * 6 + 6 * 12), "rows of one length are embedded together, without padding"


@pytest.mark.parametrize("n_columns", [1, 2])
@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("name", ["topical", "published"])
def test_dropout_is_replayed_exactly(bert: Path, name: str, n_columns: int, size: int) -> None:
    """Real dropout: the gradients are those of a plain pass that drew the same masks, mini-batch by mini-batch."""
    sentences = make_sentences(ROWS * n_columns, lengths=(5, 5))  # no padding, which mini-batches would trim
    model = load_model(bert)
    columns = [model.preprocess(sentences[i * ROWS : (i + 1) * ROWS]) for i in range(n_columns)]
    cached = on_bert(name, CachedClusterNSLoss, model, mini_batch_size=size)
    plain = on_bert(name, ClusterNSLoss, model)

    random_state = RandContext()
    got = cached([dict(column) for column in columns])
    after_embedding = torch.get_rng_state()
    got.backward()
    assert torch.equal(after_embedding, torch.get_rng_state()), "the replay must leave the random state alone"
    replayed = gradients_of(model)

    model.zero_grad()
    with random_state:
        embeddings = [
            torch.cat([model(cut(column, i, size))["sentence_embedding"] for i in range(0, ROWS, size)])
            for column in (columns * 2 if n_columns == 1 else columns)
        ]
    assert not torch.equal(embeddings[0], embeddings[1])
    expected = plain.compute_loss_from_embeddings(embeddings)
    expected.backward()
    torch.testing.assert_close(got.detach(), expected.detach())
    for parameter, gradient in gradients_of(model).items():
        torch.testing.assert_close(replayed[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)


def cut(features: dict[str, Any], begin: int, size: int) -> dict[str, Any]:
    return {k: v[begin : begin + size] if isinstance(v, Tensor) else v for k, v in features.items()}


def test_other_dropout_has_other_gradients(bert: Path) -> None:
    """A canary for the test above: masks that are not replayed would show."""
    model = load_model(bert)
    loss = on_bert("topical", CachedClusterNSLoss, model, mini_batch_size=4)
    features = model.preprocess(make_sentences(ROWS))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        loss([dict(features)]).backward()
        gradients.append(gradients_of(model))
    assert any(not torch.allclose(gradients[0][name], g, rtol=1e-2) for name, g in gradients[1].items())


# Memory


@METHODS
def test_no_terms_of_the_whole_batch_are_computed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory's bound: no terms are ever computed of more rows than a mini-batch."""
    loss = make(CachedClusterNSLoss, IndexedStub(), mini_batch_size=5)
    seen: list[int] = []
    terms = loss.terms
    monkeypatch.setattr(loss, "terms", lambda batch, rows: (seen.append(len(batch.own[rows])), terms(batch, rows))[1])
    loss(features_of(columns_of(2)))
    assert seen == [5, 5, 2]


MEMORY = """
import sys
import torch
from programs import peak_mib
from test_cached import IndexedStub, corpus_around
from torch import nn
from st_clusterns import CachedClusterNSLoss, ClusterNSLoss

class Deep(IndexedStub):  # two thousand activations a row, as a small transformer has
    def __init__(self):
        super().__init__(64)
        self.layers = nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 64))
    def forward(self, features):
        return {"sentence_embedding": self.layers(features["embedding"])}

def column(rows):
    tokens = torch.randint(30000, (rows, 8))
    return {"embedding": torch.randn(rows, 64), "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

def step(rows):
    loss([column(rows) for _ in range(2)]).backward()

torch.set_num_threads(1)
method, kind, rows = sys.argv[1:]
loss_class, settings = (CachedClusterNSLoss, {"mini_batch_size": 64}) if kind == "cached" else (ClusterNSLoss, {})
if method == "published":
    loss = loss_class.from_preset(Deep(), "paper/bert-base", n_clusters=16, **settings)
    loss.centroids.centroids.copy_(torch.randn(16, 64))
    loss.centroids.started = True
else:
    loss = loss_class(Deep(), corpus_around(torch.randn(16, 64)), **settings)
step(64)
before = peak_mib()
step(int(rows))
print(peak_mib() - before)
"""


def growth(method: str, kind: str, rows: int) -> float:
    """Return the MiB by which a step on many rows raises the peak memory of a process that has taken one on 64."""
    return float(run_python(MEMORY, method, kind, str(rows), check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("method", ["default", "published"])
def test_8192_rows_train_in_the_memory_of_a_mini_batch(method: str) -> None:
    """Beside it there are the embeddings of two columns, and matrices of a mini-batch's rows by all rows."""
    rows, mini_batch, dimension, mib = 8192, 64, 64, 2**20
    embeddings, block = (4 * rows * width / mib for width in (2 * dimension, mini_batch))
    cached = growth(method, "cached", rows)
    assert cached < 20 * (embeddings + block), "a few gradients and intermediate results of each"
    assert growth(method, "plain", rows // 2) > 2 * cached, (
        "a canary: half the batch, of which all activations are kept"
    )
