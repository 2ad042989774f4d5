#!/usr/bin/env bash
# onnxruntime 1.32.0, onnx 1.23.2: after quantize_dynamic, an image's result depends on the images
# it shares a batch with.
#
# Good guess: the weights are rounded to 8 bits, so results move a little, but each image's
#     result is still its own: alone or in a batch, the same numbers.
# Seen: the activations are rounded, too, with one scale for the whole batch. One neighbour
#     with activations 20 times as large, and an image's output moves by 8 %, although neither it
#     nor the weights changed. The float model gives the same numbers in both cases.
# Output: moved by its neighbour: float 0.0000, quantised 0.0821
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.2.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import logging
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

logging.disable(logging.WARNING)
generator = np.random.default_rng(0)
weight = generator.standard_normal((64, 10)).astype(np.float32)

graph = helper.make_graph(
    [helper.make_node("MatMul", ["features", "weight"], ["logits"])],
    "linear_probe",
    [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 64])],
    [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
    [numpy_helper.from_array(weight, "weight")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
plain_path = sys.argv[1] + "/plain.onnx"
quantised_path = sys.argv[1] + "/quantised.onnx"
onnx.save(model, plain_path)
quantize_dynamic(plain_path, quantised_path)

image = generator.standard_normal((1, 64)).astype(np.float32)
neighbour = 20 * generator.standard_normal((1, 64)).astype(np.float32)
moved = {}
for name, path in (("float", plain_path), ("quantised", quantised_path)):
    session = onnxruntime.InferenceSession(path)
    alone = session.run(None, {"features": image})[0][0]
    together = session.run(None, {"features": np.concatenate([image, neighbour])})[0][0]
    moved[name] = float(np.linalg.norm(together - alone) / np.linalg.norm(alone))
print(f"moved by its neighbour: float {moved['float']:.4f}, quantised {moved['quantised']:.4f}")

as_described = moved["float"] < 1e-5 and moved["quantised"] > 0.05

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
