#!/usr/bin/env bash
# Pillow 12.0.0: grey TIFFs of floating-point, signed or 32-bit numbers may open with other values.
#
# Good guess: a TIFF that opens without an error or a warning gives the numbers that were written.
# Seen (low-byte-first CPU): floating-point and signed numbers with high bytes first (MM files)
#     are right without compression, and are read with their bytes the other way round if they are
#     compressed; 1.0 becomes 4.6e-41. Numbers with the low bytes first (II) are right both ways.
#     Unsigned 32-bit numbers above 2**31 become negative, signed 8-bit ones below 0 positive,
#     compressed or not. Nothing is said.
# Output: float32 MM zlib 4.6006e-41, int16 MM zlib 256, uint32 II -294967296, int8 II 255 where
#     1.0, 1, 4000000000 and -1 were written
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet pillow==12.0.0 tifffile==2025.10.16 numpy==2.2.6 \
    imagecodecs==2025.8.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import numpy as np
import tifffile
from PIL import Image

CASES = [  # type, order of bytes, compression, written, read as that
    ("float32", "MM", None, 1.0, True),
    ("float32", "MM", "zlib", 1.0, False),
    ("float32", "II", "zlib", 1.0, True),
    ("int16", "MM", None, 1, True),
    ("int16", "MM", "zlib", 1, False),
    ("int16", "II", "zlib", 1, True),
    ("uint32", "II", None, 4_000_000_000, False),
    ("int8", "II", None, -1, False),
]

as_described = True
for kind, order, compression, written, is_right in CASES:
    path = f"{sys.argv[1]}/picture.tif"
    values = np.full((8, 12), written, kind)
    byteorder = ">" if order == "MM" else "<"
    tifffile.imwrite(path, values, byteorder=byteorder, compression=compression, metadata=None)
    assert (tifffile.imread(path) == values).all()

    with Image.open(path) as image:
        read = np.asarray(image)[0, 0].item()
    print(f"{kind} {order} {compression}: wrote {written}, Pillow reads {read:.5g} ({image.mode})")
    as_described = as_described and (read == written) == is_right

sys.exit(not as_described)
PYTHON
