"""Rows of about one length are embedded together: the embeddings are those of the batch, for less padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_kinds import KINDS
from sentence_transformers import SentenceTransformer
from tiny_bert import load_model, make_sentences, save_bert
from torch import nn

from st_clusterns.losses.lengths import GROUP, embed_by_length
from st_clusterns.models import resolve_prompt


def texts(count: int = 3 * GROUP + 5) -> list[str]:
    long = make_sentences(count, lengths=(12, 16))
    return [text if place % 4 == 0 else " ".join(text.split()[: 1 + place % 3]) for place, text in enumerate(long)]


# A CNN reads the padding, so its embeddings change with the batch anyway.
@pytest.mark.parametrize(
    "name", [name for name, kind in KINDS.items() if "trainer" not in kind.refused and name != "CNN"]
)
def test_the_embeddings_and_their_gradients_are_those_of_the_batch(name: str, tmp_path: Path) -> None:
    """Whatever the side of the padding, and also for models that have none."""
    KINDS[name].build(tmp_path / "model")
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu", **KINDS[name].load).eval()
    prompt = resolve_prompt(model)
    weights = torch.randn(len(texts()), model.get_embedding_dimension())
    found: list[Any] = []
    for embed in (
        lambda features: model(features)["sentence_embedding"],
        lambda features: embed_by_length(model, features),
    ):
        model.zero_grad()
        rows = embed(model.preprocess(texts(), **({"prompt": prompt} if prompt else {})))
        (rows * weights).sum().backward()
        found.append((rows.detach(), [w.grad.clone() for w in model.parameters() if w.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_less_padding_is_read(tmp_path: Path) -> None:
    model, read = load_model(save_bert(tmp_path / "bert")), []
    features = model.preprocess(texts())
    model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]["attention_mask"]))
    embed_by_length(model, features)
    assert [len(mask) for mask in read] == [GROUP] * 3 + [5]
    assert sum(int(mask.sum()) for mask in read) == int(features["attention_mask"].sum())
    assert sum(mask.numel() for mask in read) < 0.6 * features["attention_mask"].numel()


class Reader(nn.Module):
    """Notes what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[dict[str, Any]] = []

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        self.read.append(features)
        return {"sentence_embedding": features["input_ids"].float()[:, :1]}


def test_other_features_go_with_their_rows() -> None:
    model = Reader()
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]]).repeat(20, 1)
    features = {
        "input_ids": torch.arange(180).reshape(60, 3),
        "attention_mask": mask,
        "lengths": mask.sum(dim=1),
        "prompt_length": 1,
        "scale": torch.tensor(2.0),
    }
    torch.testing.assert_close(embed_by_length(model, features)[:, 0], torch.arange(0, 180, 3.0))
    for part in model.read:
        assert torch.equal(part["lengths"], part["attention_mask"].sum(dim=1))
        assert part["input_ids"].shape == part["attention_mask"].shape
        assert (part["prompt_length"], part["scale"]) == (1, 2)
    nothing = {name: value[1::3] for name, value in features.items() if name in ("input_ids", "attention_mask")}
    assert len(embed_by_length(model, nothing)) == 20, "rows without any token are read as they are"


def test_a_gpu_reads_the_batch_at_once() -> None:
    model = Reader()
    features = {"input_ids": torch.ones(99, 3, device="meta"), "attention_mask": torch.ones(99, 3, device="meta")}
    embed_by_length(model, features)
    assert [part["input_ids"] is features["input_ids"] for part in model.read] == [True]
