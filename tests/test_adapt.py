"""The main job: a file of sentences in, a better model, its report and its state out; nothing half-written."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from command_line import SENTENCES, cli, save_corpus, save_model, train_words
from sentence_transformers import SentenceTransformer

from st_clusterns import cli as cli_module
from st_clusterns import cluster_corpus, training
from st_clusterns.quickstart import false_negative_shares, load_utterances
from st_clusterns.report import describe_clusters, describe_embeddings, random_pairs, same_cluster_pairs
from st_clusterns.scoring import matched_accuracy, score_clustering

# accelerate warns about pinned memory where there is no GPU; nothing of ours decides it
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return save_corpus(tmp_path)


def test_the_command_saves_a_plain_model_and_its_report(corpus: Path, model_path: str, tmp_path: Path) -> None:
    code, text = cli(*train_words(corpus, model_path, tmp_path / "out"))
    assert code == 0, text
    assert not (tmp_path / "out.partial").exists()
    before, after = SentenceTransformer(model_path), SentenceTransformer(str(tmp_path / "out"))
    assert not np.allclose(before.encode(["w1 w2"]), after.encode(["w1 w2"]), atol=1e-6), "training changed nothing"
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers") for module in modules), "needs our package to load"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ClusterNSLoss" in card
    assert "Clustering-Aware Negative Sampling" in card
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["clusters"]["n_clusters"] == 8
    assert sum(report["clusters"]["sizes"]) == report["sentences"] == len(set(SENTENCES))
    assert {"before", "after"} <= set(report)
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "clusterns_state.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--corpus", "nowhere.txt"], ["nowhere.txt"]),
        (["--batch-size", 1000], ["batch_size=1000"]),
        (["--column", "text"], ["column"]),
    ],
)
def test_bad_input_is_one_clear_line(
    corpus: Path, model_path: str, tmp_path: Path, change: list[object], words: list[str]
) -> None:
    code, text = cli(*train_words(corpus, model_path, tmp_path / "out", *change))
    assert code == 2
    assert text.startswith("Error:")
    assert all(word in text for word in words), text
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_not_touched(corpus: Path, model_path: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    code, text = cli(*train_words(corpus, model_path, tmp_path / "out"))
    assert code == 2
    assert "exists already" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("module", ["st_clusterns", "st_clusterns.cli"])
def test_the_command_runs_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "train", "--help"], capture_output=True, text=True, check=True)
    assert "--corpus" in done.stdout


def test_one_sentence_as_a_string_is_refused(model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="list of str"):
        training.train("only one", model_path, tmp_path / "out")


def test_training_length_is_put_back(corpus: Path, model_path: str, tmp_path: Path) -> None:
    cli(*train_words(corpus, model_path, tmp_path / "out", "--max-length", 5))
    assert SentenceTransformer(str(tmp_path / "out")).max_seq_length == SentenceTransformer(model_path).max_seq_length


def test_packaged_utterances_are_dense_in_topics() -> None:
    texts, intents = load_utterances()
    assert len(texts) == len({text.lower() for text in texts}) >= 1000
    assert 20 <= len(set(intents)) <= 30
    assert min(Counter(intents).values()) >= 40
    assert all(text.strip() for text in texts)


def test_false_negative_shares_against_a_count_of_pairs() -> None:
    clusters = cluster_corpus(np.random.default_rng(0).normal(size=(40, 4)), 4)
    object.__setattr__(clusters, "trust", np.array([1, 0, 1, 0], dtype=np.float32))
    intents = [str(i % 5) for i in range(40)]
    same = pushed = 0
    for i in range(40):
        for j in range(40):
            if i != j and intents[i] == intents[j]:
                same += 1
                together = clusters.ids[i] == clusters.ids[j] and clusters.trust[clusters.ids[i]] > 0.5
                pushed += not together
    assert false_negative_shares(intents, clusters, 0.5) == pytest.approx((100 * same / 1560, 100 * pushed / 1560))
    assert pushed < same


def test_scores_are_those_of_a_perfect_and_of_a_wrong_clustering() -> None:
    blobs = np.repeat(np.eye(3), 20, axis=0) + np.random.default_rng(0).normal(scale=0.01, size=(60, 3))
    assert score_clustering(blobs, np.repeat(["a", "b", "c"], 20))["v_measure"] > 60  # k-means may merge two of them
    assert matched_accuracy([0, 0, 1, 1], [5, 5, 2, 2]) == 1
    assert matched_accuracy([0, 0, 1, 1], [0, 1, 0, 1]) == 0.5


def test_pairs_are_what_they_say() -> None:
    clusters = cluster_corpus(np.random.default_rng(0).normal(size=(100, 4)), 5)
    first, second = same_cluster_pairs(clusters, 0)
    assert (first != second).all()
    assert (clusters.ids[first] == clusters.ids[second]).all()
    first, second = random_pairs(100, 0)
    assert (first != second).all()


def test_report_numbers_against_direct_counts() -> None:
    rows = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    clusters = cluster_corpus(rows, 5)
    numbers = describe_embeddings(rows, clusters)
    cosines = (rows @ rows.T)[~np.eye(100, dtype=bool)]
    assert numbers["mean_cosine"] == pytest.approx(cosines.mean(), abs=0.02)
    assert numbers["uniformity"] == pytest.approx(np.log(np.exp(-4 + 4 * cosines).mean()), abs=0.05)
    shares = describe_clusters(clusters, batch_size=11, min_trust=0.0)
    assert shares["false_negatives_in_batch"] == pytest.approx(sum((s / 100) ** 2 for s in clusters.sizes))
    assert shares["false_negatives_of_a_row"] == pytest.approx(10 * shares["false_negatives_in_batch"])


def test_the_commands_defaults_are_those_of_the_functions() -> None:
    options = inspect.signature(cli_module.train).parameters
    for field in dataclasses.fields(training.Recipe):
        assert options[field.name].default == field.default, field.name
    for name in ("n_clusters", "topic_layer"):
        assert options[name].default == inspect.signature(training.train).parameters[name].default, name


def test_utterances_are_valid_csv() -> None:
    path = Path(training.__file__).parent / "data" / "utterances.csv"
    with path.open(encoding="utf-8", newline="") as file:
        assert all(set(row) == {"text", "intent"} and None not in row.values() for row in csv.DictReader(file))


def test_duplicates_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="st_clusterns"), pytest.raises(ValueError, match="sentences holds 1:"):
        training.train(200 * ["the same again"], "no-such-model", tmp_path / "out")
    assert "199 exact duplicates are left out: 1 sentences remain" in caplog.text
