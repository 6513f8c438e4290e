"""Evaluators that choose the best checkpoint of a training run: by mteb tasks, or without labels.

With labelled pairs, use `sts_evaluator`. An evaluator does not change the training: it restores the random number
generators and the model's modes. (The trainer itself draws random numbers at each evaluation. Training with an
evaluator therefore equals training with one that does nothing, not training without one.)
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sklearn.cluster import KMeans

from st_clusterns.clustering.embedding import as_texts, embed_corpus
from st_clusterns.clustering.trust import cluster_trust
from st_clusterns.clustering.vectors import Floats
from st_clusterns.clustering.words import split_pieces
from st_clusterns.evaluation.mteb_tasks import mteb_tasks, preserved_state, run_mteb
from st_clusterns.evaluation.scores import alignment, mean_cosine, uniformity
from st_clusterns.models import resolve_prompt


class MtebEvaluator(BaseEvaluator):  # type: ignore[misc]
    """Run mteb tasks during training. The primary metric is `NAME_mean`, the mean of their main scores.

    `tasks` are names of mteb tasks or benchmarks, or task objects, such as `clustering_task(...)`; `splits`, such as
    ["validation"], replace the tasks' own. Do not choose a model by a test split that you report afterwards.
    """

    def __init__(
        self, tasks: Sequence[Any], splits: Sequence[str] | None = None, name: str = "mteb", batch_size: int = 32
    ) -> None:
        super().__init__()
        found = [one for task in tasks for one in (mteb_tasks(task) if isinstance(task, str) else [task])]
        self.tasks = [copy.copy(task) for task in found]  # mteb shares a benchmark's tasks within a process
        if splits is not None:
            self.tasks = [task.filter_eval_splits(list(splits)) for task in self.tasks]
        self.name, self.batch_size = name, batch_size
        self.primary_metric = f"{name}_mean"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return the main score of each task, 0 to 1, and their mean."""
        scores = {}
        with preserved_state(model):
            for task in self.tasks:
                task.load_data()  # keeps the data for the next call: mteb drops what it loads itself
                scores[task.metadata.name] = float(run_mteb(model, task, self.batch_size).get_score())
        scores["mean"] = float(np.mean(list(scores.values())))
        metrics: dict[str, float] = self.prefix_name_to_metrics(scores, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics


def random_span(n_words: int, shares: tuple[float, float], draw: random.Random) -> slice:
    """Draw a span of a text of two words or more: between two shares of the words, one at least and not all of them."""
    count = min(max(1, round(n_words * draw.uniform(*shares))), n_words - 1)
    start = draw.randrange(n_words - count + 1)
    return slice(start, start + count)


class SpanRetrievalEvaluator(BaseEvaluator):  # type: ignore[misc]
    """Search without labels: a random span is cut out of each document, and the rest is searched for by it.

    `accuracy`, the primary metric, is the share of spans that find their own rest first; `mrr` is the mean reciprocal
    rank (both 0 to 1). It is meant for documents: over seven runs on two search collections, its change had the sign of
    that of nDCG@10 in five. It says nothing about topics: on sets of short sentences it fell by up to 0.02 where
    V-measure rose by up to 10.

    Args:
        texts: documents, preferably held out from training; exact repeats and texts of one word do not count.
        max_texts: size of the random sample of the texts that is used.
        batch_size: texts per batch.
        seed: seed of the sample and of the spans.
        prompt: what the model reads before each text; "" for nothing. Default: the model's default prompt.
    """

    def __init__(
        self,
        texts: Iterable[str],
        max_texts: int = 500,
        batch_size: int = 64,
        seed: int = 0,
        name: str = "span-retrieval",
        prompt: str | None = None,
    ) -> None:
        super().__init__()
        split = [words for text in dict.fromkeys(as_texts(texts)) if len(words := split_pieces(text)) > 1]
        if len(split) < 2:
            raise ValueError(f"texts holds {len(split)} distinct text(s) of two words or more: give 2 or more.")
        draw = random.Random(seed)
        self.spans, self.rests = [], []
        for words in draw.sample(split, min(max_texts, len(split))):
            span = random_span(len(words), (0.2, 0.5), draw)
            self.spans.append("".join(words[span]).rstrip())
            self.rests.append("".join(words[: span.start] + words[span.stop :]).rstrip())
        self.batch_size, self.name, self.prompt = batch_size, name, prompt
        self.primary_metric = f"{name}_accuracy"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return `NAME_accuracy` and `NAME_mrr`."""
        with preserved_state(model):
            spans, rests = (
                embed_corpus(side, model, self.batch_size, show_progress_bar=False, prompt=self.prompt)
                for side in (self.spans, self.rests)
            )
        cosines = spans @ rests.T
        ranks = (cosines >= cosines.diagonal()[:, None]).sum(axis=1)  # the last of equal ones: a collapse finds nothing
        scores = {"accuracy": float((ranks == 1).mean()), "mrr": float((1 / ranks).mean())}
        metrics: dict[str, float] = self.prefix_name_to_metrics(scores, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics


class LabelFreeEvaluator(BaseEvaluator):  # type: ignore[misc]
    """Heuristic signals from plain sentences, for use without labelled data.

    - `prediction_strength` (higher is better; the default primary metric): trust of k-means clusters of the sentences,
      see `cluster_trust`. It measures how distinct the topics are. Merging topics, or pulling clusters together in
      training, can raise it although the model is no better.
    - `alignment` of two dropout views and `uniformity` (lower is better; Wang and Isola 2020), and `align_uniform`,
      minus their sum (higher is better). Contrastive training optimises them, so they can improve while topics become
      harder to tell apart. Without dropout in the model, alignment is 0.
    - `mean_cosine`: anisotropy; near 1, the embeddings have collapsed.

    Args:
        sentences: plain sentences, preferably held out from training; exact repeats count once.
        select_by: "prediction_strength" or "align_uniform".
        n_clusters: number of clusters; by default one per 20 sentences, at most 64.
        max_sentences: size of the random sample of the sentences that is used.
        batch_size: texts per batch.
        seed: seed of the sample, of k-means and of the dropout views.
        prompt: what the model reads before each sentence; "" for nothing. Default: the model's default prompt.
    """

    def __init__(
        self,
        sentences: Iterable[str],
        select_by: str = "prediction_strength",
        n_clusters: int | None = None,
        max_sentences: int = 2000,
        batch_size: int = 64,
        seed: int = 0,
        name: str = "label-free",
        prompt: str | None = None,
    ) -> None:
        super().__init__()
        if select_by not in ("prediction_strength", "align_uniform"):
            raise ValueError(f"select_by={select_by!r} is unknown: choose 'prediction_strength' or 'align_uniform'.")
        texts = list(dict.fromkeys(as_texts(sentences)))  # copies would make a cluster of their own
        drawn = np.random.default_rng(seed).permutation(len(texts))[:max_sentences]
        self.sentences = [texts[row] for row in drawn]
        self.n_clusters = max(2, min(64, len(drawn) // 20)) if n_clusters is None else n_clusters
        if not 2 <= self.n_clusters <= len(drawn) // 4:
            raise ValueError(
                f"n_clusters={n_clusters} does not fit {len(drawn)} sentences: choose 2 to {len(drawn) // 4}."
            )
        self.batch_size, self.seed, self.name, self.prompt = batch_size, seed, name, prompt
        self.primary_metric = f"{name}_{select_by}"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return all signals."""
        with preserved_state(model):
            rows = embed_corpus(self.sentences, model, self.batch_size, show_progress_bar=False, prompt=self.prompt)
            torch.manual_seed(self.seed)  # the same dropout at every call, so that calls can be compared
            first, second = (self._dropout_view(model) for _ in range(2))
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

    def _dropout_view(self, model: SentenceTransformer) -> Floats:
        """Embed the sentences with dropout, which `model.encode` turns off."""
        model.train()
        views, prompt = [], resolve_prompt(model, self.prompt)
        for begin in range(0, len(self.sentences), self.batch_size):
            features = model.preprocess(self.sentences[begin : begin + self.batch_size], prompt=prompt)
            features = {key: part.to(model.device) if torch.is_tensor(part) else part for key, part in features.items()}
            with torch.no_grad():
                views.append(model(features)["sentence_embedding"].float().cpu().numpy())
        return np.concatenate(views)
