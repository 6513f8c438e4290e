"""Tables of an evaluation's records: Markdown to read, CSV to compute with, JSON with all that is known."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from st_clusterns.evaluation.sts import SICK, STS_TESTS
from st_clusterns.files import write_json, write_text

STS = "STS"  # the name by which the seven tests under both protocols are asked for
MTEB, SIMCSE, SHORT_TEXTS = "mteb", 'SimCSE "all"', "k-means on short texts"
COLUMNS = ("model", "revision", "task", "protocol", "metric", "value", "rows", "data")
Record = dict[str, Any]


def write_tables(output: Path, command: str = "") -> None:
    """Write `results.md`, `results.csv` and `results.json` of all records in `output/tasks`.

    Args:
        output: the folder of one model's results.
        command: what made them.
    """
    order = [*STS_TESTS]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((output / "tasks").glob("*.json"))]
    records.sort(
        key=lambda one: (one["protocol"], order.index(one["task"]) if one["task"] in order else 99, one["task"])
    )
    write_json({"command": command, "records": records}, output / "results.json")
    write_text(as_csv(records), output / "results.csv")
    write_text(as_markdown(records, command), output / "results.md")


def as_csv(records: list[Record]) -> str:
    """One line a metric."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_lines(records))
    return text.getvalue()


def as_markdown(records: list[Record], command: str = "") -> str:
    """The STS tests as papers show them, then one line a metric."""
    first = records[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    revision = f"Revision (hash of weights, settings and library versions): `{first['revision']}`. {versions}."
    lines = [f"# {first['model']}", "", revision]
    lines += ["", f"`{command}`"] if command else []
    lines += sts_table(records)
    lines += ["", "## All scores", "", "Correlations and clustering scores x100, the other measures as defined.", ""]
    lines += ["| task | protocol | metric | value | rows | data |", "|---|---|---|---:|---:|---|"]
    for line in _lines(records):
        rows = "-" if line["rows"] is None else f"{line['rows']:,}"
        cells = (line["task"], line["protocol"], line["metric"], f"{line['value']:.2f}", rows, line["data"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines + _means(records)) + "\n"


def sts_table(records: list[Record]) -> list[str]:
    """One row a protocol; SICK-R in two columns, because the protocols score different pairs of it."""
    six = [name for name in STS_TESTS if name != SICK]
    lines = []
    for protocol in (MTEB, SIMCSE):
        scores = {
            record["task"]: record["values"]["cosine_spearman"]
            for record in records
            if record["protocol"] == protocol and record["task"] in STS_TESTS
        }
        sick = [scores.get(SICK) if protocol == owner else None for owner in (MTEB, SIMCSE)]
        mean = np.mean(list(scores.values())) if len(scores) == len(STS_TESTS) else None
        cells = [*(scores.get(name) for name in six), *sick, mean]
        if scores:
            lines.append(f"| {protocol} | {' | '.join('-' if cell is None else f'{cell:.2f}' for cell in cells)} |")
    heads = [*six, "SICK-R (mteb, 9927)", "SICK-R test (SimCSE, 4927)", "mean of the seven"]
    head = ["", "## STS, Spearman x100", "", f"| protocol | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    return [*head, *lines] if lines else []


def _lines(records: list[Record]) -> list[Record]:
    lines = []
    for record in records:
        settings = record["settings"]
        source = f"{settings['data'].get('path', '')}@{settings['data'].get('revision', '')[:14]}"
        if "restarts" in settings:
            source += f"; k-means: {settings['restarts']} restarts from seed {settings['seed']}"
        for metric, value in record["values"].items():
            lines.append({**record, "metric": metric, "value": value, "data": source})
    return lines


def _means(records: list[Record]) -> list[str]:
    """The plain mean over the tasks of each benchmark that was asked for by name."""
    lines = []
    for group in sorted({group for record in records for group in record["groups"]} - {STS}):
        values = [next(iter(record["values"].values())) for record in records if group in record["groups"]]
        if len(values) > 1:
            lines.append(f"\n{group}: plain mean of {len(values)} tasks {np.mean(values):.2f}.")
    return lines
