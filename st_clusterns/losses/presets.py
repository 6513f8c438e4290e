"""The published settings, as data.

Numbers: the authors' README (github.com/djz233/ClusterNS) and Deng et al. 2023, appendix A. All of them share
temperature 0.05, maximum length 32, one epoch in fp16, evaluation on STS-B dev every 125 steps, and CLS pooling with
a tanh layer in training only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One published row: the loss's settings and, for the record, the training's."""

    source: str  # where the numbers come from
    batch_size: int  # rows an optimiser step sees, over all devices
    learning_rate: float  # of AdamW, decaying linearly
    settings: dict[str, Any]  # keyword arguments of `PublishedClusterNSLoss`


SETTINGS = ("n_clusters", "momentum", "start_similarity", "margin_weight", "margin_alpha", "margin_beta")


def _paper(batch_size: int, learning_rate: float, *numbers: float, hard_negative_weight: float = 1.0) -> Preset:
    settings = {**dict(zip(SETTINGS, numbers, strict=True)), "hard_negative_weight": hard_negative_weight}
    return Preset("Deng et al. 2023, authors' README", batch_size, learning_rate, {"temperature": 0.05, **settings})


#: The seven published rows, by the name that `ClusterNSLoss.from_preset` takes.
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
    """Return the preset of that name; the ValueError for an unknown one names the known ones."""
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}. Known: {', '.join(sorted(PRESETS))}.")
    return PRESETS[name]
