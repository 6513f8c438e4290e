"""A second view of a text, made from its own words: the positives of contrastive training without labels.

Two passes of one text through a model differ by dropout alone. They are nearly equal, so they teach little. For a long
text, a span of it is a harder positive (the inverse cloze task, Lee et al. 2019; DeCLUTR, Giorgi et al. 2021;
Contriever, Izacard et al. 2022). A short text is its own view: deleted words cost more than they teach where there are
topics. Without topics, in a model without dropout, equal views would teach nothing: there the view lacks some words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.models import has_dropout

LONG = 40  # words from which on a view is a span
SPAN = (0.1, 0.3)  # its length, as a share of the words
DELETED = 0.3  # share of the words that are deleted from a shorter text, where nothing else teaches


class TextViews:
    """Adds a view of each text to the rows of a data set, when they are read: a transform for `Dataset.set_transform`.

    A view follows from the seed, the epoch and the text alone, so a resumed run sees the same views.

    Args:
        column: the column that holds the texts. The view stands before it, in the column `view`.
        seed: seed of the random number generator, 0 or more.
        deleted: share of the words that are deleted from a text of less than 40 words, 0 to 1.

    Attributes:
        epoch: the current epoch. `ClusterStateCallback` sets it; without that, all epochs have the same views.
    """

    def __init__(self, column: str = "sentence", seed: int = 0, deleted: float = 0.0) -> None:
        self.column, self.seed, self.deleted, self.epoch = column, seed, deleted, 0

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the rows with their views."""
        return {"view": [self.view(text) for text in rows[self.column]], **rows}

    def view(self, text: str) -> str:
        """Return the view of a text in this epoch."""
        draw = random.Random(f"{self.seed} {self.epoch} {text}")
        words = text.split()
        if len(words) >= LONG:
            count = max(1, round(len(words) * draw.uniform(*SPAN)))
            start = draw.randrange(len(words) - count + 1)
            return " ".join(words[start : start + count])
        if self.deleted == 0 or len(words) < 2:
            return text
        kept = [word for word in words if draw.random() >= self.deleted] or [draw.choice(words)]
        if len(kept) == len(words):
            del kept[draw.randrange(len(kept))]  # else the view would be the text itself
        return " ".join(kept)


def set_epoch(dataset: Any, epoch: int) -> None:
    """Tell the `TextViews` of a data set, or of several that are trained on together, which epoch begins."""
    for part in getattr(dataset, "datasets", [dataset]):
        transform = getattr(part, "format", {}).get("format_kwargs", {}).get("transform")
        transform = getattr(transform, "keywords", {}).get("transform", transform)  # the trainer wraps that of several
        if isinstance(transform, TextViews):
            transform.epoch = epoch


def share_to_delete(model: Any, clusters: CorpusClusters) -> float:
    """Return the share of the words that views of short texts should lack."""
    return 0.0 if clusters.has_topics or has_dropout(model) else DELETED


def views_dataset(sentences: Sequence[str], seed: int = 0, deleted: float = 0.0) -> Dataset:
    """Return a data set of (view, sentence) pairs, for `ClusterNSLoss` or any built-in loss of pairs.

    Args:
        sentences: the corpus.
        seed: seed of the views.
        deleted: share of the words that views of short texts lack, as of `share_to_delete`.
    """
    dataset = Dataset.from_dict({"sentence": list(sentences)})
    dataset.set_transform(TextViews(seed=seed, deleted=deleted))
    return dataset
