"""Reading a corpus: every format, and every way in which a file or a list can be wrong."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from st_clusterns.training import sentences as module
from st_clusterns.training.sentences import check_sentences, count_duplicates, read_sentences

TEXT = "A café.\nHello, world\n"
WANTED = ["A café.", "Hello, world"]
NOT_UTF8 = "ok\nA café.\n".encode("latin-1")


def write(folder: Path, name: str, content: str | bytes | dict[str, Any] | None) -> Path:
    """Write one file: text, bytes, or the columns of a Parquet file; None writes nothing."""
    path = folder / name
    if isinstance(content, dict):
        parquet.write_table(pa.table(content), path)
    elif content is not None:
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    return path


GOOD = {
    "txt": ("a.txt", TEXT, None),
    "txt without a last newline": ("a.txt", TEXT.strip(), None),
    "txt from Windows": ("a.TXT", b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode(), None),
    "txt of white space": ("a.txt", "\n  A café. \t\n \u3000\nHello, world", None),
    "txt.gz": ("a.txt.gz", TEXT, None),
    "csv": ("a.csv", 'text\nA café.\n"Hello, world"\n', None),
    "csv with a named column": ("a.csv", 'title,text\nx,A café.\ny,"Hello, world"\n', "text"),
    "csv with an index": ("a.csv", ',text\n0,A café.\n1,"Hello, world"', None),
    "csv from Windows": ("a.csv", b"\xef\xbb\xbf" + 'text\r\nA café.\r\n"Hello, world"\r\n'.encode(), "text"),
    "csv of blanks": ("a.csv", 'id,text\n1,\n2,A café.\n\n3,"  "\n4,"Hello, world"\n', None),
    "csv.gz": ("a.csv.gz", 'text\nA café.\n"Hello, world"\n', None),
    "tsv": ("a.tsv", "id\ttext\n1\tA café.\n2\tHello, world\n", None),
    "tsv.gz": ("a.tsv.gz", "id\ttext\n1\tA café.\n2\tHello, world\n", "text"),
    "jsonl": ("a.jsonl", '{"text": "A caf\\u00e9."}\n{"text": "Hello, world"}\n', None),
    "json": ("a.json", '{"id": 1, "text": "A café."}\n\n{"id": 2, "text": "Hello, world"}', None),
    "jsonl of blanks": ("a.jsonl", '{"t":null}\n{"t":"A café."}\n{}\n{"t":" "}\n{"t":"Hello, world"}', "t"),
    "jsonl.gz": ("a.jsonl.gz", '{"text": "A café."}\n{"text": "Hello, world"}\n', None),
    "parquet": ("a.parquet", {"text": WANTED}, None),
    "parquet of several columns": ("a.parquet", {"title": ["x", "y"], "text": WANTED}, "text"),
    "parquet of nulls": ("a.parquet", {"id": [1, 2, 3], "text": [WANTED[0], None, WANTED[1]]}, None),
    "parquet of large strings": ("a.parquet", {"text": pa.array(WANTED, pa.large_string())}, None),
    "parquet of categories": ("a.parquet", {"text": pa.array(WANTED).dictionary_encode()}, None),
    "parquet with vectors": ("a.parquet", {"vector": [[1.0], [2.0]], "a.b": WANTED}, None),
}


@pytest.mark.parametrize(("name", "content", "column"), GOOD.values(), ids=GOOD)
def test_reads(tmp_path: Path, name: str, content: Any, column: str | None) -> None:
    path = write(tmp_path, name, content)
    assert read_sentences(path, column) == WANTED
    assert read_sentences(str(path), column) == WANTED
    assert list(tmp_path.iterdir()) == [path]  # no cache beside it


EXACT = {
    "only line ends end a line": ("a.txt", "a\u2028b\x0cc\x85d\ne", ["a\u2028b\x0cc\x85d", "e"]),
    "no quoting in txt": ("a.txt", '"a"\n"b, c"', ['"a"', '"b, c"']),
    "no quoting in tsv": ("a.tsv", 'text\n"a\nb" c\n', ['"a', 'b" c']),
    "quoted lines in csv": ("a.csv", 'text\n"a\nb"\n"say ""c"""\n', ["a\nb", 'say "c"']),
    "inches in csv": ("a.csv", 'text\n5" pipe\nb\n', ['5" pipe', "b"]),
    "NA is a word": ("a.csv", "text\nNA\nnull\nhello\n", ["NA", "null", "hello"]),
    "numbers among words": ("a.csv", "text\n1\n2\nthree\n", ["1", "2", "three"]),
    "dates among words": ("a.jsonl", '{"t":"2020-01-01"}\n{"t":"b"}', ["2020-01-01", "b"]),
    "duplicates in order": ("a.txt", "b\na\nb\nb\n", ["b", "a", "b", "b"]),
    "numbers, then one word late": ("a.csv", "text\n" + "7\n" * 600_000 + "word\n", ["7"] * 600_000 + ["word"]),
    "a row longer than a block": ("a.jsonl", f'{{"t":"{"x" * 3_000_000}"}}\n{{"t":"b"}}\n', ["x" * 3_000_000, "b"]),
}


@pytest.mark.parametrize(("name", "content", "wanted"), EXACT.values(), ids=EXACT)
def test_reads_exactly(tmp_path: Path, name: str, content: str, wanted: list[str]) -> None:
    assert read_sentences(write(tmp_path, name, content)) == wanted


def test_quoted_lines_cross_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BLOCK", 32)  # as in a file of more than 2 GB
    rows = [f"line\n{i}" for i in range(20)]
    path = write(tmp_path, "a.csv", "text\n" + "".join(f'"{row}"\n' for row in rows))
    assert read_sentences(path) == rows


def test_logs_what_it_dropped_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "st_clusterns.training.sentences")
    read_sentences(write(tmp_path, "a.csv", "id,text\n1,a\n2, \n3,a\n4,b\n5,a\n6,\n"))
    assert "reading the column 'text'" in caplog.text
    assert "4 sentences; dropped 2 blank rows, kept 2 exact duplicates" in caplog.text


def test_counts_duplicates() -> None:
    assert count_duplicates(["a", "b", "a", "a", "A"]) == 2


BAD_UTF8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xe9")]
)
PARQUET = b"PAR1" + b"\x00" * 20 + b"PAR1"

BAD = {
    "unknown suffix": ("a.docx", "x", None, ["unknown suffix", *module.FORMATS, ".gz"]),
    "no suffix": ("corpus", "x", None, ["unknown suffix"]),
    "bare gz": ("a.gz", "x", None, ["unknown suffix"]),
    "gzipped parquet": ("a.parquet.gz", "x", None, ["unknown suffix", "not .parquet"]),
    "empty": ("a.txt", "", None, ["is empty"]),
    "empty csv": ("a.csv", "\n \n", None, ["is empty"]),
    "empty jsonl": ("a.jsonl", "", None, ["is empty"]),
    "empty gz": ("a.txt.gz", "", None, ["is empty"]),
    "only a BOM": ("a.txt", b"\xef\xbb\xbf\n", None, ["is empty"]),
    "empty parquet": ("a.parquet", b"", None, ["cannot be read", "0 bytes"]),
    "only invisible space": ("a.txt", "\u3000\n\u00a0\n", None, ["no sentence", "2 rows"]),
    "only a header": ("a.csv", "id,text", None, ["no sentence", "0 rows"]),
    "only a header with inches": ("a.csv", 'id,5" pipe\n', None, ["no sentence", "0 rows"]),
    "only blank values": ("a.csv", 'text\n" "\n""\n', "text", ["no sentence", "2 rows"]),
    "only nulls": ("a.jsonl", '{"text":null}', None, ["no sentence", "1 rows"]),
    "only numeric nulls": ("a.parquet", {"n": pa.array([None], pa.int64())}, "n", ["no sentence", "1 rows"]),
    "column of a txt": ("a.txt", TEXT, "text", ["column='text'", "no table", "leave it out"]),
    "several columns": ("a.csv", "a,b,n\nx,y,1\n", None, ["column=None", "2 columns", "'a', 'b' (", "--column"]),
    "no text column": ("a.csv", "a,b\n1,2.5\n", None, ["no column of text", "'a' (int64)", "'b' (double)"]),
    "no column": ("a.jsonl", "{}\n{}\n", None, ["no column of text", "none at all"]),
    "absent column": ("a.csv", "id,text\n1,x\n", "Text", ["column='Text'", "is not in", "'id', 'text'"]),
    "absent column of parquet": ("a.parquet", {"text": ["x"]}, "t", ["column='t'", "is not in", "'text'"]),
    "column twice": ("a.csv", "t,t\nx,y\n", "t", ["column='t'", "2 times", "rename"]),
    "column twice, unnamed": ("a.csv", "t,t,n\nx,1,2\n", None, ["column='t'", "2 times", "rename"]),
    "numbers": ("a.csv", "id,text\n7,x\n8,y\n", "id", ["column='id'", "int64, not text", "row 1 is 7"]),
    "numbers, late": ("a.jsonl", '{"n":null}\n{"n":2.5}', "n", ["column='n'", "double, not text", "row 2 is 2.5"]),
    "lists": ("a.parquet", {"t": [["x"]]}, "t", ["column='t'", "list<", "row 1 is ['x']"]),
    "bytes": ("a.parquet", {"t": [b"x"]}, "t", ["column='t'", "binary, not text", "row 1 is b'x'"]),
    "not UTF-8 txt": ("a.txt", NOT_UTF8, None, ["not UTF-8", "byte 0xe9 in line 2", "iconv"]),
    "not UTF-8 csv": ("a.csv", NOT_UTF8, None, ["not UTF-8", "byte 0xe9 in line 2", "iconv"]),
    "not UTF-8 jsonl": ("a.jsonl", b'{"t":"\xe9"}', None, ["not UTF-8", "byte 0xe9 in line 1", "iconv"]),
    "not UTF-8 gz": ("a.tsv.gz", NOT_UTF8, None, ["not UTF-8", "byte 0xe9 in line 2", "iconv"]),
    "not UTF-8 parquet": ("a.parquet", {"t": BAD_UTF8}, None, ["cannot be read", "Invalid UTF8"]),
    "UTF-16": ("a.txt", "hello".encode("utf-16"), None, ["not UTF-8", "in line 1"]),
    "csv of uneven rows": ("a.csv", "id,text\n1,x\n2,y,z\n", None, ["Row #3: Expected 2 columns, got 3", "header"]),
    "tsv of uneven rows": ("a.tsv", "id\ttext\n1\tx\n2\n", None, ["Row #3: Expected 2 columns, got 1", "tabs"]),
    "csv with an open quote": ("a.csv", 'id,text\n1,x\n2,"y\n3,z\n', None, ["row 2", "never closed"]),
    "csv with a last open quote": ("a.csv", 'text\nx\n"y', None, ["row 2", "never closed"]),
    "broken jsonl": ("a.jsonl", '{"t":"a"}\n{"t" "b"}\n', None, ["Missing a colon", "in row 1", "row 0"]),
    "cut jsonl": ("a.jsonl", '{"t":"a"}\n{"t":"b', None, ["JSON parse error", "in row 1"]),
    "json array": ("a.json", '[{"t":"a"}]', None, ["changed from object to array", "one JSON object a line"]),
    "jsonl of mixed types": ("a.jsonl", '{"t":"a"}\n{"t":1}\n', None, ["Column(/t)", "string to number in row 1"]),
    "jsonl of half a character": ("a.jsonl", '{"t":"\\ud800"}', None, ["surrogate", "in row 0"]),
    "broken parquet": ("a.parquet", PARQUET, None, ["cannot be read", "Expected a Parquet file"]),
    "parquet that is text": ("a.parquet", TEXT, None, ["cannot be read", "magic bytes"]),
}


@pytest.mark.parametrize(("name", "content", "column", "words"), BAD.values(), ids=BAD)
def test_refuses(tmp_path: Path, name: str, content: Any, column: str | None, words: list[str]) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are matched below
        read_sentences(path, column)
    assert type(caught.value) is ValueError
    for word in [f"path={str(path)!r}", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("data", [b"hello\n", gzip.compress(b"hello\n" * 99)[:-9], b"\x1f\x8b\x08\x00" + b"\xff" * 20])
def test_refuses_broken_gzip(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.txt\.gz' cannot be read"):
        read_sentences(path)


def test_refuses_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        read_sentences("gone.txt")
    assert "path='gone.txt' does not exist" in str(caught.value)
    assert str(tmp_path / "gone.txt") in str(caught.value)


def test_refuses_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "corpus.txt"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"path='.*corpus\.txt' is a directory: name one file"):
        read_sentences(folder)


FOUR = ["a", "b", "c", "c"]


@pytest.mark.parametrize("corpus", [FOUR, tuple(FOUR), FOUR * 8])
def test_check_passes(corpus: list[str]) -> None:
    check_sentences(corpus, batch_size=4)


@pytest.mark.parametrize(
    ("corpus", "batch_size", "words"),
    [
        ("a sentence", 2, ["must be a list of str", "got str 'a sentence'", "put a single sentence in a list"]),
        (b"a sentence", 2, ["must be a list of str", "got bytes"]),
        (None, 2, ["must be a list of str", "got NoneType"]),
        ({"a", "b"}, 2, ["must be a list of str", "got set"]),
        (iter(FOUR), 2, ["must be a list of str", "got list_iterator"]),
        (["a", "b", None, 1, "c"], 2, ["sentences[2] is NoneType None"]),
        (["a", b"b", "c", "d"], 2, ["sentences[1] is bytes b'b'"]),
        ([["a"], "b", "c", "d"], 2, ["sentences[0] is list ['a']"]),
        (FOUR, 1, ["batch_size must be 2 or more, got 1"]),
        (FOUR, 5, ["batch_size=5", "4 sentences", "choose 4 or fewer"]),
    ],
)
def test_check_refuses(corpus: Any, batch_size: int, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are matched below
        check_sentences(corpus, batch_size)
    for word in words:
        assert word in str(caught.value)
