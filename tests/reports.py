"""Clusters and embeddings with topics that are easy to see, for the tests of the report."""

from __future__ import annotations

from typing import Any

import numpy as np

from st_clusterns import CorpusClusters
from st_clusterns.training.report import describe_clusters, describe_embeddings

BATCH = 24


def make_rows(n_rows: int, n_topics: int, spread: float, seed: int) -> np.ndarray:
    """Unit vectors around the axes, one axis a topic, in turn."""
    rows = np.random.default_rng(seed).normal(scale=spread, size=(n_rows, n_topics + 2))
    rows[np.arange(n_rows), np.arange(n_rows) % n_topics] += 1
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make_clusters(n_rows: int = 120, n_topics: int = 4, texts: dict[int, str] | None = None) -> CorpusClusters:
    """Clusters of sentences that name their topic, all trusted but the last; `texts` replaces some of the sentences."""
    sentences = [f"sentence {i} about topic{i % n_topics}" for i in range(n_rows)]
    for place, text in (texts or {}).items():
        sentences[place] = text
    rows, ids = make_rows(n_rows, n_topics, 0.15, 0), np.arange(n_rows) % n_topics
    centroids = np.stack([rows[ids == topic].mean(axis=0) for topic in range(n_topics)])
    trust = np.append(np.full(n_topics - 1, 0.8), 0.1).astype(np.float32)
    return CorpusClusters(sentences, rows, ids, centroids, trust, has_topics=True, curve={n_topics: 0.8}, bound=0.5)


def make_after(clusters: CorpusClusters) -> np.ndarray:
    """Embeddings in which the topics lie closer together, and the first sentence has moved to the second topic."""
    rows = make_rows(len(clusters.sentences), clusters.n_clusters, 0.08, 1)
    rows[0] = rows[1]
    return rows


def make_report(clusters: CorpusClusters, after: np.ndarray) -> dict[str, Any]:
    """The numbers that `adapt` hands to the page."""
    log = [{"loss": 3.0 - step / 10, "learning_rate": 1e-5, "epoch": step / 4, "step": step} for step in range(1, 9)]
    return {
        "model": "a model",
        "sentences": len(clusters.sentences),
        "recipe": {"batch_size": BATCH, "learning_rate": 1e-5, "max_length": 64},
        "clusters": describe_clusters(clusters, BATCH),
        "before": describe_embeddings(clusters.embeddings, clusters.ids),
        "after": describe_embeddings(after, clusters.ids),
        "log": [*log, {"train_loss": 2.6, "epoch": 2.0, "step": 8}],
    }
