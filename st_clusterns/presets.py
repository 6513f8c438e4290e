"""The published settings, as data.

Numbers: the authors' README (github.com/djz233/ClusterNS) and Deng et al. 2023, appendix A. All of them share
temperature 0.05, maximum length 32, one epoch in fp16, evaluation on STS-B dev every 125 steps, and CLS pooling with
a tanh layer in training only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choices:
    """Where the published method (all `True`) and the recommended one may part.

    Attributes:
        move_to_sum: centroids move towards the *sum* of a batch's members (else their mean), so that the step
            grows with the cluster.
        share_hard_negatives: every row's hard negative enters every row's denominator, also as the own centroid of
            most rows (else a row sees its own hard negative only).
        keep_false_negatives: rows of the same cluster stay in the denominator, where they hold the margin in check
            (else they are masked).
        average_margin_over_batch: the margin is averaged over all B*B pairs of a batch (else over each row's false
            negatives, then over the rows).
        pull_rows_together: what keeps false negatives together is the bidirectional margin between the rows (else
            cross-entropy of a row's own centroid among all centroids).
        start_from_one_batch: the first centroids are a chain of unlike rows of one batch (else k-means over many
            rows, which also measures how far each cluster is to be trusted).
    """

    move_to_sum: bool
    share_hard_negatives: bool
    keep_false_negatives: bool
    average_margin_over_batch: bool
    pull_rows_together: bool
    start_from_one_batch: bool


PUBLISHED = Choices(
    move_to_sum=True,
    share_hard_negatives=True,
    keep_false_negatives=True,
    average_margin_over_batch=True,
    pull_rows_together=True,
    start_from_one_batch=True,
)
RECOMMENDED = Choices(
    move_to_sum=False,
    share_hard_negatives=False,
    keep_false_negatives=False,
    average_margin_over_batch=False,
    pull_rows_together=False,
    start_from_one_batch=False,
)


@dataclass(frozen=True)
class Preset:
    """One row of settings: the loss's numbers and, for the record, the training's.

    Attributes:
        source: where the numbers come from.
        choices: published or recommended.
        batch_size: rows an optimiser step sees, over all devices.
        learning_rate: of AdamW, decaying linearly.
        settings: the keyword arguments of `ClusterNSLoss`.
    """

    source: str
    choices: Choices
    batch_size: int
    learning_rate: float
    settings: dict[str, Any]


def _paper(
    batch_size: int,
    learning_rate: float,
    n_clusters: int,
    momentum: float,
    start_similarity: float,
    margin_weight: float,
    alpha: float,
    beta: float,
    hard_negative_weight: float = 1.0,
) -> Preset:
    return Preset(
        source="Deng et al. 2023, authors' README",
        choices=PUBLISHED,
        batch_size=batch_size,
        learning_rate=learning_rate,
        settings={
            "n_clusters": n_clusters,
            "temperature": 0.05,
            "momentum": momentum,
            "start_similarity": start_similarity,
            "margin_alpha": alpha,
            "margin_beta": beta,
            "margin_weight": margin_weight,
            "hard_negative_weight": hard_negative_weight,
            "min_trust": 0.0,
        },
    )


PRESETS: dict[str, Preset] = {
    #                                  batch     lr    K   momentum start  margin  alpha beta
    "paper/bert-base": _paper(256, 5e-5, 128, 1e-3, 0.4, 1e-3, 0.0, 0.3),
    "paper/bert-large": _paper(512, 5e-5, 128, 1e-3, 0.5, 5e-5, 0.25, 0.3),
    "paper/roberta-base": _paper(512, 5e-5, 128, 1e-3, 0.4, 1e-4, 0.2, 0.5),
    "paper/roberta-large": _paper(512, 5e-5, 128, 5e-4, 0.4, 0.0, 0.0, 0.3),  # no margin: alpha, beta unused
    "paper/prompt-bert-base": _paper(512, 5e-5, 96, 5e-4, 0.4, 1e-2, 0.0, 0.2),
    "paper/prompt-bert-large": _paper(256, 3e-5, 96, 1e-4, 0.2, 5e-4, 0.25, 0.3),
    "paper/prompt-roberta-base": _paper(512, 5e-5, 128, 1e-3, 0.4, 1e-2, 0.2, 0.6, hard_negative_weight=0.0),
}


def find_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        ValueError: naming the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}. Known: {', '.join(sorted(PRESETS))}.")
    return PRESETS[name]
