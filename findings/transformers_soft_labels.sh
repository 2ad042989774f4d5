#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: soft labels (Mixup, CutMix) turn an image classifier into a
# multi-label one, for good.
#
# Good guess: labels of shape (images, classes) whose rows sum to one give the cross-entropy, as
#     torch's F.cross_entropy takes them.
# Seen: the loss is the binary cross-entropy of each class by itself. The library's guess is written
#     into the config ("multi_label_classification") and saved with the model, after which the
#     pipeline applies a sigmoid: scores do not sum to one. Later batches with integer labels raise
#     a ValueError about shapes.
# Output: loss 0.6953, cross-entropy 1.1092, binary cross-entropy 0.6953; scores sum to 1.509;
#     integer labels afterwards: ValueError
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet torch==2.13.0 \
    transformers==5.23.0 pillow==13.0.0 numpy==2.2.6
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    ViTImageProcessorPil,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    pipeline,
)

torch.manual_seed(0)
config = ViTMSNConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=32,
    patch_size=8,
    num_labels=3,
)
model = ViTMSNForImageClassification(config)
images = torch.randn(2, 3, 32, 32)
soft = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.5, 0.5]])

output = model(images, labels=soft)
loss = output.loss.item()
cross_entropy = F.cross_entropy(output.logits, soft).item()
binary = F.binary_cross_entropy_with_logits(output.logits, soft).item()
print(f"loss {loss:.4f}, cross-entropy {cross_entropy:.4f}, binary cross-entropy {binary:.4f}")

model.save_pretrained(sys.argv[1] + "/model")
saved = ViTMSNForImageClassification.from_pretrained(sys.argv[1] + "/model")
processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
classify = pipeline("image-classification", model=saved, image_processor=processor)
scores = classify(Image.new("RGB", (32, 32), (200, 10, 90)))
total = sum(score["score"] for score in scores)
print(f"{saved.config.problem_type}: the pipeline's scores sum to {total:.3f}")

try:
    model(images, labels=torch.tensor([0, 1]))
    integer_labels = "taken"
except ValueError:
    integer_labels = "ValueError"
print(f"integer labels afterwards: {integer_labels}")

as_described = abs(loss - binary) < 1e-5 and abs(loss - cross_entropy) > 0.1
as_described = as_described and abs(total - 1) > 0.1 and integer_labels == "ValueError"

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
