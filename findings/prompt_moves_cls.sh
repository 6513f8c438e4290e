#!/usr/bin/env bash
# include_prompt=False with CLS pooling: the embedding is the first word's, not [CLS]'s.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, Python 3.11.
#
# A good engineer would guess:
#   include_prompt=False concerns pooling over tokens (mean, max, last). A model that reads its embedding from
#   [CLS] reads it there, with a prompt or without.
#
# What happens:
#   [CLS] stands before the prompt and is counted as a part of it. Pooling takes the first token that is left: the
#   first word of the text. The same model without a prompt takes [CLS]. Nothing says so, and the embedding is a
#   plausible vector.
#
# Output seen (beside what the libraries log):
#   no prompt   ['[CLS]', 'red', 'fox', '[SEP]'] embedding is that of [CLS]
#   with prompt ['[CLS]', 'topic', 'red', 'fox', '[SEP]'] embedding is that of red
#
# By hand, no CI: installs the packages into a temporary environment, or runs in PYTHON where that is set.
# Exits with 1 when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/environment"
    PYTHON=$folder/environment/bin/python
    "$PYTHON" -m pip install --quiet sentence-transformers==6.2.0 transformers==5.23.0 torch==2.13.0
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

model = tiny_bert(pooling="cls", include_prompt=False).eval()
taken = []
for name, prompt in (("no prompt", None), ("with prompt", "topic ")):
    features = model.preprocess(["red fox"], prompt=prompt)
    tokens = model.tokenizer.convert_ids_to_tokens(features["input_ids"][0])
    with torch.no_grad():
        out = model(features)
    distances = (out["token_embeddings"][0] - out["sentence_embedding"]).norm(dim=1)
    assert distances.min() < 1e-6
    taken.append(tokens[int(distances.argmin())])
    print(f"{name:<11} {tokens} embedding is that of {taken[-1]}")
assert taken == ["[CLS]", "red"], "the behaviour changed"
PY
