"""The moving centroids: the pure functions against loops, the state against what may never happen to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from st_clusterns.losses import moving_centroids as centroids_module
from st_clusterns.losses.moving_centroids import MovingCentroids, move_centroids, pick_spread_rows

K, D = 4, 8


def fresh(k: int = K, momentum: float = 0.3, start_similarity: float = 1.0) -> MovingCentroids:
    return MovingCentroids(k, D, momentum, start_similarity)


def started(k: int = K, momentum: float = 0.3) -> MovingCentroids:
    moving = fresh(k, momentum)
    rows = torch.randn(k, D)
    moving.follow(rows, rows)
    assert moving.started
    return moving


def views(n_rows: int = 6) -> tuple[Tensor, Tensor]:
    anchors = torch.randn(n_rows, D)
    return anchors, anchors + torch.randn(n_rows, D)


def alike(n_rows: int = 6) -> tuple[Tensor, Tensor]:
    """As a raw language model has them: all cosines are close to 1."""
    return torch.ones(n_rows, D) + 0.01 * torch.randn(n_rows, D), torch.ones(n_rows, D)


def state_of(moving: MovingCentroids) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in moving.state_dict().items()}


def assert_same_state(before: dict[str, Tensor], moving: MovingCentroids) -> None:
    after = moving.state_dict()
    assert list(after) == list(before)
    for name, value in after.items():
        assert torch.equal(before[name], value), name


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Unit centroids (K, D), rows (M, D) and a cluster for each row (M,), in float64."""
    k, m, d = draw(st.integers(2, 6)), draw(st.integers(1, 20)), draw(st.integers(1, 9))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    centroids = F.normalize(torch.randn(k, d, generator=source).double(), dim=1)
    return centroids, torch.randn(m, d, generator=source).double(), torch.randint(k, (m,), generator=source)


# The pure functions


def pick_by_loop(similarity: list[list[float]], count: int, first: int) -> list[int]:
    picks = [first]
    while len(picks) < count:
        free = [row for row in range(len(similarity)) if row not in picks]
        picks.append(min(free, key=lambda row: similarity[picks[-1]][row]))
    return picks


@pytest.mark.parametrize("count", [1, 2, 7, 12])
@pytest.mark.parametrize("first", [0, 5, 11])
def test_pick_spread_rows_is_a_chain_from_the_last_pick(count: int, first: int) -> None:
    similarity = 2 * torch.rand(12, 12) - 1  # not symmetric: the two views differ
    picks = pick_spread_rows(similarity, count, first).tolist()
    assert picks == pick_by_loop(similarity.tolist(), count, first)
    assert len(set(picks)) == count


def test_pick_spread_rows_does_not_look_at_earlier_picks() -> None:
    """The authors' chain, not farthest-point sampling: row 2 is unlike row 1 and equal to row 0."""
    similarity = torch.tensor([[1.0, -1.0, 1.0, 0.0], [-1.0, 1.0, -1.0, 0.0], [0.0] * 4, [0.0] * 4])
    assert pick_spread_rows(similarity, 3, first=0).tolist() == [0, 1, 2]


def move_by_loop(centroids: Tensor, rows: Tensor, ids: Tensor, momentum: float) -> Tensor:
    moved = centroids.clone()
    for k in range(len(centroids)):
        members = [row for row, cluster in zip(rows, ids.tolist(), strict=True) if cluster == k]
        if members:
            moved[k] = (1 - momentum) * centroids[k] + momentum * sum(members)
    return moved


@given(batches(), st.floats(0, 1))
def test_move_centroids_is_its_definition_cluster_by_cluster(
    batch: tuple[Tensor, Tensor, Tensor], momentum: float
) -> None:
    centroids, rows, ids = batch
    before = centroids.clone()
    actual = move_centroids(centroids, rows, ids, momentum)
    torch.testing.assert_close(actual, move_by_loop(centroids, rows, ids, momentum))
    assert torch.equal(centroids, before), "the argument is not changed"


@given(batches(), st.randoms())
def test_the_order_of_the_rows_does_not_matter(batch: tuple[Tensor, Tensor, Tensor], random: Any) -> None:
    centroids, rows, ids = batch
    order = random.sample(range(len(rows)), len(rows))
    moved = move_centroids(centroids, rows, ids, 0.3)
    torch.testing.assert_close(move_centroids(centroids, rows[order], ids[order], 0.3), moved)


def test_clusters_without_members_stay_to_the_last_bit() -> None:
    centroids, rows = torch.randn(K, D), torch.randn(6, D)
    moved = move_centroids(centroids, rows, torch.tensor([1, 1, 3, 1, 3, 3]), 0.7)
    assert torch.equal(moved[[0, 2]], centroids[[0, 2]])
    assert (moved[[1, 3]] != centroids[[1, 3]]).all()


def test_the_step_is_towards_the_sum_and_not_to_the_mean() -> None:
    """As in the authors' code: a centroid of more members grows longer, so that a step turns it less."""
    centroids, row = torch.zeros(2, 3), torch.ones(1, 3)
    one = move_centroids(centroids, row, torch.tensor([0]), 0.5)[0]
    two = move_centroids(centroids, row.repeat(2, 1), torch.tensor([0, 0]), 0.5)[0]
    assert torch.equal(two, 2 * one)


@pytest.mark.parametrize("bad", [(torch.nan,), (torch.inf,), (-torch.inf,), (torch.inf, -torch.inf)])
def test_a_batch_that_is_not_finite_moves_nothing(bad: tuple[float, ...]) -> None:
    centroids, rows = torch.randn(K, D), torch.randn(6, D)
    rows[2, : len(bad)] = torch.tensor(bad)
    moved = move_centroids(centroids, rows, torch.arange(6) % K, 0.5)
    assert torch.equal(moved, centroids)


# Following a batch


def test_the_similarity_is_the_cosine_also_with_truncated_rows() -> None:
    """Lengths do not matter, neither the rows' nor the centroids'."""
    moving, rows = started(), torch.randn(6, D, requires_grad=True)
    moving.centroids.mul_(torch.logspace(-2, 2, K)[:, None])
    for width in (D, 3):
        expected = F.cosine_similarity(rows[:, None, :width], moving.centroids[None, :, :width], dim=2).detach()
        for scale in (1, 1000):
            similarity = moving.similarity(scale * rows[:, :width])
            torch.testing.assert_close(similarity, expected)
            assert not similarity.requires_grad


def test_directions_are_unit_vectors_as_wide_and_precise_as_the_rows() -> None:
    moving = started()
    for width, dtype in ((D, torch.float32), (3, torch.float64)):
        directions = moving.directions(torch.randn(2, width, dtype=dtype))
        assert directions.dtype == dtype
        expected = moving.centroids[:, :width].to(dtype)
        torch.testing.assert_close(directions, expected / expected.norm(dim=1, keepdim=True))


def test_centroids_follow_the_anchors_nearest_to_them() -> None:
    moving = started(momentum=0.3)
    anchors, positives = views(10)
    cosines = F.cosine_similarity(anchors[:, None], moving.centroids[None], dim=2)
    expected = move_by_loop(moving.centroids, anchors, cosines.argmax(dim=1), 0.3)
    moving.follow(anchors, positives)
    torch.testing.assert_close(moving.centroids, expected)


# The start


@pytest.mark.parametrize(("difference", "starts"), [(-1e-3, False), (1e-3, True)])
def test_the_threshold_is_the_mean_cosine_of_all_pairs(difference: float, starts: bool) -> None:
    anchors, positives = views()
    mean = F.cosine_similarity(anchors[:, None], positives[None], dim=2).mean().item()
    moving = fresh(start_similarity=mean + difference)
    moving.follow(anchors, positives)
    assert moving.started == starts


def test_nothing_is_collected_while_rows_are_alike() -> None:
    moving = fresh(start_similarity=0.4)
    for _ in range(3):
        moving.follow(*alike())
    assert (moving.started, moving.n_rows, moving.n_waited) == (False, 0, 3)
    assert not moving.rows.any()


@pytest.mark.parametrize(("n_clusters", "n_batches"), [(4, 1), (6, 1), (7, 2), (20, 4)])
def test_rows_are_collected_until_there_are_enough(n_clusters: int, n_batches: int) -> None:
    moving, seen = fresh(n_clusters), []
    for step in range(1, n_batches + 1):
        assert not moving.started
        batch = views(6)
        moving.follow(*batch)
        seen.append(torch.stack(batch))
        if step < n_batches:
            assert moving.n_rows == 6 * step
            assert torch.equal(moving.rows[:, : 6 * step], torch.cat(seen, dim=1))
            assert not moving.rows[:, 6 * step :].any()
    assert moving.started
    assert moving.n_rows == moving.n_waited == 0
    assert not moving.rows.any()
    chosen = (moving.centroids[:, None] == torch.cat(seen, dim=1)[0]).all(dim=2)  # (K, rows)
    assert chosen.any(dim=1).all(), "each centroid is a row"
    assert chosen.any(dim=0).sum() == n_clusters, "and no row is two centroids"


def test_the_start_picks_rows_by_the_cosines_of_both_views(monkeypatch: pytest.MonkeyPatch) -> None:
    moving = fresh(5)
    monkeypatch.setattr(moving, "draw", lambda below: below - 2)
    anchors, positives = views(9)
    moving.follow(anchors, positives)
    cosines = F.cosine_similarity(anchors[:, None], positives[None], dim=2)
    assert torch.equal(moving.centroids, anchors[pick_by_loop(cosines.tolist(), 5, 7)])


def test_the_first_row_is_drawn_at_random() -> None:
    anchors, positives = views(9)
    firsts = set()
    for _ in range(100):
        moving = fresh()
        moving.follow(anchors, positives)
        firsts.add((anchors == moving.centroids[0]).all(dim=1).nonzero().item())
    assert firsts == set(range(9))


@pytest.mark.parametrize(
    ("make", "batch", "reason"),
    [
        (
            lambda: fresh(start_similarity=0.4),
            alike,
            "mean in-batch cosine is 1.00 and has to fall to start_similarity=0.4. Raise start_similarity",
        ),
        (lambda: fresh(1000), views, "30 of 1000 rows are collected. Lower n_clusters"),
    ],
    ids=["alike", "too many clusters"],
)
def test_waiting_in_vain_is_reported_once_with_its_reason(
    make: Callable[[], MovingCentroids],
    batch: Callable[[], tuple[Tensor, Tensor]],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert centroids_module.PATIENCE == 500
    monkeypatch.setattr(centroids_module, "PATIENCE", 5)
    moving = make()
    for _ in range(4):
        moving.follow(*batch())
    assert caplog.messages == []
    for _ in range(12):
        moving.follow(*batch())
    assert len(caplog.messages) == 1
    assert "have not started after 5 batches" in caplog.text
    assert reason in caplog.text


def test_centroids_that_started_are_not_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(centroids_module, "PATIENCE", 5)
    moving = fresh()
    for _ in range(20):
        moving.follow(*views())
    assert caplog.messages == []


# The state


def test_everything_learnt_is_a_float32_buffer_of_full_size() -> None:
    moving = fresh()
    assert list(moving.parameters()) == []
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in moving.named_buffers()}
    assert shapes == {"centroids": ((K, D), torch.float32), "rows": ((2, K, D), torch.float32)}
    assert set(moving.state_dict()) == {*shapes, "_extra_state"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_buffers_are_changed_in_place_and_stay_float32(dtype: torch.dtype) -> None:
    moving = fresh(10)
    places = {name: value.data_ptr() for name, value in moving.named_buffers()}
    for _ in range(3):  # collects, starts, follows
        before = state_of(moving)
        anchors, positives = (view.to(dtype).requires_grad_() for view in views())
        moving.follow(anchors, positives)
        assert any(not torch.equal(before[name], value) for name, value in moving.named_buffers())
    assert moving.started
    assert {name: value.data_ptr() for name, value in moving.named_buffers()} == places
    for buffer in moving.buffers():
        assert buffer.dtype == torch.float32
        assert not buffer.requires_grad


def test_centroids_are_copies_of_their_rows() -> None:
    moving = fresh()
    anchors, positives = views()
    moving.follow(anchors, positives)
    anchors.zero_()
    assert moving.centroids.abs().min() > 0


@pytest.mark.parametrize("n_batches", [0, 1, 2, 4], ids=["fresh", "collecting", "still collecting", "started"])
def test_the_state_survives_a_round_trip(n_batches: int) -> None:
    first, second = fresh(15), fresh(15)
    for _ in range(n_batches):
        first.follow(*views())
    second.load_state_dict(first.state_dict())
    assert_same_state(state_of(first), second)
    attributes = ("started", "n_rows", "n_waited")
    assert [getattr(second, name) for name in attributes] == [getattr(first, name) for name in attributes]
    assert type(second.started) is bool
    assert first.started == (n_batches == 4)


@pytest.mark.parametrize("n_batches", [1, 4], ids=["collecting", "started"])
def test_reset_forgets_everything(n_batches: int) -> None:
    moving = fresh(15)
    before = state_of(moving)
    for _ in range(n_batches):
        moving.follow(*views())
    moving.reset()
    assert_same_state(before, moving)
    assert not moving.started


def test_rows_that_are_not_finite_are_not_collected() -> None:
    moving = fresh(15)
    moving.follow(*views())
    buffers = [buffer.clone() for buffer in moving.buffers()]
    for view in range(2):
        for value in (torch.nan, torch.inf, -torch.inf):
            batch = views()
            batch[view][3, 0] = value
            moving.follow(*batch)
    assert moving.n_rows == 6
    assert all(map(torch.equal, buffers, moving.buffers()))


def test_repr_shows_the_sizes() -> None:
    assert "n_clusters=4, dimension=8, momentum=0.3, started=True" in repr(started())


@pytest.mark.parametrize("n_clusters", [1, 0, -1])
def test_fewer_than_two_clusters_are_refused(n_clusters: int) -> None:
    with pytest.raises(ValueError, match=f"n_clusters must be 2 or more, got {n_clusters}"):
        fresh(n_clusters)
    assert fresh(2).n_clusters == 2
