"""The main job: a list or file of sentences in, a better model, its report and its state out; nothing half-written."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import (
    DISTINCT,
    REPEATED,
    SENTENCES,
    STEPS,
    cli,
    save_corpus,
    save_model,
    topic_sentences,
    train_words,
)
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import TrainingArguments

from st_clusterns import ClusterNSLoss, CorpusClusters, Recipe, adapt
from st_clusterns import cli as cli_module
from st_clusterns.clustering import sample
from st_clusterns.evaluation.scores import matched_accuracy, score_clustering
from st_clusterns.training import adapt as module
from st_clusterns.training import quickstart
from st_clusterns.training.report import describe_clusters, describe_embeddings, report_files
from st_clusterns.training.sentences import SentenceFile

# accelerate warns about pinned memory where there is no GPU; nothing of ours decides it
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")

QUICK = Recipe(batch_size=32, max_steps=STEPS, learning_rate=1e-3)
REPORT = {"report.json", "report.html", "report.png", "report.svg", "map.parquet"}
FILES = {*REPORT, "clusterns_state.safetensors", "model.safetensors", "README.md", "modules.json"}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return save_corpus(tmp_path)


def write_no_report(*args: Any) -> None:
    """In place of the report, whose maps take longer than all else."""
    for path in report_files(args[3]):
        path.write_bytes(b"a report")


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_files", write_no_report)


def embed(model: SentenceTransformer | str | Path) -> np.ndarray:
    model = model if isinstance(model, SentenceTransformer) else SentenceTransformer(str(model), device="cpu")
    rows: np.ndarray = model.encode(DISTINCT[:20])
    return rows


# What comes out


def test_the_command_saves_a_plain_model_and_its_report(corpus: Path, model_path: str, tmp_path: Path) -> None:
    code, text = cli(*train_words(corpus, model_path, tmp_path / "out"))
    assert code == 0, text
    assert not (tmp_path / "out.partial").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES
    assert not np.allclose(embed(model_path), embed(tmp_path / "out"), atol=1e-6), "training changed nothing"
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers") for module in modules), "needs our package to load"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ClusterNSLoss" in card
    assert "Clustering-Aware Negative Sampling" in card
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["clusters"]["n_clusters"] == report["loss"]["n_clusters"] == 8
    assert report["clusters"]["has_topics"]
    assert report["clusters"]["verdict"] in text
    assert sum(report["clusters"]["sizes"]) == report["sentences"] == len(DISTINCT)
    assert report["recipe"]["max_steps"] == STEPS
    assert report["before"].keys() == report["after"].keys()
    assert report["before"] != report["after"]
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000


def test_the_report_is_that_of_the_models_before_and_after(model_path: str, no_report: None, tmp_path: Path) -> None:
    report = adapt(model_path, SENTENCES, tmp_path / "out", 8, QUICK, show_progress=False)
    before, after = SentenceTransformer(model_path), SentenceTransformer(str(tmp_path / "out"))
    ids = CorpusClusters.fit(DISTINCT, before, 8, show_progress_bar=False).ids
    for when, model in (("before", before), ("after", after)):
        assert report[when] == pytest.approx(describe_embeddings(model.encode(DISTINCT), ids), abs=1e-4), when
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert len([entry for entry in report["log"] if "loss" in entry]) == STEPS


def test_a_model_is_trained_in_place_and_a_name_is_loaded(model_path: str, no_report: None, tmp_path: Path) -> None:
    """Both to the same weights, as the same start and seed demand."""
    model = SentenceTransformer(model_path, device="cpu")
    before = embed(model)
    adapt(model, SENTENCES, tmp_path / "object", 8, QUICK, show_progress=False)
    assert not np.allclose(before, embed(model), atol=1e-3), "training changed nothing"
    np.testing.assert_array_equal(embed(model), embed(tmp_path / "object"))
    adapt(model_path, SENTENCES, tmp_path / "name", 8, QUICK, show_progress=False)
    np.testing.assert_array_equal(embed(tmp_path / "name"), embed(tmp_path / "object"))


def test_sentences_longer_than_training_reads_are_recognised(
    model_path: str, no_report: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is made while the model reads as little as in training; else their tokens would differ."""
    recognised: list[bool] = []
    prepare = ClusterNSLoss.prepare

    def watched(self: ClusterNSLoss, embeddings: list[Any], texts: Any = None) -> Any:
        recognised.append(bool(torch.isin(texts[-1], self.known_texts).all()))
        return prepare(self, embeddings, texts)

    monkeypatch.setattr(ClusterNSLoss, "prepare", watched)
    short = dataclasses.replace(QUICK, max_length=6)
    assert min(len(sentence.split()) for sentence in DISTINCT) > short.max_length
    adapt(model_path, SENTENCES, tmp_path / "out", 8, short, show_progress=False)
    assert recognised == [True] * STEPS


def test_a_model_without_a_maximum_length_reads_whole_texts(model_path: str, no_report: None, tmp_path: Path) -> None:
    """The property of a StaticEmbedding model cannot be set."""
    tokenizer = SentenceTransformer(model_path, device="cpu").tokenizer.backend_tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    before = embed(model)
    adapt(model, SENTENCES, tmp_path / "out", 8, QUICK, show_progress=False)
    assert not np.allclose(before, embed(tmp_path / "out"), atol=1e-3), "training changed nothing"
    np.testing.assert_array_equal(embed(model), embed(tmp_path / "out"))


def test_the_clusters_take_part_in_the_training(
    model_path: str, no_report: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A canary: without them, the same run ends elsewhere."""
    adapt(model_path, SENTENCES, tmp_path / "with", 8, QUICK, show_progress=False)
    forgetful = CorpusClusters.fit

    def fit(*args: Any, **settings: Any) -> CorpusClusters:
        return dataclasses.replace(forgetful(*args, **settings), has_topics=False)

    monkeypatch.setattr(CorpusClusters, "fit", fit)
    adapt(model_path, SENTENCES, tmp_path / "without", 8, QUICK, show_progress=False)
    assert not np.allclose(embed(tmp_path / "with"), embed(tmp_path / "without"), atol=1e-3)


def test_a_failing_report_does_not_cost_the_model(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        args[3].write_bytes(b"half a page")
        raise RuntimeError("no fonts")

    monkeypatch.setattr(module, "write_files", fail)
    report = adapt(model_path, SENTENCES, tmp_path / "out", 8, QUICK, show_progress=False)
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == f"The report could not be drawn (RuntimeError: no fonts); the model is in {tmp_path / 'out'}."
    assert not np.allclose(embed(model_path), embed(tmp_path / "out"), atol=1e-6)
    assert report["sentences"] == len(DISTINCT)
    assert not module.work_folder(tmp_path / "out").exists()


def test_training_length_is_put_back(corpus: Path, model_path: str, no_report: None, tmp_path: Path) -> None:
    """And it does limit the training: another length, another model."""
    for length in (5, 16):
        code, text = cli(*train_words(corpus, model_path, tmp_path / f"out{length}", "--max-length", length))
        assert code == 0, text
    full = SentenceTransformer(model_path).max_seq_length
    assert SentenceTransformer(str(tmp_path / "out5")).max_seq_length == full == 16
    assert not np.allclose(embed(tmp_path / "out5"), embed(tmp_path / "out16"), atol=1e-6)


@pytest.mark.parametrize(("embed_batch_size", "rows"), [(None, 32), (8, 8), (100, 100)])
def test_one_number_bounds_the_length_and_one_the_rows_of_all_that_is_read(
    embed_batch_size: int | None, rows: int, model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters, training and report; a long document costs no more memory in one than in the others."""
    shapes: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
    forward = SentenceTransformer.forward

    def watched(self: SentenceTransformer, features: dict[str, Any], **settings: Any) -> Any:
        shapes[self.training].append(tuple(features["input_ids"].shape))
        return forward(self, features, **settings)

    monkeypatch.setattr(SentenceTransformer, "forward", watched)
    monkeypatch.setattr(SentenceTransformer, "_create_model_card", lambda *args, **settings: None)  # embeds examples
    recipe = dataclasses.replace(QUICK, max_length=7, max_steps=2, embed_batch_size=embed_batch_size)
    adapt(model_path, SENTENCES, tmp_path / "out", 8, recipe, show_progress=False)
    assert shapes[True] == [(32, 7)] * 2 * 2, "groups of two views, in two steps"
    assert set(shapes[False]) == {(rows, 7), (len(DISTINCT) % rows or rows, 7)}


# Which sentences are trained on


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch, no_report: None) -> list[list[str]]:
    """The sentences of each run that reached the trainer; nothing is trained."""
    runs: list[list[str]] = []

    def run(model: Any, loss: Any, dataset: Dataset, *args: Any, **settings: Any) -> list[Any]:
        runs.append(list(dataset["sentence"]))
        return []

    monkeypatch.setattr(module, "run_trainer", run)
    return runs


def test_duplicates_are_left_out_and_counted(
    model_path: str, trained_on: list[list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "st_clusterns")
    report = adapt(model_path, SENTENCES, tmp_path / "out", 8, QUICK, show_progress=False)
    assert trained_on == [DISTINCT]
    assert report["sentences"] == len(DISTINCT) == len(SENTENCES) - REPEATED
    assert f"{REPEATED} exact duplicates are left out: {len(DISTINCT)} remain" in caplog.text


@pytest.mark.parametrize("corpus", [SENTENCES, pd.Series(SENTENCES), (text for text in SENTENCES)], ids=type)
def test_command_and_interface_find_the_same_clusters(
    corpus: Any, model_path: str, trained_on: list[list[str]], tmp_path: Path
) -> None:
    """In one corpus, whatever it is passed as, repeats or not: exact repeats count once."""
    recipe = dataclasses.replace(QUICK, max_length=64)
    report = adapt(model_path, corpus, tmp_path / "out", 8, recipe, show_progress=False)
    for sentences in (SENTENCES, DISTINCT, SENTENCES + DISTINCT[:3] * 100):
        clusters = CorpusClusters.fit(sentences, SentenceTransformer(model_path, device="cpu"), 8)
        assert describe_clusters(clusters, 32) == report["clusters"]


def test_without_duplicates_nothing_is_said_of_them(
    model_path: str, trained_on: list[list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "st_clusterns")
    adapt(model_path, DISTINCT, tmp_path / "out", 8, QUICK, show_progress=False)
    assert trained_on == [DISTINCT]
    assert "duplicates" not in caplog.text


@pytest.mark.parametrize(("steps", "on_sample"), [(1, True), (3, True), (4, False), (0, False)])
def test_a_short_run_over_a_large_corpus_trains_on_the_clustered_sample(
    steps: int,
    on_sample: bool,
    model_path: str,
    trained_on: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """3 steps of 32 rows are the 96 of the sample; 0 is no limit, here one epoch."""
    monkeypatch.setattr(sample, "SAMPLE", 96)
    recipe = dataclasses.replace(QUICK, max_steps=steps)
    report = adapt(model_path, SENTENCES, tmp_path / "out", 8, recipe, show_progress=False)
    [texts] = trained_on
    assert len(texts) == (96 if on_sample else len(DISTINCT))
    assert set(texts) <= set(DISTINCT)
    assert texts == sorted(texts, key=DISTINCT.index)
    assert sum(report["clusters"]["sizes"]) == 96
    assert report["sentences"] == pytest.approx(len(DISTINCT), rel=0.3 if on_sample else 0), "else it is an estimate"


@pytest.mark.parametrize("steps", [3, 0])
def test_a_file_is_trained_on_as_a_list_is(
    steps: int,
    corpus: Path,
    model_path: str,
    trained_on: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sample, "SAMPLE", 96)
    recipe = dataclasses.replace(QUICK, max_steps=steps)
    given = {"list": SENTENCES, "file": SentenceFile(corpus), "generator": (text for text in SENTENCES)}
    reports = [adapt(model_path, given[name], tmp_path / name, 8, recipe, show_progress=False) for name in given]
    assert reports[0] == reports[1] == reports[2]
    assert trained_on[0] == trained_on[1] == trained_on[2]


# What is refused, and what is left then


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--corpus", "nowhere.txt"], ["nowhere.txt"]),
        (["--batch-size", 1000], ["batch_size=1000"]),
        (["--batch-size", 1], ["batch_size must be 2 or more, got 1"]),
        (["--column", "text"], ["column"]),
        (["--n-clusters", 300], ["n_clusters=300 does not fit 320 distinct sentences: choose 2 to 160"]),
        (["--n-clusters", 1], ["n_clusters=1 does not fit"]),
        (["--max-steps", -1], ["max_steps must be a whole number, 0 or more, got -1"]),
        (["--learning-rate", -1], ["learning_rate must be 0 or more, got -1"]),
    ],
)
def test_bad_input_is_one_clear_line(
    corpus: Path, model_path: str, no_report: None, tmp_path: Path, change: list[object], words: list[str]
) -> None:
    """And leaves nothing behind that would refuse the corrected command."""
    code, text = cli(*train_words(corpus, model_path, tmp_path / "out", *change))
    assert code == 2
    assert text.startswith("Error:")
    assert "Traceback" not in text
    assert all(word in text for word in words), text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"max_steps": -1}, "max_steps must be a whole number, 0 or more, got -1"),
        ({"max_steps": 1.5}, "max_steps must be a whole number"),
        ({"max_length": 0}, "max_length must be a whole number, 1 or more"),
        ({"learning_rate": float("nan")}, "learning_rate must be 0 or more, got nan"),
        ({"embed_batch_size": 0}, "embed_batch_size must be a whole number, 1 or more"),
        ({"seed": -1}, "seed must be a whole number, 0 or more"),
    ],
)
def test_a_recipe_of_impossible_numbers_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**setting)


def test_an_error_before_any_checkpoint_does_not_refuse_the_corrected_call(
    model_path: str, no_report: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise ValueError("something of the trainer's")

    with monkeypatch.context() as patch:
        patch.setattr(module, "run_trainer", fail)
        with pytest.raises(ValueError, match="something of the trainer's"):
            adapt(model_path, DISTINCT, tmp_path / "out", 8, QUICK, show_progress=False)
    adapt(model_path, DISTINCT, tmp_path / "out", np.int64(8), dataclasses.replace(QUICK, seed=1), show_progress=False)  # type: ignore[arg-type]


def test_several_gpus_of_one_process_do_not_multiply_the_batch(
    model_path: str, no_report: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torchrun, transformers would wrap the model in DataParallel."""
    sizes = []
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: vars(self).get("_n_gpu") or 2))
    prepare = ClusterNSLoss.prepare

    def noted(self: Any, embeddings: list[torch.Tensor], texts: Any = None) -> Any:
        sizes.append(len(embeddings[0]))
        return prepare(self, embeddings, texts)

    monkeypatch.setattr(ClusterNSLoss, "prepare", noted)
    adapt(model_path, DISTINCT, tmp_path / "out", 8, QUICK, show_progress=False)
    assert sizes == [32] * STEPS


def test_a_work_folder_that_cannot_be_removed_costs_neither_model_nor_report(
    model_path: str, no_report: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remove = module.shutil.rmtree

    def fail(path: Path, **settings: Any) -> None:
        if Path(path).name == "out.partial":
            raise OSError(39, "Directory not empty")
        remove(path, **settings)

    monkeypatch.setattr(module.shutil, "rmtree", fail)
    adapt(model_path, DISTINCT, tmp_path / "out", 8, QUICK, show_progress=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES
    assert f"remove {tmp_path / 'out.partial'} by hand" in caplog.text


def test_a_model_in_memory_with_a_new_prompt_goes_on_after_an_interrupt(
    model_path: str, no_report: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    model = SentenceTransformer(model_path, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(CorpusClusters, "fit", stop)
        with pytest.raises(KeyboardInterrupt):
            adapt(model, DISTINCT, tmp_path / "out", 8, QUICK, show_progress=False, prompt="query: ")
    adapt(model, DISTINCT, tmp_path / "out", 8, QUICK, show_progress=False, prompt="query: ")


def test_an_existing_output_is_not_touched(corpus: Path, model_path: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    code, text = cli(*train_words(corpus, model_path, tmp_path / "out"))
    assert code == 2
    assert "exists already" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(FileExistsError, match="exists already: choose another folder"):
        adapt(model_path, SENTENCES, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        ("only one", "must be a list of str, got str 'only one'"),
        ([["a"], ["b"]] * 20, r"sentences\[0\] is list \['a'\]"),
        ([*SENTENCES, None], r"sentences\[325\] is NoneType None"),
        (200 * ["the same again"], r"sentences holds 1 distinct text\(s\) in 200: give 4 or more"),
        (2 * DISTINCT[:20], "batch_size=32 does not fit 20 sentences"),
        ([*SENTENCES, " "], r"sentences\[325\] is blank, ' ': drop it"),
        (pd.DataFrame({"text": SENTENCES}), r"got DataFrame .*pass one column of a table, such as frame\['text'\]"),
        (Dataset.from_dict({"text": SENTENCES}), r"got Dataset .*pass one column of a table, such as frame\['text'\]"),
    ],
    ids=["a string", "lists", "None", "one text", "too few for a batch", "a blank", "a data frame", "a data set"],
)
def test_sentences_that_cannot_be_trained_on(sentences: Any, message: str, tmp_path: Path) -> None:
    """Told before the model is loaded: there is no such model."""
    with pytest.raises(ValueError, match=message):
        adapt("no-such-model", sentences, tmp_path / "out", recipe=QUICK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: setattr(model, "truncate_dim", 16), r"set model\.truncate_dim = None before"),
        (lambda model: model.requires_grad_(False), r"None of the model's 39 weights is trainable"),
    ],
    ids=["truncate_dim", "frozen"],
)
def test_models_that_cannot_be_trained(
    spoil: Callable[[Any], Any], message: str, model_path: str, tmp_path: Path
) -> None:
    """Told before the work folder is made: it would refuse the corrected model as that of another run."""
    model = SentenceTransformer(model_path, device="cpu")
    spoil(model)
    with pytest.raises(ValueError, match=message):
        adapt(model, SENTENCES, tmp_path / "out", 8, QUICK, show_progress=False)
    assert not list(tmp_path.iterdir())


UNKNOWN = [f"unknown{i} words{i}" for i in range(60)]


def test_texts_that_the_model_cannot_read_are_counted_before_training(
    model_path: str, trained_on: list[list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapt(model_path, [*DISTINCT, *UNKNOWN], tmp_path / "out", 8, QUICK, show_progress=False)
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "embeds 60 of 380 distinct sentences exactly as another one: their words are unknown" in warning


def test_a_corpus_that_the_model_cannot_read_is_refused(model_path: str, tmp_path: Path) -> None:
    """And leaves nothing behind that would refuse the same command with a model that can."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(UNKNOWN + DISTINCT[:40]))
    code, text = cli(*train_words(corpus, model_path, tmp_path / "out"))
    assert code == 2
    assert "embeds 60 of 100 distinct sentences exactly as another one" in text
    assert "Choose a model for the language of the sentences" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt"]


# The command


@pytest.mark.parametrize("module", ["st_clusterns", "st_clusterns.cli"])
def test_the_command_runs_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "train", "--help"], capture_output=True, text=True, check=True)
    assert "--corpus" in done.stdout


def test_the_commands_defaults_are_those_of_the_functions() -> None:
    options = inspect.signature(cli_module.train).parameters
    for field in dataclasses.fields(Recipe):
        assert options[field.name].default == field.default, field.name
    assert options["n_clusters"].default == inspect.signature(adapt).parameters["n_clusters"].default


def test_every_option_reaches_the_function(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def stand_in(*args: Any, **others: Any) -> Any:
        calls.extend([args, others])
        raise ValueError("far enough")

    monkeypatch.setattr(module, "adapt", stand_in)
    recipe = Recipe(7, 1.5, 9, 1e-3, 11, True, 3, 5)
    words: list[object] = ["train", "--corpus", corpus, "--model", "m", "--output", tmp_path / "out", "--n-clusters", 5]
    for name, value in dataclasses.asdict(recipe).items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    words += ["--prompt", "topic: ", "--prompt-name", "topic", "--trust-remote-code", "--lora", 4]
    words += ["--report-to", "tensorboard", "--push-to-hub", "me/tickets"]
    words += ["--embed-device", "cpu", "--embed-device", "cuda:1"]
    assert cli(*words) == (2, "Error: far enough")
    others = {"prompt": "topic: ", "prompt_name": "topic", "trust_remote_code": True, "lora": 4}
    others |= {"report_to": "tensorboard", "evaluator": None, "push_to_hub": "me/tickets"}
    others["embed_devices"] = ["cpu", "cuda:1"]
    [name, sentences, *rest], found = calls
    assert (name, list(sentences), *rest) == ("m", SENTENCES, tmp_path / "out", 5, recipe)
    assert found == others


# The quickstart


def test_packaged_utterances_are_dense_in_topics() -> None:
    texts, intents = quickstart.load_utterances()
    assert len(texts) == len({text.lower() for text in texts}) >= 1000
    assert 20 <= len(set(intents)) <= 30
    assert min(Counter(intents).values()) >= 40
    assert all(text.strip() for text in texts)


def test_utterances_are_valid_csv() -> None:
    path = Path(cli_module.__file__).parent / "data" / "utterances.csv"
    with path.open(encoding="utf-8", newline="") as file:
        assert all(set(row) == {"text", "intent"} and None not in row.values() for row in csv.DictReader(file))


def random_clusters(n_rows: int, n_clusters: int) -> CorpusClusters:
    """Clusters of directions at random, all of them taken for trusted."""
    rows = np.random.default_rng(0).normal(size=(n_rows, 4))
    clusters = CorpusClusters.fit(topic_sentences(n_rows), n_clusters=n_clusters, embeddings=rows)
    return dataclasses.replace(clusters, has_topics=True, trust=np.ones(n_clusters, dtype=np.float32))


def test_false_negative_shares_against_a_count_of_pairs() -> None:
    """A pair is recognised if both rows have the same nearest centroid, and that cluster is trusted."""
    clusters = dataclasses.replace(random_clusters(40, 4), trust=np.array([1, 0, 1, 0], dtype=np.float32))
    directions = clusters.centroids / np.linalg.norm(clusters.centroids, axis=1, keepdims=True)
    ids = [int(np.argmax([row @ direction for direction in directions])) for row in clusters.embeddings]
    intents = [str(i % 5) for i in range(40)]
    same = pushed = 0
    for i in range(40):
        for j in range(40):
            if i != j and intents[i] == intents[j]:
                same += 1
                pushed += not (ids[i] == ids[j] and ids[i] in (0, 2))
    assert quickstart.false_negative_shares(intents, clusters) == pytest.approx(
        (100 * same / 1560, 100 * pushed / 1560)
    )
    assert 0 < pushed < same
    no_topics = dataclasses.replace(clusters, has_topics=False)
    plain, ours = quickstart.false_negative_shares(intents, no_topics)
    assert plain == ours == pytest.approx(100 * same / 1560)


# The report


def test_scores_are_those_of_a_perfect_and_of_a_wrong_clustering() -> None:
    blobs = np.repeat(np.eye(3), 20, axis=0) + np.random.default_rng(0).normal(scale=0.01, size=(60, 3))
    assert score_clustering(blobs, np.repeat(["a", "b", "c"], 20))["v_measure"] > 60  # k-means may merge two of them
    assert matched_accuracy([0, 0, 1, 1], [5, 5, 2, 2]) == 1
    assert matched_accuracy([0, 0, 1, 1], [0, 1, 0, 1]) == 0.5


def test_report_numbers_against_direct_counts() -> None:
    clusters = random_clusters(100, 5)
    rows = clusters.embeddings
    numbers = describe_embeddings(rows, clusters.ids)
    cosines = rows @ rows.T
    different = ~np.eye(100, dtype=bool)
    same = (clusters.ids[:, None] == clusters.ids) & different
    assert numbers["mean_cosine"] == pytest.approx(cosines[different].mean(), abs=1e-5)
    assert numbers["mean_cosine_same_cluster"] == pytest.approx(cosines[same].mean(), abs=1e-5)
    assert numbers["contrast"] == pytest.approx(cosines[same].mean() - cosines[different].mean(), abs=1e-5)
    assert numbers["uniformity"] == pytest.approx(np.log(np.exp(-4 + 4 * cosines[different]).mean()), abs=1e-3)
    shares = describe_clusters(clusters, batch_size=11)
    assert shares["false_negatives_in_batch"] == pytest.approx(same[different].mean())
    assert shares["false_negatives_of_a_row"] == pytest.approx(10 * shares["false_negatives_in_batch"])
    assert shares["sentences_in_trusted_clusters"] == pytest.approx(1)


def test_a_report_counts_trusted_clusters_only() -> None:
    clusters = random_clusters(100, 5)
    trust = np.array([1, 0.1, 1, 0.1, 0.1], dtype=np.float32)
    some = describe_clusters(dataclasses.replace(clusters, trust=trust), batch_size=11)
    assert some["sentences_in_trusted_clusters"] == pytest.approx(clusters.sizes[[0, 2]].sum() / 100)
    sizes = clusters.sizes[[0, 2]]
    assert some["false_negatives_in_batch"] == pytest.approx((sizes * (sizes - 1)).sum() / (100 * 99))
    none = describe_clusters(dataclasses.replace(clusters, has_topics=False), batch_size=11)
    assert none["sentences_in_trusted_clusters"] == none["false_negatives_in_batch"] == 0
    assert "no topics were found" in none["verdict"]


def test_a_loss_of_the_host_library_runs_by_the_same_trainer(model_path: str, tmp_path: Path) -> None:
    """As the quickstart's comparison does; without our state beside its checkpoints, each run begins anew."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(model_path, device="cpu")
    before = embed(model)
    pairs = Dataset.from_dict({"sentence": DISTINCT, "positive": DISTINCT})
    loss = MultipleNegativesRankingLoss(model)
    log = module.run_trainer(model, loss, pairs, QUICK, tmp_path / "run", show_progress=False)
    assert len([entry for entry in log if "loss" in entry]) == STEPS
    assert not np.allclose(before, embed(model), atol=1e-3)


@pytest.mark.parametrize(
    ("n_sentences", "recipe", "steps"),
    [
        (1000, Recipe(batch_size=96), 10),
        (10_000, Recipe(batch_size=96), 20),
        (10_000, Recipe(batch_size=96, max_steps=0), 104),
        (10_000, Recipe(batch_size=96, epochs=0.5, max_steps=0), 52),
        (96, Recipe(batch_size=96, epochs=0.1), 1),
    ],
)
def test_steps_of_a_run(n_sentences: int, recipe: Recipe, steps: int) -> None:
    assert module.count_steps(n_sentences, recipe) == steps


def test_the_loss_of_adapt_is_the_public_one(model_path: str, trained_on: list[list[str]], tmp_path: Path) -> None:
    """With its default settings, as the tables have it."""
    report = adapt(model_path, SENTENCES, tmp_path / "out", 8, QUICK, show_progress=False)
    model = SentenceTransformer(model_path, device="cpu")
    clusters = CorpusClusters.fit(DISTINCT, model, 8, show_progress_bar=False)
    assert report["loss"] == ClusterNSLoss(model, clusters).get_config_dict()
