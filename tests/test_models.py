"""Every kind of model by every way: it trains and evaluates right, or is refused before anything is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import topic_sentences
from datasets import Dataset
from model_kinds import KINDS, WAYS, Kind, table
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)

from st_clusterns import CachedClusterNSLoss, ClusterDataLoader, ClusterNSLoss, CorpusClusters, Recipe, adapt
from st_clusterns.clustering.embedding import describe_model, embed_corpus
from st_clusterns.evaluation.evaluate import evaluate
from st_clusterns.evaluation.scores import score_clustering
from st_clusterns.training import adapt as training

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
        router_mapping={"sentence": "document"} if router else None,
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
    monkeypatch.setattr(training, "draw_report", lambda *args: args[-1].write_bytes(b"a picture"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_model_by_a_way(
    name: str, way: str, folders: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if "LoRA" in name:
        pytest.importorskip("peft")
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


def test_the_table_in_the_docs_is_the_matrix() -> None:
    page = Path(__file__).parent.parent / "docs" / "models.md"
    assert table() in page.read_text(encoding="utf-8"), "python tests/model_kinds.py writes it anew"
