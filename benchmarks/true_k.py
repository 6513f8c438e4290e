"""Clusters at the true number of classes: those of `CorpusClusters.fit` itself, before and after a training.

    python benchmarks/true_k.py --data-dir DIR --output results/true_k

Methods of short-text clustering are given the number of classes and read out their own clusters. Here the corpus is
clustered with this number as the starting model embeds it, and as the model embeds it that `ClusterNS` has trained with
the number that it chose. Accuracy and V-measure by the classes, which do nothing else. One JSON file per corpus and
seed; files that exist are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sklearn.metrics import v_measure_score
from transformers import set_seed

import corpora
from compare import command, versions, write_missing
from methods import METHODS, Job
from st_clusterns import CorpusClusters, Recipe, embed_corpus
from st_clusterns.clustering.vectors import Floats
from st_clusterns.evaluation.scores import matched_accuracy
from st_clusterns.files import write_text
from st_clusterns.training.quickstart import packaged_model

MODELS = ("starting model", "ClusterNS")
CORPORA = ("StackOverflow", "SearchSnippets", "Biomedical", "AgNews8000")
# Accuracy of SCCL (Zhang et al. 2021, table 1), from another backbone and trained for the true number of classes.
SCCL = {"StackOverflow": 75.5, "SearchSnippets": 85.2, "Biomedical": 46.2, "AgNews8000": 88.2}


MADE_BY = (
    "Made by `python benchmarks/true_k.py --data-dir DIR --output DIR`. Accuracy ± standard deviation over seeds\n"
    "[V-measure] (number of seeds), times 100. No labels in training. SCCL: Zhang et al. 2021, from another backbone."
)


def run(name: str, seed: int, data: Path | None, cache: Path) -> dict[str, Any]:
    """Cluster a corpus before and after a training; return accuracy and V-measure (x100) of both."""
    texts, classes = corpora.load_classes(name, data)
    set_seed(seed)
    model = SentenceTransformer(packaged_model())

    def embed(sentences: Sequence[str] = texts, folder: Path | None = cache / "embeddings") -> Floats:
        return embed_corpus(sentences, model, show_progress_bar=False, bf16=True, cache=folder)

    scores = {MODELS[0]: score(texts, classes, embed(), seed)}
    with tempfile.TemporaryDirectory() as folder:
        notes = METHODS["ClusterNS"](Job(model, texts, embed, Recipe(seed=seed), Path(folder)))
    scores[MODELS[1]] = score(texts, classes, embed(folder=None), seed)
    print(name, seed, scores, flush=True)
    return {"scores": scores, "notes": notes, "versions": versions(), "command": command()}


def score(texts: Sequence[str], classes: Sequence[str], rows: Floats, seed: int) -> dict[str, float]:
    """Compare the clusters of as many as there are classes with the classes."""
    clusters = CorpusClusters.fit(texts, n_clusters=len(set(classes)), seed=seed, embeddings=rows)
    ids = dict(zip(clusters.sentences, clusters.ids.tolist(), strict=True))
    own = np.array([ids[text] for text in texts])
    scores = {"accuracy": matched_accuracy(classes, own), "v_measure": v_measure_score(classes, own)}
    return {name: 100 * float(value) for name, value in scores.items()}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return accuracy [V-measure] of each corpus, mean over seeds with the standard deviation of the accuracy."""
    lines = [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for model in MODELS:
        cells = []
        for runs in results.values():
            accuracies, v_measures = ([one["scores"][model][key] for one in runs] for key in ("accuracy", "v_measure"))
            spread = f" ± {np.std(accuracies, ddof=1):.1f}" if len(runs) > 1 else ""
            cells.append(f"{np.mean(accuracies):.1f}{spread} [{np.mean(v_measures):.1f}] ({len(runs)})")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines.append(f"| SCCL | {' | '.join(str(SCCL[name]) for name in results)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "st_clusterns_benchmarks")
    parser.add_argument("--corpora", nargs="*", choices=CORPORA, default=list(CORPORA))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    write_missing(args.output, args.corpora, args.seeds, lambda name, seed: run(name, seed, args.data_dir, args.cache))
    found = {name: sorted(args.output.glob(f"{name}-*.json")) for name in CORPORA}
    results = {name: [json.loads(path.read_text(encoding="utf-8")) for path in paths] for name, paths in found.items()}
    text = table({name: runs for name, runs in results.items() if runs})
    write_text(f"# Clusters at the true number of classes\n\n{MADE_BY}\n\n{text}", args.output / "README.md")
    print(text)


if __name__ == "__main__":
    main()
