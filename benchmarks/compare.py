"""Compare methods on corpora over seeds, from one declarative file; resumable, and safe to start several times.

    python benchmarks/compare.py benchmarks/foundation.json --data-dir DIR --output results/foundation

Each run (method x corpus x seed) writes one JSON file with its settings, versions and seconds; runs that have one are
skipped, runs that another process works on too. When all are there, the table is (re)written to
`results/NAME/README.md`. No labels are used in training; test labels choose nothing.

Data: `--data-dir` holds `clustering/NAME.tsv.gz` (columns label, text), `sts/STSB.tsv.gz` and `corpus/wiki_1m.txt.gz`;
without it Wikipedia and STS-B come from the hub, and the clustering sets ask for it.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
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
SOURCES = """The short-text clustering sets have no canonical copy on the hub: put NAME.tsv.gz (columns label, text)
into DIR/clustering and pass --data-dir DIR. StackOverflow, SearchSnippets and Biomedical: github.com/jacoxu/STC2."""


def read_table(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def load_corpus(name: str, data: Path | None) -> tuple[list[str], list[str] | None]:
    """Return the texts to train on, and their classes for scoring (None for Wikipedia)."""
    if name in CLUSTERING:
        if data is None:
            raise SystemExit(SOURCES)
        rows = read_table(data / "clustering" / f"{name}.tsv.gz")
        return [row["text"] for row in rows], [row["label"] for row in rows]
    count = int(name.removeprefix("wiki"))
    if data is None:
        wiki = "hf://datasets/princeton-nlp/datasets-for-simcse/wiki1m_for_simcse.txt"
        return load_dataset("text", data_files=wiki, split=f"train[:{count}]")["text"], None
    with gzip.open(data / "corpus" / "wiki_1m.txt.gz", "rt", encoding="utf-8") as file:
        return [line.strip() for _, line in zip(range(count), file, strict=False)], None


def load_sts_dev(data: Path | None) -> tuple[list[str], list[str], list[float]]:
    """Return the pairs of STS-B dev and their gold scores."""
    if data is None:
        rows = list(load_dataset("mteb/stsbenchmark-sts", split="validation"))
    else:
        rows = [row for row in read_table(data / "sts" / "STSB.tsv.gz") if row["split"] == "dev"]
    return [r["sentence1"] for r in rows], [r["sentence2"] for r in rows], [float(r["score"]) for r in rows]


def sts_dev(model: SentenceTransformer, data: Path | None) -> float:
    """Spearman (x100) of cosines with the gold scores of STS-B dev."""
    first, second, gold = load_sts_dev(data)
    left, right = (embed_corpus(side, model, show_progress_bar=False, bf16=True) for side in (first, second))
    return 100 * float(spearmanr((left * right).sum(1), gold)[0])


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


def run(method: str, corpus: str, seed: int, recipe: Recipe, data: Path | None, cache: Path) -> dict[str, Any]:
    began = time.monotonic()
    model_path = packaged_model()
    set_seed(seed)
    model = SentenceTransformer(model_path)
    texts, classes = load_corpus(corpus, data)
    start = embed_start(model, corpus, texts, cache)
    set_seed(seed)
    trained = time.monotonic()
    with tempfile.TemporaryDirectory(dir=cache) as work:  # a fresh one, or a run would go on from another's checkpoint
        notes = train_method(method, model, texts, start, recipe, Path(work))
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


def write_table(folder: Path, plan: dict[str, Any]) -> None:
    """Write the README of the results: mean and standard deviation over the seeds, one row a method."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    corpora = plan["corpora"]
    lines = [
        f"# {folder.name}",
        "",
        f"Made by `python benchmarks/compare.py benchmarks/{folder.name}.json --data-dir DIR --output {folder}`.",
        f"Mean ± standard deviation over the seeds that have run (of {plan['seeds']}; n of them). V-measure",
        "(clustering accuracy in brackets) x100 of k-means with the true number of classes, mean of",
        "3 restarts, whole sets; Wikipedia: Spearman x100 on STS-B dev. No labels in training; the same settings in",
        f"every row: {json.dumps(plan['recipe'])}.",
        "",
        f"| | {' | '.join(corpora)} | mean V of the {len([c for c in corpora if c in CLUSTERING])} sets |",
        f"|---|{'---|' * (len(corpora) + 1)}",
    ]
    for method in plan["methods"]:
        cells, by_seed = [], {}
        for corpus in corpora:
            found = [run for run in runs if run["method"] == method and run["corpus"] == corpus]
            if corpus in CLUSTERING:
                for run in found:
                    by_seed.setdefault(run["seed"], []).append(run["scores"]["v_measure"])
            cells.append(_cell(found, "v_measure" if corpus in CLUSTERING else "sts_dev"))
        whole = [np.mean(values) for values in by_seed.values() if len(values) == sum(c in CLUSTERING for c in corpora)]
        cells.append(_spread(whole))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(runs: list[dict[str, Any]], score: str) -> str:
    values = [run["scores"][score] for run in runs]
    accuracy = [run["scores"]["accuracy"] for run in runs if "accuracy" in run["scores"]]
    return _spread(values) + (f" ({np.mean(accuracy):.1f})" if accuracy else "")


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}, n=1" if values else "-"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}, n={len(values)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "st_clusterns_benchmarks")
    for part in ("methods", "corpora", "seeds"):
        parser.add_argument(f"--{part}", nargs="*", type=json.loads if part == "seeds" else str, help="only these")
    args = parser.parse_args()
    plan = json.loads(args.plan.read_text())
    chosen = {part: getattr(args, part) or plan[part] for part in ("methods", "corpora", "seeds")}
    args.output.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    for method in chosen["methods"]:
        for seed in chosen["seeds"]:
            for corpus in chosen["corpora"]:
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
    write_table(args.output, plan)


if __name__ == "__main__":
    main()
