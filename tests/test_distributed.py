"""Two processes on half a batch each are one process on the whole batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import train_script
from test_cached import IndexedStub
from tiny_bert import save_bert
from torch import Tensor
from two_processes import TwoProcesses, launch

from st_clusterns import CachedClusterNSLoss, ClusterNSLoss, CorpusClusters

pytestmark = pytest.mark.slow

ROWS, DIMENSION, CLUSTERS, STEPS = 16, 8, 3, 40
RECOMMENDED = {
    "n_clusters": CLUSTERS,
    "momentum": 0.1,
    "hard_negative_weight": 1.5,
    "margin_beta": 0.1,
    "min_trust": 0.0,
    "start_similarity": 1.0,
}
PUBLISHED = {"n_clusters": CLUSTERS, "momentum": 0.02, "margin_weight": 2.0, "start_similarity": 1.0}


def columns_at(step: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    topics = 2 * torch.randn(CLUSTERS, DIMENSION, generator=torch.Generator().manual_seed(99))
    rows = topics[torch.randint(CLUSTERS, (ROWS,), generator=generator)]
    return [rows + torch.randn(ROWS, DIMENSION, generator=generator) for _ in range(count)]


def make_loss(kind: str, preset: str, gather: bool, **settings: Any) -> ClusterNSLoss:
    torch.manual_seed(0)
    model = IndexedStub(DIMENSION)
    loss_class = {"plain": ClusterNSLoss, "cached": CachedClusterNSLoss}[kind]
    extra = {"mini_batch_size": 3} if kind == "cached" else {}
    if preset == "published":
        return loss_class.from_preset(
            model, "paper/bert-base", gather_across_devices=gather, **{**PUBLISHED, **extra, **settings}
        )
    return loss_class(model, gather_across_devices=gather, **{**RECOMMENDED, **extra, **settings})


def mean_over_processes(value: Tensor) -> Tensor:
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / 2


def train(rank: int, kind: str, preset: str, gather: bool, n_columns: int, share: int = 1) -> dict[str, Any]:
    """Train by plain gradient descent on this rank's share of each batch, as DDP does; record every step."""
    loss = make_loss(kind, preset, gather)
    weight = loss.model.weight
    torch.manual_seed(rank)  # processes need not agree about random numbers
    record: dict[str, list[Tensor]] = {"contrastive": [], "false_negative": [], "gradient": [], "centroids": []}
    rows = slice(rank * ROWS // share, (rank + 1) * ROWS // share)
    started = []
    for step in range(STEPS):
        started.append(bool(loss.clusters.started))
        weight.grad = None
        parts = loss([{"embedding": column[rows]} for column in columns_at(step, n_columns)])
        parts.backward()
        gradient = mean_over_processes(weight.grad)
        with torch.no_grad():
            weight -= 0.02 * gradient
        record["gradient"].append(gradient.clone())
        record["centroids"].append(loss.clusters.centroids.clone())
        for name, value in parts.items():
            record[name].append(mean_over_processes(value.detach()))
    return {
        "started": started,
        "trust": loss.clusters.trust.clone(),
        **{k: torch.stack(v) for k, v in record.items()},
    }


@pytest.mark.parametrize("n_columns", [2, 4], ids=["pairs", "hard negatives"])
@pytest.mark.parametrize("preset", ["published", "recommended"])
@pytest.mark.parametrize("kind", ["plain", "cached"])
def test_two_halves_are_a_whole(pair: TwoProcesses, kind: str, preset: str, n_columns: int) -> None:
    """Loss, gradients and centroids over many steps, from before the start of the clusters on."""
    one = train(0, kind, preset, True, n_columns)
    two = pair.run(train, kind, preset, True, n_columns, 2)
    assert not one["started"][0], "the start must be within the test"
    assert one["started"][-1]
    assert one["false_negative"].count_nonzero() > STEPS // 3, "the clusters must be in play"
    for result in two:
        assert isinstance(result, dict), result
        assert result["started"] == one["started"]
        for name in ("contrastive", "false_negative", "gradient", "centroids", "trust"):
            torch.testing.assert_close(result[name], one[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("preset", ["published", "recommended"])
@pytest.mark.parametrize("kind", ["plain", "cached"])
def test_without_gathering_the_state_is_still_shared(pair: TwoProcesses, kind: str, preset: str) -> None:
    first, second = pair.run(train, kind, preset, False, 2, 2)
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    assert first["started"][-1]
    assert not first["started"][0]
    assert torch.equal(first["centroids"], second["centroids"])
    assert torch.equal(first["trust"], second["trust"])
    whole = train(0, kind, preset, True, 2)
    assert (whole["contrastive"] - first["contrastive"]).abs().max() > 0.1, "a canary: fewer negatives, another loss"


def taught_by_words(rank: int, gather: bool) -> Tensor:
    """The divergence from what words say, of this rank's half of the rows."""
    draw = np.random.default_rng(0)
    centroids, weights = draw.normal(size=(CLUSTERS, DIMENSION)), draw.uniform(1, 2, size=20)
    tokens = torch.tensor(draw.integers(20, size=(ROWS, 5)))
    ids = np.arange(ROWS) % CLUSTERS
    untrusted = CorpusClusters(ids, centroids.astype(np.float32), np.zeros(CLUSTERS, np.float32), token_weights=weights)
    torch.manual_seed(0)
    loss = ClusterNSLoss(IndexedStub(DIMENSION), clusters=untrusted, gather_across_devices=gather)
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    words = {"input_ids": tokens[rows], "attention_mask": torch.ones_like(tokens[rows])}
    return loss([{"embedding": column[rows], **words} for column in columns_at(0, 2)])["false_negative"].detach()


@pytest.mark.parametrize("gather", [False, True])
def test_each_process_learns_from_the_words_of_its_own_rows(pair: TwoProcesses, gather: bool) -> None:
    alone = [taught_by_words(rank, False) for rank in range(2)]
    assert min(alone) > 1
    assert alone[0] != alone[1]
    together = pair.run(taught_by_words, gather)
    torch.testing.assert_close(torch.stack(together), torch.stack(alone))


def unlike_states(rank: int) -> Tensor:
    loss = make_loss("plain", "recommended", False, momentum=0.0)
    loss.clusters.seed(torch.full((CLUSTERS, DIMENSION), float(rank + 1)))
    loss([{"embedding": column} for column in columns_at(0, 2)])
    return loss.clusters.centroids


def test_rank_0_gives_the_first_state(pair: TwoProcesses) -> None:
    """k-means of the same corpus can differ in the last bits from one device to the next."""
    for centroids in pair.run(unlike_states):
        assert torch.equal(centroids, torch.ones(CLUSTERS, DIMENSION))


def evaluate_on_rank_0(rank: int) -> Any:
    loss = make_loss("plain", "recommended", False)
    loss.clusters.seed(torch.randn(CLUSTERS, DIMENSION))
    if rank > 0:
        return None
    with torch.no_grad():
        return loss([{"embedding": column} for column in columns_at(0, 2)]).total()


def test_an_evaluation_on_one_process_waits_for_nobody(pair: TwoProcesses) -> None:
    total, _ = pair.run(evaluate_on_rank_0)
    assert isinstance(total, Tensor), total


@pytest.mark.parametrize(("launcher", "kind"), [("torchrun", "plain"), ("accelerate", "cached")])
def test_the_trainer_in_two_processes_trains_as_in_one(launcher: str, kind: str, tmp_path: Path) -> None:
    """The whole stack, DDP included, without dropout: a whole batch's worth of losses and the same state."""
    bert = save_bert(tmp_path / "bert", dropout=0.0)
    one = train_script.train(bert, tmp_path / "one", loss=kind)
    (tmp_path / "two").mkdir()
    printed = launch(
        Path(train_script.__file__), str(bert), str(tmp_path / "two"), json.dumps({"loss": kind}), launcher=launcher
    )
    assert not re.search(r"st_clusterns/\w+\.py:\d+: \w*Warning", printed), "no warning may come from the package"
    first, second = (torch.load(tmp_path / "two" / f"result-{rank}.pt") for rank in range(2))
    for part in ("weights", "state"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name
    assert one["state"]["started"]
    assert max(entry["false_negative"] for entry in one["log"]) > 0
    means = (torch.tensor(first["values"]) + torch.tensor(second["values"])) / 2
    torch.testing.assert_close(means, torch.tensor(one["values"]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first["state"]["centroids"], one["state"]["centroids"], rtol=1e-3, atol=1e-4)
