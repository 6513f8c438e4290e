"""In-batch negatives, looked at pair by pair: which are probably false, which are hard, which a loss masks.

Random batches are drawn, and every pair of a batch is put into the first of these kinds that fits:

1. exact copies: the same text.
2. same words: the same words in any order, case and punctuation.
3. same topic: the same trusted cluster.
4. as similar as a positive: a cosine that nine in ten positive pairs reach.
5. hard: as similar as two sentences of one cluster on average.
6. easy: the rest.

The first four are probably false negatives. `ClusterNSLoss` masks exact copies and pairs of one trusted cluster.
Estimates are means over the batches, with the 95 % confidence interval of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from st_clusterns.clustering.vectors import Floats, Ints
from st_clusterns.clustering.words import split_words

KINDS = ("exact copies", "same words", "same topic", "as similar as a positive", "hard", "easy")
N_FALSE = 4  # the first kinds, which are probably false negatives
PAIRS, MOST_BATCHES, FEWEST_BATCHES = 10_000_000, 200, 10  # pairs that are looked at for a batch size, about; batches
ANCHORS = 512  # rows of a batch that are compared with all of it, at most
WORST = 20  # masked pairs of a batch, and others, that are kept for the list of the worst

Mask = npt.NDArray[np.bool_]


class Estimate(NamedTuple):
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Rows:
    """The rows of a corpus as batches are drawn from them, `N`; numbers are equal where rows are.

    Attributes:
        embeddings: unit vectors of the distinct texts, (M, D).
        texts: which of the M texts a row has, (N,).
        words: a number for the words of each text, (M,); -1 without words.
        topics: the trusted cluster of each text, (M,); -1 without one.
        near: cosine from which on a pair is as similar as a positive.
        hard: cosine from which on a negative is hard.
        labels: a number for the label of each row, (N,), if there are labels; -1 for a row without one.
    """

    embeddings: Floats
    texts: Ints
    words: Ints
    topics: Ints
    near: float
    hard: float
    labels: Ints | None = None


@dataclass(frozen=True)
class Pair:
    """Two texts, by their numbers, that are negatives of each other in a batch."""

    cosine: float
    first: int
    second: int
    kind: str
    masked: bool


@dataclass(frozen=True)
class Negatives:
    """What the negatives of batches of one size are. Numbers are negatives of a row, on the mean.

    Attributes:
        batch_size: rows of a batch; each has `batch_size - 1` negatives.
        n_batches: batches that were drawn.
        kinds: the number of each kind of `KINDS`.
        false: the number of those that are probably false, and of hard ones below.
        masked: the number that `ClusterNSLoss` leaves out.
        left: the number of those that are probably false and not masked.
        rows_with_false: the share of the rows that have a probably false negative, 0 to 1.
        precision: with labels, the share of the probably false negatives that have the row's label; else None.
        recall: with labels, the share of the negatives of the row's label that are taken to be false; else None.
    """

    batch_size: int
    n_batches: int
    kinds: dict[str, Estimate]
    false: Estimate
    masked: Estimate
    left: Estimate
    rows_with_false: Estimate
    precision: float | None = None
    recall: float | None = None


def number_words(texts: Sequence[str]) -> Ints:
    """Number texts by their words, in any order: equal numbers for equal words, -1 for none."""
    numbers: dict[tuple[str, ...], int] = {(): -1}
    return np.array([numbers.setdefault(tuple(sorted(split_words(text))), len(numbers)) for text in texts], np.int64)


def look_at_batches(rows: Rows, batch_size: int, seed: int = 0) -> tuple[Negatives, list[Pair]]:
    """Draw random batches of `batch_size` different rows, and return what their negatives are, and the worst pairs.

    The worst pairs are those of the highest cosine among the probably false ones, exact copies apart: of those that the
    loss masks, and of the others.
    """
    generator = np.random.default_rng(seed)
    anchors = min(batch_size, ANCHORS)
    n_batches = int(np.clip(PAIRS // (anchors * batch_size), FEWEST_BATCHES, MOST_BATCHES))
    seen: dict[str, list[float]] = {name: [] for name in (*KINDS, "false", "masked", "left", "rows_with_false")}
    worst: dict[tuple[int, int], Pair] = {}
    guessed = right = same_label = 0
    for _ in range(n_batches):
        batch = generator.choice(len(rows.texts), batch_size, replace=False)
        texts = rows.texts[batch]
        kinds, masked, cosines = _kinds_of(rows, texts, anchors)
        false = kinds < N_FALSE
        for name, count in zip(KINDS, np.bincount(kinds.ravel()), strict=False):
            seen[name].append(float(count / anchors))
        seen["false"].append(float(false.sum() / anchors))
        seen["masked"].append(float(masked.sum() / anchors))
        seen["left"].append(float((false & ~masked).sum() / anchors))
        seen["rows_with_false"].append(float(false.any(axis=1).mean()))
        if rows.labels is not None:
            same = _equal(rows.labels[batch], anchors)
            np.fill_diagonal(same, False)
            judged = false & (rows.labels[batch][:anchors, None] >= 0) & (rows.labels[batch] >= 0)
            guessed, right, same_label = guessed + judged.sum(), right + (false & same).sum(), same_label + same.sum()
        for pair in _worst_of(kinds, masked, cosines, texts):
            worst[min(pair.first, pair.second), max(pair.first, pair.second)] = pair
    estimates = {name: _estimate(values) for name, values in seen.items()}
    found = Negatives(
        batch_size,
        n_batches,
        {name: estimates[name] for name in KINDS},
        estimates["false"],
        estimates["masked"],
        estimates["left"],
        estimates["rows_with_false"],
        _ratio(right, guessed),
        _ratio(right, same_label),
    )
    return found, list(worst.values())


def _kinds_of(rows: Rows, texts: Ints, anchors: int) -> tuple[npt.NDArray[np.int8], Mask, Floats]:
    """Return, for the first rows of a batch with all: the kind of each pair, whether it is masked, and its cosine.

    A row with itself is of a kind of its own.
    """
    unit = rows.embeddings[texts]
    cosines: Floats = unit[:anchors] @ unit.T  # (A, B)
    copies, topic = _equal(texts, anchors), _equal(rows.topics[texts], anchors)
    fits = [copies, _equal(rows.words[texts], anchors), topic, cosines >= rows.near, cosines >= rows.hard]
    kinds = np.select(fits, [np.int8(kind) for kind in range(len(fits))], np.int8(len(fits)))
    np.fill_diagonal(kinds, len(KINDS))
    masked = copies | topic
    np.fill_diagonal(masked, False)
    return kinds, masked, cosines


def _equal(ids: Ints, anchors: int) -> Mask:
    equal: Mask = (ids[:anchors, None] == ids) & (ids >= 0)
    return equal


def _worst_of(kinds: npt.NDArray[np.int8], masked: Mask, cosines: Floats, texts: Ints) -> list[Pair]:
    """Return the most similar pairs of a batch that are probably false negatives: of masked ones and of others."""
    false = np.triu((kinds > 0) & (kinds < N_FALSE))
    pairs = list[Pair]()
    for chosen in (false & masked, false & ~masked):
        first, second = np.nonzero(chosen)
        order = np.argsort(-cosines[first, second], kind="stable")[:WORST]
        for i, j in zip(first[order], second[order], strict=True):
            pair = float(cosines[i, j]), int(texts[i]), int(texts[j]), KINDS[kinds[i, j]], bool(masked[i, j])
            pairs.append(Pair(*pair))
    return pairs


def _estimate(values: Sequence[float]) -> Estimate:
    mean, margin = float(np.mean(values)), 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Estimate(mean, max(0.0, mean - margin), mean + margin)


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
