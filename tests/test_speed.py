"""The speed benchmark: sides run in turn, ratios are those of the pairs, and one command writes the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import speed
from st_clusterns import CorpusClusters


def test_the_sides_run_in_turn_and_the_ratio_is_that_of_the_pairs() -> None:
    order: list[str] = []
    seconds = {"ours": iter([9.0, 1.0, 6.0, 2.0]), "theirs": iter([9.0, 2.0, 2.0, 4.0])}  # the first is a warm-up

    def side(name: str) -> dict[str, float]:
        order.append(name)
        return {"seconds": next(seconds[name]), "peak_mb": len(order)}

    row = speed.paired(lambda: side("ours"), lambda: side("theirs"), pairs=3)
    assert order == ["ours", "theirs", "ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert (row["ours_seconds"], row["theirs_seconds"], row["pairs"]) == (2.0, 2.0, 3)
    assert row["ratio"] == 0.5  # of 0.5, 3 and 0.5; that of the medians would be 1
    assert row["ratio_quartiles"] == [0.5, 1.75]
    assert row["ours_peak_mb"] == 6
    assert speed.paired(lambda: sum(range(10**5)), None, 2)["ours_seconds"] > 0


def test_the_corpus_has_topics_in_words_and_embeddings() -> None:
    texts, rows = speed.make_corpus(1000, n_topics=8)
    assert len(set(texts)) == len(texts) == 1000
    assert speed.make_corpus(1000, n_topics=8)[0] == texts
    clusters = CorpusClusters.fit(texts, embeddings=rows)
    assert clusters.has_topics
    words = [set(text.split()) for text in texts]
    same = np.array([[one == other for other in clusters.ids[:200]] for one in clusters.ids[:200]])
    shared = np.array([[bool(one & other) for other in words[:200]] for one in words[:200]])
    np.fill_diagonal(same, False)
    assert shared[same].mean() > 2 * shared[~same].mean()


@pytest.mark.slow
def test_one_command_writes_the_results(tmp_path: Path) -> None:
    words = [sys.executable, speed.__file__, "--quick", "--output", str(tmp_path)]
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["quick"]
    names = list(result["rows"])
    assert [name.split(",")[0].split(" of ")[0] for name in names] == [
        "loss stage",
        "training step",
        "step with spans",
        "cached step",
        "2048 tokens against 32 rows a mini-batch",
        "logged step against one without diagnostics",
        "clustering",
        "training on 1",
        "training on 2",
    ]
    rows = list(result["rows"].values())
    assert all(row["ours_seconds"] > 0 for row in rows)
    assert all(row["ratio"] > 0 for row in rows[:6])
    assert not any("ratio" in row for row in rows[6:]), "there is nothing to compare with"
    assert all(row["ours_peak_mb"] > 100 for row in rows[7:])
    assert min(rows[3]["ours_peak_mb"], rows[3]["theirs_peak_mb"]) > 1
    page = (tmp_path / "README.md").read_text()
    assert all(f"| {name} | " in page for name in names)
    assert "say nothing about speed" in page
    assert str(tmp_path) not in page
