"""Shared words teach a model that judges worse than they do, and no other one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import adjusted_rand_score
from tiny_bert import DIMENSION, WORDS, load_model, make_sentences, save_bert
from torch import Tensor

from st_clusterns import CachedClusterNSLoss, ClusterNSLoss, CorpusClusters, cluster_corpus
from st_clusterns import word_overlap as module
from st_clusterns.corpus import follow_corpus
from st_clusterns.false_negatives import relation_divergence
from st_clusterns.rows import unit_rows
from st_clusterns.topic_layer import fit_whitening
from st_clusterns.word_overlap import learn_token_weights, token_vectors

TEXTS = make_sentences(400, lengths=(8, 14))
COUNTS = CountVectorizer(vocabulary=WORDS).fit_transform(TEXTS).toarray()
IDF = np.log(401 / (1 + (COUNTS > 0).sum(0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"), dropout=0.0)


@pytest.fixture
def model(folder: Path) -> SentenceTransformer:
    return load_model(folder)


def judge(model: SentenceTransformer, knows: bool) -> SentenceTransformer:
    """Let a model find all second halves, or none."""

    def encode(halves: list[str], **_: Any) -> Tensor:
        rows = torch.eye(len(halves) // 2)
        return torch.cat([rows, rows if knows else rows.roll(1, dims=0)])

    model.encode = encode
    return model


def corpus(weights: np.ndarray | None = None, n_rows: int = 400) -> CorpusClusters:
    centroids = np.random.default_rng(0).normal(size=(4, DIMENSION)).astype(np.float32)
    return CorpusClusters(np.arange(n_rows) % 4, centroids, np.zeros(4, np.float32), token_weights=weights)


def weights_of_words() -> np.ndarray:
    return np.concatenate([np.zeros(5), IDF]).astype(np.float32)  # after the five special tokens


def test_the_divergence_is_its_definition_row_by_row() -> None:
    draw = np.random.default_rng(0)
    cosine, teacher = draw.uniform(-1, 1, (3, 6)), draw.uniform(0, 1, (3, 6))
    own = [4, 0, 2]
    expected = [
        entropy(softmax(np.delete(t, place) / 0.1), softmax(np.delete(c, place) / 0.05))
        for c, t, place in zip(cosine, teacher, own, strict=True)
    ]
    actual = relation_divergence(torch.tensor(cosine), torch.tensor(teacher), torch.tensor(own), 0.05, 0.1)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_a_row_that_agrees_has_no_divergence_whatever_it_says_of_itself() -> None:
    teacher = torch.rand(5, 5, dtype=torch.float64)
    cosine = (0.5 * teacher + 0.1).fill_diagonal_(7.0)
    actual = relation_divergence(cosine, teacher, torch.arange(5), 0.05, 0.1)
    torch.testing.assert_close(actual, torch.zeros(5, dtype=torch.float64))


def test_token_vectors_are_those_of_counted_words(model: SentenceTransformer) -> None:
    expected = COUNTS[:20] * IDF
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    weights = weights_of_words()
    weights[model.tokenizer.pad_token_id] = 9.0  # never seen in a corpus, so it weighs most; padding must not count
    actual = token_vectors(features(model, TEXTS[:20]), torch.tensor(weights))
    np.testing.assert_allclose(actual @ actual.T, expected @ expected.T, atol=1e-6)


@pytest.mark.parametrize("among", [1000, 90])
@pytest.mark.parametrize("knows", [True, False])
def test_words_teach_a_model_that_finds_fewer_halves(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, knows: bool, among: int
) -> None:
    monkeypatch.setattr(module, "AMONG", among)
    weights = learn_token_weights(TEXTS, judge(model, knows))
    if knows:
        assert weights is None
    else:
        assert weights is not None
        np.testing.assert_allclose(weights[5:], IDF, rtol=1e-5)
        np.testing.assert_allclose(weights[2:4], 0)  # what every sentence has says nothing


def test_every_sentence_is_cut_in_two_once(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    encode = judge(model, True).encode

    def note(halves: list[str], **settings: Any) -> Tensor:
        asked.extend(f"{first} {second}" for first, second in zip(*np.split(np.array(halves), 2), strict=True))
        return encode(halves, **settings)

    monkeypatch.setattr(model, "encode", note)
    monkeypatch.setattr(module, "AMONG", 90)
    learn_token_weights(TEXTS, model)
    assert sorted(asked) == sorted(TEXTS)


def test_what_may_be_chance_does_not_make_words_a_teacher(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 to 40 of 400 may be chance (100 findings, standard error 10), 65 to 35 hardly."""
    for counts, certain in {(60, 40): False, (65, 35): True, (35, 65): False}.items():
        found = iter(counts)
        monkeypatch.setattr(module, "_count_found", lambda _, found=found: next(found))
        assert (learn_token_weights(TEXTS, judge(model, False)) is not None) == certain


def test_too_few_long_sentences_say_nothing(model: SentenceTransformer) -> None:
    short = [" ".join(text.split()[:7]) for text in TEXTS]
    assert learn_token_weights([*TEXTS[:99], *short], judge(model, False)) is None
    assert learn_token_weights([*TEXTS[:100], *short], judge(model, False)) is not None


def test_a_model_with_another_kind_of_tokenizer_is_left_alone(model: SentenceTransformer) -> None:
    class Other:
        tokenizer = None

    assert learn_token_weights(TEXTS, Other()) is None  # type: ignore[arg-type]


def test_only_clusters_that_are_not_trusted_bring_a_teacher(model: SentenceTransformer) -> None:
    draw = np.random.default_rng(0)
    texts = [" ".join(2 * list(draw.choice(WORDS, 5))) for _ in range(400)]  # of no topic; halves share words
    noise = draw.normal(size=(400, 16))
    found = cluster_corpus(noise, sentences=texts, model=judge(model, False))
    assert not found.trust.any()
    assert found.token_weights is not None
    expected = fit_whitening(unit_rows(noise))
    assert found.layer is not None
    np.testing.assert_allclose(found.layer.weight, expected.weight, rtol=1e-4, atol=1e-5)
    assert cluster_corpus(noise, sentences=texts, model=judge(model, False), topic_layer=False).layer is None
    alone = cluster_corpus(noise, sentences=texts)
    assert alone.token_weights is None
    assert alone.layer is None
    grouped = 0.05 * noise + draw.normal(size=(20, 16))[np.arange(400) % 20]
    trusted = cluster_corpus(grouped, sentences=texts, model=judge(model, False))
    assert trusted.trust.any()
    assert trusted.token_weights is None


def test_where_words_judge_better_they_find_the_clusters(model: SentenceTransformer) -> None:
    draw = np.random.default_rng(0)
    topics = draw.integers(20, size=1000)
    texts = [" ".join(draw.choice(WORDS[10 * topic : 10 * topic + 10], 8)) for topic in topics]
    noise = draw.normal(size=(1000, 16))
    found = cluster_corpus(noise, 20, sentences=texts, model=judge(model, False))
    assert adjusted_rand_score(topics, found.ids) > 0.8
    assert found.trust.min() > 0.5
    assert found.layer is not None
    assert found.token_weights is None
    after = follow_corpus(noise[:, ::-1], found, sentences=texts)
    assert adjusted_rand_score(topics, after.ids) > 0.8
    assert adjusted_rand_score(topics, cluster_corpus(noise, 20, sentences=texts).ids) < 0.1


def features(model: SentenceTransformer, texts: list[str]) -> dict[str, Tensor]:
    return dict(model.tokenizer(texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("margin_weight", [0.0, 1.0, 0.3])
def test_the_loss_is_contrastive_and_what_words_say(model: SentenceTransformer, margin_weight: float) -> None:
    """Pairs of different sentences: the words are those of the first column."""
    loss = ClusterNSLoss(model, clusters=corpus(weights_of_words()), margin_weight=margin_weight)
    columns = [TEXTS[:8], TEXTS[8:16]]
    parts = loss([features(model, texts) for texts in columns])
    contrastive = MultipleNegativesRankingLoss(model)([features(model, texts) for texts in columns], None)
    torch.testing.assert_close(parts["contrastive"], contrastive)

    rows = [model.encode(texts, normalize_embeddings=True).astype(float) for texts in columns]
    words = COUNTS[:8] * IDF
    words = words / np.linalg.norm(words, axis=1, keepdims=True)
    cosine, teacher = rows[0] @ rows[1].T / 0.05, words @ words.T / 0.1
    expected = np.mean([entropy(softmax(np.delete(teacher[i], i)), softmax(np.delete(cosine[i], i))) for i in range(8)])
    assert math.isclose(parts["false_negative"].item(), 10 * margin_weight * expected, rel_tol=1e-4, abs_tol=1e-9)


def test_the_words_of_one_batch_are_forgotten(model: SentenceTransformer) -> None:
    loss = ClusterNSLoss(model, clusters=corpus(weights_of_words()))
    loss([features(model, TEXTS[:8])])
    rows = torch.randn(2, 8, DIMENSION)
    assert loss.compute_loss_from_embeddings(list(rows))["false_negative"] == 0


def test_without_a_teacher_the_loss_is_plain(model: SentenceTransformer) -> None:
    parts = ClusterNSLoss(model, clusters=corpus())([features(model, TEXTS[:8])])
    assert parts["false_negative"] == 0


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("size", [3, 8])
def test_the_cached_loss_is_the_same(model: SentenceTransformer, columns: int, size: int) -> None:
    found = []
    for make in (
        lambda: ClusterNSLoss(model, clusters=corpus(weights_of_words())),
        lambda: CachedClusterNSLoss(model, clusters=corpus(weights_of_words()), mini_batch_size=size),
    ):
        model.zero_grad()
        texts = [TEXTS[:8], TEXTS[8:16]][:columns]
        parts = make()([features(model, column) for column in texts])
        parts.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((parts["contrastive"], parts["false_negative"], gradient))
    for plain, cached in zip(*found, strict=True):
        torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-4)


def test_training_brings_the_model_to_judge_as_words_do(folder: Path) -> None:
    words = COUNTS[:200] * IDF
    words = torch.tensor(words / np.linalg.norm(words, axis=1, keepdims=True)).float()
    divergence = {}
    for name, weights in {"taught": weights_of_words(), "alone": None}.items():
        model = load_model(folder)
        loss = ClusterNSLoss(model, clusters=corpus(weights))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for start in 3 * list(range(200, 400, 20)):
            optimizer.zero_grad()
            loss([features(model, TEXTS[start : start + 20])]).backward()
            optimizer.step()
        rows = torch.tensor(model.encode(TEXTS[:200], normalize_embeddings=True))
        found = relation_divergence(rows @ rows.T, words @ words.T, torch.arange(200), 0.05, 0.1)
        divergence[name] = found.mean().item()
    assert divergence["taught"] < 0.8 * divergence["alone"]
