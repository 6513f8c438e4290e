#!/usr/bin/env bash
# NO_DUPLICATES_HASHED lets duplicates into a batch that NO_DUPLICATES keeps out, where a transform makes the column.
#
# Versions: sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0, accelerate 1.15.0, datasets 5.2.0,
#   xxhash 4.1.0, Python 3.11.
#
# A good engineer would guess:
#   The hashed batch sampler is the same sampler, made faster: both keep two rows with an equal text out of one batch,
#   whether the text is stored or made when a row is read (Dataset.with_transform).
#
# What happens:
#   The plain sampler reads rows, and so compares what the transform makes. The hashed one hashes the columns that are
#   stored. 40 questions share 4 answers, looked up by a transform: the plain sampler never has one answer twice in a
#   batch of 4, the hashed one has in most batches, without a warning. For MultipleNegativesRankingLoss each of these
#   is a false negative. With the answers stored by Dataset.map both agree.
#
# Output seen (beside what the libraries log):
#   answers by a transform, plain : 0 of 10 batches hold an answer twice
#   answers by a transform, hashed: 9 of 10 batches hold an answer twice
#   answers stored        , plain : 0 of 10 batches hold an answer twice
#   answers stored        , hashed: 0 of 10 batches hold an answer twice
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
        accelerate==1.15.0 datasets==5.2.0 xxhash==4.1.0
fi
export HF_HUB_OFFLINE=1 HF_HOME="$folder" MTEB_CACHE="$folder/mteb" TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore TQDM_DISABLE=1
"$PYTHON" - <<'PY'
import torch
from datasets import Dataset, disable_progress_bars
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

disable_progress_bars()
answers = ["Reset it in the app.", "Call the branch.", "Two working days.", "It is free."]


def answer(rows: dict) -> dict:
    return {**rows, "answer": [answers[int(question.split()[-1]) % 4] for question in rows["question"]]}


questions = Dataset.from_dict({"question": [f"Question {number}" for number in range(40)]})
datasets = {"by a transform": questions.with_transform(answer), "stored": questions.map(answer, batched=True)}
double = {}
for name, dataset in datasets.items():
    for kind in ("plain", "hashed"):
        sampler = NoDuplicatesBatchSampler(
            dataset, 4, drop_last=True, precompute_hashes=kind == "hashed", generator=torch.Generator(), seed=0
        )
        batches = [[dataset[row]["answer"] for row in batch] for batch in sampler]
        double[name, kind] = sum(len(set(batch)) < len(batch) for batch in batches)
        print(f"answers {name:<14}, {kind:<6}: {double[name, kind]} of {len(batches)} batches hold an answer twice")
assert double["by a transform", "hashed"] > 0, "the behaviour changed: the hashed sampler reads transforms"
assert sum(double.values()) == double["by a transform", "hashed"]
PY
