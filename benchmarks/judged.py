"""What the judge of `adapt` says about the start, the trained model and the mean of both weights, and what search says.

    python benchmarks/judged.py --data-dir DIR --output results/judged

`adapt` holds a tenth of the documents out and judges by them without labels. This script trains as `adapt` does, on
clusters of whole documents as compare.py has them, judges all three models in the same way, and then scores them by the
queries of the collection, which choose nothing. One JSON file per collection and seed; files that exist are kept.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers import set_seed

import corpora
from compare import command, versions, write_missing
from st_clusterns import ClusterNSLoss, CorpusClusters, Recipe, embed_corpus, views_dataset
from st_clusterns.clustering.vectors import Floats
from st_clusterns.models import average_weights, copy_weights, reading_at_most
from st_clusterns.training.adapt import _hold_out
from st_clusterns.training.quickstart import packaged_model
from st_clusterns.training.trainer import run_trainer
from st_clusterns.training.views import choose_kind


def run(name: str, seed: int, data: Path, cache: Path) -> dict[str, Any]:
    """Train once as `adapt` does; return the judge's and the search's scores of all three models."""
    corpus, recipe = corpora.load(name, data), replace(Recipe(), seed=seed)
    set_seed(seed)
    model = SentenceTransformer(packaged_model())
    start = copy_weights(model)

    def embed(sentences: Sequence[str], folder: Path | None = None) -> Floats:
        return embed_corpus(sentences, model, show_progress_bar=False, bf16=True, cache=folder)

    def embed_start(sentences: Sequence[str]) -> Floats:
        return embed(sentences, cache / "embeddings")

    began = time.monotonic()
    clusters = CorpusClusters.fit(corpus.texts, None, None, seed, embeddings=embed_start(corpus.texts))
    texts = Dataset.from_dict({"sentence": clusters.sentences})
    with reading_at_most(model, recipe.max_length):
        loss = ClusterNSLoss(model, clusters)
        kind = choose_kind(clusters.sentences, clusters.has_topics)
        texts, judge = _hold_out(texts, recipe)
        if kind != "span" or judge is None:
            raise SystemExit(f"{name} is no collection of documents: `adapt` has no judge for it.")
        with tempfile.TemporaryDirectory() as folder:
            dataset = views_dataset(texts, clusters, kind, seed)
            run_trainer(model, loss, dataset, recipe, Path(folder), show_progress=False)
    seconds = round(time.monotonic() - began, 1)
    trained = copy_weights(model)
    average_weights(model, start)
    mean = copy_weights(model)

    scores = {}
    for title, state in {"start": start, "mean": mean, "trained": trained}.items():
        model.load_state_dict(state)
        with reading_at_most(model, recipe.max_length):
            judged = judge(model)
        scores[title] = {**judged, **corpus.score(embed_start if title == "start" else embed)}
        print(name, seed, title, {key: round(value, 3) for key, value in scores[title].items()}, flush=True)
    notes = {"n_clusters": clusters.n_clusters, "has_topics": clusters.has_topics, "held_out": len(judge.spans)}
    return {
        "corpus": name,
        "recipe": asdict(recipe),
        "scores": scores,
        "notes": notes,
        "seconds_training": seconds,
        "versions": versions(),
        "command": command(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "st_clusterns_benchmarks")
    parser.add_argument("--corpora", nargs="*", default=list(corpora.SEARCH))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    args = parser.parse_args()
    write_missing(args.output, args.corpora, args.seeds, lambda name, seed: run(name, seed, args.data_dir, args.cache))


if __name__ == "__main__":
    main()
