"""The card of a saved model says what was done, and cites the papers that were used."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import DISTINCT, SENTENCES, STEPS, save_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tiny_bert import WORDS

from st_clusterns import ClusterNSLoss, CorpusClusters, Recipe, adapt
from st_clusterns.evaluation.evaluators import SpanRetrievalEvaluator
from st_clusterns.training import adapt as module
from st_clusterns.training.model_card import describe_training

# accelerate warns about pinned memory where there is no GPU; nothing of ours decides it
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning")

QUICK = Recipe(batch_size=32, max_steps=STEPS, learning_rate=1e-3)
DRAW = random.Random(0)
NO_TOPICS = [" ".join(DRAW.choices(WORDS, k=5)) for _ in range(100)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def section(card: str, title: str) -> str:
    """What stands under a heading, up to the next one."""
    [text] = re.findall(rf"^#+ {title}\n(.*?)(?=^#)", card, re.DOTALL | re.MULTILINE)
    return str(text)


def table(text: str) -> dict[str, list[str]]:
    """The rows of a Markdown table by their first cell, without its header."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {first: others for first, *others in rows[2:]}


def cited(card: str) -> set[str]:
    return set(re.findall(r"^@\w+\{([^,]+),", card, re.MULTILINE))


def test_the_card_says_what_was_done(model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_files", lambda *args: args[3].write_bytes(b"a page"))
    start = SentenceTransformer(model_path)
    report = adapt(model_path, SENTENCES, tmp_path / "out", 8, QUICK, show_progress=False)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    clusters = CorpusClusters.fit(DISTINCT, start, 8, batch_size=32, show_progress_bar=False)
    corpus = section(card, "Corpus")
    assert f"{len(DISTINCT)} distinct sentences, without labels" in corpus
    assert f"`{clusters.fingerprint}`" in corpus
    assert clusters.verdict in corpus
    topics = table(section(card, "Topics"))
    assert topics == {
        name: [str((clusters.ids == i).sum()), f"{clusters.trust[i]:.2f}"] for i, name in enumerate(clusters.names)
    }
    numbers = table(section(card, "Before and after"))
    assert len(numbers) == len(report["before"])
    for name, (before, after) in numbers.items():
        key = name.replace(" ", "_")
        assert (float(before), float(after)) == pytest.approx((report["before"][key], report["after"][key]), abs=6e-4)
    assert "Finer distinctions than these topics may be lost" in section(card, "Limits")
    assert cited(card) == {
        "reimers-2019-sentence-bert",
        "deng2023clusteringaware",
        "li2021prototypical",
        "bertinetto2020making",
        "tibshirani2005cluster",
        "gao2021simcse",
    }
    order = [card.index(f"### {title}\n") for title in ("Training Dataset", "Corpus", "Topics", "Before and after")]
    assert order == sorted(order)
    assert order[-1] < card.index("### Limits") < card.index("### Training Hyperparameters")
    again = SentenceTransformer(str(tmp_path / "out"))
    again.save(str(tmp_path / "copy"))
    assert section((tmp_path / "copy" / "README.md").read_text(encoding="utf-8"), "Corpus") == corpus


def describe(model_path: str, folder: Path, sentences: list[str], **report: Any) -> str:
    """The card after a training that never ran."""
    model = SentenceTransformer(model_path)
    clusters = CorpusClusters.fit(sentences, model, 2, show_progress_bar=False)
    loss = ClusterNSLoss(model, clusters)
    model.model_card_data.train_datasets = [{"columns": [], "size": 4, "loss": {"fullname": "ours", "config_code": ""}}]
    model.model_card_data.all_hyperparameters = {"max_steps": 1}
    model.model_card_data.set_losses([loss])
    model.model_card_data.add_tags("generated_from_trainer")  # or the card that was loaded is saved again
    whole = {
        "sentences": 123456,
        "views": "deletion",
        "recipe": {"max_length": 64},
        "prompt": "",
        "search": {},
        "kept": "trained",
        "shown": 20000,
        "before": {"mean_cosine": 0.5},
        "after": {"mean_cosine": 0.25},
        **report,
    }
    describe_training(model, clusters, whole)
    model.save(str(folder))
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_corpus_without_topics(model_path: str, tmp_path: Path) -> None:
    card = describe(model_path, tmp_path / "out", NO_TOPICS, prompt="query: ")
    assert "### Topics" not in card
    assert "123,456 distinct sentences, without labels" in section(card, "Corpus")
    assert "Clustered: 100 sentences in 2 clusters" in section(card, "Corpus")
    assert "after the prompt `'query: '`" in section(card, "Corpus")
    assert "no topics" in section(card, "Limits")
    assert "topics may be lost" not in card
    in_batch = cited(MultipleNegativesRankingLoss(SentenceTransformer(model_path)).citation)
    assert cited(card) == {"reimers-2019-sentence-bert", "tibshirani2005cluster"} | in_batch


def test_a_training_that_was_undone_is_told(model_path: str, tmp_path: Path) -> None:
    search = {"before": 0.5, "after": 0.4}
    card = describe(model_path, tmp_path / "worse", NO_TOPICS, views="span", search=search, kept="start")
    assert "these are the weights of the start" in section(card, "Limits")
    assert ["0.500", "0.400"] in table(section(card, "Before and after")).values()
    assert {"lee2019latent", "wortsman2022robust"} <= cited(card)
    assert "mean of those before and after" not in card
    card = describe(model_path, tmp_path / "better", NO_TOPICS, views="span", search={"before": 0.4, "after": 0.5})
    assert "weights of the start" not in card
    assert "mean of those before and after" in section(card, "Corpus")


class Judge(SpanRetrievalEvaluator):
    """Gives the scores that it is told to give."""

    primary_metric = "found"

    def __init__(self, *scores: float) -> None:
        self.scores = iter(scores)

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        scores = {"found": next(self.scores)}
        self.store_metrics_in_model_card_data(model, scores, epoch, steps)
        return scores


@pytest.mark.parametrize(("after", "saved"), [(0.4, 0.5), (0.6, 0.6)])
def test_the_card_has_the_score_of_the_weights_that_are_saved(model_path: str, after: float, saved: float) -> None:
    model, judge = SentenceTransformer(model_path), Judge(0.5, after)
    start = model.encode(DISTINCT[:3])

    def train() -> list[dict[str, float]]:
        with torch.no_grad():
            model[0].model.embeddings.word_embeddings.weight.add_(1)
        return [{"epoch": 1.0, "step": 8}]

    assert module._train_judged(model, train, judge)[1] == {"before": 0.5, "after": after}
    assert model.model_card_data.eval_results_dict == {judge: {"found": saved}}
    assert [entry["Step"] for entry in model.model_card_data.training_logs] == [0, 8]
    assert np.allclose(model.encode(DISTINCT[:3]), start) == (saved == 0.5)


def test_the_loss_cites_what_its_settings_use(model_path: str) -> None:
    model = SentenceTransformer(model_path)
    clusters = CorpusClusters.fit(DISTINCT, model, 8, show_progress_bar=False)
    both, masked = ClusterNSLoss(model, clusters), ClusterNSLoss(model, clusters, pull_weight=0)
    assert cited(both.citation) == {"deng2023clusteringaware", "li2021prototypical", "bertinetto2020making"}
    assert cited(masked.citation) == {"deng2023clusteringaware"}
    plain = ClusterNSLoss(model, CorpusClusters.fit(NO_TOPICS, model, 2, show_progress_bar=False))
    assert cited(plain.citation) == cited(MultipleNegativesRankingLoss(model).citation)
