"""How many clusters a corpus has, and whether it has topics."""

from __future__ import annotations

import numpy as np
import pytest
from blobs import blobs
from test_trust import directions

from st_clusterns.clustering import n_clusters as module
from st_clusterns.clustering.n_clusters import N_CLUSTERS, choose_n_clusters, trust_bound
from st_clusterns.clustering.trust import mean_trust
from st_clusterns.clustering.vectors import unit_rows


def test_blobs_repeat_and_random_directions_do_not() -> None:
    blob = choose_n_clusters(unit_rows(blobs(0.05, n_blobs=48, n_rows=1920)[0]))
    cloud = choose_n_clusters(unit_rows(directions(1920)))
    assert (blob.has_topics, cloud.has_topics) == (True, False)
    assert blob.n_clusters >= 48
    assert blob.curve[48] > 0.9


def test_much_finer_clusters_than_there_are_are_not_taken() -> None:
    count = choose_n_clusters(unit_rows(blobs(0.05, n_blobs=16, n_rows=8000)[0]))
    assert count.has_topics
    assert 16 <= count.n_clusters < max(count.curve)


@pytest.mark.parametrize("n_rows", [40, 200, 1000])
def test_few_random_directions_do_not_repeat_either(n_rows: int) -> None:
    assert not any(choose_n_clusters(unit_rows(directions(n_rows, seed)), seed).has_topics for seed in range(3))


@pytest.mark.parametrize("noise", [0.05, 0.2, 3.0])
def test_the_curve_holds_what_decided(noise: float) -> None:
    rows = unit_rows(blobs(noise)[0])
    count = choose_n_clusters(rows, 5)
    assert count.curve == {k: mean_trust(rows, k, 5) for k in count.curve}
    assert count.bound == trust_bound(len(rows))
    highest = max(count.curve.values())
    assert count.has_topics == (highest >= count.bound) == (noise < 1)
    assert count.n_clusters == sorted(k for k, trust in count.curve.items() if trust >= 0.7 * highest)[-1]


@pytest.mark.parametrize(
    ("curve", "n_clusters", "has_topics", "tried"),
    [
        ([0.9] * 9, 256, True, 9),
        ([0.5] + [0.34] * 8, 16, True, 4),
        ([0.5] + [0.36] * 8, 256, True, 9),
        ([0.1, 0.2, 0.3, 0.4, 0.6] + [0.4] * 4, 64, True, 8),  # coarse clusters may well repeat less than fine ones
        ([0.6, 0.4, 0.4, 0.6, 0.4, 0.4, 0.4, 0.9, 0.9], 48, True, 7),  # three in a row below end it
        ([0.1, 0.2, 0.4, 0.3] + [0.1] * 5, 48, False, 9),
        ([0.0] * 9, 256, False, 9),
    ],
)
def test_the_largest_number_with_nearly_the_highest_trust_is_taken(
    curve: list[float], n_clusters: int, has_topics: bool, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = dict(zip(N_CLUSTERS, curve, strict=True))
    monkeypatch.setattr(module, "mean_trust", lambda rows, k, seed: known[k])
    count = choose_n_clusters(np.zeros((10_000, 2), np.float32))
    assert (count.n_clusters, count.has_topics, count.bound) == (n_clusters, has_topics, 0.5)
    assert count.curve == dict(list(known.items())[:tried])


@pytest.mark.parametrize(
    ("n_rows", "tried"), [(4, [2]), (60, [3]), (319, [15]), (320, [16]), (480, [16, 24]), (5119, list(N_CLUSTERS[:-1]))]
)
def test_numbers_are_tried_that_leave_twenty_sentences_a_cluster(
    n_rows: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "mean_trust", lambda *_: 0.0)
    assert list(choose_n_clusters(np.zeros((n_rows, 2), np.float32)).curve) == tried


def test_less_trust_is_asked_of_few_rows_only() -> None:
    asked = [trust_bound(n_rows) for n_rows in (4, 700, 2214, 7000, 10_000, 1_000_000)]
    np.testing.assert_allclose(asked, [0.25, 0.25, 0.375, 0.5, 0.5, 0.5], atol=1e-4)
    assert trust_bound(2000) < trust_bound(5000) < trust_bound(6999) < 0.5


def test_the_same_topics_are_found_in_few_rows_as_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows show less trust, which is no reason to take their topics for none."""
    rows = unit_rows(blobs(noise=0.28, n_blobs=24, n_rows=6000)[0])
    few = rows[:1000]
    assert choose_n_clusters(rows).has_topics
    assert choose_n_clusters(few).has_topics
    assert max(choose_n_clusters(few).curve.values()) < 0.5
    monkeypatch.setattr(module, "MANY_ROWS", 1000)
    assert not choose_n_clusters(few).has_topics, "a canary: these rows would not be trusted by the bound of many"


@pytest.mark.parametrize("n_rows", [0, 1, 3])
def test_too_few_rows_are_refused_as_unit_vectors_too(n_rows: int) -> None:
    with pytest.raises(ValueError, match="embeddings must be a matrix of 4 rows or more"):
        choose_n_clusters(np.eye(4, dtype=np.float32)[:n_rows])
