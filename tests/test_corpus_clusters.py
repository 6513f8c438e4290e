"""Clustering a corpus: what is there is found, and what is not there is not trusted."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blobs import LOOSE, N_BLOBS, TIGHT, TRUE_IDS, blobs, directions
from sentence_transformers import SentenceTransformer
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from tiny_bert import load_model, make_sentences
from torch import nn

from st_clusterns import CorpusClusters, embed_corpus
from st_clusterns.clustering import corpus_clusters, sample
from st_clusterns.clustering import kmeans as kmeans_module
from st_clusterns.clustering.kmeans import cluster_means, nearest
from st_clusterns.clustering.n_clusters import N_CLUSTERS, choose_n_clusters, trust_bound
from st_clusterns.clustering.trust import mean_trust
from st_clusterns.clustering.vectors import unit_rows
from st_clusterns.models import reading_at_most


def texts(count: int) -> list[str]:
    """Sentences without a common word, which are clustered by their embeddings alone."""
    return [f"unique{i}" for i in range(count)]


def fit(rows: np.ndarray, n_clusters: int | None = None, seed: int = 0) -> CorpusClusters:
    return CorpusClusters.fit(texts(len(rows)), None, n_clusters, seed, embeddings=rows)


@pytest.fixture(scope="module")
def tight() -> CorpusClusters:
    return fit(TIGHT, N_BLOBS)


def assert_equal(one: CorpusClusters, other: CorpusClusters) -> None:
    for name in ("sentences", "embeddings", "ids", "centroids", "trust"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for name in ("has_topics", "curve", "verdict", "fingerprint"):
        assert getattr(one, name) == getattr(other, name)


# What is found


def inertia(rows: np.ndarray, ids: np.ndarray) -> float:
    means = np.stack([rows[ids == own].mean(axis=0) for own in ids])
    return float(((rows - means) ** 2).sum())


@pytest.mark.parametrize(("n_clusters", "runs"), [(32, 10), (33, 1), (None, 1)])
def test_many_clusters_and_those_that_are_chosen_take_one_run(
    n_clusters: int | None, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def spy(rows: np.ndarray, count: int, seed: int, n_init: int = 1) -> np.ndarray:
        seen.append(n_init)
        return kmeans_module.kmeans(rows, count, seed, n_init)

    monkeypatch.setattr(corpus_clusters, "kmeans", spy)
    assert fit(TIGHT, n_clusters).n_clusters == n_clusters or n_clusters is None
    assert seen == [runs]


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_few_clusters_that_are_asked_for_are_the_best_of_several_runs(seed: int) -> None:
    """16 blobs in 4 clusters have many solutions."""
    rows = unit_rows(LOOSE)
    least = KMeans(4, n_init=30, random_state=7).fit(rows).inertia_
    assert inertia(rows, fit(LOOSE, 4, seed).ids) < 1.002 * least
    assert inertia(rows, nearest(rows, kmeans_module.kmeans(rows, 4, seed))) > 1.004 * least, "a canary: by one run"


@pytest.mark.parametrize("n_clusters", [None, N_BLOBS])
def test_blobs_are_found_and_trusted(n_clusters: int | None) -> None:
    clusters = fit(TIGHT, n_clusters)
    assert clusters.has_topics
    assert clusters.trusted.mean() > 0.9
    assert adjusted_rand_score(TRUE_IDS, clusters.ids) > (0.99 if n_clusters else 0.5)
    same = clusters.ids[:, None] == clusters.ids
    assert (TRUE_IDS[:, None] == TRUE_IDS)[same].mean() > 0.99, "no cluster holds two blobs"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_clusters", [None, 2, 3, 8, 16, 100, 400])
def test_noise_has_no_topics_at_any_number_of_clusters(n_clusters: int | None, seed: int) -> None:
    clusters = fit(directions(seed=seed), n_clusters, seed)
    assert not clusters.has_topics
    assert not clusters.trusted.any()
    assert "no topics were found, so training is plain in-batch contrastive learning" in clusters.verdict
    told = f"highest mean trust {max(clusters.curve.values()):.2f} ({trust_bound(len(clusters.sentences)):.2f} is asked"
    assert told in clusters.verdict, "the numbers that decided"
    assert told in clusters.sample(5).verdict, "of the whole corpus, in a report on a part of it"
    assert len(clusters.trust) == clusters.n_clusters == (n_clusters or clusters.n_clusters)


def test_a_trusted_cluster_of_noise_is_not_used() -> None:
    """One cluster may repeat by chance; the verdict on the corpus goes first."""
    noise = replace(fit(directions(), 8), trust=np.ones(8, np.float32))
    assert not noise.trusted.any()
    assert replace(noise, has_topics=True).trusted.all()


def test_overlapping_blobs_are_trusted_in_part(tight: CorpusClusters) -> None:
    loose = fit(LOOSE, N_BLOBS)
    assert 0.3 < loose.mean_trust < 0.9 < tight.mean_trust
    assert loose.trust.std() > 0.02, "trust is measured cluster by cluster"


def test_only_clusters_with_enough_trust_are_used(tight: CorpusClusters) -> None:
    some = replace(tight, trust=np.linspace(0, 1, N_BLOBS, dtype=np.float32))
    np.testing.assert_array_equal(some.trusted, some.trust >= 0.2)
    share = sum(some.trust[cluster] >= 0.2 for cluster in some.ids) / 800
    assert f"{share:.0%} of the sentences are in trusted clusters" in some.verdict


def test_fields_have_their_shapes_and_meanings(tight: CorpusClusters) -> None:
    assert (tight.ids.shape, tight.ids.dtype) == ((800,), np.int64)
    assert (tight.centroids.shape, tight.centroids.dtype) == ((N_BLOBS, 16), np.float32)
    assert (tight.trust.shape, tight.trust.dtype) == ((N_BLOBS,), np.float32)
    assert tight.n_clusters == N_BLOBS
    assert tight.sizes.tolist() == [(tight.ids == k).sum() for k in range(N_BLOBS)]
    assert tight.trust.min() >= 0
    assert tight.trust.max() <= 1
    assert tight.mean_trust == pytest.approx(np.mean([tight.trust[cluster] for cluster in tight.ids]))
    np.testing.assert_array_equal(tight.embeddings, unit_rows(TIGHT))
    assert tight.sentences == texts(800)


def test_a_sample_of_the_sentences_keeps_their_clusters(tight: CorpusClusters) -> None:
    """In a corpus that is sorted by topic, the first sentences would show the first topics alone."""
    part = tight.sample(100, seed=1)
    places = [tight.sentences.index(text) for text in part.sentences]
    assert len(set(places)) == 100
    assert places == sorted(places)
    assert min(np.bincount(np.array(places) // 100, minlength=8)) > 3, "from all over the corpus"
    np.testing.assert_array_equal(part.ids, tight.ids[places])
    np.testing.assert_array_equal(part.embeddings, tight.embeddings[places])
    assert part.centroids is tight.centroids
    assert tight.sample(100, seed=1).sentences == part.sentences != tight.sample(100).sentences
    assert tight.sample(800) is tight


@pytest.mark.parametrize("rows", [TIGHT, LOOSE, directions()], ids=["tight", "loose", "none"])
def test_centroids_are_the_means_of_unit_vectors_and_mostly_the_nearest(rows: np.ndarray) -> None:
    clusters = fit(rows, N_BLOBS)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for k in range(N_BLOBS):
        np.testing.assert_allclose(clusters.centroids[k], unit[clusters.ids == k].mean(axis=0), atol=1e-5)
    assert (clusters.predict(100 * rows) == clusters.ids).mean() > 0.95


def test_texts_that_are_longer_than_what_is_read_are_told(
    model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    """Their share, by words; within the maximum length there is nothing to tell."""
    short, long = make_sentences(40, lengths=(4, 6)), make_sentences(10, lengths=(9, 12))
    told = "At least 20% of the sentences are longer than the 6 tokens that are read of each: see max_length"
    for length, texts in ((6, short), (14, short + long), (6, short + long)):
        caplog.clear()
        with caplog.at_level("INFO"), reading_at_most(model, length):
            CorpusClusters.fit(texts, model, show_progress_bar=False)
        assert (told in caplog.text) == ("are longer than" in caplog.text) == (length == 6 and texts is not short)


def test_the_verdict_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        clusters = fit(TIGHT, 8)
    assert clusters.verdict in caplog.messages
    assert clusters.verdict.startswith(f"800 sentences in 8 clusters, mean trust {clusters.mean_trust:.2f}: ")


# How many clusters


@pytest.mark.parametrize("rows", [TIGHT, directions()], ids=["tight", "none"])
def test_without_a_number_trust_chooses_it(rows: np.ndarray) -> None:
    clusters, count = fit(rows, seed=3), choose_n_clusters(unit_rows(rows), 3)
    assert (clusters.n_clusters, clusters.has_topics) == (count.n_clusters, count.has_topics)
    assert clusters.curve == count.curve
    assert len(count.curve) > 1


def hundred() -> tuple[np.ndarray, np.ndarray]:
    """100 clusters of 40 sentences, far apart."""
    rng = np.random.default_rng(0)
    ids = np.arange(4000) % 100
    return rng.normal(size=(100, 32))[ids] + 0.1 * rng.normal(size=(4000, 32)), ids


def test_a_hundred_clusters_are_recognised_without_being_told() -> None:
    rows, ids = hundred()
    clusters = fit(rows)
    assert clusters.has_topics
    assert clusters.n_clusters >= 96
    assert clusters.trusted.mean() > 0.9
    same = clusters.ids[:2000, None] == clusters.ids[:2000]
    assert (ids[:2000, None] == ids[:2000])[same].mean() > 0.95


def test_a_hundred_clusters_are_judged_at_a_hundred() -> None:
    rows, ids = hundred()
    clusters = fit(rows, 100)
    assert clusters.has_topics
    assert (clusters.n_clusters, list(clusters.curve)) == (100, [100])
    assert clusters.curve[100] > 0.95
    assert clusters.mean_trust > 0.95
    assert adjusted_rand_score(ids, clusters.ids) > 0.95


@pytest.mark.parametrize("n_clusters", [300, 400])
def test_a_bad_number_does_not_hide_the_topics_of_the_corpus(n_clusters: int) -> None:
    """16 topics cut into 300 pieces repeat little. The verdict is the corpus's, the trust that of the pieces."""
    clusters = fit(TIGHT, n_clusters)
    assert clusters.n_clusters == n_clusters
    assert clusters.has_topics
    assert clusters.mean_trust < 0.5 < fit(TIGHT).mean_trust
    assert clusters.curve[n_clusters] == mean_trust(unit_rows(TIGHT), n_clusters) < trust_bound(len(TIGHT))
    assert max(clusters.curve.values()) >= trust_bound(len(TIGHT))


def test_no_number_finds_topics_where_there_are_none() -> None:
    clusters = fit(directions(1000), 32)
    assert not clusters.has_topics
    assert list(clusters.curve) == [32, *(k for k in N_CLUSTERS if k <= 50 and k != 32)]


def test_a_number_that_is_given_is_judged_by_the_bound_of_so_many_sentences() -> None:
    """Which is lower than one half for few."""
    clusters = fit(blobs(noise=0.28, n_blobs=24, n_rows=1000)[0], 24)
    assert trust_bound(1000) < clusters.curve[24] < trust_bound(7000)
    assert clusters.has_topics


@pytest.mark.parametrize("n_rows", [4, 60, 320])
def test_a_corpus_of_any_size_gets_clusters(n_rows: int) -> None:
    for n_clusters in (None, 2, n_rows // 2):
        clusters = fit(directions(n_rows), n_clusters)
        assert clusters.n_clusters == (n_clusters or clusters.n_clusters) <= n_rows // 2
        assert len(clusters.ids) == n_rows
        assert np.isfinite(clusters.centroids).all()


def test_equal_embeddings_are_one_cluster_and_leave_the_others_empty() -> None:
    clusters = fit(np.ones((300, 4)), 3)
    assert (clusters.ids == clusters.ids[0]).all()
    assert not clusters.has_topics
    np.testing.assert_array_equal(clusters.centroids.any(axis=1), clusters.sizes > 0)


# Copies and large corpora


def with_copies(count: int, seed: int = 0) -> np.ndarray:
    """Places 0 to count - 1 in their order, and among them as many copies of the first five."""
    rng = np.random.default_rng(seed)
    places = list(range(count))
    for copied in rng.integers(5, size=count):
        places.insert(int(rng.integers(5, len(places) + 1)), int(copied))
    return np.array(places)


@pytest.mark.parametrize("n_clusters", [None, N_BLOBS])
@pytest.mark.parametrize("rows", [TIGHT, directions()], ids=["topics", "noise"])
def test_copies_count_once(rows: np.ndarray, n_clusters: int | None) -> None:
    places, names = with_copies(800), texts(800)
    copied = CorpusClusters.fit([names[i] for i in places], n_clusters=n_clusters, embeddings=rows[places])
    assert_equal(copied, fit(rows, n_clusters))
    assert copied.has_topics == (rows is TIGHT)
    assert fit(rows[places], n_clusters).has_topics, "a canary: counted in full, copies pass for topics"


def test_of_copies_the_first_is_embedded() -> None:
    names = ["a", "b", "a", "c", "d", "b"]
    clusters = CorpusClusters.fit(names, n_clusters=2, embeddings=directions(6))
    assert clusters.sentences == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(clusters.embeddings, unit_rows(directions(6)[[0, 1, 3, 4]]))


def test_of_a_large_corpus_a_sample_is_clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SAMPLE", 500)
    one, same, other = (fit(TIGHT, N_BLOBS, seed) for seed in (1, 1, 2))
    assert_equal(one, same)
    assert one.sentences != other.sentences
    places = [int(name.removeprefix("unique")) for name in one.sentences]
    assert len(set(places)) == 500
    assert places == sorted(places), "they keep their order"
    np.testing.assert_array_equal(one.embeddings, unit_rows(TIGHT)[places])
    assert adjusted_rand_score(TRUE_IDS[places], one.ids) > 0.9
    assert adjusted_rand_score(TRUE_IDS, one.predict(TIGHT)) > 0.9, "the others are found by their nearest centroid"


def test_a_corpus_of_the_size_of_a_sample_is_clustered_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without its copies."""
    whole = fit(TIGHT, N_BLOBS)
    monkeypatch.setattr(sample, "SAMPLE", 800)
    places, names = with_copies(800), texts(800)
    copied = CorpusClusters.fit([names[i] for i in places], n_clusters=N_BLOBS, embeddings=TIGHT[places])
    assert_equal(whole, copied)


def test_only_the_sample_is_embedded(monkeypatch: pytest.MonkeyPatch, model: SentenceTransformer) -> None:
    monkeypatch.setattr(sample, "SAMPLE", 20)
    seen: list[str] = []

    def embed(sentences: Sequence[str], *args: Any, **options: Any) -> np.ndarray:
        seen.extend(sentences)
        return directions(len(sentences))

    monkeypatch.setattr(sample, "embed_corpus", embed)
    assert CorpusClusters.fit(texts(50), model).sentences == seen
    assert len(seen) == 20


# The parts of k-means


def test_nearest_is_the_highest_cosine_also_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans_module, "BLOCK", 77)
    centroids = unit_rows(directions(5)) * np.logspace(-2, 2, 5)[:, None].astype(np.float32)
    rows = unit_rows(directions(500))
    cosine = rows @ (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).T
    np.testing.assert_array_equal(nearest(rows, centroids), cosine.argmax(axis=1))
    assert nearest(rows, centroids).dtype == np.int64


def test_means_are_those_of_each_clusters_rows_and_zero_if_it_has_none() -> None:
    rows, ids = unit_rows(LOOSE), np.random.default_rng(0).integers(7, size=len(LOOSE))
    means = cluster_means(rows, ids, 8)
    assert means.dtype == np.float32
    for k in range(7):
        np.testing.assert_allclose(means[k], rows[ids == k].astype(np.float64).mean(axis=0), rtol=1e-6)
    assert not means[7].any()


# The same every time


def test_the_seed_decides_everything() -> None:
    one, same, other = (fit(LOOSE, N_BLOBS, seed) for seed in (3, 3, 4))
    assert_equal(one, same)
    assert not np.array_equal(one.ids, other.ids)


def test_the_global_random_state_is_neither_read_nor_advanced() -> None:
    one = fit(LOOSE, N_BLOBS)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    assert_equal(one, fit(LOOSE, N_BLOBS))
    np.testing.assert_array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_input_is_not_changed(dtype: Any) -> None:
    rows = TIGHT.astype(dtype)
    before = rows.copy()
    clusters = fit(rows, N_BLOBS)
    np.testing.assert_array_equal(rows, before)
    assert clusters.embeddings.dtype == np.float32


def test_the_fingerprint_changes_with_sentences_order_and_ids(tight: CorpusClusters) -> None:
    swapped = [1, 0, *range(2, 800)]
    others = [
        replace(tight, sentences=[*tight.sentences[:-1], "other"]),
        replace(tight, sentences=[tight.sentences[i] for i in swapped]),
        replace(tight, ids=np.where(np.arange(800) == 5, (tight.ids + 1) % N_BLOBS, tight.ids)),
        replace(tight, centroids=-tight.centroids),
        tight.sample(799),
        fit(TIGHT, N_BLOBS, seed=1),
    ]
    prints = {clusters.fingerprint for clusters in [tight, *others]}
    assert len(prints) == 7
    assert fit(TIGHT.copy(), N_BLOBS).fingerprint == tight.fingerprint
    assert all(re.fullmatch("[0-9a-f]{16}", fingerprint) for fingerprint in prints)


def test_a_sentence_that_is_no_valid_unicode_has_a_fingerprint(tight: CorpusClusters) -> None:
    assert replace(tight, sentences=["\ud800", *tight.sentences[1:]]).fingerprint != tight.fingerprint


# With a model


def test_a_models_embeddings_are_clustered_and_cached(bert: Path, tmp_path: Path) -> None:
    model, distinct = load_model(bert), make_sentences(150)
    sentences = distinct + distinct[:50]
    clusters = CorpusClusters.fit(sentences, model, show_progress_bar=False, cache=tmp_path)
    assert clusters.sentences == distinct
    rows = embed_corpus(distinct, model, show_progress_bar=False)
    np.testing.assert_allclose(clusters.embeddings, rows, atol=1e-6)
    assert list(tmp_path.glob("*/*.npy"))
    model.encode = None  # the cache holds them all
    assert_equal(clusters, CorpusClusters.fit(sentences, model, show_progress_bar=False, cache=tmp_path))


def test_embeddings_that_are_given_are_taken_in_place_of_a_model(model: SentenceTransformer) -> None:
    assert_equal(CorpusClusters.fit(texts(800), model, N_BLOBS, embeddings=TIGHT), fit(TIGHT, N_BLOBS))


def test_fitting_leaves_the_model_as_it_is(model: SentenceTransformer) -> None:
    sentences = make_sentences(60)
    before, modules, attributes = model.encode(sentences), list(model), set(vars(model))
    CorpusClusters.fit(sentences, model, show_progress_bar=False)
    np.testing.assert_array_equal(model.encode(sentences), before)
    assert list(model) == modules
    assert set(vars(model)) == attributes


def test_a_note_on_a_model_is_replaced_by_the_next(tight: CorpusClusters) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert CorpusClusters.noted_on(model) is None
    fit(LOOSE, 4).note_on(model)
    tight.note_on(model)
    assert CorpusClusters.noted_on(model) is tight
    assert CorpusClusters.noted_on(other) is None


def test_a_copied_model_shares_the_note(tight: CorpusClusters, model: SentenceTransformer) -> None:
    tight.note_on(model)
    copied = copy.deepcopy(model)
    assert copied is not model
    assert CorpusClusters.noted_on(copied) is tight


# What is refused


def with_value(value: float, row: int) -> np.ndarray:
    rows = directions(20)
    rows[row, 3] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (directions(19), "There are 19 embeddings for 20 sentences"),
        (directions(21), "There are 21 embeddings for 20 sentences"),
        (directions(20)[:, 0], r"embeddings must be a matrix of 4 rows or more, got the shape \(20,\)"),
        (with_value(np.nan, 7), r"NaN or Inf in row 7 \(1 of 20 rows\)"),
        (with_value(np.inf, 19), r"NaN or Inf in row 19 \(1 of 20 rows\)"),
        (None, "Pass the model that embeds the sentences, or embeddings="),
    ],
)
def test_embeddings_that_are_refused(rows: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorpusClusters.fit(texts(20), n_clusters=2, embeddings=rows)


def test_a_bad_row_is_named_as_the_user_counts_it() -> None:
    """Also behind copies, which are left out."""
    with pytest.raises(ValueError, match="NaN or Inf in row 9 "):
        CorpusClusters.fit(["same", "same", "same", *texts(17)], embeddings=with_value(np.nan, 9))


@pytest.mark.parametrize("n_clusters", [-1, 0, 1, 11, 20])
def test_a_number_of_clusters_out_of_range_is_refused(n_clusters: int) -> None:
    with pytest.raises(ValueError, match=f"n_clusters={n_clusters} does not fit 20 distinct sentences: choose 2 to 10"):
        fit(directions(20), n_clusters)


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        ([], r"sentences holds 0 distinct text\(s\) in 0: give 4 or more"),
        (["a", "b", "c"] * 10, r"sentences holds 3 distinct text\(s\) in 30: give 4 or more"),
        ("a file.txt", "sentences must be a list of str, got str 'a file.txt': read a file with read_sentences"),
        (b"bytes", "sentences must be a list of str, got bytes"),
        (iter(["a", "b"]), r"sentences holds 2 distinct text\(s\) in 2: give 4 or more"),
        (["a", "b", "c", " ", "d"], r"sentences\[3\] is blank, ' ': drop it"),
        ({"text": ["a"] * 4}, r"got dict .*pass one column of a table, such as frame\['text'\]\.tolist\(\)"),
        ({"a", "b"}, "sentences must be a list of str, got set"),
        (None, "sentences must be a list of str, got NoneType"),
        (["a", "b", None, "c", 3], r"sentences\[2\] is NoneType None: drop it or convert it"),
        (["a", "b", "c", "d", ["e"]], r"sentences\[4\] is list \['e'\]"),
        ([float("nan"), "b", "c", "d"], r"sentences\[0\] is float nan"),
    ],
)
def test_what_is_no_corpus_is_refused(sentences: Any, message: str, model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match=message):
        CorpusClusters.fit(sentences, model)


def test_a_model_that_truncates_is_refused(model: SentenceTransformer) -> None:
    model.truncate_dim = 8
    with pytest.raises(ValueError, match=r"truncate_dim=8 applies to encode\(\).*set model.truncate_dim = None"):
        CorpusClusters.fit(make_sentences(50), model)


def test_embeddings_to_predict_are_checked(tight: CorpusClusters) -> None:
    rows = TIGHT.copy()
    rows[11] = np.nan
    with pytest.raises(ValueError, match="NaN or Inf in row 11 "):
        tight.predict(rows)
