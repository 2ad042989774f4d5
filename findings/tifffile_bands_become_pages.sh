#!/usr/bin/env bash
# tifffile 2026.3.3: an image of five bands is written as a book of one-column pictures.
#
# Good guess: `imwrite(file, array)` of shape (height, width, bands) gives one picture of that
#     height and width, whatever the number of bands; with three and four it does.
# Seen: with five bands every row becomes a page of its own, `width` rows high and `bands` columns
#     wide. tifffile itself reads the array back whole, so a round trip shows nothing; another
#     reader (Pillow 13.0.0) gets a 5 x 48 picture, the first of 32. photometric="minisblack" with
#     planarconfig="contig" writes one page.
# Output: 3 bands: 1 page of (48, 32)   5 bands: 32 pages of (5, 48)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet tifffile==2026.3.3 pillow==13.0.0 numpy==2.2.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import io
import sys

import numpy as np
import tifffile
from PIL import Image


def pages_and_size(bands, **options):
    file = io.BytesIO()
    pixels = np.zeros((32, 48, bands), dtype=np.uint8)
    tifffile.imwrite(file, pixels, **options)

    file.seek(0)
    assert tifffile.imread(file).shape == pixels.shape
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        height, width = tiff.pages[0].shape[:2]
        return len(tiff.pages), (width, height)


three = pages_and_size(3)
five = pages_and_size(5)
asked = pages_and_size(5, photometric="minisblack", planarconfig="contig")
print(f"3 bands: {three}   5 bands: {five}   5 bands, asked for one page: {asked}")

file = io.BytesIO()
tifffile.imwrite(file, np.zeros((32, 48, 5), dtype=np.uint8))
file.seek(0)
seen_by_pillow = Image.open(file)
print(f"Pillow: {seen_by_pillow.size}, {seen_by_pillow.n_frames} frames")

as_described = three == (1, (48, 32)) and five == (32, (5, 48)) and asked == (1, (48, 32))
as_described = as_described and (seen_by_pillow.size, seen_by_pillow.n_frames) == ((5, 48), 32)

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
