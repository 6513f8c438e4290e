"""Training-free adaptation: a linear last layer that scales down within-cluster variance.

Linear discriminant analysis (Fisher 1936; Rao 1948) with the clusters as classes:

1. Whiten the within-cluster covariance, with shrinkage.
2. In that space, a direction whose variance between clusters is `r` times that within clusters gets the weight
   `(1 + r / (r + TOPIC)) / 2`: 1 if it separates clusters, 1/2 if it does not.
3. A share `KEPT` of the similarity of two sentences remains that of the centred embeddings, because within-cluster
   variance also holds the finer meaning that search and deduplication need.
4. Order the directions by their between-cluster variance, so that truncated embeddings keep the topics.

No gradient is needed. The result is a plain `Dense` module of sentence-transformers. Shapes: `N` rows, `K` clusters,
`D` dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from sklearn.preprocessing import normalize
from torch import nn

from st_clusterns.clustering.vectors import Floats
from st_clusterns.models import check_dense, dimension_of

SHRINKAGE, NOISE = 0.3, 8.0  # this share of their mean, plus NOISE * D / N, is added to the within-cluster variances
TOPIC = 0.1  # ratio of between- to within-cluster variance at which a direction counts half as topic
KEPT = 0.5  # share of a similarity that stays as it was


@dataclass(frozen=True)
class TopicLayer:
    """A linear map of unit vectors, whose output is normalised again."""

    weight: Floats  # (D, D), multiplied from the left as in `torch.nn.Linear`
    bias: Floats  # (D,)

    def __call__(self, rows: Floats) -> Floats:
        """Map unit vectors to unit vectors, (N, D) -> (N, D)."""
        mapped: Floats = normalize(rows @ self.weight.T + self.bias)
        return mapped


def append_topic_layer(model: SentenceTransformer, layer: TopicLayer, owner: str) -> None:
    """Append a layer, frozen, to a model, as `Dense` and `Normalize` modules; appending it again changes nothing.

    Args:
        model: gets a `Normalize` before them, too, unless it ends with one.
        layer: the layer.
        owner: fingerprint of the clusters that the layer comes from.

    Raises:
        ValueError: if the model has another topic layer, other dimensions, or a similarity that depends on lengths.
    """
    if model.similarity_fn_name not in (None, "cosine"):
        raise ValueError(
            f"model.similarity_fn_name={model.similarity_fn_name!r}: the topic layer returns unit vectors, so the "
            "lengths of this model's embeddings would be lost. Set it to 'cosine' if lengths do not matter."
        )
    weight, bias = torch.tensor(layer.weight), torch.tensor(layer.bias)
    found = owner_of_topic_layer(model)
    if found == owner or any(_holds(module, weight) for module in model):  # the latter in a reloaded model
        return
    if found is not None:
        raise ValueError("The model has the topic layer of other clusters: call clusters.remove_topic_layer(model).")
    check_dense(model)
    dimension = len(layer.bias)
    if dimension != dimension_of(model):
        raise ValueError(
            f"The layer is for {dimension} dimensions, the model has {dimension_of(model)}: pass the model that the "
            "clusters were fitted with."
        )
    dense = Dense(dimension, dimension, activation_function=nn.Identity(), init_weight=weight, init_bias=bias)
    added = [dense, Normalize()] if isinstance(model[-1], Normalize) else [Normalize(), dense, Normalize()]
    example = next(model.parameters())
    for module in added:
        module.topic_layer_of = owner  # an attribute: a subclass would be saved as a module of ours
        model.append(module.to(example.device, example.dtype).requires_grad_(False))


def remove_topic_layer(model: SentenceTransformer) -> None:
    """Remove what `append_topic_layer` has appended to a model; one without a topic layer stays as it is."""
    for place in reversed(range(len(model))):
        if hasattr(model[place], "topic_layer_of"):
            del model[place]


def owner_of_topic_layer(model: SentenceTransformer) -> str | None:
    """Return the fingerprint of the clusters whose topic layer a model has, if any. Saving a model forgets it."""
    return next((module.topic_layer_of for module in model.children() if hasattr(module, "topic_layer_of")), None)


def _holds(module: nn.Module, weight: torch.Tensor) -> bool:
    held = module.linear.weight.detach().cpu() if isinstance(module, Dense) else torch.empty(0)
    return torch.equal(held, weight.to(held.dtype))


def fit_topic_layer(rows: Floats, ids: npt.NDArray[np.integer[Any]], n_clusters: int) -> TopicLayer:
    """Compute the layer from unit vectors, (N, D), and their clusters, (N,) of 0 to K-1."""
    mean = rows.mean(axis=0, dtype=np.float64)
    between, within = _covariances(rows - mean, ids, n_clusters)
    dimension = len(mean)
    shrinkage = SHRINKAGE + NOISE * dimension / len(rows)  # few rows say little of many directions
    noise = shrinkage * np.trace(within) / dimension * np.eye(dimension)
    variances, directions = np.linalg.eigh(within + noise)
    whitening = directions / np.sqrt(variances)  # (D, D): rows @ whitening has the same variance everywhere
    ratios, directions = np.linalg.eigh(whitening.T @ between @ whitening)
    topic = whitening @ directions * (1 + ratios.clip(0) / (ratios.clip(0) + TOPIC)) / 2
    weight = _root(topic @ topic.T, between + within)
    directions = np.linalg.eigh(weight @ between @ weight)[1][:, ::-1]
    return _layer(directions.T @ weight, mean)


def _layer(weight: npt.NDArray[np.float64], mean: npt.NDArray[np.float64]) -> TopicLayer:
    weight = weight * np.sqrt(len(mean)) / np.linalg.norm(weight)  # cosines do not see it; half precision does
    return TopicLayer(weight.astype(np.float32), (-weight @ mean).astype(np.float32))


def _root(topic: npt.NDArray[np.float64], covariance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the map whose inner products are the mean of `topic`'s and the plain ones, each of mean length 1."""
    shares = ((1 - KEPT, topic), (KEPT, np.eye(len(topic))))
    metric = sum(share * product / max(np.trace(product @ covariance), 1e-12) for share, product in shares)
    values, vectors = np.linalg.eigh(metric)
    root: npt.NDArray[np.float64] = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def _covariances(
    centred: npt.NDArray[np.float64], ids: npt.NDArray[np.integer[Any]], n_clusters: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the covariances between and within clusters, both (D, D); they add up to that of all rows."""
    counts = np.bincount(ids, minlength=n_clusters)[:, None]
    means = np.zeros((n_clusters, centred.shape[1]))
    np.add.at(means, ids, centred / counts[ids])
    between = (means * counts).T @ means / len(centred)
    inside = centred - means[ids]
    return between, inside.T @ inside / len(centred)
