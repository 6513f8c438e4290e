"""Tables and plot of a comparison, from its runs: mean and standard deviation over seeds, differences and their p."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp, ttest_ind

import corpora
from corpora import Column

ENOUGH = 3  # seeds below which no p is computed
WIDE = 10  # columns above which a table is turned on its side
FROM_DATA = ("n_clusters", "temperature")  # settings of a loss that its corpus decides, unless a row does
Runs = list[dict[str, Any]]


def values(runs: Runs, column: Column) -> dict[int, float]:
    """Return a row's number in a column by seed."""
    return {
        run["settings"]["seed"]: run["scores"][column.score]
        for run in runs
        if run["settings"]["corpus"] == column.corpus and column.score in run["scores"]
    }


def mean_v(runs: Runs, sets: Sequence[str]) -> dict[int, float]:
    """Return the mean V-measure over the clustering sets, by seed; only for seeds that have run on all of them."""
    each = [values(runs, Column("", name, "v_measure")) for name in sets]
    seeds = set.intersection(*(set(found) for found in each)) if each else set()
    return {seed: float(np.mean([found[seed] for found in each])) for seed in sorted(seeds)}


def spread(numbers: Sequence[float]) -> str:
    """Format mean, sample standard deviation and number of seeds."""
    if not numbers:
        return "-"
    if len(numbers) == 1:
        return f"{numbers[0]:.1f} (1)"
    return f"{np.mean(numbers):.1f} ± {np.std(numbers, ddof=1):.1f} ({len(numbers)})"


def p_value(ours: Sequence[float], theirs: Sequence[float], fixed: str | None = None) -> float | None:
    """Return the two-sided p of a difference of means over seeds; None where there are too few seeds.

    Args:
        ours: one number a seed.
        theirs: the same, of the other method; Welch's test compares the two.
        fixed: "ours" or "theirs" if that side has nothing random in it: then one number is the whole truth, and a
            one-sample test compares the other side with it.
    """
    samples = {"ours": list(ours), "theirs": list(theirs)}
    if not all(samples.values()):
        return None
    constant = samples.pop(fixed)[0] if fixed else None
    if any(len(sample) < ENOUGH or np.ptp(sample) == 0 for sample in samples.values()):
        return None
    test = ttest_ind(*samples.values(), equal_var=False) if fixed is None else ttest_1samp(*samples.values(), constant)
    return float(test.pvalue)


class Results:
    """The runs of all rows of a plan, looked up by row and column."""

    def __init__(self, rows: Sequence[Any], found: dict[str, Runs], start_method: str) -> None:
        self.rows = {row.name: row for row in rows}
        self.found = found
        self.start_method = start_method
        names = list(dict.fromkeys(name for row in rows for name in row.corpora))
        self.sets = [name for name in names if corpora.is_clustering(name)]
        self.columns = [column for name in names for column in corpora.columns(name)]
        if len(self.sets) > 1:
            self.columns.append(Column(f"mean V of the {len(self.sets)} sets", "", "mean_v"))
        self.tests = [
            Column(f"{name}: {test}", name, test) for name in names if "wiki" in name for test in corpora.SEVEN
        ]

    def values(self, name: str, column: Column) -> list[float]:
        runs = self.found[name]
        by_seed = mean_v(runs, self.sets) if column.score == "mean_v" else values(runs, column)
        return list(by_seed.values())

    def is_fixed(self, name: str) -> bool:
        return self.rows[name].method == self.start_method

    def score_cell(self, name: str, column: Column) -> str:
        """Mean ± sd (n), and [accuracy] where the corpus has one."""
        accuracy = list(values(self.found[name], Column("", column.corpus, "accuracy")).values())
        beside = f" [{np.mean(accuracy):.1f}]" if accuracy else ""
        return spread(self.values(name, column)) + beside

    def difference_cell(self, name: str, column: Column) -> str:
        """Difference of the row's mean from its baseline's, and p."""
        baseline = self.rows[name].baseline
        if baseline not in self.rows or name == baseline:
            return "-"
        ours, theirs = self.values(name, column), self.values(baseline, column)
        if not ours or not theirs:
            return "-"
        fixed = "ours" if self.is_fixed(name) else "theirs" if self.is_fixed(baseline) else None
        p = p_value(ours, theirs, fixed)
        return f"{np.mean(ours) - np.mean(theirs):+.1f} " + ("(few)" if p is None else f"(p = {p:.3f})")

    def difference_from_start(self, name: str, column: Column) -> tuple[float, float] | None:
        """Difference of the means of row and starting model, and the standard deviation of the row (NaN: one seed)."""
        start = self.rows[name].start
        ours, theirs = self.values(name, column), self.values(start, column) if start in self.rows else []
        if not ours or not theirs:
            return None
        sd = float(np.std(ours, ddof=1)) if len(ours) > 1 else np.nan
        return float(np.mean(ours) - np.mean(theirs)), sd

    def table(self, columns: Sequence[Column], cell: Callable[[str, Column], str]) -> list[str]:
        """Return a table of the rows that have anything in it; a wide one has the rows as its columns."""
        cells = {name: [cell(name, column) for column in columns] for name in self.rows}
        table = [["", *(column.title for column in columns)]]
        table += [[name, *row] for name, row in cells.items() if set(row) != {"-"}]
        if len(columns) > WIDE:
            table = [list(line) for line in zip(*table, strict=True)]
        head, *body = ("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in table)
        return [head, "|---" * len(table[0]) + "|", *body]


def write_tables(
    folder: Path,
    plan_name: str,
    plan: dict[str, Any],
    rows: Sequence[Any],
    found: dict[str, Runs],
    limit: int | None,
    start_method: str,
) -> None:
    """Write README.md and differences.png into the folder of the results."""
    results = Results(rows, found, start_method)
    options = "" if limit is None else f" --limit {limit}"
    scoring = rows[0].scoring
    lines = [
        f"# {folder.name}",
        "",
        *([plan["about"], ""] if "about" in plan else []),
        f"Made by `python benchmarks/compare.py benchmarks/{plan_name} --data-dir DIR --output DIR{options}`, one JSON",
        "file a run. No labels in training.",
        "",
        *([f"**At most {limit} rows of each corpus, evenly spaced, to train and to score on.**", ""] if limit else []),
        "Mean ± standard deviation over seeds (number of seeds), times 100. V: V-measure of k-means with the true",
        f"number of classes, mean of {scoring['restarts']} restarts [clustering accuracy]. STS: Spearman's rho of the",
        "cosine; 7 STS: mean of STS12 to STS16, STS-B test and SICK-R in mteb's protocol (all 9,927 pairs). MAP: mean",
        f"average precision. Embedded in {'bfloat16 mixed precision' if scoring['bf16'] else 'float32'}.",
        "",
        *results.table(results.columns, results.score_cell),
        *_not_run(found),
        "",
        "## Difference from the baseline",
        "",
        *_baselines(rows),
        "p: Welch's t-test over seeds, two-sided, not corrected for the number of comparisons; (few): fewer than",
        f"{ENOUGH} seeds on a side, or no spread. What has no randomness (the starting model) enters as a fixed",
        "number, in a one-sample test.",
        "",
        *results.table(results.columns, results.difference_cell),
        "",
        "![Differences from the starting model](differences.png)",
    ]
    if results.tests:
        lines += ["", "## The seven STS tests", "", *results.table(results.tests, results.score_cell)]
    lines += ["", "## Settings", "", *_settings(plan, rows, results), *_mixed(found)]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(results, folder / "differences.png")


def _baselines(rows: Sequence[Any]) -> list[str]:
    names = list(dict.fromkeys(row.baseline for row in rows if row.baseline))
    return [f"Baseline: {', '.join(names)}." if names else "The plan names no baseline."]


def _not_run(found: dict[str, Runs]) -> list[str]:
    missing = [name for name, runs in found.items() if not runs]
    return ["", f"Rows of the plan that have not been run: {', '.join(missing)}."] if missing else []


def _settings(plan: dict[str, Any], rows: Sequence[Any], results: Results) -> list[str]:
    """Say what all rows share, and what each has of its own; times are means over the runs."""
    lines = [f"All rows: {json.dumps(plan['recipe'])}. Own settings:", ""]
    lines += ["| | method | loss | other | training, s |", "|---|---|---|---|---|"]
    for row in rows:
        if not results.found[row.name]:
            continue
        entry = next((e for e in plan["methods"] if isinstance(e, dict) and e["name"] == row.name), {})
        other = {k: v for k, v in entry.items() if k not in ("name", "method", "loss", "seeds", "corpora")}
        made = [run["notes"]["loss"] for run in results.found[row.name] if "loss" in run.get("notes", {})]
        loss = {k: v for k, v in made[0].items() if all(m.get(k) == v for m in made)} if made else row.loss
        seconds = [run["seconds_training"] for run in results.found[row.name] if row.method != results.start_method]
        time = f"{np.mean(seconds):.0f}" if seconds else "-"
        cells = [f"`{json.dumps(part)}`" if part else "" for part in (loss, other)]
        lines.append(f"| {row.name} | {row.method} | {' | '.join(cells)} | {time} |")
    return lines


def _mixed(found: dict[str, Runs]) -> list[str]:
    """Say which rows mix versions of a loss: its resolved settings, but for those from the data, must agree."""
    mixed = []
    for name, runs in found.items():
        losses = (run["notes"].get("loss", {}) for run in runs)
        made = [{k: v for k, v in loss.items() if k not in FROM_DATA} for loss in losses]
        if any(loss != made[0] for loss in made):
            mixed.append(name)
    return ["", f"**Runs with different settings of the loss are mixed in: {', '.join(mixed)}.**"] if mixed else []


def draw(results: Results, path: Path) -> None:
    """Draw each row's difference from the starting model, with bars of one standard deviation."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = [name for name in results.rows if not results.is_fixed(name)]
    columns = [c for c in results.columns if any(results.difference_from_start(name, c) for name in names)]
    figure = Figure(figsize=(max(8.0, max(0.16 * len(names), 1.1) * len(columns) + 4), 6), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        shift = 0.8 * ((place + 0.5) / len(names) - 0.5)
        found = [(x + shift, results.difference_from_start(name, column)) for x, column in enumerate(columns)]
        points = np.array([(x, *both) for x, both in found if both]).reshape(-1, 3)
        style = {"fmt": "os^Dv"[place % 5], "color": colormaps["tab20"](place % 20), "capsize": 3, "markersize": 5}
        axes.errorbar(*points.T, label=name, **style)
    axes.axhline(0, color="black", linewidth=0.8)
    for x in range(1, len(columns)):
        axes.axvline(x - 0.5, color="lightgrey", linewidth=0.8)
    names = ["\n".join(textwrap.fill(part, 14) for part in column.title.split(": ")) for column in columns]
    axes.set_xticks(range(len(columns)), names)
    axes.set_xlim(-0.5, max(len(columns), 1) - 0.5)
    axes.set_ylabel("difference from the starting model, x100")
    axes.set_title("Bars: standard deviation over seeds (none: one seed)")
    if names:
        figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)
