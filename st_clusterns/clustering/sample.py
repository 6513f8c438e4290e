"""A uniform random sample of the distinct texts of a stream, in memory that does not grow with the stream.

Bottom-k sampling (Cohen and Kaplan 2007): a hash maps each text to a number, and the `k` texts with the lowest numbers
are the sample. All copies of a text have one number, so they count once. Which texts are drawn depends on the seed and
on the texts that there are, not on their order or their format. The k-th lowest number tells how many distinct texts
there are (Bar-Yossef et al. 2002), with a standard error of 1 / sqrt(k).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from sentence_transformers import SentenceTransformer

from st_clusterns.checks import check_number
from st_clusterns.clustering.embedding import embed_corpus
from st_clusterns.clustering.vectors import FEWEST, Floats, equal_rows, unit_rows
from st_clusterns.clustering.words import count_words
from st_clusterns.models import check_dense

logger = logging.getLogger(__name__)

SAMPLE = 50_000  # distinct texts that are embedded and clustered, at most
TOLD = 0.01  # share of texts that are too long for the model from which on it is told
RANGE = 2**64  # of the numbers: one million distinct texts all have different ones but for a chance of 1 in 40 million


@dataclass(frozen=True)
class Sample:
    """A sample of the distinct texts of a stream.

    Attributes:
        texts: the texts, in their order.
        places: where in the stream each of them came first.
        n_texts: the length of the stream.
        n_distinct: the number of distinct texts: exact if the sample holds all of them, else estimated (± 0.5 %).
        digest: a hash of all texts of the stream, in their order.
    """

    texts: list[str] = field(repr=False)
    places: list[int] = field(repr=False)
    n_texts: int
    n_distinct: int
    digest: str

    @property
    def is_whole(self) -> bool:
        """Whether the sample holds all distinct texts."""
        return len(self.texts) == self.n_distinct


def sample_distinct(texts: Iterable[str], seed: int = 0) -> Sample:
    """Draw the sample of a stream of texts, which is read once: all distinct texts, or 50,000 of more."""
    salt, digest = hashlib.sha256(str(seed).encode()).digest()[:16], hashlib.sha256()
    kept: dict[int, tuple[int, str]] = {}  # number: place and text
    bound, place = RANGE, -1
    for place, text in enumerate(texts):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d " % len(data) + data)
        number = int.from_bytes(hashlib.blake2b(data, digest_size=8, salt=salt).digest(), "big")
        if number < bound and number not in kept:
            kept[number] = (place, text)
            if len(kept) > 2 * SAMPLE:
                bound = sorted(kept)[SAMPLE]
                kept = {number: row for number, row in kept.items() if number < bound}
    numbers, n_distinct = sorted(kept)[:SAMPLE], len(kept)
    if bound < RANGE or n_distinct > SAMPLE:
        n_distinct = max(round((SAMPLE - 1) / (numbers[-1] / RANGE)), SAMPLE + 1)
        logger.info(f"A random sample of {SAMPLE:,} of about {n_distinct:,} distinct sentences is clustered.")
    rows = sorted(kept[number] for number in numbers)
    return Sample([text for _, text in rows], [place for place, _ in rows], place + 1, n_distinct, digest.hexdigest())


def embed_sample(
    sample: Sample, model: SentenceTransformer | None, embeddings: npt.ArrayLike | None, **how: Any
) -> Floats:
    """Return the unit vectors of a sample, (N, D), from `embeddings` of the whole stream if given.

    The other arguments are those of `embed_corpus`.
    """
    if embeddings is not None:
        given = np.asarray(embeddings)
        if len(given) != sample.n_texts:
            raise ValueError(f"There are {len(given)} embeddings for {sample.n_texts} sentences: pass one each.")
        return unit_rows(given[sample.places], sample.places)
    if model is None:
        raise ValueError("Pass the model that embeds the sentences, or embeddings=.")
    check_dense(model)
    _tell_what_is_read(sample.texts, model)
    rows = unit_rows(embed_corpus(sample.texts, model, **how))
    _check_told_apart(rows)
    return rows


def _tell_what_is_read(texts: Sequence[str], model: SentenceTransformer) -> None:
    """Say how many texts are surely longer than what the model reads: a text has at least as many tokens as words."""
    limit = getattr(model, "max_seq_length", None)
    if not isinstance(limit, int):
        return
    # A word has a character and a space, so most texts need no count.
    longer = sum(len(text) > 2 * limit and count_words(text) > limit for text in texts) / len(texts)
    if longer >= TOLD:
        logger.info(
            f"At least {longer:.0%} of the sentences are longer than the {limit} tokens that are read of each: see "
            "max_length, and model.max_seq_length."
        )


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
    if n_distinct < FEWEST:
        raise ValueError(f"sentences holds {n_distinct} distinct text(s) in {n_sentences}: give {FEWEST} or more.")
    if n_clusters is not None and not 2 <= n_clusters <= n_distinct // 2:
        raise ValueError(
            f"n_clusters={n_clusters} does not fit {n_distinct} distinct sentences: choose 2 to "
            f"{n_distinct // 2}, so that a cluster has two sentences on average, or leave it out."
        )
    if n_clusters is not None:
        check_number("n_clusters", n_clusters, least=2, whole=True)
