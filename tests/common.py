"""Small models and random tensors, the same for every test file."""

import torch
from torch import Tensor

from vitmsn import ViTMSNConfig

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


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def randomized(model: torch.nn.Module, std: float = 0.1, seed: int = 0) -> torch.nn.Module:
    """The model with every parameter drawn from a seed, none left at 0 or 1: those would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        centre = 1 if parameter.ndim == 1 and name.endswith("weight") else 0  # the weights of norms
        parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return model


def assert_relatively_close(actual, expected, limit: float, what: str = "") -> None:
    """Largest absolute difference over largest magnitude: the measure of golden/README.md."""
    actual, expected = (torch.as_tensor(x).detach().cpu().double() for x in (actual, expected))
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    )
    difference = (actual - expected).abs().max() if actual.numel() else torch.tensor(0.0)
    scale = (
        expected.abs().max() if expected.numel() and expected.abs().max() > 0 else torch.tensor(1.0)
    )
    assert difference / scale <= limit, (
        f"{what}: off by {difference / scale:.1e} of its magnitude, over {limit:.0e}"
    )
