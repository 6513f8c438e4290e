"""`PublishedClusterNSLoss` against loops written from the paper, and its state; `test_golden` holds the arrays."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batches import MODES, D, K, corpus, cos, features, gradients, padded, published, published_and_started, views
from conftest import StubModel
from torch import Tensor

from st_clusterns import PRESETS, CachedClusterNSLoss, ClusterNSLoss, PublishedClusterNSLoss
from st_clusterns.losses import moving_centroids as centroids_module
from st_clusterns.losses.presets import find_preset

# The definition, row by row


def slow_step(columns: list[Tensor], centroids: list[Tensor], n: dict[str, float]) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the moved centroids: one step after the start, one row at a time."""
    anchors, positives, *negatives = columns
    rows = range(len(anchors))
    plain = [anchor.detach() for anchor in anchors]

    def by_similarity(row: int) -> list[int]:
        return sorted(range(len(centroids)), key=lambda k: -cos(plain[row], centroids[k]).item())

    # The centroids follow the batch; then each row is looked up anew.
    ids = [by_similarity(row)[0] for row in rows]
    moved = list(centroids)
    for k in set(ids):
        members = sum(plain[row] for row in rows if ids[row] == k)
        moved[k] = centroids[k] + n["momentum"] * (members - centroids[k])
    centroids = moved
    ids = [by_similarity(row)[0] for row in rows]
    hard = [centroids[by_similarity(row)[1]] for row in rows]

    loss = torch.zeros((), dtype=torch.float64)
    for i in rows:
        # Each candidate's share of the denominator: a weight and a cosine.
        candidates = [(1.0, cos(anchors[i], row)) for column in (positives, *negatives) for row in column]
        if n["hard_negative_weight"] > 0:
            candidates += [(n["hard_negative_weight"] if j == i else 1.0, cos(anchors[i], hard[j])) for j in rows]
        denominator = sum(weight * (cosine / n["temperature"]).exp() for weight, cosine in candidates)
        own = cos(anchors[i], positives[i])
        loss = loss - ((own / n["temperature"]).exp() / denominator).log() / len(rows)
        for j in rows:
            delta = cos(anchors[i], positives[j]) - own if j != i and ids[j] == ids[i] else torch.zeros(())
            penalty = (delta + n["margin_alpha"]).clamp(min=0) + (-delta - n["margin_beta"]).clamp(min=0)
            loss = loss + n["margin_weight"] * penalty / len(rows) ** 2
    return loss, centroids


NUMBERS = [
    {"temperature": 0.05, "hard_negative_weight": 1.0, "margin_weight": 6.0, "margin_alpha": 0.0, "margin_beta": 0.0},
    {"temperature": 0.2, "hard_negative_weight": 0.0, "margin_weight": 0.5, "margin_alpha": 0.1, "margin_beta": 0.4},
    {"temperature": 0.7, "hard_negative_weight": 2.5, "margin_weight": 0.0, "margin_alpha": 0.2, "margin_beta": 0.2},
    {"temperature": 0.7, "hard_negative_weight": 0.3, "margin_weight": 3.0, "margin_alpha": 0.2, "margin_beta": 0.3},
]


@pytest.mark.parametrize("n_negatives", [0, 1, 2])
@pytest.mark.parametrize("trial", range(len(NUMBERS)))
def test_the_loss_is_its_definition_row_by_row(trial: int, n_negatives: int) -> None:
    """Values, gradients and centroids, over two steps, in float64."""
    numbers = {**NUMBERS[trial], "momentum": 0.3}
    loss = published_and_started(**numbers).double()
    centroids = list(loss.centroids.centroids.clone())
    for _ in range(2):
        columns = views(7, 2 + n_negatives, dtype=torch.float64)
        value = loss.compute_loss_from_embeddings(columns)
        expected, centroids = slow_step(columns, centroids, numbers)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients(value, columns), gradients(expected, columns))
        torch.testing.assert_close(loss.centroids.centroids, torch.stack(centroids))


def test_the_loss_is_the_sum_of_its_two_terms() -> None:
    """`both_terms` is what the golden arrays are compared with."""
    columns = views(9, 3)
    loss = published_and_started(margin_weight=0.7, momentum=0.0)
    contrastive, margin = loss.both_terms(loss.prepare(columns), slice(None))
    assert margin > 0
    torch.testing.assert_close(loss.compute_loss_from_embeddings(columns), contrastive + 0.7 * margin)


def test_copies_of_a_text_stay_negatives() -> None:
    """As published, also before the start."""
    columns = views(3)
    for make in (published, published_and_started):
        values = []
        for texts in ([[5], [6, 7], [5]], [[5], [6, 7], [8]]):
            loss = make()
            values.append(loss([features(column, **padded(texts)) for column in columns]))
        torch.testing.assert_close(*values, rtol=0, atol=0)


# The state moves in training only


def state_of(loss: PublishedClusterNSLoss) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loss.state_dict().items()}


def changed(before: dict[str, Tensor], loss: PublishedClusterNSLoss) -> set[str]:
    return {name for name, value in loss.state_dict().items() if not torch.equal(before[name], value)}


CENTROIDS, ROWS, EXTRA = "centroids.centroids", "centroids.rows", "centroids._extra_state"


@pytest.mark.parametrize("mode", MODES)
def test_centroids_move_in_training_only_and_serve_always(mode: str) -> None:
    columns = views()
    loss, plain = published_and_started(), published(start_similarity=-1)
    before = state_of(loss)
    with MODES[mode](loss):
        value = loss.compute_loss_from_embeddings(columns)
    assert changed(before, loss) == ({CENTROIDS} if mode == "training" else set())
    assert value > plain.compute_loss_from_embeddings(columns) + 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("similarity", [1.0, -1.0], ids=["collecting", "waiting"])
def test_rows_are_collected_in_training_only(similarity: float, mode: str) -> None:
    loss = published(n_clusters=100, start_similarity=similarity)
    before = state_of(loss)
    with MODES[mode](loss):
        loss.compute_loss_from_embeddings(views())
    expected = {EXTRA, ROWS} if similarity == 1 else {EXTRA}
    assert changed(before, loss) == (expected if mode == "training" else set())


def test_truncated_embeddings_are_served_but_move_nothing() -> None:
    """Matryoshka training comes several times a step, and the widths do not mix."""
    columns = [column[:, :3].detach() for column in views()]
    loss, plain = published_and_started(), published(start_similarity=-1)
    before = state_of(loss)
    value = loss.compute_loss_from_embeddings(columns)
    assert value > plain.compute_loss_from_embeddings(columns) + 1e-3
    assert changed(before, loss) == set()
    collecting = published(start_similarity=1.0)
    before = state_of(collecting)
    collecting.compute_loss_from_embeddings(columns)
    assert changed(before, collecting) == set()


# The start


def alike(n_rows: int = 6) -> list[Tensor]:
    """As a raw language model has them: all cosines are close to 1."""
    return [(torch.ones(n_rows, D) + 0.01 * torch.randn(n_rows, D)).requires_grad_() for _ in range(2)]


def test_centroids_wait_until_rows_are_unlike() -> None:
    loss = published()
    for _ in range(20):
        loss.compute_loss_from_embeddings(alike())
    assert not loss.centroids.started
    assert loss.centroids.n_rows == 0
    for _ in range(20):
        loss.compute_loss_from_embeddings(views())
    assert loss.centroids.started


def test_the_start_is_a_chain_of_rows_and_serves_from_the_next_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = views(9)
    loss, plain = published(start_similarity=1.0), published(start_similarity=-1)
    monkeypatch.setattr(loss.centroids, "draw", lambda below: below - 1)
    expected = plain.compute_loss_from_embeddings(columns)
    torch.testing.assert_close(loss.compute_loss_from_embeddings(columns), expected, rtol=0, atol=0)
    picks, cosines = [8], F.cosine_similarity(columns[0][:, None], columns[1][None], dim=2)
    while len(picks) < K:
        picks.append(min(set(range(9)) - set(picks), key=lambda row: cosines[picks[-1], row].item()))
    assert torch.equal(loss.centroids.centroids, columns[0][picks])
    assert loss.compute_loss_from_embeddings(columns) > expected + 1e-3


# The state survives


@pytest.mark.parametrize("n_steps", [0, 1, 2, 5], ids=["fresh", "collecting", "still collecting", "started"])
def test_all_state_is_in_the_state_dict(n_steps: int) -> None:
    """A loss that gets the state of another goes on as that one: same values, same centroids."""
    first = published(n_clusters=15, start_similarity=1.0, momentum=0.3)
    for _ in range(n_steps):
        first.compute_loss_from_embeddings(views())
    assert first.centroids.started == (n_steps == 5)
    second = published(n_clusters=15, start_similarity=1.0, momentum=0.3)
    second.load_state_dict(first.state_dict())
    assert changed(state_of(first), second) == set()
    batches = [views() for _ in range(5)]
    values = []
    for loss in (first, second):
        torch.manual_seed(7)  # for the draw of the first centroid
        values.append([loss.compute_loss_from_embeddings(columns) for columns in batches])
    torch.testing.assert_close(*values, rtol=0, atol=0)
    assert changed(state_of(first), second) == set()


def test_the_patience_is_a_part_of_the_state(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(centroids_module, "PATIENCE", 5)
    first, second = published(), published()
    for _ in range(4):
        first.compute_loss_from_embeddings(alike())
    second.load_state_dict(first.state_dict())
    assert caplog.messages == []
    second.compute_loss_from_embeddings(alike())
    assert len(caplog.messages) == 1


BAD = {"nan": (torch.nan,), "inf": (torch.inf,), "both infinities": (torch.inf, -torch.inf)}


@pytest.mark.parametrize("column", [0, 1], ids=["anchors", "positives"])
@pytest.mark.parametrize("values", BAD.values(), ids=BAD)
def test_rows_that_are_not_finite_do_not_damage_the_state(values: tuple[float, ...], column: int) -> None:
    """As after an overflow in half precision, whose step the gradient scaler leaves out."""
    columns = [column.detach() for column in views()]
    columns[column][2, : len(values)] = torch.tensor(values)
    collecting, started = published(n_clusters=15, start_similarity=1.0), published_and_started(momentum=0.3)
    for loss in (collecting, started):
        loss.compute_loss_from_embeddings(views())
        before = state_of(loss)
        loss.compute_loss_from_embeddings(columns)
        assert all(value.isfinite().all() for value in loss.state_dict().values())
        if loss is collecting:
            assert changed(before, loss) == {EXTRA}, "only the counter of batches waited for"
            assert loss.centroids.n_rows == 6
        elif column == 0:
            assert changed(before, loss) == set()
        for _ in range(3):
            value = loss.compute_loss_from_embeddings(views())
        assert value.isfinite()
        assert loss.centroids.started
        assert CENTROIDS in changed(before, loss)


def test_reset_goes_back_to_construction() -> None:
    loss = published(start_similarity=1.0)
    before = state_of(loss)
    loss.compute_loss_from_embeddings(views())
    assert changed(before, loss)
    loss.centroids.reset()
    assert changed(before, loss) == set()


# Settings

TABLE = """
paper/bert-base           256  5e-5  128  1e-3  0.4  1  1e-3  0     0.3
paper/bert-large          512  5e-5  128  1e-3  0.5  1  5e-5  0.25  0.3
paper/roberta-base        512  5e-5  128  1e-3  0.4  1  1e-4  0.2   0.5
paper/roberta-large       512  5e-5  128  5e-4  0.4  1  0     -     -
paper/prompt-bert-base    512  5e-5   96  5e-4  0.4  1  1e-2  0     0.2
paper/prompt-bert-large   256  3e-5   96  1e-4  0.2  1  5e-4  0.25  0.3
paper/prompt-roberta-base 512  5e-5  128  1e-3  0.4  0  1e-2  0.2   0.6
"""  # the authors' README: batch, learning rate, K, momentum, start, hard negatives, margin weight, alpha, beta
TABLE_ROWS = [line.split() for line in TABLE.strip().splitlines()]


@pytest.mark.parametrize("row", TABLE_ROWS, ids=lambda row: row[0])
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
    assert type(loss) is PublishedClusterNSLoss


def test_the_defaults_are_those_of_the_first_preset() -> None:
    expected = ClusterNSLoss.from_preset(StubModel(D), "paper/bert-base").get_config_dict()
    assert PublishedClusterNSLoss(StubModel(D)).get_config_dict() == expected


def test_there_are_no_other_presets() -> None:
    assert set(PRESETS) == {row[0] for row in TABLE_ROWS}


@pytest.mark.parametrize("loss", [ClusterNSLoss, CachedClusterNSLoss])
def test_an_unknown_preset_lists_the_known_ones(loss: Any) -> None:
    with pytest.raises(ValueError, match="no preset 'paper/bert'") as error:
        loss.from_preset(StubModel(D), "paper/bert")
    assert all(name in str(error.value) for name in PRESETS)


def test_overrides_win_over_the_preset() -> None:
    loss = published(n_clusters=7, temperature=0.1)
    assert (loss.centroids.n_clusters, loss.temperature) == (7, 0.1)
    assert loss.margin_weight == 1e-3


def test_the_published_method_takes_no_notice_of_a_clustered_corpus() -> None:
    model = StubModel(D)
    corpus().note_on(model)
    loss = ClusterNSLoss.from_preset(model, "paper/bert-base")
    assert loss.centroids.n_clusters == 128
    assert not loss.centroids.started


@pytest.mark.parametrize(
    ("name", "value", "interval"),
    [
        *[("temperature", v, "above 0") for v in (0, -0.05, math.nan, math.inf)],
        *[("momentum", v, "between 0 and 1") for v in (-0.1, 1.1, math.nan)],
        *[("start_similarity", v, "between -1 and 1") for v in (-1.1, 1.1, math.nan)],
        *[("margin_alpha", v, "0 or more") for v in (-0.1, math.nan, math.inf)],
        *[("margin_beta", v, r"0\.0 or more") for v in (-0.1, math.nan, math.inf)],
        *[("margin_weight", v, "0 or more") for v in (-1, math.inf, math.nan)],
        *[("hard_negative_weight", v, "0 or more") for v in (-1, math.inf, math.nan)],
        *[("n_clusters", v, "2 or more") for v in (1, 0, -1)],
    ],
)
def test_numbers_out_of_range_are_named(name: str, value: float, interval: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be {interval}, got {value}\."):
        PublishedClusterNSLoss(StubModel(D), **{name: value})


def test_margin_beta_below_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match=r"margin_beta must be 0.3 or more, got 0.2"):
        PublishedClusterNSLoss(StubModel(D), margin_alpha=0.3, margin_beta=0.2)
    PublishedClusterNSLoss(StubModel(D), margin_alpha=0.3, margin_beta=0.3)


@pytest.mark.parametrize("name", ["momentum", "start_similarity"])
def test_the_ends_of_an_interval_are_in_it(name: str) -> None:
    for value in (0, 1):
        assert PublishedClusterNSLoss(StubModel(D), **{name: value}).get_config_dict()[name] == value


def test_the_config_is_json_and_holds_every_setting() -> None:
    config = published().get_config_dict()
    assert json.loads(json.dumps(config)) == config
    assert set(config) == set(inspect.signature(PublishedClusterNSLoss.__init__).parameters) - {"self", "model"}


def test_a_loss_is_made_again_from_its_config() -> None:
    values = [7, 0.1, 0.2, 0.3, 0.1, 0.4, 0.5, 0.6, True, True]
    config = PublishedClusterNSLoss(StubModel(D), *values).get_config_dict()
    names = list(inspect.signature(PublishedClusterNSLoss.__init__).parameters)[2:]
    assert config == dict(zip(names, values, strict=True))
    assert PublishedClusterNSLoss(StubModel(D), **config).get_config_dict() == config


def test_what_the_host_library_reads() -> None:
    citation = published().citation
    assert "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation" in citation
    assert citation.strip().startswith("@inproceedings{")
    assert "2023.findings-acl.555" in citation
