"""Read a corpus of plain sentences from a file, and check it before any training.

One sentence a line (`.txt`), or one column of a table (`st_clusterns.columns`). A file is taken as it is or refused:
only blanks are skipped.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from st_clusterns.clustering.embedding import as_texts
from st_clusterns.columns import TABLES, named, read_table, read_texts, read_whole, suffix_of

logger = logging.getLogger(__name__)

FORMATS = {".txt": "one sentence a line", **TABLES}


def read_sentences(path: str | Path, column: str | None = None) -> list[str]:
    """Read the sentences of a file, in its order, without surrounding white space.

    Blank lines, blank values and nulls are dropped, exact duplicates are kept; both are counted in the log.

    Args:
        path: a file of one of `FORMATS`, in UTF-8 or UTF-16; all but Parquet may be gzipped (`.txt.gz`).
        column: the column of the table; without it, the only one that holds text.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read or holds no sentence, or the column is missing, ambiguous or not text.
    """
    path = Path(path)
    values = _read_lines(path, column) if suffix_of(path, list(FORMATS)) == ".txt" else read_texts(path, column)
    sentences = [sentence for value in values if value and (sentence := value.strip())]
    if not sentences:
        raise ValueError(f"{named(path)} holds no sentence: {len(values)} rows, none with text.")
    blank, repeated = len(values) - len(sentences), count_duplicates(sentences)
    logger.info(f"{path}: {len(sentences)} sentences; dropped {blank} blank rows, kept {repeated} exact duplicates.")
    return sentences


def read_labelled(
    path: str | Path, column: str | None = None, label_column: str | None = None
) -> tuple[list[str], list[str] | None]:
    """Read sentences as `read_sentences` does, and with a `label_column` the label of each, without which it is None.

    Every row of a table with labels must have both, and the columns must be named.

    Raises:
        FileNotFoundError, ValueError: as of `read_sentences`, and if a sentence or a label is missing.
    """
    if label_column is None:
        return read_sentences(path, column), None
    if column is None:
        raise ValueError(
            f"label_column={label_column!r} needs the column of the sentences, too: give column (--column)."
        )
    table = read_table(Path(path), [column, label_column])
    return [sentence.strip() for sentence in table[column]], table[label_column]


def count_duplicates(sentences: Sequence[str]) -> int:
    """Return how many sentences repeat an earlier one exactly."""
    return len(sentences) - len(set(sentences))


def check_sentences(sentences: Iterable[str], batch_size: int) -> list[str]:
    """Return the sentences as a list; raise `ValueError` if they are no texts, or too few for a batch."""
    texts = as_texts(sentences)
    if batch_size < 2:
        raise ValueError(f"batch_size must be 2 or more, got {batch_size}: the other sentences are the negatives.")
    if len(texts) < batch_size:
        raise ValueError(
            f"batch_size={batch_size} does not fit {len(texts)} sentences: choose {len(texts)} or fewer, or "
            "give more sentences."
        )
    return texts


def _read_lines(path: Path, column: str | None) -> list[str]:
    if column is not None:
        raise ValueError(f"column={column!r} does not apply to {named(path)}, which is no table: leave it out.")
    return list(io.StringIO(read_whole(path), newline=None))  # only \n, \r\n and \r end a line
