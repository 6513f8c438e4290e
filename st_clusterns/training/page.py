"""The page of a report: one HTML file that holds its data, its style and its script, and asks the network for nothing.

The data is JSON, compressed by zlib and written in base64, which no sentence can break out of. The script puts every
text into the page as text. The files of the page are in `report_page/`.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.clustering.vectors import Floats
from st_clusterns.files import write_text
from st_clusterns.training.maps import HUES, measure_moves, nearest_rows, topic_colours

PARTS = ("page.css", "page.js", "map.js", "batch.js")
MAX_BYTES = 9_900_000  # of a page
CHARACTERS = 300  # of a sentence that are shown, at most; fewer if the page grows too large
SIDE = 10_000  # a map's coordinates are whole numbers from 0 to this
NEIGHBOURS, NEIGHBOURS_SHOWN = 10, 5  # nearest sentences that a move is measured by, and that the page lists
MOVED = 100  # sentences in the list of those that moved most
EXAMPLES = 3  # typical sentences of a topic
BATCHES, BATCH_ROWS = 4, 96  # batches in the page, and their sentences at most
FALSE, HARD = 1, 2  # kinds of negatives of a batch; 0 is any other pair

TITLES = ["Before training", "After training"]
MEASURES = {
    "mean_cosine": "Mean cosine of any two sentences",
    "mean_cosine_same_cluster": "Mean cosine of two sentences of one cluster",
    "contrast": "Contrast: the second less the first",
    "uniformity": "Uniformity (lower: spread more evenly)",
}
ATLAS = "embedding-atlas map.parquet --text text --x x_after --y y_after"


def page_data(
    report: dict[str, Any], shown: CorpusClusters, after: Floats, maps: tuple[Floats, Floats], seed: int = 0
) -> dict[str, Any]:
    """Collect what the page shows, as JSON can hold it.

    Args:
        report: the numbers of the report, as `report.json` holds them.
        shown: the clusters with the sentences to show and their embeddings before training, `N`.
        after: their embeddings after training, (N, D).
        maps: the maps before and after, each (N, 2).
        seed: seed of the batches that are drawn.
    """
    n_rows = len(shown.sentences)
    near = [nearest_rows(rows, min(NEIGHBOURS, (n_rows - 1) // 2)) for rows in (shown.embeddings, after)]
    fresh, gaps = measure_moves(shown.embeddings, *near)
    most = [int(i) for i in np.lexsort((-fresh, -gaps))[:MOVED] if fresh[i]]
    bound = report["before"]["mean_cosine_same_cluster"]
    return {
        "titles": TITLES if "recipe" in report else ["Before", "After"],
        "notes": _notes(report, shown, near[0].shape[1]),
        "texts": shown.sentences,
        "topics": shown.ids.tolist(),
        **{view: _whole(points) for view, points in zip(("before", "after"), maps, strict=True)},
        "names": shown.names,
        "examples": [[cut(text, CHARACTERS // 2) for text in texts] for texts in shown.examples(EXAMPLES)],
        "sizes": shown.sizes.tolist(),
        "trust": [round(float(value), 3) for value in shown.trust],
        "trusted": shown.trusted.tolist(),
        "colours": topic_colours(maps[0], shown.ids, shown.sizes, shown.trusted).tolist(),
        "neighbours": {
            view: rows[:, :NEIGHBOURS_SHOWN].ravel().tolist()
            for view, rows in zip(("before", "after"), near, strict=True)
        },
        "moved": [[i, int(fresh[i]), round(float(gaps[i]), 4)] for i in most],
        "batches": draw_batches(shown, after, _batch_size(report), bound, seed),
        "kinds": _kinds(bound),
        "measures": [
            [MEASURES[name], _finite(report["before"][name]), _finite(report["after"][name])] for name in MEASURES
        ],
        "facts": _facts(report),
        "curves": curves(report.get("log", [])),
    }


def write_page(data: dict[str, Any], path: Path) -> None:
    """Write the page, of 10 MB at most: longer sentences are cut until it fits."""
    folder = files("st_clusterns.training") / "report_page"
    page = (folder / "page.html").read_text(encoding="utf-8")
    for part in PARTS:
        page = page.replace(f"/* {part} */", (folder / part).read_text(encoding="utf-8"))
    limit = CHARACTERS
    while True:
        content = data | {"texts": [cut(text, limit) for text in data["texts"]], "limit": limit}
        packed = pack(content)
        if len(packed) + len(page) < MAX_BYTES or limit < 2:
            write_text(page.replace("/* data */", packed), path)
            return
        limit = limit * 3 // 4


def pack(content: Any) -> str:
    """Return content as JSON, compressed, in base64."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode("utf-8"), 9)).decode("ascii")


def cut(text: str, limit: int) -> str:
    """Return the first `limit` characters of a text."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def draw_batches(
    shown: CorpusClusters, after: Floats, batch_size: int, bound: float, seed: int
) -> list[dict[str, list[int]]]:
    """Draw random batches: the rows of each in the order of their topics, all cosines, and the kind of each pair.

    A pair of one trusted cluster is a false negative, which `ClusterNSLoss` leaves out. Any other pair is a hard
    negative if its cosine before training is `bound` or more. Cosines are in thousandths.
    """
    generator = np.random.default_rng(seed)
    size = min(batch_size, BATCH_ROWS, len(after))
    batches = []
    for _ in range(BATCHES):
        rows = generator.choice(len(after), size, replace=False)
        rows = rows[np.lexsort((rows, shown.ids[rows]))]
        cosines = [some[rows] @ some[rows].T for some in (shown.embeddings, after)]
        ids = shown.ids[rows]
        same = (ids[:, None] == ids) & shown.trusted[ids]
        kinds = np.where(same, FALSE, np.where(cosines[0] >= bound, HARD, 0))
        np.fill_diagonal(kinds, 0)
        whole = [np.rint(1000 * values).astype(int).ravel().tolist() for values in cosines]
        batches.append({"rows": rows.tolist(), "before": whole[0], "after": whole[1], "kinds": kinds.ravel().tolist()})
    return batches


def curves(log: Sequence[dict[str, float]]) -> dict[str, list[tuple[int, float]]]:
    """Return each number that the trainer has logged more than once, by step."""
    names = dict.fromkeys(name for entry in log for name in entry if name not in ("step", "epoch"))
    found = {
        name: [
            (int(entry["step"]), float(entry[name])) for entry in log if "step" in entry and _finite(entry.get(name))
        ]
        for name in names
    }
    return {name: entries for name, entries in found.items() if len(entries) > 1}


def _whole(points: Floats) -> list[int]:
    """Scale a map into a square of whole numbers, as x, y, x, y ... for JSON."""
    centred = points - (points.max(axis=0) + points.min(axis=0)) / 2
    scale = SIDE / 2 / (np.abs(centred).max() or 1)
    whole: list[int] = np.rint(SIDE / 2 + scale * centred).astype(int).ravel().tolist()
    return whole


def _finite(value: Any) -> float | None:
    """Return a number that JSON can hold; None for NaN and for what is no number."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Name the settings of a report that a reader looks for."""
    recipe = report.get("recipe", {})
    facts = {
        "Model": report["model"],
        "Compared with": report.get("compared_with"),
        "Sentences in the corpus": f"{report['sentences']:,}",
        "Clusters": report["clusters"]["n_clusters"],
        "Positives": report.get("views"),
        "Batch size": _batch_size(report),
        "Learning rate": recipe.get("learning_rate"),
        "Tokens read of a sentence, at most": recipe.get("max_length"),
        "Prompt": report.get("prompt"),
        "Opens the maps in embedding-atlas": ATLAS,
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _batch_size(report: dict[str, Any]) -> int:
    return int(report.get("recipe", report)["batch_size"])


def _kinds(bound: float) -> list[str]:
    """Say what each kind of pair in a batch is."""
    return [
        "Negative.",
        "Probably a false negative: both are of one trusted topic, so ClusterNSLoss does not push them apart.",
        "Hard negative: pushed apart, though before training as similar as two sentences of one cluster on average "
        f"(cosine {bound:.3f}) or more.",
    ]


def _notes(report: dict[str, Any], shown: CorpusClusters, n_neighbours: int) -> dict[str, str]:
    """Say in words what each part of the page shows."""
    if shown.has_topics:
        colours = (
            f"Each of {int(shown.trusted.sum())} trusted topics has one of {HUES} colours, topics of one colour far "
            "apart; grey sentences are of topics that are not trusted."
        )
        topics = (
            "Topics are clusters of the sentences before training. Trust is how far an independent clustering agrees "
            "with a topic, 0 to 1. Click a topic to see it on both maps, and again to see all."
        )
    else:
        colours = "All are grey, as no topics were found."
        topics = "No topics were found: these clusters are not stable, and training takes no notice of them."
    shown_of_all = f"All {len(shown.sentences):,} sentences shown here, of {report['sentences']:,} in the corpus,"
    return {
        "verdict": report["clusters"]["verdict"],
        "privacy": f"{shown_of_all} are inside this file, and whoever has it can read them. The page loads nothing "
        "from the network.",
        "colours-note": colours,
        "topics-note": topics,
        "moved-note": f"New neighbours: how many of the {n_neighbours} most similar sentences are new after training. "
        "Moved by: how much less similar these were before training than those which were nearest then (mean cosine). "
        "The list is sorted by it. Click a sentence to compare its neighbours.",
    }
