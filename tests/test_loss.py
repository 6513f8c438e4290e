"""`ClusterNSLoss` against loops written from the definition, against MNRL, and against misuse."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import StubModel
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor

from st_clusterns import PRESETS, ClusterNSLoss, CorpusClusters
from st_clusterns import start as start_module
from st_clusterns.clusters import Clusters
from st_clusterns.components import LossComponents
from st_clusterns.corpus import remember_corpus
from st_clusterns.presets import PUBLISHED, RECOMMENDED, Choices, find_preset

K, D = 4, 8
OFF = {"hard_negative_weight": 0.0, "margin_weight": 0.0}
UNMASKED = replace(RECOMMENDED, keep_false_negatives=True)
ON = {"hard_negative_weight": 1.0, "margin_weight": 6.0, "margin_beta": 0.1}


def corpus(trust: float = 1.0, k: int = K) -> CorpusClusters:
    centroids = np.random.default_rng(0).normal(size=(k, D)).astype(np.float32)
    return CorpusClusters(np.arange(3 * k) % k, centroids, np.full(k, trust, dtype=np.float32))


def views(n_rows: int = 6, n_columns: int = 2, noise: float = 1.0, **options: Any) -> list[Tensor]:
    """Anchors, positives near them, and random negatives, as leaves."""
    anchors = torch.randn(n_rows, D, **options)
    positives = anchors + noise * torch.randn(n_rows, D, **options)
    columns = [anchors, positives, *(torch.randn(n_rows, D, **options) for _ in range(n_columns - 2))]
    return [column.requires_grad_() for column in columns]


def gradients(loss: Tensor | LossComponents, columns: list[Tensor]) -> list[Tensor]:
    total = loss.total() if isinstance(loss, LossComponents) else loss
    return list(torch.autograd.grad(total, columns))


def state_of(loss: ClusterNSLoss) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in loss.named_buffers()}


def changed(before: dict[str, Tensor], loss: ClusterNSLoss) -> set[str]:
    return {name for name, buffer in loss.named_buffers() if not torch.equal(before[name], buffer)}


# (a) The definition, row by row


def cos(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum() / one.norm() / other.norm()


def slow_step(
    columns: list[Tensor],
    labels: list[int],
    centroids: list[Tensor],
    trust: list[float],
    choices: Choices,
    n: dict[str, float],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return both terms and the moved centroids: one step on a started cluster state, one row at a time."""
    anchors, positives, *negatives = columns
    rows = range(len(anchors))
    plain = [anchor.detach() for anchor in anchors]

    def by_similarity(row: int) -> list[int]:
        return sorted(range(len(centroids)), key=lambda k: -float(cos(plain[row], centroids[k])))

    def cluster_of(row: int) -> int:
        return labels[row] - 1 if labels[row] > 0 else by_similarity(row)[0]

    # The centroids follow the batch; then each row is looked up anew.
    ids = [cluster_of(row) for row in rows]
    moved = list(centroids)
    for k in set(ids):
        members = [plain[row] for row in rows if ids[row] == k]
        if choices.move_to_sum:
            target = sum(members)
        else:
            target = sum(member / member.norm() for member in members) / len(members)
        moved[k] = centroids[k] + n["momentum"] * (target - centroids[k])
    centroids = moved
    ids = [cluster_of(row) for row in rows]
    hard = [centroids[next(k for k in by_similarity(row) if k != ids[row])] for row in rows]

    contrastive = margin = torch.zeros((), dtype=torch.float64)
    for i in rows:
        false = [j for j in rows if j != i and ids[j] == ids[i] and trust[ids[i]] >= n["min_trust"]]
        own = cos(anchors[i], positives[i])

        # Each candidate's share of the denominator: a weight and a cosine.
        candidates = [
            (1.0, cos(anchors[i], positives[j])) for j in rows if choices.keep_false_negatives or j not in false
        ]
        candidates += [(1.0, cos(anchors[i], row)) for column in negatives for row in column]
        if n["hard_negative_weight"] > 0:
            served = rows if choices.share_hard_negatives else [i]
            candidates += [(n["hard_negative_weight"] if j == i else 1.0, cos(anchors[i], hard[j])) for j in served]
        denominator = sum(weight * (cosine / n["temperature"]).exp() for weight, cosine in candidates)
        contrastive = contrastive - ((own / n["temperature"]).exp() / denominator).log() / len(rows)

        if not choices.pull_rows_together:
            shares = torch.stack([(cos(anchors[i], centroid) / n["temperature"]).exp() for centroid in centroids])
            if trust[ids[i]] >= n["min_trust"]:
                margin = margin - (shares[ids[i]] / shares.sum()).log() / len(rows)
            continue
        for j in rows:
            delta = cos(anchors[i], positives[j]) - own if j in false else torch.zeros(())
            penalty = (delta + n["margin_alpha"]).clamp(min=0) + (-delta - n["margin_beta"]).clamp(min=0)
            if choices.average_margin_over_batch:
                margin = margin + penalty / len(rows) ** 2
            elif j in false:
                margin = margin + penalty / len(false) / len(rows)
    return contrastive, n["margin_weight"] * margin, centroids


def turned(choices: Choices) -> Iterator[Choices]:
    """The choices themselves, and each with one choice turned over."""
    yield choices
    for field in fields(Choices):
        if field.name != "start_from_one_batch":  # plays no part once the clusters have started
            yield replace(choices, **{field.name: not getattr(choices, field.name)})


NUMBERS = [
    {"temperature": 0.05, "hard_negative_weight": 1.0, "margin_weight": 6.0, "margin_alpha": 0.0, "margin_beta": 0.0},
    {"temperature": 0.2, "hard_negative_weight": 0.0, "margin_weight": 0.5, "margin_alpha": 0.1, "margin_beta": 0.4},
    {"temperature": 0.7, "hard_negative_weight": 2.5, "margin_weight": 0.0, "margin_alpha": 0.2, "margin_beta": 0.2},
]


def named(choices: Choices) -> str:
    """Return one letter a choice, such as `TTTTT` for the published ones."""
    return "".join("FT"[value] for value in vars(choices).values())


CASES = [
    *((choices, False) for choices in (*turned(PUBLISHED), *turned(RECOMMENDED))),
    *((choices, True) for choices in (PUBLISHED, *turned(RECOMMENDED))),
]


@pytest.mark.parametrize("n_negatives", [0, 1, 2])
@pytest.mark.parametrize(
    ("choices", "with_labels"),
    CASES,
    ids=lambda value: named(value) if isinstance(value, Choices) else ("labels" if value else "nearest"),
)
def test_the_loss_is_its_definition_row_by_row(choices: Choices, with_labels: bool, n_negatives: int) -> None:
    """Values, gradients and centroids, over two steps each, in float64."""
    for trial, numbers in enumerate(NUMBERS):
        torch.manual_seed(trial)
        numbers = {**numbers, "momentum": 0.3, "min_trust": 0.5}
        clusters = corpus() if not choices.start_from_one_batch else None
        loss = ClusterNSLoss(StubModel(D), K, clusters=clusters, choices=choices, **numbers).double()
        centroids, trust = list(torch.randn(K, D).double()), [0.9, 0.1, 0.5, 1.0]
        loss.clusters.seed(torch.stack(centroids), torch.tensor(trust).double())
        for _ in range(2):
            columns = views(7, 2 + n_negatives, dtype=torch.float64)
            labels = torch.randint(0, K + 1, (7,)) if with_labels else None
            parts = loss.compute_loss_from_embeddings(columns, labels)
            ignored = labels is None or choices.start_from_one_batch  # the published method has no corpus to number
            known = [0] * 7 if ignored else labels.tolist()
            contrastive, margin, centroids = slow_step(columns, known, centroids, trust, choices, numbers)

            torch.testing.assert_close(parts["contrastive"], contrastive)
            torch.testing.assert_close(parts["false_negative"], margin)
            torch.testing.assert_close(gradients(parts, columns), gradients(contrastive + margin, columns))
            torch.testing.assert_close(loss.clusters.centroids, torch.stack(centroids))


# (b) The baseline


@contextmanager
def nothing_drawn() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the loss drew random numbers, so dropout would differ"


def published_and_started(model: StubModel, temperature: float) -> ClusterNSLoss:
    loss = ClusterNSLoss.from_preset(model, "paper/bert-base", n_clusters=K, temperature=temperature, **OFF)
    loss.clusters.seed(torch.randn(K, D))
    return loss


@pytest.mark.parametrize("trust", [0.0, 1.0])
def test_without_trusted_clusters_it_is_the_built_in_loss_at_its_own_temperature(trust: float) -> None:
    model = StubModel(D)
    loss, baseline = ClusterNSLoss(model, clusters=corpus(trust)), MultipleNegativesRankingLoss(model)
    columns = [torch.randn(6, D) for _ in range(2)]
    equal = torch.isclose(
        loss.compute_loss_from_embeddings(columns).total(), baseline.compute_loss_from_embeddings(columns, None)
    )
    assert bool(equal) == (trust == 0)
    assert loss.temperature == (0.05 if trust == 0 else 0.1)


@pytest.mark.parametrize("n_columns", [2, 3, 4])
@pytest.mark.parametrize("temperature", [0.05, 0.3])
@pytest.mark.parametrize(
    "make",
    [
        lambda m, t: ClusterNSLoss(m, temperature=t, start_similarity=-1, **ON),
        lambda m, t: ClusterNSLoss.from_preset(m, "paper/bert-base", temperature=t, start_similarity=-1),
        lambda m, t: ClusterNSLoss(m, temperature=t, clusters=corpus(), choices=UNMASKED, **OFF),
        published_and_started,
        lambda m, t: ClusterNSLoss(
            m, temperature=t, clusters=corpus(0.1), min_trust=0.2, **{**ON, "hard_negative_weight": 0.0}
        ),
    ],
    ids=["not started", "published, not started", "terms off", "published, terms off", "clusters not trusted"],
)
def test_without_cluster_terms_it_is_mnrl(
    make: Callable[..., ClusterNSLoss], temperature: float, n_columns: int
) -> None:
    model, columns = StubModel(D), views(9, n_columns)
    loss, baseline = make(model, temperature), MultipleNegativesRankingLoss(model, scale=1 / temperature)
    with nothing_drawn():
        parts = loss.compute_loss_from_embeddings(columns)
    expected = baseline.compute_loss_from_embeddings(columns, None)
    assert parts["false_negative"] == 0
    torch.testing.assert_close(parts.total(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(parts, columns), gradients(expected, columns), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("setting", ["hard_negative_weight", "margin_weight"])
def test_each_cluster_term_parts_from_mnrl(setting: str) -> None:
    """A canary for the test above."""
    model, columns = StubModel(D), views(9)
    loss = ClusterNSLoss(model, temperature=0.05, clusters=corpus(), choices=UNMASKED, **{**OFF, setting: 5.0})
    total = loss.compute_loss_from_embeddings(columns).total()
    baseline = MultipleNegativesRankingLoss(model, scale=20).compute_loss_from_embeddings(columns, None)
    assert total > baseline + 1e-3


def test_gathering_on_one_process_changes_nothing() -> None:
    columns = views(9, 3)
    results = []
    for gather in (False, True):
        loss = ClusterNSLoss(StubModel(D), clusters=corpus(), gather_across_devices=gather, **ON)
        results.append(gradients(loss.compute_loss_from_embeddings(columns), columns))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# (c) One text column


def features(rows: Tensor, **others: Tensor) -> dict[str, Tensor]:
    return {"embedding": rows, "attention_mask": torch.ones(len(rows), 3), **others}


def record_views(loss: ClusterNSLoss, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    seen, original = [], loss.compute_loss_from_embeddings

    def record(embeddings: list[Tensor], labels: Tensor | None = None) -> LossComponents:
        seen.append(embeddings)
        return original(embeddings, labels)

    monkeypatch.setattr(loss, "compute_loss_from_embeddings", record)
    return seen


def test_one_column_is_encoded_twice_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ClusterNSLoss(StubModel(D, dropout=0.3), K)
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
def test_what_cannot_be_doubled_is_encoded_in_two_calls(flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ClusterNSLoss(StubModel(D, dropout=0.3), K)
    seen = record_views(loss, monkeypatch)
    rows = torch.randn(6, D)
    loss([{"embedding": rows} if flat else features(rows, cu_seq_lens_q=torch.arange(7))])
    assert loss.model.calls == 2
    assert not torch.equal(*seen[0])


@pytest.mark.parametrize("n_columns", [2, 3])
def test_other_columns_are_encoded_once_each(n_columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ClusterNSLoss(StubModel(D), K)
    seen = record_views(loss, monkeypatch)
    columns = [torch.randn(6, D) for _ in range(n_columns)]
    loss([features(column) for column in columns])
    assert loss.model.calls == n_columns
    assert all(map(torch.equal, seen[0], columns))


def test_equal_views_are_reported_once_and_only_in_training(caplog: pytest.LogCaptureFixture) -> None:
    loss = ClusterNSLoss(StubModel(D, dropout=0.0), K)
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


def test_different_views_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    ClusterNSLoss(StubModel(D, dropout=0.3), K)([features(torch.randn(6, D))])
    assert caplog.messages == []


def test_pairs_of_equal_texts_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.randn(6, D)
    ClusterNSLoss(StubModel(D), K)([features(rows), features(rows)])
    assert caplog.messages == []


# (d) The state moves in training only


@contextmanager
def evaluating(loss: ClusterNSLoss) -> Iterator[None]:
    """As `trainer.evaluate()` has it: the loss stays in training mode."""
    loss.train()
    loss.model.eval()
    with torch.no_grad():
        yield


@contextmanager
def eval_mode(loss: ClusterNSLoss) -> Iterator[None]:
    loss.model.eval()
    yield


MODES = {"training": nullcontext, "eval": eval_mode, "no_grad": lambda _: torch.no_grad(), "evaluate": evaluating}


@pytest.mark.parametrize("mode", MODES)
def test_centroids_move_in_training_only_and_serve_always(mode: str) -> None:
    loss = ClusterNSLoss(StubModel(D), clusters=corpus(), **ON)
    before = state_of(loss)
    with MODES[mode](loss):
        parts = loss.compute_loss_from_embeddings(views())
    assert changed(before, loss) == ({"clusters.centroids"} if mode == "training" else set())
    assert parts["false_negative"] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("similarity", [1.0, -1.0], ids=["collecting", "waiting"])
def test_rows_are_collected_in_training_only(similarity: float, mode: str) -> None:
    loss = ClusterNSLoss(StubModel(D), K, start_similarity=similarity)
    before = state_of(loss)
    with MODES[mode](loss):
        loss.compute_loss_from_embeddings(views())
    collected = {"start.rows", "start.n_rows"} if similarity == 1 else set()
    assert changed(before, loss) == ({"start.n_waited", *collected} if mode == "training" else set())


def test_everything_learnt_is_a_buffer() -> None:
    loss = ClusterNSLoss(StubModel(D), clusters=corpus())
    assert list(loss.parameters()) == []


def test_truncated_embeddings_are_served_but_move_nothing() -> None:
    """Matryoshka training comes several times a step, and the widths do not mix."""
    loss = ClusterNSLoss(StubModel(D), clusters=corpus(), **ON)
    before = state_of(loss)
    parts = loss.compute_loss_from_embeddings([view[:, :3] for view in views()])
    assert parts["false_negative"] > 0
    assert changed(before, loss) == set()


def test_reset_goes_back_to_the_corpus() -> None:
    loss = ClusterNSLoss(StubModel(D), clusters=corpus(0.7))
    before = state_of(loss)
    loss.compute_loss_from_embeddings(views())
    assert changed(before, loss)
    loss.reset()
    assert changed(before, loss) == set()
    torch.testing.assert_close(loss.clusters.trust, torch.full((K,), 0.7))


# (e) The start


def published(k: int = K, **settings: Any) -> ClusterNSLoss:
    return ClusterNSLoss.from_preset(StubModel(D), "paper/bert-base", n_clusters=k, **settings)


def alike(n_rows: int = 6) -> list[Tensor]:
    """As a raw language model has them: all cosines are close to 1."""
    return [(torch.ones(n_rows, D) + 0.01 * torch.randn(n_rows, D)).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("make", [published, lambda: ClusterNSLoss(StubModel(D), 2)], ids=["published", "recommended"])
def test_clusters_wait_until_rows_are_unlike(make: Callable[[], ClusterNSLoss]) -> None:
    loss = make()
    for _ in range(20):
        assert loss.compute_loss_from_embeddings(alike())["false_negative"] == 0
    assert not loss.clusters.started
    assert loss.start.n_rows == 0
    for _ in range(20):
        loss.compute_loss_from_embeddings(views())
    assert loss.clusters.started


def test_the_threshold_is_the_mean_cosine_of_all_pairs() -> None:
    columns = views(6)
    mean = F.cosine_similarity(columns[0][:, None], columns[1][None], dim=2).mean().item()
    for similarity, starts in ((mean - 1e-3, False), (mean + 1e-3, True)):
        loss = published(start_similarity=similarity)
        loss.compute_loss_from_embeddings(columns)
        assert bool(loss.clusters.started) == starts


def test_published_start_is_a_chain_of_rows_and_serves_from_the_next_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, columns = published(start_similarity=1.0, margin_beta=0.0), views(9)
    monkeypatch.setattr(loss.start, "_draw", lambda below: below - 1)
    assert loss.compute_loss_from_embeddings(columns)["false_negative"] == 0
    picks, cosines = [8], F.cosine_similarity(columns[0][:, None], columns[1][None], dim=2)
    while len(picks) < K:
        picks.append(min(set(range(9)) - set(picks), key=lambda row: cosines[picks[-1], row]))
    assert torch.equal(loss.clusters.centroids, columns[0][picks])
    assert loss.clusters.trust.min() == 1
    assert loss.compute_loss_from_embeddings(columns)["false_negative"] > 0


@pytest.mark.parametrize(
    ("make", "batches"),
    [(lambda: published(20), 4), (lambda: ClusterNSLoss(StubModel(D), 2, start_similarity=1.0), 11)],
    ids=["published: K rows", "recommended: 32 K rows"],
)
def test_more_rows_than_a_batch_holds_are_collected(make: Callable[[], ClusterNSLoss], batches: int) -> None:
    loss, seen = make(), []
    for step in range(1, batches + 1):
        columns = views(6)
        seen.append(columns[0].detach())
        loss.compute_loss_from_embeddings(columns)
        assert bool(loss.clusters.started) == (step == batches)
        if step < batches:
            assert loss.start.n_rows == 6 * step
            assert torch.equal(loss.start.rows[0, : 6 * step], torch.cat(seen))
    assert loss.start.n_rows == 0
    assert loss.start.rows.count_nonzero() == 0
    if loss.choices.start_from_one_batch:
        assert all((torch.cat(seen) == centroid).all(dim=1).any() for centroid in loss.clusters.centroids)


def test_recommended_start_finds_the_clusters_of_the_rows() -> None:
    loss = ClusterNSLoss(StubModel(D), 3, start_similarity=1.0)
    for _ in range(6):
        rows = torch.eye(3, D).repeat_interleave(6, dim=0) + 0.02 * torch.randn(18, D)
        loss.compute_loss_from_embeddings([rows.requires_grad_(), rows.detach()])
    assert loss.clusters.started
    assert sorted(loss.clusters.predict(torch.eye(3, D)).tolist()) == [0, 1, 2]
    assert loss.clusters.trust.min() > 0.8


def test_recommended_start_does_not_trust_what_is_no_cluster() -> None:
    loss = ClusterNSLoss(StubModel(D), 8, start_similarity=1.0)
    for _ in range(16):
        loss.compute_loss_from_embeddings(views(16))
    assert loss.clusters.started
    assert not loss.clusters.trust.any()
    assert loss.compute_loss_from_embeddings(views(16))["false_negative"] == 0


def test_corpus_clusters_serve_from_the_first_step_on() -> None:
    loss = ClusterNSLoss(StubModel(D), clusters=corpus(0.5), start_similarity=-1.0, **ON)
    assert loss.clusters.started
    np.testing.assert_array_equal(loss.clusters.centroids, corpus().centroids)
    assert loss.compute_loss_from_embeddings(views())["false_negative"] > 0


@pytest.mark.parametrize(
    ("make", "batch", "reason"),
    [
        (published, alike, "mean in-batch cosine is 1.00 and has to fall to start_similarity=0.4"),
        (lambda: published(1000), views, "30 of 1000 rows are collected. Lower n_clusters"),
        (lambda: ClusterNSLoss(StubModel(D), 50), views, "30 of 1600 rows are collected. Lower n_clusters"),
    ],
    ids=["alike", "too many clusters", "too few rows"],
)
def test_waiting_in_vain_is_reported_once_with_its_reason(
    make: Callable[[], ClusterNSLoss],
    batch: Callable[[], list[Tensor]],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert start_module.PATIENCE == 500
    monkeypatch.setattr(start_module, "PATIENCE", 5)
    loss = make()
    for _ in range(4):
        loss.compute_loss_from_embeddings(batch())
    assert caplog.messages == []
    for _ in range(12):
        loss.compute_loss_from_embeddings(batch())
    [message] = caplog.messages
    assert "have not started after 5 forward passes" in message
    assert reason in message


def test_clusters_that_started_are_not_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(start_module, "PATIENCE", 5)
    loss = published()
    for _ in range(20):
        loss.compute_loss_from_embeddings(views())
    assert caplog.messages == []


# (f) Labels


def apart() -> list[Tensor]:
    """One row at each centroid of the corpus: without labels there are no false negatives."""
    rows = torch.as_tensor(corpus().centroids)
    return [rows.clone().requires_grad_(), (rows + 0.1 * torch.randn(K, D)).requires_grad_()]


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "masked"])
def test_labels_decide_masks_and_margins(keep: bool) -> None:
    """Rows 0 and 2 are false negatives of each other if, and only if, their labels are equal."""
    choices = replace(RECOMMENDED, keep_false_negatives=keep, pull_rows_together=True)
    labelled, plain = (ClusterNSLoss(StubModel(D), clusters=corpus(), choices=choices) for _ in range(2))
    columns = apart()
    with_labels = labelled.compute_loss_from_embeddings(columns, torch.tensor([3, 1, 3, 2]))
    without = plain.compute_loss_from_embeddings(columns)
    assert without["false_negative"] == 0
    cosines = F.cosine_similarity(columns[0][:, None], columns[1][None], dim=2)
    deltas = [cosines[i, j] - cosines[i, i] for i, j in ((0, 2), (2, 0))]
    penalties = [delta.relu() + (-delta - labelled.margin_beta).relu() for delta in deltas]
    torch.testing.assert_close(with_labels["false_negative"], labelled.margin_weight * sum(penalties) / K)
    logits = cosines / labelled.temperature
    if not keep:
        logits[[0, 2], [2, 0]] = -torch.inf
    torch.testing.assert_close(with_labels["contrastive"], F.cross_entropy(logits, torch.arange(K)))


def test_labels_decide_the_centroid_that_a_row_is_pulled_to() -> None:
    loss = ClusterNSLoss(StubModel(D), clusters=corpus(), momentum=0.0)
    columns, labels = apart(), torch.tensor([3, 1, 3, 2])
    pull = loss.compute_loss_from_embeddings(columns, labels)["false_negative"]
    cosines = F.cosine_similarity(columns[0][:, None], torch.as_tensor(corpus().centroids)[None], dim=2)
    torch.testing.assert_close(pull, F.cross_entropy(cosines / loss.temperature, labels - 1))
    assert torch.autograd.grad(pull, columns[0])[0].any()


def test_labels_decide_which_centroid_follows() -> None:
    loss = ClusterNSLoss(StubModel(D), clusters=corpus())
    before = loss.clusters.centroids.clone()
    loss.compute_loss_from_embeddings(apart(), torch.tensor([2, 2, 2, 2]))
    assert (loss.clusters.centroids != before).any(dim=1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_label_0_is_unknown(dtype: torch.dtype) -> None:
    """Such rows go to their nearest centroid, beside labelled ones."""
    loss = ClusterNSLoss(StubModel(D), clusters=corpus(), momentum=0.0)
    columns = views(12)
    nearest = loss.clusters.predict(columns[0])
    plain = loss.compute_loss_from_embeddings(columns)
    assert plain["false_negative"] > 0
    for known in (torch.zeros(12), torch.arange(12) % 2, torch.ones(12)):
        labels = ((nearest + 1) * known).to(dtype)
        torch.testing.assert_close(loss.compute_loss_from_embeddings(columns, labels), plain)


def test_the_published_method_takes_no_notice_of_labels() -> None:
    """Its clusters are its own, so `fit` with a `ClusterDataLoader` must not number them by another corpus."""
    columns = views()
    results = []
    for labels in (None, torch.ones(6, dtype=torch.long), torch.full((6,), 99), torch.rand(6)):
        loss = published()
        loss.clusters.seed(torch.as_tensor(corpus().centroids))
        results.append((loss.compute_loss_from_embeddings(columns, labels), loss.clusters.centroids))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_labels_without_a_corpus_are_refused() -> None:
    with pytest.raises(ValueError, match=r"label column reached ClusterNSLoss.*clusters=cluster_corpus"):
        ClusterNSLoss(StubModel(D), K).compute_loss_from_embeddings(apart(), torch.ones(K, dtype=torch.long))


def test_a_corpus_noted_for_the_model_is_found() -> None:
    model = StubModel(D)
    remember_corpus(model, corpus())
    assert ClusterNSLoss(model).clusters.started
    assert not ClusterNSLoss(StubModel(D), K).clusters.started
    given = corpus(0.5, k=7)
    assert ClusterNSLoss(model, clusters=given).corpus is given


def test_a_corpus_noted_after_the_loss_was_made_is_adopted_with_the_first_labels() -> None:
    model = StubModel(D)
    loss = ClusterNSLoss(model, K)
    remember_corpus(model, corpus())
    loss.compute_loss_from_embeddings(apart())
    assert not loss.clusters.started
    parts = loss.compute_loss_from_embeddings(apart(), torch.ones(K, dtype=torch.long))
    assert loss.clusters.started
    assert parts["false_negative"] > 0


def test_a_corpus_of_other_clusters_than_the_loss_is_not_adopted() -> None:
    model = StubModel(D)
    loss = ClusterNSLoss(model)
    remember_corpus(model, corpus())
    with pytest.raises(ValueError, match=f"made with 128 clusters .*into {K}: make the ClusterDataLoader first"):
        loss.compute_loss_from_embeddings(apart(), torch.ones(K, dtype=torch.long))


# (g) Settings

TABLE = """
paper/bert-base           256  5e-5  128  1e-3  0.4  1  1e-3  0     0.3
paper/bert-large          512  5e-5  128  1e-3  0.5  1  5e-5  0.25  0.3
paper/roberta-base        512  5e-5  128  1e-3  0.4  1  1e-4  0.2   0.5
paper/roberta-large       512  5e-5  128  5e-4  0.4  1  0     -     -
paper/prompt-bert-base    512  5e-5   96  5e-4  0.4  1  1e-2  0     0.2
paper/prompt-bert-large   256  3e-5   96  1e-4  0.2  1  5e-4  0.25  0.3
paper/prompt-roberta-base 512  5e-5  128  1e-3  0.4  0  1e-2  0.2   0.6
"""  # the authors' README: batch, learning rate, K, momentum, start, hard negatives, margin weight, alpha, beta
ROWS = [line.split() for line in TABLE.strip().splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_presets_hold_the_published_numbers(row: list[str]) -> None:
    name, *cells = row
    preset, loss = find_preset(name), ClusterNSLoss.from_preset(StubModel(D), name)
    config = loss.get_config_dict()
    names = ["n_clusters", "momentum", "start_similarity", "hard_negative_weight", "margin_weight"]
    names += ["margin_alpha", "margin_beta"]
    actual = [preset.batch_size, preset.learning_rate, *(config[name] for name in names)]
    for value, cell in zip(actual, cells, strict=True):
        assert cell == "-" or value == float(cell)
    assert config["temperature"] == 0.05
    assert all(vars(loss.choices).values()), "the published choices"
    assert loss.clusters.to_sum
    assert loss.min_trust == 0


def test_there_are_no_other_presets() -> None:
    assert set(PRESETS) == {row[0] for row in ROWS}


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no preset 'paper/bert'") as error:
        ClusterNSLoss.from_preset(StubModel(D), "paper/bert")
    assert all(name in str(error.value) for name in PRESETS)


def test_overrides_win_over_the_preset() -> None:
    loss = published(temperature=0.1, choices=RECOMMENDED)
    assert (loss.clusters.n_clusters, loss.temperature) == (K, 0.1)
    assert loss.choices == RECOMMENDED
    assert not loss.clusters.to_sum


def test_the_published_method_starts_on_its_own() -> None:
    """Even where a corpus was clustered for the model."""
    model = StubModel(D)
    remember_corpus(model, corpus())
    loss = ClusterNSLoss.from_preset(model, "paper/bert-base")
    assert loss.clusters.n_clusters == 128
    assert not loss.clusters.started


def test_n_clusters_comes_from_the_corpus_and_may_not_contradict_it() -> None:
    assert ClusterNSLoss(StubModel(D)).clusters.n_clusters == 128
    assert ClusterNSLoss(StubModel(D), clusters=corpus(k=7)).clusters.n_clusters == 7
    assert ClusterNSLoss(StubModel(D), 7, clusters=corpus(k=7)).clusters.n_clusters == 7
    with pytest.raises(ValueError, match="n_clusters=5, but the corpus was clustered into 7"):
        ClusterNSLoss(StubModel(D), 5, clusters=corpus(k=7))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (0, -0.05, math.nan)],
        *[("momentum", v) for v in (-0.1, 1.1, math.nan)],
        *[("start_similarity", v) for v in (-1.1, 1.1, math.nan)],
        *[("margin_alpha", v) for v in (-0.1, math.nan)],
        *[("margin_beta", v) for v in (-0.1, math.nan)],
        *[("margin_weight", v) for v in (-1, math.inf, math.nan)],
        *[("hard_negative_weight", v) for v in (-1, math.inf, math.nan)],
        *[("min_trust", v) for v in (-0.1, 1.1, math.nan)],
        *[("n_clusters", v) for v in (1, -1)],
    ],
)
def test_numbers_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must .*got {value}"):
        ClusterNSLoss(StubModel(D), **{name: value})


def test_margin_beta_below_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match=r"margin_beta must be margin_alpha \(0.3\) or more, got 0.2"):
        ClusterNSLoss(StubModel(D), margin_alpha=0.3, margin_beta=0.2)


def test_a_model_without_a_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="does not know its embedding dimension"):
        ClusterNSLoss(StubModel(None))


@pytest.mark.parametrize("make", [published, lambda: ClusterNSLoss(StubModel(D), K)], ids=["published", "recommended"])
def test_the_config_is_json_and_holds_every_setting(make: Callable[[], ClusterNSLoss]) -> None:
    config = make().get_config_dict()
    assert json.loads(json.dumps(config)) == config
    settings = set(inspect.signature(ClusterNSLoss.__init__).parameters) - {"self", "model", "clusters", "choices"}
    assert set(config) == settings | {field.name for field in fields(Choices)}


def test_a_loss_is_made_again_from_its_config() -> None:
    config = ClusterNSLoss(StubModel(D), 7, 0.1, 0.2, 0.3, 0.1, 0.4, 0.5, 0.6, 0.7, True).get_config_dict()
    choices = Choices(**{field.name: config.pop(field.name) for field in fields(Choices)})
    again = ClusterNSLoss(StubModel(D), **config, choices=choices)
    assert again.get_config_dict() == {**config, **vars(choices)}
    assert list(config.values()) == [7, 0.1, 0.2, 0.3, 0.1, 0.4, 0.5, 0.6, 0.7, True]


def test_what_the_host_library_reads() -> None:
    loss = ClusterNSLoss(StubModel(D), temperature=0.07)
    assert loss.temperature == 0.07
    assert "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation" in loss.citation
    assert loss.citation.strip().startswith("@inproceedings{")
    assert "2023.findings-acl.555" in loss.citation


# (h) The components behave as their sum


def components(*values: float) -> tuple[LossComponents, Tensor]:
    x = torch.tensor(1.0, requires_grad=True)
    return LossComponents({name: x * value for name, value in zip("ab", values, strict=False)}), x


def derivative(loss: LossComponents, x: Tensor) -> float:
    loss.backward()
    return x.grad.item()


def test_components_are_scaled_one_by_one() -> None:
    parts, _ = components(2.0, 3.0)
    for scaled in (parts * 4, 4 * parts, torch.tensor(4.0) * parts, parts / 0.25):
        assert isinstance(scaled, LossComponents)
        assert {name: value.item() for name, value in scaled.items()} == {"a": 8.0, "b": 12.0}
    assert parts.total() == 5


def test_components_are_added_by_name() -> None:
    parts, _ = components(2.0, 3.0)
    other, _ = components(10.0)
    for added in (sum([parts, other]), parts + other, other + parts, 0 + parts + 0.0 + other):
        assert isinstance(added, LossComponents)
        assert {name: value.item() for name, value in added.items()} == {"a": 12.0, "b": 3.0}


def test_a_plain_loss_is_added_as_another_component() -> None:
    parts, _ = components(2.0, 3.0)
    for added in (parts + torch.tensor(7.0), torch.tensor(7.0) + parts, parts + 7.0, 7 + parts):
        assert isinstance(added, LossComponents)
        assert added.total() == 12
        assert added["other"] == 7
    assert (added + torch.tensor(1.0))["other"] == 8


def test_gradients_are_those_of_the_sum() -> None:
    parts, x = components(2.0, 3.0)
    assert derivative(2 * parts / 4 + parts, x) == 7.5


def test_arithmetic_leaves_the_operands_alone() -> None:
    parts, _ = components(2.0, 3.0)
    _ = parts + parts, parts * 2, parts / 2, parts + torch.tensor(1.0)
    assert {name: value.item() for name, value in parts.items()} == {"a": 2.0, "b": 3.0}


# (i) Precision


@pytest.mark.parametrize("choices", [PUBLISHED, RECOMMENDED], ids=["published", "recommended"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-4), (torch.float16, 1e-4)])
def test_half_precision_embeddings_give_a_float32_loss(dtype: torch.dtype, tolerance: float, choices: Choices) -> None:
    columns = [column.detach().to(dtype).requires_grad_() for column in views(9, 3)]
    wide = [column.detach().float().requires_grad_() for column in columns]
    results = []
    for some in (columns, wide):
        loss = ClusterNSLoss(StubModel(D), K, choices=choices, min_trust=0.0, **ON)
        loss.clusters.seed(torch.as_tensor(corpus().centroids))
        parts = loss.compute_loss_from_embeddings(some)
        assert all(value.dtype == torch.float32 for value in parts.values())
        assert loss.clusters.centroids.dtype == torch.float32
        results.append((parts, gradients(parts, some), loss.clusters.centroids))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=tolerance, atol=tolerance)
    for half, full in zip(results[0][1], results[1][1], strict=True):
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), full, rtol=0.02, atol=1e-3)


def test_autocast_changes_nothing() -> None:
    columns, results = views(9, 3), []
    for enabled in (False, True):
        loss = ClusterNSLoss(StubModel(D), clusters=corpus(), **ON)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            parts = loss.compute_loss_from_embeddings(columns)
        results.append((parts, gradients(parts, columns), loss.clusters.centroids))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_an_evaluation_adopts_no_corpus() -> None:
    model = StubModel(D)
    loss = ClusterNSLoss(model, K)
    loss.clusters.seed(torch.randn(K, D))
    before = state_of(loss)
    remember_corpus(model, corpus())
    model.eval()
    with torch.no_grad():
        loss.compute_loss_from_embeddings(views(), torch.ones(6, dtype=torch.long))
    assert not changed(before, loss)


def test_no_argument_is_dropped_silently() -> None:
    with pytest.raises(ValueError, match="n_clusters"):
        ClusterNSLoss(StubModel(D), n_clusters=0)
    with pytest.raises(ValueError, match="clusters"):
        ClusterNSLoss.from_preset(StubModel(D), "paper/bert-base", clusters=corpus())


def test_clusters_do_not_move_before_the_start() -> None:
    with pytest.raises(RuntimeError, match="have not started"):
        Clusters(3, 4, 0.5).partial_fit(torch.randn(2, 4), torch.tensor([0, 1]))


def test_fewer_than_two_columns_are_refused_where_embeddings_are_given() -> None:
    with pytest.raises(ValueError, match=r"anchor and a positive at least, got 1 column"):
        ClusterNSLoss(StubModel(D), K).compute_loss_from_embeddings(views()[:1])
