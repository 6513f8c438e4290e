"""The words and tables of an audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from st_clusterns.clustering.corpus_clusters import MIN_TRUST
from st_clusterns.evaluation.negatives import KINDS, N_FALSE, Estimate, Negatives

if TYPE_CHECKING:
    from st_clusterns.training.audit import Audit

N_TOPICS, N_PAIRS, WIDTH = 10, 4, 58  # topics, and pairs of either sort, that a text shows; characters of a sentence
MANY = 0.01  # share of the sentences from which on repeats are worth a word
TOLERABLE = 1.0  # false negatives of a row, unmasked, up to which a batch size is recommended


def verdict(audit: Audit) -> str:
    """Return what to train with: a sentence or two a line."""
    clusters, last = audit.clusters, audit.negatives[-1]
    others = last.batch_size - 1
    met = (
        f"In a batch of {last.batch_size}, {last.false.mean:.1f} of the {others} negatives of a row "
        f"({last.false.mean / others:.1%}) are probably false."
    )
    if clusters.has_topics:
        share = clusters.sizes[clusters.trusted].sum() / clusters.sizes.sum()
        parts = [
            f"The corpus has topics: train with ClusterNSLoss and K={clusters.n_clusters}. If you must tell sentences "
            "of one topic apart, do not.",
            f"{met} The loss masks {last.masked.mean:.1f}, {last.left.mean:.1f} remain.",
            f"The loss pulls {share:.0%} of the sentences to the centroid of their topic.",
        ]
    else:
        parts = [
            f"No topics were found (highest mean trust {clusters.highest_trust:.2f}, asked for {clusters.bound:.2f}), "
            "so clusters do not help: train with in-batch contrastive learning.",
            f"{met} ClusterNSLoss masks exact copies; otherwise it is MultipleNegativesRankingLoss here.",
        ]
    parts.append(f"Positives: views of the kind {audit.positives!r} (views_dataset).")
    parts.append(_batch_size(audit.negatives))
    if audit.n_repeated > MANY * audit.n_sentences:
        parts.append(f"{audit.n_repeated:,} sentences repeat another one exactly: train on each once.")
    if audit.n_same_words > MANY * len(clusters.sentences):
        parts.append(
            f"{audit.n_same_words:,} sentences have the words of another one, in other case, punctuation or order: "
            "keep one of each."
        )
    if last.precision is not None and last.recall is not None:
        parts.append(
            f"By the labels, {last.precision:.0%} of the probably false negatives are false, and {last.recall:.0%} of "
            "the false ones are found."
        )
    return "\n".join(parts)


def _batch_size(found: Sequence[Negatives]) -> str:
    good = [one for one in found if one.left.mean < TOLERABLE]
    if not good:
        smallest = min(found, key=lambda one: one.batch_size)
        return (
            f"Batch size: even with {smallest.batch_size}, a row has {smallest.left.mean:.1f} probably false negatives "
            "that are not masked. Take smaller batches, or drop near duplicates first."
        )
    best = max(good, key=lambda one: one.batch_size)
    words = f"Batch size: up to {best.batch_size}, where a row has {best.left.mean:.2f} of them unmasked"
    worse = [one for one in found if one.batch_size > best.batch_size]
    return words + (f" ({worse[0].left.mean:.1f} with {worse[0].batch_size})." if worse else ".")


def text(audit: Audit) -> str:
    """Return the whole audit as plain text."""
    scope = f"all {audit.n_sampled:,} sentences were"
    if audit.n_sampled < audit.n_sentences:
        scope = f"a random sample of {audit.n_sampled:,} of {audit.n_sentences:,} sentences was"
    parts = [
        f"Audit of {audit.model}: {scope} embedded ({len(audit.clusters.sentences):,} distinct).",
        audit.verdict,
        "Negatives of a row in random batches: mean [95 % interval]\n" + _negatives_table(audit),
        _topics_table(audit),
    ]
    return "\n\n".join(parts + [_pairs_table(audit)] * bool(audit.pairs)) + "\n"


def _negatives_table(audit: Audit) -> str:
    found = audit.negatives
    rows = [
        ["negatives", *(str(one.batch_size - 1) for one in found)],
        ["probably false", *(_cell(one.false) for one in found)],
        *([f"  {kind}", *(_cell(one.kinds[kind]) for one in found)] for kind in KINDS[:N_FALSE]),
        ["hard", *(_cell(one.kinds["hard"]) for one in found)],
        ["masked by ClusterNSLoss", *(_cell(one.masked) for one in found)],
        ["probably false, not masked", *(_cell(one.left) for one in found)],
        ["rows with a false one", *(f"{one.rows_with_false.mean:.0%}" for one in found)],
    ]
    if audit.has_labels:
        rows.append(["precision by the labels", *(_percent(one.precision) for one in found)])
        rows.append(["recall by the labels", *(_percent(one.recall) for one in found)])
    return _table(["", *(f"batch of {one.batch_size}" for one in found)], rows, left=(0,))


def _topics_table(audit: Audit) -> str:
    clusters, shown = audit.clusters, [topic for topic in audit.topics if topic["examples"]][:N_TOPICS]
    title = f"The largest of {clusters.n_clusters} clusters, none of which is used"
    if clusters.has_topics:
        trusted = int(clusters.trusted.sum())
        title = f"The largest of {clusters.n_clusters} topics; {trusted} are trusted (trust of {MIN_TRUST} or more)"
    rows = [
        [f"{topic['size']:,}", f"{topic['trust']:.2f}", topic["name"], _short(topic["examples"][0])] for topic in shown
    ]
    return f"{title}\n" + _table(["size", "trust", "name", "most typical"], rows, left=(2, 3))


def _pairs_table(audit: Audit) -> str:
    texts, rows = audit.clusters.sentences, list[list[str]]()
    for masked in (False, True):
        for pair in [pair for pair in audit.pairs if pair.masked == masked][:N_PAIRS]:
            what = "masked" if masked else "pushed"
            rows.append([f"{pair.cosine:.2f}", pair.kind, what, _short(texts[pair.first])])
            rows.append(["", "", "", _short(texts[pair.second])])
    title = "The worst pairs met, exact copies apart, and what ClusterNSLoss does with them"
    return f"{title}\n" + _table(["cosine", "kind", "loss", "sentences"], rows, left=(1, 2, 3))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _cell(estimate: Estimate) -> str:
    digits = 2 if estimate.mean < 10 else 1
    return f"{estimate.mean:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    sides = ["<" if place in left else ">" for place in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    )


def _short(sentence: str) -> str:
    sentence = " ".join(sentence.split())
    return f'"{sentence}"' if len(sentence) <= WIDTH else f'"{sentence[: WIDTH - 1]}…"'
