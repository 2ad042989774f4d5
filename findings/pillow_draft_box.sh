#!/usr/bin/env bash
# Pillow 13.0.0: a JPEG opened with `draft` is not quite the picture.
#
# Good guess: `image.draft("RGB", size)` decodes the picture at a fraction of its size, so
#     resizing the result gives nearly the picture that a full decode gives.
# Seen: the decoded size is rounded up. Of 637 x 422 at a quarter, 160 x 106 pixels come, of which
#     the picture fills 159.25 x 105.5. Only the returned box says so; a resize without it
#     stretches the picture.
# Output: box (0, 0, 159.25, 105.5) in (160, 106); grey levels from a full decode, mean:
#     without the box 7.54, with it 0.99
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.2.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import io
import sys

import numpy as np
from PIL import Image

rows, columns = np.mgrid[0:422, 0:637]
pattern = 127 + 60 * np.sin(rows / 9) + 60 * np.sin(columns / 9)
file = io.BytesIO()
Image.fromarray(pattern.astype(np.uint8)).convert("RGB").save(file, "JPEG", quality=95)

image = Image.open(file)
mode, box = image.draft("RGB", (96, 96))
print(f"box {box} in {image.size}")

reference = np.asarray(Image.open(file).resize((96, 96), Image.BILINEAR), dtype=float)
without_box = np.asarray(image.resize((96, 96), Image.BILINEAR), dtype=float)
with_box = np.asarray(image.resize((96, 96), Image.BILINEAR, box=box), dtype=float)
error_without = np.abs(without_box - reference).mean()
error_with = np.abs(with_box - reference).mean()
print(
    f"grey levels from a full decode, mean: without the box {error_without:.2f}, "
    f"with it {error_with:.2f}"
)

as_described = box == (0, 0, 159.25, 105.5) and image.size == (160, 106)
as_described = as_described and error_without > 3 * error_with

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
