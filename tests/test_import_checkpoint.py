"""A checkpoint in the authors' layout becomes the model that it holds, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import cli
from prompt_models import DIMENSION, SENTENCES, TEMPLATES, save_backbone, slow_prompt_embedding
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from st_clusterns.import_checkpoint import import_checkpoint
from st_clusterns.losses.presets import BERT_TEMPLATES, ROBERTA_TEMPLATES

PRESETS = {"bert": "paper/bert-base", "roberta": "paper/roberta-base"}
PROMPT_PRESETS = {"bert": "paper/prompt-bert-base", "roberta": "paper/prompt-roberta-base"}


def save_checkpoint(
    family: str, folder: Path, change: Callable[[dict[str, Tensor]], Any] | None = None, safe: bool = False
) -> Path:
    """Write what the authors' `Trainer` writes: a model with heads, its config and its tokenizer."""
    save_backbone(family, folder)
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False).state_dict()
    weights = {f"{family}.{name}": value for name, value in encoder.items()}
    weights[f"{family}.embeddings.position_ids"] = torch.arange(40)[None]
    weights["mlp.dense.weight"], weights["mlp.dense.bias"] = torch.randn(DIMENSION, DIMENSION), torch.randn(DIMENSION)
    weights["cluster.centroid"] = torch.randn(4, DIMENSION)
    if change is not None:
        change(weights)
    (folder / "model.safetensors").unlink()
    if safe:
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


@torch.no_grad()
def first_token_state(folder: Path, sentence: str) -> Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)(sentence, truncation=True, max_length=32, return_tensors="pt")
    network = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    state: Tensor = network(**tokens).last_hidden_state[0, 0]
    return state


@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
@pytest.mark.parametrize("family", PRESETS)
def test_embeddings_are_the_first_tokens_states(family: str, safe: bool, tmp_path: Path) -> None:
    encoder = save_backbone(family, tmp_path / "encoder")  # the same weights
    source = save_checkpoint(family, tmp_path / "source", safe=safe)
    code, said = cli("import-checkpoint", source, tmp_path / "out", "--preset", PRESETS[family])
    assert code == 0, said
    assert "Transformer + Pooling" in said
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    expected = [first_token_state(encoder, text) for text in SENTENCES]
    np.testing.assert_allclose(model.encode(SENTENCES), torch.stack(expected), atol=1e-5)
    heads = torch.load(source / "pytorch_model.bin") if not safe else None
    if heads is not None:
        assert torch.equal(model[0].auto_model.pooler.dense.weight, heads["mlp.dense.weight"])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert PRESETS[family] in card
    assert "deng2023clusteringaware" in card
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("family", PROMPT_PRESETS)
def test_a_prompt_checkpoint_becomes_the_prompt_model(family: str, standard: bool, tmp_path: Path) -> None:
    encoder = save_backbone(family, tmp_path / "encoder")
    source = save_checkpoint(family, tmp_path / "source")
    words = ["--preset", PROMPT_PRESETS[family], *(["--standard"] if standard else [])]
    code, said = cli("import-checkpoint", source, tmp_path / "out", *words)
    assert code == 0, said
    assert ("trust_remote_code=True" in said) != standard
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu", trust_remote_code=not standard)
    template = {"bert": BERT_TEMPLATES, "roberta": ROBERTA_TEMPLATES}[family][0]
    expected = [slow_prompt_embedding(encoder, template, text, 32, bias=False) for text in SENTENCES]
    np.testing.assert_allclose(model.encode(SENTENCES), torch.stack(expected), atol=1e-5)


def test_another_template_wins_over_the_presets(tmp_path: Path) -> None:
    source = save_checkpoint("bert", tmp_path / "source")
    model = import_checkpoint(source, tmp_path / "out", "paper/prompt-bert-base", TEMPLATES["bert"][1])
    assert model[0].template == TEMPLATES["bert"][1]


def rename(weights: dict[str, Tensor]) -> None:
    weights["bert.encoder.layer.0.attention.novel.weight"] = weights.pop("bert.encoder.layer.1.output.dense.weight")
    weights["p_mbv"] = torch.zeros(1)
    weights["bert.embeddings.LayerNorm.bias"] = torch.zeros(3)
    del weights["mlp.dense.bias"]


BAD = {
    "weights": (
        lambda folder: save_checkpoint("bert", folder, rename),
        r"unknown: bert\.encoder\.layer\.0\.attention\.novel\.weight, p_mbv; missing: "
        r"bert\.encoder\.layer\.1\.output\.dense\.weight, mlp\.dense\.bias; of another shape: "
        r"bert\.embeddings\.LayerNorm\.bias: \(3,\) instead of \(32,\)",
    ),
    "plain checkpoint": (lambda folder: save_backbone("bert", folder), "unknown: embeddings.LayerNorm"),
    "other family": (lambda folder: save_checkpoint("roberta", folder), "is a bert model, .* is of 'roberta'"),
    "no config": (lambda folder: folder.mkdir(), "config.json is missing"),
    "no weights": (
        lambda folder: (save_checkpoint("bert", folder) / "pytorch_model.bin").unlink(),
        "holds neither model.safetensors nor pytorch_model.bin",
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in save_checkpoint("bert", folder).glob("tokenizer*")],
        "has no tokenizer.json, .*: copy the tokenizer of google-bert/bert-base-uncased",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    save, message = BAD[case]
    save(tmp_path / "source")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        import_checkpoint(tmp_path / "source", tmp_path / "out", "paper/bert-base")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    for words, message in (
        ([tmp_path, tmp_path / "new", "--preset", "paper/bert"], "There is no preset 'paper/bert'"),
        ([tmp_path, tmp_path, "--preset", "paper/bert-base"], "exists already"),
        ([tmp_path, tmp_path / "new"], "--preset"),
    ):
        code, said = cli("import-checkpoint", *words)
        assert code == 2
        assert message in said
