#!/usr/bin/env bash
# transformers 5.23.0: one transparent picture, two answers.
#
# Good guess: a picture reaches the model the same way whether it passes through `load_image` (what
#     the pipelines do with every image) or goes straight to the image processor with
#     do_convert_rgb=True: both make an RGB picture of it.
# Seen: the processor lays it on white; `load_image` drops the alpha channel. A black drawing on
#     transparent ground (a usual icon) is black on white in one, all black in the other.
# Output: processor alone: -1.0 to 1.0   after load_image: -1.0 to -1.0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 pillow==13.0.0 numpy==2.2.6
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import numpy as np
from PIL import Image
from transformers import ViTImageProcessorPil
from transformers.image_utils import load_image

pixels = np.zeros((40, 40, 4), dtype=np.uint8)
pixels[10:30, 10:30, 3] = 255
icon = Image.fromarray(pixels)

processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True)
alone = processor(icon, return_tensors="np")["pixel_values"]
loaded = processor(load_image(icon), return_tensors="np")["pixel_values"]
print(
    f"processor alone: {alone.min()} to {alone.max()}   "
    f"after load_image: {loaded.min()} to {loaded.max()}"
)

as_described = (alone.min(), alone.max()) == (-1, 1) and (loaded.min(), loaded.max()) == (-1, -1)

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
