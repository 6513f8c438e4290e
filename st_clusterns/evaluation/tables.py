"""Tables of the records of an evaluation: Markdown for people, CSV for programs, JSON with everything."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from st_clusterns.evaluation.sts import SICK, STS_TESTS
from st_clusterns.files import write_json, write_text

STS = "STS"  # the name that asks for the seven tests under both protocols
MTEB, SIMCSE, SHORT_TEXTS, SEARCH = "mteb", 'SimCSE "all"', "k-means on short texts", "search in documents"
COLUMNS = ("model", "revision", "task", "protocol", "metric", "value", "rows", "data")
Record = dict[str, Any]


def write_tables(output: Path, command: str = "") -> None:
    """Write `results.md`, `results.csv` and `results.json` of all records in `output/tasks`, all of one model."""
    order = {name: place for place, name in enumerate(STS_TESTS)}
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (output / "tasks").glob("*.json")]
    records.sort(key=lambda one: (one["protocol"], order.get(one["task"], 99), one["task"]))
    lines = [
        {**record, "metric": metric, "value": value, "data": _source(record["settings"])}
        for record in records
        for metric, value in record["values"].items()
    ]
    write_json({"command": command, "records": records}, output / "results.json")
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(table.getvalue(), output / "results.csv")
    write_text(_markdown(records, lines, command), output / "results.md")


def _source(settings: Record) -> str:
    source = f"{settings['data'].get('path', '')}@{settings['data'].get('revision', '')[:14]}"
    if "restarts" in settings:
        source += f"; k-means: {settings['restarts']} runs from seed {settings['seed']}"
    return source


def _markdown(records: list[Record], lines: list[Record], command: str) -> str:
    """The STS tests as papers show them, then one line per metric, then the mean over each benchmark's tasks."""
    versions = ", ".join(f"{name} {number}" for name, number in records[0]["versions"].items())
    text = [f"# {records[0]['model']}", ""]
    text += [f"Revision (hash of weights, settings and library versions): `{records[0]['revision']}`. {versions}."]
    text += ["", f"`{command}`"] if command else []
    text += _sts_table(records)
    text += [
        "",
        "## All scores",
        "",
        "Correlations, clustering and search scores x100, the other measures as defined.",
        "",
    ]
    text += ["| task | protocol | metric | value | rows | data |", "|---|---|---|---:|---:|---|"]
    for line in lines:
        rows = "-" if line["rows"] is None else f"{line['rows']:,}"
        cells = (line["task"], line["protocol"], line["metric"], f"{line['value']:.2f}", rows, line["data"])
        text.append(f"| {' | '.join(cells)} |")
    for group in sorted({group for record in records for group in record["groups"]} - {STS}):
        values = [next(iter(record["values"].values())) for record in records if group in record["groups"]]
        if len(values) > 1:
            text.append(f"\n{group}: plain mean of {len(values)} tasks {np.mean(values):.2f}.")
    return "\n".join(text) + "\n"


def _sts_table(records: list[Record]) -> list[str]:
    """One row per protocol. SICK-R has two columns, because the protocols score different pairs of it."""
    six = [name for name in STS_TESTS if name != SICK]
    heads = [*six, "SICK-R (mteb, 9927)", "SICK-R test (SimCSE, 4927)", "mean of the seven"]
    head = ["", "## STS, Spearman x100", "", f"| protocol | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    lines = []
    for protocol in (MTEB, SIMCSE):
        found = [one for one in records if one["protocol"] == protocol and one["task"] in STS_TESTS]
        scores = {one["task"]: one["values"]["cosine_spearman"] for one in found}
        sick = [scores.get(SICK) if protocol == owner else None for owner in (MTEB, SIMCSE)]
        mean = np.mean(list(scores.values())) if len(scores) == len(STS_TESTS) else None
        cells = [*(scores.get(name) for name in six), *sick, mean]
        if scores:
            lines.append(f"| {protocol} | {' | '.join('-' if cell is None else f'{cell:.2f}' for cell in cells)} |")
    return [*head, *lines] if lines else []
