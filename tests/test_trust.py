"""Trust: what clusters repeat on other sentences, cluster by cluster and for a whole corpus."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from blobs import N_BLOBS, TIGHT, TRUE_IDS, blobs, directions

from st_clusterns import trust as module
from st_clusterns.kmeans import kmeans, nearest
from st_clusterns.rows import unit_rows
from st_clusterns.trust import cluster_trust, mean_trust, most_repeatable_clusters, scale_for_few


def test_trust_tells_a_blob_from_a_cloud_in_one_corpus() -> None:
    rng = np.random.default_rng(0)
    blob = np.eye(1, 16) * 10 + 0.1 * rng.normal(size=(200, 16))
    cloud = directions(200) - np.eye(1, 16) * 2
    rows = unit_rows(np.concatenate([blob, cloud]))
    ids = np.r_[np.zeros(200, dtype=np.int64), rng.integers(1, 5, size=200)]  # the cloud's clusters are mere chance
    trust = cluster_trust(rows, ids, 5)
    assert trust[0] > 0.8
    assert trust[1:].max() < 0.3


def trust_pair_by_pair(rows: np.ndarray, ids: np.ndarray, n_clusters: int, seed: int) -> list[float]:
    together, expected, pairs = (dict.fromkeys(range(n_clusters), 0.0) for _ in range(3))
    for judged, judges in module._halves(len(rows), seed, 2):
        others = nearest(rows[judged], kmeans(rows[judges], n_clusters, seed)).tolist()
        chance = sum(one == other for one in others for other in others) / len(others) ** 2
        for i, j in itertools.permutations(range(len(judged)), 2):
            if ids[judged[i]] == ids[judged[j]]:
                cluster = ids[judged[i]]
                pairs[cluster] += 1
                together[cluster] += others[i] == others[j]
                expected[cluster] += chance
    return [max(0.0, (together[k] - expected[k]) / (pairs[k] - expected[k])) for k in range(n_clusters)]


@pytest.mark.parametrize("noise", [0.1, 0.3, 3.0])
def test_trust_is_its_definition_pair_by_pair(noise: float) -> None:
    """Of the pairs of a cluster, the share that the other half's clustering keeps together, beyond chance."""
    rows, ids = blobs(noise, n_rows=60, n_blobs=4)
    actual = cluster_trust(unit_rows(rows), ids, 4, seed=2)
    np.testing.assert_allclose(actual, trust_pair_by_pair(unit_rows(rows), ids, 4, seed=2), atol=1e-6)


def test_trust_of_a_random_partition_is_zero() -> None:
    """Not one quarter, which is the share of its pairs that stay together by chance."""
    rows, _ = blobs(noise=0.05, n_blobs=4)
    ids = np.random.default_rng(1).integers(4, size=len(rows))
    assert cluster_trust(unit_rows(rows), ids, 4).max() < 0.05


def test_trust_of_an_empty_cluster_is_zero() -> None:
    assert cluster_trust(unit_rows(TIGHT), TRUE_IDS, N_BLOBS + 1)[-1] == 0


# How many clusters


def test_blobs_repeat_and_random_directions_do_not() -> None:
    assert most_repeatable_clusters(unit_rows(directions())) is None
    many = most_repeatable_clusters(unit_rows(blobs(0.05, n_blobs=48, n_rows=1920)[0]))
    few = most_repeatable_clusters(unit_rows(blobs(0.2, n_blobs=16, n_rows=8000)[0]))
    assert many >= 48 > few


@pytest.mark.parametrize("n_rows", [40, 200, 1000])
def test_few_random_directions_do_not_repeat_either(n_rows: int) -> None:
    assert all(most_repeatable_clusters(unit_rows(directions(n_rows, seed)), seed) is None for seed in range(3))


def test_the_same_topics_are_found_in_few_rows_as_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows show less trust, which is no reason to take their topics for none."""
    rows = unit_rows(blobs(noise=0.31, n_blobs=24, n_rows=8000)[0])
    few = rows[np.random.default_rng(0).permutation(len(rows))[:1000]]
    assert most_repeatable_clusters(rows) is not None
    assert most_repeatable_clusters(few) is not None
    monkeypatch.setattr(module, "MANY_ROWS", 1000)
    assert most_repeatable_clusters(few) is None, "these rows would be trusted in any case"


def test_few_rows_are_clustered_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean trust over clusterings that differ in their seed: each seen once, and all count."""
    seeds: list[int] = []

    def watched(rows: np.ndarray, ids: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
        seeds.append(seed)
        return np.full(n_clusters, float(seed))

    monkeypatch.setattr(module, "cluster_trust", watched)
    means = [mean_trust(unit_rows(directions(n_rows)), 4, 7) for n_rows in (100, 2500, 8000)]
    assert seeds == [7, 8, 9, 10, 11, 7, 8, 9, 7]
    assert means == [9, 8, 7]


def test_less_trust_is_asked_of_few_rows_only() -> None:
    asked = [scale_for_few(n) for n in (4, 800, 2530, 8000, 10_000)]
    np.testing.assert_allclose(asked, [2 / 3, 2 / 3, 0.8, 1, 1], atol=1e-4)


def test_clusters_that_repeat_weakly_do_not_count_as_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = unit_rows(blobs(0.25, n_blobs=8, n_rows=8000)[0])
    assert most_repeatable_clusters(rows) is None
    monkeypatch.setattr(module, "TOPICAL", 0.0)
    assert most_repeatable_clusters(rows) is not None
