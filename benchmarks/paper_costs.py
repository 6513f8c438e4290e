"""Steps, memory and time that the runs of `paper.py` are expected to take, before anything is loaded.

Memory: weights, gradients and both moments of AdamW in float32, and the activations of a mini-batch in half precision,
`34 h + 5 a s` bytes for each token and layer (Korthikanti et al. 2022, equation 2; width h, a heads, s tokens a
sentence). Time: 6 operations for each weight of the layers and token, 8 with the cached loss. The speeds are what a
device reaches in training at this length, not its peak. Take the numbers as right within a factor of two.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from transformers import AutoConfig

TOKENS, TEMPLATE_TOKENS = 32, 10


class Device(NamedTuple):
    """A kind of device."""

    name: str
    memory: float  # GB
    speed: float  # 10^12 operations a second, in training


DEVICES = (
    Device("24 GB GPU", 24, 30),
    Device("A100", 80, 110),
    Device("H100", 80, 220),
    Device("two CPU cores", 16, 0.08),
)


class Size(NamedTuple):
    """The size of an encoder."""

    layers: int
    width: int
    heads: int
    vocabulary: int

    @property
    def layer_weights(self) -> float:
        return 12 * self.layers * self.width**2

    @property
    def weights(self) -> float:
        return self.layer_weights + self.vocabulary * self.width


SIZES = {
    "google-bert/bert-base-uncased": Size(12, 768, 12, 31_036),
    "google-bert/bert-large-uncased": Size(24, 1024, 16, 31_036),
    "FacebookAI/roberta-base": Size(12, 768, 12, 50_779),
    "FacebookAI/roberta-large": Size(24, 1024, 16, 50_779),
}


def size_of(model: str) -> Size:
    if model in SIZES:
        return SIZES[model]
    config = AutoConfig.from_pretrained(model)
    return Size(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size)


def estimate(settings: dict[str, Any], mini_batch_size: int, devices: int = 1) -> dict[str, float]:
    """Return steps, peak memory of a device in GB, and operations of a run."""
    size, prompt = size_of(settings["model"]), bool(settings["templates"])
    share = settings["batch_size"] // devices
    cached = share > mini_batch_size > 0
    tokens = TOKENS + TEMPLATE_TOKENS * prompt
    rows = mini_batch_size if cached else 2 * share
    bias = TOKENS * TEMPLATE_TOKENS * prompt  # tokens of the empty templates, once a forward pass
    at_once = rows * tokens + bias * (1 if cached else 2)
    activations = at_once * size.layers * (34 * size.width + 5 * size.heads * tokens)
    steps = settings["sentences"] // settings["batch_size"]
    passes = 2 * settings["batch_size"] / mini_batch_size if cached else 2
    trained = settings["batch_size"] * 2 * tokens + passes * bias  # tokens a step
    operations = (8 if cached else 6) * size.layer_weights * trained * steps
    return {
        "steps": steps,
        "tokens": tokens,
        "memory_gb": (16 * size.weights + activations) / 1e9 + 1,  # 1: what the device's runtime takes
        "operations": operations,
    }


def describe_plan(runs: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Return the plan as text: one row of the table a published row, hours for each kind of device."""
    mini = args.mini_batch_size
    devices = " | ".join(f"hours: {device.name}" for device in DEVICES)
    lines = [f"{len(runs)} rows x {len(args.seeds)} seeds; results in {args.output}. Right within a factor of two:", ""]
    lines += [
        f"| row | batch | steps | evaluations, at most | loss | GB | {devices} |",
        "|---" * (6 + len(DEVICES)) + "|",
    ]
    total = dict.fromkeys(DEVICES, 0.0)
    for run in runs:
        cost = estimate(run, mini)
        hours = {device: cost["operations"] / device.speed / 1e12 / 3600 for device in DEVICES}
        total = {device: total[device] + hours[device] * len(args.seeds) for device in DEVICES}
        cells = [
            run["name"],
            str(run["batch_size"]),
            f"{cost['steps']}",
            f"{cost['steps'] // run['eval_steps']}",
            f"cached, {mini} rows at a time" if run["batch_size"] > mini > 0 else "plain",
            f"{cost['memory_gb']:.1f}",
            *(f"{h:.1f}" if cost["memory_gb"] < device.memory else "does not fit" for device, h in hours.items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "All seeds, hours: " + ", ".join(f"{h:.0f} on {device.name}" for device, h in total.items()) + "."]
    if several := [f"{run['name']} ({run['devices']})" for run in runs if run["devices"] > 1]:
        lines += [f"Published on several devices: {', '.join(several)}."]
        lines += [
            "One device trains the same batch by the cached loss: the same negatives, and the gradients of the whole"
        ]
        lines += ["batch, for a third more operations."]
    return "\n".join(lines)
