"""Shared words as the teacher of a model that knows less than they do.

A raw language model, pretrained by masked words only, makes embeddings that are worse judges of likeness than the mere
count of shared words, and contrastive training on diverse text without labels hardly mends that: it teaches to tell
sentences apart, not which are alike. A model trained for sentences is far better than words, and would only lose by
learning from them.

Which of the two a model is can be asked without labels. Cut sentences in two and look for the second half of each
first half among a thousand: by the model's embeddings, and by the tf-idf of the model's own tokens. If tokens find
more of them, words judge better. Then clusters are sought by words (`st_clusterns.corpus`), and where these are not to
be trusted either, the model gets a part that knows shared words (`st_clusterns.spelling`), and `ClusterNSLoss` lets it
learn the likeness of a batch's rows from their tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SAMPLE = 50_000  # sentences that the weights are learnt from
HALVED, LEAST_HALVED = 5000, 100  # sentences that are cut in two, at most and at least
AMONG = 1000  # second halves among which one is looked for
LEAST_WORDS = 8  # of a sentence that is cut
CERTAINTY = 2.0  # standard errors by which words must find more: a good model would lose by learning from them


def learn_token_weights(
    sentences: Sequence[str], model: SentenceTransformer, seed: int = 0
) -> npt.NDArray[np.float32] | None:
    """Return the weight of each of the model's tokens, if shared tokens judge clearly better than the model.

    Args:
        sentences: the corpus; at most 50,000 of them are used, and 5,000 are cut in two.
        model: embeds the halves.
        seed: of the samples.

    Returns:
        Inverse document frequencies, `log((1 + N) / (1 + n))`, one a token, (V,). None if the model judges as well,
        has no tokenizer of `transformers`, or fewer than 100 sentences have 8 words.
    """
    if not isinstance(getattr(model, "tokenizer", None), PreTrainedTokenizerBase):
        return None
    draw = np.random.default_rng(seed)
    sample = [sentences[place] for place in draw.permutation(len(sentences))[:SAMPLE]]
    long = [words for words in (sentence.split() for sentence in sample) if len(words) >= LEAST_WORDS][:HALVED]
    if len(long) < LEAST_HALVED:
        return None
    logger.info(f"Cutting {len(long)} sentences in two, to see who judges better, the model or shared words.")
    weights = inverse_document_frequencies(sample, model)
    found = found_by_model = 0
    for start in range(0, len(long), AMONG):
        some = long[start : start + AMONG]
        halves = [" ".join(words[: len(words) // 2]) for words in some]
        halves += [" ".join(words[len(words) // 2 :]) for words in some]
        by_model = model.encode(halves, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        found += _count_found(token_vectors(tokenize(halves, model), torch.from_numpy(weights)))
        found_by_model += _count_found(by_model.float().cpu())
    return weights if found - found_by_model > CERTAINTY * math.sqrt(found + found_by_model) else None


def token_vectors(features: dict[str, Any], weights: Tensor) -> Tensor:
    """Return the tf-idf vectors of tokenised sentences.

    Args:
        features: `input_ids` and `attention_mask`, (B, L).
        weights: of each token, (V,).

    Returns:
        Unit vectors over the `U` different tokens of these sentences, (B, U).
    """
    tokens, places = features["input_ids"].unique(return_inverse=True)
    counts = weights.new_zeros(len(places), len(tokens))
    counts.scatter_add_(1, places, features["attention_mask"].to(weights))
    return F.normalize(counts * weights[tokens], dim=1)


def inverse_document_frequencies(sentences: Sequence[str], model: SentenceTransformer) -> npt.NDArray[np.float32]:
    """Return `log((1 + N) / (1 + n))` of each of the model's tokens, of which `n` of `N` sentences have it, (V,)."""
    found = np.zeros(len(model.tokenizer))
    for start in range(0, len(sentences), 1000):
        for ids in tokenize(sentences[start : start + 1000], model, padding=False)["input_ids"]:
            found[np.unique(ids)] += 1
    weights: npt.NDArray[np.float32] = np.log((1 + len(sentences)) / (1 + found)).astype(np.float32)
    return weights


def tokenize(sentences: Sequence[str], model: SentenceTransformer, padding: bool = True) -> dict[str, Any]:
    """Tokenise as the model does, at its own length: padded tensors, or lists of numbers."""
    return dict(
        model.tokenizer(
            list(sentences),
            truncation=True,
            max_length=model.max_seq_length,
            padding=padding,
            return_tensors="pt" if padding else None,
        )
    )


def _count_found(halves: Tensor) -> int:
    """Count the first halves whose second half is the likest of all; all first halves come first, then all second."""
    first, second = halves.chunk(2)
    return int(((first @ second.T).argmax(dim=1) == torch.arange(len(first))).sum())
