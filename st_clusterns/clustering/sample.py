"""A uniform random sample of the distinct texts of a stream, in memory that does not grow with the stream.

Bottom-k sampling (Cohen and Kaplan 2007): a hash maps each text to a number, and the `k` texts with the lowest numbers
are the sample. All copies of a text have one number, so they count once. Which texts are drawn depends on the seed and
on the texts that there are, not on their order or their format. The k-th lowest number tells how many distinct texts
there are (Bar-Yossef et al. 2002), with a standard error of 1 / sqrt(k).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

SAMPLE = 50_000  # distinct texts that are embedded and clustered, at most
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
