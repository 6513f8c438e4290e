"""The words and tables of an audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from st_clusterns.clustering.n_clusters import trust_bound
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
            f"No topics were found (mean trust {max(clusters.curve.values()):.2f}, asked for "
            f"{trust_bound(len(clusters.sentences)):.2f}), so clusters do not help: train with in-batch contrastive "
            "learning.",
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
    clusters = audit.clusters
    scope = f"all {audit.n_sampled:,} sentences were"
    if audit.n_sampled < audit.n_sentences:
        scope = f"a random sample of {audit.n_sampled:,} of {audit.n_sentences:,} sentences was"
    trusted = int(clusters.trusted.sum())
    shown = audit.topics[:N_TOPICS]
    examples = [
        [f"{topic['size']:,}", f"{topic['trust']:.2f}", topic["name"], f'"{_short(topic["examples"][0])}"']
        for topic in shown
        if topic["examples"]
    ]
    topics = f"The largest of {clusters.n_clusters} topics, of which {trusted} are trusted (trust of 0.2 or more)"
    if not clusters.has_topics:
        topics = f"The largest of {clusters.n_clusters} clusters, none of which is used"
    parts = [
        f"Audit of {audit.model}: {scope} embedded ({len(clusters.sentences):,} distinct).",
        audit.verdict,
        "Negatives of a row in random batches: mean [95 % interval]\n" + _negatives_table(audit),
        f"{topics}\n" + _table(["size", "trust", "name", "most typical"], examples, left=(2, 3)),
    ]
    if audit.pairs:
        names = clusters.sentences
        worst = [pair for masked in (False, True) for pair in [p for p in audit.pairs if p.masked == masked][:N_PAIRS]]
        pairs = [
            [f"{pair.cosine:.2f}", pair.kind, "masked" if pair.masked else "pushed", side]
            for pair in worst
            for side in (f'"{_short(names[pair.first])}"', f'"{_short(names[pair.second])}"')
        ]
        for place in range(1, len(pairs), 2):
            pairs[place][:3] = ["", "", ""]
        title = "The worst pairs met, exact copies apart, and what ClusterNSLoss does with them"
        parts.append(f"{title}\n" + _table(["cosine", "kind", "loss", "sentences"], pairs, left=(1, 2, 3)))
    return "\n\n".join(parts) + "\n"


def _negatives_table(audit: Audit) -> str:
    def line(name: str, cells: Sequence[str]) -> list[str]:
        return [name, *cells]

    found = audit.negatives
    rows = [line("negatives", [str(one.batch_size - 1) for one in found])]
    rows.append(line("probably false", [_cell(one.false) for one in found]))
    rows += [line(f"  {kind}", [_cell(one.kinds[kind]) for one in found]) for kind in KINDS[:N_FALSE]]
    rows.append(line("hard", [_cell(one.kinds["hard"]) for one in found]))
    rows.append(line("masked by ClusterNSLoss", [_cell(one.masked) for one in found]))
    rows.append(line("probably false, not masked", [_cell(one.left) for one in found]))
    rows.append(line("rows with a false one", [f"{one.rows_with_false.mean:.0%}" for one in found]))
    if audit.has_labels:
        for name in ("precision", "recall"):
            values = [getattr(one, name) for one in found]
            rows.append(line(f"{name} by the labels", ["-" if value is None else f"{value:.0%}" for value in values]))
    return _table(["", *(f"batch of {one.batch_size}" for one in found)], rows, left=(0,))


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
    return sentence if len(sentence) <= WIDTH else sentence[: WIDTH - 1] + "…"
