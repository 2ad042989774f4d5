#!/usr/bin/env bash
# torchvision 0.29.1 (torch 2.14.1) against timm 1.0.31: positions resampled for another image size
# belong to other places.
#
# Good guess: a ViT's learned positions, resampled from 14 x 14 patches to 6 x 6, stand for the
#     centres of the new patches: the first for the point at 1/12 of the picture's width.
# Seen: torchvision's interpolate_embeddings lays the corner patches' centres upon each other
#     (align_corners). With embeddings that hold their own coordinate, its first patch of 96 pixels
#     stands at 8.0 pixels of 224 where 18.7 is right, and the whole grid is stretched; timm is
#     within a pixel. The picture's patches themselves are cut without that stretch.
# Output: first patch, in pixels of 224: right 18.7, timm 19.5, torchvision 8.0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet torch==2.14.1 \
    torchvision==0.29.1 timm==1.0.31 numpy==2.2.6
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import torch
from timm.layers import resample_abs_pos_embed
from torchvision.models.vision_transformer import interpolate_embeddings

PIXELS = 224


def coordinates(patches):
    """The centres of a square grid of patches, in pixels, after a class token: 1, 1 + n, 2."""
    centres = (torch.arange(patches) + 0.5) * PIXELS / patches
    down, right = torch.meshgrid(centres, centres, indexing="ij")
    grid = torch.stack([right, down], dim=-1).reshape(1, patches**2, 2)
    return torch.cat([torch.zeros(1, 1, 2), grid], dim=1)


trained = coordinates(14)
right_places = coordinates(6)
by_timm = resample_abs_pos_embed(trained.clone(), [6, 6])
state = {"encoder.pos_embedding": trained.clone()}
by_torchvision = interpolate_embeddings(96, 16, state)["encoder.pos_embedding"]

first = {"right": right_places, "timm": by_timm, "torchvision": by_torchvision}
for name, positions in first.items():
    error = (positions - right_places)[:, 1:].abs().max().item()
    print(f"{name}: first patch at {positions[0, 1, 0].item():.1f}, largest error {error:.1f}")

timm_error = (by_timm - right_places)[:, 1:].abs().max().item()
torchvision_error = (by_torchvision - right_places)[:, 1:].abs().max().item()
as_described = timm_error < 1.5 and 10 < torchvision_error < 11.5

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
