"""Speed and memory of ClusterNS on a CPU, beside the built-in losses and version 0.1.0.

    python benchmarks/speed.py [--output results/speed] [--old PATH] [--corpus FILE] [--threads 1] [--quick]

Writes `speed.json` and `README.md`. `--old` is a checkout of version 0.1.0, which is then timed as well in 5, 7 and 8.

1. Loss stage: from embeddings to their gradients, `ClusterNSLoss` against `MultipleNegativesRankingLoss`.
2. Training step of the packaged all-MiniLM-L6-v2, from texts to new weights: one text column against (s, s) pairs.
3. The same step with the cached losses: time and peak memory, each run in a process of its own.
4. `CachedClusterNSLoss` on sentences of mixed lengths: `mini_batch_num_tokens` against `mini_batch_size=32`.
5. `CorpusClusters.fit` with embeddings given, against 0.1.0's `cluster_corpus`, each run in a process of its own.
6. `st-clusterns train` on files of short lines, with random word vectors: what the size of a file costs.
7. `st-clusterns train` of the packaged model on the first `--lines` of `--corpus`, against 0.1.0.
8. `st-clusterns quickstart`, against 0.1.0.

The two sides run in turn. A ratio is the median of the ratios of the pairs. On one thread the clock is the process's
CPU time, which other work disturbs little. Peak memory is what a step adds, in 6 to 8 that of the whole process, as
Linux counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn

from compare import command, versions
from st_clusterns import CachedClusterNSLoss, ClusterNSLoss, CorpusClusters, Recipe
from st_clusterns.clustering.vectors import Floats, unit_rows
from st_clusterns.files import write_json, write_text
from st_clusterns.training.diagnostics import Watch
from st_clusterns.training.quickstart import load_utterances, packaged_model
from st_clusterns.training.views import TextViews

Row = dict[str, Any]
DIMENSION, N_CLUSTERS, TOKENS = 384, 128, 2048
DOCUMENT = 160  # words, as in Cranfield
SYLLABLES = ["ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sta", "ve", "wi", "zo"]


class Sizes(NamedTuple):
    """Rows of each measure, and the number of pairs of runs."""

    loss: int = 512
    step: int = 96
    cached: tuple[int, ...] = (1024, 4096)
    mixed: int = 512
    corpus: tuple[int, ...] = (20_000, 50_000)
    lines: tuple[int, ...] = (1_000_000, 10_000_000)
    pairs: tuple[int, int, int] = (200, 20, 3)  # of the loss stage, the training step, the other measures


QUICK = Sizes(64, 8, (64,), 16, (1000,), (1000, 2000), (3, 2, 1))


def timed(action: Callable[[], Any]) -> Row:
    """Run an action; return its seconds, or what it tells of itself (a dictionary with `seconds`)."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    told = action()
    return told if isinstance(told, dict) else {"seconds": clock() - begin}


def paired(ours: Callable[[], Any], theirs: Callable[[], Any] | None, pairs: int, warm_up: bool = True) -> Row:
    """Run two sides in turn (A B, B A, ...); return the medians, and the median and quartiles of the ratios."""
    sides = {"ours": ours} if theirs is None else {"ours": ours, "theirs": theirs}
    for action in sides.values() if warm_up else ():
        action()
    found: dict[str, list[Row]] = {side: [] for side in sides}
    for place in range(pairs):
        for side in list(sides)[:: -1 if place % 2 else 1]:
            found[side].append(timed(sides[side]))
    result: Row = {"pairs": pairs}
    for side, runs in found.items():
        result |= {f"{side}_{name}": float(np.median([run[name] for run in runs])) for name in runs[0]}
    if theirs is not None:
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(found["ours"], found["theirs"], strict=True)]
        low, ratio, high = np.percentile(ratios, [25, 50, 75]).tolist()
        result |= {"ratio": ratio, "ratio_quartiles": [low, high]}
    return result


def in_a_process(words: list[str], checkout: Path | None = None) -> Row:
    """Run Python in a process of its own, in and with a checkout; return the JSON of its last line."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    env |= {"PYTHONPATH": str(checkout.resolve())} if checkout else {}
    line = [sys.executable, "-W", "ignore", *words]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=env, cwd=checkout, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def make_corpus(count: int, longest: int = 12, n_topics: int = 40) -> tuple[list[str], Floats]:
    """Return sentences with half of their words drawn by topic, and embeddings that cluster by the same topics."""
    draw = np.random.default_rng(0)
    words = np.array(["".join(draw.choice(SYLLABLES, 3)) for _ in range(4000)])
    by_topic, common = words[: n_topics * 60].reshape(n_topics, 60), words[n_topics * 60 :]
    topics, sentences = draw.integers(n_topics, size=count), []
    for topic, length in zip(topics, draw.integers(4, longest + 1, size=count), strict=True):
        chosen = [*draw.choice(by_topic[topic], length // 2), *draw.choice(common, length - length // 2)]
        sentences.append(" ".join(draw.permutation(chosen)))
    centres = unit_rows(draw.normal(size=(n_topics, DIMENSION)))
    return sentences, unit_rows(centres[topics] + draw.normal(size=(count, DIMENSION)) / DIMENSION**0.5)


def trusted_clusters(centroids: Floats) -> CorpusClusters:
    """Return clusters that are all trusted, so that every term of the loss is at work."""
    ids = np.arange(len(centroids))
    texts = [f"text {number}" for number in ids]
    return CorpusClusters(texts, centroids, ids, centroids, np.ones(len(ids), np.float32), True, {len(ids): 1.0}, 0.5)


class Training:
    """The packaged model, a batch of sentences, and steps on it."""

    def __init__(self, n_rows: int, longest: int = 12) -> None:
        self.model = SentenceTransformer(packaged_model(), device="cpu")
        texts, _ = make_corpus(n_rows + N_CLUSTERS, longest)
        self.texts = texts[:n_rows]
        self.clusters = trusted_clusters(self.model.encode(texts[n_rows:], show_progress_bar=False))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5)
        self.model.train()

    def step(self, loss: nn.Module, *columns: list[str]) -> None:
        loss([self.model.preprocess(texts) for texts in columns], None).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure_loss(sizes: Sizes) -> Row:
    _, rows = make_corpus(sizes.loss + N_CLUSTERS)
    anchors = torch.tensor(rows[: sizes.loss])
    columns = [(anchors + 0.01 * torch.randn_like(anchors)).requires_grad_() for _ in range(2)]
    texts = [torch.arange(sizes.loss)] * 2
    model = Training(1).model  # not run: embeddings are given
    ours = ClusterNSLoss(model, trusted_clusters(rows[sizes.loss :]))
    theirs = losses.MultipleNegativesRankingLoss(model)
    return paired(
        lambda: torch.autograd.grad(ours.compute_loss_from_embeddings(columns, texts), columns),
        lambda: torch.autograd.grad(theirs.compute_loss_from_embeddings(columns, None), columns),
        sizes.pairs[0],
    )


def measure_step(sizes: Sizes) -> Row:
    training = Training(sizes.step)
    ours = ClusterNSLoss(training.model, training.clusters)
    theirs = losses.MultipleNegativesRankingLoss(training.model)
    texts = training.texts
    return paired(lambda: training.step(ours, texts), lambda: training.step(theirs, texts, texts), sizes.pairs[1])


def measure_views(sizes: Sizes) -> Row:
    """A step on documents whose positives are spans, against one whose positives are the documents under dropout."""
    training, draw = Training(sizes.step), np.random.default_rng(0)
    training.model.max_seq_length = Recipe().max_length
    loss = ClusterNSLoss(training.model, training.clusters)
    words = " ".join(load_utterances()[0]).split()  # real ones, of about one token
    documents = [" ".join(draw.choice(words, DOCUMENT)) for _ in training.texts]
    spans = [TextViews("span").view(text) for text in documents]
    return paired(lambda: training.step(loss, spans, documents), lambda: training.step(loss, documents), sizes.pairs[1])


def cached_step(n_rows: int, side: str) -> Row:
    """Take a step with a cached loss in this process."""

    def memory_mb(field: str) -> float:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    training = Training(n_rows)
    ours, theirs = CachedClusterNSLoss, losses.CachedMultipleNegativesRankingLoss
    loss, n_columns = (ours(training.model, training.clusters), 1) if side == "ours" else (theirs(training.model), 2)
    training.step(loss, *[training.texts[:8]] * n_columns)
    before = memory_mb("VmRSS")
    return {**timed(lambda: training.step(loss, *[training.texts] * n_columns)), "peak_mb": memory_mb("VmHWM") - before}


def measure_cached(sizes: Sizes, n_rows: int) -> Row:
    ours, theirs = ([__file__, "--cached-step", str(n_rows), side] for side in ("ours", "theirs"))
    return paired(lambda: in_a_process(ours), lambda: in_a_process(theirs), sizes.pairs[2], warm_up=False)


def measure_tokens(sizes: Sizes) -> Row:
    training = Training(sizes.mixed, longest=30)
    by_tokens = CachedClusterNSLoss(training.model, training.clusters, mini_batch_num_tokens=TOKENS)
    by_rows = CachedClusterNSLoss(training.model, training.clusters, mini_batch_size=32)
    texts = training.texts
    return paired(lambda: training.step(by_tokens, texts), lambda: training.step(by_rows, texts), sizes.pairs[2])


def measure_logs(sizes: Sizes) -> Row:
    """A step whose cluster diagnostics are logged, against one without: every step of a training at most."""
    training = Training(sizes.step)
    loss = ClusterNSLoss(training.model, training.clusters)
    watch = Watch(loss)

    def logged() -> None:
        loss.observer, watch.batch = watch, None
        training.step(loss, training.texts)
        loss.observer = None
        watch.describe()

    return paired(logged, lambda: training.step(loss, training.texts), sizes.pairs[1])


NEW = "from st_clusterns import CorpusClusters; fit = lambda: CorpusClusters.fit(texts, embeddings=rows)"
OLD = "from st_clusterns.corpus import cluster_corpus; fit = lambda: cluster_corpus(rows, sentences=texts)"
FIT = """
import json, sys, time, numpy as np
rows, texts = np.load(sys.argv[1] + "/rows.npy"), json.load(open(sys.argv[1] + "/texts.json"))
clock = time.process_time if sys.argv[2] == "1" else time.perf_counter
begin, clusters, end = clock(), fit(), clock()
print(json.dumps({"seconds": end - begin, "n_clusters": clusters.n_clusters}))
"""


def measure_fit(count: int, old: Path | None) -> Row:
    texts, rows = make_corpus(count)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/rows.npy", rows)
        write_json(texts, Path(folder) / "texts.json")
        words = [folder, str(torch.get_num_threads())]
        theirs = (lambda: in_a_process(["-c", OLD + FIT, *words], old)) if old else None
        return paired(lambda: in_a_process(["-c", NEW + FIT, *words]), theirs, 1, warm_up=False)


def run_command(words: list[str], checkout: Path | None = None) -> Row:
    """Run `st-clusterns` in a process of its own, with a folder for its output; return its time and peak memory."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    env |= {"PYTHONPATH": str(checkout.resolve())} if checkout else {}
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-W", "ignore", "-m", "st_clusterns", *words, "--output", f"{folder}/out"]
        begin = time.perf_counter()
        process = subprocess.Popen(line, env=env, cwd=checkout)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
    if status:
        raise RuntimeError(f"{words} ended with {os.waitstatus_to_exitcode(status)}")
    seconds = used.ru_utime + used.ru_stime if torch.get_num_threads() == 1 else wall
    # An upper bound: Linux counts what this process held when it forked as the child's, too.
    return {"seconds": seconds, "wall_seconds": wall, "peak_mb": used.ru_maxrss / 1024}


def measure_command(words: list[str], old: Path | None, pairs: int = 1) -> Row:
    theirs = (lambda: run_command(words, old)) if old else None
    return paired(lambda: run_command(words), theirs, pairs, warm_up=False)


def train_words(corpus: Path, model: str) -> list[str]:
    return ["train", "--corpus", str(corpus), "--model", model]


def measure_lines(count: int) -> Row:
    """Train random word vectors on a file of short lines by topic."""
    draw = np.random.default_rng(0)
    words = np.array(["".join(draw.choice(SYLLABLES, 3)) for _ in range(200)])
    with tempfile.TemporaryDirectory() as folder:
        corpus, model = Path(folder) / "lines.txt", f"{folder}/model"
        with corpus.open("w", encoding="utf-8") as file:
            for start in range(0, count, 100_000):
                size = min(100_000, count - start)
                rows = words[draw.integers(8, size=(size, 1)) * 25 + draw.integers(25, size=(size, 6))]
                file.writelines(" ".join(row) + "\n" for row in rows.tolist())
        tokenizer = SentenceTransformer(packaged_model(), device="cpu").tokenizer.backend_tokenizer
        SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=64)], device="cpu").save(model)
        return measure_command(train_words(corpus, model), None)


def measure_train(corpus: Path, count: int, old: Path | None) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.txt"
        with corpus.open(encoding="utf-8") as file, part.open("w", encoding="utf-8") as copy:
            copy.writelines(islice(file, count))
        return measure_command(train_words(part, packaged_model()), old)


def describe(result: Row) -> str:
    """Return the README."""
    lines = ["# Speed and memory", "", "Made by `benchmarks/speed.py`. A ratio below 1 means that ours is faster.", ""]
    lines += ["**Small sizes (`--quick`): these numbers say nothing about speed.**", ""] if result["quick"] else []
    lines += ["| | ours, s | theirs, s | ratio (quartiles) | pairs | ours, MB | theirs, MB |", "|---" * 7 + "|"]
    for name, row in result["rows"].items():
        keys = ("ours_seconds", "theirs_seconds", "ours_peak_mb", "theirs_peak_mb")
        ours, theirs, *peaks = (f"{row[key]:.4g}" if key in row else "-" for key in keys)
        ratio = "{:.3f} ({:.3f} to {:.3f})".format(row["ratio"], *row["ratio_quartiles"]) if "ratio" in row else "-"
        lines.append(f"| {' | '.join([name, ours, theirs, ratio, str(row['pairs']), *peaks])} |")
    machine = ", ".join(f"{name} {value}" for name, value in result.items() if name not in ("command", "quick", "rows"))
    return "\n".join([*lines, "", f"Command: `{result['command']}`", "", f"{machine}.", ""])


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/speed"))
    parser.add_argument("--old", type=Path, help="a checkout of version 0.1.0")
    parser.add_argument("--corpus", type=Path, help="a text file, one sentence a line")
    parser.add_argument("--lines", type=int, default=200_000, help="lines of --corpus that are trained on")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)))
    parser.add_argument("--only", nargs="*", default=[""], help="the measures whose names contain one of these")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--cached-step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.cached_step:
        print(json.dumps(cached_step(int(args.cached_step[0]), args.cached_step[1])))
        return
    sizes = QUICK if args.quick else Sizes()
    measures: dict[str, Callable[[], Row]] = {
        f"loss stage, B={sizes.loss}, K={N_CLUSTERS}, D={DIMENSION}": lambda: measure_loss(sizes),
        f"training step, B={sizes.step}": lambda: measure_step(sizes),
        f"step with spans of documents against dropout, B={sizes.step}": lambda: measure_views(sizes),
        **{f"cached step, B={n}": lambda n=n: measure_cached(sizes, n) for n in sizes.cached},
        f"{TOKENS} tokens against 32 rows a mini-batch, B={sizes.mixed}": lambda: measure_tokens(sizes),
        f"logged step against one without diagnostics, B={sizes.step}": lambda: measure_logs(sizes),
        **{f"clustering of {n:,} texts, against 0.1.0": lambda n=n: measure_fit(n, args.old) for n in sizes.corpus},
        **{f"training on {n:,} short lines": lambda n=n: measure_lines(n) for n in sizes.lines},
    }
    if args.old:
        measures["quickstart, against 0.1.0"] = lambda: measure_command(["quickstart"], args.old)
    if args.corpus:
        name = f"training on {args.lines:,} lines of {args.corpus.name}, against 0.1.0"
        measures[name] = lambda: measure_train(args.corpus, args.lines, args.old)
    result: Row = {"command": command(), "quick": args.quick, "threads": args.threads, **versions(), "rows": {}}
    args.output.mkdir(parents=True, exist_ok=True)
    for name, measure in ((n, measure) for n, measure in measures.items() if any(part in n for part in args.only)):
        result["rows"][name] = measure()
        print(f"{name}: {result['rows'][name]}", flush=True)
        write_json(result, args.output / "speed.json")
        write_text(describe(result), args.output / "README.md")


if __name__ == "__main__":
    main()
