#!/usr/bin/env bash
# include_prompt=False leaves the first word of the text out of pooling, too.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, Python 3.11.
#
# A good engineer would guess:
#   With include_prompt=False the mean is over the tokens of the text alone; the prompt's tokens are found by
#   length or offset, whatever the tokenizer.
#
# What happens:
#   The prompt's length is that of the prompt tokenised alone. A byte-level BPE (ModernBERT, RoBERTa, Qwen3,
#   Llama) gives the space at the end of "query: " a token there, and in the text makes it a part of the next
#   word. The count is one too many, and every text loses its first word: short queries lose most of their
#   meaning.
#
# Output seen (beside what the libraries log):
#   prompt 'query: ': ['query', ':', 'Ġ']
#   text            : ['query', ':', 'Ġred', 'Ġfox']
#   prompt_length 3, so pooled: ['Ġfox']
#   the embedding is that of the token 'Ġfox' alone: True
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

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False)
bpe.train_from_iterator(["query: the red fox ran"] * 9, trainer)
PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", model_max_length=32).save_pretrained(root)
torch.manual_seed(0)
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
BertModel(BertConfig(vocab_size=300, **sizes)).save_pretrained(root)
model = SentenceTransformer(modules=[Transformer(root), Pooling(16, include_prompt=False)], device="cpu").eval()

prompt, text = "query: ", "red fox"
features = model.preprocess([text], prompt=prompt)
tokens = model.tokenizer.convert_ids_to_tokens(features["input_ids"][0])
length = int(features["prompt_length"])
print(f"prompt {prompt!r}:", model.tokenizer.tokenize(prompt))
print("text            :", tokens)
print(f"prompt_length {length}, so pooled:", tokens[length:])
with torch.no_grad():
    out = model(features)
alone = torch.allclose(out["sentence_embedding"][0], out["token_embeddings"][0, -1])
print("the embedding is that of the token 'Ġfox' alone:", alone)
assert tokens[length:] == ["Ġfox"] and alone, "the behaviour changed: the whole text is pooled"
PY
