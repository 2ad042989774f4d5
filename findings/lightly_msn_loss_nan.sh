#!/usr/bin/env bash
# lightly 1.6.0 (torch 2.14.1, torchvision 0.29.1): MSNLoss turns nan at low temperatures.
#
# Good guess: the loss of unit vectors against 1,024 prototypes is finite in float32 at every
#     positive temperature and sharpening; log_softmax of the same similarities is.
# Seen: with features near a prototype, as after training, loss and gradient are nan when
#     temperature times sharpening falls below 1/88 (similarity 1 over it is beyond what float32's
#     exp holds): at the usual temperature 0.1 already with sharpening 0.1. Without Sinkhorn
#     iterations that is mended, but not temperature 0.01, where a probability underflows.
# Output (temperature, sharpening): finite at (0.1, 0.25), (0.1, 0.15), (0.05, 0.25);
#     nan at (0.1, 0.1), (0.03, 0.25), (0.01, 1.0); without Sinkhorn only the last is nan
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet torch==2.14.1 \
    torchvision==0.29.1 lightly==1.6.0 numpy==2.2.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from lightly.loss import MSNLoss

CASES = [(0.1, 0.25), (0.1, 0.15), (0.05, 0.25), (0.1, 0.1), (0.03, 0.25), (0.01, 1.0)]

generator = torch.Generator().manual_seed(0)
prototypes = torch.randn(1024, 64, generator=generator)
anchors = prototypes[:8] + 0.1 * torch.randn(8, 64, generator=generator)
targets = prototypes[:4] + 0.1 * torch.randn(4, 64, generator=generator)


def is_finite(temperature, sharpening, sinkhorn_iterations):
    leaf = anchors.clone().requires_grad_()
    criterion = MSNLoss(temperature=temperature, sinkhorn_iterations=sinkhorn_iterations)
    loss = criterion(leaf, targets, prototypes, target_sharpen_temperature=sharpening)
    loss.backward()
    return bool(loss.isfinite() and leaf.grad.isfinite().all())


with_sinkhorn = []
without_sinkhorn = []
by_log_softmax = []
for temperature, sharpening in CASES:
    with_sinkhorn.append(is_finite(temperature, sharpening, sinkhorn_iterations=3))
    without_sinkhorn.append(is_finite(temperature, sharpening, sinkhorn_iterations=0))
    similarities = F.normalize(anchors, dim=1) @ F.normalize(prototypes, dim=1).T
    scaled = similarities / (temperature * sharpening)
    by_log_softmax.append(bool(F.log_softmax(scaled, dim=1).isfinite().all()))
    print(
        f"temperature {temperature}, sharpening {sharpening}: finite {with_sinkhorn[-1]}, "
        f"without Sinkhorn {without_sinkhorn[-1]}, log_softmax {by_log_softmax[-1]}"
    )

as_described = with_sinkhorn == [True, True, True, False, False, False]
as_described = as_described and without_sinkhorn == [True, True, True, True, True, False]
as_described = as_described and all(by_log_softmax)

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
