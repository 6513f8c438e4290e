"""The page of a report in a real headless browser: Chromium by Playwright. Skipped where one of the two is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reports import BATCH, make_after, make_clusters, make_report

from st_clusterns.training.report import write_files

playwright = pytest.importorskip("playwright.sync_api", reason="needs the browser extra: pip install -e '.[browser]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

NASTY = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"> needle"
ARABIC, CHINESE = "كيف أعيد تعيين كلمة المرور", "今天天气很好, needle"
CLUSTERS = make_clusters(texts={5: NASTY, 6: "long " * 500, 7: ARABIC, 8: CHINESE})
PIXELS_READ = "willReadFrequently"  # what Chromium says when `bright` reads the pixels of a canvas; the page does not
HITS = [5, 8]  # sentences with the word "needle"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    after = make_after(CLUSTERS)
    write_files(make_report(CLUSTERS, after), CLUSTERS, after, path)
    return path


def open_page(browser: Any, path: Path, **settings: Any) -> tuple[Any, list[str]]:
    """Open a page; return it with all that went wrong: messages of the console, errors, requests but for the file."""
    page, faults = browser.new_page(viewport={"width": 1200, "height": 900}, **settings), []
    page.on("console", lambda message: PIXELS_READ in message.text or faults.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("dialog", lambda dialog: faults.append("a dialog"))
    page.on("request", lambda request: request.url == path.as_uri() or faults.append(f"request: {request.url}"))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")
    settle(page)
    return page, faults


@pytest.fixture
def page(browser: Any, path: Path) -> Iterator[Any]:
    page, faults = open_page(browser, path)
    yield page
    assert faults == []
    assert page.title() == "Sentence embeddings before and after training", "a sentence has run as a script"
    page.close()


def settle(page: Any) -> None:
    """Wait until what was asked for is drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def bright(page: Any, view: str) -> int:
    """The pixels of a map that are coloured: sentences that a search leaves out are grey."""
    count: int = page.evaluate(
        """(id) => { const canvas = document.getElementById(id);
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let count = 0; for (let i = 0; i < data.length; i += 4) {
          const pixel = data.slice(i, i + 3), spread = Math.max(...pixel) - Math.min(...pixel);
          count += data[i + 3] > 150 && spread > 50;
        } return count; }""",
        view,
    )
    return count


def places(page: Any, view: str) -> np.ndarray:
    """Where the sentences are drawn, in CSS pixels of the canvas, (N, 2)."""
    index = ["before", "after"].index(view)
    return np.array(page.evaluate(f"[...data.texts.keys()].map((i) => maps[{index}].outside(i))"))


def labels(page: Any) -> list[str]:
    return [page.locator(f"#{view}").get_attribute("aria-label") for view in ("before", "after")]


def test_all_points_are_drawn_on_both_maps(page: Any) -> None:
    assert labels(page) == ["Before training: 120 sentences", "After training: 120 sentences"]
    page.evaluate("maps.forEach((map) => { map.labels = []; map.draw(); })")
    for view in ("before", "after"):
        inside = page.locator(f"#{view}").bounding_box()
        points = places(page, view)
        assert len(points) == 120
        assert points.min() > 0
        assert (points.max(axis=0) < (inside["width"], inside["height"])).all()
        assert bright(page, view) > 120 * 5, "a point has a few pixels"


def test_the_page_says_what_it_holds_and_shows_sentences_as_text(page: Any) -> None:
    assert "All 120 sentences shown here, of 120 in the corpus, are inside this file" in page.inner_text("#privacy")
    assert "Long sentences are cut to 300 characters" in page.inner_text("#privacy")
    assert page.locator("#hits button").nth(5).inner_text() == NASTY
    assert page.locator("#topics tbody tr").count() == 4
    assert page.locator("#moved button").first.get_attribute("data-sentence") == "0"
    assert page.locator("#curves svg").count() == 2
    assert "loss: 2.9 → 2.2" in page.inner_text("#curves")
    button = page.locator("#hits button").nth(7)
    assert button.evaluate("(element) => getComputedStyle(element).unicodeBidi") == "plaintext"


def test_a_search_filters_both_maps_and_show_all_ends_it(page: Any) -> None:
    page.evaluate("maps.forEach((map) => { map.labels = []; map.draw(); })")
    whole = [bright(page, view) for view in ("before", "after")]
    page.fill("#search", "NEEDLE")
    settle(page)
    assert page.inner_text("#count") == "2 of 120 sentences"
    assert all(label.endswith("120 sentences, 2 highlighted") for label in labels(page))
    found = page.locator("#hits button")
    assert [int(found.nth(i).get_attribute("data-sentence")) for i in range(found.count())] == HITS
    for view, before in zip(("before", "after"), whole, strict=True):
        assert 0 < bright(page, view) < before / 4
    page.fill("#search", ARABIC[:8])
    assert page.inner_text("#count") == "1 of 120 sentences"
    page.fill("#search", "no such words")
    assert page.inner_text("#count") == "0 of 120 sentences"
    page.click("text=Show all")
    settle(page)
    assert page.inner_text("#count") == "120 of 120 sentences"
    assert [bright(page, view) for view in ("before", "after")] == whole


def test_a_click_on_a_topic_highlights_it_in_both_maps_and_another_click_ends_it(page: Any) -> None:
    button = page.locator("#topics tbody button").nth(1)
    button.click()
    settle(page)
    assert page.inner_text("#count") == "30 of 120 sentences"
    assert all(label.endswith("30 highlighted") for label in labels(page))
    assert button.get_attribute("aria-current") == "true"
    assert "topic1" in page.locator("#topic option:checked").inner_text()
    button.click()
    assert page.inner_text("#count") == "120 of 120 sentences"


def test_the_pointer_shows_a_sentence_and_a_click_its_neighbours(page: Any) -> None:
    page.fill("#search", "sentence 17 ")
    settle(page)
    for view in ("before", "after"):
        x, y = places(page, view)[17]
        page.locator(f"#{view}").hover(position={"x": x, "y": y})
        assert "sentence 17 about topic1" in page.inner_text("#tip")
        page.locator(f"#{view}").click(position={"x": x, "y": y})
        assert "sentence 17 about topic1" in page.inner_text("#sentence")
    assert page.locator("#sentence li").count() == 10
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()
    page.locator("#moved button").first.click()
    assert "sentence 0 about topic0" in page.inner_text("#sentence blockquote")
    assert page.locator("#sentence .new").count() == 5, "it has moved to another topic"


def test_a_click_on_a_cell_shows_its_pair(page: Any) -> None:
    batch = page.evaluate("data.batches[0]")
    cosines = CLUSTERS.embeddings[batch["rows"]] @ CLUSTERS.embeddings[batch["rows"]].T
    for kind, words in ((1, "Probably a false negative"), (2, "Hard negative"), (0, "Negative.")):
        at = next(i for i, found in enumerate(batch["kinds"]) if found == kind and i % BATCH != i // BATCH)
        row, column = divmod(at, BATCH)
        for view in ("before", "after"):
            canvas = page.locator(f"#batch-{view}")
            cell = canvas.evaluate("(element) => element.clientWidth") / BATCH
            canvas.click(position={"x": (column + 0.5) * cell, "y": (row + 0.5) * cell})
            shown = page.inner_text("#cell")
            assert CLUSTERS.sentences[batch["rows"][row]][:20] in shown
            assert CLUSTERS.sentences[batch["rows"][column]][:20] in shown
            assert f"Cosine {cosines[row, column]:.3f} before" in shown
            assert words in shown
    page.select_option("#batch", "1")
    assert "24 sentences drawn at random" in page.inner_text("#batch-note")


def test_the_keyboard_alone_will_do(page: Any) -> None:
    page.focus("#before")
    start = places(page, "before")
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    settle(page)
    assert np.ptp(places(page, "before"), axis=0) == pytest.approx(1.5 * np.ptp(start, axis=0), rel=1e-3)
    page.keyboard.press("0")
    assert places(page, "before") == pytest.approx(start)
    page.locator("#hits button").nth(3).focus()
    page.keyboard.press("Enter")
    assert "sentence 3 about topic3" in page.inner_text("#sentence")
    page.locator("#topics tbody button").first.focus()
    page.keyboard.press("Space")
    assert page.inner_text("#count") == "30 of 120 sentences"
    page.focus("#batch-after")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    rows = page.evaluate("data.batches[0].rows")
    assert [CLUSTERS.sentences[rows[i]] in page.inner_text("#cell") for i in (1, 2)] == [True, True]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_both_colour_schemes_and_narrow_windows(browser: Any, path: Path, scheme: str, width: int) -> None:
    page, faults = open_page(browser, path, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    settle(page)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert bright(page, "before") > 0
    assert faults == []
    page.close()


def test_a_broken_file_says_so(browser: Any, path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    start = text.index('octet-stream">') + len('octet-stream">')
    broken.write_text(text[: start + 400] + text[start + 500 :], encoding="utf-8")
    page = browser.new_page()
    page.goto(broken.as_uri())
    page.wait_for_selector("#failure:not([hidden])")
    assert "The page could not be drawn" in page.inner_text("#failure")
    page.close()
