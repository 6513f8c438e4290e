"""The clusters: the verbs against loops, the state against what may never happen to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from st_clusterns.clusters import Clusters, check_finite, move_centroids, pick_spread_rows


def started(k: int = 4, d: int = 8, momentum: float = 0.3, **settings: Any) -> Clusters:
    clusters = Clusters(k, d, momentum, **settings)
    clusters.seed(torch.randn(k, d))
    return clusters


def state_of(clusters: Clusters) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in clusters.state_dict().items()}


def assert_same_state(before: dict[str, Tensor], clusters: Clusters) -> None:
    for name, value in clusters.state_dict().items():
        assert torch.equal(before[name], value), name


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Unit centroids (K, D), rows (B, D) and a cluster for each row (B,)."""
    k, b, d = draw(st.integers(2, 6)), draw(st.integers(1, 20)), draw(st.integers(1, 9))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    centroids = F.normalize(torch.randn(k, d, generator=source), dim=1)
    return centroids, torch.randn(b, d, generator=source), torch.randint(k, (b,), generator=source)


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


def move_by_loop(centroids: Tensor, rows: Tensor, ids: Tensor, momentum: float, to_sum: bool) -> Tensor:
    moved = centroids.clone()
    for k in range(len(centroids)):
        members = [row for row, cluster in zip(rows, ids.tolist(), strict=True) if cluster == k]
        if members:
            target = sum(members) / (1 if to_sum else len(members))
            moved[k] = (1 - momentum) * centroids[k] + momentum * target
    return moved


@given(batches(), st.floats(0, 1), st.booleans())
def test_move_centroids_is_its_definition_cluster_by_cluster(
    batch: tuple[Tensor, Tensor, Tensor], momentum: float, to_sum: bool
) -> None:
    centroids, rows, ids = (x.double() if x.is_floating_point() else x for x in batch)
    actual = move_centroids(centroids, rows, ids, momentum, to_sum=to_sum)
    torch.testing.assert_close(actual, move_by_loop(centroids, rows, ids, momentum, to_sum))


@pytest.mark.parametrize("to_sum", [False, True])
def test_clusters_without_members_stay_to_the_last_bit(to_sum: bool) -> None:
    centroids, rows = torch.randn(4, 8), torch.randn(6, 8)
    moved = move_centroids(centroids, rows, torch.tensor([1, 1, 3, 1, 3, 3]), 0.7, to_sum=to_sum)
    assert torch.equal(moved[[0, 2]], centroids[[0, 2]])
    assert (moved[[1, 3]] != centroids[[1, 3]]).all()


def test_mean_and_sum_part_with_the_second_member() -> None:
    centroids, row = torch.zeros(2, 3), torch.ones(1, 3)
    one, two = torch.zeros(1, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    mean, total = (move_centroids(centroids, row.repeat(2, 1), two, 0.5, to_sum=s)[0] for s in (False, True))
    assert torch.equal(total, 2 * mean)
    assert torch.equal(move_centroids(centroids, row, one, 0.5, to_sum=True)[0], mean)


# The verbs


def test_predict_is_the_centroid_of_highest_cosine() -> None:
    """Lengths do not matter, neither the rows' nor the centroids'."""
    clusters = Clusters(5, 8)
    centroids, rows = torch.randn(5, 8) * torch.logspace(-2, 2, 5)[:, None], torch.randn(30, 8)
    clusters.seed(centroids)
    expected = [max(range(5), key=lambda k: float(F.cosine_similarity(row, centroids[k], dim=0))) for row in rows]
    assert clusters.predict(rows).tolist() == expected
    assert clusters.predict(1000 * rows).tolist() == expected
    assert len(set(expected)) > 1


def test_similarity_is_the_cosine_also_with_truncated_rows() -> None:
    clusters, rows = started(), torch.randn(6, 8)
    for width in (8, 3):
        expected = F.cosine_similarity(rows[:, None, :width], clusters.centroids[None, :, :width], dim=2)
        torch.testing.assert_close(clusters.similarity(rows[:, :width]), expected)


@pytest.mark.parametrize("to_sum", [False, True])
def test_partial_fit_moves_to_predicted_members(to_sum: bool) -> None:
    """The mean is over unit vectors, the published sum over the rows as they are."""
    clusters = started(momentum=0.3, to_sum=to_sum)
    rows = 3 * torch.randn(10, 8)
    ids = clusters.predict(rows)
    targets = rows if to_sum else F.normalize(rows, dim=1)
    expected = move_by_loop(clusters.centroids, targets, ids, 0.3, to_sum)
    clusters.partial_fit(rows)
    torch.testing.assert_close(clusters.centroids, expected)


def test_partial_fit_with_ids_does_not_predict() -> None:
    clusters, rows = started(), torch.randn(4, 8)
    ids = (clusters.predict(rows) + 1) % 4
    expected = move_by_loop(clusters.centroids, F.normalize(rows, dim=1), ids, 0.3, to_sum=False)
    clusters.partial_fit(rows, ids)
    torch.testing.assert_close(clusters.centroids, expected)


def test_seed_starts_and_reset_forgets() -> None:
    clusters = Clusters(3, 4)
    fresh = state_of(clusters)
    centroids = torch.randn(3, 4)
    clusters.seed(centroids)
    assert bool(clusters.started)
    assert torch.equal(clusters.centroids, centroids)
    assert torch.equal(clusters.trust, torch.ones(3))
    trust = torch.tensor([0.0, 0.5, 1.0])
    clusters.seed(-centroids, trust)
    assert torch.equal(clusters.centroids, -centroids)
    assert torch.equal(clusters.trust, trust)
    clusters.reset()
    assert_same_state(fresh, clusters)


def test_seed_copies() -> None:
    clusters, centroids = Clusters(3, 4), torch.randn(3, 4)
    clusters.seed(centroids)
    centroids.zero_()
    assert clusters.centroids.abs().min() > 0


# The state


def test_everything_learnt_is_a_float32_buffer_of_full_size() -> None:
    clusters = Clusters(3, 4)
    assert list(clusters.parameters()) == []
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in clusters.state_dict().items()}
    assert shapes == {
        "centroids": ((3, 4), torch.float32),
        "trust": ((3,), torch.float32),
        "started": ((), torch.bool),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_buffers_are_changed_in_place_and_stay_float32(dtype: torch.dtype) -> None:
    clusters = Clusters(4, 8, 0.3)
    places = {name: value.data_ptr() for name, value in clusters.named_buffers()}
    clusters.seed(torch.randn(4, 8, dtype=dtype))
    before = state_of(clusters)
    clusters.partial_fit(torch.randn(9, 8, dtype=dtype, requires_grad=True))
    assert not torch.equal(before["centroids"], clusters.centroids)
    assert {name: value.data_ptr() for name, value in clusters.named_buffers()} == places
    assert clusters.centroids.dtype == torch.float32
    assert not clusters.centroids.requires_grad


def test_no_gradient_leaves_the_verbs() -> None:
    clusters, rows = started(), torch.randn(3, 8, requires_grad=True)
    assert not clusters.similarity(rows).requires_grad


def test_repr_shows_the_sizes() -> None:
    assert "n_clusters=4, dimension=8, momentum=0.3, started=True" in repr(started())


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 8), "n_clusters must be 2 or more, got 1"),
        ((0, 8), "n_clusters must be 2 or more, got 0"),
        ((3, 0), "dimension must be 1 or more, got 0"),
        ((3, 8, -0.1), "momentum must lie between 0 and 1, got -0.1"),
        ((3, 8, 1.1), "momentum must lie between 0 and 1, got 1.1"),
        ((3, 8, float("nan")), "momentum must lie between 0 and 1, got nan"),
    ],
)
def test_numbers_out_of_range(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clusters(*arguments)


@pytest.mark.parametrize("verb", ["predict", "similarity", "partial_fit"])
def test_nothing_works_before_the_start(verb: str) -> None:
    clusters = Clusters(3, 4, 0.5)
    before = state_of(clusters)
    with pytest.raises(RuntimeError, match="have not started"):
        getattr(clusters, verb)(torch.randn(5, 4))
    assert_same_state(before, clusters)


def with_bad_row(shape: tuple[int, int], row: int, value: float) -> Tensor:
    rows = torch.randn(shape)
    rows[row, -1] = value
    return rows


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda c: c.seed(torch.randn(3, 8)), r"\(4, 8\).*got \(3, 8\)"),
        (lambda c: c.seed(torch.randn(4, 9)), r"\(4, 8\).*got \(4, 9\)"),
        (lambda c: c.seed(torch.randn(4, 8), torch.ones(3)), r"\(4,\), got \(3,\)"),
        (lambda c: c.seed(with_bad_row((4, 8), 2, torch.nan)), "centroids holds NaN or Inf in row 2"),
        (lambda c: c.seed(torch.randn(4, 8), torch.tensor([1, torch.inf, 1, 1])), "trust holds NaN or Inf in row 1"),
        (lambda c: c.partial_fit(torch.randn(5, 7)), "7 dimensions, the centroids 8"),
        (lambda c: c.partial_fit(torch.randn(5, 9)), "9 dimensions, the centroids 8"),
        (lambda c: c.partial_fit(with_bad_row((5, 8), 3, torch.nan)), r"NaN or Inf in row 3 \(1 of 5 rows\)"),
        (lambda c: c.partial_fit(with_bad_row((5, 8), 0, -torch.inf)), r"NaN or Inf in row 0 \(1 of 5 rows\)"),
        (lambda c: c.predict(torch.randn(5, 9)), "9 dimensions, the centroids 8"),
    ],
)
def test_what_is_refused_leaves_the_state_untouched(act: Callable[[Clusters], None], message: str) -> None:
    clusters = started()
    before = state_of(clusters)
    with pytest.raises(ValueError, match=message):
        act(clusters)
    assert_same_state(before, clusters)


# Properties


@given(batches())
def test_a_whole_step_to_the_mean_is_the_mean(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    centroids, rows, ids = batch
    clusters = Clusters(*centroids.shape, 1.0)
    clusters.seed(centroids)
    clusters.partial_fit(rows, ids)
    for k in ids.unique():
        torch.testing.assert_close(clusters.centroids[k], F.normalize(rows[ids == k], dim=1).mean(dim=0))


@given(batches(), st.floats(0, 1), st.integers(1, 4))
def test_centroids_never_leave_the_unit_ball(batch: tuple[Tensor, Tensor, Tensor], momentum: float, steps: int) -> None:
    """A step to the mean is convex, however long the rows are."""
    centroids, rows, _ = batch
    clusters = Clusters(*centroids.shape, momentum)
    clusters.seed(centroids)
    for _ in range(steps):
        clusters.partial_fit(100 * rows)
    assert clusters.centroids.norm(dim=1).max() <= 1 + 1e-5


def test_the_published_sum_does_leave_it() -> None:
    """A canary for the test above."""
    clusters = Clusters(2, 3, 0.5, to_sum=True)
    clusters.seed(torch.eye(2, 3))
    clusters.partial_fit(torch.eye(2, 3).repeat(10, 1))
    assert clusters.centroids.norm(dim=1).min() > 5


@given(batches(), st.booleans(), st.randoms())
def test_the_order_of_the_rows_does_not_matter(batch: tuple[Tensor, Tensor, Tensor], to_sum: bool, random: Any) -> None:
    centroids, rows, _ = batch
    order = random.sample(range(len(rows)), len(rows))
    moved = []
    for some in (rows, rows[order]):
        clusters = Clusters(*centroids.shape, 0.3, to_sum=to_sum)
        clusters.seed(centroids)
        clusters.partial_fit(some)
        moved.append(clusters.centroids)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [[torch.nan], [torch.inf], [torch.inf, -torch.inf]])
def test_check_finite_names_the_row(bad: list[float]) -> None:
    rows = torch.zeros(4, 3)
    rows[2, : len(bad)] = torch.tensor(bad)
    with pytest.raises(ValueError, match=r"rows holds NaN or Inf in row 2 \(1 of 4 rows\)"):
        check_finite(rows, "rows")


def test_check_finite_takes_numbers_whose_sum_is_not_finite() -> None:
    check_finite(torch.full((4, 3), torch.finfo(torch.float32).max), "rows")
