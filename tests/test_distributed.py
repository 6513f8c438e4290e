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
from test_cached import Reader, corpus_around
from tiny_bert import make_sentences, save_bert
from torch import Tensor
from two_processes import TwoProcesses, launch

from st_clusterns import CachedClusterNSLoss, ClusterNSLoss
from st_clusterns.losses.published import PublishedClusterNSLoss

pytestmark = pytest.mark.slow

ROWS, DIMENSION, CLUSTERS, STEPS = 16, 8, 3, 20
TOPICS = 2 * torch.randn(CLUSTERS, DIMENSION, generator=torch.Generator().manual_seed(99))
PUBLISHED = {
    "n_clusters": 2 * ROWS + 3,  # the start takes three batches
    "momentum": 0.05,
    "margin_weight": 2.0,
    "hard_negative_weight": 1.5,
    "start_similarity": 1.0,
}

both_kinds = pytest.mark.parametrize("kind", ["plain", "cached"])
both_methods = pytest.mark.parametrize("method", ["default", "published"])


def columns_at(step: int, count: int, copies: bool = True) -> list[dict[str, Tensor]]:
    """Columns of a batch; copies of a text lie in both halves, one half has longer texts than the other."""
    generator, words = (torch.Generator().manual_seed(seed) for seed in (step, 1000 + step))
    rows = TOPICS[torch.randint(CLUSTERS, (ROWS,), generator=generator)]
    columns: list[dict[str, Tensor]] = []
    for i in range(count):
        column = {"embedding": rows + torch.randn(ROWS, DIMENSION, generator=generator)}
        if copies:
            texts = torch.randint(6, (ROWS, 1), generator=words) + 3 * (i > 1)
            tokens = torch.cat([texts, texts + 100, torch.zeros(ROWS, 1, dtype=torch.long)], dim=1)
            mask = torch.tensor([1, 1, 0]).repeat(ROWS, 1)
            tokens[ROWS - 1, 2] = mask[ROWS - 1, 2] = 1
            column |= {"input_ids": tokens, "attention_mask": mask}
        columns.append(column)
    return columns


def share_of(columns: list[dict[str, Tensor]], rows: slice) -> list[dict[str, Tensor]]:
    """Some rows, without padding that none of them needs: each process pads to its own longest text."""
    shares = [{name: value[rows] for name, value in column.items()} for column in columns]
    for share in shares:
        if "attention_mask" in share:
            width = int(share["attention_mask"].sum(dim=1).max())
            share.update({name: share[name][:, :width] for name in ("input_ids", "attention_mask")})
    return shares


def half(rank: int) -> slice:
    return slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)


def make_loss(method: str, kind: str, gather: bool, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = Reader(DIMENSION)
    loss_class = {"plain": ClusterNSLoss, "cached": CachedClusterNSLoss}[kind]
    settings = {"gather_across_devices": gather, **({"mini_batch_size": 3} if kind == "cached" else {}), **settings}
    if method == "published":
        return loss_class.from_preset(model, "paper/bert-base", **{**PUBLISHED, **settings})
    # Rows of these texts are recognised; the others have the nearest centroid.
    corpus = corpus_around(TOPICS, method == "default", sentences=["0 100", "1 101", "2 102"], ids=[0, 1, 0])
    return loss_class(model, corpus, **settings)


def mean_over_processes(value: Tensor) -> Tensor:
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / 2


def train(
    rank: int,
    method: str,
    kind: str,
    gather: bool,
    n_columns: int,
    processes: int = 1,
    learning_rate: float = 0.02,
    copies: bool = True,
) -> dict[str, Any]:
    """Train by plain gradient descent on this rank's share of each batch, as DDP does; record every step."""
    loss = make_loss(method, kind, gather, temperature=0.3)
    published = isinstance(loss, PublishedClusterNSLoss)
    weight = loss.model.weight
    torch.manual_seed(rank)  # processes need not agree about random numbers
    record: dict[str, list[Tensor]] = {"value": [], "own value": [], "gradient": [], "centroids": []}
    rows = half(rank) if processes == 2 else slice(None)
    started = []
    for step in range(STEPS):
        started.append(published and loss.centroids.started)
        weight.grad = None
        value = loss(share_of(columns_at(step, n_columns, copies), rows))
        value.backward()
        gradient = mean_over_processes(weight.grad)
        with torch.no_grad():
            weight -= learning_rate * gradient
        record["value"].append(mean_over_processes(value.detach()))
        record["own value"].append(value.detach())
        record["gradient"].append(gradient.clone())
        record["centroids"].append(loss.centroids.centroids.clone() if published else loss.centroids.clone())
    return {"started": started, **{name: torch.stack(values) for name, values in record.items()}}


def assert_started_within(result: dict[str, Any], method: str) -> None:
    if method == "published":
        assert not result["started"][0], "the start must be within the test"
        assert result["started"][-1]
        assert not torch.equal(result["centroids"][-1], result["centroids"][3])


@pytest.mark.parametrize("n_columns", [1, 2, 4], ids=["one column", "pairs", "negatives"])
@both_methods
@both_kinds
def test_two_halves_are_a_whole(pair: TwoProcesses, kind: str, method: str, n_columns: int) -> None:
    """Loss, gradients and centroids over many steps, with copies of texts in both halves.

    The published loss begins before the start of its centroids.
    """
    one = train(0, method, kind, True, n_columns)
    assert_started_within(one, method)
    for result in pair.run(train, method, kind, True, n_columns, 2):
        assert isinstance(result, dict), result
        assert result["started"] == one["started"]
        for name in ("value", "gradient", "centroids"):
            torch.testing.assert_close(result[name], one[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("n_columns", [1, 2, 4], ids=["one column", "pairs", "negatives"])
@both_kinds
def test_copies_of_a_text_on_the_other_process_count(pair: TwoProcesses, kind: str, n_columns: int) -> None:
    """The masks of one process, gathered: with the batch cut anywhere, and not the masks of each half alone."""
    masked = train(0, "no topics", kind, True, n_columns, learning_rate=0.0)
    bare = train(0, "no topics", kind, True, n_columns, learning_rate=0.0, copies=False)
    assert (bare["value"] - masked["value"]).min() > 0.001, "copies must be in play"
    for result in pair.run(train, "no topics", kind, True, n_columns, 2, 0.0):
        torch.testing.assert_close(result["value"], masked["value"], rtol=1e-5, atol=1e-5)


def masks_of(rank: int, processes: int) -> Tensor:
    """The candidates that this rank's rows see, as a mask over those of the whole batch."""
    loss = make_loss("no topics", "plain", True)
    seen: list[Tensor] = []
    contrast = loss.contrast
    loss.contrast = lambda batch, rows, cosine: seen.append(cosine.isfinite()) or contrast(batch, rows, cosine)
    loss(share_of(columns_at(0, 3), half(rank) if processes == 2 else slice(None)))
    return torch.cat(seen)


def test_masks_of_two_processes_are_the_rows_of_one(pair: TwoProcesses) -> None:
    whole = masks_of(0, 1)
    columns = columns_at(0, 3)
    texts = [
        [tuple(row[m == 1].tolist()) for row, m in zip(c["input_ids"], c["attention_mask"], strict=True)]
        for c in columns
    ]
    anchors, positives, negatives = texts
    for i in range(ROWS):
        own = {anchors[i], positives[i]}
        seen = [i == j or not (positives[j] in own or anchors[j] == anchors[i]) for j in range(ROWS)]
        assert whole[i].tolist() == seen + [text not in own for text in negatives]
    assert not whole.all()
    torch.testing.assert_close(torch.cat(pair.run(masks_of, 2)), whole)


@both_methods
@both_kinds
def test_without_gathering_each_process_scores_its_own_rows(pair: TwoProcesses, kind: str, method: str) -> None:
    """Its value is that of one process on those rows; the state of the published method is shared nevertheless."""
    first, second = pair.run(train, method, kind, False, 2, 2, 0.0)
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    whole = train(0, method, kind, True, 2, learning_rate=0.0)
    assert_started_within(first, method)
    assert torch.equal(first["centroids"], second["centroids"])
    torch.testing.assert_close(first["centroids"], whole["centroids"])
    assert (whole["value"] - first["value"]).abs().max() > 0.1, "a canary: fewer negatives, another loss"
    assert first["started"] == whole["started"]
    for rank, result in enumerate((first, second)):
        loss = make_loss(method, kind, False, temperature=0.3)
        loss.model.eval()  # so that the state is only what is set below
        for step in range(STEPS):
            if method == "published":
                loss.centroids.centroids.copy_(whole["centroids"][step])
                loss.centroids.started = whole["started"][step]
            alone = loss(share_of(columns_at(step, 2), half(rank))).detach()
            torch.testing.assert_close(result["own value"][step], alone, rtol=1e-5, atol=1e-5)


def loss_of_rows(rank: int, method: str, kind: str, gather: bool, sizes: list[int], training: bool = True) -> Tensor:
    loss = make_loss(method, kind, gather)
    loss.model.train(training)
    value = loss(share_of(columns_at(0, 2), slice(sizes[rank])))
    value.backward()
    return value.detach()


@pytest.mark.parametrize(("method", "gather"), [("default", True), ("published", True), ("published", False)], ids=str)
@both_kinds
def test_batches_of_other_sizes_are_refused_on_both_where_rows_are_gathered(
    pair: TwoProcesses, kind: str, method: str, gather: bool
) -> None:
    message = r"ValueError: The number of rows of a batch differs between the processes: \[8, 5\].*dataloader_drop_last"
    for text in pair.run(loss_of_rows, method, kind, gather, [8, 5]):
        assert isinstance(text, str)
        assert re.search(message, text), text
    for result in pair.run(loss_of_rows, method, kind, gather, [5, 5]):
        assert isinstance(result, Tensor), "the processes must still be in step afterwards"


@pytest.mark.parametrize(("method", "training"), [("default", True), ("published", False)], ids=str)
@both_kinds
def test_batches_of_other_sizes_are_fine_where_none_are_gathered(
    pair: TwoProcesses, kind: str, method: str, training: bool
) -> None:
    alone = [loss_of_rows(rank, method, kind, False, [8, 5], training) for rank in range(2)]
    together = pair.run(loss_of_rows, method, kind, False, [8, 5], training)
    torch.testing.assert_close(torch.stack(together), torch.stack(alone))


def starts_unlike(rank: int) -> Tensor:
    """Rows that differ in the last bits from one device to the next."""
    loss = make_loss("published", "plain", False, n_clusters=CLUSTERS)
    loss.centroids._start(*(torch.full((CLUSTERS, DIMENSION), float(rank + 1)) for _ in range(2)))
    return loss.centroids.centroids


def test_rank_0_gives_the_first_centroids(pair: TwoProcesses) -> None:
    for centroids in pair.run(starts_unlike):
        assert torch.equal(centroids, torch.ones(CLUSTERS, DIMENSION))


def evaluate_on_rank_0(rank: int, method: str, kind: str) -> Any:
    loss = make_loss(method, kind, False)
    if method == "published":
        loss.centroids.centroids.normal_()
        loss.centroids.started = True
    if rank > 0:
        return None
    with torch.no_grad():
        return loss(columns_at(0, 2))


@both_methods
@both_kinds
def test_an_evaluation_on_one_process_waits_for_nobody(pair: TwoProcesses, kind: str, method: str) -> None:
    value, _ = pair.run(evaluate_on_rank_0, method, kind)
    assert isinstance(value, Tensor), value


@pytest.mark.parametrize(
    ("launcher", "kind", "method"),
    [("torchrun", "plain", "published"), ("accelerate", "cached", "published"), ("torchrun", "plain", "default")],
)
def test_the_trainer_in_two_processes_trains_as_in_one(launcher: str, kind: str, method: str, tmp_path: Path) -> None:
    """The whole stack, DDP included, without dropout: a whole batch's worth of losses and the same state."""
    bert = save_bert(tmp_path / "bert", dropout=0.0)
    one = train_script.train(bert, tmp_path / "one", loss=kind, method=method)
    (tmp_path / "two").mkdir()
    settings = json.dumps({"loss": kind, "method": method})
    printed = launch(Path(train_script.__file__), str(bert), str(tmp_path / "two"), settings, launcher=launcher)
    assert not re.search(r"st_clusterns/[\w/]+\.py:\d+: \w*Warning", printed), "no warning may come from the package"
    first, second = (torch.load(tmp_path / "two" / f"result-{rank}.pt") for rank in range(2))
    for part in ("weights", "state"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name
    means = (np.array(first["values"]) + np.array(second["values"])) / 2
    np.testing.assert_allclose(means, one["values"], rtol=1e-3, atol=1e-4)
    assert len(means) == 3 * train_script.STEPS_AN_EPOCH
    if method == "default":
        assert one["settings"]["has_topics"], "the clusters must be in play"
        for alone, *ranks in zip(*(result["diagnostics"] for result in (one, first, second)), strict=True):
            for name in ("positive_similarity", "masked_pairs"):  # means over rows: half of them on each process
                assert np.mean([rank[name] for rank in ranks]) == pytest.approx(alone[name], abs=2e-3), name
        assert len(one["diagnostics"]) == 3 * train_script.STEPS_AN_EPOCH
        return
    assert one["state"]["centroids._extra_state"][0] == 1, "the centroids must have started"
    for name, value in one["state"].items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-3, atol=1e-4)


def test_evaluators_score_in_two_processes_as_in_one(tmp_path: Path) -> None:
    """sentence-transformers 5.7 evaluates on every process; 6.2 on the first, with `encode` shared over all of them."""
    bert, texts = save_bert(tmp_path / "bert"), tmp_path / "texts.tsv"
    texts.write_text("label\ttext\n" + "".join(f"{i % 3}\t{text}\n" for i, text in enumerate(make_sentences(30))))
    settings = {"method": "default", "labelled": str(texts)}
    one = train_script.train(bert, tmp_path / "one", **settings)["scores"]
    (tmp_path / "two").mkdir()
    launch(Path(train_script.__file__), str(bert), str(tmp_path / "two"), json.dumps(settings))
    first, second = (torch.load(tmp_path / "two" / f"result-{rank}.pt")["scores"] for rank in range(2))
    assert first == second, "both must choose the same checkpoint"
    assert first[0] == pytest.approx(one[0], abs=1e-5), "the same weights have the same scores"
    kinds = ("label-free", "span-retrieval", "mteb")
    for kind in kinds:
        scores = {str([score for name, score in at.items() if kind in name]) for at in first}
        assert len(first) == 4
        assert len(scores) > 1, f"training must move {kind}"
