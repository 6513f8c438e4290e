#!/usr/bin/env bash
# Adam over bfloat16 weights: its second moment rises and never falls.
#
# Versions: torch 2.13.0, numpy 2.4.6, Python 3.11.
#
# A good engineer would guess:
#   bfloat16 makes Adam's running averages coarse, by 0.4 % or so. An unusual gradient is forgotten as in float32,
#   after some thousands of steps (beta2 = 0.999).
#
# What happens:
#   The state takes the format of the weight. One step multiplies the second moment by 0.999, which is nearer to 1
#   than to the next bfloat16, so the product is rounded back: the moment can grow, never shrink. One large
#   gradient (the first steps of a fine-tuning, a loss spike) lowers that weight's step size for the rest of the
#   run.
#
# Output seen (beside what the libraries log):
#   one gradient of 100, then 20000 of 0.01, lr 1e-3
#   torch.float32 : second moment 1.00e-04, last step moved the weight by 1.00e-03
#   torch.bfloat16: second moment 1.00e+01, last step moved the weight by 3.25e-06
#
# By hand, no CI: installs the packages into a temporary environment, or runs in PYTHON where that is set.
# Exits with 1 when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/environment"
    PYTHON=$folder/environment/bin/python
    "$PYTHON" -m pip install --quiet torch==2.13.0 numpy==2.4.6
fi
export HF_HUB_OFFLINE=1 HF_HOME="$folder" MTEB_CACHE="$folder/mteb" TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore TQDM_DISABLE=1
"$PYTHON" - "$folder" <<'PY'
import torch

steps = 20_000
moment, last = {}, {}
print(f"one gradient of 100, then {steps} of 0.01, lr 1e-3")
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    for step in range(steps + 1):
        weight.grad = torch.full_like(weight, 0.01 if step else 100.0)
        if step == steps:
            weight.data.zero_()  # near zero, where bfloat16 has room for the smallest step
        optimizer.step()
    moment[dtype] = optimizer.state[weight]["exp_avg_sq"].item()
    last[dtype] = abs(weight.item())
    print(f"{str(dtype):<14}: second moment {moment[dtype]:.2e}, last step moved the weight by {last[dtype]:.2e}")
assert moment[torch.float32] < 2e-4, "the behaviour changed: float32 does not forget either"
assert moment[torch.bfloat16] == 10, "the behaviour changed: the second moment falls in bfloat16"
PY
