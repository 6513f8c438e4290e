"""The cached loss is the plain loss: same values, same gradients, same state, for any size of the mini-batches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import StubModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import RandContext
from tiny_bert import load_model, make_sentences, save_bert
from torch import Tensor, nn

from st_clusterns import CachedClusterNSLoss, ClusterNSLoss

ROWS, DIMENSION, CLUSTERS = 12, 8, 3
SIZES = [4, 5, 12, 64]  # divides the batch, does not divide it, is it, exceeds it
LOSSES = [ClusterNSLoss, CachedClusterNSLoss]


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


def columns_of(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(CLUSTERS, DIMENSION, generator=generator)
    rows = topics[torch.arange(ROWS) % CLUSTERS]
    return [rows + 0.5 * torch.randn(ROWS, DIMENSION, generator=generator) for _ in range(count)]


def features_of(columns: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"embedding": column} for column in columns]


def recommended(loss_class: type[ClusterNSLoss], model: Any, **settings: Any) -> ClusterNSLoss:
    return loss_class(model, CLUSTERS, momentum=0.1, hard_negative_weight=1.5, margin_beta=0.2, **settings)


def published(loss_class: type[ClusterNSLoss], model: Any, **settings: Any) -> ClusterNSLoss:
    return loss_class.from_preset(
        model, "paper/bert-base", n_clusters=CLUSTERS, margin_weight=2.0, momentum=0.1, **settings
    )


def start(loss: ClusterNSLoss, seed: int = 5) -> ClusterNSLoss:
    loss.clusters.seed(torch.randn(CLUSTERS, DIMENSION, generator=torch.Generator().manual_seed(seed)))
    return loss


def twins(make: Callable[..., ClusterNSLoss], size: int, **settings: Any) -> tuple[ClusterNSLoss, ClusterNSLoss]:
    """The plain and the cached loss on models with equal weights."""
    plain_model, cached_model = IndexedStub(), IndexedStub()
    cached_model.load_state_dict(plain_model.state_dict())
    plain = make(ClusterNSLoss, plain_model, **settings)
    return plain, make(CachedClusterNSLoss, cached_model, mini_batch_size=size, **settings)


@pytest.mark.parametrize("n_columns", [2, 4])
@pytest.mark.parametrize("make", [recommended, published])
@pytest.mark.parametrize("size", SIZES)
def test_values_gradients_and_state_are_those_of_the_plain_loss(
    make: Callable[..., ClusterNSLoss], size: int, n_columns: int
) -> None:
    plain, cached = (start(loss) for loss in twins(make, size))
    for step in range(3):
        columns = columns_of(n_columns, seed=step)
        for loss in (plain, cached):
            loss.model.zero_grad()
        expected, got = plain(features_of(columns)), cached(features_of(columns))
        expected.backward()
        got.backward()
        assert expected["false_negative"] > 0, "the terms of the clusters must be in play"
        for name, value in expected.items():
            torch.testing.assert_close(got[name].detach(), value.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cached.model.weight.grad, plain.model.weight.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cached.clusters.centroids, plain.clusters.centroids)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_every_embedding_are_those_of_the_plain_loss(size: int) -> None:
    """Beneath the model: `calculate_loss` fills the gradient of each row of each column."""
    plain, cached = (start(loss) for loss in twins(recommended, size))
    whole = [column.requires_grad_() for column in columns_of(3)]
    cut = [[part.detach().requires_grad_() for part in column.split(size)] for column in whole]
    plain.compute_loss_from_embeddings(whole).backward()
    total = cached.calculate_loss(cut, with_backward=True)
    assert not total.requires_grad, "no graph may outlive its own backward pass"
    for column, parts in zip(whole, cut, strict=True):
        torch.testing.assert_close(torch.cat([part.grad for part in parts]), column.grad)


def test_labels_reach_the_cached_loss() -> None:
    from st_clusterns.corpus import CorpusClusters

    generator = torch.Generator().manual_seed(1)
    corpus = CorpusClusters(
        ids=torch.arange(ROWS).numpy() % CLUSTERS,
        centroids=0.1 * torch.randn(CLUSTERS, DIMENSION, generator=generator).numpy(),  # loose clusters
        trust=torch.ones(CLUSTERS).numpy(),
    )
    labels = torch.arange(ROWS) % CLUSTERS + 1
    plain = ClusterNSLoss(IndexedStub(), clusters=corpus, margin_beta=0.2)
    cached = CachedClusterNSLoss(plain.model, clusters=corpus, margin_beta=0.2, mini_batch_size=5)
    columns = features_of(columns_of(2))
    expected = plain(columns, labels)
    assert expected["false_negative"] > 0
    assert expected.total() != ClusterNSLoss(plain.model, clusters=corpus, margin_beta=0.2)(columns).total()
    torch.testing.assert_close(cached(columns, labels).total(), expected.total())


@pytest.mark.parametrize("loss_class", LOSSES)
class TestBothLosses:
    """What holds for the plain and for the cached loss alike."""

    def test_state_moves_once_a_batch(self, loss_class: type[ClusterNSLoss], monkeypatch: pytest.MonkeyPatch) -> None:
        loss = start(recommended(loss_class, IndexedStub(), **small_mini_batches(loss_class)))
        moves: list[int] = []
        partial_fit = loss.clusters.partial_fit
        monkeypatch.setattr(
            loss.clusters, "partial_fit", lambda *args: (moves.append(len(args[0])), partial_fit(*args))
        )
        for _ in range(3):
            before = loss.clusters.centroids.clone()
            loss(features_of(columns_of(2))).backward()
            assert not torch.equal(before, loss.clusters.centroids)
        assert moves == [ROWS] * 3

    def test_rows_are_collected_once_a_batch(self, loss_class: type[ClusterNSLoss]) -> None:
        loss = recommended(loss_class, IndexedStub(), start_similarity=1.0, **small_mini_batches(loss_class))
        loss.start.needed = 1000
        loss.start.rows = torch.zeros(2, 1000, DIMENSION)
        for step in range(1, 4):
            loss(features_of(columns_of(2))).backward()
            assert int(loss.start.n_rows) == step * ROWS
        assert not loss.clusters.started

    @pytest.mark.parametrize("how", ["eval", "no_grad"])
    def test_state_stays_outside_training(self, loss_class: type[ClusterNSLoss], how: str) -> None:
        loss = start(recommended(loss_class, IndexedStub(), **small_mini_batches(loss_class)))
        before = loss.clusters.centroids.clone()
        if how == "eval":
            loss.model.eval()
        with torch.set_grad_enabled(how != "no_grad"):
            parts = loss(features_of(columns_of(2)))
        assert parts.keys() == {"contrastive", "false_negative"}
        assert parts["contrastive"].requires_grad == (how == "eval")
        assert torch.equal(before, loss.clusters.centroids)

    def test_components_sum_to_what_is_back_propagated(self, loss_class: type[ClusterNSLoss]) -> None:
        """The trainer sums the dict; weighting the sum must weight every gradient."""
        loss = start(recommended(loss_class, IndexedStub(), **small_mini_batches(loss_class)))
        loss.clusters.momentum = 0.0
        gradients = []
        for weight in (1.0, 3.0):
            loss.model.zero_grad()
            (torch.stack(list(loss(features_of(columns_of(2))).values())).sum() * weight).backward()
            gradients.append(loss.model.weight.grad.clone())
        torch.testing.assert_close(gradients[1], 3 * gradients[0])

    def test_two_forwards_before_the_first_backward(self, loss_class: type[ClusterNSLoss]) -> None:
        loss = start(recommended(loss_class, IndexedStub(), **small_mini_batches(loss_class)))
        loss.clusters.momentum = 0.0
        alone = []
        for seed in (1, 2):
            loss.model.zero_grad()
            loss(features_of(columns_of(2, seed))).backward()
            alone.append(loss.model.weight.grad.clone())
        loss.model.zero_grad()
        first, second = (loss(features_of(columns_of(2, seed))) for seed in (1, 2))
        first.backward()
        second.backward()
        torch.testing.assert_close(loss.model.weight.grad, alone[0] + alone[1])

    def test_equal_views_are_told_once(self, loss_class: type[ClusterNSLoss], caplog: pytest.LogCaptureFixture) -> None:
        loss = loss_class(IndexedStub(), CLUSTERS)
        for _ in range(2):
            loss(features_of(columns_of(1)))
        assert caplog.text.count("Both views of a sentence are equal") == 1

    def test_pairs_of_equal_texts_are_not_reported(
        self, loss_class: type[ClusterNSLoss], caplog: pytest.LogCaptureFixture
    ) -> None:
        loss_class(IndexedStub(), CLUSTERS)(features_of(columns_of(1) * 2))
        assert not caplog.text

    def test_preset_and_card(self, loss_class: type[ClusterNSLoss]) -> None:
        loss = published(loss_class, IndexedStub())
        assert type(loss) is loss_class
        assert loss.get_config_dict()["hard_negative_weight"] == 1.0
        assert "deng2023" in loss.citation


def small_mini_batches(loss_class: type[ClusterNSLoss]) -> dict[str, int]:
    return {"mini_batch_size": 5} if loss_class is CachedClusterNSLoss else {}


def test_the_card_tells_of_the_cache() -> None:
    loss = CachedClusterNSLoss(IndexedStub(), CLUSTERS, mini_batch_size=7)
    assert loss.get_config_dict()["mini_batch_size"] == 7
    assert "gao2021scaling" in loss.citation


@pytest.mark.parametrize("size", [0, -1])
def test_mini_batch_size_is_checked(size: int) -> None:
    with pytest.raises(ValueError, match=f"mini_batch_size must be 1 or more, got {size}"):
        CachedClusterNSLoss(IndexedStub(), mini_batch_size=size)


def test_other_numbers_are_checked_too() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        CachedClusterNSLoss(IndexedStub(), temperature=0)


def test_static_embeddings_are_refused(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    save_bert(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    with pytest.raises(ValueError, match=r"StaticEmbedding.*use ClusterNSLoss"):
        CachedClusterNSLoss(model)
    ClusterNSLoss(model)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("n_columns", [1, 2])
@pytest.mark.parametrize("size", [4, 5])
def test_dropout_is_replayed_exactly(bert: Path, n_columns: int, size: int) -> None:
    """Real dropout: the gradients are those of a plain pass that drew the same masks, mini-batch by mini-batch."""
    sentences = make_sentences(ROWS * n_columns, lengths=(5, 5))  # no padding, which mini-batches would trim
    model = load_model(bert)
    model.train()
    columns = [model.preprocess(sentences[i * ROWS : (i + 1) * ROWS]) for i in range(n_columns)]
    settings = {"margin_alpha": 0.2, "margin_beta": 0.2, "momentum": 0.1}
    cached = CachedClusterNSLoss(model, CLUSTERS, mini_batch_size=size, **settings)
    plain = ClusterNSLoss(model, CLUSTERS, **settings)
    for loss in (cached, plain):
        loss.clusters.seed(torch.randn(CLUSTERS, 32, generator=torch.Generator().manual_seed(3)))

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
    torch.testing.assert_close(got.total(), expected.total())
    assert expected["false_negative"] > 0
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(replayed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def cut(features: dict[str, Any], begin: int, size: int) -> dict[str, Any]:
    return {k: v[begin : begin + size] if isinstance(v, Tensor) else v for k, v in features.items()}


def test_other_dropout_has_other_gradients(bert: Path) -> None:
    """A canary for the test above: masks that are not replayed would show."""
    model = load_model(bert)
    model.train()
    loss = CachedClusterNSLoss(model, CLUSTERS, mini_batch_size=4)
    features = model.preprocess(make_sentences(ROWS))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        loss([dict(features)]).backward()
        gradients.append(gradients_of(model))
    assert any(not torch.allclose(gradients[0][name], g, rtol=1e-2) for name, g in gradients[1].items())


def test_no_matrix_of_the_whole_batch_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory's bound: no terms are ever computed of more rows than a mini-batch."""
    loss = start(recommended(CachedClusterNSLoss, IndexedStub(), mini_batch_size=5))
    seen: list[int] = []
    terms = loss._terms
    monkeypatch.setattr(loss, "_terms", lambda batch, rows: (seen.append(len(batch.own[rows])), terms(batch, rows))[1])
    loss(features_of(columns_of(2)))
    assert seen == [5, 5, 2]


MEMORY = """
import resource, sys
import torch
from test_cached import DIMENSION, IndexedStub
from torch import nn
from st_clusterns import CachedClusterNSLoss, ClusterNSLoss

class Deep(IndexedStub):  # two thousand activations a row, as a small transformer has
    def __init__(self):
        super().__init__(64)
        self.layers = nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 64))
    def forward(self, features):
        return {"sentence_embedding": self.layers(features["embedding"])}

def step(rows):
    loss([{"embedding": torch.randn(rows, 64)} for _ in range(2)]).backward()

torch.set_num_threads(1)
settings = {"momentum": 0.1, "min_trust": 0.0, "hard_negative_weight": 1.0}
if sys.argv[1] == "cached":
    loss = CachedClusterNSLoss(Deep(), 16, mini_batch_size=64, **settings)
else:
    loss = ClusterNSLoss(Deep(), 16, **settings)
loss.clusters.seed(torch.randn(16, 64))
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(int(sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def growth(kind: str, rows: int) -> float:
    """Return the MiB by which a step on many rows raises the peak memory of a process that has taken one on 64."""
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{folder.parent}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", MEMORY, kind, str(rows)]
    return float(subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_8192_rows_train_in_the_memory_of_a_mini_batch() -> None:
    """Beside it there are the embeddings of two columns, and matrices of a mini-batch's rows by all rows."""
    rows, mini_batch, dimension, mib = 8192, 64, 64, 2**20
    embeddings, block, square = (4 * rows * width / mib for width in (2 * dimension, mini_batch, rows))
    cached = growth("cached", rows)
    assert cached < 30 * (embeddings + block), "a few gradients and intermediate results of each"
    assert cached < square, "no matrix of the batch by itself"
    assert growth("plain", rows // 2) > 2 * cached, "a canary: half the batch, of which all activations are kept"
