"""The methods of the comparison: `METHODS[name](job)` trains `job.model` in place and returns what is worth noting.

All see the same plain sentences and the same recipe, unless a row of the plan gives a method its own. A loss's
arguments are the defaults below, overridden by the row's `loss`.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    DenoisingAutoEncoderLoss,
    GISTEmbedLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from ablation import AblatedLoss
from st_clusterns import ClusterDataLoader, ClusterNSLoss, CorpusClusters, Recipe
from st_clusterns.clustering import corpus_clusters
from st_clusterns.clustering.vectors import Floats
from st_clusterns.models import reading_at_most
from st_clusterns.training.trainer import count_steps, run_trainer
from st_clusterns.training.views import Kind, choose_kind, views_dataset

START = "starting model"


@dataclass
class Job:
    """One training run.

    Attributes:
        model: to be trained in place.
        texts: the corpus.
        start: returns the starting model's embeddings of the corpus, made when first asked for.
        recipe: the settings of the run.
        folder: for checkpoints.
        loss: arguments of the method's loss.
        n_clusters: of the corpus clusters; chosen from the corpus without it. A float is a multiple of the chosen one.
        group_size: rows of one corpus cluster that meet in a batch; 1 is a random order.
        tfidf: whether clusters come from tf-idf vectors as well as embeddings.
        views: kind of the positives; the default's choice without it.
    """

    model: SentenceTransformer
    texts: list[str]
    start: Callable[[], Floats]
    recipe: Recipe
    folder: Path
    loss: dict[str, Any] = field(default_factory=dict)
    n_clusters: int | float | None = None
    group_size: int = 1
    tfidf: bool = True
    views: Kind | None = None


class InBatchLoss(nn.Module):
    """A loss of the cosines between the first column's rows and the second's."""

    def __init__(self, model: SentenceTransformer, **settings: float) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        rows = [
            F.normalize(self.model(features)["sentence_embedding"].float(), dim=1) for features in sentence_features
        ]
        return self.from_cosines(rows[0] @ rows[1].T, **self.settings)  # (B, B), the positives on the diagonal

    def get_config_dict(self) -> dict[str, float]:
        return self.settings


class SelfGuidedLoss(InBatchLoss):
    """Cross-entropy without the negatives that the model itself puts above the positive by more than a margin."""

    @staticmethod
    def from_cosines(cosine: Tensor, temperature: float, margin: float) -> Tensor:
        false = cosine.detach() > cosine.detach().diagonal()[:, None] + margin
        logits = cosine.masked_fill(false, -torch.inf) / temperature
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


class DebiasedLoss(InBatchLoss):
    """The debiased contrastive loss (Chuang et al. 2020, equation 8).

    The sum over the N negatives is corrected for the share `class_prior` of them that are of the row's own class,
    for which the positive stands in, and held above its least possible value N * exp(-1 / temperature).
    """

    @staticmethod
    def from_cosines(cosine: Tensor, temperature: float, class_prior: float) -> Tensor:
        likeness = torch.exp(cosine / temperature)
        positive = likeness.diagonal()
        count = len(cosine) - 1
        negatives = (likeness.sum(dim=1) - positive - count * class_prior * positive) / (1 - class_prior)
        negatives = negatives.clamp(min=count * torch.e ** (-1 / temperature))
        return -torch.log(positive / (positive + negatives)).mean()


def guided_by_start(model: SentenceTransformer, **settings: Any) -> GISTEmbedLoss:
    """Make GISTEmbed with a frozen copy of the model as its guide."""
    guide = copy.deepcopy(model).eval().requires_grad_(False)
    return GISTEmbedLoss(model, guide, **settings)


def delete_words(text: str, share: float, draw: random.Random) -> str:
    """Delete each word with a probability of `share`, but never all (the noise of TSDAE)."""
    words = text.split()
    kept = [word for word in words if draw.random() >= share]
    return " ".join(kept or [draw.choice(words)]) if words else text


def on_pairs(make: Callable[..., nn.Module], **defaults: Any) -> Callable[[Job], dict[str, Any]]:
    """Return the method that trains a loss on (sentence, sentence) pairs, or on the views that a row names."""

    def train(job: Job) -> dict[str, Any]:
        loss = make(job.model, **{**defaults, **job.loss})
        if job.views:
            return _fit(job, loss, _texts(job, find_clusters(job)), kind=job.views)
        return _fit(job, loss, sentence=job.texts, positive=job.texts)

    return train


_CLUSTERS: dict[tuple[Any, ...], CorpusClusters] = {}


def find_clusters(job: Job) -> CorpusClusters:
    """Cluster the corpus as the starting model embeds it; runs on one corpus and seed share the result."""
    if isinstance(job.n_clusters, float):
        chosen = find_clusters(replace(job, n_clusters=None)).n_clusters
        return find_clusters(replace(job, n_clusters=round(job.n_clusters * chosen)))
    rows = np.ascontiguousarray(job.start(), dtype=np.float32)
    key = (hashlib.sha256(rows.tobytes()).digest(), job.tfidf, job.n_clusters, job.recipe.seed)
    if key not in _CLUSTERS:
        join = corpus_clusters.join_tfidf if job.tfidf else lambda rows, *_: rows
        with mock.patch.object(corpus_clusters, "join_tfidf", join):
            fit = CorpusClusters.fit(job.texts, None, job.n_clusters, job.recipe.seed, embeddings=rows)
        _CLUSTERS[key] = fit
    return _CLUSTERS[key]


def topic_layer_alone(job: Job) -> dict[str, Any]:
    """Append the topic layer, and do not train."""
    clusters = find_clusters(job)
    if clusters.has_topics:
        clusters.add_topic_layer(job.model)
    return _notes(clusters)


def nearest_other(rows: Floats, lowest: float, highest: float) -> np.ndarray:
    """Return the place of the most similar other row whose cosine lies between two bounds, (N,); -1 if none does."""
    found = []
    for start in range(0, len(rows), 1000):
        cosine = rows[start : start + 1000] @ rows.T
        cosine[(cosine < lowest) | (cosine > highest)] = -np.inf
        np.fill_diagonal(cosine[:, start:], -np.inf)  # a row itself, whatever the bounds
        found.append(np.where(np.isfinite(cosine).any(axis=1), cosine.argmax(axis=1), -1))
    return np.concatenate(found)


def nearest_sentence_as_negative(job: Job) -> dict[str, Any]:
    """Train SimCSE on the sentences that have a near other one, which is an explicit negative beside those in-batch."""
    settings = {"lowest": 0.6, "highest": 0.95, **job.loss}
    nearest = nearest_other(job.start(), **settings)
    kept = np.flatnonzero(nearest >= 0)
    texts, negatives = ([job.texts[place] for place in places] for places in (kept, nearest[kept]))
    loss = MultipleNegativesRankingLoss(job.model, scale=20.0)
    notes = _fit(job, loss, sentence=texts, positive=texts, negative=negatives)
    return {**notes, "loss": {**notes["loss"], **settings}, "sentences_with_a_near_one": len(kept)}


def tsdae(job: Job) -> dict[str, Any]:
    """Reconstruct sentences from the embedding of what is left of them after words were deleted."""
    settings = {"share": 0.6, **job.loss}  # as published
    draw = random.Random(job.recipe.seed)
    noisy = [delete_words(text, settings["share"], draw) for text in job.texts]
    loss = DenoisingAutoEncoderLoss(job.model, tie_encoder_decoder=True)
    return {**_fit(job, loss, sentence=noisy, positive=job.texts), "loss": settings}


def published(job: Job) -> dict[str, Any]:
    """Train ClusterNS as published; `loss.preset` names another preset than BERT-base's."""
    settings = {"preset": "paper/bert-base", "n_clusters": 64, **job.loss}
    loss = ClusterNSLoss.from_preset(job.model, settings.pop("preset"), **settings)
    return {**_fit(job, loss, sentence=job.texts), "started": loss.centroids.started}


def clusterns(job: Job, loss_class: type[ClusterNSLoss] = ClusterNSLoss) -> dict[str, Any]:
    """Train ClusterNS on clusters of the corpus; `group_size` above 1 groups batches by cluster."""
    clusters = find_clusters(job)
    with reading_at_most(job.model, job.recipe.max_length):
        loss = loss_class(job.model, clusters, **job.loss)
    dataset = _texts(job, clusters)
    if job.group_size > 1:
        dataset = dataset.add_column("label", _labels(job, clusters))
    return {**_fit(job, loss, dataset, kind=_kind(job, clusters)), **_notes(clusters)}


def clusterns_by_fit(job: Job) -> dict[str, Any]:
    """Train ClusterNS by `model.fit` over a `ClusterDataLoader`, as the README has it."""
    recipe, model = job.recipe, job.model
    loader = ClusterDataLoader(
        job.texts, model, recipe.batch_size, job.n_clusters, seed=recipe.seed, show_progress_bar=False
    )
    with reading_at_most(model, recipe.max_length):
        loss = ClusterNSLoss(model, **job.loss)
        model.fit(
            [(loader, loss)],
            epochs=1,
            steps_per_epoch=count_steps(len(job.texts), recipe),
            warmup_steps=0,
            show_progress_bar=False,
            optimizer_params={"lr": recipe.for_views(_kind(job, loader.clusters)).learning_rate},
            checkpoint_path=str(job.folder),
        )
    return {"loss": loss.get_config_dict(), **_notes(loader.clusters)}


def _texts(job: Job, clusters: CorpusClusters) -> Dataset:
    """Return the texts as ClusterNS trains on them."""
    return views_dataset(job.texts, clusters, _kind(job, clusters), job.recipe.seed)


def _kind(job: Job, clusters: CorpusClusters) -> Kind:
    return job.views or choose_kind(clusters.sentences, clusters.has_topics)


def _labels(job: Job, clusters: CorpusClusters) -> list[int]:
    """Return the cluster number of each text, from 1."""
    ids = dict(zip(clusters.sentences, clusters.ids.tolist(), strict=True))
    return [ids[text] + 1 for text in job.texts]


def _notes(clusters: CorpusClusters) -> dict[str, Any]:
    return {"n_clusters": clusters.n_clusters, "has_topics": clusters.has_topics, "mean_trust": clusters.mean_trust}


def _fit(
    job: Job, loss: nn.Module, dataset: Dataset | None = None, kind: Kind | None = None, **columns: list[str]
) -> dict[str, Any]:
    dataset = Dataset.from_dict(columns) if dataset is None else dataset
    recipe = job.recipe.for_views(kind)
    log = run_trainer(
        job.model, loss, dataset, recipe, job.folder, kind=kind, group_size=job.group_size, show_progress=False
    )
    settings = {name: v for name, v in loss.get_config_dict().items() if isinstance(v, (int, float, str))}
    settings["learning_rate"] = recipe.learning_rate
    return {"loss": settings, "training_loss": [entry["loss"] for entry in log if "loss" in entry]}


# Settings are the sources' own unless a comment says otherwise. Two dropout views of one sentence are nearly equal
# (cosine 0.9 and more), which several of these methods were not made for.
METHODS: dict[str, Callable[[Job], dict[str, Any]]] = {
    START: lambda job: {},
    "SimCSE": on_pairs(MultipleNegativesRankingLoss, scale=20.0),
    "hardness weighting": on_pairs(
        MultipleNegativesRankingLoss, scale=20.0, hardness_mode="in_batch_negatives", hardness_strength=9.0
    ),
    # The guide gives a sentence and itself a cosine of 1, so a margin of m masks all pairs above 1 - m. The
    # temperature is SimCSE's (the library's default, 0.01, is for labelled pairs).
    "GISTEmbed": on_pairs(guided_by_start, margin=0.5, temperature=0.05),
    "self-guided masking": on_pairs(SelfGuidedLoss, temperature=0.05, margin=0.1),
    # At SimCSE's temperature the positive's share exceeds the whole sum of negatives, and nothing would be learnt.
    "debiased contrastive": on_pairs(DebiasedLoss, temperature=0.5, class_prior=0.1),
    # The bounds were chosen on STS-B dev. Nearer ones are taken for copies.
    "nearest sentence as negative": nearest_sentence_as_negative,
    "TSDAE": tsdae,
    "topic layer alone": topic_layer_alone,
    "ClusterNS, published": published,
    "ClusterNS": clusterns,
    "ClusterNS, ablated": partial(clusterns, loss_class=AblatedLoss),
    "ClusterNS, model.fit": clusterns_by_fit,
}
