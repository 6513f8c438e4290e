"""The reproduction of the published rows runs from end to end on a tiny model, resumes, and plans what it says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_models import save_backbone
from sentence_transformers import SentenceTransformer
from tiny_bert import make_sentences

import paper
from paper_costs import estimate
from st_clusterns import PRESETS, ClusterNSLoss
from st_clusterns.evaluation.sts import STS_TESTS
from st_clusterns.losses.contrastive import ContrastiveLoss

SCORES = [*STS_TESTS, "average"]
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    texts = make_sentences(60)
    for name, test in list(STS_TESTS.items()):
        monkeypatch.setitem(STS_TESTS, name, test._replace(pairs=20))
        pairs = [f"{('dev', 'test')[i % 2]}\t{i % 5}\t{texts[i]}\t{texts[-i - 1]}" for i in range(40)]
        path = tmp_path / "data" / "sts" / f"{test.file}.tsv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(["split\tscore\tsentence1\tsentence2", *pairs]).encode()))
    (tmp_path / "corpus.txt").write_text("\n".join(make_sentences(96, seed=1)))
    return tmp_path


def words(data: Path, family: str, row: str, *more: str) -> list[str]:
    model = data / family
    if not model.exists():
        save_backbone(family, model, positions=64, model_max_length=48)
    small = ["--batch-size", "16", "--eval-steps", "2", "--mini-batch-size", "8"]
    loss = ["--loss", '{"n_clusters": 4, "start_similarity": 1.0}']
    files = ["--corpus", str(data / "corpus.txt"), "--data-dir", str(data / "data"), "--model", str(model)]
    return ["--row", row, "--output", str(data / "out"), *files, *small, *loss, *more]


def results(data: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (data / "out").glob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "row"), [("bert", "bert-base"), ("bert", "prompt-bert-base")])
def test_a_row_and_simcse_from_end_to_end(family: str, row: str, data: Path) -> None:
    models = data / "models"
    paper.main(words(data, family, row, "--seeds", "0", "1", "--models", str(models)))
    found = results(data)
    assert set(found) == {f"{name}-{seed}" for name in (row, "simcse-bert-base") for seed in (0, 1)}
    for name, run in found.items():
        assert list(run["scores"]) == SCORES
        assert run["scores"]["average"] == pytest.approx(sum(run["scores"][test] for test in STS_TESTS) / 7)
        assert set(run["dev_by_step"]) <= {"2", "4", "6"}
        assert run["dev"] == pytest.approx(max(run["dev_by_step"].values()))
        assert run.get("started", name.startswith("simcse"))
        embedded = SentenceTransformer(str(models / name), device="cpu").encode(["w1 w2", "w3"])
        assert embedded.shape == (2, 32)
    assert found[f"{row}-0"]["scores"] != found[f"{row}-1"]["scores"]
    assert found[f"{row}-0"]["scores"] != found["simcse-bert-base-0"]["scores"]
    page = (data / "out" / "README.md").read_text()
    assert "cannot be compared" in page
    assert page.count("(2) |") == 2 * (len(SCORES) + 1)
    assert not (data / "out" / "work").exists()

    before = {path: path.stat().st_mtime_ns for path in (data / "out").glob("*.json")}
    paper.main(words(data, family, row, "--seeds", "0", "1"))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(SystemExit, match="was made with another eval_steps"):
        paper.main([*words(data, family, row, "--seeds", "0"), "--eval-steps", "3"])


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_result(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = words(data, "roberta", "prompt-roberta-base", "--seeds", "0", "--no-simcse")
    paper.main([*line[:3], str(data / "straight"), *line[4:]])
    straight = json.loads((data / "straight" / "prompt-roberta-base-0.json").read_text())
    step, calls = ContrastiveLoss.is_training, []

    def fail(loss: ContrastiveLoss) -> bool:
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return step(loss)

    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveLoss, "is_training", fail)
        with pytest.raises(KeyboardInterrupt):
            paper.main(line)
    assert list((data / "out" / "work").glob("*/checkpoint-*")), "it must stop after a checkpoint"
    with pytest.raises(SystemExit, match=r"settings.json was made with another batch_size"):
        paper.main([*line, "--batch-size", "8"])
    paper.main(line)
    resumed = results(data)["prompt-roberta-base-0"]
    for name in ("dev_by_step", "steps", "scores"):
        assert resumed[name] == pytest.approx(straight[name]), name


def test_the_rows_are_the_presets_and_simcse(stub: Any) -> None:
    ours = {name: row for name, row in paper.ROWS.items() if row.loss is not None}
    assert set(ours) == {name.removeprefix("paper/") for name in PRESETS}
    for name, row in ours.items():
        preset = PRESETS[f"paper/{name}"]
        assert row.batch_size == preset.batch_size == row.devices * (preset.batch_size // row.devices)
        settings = paper.Plan().settings(row, 0)
        loss = paper.make_loss(stub, settings, 0)
        expected = ClusterNSLoss.from_preset(stub, f"paper/{name}").get_config_dict()
        assert loss.get_config_dict() == {**expected, "head": True}
    averages = [paper.ROWS[row.simcse].average for row in ours.values()]
    assert averages == [76.25, 78.41, 76.57, 78.90, 76.25, 78.41, 76.57]
    assert [row.name for row in paper.choose_rows(["roberta-large"], True)] == ["roberta-large", "simcse-roberta-large"]
    assert len(paper.choose_rows(["all"], True)) == 7 + 4
    with pytest.raises(SystemExit, match="no row bert-huge"):
        paper.choose_rows(["bert-huge"], True)


def test_a_dry_run_prints_the_plan_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper.main(["--row", "all", "--dry-run", "--output", str(tmp_path / "out")])
    plan = capsys.readouterr().out
    assert "11 rows x 3 seeds" in plan
    assert "| bert-base | 256 | 3906 | 31 | cached, 64 rows at a time | 3.4 | 0.4 |" in plan
    assert "Published on several devices: bert-large (4), roberta-base (2)" in plan
    assert not (tmp_path / "out").exists()


def test_every_base_row_is_said_to_fit_24_gb() -> None:
    for name, row in paper.ROWS.items():
        cost = estimate(paper.Plan().settings(row, 0), 64)
        assert cost["steps"] == 10**6 // row.batch_size
        assert cost["memory_gb"] < (24 if "base" in name else 40)
    whole, cut = (estimate(paper.Plan().settings(paper.ROWS["prompt-bert-base"], 0), mini) for mini in (0, 64))
    assert whole["memory_gb"] > 2 * cut["memory_gb"]
    assert 1.2 < cut["operations"] / whole["operations"] < 1.5


def test_the_estimated_weights_are_those_of_bert_base() -> None:
    from transformers import BertConfig, BertModel

    from paper_costs import SIZES

    with torch.device("meta"):
        weights = sum(p.numel() for p in BertModel(BertConfig(), add_pooling_layer=False).parameters())
    assert SIZES["google-bert/bert-base-uncased"].weights == pytest.approx(weights, rel=0.01)
