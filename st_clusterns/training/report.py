"""The report of a training run: what the clusters and the embeddings look like before and after, without labels.

It is four files: a page for the browser (`report.html`), a picture (`report.png`, `report.svg`), and a table of the
sentences with their places on the maps (`map.parquet`), which opens in embedding-atlas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformer

from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.clustering.embedding import as_texts, embed_corpus
from st_clusterns.clustering.sample import SAMPLE, check_counts
from st_clusterns.clustering.vectors import Floats
from st_clusterns.evaluation.scores import false_negative_share, mean_cosine, uniformity
from st_clusterns.files import written_whole
from st_clusterns.models import check_dense, in_float32, load_model, name_of, reading_at_most, resolve_prompt
from st_clusterns.training.maps import draw_maps
from st_clusterns.training.page import page_data, write_page
from st_clusterns.training.pictures import draw_report

REPORT_ROWS, MOST_ROWS = 20_000, 100_000  # sentences that a report shows: by default, and at most
TABLE = "map.parquet"


def report_files(page: Path) -> list[Path]:
    """Return the files of a report: the page, the picture as PNG and as SVG, and the table."""
    return [page, page.with_suffix(".png"), page.with_suffix(".svg"), page.with_name(TABLE)]


def write_report(
    sentences: Iterable[str],
    before: SentenceTransformer | str,
    after: SentenceTransformer | str,
    output: str | Path = "report.html",
    *,
    n_rows: int = REPORT_ROWS,
    n_clusters: int | None = None,
    seed: int = 0,
    max_length: int = 64,
    batch_size: int = 96,
    prompt: str | None = None,
    prompt_name: str | None = None,
    show_progress: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare two models on plain sentences, in a page that opens in any browser; nothing is trained.

    Writes `output`, beside it the same name with `.png` and `.svg`, and `map.parquet`. The page holds the sentences
    that it shows. `adapt` writes the same report at the end of a training.

    Args:
        sentences: the corpus: a list, a column of a table, a generator. Exact duplicates count once.
        before: a model, or its name on the hub or path. Its embeddings are clustered.
        after: the model to compare with it.
        output: the page to write, such as "report.html".
        n_rows: sentences to show, 4 to 100,000; of more, a random sample.
        n_clusters: number of clusters `K`. Default: chosen from the corpus (`CorpusClusters.fit`).
        seed: seed of the random number generators.
        max_length: tokens that are read of a sentence, at most, besides the prompt.
        batch_size: sentences in a batch, while embedding and in the batches that the page shows.
        prompt: what both models read before each sentence; "" for nothing. Default: the default prompt of each.
        prompt_name: its name among the prompts of each, in place of `prompt`.
        show_progress: whether to show progress bars.
        trust_remote_code: whether code that comes with a model given by its name may be run.

    Returns:
        The numbers of the report.

    Raises:
        FileExistsError: if one of the files exists.
        ValueError: if the corpus or a model is unsuitable, or a number is out of its range.
    """
    page = check_output(output)
    if not 4 <= n_rows <= MOST_ROWS:
        raise ValueError(f"n_rows={n_rows} is out of range: choose 4 to {MOST_ROWS:,} sentences to show.")
    given = as_texts(sentences)
    texts = list(dict.fromkeys(given))
    total = len(texts)
    check_counts(total, len(given), n_clusters)  # before anything is embedded
    if total > n_rows:
        chosen = np.sort(np.random.default_rng(seed).choice(total, n_rows, replace=False))
        texts = [texts[place] for place in chosen]
    names = [model if isinstance(model, str) else name_of(model) for model in (before, after)]
    rows = []
    for model in (before, after):
        model = load_model(model, trust_remote_code) if isinstance(model, str) else model
        check_dense(model)
        read = resolve_prompt(model, prompt, prompt_name)
        with reading_at_most(model, max_length, read), in_float32(model):
            rows.append(embed_corpus(texts, model, batch_size, show_progress, prompt=read))
    clusters = CorpusClusters.fit(texts, n_clusters=n_clusters, seed=seed, embeddings=rows[0])
    shown = clusters if len(texts) <= SAMPLE else _with_all(clusters, texts, rows[0])
    report = {
        "model": names[0],
        "compared_with": names[1],
        "sentences": total,
        "clusters": describe_clusters(clusters, batch_size),
        "before": describe_embeddings(shown.embeddings, shown.ids),
        "after": describe_embeddings(rows[1], shown.ids),
        "batch_size": batch_size,
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    write_files(report, shown, rows[1], page, seed)
    return report


def write_files(report: dict[str, Any], shown: CorpusClusters, after: Floats, page: Path, seed: int = 0) -> None:
    """Write the files of a report.

    Args:
        report: its numbers, as `adapt` and `write_report` return them.
        shown: the clusters with the sentences to show and their embeddings before training, `N`.
        after: their embeddings after training, (N, D).
        page: the HTML file; the other files have their places beside it (`report_files`).
        seed: seed of the maps and of the batches in the page.
    """
    maps = draw_maps(shown.embeddings, after, seed)
    page, *pictures, table = report_files(page)
    write_page(page_data(report, shown, after, maps, seed), page)
    write_table(shown, maps, table)
    draw_report(shown, after, maps, *pictures)


def check_output(output: str | Path) -> Path:
    """Return the path of a page; raise an error if it is no `.html`, or if a file of the report exists."""
    page = Path(output)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"output={str(output)!r} is no page: give it a name that ends in .html.")
    if page.parent.exists() and not page.parent.is_dir():
        raise ValueError(f"output={str(output)!r}: {str(page.parent)!r} is no folder.")
    for path in report_files(page):
        if path.exists():
            raise FileExistsError(f"{str(path)!r} exists already: choose another folder or name, or remove it first.")
    return page


def write_table(shown: CorpusClusters, maps: tuple[Floats, Floats], path: Path) -> None:
    """Write the sentences with their topics and their places on both maps as a Parquet file."""
    columns: dict[str, Any] = {
        "text": shown.sentences,
        "topic": [shown.names[topic] for topic in shown.ids],
        "trust": shown.trust[shown.ids],
    }
    for points, view in zip(maps, ("before", "after"), strict=True):
        columns |= {f"x_{view}": points[:, 0], f"y_{view}": points[:, 1]}
    with written_whole(path) as partial:
        pq.write_table(pa.table(columns), partial)


def describe_clusters(clusters: CorpusClusters, batch_size: int) -> dict[str, Any]:
    """Describe the clusters that a run starts from, with batches of `batch_size` sentences.

    `false_negatives_in_batch` is the share of a row's in-batch negatives that belong to its own, trusted, cluster in a
    random batch.
    """
    shares = clusters.sizes / clusters.sizes.sum()
    false_negatives = false_negative_share(clusters.ids, clusters.trusted[clusters.ids])
    return {
        "verdict": clusters.verdict,
        "n_clusters": clusters.n_clusters,
        "has_topics": clusters.has_topics,
        "trust_by_n_clusters": clusters.curve,
        "sizes": sorted(clusters.sizes.tolist(), reverse=True),
        "mean_trust": clusters.mean_trust,
        "sentences_in_trusted_clusters": float(shares[clusters.trusted].sum()),
        "false_negatives_in_batch": false_negatives,
        "false_negatives_of_a_row": false_negatives * (batch_size - 1),
    }


def describe_embeddings(embeddings: npt.ArrayLike, ids: npt.NDArray[np.int64], seed: int = 0) -> dict[str, float]:
    """Describe embeddings (N, D) by the clusters of the start, `ids` (N,).

    Returns `mean_cosine` of any two sentences (anisotropy), `mean_cosine_same_cluster`, their difference (`contrast`),
    and `uniformity` (Wang and Isola 2020: log of the mean of exp(-2 * squared distance); lower is more uniform).
    """
    any_pair, same_pair = mean_cosine(embeddings), mean_cosine(embeddings, ids)
    return {
        "mean_cosine": any_pair,
        "mean_cosine_same_cluster": same_pair,
        "contrast": same_pair - any_pair,
        "uniformity": uniformity(embeddings, seed),
    }


def compare(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of a table from a report of `adapt`: a measure, of the starting and of the saved model.

    Rows that need topics, held-out documents or an evaluator are left out where there are none.
    """
    names = {
        "mean_cosine_same_cluster": "mean cosine of two sentences of a cluster",
        "mean_cosine": "mean cosine of any two sentences",
        "contrast": "difference of the two",
        "uniformity": "uniformity (lower: more evenly spread)",
    }
    if not report["clusters"]["has_topics"]:
        names = {name: title for name, title in names.items() if name in ("mean_cosine", "uniformity")}
    rows = [(title, *(f"{report[side][name]:.3f}" for side in ("before", "after"))) for name, title in names.items()]
    if search := report["search"]:
        after = search["before" if report["kept"] == "start" else "after"]
        found = "held-out documents found first by a span of theirs"
        rows.insert(0, (found, f"{search['before']:.1%}", f"{after:.1%}"))
    sides = [report["evaluation"].get(side, {}) for side in ("before", "after")]
    scores = [(name, *(f"{side[name]:.3f}" if name in side else "-" for side in sides)) for name in sides[0]]
    return [*scores, *rows]


def _with_all(clusters: CorpusClusters, texts: list[str], rows: Floats) -> CorpusClusters:
    """Return clusters of a sample with all sentences: those beyond the sample have that of the nearest centroid."""
    known = dict(zip(clusters.sentences, clusters.ids.tolist(), strict=True))
    nearest = clusters.predict(rows).tolist()
    ids = np.array([known.get(text, own) for text, own in zip(texts, nearest, strict=True)])
    return replace(clusters, sentences=texts, embeddings=rows, ids=ids, given_names=clusters.names)
