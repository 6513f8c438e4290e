"""The seven STS tests, from local files or from the hub.

Two protocols score them: SimCSE's (one Spearman correlation over the pairs of all subsets) and mteb's. They use the
same pairs, except in SICK-R: SimCSE scores the 4,927 pairs of the test split, mteb all 9,927.
"""

from __future__ import annotations

import csv
import hashlib
import io
import tarfile
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, load_dataset
from huggingface_hub import hf_hub_download
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from st_clusterns.columns import read_table


class StsTest(NamedTuple):
    """A test: its data set on the hub, the name of its local file, and the number of pairs that SimCSE scores."""

    path: str
    revision: str
    file: str
    pairs: int


STSB, SICK = "STSBenchmark", "SICK-R"
STS_TESTS = {  # names, data sets and revisions are mteb's
    "STS12": StsTest("mteb/sts12-sts", "a0d554a64d88156834ff5ae9920b964011b16384", "STS12", 3108),
    "STS13": StsTest("mteb/sts13-sts", "7e90230a92c190f1bf69ae9002b8cea547a64cca", "STS13", 1500),
    "STS14": StsTest("mteb/sts14-sts", "6031580fec1f6af667f0bd2da0a551cf4f0b2375", "STS14", 3750),
    "STS15": StsTest("mteb/sts15-sts", "ae752c7c21bf194d8b67fd573edf7ae58183cbe3", "STS15", 3000),
    "STS16": StsTest("mteb/sts16-sts", "4d8694f8f0e0100860b497b999b3dbed754a0513", "STS16", 1186),
    STSB: StsTest("mteb/stsbenchmark-sts", "b0fddb56ed78048fa8b90373c8a3cfc37b684831", "STSB", 1379),
    SICK: StsTest("mteb/sickr-sts", "20a6d6f312dd54037fe07a32d58e5e168867909d", "SICK-R", 4927),
}
SENTEVAL = "princeton-nlp/datasets-for-simcse"  # its senteval.tar has the splits of SICK-R, which mteb's data lack
PAIR = ["sentence1", "sentence2", "score"]


def load_sts(name: str, split: str = "test", data_dir: str | Path | None = None) -> Dataset:
    """Load the pairs of an STS test that SimCSE scores, with the columns `sentence1`, `sentence2` and `score`.

    `name` is a key of `STS_TESTS`. `split` is "test"; for STSBenchmark also "train" or "dev". `data_dir` is a folder
    of local files, see `find_sts_file` and `read_pairs`; by default the pairs come from the hub. Raises a
    FileNotFoundError if the file is missing, and a ValueError if a split, a column or pairs are missing.
    """
    test = STS_TESTS[name]
    if data_dir is not None:
        pairs = read_pairs(find_sts_file(name, data_dir), split)
    elif name == SICK:
        pairs = _read_sick(hf_hub_download(SENTEVAL, "senteval.tar", repo_type="dataset"))
    else:
        hub_split = "validation" if split == "dev" else split
        pairs = load_dataset(test.path, revision=test.revision, split=hub_split).select_columns(PAIR)
    if split == "test":
        check_pairs(name, len(pairs), test.pairs, data_dir or sts_source(name, None)["path"])
    return pairs


def sts_source(name: str, data_dir: str | Path | None) -> dict[str, str]:
    """Return path and revision of the data that `load_sts` reads."""
    if data_dir is not None:
        return file_source(find_sts_file(name, data_dir))
    path, revision = (SENTEVAL, "main") if name == SICK else STS_TESTS[name][:2]
    return {"path": path, "revision": revision}


def file_source(path: Path, *others: Path) -> dict[str, str]:
    """Return the name of a local file as path, and a hash of its content, and of others', as revision."""
    digest = hashlib.sha256(path.read_bytes())
    for other in others:
        digest.update(hashlib.sha256(other.read_bytes()).digest())
    return {"path": path.name, "revision": f"local-{digest.hexdigest()[:16]}"}


def sts_evaluator(pairs: Dataset, name: str, batch_size: int = 32) -> EmbeddingSimilarityEvaluator:
    """Return the evaluator of sentence-transformers for pairs of `load_sts`; primary metric: `NAME_spearman_cosine`."""
    columns = [list(pairs[column]) for column in PAIR]
    return EmbeddingSimilarityEvaluator(*columns, batch_size, main_similarity="cosine", name=name, write_csv=False)


def find_sts_file(name: str, data_dir: str | Path) -> Path:
    """Return the local file of a test, `sts/NAME.tsv.gz` or `.tsv`; NAME is STS12 to STS16, STSB or SICK-R."""
    stem = Path(data_dir) / "sts" / STS_TESTS[name].file
    for path in (Path(f"{stem}.tsv.gz"), Path(f"{stem}.tsv")):
        if path.is_file():
            return path
    raise FileNotFoundError(f"'{stem}.tsv.gz' and '{stem}.tsv' are missing: put one there, or leave out data_dir.")


def read_pairs(path: Path, split: str | None) -> Dataset:
    """Read one split, or all (None), of a local STS file with the columns split, score, sentence1 and sentence2."""
    table = read_table(path, ("split", *PAIR))
    chosen = [row for row, name in enumerate(table["split"]) if split in (None, name)]
    if not chosen:
        there = ", ".join(sorted(set(table["split"])))
        raise ValueError(f"{str(path)!r} has no row of split={split!r}; it has: {there}.")
    return _scored_pairs(path, *([table[column][row] for row in chosen] for column in PAIR))


def read_scored_pairs(path: Path) -> Dataset:
    """Read a table with the columns sentence1, sentence2 and score."""
    return _scored_pairs(path, *read_table(path, PAIR).values())


def _scored_pairs(path: Path, *columns: list[str]) -> Dataset:
    try:
        return _as_dataset(*columns)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} holds a score that is no number: {error}.") from error


def check_pairs(name: str, found: int, expected: int, source: str | Path) -> None:
    """Refuse pairs that are not the whole test."""
    if found != expected:
        raise ValueError(f"{name} has {expected} pairs, {str(source)!r} holds {found}: scores would not be comparable.")


def _read_sick(archive: str) -> Dataset:
    """Read the test split of SICK-R from SentEval's archive."""
    with tarfile.open(archive) as files:
        [member] = [one for one in files.getmembers() if one.name.endswith("SICK_test_annotated.txt")]
        file = files.extractfile(member)
        assert file is not None
        rows = list(csv.DictReader(io.TextIOWrapper(file, "utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE))
    columns = ("sentence_A", "sentence_B", "relatedness_score")
    return _as_dataset(*([row[column] for row in rows] for column in columns))


def _as_dataset(first: list[str], second: list[str], scores: list[str]) -> Dataset:
    return Dataset.from_dict({"sentence1": first, "sentence2": second, "score": [float(score) for score in scores]})
