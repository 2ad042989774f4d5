#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Muon rounds the gradient to bfloat16, whatever the parameters are.
#
# Good guess: parameters in float64 (or float32) are updated in that type. The step does not depend
#     on the gradient's scale, since the gradient is divided by its norm first; a change in its
#     seventh digit changes the update's seventh digit.
# Seen: the orthogonalisation runs in bfloat16 for all of them: a gradient times 1.001 gives an
#     update that is 1.3 % different, and noise of one millionth moves it by 0.8 %. Two runs that
#     differ by the order of a sum (one process or two, one thread or four) part at the first step.
# Output: float32: scale 0.0132, noise 0.0075   float64: scale 0.0133, noise 0.0077
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import torch
from torch import nn


def update(gradient, dtype):
    weight = nn.Parameter(torch.zeros(gradient.shape, dtype=dtype))
    weight.grad = gradient.to(dtype)
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0).step()
    return weight.detach().double()


generator = torch.Generator().manual_seed(0)
gradient = torch.randn(384, 384, dtype=torch.float64, generator=generator)
noise = 1e-6 * torch.randn(384, 384, dtype=torch.float64, generator=generator)

as_described = True
for dtype in (torch.float32, torch.float64):
    reference = update(gradient, dtype)
    scaled = update(gradient * 1.001, dtype)
    noisy = update(gradient * (1 + noise), dtype)
    by_scale = ((scaled - reference).norm() / reference.norm()).item()
    by_noise = ((noisy - reference).norm() / reference.norm()).item()
    print(f"{dtype}: moved by scale {by_scale:.4f}, by noise {by_noise:.4f}")
    as_described = as_described and by_scale > 1e-3 and by_noise > 1e-3

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
