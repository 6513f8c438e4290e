"""Every kind of model by every way: it trains and evaluates right, or is refused before anything is touched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import cli, topic_sentences
from datasets import Dataset, DatasetDict
from model_kinds import KINDS, WAYS, Kind, import_peft, table, words
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights
from tiny_bert import WORDS

from st_clusterns import CachedClusterNSLoss, ClusterDataLoader, ClusterNSLoss, CorpusClusters, Recipe, adapt
from st_clusterns.clustering.embedding import describe_model, embed_corpus
from st_clusterns.evaluation.evaluate import evaluate
from st_clusterns.evaluation.scores import score_clustering
from st_clusterns.losses.contrastive import ContrastiveLoss
from st_clusterns.models import check_full_precision
from st_clusterns.training import adapt as training
from st_clusterns.training.report import describe_embeddings
from st_clusterns.training.sampler import ClusterBatchSampler

# accelerate warns about pinned memory where there is no GPU; nothing of ours decides it
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::DeprecationWarning", "ignore::FutureWarning")

SENTENCES = topic_sentences(96)
RECIPE = Recipe(batch_size=16, max_steps=4, learning_rate=1e-3, max_length=12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where each kind is saved; made once."""
    root, made = tmp_path_factory.mktemp("kinds"), dict[str, Path]()

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = root / str(len(made)) / "model"
            made[name].parent.mkdir()
            KINDS[name].build(made[name])
        return made[name]

    return folder_of


def load(kind: Kind, folder: Path) -> Any:
    if "SparseEncoder" in str(kind.refused):
        return SparseEncoder(str(folder), device="cpu")
    return SentenceTransformer(str(folder), device="cpu", **kind.load)


def train(model: Any, loss_class: type[ClusterNSLoss], output: Path, **settings: Any) -> None:
    """As README's trainer example; what the model needs besides is in the table's notes."""
    clusters = CorpusClusters.fit(SENTENCES, model, 4, show_progress_bar=False)
    router = type(model[0]).__name__ == "Router"
    args = SentenceTransformerTrainingArguments(
        output_dir=str(output),
        max_steps=4,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        prompts=clusters.prompt or None,
        router_mapping={"sentence": model[0].default_route} if router else None,
    )
    dataset = Dataset.from_dict({"sentence": SENTENCES})
    trainer = SentenceTransformerTrainer(model, args, dataset, loss=loss_class(model, clusters, **settings))
    trainer.train()
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def by_fit(model: Any, kind: Kind, folder: Path, tmp_path: Path) -> Path:
    loader = ClusterDataLoader(SENTENCES, model, 16, 4, show_progress_bar=False)
    loss = ClusterNSLoss(model)
    settings = {"optimizer_params": {"lr": 1e-3}, "warmup_steps": 0, "show_progress_bar": False}
    model.fit([(loader, loss)], epochs=1, steps_per_epoch=4, checkpoint_path=str(tmp_path / "checkpoints"), **settings)
    model.save(str(tmp_path / "out"))
    return tmp_path / "out"


def by_trainer(model: Any, kind: Kind, folder: Path, tmp_path: Path) -> Path:
    train(model, ClusterNSLoss, tmp_path)
    model.save(str(tmp_path / "out"))
    return tmp_path / "out"


def by_cached(model: Any, kind: Kind, folder: Path, tmp_path: Path) -> Path:
    train(model, CachedClusterNSLoss, tmp_path, mini_batch_size=5)
    model.save(str(tmp_path / "out"))
    return tmp_path / "out"


def by_command(model: Any, kind: Kind, folder: Path, tmp_path: Path) -> Path:
    by_name = "truncate_dim" not in kind.load
    code = "trust_remote_code" in kind.load
    subject = str(folder) if by_name else model
    adapt(subject, SENTENCES, tmp_path / "out", 4, RECIPE, show_progress=False, trust_remote_code=code)
    return tmp_path / "out"


def by_evaluate(model: Any, kind: Kind, folder: Path, tmp_path: Path) -> Path:
    labels = [sentence.split()[0] for sentence in SENTENCES]
    rows = "".join(f"{label}\t{text}\n" for label, text in zip(labels, SENTENCES, strict=True))
    (tmp_path / "texts.tsv").write_text("label\ttext\n" + rows)
    settings: dict[str, Any] = {"tasks": (), "clustering": [tmp_path / "texts.tsv"], "restarts": 1}
    [record] = evaluate(model, "tiny", tmp_path / "scores", **settings, say=lambda line: None)
    direct = score_clustering(model.encode(SENTENCES, batch_size=32), labels, 1, 0)
    assert record["values"]["v_measure"] == pytest.approx(direct["v_measure"], abs=1e-3)
    return folder


RUN: dict[str, Callable[..., Path]] = {
    "fit": by_fit,
    "trainer": by_trainer,
    "cached": by_cached,
    "command": by_command,
    "evaluate": by_evaluate,
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "write_files", lambda *args: args[3].write_bytes(b"a page"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_model_by_a_way(
    name: str, way: str, folders: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if "LoRA" in name:
        import_peft()
    kind = KINDS[name]
    folder = folders(name)
    if way in kind.refused:
        assert_refused(kind, way, folder, tmp_path)
        return
    model = load(kind, folder)
    before, formats = embed(model), formats_of(model)
    frozen = frozen_of(model)
    out = RUN[way](model, kind, folder, tmp_path)
    assert "No sentence of the first batch" not in caplog.text, "the loss recognises what was clustered"
    if way == "evaluate":
        assert describe_model(model) == describe_model(load(kind, folder))
        return
    trained = load(kind, out)
    assert not np.allclose(before, embed(trained), atol=1e-5), "training changed nothing"
    np.testing.assert_array_equal(embed(trained), embed(trained), "embedding is not deterministic")
    if way != "command":
        np.testing.assert_allclose(embed(model), embed(trained), atol=1e-5, err_msg="what is saved is not the model")
    assert formats_of(trained) == formats
    assert settings_of(trained) == settings_of(load(kind, folder))
    for key, value in frozen.items():
        assert torch.equal(value, trained.state_dict()[key]), key


def assert_refused(kind: Kind, way: str, folder: Path, tmp_path: Path) -> None:
    """Before the model is changed, and before anything is written."""
    model = load(kind, folder)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=kind.refused[way]):
        RUN[way](model, kind, folder, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"texts.tsv"}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert settings_of(model) == settings_of(load(kind, folder))


def embed(model: SentenceTransformer) -> np.ndarray:
    return embed_corpus(SENTENCES[:20], model, show_progress_bar=False)


def formats_of(model: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


def frozen_of(model: Any) -> dict[str, torch.Tensor]:
    """The weights below an adapter."""
    adapters = any("lora" in key for key in model.state_dict())
    return {key: value.clone() for key, value in model.state_dict().items() if adapters and "lora" not in key}


def settings_of(model: Any) -> dict[str, Any]:
    names = ("max_seq_length", "default_prompt_name", "prompts", "truncate_dim", "training", "similarity_fn_name")
    return {name: getattr(model, name, None) for name in names}


# Half precision


HALF = pytest.mark.parametrize("name", ["float16 weights", "bfloat16 weights"])


@HALF
def test_half_precision_is_trained_as_float32_and_rounded_once(
    name: str, folders: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also after an interrupt, which the checkpoints in float32 do not round."""
    caplog.set_level("INFO", "st_clusterns")
    folder = str(folders(name))
    half, full = SentenceTransformer(folder, device="cpu"), SentenceTransformer(folder, device="cpu").float()
    dtype = next(half.parameters()).dtype
    assert dtype in (torch.float16, torch.bfloat16)
    settings: dict[str, Any] = {"n_clusters": 4, "recipe": RECIPE, "show_progress": False}
    adapt(half, SENTENCES, tmp_path / "half", **settings)
    assert caplog.text.count(f"are in {dtype}: they are trained in float32 and saved in {dtype}") == 1
    adapt(full, SENTENCES, tmp_path / "full", **settings)
    with pytest.MonkeyPatch.context() as patch:
        steps = count_steps(patch, stop_at=3)
        with pytest.raises(KeyboardInterrupt):
            adapt(folder, SENTENCES, tmp_path / "stopped", **settings)
    with pytest.MonkeyPatch.context() as patch:
        steps = count_steps(patch)
        adapt(folder, SENTENCES, tmp_path / "stopped", **settings)
    assert len(steps) == 2, "from checkpoint-2"
    saved = {out: load(KINDS[name], tmp_path / out).state_dict() for out in ("half", "full", "stopped")}
    start = load(KINDS[name], folders(name)).state_dict()
    for key, value in saved["full"].items():
        assert saved["half"][key].dtype == start[key].dtype
        assert torch.equal(saved["half"][key], value.to(start[key].dtype)), key
        assert torch.equal(half.state_dict()[key], saved["half"][key]), "the model itself, trained in place"
        assert torch.equal(saved["stopped"][key], saved["half"][key]), key
    assert formats_of(load(KINDS[name], tmp_path / "full")) == {torch.float32}


def count_steps(patch: pytest.MonkeyPatch, stop_at: int = 0) -> list[int]:
    forward, steps = ContrastiveLoss.forward, list[int]()

    def counted(self: ContrastiveLoss, *args: Any) -> Any:
        steps.append(1)
        if len(steps) == stop_at:
            raise KeyboardInterrupt
        return forward(self, *args)

    patch.setattr(ContrastiveLoss, "forward", counted)
    return steps


@HALF
def test_the_report_describes_the_model_that_is_saved(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    report = adapt(str(folders(name)), SENTENCES, tmp_path / "out", 4, RECIPE, show_progress=False)
    start, saved = (
        SentenceTransformer(str(folder), device="cpu").float() for folder in (folders(name), tmp_path / "out")
    )
    start.max_seq_length = saved.max_seq_length = RECIPE.max_length  # one length for clusters, training and report
    ids = CorpusClusters.fit(SENTENCES, start, 4, show_progress_bar=False).ids
    assert report["after"] == pytest.approx(describe_embeddings(saved.encode(SENTENCES), ids), abs=1e-5)


def test_frozen_bfloat16_below_an_adapter_is_no_half_precision_training() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2).bfloat16().requires_grad_(False), torch.nn.Linear(2, 2)])
    check_full_precision(model)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"weights are in torch\.bfloat16"):
        check_full_precision(model)
    model[0].half().requires_grad_(False)
    with pytest.raises(ValueError, match=r"weights are in torch\.float16"):
        check_full_precision(model)


# Adapters, custom code, word vectors


def test_a_saved_adapter_goes_on_training_alone(folders: Callable[[str], Path], tmp_path: Path) -> None:
    import_peft()
    folder = folders("LoRA adapter")
    adapt(str(folder), SENTENCES, tmp_path / "out", 4, RECIPE, show_progress=False)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists(), "the weights below are not saved a second time"
    before, after = (load(KINDS["LoRA adapter"], path).state_dict() for path in (folder, tmp_path / "out"))
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert any("lora_B" in key for key in changed)
    assert all("lora" in key for key in changed)


@pytest.mark.parametrize("name", ["BERT", "bfloat16 weights"])
def test_a_new_adapter_is_trained_and_saved_alone(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The weights below stay in their folder and format; an interrupted run goes on to the same adapter."""
    import_peft()
    settings: dict[str, Any] = {"n_clusters": 4, "recipe": RECIPE, "show_progress": False, "lora": 2}
    adapt(str(folders(name)), SENTENCES, tmp_path / "out", **settings)
    with pytest.MonkeyPatch.context() as patch:
        count_steps(patch, stop_at=4)
        with pytest.raises(KeyboardInterrupt):
            adapt(str(folders(name)), SENTENCES, tmp_path / "stopped", **settings)
    adapt(str(folders(name)), SENTENCES, tmp_path / "stopped", **settings)
    before = load(KINDS[name], folders(name))
    trained, stopped = (SentenceTransformer(str(tmp_path / out), device="cpu") for out in ("out", "stopped"))
    assert not np.allclose(embed(before), embed(trained), atol=1e-5)
    lora = {key: value for key, value in trained.state_dict().items() if "lora" in key}
    assert {value.shape[0] for key, value in lora.items() if "lora_A" in key} == {2}
    # transformers reads an adapter in the format of the weights below it: from a checkpoint as well
    rounding = 0 if name == "BERT" else 2**-7
    for key, value in lora.items():
        torch.testing.assert_close(
            stopped.state_dict()[key], value, rtol=rounding, atol=rounding * RECIPE.learning_rate
        )
    below = [value for key, value in trained.state_dict().items() if "lora" not in key]
    assert all(torch.equal(*pair) for pair in zip(below, before.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("name", "rank", "message"),
    [
        ("BERT", 0, "lora=0 must be the rank"),
        ("LoRA adapter", 2, "lora=2 needs a model with a transformer and without"),
        ("word vectors", 2, "lora=2 needs a model with a transformer"),
    ],
)
def test_adapters_that_cannot_be_added(
    name: str, rank: int, message: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    import_peft()
    with pytest.raises(ValueError, match=message):
        adapt(str(folders(name)), SENTENCES, tmp_path / "out", 4, RECIPE, lora=rank)
    assert not list(tmp_path.iterdir())


def test_custom_code_runs_only_when_asked_for_and_is_saved_with_the_model(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    KINDS["custom code"].build(folder)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES))
    command = ["train", "--corpus", corpus, "--model", folder, "--output", tmp_path / "out", "--n-clusters", 4]
    command += ["--batch-size", 16, "--max-steps", 1]
    code, text = cli(*command)
    assert code == 2
    assert "trust_remote_code" in text
    assert not (tmp_path / "out.partial").exists()
    code, text = cli(*command, "--trust-remote-code")
    assert code == 0, text
    assert (tmp_path / "out" / "modeling_mine.py").is_file()
    shutil.rmtree(folder)
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu", trust_remote_code=True)
    assert type(model[0].auto_model).__name__ == "MyModel"


@pytest.mark.parametrize("frozen", [False, True])
def test_trained_weights_that_saving_loses_are_told(
    frozen: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`WordWeights` loads those that it was made with."""
    weights = WordWeights(["PADDING", *WORDS], dict.fromkeys(WORDS[::2], 0.5)).requires_grad_(not frozen)
    words(lambda: weights, lambda: Pooling(24))(tmp_path / "model")
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    model[1].requires_grad_(not frozen)
    adapt(model, SENTENCES, tmp_path / "out", 4, RECIPE, show_progress=False)
    told = "1 trained weights are lost in the saved model (1.emb_layer.weight)" in caplog.text
    same = np.array_equal(embed(model), embed(SentenceTransformer(str(tmp_path / "out"), device="cpu")))
    assert (told, same) == (not frozen, frozen)


@pytest.mark.parametrize("name", KINDS)
def test_two_views_without_dropout_are_what_encode_returns(name: str, folders: Callable[[str], Path]) -> None:
    """Every row of every feature is doubled: the lengths that an LSTM reads as well."""
    if set(KINDS[name].refused) >= {"trainer"}:
        pytest.skip("refused")
    model = load(KINDS[name], folders(name))
    clusters = CorpusClusters.fit(SENTENCES, model, 4, show_progress_bar=False)
    loss = ClusterNSLoss(model, clusters)
    model.eval()
    with torch.no_grad():
        views = loss.embed_twice(model.preprocess(SENTENCES[:7], prompt=clusters.prompt))
    for view in views:
        torch.testing.assert_close(view, torch.tensor(model.encode(SENTENCES[:7])), rtol=1e-4, atol=1e-5)


# Several data sets in one training


def test_topics_train_beside_scored_pairs(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """By the sampler that groups clusters, whose column the pairs lack; and scored pairs evaluate."""
    model = load(KINDS["BERT"], folders("BERT"))
    clusters = CorpusClusters.fit(SENTENCES, model, 4, show_progress_bar=False)
    scores = [(place % 10) / 10 for place in range(48)]
    pairs = {"sentence1": SENTENCES[:48], "sentence2": SENTENCES[48:], "score": scores}
    data = {
        "topics": Dataset.from_dict({"sentence": SENTENCES, "label": clusters.ids.tolist()}),
        "pairs": Dataset.from_dict(pairs),
    }
    seen: dict[str, list[list[float]]] = {"topics": [], "pairs": []}
    losses = {"topics": ClusterNSLoss(model, clusters), "pairs": CoSENTLoss(model)}
    for name, loss in losses.items():
        loss.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[1].tolist()))
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        eval_strategy="steps",
        eval_steps=8,
        per_device_train_batch_size=16,
        batch_sampler=partial(ClusterBatchSampler, group_size=8),
        multi_dataset_batch_sampler="round_robin",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(model, args, DatasetDict(data), DatasetDict(pairs=data["pairs"]), loss=losses)
    trainer.train()
    assert all(np.isfinite(value) for entry in trainer.state.log_history for value in entry.values())
    assert all(len(set(labels)) <= 3 for labels in seen["topics"]), "groups of 8 rows of one cluster"
    np.testing.assert_allclose(np.sort(np.ravel(seen["pairs"][:3])), sorted(scores), atol=1e-6)


def test_the_table_in_the_docs_is_the_matrix() -> None:
    page = Path(__file__).parent.parent / "docs" / "models.md"
    assert table() in page.read_text(encoding="utf-8"), "python tests/model_kinds.py writes it anew"
