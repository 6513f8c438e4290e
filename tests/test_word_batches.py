"""Batches of sentences that share words, against properties that do not look inside."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from st_clusterns import word_batches
from st_clusterns.sampler import ClusterBatchSampler
from st_clusterns.word_batches import WordBatchSampler, nearest_free

Batches = list[list[int]]


def make_texts(n_rows: int, n_stems: int = 40) -> list[str]:
    """Sentences that share two words with all those of their stem, and one with every other."""
    draw = random.Random(0)
    stems = [draw.randrange(n_stems) for _ in range(n_rows)]
    return [f"the noun{stem} verb{stem} once{row}" for row, stem in enumerate(stems)]


def batches_of(texts: list[str], batch_size: int, epoch: int = 0, **settings: Any) -> Batches:
    sampler = WordBatchSampler(range(len(texts)), batch_size, sentences=texts, **settings)
    sampler.set_epoch(epoch)
    return list(sampler)


def stems_a_batch(texts: list[str], batches: Batches) -> float:
    return float(np.mean([len({texts[row].split()[1] for row in batch}) for batch in batches]))


@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 20), st.integers(1, 30), st.booleans())
def test_every_row_comes_once_in_full_batches(
    n_rows: int, batch_size: int, group_size: int, window: int, drop_last: bool
) -> None:
    group_size, texts = min(group_size, batch_size), make_texts(n_rows, n_stems=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_batches, "WINDOW", window)
        sampler = WordBatchSampler(range(n_rows), batch_size, drop_last, sentences=texts, group_size=group_size)
        batches = list(sampler)
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows) == n_rows - (n_rows % batch_size if drop_last else 0)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert len(sampler) == len(batches)


def test_groups_share_words() -> None:
    texts = make_texts(2000)
    early = batches_of(texts, 32, group_size=8)[:10]
    assert 3.5 < stems_a_batch(texts, early) <= 4  # two groups may be of one stem
    assert stems_a_batch(texts, batches_of(texts, 32, group_size=1)) > 20


def test_the_free_rows_that_share_the_most() -> None:
    shared = csr_matrix(([0.5, 0.2, 0.9, 0.7, 0.1], ([0] * 5, [4, 7, 8, 1, 3])), shape=(1, 10))
    free = np.ones(10, dtype=bool)
    free[8] = False
    assert nearest_free(shared, free, 3).tolist() == [1, 4, 7]
    assert nearest_free(shared, free, 9).tolist() == [1, 4, 7, 3], "rows that share nothing"


def test_without_repeated_words_the_order_is_purely_random() -> None:
    texts = [f"once{row} and never again{row}" for row in range(50)]
    expected = list(ClusterBatchSampler(range(50), 8, group_size=1))
    assert batches_of(texts, 8) == batches_of(make_texts(50), 8, group_size=1) == expected


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    texts, states = make_texts(300), (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy())
    first = batches_of(texts, 16)
    assert first == batches_of(texts, 16, generator=torch.Generator().manual_seed(7))
    assert len({str(first), str(batches_of(texts, 16, epoch=1)), str(batches_of(texts, 16, seed=1))}) == 3
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_two_passes_of_one_epoch_are_equal_and_do_not_disturb_each_other() -> None:
    sampler = WordBatchSampler(range(300), 16, sentences=make_texts(300))
    pairs = list(zip(sampler, sampler, strict=True))
    assert all(one == other for one, other in pairs)


@pytest.mark.parametrize("shuffled", [False, True])
def test_reads_the_first_column_that_is_no_label(shuffled: bool) -> None:
    texts = make_texts(200)
    data = Dataset.from_dict({"label": [0] * 200, "sentence": texts, "positive": ["other"] * 200})
    data = data.shuffle(seed=3) if shuffled else data
    sampler = WordBatchSampler(data, 16, valid_label_columns=["label", "score"])
    assert list(sampler) == batches_of(data["sentence"][:], 16)


def test_a_window_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_batches, "WINDOW", 100)
    read: list[str] = []

    class Watched(list[str]):
        def __getitem__(self, row: Any) -> Any:
            read.append(row)
            return super().__getitem__(row)

    batches = iter(WordBatchSampler(range(1000), 10, sentences=Watched(make_texts(1000))))
    list(itertools.islice(batches, 10))
    assert len(read) == 100


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sentences": ["too", "few"]}, "sentences has 2 entries, but the data set has 20 rows"),
        ({}, "no column of texts: give the sampler sentences"),
        ({"sentences": ["a"] * 20, "group_size": 9}, "group_size=9 does not fit batch_size=8"),
        ({"sentences": ["a"] * 20, "seed": -1}, "seed=-1 must be"),
    ],
)
def test_says_what_is_wrong(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WordBatchSampler(range(20), 8, **settings)
