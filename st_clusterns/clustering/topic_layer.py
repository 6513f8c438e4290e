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

SHRINKAGE, NOISE = 0.3, 8.0  # this share of their mean, plus NOISE * D / N, is added to the within-cluster variances
TOPIC = 0.1  # ratio of between- to within-cluster variance at which a direction counts half as topic
KEPT = 0.5  # share of a similarity that stays as it was


@dataclass(frozen=True)
class TopicLayer:
    """A linear map of unit vectors, whose output is normalised again.

    Attributes:
        weight: (D, D), multiplied from the left as in `torch.nn.Linear`.
        bias: (D,).
    """

    weight: Floats
    bias: Floats

    def __call__(self, rows: Floats) -> Floats:
        """Map unit vectors to unit vectors, (N, D) -> (N, D)."""
        mapped: Floats = normalize(rows @ self.weight.T + self.bias)
        return mapped

    def append_to(self, model: SentenceTransformer) -> None:
        """Append the layer, frozen, to a model that does not have it yet.

        Args:
            model: gets a `Dense` and a `Normalize` module, and a `Normalize` before them unless it ends with one.

        Raises:
            ValueError: if the model compares embeddings by anything but cosines, whose lengths would be lost.
        """
        if model.similarity_fn_name not in (None, "cosine"):
            raise ValueError(
                f"model.similarity_fn_name={model.similarity_fn_name!r}: the topic layer returns unit vectors, so the "
                "lengths of this model's embeddings would be lost. Set it to 'cosine' if lengths do not matter."
            )
        if self.find_in(model) is not None:
            return
        if len(self.bias) != model.get_embedding_dimension():
            raise ValueError(
                f"The layer is for {len(self.bias)} dimensions, the model has {model.get_embedding_dimension()}: pass "
                "the model that the clusters were fitted with."
            )
        dense = Dense(
            len(self.bias),
            len(self.bias),
            activation_function=nn.Identity(),
            init_weight=torch.tensor(self.weight),
            init_bias=torch.tensor(self.bias),
        )
        example = next(model.parameters())
        if not isinstance(model[-1], Normalize):
            model.append(Normalize())
        for module in (dense, Normalize()):
            model.append(module.to(example.device, example.dtype).requires_grad_(False))

    def remove_from(self, model: SentenceTransformer) -> None:
        """Remove the layer from the end of a model that has it; its `Normalize` goes with it.

        A `Normalize` that `append_to` put before the layer stays: it changes no cosine.
        """
        place = self.find_in(model)
        if place is not None:
            del model[place : place + 2]

    def find_in(self, model: SentenceTransformer) -> int | None:
        """Return the position of the layer among a model's modules, None if it is not there."""
        weight = torch.tensor(self.weight)
        for place, module in enumerate(model):
            if isinstance(module, Dense) and module.linear.weight.shape == weight.shape:
                held = module.linear.weight.detach().cpu()
                if torch.equal(held, weight.to(held.dtype)):
                    return place
        return None


def fit_topic_layer(rows: Floats, ids: npt.NDArray[np.integer[Any]], n_clusters: int) -> TopicLayer:
    """Compute the layer from unit vectors and their clusters.

    Args:
        rows: (N, D).
        ids: the cluster of each row, 0 to K-1, (N,).
        n_clusters: number of clusters `K`.

    Returns:
        The layer.
    """
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
    """Return the linear map whose inner products are the mean of `topic`'s and the plain ones.

    Each of the two is scaled to rows of mean square length 1.
    """
    shares = ((1 - KEPT, topic), (KEPT, np.eye(len(topic))))
    metric = sum(share * product / max(np.trace(product @ covariance), 1e-12) for share, product in shares)
    values, vectors = np.linalg.eigh(metric)
    root: npt.NDArray[np.float64] = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def _covariances(
    centred: npt.NDArray[np.float64], ids: npt.NDArray[np.integer[Any]], n_clusters: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the covariances between and within clusters, both (D, D); they add up to that of all rows."""
    sums = np.zeros((n_clusters, centred.shape[1]))
    np.add.at(sums, ids, centred)
    counts = np.bincount(ids, minlength=n_clusters)[:, None]
    means = sums / np.maximum(counts, 1)
    between = (means * counts).T @ means / len(centred)
    inside = centred - means[ids]
    return between, inside.T @ inside / len(centred)
