"""Shared spelling: a small part of the embedding that knows which words two sentences have in common.

It is for a raw language model whose corpus has no topics: shared words judge likeness better than its embeddings do
(`st_clusterns.word_overlap`). Each of the model's tokens gets a vector of its character n-grams, so that the forms of a
word are alike, hashed to `S` dimensions (Weinberger et al. 2009), and the longer the fewer sentences have the token.
The sum over a sentence's tokens is added to its embedding, along the `S` directions in which embeddings vary least. A
model trained for sentences gains nothing by it (`results/exploration`), so it gets none.

Nothing is trained, embeddings stay as wide as they were, and the model loads everywhere: all of it is made of modules
of sentence-transformers. Shapes: `N` rows, `V` tokens, `D` dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from sklearn.feature_extraction.text import HashingVectorizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from st_clusterns.rows import Floats
from st_clusterns.topic_layer import append_frozen
from st_clusterns.word_overlap import tokenize

DIMENSION = 128  # `S`; no more than a third of D
GRAMS = (2, 4)  # characters, from and to
WEIGHT = 0.25  # of the cosine of two spellings beside that of two embeddings; more costs topics (results/exploration)
MEASURED = 5000  # sentences that say how long spellings are
SPELLING_KEY = "cls_token_embeddings"  # of the features: where `Pooling` takes an embedding to join with others from
MARKS = "#▁Ġ"  # what tokenizers put before a token to say whether it begins a word


@dataclass(frozen=True)
class SpellingLayer:
    """What is added to unit vectors; the sum is normalised again.

    Attributes:
        table: the spelling of each token, (V, S).
        directions: along which spellings are added, orthonormal columns, (D, S).
    """

    table: Floats
    directions: Floats

    def append_to(self, model: nn.Sequential) -> None:
        """Put the layer, frozen, at the end of a model that has none yet.

        Args:
            model: a SentenceTransformer whose first module is a `Transformer`; it gets `WordEmbeddings`, the table;
                a `Dense` that changes nothing but the name under which `Pooling` finds the embedding; a `Pooling` that
                joins it with the sum of spellings, divided by the root of their number; a `Dense` that adds the two;
                and a `Normalize` (one before them as well, if its embeddings have other lengths than 1).
        """
        if any(isinstance(module, WordEmbeddings) for module in model):
            return
        dimension = len(self.directions)
        unchanged = torch.eye(dimension)
        append_frozen(
            model,
            WordEmbeddings(WhitespaceTokenizer(), torch.tensor(self.table)),
            _linear(unchanged, module_output_name=SPELLING_KEY),
            Pooling(dimension, ("cls", "mean_sqrt_len_tokens")),
            _linear(torch.hstack([unchanged, torch.tensor(self.directions)])),
        )


def _linear(weight: Tensor, **names: str) -> Dense:
    return Dense(*weight.T.shape, bias=False, activation_function=nn.Identity(), init_weight=weight, **names)


def can_spell(model: Any) -> TypeGuard[SentenceTransformer]:
    """Whether a model reads tokens of `transformers`, and so can have the layer."""
    return (
        isinstance(model, SentenceTransformer)
        and isinstance(model[0], Transformer)
        and isinstance(model.tokenizer, PreTrainedTokenizerBase)
    )


def fit_spelling(
    rows: Floats, sentences: Sequence[str], model: SentenceTransformer, token_weights: Floats, seed: int = 0
) -> SpellingLayer:
    """Compute the layer from a model's tokens and a sample of a corpus.

    Args:
        rows: unit vectors, (N, D).
        sentences: the corpus, not necessarily those of the rows.
        model: whose tokens they are.
        token_weights: how rare each token is (`st_clusterns.word_overlap.learn_token_weights`), (V,).
        seed: of the sample.

    Returns:
        The layer; spellings have a mean square length of a quarter, beside embeddings of length 1.
    """
    sample = [sentences[place] for place in np.random.default_rng(seed).permutation(len(sentences))[:MEASURED]]
    directions = np.linalg.eigh(np.cov(rows, rowvar=False))[1][:, : min(DIMENSION, rows.shape[1] // 3)]
    table = token_weights[:, None] * _spell_tokens(model.tokenizer, directions.shape[1])
    tokens = tokenize(sample, model, padding=False)["input_ids"]
    squares = [np.square(table[ids].sum(axis=0)).sum() / len(ids) for ids in tokens]
    table *= np.sqrt(WEIGHT / max(np.mean(squares), 1e-9))
    return SpellingLayer(table.astype(np.float32), directions.astype(np.float32))


def _spell_tokens(tokenizer: PreTrainedTokenizerBase, dimension: int) -> Floats:
    """Return unit vectors of the tokens' n-grams; 0 for special tokens, (V, S)."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    spellings = ["" if token in special else token.lstrip(MARKS) for token in tokens]
    hashing = HashingVectorizer(analyzer="char_wb", ngram_range=GRAMS, n_features=dimension, dtype=np.float32)
    table: Floats = hashing.transform(spellings).toarray()
    return table
