"""Trust: which clusters repeat on other sentences, cluster by cluster and for a whole corpus."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from blobs import N_BLOBS, TIGHT, TRUE_IDS, blobs, directions

from st_clusterns.clustering import trust as module
from st_clusterns.clustering.kmeans import kmeans, nearest
from st_clusterns.clustering.trust import cluster_trust, mean_trust
from st_clusterns.clustering.vectors import unit_rows

# One cluster


def test_trust_tells_a_blob_from_a_cloud_in_one_corpus() -> None:
    rng = np.random.default_rng(0)
    blob = np.eye(1, 16) * 10 + 0.1 * rng.normal(size=(200, 16))
    cloud = directions(200) - np.eye(1, 16) * 2
    rows = unit_rows(np.concatenate([blob, cloud]))
    ids = np.r_[np.zeros(200, dtype=np.int64), rng.integers(1, 5, size=200)]  # the cloud's clusters are mere chance
    trust = cluster_trust(rows, ids, 5)
    assert trust[0] > 0.8
    assert trust[1:].max() < 0.3


def both_ways(halves: tuple[np.ndarray, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    yield halves
    yield halves[::-1]


class Pairs:
    """Pairs of rows of one cluster, counted one by one."""

    def __init__(self) -> None:
        self.all = self.together = self.expected = 0.0

    def add(self, own: list[int], others: list[int], cluster: int) -> None:
        chance = sum(one == other for one in others for other in others) / len(others) ** 2
        for i, j in itertools.permutations(range(len(own)), 2):
            if own[i] == own[j] == cluster:
                self.all += 1
                self.together += others[i] == others[j]
                self.expected += chance

    @property
    def trust(self) -> float:
        return max(0.0, (self.together - self.expected) / (self.all - self.expected)) if self.all else 0.0


@pytest.mark.parametrize("noise", [0.1, 0.3, 3.0])
def test_trust_is_its_definition_pair_by_pair(noise: float) -> None:
    """Of the pairs of a cluster, the share that the other half's clustering keeps together, beyond chance."""
    rows, ids = blobs(noise, n_rows=60, n_blobs=4)
    rows = unit_rows(rows)
    counts = [Pairs() for _ in range(4)]
    [halves] = module._halves(60, 2, 1)
    for judged, judge in both_ways(halves):
        others = nearest(rows[judged], kmeans(rows[judge], 4, 2)).tolist()
        for cluster in range(4):
            counts[cluster].add(ids[judged].tolist(), others, cluster)
    expected = [pairs.trust for pairs in counts]
    np.testing.assert_allclose(cluster_trust(rows, ids, 4, seed=2), expected, atol=1e-6)
    assert (max(expected) > 0.3) == (noise < 1), "levels of noise that show different trust"


def test_trust_of_a_random_partition_is_zero() -> None:
    """Not one quarter, which is the share of its pairs that stay together by chance."""
    rows, _ = blobs(noise=0.05, n_blobs=4)
    ids = np.random.default_rng(1).integers(4, size=len(rows))
    assert cluster_trust(unit_rows(rows), ids, 4).max() < 0.05


def test_trust_of_an_empty_cluster_is_zero() -> None:
    assert cluster_trust(unit_rows(TIGHT), TRUE_IDS, N_BLOBS + 1)[-1] == 0


# All clusters of a number K


@pytest.mark.parametrize("n_clusters", [2, 4, 9])
@pytest.mark.parametrize("noise", [0.1, 0.3, 3.0])
def test_mean_trust_is_its_definition_pair_by_pair(noise: float, n_clusters: int) -> None:
    """The mean over sentences of the trust of their cluster, over both halves of two splits, each clustered alone."""
    rows = unit_rows(blobs(noise, n_rows=50, n_blobs=4)[0])
    means = []
    for halves in module._halves(50, 3, 2):
        for half, judge in both_ways(halves):
            own = nearest(rows[half], kmeans(rows[half], n_clusters, 3)).tolist()
            others = nearest(rows[half], kmeans(rows[judge], n_clusters, 3)).tolist()
            trust = 0.0
            for row in range(len(half)):
                pairs = Pairs()
                pairs.add(own, others, own[row])
                trust += pairs.trust
            means.append(trust / len(half))
    assert len(means) == 4
    assert mean_trust(rows, n_clusters, seed=3) == pytest.approx(np.mean(means), abs=1e-6)


def test_halves_are_two_and_share_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    [first, second] = module._halves(101, 0, 2)
    for halves in (first, second):
        assert sorted(np.concatenate(halves)) == list(range(101))
        assert [len(half) for half in halves] == [50, 51]
    assert set(first[0]) != set(second[0])
    monkeypatch.setattr(module, "TRUST_ROWS", 40)
    [(few, others)] = module._halves(101, 0, 1)
    assert (len(few), len(others), len({*few, *others})) == (20, 20, 40)


def test_trust_of_random_directions_is_low_at_every_number() -> None:
    rows = unit_rows(directions(400))
    assert max(mean_trust(rows, k) for k in (2, 3, 5, 8, 20, 50, 100, 199, 200)) < 0.25


def test_as_many_clusters_as_rows_show_no_trust() -> None:
    """A cluster of one row holds no pair that could stay together."""
    assert mean_trust(unit_rows(TIGHT[:40]), 40) == 0
