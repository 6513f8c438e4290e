"""Evaluators to choose a model by while it trains: with mteb tasks, or without any labels.

With labelled pairs, use `sts_evaluator` (st_clusterns.evaluation.sts). No evaluator changes the training: each restores
the random number generators and the model's modes. (The trainer itself draws random numbers at each evaluation, so
training with an evaluator equals training with one that does nothing, not training without one.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sklearn.cluster import KMeans

from st_clusterns.clustering.embedding import embed_corpus
from st_clusterns.clustering.trust import cluster_trust
from st_clusterns.clustering.vectors import Floats
from st_clusterns.evaluation.evaluate import Subject, mteb_tasks, preserved_random_state, run_mteb
from st_clusterns.evaluation.scores import alignment, mean_cosine, uniformity


class MtebEvaluator(BaseEvaluator):  # type: ignore[misc]
    """Run mteb tasks while a model trains; `NAME_mean`, the mean of their main scores, chooses the model.

    Never by a task's test split that is reported afterwards.

    Args:
        tasks: names of mteb tasks or benchmarks, or task objects, such as `clustering_task(...)`.
        splits: the splits to run instead of the tasks' own, such as ["validation"].
        name: prefix of the metrics.
        batch_size: texts in a batch.

    Raises:
        ImportError: if mteb is not installed.
        ValueError: if a task is unknown.
    """

    def __init__(
        self, tasks: Sequence[Any], splits: Sequence[str] | None = None, name: str = "mteb", batch_size: int = 32
    ) -> None:
        super().__init__()
        with preserved_random_state():
            found = [one for task in tasks for one in (mteb_tasks(task) if isinstance(task, str) else [task])]
        self.tasks = [copy.copy(task) for task in found]  # a benchmark's tasks are shared by all who ask for it
        if splits is not None:
            self.tasks = [task.filter_eval_splits(list(splits)) for task in self.tasks]
        self.name, self.batch_size = name, batch_size
        self.primary_metric = f"{name}_mean"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return the main score of each task, 0 to 1, and their mean."""
        with _undisturbed(model):
            for task in self.tasks:
                task.load_data()  # once: mteb drops what it has loaded itself
            results = run_mteb(Subject(model, "local/in-training", f"step-{steps}", self.batch_size), self.tasks)
        scores = {result.task_name: float(result.get_score()) for result in results}
        scores["mean"] = float(np.mean(list(scores.values())))
        metrics: dict[str, float] = self.prefix_name_to_metrics(scores, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics


class LabelFreeEvaluator(BaseEvaluator):  # type: ignore[misc]
    """Signals from plain sentences, for those who have no dev set. They are heuristics: none measures quality.

    - `prediction_strength` (higher is better, chooses the model by default): cluster the sentences, and ask which share
      of a cluster's pairs an independent clustering of other sentences keeps together, corrected for chance (Tibshirani
      and Walther 2005). It says how clear-cut the topics are. Merged topics are clear-cut, too, and a loss that pulls
      its own clusters together may raise it without being better.
    - `alignment` of two dropout views, `uniformity` (lower is better; Wang and Isola 2020) and `align_uniform`, minus
      their sum (higher is better): what contrastive training optimises, so it may rise while that training breaks
      topics apart. Without dropout in the model, alignment is 0.
    - `mean_cosine`: the anisotropy; near 1, the embeddings have collapsed.

    Seen once (600 held-out texts of SearchSnippets, all-MiniLM-L6-v2, 20 steps of in-batch contrastive training, batch
    64, learning rate 2e-5, one seed): V-measure fell from 52.1 to 32.6, prediction strength from 0.34 to 0.16, while
    align_uniform rose from 3.40 to 3.68.

    Args:
        sentences: plain sentences, best not those trained on.
        select_by: "prediction_strength" or "align_uniform".
        n_clusters: the same at every call; without it, one for each 20 sentences, 64 at most.
        max_sentences: so many are drawn.
        batch_size: texts in a batch.
        seed: of the draw, of k-means and of the dropout views.
        name: prefix of the metrics.

    Raises:
        ValueError: if an argument does not fit.
    """

    def __init__(
        self,
        sentences: Sequence[str],
        select_by: str = "prediction_strength",
        n_clusters: int | None = None,
        max_sentences: int = 2000,
        batch_size: int = 64,
        seed: int = 0,
        name: str = "label-free",
    ) -> None:
        super().__init__()
        if select_by not in ("prediction_strength", "align_uniform"):
            raise ValueError(f"select_by={select_by!r} is unknown: choose 'prediction_strength' or 'align_uniform'.")
        drawn = np.random.default_rng(seed).permutation(len(sentences))[:max_sentences]
        self.sentences = [sentences[row] for row in drawn]
        self.n_clusters = max(2, min(64, len(drawn) // 20)) if n_clusters is None else n_clusters
        if not 2 <= self.n_clusters <= len(drawn) // 4:
            raise ValueError(
                f"n_clusters={n_clusters} does not fit {len(drawn)} sentences: choose 2 to {len(drawn) // 4}."
            )
        self.batch_size, self.seed, self.name = batch_size, seed, name
        self.primary_metric = f"{name}_{select_by}"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return all signals."""
        with _undisturbed(model):
            rows = embed_corpus(self.sentences, model, self.batch_size, show_progress_bar=False)
            torch.manual_seed(self.seed)  # the same dropout at every call, or chance would choose
            first, second = (_dropout_view(self.sentences, model, self.batch_size) for _ in range(2))
        ids = KMeans(self.n_clusters, n_init=2, random_state=self.seed).fit_predict(rows).astype(np.int64)
        signals = {
            "prediction_strength": float(cluster_trust(rows, ids, self.n_clusters, self.seed)[ids].mean()),
            "alignment": alignment(first, second),
            "uniformity": uniformity(rows),
            "mean_cosine": mean_cosine(rows),
        }
        signals["align_uniform"] = -signals["alignment"] - signals["uniformity"]
        metrics: dict[str, float] = self.prefix_name_to_metrics(signals, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics


def _dropout_view(sentences: list[str], model: SentenceTransformer, batch_size: int) -> Floats:
    """Embed with dropout on, which `model.encode` would turn off."""
    model.train()
    views = []
    for begin in range(0, len(sentences), batch_size):
        features = model.preprocess(sentences[begin : begin + batch_size])
        features = {key: part.to(model.device) if torch.is_tensor(part) else part for key, part in features.items()}
        with torch.no_grad():
            views.append(model(features)["sentence_embedding"].float().cpu().numpy())
    rows: Floats = np.concatenate(views)
    return rows


@contextmanager
def _undisturbed(model: SentenceTransformer) -> Iterator[None]:
    """Put back the random number generators and every module's mode, which `model.encode` changes."""
    modes = {module: module.training for module in model.modules()}
    with preserved_random_state():
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
