"""A prompt is read by all or by none: clusters, training, report, evaluators and the later `encode`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import cli, topic_sentences
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import Pooling, Router, StaticEmbedding, Transformer
from tiny_bert import DIMENSION, make_tokenizer, save_bert

from st_clusterns import CachedClusterNSLoss, ClusterDataLoader, ClusterNSLoss, CorpusClusters, Recipe, adapt
from st_clusterns.evaluation.evaluators import LabelFreeEvaluator
from st_clusterns.losses.text_hashes import hash_sentences
from st_clusterns.models import reading_at_most, resolve_prompt, set_default_prompt
from st_clusterns.training import adapt as training

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning", "ignore::FutureWarning")

SENTENCES = topic_sentences(96)
TOPIC, OTHER = "w190 w191 w192 ", "w180 "
RECIPE = Recipe(batch_size=16, max_steps=3, learning_rate=1e-3)
Rows = set[tuple[int, ...]]

# arguments of the call, the default prompt of the model, and what is read
CASES: dict[str, tuple[dict[str, str], str | None, str]] = {
    "nothing": ({}, None, ""),
    "the model's default": ({}, "topic", TOPIC),
    "a name": ({"prompt_name": "other"}, "topic", OTHER),
    "a text": ({"prompt": "w170 w171 "}, None, "w170 w171 "),
    "the text of a name": ({"prompt": OTHER}, "topic", OTHER),
    "none in place of the default": ({"prompt": ""}, "topic", ""),
}
cases = pytest.mark.parametrize(("given", "default", "prompt"), CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "write_files", lambda *args: args[3].write_bytes(b"a page"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def load(bert: Path, default: str | None = None, include_prompt: bool = True) -> SentenceTransformer:
    modules = [Transformer(str(bert)), Pooling(DIMENSION, include_prompt=include_prompt)]
    prompts = {"topic": TOPIC, "other": OTHER}
    return SentenceTransformer(modules=modules, device="cpu", prompts=prompts, default_prompt_name=default)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int | None, Rows]]:
    """What reaches a transformer: whether in a training step, the length of the prompt, and the tokens of each row."""
    seen: list[tuple[bool, int | None, Rows]] = []
    forward = Transformer.forward

    def watched(self: Transformer, features: dict[str, Any], **settings: Any) -> Any:
        rows = zip(features["input_ids"].tolist(), features["attention_mask"].bool().tolist(), strict=True)
        texts = {tuple(token for token, real in zip(*row, strict=True) if real) for row in rows}
        seen.append((torch.is_grad_enabled(), features.get("prompt_length"), texts))
        return forward(self, features, **settings)

    monkeypatch.setattr(Transformer, "forward", watched)
    return seen


def expected(bert: Path, prompt: str, length: int = 16) -> Rows:
    """The tokens of the sentences with the prompt, from the tokenizer alone."""
    tokenizer = make_tokenizer()
    return {tuple(tokenizer(prompt + text, truncation=True, max_length=length)["input_ids"]) for text in SENTENCES}


def union(seen: list[tuple[bool, int | None, Rows]], training: bool) -> Rows:
    return set[tuple[int, ...]]().union(*(rows for step, _, rows in seen if step == training))


@cases
def test_adapt_reads_one_text_all_along(
    given: dict[str, str], default: str | None, prompt: str, bert: Path, tmp_path: Path, read: list[Any]
) -> None:
    report = adapt(load(bert, default), SENTENCES, tmp_path / "out", 4, RECIPE, show_progress=False, **given)
    whole = expected(bert, prompt)
    assert report["prompt"] == prompt
    assert union(read, training=False) == whole, "clusters, report and model card"
    steps = union(read, training=True)
    assert len(steps) > 40
    assert steps <= whole
    read.clear()
    trained = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    LabelFreeEvaluator(SENTENCES, n_clusters=4)(trained)
    assert union(read, training=False) == whole, "embeddings and dropout views"
    read.clear()
    trained.encode(SENTENCES)
    assert union(read, training=False) == whole
    assert trained.prompts.items() >= {"topic": TOPIC, "other": OTHER}.items(), "its other prompts"


@cases
def test_fit_reads_one_text_all_along(
    given: dict[str, str], default: str | None, prompt: str, bert: Path, tmp_path: Path, read: list[Any]
) -> None:
    model = load(bert, default)
    loader = ClusterDataLoader(SENTENCES, model, 16, 4, show_progress_bar=False, **given)
    whole = expected(bert, prompt)
    assert union(read, training=False) == whole
    loss = ClusterNSLoss(model)
    assert model.default_prompt_name == default, "a loader does not change the model"
    settings: dict[str, Any] = {"warmup_steps": 0, "show_progress_bar": False, "checkpoint_path": str(tmp_path)}
    model.fit([(loader, loss)], epochs=1, steps_per_epoch=3, **settings)
    steps = union(read, training=True)
    assert len(steps) > 40
    assert steps <= whole
    known = hash_sentences(model, [prompt + text for text in SENTENCES])
    assert known is not None
    assert torch.equal(known.sort().values, loss.known_texts), "the loss recognises them"


def train(model: SentenceTransformer, loss: Any, output: Path, prompts: Any) -> None:
    args = SentenceTransformerTrainingArguments(
        output_dir=str(output),
        max_steps=3,
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        prompts=prompts,
    )
    SentenceTransformerTrainer(model, args, Dataset.from_dict({"sentence": SENTENCES}), loss=loss).train()


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("loss_class", [ClusterNSLoss, CachedClusterNSLoss])
def test_the_trainer_reads_the_prompt_and_pools_as_encode_does(
    loss_class: type[ClusterNSLoss],
    include_prompt: bool,
    bert: Path,
    tmp_path: Path,
    read: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(bert, "topic", include_prompt)
    clusters = CorpusClusters.fit(SENTENCES, model, 4, show_progress_bar=False)
    assert clusters.prompt == TOPIC
    read.clear()
    recognised: list[bool] = []
    prepare = ClusterNSLoss.prepare

    def watched(self: ClusterNSLoss, embeddings: list[Any], texts: Any = None) -> Any:
        recognised.append(bool(torch.isin(texts[0], self.known_texts).all()))
        return prepare(self, embeddings, texts)

    monkeypatch.setattr(ClusterNSLoss, "prepare", watched)
    train(model, loss_class(model, clusters), tmp_path, clusters.prompt)
    assert recognised == [True] * 3
    assert {length for step, length, _ in read if step} == {4}, "[CLS] and three words"
    assert union(read, training=True) <= expected(bert, TOPIC)


@pytest.mark.parametrize("loss_class", [ClusterNSLoss, CachedClusterNSLoss])
@pytest.mark.parametrize("has_topics", [True, False])
def test_a_trainer_without_the_prompt_is_refused_at_the_first_step(
    loss_class: type[ClusterNSLoss], has_topics: bool, bert: Path, tmp_path: Path
) -> None:
    model = load(bert, "topic")
    clusters = replace(CorpusClusters.fit(SENTENCES, model, 4, show_progress_bar=False), has_topics=has_topics)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"clustered with the prompt 'w190 .*pass prompts=clusters\.prompt"):
        train(model, loss_class(model, clusters), tmp_path, None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    train(model, loss_class(model, clusters), tmp_path, clusters.prompt)


def test_a_prompt_that_clustering_did_not_read_is_told(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(bert)
    clusters = replace(CorpusClusters.fit(SENTENCES, model, 4, show_progress_bar=False), has_topics=True)
    train(model, ClusterNSLoss(model, clusters), tmp_path, None)
    assert "No sentence of the first batch" not in caplog.text
    train(model, ClusterNSLoss(model, clusters), tmp_path, OTHER)
    assert caplog.text.count("No sentence of the first batch is one that was clustered") == 1


def test_a_prompt_outside_the_pooling_changes_the_embeddings_of_all_alike(bert: Path) -> None:
    """A canary: `fit`, which cannot leave it out, would train other embeddings."""
    model = load(bert, "topic", include_prompt=False)
    with pytest.raises(
        ValueError, match=r"treats the prompt 'w190 .*SentenceTransformerTrainer, prompts=clusters.prompt"
    ):
        ClusterDataLoader(SENTENCES, model, 16, 4, show_progress_bar=False)
    assert not hasattr(model, "corpus_clusters")
    ClusterDataLoader(SENTENCES, model, 16, 4, show_progress_bar=False, prompt="")


@pytest.mark.parametrize("max_length", [4, 6])
def test_a_prompt_takes_no_room_from_the_sentence(max_length: int, bert: Path, tmp_path: Path, read: list[Any]) -> None:
    """Otherwise a long prompt would leave nothing but itself."""
    recipe = replace(RECIPE, max_length=max_length)
    adapt(load(bert), SENTENCES, tmp_path / "out", 4, recipe, show_progress=False, prompt=TOPIC)
    steps = union(read, training=True)
    assert steps <= expected(bert, TOPIC, max_length + 5)  # three words, and the tokens around a text
    assert max(map(len, steps)) == max_length + 5
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu").max_seq_length == 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "a ", "prompt_name": "topic"}, r"prompt='a ' and prompt_name='topic' are both given"),
        ({"prompt_name": "topics"}, r"prompt_name='topics' is no prompt of the model, which has .*'topic', 'other'"),
    ],
)
@pytest.mark.parametrize("call", ["adapt", "loader", "clusters"])
def test_prompts_that_cannot_be_read(
    call: str, given: dict[str, str], message: str, bert: Path, tmp_path: Path, read: list[Any]
) -> None:
    """Told before anything is embedded or written."""
    model = load(bert)
    calls: dict[str, Callable[[], Any]] = {
        "adapt": lambda: adapt(model, SENTENCES, tmp_path / "out", 4, RECIPE, **given),
        "loader": lambda: ClusterDataLoader(SENTENCES, model, 16, **given),
        "clusters": lambda: CorpusClusters.fit(SENTENCES, model, **given),
    }
    with pytest.raises(ValueError, match=message):
        calls[call]()
    assert not read
    assert not list(tmp_path.iterdir())
    assert model.default_prompt_name is None


def test_a_default_prompt_is_found_again_by_its_text(bert: Path) -> None:
    model = load(bert, "topic")
    assert set_default_prompt(model) == TOPIC
    assert set_default_prompt(model, prompt=OTHER) == OTHER
    assert model.default_prompt_name == "other"
    assert set_default_prompt(model, prompt="new: ") == resolve_prompt(model) == "new: "
    assert model.default_prompt_name == "Clustering"
    assert set_default_prompt(model, prompt="") == resolve_prompt(model) == ""
    assert model.default_prompt_name is None


def test_evaluate_reads_the_prompt_of_the_command(bert: Path, tmp_path: Path, read: list[Any]) -> None:
    load(bert, "topic").save(str(tmp_path / "model"))
    rows = "".join(f"{place % 4}\t{text}\n" for place, text in enumerate(SENTENCES))
    (tmp_path / "texts.tsv").write_text("label\ttext\n" + rows)
    for name, options, prompt in (
        ("default", [], TOPIC),
        ("text", ["--prompt", OTHER], OTHER),
        ("name", ["--prompt-name", "other"], OTHER),
        ("none", ["--prompt", ""], ""),
    ):
        read.clear()
        words = ["evaluate", tmp_path / "model", "--clustering", tmp_path / "texts.tsv", "--restarts", 1]
        code, text = cli(*words, "--output", tmp_path / name, *options)
        assert code == 0, text
        assert union(read, training=False) == expected(bert, prompt), name


def test_lengths_of_all_routes_are_put_back(bert: Path) -> None:
    static = StaticEmbedding(make_tokenizer().backend_tokenizer, embedding_dim=DIMENSION)
    short, long = Transformer(str(bert)), Transformer(str(bert))
    short.max_seq_length = 3
    routes = {"long": [long, Pooling(DIMENSION)], "static": [static], "short": [short, Pooling(DIMENSION)]}
    model = SentenceTransformer(modules=[Router(routes, default_route="long")], device="cpu")
    with reading_at_most(model, 8):
        assert (long.max_seq_length, short.max_seq_length) == (8, 3)
    assert (long.max_seq_length, short.max_seq_length) == (16, 3)


def test_a_router_is_trained_through_its_default_route_alone(bert: Path, tmp_path: Path) -> None:
    routes = {name: [Transformer(str(bert)), Pooling(DIMENSION)] for name in ("query", "document")}
    model = SentenceTransformer(modules=[Router(routes, default_route="document")], device="cpu")
    before = {name: value.clone() for name, value in model.named_parameters()}
    adapt(model, SENTENCES, tmp_path / "out", 4, RECIPE, show_progress=False)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all(".document." in name for name in changed)
    trained = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_array_equal(trained.encode(SENTENCES), model.encode(SENTENCES))
