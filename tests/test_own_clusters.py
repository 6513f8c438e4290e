"""Clusters of one's own, the clusters of new sentences, and the number of clusters for other tools."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from blobs import N_BLOBS, TIGHT, TRUE_IDS, directions
from sentence_transformers import SentenceTransformer
from tiny_bert import load_model, make_sentences

from st_clusterns import ClusterNSLoss, CorpusClusters, choose_n_clusters, embed_corpus
from st_clusterns.clustering import sample
from st_clusterns.clustering.n_clusters import trust_bound
from st_clusterns.clustering.vectors import unit_rows
from st_clusterns.losses.text_hashes import hash_sentences

TEXTS = [f"text {i}" for i in range(len(TIGHT))]
DOCS = (Path(__file__).parent.parent / "docs" / "topics.md").read_text(encoding="utf-8")


def own(labels: object, rows: np.ndarray = TIGHT) -> CorpusClusters:
    return CorpusClusters.from_labels(TEXTS, labels, embeddings=rows)  # type: ignore[arg-type]


def test_true_labels_are_trusted_and_shuffled_ones_are_not() -> None:
    true = own(TRUE_IDS)
    np.testing.assert_array_equal(true.ids, TRUE_IDS)
    assert true.has_topics
    assert true.mean_trust > 0.8
    assert true.curve == {N_BLOBS: pytest.approx(true.mean_trust)}
    unit = unit_rows(TIGHT)
    for cluster in range(N_BLOBS):
        np.testing.assert_allclose(true.centroids[cluster], unit[cluster == TRUE_IDS].mean(axis=0), atol=1e-5)
    shuffled = own(np.random.default_rng(0).permutation(TRUE_IDS))
    assert not shuffled.has_topics
    assert shuffled.mean_trust < 0.1
    assert not own(TRUE_IDS, directions(len(TIGHT))).has_topics, "labels that the embeddings know nothing of"


def test_one_wrong_cluster_among_true_ones_is_not_trusted() -> None:
    labels = TRUE_IDS.copy()
    labels[::8] = N_BLOBS
    clusters = own(labels)
    assert clusters.trust[N_BLOBS] < 0.2 < clusters.trust[:N_BLOBS].min()
    assert clusters.trusted.tolist() == [True] * N_BLOBS + [False]


def test_texts_as_labels_are_names_and_numbers_are_not() -> None:
    names = [f"topic {i:02}" for i in TRUE_IDS]
    clusters = own(names)
    assert clusters.names == sorted(set(names))
    assert [clusters.names[i] for i in clusters.ids] == names
    np.testing.assert_array_equal(own(TRUE_IDS * 10 - 50).ids, TRUE_IDS)
    assert own(TRUE_IDS).names != clusters.names


@pytest.mark.parametrize("kind", [torch.tensor, np.array, pd.Series, lambda ids: [torch.tensor(one) for one in ids]])
def test_labels_of_any_kind(kind: Any) -> None:
    np.testing.assert_array_equal(own(kind(TRUE_IDS.tolist())).ids, TRUE_IDS)


@pytest.mark.parametrize("nothing", [-1, None, float("nan"), np.nan, pd.NA])
def test_sentences_without_a_label_have_the_last_cluster_which_is_never_trusted(nothing: object) -> None:
    labels = [nothing if i % 4 == 0 else label for i, label in enumerate(TRUE_IDS.tolist())]
    clusters = own(labels)
    assert clusters.n_clusters == N_BLOBS + 1
    assert (clusters.ids == N_BLOBS).tolist() == [i % 4 == 0 for i in range(len(TEXTS))]
    assert clusters.trust[N_BLOBS] == 0
    assert clusters.has_topics, "the verdict is on the sentences that have a label"
    assert not replace(clusters, has_topics=True).trusted[N_BLOBS]
    assert clusters.bound == trust_bound(600), "as is what it asks for"


def test_of_duplicates_the_first_label_counts() -> None:
    clusters = CorpusClusters.from_labels([*TEXTS, TEXTS[0]], [*TRUE_IDS, 3], embeddings=[*TIGHT, TIGHT[5]])
    np.testing.assert_array_equal(clusters.ids, TRUE_IDS)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "There are 2 labels for 800 sentences: pass one each"),
        ([7] * 800, r"labels holds 1 distinct label\(s\): clusters are 2 or more"),
        ([-1] * 800, r"labels holds 0 distinct label\(s\)"),
        ([0, "a"] * 400, r"labels holds values of several types \(int, str\): convert them to one"),
    ],
)
def test_labels_that_make_no_clusters_are_refused(labels: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own(labels)


def test_new_sentences_have_the_nearest_centroid_and_old_ones_their_cluster(model: SentenceTransformer) -> None:
    sentences = list(dict.fromkeys(make_sentences(600)))
    old, new = sentences[:400], sentences[400:]
    labels = np.random.default_rng(0).integers(8, size=400)  # so that few sentences have the nearest centroid
    clusters = CorpusClusters.from_labels(old, labels, model, show_progress_bar=False, prompt="w1 ")
    rows = embed_corpus(new, model, show_progress_bar=False, prompt="w1 ")
    expected = (rows @ unit_rows(clusters.centroids).T).argmax(axis=1)
    np.testing.assert_array_equal(clusters.predict([*new, *old, new[0]], model)[: len(new)], expected)
    np.testing.assert_array_equal(clusters.predict([*new, *old, new[0]], model)[len(new) : -1], clusters.ids)
    np.testing.assert_array_equal(clusters.predict(rows), expected)
    assert clusters.predict(rows[:1]).tolist() == clusters.predict(new[:1], model).tolist() == expected[:1].tolist()
    # The same as a loss sees it, where the clusters are trusted.
    loss = ClusterNSLoss(model, replace(clusters, has_topics=True, trust=np.ones(8, np.float32)))
    batch = [*new[:10], *old[:10]]
    rows = torch.tensor(embed_corpus(batch, model, show_progress_bar=False, prompt="w1 "))
    hashes = hash_sentences(model, batch, clusters.prompt)
    ids = loss.prepare([rows, rows], [hashes, hashes]).ids  # type: ignore[attr-defined]
    np.testing.assert_array_equal(ids, clusters.predict(batch, model))


def test_texts_without_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs the model: clusters.predict\(sentences, model\)"):
        own(TRUE_IDS).predict(["a text"])


def test_the_number_of_clusters_of_any_embeddings() -> None:
    assert choose_n_clusters(TIGHT.tolist()) == choose_n_clusters(unit_rows(TIGHT)), "lengths do not matter"
    with pytest.raises(ValueError, match="NaN or Inf in row 3 "):
        choose_n_clusters([[1.0], [1.0], [1.0], [np.nan]])


def test_the_example_for_scikit_learn_runs(model: SentenceTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"<!-- runs: scikit-learn -->\s*```python\n(.*?)```", DOCS, re.DOTALL)
    scope: dict[str, object] = {"sentences": list(dict.fromkeys(make_sentences(400))), "model": model}
    exec(compile(code, "docs/topics.md", "exec"), scope)
    assert "clusters, mean trust" in capsys.readouterr().out


def test_the_arguments_of_fit_are_taken_and_reach_the_embedding(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_fit, own = (set(inspect.signature(make).parameters) for make in (CorpusClusters.fit, CorpusClusters.from_labels))
    assert of_fit - {"n_clusters"} < own

    model, texts, seen = load_model(bert), make_sentences(30), {}
    rows = model.encode(texts, show_progress_bar=False)
    monkeypatch.setattr(sample, "embed_corpus", lambda texts, model, **how: seen.update(how) or rows)
    asked = {"batch_size": 7, "show_progress_bar": False, "cache": Path("here"), "devices": ["a", "b"], "prompt": "w1 "}
    CorpusClusters.from_labels(texts, [place % 3 for place in range(30)], model, **asked)
    assert seen == asked
