"""Pretrain a small BERT by masked language modelling on Wikipedia sentences: the raw backbone of backbone.json.

    python benchmarks/pretrain.py --output benchmarks/backbone --minutes 60 --data-dir DIR

In steps: learn a WordPiece vocabulary; turn the sentences into tokens; train, in bfloat16 mixed precision, with a
learning rate that rises over the first twentieth of the budget and falls linearly to 0; save a plain Hugging Face
folder with float16 weights that load as float32, of 15 MB at most, with the loss curve (`pretraining.png`) and the
settings, versions, losses and command (`pretraining.json`). Pooling is chosen by whoever loads it.

The budget is minutes of training or a number of steps; only the latter gives the same model again. An interrupted run
goes on by the same command; what is unfinished lies in OUTPUT.partial. Without `--data-dir` the sentences come from the
hub.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizerFast,
    DataCollatorForLanguageModeling,
)

from compare import command, versions
from corpora import read_wiki
from st_clusterns.report import write_json

MEGABYTES = 15  # of the folder, at most: it may lie in a repository
DROPOUT = 0.1  # of the saved model, for the two views; pretraining as short as this is better without
HELD_OUT = 1000  # sentences that the loss is measured on, not trained on
LENGTH = 64  # tokens of a sentence, at most
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHUNK = 64  # batches that are sorted by length together, so that little is padding


class Tokens:
    """Sentences as token numbers, each with [CLS] and [SEP], one after the other in one array."""

    def __init__(self, flat: npt.NDArray[np.uint16], ends: npt.NDArray[np.int64]) -> None:
        self.flat = flat
        self.ends = ends
        self.lengths = np.diff(ends, prepend=0)

    @classmethod
    def encode(cls, sentences: Sequence[str], tokenizer: BertTokenizerFast) -> Tokens:
        parts = []
        for start in range(0, len(sentences), 10_000):
            encoded = tokenizer(list(sentences[start : start + 10_000]), truncation=True, max_length=LENGTH)
            parts += [np.array(ids, dtype=np.uint16) for ids in encoded["input_ids"]]
        return cls(np.concatenate(parts), np.cumsum([len(part) for part in parts]))

    def batch(self, rows: npt.NDArray[np.int64], pad: int) -> Tensor:
        """Return the sentences of some rows, padded to the longest, (B, L)."""
        lengths = self.lengths[rows]
        ids = np.full((len(rows), lengths.max()), pad, dtype=np.int64)
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[place, :length] = self.flat[self.ends[row] - length : self.ends[row]]
        return torch.from_numpy(ids)


def rows_of_step(step: int, lengths: npt.NDArray[np.int64], batch_size: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the rows of a step's batch: of similar length, and a function of (seed, step) alone."""
    chunk, place = divmod(step, CHUNK)
    draw = np.random.default_rng((seed, chunk))
    rows = draw.choice(len(lengths), size=min(CHUNK * batch_size, len(lengths)), replace=False)
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    return np.array_split(rows, CHUNK)[draw.permutation(CHUNK)[place]]


class Masker:
    """BERT's masking of a share of the tokens, by transformers; the same for the same seed."""

    def __init__(self, tokenizer: BertTokenizerFast, share: float) -> None:
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=share)
        self.special = torch.tensor(tokenizer.all_special_ids)
        self.pad = tokenizer.pad_token_id

    def __call__(self, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return self.collator.torch_mask_tokens(ids.clone(), special_tokens_mask=torch.isin(ids, self.special))


def masked_loss(model: BertForMaskedLM, ids: Tensor, masker: Masker, seed: int) -> Tensor:
    """Return the cross-entropy of the masked tokens; the vocabulary's scores are computed at those alone."""
    inputs, labels = (tensor.to(model.device) for tensor in masker(ids, seed))
    real = (ids != masker.pad).long().to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        hidden = model.bert(input_ids=inputs, attention_mask=real).last_hidden_state
        wanted = labels != -100
        scores = model.cls(hidden[wanted])
    return torch.nn.functional.cross_entropy(scores.float(), labels[wanted])


def held_out_loss(model: BertForMaskedLM, tokens: Tokens, masker: Masker) -> float:
    """Return the mean loss over the held-out sentences, always masked alike."""
    order = np.argsort(tokens.lengths, kind="stable")
    with torch.no_grad():
        parts = [
            masked_loss(model, tokens.batch(rows, masker.pad), masker, 0).item() for rows in np.array_split(order, 10)
        ]
    return float(np.mean(parts))


def make_tokenizer(sentences: Sequence[str], size: int, folder: Path) -> BertTokenizerFast:
    """Learn a lower-case WordPiece vocabulary, or read it where it has been."""
    if not (folder / "tokenizer_config.json").exists():
        learner = BertWordPieceTokenizer(lowercase=True)
        learner.train_from_iterator(sentences, vocab_size=size, show_progress=False)
        special = sorted(SPECIAL, key=learner.token_to_id)
        words = sorted(set(learner.get_vocab()) - set(special))  # the learner's own order differs from run to run
        folder.mkdir(exist_ok=True)
        (folder / "vocab.txt").write_text("\n".join([*special, *words]) + "\n", encoding="utf-8")
        BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=2 * LENGTH).save_pretrained(str(folder))
    return BertTokenizerFast.from_pretrained(str(folder))


def make_model(layers: int, width: int, vocabulary: int, seed: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=2 * LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    megabytes = 2 * sum(weight.numel() for weight in model.bert.parameters()) / 1e6
    if megabytes > MEGABYTES - 1:  # one for the tokenizer and the picture
        raise SystemExit(
            f"layers={layers}, width={width}, vocabulary={vocabulary} make {megabytes:.0f} MB of weights, more than "
            f"{MEGABYTES - 1}: choose less of one."
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def learning_rate(done: float, peak: float) -> float:
    """Return the learning rate when a share `done` of the budget is used up."""
    return peak * min(done / 0.05, (1 - done) / 0.95)


def train(
    model: BertForMaskedLM,
    tokens: Tokens,
    held_out: Tokens,
    masker: Masker,
    checkpoint: Path,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Train within the budget, going on from the checkpoint if there is one; return the record of losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    record: dict[str, Any] = {"step": 0, "seconds": 0.0, "tokens": 0, "training": [], "held_out": []}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=model.device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        record = saved["record"]
    lengths, saves, recent = tokens.lengths, 20, []
    with Progress() as progress:
        bar = progress.add_task("pretraining", total=1.0)
        while (done := _done(record, settings)) < 1:
            began = time.monotonic()
            optimizer.param_groups[0]["lr"] = learning_rate(done, settings["learning_rate"])
            rows = rows_of_step(record["step"], lengths, settings["batch_size"], settings["seed"])
            ids = tokens.batch(rows, masker.pad)
            loss = masked_loss(model, ids, masker, settings["seed"] + record["step"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(loss.item())
            record["step"] += 1
            record["tokens"] += int(lengths[rows].sum())
            record["seconds"] += time.monotonic() - began
            after = _done(record, settings)
            progress.update(bar, completed=after, description=f"step {record['step']}, loss {recent[-1]:.2f}")
            if int(after * saves) > int(done * saves):
                record["training"].append((record["step"], float(np.mean(recent))))
                record["held_out"].append((record["step"], held_out_loss(model, held_out, masker)))
                recent = []
                parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "record": record}
                torch.save(parts, checkpoint.with_suffix(".new"))
                os.replace(checkpoint.with_suffix(".new"), checkpoint)
    return record


def _done(record: dict[str, Any], settings: dict[str, Any]) -> float:
    if settings["steps"]:
        return min(1.0, record["step"] / settings["steps"])
    return min(1.0, record["seconds"] / (60 * settings["minutes"]))


def save(model: BertForMaskedLM, tokenizer: BertTokenizerFast, folder: Path) -> None:
    """Write the encoder with float16 weights that load as float32."""
    config = model.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = DROPOUT
    torch.manual_seed(0)
    encoder = BertModel(config)  # with a pooler, unused: where one is missing, loading makes a random one
    encoder.load_state_dict(model.bert.state_dict(), strict=False)
    encoder.half().save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    description = json.loads((folder / "config.json").read_text())
    write_json({**description, "dtype": "float32"}, folder / "config.json")


def draw(record: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in ("training", "held_out"):
        axes.plot(*np.array(record[name]).T, marker=".", label=name.replace("_", " "))
    axes.set(title="Masked language modelling", xlabel="step", ylabel="cross-entropy of a masked token, nats")
    axes.legend()
    figure.savefig(path, dpi=100)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float)
    budget.add_argument("--steps", type=int)
    parser.add_argument("--sentences", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--masked", type=float, default=0.15, help="share of the tokens that are masked")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    if args.output.exists():
        raise SystemExit(f"{args.output} exists already: choose another folder, or remove it first.")
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "data_dir")}
    work = args.output.with_name(f"{args.output.name}.partial")
    _check_same(work, settings)

    sentences = read_wiki(args.sentences, args.data_dir)
    tokenizer = make_tokenizer(sentences[HELD_OUT:], args.vocabulary, work / "tokenizer")
    model = make_model(args.layers, args.width, len(tokenizer), args.seed)
    held_out, tokens = _encode_once(sentences, tokenizer, work / "tokens.npz")
    record = train(model, tokens, held_out, Masker(tokenizer, args.masked), work / "checkpoint.pt", settings)

    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    save(model, tokenizer, finished)
    draw(record, finished / "pretraining.png")
    report = {
        "settings": settings,
        "data": f"the first {len(sentences)} Wikipedia sentences, of which {HELD_OUT} held out",
        "parameters": sum(weight.numel() for weight in model.bert.parameters()),
        "perplexity_held_out": math.exp(record["held_out"][-1][1]),
        **record,
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "command": command(),
    }
    write_json(report, finished / "pretraining.json")
    os.replace(finished, args.output)
    shutil.rmtree(work)
    megabytes = sum(path.stat().st_size for path in args.output.iterdir()) / 1e6
    print(f"{args.output}: {megabytes:.1f} MB, held-out loss {record['held_out'][-1][1]:.3f}")


def _check_same(work: Path, settings: dict[str, Any]) -> None:
    note = work / "settings.json"
    if not note.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_json(settings, note)
    elif json.loads(note.read_text()) != settings:
        raise SystemExit(f"{work} holds an interrupted run with other settings: repeat its command, or remove it.")


def _encode_once(sentences: Sequence[str], tokenizer: BertTokenizerFast, path: Path) -> tuple[Tokens, Tokens]:
    if not path.exists():
        parts = [Tokens.encode(part, tokenizer) for part in (sentences[:HELD_OUT], sentences[HELD_OUT:])]
        partial = path.with_name("new.npz")
        np.savez(partial, **{f"{n}{i}": getattr(part, n) for i, part in enumerate(parts) for n in ("flat", "ends")})
        os.replace(partial, path)
    with np.load(path) as saved:
        return Tokens(saved["flat0"], saved["ends0"]), Tokens(saved["flat1"], saved["ends1"])


if __name__ == "__main__":
    main()
