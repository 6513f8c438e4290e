"""What ClusterNS costs: ratios measured side by side in one process, medians with spread.

    python benchmarks/speed.py --output results/speed [--only step loss arithmetic sampler clustering embedding]

Writes `speed.json` and `speed.png`. A ratio compares two timings taken in turn (A B A B ...), so that a machine whose
speed drifts slows both; quoted are the median of the pairwise ratios and their quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from st_clusterns import ClusterBatchSampler, ClusterNSLoss
from st_clusterns.clusters import Clusters
from st_clusterns.corpus import CorpusClusters, cluster_corpus
from st_clusterns.report import write_json

ENCODERS = {"MiniLM": (6, 384, 12, 1536), "BERT-base": (12, 768, 12, 3072)}


class Encoder(nn.Module):
    """A random Bert with mean pooling, with what a loss reads of a SentenceTransformer."""

    def __init__(self, layers: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.bert = BertModel(
            BertConfig(num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=inner),
            add_pooling_layer=False,
        )

    def get_embedding_dimension(self) -> int:
        return self.bert.config.hidden_size

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = self.bert(input_ids=features["input_ids"], attention_mask=features["attention_mask"])[0]
        return {"sentence_embedding": tokens.mean(1)}


class Passing(nn.Module):
    """No encoder at all: only tells its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def get_embedding_dimension(self) -> int:
        return self.width


def corpus_clusters(k: int, width: int) -> CorpusClusters:
    centroids = F.normalize(torch.randn(k, width), dim=1).numpy()
    return CorpusClusters(np.arange(k), centroids, np.ones(k, dtype=np.float32))


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(action: Callable[[], Any]) -> float:
    synchronise()
    begin = time.perf_counter()
    action()
    synchronise()
    return time.perf_counter() - begin


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Time two actions in turn after a warm-up of each."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    quarter = len(ratios) // 4
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[quarter],
        "ratio_high": ratios[-1 - quarter],
        "ours_s": statistics.median(a for a, _ in pairs),
        "theirs_s": statistics.median(b for _, b in pairs),
        "repeats": repeats,
    }


def step_action(model: nn.Module, loss: nn.Module, columns: list[dict[str, Tensor]]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        value = loss([dict(column) for column in columns], None)
        (value.total() if isinstance(value, dict) else value).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_step(device: str, quick: bool) -> list[dict[str, Any]]:
    """One whole training step on (anchor, positive) pairs against the same step with MNRL."""
    rows = []
    batches, ks, repeats = ((64,), (128,), 7) if quick else ((64, 256, 512), (128, 1024), 9)
    for name, shape in ENCODERS.items():
        for batch in batches:
            columns = []
            for _ in range(2):
                ids = torch.randint(100, 30000, (batch, 16), device=device)
                columns.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            for k in ks:
                model = Encoder(*shape).to(device)
                ours = ClusterNSLoss(model, clusters=corpus_clusters(k, shape[1])).to(device)
                theirs = MultipleNegativesRankingLoss(model)
                timed = paired(step_action(model, ours, columns), step_action(model, theirs, columns), repeats)
                rows.append({"encoder": name, "B": batch, "K": k, **timed})
                print(rows[-1], flush=True)
    return rows


def loss_action(loss: nn.Module, columns: list[Tensor]) -> Callable[[], None]:
    def action() -> None:
        value = loss.compute_loss_from_embeddings(columns, None)
        (value.total() if isinstance(value, dict) else value).backward()

    return action


def measure_loss(device: str, quick: bool) -> list[dict[str, Any]]:
    """The loss stage alone, forward and backward, against MNRL's."""
    rows = []
    batches = (512, 2048) if quick else (512, 2048, 8192)
    for width in (384,) if quick else (384, 1024):
        for batch in batches:
            columns = [torch.randn(batch, width, device=device, requires_grad=True) for _ in range(2)]
            for k in (128, 1024, 4096):
                ours = ClusterNSLoss(Passing(width), clusters=corpus_clusters(k, width)).to(device)
                theirs = MultipleNegativesRankingLoss(Passing(width))
                timed = paired(loss_action(ours, columns), loss_action(theirs, columns), 5 if batch > 4000 else 9)
                rows.append({"B": batch, "K": k, "D": width, "work": batch * (batch + k) * width, **timed})
                print(rows[-1], flush=True)
    return rows


def measure_arithmetic(device: str, quick: bool) -> list[dict[str, Any]]:
    """Cosines with the centroids against broadcasting (B, K, D), as the authors' code does it."""
    batch, k, width = 512, 128, 768
    rows, clusters = torch.randn(batch, width, device=device), Clusters(k, width).to(device)
    clusters.seed(torch.randn(k, width, device=device))
    broadcast = lambda: F.cosine_similarity(rows[:, None], clusters.centroids[None], dim=-1)  # noqa: E731
    torch.testing.assert_close(clusters.similarity(rows), broadcast(), rtol=1e-4, atol=1e-5)
    timed = paired(lambda: clusters.similarity(rows), broadcast, 15)
    return [{"B": batch, "K": k, "D": width, "faster": 1 / timed["ratio"], **timed}]


def measure_sampler(device: str, quick: bool) -> list[dict[str, Any]]:
    """Planning an epoch of ten million rows."""
    n_rows = 1_000_000 if quick else 10_000_000
    ids = np.random.default_rng(0).integers(1000, size=n_rows)
    tracemalloc.start()
    begin = time.perf_counter()
    iterator = iter(ClusterBatchSampler(range(n_rows), 128, ids=ids, group_size=8))
    next(iterator)
    planned = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return [{"rows": n_rows, "planned_s": planned, "peak_mb": peak / 2**20}]


def measure_clustering(device: str, quick: bool) -> list[dict[str, Any]]:
    """Clustering a corpus of topical embeddings: ours (with trust) beside bare scikit-learn."""
    n_rows, k, width = (50_000, 100, 384) if quick else (1_000_000, 1000, 384)
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(k, width)).astype(np.float32)
    rows = centres[generator.integers(k, size=n_rows)]
    rows += generator.normal(scale=1.5, size=rows.shape).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def inertia(found: np.ndarray) -> float:
        found = found / np.linalg.norm(found, axis=1, keepdims=True)
        return float(
            sum((2 - 2 * (rows[i : i + 10000] @ found.T).max(1)).sum() for i in range(0, n_rows, 10000)) / n_rows
        )

    results = []
    for name, action in {
        "cluster_corpus": lambda: cluster_corpus(rows, k).centroids,
        "MiniBatchKMeans": lambda: (
            MiniBatchKMeans(k, batch_size=8192, n_init=1, max_iter=20, random_state=0).fit(rows).cluster_centers_
        ),
        "KMeans": lambda: KMeans(k, n_init=1, max_iter=10, random_state=0).fit(rows).cluster_centers_,
    }.items():
        begin = time.perf_counter()
        found = action()
        results.append({"method": name, "seconds": time.perf_counter() - begin, "inertia": inertia(found)})
        print(results[-1], flush=True)
    return results


MEASURES: dict[str, Callable[[str, bool], list[dict[str, Any]]]] = {
    "step": measure_step,
    "loss": measure_loss,
    "arithmetic": measure_arithmetic,
    "sampler": measure_sampler,
    "clustering": measure_clustering,
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the ratios to MNRL and the growth of the loss stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = results.get("step", [])
    names = [f"{row['encoder']}\nB={row['B']} K={row['K']}" for row in steps]
    errors = [[r["ratio"] - r["ratio_low"] for r in steps], [r["ratio_high"] - r["ratio"] for r in steps]]
    left.bar(names, [row["ratio"] for row in steps], yerr=errors, color="C0")
    left.axhline(1.03, color="C3", linestyle="--", label="target 1.03")
    left.set(title="One training step against MNRL (median, quartiles)", ylabel="ratio")
    left.tick_params(axis="x", labelsize=6)
    left.legend()
    for k in sorted({row["K"] for row in results.get("loss", [])}):
        chosen = [row for row in results["loss"] if row["K"] == k]
        right.loglog([r["work"] for r in chosen], [r["ours_s"] for r in chosen], "o", label=f"K={k}")
    right.set(title="Loss stage alone", xlabel="B (B+K) D", ylabel="seconds")
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/speed"))
    parser.add_argument("--only", nargs="*", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "speed.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    torch.manual_seed(0)
    for name in args.only:
        results[name] = MEASURES[name](args.device, args.quick)
        results["machine"] = {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "quick": args.quick,
            **{package: version(package) for package in ("torch", "sentence-transformers", "scikit-learn")},
        }
        write_json(results, path)
    draw(results, args.output / "speed.png")


if __name__ == "__main__":
    main()
