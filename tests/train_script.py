"""A small training run by `SentenceTransformerTrainer`, for tests: a function, and a script for launchers.

Everything a resumed run must repeat to the last bit is returned: weights, the state of the clusters, each forward
pass's loss, the log.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from tiny_bert import load_model, make_sentences
from transformers import TrainerCallback

from st_clusterns import CachedClusterNSLoss, ClusterBatchSampler, ClusterNSLoss, ClusterStateCallback

LOSS_CLASSES = {"plain": ClusterNSLoss, "cached": CachedClusterNSLoss}
ROWS, BATCH, CLUSTERS = 96, 8, 4
STEPS_AN_EPOCH = ROWS // BATCH  # of one process; the clusters start after 16 steps, within epoch 1


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


def train(
    model_folder: Path,
    output: Path,
    *,
    loss: str = "plain",
    sampler: str = "default",
    stop_after: int = 0,
    resume: str | bool = False,
    n_clusters: int = CLUSTERS,
    callback: dict[str, Any] | None = None,
    loss_settings: dict[str, Any] | None = None,
    train_settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on 96 sentences in batches of 8 over all processes, 3 epochs, and return what has become of it."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    model = load_model(model_folder)
    objective = LOSS_CLASSES[loss](
        model,
        n_clusters,
        momentum=0.1,
        start_similarity=1.0,
        margin_alpha=0.1,
        margin_beta=0.1,
        hard_negative_weight=1.0,
        min_trust=0.0,
        gather_across_devices=processes > 1,
        **({"mini_batch_size": 3} if loss == "cached" else {}),
        **(loss_settings or {}),
    )
    values: list[float] = []
    objective.register_forward_hook(lambda module, inputs, parts: values.append(float(parts.total().detach())))
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "num_train_epochs": 3,
        "per_device_train_batch_size": BATCH // processes,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **({"batch_sampler": ClusterBatchSampler} if sampler == "clusters" else {}),
        **(train_settings or {}),
    }
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**settings),
        train_dataset=Dataset.from_dict({"text": make_sentences(ROWS)}),
        loss=objective,
        callbacks=[ClusterStateCallback(objective, **(callback or {})), StopAfter(stop_after)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "state": {name: value.clone() for name, value in objective.clusters.state_dict().items()},
        "rows": objective.start.rows.clone(),
        "values": values,
        "log": [
            {name: entry[name] for name in ("step", "loss", "contrastive", "false_negative", "grad_norm")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", type=json.loads, nargs="?", default={})
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = train(arguments.model_folder, arguments.output, **arguments.settings)
    torch.save(result, arguments.output / f"result-{os.environ.get('RANK', '0')}.pt")
