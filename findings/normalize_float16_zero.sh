#!/usr/bin/env bash
# F.normalize of a zero row: zeros in float32 and bfloat16, NaN in float16.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, Python 3.11.
#
# A good engineer would guess:
#   F.normalize divides by max(norm, eps) with eps=1e-12, so that a zero vector stays zero, in every format. Of
#   the two half formats float16 is the more precise, the safer one for embeddings.
#
# What happens:
#   1e-12 is 0 in float16, and 0 / 0 is NaN. encode(normalize_embeddings=True) with a float16 StaticEmbedding
#   gives a NaN row for a text without a known token (the mean of none is an exact zero); one such row makes a
#   mean, a k-means or a similarity matrix NaN. bfloat16 has the range and gives zeros.
#
# Output seen (beside what the libraries log):
#   torch.float32  normalize(0) 0.0   embedding of an unknown text 0.0
#   torch.bfloat16 normalize(0) 0.0   embedding of an unknown text 0.0
#   torch.float16  normalize(0) nan   embedding of an unknown text nan
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
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import BPE

values = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    zero = torch.nn.functional.normalize(torch.zeros(1, 4, dtype=dtype))[0, 0].item()
    letters = Tokenizer(BPE({"r": 0, "e": 1, "d": 2}, []))  # drops what it does not know
    model = SentenceTransformer(modules=[StaticEmbedding(letters, embedding_dim=4)], device="cpu").to(dtype)
    row = model.encode(["日本"], normalize_embeddings=True, convert_to_tensor=True)[0, 0].item()
    values.append((zero, row))
    print(f"{str(dtype):<14} normalize(0) {zero}   embedding of an unknown text {row}")
assert values[:2] == [(0.0, 0.0)] * 2 and all(value != value for value in values[2]), "the behaviour changed"
PY
