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

logger = logging.getLogger(__name__)

DIMENSION = 100  # singular directions, at most
MIN_DF, MAX_DF = 3, 0.25  # a word counts if so many sentences, and at most this share of them, contain it


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
        weights = TfidfVectorizer(sublinear_tf=True, min_df=MIN_DF, max_df=MAX_DF).fit_transform(sentences)
    except ValueError:  # scikit-learn's way to say that no word is left
        weights = None
    if weights is None or weights.shape[1] < 3:
        logger.info("The sentences share hardly any words: clusters come from the embeddings alone.")
        return None
    reduced = TruncatedSVD(min(DIMENSION, weights.shape[1] - 1), random_state=seed).fit_transform(weights)
    vectors: Floats = normalize(reduced).astype(np.float32)
    return vectors
