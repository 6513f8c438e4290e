"""What `adapt` does around its training: logs to a reporter, scores by labels, the upload, and the table at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import DISTINCT, cli, save_corpus, save_model, train_words
from sentence_transformers import SentenceTransformer
from test_diagnostics import Reporter, reporter  # noqa: F401

from st_clusterns import Recipe, adapt
from st_clusterns.clustering import n_clusters
from st_clusterns.evaluation.labelled import ClassEvaluator
from st_clusterns.training import adapt as module
from st_clusterns.training.adapt import work_folder
from st_clusterns.training.report import compare

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")
QUICK = Recipe(batch_size=32, max_steps=4, learning_rate=1e-3)
CLASSES = [sentence.split()[0] for sentence in DISTINCT]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_files", lambda *args: args[3].write_bytes(b"a page"))


def run(model: str | SentenceTransformer, output: Path, **others: Any) -> dict[str, Any]:
    return adapt(model, DISTINCT, output, 8, QUICK, show_progress=False, **others)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(SentenceTransformer(str(folder), device="cpu").state_dict())


def test_logs_go_to_a_reporter_and_its_files_to_the_output(
    model_path: str,
    reporter: type[Reporter],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write_file(self: Reporter, args: Any, *others: Any, **kwargs: Any) -> None:
        (Path(args.output_dir) / "runs").mkdir(parents=True)  # where TensorBoard writes
        (Path(args.output_dir) / "runs" / "events").write_text("logs")

    monkeypatch.setattr(Reporter, "on_train_begin", write_file)
    report = run(model_path, tmp_path / "out", report_to="recorder")
    losses = [entry for entry in reporter.logs if "loss" in entry]
    assert len(losses) == QUICK.max_steps
    assert all(entry.keys() >= {"used_centroids", "masked_pairs", "positive_similarity"} for entry in losses)
    assert [entry["masked_pairs"] for entry in report["log"] if "loss" in entry] == [
        entry["masked_pairs"] for entry in losses
    ]
    assert (tmp_path / "out" / "runs" / "events").read_text() == "logs"


def test_an_interrupted_run_goes_on_with_other_reports_and_evaluators(
    model_path: str,
    reporter: type[Reporter],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*args: Any, **others: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_compare_saved", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model_path, tmp_path / "out")
    assert work_folder(tmp_path / "out").exists()
    evaluator = ClassEvaluator(DISTINCT, CLASSES)
    report = run(model_path, tmp_path / "out", report_to="recorder", evaluator=evaluator)
    plain = run(model_path, tmp_path / "plain")
    assert report["log"][0]["loss"] == plain["log"][0]["loss"]
    first, second = (weights(tmp_path / name) for name in ("out", "plain"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_evaluator_scores_start_and_result_and_changes_nothing(model_path: str, tmp_path: Path) -> None:
    seen: list[tuple[bool, Any]] = []

    def evaluator(model: SentenceTransformer) -> float:
        torch.rand(1)
        seen.append((model.training, model.state_dict()["0.model.encoder.layer.1.output.dense.weight"].clone()))
        return 0.25 * len(seen)

    model = SentenceTransformer(model_path, device="cpu")
    report = run(model, tmp_path / "out", evaluator=evaluator)
    assert report["evaluation"] == {"before": {"score": 0.25}, "after": {"score": 0.5}}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"] == report["evaluation"]
    name = "0.model.encoder.layer.1.output.dense.weight"
    assert torch.equal(seen[0][1], weights(Path(model_path))[name])
    assert torch.equal(seen[1][1], weights(tmp_path / "out")[name])
    run(model_path, tmp_path / "plain")
    assert torch.equal(seen[1][1], weights(tmp_path / "plain")[name])


def test_an_evaluator_that_fails_at_the_end_does_not_cost_the_model(
    model_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = [1.0]
    with caplog.at_level(logging.WARNING, "st_clusterns"):
        report = run(model_path, tmp_path / "out", evaluator=lambda model: {"found": left.pop()})
    assert report["evaluation"] == {"before": {"found": 1.0}}
    assert "The trained model could not be evaluated (IndexError: pop from empty list)." in caplog.text
    assert compare(report)[0] == ("found", "1.000", "-")
    assert weights(tmp_path / "out")


def push_by(call: Callable[[Path], str]) -> Callable[..., str]:
    def push(self: Any, repo_id: str, *, private: bool, exist_ok: bool, local_model_path: str) -> str:
        assert (repo_id, private, exist_ok) == ("me/tickets", True, True)
        return call(Path(local_model_path))

    return push


def test_the_folder_is_pushed_without_the_page_that_holds_sentences(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pushed: list[set[str]] = []

    def upload(folder: Path) -> str:
        pushed.append({path.name for path in folder.iterdir()})
        return "https://hub/me/tickets"

    monkeypatch.setattr(SentenceTransformer, "push_to_hub", push_by(upload))
    with caplog.at_level(logging.INFO, "st_clusterns"):
        run(model_path, tmp_path / "out", push_to_hub="me/tickets")
    assert "Pushed to the hub: https://hub/me/tickets" in caplog.text
    [files] = pushed
    assert files >= {"model.safetensors", "report.json", "README.md", "modules.json"}
    assert "report.html" not in files
    assert (tmp_path / "out" / "report.html").exists()
    assert 'SentenceTransformer("me/tickets")' in (tmp_path / "out" / "README.md").read_text()
    assert not work_folder(tmp_path / "out").exists()


def test_a_push_that_fails_does_not_cost_the_model(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(SentenceTransformer, "push_to_hub", push_by(fail))
    run(model_path, tmp_path / "out", push_to_hub="me/tickets")
    folder = tmp_path / "out"
    assert (
        f"The model could not be pushed to 'me/tickets' (ConnectionError: no network). It is whole in {folder}: "
        f"`hf auth login`, then `hf upload me/tickets {folder} --private --exclude report.html map.parquet` (these two "
        "hold sentences)." in caplog.text
    )
    assert weights(folder)


@pytest.mark.parametrize(
    ("option", "kind", "message"),
    [
        ({"report_to": "tensorbord"}, ValueError, "report_to='tensorbord': tensorbord is not supported, only"),
        ({"push_to_hub": "my tickets/x"}, ValueError, "push_to_hub='my tickets/x' is no name of a repository"),
    ],
)
def test_wrong_options_are_told_before_any_work(
    option: dict[str, str], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        run("no/model", tmp_path / "out", **option)


def test_a_reporter_that_is_not_installed_is_told_before_any_work(
    reporter: type[Reporter],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(self: Reporter) -> None:
        raise RuntimeError("pip install recorder")

    monkeypatch.setattr(Reporter, "__init__", missing)
    with pytest.raises(ImportError, match="report_to='recorder': pip install recorder"):
        run("no/model", tmp_path / "out", report_to="recorder")


# The table


def a_report(topics: bool, search: dict[str, float], kept: str, **evaluation: dict[str, float]) -> dict[str, Any]:
    side = {"mean_cosine": 0.1, "mean_cosine_same_cluster": 0.6, "contrast": 0.5, "uniformity": -3.0}
    later = {name: value + 0.25 for name, value in side.items()} if kept == "trained" else side
    return {
        "clusters": {"has_topics": topics},
        "search": search,
        "kept": kept,
        "before": side,
        "after": later,
        "evaluation": evaluation,
    }


def test_the_table_of_a_corpus_with_topics_and_labels() -> None:
    report = a_report(True, {}, "trained", before={"gold_v_measure": 0.5}, after={"gold_v_measure": 0.625})
    assert compare(report) == [
        ("gold_v_measure", "0.500", "0.625"),
        ("mean cosine of two sentences of a cluster", "0.600", "0.850"),
        ("mean cosine of any two sentences", "0.100", "0.350"),
        ("difference of the two", "0.500", "0.750"),
        ("uniformity (lower: more evenly spread)", "-3.000", "-2.750"),
    ]


def test_the_table_without_topics_says_nothing_of_clusters() -> None:
    assert [row[0] for row in compare(a_report(False, {}, "trained"))] == [
        "mean cosine of any two sentences",
        "uniformity (lower: more evenly spread)",
    ]


@pytest.mark.parametrize(("after", "kept", "shown"), [(0.5, "trained", "50.0%"), (0.3, "start", "40.0%")])
def test_the_table_of_documents_shows_the_saved_model(after: float, kept: str, shown: str) -> None:
    rows = compare(a_report(True, {"before": 0.4, "after": after}, kept))
    assert rows[0] == ("held-out documents found first by a span of theirs", "40.0%", shown)


def test_the_command_shows_labels_and_keeps_them_out_of_training(model_path: str, tmp_path: Path) -> None:
    corpus = save_corpus(tmp_path)
    gold = tmp_path / "gold.tsv"
    gold.write_text("\n".join(["label\ttext", *(f"{c}\t{t}" for c, t in zip(CLASSES, DISTINCT, strict=True))]))
    code, output = cli(*train_words(corpus, model_path, tmp_path / "out", "--max-steps", 2, "--eval", gold))
    assert code == 0
    assert "Labels of gold.tsv were used for these scores only" in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for name, value in report["evaluation"]["before"].items():
        assert f"│ {name} │ {value:.3f} │ {report['evaluation']['after'][name]:.3f} │" in output
    assert set(report["evaluation"]["before"]) == {
        f"gold_{key}" for key in ("v_measure", "accuracy", "neighbour_purity", "pair_average_precision")
    }
    code, _ = cli(*train_words(corpus, model_path, tmp_path / "plain", "--max-steps", 2))
    first, second = (weights(tmp_path / name) for name in ("out", "plain"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_missing_table_of_labels_stops_the_command_before_any_work(model_path: str, tmp_path: Path) -> None:
    code, output = cli(*train_words(save_corpus(tmp_path), model_path, tmp_path / "out", "--eval", tmp_path / "no.tsv"))
    assert code == 2
    assert "no.tsv' does not exist" in output
    assert not work_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["./no/such-model", "all-MiniLM-typo"])
def test_a_model_that_cannot_be_loaded_is_named_by_every_command(name: str, tmp_path: Path) -> None:
    corpus, output = save_corpus(tmp_path), tmp_path / "output"
    commands = (
        train_words(corpus, name, output),
        ["audit", corpus, "--model", name],
        ["report", corpus, "--before", name, "--after", name, "--output", tmp_path / "page.html"],
        ["evaluate", name, "--output", output],
    )
    for words in commands:
        code, printed = cli(*words)
        assert code == 2
        assert f"The model {name!r} could not be loaded" in printed, (words[0], printed)
        assert not output.exists()


def test_topics_train_at_a_higher_rate_than_views_alone(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {}
    for has_topics in (True, False):
        monkeypatch.setattr(n_clusters, "trust_bound", lambda rows, bound=not has_topics: 1.1 * bound)
        recipe = replace(QUICK, learning_rate=None)
        report = adapt(model_path, DISTINCT, tmp_path / str(has_topics), 8, recipe, show_progress=False)
        assert report["clusters"]["has_topics"] == has_topics
        first = next(entry["learning_rate"] for entry in report["log"] if "learning_rate" in entry)
        rates[has_topics] = (report["recipe"]["learning_rate"], first)
    assert rates == {True: (5e-5, 5e-5), False: (2e-5, 2e-5)}
    report = adapt(model_path, DISTINCT, tmp_path / "own", 8, QUICK, show_progress=False)
    assert report["recipe"]["learning_rate"] == QUICK.learning_rate
    assert Recipe(learning_rate=0.0).for_views("dropout").learning_rate == 0, "a rate of the user, though a zero"
