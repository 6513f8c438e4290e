"""Evaluators of labelled data: they judge a model, and are never used in training or to choose anything in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator

from st_clusterns.clustering.embedding import embed_corpus
from st_clusterns.columns import column_names, read_table
from st_clusterns.evaluation.mteb_tasks import preserved_state
from st_clusterns.evaluation.scores import neighbour_purity, pair_average_precision, score_clustering
from st_clusterns.evaluation.search import read_collection, search_evaluator
from st_clusterns.evaluation.sts import PAIR, read_scored_pairs, sts_evaluator
from st_clusterns.text_files import named

CLASSES = ["label", "text"]
NEIGHBOURS = 10


class ClassEvaluator(BaseEvaluator):  # type: ignore[misc]
    """Scores of texts with classes, each 0 to 1.

    `v_measure`, the primary metric, and `accuracy` are those of k-means with the true number of classes
    (`score_clustering`); `neighbour_purity` is the share of the ten nearest neighbours that have a text's class;
    `pair_average_precision` is that of the pairs of one class among all pairs, sorted by cosine.

    Args:
        texts: short texts.
        classes: the class of each.
        name: precedes the names of the metrics.
        restarts: k-means runs; scores are their means.
        seed: seed of the first run.
        batch_size: texts per batch.
    """

    def __init__(
        self,
        texts: Sequence[str],
        classes: Sequence[str],
        name: str = "classes",
        restarts: int = 3,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        if len(texts) != len(classes):
            raise ValueError(f"There are {len(texts)} texts and {len(classes)} classes: give one class for each text.")
        if not 2 <= len(set(classes)) < len(texts):
            raise ValueError(
                f"{len(texts)} texts have {len(set(classes))} distinct classes: give two or more, and several texts of "
                "one class."
            )
        self.texts, self.classes, self.name = list(texts), list(classes), name
        self.restarts, self.seed, self.batch_size = restarts, seed, batch_size
        self.primary_metric = f"{name}_v_measure"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return `NAME_v_measure`, `NAME_accuracy`, `NAME_neighbour_purity` and `NAME_pair_average_precision`."""
        with preserved_state(model):
            rows = embed_corpus(self.texts, model, self.batch_size, show_progress_bar=False)
        clustering = score_clustering(rows, self.classes, self.restarts, self.seed)
        scores = {name: clustering[name] / 100 for name in ("v_measure", "accuracy")}
        neighbours = min(NEIGHBOURS, len(self.texts) - 1)
        scores["neighbour_purity"] = neighbour_purity(rows, self.classes, neighbours) / 100
        scores["pair_average_precision"] = pair_average_precision(rows, self.classes, self.seed) / 100
        metrics: dict[str, float] = self.prefix_name_to_metrics(scores, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics


def read_evaluator(path: str | Path, batch_size: int = 32) -> BaseEvaluator:
    """Make the evaluator of a labelled table (`st_clusterns.columns`) or of a folder, named after it.

    A table by the columns it has, of which others are not read; a folder by its tables (`read_collection`):

    - `label` and `text`, as `st-clusterns evaluate --clustering` takes them: `ClassEvaluator`.
    - `sentence1`, `sentence2` and `score`: `EmbeddingSimilarityEvaluator` of sentence-transformers.
    - A collection for search: `InformationRetrievalEvaluator` of sentence-transformers.

    Raises a FileNotFoundError without the file, or one of the folder's tables, and a ValueError if a table has neither
    or both sets of columns, or cannot be scored.
    """
    path = Path(path)
    if path.is_dir():
        return search_evaluator(read_collection(path), path.resolve().name, batch_size)
    names, title = column_names(path), path.name.split(".")[0]
    fits = [columns for columns in (CLASSES, PAIR) if set(columns) <= set(names)]
    if len(fits) != 1:
        raise ValueError(
            f"{named(path)} has the columns {', '.join(map(repr, names))}: give either label and text, or sentence1, "
            "sentence2 and score."
        )
    if fits == [PAIR]:
        pairs = read_scored_pairs(path)
        if len(set(pairs["score"])) < 2:
            raise ValueError(f"{named(path)} has one score only: a correlation needs different ones.")
        return sts_evaluator(pairs, title, batch_size)
    table = read_table(path, CLASSES)
    try:
        return ClassEvaluator(table["text"], table["label"], title, batch_size=batch_size)
    except ValueError as error:
        raise ValueError(f"{named(path)}: {error}") from error
