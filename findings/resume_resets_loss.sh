#!/usr/bin/env bash
# Resuming a training restores the model and the optimizer, not what the loss has learnt.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, accelerate 1.15.0, datasets 5.2.0,
#   Python 3.11.
#
# A good engineer would guess:
#   A checkpoint holds what is trained. SoftmaxLoss has a classifier that the optimizer trains with the model, so
#   a resumed run goes on with it.
#
# What happens:
#   The checkpoint holds the SentenceTransformer and the optimizer, whose moments cover the classifier, but not
#   the classifier. The resumed run trains a random classifier with the moments of the old one. Any loss with
#   parameters of its own is concerned.
#
# Output seen (beside what the libraries log):
#   classifier at the end of the first run   [0.0601, -0.0493, -0.0422]
#   classifier of the resumed run, at first  [0.0331, -0.0343, 0.0396]
#   files with its weights in the checkpoint 0
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
from pathlib import Path
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import SoftmaxLoss
from transformers import TrainerCallback

data = Dataset.from_dict({"a": ["red fox", "blue cat"] * 8, "b": ["fox ran", "cat sat"] * 8, "label": [0, 1] * 8})


def run(seed, steps, resume=None):
    """Train for some steps; the classifier when training begins and when it ends."""
    model = tiny_bert()
    torch.manual_seed(seed)
    loss = SoftmaxLoss(model, embedding_dimension=16, num_labels=2)
    first = []

    class AtTheStart(TrainerCallback):
        def on_train_begin(self, *_, **__):
            first.append(loss.classifier.weight.detach().clone())

    arguments = dict(max_steps=steps, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=4)
    quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True)
    arguments = SentenceTransformerTrainingArguments(root + "/run", **arguments, **quiet)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss, callbacks=[AtTheStart()])
    trainer.train(resume_from_checkpoint=resume)
    return first[0], loss.classifier.weight.detach().clone()


_, trained = run(seed=1, steps=2)
resumed, _ = run(seed=2, steps=4, resume=root + "/run/checkpoint-2")
print("classifier at the end of the first run  ", [round(x, 4) for x in trained[0, :3].tolist()])
print("classifier of the resumed run, at first ", [round(x, 4) for x in resumed[0, :3].tolist()])
files = Path(root, "run", "checkpoint-2").rglob("*.safetensors")
held = [file.name for file in files if any("classifier" in name for name in load_file(file))]
print("files with its weights in the checkpoint", len(held))
assert not held and torch.equal(resumed, run(seed=2, steps=2)[0]), "the behaviour changed: the loss is restored"
assert not torch.equal(resumed, trained)
PY
