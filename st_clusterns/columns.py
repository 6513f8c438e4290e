"""Read columns of a table, for all commands: each file is read right, or refused with the line.

A csv or tsv file has a header and rows of one length. Its separator is that of a first line `sep=;`, a tab in a tsv
file, and otherwise the one of `SEPARATORS` that fits the whole file. Quotes inside quotes are doubled, or escaped by a
backslash. A tsv file that does not fit these rules is taken to have no quotes.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import parquet

TABLES = {
    ".csv": "a header, then rows of as many fields, in double quotes where needed",
    ".tsv": "a header, then rows of as many fields, separated by tabs",
    ".json": "one JSON object a line, or one array of objects",
    ".jsonl": "one JSON object a line, or one array of objects",
    ".parquet": "a Parquet file",
}
logger = logging.getLogger(__name__)
SEPARATORS = ",;\t|"
LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True)
class _Table:
    names: list[str]  # of the columns, as the file has them
    values: Callable[[str], list[Any]]
    texts: list[str]  # names of the columns that hold text
    numbers: Sequence[int]  # what an error calls each row: the line in which it begins, or its number
    unit: str  # "line" or "row"


class _TableError(Exception):
    """Why a file cannot be read, and the line that says so."""

    def __init__(self, reason: object, line: int = 0) -> None:
        super().__init__(f"line {line}: {reason}" if line else reason)
        self.line = line


def read_texts(path: Path, column: str | None = None) -> list[str | None]:
    """Read a column of text; without a name, the only one that holds text.

    Args:
        path: a table of one of the suffixes of `TABLES`, in UTF-8 or UTF-16; all but Parquet may be gzipped.
        column: name of the column.

    Returns:
        One text a row, or None where the file has a null.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, or the column is missing, ambiguous or not text.
    """
    with _opened(path) as table:
        if column is None:
            if not table.texts:
                raise ValueError(f"{named(path)} has no column of text; its columns: {_listed(table.names)}.")
            if len(table.texts) > 1:
                raise ValueError(
                    f"column=None, but {named(path)} has {len(table.texts)} columns of text: choose one of "
                    f"{_listed(table.texts)} (--column on the command line)."
                )
            [column] = table.texts
            logger.info(f"{path}: reading the column {column!r}.")
        values = _column(path, table, column)
        for number, value in zip(table.numbers, values, strict=True):
            if not isinstance(value, str | None):
                raise ValueError(
                    f"column={column!r} of {named(path)} holds {type(value).__name__} {reprlib.repr(value)} in "
                    f"{table.unit} {number}: choose a column of text."
                )
        example = next((value for value in values if value and value.strip()), None)
        if example and not holds_text(values):
            raise ValueError(
                f"column={column!r} of {named(path)} holds no text, but values such as {reprlib.repr(example)}: choose "
                "a column of text."
            )
        return values


def column_names(path: Path) -> list[str]:
    """Return the names of a table's columns; formats and errors are those of `read_texts`."""
    with _opened(path) as table:
        return list(table.names)


def read_table(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    """Read the columns of these names, without gaps; arguments, formats and errors are those of `read_texts`."""
    with _opened(path) as table:
        found = {name: _column(path, table, name) for name in columns}
        for name, values in found.items():
            for number, value in zip(table.numbers, values, strict=True):
                if value is None or not str(value).strip():
                    raise ValueError(f"column={name!r} of {named(path)} has no value in {table.unit} {number}.")
        return {name: [str(value) for value in values] for name, values in found.items()}


def suffix_of(path: Path, suffixes: Sequence[str]) -> str:
    """Return the suffix of a file, without `.gz`, after a check that it can be read."""
    if not path.exists():
        raise FileNotFoundError(f"{named(path)} does not exist (looked for {path.absolute()}): check its name.")
    if path.is_dir():
        raise ValueError(f"{named(path)} is a directory: name one file in it.")
    gzipped = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if gzipped else path.name).suffix.lower()
    if suffix not in suffixes or (gzipped and suffix == ".parquet"):
        raise ValueError(
            f"{named(path)} has an unknown suffix: it must be one of {', '.join(suffixes)}, or one of "
            "these and .gz (not .parquet)."
        )
    return suffix


def read_whole(path: Path) -> str:
    """Return the text of a file, gzipped or not, in UTF-8 or with the byte order mark of UTF-16."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{named(path)} cannot be read: {error}.") from error
    try:
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{named(path)} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}. Convert it first, "
            "for example with `iconv -f LATIN1 -t UTF-8`."
        ) from error
    if not text.strip():
        raise ValueError(f"{named(path)} is empty: it holds no sentence.")
    return text


def named(path: Path) -> str:
    """Return what an error calls a file."""
    return f"path={str(path)!r}"


def holds_text(values: Sequence[Any]) -> bool:
    """Whether any of the values is a text with a letter, which numbers and dates are not."""
    return any(isinstance(value, str) and any(map(str.isalpha, value)) for value in values)


@contextmanager
def _opened(path: Path) -> Iterator[_Table]:
    suffix = suffix_of(path, list(TABLES))
    read = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}.get(suffix, _read_json)
    try:
        table = read(path)
        if not table.numbers:
            raise ValueError(f"{named(path)} has no rows.")
        yield table
    except (_TableError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{named(path)} cannot be read: {error}. Expected {TABLES[suffix]}.") from error


def _column(path: Path, table: _Table, name: str) -> list[Any]:
    if name not in table.names:
        raise ValueError(f"column={name!r} is not in {named(path)}: choose one of {_listed(table.names)}.")
    if (times := table.names.count(name)) > 1:
        raise ValueError(f"column={name!r} is {times} times in {named(path)}: rename the others.")
    return table.values(name)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none at all"


def _in_memory(names: list[str], rows: list[dict[str, Any]], numbers: Sequence[int], unit: str) -> _Table:
    def values(name: str) -> list[Any]:
        return [row.get(name) for row in rows]

    texts = [name for name in dict.fromkeys(names) if holds_text(values(name))]
    pure = [name for name in texts if all(isinstance(value, str | None) for value in values(name))]
    return _Table(names, values, pure or texts, numbers, unit)


def _read_csv(path: Path) -> _Table:
    """Parse a whole file with each separator and each style of quotes; take the first style that one separator fits."""
    text, begin = read_whole(path), 1
    tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
    header, _, rest = text.lstrip("\r\n").partition("\n")
    separators = "\t" if tabs else "".join(one for one in SEPARATORS if one in header) or ","
    if told := re.fullmatch(r'"?sep=(.)"?\r?', header):
        separators, text, begin = told[1], rest, 2
    quoted = {"strict": True, "skipinitialspace": not tabs}
    styles: list[dict[str, Any]] = [quoted]
    if '\\"' in text:  # an escaped quote, or a backslash before a quote that is doubled, as by csv.writer
        doubled = re.search(r'\\""[^,;\t|\r\n]', text) is not None
        styles.insert(1 if doubled else 0, {**quoted, "escapechar": "\\"})
    styles += [{"quoting": csv.QUOTE_NONE}] if tabs else []
    failures = []
    for style in styles:
        fits = []
        for separator in separators:
            try:
                fits.append(_parse(text, begin, delimiter=separator, **style))
            except _TableError as error:
                failures.append(error)
        fits = [fit for fit in fits if len(fit[1][0]) > 1] or fits[:1]
        if len(fits) > 1:
            raise _TableError("more than one separator fits it: say which in a first line, such as sep=;")
        for numbers, (names, *rows) in fits:
            return _in_memory(names, [dict(zip(names, row, strict=True)) for row in rows], numbers[1:], "line")
    raise max(failures, key=lambda failure: failure.line)  # what was read furthest was most likely meant


def _parse(text: str, begin: int, **style: Any) -> tuple[list[int], list[list[str]]]:
    """Return the rows of a file, header included, and the lines in which they begin."""
    rows, numbers = list[list[str]](), list[int]()
    reader = csv.reader(io.StringIO(text, newline=""), **style)
    number, limit = begin, csv.field_size_limit(LONGEST_FIELD)
    try:
        for row in reader:
            if row:
                rows.append(row)
                numbers.append(number)
                if len(row) != len(rows[0]):
                    raise _TableError(f"{len(row)} fields, but the header has {len(rows[0])}", number)
            number = begin + reader.line_num
    except csv.Error as error:
        raise _TableError("a double quote is never closed" if "end of data" in str(error) else error, number) from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise _TableError("there is no header")
    return numbers, rows


def _read_json(path: Path) -> _Table:
    text = read_whole(path)
    rows, numbers, unit, number = list[Any](), list[int](), "line", 1
    try:
        if text.lstrip().startswith("["):
            rows, unit = json.loads(text), "row"
            numbers = list(range(1, len(rows) + 1))
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append(json.loads(line))
                    numbers.append(number)
    except json.JSONDecodeError as error:
        raise _TableError(f"{error.msg} in column {error.colno}", number + error.lineno - 1) from error
    except RecursionError as error:
        raise _TableError("it is nested too deeply", number) from error
    for number, row in zip(numbers, rows, strict=True):
        if not isinstance(row, dict):
            raise _TableError(f"{unit} {number} is {reprlib.repr(row)}, no object")
    return _in_memory(list(dict.fromkeys(name for row in rows for name in row)), rows, numbers, unit)


def _read_parquet(path: Path) -> _Table:
    def values(name: str) -> list[Any]:
        with parquet.ParquetFile(path) as file:
            column = file.read(columns=[name]).column(name)
        column.validate(full=True)
        rows: list[Any] = column.to_pylist()
        return rows

    with parquet.ParquetFile(path) as file:
        schema, numbers = file.schema_arrow, range(1, file.metadata.num_rows + 1)
    texts = [field.name for field in schema if _is_text(field.type)]
    return _Table(schema.names, values, texts, numbers, "row")


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view")
