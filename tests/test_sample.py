"""The sample of a stream of texts: which texts are drawn, how many there are, and what it takes."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest

from st_clusterns.clustering import sample as module
from st_clusterns.clustering.sample import sample_distinct

TEXTS = [f"text {i} \U0001f600" for i in range(2_000)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "SAMPLE", 100)
    return 100


def test_a_small_corpus_is_taken_whole_in_its_order() -> None:
    sample = sample_distinct(iter(["b", "a", "b", "c", "a"]))
    assert (sample.texts, sample.places) == (["b", "a", "c"], [0, 1, 3])
    assert (sample.n_texts, sample.n_distinct, sample.is_whole) == (5, 3, True)


def test_those_with_the_lowest_numbers_are_drawn(small: int) -> None:
    """Against a sort of all numbers, although most are dropped on the way."""
    salt = hashlib.sha256(b"3").digest()[:16]
    numbers = [hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest() for text in TEXTS]
    lowest = sorted(np.argsort(np.array(numbers, dtype="S8"))[:small].tolist())
    sample = sample_distinct(TEXTS, 3)
    assert sample.places == lowest
    assert sample.texts == [TEXTS[place] for place in lowest]
    assert not sample.is_whole


def test_order_and_copies_do_not_matter(small: int) -> None:
    sample = sample_distinct(TEXTS, 1)
    mixed = [TEXTS[i] for i in np.random.default_rng(0).integers(len(TEXTS), size=5_000)] + TEXTS[::-1]
    other = sample_distinct(mixed, 1)
    assert set(other.texts) == set(sample.texts)
    assert other.places == [mixed.index(text) for text in other.texts] == sorted(other.places)
    assert other.n_distinct == sample.n_distinct
    assert (other.n_texts, other.digest != sample.digest) == (7_000, True)
    assert set(sample_distinct(TEXTS, 2).texts) != set(sample.texts)


def test_the_sample_of_a_sample_is_itself(small: int) -> None:
    texts = sample_distinct(TEXTS, 1).texts
    assert sample_distinct(texts, 1).texts == texts


def test_every_text_is_drawn_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 10)
    stream = TEXTS[:40] + TEXTS[:5] * 9  # also those that come often
    drawn = [text for seed in range(1_000) for text in sample_distinct(stream, seed).texts]
    counts = np.array([drawn.count(text) for text in TEXTS[:40]])
    assert counts.sum() == 10_000
    deviations = (counts - 250) / np.sqrt(1_000 * 0.25 * 0.75)
    assert np.abs(deviations).max() < 4
    assert 0.5 < deviations.var() < 1.6


def test_the_number_of_distinct_texts_is_estimated(small: int) -> None:
    found = np.array([sample_distinct(TEXTS, seed).n_distinct for seed in range(100)])
    assert found.mean() == pytest.approx(2_000, rel=0.04)
    assert found.std() == pytest.approx(2_000 / np.sqrt(small), rel=0.25)


def test_the_digest_tells_texts_apart() -> None:
    corpora = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", "c"]]
    assert len({sample_distinct(texts).digest for texts in corpora}) == len(corpora)
    assert sample_distinct(["a", "\ud800"]).texts == ["a", "\ud800"], "half a character is a text as well"


def test_memory_does_not_grow_with_the_stream(small: int) -> None:
    peaks = []
    for count in (2_000, 50_000):
        tracemalloc.start()
        sample_distinct(str(i) for i in range(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], peaks
