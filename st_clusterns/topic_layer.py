"""A last linear layer that turns down what the sentences of one cluster differ in.

Within a cluster, sentences differ in what has nothing to do with its topic: form of question, tone, length. The
covariance of these differences tells the directions apart in which a corpus is told apart by topic from those in
which it is not. As in linear discriminant analysis (Fisher 1936; Rao 1948), with the clusters in place of classes:

1. Whiten the differences within clusters: directions of much idle variation shrink, quiet ones grow.
2. There, a direction whose variance between clusters is `r` times that within has the weight
   `(1 + r / (r + TOPIC)) / 2`: 1 if it tells topics apart, 1/2 if not.
3. Of the similarity of two sentences, `KEPT` is still that of the centred embeddings: what differs within a cluster is
   the finer meaning as well, which search and deduplication live on.
4. Order the directions by how much they tell of the clusters, so that embeddings cut short (`truncate_dim`) keep the
   topics longest.

A model that judges worse than shared words, and whose corpus has no clusters to be trusted, gets a layer as well: it
whitens half of every similarity, without any clusters (`fit_whitening`); behind it comes that of
`st_clusterns.spelling`.

The layer needs no gradient, takes seconds, and loads everywhere as a plain `Dense` module. Shapes: `N` rows, `K`
clusters, `D` dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from sklearn.preprocessing import normalize
from torch import nn

from st_clusterns.rows import Floats

SHRINKAGE, NOISE = 0.3, 8.0  # this share of their mean, plus NOISE * D / N, is added to the variances within clusters
TOPIC = 0.1  # ratio of variances, between to within clusters, at which a direction counts half as topic
WHITENING_SHRINKAGE, WHITENING_NOISE = 0.01, 0.5  # likewise, added to the variances where nothing is known of clusters
KEPT = 0.5  # share of a similarity that is as before


@dataclass(frozen=True)
class TopicLayer:
    """A linear map of unit vectors; what it returns is normalised again.

    Attributes:
        weight: (D, D), to be multiplied from the left, as `torch.nn.Linear` has it.
        bias: (D,).
    """

    weight: Floats
    bias: Floats

    def __call__(self, rows: Floats) -> Floats:
        """Map unit vectors to unit vectors, (N, D) -> (N, D)."""
        mapped: Floats = normalize(rows @ self.weight.T + self.bias)
        return mapped

    def append_to(self, model: nn.Module) -> None:
        """Put the layer, frozen, at the end of a model, unless it is there already.

        Args:
            model: a SentenceTransformer; it gets a `Dense` and a `Normalize` module (and a `Normalize` before them, if
                its embeddings have other lengths than 1).

        Raises:
            ValueError: if the model is not made of modules in a row.
        """
        if not isinstance(model, nn.Sequential):
            raise ValueError(
                f"The topic layer can be put at the end of a SentenceTransformer, not of a {type(model).__name__}: "
                "cluster the corpus with topic_layer=False."
            )
        if self._is_in(model):
            return
        dense = Dense(
            len(self.bias),
            len(self.bias),
            activation_function=nn.Identity(),
            init_weight=torch.tensor(self.weight),
            init_bias=torch.tensor(self.bias),
        )
        append_frozen(model, dense)

    def _is_in(self, model: nn.Sequential) -> bool:
        layers = [module.linear for module in model if isinstance(module, Dense)]
        return any(
            layer.bias is not None
            and layer.weight.shape == self.weight.shape
            and torch.equal(layer.weight.cpu(), torch.tensor(self.weight).to(layer.weight.dtype))
            for layer in layers
        )


def append_frozen(model: nn.Sequential, *modules: nn.Module) -> None:
    """Put modules that no gradient changes at the end of a model, between unit vectors and unit vectors."""
    example = next(model.parameters())
    if not isinstance(model[-1], Normalize):
        model.append(Normalize())
    for module in (*modules, Normalize()):
        model.append(module.to(example.device, example.dtype).requires_grad_(False))


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


def fit_whitening(rows: Floats) -> TopicLayer:
    """Compute the layer that brings out what a few directions drown, in the embeddings of a raw language model.

    Of the similarity of two sentences, `KEPT` stays as it was; the rest is that of whitened embeddings (Su et al.
    2021, BERT-whitening). Nothing is centred: the common direction holds meaning, too.

    Args:
        rows: unit vectors, (N, D).

    Returns:
        The layer.
    """
    dimension = rows.shape[1]
    covariance = np.cov(rows.astype(np.float64), rowvar=False)
    variances, directions = np.linalg.eigh(covariance)
    noise = (WHITENING_SHRINKAGE + WHITENING_NOISE * dimension / len(rows)) * max(variances.mean(), 1e-12)
    whitening = directions / np.sqrt(variances.clip(0) + noise)
    return _layer(_root(whitening @ whitening.T, covariance), np.zeros(dimension))


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
