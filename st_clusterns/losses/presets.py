"""The published settings, as data.

Numbers: the authors' README (github.com/djz233/ClusterNS) and Deng et al. 2023, appendix A; their shell scripts differ.
All of them share temperature 0.05, maximum length 32 (without the template), one epoch in fp16, evaluation on STS-B dev
every 125 steps with patience 3, CLS pooling or the template's mask token, and a tanh layer in training only.
`benchmarks/paper.py` trains a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One published row: the loss's settings and, for the record, the training's and the result."""

    model: str  # that is trained, on the hub
    average: float  # published mean of Spearman's rho (x100) over the seven STS tests
    batch_size: int  # rows an optimiser step sees, over all devices
    devices: int  # that it was published with
    learning_rate: float  # of AdamW, decaying linearly
    settings: dict[str, Any]  # keyword arguments of `PublishedClusterNSLoss`; the rows were trained with `head=True`
    templates: tuple[str, ...] = ()  # of the two views, for `PromptTransformer`; the first one embeds afterwards
    source: str = "Deng et al. 2023, authors' README; templates: Jiang et al. 2022"


SETTINGS = ("n_clusters", "momentum", "start_similarity", "margin_weight", "margin_alpha", "margin_beta")
BERT_TEMPLATES = ('This sentence of "{sentence}" means[MASK].', 'This sentence : "{sentence}" means[MASK].')
ROBERTA_TEMPLATES = ("This sentence : ' {sentence} ' means[MASK].", "The sentence : ' {sentence} ' means[MASK].")


def _paper(
    model: str,
    average: float,
    batch: tuple[int, int],
    learning_rate: float,
    *numbers: float,
    hard_negative_weight: float = 1.0,
    templates: tuple[str, ...] = (),
) -> Preset:
    settings = {**dict(zip(SETTINGS, numbers, strict=True)), "hard_negative_weight": hard_negative_weight}
    rows, devices = batch
    return Preset(model, average, rows * devices, devices, learning_rate, {"temperature": 0.05, **settings}, templates)


BERT, ROBERTA = ("google-bert/bert-{}-uncased", "FacebookAI/roberta-{}")
#: The seven published rows, by the name that `ClusterNSLoss.from_preset` takes.
PRESETS: dict[str, Preset] = {
    #                        batch x devices     lr    K   momentum start  margin  alpha beta
    "paper/bert-base": _paper(BERT.format("base"), 77.55, (256, 1), 5e-5, 128, 1e-3, 0.4, 1e-3, 0.0, 0.3),
    "paper/bert-large": _paper(BERT.format("large"), 79.19, (128, 4), 5e-5, 128, 1e-3, 0.5, 5e-5, 0.25, 0.3),
    "paper/roberta-base": _paper(ROBERTA.format("base"), 77.98, (256, 2), 5e-5, 128, 1e-3, 0.4, 1e-4, 0.2, 0.5),
    # No margin: alpha and beta are not used.
    "paper/roberta-large": _paper(ROBERTA.format("large"), 79.43, (128, 4), 5e-5, 128, 5e-4, 0.4, 0.0, 0.0, 0.3),
    "paper/prompt-bert-base": _paper(
        BERT.format("base"), 78.72, (512, 1), 5e-5, 96, 5e-4, 0.4, 1e-2, 0.0, 0.2, templates=BERT_TEMPLATES
    ),
    "paper/prompt-bert-large": _paper(
        BERT.format("large"), 80.30, (64, 4), 3e-5, 96, 1e-4, 0.2, 5e-4, 0.25, 0.3, templates=BERT_TEMPLATES
    ),
    "paper/prompt-roberta-base": _paper(
        ROBERTA.format("base"),
        79.74,
        (256, 2),
        5e-5,
        128,
        1e-3,
        0.4,
        1e-2,
        0.2,
        0.6,
        hard_negative_weight=0.0,
        templates=ROBERTA_TEMPLATES,
    ),
}


def find_preset(name: str) -> Preset:
    """Return the preset of that name; the ValueError for an unknown one names the known ones."""
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}. Known: {', '.join(sorted(PRESETS))}.")
    return PRESETS[name]
