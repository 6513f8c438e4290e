"""The terms of the losses against their definitions, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from st_clusterns.losses.terms import NO_CLUSTER, bidirectional_margin, centroid_pull, same_cluster, soft_targets

# The bidirectional margin

BANDS = [(0.0, 0.0), (0.0, 0.3), (0.25, 0.3), (0.2, 0.6)]


def pair_by_pair(similarity: list[list[float]], positive: list[float], alpha: float, beta: float) -> list[list[float]]:
    penalties = []
    for row, own in zip(similarity, positive, strict=True):
        deltas = [cosine - own for cosine in row]
        penalties.append([max(0.0, delta + alpha) + max(0.0, -delta - beta) for delta in deltas])
    return penalties


def random_cosines(n_rows: int, n_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (2 * torch.rand(n_rows, n_columns) - 1).double(), (2 * torch.rand(n_rows) - 1).double()


@pytest.mark.parametrize(("alpha", "beta"), BANDS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 12)])
def test_it_is_its_definition_pair_by_pair(shape: tuple[int, int], alpha: float, beta: float) -> None:
    similarity, positive = random_cosines(*shape)
    expected = pair_by_pair(similarity.tolist(), positive.tolist(), alpha, beta)
    actual = bidirectional_margin(similarity, positive, alpha, beta)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("alpha", "beta"), BANDS)
def test_gradients_are_those_of_finite_differences(alpha: float, beta: float) -> None:
    similarity, positive = random_cosines(6, 7)
    delta = similarity - positive[:, None]
    kinks = torch.stack([delta + alpha, delta + beta]).abs().min(dim=0).values < 1e-3
    similarity[kinks] += 0.01
    similarity.requires_grad_()
    positive.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, p: bidirectional_margin(s, p, alpha, beta), (similarity, positive))


def test_no_penalty_and_no_gradient_inside_the_band() -> None:
    delta = torch.linspace(-0.29, -0.11, 19, dtype=torch.float64)[None].requires_grad_()
    penalty = bidirectional_margin(delta, torch.zeros(1).double(), 0.1, 0.3)
    penalty.sum().backward()
    assert penalty.count_nonzero() == 0
    assert delta.grad.count_nonzero() == 0


@pytest.mark.parametrize(("deltas", "slope"), [((-0.09, 1.5), 1.0), ((-1.5, -0.31), -1.0)], ids=["above", "below"])
def test_linear_outside_the_band(deltas: tuple[float, float], slope: float) -> None:
    """One more step away from the band costs one more step, no matter how far away."""
    delta = torch.linspace(*deltas, 15, dtype=torch.float64)
    penalty = bidirectional_margin(delta[None], torch.zeros(1).double(), 0.1, 0.3)[0]
    torch.testing.assert_close(penalty.diff(), slope * delta.diff())
    assert (penalty > 0).all()


def test_equal_edges_are_the_distance_to_the_edge() -> None:
    """With alpha = beta = 0, rows are pulled to the positive's similarity from both sides."""
    similarity, positive = random_cosines(4, 5)
    penalty = bidirectional_margin(similarity, positive, 0.0, 0.0)
    torch.testing.assert_close(penalty, (similarity - positive[:, None]).abs())


# Rows of one cluster


@given(st.lists(st.integers(NO_CLUSTER, 3), min_size=1, max_size=12), st.data())
def test_same_cluster_is_its_definition_pair_by_pair(ids: list[int], data: st.DataObject) -> None:
    own = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=8))
    expected = [[j != i and ids[j] == ids[i] and ids[i] != NO_CLUSTER for j in range(len(ids))] for i in own]
    assert same_cluster(torch.tensor(ids), torch.tensor(own)).tolist() == expected


def test_same_cluster_leaves_its_arguments_alone() -> None:
    ids, own = torch.tensor([1, 1, NO_CLUSTER, 1]), torch.tensor([0, 2])
    assert same_cluster(ids, own).tolist() == [[False, True, False, True], [False] * 4]
    assert ids.tolist() == [1, 1, NO_CLUSTER, 1]
    assert own.tolist() == [0, 2]


# The pull to centroids


def shares(vector: list[float], centroids: list[list[float]], temperature: float) -> list[float]:
    cosines = [sum(a * b for a, b in zip(vector, centroid, strict=True)) for centroid in centroids]
    weights = [math.exp(cosine / temperature) for cosine in cosines]
    return [weight / sum(weights) for weight in weights]


def pull_row_by_row(rows: list[list[float]], centroids: list[list[float]], ids: list[int], temperature: float) -> float:
    total = 0.0
    for row, own in zip(rows, ids, strict=True):
        if own != NO_CLUSTER:
            target, found = (shares(vector, centroids, temperature) for vector in (centroids[own], row))
            total -= sum(share * math.log(guess) for share, guess in zip(target, found, strict=True))
    return total


def random_rows(n_rows: int, n_clusters: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, centroids = (F.normalize(torch.randn(count, 5).double(), dim=1) for count in (n_rows, n_clusters))
    return rows, centroids, torch.randint(NO_CLUSTER, n_clusters, (n_rows,))


def pull(rows: torch.Tensor, centroids: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    return centroid_pull(rows @ centroids.T, ids, soft_targets(centroids, temperature), temperature)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(1, 2), (6, 3), (4, 9)])
def test_the_pull_is_its_definition_row_by_row(shape: tuple[int, int], temperature: float) -> None:
    rows, centroids, ids = random_rows(*shape)
    expected = pull_row_by_row(rows.tolist(), centroids.tolist(), ids.tolist(), temperature)
    assert pull(rows, centroids, ids, temperature).item() == pytest.approx(expected, abs=1e-12)


def test_one_hot_targets_make_it_the_cross_entropy_of_the_own_centroid() -> None:
    rows, centroids, ids = random_rows(6, 3)
    expected = F.cross_entropy(rows @ centroids.T / 0.1, ids, ignore_index=NO_CLUSTER, reduction="sum")
    found = centroid_pull(rows @ centroids.T, ids, torch.eye(3).double(), 0.1)
    torch.testing.assert_close(found, expected)


def test_the_pull_ends_at_the_centroid() -> None:
    """A row that lies at its centroid is pulled nowhere, also if other centroids are near."""
    _, centroids, _ = random_rows(1, 9)
    rows = centroids.clone().requires_grad_()
    pull(rows, centroids, torch.arange(9), 0.1).backward()
    torch.testing.assert_close(rows.grad, torch.zeros_like(rows))


def test_two_halves_of_one_cluster_are_not_pushed_apart() -> None:
    """A cluster that is cut into two with one centroid pulls its rows as the whole one does."""
    rows, centroids, _ = random_rows(6, 3)
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    halves, half_ids = torch.cat([centroids, centroids]), ids + torch.tensor([0, 3] * 3)
    gradients = []
    for points, own in ((centroids, ids), (halves, half_ids)):
        moved = rows.clone().requires_grad_()
        pull(moved, points, own, 0.1).backward()
        gradients.append(moved.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_gradient_of_the_pull_is_that_of_finite_differences() -> None:
    rows, centroids, ids = random_rows(6, 3)
    rows.requires_grad_()
    centroids.requires_grad_()
    assert torch.autograd.gradcheck(lambda r, c: pull(r, c, ids, 0.3), (rows, centroids))


def test_rows_without_a_cluster_are_not_pulled() -> None:
    rows, centroids, ids = random_rows(6, 3)
    ids[:] = 1
    ids[[0, 4]] = NO_CLUSTER
    rows.requires_grad_()
    pull(rows, centroids, ids, 0.1).backward()
    assert rows.grad.any(dim=1).tolist() == [False, True, True, True, False, True]


def test_a_batch_without_clusters_costs_nothing() -> None:
    rows, centroids, ids = random_rows(6, 3)
    assert pull(rows, centroids, torch.full_like(ids, NO_CLUSTER), 0.1) == 0
