"""The topic layer against scikit-learn's discriminant analysis, and at the end of real models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import StubModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tiny_bert import make_sentences

from st_clusterns import ClusterNSLoss, CorpusClusters, cluster_corpus
from st_clusterns import topic_layer as module
from st_clusterns.corpus import follow_corpus
from st_clusterns.rows import unit_rows
from st_clusterns.topic_layer import TopicLayer, fit_topic_layer, fit_whitening

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


def test_whitening_is_that_of_principal_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 0.0)
    monkeypatch.setattr(module, "WHITENING_SHRINKAGE", 0.0)
    monkeypatch.setattr(module, "WHITENING_NOISE", 0.0)
    rows, _ = corpus()
    expected = PCA(whiten=True).fit_transform(rows)[:100]
    layer = fit_whitening(rows)
    actual = (rows - rows.mean(axis=0))[:100] @ layer.weight.T
    np.testing.assert_allclose(
        actual @ actual.T / (actual**2).mean(), expected @ expected.T / (expected**2).mean(), atol=0.01
    )
    assert not layer.bias.any()


def test_half_of_a_similarity_is_not_whitened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHITENING_SHRINKAGE", 0.0)
    monkeypatch.setattr(module, "WHITENING_NOISE", 0.0)
    rows, _ = corpus()
    layer = fit_whitening(rows)
    variances = np.linalg.eigvalsh(np.cov((rows @ layer.weight.T).T))
    before = np.linalg.eigvalsh(np.cov(rows.T))
    np.testing.assert_allclose(variances / variances.sum(), (1 / D + before / before.sum()) / 2, rtol=1e-3)


def test_few_rows_are_whitened_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured on few rows is noise; with many, new rows vary alike in all directions."""
    monkeypatch.setattr(module, "KEPT", 0.0)

    def spread(n_rows: int) -> float:
        layer = fit_whitening(corpus(n_rows)[0])
        variances = np.linalg.eigvalsh(np.cov((corpus(4000, seed=1)[0] @ layer.weight.T).T))
        return float(variances[-1] / variances[0])

    rows = corpus(4000, seed=1)[0]
    plain = np.linalg.eigvalsh(np.cov(rows.T))
    assert spread(40_000) < 2 < spread(20) < plain[-1] / plain[0]
    assert np.isfinite(fit_whitening(np.repeat(rows[:1], 50, axis=0)).weight).all()


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


# In the corpus clusters


def test_clusters_that_repeat_bring_a_layer_and_centroids_behind_it() -> None:
    generator = np.random.default_rng(0)
    means = 4 * generator.normal(size=(16, D))
    rows = unit_rows(means[generator.integers(16, size=2000)] + 0.5 * generator.normal(size=(2000, D)))
    clusters = cluster_corpus(rows, 16)
    assert clusters.layer is not None
    behind = clusters.layer(rows)
    for k in range(16):
        np.testing.assert_allclose(clusters.centroids[k], behind[clusters.ids == k].mean(axis=0), atol=1e-5)
    assert follow_corpus(behind, clusters).layer is clusters.layer
    assert cluster_corpus(rows, 16, topic_layer=False).layer is None


def test_directions_without_clusters_bring_none() -> None:
    assert cluster_corpus(np.random.default_rng(0).normal(size=(2000, D)), 8).layer is None


# At the end of a model


def random_layer(dimension: int, seed: int = 0) -> TopicLayer:
    generator = np.random.default_rng(seed)
    weight = np.eye(dimension) + 0.1 * generator.normal(size=(dimension, dimension))
    return TopicLayer(weight.astype(np.float32), generator.normal(size=dimension).astype(np.float32) / 10)


def make_clusters(model: SentenceTransformer, layer: TopicLayer | None) -> CorpusClusters:
    dimension = model.get_embedding_dimension()
    centroids = np.random.default_rng(1).normal(size=(K, dimension)).astype(np.float32)
    return CorpusClusters(np.arange(40) % K, centroids, np.ones(K, np.float32), layer)


def test_the_model_gives_what_the_layer_gives_and_is_loaded_by_the_host_library_alone(
    model: SentenceTransformer, tmp_path: Path
) -> None:
    sentences = make_sentences(20)
    before = unit_rows(model.encode(sentences))
    layer = random_layer(before.shape[1])
    ClusterNSLoss(model, clusters=make_clusters(model, layer))
    after = model.encode(sentences)
    np.testing.assert_allclose(after, layer(before), atol=1e-5)
    assert not np.allclose(after, before, atol=0.1)
    model.save(str(tmp_path / "model"))
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "model")).encode(sentences), after, atol=1e-6)


def test_it_is_appended_once_however_many_losses_are_made(model: SentenceTransformer) -> None:
    clusters = make_clusters(model, random_layer(model.get_embedding_dimension()))
    ClusterNSLoss(model, clusters=clusters)
    count = len(model)
    ClusterNSLoss(model, clusters=clusters).reset()
    assert len(model) == count
    assert isinstance(model[-1], Normalize)


def test_another_layer_is_not_taken_for_the_same(model: SentenceTransformer) -> None:
    dimension = model.get_embedding_dimension()
    for seed in range(2):
        random_layer(dimension, seed).append_to(model)
    assert sum(type(part).__name__ == "Dense" for part in model) == 2


def test_it_is_frozen_and_of_the_models_precision(model: SentenceTransformer) -> None:
    model.to(torch.bfloat16)
    layer = random_layer(model.get_embedding_dimension())
    layer.append_to(model)
    layer.append_to(model)  # the rounded weights are known again
    linear = [part.linear for part in model if type(part).__name__ == "Dense"]
    assert len(linear) == 1
    assert linear[0].weight.dtype == torch.bfloat16
    assert not linear[0].weight.requires_grad


def test_without_a_layer_the_model_stays_as_it_is(model: SentenceTransformer) -> None:
    count = len(model)
    ClusterNSLoss(model, clusters=make_clusters(model, None))
    assert len(model) == count


def test_the_published_method_never_takes_one(model: SentenceTransformer) -> None:
    from st_clusterns.corpus import remember_corpus

    count, owner = len(model), object
    clusters = make_clusters(model, random_layer(model.get_embedding_dimension()))
    remember_corpus(model, clusters, owner)
    ClusterNSLoss.from_preset(model, "paper/bert-base", n_clusters=K)
    assert len(model) == count


def test_what_is_no_sequence_of_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="not of a StubModel: cluster the corpus with topic_layer=False"):
        random_layer(8).append_to(StubModel(8))
