"""What ClusterNS costs, measured side by side.

    python benchmarks/speed.py [SECTION ...] [--output results/speed] [--threads 1] [--quick] [--again]

Sections: step, loss-stage, arithmetic, clustering, embedding, bf16, sampler; all of them if none is named, and those
that `speed.json` holds already are skipped (`--again` measures them anew), so an interrupted run goes on. Writes
`speed.json`, `speed.png` and the table in `README.md`.

- What is compared runs in turn (A B B A ...) in one process; a ratio is the median of the ratios of neighbours, with
  its quartiles. Where memory is measured too, each run has a process of its own, again in turn.
- On one thread of a CPU the clock is the process's own CPU time, which other work on the machine disturbs less than
  the time of day; otherwise the time of day.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sklearn.cluster import KMeans, MiniBatchKMeans
from st_clusterns.clusters import Clusters
from st_clusterns.corpus import CorpusClusters, cluster_corpus
from st_clusterns.quickstart import load_utterances, packaged_model
from st_clusterns.report import write_json
from st_clusterns.rows import UnitRows
from st_clusterns.scoring import score_clustering
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from st_clusterns import ClusterBatchSampler, ClusterNSLoss, embed_corpus
from st_clusterns import corpus as corpus_module

Row = dict[str, Any]
ENCODERS = {"MiniLM": (6, 384, 12, 1536), "BERT-base": (12, 768, 12, 3072)}
ROUNDS = 1  # of the clusterings, in turn
TOKENS = 4  # fewer than a sentence has, so the loss's share of a step is larger here than in use


# Timing


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(action: Callable[[], Any]) -> float:
    begin = clock()
    action()
    return clock() - begin


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], budget: float = 20, fewest: int = 3) -> Row:
    """Time two actions in turn (A B B A ...), after a warm-up of each, for about `budget` seconds."""
    once = seconds(ours) + seconds(theirs)
    repeats = max(fewest, min(200, int(budget / once)))
    pairs = []
    for place in range(repeats):
        if place % 2:
            pairs.append((seconds(ours), seconds(theirs)))
        else:
            pairs.append((seconds(theirs), seconds(ours))[::-1])
    low, ratio, high = np.percentile([a / b for a, b in pairs], [25, 50, 75])
    return {
        "ratio": ratio,
        "ratio_quartiles": [low, high],
        "ours_s": statistics.median(a for a, _ in pairs),
        "theirs_s": statistics.median(b for _, b in pairs),
        "pairs": repeats,
    }


# The loss


class Encoder(nn.Module):
    """A random Bert with mean pooling, with what a loss reads of a SentenceTransformer."""

    def __init__(self, layers: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
        self.bert = BertModel(BertConfig(**sizes, intermediate_size=inner), add_pooling_layer=False)

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


def trusted_clusters(k: int, width: int) -> CorpusClusters:
    """Clusters that are all trusted, so that every term of the loss is at work."""
    centroids = F.normalize(torch.randn(k, width), dim=1).numpy()
    return CorpusClusters(np.arange(k), 0.1 * centroids, np.ones(k, dtype=np.float32))


def backward(value: Any) -> None:
    (value.total() if isinstance(value, dict) else value).backward()


def step_action(model: nn.Module, loss: nn.Module, columns: list[dict[str, Tensor]]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        backward(loss([dict(column) for column in columns], None))
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_step(device: str, quick: bool) -> list[Row]:
    rows = []
    for name, shape in ENCODERS.items():
        model = Encoder(*shape).to(device)
        for batch in (64,) if quick else (64, 512):
            columns = []
            for _ in range(2):
                ids = torch.randint(100, 30000, (batch, TOKENS), device=device)
                columns.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            for k in (1024,) if quick or (name, batch) == ("BERT-base", 512) else (128, 1024):
                ours = ClusterNSLoss(model, clusters=trusted_clusters(k, shape[1])).to(device)
                actions = [step_action(model, loss, columns) for loss in (ours, MultipleNegativesRankingLoss(model))]
                rows.append(
                    {"encoder": name, "B": batch, "K": k, "tokens": TOKENS, **paired(*actions, budget=20, fewest=4)}
                )
                print(rows[-1], flush=True)
    return rows


def loss_action(loss: nn.Module, columns: list[Tensor], labels: Tensor | None = None) -> Callable[[], None]:
    return lambda: backward(loss.compute_loss_from_embeddings(columns, labels))


def measure_loss_stage(device: str, quick: bool) -> list[Row]:
    rows = []
    for width in (384,) if quick else (384, 1024):
        for batch in (64, 512) if quick else (64, 512, 2048, 8192):
            ks = (128, 1024, 4096) if batch in (512, 2048) else (128,)
            columns = [torch.randn(batch, width, device=device, requires_grad=True) for _ in range(2)]
            theirs = loss_action(MultipleNegativesRankingLoss(Passing(width)), columns)
            for k in ks:
                ours = ClusterNSLoss(Passing(width), clusters=trusted_clusters(k, width)).to(device)
                known = torch.randint(1, k + 1, (batch,), device=device)  # as a loader or trainer sends them
                for labels in (None, known) if batch <= 512 else (None,):
                    timed = paired(loss_action(ours, columns, labels), theirs, budget=4, fewest=2)
                    row = {"B": batch, "K": k, "D": width, "labels": labels is not None}
                    rows.append({**row, "work": batch * (batch + k) * width, **timed})
                    print(rows[-1], flush=True)
    return rows


def growth(rows: list[Row]) -> tuple[float, float]:
    """Fit seconds = c * work^power to the loss stage from B=512 on; return the power and the worst factor off."""
    x, y = np.log([[r["work"], r["ours_s"]] for r in rows if r["B"] >= 512 and not r.get("labels")]).T
    power, constant = np.polyfit(x, y, 1)
    return float(power), float(np.exp(np.abs(y - power * x - constant).max()))


def measure_arithmetic(device: str, quick: bool) -> list[Row]:
    """Cosines with the centroids against broadcasting (B, K, D), as the authors' code does it."""
    batch, k, width = 512, 128, 768
    batch_rows, clusters = torch.randn(batch, width, device=device), Clusters(k, width).to(device)
    clusters.seed(torch.randn(k, width, device=device))

    def ours() -> Tensor:
        return clusters.similarity(batch_rows)

    def broadcasting() -> Tensor:
        return F.cosine_similarity(batch_rows[:, None], clusters.centroids[None], dim=-1)

    torch.testing.assert_close(ours(), broadcasting(), rtol=1e-4, atol=1e-5)
    memory = {f"{name}_mb": most_memory(f) for name, f in (("ours", ours), ("broadcasting", broadcasting))}
    return [{"B": batch, "K": k, "D": width, **paired(ours, broadcasting), **memory}]


def most_memory(action: Callable[[], Any]) -> float:
    """Return the memory in use at the worst moment of an action, from torch's own record, in MB."""
    with torch.profiler.profile(profile_memory=True) as record:
        action()
    held, most = 0, 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


# The corpus


def write_topical_embeddings(path: Path, n_rows: int, width: int) -> None:
    """Write unit vectors of 3,000 subtopics in 100 topics, sizes and spectrum falling, in float16."""
    rng = np.random.default_rng(0)
    spectrum = 1 / np.sqrt(1 + np.arange(width) / 20)
    topics = np.repeat(rng.normal(size=(100, width)), 30, axis=0) + 0.8 * rng.normal(size=(3000, width))
    share = rng.permutation(1 / (10 + np.arange(3000)))
    rows = np.lib.format.open_memmap(path, "w+", np.float16, (n_rows, width))
    for start in range(0, n_rows, 10_000):
        block = topics[rng.choice(3000, 10_000, p=share / share.sum())] + 1.3 * rng.normal(size=(10_000, width))
        block *= spectrum
        rows[start : start + 10_000] = block / np.linalg.norm(block, axis=1, keepdims=True)
    rows.flush()


def ours(rows: np.ndarray, k: int, use_faiss: bool) -> tuple[np.ndarray, np.ndarray]:
    if not use_faiss:
        sys.modules["faiss"] = None  # type: ignore[assignment]
    found = cluster_corpus(rows, k)
    return found.centroids, found.ids


def faiss_kmeans(rows: np.ndarray, k: int, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    whole = rows.astype(np.float32)
    method = faiss.Kmeans(rows.shape[1], k, seed=1, **settings)
    method.train(whole)
    return method.centroids, method.assign(whole)[1]


def scikit_kmeans(rows: np.ndarray, method: Any) -> tuple[np.ndarray, np.ndarray]:
    whole = rows.astype(np.float32)
    sample = whole[:: len(rows) // min(len(rows), 256 * method.n_clusters)] if isinstance(method, KMeans) else whole
    return method.fit(sample).cluster_centers_, method.predict(whole)


METHODS: dict[str, Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]] = {
    "cluster_corpus (faiss)": lambda rows, k: ours(rows, k, True),
    "faiss, its defaults (25 iterations, 256 rows a cluster)": lambda rows, k: faiss_kmeans(rows, k),
    "faiss, 10 iterations, 256 rows a cluster": lambda rows, k: faiss_kmeans(rows, k, niter=10),
    "cluster_corpus (scikit-learn)": lambda rows, k: ours(rows, k, False),
    "scikit-learn KMeans, 10 iterations, 256 rows a cluster": lambda rows, k: scikit_kmeans(
        rows, KMeans(k, init="random", n_init=1, max_iter=10, random_state=0)
    ),
    "scikit-learn MiniBatchKMeans, batch 8192": lambda rows, k: scikit_kmeans(
        rows, MiniBatchKMeans(k, batch_size=8192, n_init=1, max_iter=3, random_state=0)
    ),
}


def status_mb(field: str) -> float:
    """Read a field of this process's memory from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def cluster_once(method: str, path: Path, k: int) -> Row:
    """Cluster in this process; ours also tells what of its time went into more than k-means."""
    rows = np.load(path, mmap_mode="r")
    measuring = [0.0]
    for name in ("most_repeatable_clusters", "cluster_trust", "_with_layer"):
        time_calls(name, measuring)
    before, begin = status_mb("VmRSS"), clock()
    centroids, ids = METHODS[method](rows, k)
    took, peak = clock() - begin, status_mb("VmHWM") - before
    some = np.arange(0, len(rows), 17)
    inertia = float(np.square(UnitRows(rows)[some] - centroids[ids[some]]).sum(1).mean())
    return {"seconds": took, "of_which_trust_and_layer_s": measuring[0], "peak_mb": peak, "inertia": inertia}


def time_calls(name: str, total: list[float]) -> None:
    function = getattr(corpus_module, name)

    def timed(*args: Any, **settings: Any) -> Any:
        begin = clock()
        result = function(*args, **settings)
        total[0] += clock() - begin
        return result

    setattr(corpus_module, name, timed)


def measure_clustering(device: str, quick: bool) -> list[Row]:
    n_rows, k = (100_000, 100) if quick else (1_000_000, 1000)
    runs: dict[str, list[Row]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        write_topical_embeddings(path, n_rows, 384)
        for _ in range(ROUNDS):
            for method, found in runs.items():
                found.append(in_a_process("cluster_once", method, str(path), str(k)))
                print(method, found[-1], flush=True)
    rows = []
    for method, found in runs.items():
        middle = {name: statistics.median(run[name] for run in found) for name in found[0]}
        rows.append({"method": method, "rows": n_rows, "K": k, **middle, "all_seconds": [r["seconds"] for r in found]})
    return rows


def in_a_process(task: str, *words: str) -> Row:
    """Run a task of this file in a process of its own, for its memory."""
    command = [sys.executable, "-W", "ignore", __file__, "--task", task, *words]
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [*command, "--threads", threads], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": threads}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_embedding(device: str, quick: bool) -> list[Row]:
    """The packaged utterances, four times over (each copy with another ending), by the packaged MiniLM."""
    model = SentenceTransformer(str(packaged_model()), device=device)
    utterances, _ = load_utterances()
    texts = [f"{text}{ending}" for ending in (("",) if quick else ("", ".", " now", " please")) for text in utterances]
    quiet = {"show_progress_bar": False}
    with tempfile.TemporaryDirectory() as folder:
        caches = iter(range(1000))
        ways: dict[str, Callable[[], Any]] = {
            f"encode, batch {size}": lambda size=size: model.encode(
                texts, batch_size=size, normalize_embeddings=True, **quiet
            )
            for size in (16, 32, 64, 128)
        }
        ways["embed_corpus"] = lambda: embed_corpus(texts, model, **quiet)
        ways["embed_corpus, new cache"] = lambda: embed_corpus(texts, model, cache=f"{folder}/{next(caches)}", **quiet)
        ways["embed_corpus, cached"] = lambda: embed_corpus(texts, model, cache=f"{folder}/0", **quiet)
        ways["embed_corpus, bf16"] = lambda: embed_corpus(texts, model, bf16=True, **quiet)
        model.encode(texts[:64], **quiet)
        times = [{name: seconds(way) for name, way in ways.items()} for _ in range(3 if quick else 5)]
    middle = {name: statistics.median(run[name] for run in times) for name in ways}
    best = min((name for name in ways if name.startswith("encode")), key=middle.__getitem__)
    rows = []
    for name in ways:
        low, ratio, high = np.percentile([run[name] / run[best] for run in times], [25, 50, 75])
        row = {"way": name, "sentences": len(texts), "seconds": middle[name], "best": best}
        rows.append({**row, "ratio": ratio, "ratio_quartiles": [low, high], "runs": len(times)})
    return rows


def measure_bf16(device: str, quick: bool) -> list[Row]:
    """How far bf16 embeddings of the packaged utterances differ from float32 ones."""
    model = SentenceTransformer(str(packaged_model()), device=device)
    texts, intents = load_utterances()
    full, half = (embed_corpus(texts, model, show_progress_bar=False, bf16=bf16) for bf16 in (False, True))
    full, half = full.astype(np.float64), half.astype(np.float64)
    cosines = (full * half).sum(1) / np.linalg.norm(full, axis=1) / np.linalg.norm(half, axis=1)
    scores = {f"v_measure_{name}": score_clustering(rows, intents)["v_measure"] for name, rows in
              (("float32", full), ("bf16", half))}  # fmt: skip
    lowest, mean = float(cosines.min()), float(cosines.mean())
    return [{"sentences": len(texts), "mean_cosine": mean, "lowest_cosine": lowest, **scores}]


def plan_once(n_rows: int) -> Row:
    ids = np.random.default_rng(0).integers(1000, size=n_rows)
    before, begin = status_mb("VmRSS"), clock()
    sampler = ClusterBatchSampler(range(n_rows), 128, ids=ids, group_size=8)
    next(iter(sampler))
    return {"rows": n_rows, "seconds": clock() - begin, "peak_mb": status_mb("VmHWM") - before}


def measure_sampler(device: str, quick: bool) -> list[Row]:
    """Planning an epoch, up to the first batch; the memory is beyond that of the cluster numbers themselves."""
    runs = [in_a_process("plan_once", "1000000" if quick else "10000000") for _ in range(3)]
    return [{name: statistics.median(run[name] for run in runs) for name in runs[0]}]


TASKS: dict[str, Callable[..., Row]] = {
    "cluster_once": lambda method, path, k: cluster_once(method, Path(path), int(k)),
    "plan_once": lambda n_rows: plan_once(int(n_rows)),
}
SECTIONS: dict[str, Callable[[str, bool], list[Row]]] = {
    "step": measure_step,
    "loss-stage": measure_loss_stage,
    "arithmetic": measure_arithmetic,
    "clustering": measure_clustering,
    "embedding": measure_embedding,
    "bf16": measure_bf16,
    "sampler": measure_sampler,
}


# The report


def best_rival(rows: list[Row]) -> tuple[Row, Row]:
    """Return our clustering and the fastest library of equal inertia (1 %), or without one that of the lowest."""
    mine = rows[0]
    rivals = [row for row in rows if not row["method"].startswith("cluster_corpus")]
    equal = [row for row in rivals if row["inertia"] <= 1.01 * mine["inertia"]]
    return mine, min(equal, key=lambda r: r["seconds"]) if equal else min(rivals, key=lambda r: r["inertia"])


def table(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (measure, target, reached) of every section that was measured."""
    lines = []
    rows = {name: result["rows"] for name, result in results.items()}
    for row in rows.get("step", []):
        what = f"training step against MNRL's, {row['encoder']} size, B={row['B']}, K={row['K']}"
        lines.append((what, "1.03 or less", spread(row)))
    for row in rows.get("loss-stage", []):
        what = f"loss stage against MNRL's, B={row['B']}, K={row['K']}, D={row['D']}"
        what += ", clusters sent as labels" * row.get("labels", False)
        lines.append((what, "1.5 or less" if row["K"] == 128 else "-", f"{spread(row)}; {row['ours_s'] * 1e3:.1f} ms"))
    if "loss-stage" in rows:
        power, off = growth(rows["loss-stage"])
        reached = f"power {power:.2f}, no point more than {off:.2f} times off"
        lines.append(("loss stage from B=512 on: seconds grow with B(B+K)D to the power", "1", reached))
    for row in rows.get("arithmetic", []):
        what = f"cosines with the centroids against broadcasting, B={row['B']}, K={row['K']}, D={row['D']}"
        memory = f"{row['ours_mb']:.1f} MB instead of {row['broadcasting_mb']:.0f} MB"
        lines.append((what, "20 times faster, without B·K·D memory", f"{1 / row['ratio']:.0f} times faster; {memory}"))
    if "clustering" in rows:
        mine, rival = best_rival(rows["clustering"])
        what = f"clustering {mine['rows']:,} x 384 into {mine['K']:,}, against: {rival['method']}"
        clusters = mine["seconds"] - mine["of_which_trust_and_layer_s"]
        reached = f"{clusters / rival['seconds']:.2f}"
        reached += f" ({mine['seconds'] / rival['seconds']:.2f} with trust and topic layer)"
        reached += f"; inertia {mine['inertia']:.4f} against {rival['inertia']:.4f}"
        lines.append((what, "1.2 or less at equal inertia (1 %)", reached))
        size = mine["rows"] * 384 * 2 / 2**20
        peak = f"{mine['peak_mb'] / size:.2f} times ({rival['peak_mb'] / size:.2f} times)"
        lines.append(("its peak memory, mapped pages included", "twice the float16 embeddings", peak))
    for row in rows.get("embedding", []):
        target = "1 or less" if row["way"] == "embed_corpus" else "-"
        lines.append((f"{row['way']}, against {row['best']}", target, f"{spread(row)}; {row['seconds']:.1f} s"))
    for row in rows.get("bf16", []):
        cosine = f"mean cosine {row['mean_cosine']:.5f}, lowest {row['lowest_cosine']:.5f}"
        scores = f"V-measure {row['v_measure_float32']:.2f} and {row['v_measure_bf16']:.2f}"
        lines.append(("float32 and bf16 embeddings of the packaged utterances", "-", f"{cosine}; {scores}"))
    for row in rows.get("sampler", []):
        reached = f"{row['seconds']:.1f} s, {row['peak_mb']:.0f} MB"
        lines.append((f"planning an epoch of {row['rows']:,} rows", "10 s, 1 GB", reached))
    return lines


def spread(row: Row) -> str:
    low, high = row["ratio_quartiles"]
    return f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"


def write_table(results: dict[str, Any], path: Path) -> None:
    machines = {json.dumps(result["machine"], sort_keys=True): result["machine"] for result in results.values()}
    machine = "; ".join(", ".join(f"{k} {v}" for k, v in m.items()) for m in machines.values())
    lines = [f"| {' | '.join(row)} |" for row in table(results)]
    commands = dict.fromkeys(f"    {result['command']}" for result in results.values())
    text = [
        "# What it costs\n",
        "Written by `benchmarks/speed.py`, whose head says how it measures; every number is in `speed.json`. Ratios "
        "are medians of pairs run in turn, in brackets their quartiles.\n",
        f"Machine: {machine}.\n",
        "Commands:\n",
        *commands,
        "",
        "| Measure | Target | Reached |",
        "|---|---|---|",
        *lines,
        "",
        "![speed](speed.png)\n",
    ]
    notes = path.with_name("NOTES.md")
    path.write_text("\n".join(text) + (f"\n{notes.read_text()}" if notes.exists() else ""), encoding="utf-8")


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw a panel for each of these sections that has been measured."""
    from matplotlib.figure import Figure

    panels = {"step": _draw_steps, "loss-stage": _draw_growth, "clustering": _draw_clustering}
    measured = [name for name in panels if name in results]
    if not measured:
        return
    figure = Figure(figsize=(5 * len(measured), 4.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        panels[name](axes, results[name]["rows"])
    figure.savefig(path, dpi=110)


def _draw_steps(axes: Any, rows: list[Row]) -> None:
    names = [f"{row['encoder']}\nB={row['B']}\nK={row['K']}" for row in rows]
    low, ratios, high = np.array([[r["ratio_quartiles"][0], r["ratio"], r["ratio_quartiles"][1]] for r in rows]).T
    axes.errorbar(names, ratios, [ratios - low, high - ratios], fmt="o", capsize=4)
    axes.axhline(1.03, color="C3", linestyle="--", label="target 1.03")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(title="One training step against MNRL's\n(median and quartiles)", ylabel="ratio")
    axes.tick_params(axis="x", labelsize=7)
    axes.legend()


def _draw_growth(axes: Any, rows: list[Row]) -> None:
    for k, width in sorted({(row["K"], row["D"]) for row in rows}):
        chosen = [row for row in rows if (row["K"], row["D"]) == (k, width) and not row.get("labels")]
        marker = "o" if width == 384 else "s"
        axes.loglog([r["work"] for r in chosen], [r["ours_s"] for r in chosen], marker, label=f"K={k}, D={width}")
    power, off = growth(rows)
    axes.set_title(f"The loss stage: seconds ~ work^{power:.2f} from B=512 on\n(worst point {off:.2f} times off)")
    axes.set(xlabel="work = B (B+K) D", ylabel="seconds, forward and backward")
    axes.legend(fontsize=7)


def _draw_clustering(axes: Any, rows: list[Row]) -> None:
    for row in rows:
        axes.plot(row["seconds"], row["inertia"], "o", label=row["method"])
    axes.set(title="Clustering a corpus (lower left is better)", xlabel="seconds, whole", ylabel="inertia a row")
    axes.legend(fontsize=6)


def machine(device: str) -> Row:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    packages = ("torch", "sentence-transformers", "scikit-learn", "faiss-cpu", "numpy")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu} ({os.cpu_count()} cores)",
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if device == "cpu" and torch.get_num_threads() == 1 else "time of day",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def commit() -> str:
    """Return the commit that was measured, with + if files had changed since; nothing outside a repository."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--output", type=Path, default=Path("results/speed"))
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--again", action="store_true", help="measure sections anew that are there already")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--note", default="", help="what else the machine was doing, for the record")
    parser.add_argument("--task", choices=list(TASKS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.task:
        print(json.dumps(TASKS[args.task](*args.sections)))
        return
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown sections {sorted(unknown)}: choose from {', '.join(SECTIONS)}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "speed.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in args.sections or SECTIONS:
        if name not in results or args.again:
            results[name] = {
                "rows": SECTIONS[name](args.device, args.quick),
                "command": shlex.join(["python", *sys.argv]),
                "commit": commit(),
                "machine": machine(args.device),
                "other_work": args.note,
                "quick": args.quick,
            }
            write_json(results, path)
    write_table(results, args.output / "README.md")
    draw(results, args.output / "speed.png")


if __name__ == "__main__":
    main()
