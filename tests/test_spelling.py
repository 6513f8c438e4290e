"""What the layer adds is computed here sentence by sentence, from its table; what the table says, from texts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
    WordEmbeddings,
)
from test_word_overlap import judge
from tiny_bert import DIMENSION, WORDS, make_sentences, save_bert
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from st_clusterns import spelling as module
from st_clusterns.corpus import CorpusClusters, cluster_corpus
from st_clusterns.loss import ClusterNSLoss
from st_clusterns.rows import unit_rows
from st_clusterns.spelling import SpellingLayer, can_spell
from st_clusterns.topic_layer import fit_whitening
from st_clusterns.word_overlap import inverse_document_frequencies

TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 8)) for i in range(400)]  # of no topic
NOISE = np.random.default_rng(0).normal(size=(400, DIMENSION)).astype(np.float32)
SPECIAL = 5  # tokens before the words


def fit_spelling(rows: np.ndarray, texts: list[str], model: SentenceTransformer) -> SpellingLayer:
    return module.fit_spelling(rows, texts, model, inverse_document_frequencies(texts, model))


def random_layer(seed: int = 0) -> SpellingLayer:
    draw = np.random.default_rng(seed)
    directions = np.linalg.qr(draw.normal(size=(DIMENSION, 10)))[0]
    table = draw.normal(size=(SPECIAL + len(WORDS), 10))
    table[:SPECIAL] = 0
    return SpellingLayer(table.astype(np.float32), directions.astype(np.float32))


def add_spelling(rows: np.ndarray, texts: Sequence[str], layer: SpellingLayer) -> np.ndarray:
    added = []
    for row, text in zip(rows, texts, strict=True):
        words = text.split()
        spelling = sum(layer.table[SPECIAL + WORDS.index(word)] for word in words) / math.sqrt(len(words) + 2)
        whole = row / np.linalg.norm(row) + layer.directions @ spelling
        added.append(whole / np.linalg.norm(whole))
    return np.array(added)


# In the model


def test_embeddings_are_what_they_were_and_the_sum_of_spellings(model: SentenceTransformer) -> None:
    texts = make_sentences(20)  # of 3 to 9 words: padded in a batch
    before, layer = model.encode(texts), random_layer()
    layer.append_to(model)
    after = model.encode(texts)
    np.testing.assert_allclose(after, add_spelling(before, texts, layer), atol=1e-5)
    assert np.abs(after - unit_rows(before)).max() > 0.05


def test_the_host_library_loads_it_alone(model: SentenceTransformer, tmp_path: Path) -> None:
    random_layer().append_to(model)
    model.save(str(tmp_path))
    kinds = [part["type"] for part in json.loads((tmp_path / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in kinds)
    loaded, texts = SentenceTransformer(str(tmp_path)), make_sentences(9)
    np.testing.assert_allclose(loaded.encode(texts), model.encode(texts), atol=1e-6)
    assert loaded.get_embedding_dimension() == DIMENSION
    assert loaded.max_seq_length == model.max_seq_length


def test_a_model_spells_once(model: SentenceTransformer) -> None:
    for seed in (0, 0, 1):
        random_layer(seed).append_to(model)
    assert sum(isinstance(part, WordEmbeddings) for part in model) == 1


def test_it_is_frozen_and_of_the_models_precision(model: SentenceTransformer) -> None:
    model.to(torch.bfloat16)
    before = len(model)
    random_layer().append_to(model)
    added = [weight for part in list(model)[before:] for weight in part.parameters()]
    assert added
    assert all(weight.dtype == torch.bfloat16 and not weight.requires_grad for weight in added)


def test_unit_vectors_are_not_normalised_twice(model: SentenceTransformer) -> None:
    model.append(Normalize())
    random_layer().append_to(model)
    assert sum(isinstance(part, Normalize) for part in model) == 2


def test_gradients_reach_the_encoder_through_it(model: SentenceTransformer) -> None:
    clusters = CorpusClusters(np.zeros(40, int), NOISE[:2], np.zeros(2, np.float32), spelling=random_layer())
    loss = ClusterNSLoss(model, clusters=clusters)
    features = dict(model.tokenizer(TEXTS[:8], padding=True, return_tensors="pt"))
    loss([features]).backward()
    assert model[0].model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("columns", [1, 2])
def test_features_that_come_again_are_embedded_anew(columns: int, tmp_path: Path) -> None:
    folder = save_bert(tmp_path, dropout=0.0)  # AdaptiveLayerLoss changes the layers between two calls
    model = SentenceTransformer(modules=[Transformer(str(folder)), Pooling(DIMENSION, "cls")], device="cpu")
    random_layer().append_to(model)
    loss = ClusterNSLoss(model)
    features = [dict(model.tokenizer(TEXTS[:8], padding=True, return_tensors="pt")) for _ in range(columns)]
    fresh = [dict(column) for column in features]
    loss(features)
    with torch.no_grad():
        model[0].model.embeddings.word_embeddings.weight.mul_(torch.rand(DIMENSION))
    again = loss(features)["contrastive"]
    torch.testing.assert_close(again, loss(fresh)["contrastive"])


# The table


def tokenizer_of(tokens: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(["[UNK]", *tokens])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordPiece(vocabulary, unk_token="[UNK]")), unk_token="[UNK]"
    )


def test_forms_of_a_word_are_alike_and_marks_and_case_are_no_letters() -> None:
    names = ["connect", "connected", "orange", "##ing", "▁ing", "Ġing", "ing", "Connect"]
    table = module._spell_tokens(tokenizer_of(names), 128)
    unknown, *rows = table
    assert not unknown.any()
    spelling = dict(zip(names, rows, strict=True))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert spelling["connect"] @ spelling["connected"] > 0.5
    assert abs(spelling["connect"] @ spelling["orange"]) < 0.3
    for other in ("▁ing", "Ġing", "ing"):
        np.testing.assert_array_equal(spelling["##ing"], spelling[other])
    np.testing.assert_array_equal(spelling["connect"], spelling["Connect"])


def test_rare_tokens_are_longer(model: SentenceTransformer) -> None:
    texts = [f"w0 {WORDS[1 + i % 9]} {WORDS[20 + i % 90]}" for i in range(180)]  # in 180, 20 and 2 of 180 sentences
    table = fit_spelling(NOISE, texts, model).table
    length = {word: np.linalg.norm(table[SPECIAL + WORDS.index(word)]) for word in ("w0", "w1", "w20", "w150")}
    assert length["w0"] == 0
    for word, found in {"w1": 20, "w20": 2, "w150": 0}.items():
        ratio = math.log(181 / (1 + found)) / math.log(181 / 21)
        assert math.isclose(length[word] / length["w1"], ratio, rel_tol=1e-4)


def test_spellings_have_a_quarter_of_the_weight_on_average(model: SentenceTransformer) -> None:
    layer = fit_spelling(NOISE, TEXTS, model)
    sums = [sum(layer.table[SPECIAL + WORDS.index(word)] for word in text.split()) for text in TEXTS]
    assert math.isclose(np.mean([vector @ vector / 10 for vector in sums]), 0.25, rel_tol=1e-3)


def test_spellings_lie_where_embeddings_vary_least(model: SentenceTransformer) -> None:
    scales = np.random.default_rng(1).permutation(np.arange(1, DIMENSION + 1))
    directions = fit_spelling(unit_rows(NOISE * scales), TEXTS, model).directions
    quiet = scales <= DIMENSION // 3
    assert directions.shape == (DIMENSION, DIMENSION // 3)
    np.testing.assert_allclose(directions.T @ directions, np.eye(DIMENSION // 3), atol=1e-5)
    assert np.square(directions[quiet]).sum() > 0.9 * (DIMENSION // 3)


def test_sentences_that_share_words_come_nearer_than_others(model: SentenceTransformer) -> None:
    others = [" ".join(text.split()[::-1]) for text in TEXTS]  # the same words, another embedding
    before = unit_rows(model.encode(TEXTS)) @ unit_rows(model.encode(others)).T
    fit_spelling(unit_rows(model.encode(TEXTS)), TEXTS, model).append_to(model)
    change = model.encode(TEXTS) @ model.encode(others).T - before
    assert np.diag(change).mean() > change.mean() + 0.02


# In the corpus clusters


def test_it_is_for_raw_models_of_corpora_without_topics_behind_the_whitening(model: SentenceTransformer) -> None:
    texts = [" ".join(2 * text.split()[:5]) for text in TEXTS]  # halves share words
    raw = judge(model, False)
    found = cluster_corpus(NOISE, sentences=texts, model=raw)
    assert not found.trust.any()
    assert found.spelling is not None
    rows = unit_rows(NOISE)
    expected = fit_spelling(fit_whitening(rows)(rows), texts, model)
    np.testing.assert_allclose(found.spelling.table, expected.table, atol=1e-6)
    projectors = [layer.directions @ layer.directions.T for layer in (found.spelling, expected)]
    np.testing.assert_allclose(*projectors, atol=1e-2)

    assert cluster_corpus(NOISE, sentences=texts, model=raw, topic_layer=False).spelling is None
    assert cluster_corpus(NOISE, sentences=texts).spelling is None
    grouped = 0.05 * NOISE + np.random.default_rng(1).normal(size=(20, DIMENSION))[np.arange(400) % 20]
    trusted = cluster_corpus(grouped, sentences=texts, model=raw)
    assert trusted.trust.any()
    assert trusted.spelling is None
    assert cluster_corpus(NOISE, sentences=texts, model=judge(model, True)).spelling is None

    before = len(model)
    ClusterNSLoss(model, clusters=found)
    kinds = [type(part).__name__ for part in list(model)[before:]]
    assert kinds == ["Normalize", "Dense", "Normalize", "WordEmbeddings", "Dense", "Pooling", "Dense", "Normalize"]


def test_a_model_without_tokens_of_transformers_cannot_spell(model: SentenceTransformer) -> None:
    static = SentenceTransformer(modules=[StaticEmbedding(model.tokenizer._tokenizer, embedding_dim=8)], device="cpu")
    assert can_spell(model)
    assert not can_spell(static)
    assert not can_spell(None)
    assert cluster_corpus(static.encode(TEXTS), sentences=TEXTS, model=static).spelling is None
