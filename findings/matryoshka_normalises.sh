#!/usr/bin/env bash
# MatryoshkaLoss over the full dimension alone is not the loss that it wraps.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, Python 3.11.
#
# A good engineer would guess:
#   MatryoshkaLoss(model, loss, [full dimension]) computes the loss on all dimensions, once: it equals the loss.
#   Truncation to d keeps the first d numbers, as encode(truncate_dim=d) does.
#
# What happens:
#   Every slice, the full one too, is divided by its norm. Losses over cosine do not notice. A dot-product model
#   (here MultipleNegativesRankingLoss with dot_score) trains on cosines between -1 and 1: lengths get no gradient
#   (the gradient is orthogonal to each embedding), while encode and dot_score go on using them.
#
# Output seen (beside what the libraries log):
#   loss on embeddings of length 2.6            0.6732
#   MatryoshkaLoss(..., matryoshka_dims=[16])   0.6903
#   embeddings doubled: loss 0.6207, MatryoshkaLoss 0.6903
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
from sentence_transformers import util
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

model = tiny_bert()
loss = MultipleNegativesRankingLoss(model, scale=1.0, similarity_fct=util.dot_score)
wrapped = MatryoshkaLoss(model, loss, matryoshka_dims=[16])
columns = ["red fox", "blue cat"], ["fox ran", "a green hill"]


def value(of, factor=1.0):
    """The loss where every embedding is multiplied by a factor."""
    forward = model.forward

    def longer(features):
        out = forward(features)
        return {**out, "sentence_embedding": factor * out["sentence_embedding"]}

    model.forward = longer
    result = of([model.preprocess(list(column)) for column in columns], None).item()
    model.forward = forward
    return result


length = torch.tensor(model.encode(columns[0])).norm(dim=1).mean()
plain, full, plain2, full2 = value(loss), value(wrapped), value(loss, 2.0), value(wrapped, 2.0)
print(f"loss on embeddings of length {length:.1f}            {plain:.4f}")
print(f"MatryoshkaLoss(..., matryoshka_dims=[16])   {full:.4f}")
print(f"embeddings doubled: loss {plain2:.4f}, MatryoshkaLoss {full2:.4f}")
assert abs(full - plain) > 1e-3 and abs(full2 - full) < 1e-5, "the behaviour changed: no normalisation"
PY
