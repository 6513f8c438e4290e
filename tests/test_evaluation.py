"""Evaluation: its numbers against plain formulas, one score for one model, and a training that it does not disturb."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import random
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import topic_sentences
from datasets import Dataset, DatasetDict
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sklearn.cluster import KMeans
from sklearn.metrics import v_measure_score
from tiny_bert import load_model, make_sentences, save_bert
from typer.testing import CliRunner

from st_clusterns import ClusterNSLoss, CorpusClusters
from st_clusterns.cli import app
from st_clusterns.evaluation import evaluate as evaluation
from st_clusterns.evaluation import scores as measures
from st_clusterns.evaluation import sts
from st_clusterns.evaluation.evaluate import collect_jobs, evaluate
from st_clusterns.evaluation.evaluators import LabelFreeEvaluator, MtebEvaluator
from st_clusterns.evaluation.mteb_tasks import (
    clustering_task,
    import_mteb,
    mteb_encoder,
    mteb_name,
    mteb_tasks,
    run_mteb,
)
from st_clusterns.evaluation.scores import (
    alignment,
    false_negative_share,
    matched_accuracy,
    mean_cosine,
    neighbour_purity,
    pair_average_precision,
    score_clustering,
    uniformity,
)
from st_clusterns.evaluation.sts import STS_TESTS, load_sts, sts_evaluator
from st_clusterns.training.quickstart import false_negative_shares, load_utterances, packaged_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*is superseded by.*"),  # mteb, of the tests that everybody publishes
    pytest.mark.filterwarnings("ignore:.*get_sentence_embedding_dimension.*:FutureWarning"),  # mteb's own calls
    pytest.mark.filterwarnings("ignore:The fill_missing parameter is deprecated.*:DeprecationWarning"),
]
NAMES = [*STS_TESTS]
TEST_ROWS, OTHER_ROWS = 12, 8


@pytest.fixture(scope="session", autouse=True)
def _import_mteb() -> None:
    with warnings.catch_warnings():  # what mteb's own imports warn of depends on versions
        warnings.simplefilter("ignore")
        import_mteb()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    load_model(save_bert(folder / "bert")).save(str(folder / "tiny"))
    return str(folder / "tiny")


@pytest.fixture
def model(model_path: str) -> SentenceTransformer:
    return SentenceTransformer(model_path, device="cpu")


def make_rows(name: str) -> list[dict[str, str]]:
    """Pairs of a test, all splits, with scores and quotes that a careless reader would change."""
    draw = random.Random(name)
    splits = ["test"] * TEST_ROWS
    splits += {"STSBenchmark": ["dev"] * OTHER_ROWS, "SICK-R": ["train"] * OTHER_ROWS}.get(name, [])
    draw.shuffle(splits)
    first, second = (make_sentences(len(splits), seed) for seed in (draw.randrange(99), draw.randrange(99)))
    return [
        {
            "split": s,
            "subset": "x",
            "score": f"{draw.uniform(3.2 if s == 'dev' else 0, 5):.3f}",
            "sentence1": f'"{a}',
            "sentence2": b,
        }
        for s, a, b in zip(splits, first, second, strict=True)
    ]


ROWS = {name: make_rows(name) for name in NAMES}


def write_tsv(path: Path, rows: list[dict[str, str]]) -> Path:
    text = "\n".join("\t".join(values) for values in [list(rows[0]), *(list(row.values()) for row in rows)]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def revision(model: SentenceTransformer) -> str:
    return str(mteb_encoder(model, "tiny").mteb_model_meta.revision)


@pytest.fixture(autouse=True)
def _small_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of this file's data have a dozen pairs; how many the real ones have is tested apart."""
    from mteb.abstasks.task_metadata import TaskMetadata

    def n_samples(metadata: Any) -> dict[str, int]:
        return {"test": TEST_ROWS + (OTHER_ROWS if metadata.name == "SICK-R" else 0)}

    monkeypatch.setattr(TaskMetadata, "n_samples", property(n_samples))
    for name, test in STS_TESTS.items():
        monkeypatch.setitem(STS_TESTS, name, sts.StsTest(test.path, test.revision, test.file, TEST_ROWS))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for name, suffix in zip(NAMES, itertools.cycle((".tsv.gz", ".tsv")), strict=False):
        write_tsv(tmp_path / "data" / "sts" / f"{STS_TESTS[name].file}{suffix}", ROWS[name])
    return tmp_path / "data"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [{"label": sentence.split()[0], "text": sentence} for sentence in make_sentences(60, lengths=(1, 3))]
    return write_tsv(tmp_path / "texts.tsv", rows)


def cli(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


def spearman(model: SentenceTransformer, rows: list[dict[str, str]]) -> float:
    """Written out: encode one by one, cosine by hand."""
    cosines = []
    for row in rows:
        a, b = model.encode(row["sentence1"]), model.encode(row["sentence2"])
        cosines.append(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
    return 100 * float(spearmanr(cosines, [float(row["score"]) for row in rows]).statistic)


def random_numbers() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


# measures


def test_accuracy_is_the_best_over_all_matchings() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        truth, ids = draw.integers(4, size=30), draw.integers(4, size=30)
        best = max(np.mean(np.array(match)[ids] == truth) for match in itertools.permutations(range(4)))
        assert matched_accuracy(truth, ids) == pytest.approx(best)


def fixed_runs(runs: list[tuple[Any, float]]) -> Callable[..., Any]:
    """Stand in for k-means: each run gives the next ids and inertia."""
    left = iter(runs)

    def kmeans(n_clusters: int, **_: object) -> Any:
        ids, inertia = next(left)
        return SimpleNamespace(fit=lambda rows: SimpleNamespace(labels_=ids, inertia_=inertia))

    return kmeans


def test_nmi_is_mutual_information_over_the_geometric_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    truth, ids = np.repeat([0, 1, 2], 10), draw.integers(3, size=30)
    joint = np.zeros((3, 3))
    np.add.at(joint, (truth, ids), 1 / 30)
    p, q = joint.sum(1), joint.sum(0)
    mutual = sum(joint[i, j] * math.log(joint[i, j] / (p[i] * q[j])) for i in range(3) for j in range(3) if joint[i, j])
    entropy = [-float((x * np.log(x)).sum()) for x in (p, q)]
    monkeypatch.setattr(measures, "KMeans", fixed_runs([(ids, 1.0)]))
    scores = score_clustering(draw.normal(size=(30, 3)), truth.tolist(), restarts=1)
    assert scores["nmi"] == pytest.approx(100 * mutual / math.sqrt(entropy[0] * entropy[1]))
    assert scores["v_measure"] == pytest.approx(100 * mutual / ((entropy[0] + entropy[1]) / 2))


def test_every_restart_has_its_own_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    class Spy:
        def __init__(self, *_: object, n_init: int, random_state: int) -> None:
            seeds.append((n_init, random_state))

        def fit(self, rows: np.ndarray) -> Any:
            return SimpleNamespace(labels_=np.arange(len(rows)) % 2, inertia_=1.0)

    monkeypatch.setattr(measures, "KMeans", Spy)
    score_clustering(np.eye(6), [0, 1] * 3, restarts=4, seed=7)
    assert seeds == [(1, 7), (1, 8), (1, 9), (1, 10)]


def test_the_best_run_is_the_one_with_the_lowest_inertia(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], 10)
    runs = [draw.integers(3, size=30) for _ in range(3)]
    singles = []
    for ids in runs:
        monkeypatch.setattr(measures, "KMeans", fixed_runs([(ids, 1.0)]))
        singles.append(score_clustering(np.eye(30), truth, restarts=1))
    monkeypatch.setattr(measures, "KMeans", fixed_runs(list(zip(runs, (3.0, 1.0, 2.0), strict=True))))
    scores = score_clustering(np.eye(30), truth, restarts=3)
    for name in ("v_measure", "nmi", "accuracy"):
        assert len({single[name] for single in singles}) == 3
        assert scores[name] == pytest.approx(sum(single[name] for single in singles) / 3)
        assert scores[f"{name}_best"] == singles[1][name]


def test_the_best_run_by_a_slow_search_over_k_means_runs() -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(60, 5))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    truth = draw.integers(6, size=60)
    runs = []
    for seed in range(4, 9):
        ids = KMeans(6, n_init=1, random_state=seed).fit_predict(unit.astype(np.float32))
        spread = sum(float(np.sum((unit[row] - unit[ids == ids[row]].mean(axis=0)) ** 2)) for row in range(len(unit)))
        runs.append((spread, ids))
    best = min(runs, key=lambda run: run[0])[1]
    accuracy = max(np.mean(np.array(match)[best] == truth) for match in itertools.permutations(range(6)))
    scores = score_clustering(rows, truth, restarts=5, seed=4)
    assert scores["accuracy_best"] == pytest.approx(100 * accuracy)
    assert scores["v_measure_best"] == pytest.approx(100 * v_measure_score(truth, best))
    assert scores["accuracy_best"] != scores["accuracy"]


def test_neighbour_purity_against_sorted_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(50, 4))
    classes = [f"class {number}" for number in draw.integers(3, size=50)]
    for n_neighbours, block in ((1, 512), (7, 512), (7, 8), (49, 50)):
        hits = []
        for i, row in enumerate(rows):
            others = [j for j in range(50) if j != i]
            others.sort(key=lambda j: -float(row @ rows[j] / np.linalg.norm(rows[j])))
            hits += [classes[j] == classes[i] for j in others[:n_neighbours]]
        monkeypatch.setattr(measures, "PAIR_BLOCK", block)
        assert neighbour_purity(rows, classes, n_neighbours) == pytest.approx(100 * np.mean(hits)), (
            n_neighbours,
            block,
        )


def test_a_row_is_not_its_own_neighbour() -> None:
    rows = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]])  # two pairs, each of two classes
    assert neighbour_purity(rows, [0, 1, 0, 1], n_neighbours=1) == 0
    assert neighbour_purity(rows, [0, 0, 1, 1], n_neighbours=1) == 100


@pytest.mark.parametrize("n_neighbours", [0, 4])
def test_the_number_of_neighbours_is_checked(n_neighbours: int) -> None:
    with pytest.raises(ValueError, match=f"n_neighbours={n_neighbours} does not fit 4 rows: choose 1 to 3"):
        neighbour_purity(np.eye(4), [0, 0, 1, 1], n_neighbours)


def test_average_precision_of_pairs_against_a_sorted_list() -> None:
    draw = np.random.default_rng(0)
    rows, classes = draw.normal(size=(30, 4)), draw.integers(3, size=30).tolist()
    unit = [row / np.linalg.norm(row) for row in rows]
    pairs = sorted(itertools.combinations(range(30), 2), key=lambda pair: -float(unit[pair[0]] @ unit[pair[1]]))
    hits = [classes[one] == classes[other] for one, other in pairs]
    precisions = [np.mean(hits[: place + 1]) for place, hit in enumerate(hits) if hit]
    assert pair_average_precision(rows, classes) == pytest.approx(100 * np.mean(precisions))
    assert pair_average_precision([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], list("aabb")) == 100
    assert math.isnan(pair_average_precision(np.eye(4), list("abcd")))


def test_average_precision_of_pairs_of_a_sample() -> None:
    draw = np.random.default_rng(0)
    classes = draw.integers(4, size=2000)
    rows = np.eye(4)[classes] + draw.normal(size=(2000, 4))
    whole, other, sample, another = (
        pair_average_precision(rows, classes, seed, n_rows)
        for seed, n_rows in ((0, 2000), (1, 2000), (0, 700), (1, 700))
    )
    assert whole == pytest.approx(other), "all rows, in another order"
    assert sample == pytest.approx(whole, abs=3)
    assert len({whole, sample, another}) == 3


def test_geometry_against_pairs_written_out() -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(40, 5)) + 0.5
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    classes = draw.integers(3, size=40).tolist()
    pairs = list(itertools.combinations(range(40), 2))
    cosines = {(i, j): float(unit[i] @ unit[j]) for i, j in pairs}
    same = [(i, j) for i, j in pairs if classes[i] == classes[j]]
    assert mean_cosine(rows) == pytest.approx(np.mean(list(cosines.values())), abs=1e-6)
    assert mean_cosine(rows, classes) == pytest.approx(np.mean([cosines[pair] for pair in same]), abs=1e-6)
    far = [math.exp(-2 * float(np.sum((unit[i] - unit[j]) ** 2))) for i, j in pairs]
    assert uniformity(rows) == pytest.approx(math.log(np.mean(far)), abs=1e-5)
    near = np.mean([np.sum((unit[i] - unit[j]) ** 2) for i, j in same])
    first, second = zip(*same, strict=True)
    assert alignment(rows[list(first)], rows[list(second)]) == pytest.approx(near, abs=1e-6)
    assert 2 - 2 * mean_cosine(rows, classes) == pytest.approx(near, abs=1e-6)
    assert false_negative_share(classes) == pytest.approx(len(same) / len(pairs))


def test_uniformity_of_many_rows_is_that_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(3000, 8))
    whole = uniformity(rows)
    monkeypatch.setattr(measures, "UNIFORMITY_ROWS", 1500)
    assert uniformity(rows) != whole
    assert uniformity(rows) == pytest.approx(whole, abs=0.01)


def test_false_negatives_are_those_met_in_random_batches() -> None:
    classes = np.repeat([0, 1, 2, 3], [10, 20, 30, 40])
    draw, met = np.random.default_rng(0), []
    for _ in range(2000):
        batch = draw.permutation(classes)[:16]
        met.append((np.sum(batch[:, None] == batch) - 16) / (16 * 15))
    assert false_negative_share(classes.tolist()) == pytest.approx(np.mean(met), abs=0.005)


# STS


def test_both_protocols_score_their_own_pairs(model: SentenceTransformer, data_dir: Path, tmp_path: Path) -> None:
    records = {
        (one["task"], one["protocol"]): one for one in evaluate(model, "tiny", tmp_path / "out", data_dir=data_dir)
    }
    assert len(records) == 15
    for name in NAMES:
        tests = [row for row in ROWS[name] if row["split"] == "test"]
        mteb_pairs = ROWS[name] if name == "SICK-R" else tests
        for protocol, pairs in (("mteb", mteb_pairs), ('SimCSE "all"', tests)):
            record = records[name, protocol]
            assert record["values"]["cosine_spearman"] == pytest.approx(spearman(model, pairs), abs=1e-3), protocol
            assert record["rows"] == len(pairs)
            assert record["settings"]["data"]["revision"].startswith("local-")
    assert records["SICK-R", "mteb"]["values"] != records["SICK-R", 'SimCSE "all"']["values"]

    dev = [row for row in ROWS["STSBenchmark"] if row["split"] == "dev"]
    good = [row for row in dev if float(row["score"]) > 4]
    first, second = (
        model.encode([row[side] for row in good], normalize_embeddings=True) for side in ("sentence1", "sentence2")
    )
    geometry = records["STS-B dev", "Wang and Isola 2020"]
    assert 3 < len(good) < geometry["rows"] == len(dev)
    assert geometry["values"]["alignment"] == pytest.approx(((first - second) ** 2).sum(1).mean(), abs=1e-5)

    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| protocol |")).strip("| ").split(" | ")
    assert head[-3:-1] == ["SICK-R (mteb, 9927)", "SICK-R test (SimCSE, 4927)"]
    for protocol, empty in (("mteb", -2), ('SimCSE "all"', -3)):
        cells = next(line for line in lines if line.startswith(f"| {protocol} |")).strip("| ").split(" | ")
        values = [records[name, protocol]["values"]["cosine_spearman"] for name in NAMES]
        shown = [cell for place, cell in enumerate(cells[1:], 1 - len(cells)) if place != empty]
        assert cells[empty] == "-", "the two SICK-R must not share a column"
        assert shown == [f"{value:.2f}" for value in [*values, np.mean(values)]]
    table = list(csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    by_metric = {(row["task"], row["protocol"], row["metric"]): float(row["value"]) for row in table}
    everything = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    assert by_metric == {(r["task"], r["protocol"], m): v for r in everything for m, v in r["values"].items()}
    assert len(everything) == 15


def real_hub(asked: list[tuple[str, str]]) -> Callable[..., Any]:
    """Stand in for `datasets.load_dataset`, with the hub's own columns and splits."""
    splits = {"STS12": ("train", "test"), "STSBenchmark": ("train", "validation", "test")}

    def table(name: str, split: str) -> Dataset:
        where = {"validation": "dev"}.get(split, split)
        rows = [row for row in ROWS[name] if name == "SICK-R" or row["split"] == where] or ROWS[name][:1]
        columns = {key: [row[key] for row in rows] for key in ("sentence1", "sentence2")}
        columns["score"] = [float(row["score"]) for row in rows]
        if name == "STSBenchmark":
            more = dict.fromkeys(("split", "genre", "dataset", "year", "sid"), ["x"] * len(rows))
            columns = {**more, "score": columns.pop("score"), **columns}
        return Dataset.from_dict(columns)

    def load_dataset(path: str, *, revision: str, split: str | None = None, num_proc: int | None = None) -> Any:
        asked.append((path, revision))
        [name] = [name for name, test in STS_TESTS.items() if test.path == path]
        whole = DatasetDict({one: table(name, one) for one in splits.get(name, ("test",))})
        return whole if split is None else whole[split]

    return load_dataset


def sick_archive(path: Path) -> str:
    """SentEval's archive, as SimCSE offers it on the hub."""
    lines = ["pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"]
    tests = [row for row in ROWS["SICK-R"] if row["split"] == "test"]
    lines += [f"{i}\t{row['sentence1']}\t{row['sentence2']}\t{row['score']}\tNEUTRAL" for i, row in enumerate(tests)]
    with tarfile.open(path, "w") as archive:
        for name, content in (("SICK_train.txt", lines[:2]), ("SICK_test_annotated.txt", lines)):
            info = tarfile.TarInfo(f"SICK/{name}")
            data = "\n".join(content).encode()
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def test_the_hub_gives_the_scores_of_the_local_files(
    model: SentenceTransformer, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("mteb.abstasks.abstask.load_dataset", real_hub(asked))
    monkeypatch.setattr(sts, "load_dataset", real_hub(asked))
    monkeypatch.setattr(sts, "hf_hub_download", lambda *words, repo_type: sick_archive(tmp_path / words[-1]))
    hub = evaluate(model, "tiny", tmp_path / "hub")
    local = evaluate(model, "tiny", tmp_path / "local", data_dir=data_dir)
    for one, other in zip(hub, local, strict=True):
        assert one["values"] == pytest.approx(other["values"], abs=1e-3)
        assert (one["task"], one["protocol"], one["rows"]) == (other["task"], other["protocol"], other["rows"])
        assert not one["settings"]["data"]["revision"].startswith("local"), "the table must say where data came from"
    assert set(asked) == {(test.path, test.revision) for test in STS_TESTS.values()}


def test_the_hub_s_data_are_those_that_mteb_pins() -> None:
    for name, test in STS_TESTS.items():
        [task] = mteb_tasks(name)
        assert task.metadata.dataset == {"path": test.path, "revision": test.revision}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), ["STS12.tsv.gz", "missing"]),
        (lambda path: write_tsv(path, ROWS["STS12"][1:]), ["STS12", "12 pairs", "holds 11"]),
        (
            lambda path: write_tsv(path, [{"split": "test", "score": "1"}]),
            ["column=", "is not in", "score"],
        ),
        (lambda path: write_tsv(path, [{**row, "split": "dev"} for row in ROWS["STS12"]]), ["'test'", "it has: dev"]),
        (lambda path: path.write_bytes(gzip.compress(b"split\tscore\tsentence1\tsentence2\ntest\t1\ta\n")), ["line 2"]),
        (lambda path: path.write_bytes(gzip.compress(b"split\tscore\tsentence1\tsentence2\n")), ["no rows"]),
        (lambda path: write_tsv(path, [{**row, "score": "?"} for row in ROWS["STS12"]]), ["no number", "'?'"]),
        (lambda path: write_tsv(path, [{**row, "sentence2": " "} for row in ROWS["STS12"]]), ["no value in line 2"]),
    ],
)
def test_bad_files_are_refused_before_any_work(
    model_path: str, data_dir: Path, tmp_path: Path, change: Callable[[Path], Any], words: list[str]
) -> None:
    change(data_dir / "sts" / "STS12.tsv.gz")
    code, text = cli("evaluate", model_path, "--data-dir", data_dir, "--output", tmp_path / "out")
    assert code == 2
    assert "Error:" in text, text
    assert all(word in text for word in words), text
    assert not (tmp_path / "out").exists()


# tasks by name


def test_an_unknown_task_lists_close_names(model_path: str, tmp_path: Path) -> None:
    code, text = cli("evaluate", model_path, "--tasks", "MTEB(eng,v2)", "--output", tmp_path / "out")
    assert code == 2
    assert "tasks='MTEB(eng,v2)'" in text
    assert "MTEB(eng, v2)" in text
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"tasks='stsbenchmrk' is no .*names: STSBenchmark"):
        mteb_tasks("stsbenchmrk")


def test_without_mteb_the_extra_is_named(model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    code, text = cli("evaluate", model_path, "--output", tmp_path / "out")
    assert code == 2
    assert "pip install 'st-clusterns[mteb]'" in text


def test_a_benchmark_is_all_its_tasks_with_its_languages() -> None:
    jobs = collect_jobs(["MTEB(eng, v2)", "STS12"], None, [], 1, 0)
    assert len(jobs) == 41
    assert {job.protocol for job in jobs} == {"mteb"}
    assert next(job for job in jobs if job.task == "STS12").groups == ["MTEB(eng, v2)", "STS12"]
    assert "STS17 (en-en)" in {job.task for job in jobs}, "a part of a task must not pass for the whole"


def test_a_benchmark_s_mean_is_shown_and_local_data_stay_with_the_caller(
    model: SentenceTransformer, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [*mteb_tasks("STS12"), *mteb_tasks("STS13")]
    monkeypatch.setattr("mteb.get_benchmark", lambda name: SimpleNamespace(tasks=shared))
    records = evaluate(model, "tiny", tmp_path / "out", ["Two"], data_dir)
    mean = np.mean([record["values"]["cosine_spearman"] for record in records])
    assert f"Two: plain mean of 2 tasks {mean:.2f}." in (tmp_path / "out" / "results.md").read_text()
    assert not any(task.data_loaded for task in shared)
    assert all("local" not in task.metadata.revision for task in shared)


def test_two_files_of_one_name_are_refused(texts: Path, tmp_path: Path) -> None:
    other = write_tsv(tmp_path / "other" / "texts.tsv", [{"label": str(i % 2), "text": f"w{i}"} for i in range(9)])
    with pytest.raises(ValueError, match="'texts' was asked for twice"):
        collect_jobs([], None, [texts, other], 3, 0)


# short texts


def test_short_texts_are_clustered_as_score_clustering_does(
    model_path: str, model: SentenceTransformer, texts: Path, tmp_path: Path
) -> None:
    words = ["evaluate", model_path, "--clustering", texts, "--restarts", 4, "--seed", 5, "--output", tmp_path / "out"]
    code, text = cli(*words)
    assert code == 0, text
    [record] = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    rows = [line.split("\t") for line in texts.read_text().splitlines()[1:]]
    embeddings, labels = model.encode([row[1] for row in rows]), [row[0] for row in rows]
    expected = score_clustering(embeddings, labels, restarts=4, seed=5)
    assert {name: record["values"][name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert record["values"]["mean_cosine"] == pytest.approx(mean_cosine(embeddings), abs=1e-5)
    assert record["values"]["false_negative_share"] == false_negative_share(labels)
    assert record["rows"] == 60
    assert "4 runs from seed 5" in (tmp_path / "out" / "results.md").read_text()


def test_the_clustering_task_is_one_for_mteb_itself(model: SentenceTransformer, texts: Path) -> None:
    import mteb

    [result] = mteb.evaluate(mteb_encoder(model, "tiny"), clustering_task(texts), cache=None).task_results
    assert 0 < result.get_score() < 1
    assert result.dataset_revision.startswith("local-")


def make_mteb_clustering() -> Any:
    """A task of mteb's own class with local data, from which each run draws half of the documents."""
    from mteb.abstasks import AbsTaskClustering
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalClustering(AbsTaskClustering):  # type: ignore[misc]
        metadata = TaskMetadata(
            name="LocalClustering",
            dataset={"path": "local", "revision": "1"},
            description="Texts of eight topics.",
            type="Clustering",
            eval_langs=["eng-Latn"],
            main_score="v_measure",
        )
        max_fraction_of_documents_to_embed = 0.5
        max_documents_per_cluster = 40
        n_clusters = 2

    task = LocalClustering()
    sentences = make_sentences(120, lengths=(1, 3))
    table = {"sentences": sentences, "labels": [int(sentence.split()[0][1:]) // 25 for sentence in sentences]}
    task.dataset, task.data_loaded = DatasetDict(test=Dataset.from_dict(table)), True
    return task


def test_one_model_has_one_score_whatever_ran_before(
    model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A benchmark's task objects are shared, and a clustering task's generator goes on from run to run."""
    import mteb

    def bare(task: Any) -> float:
        return float(mteb.evaluate(model, task, cache=None)[0].get_score())

    expected = bare(make_mteb_clustering())  # a new task object: the score that mteb publishes
    shared = make_mteb_clustering()
    assert len({bare(shared) for _ in range(3)}) > 1, "a canary: mteb's own scores of one task object differ"
    monkeypatch.setattr("mteb.get_benchmark", lambda name: SimpleNamespace(tasks=[shared]))
    for number in range(3):
        random.seed(number)
        [record] = evaluate(model, "tiny", tmp_path / str(number), ["Shared"])
        assert record["values"]["v_measure"] == pytest.approx(100 * expected, abs=1e-9)
    evaluator = MtebEvaluator(["Shared"])
    bare(shared)
    assert [evaluator(model)["mteb_LocalClustering"] for _ in range(3)] == pytest.approx([expected] * 3, abs=1e-9)


def test_the_parts_of_an_aggregate_task_are_seeded_too(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, states = make_mteb_clustering(), []
    part.rng_state.random()
    random_numbers()  # the generators are no longer as a new task leaves them
    aggregate = SimpleNamespace(seed=42, metadata=SimpleNamespace(tasks=[part]))

    def run(encoder: Any, task: Any, **_: Any) -> Any:
        states.append((part.rng_state.random(), part.np_rng.random(), random_numbers()))
        return SimpleNamespace(exceptions=[], task_results=["result"])

    monkeypatch.setattr("mteb.evaluate", run)
    assert [run_mteb(model, aggregate) for _ in range(2)] == ["result"] * 2
    fresh = make_mteb_clustering()  # seeds the global generators as well
    assert states == [(fresh.rng_state.random(), fresh.np_rng.random(), random_numbers())] * 2


def test_bad_short_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one of 'class', 'text'"):
        clustering_task(write_tsv(tmp_path / "a.tsv", [{"class": "1", "text": "x"}]))
    with pytest.raises(ValueError, match="only one label"):
        clustering_task(write_tsv(tmp_path / "b.tsv", [{"label": "1", "text": "x"}] * 5))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tsv"):
        clustering_task(tmp_path / "nowhere.tsv")


# whose score it is


def test_the_revision_is_that_of_what_decides_the_embeddings(model_path: str, model: SentenceTransformer) -> None:
    seen = {revision(model)}
    model.encode(["w1 w2 w3", "w4"])
    seen.add(revision(model))
    seen.add(revision(SentenceTransformer(model_path, device="cpu")))
    assert len(seen) == 1, "encoding or loading again changed it"

    def change_weight(model: SentenceTransformer) -> None:
        with torch.no_grad():
            next(model.parameters())[7, 3] += 1e-3

    def change_prompt(model: SentenceTransformer) -> None:
        model.prompts = {"query": "w1 ", "document": ""}
        model.default_prompt_name = "query"

    changes: list[Callable[[SentenceTransformer], Any]] = [
        change_weight,
        change_prompt,
        lambda model: setattr(model, "max_seq_length", 4),
        lambda model: setattr(model, "truncate_dim", 8),
        lambda model: setattr(model[1], "pooling_mode", "cls"),
        lambda model: model.half(),
    ]
    for number, change in enumerate(changes):
        changed = SentenceTransformer(model_path, device="cpu")
        change(changed)
        seen.add(revision(changed))
        assert len(seen) == number + 2, f"change {number} goes unnoticed"


def test_mteb_s_cache_cannot_confuse_two_models(model_path: str, data_dir: Path, tmp_path: Path) -> None:
    import mteb

    [task] = mteb_tasks("STS12", data_dir)
    cache, scores, bare = mteb.ResultCache(tmp_path / "mteb"), [], []
    for truncate_dim in (None, 3):
        model = SentenceTransformer(model_path, device="cpu", truncate_dim=truncate_dim)
        scores.append(mteb.evaluate(mteb_encoder(model, model_path), task, cache=cache)[0].get_score())
        bare.append(mteb.evaluate(model, task, cache=cache)[0].get_score())
    assert scores[0] != scores[1]
    assert bare[0] == pytest.approx(bare[1], abs=1e-6), "a canary: this is what mteb's own names do"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org/model-1.0", "org/model-1.0"), ("model", "local/model"), ("/some/where/model", "local/model")],
)
def test_names_have_mteb_s_form(name: str, expected: str) -> None:
    assert mteb_name(name) == expected


def test_a_model_that_mteb_cannot_compare_is_refused(model: SentenceTransformer) -> None:
    model.similarity_fn_name = "euclidean"
    with pytest.raises(ValueError, match="similarity_fn_name='euclidean'"):
        mteb_encoder(model, "tiny")


def test_a_rerun_goes_on_task_by_task(
    model_path: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", model_path, "--data-dir", data_dir, "--output", tmp_path / "out"]
    words += ["--tasks", "STS12", "--tasks", "STS13", "--tasks", "STS14"]
    ran: list[str] = []
    real = evaluation.run_mteb

    def run_mteb(model: Any, task: Any, batch_size: int) -> Any:
        ran.append(task.metadata.name)
        if ran == ["STS12", "STS13"]:
            raise KeyboardInterrupt
        return real(model, task, batch_size)

    monkeypatch.setattr(evaluation, "run_mteb", run_mteb)
    code, text = cli(*words)
    assert code == 130
    assert "the same command goes on" in text
    assert cli(*words)[0] == 0
    assert cli(*words)[0] == 0
    assert ran == ["STS12", "STS13", "STS13", "STS14"]


def test_a_task_that_fails_does_not_stop_the_others(
    model: SentenceTransformer, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    real = evaluation.run_mteb

    def run_mteb(model: Any, task: Any, batch_size: int) -> Any:
        ran.append(task.metadata.name)
        if ran.count("STS12") == 1 and ran[-1] == "STS12":
            raise ConnectionError("no such host")
        return real(model, task, batch_size)

    def run() -> list[dict[str, Any]]:
        return evaluate(model, "tiny", tmp_path / "out", ["STS12", "STS13"], data_dir)

    monkeypatch.setattr(evaluation, "run_mteb", run_mteb)
    with pytest.raises(ValueError, match=r"1 of 2 tasks failed, .* STS12, \w+: ConnectionError: no such host"):
        run()
    assert "| STS13 | mteb |" in (tmp_path / "out" / "results.md").read_text()
    assert [record["task"] for record in run()] == ["STS12", "STS13"]
    assert ran == ["STS12", "STS13", "STS12"]


def test_scores_of_another_model_or_other_data_are_neither_used_nor_overwritten(
    model: SentenceTransformer, data_dir: Path, tmp_path: Path
) -> None:
    def run() -> list[dict[str, Any]]:
        return evaluate(model, "tiny", tmp_path / "out", ["STS12"], data_dir)

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    run()
    before = content()
    weights = next(model.parameters()).clone()
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    with pytest.raises(ValueError, match="another revision: choose another output"):
        run()
    with torch.no_grad():
        next(model.parameters()).copy_(weights)
    run()
    assert content() == before
    write_tsv(
        data_dir / "sts" / "STS12.tsv.gz", [{**row, "score": "1.5"} for row in ROWS["STS12"][:1]] + ROWS["STS12"][1:]
    )
    with pytest.raises(ValueError, match="another settings"):
        run()
    assert content() == before


# in training


def test_random_numbers_go_on_as_if_nothing_had_been_evaluated(
    model: SentenceTransformer, data_dir: Path, texts: Path, tmp_path: Path
) -> None:
    import mteb

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = random_numbers()
    mteb_evaluator, label_free = MtebEvaluator([clustering_task(texts)]), LabelFreeEvaluator(make_sentences(80))
    users: list[Callable[[], Any]] = [
        lambda: evaluate(model, "tiny", tmp_path / "out", ["STS12"], data_dir),
        lambda: MtebEvaluator(["STS12"]),
        lambda: mteb_evaluator(model),
        lambda: label_free(model),
        lambda: mteb_tasks("STS12"),
        lambda: clustering_task(texts),
    ]
    model.train()
    for number, use in enumerate(users):
        seed()
        use()
        assert random_numbers() == expected, number
        assert all(module.training for module in model.modules()), number
    seed()
    mteb.get_task("STS12")
    assert random_numbers() != expected, "a canary: mteb seeds the generators"


def train(model_path: str, folder: Path, evaluator: Any, **settings: Any) -> SentenceTransformerTrainer:
    torch.manual_seed(3)
    model = SentenceTransformer(model_path, device="cpu")
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        dataloader_pin_memory=False,
        **settings,
    )
    sentences = make_sentences(48)
    clusters = CorpusClusters.fit(sentences, model, n_clusters=4, show_progress_bar=False)
    data = Dataset.from_dict({"sentence": sentences})
    trainer = SentenceTransformerTrainer(model, args, data, loss=ClusterNSLoss(model, clusters), evaluator=evaluator)
    trainer.train()
    return trainer


class Nothing(BaseEvaluator):
    """The trainer itself draws random numbers at each evaluation, whatever is evaluated."""

    primary_metric = "nothing"

    def __call__(self, *words: object, **more: object) -> dict[str, float]:
        return {"nothing": 1.0}


@pytest.mark.slow
def test_training_with_evaluators_is_training_with_one_that_does_nothing(
    model_path: str, texts: Path, data_dir: Path, tmp_path: Path
) -> None:
    plain = train(model_path, tmp_path / "plain", Nothing()).model
    start = SentenceTransformer(model_path, device="cpu")
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), start.parameters(), strict=True))
    evaluators = [
        MtebEvaluator([clustering_task(texts)]),
        LabelFreeEvaluator(make_sentences(80, seed=5)),
        sts_evaluator(load_sts("STSBenchmark", "dev", data_dir), "sts-dev"),
    ]
    for number, evaluator in enumerate(evaluators):
        trained = train(model_path, tmp_path / str(number), evaluator).model
        for (name, weight), other in zip(plain.named_parameters(), trained.parameters(), strict=True):
            assert torch.equal(weight, other), (number, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mteb", "label-free", "sts"])
def test_the_best_model_is_loaded_by_the_primary_metric(
    model_path: str, texts: Path, data_dir: Path, tmp_path: Path, kind: str
) -> None:
    evaluator: Any
    if kind == "mteb":
        evaluator, metric = MtebEvaluator([clustering_task(texts)]), "mteb_mean"
    elif kind == "label-free":
        sentences = make_sentences(80, seed=5)
        evaluator, metric = LabelFreeEvaluator(sentences, "align_uniform"), "label-free_align_uniform"
    else:
        pairs = load_sts("STSBenchmark", "dev", data_dir)
        evaluator, metric = sts_evaluator(pairs, "sts-dev"), "sts-dev_spearman_cosine"
    trainer = train(model_path, tmp_path / "run", evaluator, load_best_model_at_end=True, metric_for_best_model=metric)
    values = [entry[f"eval_{metric}"] for entry in trainer.state.log_history if f"eval_{metric}" in entry]
    assert len(values) == 3
    assert len(set(values)) > 1, "training must move it"
    assert trainer.state.best_metric == max(values)
    assert evaluator.primary_metric == metric
    assert evaluator(trainer.model)[metric] == pytest.approx(max(values), abs=1e-6)


def test_mteb_evaluator_gives_main_scores_and_their_mean(
    model: SentenceTransformer, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("mteb.abstasks.abstask.load_dataset", real_hub(asked))
    evaluator = MtebEvaluator(["STSBenchmark", "STS12"], splits=["test"])
    scores = evaluator(model)
    for name in ("STSBenchmark", "STS12"):
        tests = [row for row in ROWS[name] if row["split"] == "test"]
        assert 100 * scores[f"mteb_{name}"] == pytest.approx(spearman(model, tests), abs=1e-3)
    assert scores[evaluator.primary_metric] == pytest.approx((scores["mteb_STS12"] + scores["mteb_STSBenchmark"]) / 2)
    assert evaluator(model) == scores
    assert len(asked) == 2, "data are loaded once"
    assert mteb_tasks("STSBenchmark")[0].eval_splits == ["test"]


def test_mteb_evaluator_takes_the_dev_split(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mteb.abstasks.abstask.load_dataset", real_hub([]))
    scores = MtebEvaluator(["STSBenchmark"], splits=["validation"])(model)
    dev = [row for row in ROWS["STSBenchmark"] if row["split"] == "dev"]
    assert 100 * scores["mteb_STSBenchmark"] == pytest.approx(spearman(model, dev), abs=1e-3)


def test_label_free_signals_are_repeatable_and_leave_the_modes(model_path: str) -> None:
    model = SentenceTransformer(model_path, device="cpu")
    model.train()
    model[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    evaluator = LabelFreeEvaluator(make_sentences(200), n_clusters=8)
    first = evaluator(model)
    torch.manual_seed(99)
    assert evaluator(model) == first, "chance would choose the model"
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert first["label-free_alignment"] > 1e-4, "dropout must make two views"
    assert first["label-free_align_uniform"] == pytest.approx(
        -first["label-free_alignment"] - first["label-free_uniformity"]
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model[0].auto_model.config.attention_probs_dropout_prob = 0.0
    for layer in model[0].auto_model.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    assert evaluator(model)["label-free_alignment"] == pytest.approx(0, abs=1e-9)


def test_prediction_strength_tells_clear_topics_from_none(model: SentenceTransformer) -> None:
    clear = topic_sentences(200)
    mixed = [" ".join(f"w{draw}" for draw in np.random.default_rng(i).integers(200, size=6)) for i in range(200)]
    strengths = [
        LabelFreeEvaluator(sentences, n_clusters=8)(model)["label-free_prediction_strength"]
        for sentences in (clear, mixed)
    ]
    assert strengths[0] > 0.8 > 0.4 > strengths[1]


def test_exact_repeats_do_not_make_topics(model: SentenceTransformer) -> None:
    """They would be clusters that repeat perfectly. A column of pandas is a corpus, too."""
    distinct = list(dict.fromkeys(make_sentences(200)))
    repeated = [*distinct, *distinct[:5] * 40]
    plain, others = (
        LabelFreeEvaluator(sentences, n_clusters=8)(model) for sentences in (distinct, pd.Series(repeated)[::-1][::-1])
    )
    assert others == plain


@pytest.mark.parametrize("name", ["a.csv", "b.jsonl", "c.parquet"])
def test_short_texts_come_from_any_table(tmp_path: Path, name: str) -> None:
    frame = pd.DataFrame({"text": ["a; b", 'say "x"', "two\nlines", "d"], "label": [1, 1, 2, 2], "n": [None, 1, 2, 3]})
    write = {"csv": frame.to_csv, "jsonl": frame.to_json, "parquet": frame.to_parquet}[name[2:]]
    write(tmp_path / name, **({"orient": "records", "lines": True} if name == "b.jsonl" else {}))
    found = clustering_task(tmp_path / name).dataset["test"]
    assert list(found["text"]) == list(frame["text"])
    assert list(found["label"]) == ["1", "1", "2", "2"]
    frame.loc[2, "label"] = None
    frame.to_json(tmp_path / "gap.jsonl", orient="records", lines=True)
    with pytest.raises(ValueError, match=r"column='label' of .*gap\.jsonl' has no value in line 3"):
        clustering_task(tmp_path / "gap.jsonl")


@pytest.mark.parametrize("arguments", [{"select_by": "loss"}, {"n_clusters": 30}, {"n_clusters": 1}])
def test_label_free_arguments_are_checked(arguments: dict[str, Any]) -> None:
    [name] = arguments
    with pytest.raises(ValueError, match=f"{name}={arguments[name]!r}"):
        LabelFreeEvaluator(make_sentences(100), **arguments)


# the real model


@pytest.mark.slow
def test_minilm_on_the_packaged_utterances(tmp_path: Path) -> None:
    """The starting model's row of the quickstart."""
    sentences, intents = load_utterances()
    rows = [{"label": intent, "text": text} for text, intent in zip(sentences, intents, strict=True)]
    path = write_tsv(tmp_path / "utterances.tsv", rows)
    code, text = cli("evaluate", packaged_model(), "--clustering", path, "--output", tmp_path / "out")
    assert code == 0, text
    [record] = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    assert record["values"]["v_measure"] == pytest.approx(80.2, abs=1)
    assert record["values"]["accuracy"] == pytest.approx(73.8, abs=2)
    clusters = CorpusClusters.fit(sentences, embeddings=np.random.default_rng(0).normal(size=(len(intents), 4)))
    assert 100 * record["values"]["false_negative_share"] == pytest.approx(false_negative_shares(intents, clusters)[0])
