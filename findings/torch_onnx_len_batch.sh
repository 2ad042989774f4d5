#!/usr/bin/env bash
# torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2: a batch that was asked to be free is written fixed.
#
# Good guess: torch.onnx.export(dynamo=True) with a Dim on the batch writes a file that takes any
#     batch, or says that it cannot; torch.export.export with the same arguments says so.
# Seen: where the module asks for len(x) in place of x.shape[0], torch.export raises ("Constraints
#     violated"), while the ONNX export writes a file whose batch is that of the example, and
#     returns normally.
# Output: x.shape[0]: torch.export ok, file takes ['batch', 4, 8]
#         len(x): torch.export raises UserError, file takes [2, 4, 8]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 numpy==2.2.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import logging
import sys

import onnx
import torch
from torch import nn

logging.disable(logging.WARNING)


class ClassToken(nn.Module):
    """Puts a learned token before a batch of sequences."""

    def __init__(self, uses_len):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.uses_len = uses_len

    def forward(self, x):
        batch = len(x) if self.uses_len else x.shape[0]
        return torch.cat([self.token.expand(batch, -1, -1), x], dim=1)


example = (torch.zeros(2, 4, 8),)
free_batch = ({0: torch.export.Dim("batch")},)
answers = []
for uses_len in (False, True):
    model = ClassToken(uses_len).eval()
    try:
        torch.export.export(model, example, dynamic_shapes=free_batch)
        exported = "ok"
    except Exception as error:
        exported = "raises " + type(error).__name__

    path = f"{sys.argv[1]}/{uses_len}.onnx"
    torch.onnx.export(model, example, path, dynamo=True, dynamic_shapes=free_batch, verbose=False)
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    shape = [dim.dim_param or dim.dim_value for dim in dims]
    print(f"{'len(x)' if uses_len else 'x.shape[0]'}: torch.export {exported}, file takes {shape}")
    answers.append((exported, shape))

as_described = answers == [("ok", ["batch", 4, 8]), ("raises UserError", [2, 4, 8])]

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
