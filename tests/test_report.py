"""The files of a report: what is in the page, how large it is, and that no corpus is too odd for it."""

from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import cli, save_corpus, save_model
from matplotlib.image import imread
from reports import BATCH, make_after, make_clusters, make_report, make_rows

from st_clusterns import CorpusClusters
from st_clusterns.clustering import sample
from st_clusterns.training import maps, page, report
from st_clusterns.training.maps import draw_maps, lay_out, measure_moves, nearest_rows, topic_colours
from st_clusterns.training.page import curves, cut, draw_batches, page_data, write_page
from st_clusterns.training.pictures import PALETTE, random_pairs, same_cluster_pairs
from st_clusterns.training.report import report_files, write_files, write_report

NASTY = "</script><script>document.title = 'broken'</script><img src=x onerror=alert(1)> & <!-- \u2028"


def read_page(path: Path) -> dict[str, Any]:
    """What the script of a page reads."""
    [packed] = re.findall(r'<script id="data"[^>]*>(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    data: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return data


@pytest.fixture(scope="module")
def clusters() -> CorpusClusters:
    return make_clusters(texts={5: NASTY, 6: "x" * 1000, 7: "مرحبا بالعالم", 8: "今天天气很好"})


@pytest.fixture(scope="module")
def written(clusters: CorpusClusters, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    after = make_after(clusters)
    write_files(make_report(clusters, after), clusters, after, path)
    return path


# What the files hold


def test_the_page_holds_every_sentence_once_and_as_it_is(written: Path, clusters: CorpusClusters) -> None:
    data = read_page(written)
    assert data["texts"] == [cut(text, page.CHARACTERS) for text in clusters.sentences]
    assert data["texts"][5] == NASTY
    assert data["texts"][6] == "x" * (page.CHARACTERS - 1) + "…"
    assert data["topics"] == clusters.ids.tolist()
    assert len(data["before"]) == len(data["after"]) == 2 * len(clusters.sentences)
    assert min(data["before"]) >= 0
    assert max(data["before"]) <= page.SIDE
    assert data["sizes"] == [30] * 4
    assert data["trusted"] == [True, True, True, False]
    assert data["names"] == clusters.names
    assert all(len(texts) == page.EXAMPLES for texts in data["examples"])
    assert "All 120 sentences shown here, of 120 in the corpus, are inside this file" in data["notes"]["privacy"]


def test_no_sentence_gets_out_of_the_data_and_nothing_is_loaded(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert NASTY[:20] not in text
    assert "document.title" not in text
    assert text.count("<script") == text.count("</script>") == 2
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "innerHTML" not in text
    assert "default-src 'none'" in text


def test_the_same_report_is_the_same_to_the_last_byte(written: Path, clusters: CorpusClusters, tmp_path: Path) -> None:
    after = make_after(clusters)
    write_files(make_report(clusters, after), clusters, after, tmp_path / "report.html")
    for ours, theirs in zip(report_files(tmp_path / "report.html"), report_files(written), strict=True):
        assert ours.read_bytes() == theirs.read_bytes(), ours.name
    assert len(list(tmp_path.iterdir())) == 4


def test_the_table_and_the_pictures(written: Path, clusters: CorpusClusters) -> None:
    table = pq.read_table(written.with_name("map.parquet")).to_pydict()
    assert list(table) == ["text", "topic", "trust", "x_before", "y_before", "x_after", "y_after"]
    assert table["text"] == clusters.sentences, "in full"
    assert table["topic"] == [clusters.names[topic] for topic in clusters.ids]
    assert table["trust"] == pytest.approx(clusters.trust[clusters.ids])
    points = np.array([table["x_before"], table["y_before"]]).T
    own = np.array([points[clusters.ids == topic].mean(axis=0) for topic in range(4)])
    assert (np.linalg.norm(points[:, None] - own, axis=2).argmin(axis=1) == clusters.ids).mean() > 0.95
    assert imread(written.with_suffix(".png")).std() > 0.05, "a blank picture"
    assert written.with_suffix(".svg").read_text().count("Sentences before training") == 1


def test_a_page_of_100_000_sentences_is_below_10_mb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences whose letters are random do not compress: they are cut until the page fits."""
    draw = np.random.default_rng(0)
    n_rows, letters = 100_000, np.array(list("abcdefghijklmnopqrstuvwxyz  "))
    texts = ["".join(row) for row in letters[draw.integers(len(letters), size=(n_rows, 200))]]
    small = make_clusters()
    points = draw.random((n_rows, 2), dtype=np.float32)
    numbers = make_report(small, make_after(small))
    few = page_data(numbers, small, make_after(small), (points[:120], points[:120]))
    ids = draw.integers(4, size=n_rows)
    rows = make_rows(4, 4, 0.1, 0)[ids]
    clusters = replace(small, sentences=texts, embeddings=rows, ids=ids, given_names=list("abcd"))
    monkeypatch.setattr(page, "nearest_rows", lambda rows, count: draw.integers(n_rows, size=(n_rows, count)))
    write_page(page_data(numbers, clusters, rows, (points, points[::-1])), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 10_000_000
    data = read_page(tmp_path / "report.html")
    assert len(data["texts"]) == n_rows
    assert 50 <= data["limit"] == len(data["texts"][0]) < 200
    monkeypatch.setattr(page, "MAX_BYTES", 0)
    write_page(few, tmp_path / "end.html")
    assert read_page(tmp_path / "end.html")["limit"] == 1, "and there is an end to cutting"


def test_the_colours_of_the_picture_are_those_of_the_page() -> None:
    style = (Path(page.__file__).parent / "report_page" / "page.css").read_text()
    light = style[: style.index("@media")]
    assert re.findall(r"--hue\d: (#\w{6})", light) == list(PALETTE)
    assert len(PALETTE) == maps.HUES


# Maps and moves


def test_neighbours_and_moves_against_a_loop(clusters: CorpusClusters) -> None:
    before, after = clusters.embeddings, make_after(clusters)
    near, near_after = nearest_rows(before, 5), nearest_rows(after, 5)
    fresh, gaps = measure_moves(before, near, near_after)
    for i in range(0, 120, 7):
        cosines = [before[i] @ row for row in before]
        order = sorted((j for j in range(120) if j != i), key=lambda j: -cosines[j])
        assert near[i].tolist() == order[:5]
        assert fresh[i] == sum(j not in order[:5] for j in near_after[i])
        expected = np.mean([cosines[j] for j in order[:5]]) - np.mean([cosines[j] for j in near_after[i]])
        assert gaps[i] == pytest.approx(expected, abs=1e-5)
    assert gaps.argmax() == 0, "the sentence that was moved to another topic"
    assert (gaps[0] > 2 * np.delete(gaps, 0)).all()
    unmoved = measure_moves(before, near, near)
    assert not unmoved[0].any()
    assert not unmoved[1].any()


def test_a_map_of_the_same_embeddings_keeps_its_places_and_a_sentence_that_moves_is_seen() -> None:
    """Places of topics on both maps are compared after scaling; a start of its own would turn or mirror them."""
    clusters = make_clusters(400, 8)
    after = clusters.embeddings.copy()
    after[0] = after[1]
    before_map, after_map = draw_maps(clusters.embeddings, after)
    centres = [
        np.array([points[clusters.ids == topic].mean(axis=0) for topic in range(8)])
        for points in (before_map, after_map)
    ]
    flat = [(places / np.abs(places).max()).ravel() for places in centres]
    assert np.corrcoef(*flat)[0, 1] > 0.95
    own = [np.linalg.norm(points[0] - points[clusters.ids == 0][1:].mean(axis=0)) for points in (before_map, after_map)]
    spread = [points.std() for points in (before_map, after_map)]
    assert own[0] / spread[0] < 0.7 < own[1] / spread[1]


def test_a_sentence_beyond_the_layout_lies_among_its_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "LAYOUT_ROWS", 100)
    clusters = make_clusters(400, 4)
    points, _ = draw_maps(clusters.embeddings, clusters.embeddings)
    centres = np.array([points[clusters.ids == topic].mean(axis=0) for topic in range(4)])
    assert (np.linalg.norm(points[:, None] - centres, axis=2).argmin(axis=1) == clusters.ids).mean() > 0.97


def test_topics_of_one_colour_lie_far_apart() -> None:
    line = np.array([[place, 0.0] for place in range(14)], dtype=np.float32)
    shown = np.arange(14) != 3
    hues = topic_colours(line, np.arange(14), np.arange(14, 0, -1), shown)
    assert hues[3] == -1
    assert sorted(hues[shown][:7]) == list(range(7)), "the largest topics have a colour each"
    for hue in range(7):
        assert (np.diff(np.flatnonzero(hues == hue)) >= 4).all()


def test_pairs_are_what_they_say(clusters: CorpusClusters) -> None:
    first, second = same_cluster_pairs(clusters, 0)
    assert len(first) > 0
    assert (first != second).all()
    assert (clusters.ids[first] == clusters.ids[second]).all()
    first, second = random_pairs(100, 0)
    assert (first != second).all()


def test_batches_mark_the_negatives_that_the_loss_leaves_out_and_the_hard_ones(clusters: CorpusClusters) -> None:
    after, bound = make_after(clusters), 0.3
    batches = draw_batches(clusters, after, BATCH, bound, seed=0)
    assert batches == draw_batches(clusters, after, BATCH, bound, seed=0)
    assert len({tuple(batch["rows"]) for batch in batches}) == page.BATCHES
    seen = set()
    for batch in batches:
        rows = batch["rows"]
        assert len(set(rows)) == BATCH
        for at, kind in enumerate(batch["kinds"]):
            i, j = rows[at // BATCH], rows[at % BATCH]
            cosine = float(clusters.embeddings[i] @ clusters.embeddings[j])
            assert batch["before"][at] == pytest.approx(1000 * cosine, abs=0.51)
            assert batch["after"][at] == pytest.approx(1000 * float(after[i] @ after[j]), abs=0.51)
            false = clusters.ids[i] == clusters.ids[j] != 3  # the last topic is not trusted
            expected = 0 if i == j else page.FALSE if false else page.HARD if cosine >= bound else 0
            assert kind == expected
            seen.add(kind)
    assert seen == {0, page.FALSE, page.HARD}


def test_curves_are_the_numbers_that_were_logged_more_than_once() -> None:
    log: list[dict[str, Any]] = [
        {"loss": 2.0, "step": 1, "epoch": 0.5, "note": "text"},
        {"loss": 1.0, "step": 2, "epoch": 1.0, "note": "text"},
        {"loss": float("nan"), "step": 3, "epoch": 1.5},
        {"train_runtime": 3.0, "step": 3},
    ]
    assert curves(log) == {"loss": [(1, 2.0), (2, 1.0)]}
    assert curves([]) == {}


# Odd corpora


def odd_embeddings(kind: str) -> np.ndarray:
    rows = make_rows(40, 4, 0.1, 0)
    if kind == "all equal":
        rows[:] = rows[0]
    elif kind == "two different":
        rows[:] = rows[[0, 1] * 20]
    elif kind == "nearly all equal":
        rows[1:] = rows[1]
    elif kind == "on a line":
        rows[:] = [[np.cos(i / 50), np.sin(i / 50), 0, 0, 0, 0] for i in range(40)]
    elif kind == "four":
        rows = rows[:4]
    elif kind == "zeros":
        rows[:20] = 0
    return rows


@pytest.mark.parametrize(
    "kind", ["all equal", "two different", "nearly all equal", "on a line", "four", "zeros", "plain"]
)
@pytest.mark.parametrize("then", ["all equal", "plain"])
def test_odd_embeddings_have_a_report(kind: str, then: str, tmp_path: Path) -> None:
    """The t-SNE of scikit-learn would end the process on rows that are all equal."""
    before = odd_embeddings(kind)
    after = odd_embeddings(then)[: len(before)]
    clusters = CorpusClusters.fit([f"text {i}" for i in range(len(before))], embeddings=before)
    write_files(make_report(clusters, after), clusters, after, tmp_path / "report.html")
    data = read_page(tmp_path / "report.html")
    assert len(data["texts"]) == len(before)
    assert len(data["before"]) == len(data["after"]) == 2 * len(before)
    if not clusters.has_topics:
        assert set(data["colours"]) == {-1}
        assert "No topics were found" in data["notes"]["topics-note"]


def test_a_map_of_equal_embeddings_is_one_point() -> None:
    assert not lay_out(odd_embeddings("all equal")).any()


# Two models, without training


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def test_the_command_compares_two_models_and_overwrites_nothing(model_path: str, tmp_path: Path) -> None:
    words = ["report", save_corpus(tmp_path), "--before", model_path, "--after", model_path, "--n-clusters", 8]
    words += ["--output", tmp_path / "new" / "page.html", "--n-rows", 100]
    code, text = cli(*words)
    assert code == 0, text
    assert "100 sentences in 8 clusters" in text
    assert "holds the sentences that it shows" in text
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"page.html", "page.png", "page.svg", "map.parquet"}
    data = read_page(tmp_path / "new" / "page.html")
    assert len(data["texts"]) == 100
    assert "of 320 in the corpus" in data["notes"]["privacy"]
    assert data["moved"] == [], "the models are one"
    assert data["curves"] == {}
    code, text = cli(*words)
    assert code == 2
    assert "page.html' exists already" in text
    code, text = cli(*[word if word != tmp_path / "new" / "page.html" else tmp_path / "page" for word in words])
    assert code == 2
    assert "is no page: give it a name that ends in .html" in text


def test_sentences_beyond_the_clustered_sample_have_the_nearest_centroid(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE", 200)
    monkeypatch.setattr(report, "SAMPLE", 200)
    shown: list[CorpusClusters] = []
    monkeypatch.setattr(report, "write_files", lambda numbers, clusters, *args: shown.append(clusters))
    sentences = save_corpus(tmp_path).read_text().splitlines()
    write_report(sentences, model_path, model_path, tmp_path / "page.html", n_clusters=8, show_progress=False)
    [clusters] = shown
    assert clusters.sentences == list(dict.fromkeys(sentences))
    assert len(clusters.ids) == len(clusters.embeddings) == 320
    assert (clusters.ids == clusters.predict(clusters.embeddings)).mean() > 0.8
    assert clusters.sizes.sum() == 320


def test_too_few_distinct_sentences_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sentences holds 1 distinct text\(s\) in 50: give 4 or more"):
        write_report(["same"] * 50, "no model", "no model", tmp_path / "page.html")


@pytest.mark.parametrize("n_rows", [3, 100_001])
def test_numbers_of_sentences_out_of_range_are_refused_at_once(n_rows: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"n_rows={n_rows} is out of range: choose 4 to 100,000"):
        write_report(["a", "b"], "no model", "no model", tmp_path / "page.html", n_rows=n_rows)
