#!/usr/bin/env bash
# Pillow 13.0.0: 16-bit grey is clipped at 255, the same pixels as 16-bit RGB are scaled.
#
# Good guess: one grey ramp of 16 bits, saved once as a grey and once as an RGB file, is the same
#     picture after `convert("RGB")`: 0 to 255.
# Seen: the RGB file is read with its low byte dropped (a scaled ramp); the grey file opens as
#     "I;16", and `convert` clips every value above 255 to white. No warning either way.
# Output: grey [0, 255, 255, 255, 255]  RGB [0, 64, 128, 192, 255]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 tifffile==2026.3.3 numpy==2.2.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import io
import sys

import numpy as np
import tifffile
from PIL import Image

ramp = np.array([[0, 16448, 32896, 49344, 65535]], dtype=np.uint16)


def read_as_rgb(pixels, photometric):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric=photometric)
    file.seek(0)
    return np.asarray(Image.open(file).convert("RGB"))[0, :, 0].tolist()


grey = read_as_rgb(ramp, "minisblack")
colour = read_as_rgb(np.stack([ramp, ramp, ramp], axis=-1), "rgb")
print(f"grey {grey}  RGB {colour}")

as_described = grey == [0, 255, 255, 255, 255] and colour == [0, 64, 128, 192, 255]

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
