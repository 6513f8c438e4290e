#!/usr/bin/env bash
# mteb.evaluate gives a trained model the score that it had before training.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, datasets 5.2.0, mteb 2.26.24,
#   Python 3.11.
#
# A good engineer would guess:
#   The cache of mteb.evaluate (on by default) is for published models, by name and revision. A model in memory
#   that has neither is evaluated each time.
#
# What happens:
#   Every model without a name on the hub is filed as no_model_name/available, revision no_revision_available. The
#   second evaluation on the machine, of the model after training or of any other local model, reads the first
#   one's score from the cache, without a word.
#
# Output seen (beside what the libraries log):
#   before training       0.4940
#   after the weights were replaced, default cache 0.4940
#   after the weights were replaced, cache=None    0.1793
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
        datasets==5.2.0 mteb==2.26.24
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

import random

import mteb
import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks.clustering import AbsTaskClustering
from mteb.abstasks.task_metadata import TaskMetadata


class Topics(AbsTaskClustering):
    """A clustering task over 200 local documents of three topics."""

    metadata = TaskMetadata(
        name="Topics", description="Local.", type="Clustering", dataset={"path": "local/topics", "revision": "1"},
        reference=None, category="t2c", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"],
        main_score="v_measure", date=None, domains=None, task_subtypes=None, license=None, dialect=None,
        annotations_creators=None, sample_creation=None, bibtex_citation=None,
    )
    max_fraction_of_documents_to_embed, max_document_to_embed = 0.5, None
    max_documents_per_cluster, n_clusters = 50, 3

    def load_data(self, **_):
        draw = random.Random(0)
        labels = [i % 3 for i in range(200)]
        texts = [" ".join(draw.choices(WORDS[3 * label : 3 * label + 6], k=4)) for label in labels]
        self.dataset = DatasetDict(test=Dataset.from_dict({"sentences": texts, "labels": labels}))
        self.data_loaded = True


def score(model, task, **settings):
    settings = {"cache": None, "co2_tracker": False, "show_progress_bar": False, **settings}
    return mteb.evaluate(model, task, **settings).task_results[0].scores["test"][0]["main_score"]


model = tiny_bert()
default = {"cache": mteb.ResultCache()}  # what evaluate uses where nothing is passed; in a folder of this run
before = score(model, Topics(), **default)
torch.manual_seed(7)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter)
cached = score(model, Topics(), **default)
fresh = score(model, Topics())
print(f"before training       {before:.4f}")
print(f"after the weights were replaced, default cache {cached:.4f}")
print(f"after the weights were replaced, cache=None    {fresh:.4f}")
assert round(before, 4) != round(fresh, 4), "the two models must differ for this to show anything"
assert round(cached, 4) == round(before, 4), "the behaviour changed: the second model has a score of its own"
PY
