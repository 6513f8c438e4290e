"""Words that occur together: a second view of a corpus, which no embedding model has seen.

A pretrained model knows the language; it does not know which words go together in *this* corpus. Latent semantic
analysis (Deerwester et al. 1990) does: weigh the words of each sentence by how few sentences have them (tf-idf), and
keep the leading singular directions of the sentence-by-word matrix. Clusters found in both views at once, embeddings
and words, are nearer to the topics than those of either, and what they know of words passes on to the model: through
the topic layer, and through the pull to their centroids.

A sentence none of whose words is repeated elsewhere has no word vector and is clustered by its embedding alone. So is
a corpus in a script without spaces between words.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer

logger = logging.getLogger(__name__)

DIMENSION = 100  # singular directions, at most
LEAST_SENTENCES, LARGEST_SHARE = 3, 0.25  # a word counts if this many sentences and at most this share have it
SAMPLE = 50_000  # sentences that words and directions are learnt from
BLOCK = 50_000  # sentences that are mapped at a time


def word_vectors(sentences: Sequence[str], seed: int = 0) -> npt.NDArray[np.floating[Any]] | None:
    """Map each sentence to a unit vector by the words in it.

    Args:
        sentences: `N` texts.
        seed: of the sample that a large corpus is learnt from, and of the decomposition.

    Returns:
        (N, 100) or narrower; rows of 0 for sentences without known words. In float32, for more than 50,000 sentences
        in float16. None if the corpus repeats fewer than 3 words.
    """
    few = len(sentences) <= SAMPLE
    places = range(len(sentences)) if few else np.sort(np.random.default_rng(seed).permutation(len(sentences))[:SAMPLE])
    mapping = _learn([sentences[place] for place in places], seed)
    if mapping is None:
        logger.info("The sentences share hardly any words: clusters come from the embeddings alone.")
        return None
    blocks = (mapping.transform(sentences[start : start + BLOCK]) for start in range(0, len(sentences), BLOCK))
    return np.concatenate([block.astype(np.float32 if few else np.float16) for block in blocks])


def _learn(sentences: Sequence[str], seed: int) -> Pipeline | None:
    counting = TfidfVectorizer(sublinear_tf=True, min_df=LEAST_SENTENCES, max_df=LARGEST_SHARE)
    try:
        weights = counting.fit_transform(sentences)
    except ValueError:  # no word is left
        return None
    n_words = weights.shape[1]
    if n_words < 3:
        return None
    directions = TruncatedSVD(min(DIMENSION, n_words - 1), random_state=seed).fit(weights)
    return make_pipeline(counting, directions, Normalizer(copy=False))
