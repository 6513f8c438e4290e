"""Embeddings of a corpus, in memory or cached on disk: found again by content, and resumed after a kill.

Embedding is the slowest preparation of a run, so its result can be cached. A hash of everything that decides an
embedding (the sentences, the model, the number format) names two files of a folder:

1. `<hash>.rows`: the embeddings, row after row, chunk by chunk.
2. `<hash>.chunks`: a line for each whole chunk: its width and the SHA-256 of its bytes, written after them.

Opening reads as many chunks as match their line, deletes what follows, and embeds the rest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from sentence_transformers import SentenceTransformer

from st_clusterns.clustering.vectors import Floats

logger = logging.getLogger(__name__)

CHUNK = 8192  # sentences that a kill can cost


def embed_corpus(
    sentences: Sequence[str],
    model: SentenceTransformer,
    batch_size: int = 64,
    show_progress_bar: bool = True,
    bf16: bool = False,
    cache: str | Path | None = None,
) -> Floats:
    """Embed a corpus with `model.encode`.

    Args:
        sentences: `N` texts.
        model: the embedding model.
        batch_size: texts per batch.
        show_progress_bar: whether to show one.
        bf16: whether to use bfloat16 mixed precision.
        cache: a folder that keeps the embeddings: the same call reads them there, or resumes where a killed one
            stopped.

    Returns:
        Unit vectors in float32, (N, D).

    Raises:
        ValueError: if an embedding is not finite.
    """

    def embed(texts: Sequence[str]) -> Floats:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            rows = model.encode(
                list(texts), batch_size=batch_size, convert_to_numpy=True, show_progress_bar=show_progress_bar
            )
        rows = rows.astype(np.float32)  # `encode` would normalise in the model's own precision
        unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return unit

    if cache is None:
        rows = embed(sentences)
        _check_finite(rows, 0)
        return rows
    return embed_or_read(sentences, embed, describe_model(model, bf16=bf16), cache)


def embed_or_read(
    sentences: Sequence[str], embed: Callable[[Sequence[str]], Floats], maker: str, folder: str | Path
) -> Floats:
    """Return the embeddings of a corpus, from a folder as far as they are there.

    Processes that ask for the same embeddings at a time wait for the first of them.

    Args:
        sentences: `N` texts.
        embed: from texts to float32 embeddings, (n,) -> (n, D).
        maker: what decides the embeddings besides the texts, such as `describe_model(model)`.
        folder: created if missing. Its content may be deleted when no process uses it.

    Returns:
        The embeddings, (N, D).

    Raises:
        ValueError: if an embedding is not finite; nothing of its chunk is kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = _hash(chain([maker, str(CHUNK)], sentences))
    rows_path, notes_path = folder / f"{name}.rows", folder / f"{name}.chunks"
    with FileLock(folder / f"{name}.lock"), rows_path.open("a+b") as rows, notes_path.open("a+b") as notes:
        begin, width = _keep_whole_chunks(rows, notes, len(sentences))
        if begin:
            logger.info(f"{begin} of {len(sentences)} embeddings are in {folder}.")
        for start in range(begin, len(sentences), CHUNK):
            chunk = embed(sentences[start : start + CHUNK])
            _check_finite(chunk, start)
            width = chunk.shape[1]
            data = chunk.tobytes()
            _append(rows, data)
            _append(notes, _note(data, width))
    return np.fromfile(rows_path, np.float32).reshape(len(sentences), width)


def describe_model(model: SentenceTransformer, **settings: Any) -> str:
    """Return a hash of what decides a model's embeddings.

    Covers the weights, the architecture and its settings, the tokenizer, maximum length, prompts, adapters, the
    versions of the libraries, and `settings` (such as the precision).
    """
    parts = [json.dumps({"settings": settings, "libraries": _versions()}, sort_keys=True, default=str), repr(model)]
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
        vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else None
        return repr((type(tokenizer), vocabulary, getattr(tokenizer, "init_kwargs", None)))
    parts = json.loads(fast.to_str())
    # Set anew by every call, by the padding side and the maximum length.
    parts.pop("padding", None), parts.pop("truncation", None)
    sides = [getattr(tokenizer, name, None) for name in ("padding_side", "truncation_side")]
    return json.dumps([parts, sides], sort_keys=True)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("sentence-transformers", "transformers", "torch")}


def _hash(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))  # so that ["ab", "c"] is not ["a", "bc"]
        digest.update(data)
    return digest.hexdigest()


def _keep_whole_chunks(rows: BinaryIO, notes: BinaryIO, n_sentences: int) -> tuple[int, int]:
    """Cut both files after the last chunk that is as noted; return how many rows are left, and their width."""
    rows.seek(0), notes.seek(0)
    begin, width, rows_end, notes_end = 0, 0, 0, 0
    for note in notes:
        n_rows = min(CHUNK, n_sentences - begin)
        parts = re.fullmatch(rb"(\d{1,9}) [0-9a-f]{64}\n", note)
        found = int(parts[1]) if parts else 0
        data = rows.read(n_rows * found * np.dtype(np.float32).itemsize)
        if not data or note != _note(data, found) or width not in (0, found):
            break
        begin, width = begin + n_rows, found
        rows_end, notes_end = rows_end + len(data), notes_end + len(note)
    rows.truncate(rows_end), notes.truncate(notes_end)
    return begin, width


def _note(data: bytes, width: int) -> bytes:
    return f"{width} {hashlib.sha256(data).hexdigest()}\n".encode()


def _append(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _check_finite(chunk: Floats, start: int) -> None:
    bad = ~np.isfinite(chunk).all(axis=1)
    if bad.any():
        raise ValueError(
            f"The model embeds sentences[{start + int(bad.argmax())}] as NaN or Inf: is the model broken, or loaded "
            "in half precision on a device that lacks it?"
        )
