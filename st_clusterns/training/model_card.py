"""What `adapt` did, in the model card that sentence-transformers writes when a model is saved."""

from __future__ import annotations

from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

import st_clusterns
from st_clusterns import citations
from st_clusterns.clustering.corpus_clusters import MIN_TRUST, CorpusClusters

SHOWN_TOPICS = 20
VIEWS = {
    "dropout": "the sentence itself under dropout",
    "deletion": "the sentence without some of its words",
    "span": "a random span of the text",
}
PAPERS = {"dropout": citations.DROPOUT_VIEWS, "span": citations.SPAN_VIEWS + citations.MEAN_WEIGHTS}


def describe_training(model: SentenceTransformer, clusters: CorpusClusters, report: dict[str, Any]) -> None:
    """Add corpus, topics, numbers before and after, limits and papers to the card data of a trained model.

    Args:
        model: as `SentenceTransformerTrainer` leaves it: its `model_card_data` describes one training data set.
        clusters: those of the training.
        report: as `adapt` returns it.
    """
    data = model.model_card_data
    sections = [_corpus(clusters, report)]
    if clusters.has_topics:
        sections.append(_topics(clusters))
    sections += [_before_and_after(report), _limits(clusters, report)]
    # The template has no place for sections of others. What follows a data set's loss is the next heading.
    for described in data.train_datasets[:1]:
        described["loss"]["config_code"] = "\n\n".join([described["loss"]["config_code"], *sections]) + "\n"
    data.citations["Number of clusters"] = citations.PREDICTION_STRENGTH
    if report["views"] in PAPERS:
        data.citations["Positives"] = PAPERS[report["views"]]


def _corpus(clusters: CorpusClusters, report: dict[str, Any]) -> str:
    averaged = report["views"] == "span" and report["kept"] == "trained"
    lines = [
        "### Corpus",
        f"* {report['sentences']:,} distinct sentences, without labels.",
        f"* Clustered: {clusters.verdict}",
        f"* Fingerprint of the clusters (`CorpusClusters.fingerprint`): `{clusters.fingerprint}`",
        f"* Positive of a sentence: {VIEWS[report['views']]}.",
        f"* Read at most {report['recipe']['max_length']} tokens of a sentence"
        + (f", after the prompt `{report['prompt']!r}`." if report["prompt"] else "."),
        *(["* Weights: the mean of those before and after the training."] if averaged else []),
        f"* Trained by st-clusterns {st_clusterns.__version__}.",
    ]
    return "\n".join([lines[0], "", *lines[1:]])


def _topics(clusters: CorpusClusters) -> str:
    order = np.argsort(-clusters.sizes, kind="stable")
    rows = [
        f"| {clusters.names[cluster]} | {clusters.sizes[cluster]:,} | {clusters.trust[cluster]:.2f} |"
        for cluster in order[:SHOWN_TOPICS].tolist()
    ]
    shown = f"The {len(rows)} largest of {len(order)} clusters, by their most typical words. A trust below {MIN_TRUST} "
    shown += "counts as no topic."
    return "\n".join(["### Topics", "", shown, "", "| topic | sentences | trust |", "|---|---|---|", *rows])


def _before_and_after(report: dict[str, Any]) -> str:
    before, after = report["before"], report["after"]
    rows = [f"| {name.replace('_', ' ')} | {before[name]:.3f} | {after[name]:.3f} |" for name in before]
    if report["search"]:
        found = report["search"]
        rows.append(f"| spans that find their held-out document | {found['before']:.3f} | {found['after']:.3f} |")
    return "\n".join(
        [
            "### Before and after",
            "",
            f"Without labels, on {report['shown']:,} of the clustered sentences. A change shows that the training took "
            "effect, not that the model is better at a task.",
            "",
            "| measure | before | after |",
            "|---|---|---|",
            *rows,
        ]
    )


def _limits(clusters: CorpusClusters, report: dict[str, Any]) -> str:
    lines = ["* No labels were used, and no quality was measured: compare with the base model on data of your own."]
    if report.get("evaluation"):
        lines = ["* Labels were used for the scores under Evaluation only, not in the training."]
    if clusters.has_topics:
        lines.append("* Sentences of one topic were pulled together. Finer distinctions than these topics may be lost.")
    else:
        lines.append("* The corpus has no topics that could be found, so the training is plain contrastive learning.")
    if report["kept"] == "start":
        lines.append("* Training gained nothing in held-out documents: **these are the weights of the start.**")
    lines.append("* The examples and samples in this card are sentences of the corpus.")
    return "\n".join(["### Limits", "", *lines])
