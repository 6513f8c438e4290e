"""The topic layer against scikit-learn's discriminant analysis, and at the end of real models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tiny_bert import DIMENSION, make_sentences

from st_clusterns import CorpusClusters, embed_corpus
from st_clusterns.clustering import topic_layer as module
from st_clusterns.clustering.topic_layer import TopicLayer, append_topic_layer, fit_topic_layer
from st_clusterns.clustering.vectors import unit_rows

K, D = 5, 12


def corpus(n_rows: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around K means, which differ in the first 4 directions; the last 8 vary, idly, five times as much."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(K, size=n_rows)
    means = np.zeros((K, D))
    means[:, :4] = np.eye(K, 4)
    noise = generator.normal(size=(n_rows, D)) * np.where(np.arange(D) < 4, 0.3, 1.5)
    return unit_rows(means[ids] + noise + 0.5), ids


def separation(rows: np.ndarray, ids: np.ndarray) -> float:
    """Mean cosine of pairs of one cluster less that of any pair."""
    cosines = rows[:1500] @ rows[:1500].T
    same = ids[:1500, None] == ids[:1500]
    return float(cosines[same].mean() - cosines.mean())


def test_topics_are_told_apart_better_on_other_rows_too() -> None:
    layer = fit_topic_layer(*corpus(seed=0), K)
    rows, ids = corpus(seed=1)
    assert separation(layer(rows), ids) > 2 * separation(rows, ids)


def test_the_whitened_space_is_that_of_discriminant_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing held back, distances within the topic directions are scikit-learn's LDA's."""
    monkeypatch.setattr(module, "KEPT", 0.0)
    monkeypatch.setattr(module, "SHRINKAGE", 0.0)
    monkeypatch.setattr(module, "NOISE", 0.0)
    monkeypatch.setattr(module, "TOPIC", 1e-12)  # every direction with any variance between clusters counts in full
    rows, ids = corpus()
    layer = fit_topic_layer(rows, ids, K)
    ours = (rows @ layer.weight.T + layer.bias)[:, : K - 1]
    theirs = LinearDiscriminantAnalysis(solver="eigen").fit(rows, ids).transform(rows)
    ours, theirs = ours / ours.std(axis=0), theirs / theirs.std(axis=0)
    np.testing.assert_allclose(np.abs(np.diag(np.corrcoef(ours.T, theirs.T)[: K - 1, K - 1 :])), 1, atol=1e-3)


def test_within_clusters_all_directions_vary_alike_but_for_their_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tells topics apart counts up to twice as much as what does not."""
    monkeypatch.setattr(module, "KEPT", 0.0)
    monkeypatch.setattr(module, "SHRINKAGE", 0.0)
    monkeypatch.setattr(module, "NOISE", 0.0)
    rows, ids = corpus(40_000)
    layer = fit_topic_layer(rows, ids, K)
    mapped = rows @ layer.weight.T + layer.bias
    means = np.stack([mapped[ids == k].mean(axis=0) for k in range(K)])
    spread = (mapped - means[ids]).std(axis=0)
    ratios = (means[ids].std(axis=0) / spread) ** 2
    np.testing.assert_allclose(spread / spread[-1], 1 + ratios / (ratios + module.TOPIC), rtol=0.02)
    assert spread[0] > 1.5 * spread[-1]


def test_half_of_a_similarity_is_that_of_the_centred_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ids = corpus()

    def similarities(kept: float) -> np.ndarray:
        monkeypatch.setattr(module, "KEPT", kept)
        layer = fit_topic_layer(rows, ids, K)
        mapped = rows @ layer.weight.T + layer.bias
        return mapped[:50] @ mapped[:50].T / np.square(mapped).sum(axis=1).mean()

    centred = rows - rows.mean(axis=0)
    plain = centred[:50] @ centred[:50].T / np.square(centred).sum(axis=1).mean()
    np.testing.assert_allclose(similarities(1.0), plain, atol=1e-4)
    np.testing.assert_allclose(similarities(0.5), (similarities(0.0) + plain) / 2, atol=1e-4)


def test_topics_come_first() -> None:
    """Embeddings cut short keep them."""
    rows, ids = corpus()
    mapped = fit_topic_layer(rows, ids, K)(rows)
    first, last = unit_rows(mapped[:, :4]), unit_rows(mapped[:, 4:])
    assert separation(first, ids) > 10 * separation(last, ids)


def test_the_mean_goes_to_the_origin() -> None:
    rows, ids = corpus()
    layer = fit_topic_layer(rows, ids, K)
    np.testing.assert_allclose((rows @ layer.weight.T + layer.bias).mean(axis=0), 0, atol=1e-4)


@pytest.mark.parametrize("n_rows", [8, 40])
def test_fewer_rows_than_directions_are_no_reason_to_fail(n_rows: int) -> None:
    rows, _ = corpus(n_rows)
    mapped = fit_topic_layer(rows, np.arange(n_rows) % 3, 4)(rows)  # and one cluster is empty
    np.testing.assert_allclose(np.linalg.norm(mapped, axis=1), 1, atol=1e-5)


# At the end of a model


def make_clusters(model: SentenceTransformer, seed: int = 0) -> CorpusClusters:
    """Clusters of sentences whose embeddings are those of a model moved towards 8 far points."""
    sentences = make_sentences(400, seed)
    points = 2 * np.random.default_rng(seed).normal(size=(8, DIMENSION))
    rows = embed_corpus(sentences, model, show_progress_bar=False) + points[np.arange(400) % 8]
    return CorpusClusters.fit(sentences, n_clusters=8, embeddings=rows)


@pytest.fixture
def clusters(model: SentenceTransformer) -> CorpusClusters:
    return make_clusters(model)


@pytest.fixture
def normalised(model: SentenceTransformer) -> SentenceTransformer:
    """The model, with a `Normalize` at its end."""
    model.append(Normalize())
    return model


SENTENCES = make_sentences(20, seed=3)


def names(model: SentenceTransformer) -> list[str]:
    return [type(part).__name__ for part in model]


def test_the_model_gives_what_the_layer_gives_and_is_loaded_by_the_host_library_alone(
    model: SentenceTransformer, clusters: CorpusClusters, tmp_path: Path
) -> None:
    before = unit_rows(model.encode(SENTENCES))
    clusters.add_topic_layer(model)
    after = model.encode(SENTENCES)
    layer = fit_topic_layer(clusters.embeddings, clusters.ids, clusters.n_clusters)
    np.testing.assert_allclose(after, layer(before), atol=1e-5)
    assert not np.allclose(after, before, atol=0.1)
    model.save(str(tmp_path / "model"))
    modules = json.loads((tmp_path / "model" / "modules.json").read_text())
    assert len(modules) == 5
    assert all(part["type"].startswith("sentence_transformers.") for part in modules)
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    np.testing.assert_allclose(loaded.encode(SENTENCES), after, atol=1e-6)


def test_it_is_appended_once(model: SentenceTransformer, clusters: CorpusClusters) -> None:
    clusters.add_topic_layer(model)
    modules, once = list(model), model.encode(SENTENCES)
    clusters.add_topic_layer(model)
    assert list(model) == modules
    assert names(model) == ["Transformer", "Pooling", "Normalize", "Dense", "Normalize"]
    np.testing.assert_array_equal(model.encode(SENTENCES), once)


def test_removing_it_restores_a_model_to_the_last_bit(
    normalised: SentenceTransformer, clusters: CorpusClusters
) -> None:
    before, modules = normalised.encode(SENTENCES), list(normalised.named_children())
    for _ in range(2):
        clusters.add_topic_layer(normalised)
        assert names(normalised) == ["Transformer", "Pooling", "Normalize", "Dense", "Normalize"]
        assert np.abs(normalised.encode(SENTENCES) - before).max() > 0.1
        clusters.remove_topic_layer(normalised)
        assert list(normalised.named_children()) == modules
        np.testing.assert_array_equal(normalised.encode(SENTENCES), before)


def test_removing_it_restores_a_model_without_normalize_to_the_last_bit(
    model: SentenceTransformer, clusters: CorpusClusters
) -> None:
    before, modules = model.encode(SENTENCES), list(model)
    assert names(model) == ["Transformer", "Pooling"]
    clusters.add_topic_layer(model)
    clusters.remove_topic_layer(model)
    assert list(model) == modules
    np.testing.assert_array_equal(model.encode(SENTENCES), before)


def test_removing_what_is_not_there_changes_nothing(model: SentenceTransformer, clusters: CorpusClusters) -> None:
    modules = list(model)
    clusters.remove_topic_layer(model)
    assert list(model) == modules


def test_layers_of_two_clusterings_are_never_stacked(model: SentenceTransformer, clusters: CorpusClusters) -> None:
    """As when a notebook cell that fits clusters and adds their layer is run again."""
    clusters.add_topic_layer(model)
    modules, alone = list(model), model.encode(SENTENCES)
    again = make_clusters(model, seed=1)
    with pytest.raises(ValueError, match="topic layer of other clusters"):
        again.add_topic_layer(model)
    assert list(model) == modules
    np.testing.assert_array_equal(model.encode(SENTENCES), alone)
    again.remove_topic_layer(model)  # whosever it is
    assert names(model) == ["Transformer", "Pooling"]


def test_a_reloaded_model_is_known_to_have_it(
    model: SentenceTransformer, clusters: CorpusClusters, tmp_path: Path
) -> None:
    clusters.add_topic_layer(model)
    model.save(str(tmp_path / "model"))
    reloaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    clusters.add_topic_layer(reloaded)
    assert names(reloaded) == names(model)


def test_it_is_frozen_and_of_the_models_precision(model: SentenceTransformer, clusters: CorpusClusters) -> None:
    model.to(torch.bfloat16)
    clusters.add_topic_layer(model)
    clusters.add_topic_layer(model)  # the rounded weights are known again
    linear = [part.linear for part in model if isinstance(part, Dense)]
    assert len(linear) == 1
    assert linear[0].weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in linear[0].parameters())
    assert all(parameter.requires_grad for parameter in model[0].parameters())


def test_truncated_embeddings_keep_the_first_directions(model: SentenceTransformer, clusters: CorpusClusters) -> None:
    clusters.add_topic_layer(model)
    whole = model.encode(SENTENCES)
    model.truncate_dim = 4
    np.testing.assert_array_equal(model.encode(SENTENCES), whole[:, :4])


# What is refused


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_a_model_that_compares_lengths_is_refused(
    model: SentenceTransformer, clusters: CorpusClusters, similarity: str
) -> None:
    model.similarity_fn_name = similarity
    with pytest.raises(ValueError, match=f"similarity_fn_name='{similarity}'.*Set it to 'cosine'"):
        clusters.add_topic_layer(model)
    assert names(model) == ["Transformer", "Pooling"]
    model.similarity_fn_name = "cosine"
    clusters.add_topic_layer(model)


@pytest.mark.parametrize("n_clusters", [None, 8])
def test_clusters_without_topics_have_no_layer(model: SentenceTransformer, n_clusters: int | None) -> None:
    noise = np.random.default_rng(0).normal(size=(400, DIMENSION))
    clusters = CorpusClusters.fit(make_sentences(400), n_clusters=n_clusters, embeddings=noise)
    with pytest.raises(ValueError, match="The corpus has no topics, so no layer is to be had"):
        clusters.add_topic_layer(model)
    clusters.remove_topic_layer(model)
    assert names(model) == ["Transformer", "Pooling"]


def test_a_model_of_another_dimension_is_refused(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match=f"The layer is for 8 dimensions, the model has {DIMENSION}"):
        append_topic_layer(model, TopicLayer(np.eye(8, dtype=np.float32), np.zeros(8, np.float32)), "clusters")
    assert names(model) == ["Transformer", "Pooling"]


def test_clusters_are_checked_against_the_model_they_are_used_with(
    model: SentenceTransformer, clusters: CorpusClusters
) -> None:
    clusters.check_model(model, DIMENSION)
    with pytest.raises(ValueError, match=f"The model has 8 dimensions, the clusters {DIMENSION}"):
        clusters.check_model(model, 8)
    clusters.add_topic_layer(model)
    with pytest.raises(ValueError, match=r"has the topic layer of these clusters.*remove_topic_layer"):
        clusters.check_model(model, DIMENSION)
    clusters.remove_topic_layer(model)
    clusters.check_model(model, DIMENSION)
