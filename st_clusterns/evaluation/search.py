"""Collections for search: documents, queries, and which documents answer a query.

A collection is a folder of three tables (`st_clusterns.columns`), in the layout of BEIR (Thakur et al. 2021):

- `corpus.jsonl`: `_id`, `text`, and perhaps `title`, which is read before the text;
- `queries.jsonl`: `_id`, `text`;
- `qrels/test.tsv`: `query-id`, `corpus-id`, `score`, a whole number; 0 stands for a document that does not answer.

Other suffixes of tables, `.gz`, `docs` for `corpus`, `id` for `_id`, and `qrels` beside the other two will do. So will
a `qrels.json` with an object: for each query, the list of its documents, or an object of their scores.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        relevant: for each of these, the ids of the documents that answer it, with their scores, 1 or more.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, dict[str, int]]


def read_collection(folder: str | Path) -> Collection:
    """Read a collection from its folder.

    Raises:
        FileNotFoundError: if the folder or one of the tables is missing.
        ValueError: if a table cannot be read, if ids, queries or scores are unfit, or if no query has an answer among
            the documents.
    """
    documents, queries, qrels = find_tables(folder)
    texts, asked = _read_by_id(documents, "title"), _read_by_id(queries)
    if blank := [query for query, text in asked.items() if not text]:
        raise ValueError(f"{named(queries)} has no text for the query {blank[0]!r}: drop it.")
    relevant: dict[str, dict[str, int]] = {}
    for (query, document), score in _read_judgements(qrels).items():
        if score > 0 and query in asked:
            relevant.setdefault(query, {})[document] = score
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
    """Return the evaluator of sentence-transformers: `NAME_cosine_ndcg@10`, `map@100`, `recall@100` and others.

    It knows answers and no grades: a score of 2 or more counts as 1.
    """
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
    found = [name for name in names if (folder / name).is_file()]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise ValueError(f"{named(folder)} has {' and '.join(found)}: move all but one away.")
    wanted = "qrels/test.tsv" if "qrels" in stems else f"{stems[0]}.jsonl"
    others = sorted(path.name for path in folder.glob("qrels/*")) if "qrels" in stems else []
    hint = f"copy one of {', '.join(others)} there" if others else "a collection for search has three tables"
    raise FileNotFoundError(f"{named(folder)} has no {wanted}: {hint}.")


def _read_by_id(path: Path, before: str | None = None) -> dict[str, str]:
    """Return the texts of a table by their ids; what a column `before` holds comes before the text."""
    names = column_names(path)
    key = "_id" if "_id" in names else "id"
    columns = read_table(path, [key, *([before] if before in names else []), "text"], gaps=True)
    ids = columns.pop(key)
    [(most, times)] = Counter(ids).most_common(1)
    if times > 1 or "" in ids:
        fault = "a row without an id" if "" in ids else f"the id {most!r} {times} times"
        raise ValueError(f"{named(path)} has {fault}: each row has an id of its own.")
    rows = zip(*columns.values(), strict=True)
    return {one: " ".join(filter(None, map(str.strip, row))) for one, row in zip(ids, rows, strict=True)}


def _read_judgements(path: Path) -> dict[tuple[str, str], int]:
    """Return the score of each pair of a query and a document."""
    found = _read_object(path) if ".json" in path.suffixes else None
    if found is None:
        if missing := set(JUDGEMENTS) - set(column_names(path)):
            raise ValueError(
                f"{named(path)} lacks {', '.join(sorted(missing))}: its first line must name the columns "
                f"{', '.join(JUDGEMENTS)}."
            )
        table = read_table(path, JUDGEMENTS)
        found = list(zip(*(table[name] for name in JUDGEMENTS), strict=True))
    scores: dict[tuple[str, str], int] = {}
    for query, document, text in found:
        score = _whole(text)
        if score is None or scores.setdefault((query, document), score) != score:
            fault = "no whole number" if score is None else f"another score of this pair is {scores[query, document]}"
            raise ValueError(f"{named(path)} scores query {query!r} and document {document!r} by {text!r}: {fault}.")
    return scores


def _read_object(path: Path) -> list[tuple[str, str, Any]] | None:
    """Return query, document and score of each pair in a JSON object; None if the file holds anything else."""
    try:
        with open_text(path) as file:
            found = json.load(file)
    except json.JSONDecodeError:  # as of JSON lines
        return None
    if not isinstance(found, dict) or not all(isinstance(answers, list | dict) for answers in found.values()):
        return None
    scored = {query: one if isinstance(one, dict) else {str(key): 1 for key in one} for query, one in found.items()}
    return [(query, document, score) for query, answers in scored.items() for document, score in answers.items()]


def _whole(score: Any) -> int | None:
    """Return a score as a whole number, if it is one."""
    try:
        number = float(score)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None
