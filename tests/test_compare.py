"""The benchmark harness: it resumes, shares work, refuses to mix settings, and its tables say what the runs say."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from batches import D, corpus, cos, features, gradients, views
from conftest import StubModel
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from tiny_bert import load_model, make_sentences, save_bert
from torch import Tensor

import compare
import corpora
import true_k
import verdicts
from ablation import AblatedLoss
from methods import METHODS, START, DebiasedLoss, Job, SelfGuidedLoss, delete_words, find_clusters, nearest_other
from st_clusterns import ClusterNSLoss, Recipe, embed_corpus
from st_clusterns.evaluation.sts import STS_TESTS
from st_clusterns.training import trainer
from st_clusterns.training.quickstart import load_utterances, packaged_model
from tables import p_value, spread

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROWS = [START, {"name": "plain", "method": "SimCSE"}, {"name": "ours", "loss": {"pull_weight": 0.5}}]
PLAN: dict[str, Any] = {
    "methods": ROWS,
    "baseline": "plain",
    "corpora": ["StackOverflow", "AgNews8000", "wiki100"],
    "seeds": [0, 1, 2],
    "recipe": {"batch_size": 8, "max_steps": 2},
}
CLUSTERING_SCORES = ["v_measure", "accuracy", "v_measure_best", "accuracy_best"]
CLUSTERING_SCORES += ["neighbour_purity", "pair_average_precision"]
RUNS = 3 * (1 + 3 + 3)  # the starting model has one seed


class Harness:
    """Runs `compare.main` on a plan with stub runs, and counts them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.output = folder / "out"
        self.calls: Counter[str] = Counter()
        self.broken: set[str] = set()
        self.write(PLAN)
        monkeypatch.setattr(compare, "run", self.run)

    def write(self, plan: dict[str, Any]) -> None:
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def run(self, row: compare.Row, corpus: str, seed: int, data: Any, limit: int | None, cache: Path) -> Any:
        name = f"{row.name}/{corpus}/{seed}"
        self.calls[name] += 1
        if name in self.broken:
            raise RuntimeError("broken on purpose")
        draw = random.Random(name)
        names = CLUSTERING_SCORES if corpora.is_clustering(corpus) else ["sts_dev", *corpora.SEVEN, "sts_mean"]
        return {
            "row": row.name,
            "settings": row.settings(corpus, seed, limit),
            "scores": {name: draw.uniform(40, 90) for name in names},
            "notes": {},
            "seconds": 1.0,
            "seconds_training": 1.0,
        }

    def main(self, *words: object) -> None:
        common = [self.folder / "plan.json", "--output", self.output, "--cache", self.folder / "cache"]
        compare.main([str(word) for word in (*common, *words)])

    def read(self, row: str, corpus: str, score: str) -> list[float]:
        """A second reading of the files, by their names."""
        paths = sorted(self.output.glob(f"{corpus}-{compare.slug(row)}-*.json"))
        return [json.loads(path.read_text())["scores"][score] for path in paths]

    def cells(self, *headings: str) -> dict[str, list[str]]:
        """The cells of the first table under these headings of the README, one heading below the other."""
        page = (self.output / "README.md").read_text()
        for heading in headings:
            page = page.split(f"\n{heading}")[1]
        table = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)[0].splitlines()
        lines = [line.strip("|").split("|") for line in table]
        return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    return Harness(tmp_path, monkeypatch)


def test_only_missing_runs_are_done(harness: Harness) -> None:
    harness.main()
    assert len(harness.calls) == sum(harness.calls.values()) == RUNS
    files = {path: path.read_bytes() for path in harness.output.glob("*.json")}
    assert len(files) == RUNS
    lost = harness.output / "wiki100-ours-1.json"
    lost.unlink()
    harness.main()
    assert harness.calls["ours/wiki100/1"] == 2
    assert sum(harness.calls.values()) == RUNS + 1
    assert {path: path.read_bytes() for path in harness.output.glob("*.json")} == files
    assert not list(harness.output.glob("*.lock"))


def test_parts_of_a_plan_and_tables_alone(harness: Harness) -> None:
    harness.main("--rows", "ours", START, "--corpora", "wiki100", "--seeds", 2)
    assert set(harness.calls) == {"ours/wiki100/2"}, "the starting model runs at the plan's first seed only"
    harness.main("--tables")
    assert sum(harness.calls.values()) == 1
    assert "## Clustering of" not in (harness.output / "README.md").read_text(encoding="utf-8"), "tables without rows"
    assert harness.cells("## STS and search")["ours"][0].endswith("(1)")


def test_a_wide_table_is_turned_on_its_side(harness: Harness) -> None:
    parts = [f"StackOverflow classes {n}-{n + 1}" for n in range(1, 12)]
    harness.write({**PLAN, "corpora": parts, "seeds": [0]})
    harness.main()
    for caption, names in (("V-measure.", ["v_measure"]), ("V-measure [", ["v_measure_best", "accuracy_best"])):
        table = harness.cells(caption)
        assert table[""] == [START, "plain", "ours"]
        assert list(table)[2:] == [*parts, "mean"]
        for part in parts:
            for row, cell in zip(table[""], table[part], strict=True):
                (v,), *beside = (harness.read(row, compare.slug(part), name) for name in names)
                assert cell == f"{v:.1f} (1)" + "".join(f" [{accuracy:.1f}]" for (accuracy,) in beside)


def test_a_part_that_the_plan_does_not_have_is_refused(harness: Harness) -> None:
    with pytest.raises(SystemExit, match="ClusterNS"):
        harness.main("--rows", "ours", "ClusterNS")
    assert not harness.calls


def test_one_broken_run_costs_only_itself(harness: Harness) -> None:
    harness.broken = {"plain/AgNews8000/1"}
    with pytest.raises(SystemExit, match="AgNews8000-plain-1"):
        harness.main()
    assert sum(harness.calls.values()) == RUNS
    harness.broken = set()
    harness.main()
    assert sum(harness.calls.values()) == RUNS + 1


def test_a_run_that_another_process_works_on_is_left_to_it_and_taken_over_when_it_dies(harness: Harness) -> None:
    harness.output.mkdir()
    lock = harness.output / "wiki100-ours-0.lock"
    hold = "from filelock import FileLock as L; import sys; l = L(sys.argv[1]); l.acquire(); print('held'); "
    hold += "sys.stdout.flush(); sys.stdin.read()"
    words = [sys.executable, "-c", hold, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        harness.main()
        assert "ours/wiki100/0" not in harness.calls
        other.kill()
    assert lock.exists(), "a killed process cannot clean up"
    harness.main()
    assert harness.calls["ours/wiki100/0"] == 1


@pytest.mark.parametrize("change", [{"recipe": {"batch_size": 16}}, {"scoring": {"restarts": 3, "bf16": True}}])
def test_results_of_other_settings_are_never_mixed_in(harness: Harness, change: dict[str, Any]) -> None:
    harness.main()
    before = sum(harness.calls.values())
    harness.write({**PLAN, **change})
    with pytest.raises(SystemExit, match=f"StackOverflow-.*made with another {next(iter(change))}"):
        harness.main()
    assert sum(harness.calls.values()) == before


def test_a_limit_has_a_folder_of_its_own(harness: Harness) -> None:
    harness.main("--limit", 30, "--corpora", "wiki100")
    assert not harness.output.exists()
    paths = list(harness.output.with_name("out-first30").glob("*.json"))
    assert len(paths) == RUNS // 3
    assert {json.loads(path.read_text())["settings"]["limit"] for path in paths} == {30}


def test_a_finished_run_tells_its_settings(harness: Harness) -> None:
    harness.main()
    start, ours = (
        json.loads((harness.output / f"wiki100-{name}-0.json").read_text())["settings"]
        for name in ("starting_model", "ours")
    )
    assert start["recipe"] is None, "nothing was trained"
    assert ours["recipe"]["batch_size"] == 8
    assert ours["recipe"]["seed"] == ours["seed"] == 0
    assert ours["loss"] == {"pull_weight": 0.5}
    assert ours["tfidf"] is True
    assert ours["scoring"]["restarts"] == 10


def test_tables_against_numpy_and_scipy(harness: Harness) -> None:
    harness.main()
    for caption, names in (
        ("V-measure.", ["v_measure"]),
        ("Accuracy.", ["accuracy"]),
        ("V-measure [accuracy] of the k-means run with the lowest inertia.", ["v_measure_best", "accuracy_best"]),
        ("Neighbour purity.", ["neighbour_purity"]),
        ("Average precision of same-class pairs among all pairs, sorted by cosine.", ["pair_average_precision"]),
    ):
        cells = harness.cells(caption)
        assert cells[""] == ["StackOverflow", "AgNews8000", "mean"]
        score, *beside = (
            np.array([harness.read("ours", c, name) for c in PLAN["corpora"][:2]]) for name in names
        )  # each (corpora, seeds)
        expected = [*score, score.mean(axis=0)]  # per seed, then over seeds
        brackets = [[f" [{row.mean():.1f}]" for row in [*b, b.mean(axis=0)]] for b in beside] or [[""] * 3]
        assert cells["ours"] == [
            f"{row.mean():.1f} ± {row.std(ddof=1):.1f} (3){more}" for row, more in zip(expected, *brackets, strict=True)
        ]
    v = {name: np.array(harness.read(name, "StackOverflow", "v_measure")) for name in (START, "plain", "ours")}
    assert harness.cells("V-measure.")[START][0] == f"{v[START][0]:.1f} (1)"

    differences = harness.cells("## Difference")
    titles = ["StackOverflow: V", "AgNews8000: V", "mean V of 2 sets", "mean accuracy of 2 sets"]
    assert differences[""][:4] == titles
    p = scipy.stats.ttest_ind(v["ours"], v["plain"], equal_var=False).pvalue
    assert differences["ours"][0] == f"{v['ours'].mean() - v['plain'].mean():+.1f} (p = {p:.3f})"
    assert "plain" not in differences, "the baseline differs from nothing"
    p = scipy.stats.ttest_1samp(v["plain"], v[START][0]).pvalue
    assert differences[START][0] == f"{v[START][0] - v['plain'].mean():+.1f} (p = {p:.3f})"
    assert (harness.output / "differences.png").stat().st_size > 10_000


def test_held_out_sets_have_tables_and_means_of_their_own(harness: Harness) -> None:
    plain = ["StackOverflow", "AgNews8000"]
    held_out = [f"{name} held out" for name in plain]
    harness.write({**PLAN, "corpora": [*plain, *held_out], "methods": ROWS[1:]})
    harness.main()
    for heading, names in (("## Clustering of texts", plain), ("## Clustering of held-out texts", held_out)):
        for caption, score in (("V-measure.", "v_measure"), ("Accuracy.", "accuracy")):
            cells = harness.cells(heading, caption)
            assert cells[""] == [*plain, "mean"]
            mean = np.mean([harness.read("ours", compare.slug(name), score) for name in names])
            assert cells["ours"][-1].startswith(f"{mean:.1f} ± ")
    assert "mean V of 2 held-out sets" in harness.cells("## Difference")[""]


def test_a_table_with_single_seed_runs_says_so(harness: Harness) -> None:
    said = "**Single-seed runs, which decide nothing: {}.**"
    harness.main()
    page = (harness.output / "README.md").read_text()
    assert said[:20] not in page, "the starting model has nothing random in it"
    for seed in (1, 2):
        (harness.output / f"AgNews8000-ours-{seed}.json").unlink()
    harness.main("--tables")
    page = (harness.output / "README.md").read_text()
    tables = page.split("\n|---")
    assert page.count(said.format("ours")) == 5, "the tables of the clustering sets"
    assert "decide nothing.**" in page.split("## Difference")[1], "the only row there: it needs no name"
    assert "decide nothing.**" not in page.split("## Difference")[0]
    assert said[:20] not in page.split("## STS and search")[1].split("## Difference")[0]
    assert len(tables) > 6
    for row, seed in itertools.product(("ours", "plain"), (1, 2)):
        (harness.output / f"AgNews8000-{row}-{seed}.json").unlink(missing_ok=True)
    harness.main("--tables")
    page = (harness.output / "README.md").read_text()
    assert "decide nothing.**" in page.split("## Difference")[0], "all of them: no names are needed"


def test_a_plan_without_a_recipe_has_tables(harness: Harness) -> None:
    harness.write({name: part for name, part in PLAN.items() if name != "recipe"})
    harness.main()
    assert '"batch_size": 96, "epochs": 1.0, "max_steps": 20' in (harness.output / "README.md").read_text()


def test_a_row_without_runs_is_named_and_not_tabulated(harness: Harness) -> None:
    harness.main("--rows", "ours")
    page = (harness.output / "README.md").read_text()
    assert "have not been run: starting model, plain" in page
    assert set(harness.cells("V-measure.")) - {"", "---"} == {"ours"}


@pytest.mark.parametrize(("setting", "mixed"), [("momentum", True), ("temperature", False), ("has_topics", False)])
def test_runs_of_two_versions_of_a_loss_are_told_and_what_the_corpus_decides_is_no_version(
    harness: Harness, setting: str, mixed: bool
) -> None:
    harness.main()
    for path in harness.output.glob("*-ours-*.json"):
        run = json.loads(path.read_text())
        value = 1 if run["settings"]["corpus"] == "wiki100" else 2
        path.write_text(json.dumps({**run, "notes": {"loss": {"pull_weight": 1.0, setting: value}}}))
    harness.main("--tables")
    assert ("settings of the loss are mixed in: ours" in (harness.output / "README.md").read_text()) == mixed


def test_p_by_the_formula_of_welch() -> None:
    ours, theirs = np.array([1.0, 2.0, 4.0]), np.array([3.0, 3.5, 5.0, 4.0])
    parts = [sample.var(ddof=1) / len(sample) for sample in (ours, theirs)]
    t = (ours.mean() - theirs.mean()) / math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(part**2 / (len(s) - 1) for part, s in zip(parts, (ours, theirs), strict=True))
    assert p_value(ours, theirs) == pytest.approx(2 * scipy.stats.t.sf(abs(t), freedom))
    assert p_value(ours[:2], theirs) is None, "too few"
    assert p_value([1.0] * 3, [2.0] * 3) is None, "no spread"
    assert p_value([], theirs) is None
    assert spread([]) == "-"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.json")), ids=lambda path: path.name)
def test_the_plans_of_the_repository(path: Path) -> None:
    plan, rows = compare.read_plan(path)
    names = {row.name for row in rows}
    assert all(row.baseline in names and row.start in names for row in rows)
    assert all(row.runs() for row in rows)
    assert len(rows) == len(plan["methods"])
    for row in rows:
        assert row.method == row.name or row.name not in METHODS or "ablated" in row.method, "a misleading name"
        if row.method == "ClusterNS":
            ClusterNSLoss(StubModel(D), corpus(), **row.loss)
        if row.method == "ClusterNS, ablated":
            AblatedLoss(StubModel(D), corpus(), **row.loss)
        for name in row.corpora:
            known = (*corpora.SEARCH, "AskUbuntu")
            assert corpora.is_clustering(name) or name in known or re.fullmatch(r"wiki\d+", name)


@pytest.mark.parametrize(
    ("row", "word"),
    [({"name": "x", "lsos": {}}, "lsos"), ({"name": "x", "recipe": {"steps": 1}}, "steps"), ("no such method", "such")],
)
def test_a_plan_with_a_slip_is_refused(tmp_path: Path, row: object, word: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({**PLAN, "methods": [row]}))
    with pytest.raises(SystemExit, match=word):
        compare.read_plan(tmp_path / "plan.json")


def test_the_command_line_is_recorded_without_this_machines_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(tmp_path / "benchmarks" / "compare.py"), "plan.json", "--data-dir=/secret/my data", "--rows", "a b"]
    monkeypatch.setattr(sys, "argv", words)
    assert compare.command() == "python benchmarks/compare.py plan.json '--data-dir=.../my data' --rows 'a b'"


def embed_at_random(texts: list[str]) -> np.ndarray:
    """A stand-in for a model: random vectors, no two cosines alike."""
    assert len(texts) == len(set(texts)), "a text is embedded twice"
    return np.array([np.random.default_rng(list(text.encode())).normal(size=5) for text in texts], dtype=np.float32)


def test_sts_and_map_against_their_definitions() -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(30)]

    def cosine(one: str, two: str) -> float:
        a, b = (embed_at_random([text])[0].astype(float) for text in (one, two))
        return float(a @ b / math.sqrt(a @ a * (b @ b)))

    pairs = {
        name: [dict(zip(("sentence1", "sentence2"), draw.sample(words, 2), strict=True), score=i) for i in range(12)]
        for name in corpora.SEVEN
    }
    scores = corpora.score_sts(pairs, embed_at_random)
    for name, rows in pairs.items():
        expected = scipy.stats.spearmanr([cosine(r["sentence1"], r["sentence2"]) for r in rows], range(12))[0]
        assert scores[name] == pytest.approx(100 * expected)
    assert scores["sts_mean"] == pytest.approx(np.mean([scores[name] for name in corpora.SEVEN]))

    queries = [
        {"query": words[i], "positive": words[i + 1 : i + 3], "negative": words[i + 3 : i + 9]} for i in range(9)
    ]
    precisions = []
    for query in queries:
        texts = sorted([*query["positive"], *query["negative"]], key=lambda text: -cosine(query["query"], text))
        ranks = [rank for rank, text in enumerate(texts, 1) if text in query["positive"]]
        precisions.append(np.mean([found / rank for found, rank in enumerate(ranks, 1)]))
    assert corpora.score_reranking(queries, embed_at_random)["map"] == pytest.approx(100 * np.mean(precisions))


def test_what_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, split: str, **others: str) -> Dataset:
        asked.append((path, split, others))
        if path == "text":
            return Dataset.from_dict({"text": ["a", "b"]})
        return Dataset.from_dict({name: ["0"] * 9927 for name in ("sentence1", "sentence2", "score")})

    monkeypatch.setattr(corpora, "load_dataset", load_dataset)
    assert corpora.read_wiki(2, None) == ["a", "b"]
    assert len(corpora._sts("SICK-R", None)) == 9927
    assert [call[:2] for call in asked] == [("text", "train[:2]"), ("mteb/sickr-sts", "test")]
    assert asked[0][2]["data_files"].endswith("wiki1m_for_simcse.txt")
    with pytest.raises(SystemExit, match="--data-dir"):
        corpora.load("SearchSnippets", None)


def write_set(folder: Path, name: str, rows: list[tuple[int, str]]) -> None:
    (folder / "clustering").mkdir(exist_ok=True)
    with gzip.open(folder / "clustering" / f"{name}.tsv.gz", "wt") as file:
        file.write("label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in rows))


def test_a_part_of_a_clustering_set_has_the_texts_of_its_classes_only(tmp_path: Path) -> None:
    rows = [(label, f"text {label} {number}") for number in range(20) for label in (10, 2, 1, 3)]
    write_set(tmp_path, "Clinc150", rows)
    assert corpora.load("Clinc150", tmp_path).texts == [text for _, text in rows]
    part = corpora.load("Clinc150 classes 2-9", tmp_path)
    assert part.texts == [text for label, text in rows if label in (2, 3)]
    perfect = part.score(lambda texts: np.array([[text[5] == "2", text[5] == "3"] for text in texts], np.float32))
    assert set(perfect) > set(CLUSTERING_SCORES)
    assert list(perfect.values()) == pytest.approx([100] * len(perfect))
    assert corpora.is_clustering("AgNews8000 classes 1-2")
    assert not corpora.is_clustering("wiki100")


def test_held_out_texts_are_scored_and_never_trained_on(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [(number % 4, f"text {number % 4} {number}") for number in range(80)]
    rows += draw.sample(rows, 40)  # copies, which must not fall on both sides
    draw.shuffle(rows)
    write_set(tmp_path, "StackOverflow", rows)
    held_out = corpora.load("StackOverflow held out", tmp_path)
    scored: list[str] = []

    def embed(texts: list[str]) -> np.ndarray:
        scored.extend(texts)
        return np.eye(4, dtype=np.float32)[[int(text[5]) for text in texts]]

    assert held_out.score(embed)["v_measure"] == pytest.approx(100), "texts and classes are out of step"
    assert not set(scored) & set(held_out.texts)
    assert Counter([*scored, *held_out.texts]) == Counter(text for _, text in rows)
    assert len(set(scored)) == len(set(held_out.texts)) == 40
    assert corpora.load("StackOverflow held out", tmp_path).texts == held_out.texts
    assert len({text[5] for text in held_out.texts}) == 4


def test_search_against_a_ranking_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "search" / "npl"
    folder.mkdir(parents=True)
    places = {"north": 90, "near north": 70, "between": 40, "east": 0, "q north": 89, "q east": 1, "q unjudged": 5}
    documents = [{"id": number, "text": text} for number, text in enumerate(list(places)[:4], 1)]
    queries = [{"id": number, "text": text} for number, text in enumerate(list(places)[4:], 1)]
    (folder / "docs.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, documents)).encode()))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    # The first query ranks the documents 1 2 3 4, the second 4 3 2 1. There is no document 9.
    (folder / "qrels.json").write_text(json.dumps({"1": [1, 3], "2": [3, 9]}))

    def embed(texts: list[str]) -> np.ndarray:
        angles = np.radians([places[text] for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    found = corpora.load("npl", tmp_path)
    assert found.texts == list(places)[:4]
    scores = found.score(embed)
    ideal = 1 + 1 / math.log2(3)
    assert scores["ndcg"] == pytest.approx(100 * np.mean([(1 + 1 / math.log2(4)) / ideal, 1 / math.log2(3) / ideal]))
    assert scores["map"] == pytest.approx(100 * np.mean([(1 + 2 / 3) / 2, (1 / 2) / 2]))
    assert scores["recall"] == pytest.approx(100 * np.mean([1, 1 / 2]))
    limited = corpora.load("npl", tmp_path, limit=1)
    assert limited.texts == ["north"]
    assert limited.score(embed)["map"] == pytest.approx(100 * (1 + 2 / 3) / 2), "the search is through all documents"


# -- the ablation -----------------------------------------------------------------------------------------------------


def hashes(n_columns: int) -> list[Tensor]:
    """Rows 0 and 1 have the same text, all columns of a row are alike."""
    return [torch.tensor([0, 0, 1, 2, 3, 4]) for _ in range(n_columns)]


@pytest.mark.parametrize("n_columns", [2, 3])
def test_the_ablation_with_default_settings_is_the_loss_itself(n_columns: int) -> None:
    columns = views(n_columns=n_columns)
    theirs, ours = ClusterNSLoss(StubModel(D), corpus()), AblatedLoss(StubModel(D), corpus())
    values = [loss.compute_loss_from_embeddings(columns, hashes(n_columns)) for loss in (theirs, ours)]
    assert torch.equal(*values)
    for one, other in zip(*(gradients(value, columns) for value in values), strict=True):
        assert torch.equal(one, other)
    assert theirs.get_config_dict().items() <= ours.get_config_dict().items()


@pytest.mark.parametrize(
    "settings",
    [
        {"mask": False},
        {"contrast_weight": 0.5},
        {"margin_weight": 1.0},
        {"momentum": 0.5},
        {"hard_negatives": True},
        {"pull_weight": 0.0},
        {"temperature": 0.05},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("n_columns", [2, 3])
def test_each_setting_of_the_ablation_changes_the_loss_and_is_recorded(
    settings: dict[str, Any], n_columns: int
) -> None:
    columns = [features(column) for column in views(n_columns=n_columns)]
    base, changed = (AblatedLoss(StubModel(D), corpus(), **more) for more in ({}, settings))
    values = [loss(columns).item() for loss in (base, changed)]
    assert abs(values[1] - values[0]) > 1e-3
    assert settings.items() <= changed.get_config_dict().items()
    assert torch.equal(base.centroids, changed.centroids) == ("momentum" not in settings)


def test_the_ablation_can_forget_which_sentences_were_clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    columns, texts = views(), hashes(2)
    known, forgetful = (AblatedLoss(StubModel(D), corpus(), recognise=recognise) for recognise in (True, False))
    by_nearest = ClusterNSLoss(StubModel(D), corpus()).compute_loss_from_embeddings(columns, texts)
    for loss in (known, forgetful):
        loss.known_texts, order = texts[0].sort()
        loss.known_ids = torch.tensor([0, 1, 2, 0, 1, 2])[order]
    assert not torch.equal(known.compute_loss_from_embeddings(columns, texts), by_nearest)
    assert torch.equal(forgetful.compute_loss_from_embeddings(columns, texts), by_nearest)


def test_the_margin_of_the_ablation_against_a_loop_without_copies_of_a_text() -> None:
    base = views()[0].detach()
    anchors, positives = torch.cat([base[:1], base[:1], base[:1], base[3:]]), base + 0.5 * torch.randn(6, D)
    anchors = anchors + 0.1 * torch.randn(6, D)
    loss = AblatedLoss(StubModel(D), corpus(), margin_weight=1.0)
    plain = ClusterNSLoss(StubModel(D), corpus())
    ids = [int(torch.stack([cos(row, centroid) for centroid in loss.centroids]).argmax()) for row in anchors]
    assert ids[0] == ids[1] == ids[2], "the copies, and a third of their cluster"
    texts, expected = hashes(2), 0.0
    for i in range(6):
        pairs = [j for j in range(6) if j != i and ids[j] == ids[i] and texts[0][j] != texts[0][i]]
        deltas = [float(cos(anchors[i], positives[j]) - cos(anchors[i], positives[i])) for j in pairs]
        expected += sum(max(d, 0) + max(-d - 0.3, 0) for d in deltas) / max(len(pairs), 1) / 6
    found = [one.compute_loss_from_embeddings([anchors, positives], texts) for one in (loss, plain)]
    assert (found[0] - found[1]).item() == pytest.approx(expected, abs=1e-5)
    assert expected > 0.01


def test_moving_centroids_of_the_ablation_against_a_loop() -> None:
    columns = views()
    loss = AblatedLoss(StubModel(D), corpus(), momentum=0.25)
    rows, before = torch.nn.functional.normalize(columns[0].detach(), dim=1), loss.centroids.clone()
    ids = (rows @ before.T).argmax(dim=1)
    loss.compute_loss_from_embeddings(columns)
    for cluster, old in enumerate(before):
        members = rows[ids == cluster]
        expected = old if len(members) == 0 else 0.75 * old + 0.25 * members.mean(dim=0)
        torch.testing.assert_close(loss.centroids[cluster], expected)
    assert len(set(ids.tolist())) > 1
    moved = loss.centroids.clone()
    with torch.no_grad():
        loss.compute_loss_from_embeddings(columns)
    assert torch.equal(loss.centroids, moved), "an evaluation moves nothing"


def test_the_small_losses_against_loops() -> None:
    cosine = torch.rand(6, 6, dtype=torch.float64) * 0.9
    masked, debiased = [], []
    t, margin, prior, n = 0.5, 0.1, 0.1, 5
    for i in range(6):
        others = [float(cosine[i, j]) for j in range(6) if j != i]
        positive = float(cosine[i, i])
        kept = [c for c in others if c <= positive + margin]
        e = [math.exp(c / t) for c in kept]
        masked.append(-math.log(math.exp(positive / t) / (math.exp(positive / t) + sum(e))))
        estimate = (sum(math.exp(c / t) for c in others) / n - prior * math.exp(positive / t)) / (1 - prior)
        g = max(estimate, math.exp(-1 / t))
        debiased.append(-math.log(math.exp(positive / t) / (math.exp(positive / t) + n * g)))
    assert SelfGuidedLoss.from_cosines(cosine, t, margin).item() == pytest.approx(np.mean(masked))
    assert DebiasedLoss.from_cosines(cosine, t, prior).item() == pytest.approx(np.mean(debiased))
    assert any(float(cosine[i, j]) > float(cosine[i, i]) + margin for i in range(6) for j in range(6)), "none masked"


@pytest.mark.parametrize(("lowest", "highest"), [(-1.0, 1.0), (0.2, 0.5), (0.9, 1.0)])
def test_the_nearest_other_row_against_a_loop(lowest: float, highest: float) -> None:
    rows = np.random.default_rng(0).normal(size=(2100, 6)).astype(np.float32)  # more than two blocks
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = nearest_other(rows, lowest, highest)
    for place in range(0, len(rows), 7):
        cosines = {other: float(rows[place] @ rows[other]) for other in range(len(rows)) if other != place}
        allowed = {other: cosine for other, cosine in cosines.items() if lowest <= cosine <= highest}
        if not allowed:
            assert found[place] == -1
        else:
            assert cosines[int(found[place])] == pytest.approx(max(allowed.values()), abs=1e-6)
    assert lowest == -1 or len(set(found)) > 100


@pytest.mark.parametrize("times", [0.5, 2.0])
def test_a_float_multiplies_the_number_of_clusters_that_a_corpus_gets(times: float, tmp_path: Path) -> None:
    texts, rows = make_sentences(200), np.random.default_rng(0).standard_normal((200, D)).astype(np.float32)
    numbers = [
        find_clusters(Job(StubModel(D), texts, lambda: rows, Recipe(), tmp_path, n_clusters=number)).n_clusters
        for number in (None, times)
    ]
    assert numbers[1] == times * numbers[0] != numbers[0]


def test_deleted_words() -> None:
    draw = random.Random(0)
    text = " ".join(f"w{i}" for i in range(1000))
    kept = delete_words(text, 0.6, draw).split()
    assert 330 < len(kept) < 470
    assert kept == sorted(set(kept), key=lambda word: int(word[1:])), "order kept, nothing added"
    assert all(delete_words("one two", 0.99, draw) in ("one", "two") for _ in range(20))


# -- with a real, tiny model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    load_model(save_bert(folder / "bert")).save(str(folder / "st"))
    return str(folder / "st")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("method", "group_size"), [*((method, 1) for method in METHODS), ("ClusterNS", 4)])
def test_every_method_trains(
    method: str, group_size: int, model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    sampler = trainer.ClusterBatchSampler

    def watched(*args: Any, **settings: Any) -> Any:
        made = sampler(*args, **settings)
        seen.append(made.group_size if made.ids is not None else 1)
        return made

    monkeypatch.setattr(trainer, "ClusterBatchSampler", watched)
    model, texts = SentenceTransformer(model_path), make_sentences(64)
    recipe = Recipe(batch_size=16, max_steps=2, learning_rate=1e-3, max_length=16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    job = Job(model, texts, lambda: embed_corpus(texts, model, show_progress_bar=False), recipe, tmp_path)
    job.group_size = group_size
    if method == "GISTEmbed":  # a random Bert finds all sentences alike, and would mask them all
        job.loss = {"margin": 1e-6}
    if method == "nearest sentence as negative":  # likewise, for copies
        job.loss = {"highest": 1.0}
    notes = METHODS[method](job)
    json.dumps(notes)
    after = model.state_dict()
    changed = any(name not in before or not torch.equal(before[name], weight) for name, weight in after.items())
    assert changed == (notes["has_topics"] if method == "topic layer alone" else method != START)
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())
    assert group_size == 1 or set(seen) == {group_size}, "the batches do not know the clusters"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")
def test_a_whole_comparison_from_files(model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    texts = make_sentences(120)
    write = {
        "clustering/SearchSnippets.tsv.gz": ["label\ttext", *(f"{text.split()[0]}\t{text}" for text in texts)],
        "corpus/wiki_1m.txt.gz": texts,
        "askubuntu/titles_unlabelled.txt.gz": texts,
        "askubuntu/derived_rerank_dev.jsonl.gz": [
            json.dumps({"query": texts[i], "positive": texts[i + 1 : i + 2], "negative": texts[i + 2 : i + 6]})
            for i in range(10)
        ],
    }
    head = "split\tsubset\tscore\tsentence1\tsentence2"
    for name in corpora.SEVEN:
        pairs = [f"{('dev', 'test')[i % 2]}\t\t{i % 5}\t{texts[i]}\t{texts[-i - 1]}" for i in range(40)]
        write[f"sts/{name}.tsv.gz"] = [head, *pairs]
    for name, test in list(STS_TESTS.items()):
        monkeypatch.setitem(STS_TESTS, name, test._replace(pairs=20))
    monkeypatch.setattr(corpora, "SICK_PAIRS", 40)
    for name, lines in write.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    plan = {
        "model": model_path,
        "methods": [START, "SimCSE", {"name": "few clusters", "n_clusters": 4, "loss": {"pull_weight": 0.5}}],
        "baseline": "SimCSE",
        "corpora": ["SearchSnippets", "wiki100", "AskUbuntu"],
        "seeds": [3],
        "recipe": {"batch_size": 16, "max_steps": 2, "learning_rate": 1e-3},
        "scoring": {"restarts": 2, "bf16": False},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    words = [str(tmp_path / "plan.json"), "--data-dir", str(data), "--output", str(tmp_path / "out")]
    compare.main([*words, "--cache", str(tmp_path / "cache")])
    runs = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert len(runs) == 9
    ours = next(run for run in runs if run["row"] == "few clusters" and run["settings"]["corpus"] == "wiki100")
    assert ours["notes"]["loss"]["pull_weight"] == 0.5
    assert ours["notes"]["loss"]["n_clusters"] == ours["notes"]["n_clusters"] == 4
    assert ours["sentences"] == 100
    assert len({run["starting_model"] for run in runs}) == 1
    start = next(run for run in runs if run["row"] == START and run["settings"]["corpus"] == "wiki100")
    assert start["scores"] != ours["scores"]
    monkeypatch.setattr(corpora, "SICK_PAIRS", 20)  # as many as its split named test has
    with pytest.raises(ValueError, match="SICK-R has 20 pairs"):
        corpora.load("wiki100", data)
    assert not re.search(r"\| -? \|", (tmp_path / "out" / "README.md").read_text().split("## Difference")[0])


def test_the_table_of_verdicts_counts_what_agrees_and_what_is_right() -> None:
    def draws(topics: list[bool]) -> list[dict[str, Any]]:
        shares = [share for share in verdicts.SHARES for _ in range(2)]
        return [
            {
                "share": share,
                "highest_trust": 0.1 + 0.3 * found,
                "n_clusters": 16 * (1 + found),
                "sentences": int(1000 * share),
            }
            for share, found in zip(shares, topics, strict=True)
        ]

    found = {
        "AgNews8000": draws([True, True, True, False]),
        "AskUbuntu": draws([False, False, True, True]),
        "npl": draws([True] * 4),
    }
    text = verdicts.table(found)
    assert "| AgNews8000 | yes | 2 of 2; K 32; n 500 | 1 of 2; K 16, 32; n 100 |" in text
    assert "| AskUbuntu | no | 0 of 2; K 16; n 500 | 2 of 2; K 32; n 100 |" in text
    assert "| npl | alike | 2 of 2;" in text
    assert "Same verdict: 75% of 12 draws; right: 62% of 8." in text  # 3, 2 and 4 agree; 3 and 2 are right


def test_only_missing_runs_are_made(tmp_path: Path) -> None:
    (tmp_path / "b-0.json").write_text('{"kept": 1}')
    made = []

    def run(name: str, seed: int) -> dict[str, Any]:
        made.append((name, seed))
        return {"name": name}

    compare.write_missing(tmp_path, ["a", "b"], [0, 1], run)
    assert made == [("a", 0), ("a", 1), ("b", 1)]
    assert (tmp_path / "b-0.json").read_text() == '{"kept": 1}'
    assert json.loads((tmp_path / "b-1.json").read_text()) == {"name": "b"}


def test_the_table_at_the_true_number_of_classes() -> None:
    def one(start: float, ours: float) -> dict[str, Any]:
        pairs = zip(true_k.MODELS, (start, ours), strict=True)
        return {"scores": {model: {"accuracy": value, "v_measure": value - 10} for model, value in pairs}}

    text = true_k.table({"StackOverflow": [one(70, 80), one(72, 80)], "Biomedical": [one(50, 51.26)]})
    assert "| starting model | 71.0 ± 1.4 [61.0] (2) | 50.0 [40.0] (1) |" in text
    assert "| ClusterNS | 80.0 ± 0.0 [70.0] (2) | 51.3 [41.3] (1) |" in text
    assert "| SCCL | 75.5 | 46.2 |" in text


@pytest.mark.slow
def test_clusters_at_the_true_number_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "load_classes", lambda name, data: load_utterances())
    monkeypatch.setattr(true_k, "Recipe", partial(Recipe, max_steps=6))
    run = true_k.run("the utterances", 0, None, tmp_path)
    texts, intents = load_utterances()
    start, ours = (run["scores"][model] for model in true_k.MODELS)
    assert 60 < start["accuracy"] < ours["accuracy"] < 100
    assert 70 < start["v_measure"] < ours["v_measure"] < 100
    shuffled = np.random.default_rng(0).permutation(intents).tolist()
    rows = embed_corpus(texts, SentenceTransformer(packaged_model()), show_progress_bar=False)
    assert true_k.score(texts, shuffled, rows, 0)["accuracy"] < 20, "a canary: classes that say nothing"


@pytest.mark.slow
def test_verdicts_of_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "SEEDS", range(1))
    monkeypatch.setattr(corpora, "load", lambda name, data: corpora.Corpus(load_utterances()[0], lambda embed: {}))
    found = verdicts.draw("the utterances", None, tmp_path)
    assert [(one["sentences"], verdicts.has_topics(one)) for one in found] == [(600, True), (120, True)]
    assert all(0 < one["highest_trust"] <= 1 for one in found)
