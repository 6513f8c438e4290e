"""Time and memory of a training step of the paper's rows beside SimCSE's: same model size, batch and texts.

    python benchmarks/paper_speed.py [--output results/paper] [--rows 64] [--steps 3] [--repeats 2]

BERT-base from random weights; 32 tokens of each sentence, and the template for prompt rows. A step is preprocessing,
forward, backward and AdamW. The sides run in turn; a ratio is the median of those of the repeats. On one CPU thread the
clock is the process's CPU time, which other work disturbs little; peak memory is known on a GPU only. The centroids
have started, so that all terms are at work.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

import paper
from compare import command, versions
from speed import SYLLABLES
from st_clusterns import PublishedClusterNSLoss
from st_clusterns.files import write_json
from st_clusterns.import_checkpoint import published_encoder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEMPLATE_WORDS = ["This", "sentence", "of", "means", '"', ":", "."]


def save_random_bert(folder: str, layers: int) -> None:
    """Write BERT-base from random weights, with a tokenizer of whole words."""
    words = [*SPECIAL, *TEMPLATE_WORDS, *(a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES)]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names).save_pretrained(folder)
    BertModel(BertConfig(num_hidden_layers=layers)).save_pretrained(folder)


def make_texts(count: int) -> list[str]:
    """Return sentences of 10 to 50 words, of which the longer ones are cut, as Wikipedia's are."""
    draw = np.random.default_rng(0)
    return [
        " ".join("".join(draw.choice(SYLLABLES, 3)) for _ in range(length)) for length in draw.integers(10, 51, count)
    ]


class Side:
    """A model, a loss, and steps on the same texts."""

    def __init__(self, row: str, folder: str, texts: list[str], mini_batch_size: int, device: str) -> None:
        set_seed(0)
        settings = paper.Plan(model=folder, batch_size=len(texts)).settings(paper.ROWS[row], 0)
        self.templates = settings["templates"] or [None]  # without, one column is read twice
        self.model = published_encoder(folder, self.templates[0]).to(device)
        template = self.model.preprocess([""])["input_ids"].shape[1] if settings["templates"] else 0
        self.model.max_seq_length = paper.TOKENS + template
        self.texts, self.device = texts, device
        self.loss = paper.make_loss(self.model, settings, mini_batch_size).to(device)
        if isinstance(self.loss, PublishedClusterNSLoss):
            torch.nn.init.normal_(self.loss.centroids.centroids)
            self.loss.centroids.started = True
        self.optimizer = torch.optim.AdamW(self.loss.parameters(), lr=1e-5)
        self.model.train()

    def step(self) -> None:
        columns = [self.model.preprocess(self.texts, prompt=template) for template in self.templates]
        columns = [{k: v.to(self.device) if hasattr(v, "to") else v for k, v in column.items()} for column in columns]
        with torch.autocast("cuda", torch.float16, enabled=self.device == "cuda"):
            value = self.loss(columns)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds_a_step(side: Side, steps: int) -> float:
    cuda = side.device == "cuda"
    clock: Callable[[], float] = time.process_time if torch.get_num_threads() == 1 and not cuda else time.perf_counter
    begin = clock()
    for _ in range(steps):
        side.step()
    if cuda:
        torch.cuda.synchronize()
    return (clock() - begin) / steps


def measure(args: argparse.Namespace, folder: str, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    texts = make_texts(args.rows)
    for kind, mini in (("plain", 0), ("cached", args.mini_batch_size)):
        for row in ("bert-base", "prompt-bert-base"):
            sides = [Side(name, folder, texts, mini, device) for name in (row, "simcse-bert-base")]
            peaks = []
            for side in sides:  # warm up
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                side.step()
                peaks += [torch.cuda.max_memory_allocated() / 1e9] if device == "cuda" else []
            pairs = []
            for place in range(args.repeats):
                order = sides[:: -1 if place % 2 else 1]
                took = {id(side): seconds_a_step(side, args.steps) for side in order}
                pairs.append([took[id(side)] for side in sides])
            ours, theirs = np.median(pairs, axis=0).tolist()
            ratios = [a / b for a, b in pairs]
            result = {"seconds": ours, "simcse_seconds": theirs, "ratio": float(np.median(ratios)), "ratios": ratios}
            yield f"{row}, {kind}", {**result, **({"peak_gb": peaks} if peaks else {})}
            del sides, side


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/paper"))
    parser.add_argument("--rows", type=int, default=64, help="sentences in a batch")
    parser.add_argument("--mini-batch-size", type=int, default=16, help="of the cached losses")
    parser.add_argument("--steps", type=int, default=3, help="steps of a measurement")
    parser.add_argument("--repeats", type=int, default=2, help="measurements of each side")
    parser.add_argument("--layers", type=int, default=12, help="fewer to try it out")
    args = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    facts = {"command": command(), "device": machine, "threads": torch.get_num_threads(), "layers": args.layers}
    result: dict[str, Any] = {**facts, "batch": args.rows, **versions(), "rows": {}}
    args.output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        save_random_bert(folder, args.layers)
        for name, row in measure(args, folder, device):
            result["rows"][name] = row
            print(f"{name}: {row}", flush=True)
            write_json(result, args.output / "speed.json")


if __name__ == "__main__":
    main()
