"""Batches, and losses with clusters for them, for the tests of the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from conftest import StubModel
from torch import Tensor

from st_clusterns import ClusterNSLoss, CorpusClusters, PublishedClusterNSLoss
from st_clusterns.losses.contrastive import ContrastiveLoss

K, D = 4, 8


def corpus(has_topics: bool = True, trust: tuple[float, ...] = (1.0,) * K, dimension: int = D) -> CorpusClusters:
    """Clusters whose centroids are neither unit vectors nor orthogonal; the same at every call.

    Sentence `text 7` is in cluster 7 mod K.
    """
    k = len(trust)
    centroids = np.random.default_rng(0).normal(size=(k, dimension)).astype(np.float32)
    ids = np.arange(3 * k) % k
    texts = [f"text {number}" for number in range(3 * k)]
    return CorpusClusters(texts, centroids[ids], ids, centroids, np.array(trust, np.float32), has_topics, {k: 0.5}, 0.5)


def views(n_rows: int = 6, n_columns: int = 2, noise: float = 1.0, **options: Any) -> list[Tensor]:
    """Anchors, positives near them, and random negatives, as leaves."""
    anchors = torch.randn(n_rows, D, **options)
    positives = anchors + noise * torch.randn(n_rows, D, **options)
    columns = [anchors, positives, *(torch.randn(n_rows, D, **options) for _ in range(n_columns - 2))]
    return [column.requires_grad_() for column in columns]


def gradients(loss: Tensor, columns: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, columns))


PAD = 0


def padded(texts: list[list[int]], side: str = "right", width: int = 0) -> dict[str, Tensor]:
    """Token lists as padded features; the padding has a token id that texts may hold as well."""
    width = max([width, *map(len, texts)])
    ids, mask = [], []
    for text in texts:
        rest = width - len(text)
        left, right = (rest, 0) if side == "left" else (0, rest)
        ids.append([PAD] * left + text + [PAD] * right)
        mask.append([0] * left + [1] * len(text) + [0] * right)
    return {"input_ids": torch.tensor(ids).reshape(-1, width), "attention_mask": torch.tensor(mask).reshape(-1, width)}


class TokenStub(StubModel):
    """A stub with a tokenizer: `text 7` is the token 7."""

    def preprocess(self, sentences: list[str]) -> dict[str, Tensor]:
        return padded([[int(sentence.removeprefix("text "))] for sentence in sentences])


def features(rows: Tensor, **others: Tensor) -> dict[str, Tensor]:
    """One column for a `StubModel`, padded, without the tokens that texts are compared by."""
    return {"embedding": rows, "attention_mask": torch.ones(len(rows), 3), **others}


def cos(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum() / one.norm() / other.norm()


def published(model: StubModel | None = None, **settings: Any) -> PublishedClusterNSLoss:
    """The published loss before the start of its centroids."""
    return ClusterNSLoss.from_preset(model or StubModel(D), "paper/bert-base", **{"n_clusters": K, **settings})


def published_and_started(model: StubModel | None = None, **settings: Any) -> PublishedClusterNSLoss:
    loss = published(model, **settings)
    loss.centroids.centroids.copy_(torch.as_tensor(corpus().centroids[: loss.centroids.n_clusters]))
    loss.centroids.started = True
    return loss


def default(model: StubModel | None = None, **settings: Any) -> ClusterNSLoss:
    return ClusterNSLoss(model or StubModel(D), corpus(), **settings)


LOSSES: dict[str, Callable[..., ContrastiveLoss]] = {
    "default": default,
    "no topics": lambda model=None, **settings: ClusterNSLoss(model or StubModel(D), corpus(False), **settings),
    "published": published_and_started,
}


@contextmanager
def evaluating(loss: ContrastiveLoss) -> Iterator[None]:
    """As `trainer.evaluate()` has it: the loss stays in training mode."""
    loss.train()
    loss.model.eval()
    with torch.no_grad():
        yield


@contextmanager
def eval_mode(loss: ContrastiveLoss) -> Iterator[None]:
    loss.model.eval()
    yield


MODES = {"training": nullcontext, "eval": eval_mode, "no_grad": lambda _: torch.no_grad(), "evaluate": evaluating}
