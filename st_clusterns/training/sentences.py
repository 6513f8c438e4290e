"""Read a corpus of plain sentences from a file, and check it before any training.

One sentence a line (`.txt`), or one column of a table (`st_clusterns.columns`). A file is taken as it is or refused:
only blanks are skipped.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset

from st_clusterns.checks import check_number
from st_clusterns.clustering.embedding import as_texts
from st_clusterns.columns import TABLES, read_table, read_texts
from st_clusterns.text_files import check_not_empty, named, open_text, suffix_of

logger = logging.getLogger(__name__)

FORMATS = {".txt": "one sentence a line", **TABLES}
BLOCK = 10_000  # texts that are written at a time


class SentenceFile:
    """The sentences of a file, in its order, without surrounding white space: an iterable that streams the file.

    Blank lines, blank values and nulls are dropped and counted in the log; exact duplicates are kept. Memory does not
    grow with the file, unless it is a JSON array.

    Args:
        path: a file of one of `FORMATS`, in UTF-8 or UTF-16; all but Parquet may be gzipped (`.txt.gz`).
        column: the column of the table; without it, the only one that holds text.

    Raises:
        FileNotFoundError: while iterating, if there is no such file.
        ValueError: while iterating, if the file cannot be read or holds no sentence, or the column is missing,
            ambiguous or not text.
    """

    def __init__(self, path: str | Path, column: str | None = None) -> None:
        self.path, self.column = Path(path), column

    def __iter__(self) -> Iterator[str]:
        """Read the file from its start."""
        is_table = suffix_of(self.path, list(FORMATS)) != ".txt"
        sentences = blank = 0
        for value in read_texts(self.path, self.column) if is_table else self._lines():
            if value and (sentence := value.strip()):
                sentences += 1
                yield sentence
            else:
                blank += 1
        if not sentences:
            raise ValueError(f"{named(self.path)} holds no sentence: {blank} rows, none with text.")
        logger.info(f"{self.path}: {sentences:,} sentences; dropped {blank:,} blank rows.")

    def _lines(self) -> Iterator[str]:
        if self.column is not None:
            raise ValueError(
                f"column={self.column!r} does not apply to {named(self.path)}, which is no table: leave it out."
            )
        check_not_empty(self.path)
        with open_text(self.path) as file:  # only \n, \r\n and \r end a line
            yield from file


def read_sentences(path: str | Path, column: str | None = None) -> list[str]:
    """Read the sentences of a file into memory; arguments and errors are those of `SentenceFile`."""
    return list(SentenceFile(path, column))


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


def store_distinct(sentences: Iterable[str], path: Path) -> Dataset:
    """Write texts into an Arrow file; return a data set that reads the distinct ones from it, not from memory.

    Args:
        sentences: the texts. While they are written, each takes 8 bytes of memory.
        path: the file, which is replaced.

    Returns:
        The column `sentence`, in the order of the texts.
    """
    hashes, texts = array("q"), iter(sentences)
    schema = pa.schema({"sentence": pa.string()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while block := list(islice(texts, BLOCK)):
            hashes.extend(map(hash, block))  # of 64 bits: two of 100 million differ but for a chance of 1 in 3,000
            writer.write_batch(pa.record_batch([pa.array(block, pa.string())], schema=schema))
    first = np.unique(np.frombuffer(hashes, dtype=np.int64), return_index=True)[1]
    dataset = Dataset.from_file(str(path))
    if len(first) == len(dataset):
        return dataset
    logger.info(f"{len(dataset) - len(first):,} exact duplicates are left out: {len(first):,} remain.")
    return dataset.select(np.sort(first))


def check_sentences(sentences: Iterable[str], batch_size: int) -> list[str]:
    """Return the sentences as a list; raise `ValueError` if they are no texts, or too few for a batch."""
    texts = as_texts(sentences)
    check_batch_size(batch_size, len(texts))
    return texts


def check_batch_size(batch_size: int, n_sentences: int) -> None:
    """Refuse, by a `ValueError`, a batch of one sentence, or of more than there are."""
    check_number("batch_size", batch_size, whole=True)
    if batch_size < 2:
        raise ValueError(f"batch_size must be 2 or more, got {batch_size}: the other sentences are the negatives.")
    if n_sentences < batch_size:
        raise ValueError(
            f"batch_size={batch_size} does not fit {n_sentences} sentences: choose {n_sentences} or fewer, or "
            "give more sentences."
        )
