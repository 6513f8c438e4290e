"""The bidirectional margin against its definition, pair by pair."""

from __future__ import annotations

import pytest
import torch

from st_clusterns.false_negatives import bidirectional_margin

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
    """alpha = beta = 0, the recommended setting: pull to the positive's similarity from both sides."""
    similarity, positive = random_cosines(4, 5)
    penalty = bidirectional_margin(similarity, positive, 0.0, 0.0)
    torch.testing.assert_close(penalty, (similarity - positive[:, None]).abs())
