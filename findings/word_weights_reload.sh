#!/usr/bin/env bash
# sentence-transformers saves trained WordWeights and reloads the untrained ones.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, accelerate 1.15.0, datasets 5.2.0,
#   Python 3.11.
#
# A good engineer would guess:
#   WordWeights holds an nn.Embedding that training updates. save writes its weights (model.safetensors), so the
#   reloaded model is the trained one, as with Dense, LSTM and CNN.
#
# What happens:
#   The reload makes the module from its config, which holds the weights it was created with, and does not read
#   model.safetensors. Training is lost without a warning. The trainer reloads in this way, too, where it resumes
#   or loads the best model.
#
# Output seen (beside what the libraries log):
#   files: ['config.json', 'model.safetensors']
#   weight of "red": made with 2.0, trained 1.977, in the saved file 1.977, reloaded 2.0
#   largest change of an embedding by the reload: 1.88e-02
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
import os

from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import WordWeights

bert = tiny_bert()
vocabulary = sorted(bert.tokenizer.get_vocab(), key=bert.tokenizer.get_vocab().get)
weights = WordWeights(vocabulary, {"red": 2.0})
model = SentenceTransformer(modules=[bert[0], weights, bert[1]], device="cpu")
arguments = dict(max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no")
quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True)
SentenceTransformerTrainer(
    model,
    SentenceTransformerTrainingArguments(root + "/run", **arguments, **quiet),
    train_dataset=Dataset.from_dict({"a": ["red fox", "blue cat"] * 8, "b": ["fox ran", "cat sat"] * 8}),
    loss=MultipleNegativesRankingLoss(model),
).train()
model.save(root + "/saved")
again = SentenceTransformer(root + "/saved", device="cpu")

red, files = vocabulary.index("red"), sorted(os.listdir(root + "/saved/1_WordWeights"))
saved = load_file(root + "/saved/1_WordWeights/model.safetensors")["emb_layer.weight"][red].item()
trained, reloaded = (m[1].emb_layer.weight[red].item() for m in (model, again))
change = abs(model.encode("red fox") - again.encode("red fox")).max()
print("files:", files)
print(f'weight of "red": made with 2.0, trained {trained:.3f}, in the saved file {saved:.3f}, reloaded {reloaded}')
print(f"largest change of an embedding by the reload: {change:.2e}")
assert trained == saved != reloaded == 2.0, "the behaviour changed: the trained weights are reloaded"
PY
