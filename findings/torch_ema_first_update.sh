#!/usr/bin/env bash
# torch 2.13.0: the first update of an exponential moving average is no average.
#
# Good guess: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.996)) starts as a copy of the
#     model, and each `update_parameters` moves it by 0.4 % of the way to the model.
# Seen: the first call copies the model over the average; only later ones average. Weights loaded
#     into the average before (a teacher from a checkpoint) are lost without a word, unless the
#     buffer n_averaged, which counts the calls, is restored with them.
# Output: moved by 1.0000 of the way at the first update, 0.0040 at the second
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

student = nn.Linear(4, 4)
teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.996))
trained = {name: torch.full_like(value, 7.0) for name, value in student.state_dict().items()}
teacher.module.load_state_dict(trained)

shares = []
for _ in range(2):
    with torch.no_grad():
        student.weight.add_(1.0)
    before = teacher.module.weight.detach().clone()
    teacher.update_parameters(student)
    way = (student.weight - before).norm()
    shares.append(((teacher.module.weight - before).norm() / way).item())
print(f"moved by {shares[0]:.4f} of the way at the first update, {shares[1]:.4f} at the second")

as_described = abs(shares[0] - 1) < 1e-4 and abs(shares[1] - 0.004) < 1e-4

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
