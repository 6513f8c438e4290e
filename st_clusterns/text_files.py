"""Files of text, gzipped or not, in UTF-8 or UTF-16: opened as streams; what cannot be read is told with the line."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

BLOCK = 1 << 20  # bytes that are read at a time


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


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a file, gzipped or not, in UTF-8 or with the byte order mark of UTF-16; `newline` is that of `open`.

    Raises:
        ValueError: in the body of the `with`, if the file cannot be read or decoded, with the line.
    """
    with _open_bytes(path) as data:
        try:
            wide = data.peek(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            text = io.TextIOWrapper(data, "utf-16" if wide else "utf-8-sig", newline=newline)
            yield text
        except UnicodeDecodeError as error:
            place = data.tell() - len(error.object) + error.start  # what was decoded last ends where reading stands
            raise ValueError(
                f"{named(path)} is not UTF-8: byte 0x{error.object[error.start]:02x} in line {_line_at(path, place)}. "
                "Convert it first, for example with `iconv -f LATIN1 -t UTF-8`."
            ) from error
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{named(path)} cannot be read: {error}.") from error


def check_not_empty(path: Path) -> None:
    """Refuse, by a `ValueError`, a text file of white space."""
    with open_text(path) as file:
        if not any(line.strip() for line in file):
            raise ValueError(f"{named(path)} is empty: it holds no sentence.")


def named(path: Path) -> str:
    """Return what an error calls a file."""
    return f"path={str(path)!r}"


def _open_bytes(path: Path) -> Any:  # a `gzip.GzipFile` or an `io.BufferedReader`, which have `peek`
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _line_at(path: Path, place: int) -> int:
    """Return the line of a byte of the decompressed file."""
    line = 1
    with _open_bytes(path) as file:
        while place > 0 and (block := file.read(min(place, BLOCK))):
            line, place = line + block.count(b"\n"), place - len(block)
    return line
