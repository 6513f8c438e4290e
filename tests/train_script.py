"""A small training run by `SentenceTransformerTrainer`, for tests: a function, and a script for launchers.

Everything a resumed run must repeat to the last bit is returned: weights, the state of the loss, each forward pass's
loss, the log.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.evaluation import SequentialEvaluator
from tiny_bert import load_model, make_sentences
from transformers import TrainerCallback

from st_clusterns import (
    CachedClusterNSLoss,
    ClusterBatchSampler,
    ClusterNSLoss,
    ClusterStateCallback,
    CorpusClusters,
    log_clusters,
)
from st_clusterns.evaluation.evaluators import LabelFreeEvaluator, MtebEvaluator, SpanRetrievalEvaluator
from st_clusterns.evaluation.mteb_tasks import clustering_task
from st_clusterns.losses.contrastive import ContrastiveLoss
from st_clusterns.training.views import views_dataset

LOSS_CLASSES = {"plain": ClusterNSLoss, "cached": CachedClusterNSLoss}
ROWS, BATCH = 96, 8
STEPS_AN_EPOCH = ROWS // BATCH  # of one process
CLUSTERS = {"default": 2, "published": 24}  # the embeddings of a random Bert have topics with 2
START = CLUSTERS["published"] // BATCH  # steps until the published centroids start


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


def make_loss(
    method: str, kind: str, model: SentenceTransformer, n_clusters: int, clusters: dict[str, Any], **settings: Any
) -> ContrastiveLoss:
    """Make the default loss around clusters of the sentences that it is trained on, or the published one."""
    loss_class = LOSS_CLASSES[kind]
    if kind == "cached":
        settings = {"mini_batch_size": 3, **settings}
    if method == "default":
        clusters = {"sentences": make_sentences(ROWS), "show_progress_bar": False, **clusters}
        return loss_class(model, CorpusClusters.fit(model=model, n_clusters=n_clusters, **clusters), **settings)
    numbers = {
        "n_clusters": n_clusters,
        "momentum": 0.1,
        "start_similarity": 1.0,
        "margin_alpha": 0.1,
        "margin_beta": 0.1,
        "margin_weight": 1.0,
    }
    return loss_class.from_preset(model, "paper/bert-base", **{**numbers, **settings})


def train(
    model_folder: Path,
    output: Path,
    *,
    method: str = "published",
    loss: str = "plain",
    sampler: str = "default",
    stop_after: int = 0,
    resume: str | bool = False,
    n_clusters: int | None = None,
    clusters: dict[str, Any] | None = None,
    callback: dict[str, Any] | None = None,
    loss_settings: dict[str, Any] | None = None,
    train_settings: dict[str, Any] | None = None,
    labelled: str | None = None,
) -> dict[str, Any]:
    """Train on 96 sentences in batches of 8 over all processes, 3 epochs, and return what has become of it.

    `clusters` are more arguments of `CorpusClusters.fit`. With a file of labelled texts, the evaluators score the model
    before training and after each epoch.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    model = load_model(model_folder)
    settings = {"gather_across_devices": processes > 1, **(loss_settings or {})}
    sentences = make_sentences(ROWS)
    objective = make_loss(method, loss, model, n_clusters or CLUSTERS[method], clusters or {}, **settings)
    values: list[float] = []
    objective.register_forward_hook(lambda module, inputs, value: values.append(float(value.detach())))
    arguments: dict[str, Any] = {
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
    evaluator = None
    if labelled:
        arguments |= {"eval_strategy": "epoch", "eval_on_start": True}
        plain = [LabelFreeEvaluator(sentences), SpanRetrievalEvaluator(sentences)]
        evaluator = SequentialEvaluator([*plain, MtebEvaluator([clustering_task(labelled)])])
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**arguments),
        train_dataset=views_dataset(sentences, objective.clusters, "deletion")
        if method == "default"
        else Dataset.from_dict({"text": sentences}),
        loss=objective,
        evaluator=evaluator,
        callbacks=[ClusterStateCallback(objective, **(callback or {})), StopAfter(stop_after)],
    )
    if method == "default":
        log_clusters(trainer)
    trainer.train(resume_from_checkpoint=resume)
    state = objective.state_dict()
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "state": {name: value.clone() for name, value in state.items() if not name.startswith("model.")},
        "settings": objective.get_config_dict(),
        "values": values,
        "diagnostics": [entry for entry in trainer.state.log_history if "used_centroids" in entry],
        "log": [
            {name: entry[name] for name in ("step", "loss", "grad_norm")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "scores": [
            {name: score for name, score in entry.items() if name.startswith("eval_") and name.count("_") > 1}
            for entry in trainer.state.log_history
            if "eval_sequential_score" in entry
        ],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", type=json.loads, nargs="?", default={})
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = train(options.model_folder, options.output, **options.settings)
    torch.save(result, options.output / f"result-{os.environ.get('RANK', '0')}.pt")
