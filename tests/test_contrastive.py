"""What `ClusterNSLoss` and `PublishedClusterNSLoss` share: columns, labels, precision, and the built-in baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from batches import (
    LOSSES,
    MODES,
    D,
    TokenStub,
    corpus,
    default,
    features,
    gradients,
    published,
    published_and_started,
    views,
)
from conftest import StubModel
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

from st_clusterns import ClusterNSLoss, PublishedClusterNSLoss
from st_clusterns.losses import clusterns, contrastive
from st_clusterns.losses.contrastive import ContrastiveLoss

PUBLISHED_OFF = {"hard_negative_weight": 0.0, "margin_weight": 0.0}


@pytest.fixture(params=LOSSES)
def make(request: pytest.FixtureRequest) -> Callable[..., ContrastiveLoss]:
    return LOSSES[request.param]


# The baseline


@contextmanager
def nothing_drawn() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the loss drew random numbers, so dropout would differ"


WITHOUT_CLUSTERS: dict[str, Callable[..., ContrastiveLoss]] = {
    "no topics": lambda m, t: ClusterNSLoss(m, corpus(has_topics=False), t),
    "clusters not trusted": lambda m, t: ClusterNSLoss(m, corpus(trust=(0.1, 0.0, 0.19, 0.1)), t),
    "published, not started": lambda m, t: published(m, temperature=t, start_similarity=-1, margin_weight=6.0),
    "published, terms off": lambda m, t: published_and_started(m, temperature=t, **PUBLISHED_OFF),
}


@pytest.mark.parametrize("n_columns", [2, 3, 4])
@pytest.mark.parametrize("temperature", [0.05, 0.3])
@pytest.mark.parametrize("without", WITHOUT_CLUSTERS)
def test_without_cluster_terms_it_is_mnrl(without: str, temperature: float, n_columns: int) -> None:
    model, columns = StubModel(D), views(9, n_columns)
    loss = WITHOUT_CLUSTERS[without](model, temperature)
    baseline = MultipleNegativesRankingLoss(model, scale=1 / temperature)
    with nothing_drawn():
        value = loss.compute_loss_from_embeddings(columns)
    expected = baseline.compute_loss_from_embeddings(columns, None)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(value, columns), gradients(expected, columns), rtol=1e-6, atol=1e-6)


CLUSTER_TERMS: dict[str, tuple[Callable[..., ContrastiveLoss], int]] = {
    "mask of false negatives": (lambda m: default(m, temperature=0.05, pull_weight=0.0), -1),
    "hard negatives": (lambda m: published_and_started(m, margin_weight=0.0), 1),
    "margin": (lambda m: published_and_started(m, hard_negative_weight=0.0, margin_weight=5.0), 1),
}


@pytest.mark.parametrize("term", CLUSTER_TERMS)
def test_each_cluster_term_parts_from_mnrl(term: str) -> None:
    """A canary for the test above: a mask lowers the loss, the other terms raise it."""
    model, columns = StubModel(D), views(9)
    make, sign = CLUSTER_TERMS[term]
    baseline = MultipleNegativesRankingLoss(model, scale=20).compute_loss_from_embeddings(columns, None)
    assert sign * (make(model).compute_loss_from_embeddings(columns) - baseline) > 1e-3


def test_gathering_on_one_process_changes_nothing(make: Callable[..., ContrastiveLoss]) -> None:
    columns, texts = views(9, 3), [torch.arange(9) % 7 for _ in range(3)]
    results = []
    for gather in (False, True):
        loss = make(gather_across_devices=gather)
        value = loss.compute_loss_from_embeddings(columns, texts)
        results.append([value, *gradients(value, columns)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


# One text column


def record_views(loss: ContrastiveLoss, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    seen, original = [], loss.compute_loss_from_embeddings

    def record(embeddings: list[Tensor], texts: list[Tensor | None] | None = None) -> Tensor:
        seen.append(embeddings)
        return original(embeddings, texts)

    monkeypatch.setattr(loss, "compute_loss_from_embeddings", record)
    return seen


def test_one_column_is_encoded_twice_in_one_call(
    make: Callable[..., ContrastiveLoss], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = make(StubModel(D, dropout=0.3))
    seen = record_views(loss, monkeypatch)
    rows = torch.randn(6, D)
    loss([features(rows, task=torch.tensor(3))])
    assert loss.model.calls == 1
    [[first, second]] = seen
    assert not torch.equal(first, second)
    for view in (first, second):  # in the rows' order: what dropout leaves is the row, scaled
        kept = view != 0
        torch.testing.assert_close(view[kept], (rows / 0.7)[kept])
        assert 0.4 < kept.float().mean() < 1


@pytest.mark.parametrize("flat", [True, False], ids=["without attention mask", "unpadded"])
def test_what_cannot_be_doubled_is_encoded_in_two_calls(
    flat: bool, make: Callable[..., ContrastiveLoss], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = make(StubModel(D, dropout=0.3))
    seen = record_views(loss, monkeypatch)
    rows = torch.randn(6, D)
    loss([{"embedding": rows} if flat else features(rows, cu_seq_lens_q=torch.arange(7))])
    assert loss.model.calls == 2
    assert not torch.equal(*seen[0])


@pytest.mark.parametrize("n_columns", [2, 3])
def test_other_columns_are_encoded_once_each(
    n_columns: int, make: Callable[..., ContrastiveLoss], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = make()
    seen = record_views(loss, monkeypatch)
    columns = [torch.randn(6, D) for _ in range(n_columns)]
    loss([features(column) for column in columns])
    assert loss.model.calls == n_columns
    assert all(map(torch.equal, seen[0], columns))


def test_equal_views_are_reported_once_and_only_in_training(
    make: Callable[..., ContrastiveLoss], caplog: pytest.LogCaptureFixture
) -> None:
    loss = make(StubModel(D, dropout=0.0))
    with torch.no_grad():
        loss([features(torch.randn(6, D))])
    loss.model.eval()
    loss([features(torch.randn(6, D))])
    assert caplog.messages == []
    loss.model.train()
    for _ in range(3):
        loss([features(torch.randn(6, D))])
    assert len(caplog.messages) == 1
    assert "no dropout" in caplog.text


def test_different_views_are_not_reported(
    make: Callable[..., ContrastiveLoss], caplog: pytest.LogCaptureFixture
) -> None:
    make(StubModel(D, dropout=0.3))([features(torch.randn(6, D))])
    assert caplog.messages == []


def test_pairs_of_equal_texts_are_not_reported(
    make: Callable[..., ContrastiveLoss], caplog: pytest.LogCaptureFixture
) -> None:
    rows = torch.randn(6, D)
    make()([features(rows), features(rows)])
    assert caplog.messages == []


def test_fewer_than_two_columns_are_refused_where_embeddings_are_given(make: Callable[..., ContrastiveLoss]) -> None:
    with pytest.raises(ValueError, match=r"anchor and a positive at least, got 1 column"):
        make().compute_loss_from_embeddings(views()[:1])


# Labels

LABELS: dict[str, Tensor] = {
    "cluster ids": torch.tensor([0, 1, 2, 3, 0, 1]),
    "off by one": torch.tensor([1, 2, 3, 4, 1, 2]),
    "one class": torch.ones(6, dtype=torch.long),
    "gold classes": torch.tensor([5, 5, 7, 7, 9, 9]),
    "out of range": torch.tensor([-3, 10**9, 99, 0, 1, 2]),
    "scores": torch.rand(6),
    "bytes": torch.ones(6, dtype=torch.uint8),
    "too few": torch.ones(1, dtype=torch.long),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_a_label_column_changes_nothing_and_is_reported_once(
    labels: Tensor, make: Callable[..., ContrastiveLoss], caplog: pytest.LogCaptureFixture
) -> None:
    columns = [features(column) for column in views(6, 3)]
    plain, labelled = make(), make()
    expected = [plain(columns) for _ in range(3)]
    assert caplog.messages == []
    actual = [labelled(columns, labels) for _ in range(3)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    [message] = caplog.messages
    assert f"{type(labelled).__name__} finds the clusters of sentences itself" in message
    assert "label column is not used" in message


def test_zeros_for_labels_are_not_reported(
    make: Callable[..., ContrastiveLoss], caplog: pytest.LogCaptureFixture
) -> None:
    """`old_fit` makes them up where the user gave no labels."""
    columns = [features(column) for column in views(6, 3)]
    plain, labelled = make(), make()
    for _ in range(2):
        value = labelled(columns, torch.zeros(6, dtype=torch.long))
        torch.testing.assert_close(value, plain(columns), rtol=0, atol=0)
    assert caplog.messages == []


# What is refused when a loss is made


def build_default(model: Any, **settings: Any) -> ClusterNSLoss:
    return ClusterNSLoss(model, corpus(dimension=32), **settings)


BUILD: dict[str, Callable[..., ContrastiveLoss]] = {"default": build_default, "published": PublishedClusterNSLoss}


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_a_truncated_model_is_refused(build: Callable[..., ContrastiveLoss], model: Any) -> None:
    build(model)
    model.truncate_dim = 16
    with pytest.raises(ValueError, match=r"truncate_dim=16 .*set model\.truncate_dim = None"):
        build(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_a_model_in_half_precision_is_refused(
    build: Callable[..., ContrastiveLoss], dtype: torch.dtype, model: Any
) -> None:
    with pytest.raises(ValueError, match=rf"weights are in {dtype}.*call model\.float\(\)"):
        build(model.to(dtype))
    build(model.float())


@pytest.mark.parametrize("build", [default, published], ids=["default", "published"])
def test_a_model_without_a_dimension_is_refused(build: Callable[..., ContrastiveLoss]) -> None:
    with pytest.raises(ValueError, match="does not know its embedding dimension"):
        build(StubModel(None))


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_making_a_loss_leaves_the_model_as_it_was(build: Callable[..., ContrastiveLoss], model: Any) -> None:
    texts = ["w1 w2 w3", "w40", "w7 w7 w180"]
    model.eval()
    before = model.encode(texts)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules, attributes = list(model.named_modules()), set(vars(model))
    build(model)
    assert list(model.named_modules()) == modules
    assert set(vars(model)) == attributes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.encode(texts) == before).all()


# The value is a tensor as that of any loss


def test_the_value_is_a_plain_scalar(make: Callable[..., ContrastiveLoss]) -> None:
    columns = views()
    value = make()([features(column) for column in columns])
    assert type(value) is torch.Tensor
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.item() == float(value.detach()) > 0
    assert f"{value:.3f}" == f"{value.item():.3f}"
    assert (value * 0.5 + 1).item() == pytest.approx(0.5 * value.item() + 1)
    (2 * value / 4 + value.mean()).backward()
    halves = [column.grad.clone() for column in columns]
    again = make()([features(column) for column in columns])
    torch.testing.assert_close(halves, [1.5 * gradient for gradient in gradients(again, columns)])
    assert all(half.any() for half in halves)


def test_the_loss_holds_no_parameters_of_its_own(make: Callable[..., ContrastiveLoss]) -> None:
    """An optimiser that is given `loss.parameters()` trains the model, and nothing else."""
    assert list(make().parameters()) == []


# Precision and gradients


@pytest.mark.parametrize("n_columns", [2, 4])
def test_gradients_are_those_of_finite_differences(n_columns: int, make: Callable[..., ContrastiveLoss]) -> None:
    settings = {"margin_weight": 2.0} if make is published_and_started else {}
    loss = make(temperature=0.3, **settings).double()
    loss.model.eval()  # so that centroids stay
    columns = views(5, n_columns, dtype=torch.float64)
    texts = [torch.tensor([1, 2, 3, 4, 1]) + 10 * number for number in range(n_columns)]
    assert torch.autograd.gradcheck(lambda *rows: loss.compute_loss_from_embeddings(list(rows), texts), columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_give_a_float32_loss(
    dtype: torch.dtype, make: Callable[..., ContrastiveLoss]
) -> None:
    """As under autocast: the embeddings are half, all that follows is not."""
    columns = [column.detach().to(dtype).requires_grad_() for column in views(9, 3)]
    wide = [column.detach().float().requires_grad_() for column in columns]
    results = []
    for some in (columns, wide):
        loss = make()
        value = loss.compute_loss_from_embeddings(some)
        assert value.dtype == torch.float32
        assert all(b.dtype == torch.float32 for b in loss.buffers() if b.is_floating_point())
        results.append((value, gradients(value, some), list(loss.buffers())))
    (half_value, halves, half_state), (value, fulls, state) = results
    torch.testing.assert_close(half_value, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(half_state, state, rtol=1e-6, atol=1e-6)
    for half, full in zip(halves, fulls, strict=True):
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), full, rtol=0.02, atol=1e-3)


def test_autocast_changes_nothing(make: Callable[..., ContrastiveLoss]) -> None:
    columns, results = views(9, 3), []
    for enabled in (False, True):
        loss = make()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss.compute_loss_from_embeddings(columns)
        results.append([value, *gradients(value, columns), *loss.buffers()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


# Nothing is read from a GPU


class Linear(nn.Linear):
    """Stands in for a SentenceTransformer, with a parameter to train."""

    def get_embedding_dimension(self) -> int:
        return D

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": super().forward(features["embedding"])}


class LinearWithTokens(Linear, TokenStub):
    """Such a model that has a tokenizer, too."""

    def __init__(self) -> None:
        nn.Linear.__init__(self, D, D)


def tokens(n_rows: int, **options: Any) -> dict[str, Tensor]:
    ids = torch.arange(3 * n_rows).reshape(n_rows, 3) % 7
    values = {"embedding": torch.randn(n_rows, D), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: value.to(**options) for name, value in values.items()}


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast knows no meta device."""
    monkeypatch.setattr(contrastive, "full_precision", lambda _: nullcontext())


def step(loss: ContrastiveLoss, n_columns: int, device: str) -> None:
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    labels = torch.ones(6, dtype=torch.long, device=device)
    loss([tokens(6, device=device) for _ in range(n_columns)], labels).backward()
    optimizer.step()


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("n_columns", [1, 2, 4])
@pytest.mark.parametrize("with_tokens", [False, True], ids=["no tokenizer", "tokenizer"])
def test_after_the_first_step_no_tensor_is_read(
    with_tokens: bool, n_columns: int, make: Callable[..., ContrastiveLoss]
) -> None:
    """A GPU need not be waited for. Tensors on the meta device have no values, so that reading one raises."""
    loss = make(LinearWithTokens() if with_tokens else Linear(D, D))
    step(loss, n_columns, "cpu")
    step(loss.to("meta"), n_columns, "meta")


READS: dict[str, Callable[[Tensor], Any]] = {
    "float": lambda ids: float(ids.sum()),
    "int": lambda ids: int(ids[0]),
    "item": lambda ids: ids.sum().item(),
    "bool": lambda ids: bool((ids > 0).any()),
    "equal": lambda ids: torch.equal(ids, ids),
    "tolist": Tensor.tolist,
    "mask": lambda ids: ids[ids > 0],
}


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_would_be_noticed(read: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary for the test above."""
    original = clusterns.same_cluster

    def reading(ids: Tensor, own: Tensor) -> Tensor:
        read(ids)
        return original(ids, own)

    monkeypatch.setattr(clusterns, "same_cluster", reading)
    loss = default(Linear(D, D))
    step(loss, 2, "cpu")
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|Meta"):
        step(loss.to("meta"), 2, "meta")


@pytest.mark.parametrize("mode", MODES)
def test_the_value_does_not_depend_on_the_mode(mode: str, make: Callable[..., ContrastiveLoss]) -> None:
    """Without dropout; the published loss would move its centroids."""
    still = {"momentum": 0.0} if make is published_and_started else {}
    columns = [column.detach() for column in views()]
    expected = make(**still).compute_loss_from_embeddings(columns)
    loss = make(**still)
    with MODES[mode](loss):
        torch.testing.assert_close(loss.compute_loss_from_embeddings(columns), expected, rtol=0, atol=0)
