#!/usr/bin/env bash
# datasets: the same text column from CSV and from JSON lines cannot be concatenated.
#
# Versions: datasets 5.2.0, pandas 3.1.1, pyarrow 26.0.1, Python 3.11.
#
# A good engineer would guess:
#   Text is text. load_dataset("csv") and load_dataset("json") give a column of strings each, and
#   concatenate_datasets joins the two tables.
#
# What happens:
#   With pandas 3 the CSV reader (and Dataset.from_pandas) gives large_string, JSON lines and Dataset.from_dict
#   give string, and concatenate_datasets refuses to align them, though every value of one is valid in the other.
#   The order does not matter. cast_column("text", Value("string")) on one of them helps.
#
# Output seen (beside what the libraries log):
#   csv    {'text': Value('large_string')}
#   json   {'text': Value('string')}
#   pandas {'text': Value('large_string')}
#   csv + json: ValueError, The features can't be aligned
#   json + csv: ValueError, The features can't be aligned
#   csv cast to string + json: 2 rows
#
# By hand, no CI: installs the packages into a temporary environment, or runs in PYTHON where that is set.
# Exits with 1 when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/environment"
    PYTHON=$folder/environment/bin/python
    "$PYTHON" -m pip install --quiet datasets==5.2.0 pandas==3.1.1 pyarrow==26.0.1
fi
export HF_HUB_OFFLINE=1 HF_HOME="$folder" MTEB_CACHE="$folder/mteb" TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore TQDM_DISABLE=1
"$PYTHON" - "$folder" <<'PY'
import sys

root = sys.argv[1]

import pandas as pd
from datasets import Dataset, Value, concatenate_datasets, disable_progress_bars, load_dataset

disable_progress_bars()
for name, content in (("a.csv", "text\nred fox\n"), ("a.jsonl", '{"text": "blue cat"}\n')):
    with open(f"{root}/{name}", "w") as file:
        file.write(content)
table = {
    "csv": load_dataset("csv", data_files=root + "/a.csv", split="train", cache_dir=root),
    "json": load_dataset("json", data_files=root + "/a.jsonl", split="train", cache_dir=root),
    "pandas": Dataset.from_pandas(pd.DataFrame({"text": ["green hill"]})),
}
for name, dataset in table.items():
    print(f"{name:<6} {dict(dataset.features)}")
refused = 0
for first, second in (("csv", "json"), ("json", "csv")):
    try:
        concatenate_datasets([table[first], table[second]])
    except ValueError as error:
        refused += 1
        print(f"{first} + {second}: ValueError, {str(error).split(' because')[0]}")
joined = concatenate_datasets([table["csv"].cast_column("text", Value("string")), table["json"]])
print("csv cast to string + json:", len(joined), "rows")
assert refused == 2, "the behaviour changed: they are concatenated"
PY
