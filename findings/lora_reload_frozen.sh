#!/usr/bin/env bash
# A saved LoRA model reloads with its adapter frozen: further training moves only what is behind it.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, accelerate 1.15.0, datasets 5.2.0,
#   peft 0.21.2, Python 3.11.
#
# A good engineer would guess:
#   SentenceTransformer(path) opens a LoRA model as it was when it was saved: the adapter trains, the base does
#   not. Training it on further data trains the adapter.
#
# What happens:
#   The adapter is loaded for inference, with requires_grad=False like the base. A model with a Dense layer behind
#   the pooling trains without an error or warning: the loss falls, and only the Dense layer has moved. (Without
#   such a layer, backward raises "does not require grad".)
#
# Output seen (beside what the libraries log):
#   before saving: 4 tensors of the adapter train; after the reload: 0
#   loss of the first and last of 20 steps: fell
#   largest change by training: adapter 0.0e+00, Dense 9.8e-02
#
# By hand, no CI: installs the packages into a temporary environment, or runs in PYTHON where that is set.
# Exits with 1 when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/environment"
    PYTHON=$folder/environment/bin/python
    "$PYTHON" -m pip install --quiet sentence-transformers==6.2.0 transformers==5.23.0 torch==2.13.0 \
        accelerate==1.15.0 datasets==5.2.0 peft==0.21.2
fi
export HF_HUB_OFFLINE=1 HF_HOME="$folder" MTEB_CACHE="$folder/mteb" TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore TQDM_DISABLE=1
"$PYTHON" - "$folder" <<'PY'
import sys

root = sys.argv[1]

import tempfile

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = "the red blue fox cat ran sat over under a green hill mat topic".split()


def tiny_bert(pooling="mean", include_prompt=True, seed=0, **settings):
    """A random Bert of one layer, without dropout, with a tokenizer of whole words."""
    folder = tempfile.mkdtemp(dir=root)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP")}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    no_dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertModel(BertConfig(vocab_size=len(names), **sizes, **no_dropout)).save_pretrained(folder)
    modules = [Transformer(folder), Pooling(16, pooling_mode=pooling, include_prompt=include_prompt)]
    return SentenceTransformer(modules=modules, device="cpu", **settings)
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense

bert = tiny_bert()
bert.add_adapter(LoraConfig(r=4, target_modules=["query", "value"]))
model = SentenceTransformer(modules=[bert[0], bert[1], Dense(16, 16)], device="cpu")
trains = sum("lora_" in name and weight.requires_grad for name, weight in model.named_parameters())
model.save(root + "/saved")

again = SentenceTransformer(root + "/saved", device="cpu")
trains_again = sum("lora_" in name and weight.requires_grad for name, weight in again.named_parameters())
start = {name: weight.detach().clone() for name, weight in again.named_parameters()}
arguments = dict(max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, save_strategy="no")
quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True, log_level="error")
trainer = SentenceTransformerTrainer(
    again,
    SentenceTransformerTrainingArguments(root + "/run", **arguments, **quiet),
    train_dataset=Dataset.from_dict({"a": ["red fox", "blue cat", "green hill", "mat"] * 8,
                                     "b": ["fox ran", "cat sat", "over a hill", "under the mat"] * 8}),
    loss=MultipleNegativesRankingLoss(again),
)
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
fell = float(losses[-1]) < float(losses[0])
change = {name: (weight - start[name]).abs().max().item() for name, weight in again.named_parameters()}
adapter = max(value for name, value in change.items() if "lora_" in name)
dense = max(value for name, value in change.items() if "linear" in name)
print(f"before saving: {trains} tensors of the adapter train; after the reload: {trains_again}")
print("loss of the first and last of 20 steps:", "fell" if fell else "did not fall")
print(f"largest change by training: adapter {adapter:.1e}, Dense {dense:.1e}")
assert trains == 4 and trains_again == 0 == adapter and dense > 0, "the behaviour changed: the adapter trains"
PY
