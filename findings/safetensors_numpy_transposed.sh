#!/usr/bin/env bash
# safetensors 0.8.0: a transposed NumPy array is saved with its numbers in another order.
#
# Good guess: `safetensors.numpy.save_file({"weight": kernel.T}, path)`, as one writes to turn a
#     kernel (inputs, outputs) into a Linear's weight (outputs, inputs), loads again as it was, or
#     is refused; the same library's torch functions do refuse what is not contiguous.
# Seen: the shape is that of `kernel.T`, the numbers are those of `kernel` in memory. No error, no
#     warning. A slice with a step and a reversed array are wrong, too. Version 0.7.0 saved all
#     three rightly; transformers 5.23.0 asks for 0.8.0. np.ascontiguousarray before saving helps.
# Output: saved [[0, 3], [1, 4], [2, 5]]  loaded [[0, 1], [2, 3], [4, 5]]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.2.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

path = sys.argv[1] + "/weights.safetensors"


def loaded_again(array):
    save_file({"weight": array}, path)
    return load_file(path)["weight"]


kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
transposed = loaded_again(kernel.T)
print(f"saved {kernel.T.astype(int).tolist()}  loaded {transposed.astype(int).tolist()}")

cases = {"transposed": kernel.T, "every second": kernel[:, ::2], "reversed": kernel[::-1]}
kept = {name: bool(np.array_equal(loaded_again(array), array)) for name, array in cases.items()}
print(f"loaded as saved: {kept}")

copied = np.array_equal(loaded_again(np.ascontiguousarray(kernel.T)), kernel.T)
print(f"loaded as saved, after np.ascontiguousarray: {copied}")

as_described = transposed.tolist() == [[0, 1], [2, 3], [4, 5]]
as_described = as_described and not any(kept.values()) and copied

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
