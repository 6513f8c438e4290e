"""What every room asks a model: its dimension, what is inside its wrappers, and whether it can be trained as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def unwrap(model: Any) -> Any:
    """Return the model inside the wrappers of several processes (`module`) and of `torch.compile` (`_orig_mod`)."""
    while inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None):
        model = inner
    return model


def dimension_of(model: Any) -> int:
    """Return the embedding dimension of a model; one that does not know it is a `ValueError`."""
    dimension = model.get_embedding_dimension()
    if dimension is None:
        raise ValueError("The model does not know its embedding dimension: get_embedding_dimension() is None.")
    return int(dimension)


def device_of(model: Any) -> torch.device:
    """Return the device of a model's weights."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def same_modes(model: Any) -> Iterator[None]:
    """Restore whether each module is in training mode, which `encode` changes."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def reading_at_most(model: Any, max_length: int) -> Iterator[None]:
    """Let a model read at most so many tokens of a text for a while; one without a maximum length reads whole texts."""
    full = model.max_seq_length
    try:
        model.max_seq_length = max_length if full is None else min(full, max_length)
    except AttributeError:  # as of StaticEmbedding, where it is a read-only property
        yield
        return
    try:
        yield
    finally:
        model.max_seq_length = full


def check_not_truncated(model: Any) -> None:
    """Refuse, by a `ValueError`, a model that truncates embeddings, which `encode` does and training does not."""
    if getattr(model, "truncate_dim", None) is not None:
        raise ValueError(
            f"model.truncate_dim={model.truncate_dim} applies to encode(), not to training: set "
            "model.truncate_dim = None before clustering and training, and set it again afterwards."
        )


def check_full_precision(model: Any) -> None:
    """Refuse, by a `ValueError`, a model in half precision, in which an optimiser's small steps are lost."""
    half = next((p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise ValueError(
            f"The model's weights are in {half}, in which small steps of the optimiser are lost: call model.float() "
            "before training, and use mixed precision (bf16=True) to save time."
        )
