"""What each departure of the published code does to the gradients, on the golden batches, as docs/paper.md shows it.

`python tests/test_departures.py` prints the table.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from test_golden import NAMES, as_leaf, average_over_false_negatives, load, own_hard_negatives_only, published_loss
from torch import Tensor

from st_clusterns import PublishedClusterNSLoss
from st_clusterns.losses.moving_centroids import move_centroids
from st_clusterns.losses.published import PublishedBatch
from st_clusterns.losses.terms import same_cluster

PAGE = Path(__file__).parent.parent / "docs" / "paper.md"


def without_false_negatives(self: PublishedClusterNSLoss, batch: PublishedBatch, rows: slice, cosine: Tensor) -> Tensor:
    mask = same_cluster(batch.ids, batch.own[rows])
    mask = torch.cat([mask, torch.zeros(len(mask), cosine.shape[1] - mask.shape[1], dtype=torch.bool)], dim=1)
    return contrast(self, batch, rows, cosine.masked_fill(mask, -torch.inf))


contrast = PublishedClusterNSLoss.contrast
OTHERWISE: dict[str, tuple[str, Callable[..., Any]]] = {
    "own hard negative only": ("_hard_negative_cosines", own_hard_negatives_only),
    "rows of one cluster leave the denominator": ("contrast", without_false_negatives),
    "margin averaged over pairs of one cluster": ("_margin", average_over_false_negatives),
}


def gradient(value: Tensor, rows: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, rows, retain_graph=True)])


@contextmanager
def with_choice(name: str) -> Iterator[None]:
    with mock.patch.object(PublishedClusterNSLoss, *OTHERWISE[name]):
        yield


def steps(name: str) -> Iterator[tuple[PublishedClusterNSLoss, list[Tensor]]]:
    """The loss as it stands before each batch that its clusters serve, and the batch."""
    arrays, meta = load(name)
    loss = published_loss(meta)
    loss.centroids.draw = lambda below: meta["first_index"][0][1]  # type: ignore[method-assign]
    for step in range(meta["steps"]):
        rows = [as_leaf(arrays[f"{column}_{step}"]) for column in ("anchor", "positive")]
        if loss.centroids.started:
            yield copy.deepcopy(loss), rows
        loss.compute_loss_from_embeddings(rows)


def measure(name: str) -> dict[str, float]:
    """Means over the batches: of relative differences and ratios of gradients, and of shares of rows."""
    found: dict[str, list[float]] = {}

    def note(key: str, value: float) -> None:
        found.setdefault(key, []).append(float(value))

    for loss, rows in steps(name):
        anchors, before = rows[0].detach(), loss.centroids.centroids.clone()
        ids = loss.centroids.similarity(anchors).argmax(dim=1)
        step = move_centroids(before, anchors, ids, loss.centroids.momentum) - before
        counts = ids.bincount(minlength=len(before))[:, None].clamp(min=1)
        sums = torch.zeros_like(before).index_add_(0, ids, anchors)
        moved = (ids.bincount(minlength=len(before)) > 0)[:, None]
        to_mean = loss.centroids.momentum * (sums / counts - before) * moved
        note("step of the centroids, of that towards the mean", step.norm() / to_mean.norm())

        batch = loss.prepare(list(rows))
        assert isinstance(batch, PublishedBatch)
        contrastive, margin = loss.both_terms(batch, slice(None))
        of_contrast, of_margin = gradient(contrastive, rows), loss.margin_weight * gradient(margin, rows)
        published = of_contrast + of_margin
        note("margin's gradient, of the contrastive term's", of_margin.norm() / of_contrast.norm())
        own = torch.nn.functional.normalize(loss.centroids.centroids, dim=1)[batch.ids]
        is_own = (own[:, None] - batch.hard_negatives[None]).norm(dim=2) < 1e-6
        note("rows with their own centroid as a negative", is_own.any(dim=1).float().mean())

        for choice in OTHERWISE:
            with with_choice(choice):
                other_contrast, other_margin = loss.both_terms(batch, slice(None))
            g = gradient(other_contrast, rows) + loss.margin_weight * gradient(other_margin, rows)
            note(choice, (g - published).norm() / published.norm())
            if choice.startswith("margin"):
                weighted = loss.margin_weight * gradient(other_margin, rows)
                note("the same, of the contrastive term's", weighted.norm() / of_contrast.norm())
            if choice.startswith("rows"):
                repelling = of_contrast - gradient(other_contrast, rows)  # what pushes rows of one cluster apart
                product = (repelling @ of_margin) / (repelling.norm() * of_margin.norm()).clamp(min=1e-30)
                note("cosine of that part with the margin's gradient", product)
    return {key: float(np.mean(values)) for key, values in found.items()}


def table() -> str:
    columns = [measure(name) for name in NAMES]
    lines = ["| | small | weighted | BERT-base |", "|---|---|---|---|"]
    lines += [f"| {key} | {' | '.join(f'{column[key]:.2g}' for column in columns)} |" for key in columns[0]]
    return "\n".join(lines)


@pytest.mark.skipif(not PAGE.exists(), reason="the page belongs to the repository, not to the package")
def test_the_page_shows_what_is_measured() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for line in table().splitlines()[2:]:
        _, key, *cells, _ = (cell.strip() for cell in line.split("|"))
        shown = re.search(rf"^\| {re.escape(key)} \| (.*) \|$", page, re.MULTILINE)
        assert shown, key
        for cell, value in zip(shown[1].split(" | "), cells, strict=True):
            assert float(cell) == pytest.approx(float(value), rel=0.1, abs=0.02), key


if __name__ == "__main__":
    print(table())
