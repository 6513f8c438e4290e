"""Tf-idf vectors reduced by truncated SVD (latent semantic analysis): a second view of a corpus.

A pretrained encoder knows the language. It does not know which words occur together in *this* corpus. Latent semantic
analysis (Deerwester et al. 1990) does. Clustering embeddings and tf-idf vectors together follows COTC (EMNLP 2024).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from st_clusterns.clustering.vectors import Floats
from st_clusterns.clustering.words import split_words

logger = logging.getLogger(__name__)

DIMENSION = 100  # singular directions, at most
MIN_DF, MAX_DF = 3, 0.25  # a word counts if so many sentences, and at most this share of them, contain it

LENGTH = 0.7  # of a tf-idf vector beside its embedding, which has length 1 ...
MANY_SENTENCES = 5000  # ... and in proportion less for fewer sentences, in which few words co-occur


def tfidf_vectors(sentences: Sequence[str], seed: int = 0) -> Floats | None:
    """Map each sentence to a unit vector by its words.

    Args:
        sentences: `N` texts.
        seed: seed of the decomposition's random number generator.

    Returns:
        (N, 100) or narrower. A sentence that shares no word with enough others has a row of zeros. None if fewer than
        3 words are shared: such a corpus is clustered by its embeddings alone.
    """
    try:
        weights = TfidfVectorizer(analyzer=split_words, sublinear_tf=True, min_df=MIN_DF, max_df=MAX_DF).fit_transform(
            sentences
        )
    except ValueError:  # scikit-learn's way to say that no word is left
        weights = None
    if weights is None or weights.shape[1] < 3:
        logger.info("The sentences share hardly any words: clusters come from the embeddings alone.")
        return None
    reduced = TruncatedSVD(min(DIMENSION, weights.shape[1] - 1), random_state=seed).fit_transform(weights)
    vectors: Floats = normalize(reduced).astype(np.float32)
    return vectors


def join_tfidf(rows: Floats, sentences: Sequence[str], seed: int = 0) -> Floats:
    """Join embeddings with the tf-idf vectors of their sentences, as unit vectors: (N, D) -> (N, D + 100 or fewer)."""
    words = tfidf_vectors(sentences, seed)
    if words is None:
        return rows
    length = LENGTH * min(1.0, len(rows) / MANY_SENTENCES)
    joined: Floats = normalize(np.hstack([rows, length * words]), copy=False)
    return joined
