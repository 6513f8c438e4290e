#!/usr/bin/env bash
# LoRA over a bfloat16 model: float32 with PEFT, bfloat16 with add_adapter, and bfloat16 after a reload.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, accelerate 1.15.0, datasets 5.2.0,
#   peft 0.21.2, Python 3.11.
#
# A good engineer would guess:
#   PEFT keeps adapters over a bfloat16 base in float32 (autocast_adapter_dtype=True), so that small updates
#   count. add_adapter of transformers and sentence-transformers passes the same config to PEFT and does the same.
#   An adapter saved in float32 comes back in float32.
#
# What happens:
#   add_adapter makes the adapter in bfloat16, where an AdamW step of 2e-5 is lost on every weight above 0.008.
#   Who casts it to float32 trains and saves it in float32, and SentenceTransformer(path) reads it back rounded to
#   bfloat16: the reloaded model is not the one that was saved.
#
# Output seen (beside what the libraries log):
#   get_peft_model(model, config)      torch.float32
#   model.add_adapter(config)          torch.bfloat16
#   cast to float32, file on disk      torch.float32
#   SentenceTransformer(path)          torch.bfloat16
#   weights that the reload has changed: 100%
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
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)


def adapter(model):
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


def dtype(weights):
    (only,) = {weight.dtype for weight in weights.values()}
    return only


tiny_bert().to(torch.bfloat16).save(root + "/base")
with_peft = get_peft_model(SentenceTransformer(root + "/base", device="cpu")[0].auto_model, config)
model = SentenceTransformer(root + "/base", device="cpu")
model.add_adapter(config)
found = [dtype(adapter(with_peft)), dtype(adapter(model))]
for weight in adapter(model).values():
    weight.data = torch.randn_like(weight, dtype=torch.float32)  # as training in float32 would leave it
model.save(root + "/adapter")
again = SentenceTransformer(root + "/adapter", device="cpu")
found += [dtype(load_file(root + "/adapter/adapter_model.safetensors")), dtype(adapter(again))]
made = "get_peft_model(model, config)", "model.add_adapter(config)"
for name, kind in zip([*made, "cast to float32, file on disk", "SentenceTransformer(path)"], found):
    print(f"{name:<34} {kind}")
before, after = (torch.cat([w.detach().flatten().float() for w in adapter(m).values()]) for m in (model, again))
changed = (before != after).double().mean().item()
print(f"weights that the reload has changed: {changed:.0%}")
single, half = torch.float32, torch.bfloat16
assert found == [single, half, single, half] and changed > 0.9, "the behaviour changed"
PY
