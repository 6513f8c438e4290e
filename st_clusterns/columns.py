"""Read columns of a table, for all commands: each file is read right, or refused with the line.

Files are streamed, so memory does not grow with them; a JSON array alone is read whole. A file is read more than once:
first to find its columns, and the rules of a csv file, and then for the values.

A csv or tsv file has a header and rows of one length. Its separator is that of a first line `sep=;`, a tab in a tsv
file, and otherwise the one of `SEPARATORS` that fits the whole file. Quotes inside quotes are doubled, or escaped by a
backslash. A tsv file that does not fit these rules is taken to have no quotes.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import parquet

from st_clusterns.text_files import check_not_empty, named, open_text, suffix_of

TABLES = {
    ".csv": "a header, then rows of as many fields, in double quotes where needed",
    ".tsv": "a header, then rows of as many fields, separated by tabs",
    ".json": "one JSON object a line, or one array of objects",
    ".jsonl": "one JSON object a line, or one array of objects",
    ".parquet": "a Parquet file",
}
logger = logging.getLogger(__name__)
SEPARATORS = ",;\t|"
LONGEST_FIELD = 10_000_000  # characters of a csv field; one that is longer lacks its closing quote


@dataclass(frozen=True)
class _Table:
    names: list[str]  # of the columns, as the file has them
    texts: list[str]  # names of the columns that hold text
    n_rows: int
    unit: str  # "line" or "row": what an error calls a row by
    rows: Callable[[str], Iterator[tuple[int, Any]]]  # the number of each line or row, and its value in a column


class _TableError(Exception):
    """Why a file cannot be read, and the line that says so."""

    def __init__(self, reason: object, line: int = 0) -> None:
        super().__init__(f"line {line}: {reason}" if line else reason)
        self.line = line


def read_texts(path: Path, column: str | None = None) -> Iterator[str | None]:
    """Read a column of text; without a name, the only one that holds text.

    Args:
        path: a table of one of the suffixes of `TABLES`, in UTF-8 or UTF-16; all but Parquet may be gzipped.
        column: name of the column.

    Yields:
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
        example, lettered = None, False
        for number, value in _column(path, table, column):
            if not isinstance(value, str | None):
                raise ValueError(
                    f"column={column!r} of {named(path)} holds {type(value).__name__} {reprlib.repr(value)} in "
                    f"{table.unit} {number}: choose a column of text."
                )
            if value and not lettered:
                lettered = has_letter(value)
                example = example or (value if value.strip() else None)
            yield value
        if example and not lettered:
            raise ValueError(
                f"column={column!r} of {named(path)} holds no text, but values such as {reprlib.repr(example)}: choose "
                "a column of text."
            )


def column_names(path: Path) -> list[str]:
    """Return the names of a table's columns; formats and errors are those of `read_texts`."""
    with _opened(path) as table:
        return list(table.names)


def read_table(path: Path, columns: Sequence[str], gaps: bool = False) -> dict[str, list[str]]:
    """Read the columns of these names; arguments, formats and errors are those of `read_texts`.

    With `gaps`, a missing value is "", otherwise it is a ValueError.
    """
    found: dict[str, list[str]] = {}
    with _opened(path) as table:
        for name in columns:
            found[name] = []
            for number, value in _column(path, table, name):
                value = "" if value is None else value
                if not gaps and not str(value).strip():
                    raise ValueError(f"column={name!r} of {named(path)} has no value in {table.unit} {number}.")
                if isinstance(value, list | dict):
                    raise ValueError(
                        f"column={name!r} of {named(path)} holds {reprlib.repr(value)} in {table.unit} {number}: "
                        "give texts or numbers."
                    )
                found[name].append(str(value))
    return found


def has_letter(text: str) -> bool:
    """Whether a text has a letter, which numbers and dates have not."""
    return any(map(str.isalpha, text))


@contextmanager
def _opened(path: Path) -> Iterator[_Table]:
    suffix = suffix_of(path, list(TABLES))
    read = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}.get(suffix, _read_json)
    try:
        table = read(path)
        if not table.n_rows:
            raise ValueError(f"{named(path)} has no rows.")
        yield table
    except (_TableError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{named(path)} cannot be read: {error}. Expected {TABLES[suffix]}.") from error


def _column(path: Path, table: _Table, name: str) -> Iterator[tuple[int, Any]]:
    if name not in table.names:
        raise ValueError(f"column={name!r} is not in {named(path)}: choose one of {_listed(table.names)}.")
    if (times := table.names.count(name)) > 1:
        raise ValueError(f"column={name!r} is {times} times in {named(path)}: rename the others.")
    return table.rows(name)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none at all"


class _Columns:
    """Finds the names of columns, and which of them hold text, from the rows of a table."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = dict.fromkeys(names)
        self.lettered, self.other = set[str](), set[str]()  # columns in which a text has a letter; a value is no text
        self.n_rows = 0

    def add(self, row: dict[str, Any]) -> None:
        self.n_rows += 1
        for name, value in row.items():
            self.names.setdefault(name)
            if not isinstance(value, str):
                self.other |= set() if value is None else {name}
            elif name not in self.lettered and has_letter(value):
                self.lettered.add(name)

    @property
    def texts(self) -> list[str]:
        texts = [name for name in self.names if name in self.lettered]
        return [name for name in texts if name not in self.other] or texts


def _read_csv(path: Path) -> _Table:
    """Parse a file with each separator and each style of quotes; take the first style that one separator fits."""
    check_not_empty(path)
    tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
    with open_text(path, newline="") as file:
        begin, header = next((number, line) for number, line in enumerate(file, 1) if line.strip("\r\n"))
        escaped, doubled = False, False  # a quote by a backslash; a backslash before a quote that is doubled
        for line in file:
            if '\\"' in line:
                escaped, doubled = True, doubled or re.search(r'\\""[^,;\t|\r\n]', line) is not None
    separators = "\t" if tabs else "".join(one for one in SEPARATORS if one in header) or ","
    if told := re.fullmatch(r'"?sep=(.)"?\r?\n?', header):
        separators, begin = told[1], begin + 1
    quoted = {"strict": True, "skipinitialspace": not tabs}
    styles: list[dict[str, Any]] = [quoted]
    if escaped:
        styles.insert(1 if doubled else 0, {**quoted, "escapechar": "\\"})
    styles += [{"quoting": csv.QUOTE_NONE}] if tabs else []
    failures = []
    for style in styles:
        fits = []
        for separator in separators:
            try:
                fits.append(_try_csv(path, begin, delimiter=separator, **style))
            except _TableError as error:
                failures.append(error)
        fits = [fit for fit in fits if len(fit.names) > 1] or fits[:1]
        if len(fits) > 1:
            raise _TableError("more than one separator fits it: say which in a first line, such as sep=;")
        if fits:
            return fits[0]
    raise max(failures, key=lambda failure: failure.line)  # what was read furthest was most likely meant


def _try_csv(path: Path, begin: int, **style: Any) -> _Table:
    """Check that a file can be parsed by these rules."""
    lines = _parse(path, begin, **style)
    _, names = next(lines, (0, None))
    if names is None:
        raise _TableError("there is no header")
    found = _Columns(names)
    for _, row in lines:
        found.add(dict(zip(names, row, strict=True)))

    def rows(name: str) -> Iterator[tuple[int, Any]]:
        place, lines = names.index(name), _parse(path, begin, **style)
        next(lines)
        return ((number, row[place]) for number, row in lines)

    return _Table(names, found.texts, found.n_rows, "line", rows)


def _parse(path: Path, begin: int, **style: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a file from a line on, header included, and the lines in which they begin."""
    number, width, limit = begin, 0, csv.field_size_limit(LONGEST_FIELD)
    try:
        with open_text(path, newline="") as file:
            for _ in range(1, begin):
                next(file)
            reader = csv.reader(file, **style)
            for row in reader:
                width = width or len(row)
                if row and len(row) != width:
                    raise _TableError(f"{len(row)} fields, but the header has {width}", number)
                if row:
                    yield number, row
                number = begin + reader.line_num
    except csv.Error as error:
        unclosed = any(words in str(error) for words in ("end of data", "field larger"))
        raise _TableError("a double quote is never closed" if unclosed else error, number) from error
    finally:
        csv.field_size_limit(limit)


def _read_json(path: Path) -> _Table:
    check_not_empty(path)
    with open_text(path) as file:
        is_array = next(line for line in file if line.strip()).lstrip().startswith("[")
    read, unit = (_array, "row") if is_array else (_json_lines, "line")
    found = _Columns()
    for number, row in read(path):
        if not isinstance(row, dict):
            raise _TableError(f"{unit} {number} is {reprlib.repr(row)}, no object")
        found.add(row)

    def rows(name: str) -> Iterator[tuple[int, Any]]:
        return ((number, row.get(name)) for number, row in read(path))

    return _Table(list(found.names), found.texts, found.n_rows, unit, rows)


def _array(path: Path) -> Iterator[tuple[int, Any]]:
    with open_text(path) as file:
        return enumerate(_parse_json(file.read(), 1), 1)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open_text(path, newline="\n") as file:  # no other character ends a line
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse_json(line.removesuffix("\n"), number)


def _parse_json(text: str, number: int) -> Any:
    """Parse JSON that begins in a line of this number."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _TableError(f"{error.msg} in column {error.colno}", number + error.lineno - 1) from error
    except RecursionError as error:
        raise _TableError("it is nested too deeply", number) from error


def _read_parquet(path: Path) -> _Table:
    def rows(name: str) -> Iterator[tuple[int, Any]]:
        start = 1
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=[name]):
                column = batch.column(name)
                column.validate(full=True)
                yield from enumerate(column.to_pylist(), start)
                start += len(column)

    with parquet.ParquetFile(path) as file:
        schema, n_rows = file.schema_arrow, file.metadata.num_rows
    texts = [field.name for field in schema if _is_text(field.type)]
    return _Table(schema.names, texts, n_rows, "row", rows)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view")
