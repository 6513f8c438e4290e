"""The seven STS tests: from local files, or from the hub.

Two protocols score them, and must not share a column: SimCSE's ("all": the pairs of all subsets in one Spearman
correlation) and mteb's. On STS12 to STS16 and STS-B they have the same pairs and agree. SICK-R they take from
different pairs: SimCSE the 4,927 of the test split, mteb all 9,927.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from huggingface_hub import hf_hub_download
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator


@dataclass(frozen=True)
class StsTest:
    """One test: its data set on the hub as mteb pins it, the name of its local file, the pairs that SimCSE scores."""

    path: str
    revision: str
    file: str
    pairs: int


STSB, SICK = "STSBenchmark", "SICK-R"
STS_TESTS = {  # by the names of mteb's tasks
    "STS12": StsTest("mteb/sts12-sts", "a0d554a64d88156834ff5ae9920b964011b16384", "STS12", 3108),
    "STS13": StsTest("mteb/sts13-sts", "7e90230a92c190f1bf69ae9002b8cea547a64cca", "STS13", 1500),
    "STS14": StsTest("mteb/sts14-sts", "6031580fec1f6af667f0bd2da0a551cf4f0b2375", "STS14", 3750),
    "STS15": StsTest("mteb/sts15-sts", "ae752c7c21bf194d8b67fd573edf7ae58183cbe3", "STS15", 3000),
    "STS16": StsTest("mteb/sts16-sts", "4d8694f8f0e0100860b497b999b3dbed754a0513", "STS16", 1186),
    STSB: StsTest("mteb/stsbenchmark-sts", "b0fddb56ed78048fa8b90373c8a3cfc37b684831", "STSB", 1379),
    SICK: StsTest("mteb/sickr-sts", "20a6d6f312dd54037fe07a32d58e5e168867909d", "SICK-R", 4927),
}
SENTEVAL = "princeton-nlp/datasets-for-simcse"  # holds senteval.tar, in which SICK-R still has its splits


def load_sts(name: str, split: str = "test", data_dir: str | Path | None = None) -> Dataset:
    """Load the pairs of an STS test as SimCSE scores them.

    Args:
        name: of `STS_TESTS`.
        split: "test", or for STSBenchmark also "train" and "dev".
        data_dir: holds `sts/NAME.tsv` or `.tsv.gz` (STS12 to STS16, STSB, SICK-R; unquoted, with the columns `split`,
            `score`, `sentence1` and `sentence2`); without it they come from the hub.

    Returns:
        The columns `sentence1`, `sentence2` and `score`.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if there are no such pairs, or a test has not as many as it should.
    """
    test = STS_TESTS[name]
    if data_dir is not None:
        source: Any = find_sts_file(name, data_dir)
        pairs = read_pairs(source, split)
    elif name == SICK:
        source = SENTEVAL
        pairs = _read_sick(hf_hub_download(SENTEVAL, "senteval.tar", repo_type="dataset"))
    else:
        source = test.path
        pairs = load_dataset(source, revision=test.revision, split={"dev": "validation"}.get(split, split))
        pairs = pairs.select_columns(["sentence1", "sentence2", "score"])
    if split == "test":
        check_pairs(name, len(pairs), test.pairs, source)
    return pairs


def sts_source(name: str, data_dir: str | Path | None) -> dict[str, str]:
    """Name the data that `load_sts` reads, so that scores of other data are told apart."""
    if data_dir is not None:
        return file_source(find_sts_file(name, data_dir))
    if name == SICK:
        return {"path": SENTEVAL, "revision": "main"}
    return {"path": STS_TESTS[name].path, "revision": STS_TESTS[name].revision}


def sts_evaluator(pairs: Dataset, name: str, batch_size: int = 32) -> EmbeddingSimilarityEvaluator:
    """Return sentence-transformers' evaluator of pairs with gold scores, by cosine.

    It also serves in training, as `sts_evaluator(load_sts("STSBenchmark", "dev"), "sts-dev")`.

    Args:
        pairs: the columns `sentence1`, `sentence2` and `score`.
        name: prefix of its metrics; the one to choose a model by is `NAME_spearman_cosine`.
        batch_size: texts in a batch.
    """
    columns = [list(pairs[column]) for column in ("sentence1", "sentence2", "score")]
    return EmbeddingSimilarityEvaluator(*columns, batch_size, main_similarity="cosine", name=name, write_csv=False)


def find_sts_file(name: str, data_dir: str | Path) -> Path:
    """Return the local file of a test, `.tsv.gz` or `.tsv`.

    Raises:
        FileNotFoundError: if neither is there.
    """
    stem = Path(data_dir) / "sts" / STS_TESTS[name].file
    for path in (stem.with_name(f"{stem.name}.tsv.gz"), stem.with_name(f"{stem.name}.tsv")):
        if path.is_file():
            return path
    raise FileNotFoundError(f"'{stem}.tsv.gz' and '{stem}.tsv' are missing: put one there, or leave out data_dir.")


def read_pairs(path: Path, split: str | None) -> Dataset:
    """Read the pairs of one split of a local STS file, or of all splits (None)."""
    table = read_table(path, ("split", "score", "sentence1", "sentence2"))
    chosen = [row for row, name in enumerate(table["split"]) if split in (None, name)]
    if not chosen:
        there = ", ".join(sorted(set(table["split"])))
        raise ValueError(f"{str(path)!r} has no row of split={split!r}; it has: {there}.")
    texts = {side: [table[side][row] for row in chosen] for side in ("sentence1", "sentence2")}
    return Dataset.from_dict({**texts, "score": [float(table["score"][row]) for row in chosen]})


def check_pairs(name: str, found: int, expected: int, source: Any) -> None:
    """Refuse pairs that are not the whole test."""
    if found != expected:
        raise ValueError(f"{name} has {expected} pairs, {str(source)!r} holds {found}: scores would not be comparable.")


def read_table(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    """Read columns of an unquoted, tab-separated table with a header, gzipped or not.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column, a value or every row is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is no file.")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        there = reader.fieldnames or ()
        missing = [column for column in columns if column not in there]
        if missing:
            raise ValueError(f"{str(path)!r} has no column {missing[0]!r}; it has: {', '.join(there)}.")
        rows = list(reader)
    short = [line for line, row in enumerate(rows, 2) if any(row[column] is None for column in columns)]
    if short or not rows:
        raise ValueError(f"{str(path)!r} has " + (f"too few fields in line {short[0]}." if short else "no rows."))
    return {column: [row[column] for row in rows] for column in columns}


def file_source(path: Path) -> dict[str, str]:
    """Name a local file and its content."""
    return {"path": path.name, "revision": f"local-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"}


def _read_sick(archive: str) -> Dataset:
    """Read the test split of SICK from SentEval's archive."""
    with tarfile.open(archive) as files:
        [member] = [one for one in files.getmembers() if one.name.endswith("SICK_test_annotated.txt")]
        file = files.extractfile(member)
        assert file is not None
        rows = list(csv.DictReader(io.TextIOWrapper(file, "utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE))
    texts = {"sentence1": [row["sentence_A"] for row in rows], "sentence2": [row["sentence_B"] for row in rows]}
    return Dataset.from_dict({**texts, "score": [float(row["relatedness_score"]) for row in rows]})
