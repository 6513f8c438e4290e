#!/usr/bin/env bash
# mteb: one unchanged model, one task object, another score at each evaluation.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, datasets 5.2.0, mteb 2.26.24,
#   Python 3.11.
#
# A good engineer would guess:
#   mteb is seeded, so that a score is a fact about a model. The same model on the same task object scores the
#   same.
#
# What happens:
#   A clustering task draws its documents from a generator that is seeded once, when the task object is made. The
#   second evaluation of the process draws others. A benchmark from mteb.get_benchmark shares its task objects, so
#   the order in which models are compared decides their scores; a new task object gives the first score again.
#   (Tasks of retrieval or STS do not draw.)
#
# Output seen (beside what the libraries log):
#   one task object, three evaluations:      0.494 0.388 0.5042
#   three task objects, one evaluation each: 0.494 0.494 0.494
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
task = Topics()
same = [round(score(model, task), 4) for _ in range(3)]
new = [round(score(model, Topics()), 4) for _ in range(3)]
print("one task object, three evaluations:     ", *same)
print("three task objects, one evaluation each:", *new)
assert len(set(new)) == 1 and same[0] == new[0], "the behaviour changed: a new task object has another score"
assert len(set(same)) > 1, "the behaviour changed: a task object gives one score"
PY
