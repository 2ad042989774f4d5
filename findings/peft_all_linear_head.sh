#!/usr/bin/env bash
# peft 0.21.0, transformers 5.23.0, torch 2.13.0: target_modules="all-linear" puts an adapter on an
# image classifier's new head, and saves the adapter without the head.
#
# Good guess: the output layer is left out of "all-linear", as the documentation says, or is trained
#     and saved whole; a saved adapter, loaded onto the same pretrained encoder, predicts the same.
# Seen: the head's random weights are frozen, a LoRA adapter is laid over them, and only the adapter
#     is saved. Loaded anew, the head is drawn again: other logits; peft says
#     nothing (transformers reports a new head, as it does for every first loading of an encoder).
#     Named targets with modules_to_save=["classifier"] help.
# Output: head frozen True, under an adapter True, saved False; logits moved by 0.63 (relative)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install --quiet torch==2.13.0 \
    peft==0.21.0 transformers==5.23.0 numpy==2.2.6
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import ViTMSNConfig, ViTMSNForImageClassification, ViTMSNModel

folder = sys.argv[1]
config = ViTMSNConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=32,
    patch_size=8,
)
torch.manual_seed(0)
ViTMSNModel(config).save_pretrained(folder + "/encoder")


def classifier(seed):
    torch.manual_seed(seed)
    return ViTMSNForImageClassification.from_pretrained(folder + "/encoder", num_labels=3)


tuned = get_peft_model(classifier(seed=1), LoraConfig(target_modules="all-linear", r=4)).eval()
for name, parameter in tuned.named_parameters():
    if parameter.requires_grad:
        nn.init.normal_(parameter, std=0.1)  # stands for training

head = tuned.base_model.model.classifier
frozen = not head.base_layer.weight.requires_grad
adapted = hasattr(head, "lora_A")
tuned.save_pretrained(folder + "/adapter")
saved = load_file(folder + "/adapter/adapter_model.safetensors")
head_is_saved = any("classifier" in name and "lora" not in name for name in saved)
print(f"head frozen {frozen}, under an adapter {adapted}, saved {head_is_saved}")

images = torch.randn(8, 3, 32, 32)
again = PeftModel.from_pretrained(classifier(seed=2), folder + "/adapter").eval()
with torch.no_grad():
    before = tuned(images).logits
    after = again(images).logits
moved = ((after - before).norm() / before.norm()).item()
print(f"logits moved by {moved:.2f} (relative)")

as_described = frozen and adapted and not head_is_saved and moved > 0.1

print("OK" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
