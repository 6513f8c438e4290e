"""Train the published rows of ClusterNS, and SimCSE beside them, and compare with the published numbers.

    python benchmarks/paper.py --row bert-base --seeds 0 1 2 --output results/paper
    torchrun --nproc_per_node 2 benchmarks/paper.py --row roberta-base --output results/paper
    python benchmarks/paper.py --row all --dry-run

Each run (row x seed) follows the published settings (`st_clusterns.PRESETS`; for SimCSE its README): one epoch over
10^6 Wikipedia sentences (from the hub, from `--data-dir`, or `--corpus`), 32 tokens of each, a tanh head in training
only, fp16 on a GPU, evaluation on STS-B dev every 125 steps with patience 3. The best checkpoint is scored on the seven
STS tests as SimCSE does, on whole sentences. A run writes one JSON file with scores, settings, versions and command;
README.md has the tables. The same command resumes. A file made with other settings stops the program.

A batch is that of the row, over all processes. What does not fit into a device is trained in mini-batches by the cached
loss, which has the gradients of the whole batch for one more forward pass. Gradient accumulation is not offered: it
would take negatives away. Several processes share their negatives, with gradients (the authors: without).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

import corpora
from compare import command, versions
from st_clusterns import PRESETS, ClusterBatchSampler, ClusterStateCallback, PublishedClusterNSLoss
from st_clusterns.evaluation.sts import STS_TESTS, STSB, load_sts, sts_evaluator
from st_clusterns.files import write_json, write_text
from st_clusterns.import_checkpoint import published_encoder
from st_clusterns.losses.cached import CachedPublishedClusterNSLoss, _Cached
from st_clusterns.losses.contrastive import ContrastiveLoss
from st_clusterns.losses.distributed import rank, world_size
from st_clusterns.losses.presets import BERT, ROBERTA
from st_clusterns.models import reading_at_most
from st_clusterns.prompt_encoder import to_standard_modules
from st_clusterns.training.sentences import read_sentences
from st_clusterns.training.trainer import last_checkpoint
from tables import spread

SENTENCES, TOKENS, TEMPERATURE = 1_000_000, 32, 0.05
EVAL_STEPS, PATIENCE = 125, 3
DEV = "stsb-dev"


class CachedContrastiveLoss(_Cached):
    """SimCSE's loss, cached."""


@dataclass(frozen=True)
class Row:
    """A published row: what is trained how, and the published average of the seven tests."""

    name: str
    model: str
    average: float
    batch_size: int
    learning_rate: float
    devices: int = 1
    loss: dict[str, Any] | None = None  # of ClusterNS; None: SimCSE
    templates: tuple[str, ...] = ()

    @property
    def simcse(self) -> str:
        """The SimCSE row of the same model."""
        return next(name for name, row in ROWS.items() if row.loss is None and row.model == self.model)


ROWS = {
    **{
        name: Row(name, p.model, p.average, p.batch_size, p.learning_rate, p.devices, p.settings, p.templates)
        for name, p in ((key.removeprefix("paper/"), preset) for key, preset in PRESETS.items())
    },
    # SimCSE's README (github.com/princeton-nlp/SimCSE)
    "simcse-bert-base": Row("simcse-bert-base", BERT.format("base"), 76.25, 64, 3e-5),
    "simcse-bert-large": Row("simcse-bert-large", BERT.format("large"), 78.41, 64, 1e-5),
    "simcse-roberta-base": Row("simcse-roberta-base", ROBERTA.format("base"), 76.57, 512, 1e-5),
    "simcse-roberta-large": Row("simcse-roberta-large", ROBERTA.format("large"), 78.90, 512, 3e-5),
}


@dataclass(frozen=True)
class Plan:
    """What is the same for all rows."""

    corpus: str | None = None  # a file; None: Wikipedia
    sentences: int = SENTENCES
    model: str | None = None  # in place of each row's
    batch_size: int | None = None
    eval_steps: int = EVAL_STEPS
    loss: dict[str, Any] = field(default_factory=dict)  # overrides of ClusterNS's settings

    def settings(self, row: Row, seed: int) -> dict[str, Any]:
        """Return all that the result of a run depends on."""
        row = Row(**{**asdict(row), "model": self.model or row.model, "batch_size": self.batch_size or row.batch_size})
        loss = None if row.loss is None else {**row.loss, **self.loss}
        found = {**asdict(row), "loss": loss, "seed": seed, "sentences": self.sentences, "eval_steps": self.eval_steps}
        found["corpus"] = Path(self.corpus).name if self.corpus else "Wikipedia"
        return json.loads(json.dumps(found))


def make_loss(model: SentenceTransformer, settings: dict[str, Any], mini_batch_size: int) -> ContrastiveLoss:
    """Make the row's loss with the head, cached if a process's share of the batch exceeds a mini-batch."""
    shared = {"head": True, "gather_across_devices": world_size() > 1}
    cached = settings["batch_size"] // world_size() > mini_batch_size > 0
    if cached:
        shared["mini_batch_size"] = mini_batch_size
    if settings["loss"] is None:
        return (CachedContrastiveLoss if cached else ContrastiveLoss)(model, temperature=TEMPERATURE, **shared)
    kind = CachedPublishedClusterNSLoss if cached else PublishedClusterNSLoss
    return kind(model, **settings["loss"], **shared)


class WholeSentences(SentenceEvaluator):
    """Lets an evaluator read whole sentences while training reads the first tokens."""

    def __init__(self, inner: Any, max_seq_length: int) -> None:
        super().__init__()
        self.inner, self.max_seq_length = inner, max_seq_length

    def __call__(self, model: SentenceTransformer, *args: Any, **settings: Any) -> dict[str, float]:
        short, model.max_seq_length = model.max_seq_length, self.max_seq_length
        try:
            scores: dict[str, float] = self.inner(model, *args, **settings)
            self.primary_metric = self.inner.primary_metric
            return scores
        finally:
            model.max_seq_length = short


def train(
    model: SentenceTransformer,
    loss: ContrastiveLoss,
    texts: list[str],
    dev: Dataset,
    settings: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Train in place, from the last whole checkpoint in the folder if there is one, and load the best checkpoint."""
    templates = settings["templates"]
    columns = {"sentence": texts, **({"positive": texts} if templates else {})}
    cuda = model.device.type == "cuda"
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=settings["batch_size"] // world_size(),
        learning_rate=settings["learning_rate"],
        fp16=cuda,
        use_cpu=not cuda,
        seed=settings["seed"],
        data_seed=settings["seed"],
        prompts=dict(zip(columns, templates, strict=True)) if templates else None,
        batch_sampler=partial(ClusterBatchSampler, seed=settings["seed"], group_size=1),
        dataloader_drop_last=True,
        dataloader_pin_memory=cuda,
        eval_strategy="steps",
        eval_steps=settings["eval_steps"],
        save_steps=settings["eval_steps"],
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{DEV}_spearman_cosine",
        restore_callback_states_from_checkpoint=True,
        logging_steps=settings["eval_steps"],
        report_to="none",
    )
    evaluator = WholeSentences(sts_evaluator(dev, DEV), model.max_seq_length)
    callbacks = [ClusterStateCallback(loss), EarlyStoppingCallback(PATIENCE)]
    data = Dataset.from_dict(columns)
    trainer = SentenceTransformerTrainer(model, arguments, data, loss=loss, evaluator=evaluator, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(folder)
    template = model.preprocess([""])["input_ids"].shape[1] if templates else 0
    with reading_at_most(model, TOKENS + template):
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    log = [entry for entry in trainer.state.log_history if f"eval_{DEV}_spearman_cosine" in entry]
    curve = {entry["step"]: 100 * entry[f"eval_{DEV}_spearman_cosine"] for entry in log}
    return {"steps": trainer.state.global_step, "dev": 100 * (trainer.state.best_metric or 0.0), "dev_by_step": curve}


def run(
    settings: dict[str, Any], texts: list[str], data: Path | None, work: Path, mini_batch_size: int, keep: Path | None
) -> dict[str, Any]:
    """Train and score once."""
    began = time.monotonic()
    note = work / "settings.json"
    if read_result(note, settings) is None and rank() == 0:
        work.mkdir(parents=True, exist_ok=True)
        write_json({"settings": settings}, note)
    set_seed(settings["seed"])
    model = published_encoder(settings["model"], *settings["templates"][:1])
    loss = make_loss(model, settings, mini_batch_size)
    trained = train(model, loss, texts, load_sts(STSB, "dev", data), settings, work)
    evaluators = {name: sts_evaluator(load_sts(name, "test", data), name) for name in STS_TESTS}
    scores = {name: 100 * evaluator(model)[f"{name}_spearman_cosine"] for name, evaluator in evaluators.items()}
    if keep is not None and rank() == 0:
        (to_standard_modules(model) if settings["templates"] else model).save(str(keep))
    started = {"started": loss.centroids.started} if isinstance(loss, PublishedClusterNSLoss) else {}
    return {
        "settings": settings,
        "scores": {**scores, "average": float(np.mean(list(scores.values())))},
        **trained,
        **started,
        "processes": world_size(),
        "mini_batch_size": getattr(loss, "mini_batch_size", None),
        "seconds": round(time.monotonic() - began, 1),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type,
        "versions": versions(),
        "command": command(),
    }


def result_path(folder: Path, row: Row, seed: int) -> Path:
    return folder / f"{row.name}-{seed}.json"


def read_result(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return a finished run; one with other settings is an error."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name in settings if found["settings"].get(name) != settings[name]]
    if differing:
        raise SystemExit(
            f"{path} was made with another {', '.join(differing)}: move it away, or choose another --output."
        )
    return dict(found)


def describe(rows: list[Row], found: dict[str, list[dict[str, Any]]], plan: Plan) -> str:
    """Return the tables: mean ± standard deviation over seeds (number of seeds)."""
    names = [*STS_TESTS, "average"]
    other = "**Not the published models, data or settings: these numbers cannot be compared with the papers.**"
    lines = ["# The published rows", "", "Spearman's rho x 100, seven STS tests in SimCSE's protocol; mean ± standard"]
    lines += ["deviation over seeds (number of seeds). Made by `benchmarks/paper.py`.", ""]
    published = all(getattr(plan, name) == getattr(Plan(), name) for name in ("model", "corpus", "sentences", "loss"))
    if not published or plan.batch_size:
        lines += [other, ""]
    lines += [f"| | published | {' | '.join(names)} | STS-B dev |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        cells = [spread([run["scores"][name] for run in found[row.name]]) for name in names]
        dev = spread([run["dev"] for run in found[row.name]])
        lines.append(f"| {row.name} | {row.average:.2f} | {' | '.join(cells)} | {dev} |")
    commands = dict.fromkeys(run["command"] for runs in found.values() for run in runs)
    lines += ["", *(f"    {line}" for line in commands), ""]
    return "\n".join(lines)


def choose_rows(names: Sequence[str], simcse: bool) -> list[Row]:
    """Return the rows of these names ("all": the seven), with SimCSE of the same model behind them."""
    ours = [name for name, row in ROWS.items() if row.loss is not None]
    chosen = ours if "all" in names else list(names)
    if unknown := [name for name in chosen if name not in ROWS]:
        raise SystemExit(f"There is no row {', '.join(unknown)}. Choose all, {', '.join(ROWS)}.")
    beside = [ROWS[name].simcse for name in chosen if simcse and ROWS[name].loss is not None]
    return [ROWS[name] for name in dict.fromkeys([*chosen, *beside])]


def main(words: Sequence[str] | None = None) -> None:
    from paper_costs import describe_plan

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs="+", required=True, help=f"all, or of: {', '.join(ROWS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--no-simcse", action="store_true", help="leave out SimCSE of the same models")
    parser.add_argument("--output", type=Path, default=Path("results/paper"))
    parser.add_argument("--corpus", help="a file of sentences, in place of Wikipedia's")
    parser.add_argument("--data-dir", type=Path, help="local data, see benchmarks/README.md; the hub's without")
    parser.add_argument("--sentences", type=int, default=SENTENCES, help="read so many, at most")
    parser.add_argument("--mini-batch-size", type=int, default=64, help="rows on a device at a time; 0: all")
    parser.add_argument("--models", type=Path, help="save the trained models there")
    parser.add_argument("--dry-run", action="store_true", help="print the plan with steps, memory and time")
    parser.add_argument("--model", help="train this one in place of each row's")
    parser.add_argument("--batch-size", type=int, help="in place of each row's")
    parser.add_argument("--eval-steps", type=int, default=EVAL_STEPS)
    parser.add_argument("--loss", type=json.loads, default={}, help="other settings of ClusterNS, as a JSON object")
    args = parser.parse_args(words)
    rows = choose_rows(args.row, not args.no_simcse)
    plan = Plan(args.corpus, args.sentences, args.model, args.batch_size, args.eval_steps, args.loss)
    runs = [(row, seed, plan.settings(row, seed)) for seed in args.seeds for row in rows]
    for row, seed, settings in runs:
        read_result(result_path(args.output, row, seed), settings)  # complain now, not after hours
    if args.dry_run:
        print(describe_plan([settings for _, seed, settings in runs if seed == args.seeds[0]], args))
        return
    found: dict[str, list[dict[str, Any]]]
    args.output.mkdir(parents=True, exist_ok=True)
    texts = read_sentences(args.corpus) if args.corpus else corpora.read_wiki(args.sentences, args.data_dir)
    texts = texts[: args.sentences]
    for row, _, settings in runs:
        if len(texts) < settings["batch_size"]:
            raise SystemExit(f"{row.name} has batches of {settings['batch_size']}, the corpus {len(texts)} sentences.")
    for row, seed, settings in runs:
        path = result_path(args.output, row, seed)
        if not path.exists():
            print(f"{row.name}, seed {seed}", flush=True)
            work = args.output / "work" / path.stem
            keep = args.models and args.models / path.stem
            result = run(settings, texts, args.data_dir, work, args.mini_batch_size, keep)
            if rank() == 0:
                write_json(result, path)
                shutil.rmtree(work, ignore_errors=True)
                with suppress(OSError):
                    work.parent.rmdir()
        if rank() == 0:
            found = {row.name: [] for row in rows}
            for done, number, planned in runs:
                finished = read_result(result_path(args.output, done, number), planned)
                found[done.name] += [finished] if finished else []
            write_text(describe(rows, found, plan), args.output / "README.md")
    print(f"Tables: {args.output / 'README.md'}")


if __name__ == "__main__":
    main()
