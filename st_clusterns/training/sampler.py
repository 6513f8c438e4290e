"""Batches in which a chosen number of rows share a cluster.

How many rows of one cluster meet in a batch decides how many false negatives a contrastive loss sees, and how
hard the other negatives are. `ClusterBatchSampler` turns that into one number, `group_size`:

1. Shuffle the rows of every cluster and cut them into groups of `group_size`.
2. Shuffle all whole groups and lay them in a line; then the leftovers, fewer than `group_size` rows a cluster,
   those of one cluster side by side.
3. Cut the line into batches of `batch_size` and shuffle the batches; a short last one stays last.

Where `group_size` divides `batch_size`, no batch border cuts a whole group, because leftovers follow all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sentence_transformers.base.sampler import DefaultBatchSampler

if TYPE_CHECKING:
    import torch

Ints = npt.NDArray[np.integer[Any]]


def plan_epoch(ids: Ints, batch_size: int, group_size: int, rng: np.random.Generator) -> Ints:
    """Order the rows (N,) of the clusters `ids` (N,) so that every `batch_size` of them in a row are a batch."""
    rows = shuffle_rows(len(ids), rng)
    if group_size == 1:
        return rows
    rows = rows[np.argsort(ids[rows], kind="stable")]  # a cluster after the other, each still in random order
    sizes = _run_lengths(ids[rows])
    ends = np.cumsum(sizes) - sizes % group_size  # where the whole groups of each cluster end
    whole = np.arange(len(rows)) < np.repeat(ends, sizes)
    groups, leftovers = shuffle_blocks(rows[whole], group_size, rng), rows[~whole]
    sizes = _run_lengths(ids[leftovers])
    places = np.repeat(rng.permutation(len(sizes)), sizes)  # the new place of each leftover's cluster
    line = np.concatenate([groups, leftovers[np.argsort(places, kind="stable")]])
    return shuffle_blocks(line, batch_size, rng)  # else an epoch would always end with the leftovers


def shuffle_rows(n_rows: int, rng: np.random.Generator) -> Ints:
    """Return 0 to n_rows - 1 in random order, as int32 if it holds them: half the memory."""
    dtype = np.int32 if n_rows <= np.iinfo(np.int32).max else np.int64
    return rng.permutation(np.arange(n_rows, dtype=dtype))


def shuffle_blocks(rows: Ints, size: int, rng: np.random.Generator) -> Ints:
    """Shuffle blocks of `size` rows as wholes; a shorter last one stays last: (N,) -> (N,)."""
    end = len(rows) - len(rows) % size
    return np.concatenate([rng.permutation(rows[:end].reshape(-1, size)).ravel(), rows[end:]])


def _run_lengths(sorted_ids: Ints) -> Ints:
    starts = np.flatnonzero(sorted_ids[1:] != sorted_ids[:-1]) + 1
    return np.diff(starts, prepend=0, append=len(sorted_ids))


class ClusterBatchSampler(DefaultBatchSampler):  # type: ignore[misc]  # the host library is not typed
    """Decides how many rows of one cluster meet in a batch.

    For `SentenceTransformerTrainingArguments`: `batch_sampler=ClusterBatchSampler`, or with other settings
    `batch_sampler=functools.partial(ClusterBatchSampler, group_size=8)`.

    `group_size=1` is a purely random order; `group_size=batch_size` gives batches of one cluster, as far as the cluster
    sizes allow. Every row comes once an epoch (with `drop_last` all but a remainder), every batch but the last is full.
    The order depends on (`seed`, `epoch`) and the clusters alone, hence is the same on every process.

    Args:
        dataset: the data set whose rows are drawn.
        batch_size: rows a batch.
        drop_last: leave out a short last batch.
        valid_label_columns: the first of these that the data set has holds the clusters, unless `ids` does. Scores of
            pairs, numbers with a fraction, are no clusters: their rows come in random order.
        generator: unused; the trainer passes one.
        seed: of the order, 0 or more.
        ids: the cluster of each row, any integers, (N,). Not copied: rewritten in place, they take effect in the
            next epoch. The trainer makes a sampler for the evaluation data set too, which a label column suits.
        group_size: rows of one cluster that stay together, 1 to `batch_size`.

    Raises:
        ValueError: if a number is out of its range, the data set is empty, or the clusters are not one integer a row.
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
        ids: Ints | None = None,
        group_size: int = 4,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("dataset has 0 rows: give it at least one, or leave it out of the training.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number of rows, 1 or more.")
        if group_size not in range(1, batch_size + 1):
            raise ValueError(
                f"group_size={group_size!r} does not fit batch_size={batch_size}: choose a whole number from 1 to "
                f"{batch_size}. The trainer builds it for evaluation too, with per_device_eval_batch_size rows."
            )
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"seed={seed!r} must be a whole number, 0 or more: batches follow from it alone.")
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self.dataset = dataset
        self.group_size = int(group_size)
        self.ids = _find_labels(dataset, valid_label_columns) if ids is None else ids
        self._read_ids()  # complain now, not at the first epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Plan the epoch now, with the clusters as they are now; build each batch when it is asked for."""
        rng = np.random.default_rng((self.seed, self.epoch))
        ids = self._read_ids()
        if ids is None:
            order = shuffle_rows(len(self.dataset), rng)
        else:
            order = plan_epoch(ids, self.batch_size, self.group_size, rng)
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        return (order[start : start + self.batch_size].tolist() for start in starts)

    def __len__(self) -> int:
        """The number of batches an epoch."""
        missing = 0 if self.drop_last else self.batch_size - 1
        return (len(self.dataset) + missing) // self.batch_size

    def _read_ids(self) -> Ints | None:
        if self.ids is None:
            return None
        ids = np.asarray(self.ids)
        _check_integers(ids, "ids")
        if len(ids) != len(self.dataset):
            raise ValueError(
                f"ids has {len(ids)} entries, but the data set has {len(self.dataset)} rows. The trainer builds "
                "the sampler for the evaluation data set as well: bind the clusters to the training data set by a "
                "label column, train_dataset.add_column('label', ids), instead of passing ids."
            )
        return ids


def _find_labels(dataset: Any, names: list[str] | None) -> Ints | None:
    present = getattr(dataset, "column_names", [])  # a plain sequence has no columns
    column = next((name for name in names or [] if name in present), None)
    if column is None:
        return None
    values = dataset.data.column(column)
    if dataset._indices is not None:  # shuffled or selected; asking for `dataset[:]` would take minutes and gigabytes
        values = values.take(dataset._indices.column(0))
    labels: npt.NDArray[Any] = values.to_numpy()
    if np.issubdtype(labels.dtype, np.floating) and (labels % 1 > 0).any():
        return None  # scores of pairs, for a loss such as CoSENTLoss beside ours
    _check_integers(labels, f"the label column {column!r}")
    return labels


def _check_integers(ids: npt.NDArray[Any], name: str) -> None:
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{name} must hold one integer a row, the row's cluster, got the dtype {ids.dtype} and the shape "
            f"{ids.shape}: number the clusters, fill missing values, or rename a column that is no cluster."
        )
