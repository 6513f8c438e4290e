#!/usr/bin/env bash
# The Trainer edits a config, and the saved XLM-R embeds otherwise than the trained one.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, accelerate 1.15.0, datasets 5.2.0,
#   Python 3.11.
#
# A good engineer would guess:
#   A token that the attention mask hides has no effect. Where the tokenizer pads with another id than
#   config.pad_token_id (a vocabulary of one's own in XLM-R), the model trains, and what is saved is what was in
#   memory.
#
# What happens:
#   Trainer writes the tokenizer's pad id into the config when training begins. In RoBERTa and XLM-R the pad id is
#   also the offset of all position ids, fixed in memory when the model was made. The saved model, made anew from
#   the edited config, reads other rows of its position table. One step at learning rate 0 suffices, and a
#   checkpoint resumed goes on from another model.
#
# Output seen (beside what the libraries log):
#   config.pad_token_id: 1 before training, 0 after it
#   training at learning rate 0 changes the embedding in memory by 0.00
#   saving and reloading it changes the embedding by               0.30
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
from transformers import XLMRobertaConfig, XLMRobertaModel

tokenizer = tiny_bert().tokenizer  # its pad id is 0
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
XLMRobertaModel(XLMRobertaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(root + "/xlmr")
tokenizer.save_pretrained(root + "/xlmr")
model = SentenceTransformer(modules=[Transformer(root + "/xlmr"), Pooling(16)], device="cpu")

first, pad = model.encode("the red fox ran"), model[0].auto_model.config.pad_token_id
arguments = dict(max_steps=1, per_device_train_batch_size=4, learning_rate=0.0, save_strategy="no")
quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True)
SentenceTransformerTrainer(
    model,
    SentenceTransformerTrainingArguments(root + "/run", **arguments, **quiet),
    train_dataset=Dataset.from_dict({"a": ["red fox", "blue cat"] * 4, "b": ["fox ran", "cat sat"] * 4}),
    loss=MultipleNegativesRankingLoss(model),
).train()
trained, pad_after = model.encode("the red fox ran"), model[0].auto_model.config.pad_token_id
model.save(root + "/saved")
reloaded = SentenceTransformer(root + "/saved", device="cpu").encode("the red fox ran")
print(f"config.pad_token_id: {pad} before training, {pad_after} after it")
print(f"training at learning rate 0 changes the embedding in memory by {abs(trained - first).max():.2f}")
print(f"saving and reloading it changes the embedding by               {abs(reloaded - trained).max():.2f}")
assert (pad, pad_after) == (1, 0), "the behaviour changed: the config stays"
assert abs(trained - first).max() < 1e-6 < 1e-2 < abs(reloaded - trained).max(), "the behaviour changed"
PY
