"""The training-only head: between the model and the loss, trained with the model, kept by checkpoints, not saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from prompt_models import SENTENCES, TEMPLATES, save_backbone
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from test_cached import Reader, columns_of, features_of
from test_distributed import columns_at, half, share_of
from tiny_bert import make_sentences
from torch import Tensor
from two_processes import TwoProcesses

from st_clusterns import CachedClusterNSLoss, ClusterNSLoss, ClusterStateCallback
from st_clusterns.losses.contrastive import TrainingHead
from st_clusterns.prompt_encoder import PromptTransformer
from st_clusterns.training.callbacks import load_state, save_state

LOSSES = [ClusterNSLoss, CachedClusterNSLoss]
both_losses = pytest.mark.parametrize("loss_class", LOSSES)


def make(loss_class: Any, model: Any, seed: int = 0, **settings: Any) -> Any:
    small = {"mini_batch_size": 3} if loss_class is CachedClusterNSLoss else {}
    torch.manual_seed(seed)
    numbers = {"n_clusters": 4, "start_similarity": 1.0, "momentum": 0.1, "margin_weight": 1.0, "head": True}
    return loss_class.from_preset(model, "paper/bert-base", **{**numbers, **small, **settings})


def weights_of(loss: Any) -> list[Tensor]:
    return [loss.model.weight, *loss.head.parameters()]


def step(loss: Any, columns: list[dict[str, Tensor]], scale: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """Forward and backward, as with gradient accumulation; return the value and the gradients."""
    loss.zero_grad()
    value = loss([dict(column) for column in columns])
    (scale * value).backward()
    return value.detach(), [weight.grad.clone() for weight in weights_of(loss)]


def test_the_loss_is_that_of_the_projected_embeddings() -> None:
    loss, bare = make(ClusterNSLoss, Reader()), make(ClusterNSLoss, Reader(), head=False)
    bare.model.load_state_dict(loss.model.state_dict())
    for seed in range(3):  # the first batch starts the centroids
        columns = features_of(columns_of(2, seed))
        torch.manual_seed(seed)
        value, gradients = step(loss, columns)
        rows = [loss.model(column)["sentence_embedding"] for column in columns]
        projected = [torch.tanh(row @ loss.head.dense.weight.T + loss.head.dense.bias) for row in rows]
        torch.manual_seed(seed)
        expected = bare.compute_loss_from_embeddings(projected)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradients, list(torch.autograd.grad(expected, weights_of(loss))))
    assert bare.centroids.started
    torch.testing.assert_close(loss.centroids.centroids, bare.centroids.centroids)


@pytest.mark.parametrize("n_columns", [1, 2])
def test_the_cached_loss_trains_the_head_alike(n_columns: int) -> None:
    plain, cached = (make(loss_class, Reader()) for loss_class in LOSSES)
    cached.load_state_dict(plain.state_dict())
    for seed in range(3):
        found = []
        for loss in (plain, cached):
            torch.manual_seed(seed)
            found.append(step(loss, features_of(columns_of(n_columns, seed)), scale=0.25))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
        assert all(float(gradient.abs().max()) > 0 for gradient in found[0][1])


def train_on_share(rank: int, kind: int, processes: int) -> list[list[Tensor]]:
    """The gradients of the head on this rank's share of each batch; the ranks make heads of their own."""
    torch.manual_seed(0)
    model = Reader()
    loss = make(LOSSES[kind], model, rank, gather_across_devices=True, start_similarity=-1.0)
    rows, found = half(rank) if processes == 2 else slice(None), []
    for batch in range(2):
        _, gradients = step(loss, share_of(columns_at(batch, 2, copies=False), rows))
        found.append(gradients[1:])
        with torch.no_grad():
            for weight in loss.head.parameters():
                weight -= 0.1 * weight.grad
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1], ids=["plain", "cached"])
def test_two_processes_train_one_head(pair: TwoProcesses, kind: int) -> None:
    one = train_on_share(0, kind, 1)
    for found in pair.run(train_on_share, kind, 2):
        assert isinstance(found, list), found
        torch.testing.assert_close(found, one, rtol=1e-3, atol=1e-5)


def test_a_head_above_a_frozen_base_in_bfloat16() -> None:
    head = TrainingHead(4)
    rows = torch.ones(2, 4, dtype=torch.bfloat16)
    torch.testing.assert_close(head(rows), head(rows.float()))


def test_narrower_embeddings_are_refused(model: SentenceTransformer) -> None:
    loss = MatryoshkaLoss(model, make(ClusterNSLoss, model), [32, 8])
    with pytest.raises(ValueError, match="head=True reads embeddings of 32 dimensions, got 8: pass head=False"):
        loss([model.preprocess(make_sentences(8)), model.preprocess(make_sentences(8))], None)


def test_a_head_is_kept_with_the_state_of_the_loss(model: SentenceTransformer, tmp_path: Path) -> None:
    loss = make(ClusterNSLoss, model)
    save_state(loss, tmp_path / "state")
    other = make(ClusterNSLoss, model)
    torch.nn.init.normal_(other.head.dense.weight)
    load_state(other, tmp_path / "state")
    torch.testing.assert_close(other.head.state_dict(), loss.head.state_dict())


@both_losses
def test_a_prompt_model_trains_on_two_templates(loss_class: Any, tmp_path: Path) -> None:
    """Both columns hold the sentence; the head is trained, and what is saved embeds without it."""
    first, second = TEMPLATES["bert"]
    prompt = PromptTransformer(str(save_backbone("bert", tmp_path / "bert")), first)
    model = SentenceTransformer(modules=[prompt], device="cpu")
    loss = make(loss_class, model)
    head = {name: weight.clone() for name, weight in loss.head.state_dict().items()}
    start = model.encode(SENTENCES)
    seen: list[list[str]] = []
    loss.register_forward_pre_hook(lambda module, inputs: seen.append([c["template"] for c in inputs[0]]))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        prompts={"sentence": first, "positive": second},
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    texts = make_sentences(24)
    data = Dataset.from_dict({"sentence": texts, "positive": texts})
    trainer = SentenceTransformerTrainer(model, arguments, data, loss=loss, callbacks=[ClusterStateCallback(loss)])
    trainer.train()
    assert seen == [[first, second]] * 3
    assert loss.centroids.started
    assert all(not torch.equal(weight, head[name]) for name, weight in loss.head.state_dict().items())
    after = model.encode(SENTENCES)
    assert abs(after - start).max() > 1e-3
    model.save(str(tmp_path / "saved"))
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert not any("head" in name for name in saved.state_dict())
    assert (saved.encode(SENTENCES) == after).all()
