"""Compare methods on corpora over seeds, from one declarative file; resumable, and safe to start several times.

    python benchmarks/compare.py benchmarks/foundation.json --data-dir DIR --output results/foundation

Each run (method x corpus x seed) writes one JSON file with its settings, versions and seconds; runs that have one are
skipped, runs that another process works on too. When all are there, the table is (re)written to
`results/NAME/README.md`. No labels are used in training; test labels choose nothing.

Data: `--data-dir` holds `clustering/NAME.tsv.gz` (columns label, text), `sts/STSB.tsv.gz` and `corpus/wiki_1m.txt.gz`;
without it the same sets come from the hub (see `HUB`).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed

from st_clusterns import ClusterDataLoader, ClusterNSLoss, cluster_corpus, embed_corpus
from st_clusterns.quickstart import packaged_model
from st_clusterns.report import write_json
from st_clusterns.scoring import score_clustering
from st_clusterns.training import Recipe, run_trainer

CLUSTERING = ("StackOverflow", "SearchSnippets", "Biomedical", "AgNews8000")
HUB = {  # the same texts on the hub: (data set, configuration, split, text column, label column)
    "StackOverflow": ("mteb/stackoverflow-clustering-short", None, "test", "sentences", "labels"),
    "STSB": ("sentence-transformers/stsb", None, "validation", ("sentence1", "sentence2"), "score"),
    "wiki": ("princeton-nlp/datasets-for-simcse", None, "train", "text", None),
}


def read_table(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def load_corpus(name: str, data: Path) -> tuple[list[str], list[str] | None]:
    """Return the texts to train on, and their classes for scoring (None for Wikipedia)."""
    if name in CLUSTERING:
        rows = read_table(data / "clustering" / f"{name}.tsv.gz")
        return [row["text"] for row in rows], [row["label"] for row in rows]
    count = int(name.removeprefix("wiki"))
    with gzip.open(data / "corpus" / "wiki_1m.txt.gz", "rt", encoding="utf-8") as file:
        return [line.strip() for _, line in zip(range(count), file, strict=False)], None


def sts_dev(model: SentenceTransformer, data: Path) -> float:
    """Spearman (x100) of cosines with the gold scores of STS-B dev."""
    rows = [row for row in read_table(data / "sts" / "STSB.tsv.gz") if row["split"] == "dev"]
    first = embed_corpus([row["sentence1"] for row in rows], model, show_progress_bar=False, bf16=True)
    second = embed_corpus([row["sentence2"] for row in rows], model, show_progress_bar=False, bf16=True)
    return 100 * float(spearmanr((first * second).sum(1), [float(row["score"]) for row in rows])[0])


def embed_start(model: SentenceTransformer, name: str, texts: list[str], cache: Path) -> np.ndarray:
    """Embed a corpus with the starting model once for all runs."""
    path = cache / f"{name}.npy"
    if not path.exists():
        rows = embed_corpus(texts, model, show_progress_bar=False, bf16=True)
        partial = path.with_name(f"{os.getpid()}-{path.name}")
        np.save(partial, rows)
        os.replace(partial, path)
    return np.load(path)


def train_method(
    method: str, model: SentenceTransformer, texts: list[str], start: np.ndarray, recipe: Recipe, work: Path
) -> dict[str, Any]:
    """Train `model` in place with one method; return what is worth noting."""
    if method == "starting model":
        return {}
    if method == "in-batch contrastive":
        run_trainer(model, MultipleNegativesRankingLoss(model), texts, None, recipe, work, show_progress=False)
        return {}
    if method.startswith("paper/"):
        loss = ClusterNSLoss.from_preset(model, method, n_clusters=64)
        run_trainer(model, loss, texts, None, recipe, work, show_progress=False)
        return {"loss": loss.get_config_dict(), "started": bool(loss.clusters.started)}
    if method == "ClusterNS, model.fit":
        loader = ClusterDataLoader(
            texts, model, batch_size=recipe.batch_size, seed=recipe.seed, show_progress_bar=False
        )
        loss = ClusterNSLoss(model)
        model.max_seq_length, full = recipe.max_length, model.max_seq_length
        model.fit(
            [(loader, loss)],
            epochs=1,
            steps_per_epoch=recipe.max_steps,
            warmup_steps=0,
            show_progress_bar=False,
            optimizer_params={"lr": recipe.learning_rate},
            checkpoint_path=None,
        )
        model.max_seq_length = full
        return {"loss": loss.get_config_dict()}
    clusters = cluster_corpus(start, seed=recipe.seed)
    loss = ClusterNSLoss(model, clusters=clusters)
    run_trainer(model, loss, texts, clusters, recipe, work, show_progress=False)
    return {"loss": loss.get_config_dict(), "mean_trust": float(clusters.trust.mean())}


def run(method: str, corpus: str, seed: int, recipe: Recipe, data: Path, cache: Path) -> dict[str, Any]:
    began = time.monotonic()
    model_path = packaged_model()
    set_seed(seed)
    model = SentenceTransformer(model_path)
    texts, classes = load_corpus(corpus, data)
    start = embed_start(model, corpus, texts, cache)
    set_seed(seed)
    trained = time.monotonic()
    notes = train_method(method, model, texts, start, recipe, cache / f"{os.getpid()}")
    trained = time.monotonic() - trained
    if classes is None:
        scores = {"sts_dev": sts_dev(model, data)}
    else:
        after = start if method == "starting model" else embed_corpus(texts, model, show_progress_bar=False, bf16=True)
        scores = score_clustering(after, classes, restarts=3)
    return {
        "method": method,
        "corpus": corpus,
        "seed": seed,
        "scores": scores,
        "notes": notes,
        "recipe": {**recipe.__dict__, "seed": seed},
        "sentences": len(texts),
        "seconds": round(time.monotonic() - began, 1),
        "seconds_training": round(trained, 1),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "versions": {
            name: version(name) for name in ("sentence-transformers", "torch", "transformers", "scikit-learn")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "st_clusterns_benchmarks")
    args = parser.parse_args()
    plan = json.loads(args.plan.read_text())
    args.output.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    for seed in plan["seeds"]:
        for corpus in plan["corpora"]:
            for method in plan["methods"]:
                if method == "starting model" and seed != plan["seeds"][0]:
                    continue  # nothing random in it
                if corpus not in plan.get("only", {}).get(method, [corpus]):
                    continue
                name = f"{corpus}-{method}-{seed}".replace("/", "_").replace(" ", "_").replace(",", "")
                path, claim = args.output / f"{name}.json", args.cache / f"{args.output.name}-{name}.claim"
                if path.exists():
                    continue
                try:
                    claim.touch(exist_ok=False)
                except FileExistsError:
                    print(f"{name}: another process works on it ({claim})", flush=True)
                    continue
                try:
                    recipe = Recipe(**{**plan["recipe"], "seed": seed})
                    result = run(method, corpus, seed, recipe, args.data_dir, args.cache)
                    write_json({**result, "command": f"python benchmarks/compare.py {args.plan.name}"}, path)
                    print(f"{name}: {result['scores']} in {result['seconds']} s", flush=True)
                finally:
                    claim.unlink()


if __name__ == "__main__":
    main()
