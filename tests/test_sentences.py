"""Reading a corpus: every format, and every way in which a file or a list can be wrong."""

from __future__ import annotations

import csv
import gzip
import io
import logging
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from st_clusterns import columns
from st_clusterns.training import sentences as module
from st_clusterns.training.sentences import SentenceFile, check_sentences, read_sentences, store_distinct

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
    "csv of semicolons": ("a.csv", "id;text\n1;A café.\n2;Hello, world\n", None),
    "csv of semicolons and decimal commas": ("a.csv", "x;text\n1,5;A café.\n2,5;Hello, world\n", "text"),
    "csv that tells its separator": ("a.csv", "sep=;\nid;text\n1;A café.\n2;Hello, world\n", None),
    "csv of bars": ("a.csv", "id|text\r\n1|A café.\r\n2|Hello, world\r\n", None),
    "csv of tabs": ("a.csv", "id\ttext\n1\tA café.\n2\tHello, world\n", None),
    "csv with spaces after commas": ("a.csv", 'id, text\n1, A café.\n2, "Hello, world"\n', "text"),
    "csv with an empty first line": ("a.csv", '\ntext\nA café.\n"Hello, world"\n', None),
    "csv of an old Mac": ("a.csv", 'text\rA café.\r"Hello, world"\r', None),
    "csv of quoted names": ("a.csv", '"the; id","text"\n1,A café.\n2,"Hello, world"\n', "text"),
    "Unicode text of Excel": ("a.csv", "id\ttext\r\n1\tA café.\r\n2\tHello, world\r\n".encode("utf-16"), None),
    "tsv in quotes": ("a.tsv", '"id"\t"text"\n"1"\t"A café."\n"2"\t"Hello, world"\n', None),
    "json array": ("a.json", '[{"text": "A café."},\n {"text": "Hello, world"}]', None),
    "jsonl with other fields of mixed types": (
        "a.jsonl",
        '{"id":1,"tags":["a"],"text":"A café."}\n{"id":"x","tags":{"a":1},"text":"Hello, world"}\n{"id":null}',
        None,
    ),
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
    "backslashes in csv": ("a.csv", 'text\n"size 5\\" pipe"\n"C:\\\\"\n', ['size 5" pipe', "C:\\"]),
    "a backslash at the end": ("a.csv", 'text\n"C:\\"\nplain\n', ["C:\\", "plain"]),
    "doubled quotes in tsv": ("a.tsv", 'text\n"he said ""no"" twice"\nplain\n', ['he said "no" twice', "plain"]),
    "quoted lines in tsv": ("a.tsv", 'text\n"first line\nsecond"\nplain\n', ["first line\nsecond", "plain"]),
    "a very long field": ("a.csv", f'text\n"{"x" * 300_000}"\nb\n', ["x" * 300_000, "b"]),
    "UTF-16": ("a.txt", "a\nb".encode("utf-16"), ["a", "b"]),
    "Unicode line ends in jsonl": ("a.jsonl", '{"t":"a\u2028b"}\n{"t":"c"}', ["a\u2028b", "c"]),
    "inches in csv": ("a.csv", 'text\n5" pipe\nb\n', ['5" pipe', "b"]),
    "NA is a word": ("a.csv", "text\nNA\nnull\nhello\n", ["NA", "null", "hello"]),
    "numbers among words": ("a.csv", "text\n1\n2\nthree\n", ["1", "2", "three"]),
    "dates among words": ("a.jsonl", '{"t":"2020-01-01"}\n{"t":"b"}', ["2020-01-01", "b"]),
    "duplicates in order": ("a.txt", "b\na\nb\nb\n", ["b", "a", "b", "b"]),
    "numbers, then one word late": ("a.csv", "text\n" + "7\n" * 600_000 + "word\n", ["7"] * 600_000 + ["word"]),
    "a row longer than a block": ("a.jsonl", f'{{"t":"{"x" * 3_000_000}"}}\n{{"t":"b"}}\n', ["x" * 3_000_000, "b"]),
}


@pytest.mark.parametrize(("name", "content", "wanted"), EXACT.values(), ids=EXACT)
def test_reads_exactly(tmp_path: Path, name: str, content: Any, wanted: list[str]) -> None:
    assert read_sentences(write(tmp_path, name, content)) == wanted


CELLS = st.text(st.sampled_from("ab\"',;|\t\n \\é字"), max_size=6).map(lambda cell: f"x{cell}x")


@settings(max_examples=200, deadline=None)
@example([("xx", 'x\\\\"x', "0")], ",", csv.QUOTE_MINIMAL, "\n", False)
@given(
    st.lists(st.tuples(CELLS, CELLS, st.integers().map(str)), min_size=1, max_size=6),
    st.sampled_from(columns.SEPARATORS),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_what_a_csv_writer_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, str]],
    separator: str,
    quoting: Any,
    end: str,
    told: bool,
) -> None:
    """Whatever the separator, the quotes and the line ends."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerows([("a", "b", "n"), *rows])
    head = f"sep={separator}{end}" if told else ""
    path = tmp_path_factory.mktemp("csv") / ("a.tsv" if separator == "\t" else "a.csv")
    path.write_bytes((head + file.getvalue()).encode())
    table = columns.read_table(path, ("b", "a", "n"))
    assert list(zip(table["a"], table["b"], table["n"], strict=True)) == rows


@pytest.mark.parametrize("style", [{}, {"sep": ";"}, {"sep": "\t"}, {"escapechar": "\\", "doublequote": False}])
def test_what_pandas_writes_is_read(tmp_path: Path, style: dict[str, Any]) -> None:
    texts = ['say "no"', "a, b; c", "two\nlines", "tab\there", 'end"', "plain"]
    frame = pd.DataFrame({"id": range(6), "text": texts})
    path = tmp_path / ("a.tsv" if style.get("sep") == "\t" else "a.csv")
    frame.to_csv(path, index=False, **style)
    assert read_sentences(path) == texts
    frame.to_json(tmp_path / "a.json", orient="records")
    assert read_sentences(tmp_path / "a.json") == texts


def test_logs_what_it_dropped_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "st_clusterns")
    read_sentences(write(tmp_path, "a.csv", "id,text\n1,a\n2, \n3,a\n4,b\n5,a\n6,\n"))
    assert "reading the column 'text'" in caplog.text
    assert "4 sentences; dropped 2 blank rows" in caplog.text


LONG = {
    "txt": lambda n: "".join(f"line {i}\n" for i in range(n)),
    "csv": lambda n: "id;text;n\n" + "".join(f'{i};"say ""line, {i}""";1\n' for i in range(n)),
    "tsv": lambda n: "text\tid\n" + "".join(f'"line {i}\t{i}\n' for i in range(n)),  # quotes that are never closed
    "jsonl": lambda n: "".join(f'{{"id": {i}, "text": "line {i}"}}\n' for i in range(n)),
}


@pytest.mark.parametrize("suffix", LONG)
def test_memory_does_not_grow_with_the_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "LONGEST_FIELD", 10_000)
    peaks = []
    for count in (2_000, 20_000):
        path = write(tmp_path, f"{count}.{suffix}", LONG[suffix](count))
        tracemalloc.start()
        assert sum(1 for _ in SentenceFile(path, "text" if suffix != "txt" else None)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 10_000, peaks
    assert peaks[1] < path.stat().st_size, "a canary: the whole file would show"


def test_a_file_can_be_read_again(tmp_path: Path) -> None:
    sentences = SentenceFile(write(tmp_path, "a.txt", TEXT))
    assert list(sentences) == list(sentences) == WANTED


def test_far_errors_name_their_line(tmp_path: Path) -> None:
    """Behind the first block that is decoded, and behind characters of several bytes."""
    path = write(tmp_path, "a.txt.gz", ("é" * 30 + "\n").encode() * 100_000 + b"\xe9\n")
    with pytest.raises(ValueError, match="byte 0xe9 in line 100001"):
        read_sentences(path)


@pytest.mark.parametrize("texts", [list("abcacb"), list("abc"), ["é" * 9, "\u2028", "é" * 9]])
def test_distinct_texts_are_stored_in_their_order(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 2)
    dataset = store_distinct(iter(texts), tmp_path / "a.arrow")
    assert dataset["sentence"][:] == list(dict.fromkeys(texts))
    assert [file["filename"] for file in dataset.cache_files] == [str(tmp_path / "a.arrow")], "read from the file"


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
    "only invisible space": ("a.txt", "\u3000\n\u00a0\n", None, ["is empty", "no sentence"]),
    "only a header": ("a.csv", "id,text", None, ["no rows"]),
    "only a header with inches": ("a.csv", 'id,5" pipe\n', None, ["no rows"]),
    "only a separator": ("a.csv", "sep=;\n", None, ["there is no header"]),
    "empty array": ("a.json", "[]", None, ["no rows"]),
    "only blank values": ("a.csv", 'text\n" "\n""\n', "text", ["no sentence", "2 rows"]),
    "only nulls": ("a.jsonl", '{"text":null}', None, ["no column of text", "'text'"]),
    "only nulls, named": ("a.jsonl", '{"text":null}', "text", ["no sentence", "1 rows"]),
    "only numeric nulls": ("a.parquet", {"n": pa.array([None], pa.int64())}, "n", ["no sentence", "1 rows"]),
    "column of a txt": ("a.txt", TEXT, "text", ["column='text'", "no table", "leave it out"]),
    "several columns": ("a.csv", "a,b,n\nx,y,1\n", None, ["column=None", "2 columns", "'a', 'b' (", "--column"]),
    "several columns of json": ("a.jsonl", '{"a":"x"}\n{"b":"y"}', None, ["column=None", "2 columns", "'a', 'b' ("]),
    "no text column": ("a.csv", "a,b\n1,2.5\n", None, ["no column of text", "'a', 'b'"]),
    "no text column of parquet": ("a.parquet", {"a": [1], "b": [["x"]]}, None, ["no column of text", "'a', 'b'"]),
    "dates": ("a.csv", "day\n2020-01-01\n2020-01-02 10:00\n", "day", ["column='day'", "no text", "'2020-01-01'"]),
    "no column": ("a.jsonl", "{}\n{}\n", None, ["no column of text", "none at all"]),
    "absent column": ("a.csv", "id,text\n1,x\n", "Text", ["column='Text'", "is not in", "'id', 'text'"]),
    "absent column of parquet": ("a.parquet", {"text": ["x"]}, "t", ["column='t'", "is not in", "'text'"]),
    "absent column of json": ("a.json", '[{"text":"x"}]', "t", ["column='t'", "is not in", "'text'"]),
    "column twice": ("a.csv", "t,t\nx,y\n", "t", ["column='t'", "2 times", "rename"]),
    "column twice, unnamed": ("a.csv", "t,t,n\nx,y,2\n", None, ["column='t'", "2 times", "rename"]),
    "numbers": ("a.csv", "id,text\n7,x\n8,y\n", "id", ["column='id'", "no text", "'7'", "choose a column"]),
    "numbers, late": ("a.jsonl", '{"n":null}\n\n{"n":2.5}', "n", ["column='n'", "float 2.5 in line 3", "choose"]),
    "numbers of parquet": ("a.parquet", {"n": [None, 3]}, "n", ["column='n'", "int 3 in row 2", "choose"]),
    "truth values": ("a.jsonl", '{"t":true}', "t", ["column='t'", "bool True in line 1"]),
    "lists": ("a.parquet", {"t": [["x"]]}, "t", ["column='t'", "list ['x'] in row 1"]),
    "lists of json": ("a.jsonl", '{"t":["x","y"]}', "t", ["column='t'", "list ['x', 'y'] in line 1"]),
    "bytes": ("a.parquet", {"t": [b"x"]}, "t", ["column='t'", "bytes b'x' in row 1"]),
    "not UTF-8 txt": ("a.txt", NOT_UTF8, None, ["not UTF-8", "byte 0xe9 in line 2", "iconv"]),
    "not UTF-8 csv": ("a.csv", NOT_UTF8, None, ["not UTF-8", "byte 0xe9 in line 2", "iconv"]),
    "not UTF-8 jsonl": ("a.jsonl", b'{"t":"\xe9"}', None, ["not UTF-8", "byte 0xe9 in line 1", "iconv"]),
    "not UTF-8 gz": ("a.tsv.gz", NOT_UTF8, None, ["not UTF-8", "byte 0xe9 in line 2", "iconv"]),
    "not UTF-8 parquet": ("a.parquet", {"t": BAD_UTF8}, None, ["cannot be read", "Invalid UTF8"]),
    "half of UTF-16": ("a.txt", "hello".encode("utf-16")[:-1], None, ["not UTF-8", "in line 1"]),
    "csv of uneven rows": ("a.csv", "id,text\n1,x\n2,y,z\n", None, ["line 3: 3 fields", "header has 2"]),
    "csv of short rows": ("a.csv", 'id,text\n1,"x\ny"\n2\n', None, ["line 4: 1 fields", "header has 2"]),
    "csv of uneven semicolons": ("a.csv", "sep=;\nid;text\n1;x\n2;y;z\n", None, ["line 4: 3 fields", "header has 2"]),
    "csv of commas in its texts": ("a.csv", "text\nhello, world\n", None, ["line 2: 2 fields", "header has 1"]),
    "csv of two separators": ("a.csv", "a;b,c\n1;x,y\n", None, ["more than one separator", "sep=;"]),
    "tsv of uneven rows": ("a.tsv", "id\ttext\n1\tx\n2\n", None, ["line 3: 1 fields", "header has 2", "tabs"]),
    "tsv of uneven rows and quotes": ("a.tsv", 'a\tb\n1\t"x" y\n2\n', None, ["line 3: 1 fields", "header has 2"]),
    "csv with an open quote": ("a.csv", 'id,text\n1,x\n2,"y\n3,z\n', None, ["line 3", "never closed"]),
    "csv with a last open quote": ("a.csv", 'text\nx\n"y', None, ["line 3", "never closed"]),
    "csv with text behind a quote": ("a.csv", 'text\n"x\ny"\n"a" b\n', None, ["line 4", "',' expected after"]),
    "broken jsonl": ("a.jsonl", '{"t":"a"}\n{"t" "b"}\n', None, ["line 2: Expecting ':'", "column 6"]),
    "cut jsonl": ("a.jsonl", '{"t":"a"}\n\n{"t":"b', None, ["line 3: Unterminated string"]),
    "cut json": ("a.json", '[{"t":"a"},\n{"t":"b"}', None, ["line 2: Expecting ','"]),
    "deep json": ("a.json", "[" * 200_000, None, ["nested too deeply"]),
    "json of numbers": ("a.json", "[1]", None, ["row 1 is 1, no object"]),
    "jsonl of arrays": ("a.jsonl", '{"t":"a"}\n["b"]', None, ["line 2 is ['b'], no object"]),
    "indented json": ("a.json", '{\n"t": "a"\n}', None, ["line 1: Expecting property name", "one JSON object a line"]),
    "jsonl of mixed types": ("a.jsonl", '{"t":"a"}\n{"t":1}\n', None, ["column='t'", "int 1 in line 2"]),
    "broken parquet": ("a.parquet", PARQUET, None, ["cannot be read", "Expected a Parquet file"]),
    "parquet that is text": ("a.parquet", TEXT, None, ["cannot be read", "magic bytes"]),
}


@pytest.mark.parametrize(("name", "content", "column", "words"), BAD.values(), ids=BAD)
def test_refuses(tmp_path: Path, name: str, content: Any, column: str | None, words: list[str]) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are matched below
        read_sentences(path, column)
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


CORPORA: dict[str, Callable[[], Any]] = {
    "list": lambda: FOUR,
    "tuple": lambda: tuple(FOUR),
    "generator": lambda: (text for text in FOUR),
    "array": lambda: np.array(FOUR),
    "array of objects": lambda: np.array(FOUR, dtype=object),
    "column of pandas": lambda: pd.DataFrame({"text": ["x", *FOUR]})[1:]["text"],  # its labels begin at 1
    "column of categories": lambda: pd.Series(FOUR, dtype="category"),
    "column of Dataset": lambda: Dataset.from_dict({"text": FOUR})["text"],
}


@pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)
def test_check_returns_a_list(corpus: Callable[[], Any]) -> None:
    found = check_sentences(corpus(), batch_size=4)
    assert (type(found), found) == (list, FOUR)


@pytest.mark.parametrize(
    ("corpus", "batch_size", "words"),
    [
        ("a sentence", 2, ["must be a list of str", "got str 'a sentence'", "put a single sentence in a list"]),
        (b"a sentence", 2, ["must be a list of str", "got bytes"]),
        (None, 2, ["must be a list of str", "got NoneType"]),
        ({"a", "b"}, 2, ["must be a list of str", "got set"]),
        ({"text": FOUR}, 2, ["must be a list of str", "got dict", "frame['text'].tolist()"]),
        (pd.DataFrame({"text": FOUR}), 2, ["got DataFrame", "frame['text'].tolist()"]),
        (pa.table({"text": FOUR}), 2, ["got Table", "frame['text'].tolist()"]),
        (Dataset.from_dict({"text": FOUR}), 2, ["got Dataset", "frame['text'].tolist()"]),
        (Dataset.from_dict({"text": FOUR}).to_iterable_dataset(), 2, ["got IterableDataset", "frame['text'].tolist()"]),
        (pd.Series(["a", None, "b"]), 2, ["sentences[1] is", "drop it or convert it"]),
        (np.array([FOUR]), 2, ["sentences[0] is ndarray"]),
        (np.arange(9), 2, ["sentences[0] is int64"]),
        (["a", "b", " \n"], 2, ["sentences[2] is blank, ' \\n': drop it"]),
        (["a", "", "b"], 2, ["sentences[1] is blank, '': drop it"]),
        (["a", "b\ud800"], 2, ["sentences[1] is no valid Unicode, 'b\\ud800'"]),
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
