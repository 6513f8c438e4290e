"""Which rows of a batch have the same text: a hash of the tokens of each row, on the device, without a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from st_clusterns.losses.lengths import is_padded

BLOCK = 1024  # sentences that are tokenized at a time
# Odd 64-bit constants of SplitMix64 and xxHash, as signed integers: multiplication wraps around.
_TOKEN, _POSITION, _MIX = -7046029254386353131, -4417276706812531889, -4658895280553007687


def text_hashes(features: dict[str, Any]) -> Tensor | None:
    """Return one int64 a row, (B,), equal for rows of equal tokens whatever their padding; None without tokens.

    The features are those of one column, as `model.preprocess` makes them: padded (`input_ids`, `attention_mask`), or
    one row after the other with the places where they begin (`offsets` of `StaticEmbedding`, or `cu_seq_lens_q`).
    """
    tokens, mask = features.get("input_ids"), features.get("attention_mask")
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        return None
    if is_padded(features) and isinstance(mask, Tensor) and tokens.ndim == 2:
        mask = mask.long()
        return (_mix(tokens, mask.cumsum(dim=1)) * mask).sum(dim=1)
    begins = features["cu_seq_lens_q"][:-1] if "cu_seq_lens_q" in features else features.get("offsets")
    if not isinstance(begins, Tensor):
        return None
    tokens, begins = tokens.reshape(-1), begins.long()
    places = torch.arange(len(tokens), device=tokens.device)
    rows = torch.bucketize(places, begins, right=True) - 1
    hashes = torch.zeros(len(begins), dtype=torch.long, device=tokens.device)
    return hashes.index_add_(0, rows, _mix(tokens, places - begins[rows] + 1))


def hash_sentences(model: Any, sentences: Sequence[str], prompt: str = "") -> Tensor | None:
    """Hash sentences as a model tokenizes them now, after a prompt, (N,); None if it makes no tokens of them."""
    if not hasattr(model, "preprocess"):
        return None
    parts, options = [], {"prompt": prompt} if prompt else {}
    for start in range(0, len(sentences), BLOCK):
        hashes = text_hashes(model.preprocess(list(sentences[start : start + BLOCK]), **options))
        if hashes is None:
            return None
        parts.append(hashes.cpu())
    return torch.cat(parts)


def repeats_text(texts: list[Tensor], own: Tensor) -> Tensor:
    """Return which candidates are no negatives of the rows `own`, as they repeat a row's text or that of its positive.

    Args:
        texts: a hash of each text of the anchors, the positives and the `n` negatives, each (M,).
        own: indices of the rows, (R,); their own positives are not marked in the mask, (R, M + n*M).
    """
    anchors, positives = texts[:2]
    if len(texts) == 2 and anchors is positives:  # two views of one column
        same = anchors == anchors[own, None]
    else:
        candidates = torch.cat(texts[1:])  # (M + n*M,)
        same = (candidates == anchors[own, None]) | (candidates == positives[own, None])
        same[:, : len(anchors)] |= anchors == anchors[own, None]
    return same.scatter_(1, own[:, None], False)


def _mix(tokens: Tensor, positions: Tensor) -> Tensor:
    mixed = (tokens.long() + 1) * _TOKEN + positions * _POSITION
    mixed = (mixed ^ (mixed >> 29)) * _MIX
    return mixed ^ (mixed >> 32)
