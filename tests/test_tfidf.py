"""The words that a corpus shares: sentences on one subject come together, also if they have no word in common."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from languages import WORDS, corpus_in
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_rand_score, v_measure_score

from st_clusterns import CorpusClusters
from st_clusterns.clustering import corpus_clusters as module
from st_clusterns.clustering import tfidf
from st_clusterns.clustering.tfidf import join_tfidf, tfidf_vectors
from st_clusterns.clustering.vectors import unit_rows
from st_clusterns.clustering.words import split_words
from st_clusterns.training.quickstart import load_utterances

SUBJECTS = [[f"{name}{i}" for i in range(40)] for name in "abcdefghijklmnopqrst"]  # 20 subjects of 40 words each


def sentences_on(n_rows: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Eight words of one subject and one that all share."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(len(SUBJECTS), size=n_rows)
    return ["the " + " ".join(rng.choice(SUBJECTS[i], 8, replace=False)) for i in ids], ids


@pytest.fixture(autouse=True)
def _enough_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfidf, "MANY_SENTENCES", 800)


TEXTS, SUBJECT = sentences_on(800)
NO_WORDS = [f"unique{i}" for i in range(800)]
NOISE = np.random.default_rng(1).normal(size=(800, 16))  # embeddings that know nothing
HALF = np.arange(800) % 2
GROUP = 2 * (SUBJECT // 2) + HALF
GROUPED = NOISE * 0.05 + np.random.default_rng(2).normal(size=(20, 16))[GROUP]  # those that know subjects by pairs


def test_sentences_of_one_subject_are_similar_also_without_a_common_word() -> None:
    rows = tfidf_vectors(TEXTS)
    assert rows is not None
    assert (rows.shape, rows.dtype) == ((800, 100), np.float32)
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


# Languages

SPLIT = {
    "English, as scikit-learn does": ("The cat's 2nd toy, e-mail x_1 I", "the cat 2nd toy mail x_1"),
    "accents, composed or not": ("Cafe\u0301 Café naïve", "café café naïve"),
    "full width": ("\uff28\uff29 \uff11\uff12", "hi 12"),
    "Hindi": ("मुझे हिन्दी की पुस्तक।", "मुझे हिन्दी की पुस्तक"),
    "Tamil": ("தமிழ் மொழி!", "தமிழ் மொழி"),
    "Arabic, vocalised or not": ("كِتَابٌ كتاب، مُدَرِّس", "كتاب كتاب مدرس"),
    "Hebrew": ("שָׁלוֹם שלום", "שלום שלום"),
    "Thai": ("ที่ดี คือ", "ที่ดี คือ"),
    "Chinese": ("我爱北京。iPhone手机", "我爱 爱北 北京 iphone 手机"),
    "Japanese": ("ラーメン、食べた", "ラー ーメ メン 食べ べた"),
    "half-width kana": ("ﾗｰﾒﾝ", "ラー ーメ メン"),
    "Korean": ("한국어 문장", "한국어 문장"),
    "Burmese": ("မြန်မာ", "မြန် န်မာ"),
    "no words": ("!!! 😀 a 字", ""),
}


@pytest.mark.parametrize(("text", "words"), SPLIT.values(), ids=SPLIT)
def test_words_of_any_language(text: str, words: str) -> None:
    assert split_words(text) == words.split()


def test_english_is_split_as_scikit_learn_does() -> None:
    sentences, _ = load_utterances()
    analyse = TfidfVectorizer().build_analyzer()
    assert [split_words(sentence) for sentence in sentences] == [analyse(sentence) for sentence in sentences]


@pytest.mark.parametrize("language", WORDS)
def test_words_tell_topics_apart_in_any_language(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, where the token pattern of scikit-learn does not; and joined with embeddings that know half."""
    texts, topics = corpus_in(language)

    def agreement(rows: np.ndarray) -> float:
        return v_measure_score(topics, KMeans(10, n_init=3, random_state=0).fit_predict(rows))

    words = tfidf_vectors(texts)
    assert words is not None
    assert agreement(words) > 0.9
    with monkeypatch.context() as patch:
        patch.setattr(tfidf, "split_words", TfidfVectorizer().build_analyzer())
        others = tfidf_vectors(texts)
    assert others is None or agreement(others) < agreement(words) - 0.05
    monkeypatch.setattr(tfidf, "MANY_SENTENCES", len(texts))
    draw = np.random.default_rng(0)
    rows = unit_rows(np.eye(10)[topics] + 0.5 * draw.normal(size=(len(texts), 10)))
    alone, joined = agreement(rows), agreement(join_tfidf(rows, texts, 0))
    assert 0.3 < alone < joined - 0.2


def test_clusters_come_from_both_views() -> None:
    """Embeddings tell pairs of subjects and halves of the corpus apart, words the subjects; the clusters know all."""
    both = CorpusClusters.fit(TEXTS, n_clusters=40, embeddings=GROUPED)
    alone = CorpusClusters.fit(NO_WORDS, n_clusters=40, embeddings=GROUPED)
    assert both.has_topics
    assert alone.has_topics
    assert adjusted_rand_score(2 * SUBJECT + HALF, both.ids) > 0.8
    assert adjusted_rand_score(2 * SUBJECT + HALF, alone.ids) < 0.6


@pytest.mark.parametrize("n_clusters", [None, 20])
def test_the_verdict_comes_from_the_embeddings_alone(n_clusters: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of the sentences repeat very well, whatever their embeddings do."""
    words = CorpusClusters.fit(TEXTS, n_clusters=n_clusters, embeddings=tfidf_vectors(TEXTS))
    assert words.has_topics
    monkeypatch.setattr(module, "join_tfidf", lambda *_: pytest.fail("words were looked at"))
    assert not CorpusClusters.fit(TEXTS, n_clusters=n_clusters, embeddings=NOISE).has_topics


@pytest.mark.parametrize("n_clusters", [None, 30])
def test_words_do_not_change_the_number_or_its_curve(n_clusters: int | None) -> None:
    with_words, without = (
        CorpusClusters.fit(texts, None, n_clusters, embeddings=GROUPED) for texts in (TEXTS, NO_WORDS)
    )
    assert with_words.curve == without.curve
    assert with_words.n_clusters == without.n_clusters
    assert not np.array_equal(with_words.ids, without.ids)


@pytest.mark.parametrize(("many", "share"), [(400, 1), (800, 1), (3200, 1 / 4)])
def test_words_count_less_in_a_small_corpus(many: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfidf, "MANY_SENTENCES", many)
    rows, words = unit_rows(GROUPED), tfidf_vectors(TEXTS)
    assert words is not None
    joined = join_tfidf(rows, TEXTS, 0)[:50]
    length = share * tfidf.LENGTH
    expected = (rows[:50] @ rows[:50].T + length**2 * words[:50] @ words[:50].T) / (1 + length**2)
    np.testing.assert_allclose(joined @ joined.T, expected, atol=1e-5)


def test_centroids_stay_in_the_space_of_the_embeddings() -> None:
    clusters = CorpusClusters.fit(TEXTS, n_clusters=40, embeddings=GROUPED)
    expected = [unit_rows(GROUPED)[clusters.ids == k].mean(axis=0) for k in range(40)]
    np.testing.assert_allclose(clusters.centroids, expected, atol=1e-6)


@pytest.mark.parametrize(
    "texts",
    [[f"no{i} word{i} twice{i}" for i in range(40)], ["same words here"] * 40, ["!!!"] * 40],
    ids=["nothing shared", "all alike", "no words"],
)
def test_a_corpus_that_shares_no_words_has_no_vectors(texts: list[str]) -> None:
    assert tfidf_vectors(texts) is None


def test_a_corpus_that_shares_no_words_is_clustered_by_its_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = CorpusClusters.fit(NO_WORDS, n_clusters=20, embeddings=GROUPED)
    assert clusters.trusted.all()
    monkeypatch.setattr(module, "join_tfidf", lambda rows, *_: rows)
    np.testing.assert_array_equal(clusters.ids, CorpusClusters.fit(TEXTS, n_clusters=20, embeddings=GROUPED).ids)


def test_a_sentence_without_known_words_has_no_direction() -> None:
    rows = tfidf_vectors([*TEXTS, "zebra"])
    assert rows is not None
    np.testing.assert_array_equal(rows[-1], 0)
    clusters = CorpusClusters.fit([*TEXTS, "zebra"], n_clusters=20, embeddings=np.vstack([GROUPED, GROUPED[:1]]))
    assert np.isfinite(clusters.centroids).all()
    assert clusters.ids[-1] == clusters.ids[0], "its embedding decides"


def test_the_seed_decides_everything() -> None:
    np.testing.assert_array_equal(tfidf_vectors(TEXTS, 3), tfidf_vectors(TEXTS, 3))
