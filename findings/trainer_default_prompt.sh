#!/usr/bin/env bash
# SentenceTransformerTrainer trains without the model's default prompt, which encode applies.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, accelerate 1.15.0, datasets 5.2.0,
#   Python 3.11.
#
# A good engineer would guess:
#   A model with prompts={"topic": ...} and default_prompt_name="topic" sees that prompt before every text: in
#   encode, in evaluation, and in training.
#
# What happens:
#   Training reads the prompts argument of the training arguments alone, though the model says at loading that its
#   default prompt "applies unless overridden". A model that is fine-tuned as it was loaded is trained on texts
#   without the prompt, and then used with it; the loss of training and the evaluators during training speak of
#   different inputs.
#
# Output seen (beside what the libraries log):
#   encode  [CLS] topic red fox [SEP]
#   trainer [CLS] red fox [SEP]
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
        accelerate==1.15.0 datasets==5.2.0
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
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

model = tiny_bert(prompts={"topic": "topic "}, default_prompt_name="topic")
inputs = model[0].forward
seen = []


def record(features, **settings):
    seen.append(model.tokenizer.decode(features["input_ids"][0]))
    return inputs(features, **settings)


model[0].forward = record
model.encode("red fox")
encoded = seen.pop()
arguments = dict(max_steps=1, per_device_train_batch_size=4, save_strategy="no", report_to=[], disable_tqdm=True)
data = Dataset.from_dict({"anchor": ["red fox"] * 4, "positive": ["fox ran"] * 4})
SentenceTransformerTrainer(
    model,
    SentenceTransformerTrainingArguments(root + "/run", use_cpu=True, **arguments),
    train_dataset=data,
    loss=MultipleNegativesRankingLoss(model),
).train()
trained = seen[0]
print("encode ", encoded)
print("trainer", trained)
assert "topic" in encoded and "topic" not in trained, "the behaviour changed: training applies the default prompt"
PY
