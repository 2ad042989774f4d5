#!/usr/bin/env bash
# peft 0.21.0, torch 2.13.0: LoRA on torch's own TransformerEncoderLayer works in train() and is
# ignored in eval().
#
# Good guess: adapters on linear1 and linear2 are applied in training and in evaluation alike.
# Seen: in train() the output is that of the merged model. In eval() the layer takes its fused path,
#     which reads the Linears' weights without calling them: the output is that of the base model
#     to the bit, as if nothing had been learned. merge_and_unload() before evaluation helps.
# Output: largest difference from the merged model: train 0.0000, eval 3.63;
#     eval equals the base model to the bit: True
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet torch==2.13.0 \
    peft==0.21.0 transformers==5.23.0 numpy==2.2.6
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
model = nn.Sequential(layer)
base = copy.deepcopy(model).eval()
adapted = get_peft_model(model, LoraConfig(target_modules=["linear1", "linear2"], r=4))
for name, parameter in adapted.named_parameters():
    if "lora" in name:
        nn.init.normal_(parameter, std=0.3)

x = torch.randn(2, 5, 16)
with torch.no_grad():
    merged = copy.deepcopy(adapted).merge_and_unload().eval()(x)
    training = adapted.train()(x)
    evaluation = adapted.eval()(x)
    plain = base(x)

error_train = (training - merged).abs().max().item()
error_eval = (evaluation - merged).abs().max().item()
print(f"largest difference from the merged model: train {error_train:.6f}, eval {error_eval:.4f}")
print(f"eval equals the base model to the bit: {torch.equal(evaluation, plain)}")

as_described = error_train < 1e-4 and error_eval > 0.1 and torch.equal(evaluation, plain)

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
