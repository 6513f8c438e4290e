"""What every room asks a model: dimension, prompt, route, what is inside wrappers, and whether it can be trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from sentence_transformers.sentence_transformer.modules import Router
from transformers.utils import cached_file

logger = logging.getLogger(__name__)

CONFIG_FILE = "config_sentence_transformers.json"
OTHER_KIND = "The model is a {}: pass a SentenceTransformer, which has one dense vector for a text."
NOT_LOADED = "The model {!r} could not be loaded: {}. Give its name on the hub, or the folder of a saved model."
HALF = (torch.float16, torch.bfloat16)
PROMPT_NAME = "Clustering"  # of a prompt given as a text; the name that mteb looks up as well


def load_model(name: str, trust_remote_code: bool = False) -> SentenceTransformer:
    """Load a SentenceTransformer by its name on the hub or path.

    A name that cannot be loaded, and a saved model of another kind, are a `ValueError`.
    `trust_remote_code` says whether code that comes with the model may be run.
    """
    with suppress(OSError):  # no such model, which SentenceTransformer explains better
        note = cached_file(name, CONFIG_FILE, _raise_exceptions_for_missing_entries=False)
        if note is not None:
            kind = json.loads(Path(note).read_text(encoding="utf-8")).get("model_type", "SentenceTransformer")
            if kind != "SentenceTransformer":
                raise ValueError(OTHER_KIND.format(kind))
    try:
        return SentenceTransformer(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(NOT_LOADED.format(name, " ".join(str(error).split()).rstrip("."))) from error


def unwrap(model: Any) -> Any:
    """Return the model inside the wrappers of several processes (`module`) and of `torch.compile` (`_orig_mod`)."""
    while inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None):
        model = inner
    return model


def name_of(model: Any) -> str:
    """Return what a model is called: its name on the hub or path, or its class."""
    card = getattr(model, "model_card_data", None)
    return str(getattr(card, "base_model", None) or type(model).__name__)


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
def reading_at_most(model: Any, max_length: int, prompt: str = "") -> Iterator[None]:
    """Let a model read at most so many tokens of a text, besides a prompt, for a while.

    A model without a maximum length of its own is bounded as well, unless it has none that can be set.
    """
    if prompt:
        tokens = model.preprocess([prompt]).get("input_ids")
        max_length += 0 if tokens is None else tokens.shape[-1]
    # A Router comes before its routes here, which have lengths of their own.
    readers = [module for module in model.modules() if hasattr(module, "preprocess") or hasattr(module, "tokenize")]
    full = {module: module.max_seq_length for module in readers if hasattr(module, "max_seq_length")}

    def bound(module: Any, length: int | None) -> None:
        with suppress(AttributeError):  # as of StaticEmbedding, where it is a read-only property
            module.max_seq_length = length

    try:
        for module, length in full.items():
            if module is not model:
                bound(module, max_length if length is None else min(length, max_length))
        yield
    finally:
        for module, length in full.items():
            if module is not model:
                bound(module, length)


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Convert the half-precision weights of a model to float32 for a while, and back to their format at the end."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    formats = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype in HALF}
    try:
        for name in formats:
            tensors[name].data = tensors[name].data.float()
        yield
    finally:
        for name, dtype in formats.items():
            tensors[name].data = tensors[name].data.to(dtype)


def copy_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of a model's weights and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def average_weights(model: Any, others: dict[str, torch.Tensor]) -> None:
    """Set a model's weights to the mean of its own and the others; buffers of whole numbers stay."""
    own = model.state_dict()
    model.load_state_dict(
        {name: value.lerp(others[name], 0.5) if value.is_floating_point() else value for name, value in own.items()}
    )


def half_precision_of(model: Any) -> torch.dtype | None:
    """Return the number format of a model's half-precision weights, if it has any."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.dtype in HALF), None)


def resolve_prompt(model: Any, prompt: str | None = None, prompt_name: str | None = None) -> str:
    """Return the text that a model reads before each sentence: a prompt, that of a name, or by default the model's own.

    `prompt=""` is no prompt. A `ValueError` names the prompts of the model if the name is none of them.
    """
    if prompt is not None and prompt_name is not None:
        raise ValueError(f"prompt={prompt!r} and prompt_name={prompt_name!r} are both given: pass one of them.")
    name = prompt_name if prompt_name is not None else getattr(model, "default_prompt_name", None)
    if prompt is not None or name is None:
        return prompt or ""
    if model is None:
        raise ValueError(f"prompt_name={name!r} needs the model whose prompt it is: pass the model, or prompt=.")
    if name not in model.prompts:
        raise ValueError(
            f"prompt_name={name!r} is no prompt of the model, which has {', '.join(map(repr, model.prompts)) or 'none'}"
            ": choose one of these, or pass the text as prompt=."
        )
    return model.prompts[name] or ""


def set_default_prompt(model: Any, prompt: str | None = None, prompt_name: str | None = None) -> str:
    """Make a prompt the one that `encode` uses by default, here and after saving; return its text.

    Without both arguments the model stays as it is. A text gets the name of the model's prompt that equals it, or else
    "Clustering". `prompt=""` takes the default away.
    """
    text = resolve_prompt(model, prompt, prompt_name)
    if prompt is None and prompt_name is None:
        return text
    names = [prompt_name, *(name for name, known in model.prompts.items() if known == text), PROMPT_NAME]
    model.default_prompt_name = next(name for name in names if name is not None) if text else None
    if text:
        model.prompts[model.default_prompt_name] = text
    return text


def add_lora(model: Any, rank: int, seed: int = 0) -> None:
    """Add a LoRA adapter of that rank to all linear layers of a model's transformer, and freeze all else."""
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ImportError(f"lora={rank} needs peft, which is not installed ({error}): pip install peft.") from error
    if rank < 1:
        raise ValueError(f"lora={rank} must be the rank of an adapter, 1 or more.")
    if not model.has_peft_compatible_model() or any(_has_adapter(module) for module in model.modules()):
        raise ValueError(f"lora={rank} needs a model with a transformer and without an adapter: leave it out.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, target_modules="all-linear"))


def _has_adapter(module: Any) -> bool:
    return bool(getattr(module, "_hf_peft_config_loaded", False))


def unfreeze_adapters(model: Any) -> None:
    """Make the active adapters of a model trainable, which loading freezes."""
    for module in model.modules():
        if _has_adapter(module):
            module.set_adapter(module.active_adapters())


def default_route(model: Any) -> str | None:
    """Return the route that a model with a Router sends a sentence through; None without a Router.

    A Router without a default route is a `ValueError`.
    """
    router = unwrap(model)[0] if isinstance(unwrap(model), SentenceTransformer) else None
    if not isinstance(router, Router):
        return None
    if router.default_route is None:
        raise ValueError(
            f"The model's Router has no default route for plain sentences: set model[0].default_route to one of "
            f"{', '.join(map(repr, router.sub_modules))}."
        )
    return str(router.default_route)


def check_trainable(model: Any) -> None:
    """Refuse, by a `ValueError` that names the remedy, a model that cannot be trained on sentences as it is."""
    check_dense(model)
    check_full_precision(model)
    weights = list(model.parameters())
    if isinstance(unwrap(model), SentenceTransformer) and not any(weight.requires_grad for weight in weights):
        raise ValueError(
            f"None of the model's {len(weights)} weights is trainable: set requires_grad_(True) on those to train "
            "(WordEmbeddings(update_embeddings=True); model.set_adapter(name) for an adapter)."
        )


def check_kind(model: Any) -> None:
    """Refuse, by a `ValueError`, what is no model, and the other kinds of model of sentence-transformers."""
    if model is None or isinstance(model, (str, Path)):
        raise ValueError(f"model must be a SentenceTransformer, got {model!r}: load it by SentenceTransformer(name).")
    if isinstance(model, BaseModel) and not isinstance(model, SentenceTransformer):
        raise ValueError(OTHER_KIND.format(type(model).__name__))


def check_dense(model: Any) -> None:
    """Refuse, by a `ValueError`, a model whose `encode` returns other vectors than the dense ones of its training."""
    check_kind(unwrap(model))
    if "text" not in getattr(unwrap(model), "modalities", ["text"]):
        raise ValueError(f"The model reads {', '.join(map(str, unwrap(model).modalities))}, and no text.")
    if getattr(model, "truncate_dim", None) is not None:
        raise ValueError(
            f"model.truncate_dim={model.truncate_dim} applies to encode(), not to training: set "
            "model.truncate_dim = None before clustering and training, and set it again afterwards."
        )


def check_full_precision(model: Any) -> None:
    """Refuse, by a `ValueError`, to train weights in half precision, in which an optimiser's small steps are lost."""
    trained = (weight.dtype for weight in model.parameters() if weight.requires_grad or weight.dtype == torch.float16)
    half = next((dtype for dtype in trained if dtype in HALF), None)  # frozen bfloat16 below an adapter is fine
    if half is not None:
        raise ValueError(
            f"The model's weights are in {half}, in which small steps of the optimiser are lost: call model.float() "
            "before training, and use mixed precision (bf16=True) to save time."
        )
