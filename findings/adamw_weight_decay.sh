#!/usr/bin/env bash
# AdamW's weight decay in float32: none at all, or twice as much as asked.
#
# Versions: torch 2.13.0, numpy 2.4.6, Python 3.11.
#
# A good engineer would guess:
#   float32 is precise enough for weight decay. A weight that receives no gradient shrinks by the factor 1 - lr *
#   weight_decay at each step, at any learning rate that people fine-tune with.
#
# What happens:
#   The factor is rounded to a float32 just below 1, whose neighbours lie 6e-8 apart, and so is each product.
#   Where lr * weight_decay is below 3e-8 (learning rate 2e-6 with decay 0.01, or 2e-5 with 0.001) not one bit of
#   any weight ever changes; at 5e-8 decay is 1.7 times as strong as asked. The tail of every schedule that falls
#   to zero is in this zone. All implementations (loop, foreach, fused) agree.
#
# Output seen (beside what the libraries log):
#   lr 2e-05 decay 0.01  : asked 2.00e-04 in 1000 steps, got 1.90e-04, weights that moved 100%
#   lr 5e-06 decay 0.01  : asked 5.00e-05 in 1000 steps, got 8.63e-05, weights that moved 100%
#   lr 2e-06 decay 0.01  : asked 2.00e-05 in 1000 steps, got 0.00e+00, weights that moved 0%
#   lr 2e-05 decay 0.001 : asked 2.00e-05 in 1000 steps, got 0.00e+00, weights that moved 0%
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

got = {}
for lr, decay in [(2e-5, 0.01), (5e-6, 0.01), (2e-6, 0.01), (2e-5, 0.001)]:
    for settings in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(10_000))
        start = weight.detach().clone()
        optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=decay, **settings)
        for _ in range(1000):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        moved = (weight != start).double().mean().item()
        shrunk = 1 - (weight.double().abs().sum() / start.double().abs().sum()).item()
        got[lr, decay, *settings] = shrunk, moved
    asked = 1 - (1 - lr * decay) ** 1000
    print(f"lr {lr} decay {decay:<6}: asked {asked:.2e} in 1000 steps, got {shrunk:.2e}, weights that moved {moved:.0%}")
for (lr, decay, *_), (shrunk, moved) in got.items():
    if lr * decay < 3e-8:
        assert shrunk == moved == 0, "the behaviour changed: weights decay"
    if lr * decay == 5e-8:
        assert shrunk > 1.5 * 5e-5, "the behaviour changed: decay is what was asked"
PY
