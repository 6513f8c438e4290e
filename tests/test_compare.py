"""The benchmark harness: it resumes, shares work, refuses to mix settings, and its tables say what the runs say."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import StubModel
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from tiny_bert import load_model, make_sentences, save_bert

import compare
import corpora
from methods import METHODS, START, DebiasedLoss, Job, SelfGuidedLoss, delete_words, nearest_other
from st_clusterns import ClusterNSLoss, training
from st_clusterns.embeddings import embed_corpus
from st_clusterns.presets import RECOMMENDED
from st_clusterns.sts import STS_TESTS
from st_clusterns.training import Recipe
from tables import p_value, spread

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROWS = [START, {"name": "plain", "method": "SimCSE"}, {"name": "ours", "choices": {"pull_rows_together": True}}]
PLAN: dict[str, Any] = {
    "methods": ROWS,
    "baseline": "plain",
    "corpora": ["StackOverflow", "AgNews8000", "wiki100"],
    "seeds": [0, 1, 2],
    "recipe": {"batch_size": 8, "max_steps": 2},
}
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
        names = ["v_measure", "accuracy"] if corpora.is_clustering(corpus) else ["sts_dev", *corpora.SEVEN, "sts_mean"]
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

    def cells(self, heading: str) -> dict[str, list[str]]:
        """The cells of the table under a heading of the README."""
        part = (self.output / "README.md").read_text().split(heading)[1].split("\n## ")[0]
        lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
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
    row = harness.cells("# out")["ours"]
    assert row[0] == row[1] == "-"
    assert row[2].endswith("(1)")


def test_a_wide_table_is_turned_on_its_side(harness: Harness) -> None:
    parts = [f"StackOverflow classes {n}-{n + 1}" for n in range(1, 12)]
    harness.write({**PLAN, "corpora": parts, "seeds": [0]})
    harness.main()
    table = harness.cells("# out")
    assert table[""] == [START, "plain", "ours"]
    assert list(table)[2:] == [f"{part}: V" for part in parts] + ["mean V of the 11 sets"]
    for part in parts:
        for row, cell in zip(table[""], table[f"{part}: V"], strict=True):
            (v,), (accuracy,) = (harness.read(row, compare.slug(part), score) for score in ("v_measure", "accuracy"))
            assert cell == f"{v:.1f} (1) [{accuracy:.1f}]"


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
    assert ours["choices"] == {"pull_rows_together": True}
    assert ours["scoring"]["restarts"] == 10


def test_tables_against_numpy_and_scipy(harness: Harness) -> None:
    harness.main()
    cells, differences = harness.cells("# out"), harness.cells("## Difference")
    v = {
        name: np.array([harness.read(name, c, "v_measure") for c in PLAN["corpora"][:2]]) for name in ("plain", "ours")
    }
    accuracy = np.mean(harness.read("ours", "StackOverflow", "accuracy"))
    mean, sd = v["ours"][0].mean(), v["ours"][0].std(ddof=1)
    assert cells["ours"][0] == f"{mean:.1f} ± {sd:.1f} (3) [{accuracy:.1f}]"
    both = v["ours"].mean(axis=0)  # per seed, then over seeds
    assert cells["ours"][4] == f"{both.mean():.1f} ± {both.std(ddof=1):.1f} (3)"
    assert cells[START][0].startswith(f"{harness.read(START, 'StackOverflow', 'v_measure')[0]:.1f} (1)")

    p = scipy.stats.ttest_ind(v["ours"][0], v["plain"][0], equal_var=False).pvalue
    assert differences["ours"][0] == f"{mean - v['plain'][0].mean():+.1f} (p = {p:.3f})"
    assert "plain" not in differences, "the baseline differs from nothing"
    start = harness.read(START, "StackOverflow", "v_measure")[0]
    p = scipy.stats.ttest_1samp(v["plain"][0], start).pvalue
    assert differences[START][0] == f"{start - v['plain'][0].mean():+.1f} (p = {p:.3f})"
    assert (harness.output / "differences.png").stat().st_size > 10_000


def test_a_row_without_runs_is_named_and_not_tabulated(harness: Harness) -> None:
    harness.main("--rows", "ours")
    page = (harness.output / "README.md").read_text()
    assert "have not been run: starting model, plain" in page
    assert set(harness.cells("# out")) - {"", "---"} == {"ours"}


@pytest.mark.parametrize(("setting", "mixed"), [("momentum", True), ("temperature", False), ("n_clusters", False)])
def test_runs_of_two_versions_of_a_loss_are_told_and_what_the_corpus_decides_is_no_version(
    harness: Harness, setting: str, mixed: bool
) -> None:
    harness.main()
    for path in harness.output.glob("*-ours-*.json"):
        run = json.loads(path.read_text())
        value = 1 if run["settings"]["corpus"] == "wiki100" else 2
        path.write_text(json.dumps({**run, "notes": {"loss": {"min_trust": 0.2, setting: value}}}))
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
def test_the_plans_of_the_repository(path: Path, stub: StubModel) -> None:
    plan, rows = compare.read_plan(path)
    names = {row.name for row in rows}
    assert all(row.baseline in names and row.start in names for row in rows)
    assert all(row.runs() for row in rows)
    assert len(rows) == len(plan["methods"])
    for row in rows:
        assert row.method == row.name or row.name not in METHODS, "a row named after a method that it does not run"
        if row.method == "ClusterNS":
            ClusterNSLoss(stub, choices=replace(RECOMMENDED, **row.choices), **row.loss)  # type: ignore[arg-type]


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


def test_a_part_of_a_clustering_set_has_the_texts_of_its_classes_only(tmp_path: Path) -> None:
    (tmp_path / "clustering").mkdir()
    with gzip.open(tmp_path / "clustering" / "StackOverflow.tsv.gz", "wt") as file:
        file.write("label\ttext\n" + "".join(f"{label}\ttext {label}\n" for label in (10, 2, 1, 3, 2, 3)))
    assert [text[5:] for text in corpora.load("StackOverflow", tmp_path).texts] == ["10", "2", "1", "3", "2", "3"]
    part = corpora.load("StackOverflow classes 2-9", tmp_path)
    assert part.texts == ["text 2", "text 3", "text 2", "text 3"]
    perfect = part.score(lambda texts: np.array([[text == "text 2", text == "text 3"] for text in texts], np.float32))
    assert perfect["v_measure"] == perfect["accuracy"] == 100
    assert corpora.is_clustering("AgNews8000 classes 1-2")
    assert not corpora.is_clustering("wiki100")


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
@pytest.mark.parametrize(
    ("method", "group_size"), [*((method, 1) for method in METHODS), ("SimCSE", 4), ("ClusterNS", 4)]
)
def test_every_method_trains(
    method: str, group_size: int, model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    sampler = training.ClusterBatchSampler

    def watched(*args: Any, **settings: Any) -> Any:
        made = sampler(*args, **settings)
        seen.append(made.group_size if made.ids is not None else 1)
        return made

    monkeypatch.setattr(training, "ClusterBatchSampler", watched)
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
    assert changed == (notes["topic_layer"] if method == "topic layer alone" else method != START)
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
        monkeypatch.setitem(STS_TESTS, name, replace(test, pairs=20))
    monkeypatch.setattr(corpora, "SICK_PAIRS", 40)
    for name, lines in write.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    plan = {
        "model": model_path,
        "methods": [START, "SimCSE", {"name": "few clusters", "loss": {"n_clusters": 4, "margin_weight": 0.5}}],
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
    assert ours["notes"]["loss"]["margin_weight"] == 0.5
    assert ours["notes"]["loss"]["n_clusters"] == 4
    assert ours["sentences"] == 100
    assert len({run["starting_model"] for run in runs}) == 1
    start = next(run for run in runs if run["row"] == START and run["settings"]["corpus"] == "wiki100")
    assert start["scores"] != ours["scores"]
    monkeypatch.setattr(corpora, "SICK_PAIRS", 20)  # as many as its split named test has
    with pytest.raises(ValueError, match="SICK-R has 20 pairs"):
        corpora.load("wiki100", data)
    assert not re.search(r"\| -? \|", (tmp_path / "out" / "README.md").read_text().split("## Difference")[0])
