"""Collections for search: documents, queries, and which documents answer a query.

A collection is a folder of three tables (`st_clusterns.columns`), in the layout of BEIR (Thakur et al. 2021):

- `corpus.jsonl`: `_id`, `text`, and perhaps `title`, which is read before the text;
- `queries.jsonl`: `_id`, `text`;
- `qrels/test.tsv`: `query-id`, `corpus-id`, `score`, where 0 stands for a document that does not answer.

Other suffixes of tables, `.gz`, `docs` for `corpus`, `id` for `_id`, and `qrels` beside the other two will do. So will
a `qrels.json` that holds an object: for each query, the list of its documents.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import cos_sim

from st_clusterns.columns import TABLES, column_names, read_table
from st_clusterns.text_files import named, open_text

logger = logging.getLogger(__name__)
JUDGEMENTS = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True)
class Collection:
    """A collection for search.

    Attributes:
        documents: the text of each document, by its id.
        queries: the text of each query that has an answer, by its id.
        relevant: for each of these, the ids of the documents that answer it, with their grades, 1 or more.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, dict[str, int]]


def read_collection(folder: str | Path) -> Collection:
    """Read a collection from its folder.

    Raises:
        FileNotFoundError: if the folder or one of the tables is missing.
        ValueError: if a table cannot be read or repeats an id, or if no query has an answer among the documents.
    """
    documents, queries, qrels = find_tables(folder)
    texts, asked = _read_by_id(documents, "title"), _read_by_id(queries)
    relevant: dict[str, dict[str, int]] = {}
    for query, document, grade in _read_judgements(qrels):
        if grade > 0 and query in asked:
            relevant.setdefault(query, {})[document] = grade
    answers = [document for found in relevant.values() for document in found]
    missing = sum(document not in texts for document in answers)
    if missing == len(answers):
        raise ValueError(
            f"{named(qrels)} has no answer to a query of {queries.name} among the documents of {documents.name}: are "
            "the ids of one collection?"
        )
    if missing:
        logger.warning(f"{missing} of {len(answers)} answers in {qrels} are no documents: they count as not found.")
    return Collection(texts, {query: text for query, text in asked.items() if query in relevant}, relevant)


def find_tables(folder: str | Path) -> list[Path]:
    """Return the tables of documents, queries and judgements in a folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{named(folder)} is no folder (looked for {folder.absolute()}): check its name.")
    return [_find(folder, stems) for stems in (("corpus", "docs"), ("queries",), ("qrels/test", "qrels"))]


def search_evaluator(collection: Collection, name: str, batch_size: int = 32) -> InformationRetrievalEvaluator:
    """Return the evaluator of sentence-transformers: `NAME_cosine_ndcg@10`, `map@100`, `recall@100` and others."""
    return InformationRetrievalEvaluator(
        collection.queries,
        collection.documents,
        {query: set(answers) for query, answers in collection.relevant.items()},
        accuracy_at_k=[1],
        precision_recall_at_k=[100],
        batch_size=batch_size,
        name=name,
        write_csv=False,
        score_functions={"cosine": cos_sim},
        main_score_function="cosine",
    )


def _find(folder: Path, stems: Sequence[str]) -> Path:
    names = [f"{stem}{suffix}{gz}" for stem in stems for suffix in TABLES for gz in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    wanted = "qrels/test.tsv" if "qrels" in stems else f"{stems[0]}.jsonl"
    raise FileNotFoundError(f"{named(folder)} has no {wanted}: a collection for search has three tables.")


def _read_by_id(path: Path, before: str | None = None) -> dict[str, str]:
    """Return the texts of a table by their ids; what a column `before` holds comes before the text."""
    names = column_names(path)
    key = "_id" if "_id" in names else "id"
    ids, parts = read_table(path, [key])[key], [name for name in (before, "text") if name in names or name == "text"]
    columns = read_table(path, parts, gaps=True)
    texts = [" ".join(filter(None, map(str.strip, row))) for row in zip(*columns.values(), strict=True)]
    if len(set(ids)) < len(ids):
        [(twice, times)] = Counter(ids).most_common(1)
        raise ValueError(f"{named(path)} has the id {twice!r} {times} times: ids are distinct.")
    return dict(zip(ids, texts, strict=True))


def _read_judgements(path: Path) -> list[tuple[str, str, int]]:
    """Return query, document and grade of each judgement."""
    if set(JUDGEMENTS) - set(column_names(path)) and ".json" in path.suffixes:
        with open_text(path) as file:
            found = json.load(file)
        if isinstance(found, dict) and all(isinstance(answers, list) for answers in found.values()):
            return [(query, str(document), 1) for query, answers in found.items() for document in answers]
    table = read_table(path, JUDGEMENTS)
    try:
        grades = [int(float(score)) for score in table["score"]]
    except ValueError as error:
        raise ValueError(f"{named(path)} has a score that is no number: {error}.") from error
    return list(zip(table["query-id"], table["corpus-id"], grades, strict=True))
