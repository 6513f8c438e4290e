"""Views of texts: what the positive of a text is, where there are only texts.

- "span": a random span of its words (the inverse cloze task, Lee et al. 2019; DeCLUTR, Giorgi et al. 2021; Contriever,
  Izacard et al. 2022). It teaches search in documents, and it costs topics of sentences.
- "dropout": the text itself (SimCSE, Gao et al. 2021). Two passes are nearly equal, so the clusters have to teach.
- "deletion": the text without some of its words, which teaches sentences that have no topics.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median
from typing import Any, Literal, get_args

from datasets import Dataset

from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.clustering.embedding import as_texts
from st_clusterns.clustering.sample import SAMPLE
from st_clusterns.clustering.words import count_words, split_pieces
from st_clusterns.evaluation.evaluators import random_span

Kind = Literal["span", "dropout", "deletion"]
DOCUMENT = 30  # median number of words from which on a corpus is one of documents
SPAN = (0.1, 0.3)  # length of a span, as a share of the words
DELETED = 0.3  # share of the words that are deleted


def choose_kind(sentences: Sequence[str], has_topics: bool) -> Kind:
    """Choose the kind of view: spans of documents, dropout for sentences with topics, deletion for those without."""
    if sentences and median(map(count_words, sentences)) >= DOCUMENT:
        return "span"
    return "dropout" if has_topics else "deletion"


class TextViews:
    """Adds a view of each text to the rows of a data set, when they are read: a transform for `Dataset.set_transform`.

    A view follows from the seed, the epoch and the text alone, so a resumed run sees the same views.

    Args:
        kind: the kind of view.
        seed: seed of the random number generator, 0 or more.
        column: the column that holds the texts. The view stands before it, in the column `view`.

    Raises:
        ValueError: if there is no such kind.

    Attributes:
        epoch: the current epoch. `ClusterStateCallback` sets it; without that, all epochs have the same views.
    """

    def __init__(self, kind: Kind, seed: int = 0, column: str = "sentence") -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"kind={kind!r} is no kind of view: choose one of {', '.join(map(repr, get_args(Kind)))}.")
        self.kind, self.seed, self.column, self.epoch = kind, seed, column, 0

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the rows with their views."""
        return {"view": [self.view(text) for text in rows[self.column]], **rows}

    def view(self, text: str) -> str:
        """Return the view of a text in this epoch."""
        words = split_pieces(text)
        if self.kind == "dropout" or len(words) < 2:
            return text
        draw = random.Random(f"{self.seed} {self.epoch} {text}")
        if self.kind == "span":
            return "".join(words[random_span(len(words), SPAN, draw)]).rstrip()
        kept = [word for word in words if draw.random() >= DELETED] or [draw.choice(words)]
        if len(kept) == len(words):
            del kept[draw.randrange(len(kept))]  # else the view would be the text itself
        return "".join(kept).rstrip()


def views_of(dataset: Any) -> list[TextViews]:
    """Return the `TextViews` of a data set, or of several that are trained on together."""
    found = []
    for part in getattr(dataset, "datasets", [dataset]):
        transform = getattr(part, "format", {}).get("format_kwargs", {}).get("transform")
        transform = getattr(transform, "keywords", {}).get("transform", transform)  # the trainer wraps that of several
        found += [transform] if isinstance(transform, TextViews) else []
    return found


def set_epoch(dataset: Any, epoch: int) -> None:
    """Tell the views of a data set which epoch begins."""
    for views in views_of(dataset):
        views.epoch = epoch


def views_dataset(
    sentences: Sequence[str] | Dataset, clusters: CorpusClusters, kind: Kind | None = None, seed: int = 0
) -> Dataset:
    """Return the data set to train on: the sentences, and before each its view unless that is the sentence itself.

    Args:
        sentences: the corpus: texts, or a data set with the column `sentence`, which stays where it is; its other
            columns are left out.
        clusters: its clusters, which say whether it has topics.
        kind: the kind of view. Default: that of `choose_kind` for the first 50,000 sentences.
        seed: seed of the views.

    Returns:
        Columns `view` and `sentence`; of kind "dropout", only `sentence`, which `ClusterNSLoss` reads twice.

    Raises:
        ValueError: if the sentences are no texts, the data set has no such column, or there is no such kind.
    """
    if not isinstance(sentences, Dataset):
        dataset = Dataset.from_dict({"sentence": as_texts(sentences)})
    elif "sentence" in sentences.column_names:
        dataset = sentences.select_columns("sentence")  # a loss takes any other for a positive, or for negatives
    else:
        names = ", ".join(map(repr, sentences.column_names))
        raise ValueError(f"The data set has the columns {names}, and no 'sentence': rename that of the texts.")
    kind = kind or choose_kind(dataset[:SAMPLE]["sentence"], clusters.has_topics)
    return dataset if kind == "dropout" else dataset.with_transform(TextViews(kind, seed))
