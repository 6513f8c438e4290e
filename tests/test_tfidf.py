"""The words that a corpus shares: sentences on one subject come together, also if they have no word in common."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from st_clusterns import cluster_corpus
from st_clusterns import corpus as corpus_module
from st_clusterns import words as module
from st_clusterns.corpus import WORDS, follow_corpus
from st_clusterns.rows import UnitRows, unit_rows
from st_clusterns.words import word_vectors

SUBJECTS = [[f"{name}{i}" for i in range(40)] for name in "abcdefghijklmnopqrst"]  # 20 subjects of 40 words each


def sentences_on(n_rows: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Eight words of one subject and one that all share."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(len(SUBJECTS), size=n_rows)
    return ["the " + " ".join(rng.choice(SUBJECTS[i], 8, replace=False)) for i in ids], ids


@pytest.fixture(autouse=True)
def _enough_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "WORDS_ROWS", 800)


TEXTS, SUBJECT = sentences_on(800)
NOISE = np.random.default_rng(1).normal(size=(800, 16))  # embeddings that know nothing
HALF = np.arange(800) % 2
GROUP = 2 * (SUBJECT // 2) + HALF
GROUPED = NOISE * 0.05 + np.random.default_rng(2).normal(size=(20, 16))[GROUP]  # those that know subjects by pairs


def test_sentences_of_one_subject_are_similar_also_without_a_common_word() -> None:
    rows = word_vectors(TEXTS)
    assert rows is not None
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    words = [set(text.split()[1:]) for text in TEXTS]
    apart, other = [], []
    for i, j in itertools.combinations(range(100), 2):
        if SUBJECT[i] != SUBJECT[j]:
            other.append(rows[i] @ rows[j])
        elif not words[i] & words[j]:
            apart.append(rows[i] @ rows[j])
    assert np.mean(apart) > 0.15
    assert abs(np.mean(other)) < 0.02


def test_clusters_come_from_both_views() -> None:
    """Embeddings tell pairs of subjects and halves of the corpus apart, words the subjects; the clusters know all."""
    clusters = cluster_corpus(GROUPED, 40, sentences=TEXTS)
    assert adjusted_rand_score(2 * SUBJECT + HALF, clusters.ids) > 0.8
    alone = cluster_corpus(GROUPED, 40)
    assert adjusted_rand_score(2 * SUBJECT + HALF, alone.ids) < 0.6


def test_where_no_cluster_is_trusted_words_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "word_vectors", lambda *_: pytest.fail("words were learnt"))
    clusters = cluster_corpus(NOISE, sentences=TEXTS)
    assert not clusters.trust.any()
    follow_corpus(NOISE, clusters, sentences=TEXTS)


def test_words_count_less_in_a_small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "WORDS_ROWS", 3200)
    assert cluster_corpus(GROUPED, sentences=TEXTS).words == pytest.approx(WORDS / 4)
    assert cluster_corpus(GROUPED).words == 0
    rows, words = unit_rows(GROUPED), word_vectors(TEXTS)
    assert words is not None
    joined = corpus_module._with_words(rows, TEXTS, 0, WORDS / 4)[:50]
    expected = (rows[:50] @ rows[:50].T + (WORDS / 4) ** 2 * words[:50] @ words[:50].T) / (1 + (WORDS / 4) ** 2)
    np.testing.assert_allclose(joined @ joined.T, expected, atol=1e-5)


def test_centroids_stay_in_the_space_of_the_embeddings() -> None:
    clusters = cluster_corpus(GROUPED, 40, sentences=TEXTS)
    rows = unit_rows(GROUPED)
    assert clusters.layer is not None
    rows = clusters.layer(rows)
    expected = [rows[clusters.ids == k].mean(0) for k in range(40)]
    np.testing.assert_allclose(clusters.centroids, expected, atol=1e-6)


def test_following_joins_words_of_the_same_length(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = replace(cluster_corpus(GROUPED, 40, sentences=TEXTS, topic_layer=False), words=5.0)
    lengths, join = [], corpus_module._with_words
    monkeypatch.setattr(corpus_module, "_with_words", lambda *args: lengths.append(args[3]) or join(*args))
    follow_corpus(GROUPED, clusters, sentences=TEXTS)
    assert lengths == [5.0]


def test_following_goes_on_from_both_views() -> None:
    clusters = cluster_corpus(GROUPED, 40, sentences=TEXTS, topic_layer=False)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(16, 16)))
    after = follow_corpus(GROUPED @ rotation, clusters, sentences=TEXTS)
    assert (after.ids == clusters.ids).mean() > 0.98
    assert (follow_corpus(GROUPED @ rotation, clusters).ids == clusters.ids).mean() < 0.9  # a canary


@pytest.mark.parametrize(
    "texts",
    [["no word twice"[i : i + 1] + str(i) for i in range(40)], ["same words here"] * 40, ["!!!"] * 40],
    ids=["nothing shared", "all alike", "no words"],
)
def test_a_corpus_without_telling_words_is_clustered_by_its_embeddings(texts: list[str]) -> None:
    assert word_vectors(texts) is None
    rows = np.concatenate([GROUPED[group == GROUP][:20] for group in (0, 1)])
    assert cluster_corpus(rows, 4).trust.any()
    np.testing.assert_array_equal(cluster_corpus(rows, 4, sentences=texts).ids, cluster_corpus(rows, 4).ids)


def test_a_sentence_without_known_words_has_no_direction() -> None:
    rows = word_vectors([*TEXTS, "zebra"])
    assert rows is not None
    np.testing.assert_array_equal(rows[-1], 0)
    assert np.isfinite(
        cluster_corpus(np.vstack([GROUPED, GROUPED[:1]]), 20, sentences=[*TEXTS, "zebra"]).centroids
    ).all()


def test_the_seed_decides_everything() -> None:
    np.testing.assert_array_equal(word_vectors(TEXTS, 3), word_vectors(TEXTS, 3))


def test_a_large_corpus_is_learnt_from_a_sample_and_mapped_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = word_vectors(TEXTS)
    monkeypatch.setattr(module, "SAMPLE", 500)
    monkeypatch.setattr(module, "BLOCK", 300)
    rows = word_vectors(TEXTS)
    assert whole is not None
    assert rows is not None
    assert rows.dtype == np.float16
    assert rows.shape == (800, 100)
    some = np.arange(0, 800, 7)
    similar = rows[some].astype(np.float32) @ rows[some].T, whole[some] @ whole[some].T
    assert np.corrcoef(similar[0].ravel(), similar[1].ravel())[0, 1] > 0.9


def test_rows_made_on_demand_are_those_joined_at_once() -> None:
    words = word_vectors(TEXTS)
    assert words is not None
    joined = UnitRows(NOISE, words=WORDS * words)
    assert joined.shape == (800, 16 + words.shape[1])
    embedding = NOISE[5] / np.linalg.norm(NOISE[5])
    expected = np.concatenate([embedding, WORDS * words[5]]) / np.sqrt(1 + WORDS**2)
    np.testing.assert_allclose(joined[np.array([5])][0], expected, rtol=1e-5)


def test_other_sentences_than_those_embedded_are_refused() -> None:
    with pytest.raises(ValueError, match="800 embeddings, but 799 sentences"):
        cluster_corpus(NOISE, 20, sentences=TEXTS[1:])
