"""Small models, pictures and random tensors, the same for every test file.

The tests are written to be read. Begin with the method, in this order: test_objective.py (what is
minimised), test_attention.py (the encoder's parts), test_masking.py (which patches stay). Then
test_model.py, test_golden.py (the published numbers), test_transformers.py, test_weights.py and
test_preprocess.py; then the files on pretraining and evaluation. Each law is stated by the name
and the docstring of its test, and most hold for all inputs that Hypothesis draws.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitmsn import (
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTMSNForPreTraining,
    ViTMSNModel,
)

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


def tiny_config(**changes) -> ViTMSNConfig:
    """A model of 4 x 4 patches that runs in a millisecond."""
    return ViTMSNConfig(**{**TINY, **changes})


@torch.no_grad()
def randomized(model: torch.nn.Module, std: float = 0.1, seed: int = 0) -> torch.nn.Module:
    """The model with every parameter drawn from a seed: any left at 0 or 1 would hide mistakes."""
    generator = seeded(seed)
    for name, parameter in model.named_parameters():
        is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
        centre = 1 if is_norm_weight else 0
        parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_backbone(seed: int = 0, **changes) -> ViTMSNModel:
    """A backbone with random weights, in training mode."""
    return randomized(ViTMSNModel(tiny_config(**changes)), seed=seed)


def tiny_classifier(**changes) -> ViTMSNForImageClassification:
    """A classifier of five classes with random weights, in training mode."""
    return randomized(ViTMSNForImageClassification(tiny_config(**changes)))


def tiny_pretraining(config: ViTMSNConfig | None = None, **options) -> ViTMSNForPreTraining:
    """A pretraining model of 12 prototypes, 16 wide, with random weights, in training mode."""
    model = ViTMSNForPreTraining(config or tiny_config(), 20, 16, 12, **options)
    return randomized(model)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def random_picture(
    mode: str = "RGB", width: int = 50, height: int = 40, seed: int = 0
) -> Image.Image:
    """A picture of random pixels, in any of Pillow's common modes."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "P":
        return random_picture("RGB", width, height, seed).quantize(64)

    channels = {"L": 1, "1": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    bands = [Image.fromarray(pixels[..., c]) for c in range(channels)]
    return bands[0].convert(mode) if channels == 1 else Image.merge(mode, bands)


def assert_relatively_close(actual, expected, limit: float, what: str = "") -> None:
    """Largest absolute difference over largest magnitude: the measure of golden/README.md."""
    actual = torch.as_tensor(actual).detach().cpu().double()
    expected = torch.as_tensor(expected).detach().cpu().double()
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    )
    if actual.numel() == 0:
        return

    difference = (actual - expected).abs().max()
    magnitude = expected.abs().max()
    relative = difference / magnitude if magnitude > 0 else difference
    assert relative <= limit, f"{what}: off by {relative:.1e} of its magnitude, over {limit:.0e}"
