"""Names and typical sentences of clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from blobs import TIGHT
from languages import WORDS, corpus_in

from st_clusterns import CorpusClusters
from st_clusterns.clustering.topic_names import nearest_sentences, topic_names
from st_clusterns.clustering.words import fold_case, split_words
from st_clusterns.training.quickstart import load_utterances

TEXTS, INTENTS = load_utterances()
CLASSES, IDS = np.unique(INTENTS, return_inverse=True)


def test_intents_are_named_by_words_of_theirs_and_not_by_words_of_all() -> None:
    names = dict(zip(CLASSES, topic_names(TEXTS, IDS, len(CLASSES)), strict=True))
    for intent, words in (("direct_debit_cancel", {"direct", "debit", "cancel"}), ("pin_change", {"pin", "change"})):
        assert words <= set(names[intent].split(", "))
    assert {len(name.split(", ")) for name in names.values()} == {3}
    used = {word for name in names.values() for word in name.split(", ")}
    assert not used & {"the", "to", "my", "is", "and", "of", "it", "do", "can", "for", "in", "on", "have"}


def test_words_are_ranked_by_the_weighting_of_the_module() -> None:
    words = [set(split_words(text)) for text in TEXTS]
    share = {word: sum(word in of for of in words) / len(TEXTS) for word in set().union(*words)}
    for cluster, name in enumerate(topic_names(TEXTS, IDS, len(CLASSES))):
        own = [of for of, i in zip(words, IDS, strict=True) if i == cluster]
        weight = {}
        for word in sorted(set().union(*own)):
            times = sum(word in of for of in own)
            weight[word] = (times - 0.9) * math.log(times / len(own) / share[word]) * -math.log(share[word])
        assert name == ", ".join(sorted(weight, key=lambda word: -weight[word])[:3])


@pytest.mark.parametrize("language", WORDS)
def test_topics_of_any_language_are_named_by_their_whole_words(language: str) -> None:
    sentences, ids = corpus_in(language)
    topics = [[fold_case(word) for word in line.split()] for line in WORDS[language].strip().split("\n")]
    names = topic_names(sentences, np.array(ids), 10)
    whole = [word in topics[topic] for topic, name in enumerate(names) for word in name.split(", ")]
    part = [
        any(word in other or other in word for other in topics[topic])
        for topic, name in enumerate(names)
        for word in name.split(", ")
    ]
    assert np.mean(whole) >= (0.5 if language == "Thai" else 0.85)  # several Thai words of a topic share their parts
    assert np.mean(part) > 0.95


def test_names_are_distinct_and_a_cluster_without_words_has_its_number() -> None:
    sentences = ["same words here", "same words here!", "😀", "😀😀"]
    names = topic_names(sentences, np.array([0, 1, 2, 2]), 4)
    assert names == ["here, same, words", "here, same, words (2)", "cluster 2", "cluster 3"]
    assert topic_names(["!", "?"], np.array([0, 1]), 2) == ["cluster 0", "cluster 1"]


def test_examples_are_the_rows_nearest_to_the_centroid() -> None:
    clusters = CorpusClusters.fit([f"text {i}" for i in range(len(TIGHT))], embeddings=TIGHT, n_clusters=16)
    for cluster, examples in enumerate(clusters.examples(5)):
        own = np.flatnonzero(clusters.ids == cluster)
        centroid = clusters.centroids[cluster] / np.linalg.norm(clusters.centroids[cluster])
        expected = sorted(own, key=lambda row: -float(clusters.embeddings[row] @ centroid))[:5]
        assert examples == [f"text {row}" for row in expected]


def test_an_empty_cluster_has_no_examples_and_a_small_one_all_of_its_rows() -> None:
    rows = np.eye(3, dtype=np.float32)
    assert nearest_sentences(rows, np.array([0, 0, 2]), np.ones((4, 3), np.float32), 5) == [[0, 1], [], [2], []]


def test_a_sample_of_the_sentences_keeps_the_names_of_all() -> None:
    clusters = CorpusClusters.fit(TEXTS, embeddings=np.eye(len(CLASSES))[IDS] + 0.01, n_clusters=24)
    part = clusters.sample(30)
    assert part.names == clusters.names
    assert clusters.names is clusters.names, "computed once"
    assert sum(map(len, part.examples(50))) == 30
