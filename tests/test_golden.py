"""A published preset reproduces the arrays of the authors' code, step by step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import StubModel
from torch import Tensor

from st_clusterns import ClusterNSLoss, PublishedClusterNSLoss
from st_clusterns.losses import moving_centroids as centroids_module
from st_clusterns.losses.published import PublishedBatch
from st_clusterns.losses.terms import bidirectional_margin, same_cluster

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["reference_small", "reference_weighted", "reference_bert_base"]


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    return arrays, json.loads(str(arrays.pop("meta")))


def published_loss(meta: dict[str, Any]) -> PublishedClusterNSLoss:
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


def as_leaf(array: np.ndarray) -> Tensor:
    return torch.tensor(array, dtype=torch.float32, requires_grad=True)


def close(actual: Tensor, expected: np.ndarray, rtol: float = 1e-4) -> None:
    scale = float(np.abs(expected).max())
    torch.testing.assert_close(actual.detach().double(), torch.as_tensor(expected), rtol=rtol, atol=1e-5 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_every_array_is_reproduced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, meta = load(name)
    [(first_step, first_row)] = meta["first_index"]
    loss = published_loss(meta)
    monkeypatch.setattr(loss.centroids, "draw", lambda below: first_row)
    recorded = record_terms(loss, monkeypatch)
    cluster_steps = 0
    for step in range(meta["steps"]):
        get = lambda key: arrays[f"{key}_{step}"]  # noqa: B023, E731
        served = loss.centroids.started
        anchor, positive = as_leaf(get("anchor")), as_leaf(get("positive"))
        value = loss.compute_loss_from_embeddings([anchor, positive])
        value.backward()
        batch, contrastive, margin = recorded.pop()

        close(value, get("loss"))
        close(contrastive, get("contrastive"))
        close(anchor.grad, get("grad_anchor"))
        close(positive.grad, get("grad_positive"))
        assert loss.centroids.started == bool(get("initialised")), f"step {step}"
        assert (step >= first_step) == bool(get("initialised"))
        if get("initialised"):
            close(loss.centroids.centroids, get("centroids"))
        if served:
            cluster_steps += 1
            close(margin, get("bml"))
            expected = torch.as_tensor(get("false_negative_mask").astype(bool))
            assert torch.equal(same_cluster(batch.ids, batch.own), expected)
            hard = F.normalize(loss.centroids.centroids, dim=1)[torch.as_tensor(get("hard_negative_index"))]
            torch.testing.assert_close(batch.hard_negatives, hard)
        else:
            assert margin == 0
    assert cluster_steps >= 4, "the arrays must exercise the clusters"


def record_terms(loss: PublishedClusterNSLoss, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Tensor, Tensor]]:
    """Note the batch and both terms of each step."""
    recorded, original = [], loss.both_terms

    def record(batch: Any, rows: slice) -> tuple[Tensor, Tensor]:
        terms = original(batch, rows)
        recorded.append((batch, *(term.detach() for term in terms)))
        return terms

    monkeypatch.setattr(loss, "both_terms", record)
    return recorded


def move_to_mean(centroids: Tensor, embeddings: Tensor, ids: Tensor, momentum: float) -> Tensor:
    moved = centroids.clone()
    for k in ids.unique():
        moved[k] = (1 - momentum) * centroids[k] + momentum * embeddings[ids == k].mean(dim=0)
    return moved


def pick_far_rows(similarity: Tensor, count: int, first: int) -> Tensor:
    """Farthest-point sampling: the row least similar to all picks, not to the last one."""
    picks = [first]
    while len(picks) < count:
        nearest = similarity[picks].max(dim=0).values
        nearest[picks] = torch.inf
        picks.append(int(nearest.argmin()))
    return torch.tensor(picks)


def own_hard_negatives_only(self: PublishedClusterNSLoss, batch: Any, rows: slice) -> Tensor:
    cosines = hard_negative_cosines(self, batch, rows)
    others = torch.arange(cosines.shape[1]) != batch.own[rows, None]
    return cosines.masked_fill(others, -torch.inf)


def average_over_false_negatives(self: PublishedClusterNSLoss, batch: Any, rows: slice, cosine: Tensor) -> Tensor:
    mask = same_cluster(batch.ids, batch.own[rows])
    penalty = bidirectional_margin(cosine, cosine.diagonal(), self.margin_alpha, self.margin_beta)
    return ((penalty * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def nearest_as_hard_negative(self: PublishedClusterNSLoss, embeddings: list[Tensor], texts: Any = None) -> Any:
    batch = prepare(self, embeddings, texts)
    if isinstance(batch, PublishedBatch):
        batch.hard_negatives = self.centroids.directions(batch.anchors)[batch.ids]
    return batch


def weight_all_hard_negatives(self: PublishedClusterNSLoss, batch: Any, rows: slice) -> Tensor:
    cosines = batch.anchors[rows] @ batch.hard_negatives.T
    return cosines + self.temperature * math.log(self.hard_negative_weight)


hard_negative_cosines = PublishedClusterNSLoss._hard_negative_cosines
prepare = PublishedClusterNSLoss.prepare
OTHER_CHOICES = {
    "centroids move to the mean": (centroids_module, "move_centroids", move_to_mean),
    "the start is farthest-point sampling": (centroids_module, "pick_spread_rows", pick_far_rows),
    "hard negatives are not shared": (PublishedClusterNSLoss, "_hard_negative_cosines", own_hard_negatives_only),
    "all hard negatives are weighted": (PublishedClusterNSLoss, "_hard_negative_cosines", weight_all_hard_negatives),
    "the hard negative is the nearest": (PublishedClusterNSLoss, "prepare", nearest_as_hard_negative),
    "margin over false negatives": (PublishedClusterNSLoss, "_margin", average_over_false_negatives),
}


@pytest.mark.parametrize("other", OTHER_CHOICES)
def test_each_published_choice_matters(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary: with one choice made otherwise, the arrays are no longer reproduced."""
    monkeypatch.setattr(*OTHER_CHOICES[other])
    with pytest.raises(AssertionError):
        test_every_array_is_reproduced("reference_weighted", monkeypatch)
