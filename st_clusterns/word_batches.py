"""Batches of sentences that share words.

Two dropout views of one sentence have the same words, so a contrastive loss tells them from the rows of a random
batch, which share hardly any, by a glance at the words: it is near 0 before the first step, and what little it teaches
is to look at words even more. Among rows that share words it has to look further. Where a corpus is made of clusters
these know better which rows to compare (`st_clusterns.sampler`); this is for text without topics.

Weigh the words of each sentence by how few sentences have them (tf-idf). Then fill every batch with groups: a sentence
drawn at random, and those that share the most words with it. Shapes: `N` rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from sentence_transformers.base.sampler import DefaultBatchSampler

from st_clusterns.sampler import Ints, check_numbers, shuffle_rows
from st_clusterns.words import weigh_words

if TYPE_CHECKING:
    import torch

GROUP_SIZE = 8
WINDOW = 50_000  # rows among which groups are sought, so that a corpus of any size is planned as it is read


class WordBatchSampler(DefaultBatchSampler):  # type: ignore[misc]  # the host library is not typed
    """Fills batches with groups of sentences that share words.

    For `SentenceTransformerTrainingArguments`: `batch_sampler=WordBatchSampler`, or with other settings
    `batch_sampler=functools.partial(WordBatchSampler, group_size=4)`. `st_clusterns.training.train` takes it for
    a corpus none of whose clusters are trusted.

    Every row comes once an epoch (with `drop_last` all but a remainder), every batch but the last is full. Groups are
    taken out of 50,000 rows at a time, so those that come late share less. The order depends on (`seed`, `epoch`) and
    the sentences alone, hence is the same on every process.

    Args:
        dataset: the data set whose rows are drawn.
        batch_size: rows a batch.
        drop_last: leave out a short last batch.
        valid_label_columns: columns that are no text; the trainer passes its label columns.
        generator: unused; the trainer passes one.
        seed: of the order, 0 or more.
        sentences: the text of each row, (N,). Default: the first column of the data set that is no label.
        group_size: rows that share words, 1 to `batch_size`; 1 is a purely random order.

    Raises:
        ValueError: if a number is out of its range, the data set is empty, or there is not one text a row.
    """

    batch_size: int

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        drop_last: bool = False,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        sentences: Sequence[str] | None = None,
        group_size: int = GROUP_SIZE,
    ) -> None:
        check_numbers(len(dataset), batch_size, group_size, seed)
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self.dataset = dataset
        self.group_size = int(group_size)
        self.sentences = sentences
        self.column = _find_column(dataset, valid_label_columns) if sentences is None else ""
        if sentences is not None and len(sentences) != len(dataset):
            raise ValueError(
                f"sentences has {len(sentences)} entries, but the data set has {len(dataset)} rows: give one text a "
                "row, or leave it out to read the data set's own."
            )

    def __iter__(self) -> Iterator[list[int]]:
        """Seek the groups of each batch when it is asked for."""
        rows = shuffle_rows(len(self.dataset), np.random.default_rng((self.seed, self.epoch)))
        batch: list[int] = []
        for start in range(0, len(rows), WINDOW):
            for group in self._groups(rows[start : start + WINDOW]):
                for row in group.tolist():
                    batch.append(row)
                    if len(batch) == self.batch_size:
                        yield batch
                        batch = []
        if batch and not self.drop_last:
            yield batch

    def __len__(self) -> int:
        """The number of batches an epoch."""
        missing = 0 if self.drop_last else self.batch_size - 1
        return (len(self.dataset) + missing) // self.batch_size

    def _groups(self, rows: Ints) -> Iterator[Ints]:
        found = weigh_words(self._read(rows.tolist())) if self.group_size > 1 else None
        if found is None:
            yield rows
            return
        _, weights = found
        by_word, free = weights.T.tocsr(), np.ones(len(rows), dtype=bool)
        for first in range(len(rows)):
            if free[first]:
                free[first] = False
                group = np.append(first, nearest_free(weights[first] @ by_word, free, self.group_size - 1))
                free[group] = False
                yield rows[group]

    def _read(self, rows: list[int]) -> Sequence[str]:
        if self.sentences is not None:
            return [self.sentences[row] for row in rows]
        texts: Sequence[str] = self.dataset[rows][self.column]  # type: ignore[index]  # a `datasets.Dataset`
        return texts


def nearest_free(shared: csr_matrix, free: npt.NDArray[np.bool_], count: int) -> Ints:
    """Return the free rows that share the most; fewer than `count` if fewer share anything.

    Args:
        shared: how much of its words each row shares, sparse, (1, N).
        free: which rows may be taken, (N,).
        count: how many.

    Returns:
        Places of rows, the nearest first, (count,) or fewer.
    """
    may = free[shared.indices]
    rows, much = shared.indices[may], shared.data[may]
    nearest: Ints = rows[np.argsort(-much, kind="stable")[:count]]
    return nearest


def _find_column(dataset: Any, labels: list[str] | None) -> str:
    texts = [name for name in getattr(dataset, "column_names", []) if name not in (labels or [])]
    if not texts:
        raise ValueError("The data set has no column of texts: give the sampler sentences=..., one text a row.")
    return str(texts[0])
