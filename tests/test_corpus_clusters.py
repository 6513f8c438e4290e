"""Clustering a corpus: what is there is found, and what is not there is not trusted."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blobs import LOOSE, N_BLOBS, TIGHT, TRUE_IDS, directions
from sklearn.metrics import adjusted_rand_score
from torch import nn

from st_clusterns import Clusters
from st_clusterns import corpus as module
from st_clusterns import kmeans as kmeans_module
from st_clusterns import rows as rows_module
from st_clusterns.corpus import CorpusClusters, cluster_corpus, follow_corpus, recall_corpus, remember_corpus
from st_clusterns.embeddings import embed_corpus
from st_clusterns.kmeans import cluster_means, nearest
from st_clusterns.rows import open_rows, unit_rows
from st_clusterns.trust import most_repeatable_clusters


@pytest.fixture(scope="module")
def tight() -> CorpusClusters:
    return cluster_corpus(TIGHT, N_BLOBS)


def assert_equal(one: CorpusClusters, other: CorpusClusters) -> None:
    for name in ("ids", "centroids", "trust"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


# What is found


def test_blobs_are_found_and_trusted(tight: CorpusClusters) -> None:
    assert adjusted_rand_score(TRUE_IDS, tight.ids) > 0.99
    assert tight.trust.min() > 0.8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_clusters", [None, 8, 16])
def test_random_directions_are_not_trusted(n_clusters: int | None, seed: int) -> None:
    clusters = cluster_corpus(directions(seed=seed), n_clusters)
    assert not clusters.trust.any()
    assert len(set(clusters.ids)) == clusters.n_clusters


def test_overlapping_blobs_are_trusted_in_part(tight: CorpusClusters) -> None:
    loose = cluster_corpus(LOOSE, N_BLOBS)
    assert 0.3 < loose.trust.mean() < 0.9
    assert loose.trust.mean() < tight.trust.mean()
    assert loose.trust.std() > 0.02, "trust is measured cluster by cluster"


def test_fields_have_their_shapes_and_meanings(tight: CorpusClusters) -> None:
    assert (tight.ids.shape, tight.ids.dtype) == ((800,), np.int64)
    assert (tight.centroids.shape, tight.centroids.dtype) == ((N_BLOBS, 16), np.float32)
    assert (tight.trust.shape, tight.trust.dtype) == ((N_BLOBS,), np.float32)
    assert tight.n_clusters == N_BLOBS
    assert tight.sizes.tolist() == [(tight.ids == k).sum() for k in range(N_BLOBS)]
    assert tight.trust.min() >= 0
    assert tight.trust.max() <= 1


@pytest.mark.parametrize("rows", [TIGHT, LOOSE, directions()], ids=["tight", "loose", "none"])
def test_centroids_are_the_means_of_unit_vectors_and_mostly_the_nearest(rows: np.ndarray) -> None:
    clusters = cluster_corpus(rows, N_BLOBS, topic_layer=False)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for k in range(N_BLOBS):
        np.testing.assert_allclose(clusters.centroids[k], unit[clusters.ids == k].mean(axis=0), atol=1e-5)
    assert (nearest(unit_rows(rows), clusters.centroids) == clusters.ids).mean() > 0.95


def test_tensors_are_what_seeding_clusters_takes(tight: CorpusClusters) -> None:
    """And copies: the corpus does not follow the training."""
    clusters = Clusters(N_BLOBS, 16)
    clusters.seed(**tight.tensors())
    for name in ("centroids", "trust"):
        np.testing.assert_array_equal(getattr(clusters, name), getattr(tight, name), err_msg=name)
    tight.tensors()["centroids"].zero_()
    assert tight.centroids.any()


def test_nearest_is_the_highest_cosine_also_across_blocks() -> None:
    centroids = unit_rows(directions(5)) * np.logspace(-2, 2, 5)[:, None].astype(np.float32)
    rows = np.tile(unit_rows(directions(500)), (40, 1))  # 20,000 rows, more than one block
    cosine = rows[:500] @ (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).T
    np.testing.assert_array_equal(nearest(rows, centroids), np.tile(cosine.argmax(axis=1), 40))


# How many clusters


def test_without_a_number_the_most_repeatable_is_taken() -> None:
    assert cluster_corpus(TIGHT).n_clusters == most_repeatable_clusters(unit_rows(TIGHT))


@pytest.mark.parametrize(("n_rows", "expected"), [(4, 2), (60, 3), (320, 16), (800, 32)])
def test_a_corpus_of_any_size_gets_clusters(n_rows: int, expected: int) -> None:
    """Where nothing repeats, the finest of the grid with 20 sentences a cluster, or as near as can be."""
    assert cluster_corpus(directions(n_rows)).n_clusters == expected
    assert cluster_corpus(directions(n_rows), 2).n_clusters == 2


# The same every time


def test_the_seed_decides_everything() -> None:
    one, same, other = (cluster_corpus(LOOSE, N_BLOBS, seed=seed) for seed in (3, 3, 4))
    assert_equal(one, same)
    assert not np.array_equal(one.ids, other.ids)


def test_the_global_random_state_is_neither_read_nor_advanced() -> None:
    one = cluster_corpus(LOOSE, N_BLOBS)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    assert_equal(one, cluster_corpus(LOOSE, N_BLOBS))
    np.testing.assert_array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_input_is_not_changed(dtype: Any) -> None:
    rows = TIGHT.astype(dtype)
    before = rows.copy()
    cluster_corpus(rows, N_BLOBS)
    np.testing.assert_array_equal(rows, before)


# Large corpora take another way: on a sample, in blocks


@pytest.fixture(params=["faiss", "scikit-learn"])
def _large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (rows_module, kmeans_module):
        monkeypatch.setattr(part, "LARGE", 100)
        monkeypatch.setattr(part, "BLOCK", 77)
    monkeypatch.setattr(module, "LARGE", 100)
    if request.param == "faiss":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)


@pytest.mark.usefixtures("_large")
def test_a_large_corpus_is_clustered_as_a_small_one(tight: CorpusClusters) -> None:
    clusters = cluster_corpus(TIGHT, N_BLOBS, topic_layer=False)
    assert adjusted_rand_score(tight.ids, clusters.ids) > 0.9
    assert clusters.trust.mean() > 0.8
    unit = unit_rows(TIGHT)
    for k, centroid in enumerate(clusters.centroids):
        np.testing.assert_allclose(centroid, unit[clusters.ids == k].mean(axis=0), atol=1e-5)
    assert_equal(clusters, cluster_corpus(TIGHT, N_BLOBS, topic_layer=False))
    np.testing.assert_array_equal(follow_corpus(TIGHT, clusters).ids, clusters.ids)


@pytest.mark.usefixtures("_large")
def test_a_memory_mapped_half_precision_file_is_the_same_corpus(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", TIGHT.astype(np.float16))
    in_memory = cluster_corpus(np.load(tmp_path / "rows.npy"), N_BLOBS)
    assert_equal(in_memory, cluster_corpus(np.load(tmp_path / "rows.npy", mmap_mode="r"), N_BLOBS))
    assert adjusted_rand_score(in_memory.ids, cluster_corpus(TIGHT, N_BLOBS).ids) > 0.9


@pytest.mark.usefixtures("_large")
def test_a_large_corpus_is_never_copied_as_a_whole() -> None:
    rows = np.random.default_rng(0).normal(size=(200_000, 64)).astype(np.float16)
    tracemalloc.start()
    clusters = nearest(open_rows(rows), np.eye(4, 64, dtype=np.float32))
    cluster_means(open_rows(rows), clusters, np.eye(4, 64, dtype=np.float32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_row_of_a_large_corpus_is_named(value: float) -> None:
    rows = TIGHT.astype(np.float16)
    rows[101, 1] = value
    with pytest.raises(ValueError, match="NaN or Inf in row 101"):
        cluster_corpus(rows, N_BLOBS)


@pytest.mark.usefixtures("_large")
def test_a_large_corpus_of_equal_rows_has_one_cluster_that_counts() -> None:
    clusters = cluster_corpus(np.ones((300, 4)), 3)
    assert (clusters.ids == clusters.ids[0]).all()


def test_means_are_sums_in_the_order_of_the_rows() -> None:
    """To the last bit: results published with earlier versions stay reproducible."""
    rows, ids = unit_rows(LOOSE), np.random.default_rng(0).integers(7, size=len(LOOSE))
    sums = np.zeros((7, rows.shape[1]), dtype=np.float32)
    np.add.at(sums, ids, rows)
    expected = (sums / np.bincount(ids)[:, None]).astype(np.float32)
    np.testing.assert_array_equal(cluster_means(rows, ids, sums), expected)


# Going on from previous clusters


def test_following_the_same_embeddings_changes_nothing(tight: CorpusClusters) -> None:
    before = cluster_corpus(TIGHT, N_BLOBS, topic_layer=False)
    after = follow_corpus(TIGHT, before)
    np.testing.assert_array_equal(after.ids, before.ids)
    np.testing.assert_allclose(after.centroids, before.centroids, atol=1e-6)


@pytest.mark.parametrize("rows", [TIGHT, LOOSE], ids=["tight", "loose"])
def test_following_slightly_changed_embeddings_keeps_the_numbering(rows: np.ndarray) -> None:
    clusters = cluster_corpus(rows, N_BLOBS)
    nudged = unit_rows(rows) + 0.01 * np.random.default_rng(5).normal(size=rows.shape)
    assert (follow_corpus(nudged, clusters).ids == clusters.ids).mean() > 0.95


def test_clusters_made_anew_do_not_keep_it(tight: CorpusClusters) -> None:
    """A canary: the numbering comes from the previous clusters, not from the data."""
    assert (cluster_corpus(TIGHT, N_BLOBS, seed=1).ids == tight.ids).mean() < 0.5


def test_following_a_rotation_keeps_the_numbering(tight: CorpusClusters) -> None:
    """It goes on from the members, not from where the centroids lay before."""
    rotation, _ = np.linalg.qr(directions(16))
    np.testing.assert_array_equal(follow_corpus(TIGHT @ rotation, tight).ids, tight.ids)


def test_following_measures_trust_anew_but_never_trusts_the_untrusted(tight: CorpusClusters) -> None:
    assert follow_corpus(LOOSE, tight).trust.mean() < 0.9
    untrusted = cluster_corpus(directions(), N_BLOBS)
    assert not follow_corpus(TIGHT, untrusted).trust.any()


# What is refused


def with_nan(row: int) -> np.ndarray:
    rows = directions(20)
    rows[row, 3] = np.nan
    return rows


@pytest.mark.parametrize(
    ("rows", "n_clusters", "message"),
    [
        (directions(3), 2, r"4 rows or more, got the shape \(3, 16\)"),
        (directions(20)[0], 2, r"matrix of 4 rows or more, got the shape \(16,\)"),
        (with_nan(7), 2, r"NaN or Inf in row 7 \(1 of 20 rows\)"),
        (np.where(directions(20) > 2, np.inf, 0), 2, "NaN or Inf in row"),
        (directions(20), 1, "n_clusters=1 does not fit 20 sentences"),
        (directions(20), 0, "n_clusters=0 does not fit 20 sentences"),
    ],
)
def test_what_is_refused(rows: np.ndarray, n_clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_corpus(rows, n_clusters)


def test_following_refuses_nan(tight: CorpusClusters) -> None:
    rows = TIGHT.copy()
    rows[11] = np.nan
    with pytest.raises(ValueError, match="NaN or Inf in row 11"):
        follow_corpus(rows, tight)


# The model's corpus


class Encoder:
    """Records how it is called."""

    device = torch.device("cpu")

    def encode(self, sentences: list[str], **settings: Any) -> np.ndarray:
        self.sentences, self.settings = sentences, settings
        return np.ones((len(sentences), 3))


def test_embed_corpus_keeps_the_order_and_asks_for_unit_vectors() -> None:
    model = Encoder()
    rows = embed_corpus(("b", "a"), model, batch_size=7, show_progress_bar=False)
    assert model.sentences == ["b", "a"]
    assert model.settings["normalize_embeddings"] is True
    assert (model.settings["batch_size"], model.settings["show_progress_bar"]) == (7, False)
    assert rows.dtype == np.float32


class Wrapper(nn.Module):
    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        setattr(self, name, model)


def test_a_model_remembers_its_last_corpus_also_when_wrapped(tight: CorpusClusters) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert recall_corpus(model) is None
    remember_corpus(model, cluster_corpus(LOOSE, 4))
    remember_corpus(model, tight)
    assert recall_corpus(model) is tight
    assert recall_corpus(Wrapper("_orig_mod", Wrapper("module", model))) is tight
    assert recall_corpus(other) is None


def test_a_forgotten_model_takes_its_corpus_along(tight: CorpusClusters) -> None:
    model = nn.Linear(2, 2)
    remember_corpus(model, tight)
    held = len(module._CORPUS_OF_MODEL)
    del model
    gc.collect()
    assert len(module._CORPUS_OF_MODEL) < held


def test_a_corpus_is_recalled_while_no_other_is_read(tight: CorpusClusters) -> None:
    class Reader: ...

    model, first, second = nn.Linear(2, 2), Reader(), Reader()
    remember_corpus(model, tight, first)
    other = cluster_corpus(LOOSE, 4)
    remember_corpus(model, other, second)
    with pytest.raises(ValueError, match="2 data loaders have clustered a corpus for this model"):
        recall_corpus(model)
    del second
    assert recall_corpus(model) is tight
    del first
    assert recall_corpus(model) is other, "the last one noted"


@pytest.mark.parametrize("rows", [TIGHT[:-1], TIGHT[:, :-1]], ids=["a row less", "a dimension less"])
def test_following_refuses_embeddings_of_another_corpus_or_model(tight: CorpusClusters, rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"shape \(\d+, \d+\), but the clusters are of 800 sentences in \d+ dimension"):
        follow_corpus(rows, tight)
