"""The part of a corpus that is clustered: its distinct sentences, a random sample of many, embedded and checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sentence_transformers import SentenceTransformer

from st_clusterns.clustering.embedding import embed_corpus
from st_clusterns.clustering.vectors import Floats, equal_rows, unit_rows
from st_clusterns.models import check_dense

logger = logging.getLogger(__name__)

SAMPLE = 50_000  # distinct sentences that are embedded and clustered, at most
MIN_SENTENCES = 4


def sample_places(sentences: Sequence[str], seed: int) -> list[int]:
    """Return the places of the distinct sentences, in their order; of many, those of a random sample."""
    first: dict[str, int] = {}
    for place, sentence in enumerate(sentences):
        first.setdefault(sentence, place)
    places = list(first.values())
    if len(places) > SAMPLE:
        chosen = np.random.default_rng(seed).choice(len(places), SAMPLE, replace=False)
        places = [places[place] for place in np.sort(chosen)]
        logger.info(f"Clustering a random sample of {SAMPLE:,} of {len(sentences):,} sentences.")
    return places


def embed_sample(
    sentences: Sequence[str],
    places: Sequence[int],
    model: SentenceTransformer | None,
    embeddings: npt.ArrayLike | None,
    **how: Any,
) -> tuple[list[str], Floats]:
    """Return the sentences at these places and their unit vectors, from `embeddings` of all sentences if given."""
    texts = [sentences[place] for place in places]
    if embeddings is not None:
        given = np.asarray(embeddings)
        if len(given) != len(sentences):
            raise ValueError(f"There are {len(given)} embeddings for {len(sentences)} sentences: pass one each.")
        return texts, unit_rows(given[places], places)
    if model is None:
        raise ValueError("Pass the model that embeds the sentences, or embeddings=.")
    check_dense(model)
    rows = unit_rows(embed_corpus(texts, model, **how))
    _check_told_apart(rows)
    return texts, rows


def _check_told_apart(rows: Floats) -> None:
    """Warn of distinct sentences with equal embeddings, (N, D); refuse them by a `ValueError` if most are so."""
    equal, different = equal_rows(rows)
    if equal:
        found = (
            f"The model embeds {equal:,} of {len(rows):,} distinct sentences exactly as another one: their words are "
            "unknown to its vocabulary, or they differ only in what it does not read (such as case, or what follows "
            "its maximum length)"
        )
        if different < len(rows) / 2:
            raise ValueError(f"{found}. Choose a model for the language of the sentences, or a greater maximum length.")
        logger.warning(f"{found}.")


def check_counts(n_distinct: int, n_sentences: int, n_clusters: int | None = None) -> None:
    """Refuse, by a `ValueError`, fewer than 4 distinct sentences, or too few for the `n_clusters` of the user."""
    n_distinct = min(n_distinct, SAMPLE)
    if n_distinct < MIN_SENTENCES:
        raise ValueError(
            f"sentences holds {n_distinct} distinct text(s) in {n_sentences}: give {MIN_SENTENCES} or more."
        )
    if n_clusters is not None and not 2 <= n_clusters <= n_distinct // 2:
        raise ValueError(
            f"n_clusters={n_clusters} does not fit {n_distinct} distinct sentences: choose 2 to "
            f"{n_distinct // 2}, so that a cluster has two sentences on average, or leave it out."
        )
