"""Read a corpus of plain sentences from a file, and check it before any training.

One sentence a line (`.txt`), or one column of a table (`.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`), read
by pyarrow, which keeps no cache. A file is taken as it is or refused: only blanks are skipped.
"""

from __future__ import annotations

import codecs
import gzip
import io
import logging
import reprlib
import zlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import csv, json, parquet

from st_clusterns.clustering.corpus_clusters import check_strings

logger = logging.getLogger(__name__)

FORMATS = {
    ".txt": "one sentence a line",
    ".csv": "a header, then one row a line, separated by commas, in double quotes where needed",
    ".tsv": "a header, then one row a line, separated by tabs, without quotes",
    ".json": "one JSON object a line, every field of one type (the first row is row 0)",
    ".jsonl": "one JSON object a line, every field of one type (the first row is row 0)",
    ".parquet": "a Parquet file",
}
TEXT_TYPES = ("string", "large_string", "string_view")
UNQUOTED = csv.ParseOptions(delimiter="\t", quote_char=False)
MAX_BLOCK = 2**31 - 1  # pyarrow's limit


def read_sentences(path: str | Path, column: str | None = None) -> list[str]:
    """Read the sentences of a file, in its order, without surrounding white space.

    Blank lines, blank values and nulls are dropped, exact duplicates are kept; both are counted in the log.

    Args:
        path: a file of one of `FORMATS`, in UTF-8; all but Parquet may be gzipped (`.txt.gz`).
        column: the column of the table; without it, the only one that holds text.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read or holds no sentence, or the column is missing, ambiguous or not text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{_named(path)} does not exist (looked for {path.absolute()}): check its name.")
    if path.is_dir():
        raise ValueError(f"{_named(path)} is a directory: name one file in it.")
    gzipped = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if gzipped else path.name).suffix.lower()
    if suffix not in FORMATS or (gzipped and suffix == ".parquet"):
        raise ValueError(
            f"{_named(path)} has an unknown suffix: it must be one of {', '.join(FORMATS)}, or one of "
            "these and .gz (not .parquet)."
        )
    try:
        values = _read_lines(path, column) if suffix == ".txt" else _read_column(path, suffix, column)
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{_named(path)} cannot be read: {error}. Expected {FORMATS[suffix]}.") from error
    sentences = [sentence for value in values if value and (sentence := value.strip())]
    if not sentences:
        raise ValueError(f"{_named(path)} holds no sentence: {len(values)} rows, none with text.")
    blank, repeated = len(values) - len(sentences), count_duplicates(sentences)
    logger.info(f"{path}: {len(sentences)} sentences; dropped {blank} blank rows, kept {repeated} exact duplicates.")
    return sentences


def count_duplicates(sentences: Sequence[str]) -> int:
    """Return how many sentences repeat an earlier one exactly."""
    return len(sentences) - len(set(sentences))


def check_sentences(sentences: Sequence[str], batch_size: int) -> None:
    """Raise `ValueError` if sentences are not a sequence of str, or too few for a batch of `batch_size`."""
    check_strings(sentences)
    if batch_size < 2:
        raise ValueError(f"batch_size must be 2 or more, got {batch_size}: the other sentences are the negatives.")
    if len(sentences) < batch_size:
        raise ValueError(
            f"batch_size={batch_size} does not fit {len(sentences)} sentences: choose {len(sentences)} or fewer, or "
            "give more sentences."
        )


def _read_lines(path: Path, column: str | None) -> list[str | None]:
    if column is not None:
        raise ValueError(f"column={column!r} does not apply to {_named(path)}, which is no table: leave it out.")
    return list(io.StringIO(_read_utf8(path).decode(), newline=None))  # only \n, \r\n and \r end a line


def _read_column(path: Path, suffix: str, column: str | None) -> list[str | None]:
    if suffix == ".parquet":
        with parquet.ParquetFile(path) as file:
            name = _choose_column(file.schema_arrow, path, column)
            values = file.read(columns=[name]).column(name)
    else:
        table = _read_table(_read_utf8(path), suffix)
        values = table.column(_choose_column(table.schema, path, column))
    values.validate(full=True)
    row = -1 if _is_text(values.type) else values.is_valid().index(True).as_py()
    if row >= 0:  # a column of nulls is blank, whatever its type
        raise ValueError(
            f"column={column!r} of {_named(path)} is {values.type}, not text: row {row + 1} is "
            f"{reprlib.repr(values[row].as_py())}. Choose a column of text."
        )
    rows: list[str | None] = values.to_pylist()
    return rows


def _read_table(data: bytes, suffix: str) -> pa.Table:
    data += b"\n"  # a header without it would be an "empty file"
    block_size = min(len(data), MAX_BLOCK)  # one block: a column's type is inferred from all of its values
    if suffix in (".json", ".jsonl"):
        options = json.ReadOptions(use_threads=False, block_size=block_size)
        return json.read_json(pa.BufferReader(data), read_options=options)
    quoted = suffix == ".csv"
    table = csv.read_csv(
        pa.BufferReader(data),
        read_options=csv.ReadOptions(use_threads=False, block_size=block_size),  # threads lose the row of an error
        parse_options=csv.ParseOptions(newlines_in_values=True) if quoted else UNQUOTED,
    )
    if quoted and data.count(b'"') % 2 and any("\n" in str(values[-1]) for values in table.columns if len(values)):
        raise pa.ArrowInvalid(f"row {table.num_rows} opens a double quote that is never closed")  # pyarrow goes on
    return table


def _read_utf8(path: Path) -> bytes:
    data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    data = data.removeprefix(codecs.BOM_UTF8)
    if not data.strip():
        raise ValueError(f"{_named(path)} is empty: it holds no sentence.")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{_named(path)} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}. Convert it first, "
            "for example with `iconv -f LATIN1 -t UTF-8`."
        ) from error
    return data


def _choose_column(schema: pa.Schema, path: Path, column: str | None) -> str:
    if column is None:
        names: list[str] = [field.name for field in schema if _is_text(field.type)]
        if not names and all(pa.types.is_null(field.type) for field in schema):
            names = schema.names[:1]  # a table of blanks: "no sentence" says more than "no text"
        if not names:
            types = ", ".join(f"{field.name!r} ({field.type})" for field in schema) or "none at all"
            raise ValueError(f"{_named(path)} has no column of text; its columns: {types}.")
        if len(names) > 1:
            raise ValueError(
                f"column=None, but {_named(path)} has {len(names)} columns of text: choose one of "
                f"{_listed(names)} (--column on the command line)."
            )
        column = names[0]
        logger.info(f"{path}: reading the column {column!r}.")
    if column not in schema.names:
        raise ValueError(f"column={column!r} is not in {_named(path)}: choose one of {_listed(schema.names)}.")
    if (times := schema.names.count(column)) > 1:
        raise ValueError(f"column={column!r} is {times} times in {_named(path)}: rename the others.")
    return column


def _is_text(kind: pa.DataType) -> bool:
    return str(kind.value_type if pa.types.is_dictionary(kind) else kind) in TEXT_TYPES


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _named(path: Path) -> str:
    return f"path={str(path)!r}"
