"""Embeddings of a corpus, in memory or cached on disk: found again by content, and resumed after a kill.

A hash of everything that decides an embedding (the sentences, the model, the number format) names a folder, which
holds one `.npy` file for each chunk of sentences. A file is written under a temporary name and then renamed, so it is
there whole or not at all. A chunk whose file is missing or damaged is embedded anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from sentence_transformers import SentenceTransformer

from st_clusterns.clustering.vectors import Floats
from st_clusterns.files import write_array
from st_clusterns.models import check_kind, dimension_of, same_modes, unwrap

logger = logging.getLogger(__name__)

CHUNK = 8192  # sentences in a file: what a kill can cost


def as_texts(sentences: Iterable[Any]) -> list[str]:
    """Return texts as a list; arguments and errors are those of `each_text`."""
    return list(each_text(sentences))


def each_text(sentences: Iterable[Any]) -> Iterator[str]:
    """Yield texts one by one, each checked.

    Args:
        sentences: a list, a tuple, an array, a column of a table, a generator, or another iterable.

    Raises:
        ValueError: if they are a single text, a whole table or without order, or if one of them is no text or blank.
    """
    whole = isinstance(sentences, (str, bytes, Mapping, Set)) or hasattr(sentences, "columns")
    if whole or hasattr(sentences, "column_names") or not isinstance(sentences, Iterable):
        shown = " ".join(reprlib.repr(sentences).split())
        raise ValueError(
            f"sentences must be a list of str, got {type(sentences).__name__} {shown}: read a file with "
            "read_sentences, put a single sentence in a list, and pass one column of a table, such as "
            "frame['text'].tolist() or dataset['text']."
        )
    for index, text in enumerate(sentences):
        if not isinstance(text, str):
            fault = f"is {type(text).__name__} {reprlib.repr(text)}: drop it or convert it"
        elif not text.strip():
            fault = f"is blank, {text!r}: drop it"
        elif not _is_unicode(text):
            fault = f"is no valid Unicode, {reprlib.repr(text)}: drop it or mend it"
        else:
            yield text
            continue
        raise ValueError(f"sentences must be a list of str, but sentences[{index}] {fault}.")


def _is_unicode(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:  # half a character of UTF-16
        return False


def embed_corpus(
    sentences: Iterable[str],
    model: SentenceTransformer,
    batch_size: int = 64,
    show_progress_bar: bool = True,
    bf16: bool = False,
    cache: str | Path | None = None,
    prompt: str | None = None,
    devices: Sequence[str] | None = None,
) -> Floats:
    """Embed a corpus with `model.encode`.

    Args:
        sentences: `N` texts, as of `as_texts`.
        model: the embedding model.
        batch_size: texts per batch.
        show_progress_bar: whether to show one.
        bf16: whether to use bfloat16 mixed precision; not with `devices`.
        cache: a folder that keeps the embeddings: the same call reads them there, or resumes where a killed one
            stopped. Processes that make the same call at a time wait for each other. What is in the folder may be
            deleted when no process uses it.
        prompt: what the model reads before each text; "" for nothing. Default: the model's default prompt.
        devices: devices that embed at a time, such as `["cuda:0", "cuda:1"]` or `["cpu", "cpu"]`, a process for each.
            A script that uses them needs `if __name__ == "__main__":`. Default: the device of the model.

    Returns:
        Unit vectors in float32, (N, D).

    Raises:
        ValueError: if the sentences are no texts, or an embedding is not finite.
    """
    check_kind(unwrap(model))
    texts = as_texts(sentences)
    if not texts:
        return np.empty((0, dimension_of(model)), dtype=np.float32)
    if bf16 and devices:
        raise ValueError("bf16=True does not reach the processes of devices=: leave one of them out.")
    settings: dict[str, Any] = {"prompt": prompt, "batch_size": batch_size, "show_progress_bar": show_progress_bar}
    stack = ExitStack()  # of the processes, which start with the first sentences that are embedded

    def embed(some: list[str]) -> Floats:
        if devices and "pool" not in settings:
            settings["pool"] = stack.enter_context(_processes(model, devices))
        with same_modes(model), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            rows = model.encode(some, **settings)
        rows = rows.astype(np.float32)  # `encode` would normalise in the model's own precision
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            raise ValueError(
                f"The model embeds {reprlib.repr(some[int(bad.argmax())])} as NaN or Inf: is the model broken, or "
                "loaded in half precision on a device that lacks it?"
            )
        unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return unit

    if cache is None:
        with stack:
            return embed(texts)
    folder = Path(cache) / _hash(chain([describe_model(model, bf16=bf16, prompt=prompt), str(CHUNK)], texts))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"), stack:
        starts = range(0, len(texts), CHUNK)
        chunks = [_read_or_embed(texts[i : i + CHUNK], embed, folder / f"{i:09d}.npy") for i in starts]
    return np.concatenate(chunks)


@contextmanager
def _processes(model: SentenceTransformer, devices: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Start a process for each device, for `encode(pool=...)`."""
    home = model.device
    pool = model.start_multi_process_pool(list(devices))  # moves the model to the CPU
    try:
        yield pool
    finally:
        model.stop_multi_process_pool(pool)
        model.to(home)


def _read_or_embed(texts: list[str], embed: Callable[[list[str]], Floats], path: Path) -> Floats:
    """Return the rows of a file. If it is missing or damaged, embed them and write it."""
    if path.exists():
        with suppress(Exception), path.open("rb") as file:  # a damaged header shows in many ways
            found: Floats = np.load(file)
            if found.dtype == np.float32 and found.ndim == 2 and len(found) == len(texts) and not file.read(1):
                return found
        logger.warning(f"{path} is damaged: its {len(texts)} sentences are embedded anew.")
    rows = embed(texts)
    write_array(rows, path)
    return rows


def describe_model(model: SentenceTransformer, **settings: Any) -> str:
    """Return a hash of what decides a model's embeddings.

    Covers the weights, the architecture and its settings, the tokenizer, maximum length, prompts, adapters, the
    versions of the libraries, and `settings` (such as the precision).
    """
    versions = {name: version(name) for name in ("sentence-transformers", "transformers", "torch")}
    parts = [json.dumps([settings, versions], sort_keys=True, default=str), repr(model)]
    for name in ("max_seq_length", "prompts", "default_prompt_name", "truncate_dim"):
        parts.append(f"{name}={getattr(model, name, None)!r}")
    parts.append(_describe_tokenizer(getattr(model, "tokenizer", None)))
    for name, module in model.named_modules():
        if hasattr(module, "get_config_dict"):
            parts.append(f"{name}={module.get_config_dict()}")
        for setting in ("config", "peft_config", "scaling", "active_adapters", "disable_adapters"):
            if hasattr(module, setting):
                parts.append(f"{name}.{setting}={getattr(module, setting)}")
    return _hash(chain(parts, _describe_weights(model)))


def _describe_weights(model: SentenceTransformer) -> Iterable[str | bytes]:
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):  # some modules keep other state
            yield f"{name} {value!r}"
            continue
        yield f"{name} {value.dtype} {tuple(value.shape)}"
        # The bytes as they are: numpy knows no bfloat16.
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _describe_tokenizer(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(fast, "to_str"):  # a slow one, or none
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
        words = sorted(vocabulary.items()) if isinstance(vocabulary, dict) else list(vocabulary or ())
        return repr((type(tokenizer), words, getattr(tokenizer, "init_kwargs", None)))
    parts = json.loads(fast.to_str())
    # Set anew by every call, by the padding side and the maximum length.
    parts.pop("padding", None), parts.pop("truncation", None)
    sides = [getattr(tokenizer, name, None) for name in ("padding_side", "truncation_side")]
    return json.dumps([parts, sides], sort_keys=True)


def _hash(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))  # so that ["ab", "c"] is not ["a", "bc"]
        digest.update(data)
    return digest.hexdigest()
