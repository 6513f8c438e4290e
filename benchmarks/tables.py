"""Tables and plot of a comparison, from its runs: mean and standard deviation over seeds, differences and their p."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ttest_1samp, ttest_ind

import corpora
from st_clusterns import Recipe

ENOUGH = 3  # seeds below which no p is computed
WIDE = 10  # columns above which a table is turned on its side
FROM_DATA = ("n_clusters", "has_topics", "temperature")  # settings of a loss that its corpus decides, unless a row does
HELD_OUT = " held out"
CLUSTERING = {  # the tables of a group of clustering sets: a score, and one in brackets
    "V-measure": ("v_measure", None),
    "Accuracy": ("accuracy", None),
    "V-measure [accuracy] of the k-means run with the lowest inertia": ("v_measure_best", "accuracy_best"),
    "Neighbour purity": ("neighbour_purity", None),
    "Average precision of same-class pairs among all pairs, sorted by cosine": ("pair_average_precision", None),
}
LEGEND = """Mean ± standard deviation over seeds (number of seeds), times 100. V-measure and accuracy: k-means with the
true number of classes, mean of {restarts} restarts. Neighbour purity: share of the ten nearest neighbours that have the
text's class. STS: Spearman's rho of the cosine; 7 STS: mean of STS12 to STS16, STS-B test and SICK-R in mteb's
protocol. MAP: mean average precision. Embedded in {precision}."""
TESTED = f"""p: Welch's t-test over seeds, two-sided, not corrected for the number of comparisons; (few): fewer than
{ENOUGH} seeds on a side, or no spread. The starting model has no randomness: it enters as a fixed number."""
Row = dict[str, Any]
Runs = list[Row]


class Column(NamedTuple):
    """A score on a corpus, or its mean over several; another score may stand beside it in brackets."""

    title: str
    corpora: tuple[str, ...]
    score: str
    beside: str | None = None


def values(runs: Runs, names: Sequence[str], score: str) -> dict[int, float]:
    """Return the mean of a score over corpora, by seed; only for seeds that have run on all of them."""
    each: list[dict[int, float]] = []
    for name in names:
        of_corpus = [run for run in runs if run["settings"]["corpus"] == name and score in run["scores"]]
        each.append({run["settings"]["seed"]: run["scores"][score] for run in of_corpus})
    seeds = set.intersection(*(set(found) for found in each))
    return {seed: float(np.mean([found[seed] for found in each])) for seed in sorted(seeds)}


def spread(numbers: Sequence[float]) -> str:
    """Format mean, sample standard deviation and number of seeds."""
    if len(numbers) < 2:
        return f"{numbers[0]:.1f} (1)" if numbers else "-"
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
        sets = [name for name in names if corpora.is_clustering(name)]
        held_out = [name for name in sets if name.endswith(HELD_OUT)]
        self.groups = {"": [name for name in sets if name not in held_out], "held-out ": held_out}
        self.others = [Column(c.title, (name,), c.score) for name in names for c in corpora.columns(name)]
        self.others = [column for column in self.others if column.corpora[0] not in sets]
        self.columns: list[Column] = []
        for kind, group in self.groups.items():
            self.columns += [Column(f"{name}: V", (name,), "v_measure") for name in group]
            means = {"V": "v_measure", "accuracy": "accuracy"} if len(group) > 1 else {}
            self.columns += [Column(f"mean {s} of {len(group)} {kind}sets", tuple(group), means[s]) for s in means]
        self.columns += self.others
        wiki = [name for name in names if name.startswith("wiki")]
        self.tests = [Column(f"{name}: {test}", (name,), test) for name in wiki for test in corpora.SEVEN]

    def values(self, name: str, column: Column) -> list[float]:
        return list(values(self.found[name], column.corpora, column.score).values())

    def is_fixed(self, name: str) -> bool:
        return self.rows[name].method == self.start_method

    def score_cell(self, name: str, column: Column) -> str:
        """Mean ± sd (n), and the mean of the score beside it."""
        beside = list(values(self.found[name], column.corpora, column.beside).values()) if column.beside else []
        return spread(self.values(name, column)) + (f" [{np.mean(beside):.1f}]" if beside else "")

    def difference_cell(self, name: str, column: Column) -> str:
        """Difference of the row's mean from its baseline's, and p."""
        baseline = self.rows[name].baseline
        if baseline not in self.rows or name == baseline:
            return "-"
        if not (ours := self.values(name, column)) or not (theirs := self.values(baseline, column)):
            return "-"
        fixed = "ours" if self.is_fixed(name) else "theirs" if self.is_fixed(baseline) else None
        p = p_value(ours, theirs, fixed)
        return f"{np.mean(ours) - np.mean(theirs):+.1f} " + ("(few)" if p is None else f"(p = {p:.3f})")

    def difference_from_start(self, name: str, column: Column) -> tuple[float, float] | None:
        """Difference of the means of row and starting model, and the standard deviation of the row (NaN: one seed)."""
        start = self.rows[name].start
        ours, theirs = self.values(name, column), self.values(start, column) if start in self.rows else []
        sd = float(np.std(ours, ddof=1)) if len(ours) > 1 else np.nan
        return (float(np.mean(ours) - np.mean(theirs)), sd) if ours and theirs else None

    def table(self, title: str, columns: Sequence[Column], cell: Callable[[str, Column], str]) -> list[str]:
        """Return a caption and a table of the rows that have anything in it, turned on its side if it is wide."""
        cells = {name: [cell(name, column) for column in columns] for name in self.rows}
        cells = {name: row for name, row in cells.items() if set(row) != {"-"}}
        if not cells:
            return []
        table = [["", *(column.title for column in columns)], *([name, *row] for name, row in cells.items())]
        if len(columns) > WIDE:
            table = [list(line) for line in zip(*table, strict=True)]
        head, *body = ("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in table)
        single = [n for n in cells if not self.is_fixed(n) and any(len(self.values(n, c)) == 1 for c in columns)]
        names = "" if all(name in single or self.is_fixed(name) for name in cells) else f": {', '.join(single)}"
        caption = f"{title} {f'**Single-seed runs, which decide nothing{names}.**' if single else ''}".strip()
        return [*([caption] if caption else []), "", head, "|---" * len(table[0]) + "|", *body, ""]

    def clustering_tables(self) -> list[str]:
        lines = []
        for kind, group in self.groups.items():
            tables = []
            for caption, (score, beside) in CLUSTERING.items() if group else ():
                columns = [Column(name.removesuffix(HELD_OUT), (name,), score, beside) for name in group]
                columns += [Column("mean", tuple(group), score, beside)] if len(group) > 1 else []
                tables += self.table(f"{caption}.", columns, self.score_cell)
            lines += [f"## Clustering of {kind}texts", "", *tables] if tables else []
        return lines


def write_tables(
    folder: Path, plan_name: str, plan: Row, rows: Sequence[Any], found: dict[str, Runs], limit: int | None, start: str
) -> None:
    """Write README.md and differences.png into the folder of the results."""
    results = Results(rows, found, start)
    options = "" if limit is None else f" --limit {limit}"
    precision = "bfloat16 mixed precision" if rows[0].scoring["bf16"] else "float32"
    missing = ", ".join(name for name, runs in found.items() if not runs)
    baselines = ", ".join(dict.fromkeys(row.baseline for row in rows if row.baseline)) or "none"
    head = [
        f"# {folder.name}",
        plan.get("about"),
        f"Made by `python benchmarks/compare.py benchmarks/{plan_name} --data-dir DIR --output DIR{options}`, one\n"
        "JSON file a run. No labels in training.",
        f"**At most {limit} rows of each corpus, to train and to score on.**" if limit else None,
        LEGEND.format(restarts=rows[0].scoring["restarts"], precision=precision),
        f"Rows of the plan that have not been run: {missing}." if missing else None,
    ]
    lines = [line for text in head if text for line in (text, "")]
    lines += results.clustering_tables()
    lines += ["## STS and search", "", *results.table("", results.others, results.score_cell)] if results.others else []
    tested = f"Baseline: {baselines}. {TESTED}"
    lines += ["## Difference from the baseline", "", *results.table(tested, results.columns, results.difference_cell)]
    lines += ["![Differences from the starting model](differences.png)", ""]
    lines += ["## The seven STS tests", *results.table("", results.tests, results.score_cell)] if results.tests else []
    lines += ["## Settings", "", *_settings(plan, rows, results), *_mixed(found)]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(results, folder / "differences.png")


def _settings(plan: Row, rows: Sequence[Any], results: Results) -> list[str]:
    """Say what all rows share, and what each has of its own; times are means over the runs."""
    recipe = {name: value for name, value in asdict(Recipe(**plan.get("recipe", {}))).items() if name != "seed"}
    lines = [f"All rows: `{json.dumps(recipe)}`. Own settings:", ""]
    lines += ["| | method | loss | other | training, s |", "|---|---|---|---|---|"]
    for row in (row for row in rows if results.found[row.name]):
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
