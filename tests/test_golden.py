"""The published preset reproduces the arrays of the authors' code, step by step."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import StubModel

from st_clusterns import ClusterNSLoss

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["reference_small", "reference_weighted", "reference_bert_base"]


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    return arrays, json.loads(str(arrays.pop("meta")))


def published_loss(meta: dict[str, Any]) -> ClusterNSLoss:
    return ClusterNSLoss.from_preset(
        StubModel(meta["D"]),
        "paper/bert-base",
        n_clusters=meta["K"],
        temperature=meta["temperature"],
        momentum=meta["momentum"],
        start_similarity=meta["start_similarity"],
        margin_alpha=meta["alpha"],
        margin_beta=meta["beta"],
        margin_weight=meta["bml_weight"],
        hard_negative_weight=math.exp(meta["hard_negative_log_weight"]),
    )


def as_leaf(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32, requires_grad=True)


def close(actual: torch.Tensor, expected: np.ndarray, rtol: float = 1e-4) -> None:
    scale = float(np.abs(expected).max())
    torch.testing.assert_close(actual.detach().double(), torch.as_tensor(expected), rtol=rtol, atol=1e-5 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_every_array_is_reproduced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, meta = load(name)
    [(first_step, first_row)] = meta["first_index"]
    loss = published_loss(meta)
    monkeypatch.setattr(loss.start, "_draw", lambda below: first_row)
    cluster_steps = 0
    for step in range(meta["steps"]):
        get = lambda key: arrays[f"{key}_{step}"]  # noqa: B023, E731
        served = bool(loss.clusters.started)
        anchor, positive = as_leaf(get("anchor")), as_leaf(get("positive"))
        parts = loss.compute_loss_from_embeddings([anchor, positive])
        parts.backward()

        close(parts["contrastive"], get("contrastive"))
        close(parts.total(), get("loss"))
        close(anchor.grad, get("grad_anchor"))
        close(positive.grad, get("grad_positive"))
        assert bool(loss.clusters.started) == bool(get("initialised")), f"step {step}"
        assert (step >= first_step) == bool(get("initialised"))
        if get("initialised"):
            close(loss.clusters.centroids, get("centroids"))
        if served:
            cluster_steps += 1
            close(parts["false_negative"], get("bml") * meta["bml_weight"])
            batch = look_up(loss, anchor, positive)
            expected = torch.as_tensor(get("false_negative_mask").astype(bool))
            assert torch.equal(batch.false_negatives(slice(None)), expected)
            hard = F.normalize(loss.clusters.centroids, dim=1)[torch.as_tensor(get("hard_negative_index"))]
            torch.testing.assert_close(batch.hard_negatives, hard)
        else:
            assert parts["false_negative"] == 0
    assert cluster_steps >= 4, "the arrays must exercise the clusters"


def look_up(loss: ClusterNSLoss, anchor: torch.Tensor, positive: torch.Tensor) -> Any:
    """Look the batch up without moving the state (gradients off)."""
    with torch.no_grad():
        before = loss.clusters.centroids.clone()
        batch = loss._prepare([anchor, positive], None)
        assert torch.equal(before, loss.clusters.centroids)
    return batch


@pytest.mark.parametrize("wrong", ["move_to_sum", "share_hard_negatives", "average_margin_over_batch"])
def test_each_published_choice_matters(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary: with one choice turned over, the arrays are no longer reproduced."""
    original = published_loss

    def turned(meta: dict[str, Any]) -> ClusterNSLoss:
        loss = original(meta)
        loss.choices = replace(loss.choices, **{wrong: False})
        loss.clusters.to_sum = loss.choices.move_to_sum
        return loss

    monkeypatch.setitem(globals(), "published_loss", turned)
    with pytest.raises(AssertionError):
        test_every_array_is_reproduced("reference_weighted", monkeypatch)
