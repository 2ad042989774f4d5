"""ViTMSN: the Vision Transformer of Masked Siamese Networks, and its training objective.

Paper: Assran et al., "Masked Siamese Networks for Label-Efficient Learning", ECCV 2022, arXiv
2204.07141v1. We cite it by its section titles and by its one numbered equation, (1).

The file follows the paper's Section 3: patchify and mask, attention, block, encoder, classifier,
similarity metric and predictions, training objective, pretraining model. After them, under one
banner, comes what is no part of the method: checking, loading, saving, naming and preprocessing.
The random augmentations and the training loop are in train_msn.py.

    model = ViTMSNForImageClassification.from_pretrained("facebook/vit-msn-small", num_labels=10)
    logits = model(preprocess(images, model.config)).logits

The backbone and the classifier compute what those of Hugging Face transformers compute, from the
same weights. Pretraining computes what the official code computes: it reproduces its numbers
(tests/test_golden.py). "Departure:" marks each place that differs from the paper or from the
official code.

Shapes are written in these letters, as in the einops patterns (in brackets the paper's letters):

    b  images in a batch (B)          n  tokens, or patches of an image
    v  anchor views per image (M)     r  patches to keep: those that remain after masking
    k  prototypes (K)                 d  width of the encoder
    e  width of the projection (d)    h  attention heads, each dh = d / h wide
    c  channels                       p  side of a square patch, in pixels (N)

"b n d" is a tensor of three axes. "(v b) e" has two: along the first come all b images of the first
view, then all b of the second, and so on. (In the objective p is a probability, as in the paper.)
"""

import copy
import difflib
import inspect
import json
import logging
import math
import os
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from functools import cache, partial, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageColor, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---- Configuration -------------------------------------------------------------------------------

VIT_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
VIT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
VIT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
PRESETS = {  # the published models (paper, Section 4): size of the ViT, then side of a patch
    "small-16": {**VIT_SMALL, "patch_size": 16},
    "base-16": {**VIT_BASE, "patch_size": 16},
    "base-8": {**VIT_BASE, "patch_size": 8},
    "base-4": {**VIT_BASE, "patch_size": 4},
    "large-16": {**VIT_LARGE, "patch_size": 16},
    "large-7": {**VIT_LARGE, "patch_size": 7},
}


@dataclass
class ViTMSNConfig:
    """The architecture of a ViTMSN. Field names and defaults are those of transformers.

    Raises ValueError for a value that no model can have (`check_config`).
    """

    hidden_size: int = 768  # d
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # h
    intermediate_size: int = 3072  # width inside the MLP
    hidden_act: str = "gelu"  # a name in ACTIVATIONS
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02  # standard deviation of initial weights
    layer_norm_eps: float = 1e-6
    image_size: int = 224  # pixels
    patch_size: int = 16  # p, pixels
    num_channels: int = 3  # c
    qkv_bias: bool = True
    num_labels: int | None = None  # None: as many as id2label names, else 2. 0: no classifier
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None  # None: inferred from the labels of the first loss
    attn_implementation: str = "sdpa"  # or "eager"
    drop_path_rate: float = 0.0  # stochastic depth: grows to this at the last layer
    extra: dict = field(default_factory=dict)  # other keys of a config.json, written back
    preprocessor: dict | None = None  # the content of preprocessor_config.json, if there was one

    def __post_init__(self):  # both functions are in the file's last part, "Checks"
        complete_labels(self)
        check_config(self)

    def __setattr__(self, name: str, value):
        set_config_field(self, name, value)

    @classmethod
    def preset(cls, name: str, **changes) -> "ViTMSNConfig":
        """One of the published models (a name in `PRESETS`), with any fields changed."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known; use one of {', '.join(PRESETS)}.")

        shape = PRESETS[name]
        values = {**shape, "intermediate_size": 4 * shape["hidden_size"], **changes}
        return cls(**values)

    @classmethod
    def from_dict(cls, values: dict) -> "ViTMSNConfig":
        """From the content of a config.json. Keys that are no field go to `extra`."""
        return config_from_dict(cls, values)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike) -> "ViTMSNConfig":
        """From the config.json of a folder, or of a model on the Hugging Face hub."""
        return config_from_pretrained(cls, name_or_path)

    def to_dict(self) -> dict:
        """The content of a config.json, as transformers reads and writes it."""
        return config_to_dict(self)

    @property
    def grid_size(self) -> int:
        """Patches along each side of a whole image."""
        return self.image_size // self.patch_size


# ---- Patchify and Mask (paper, Section 3) --------------------------------------------------------


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into square patches that do not overlap. b c height width -> b n (c p p).

    Patches run row by row. Pixels at the right and lower edges that fill no patch are dropped.
    """
    p = patch_size
    height = images.shape[-2] // p * p
    width = images.shape[-1] // p * p
    whole_patches = images[..., :height, :width]
    return rearrange(whole_patches, "b c (gh p1) (gw p2) -> b (gh gw) (c p1 p2)", p1=p, p2=p)


def num_patches_to_keep(num_patches: int, mask_ratio: float) -> int:
    """r = floor(n (1 - mask_ratio)). Raises ValueError if it is 0 or the ratio not in [0, 1).

    Departure: the official code computes this in floating point, where 25 patches at ratio 0.8
    keep 4. Here the ratio is the decimal number that one types, and they keep 5.
    """
    r = 0
    if 0 <= mask_ratio < 1:
        r = math.floor(num_patches * (1 - Fraction(str(mask_ratio))))

    if r < 1:
        raise ValueError(
            f"mask_ratio={mask_ratio} leaves none of {num_patches} patches or is not in [0, 1); "
            "lower it."
        )
    return r


def sample_patches_to_keep(
    batch: int, num_patches: int, mask_ratio: float, generator: torch.Generator
) -> Tensor:
    """The random mask, as the indices of the patches to keep. -> b r, ascending in each image.

    Every subset of r patches is equally likely, and `generator` alone decides.
    They ascend so that positions stay in reading order; attention itself does not mind.
    """
    r = num_patches_to_keep(num_patches, mask_ratio)

    # The patches that come first in a random order. Departure: the paper masks each view, and so
    # each image has a mask of its own here; the official code draws one for the whole batch.
    noise = torch.rand(batch, num_patches, generator=generator, device=generator.device)
    patches_to_keep = noise.argsort(dim=1)[:, :r]
    return patches_to_keep.sort(dim=1).values


def sample_block_to_keep(batch: int, grid: int, size: int, generator: torch.Generator) -> Tensor:
    """The focal mask, as the indices of the patches to keep: a square block of size x size patches
    out of grid x grid. -> b r with r = size * size, ascending in each image.

    Every place of the block is equally likely, and `generator` alone decides. Raises ValueError if
    the block has no patch or does not fit. (Official focal views are small crops instead, and so
    are those of train_msn.py, without the setting focal_mask.)
    """
    if not 1 <= size <= grid:
        raise ValueError(
            f"a block of {size} x {size} patches does not fit into {grid} x {grid}; "
            f"use a size from 1 to {grid}."
        )
    num_places = grid - size + 1  # along each side
    device = generator.device
    corner = torch.randint(num_places, (batch, 2), generator=generator, device=device)
    offsets = torch.arange(size, device=device)

    rows = corner[:, :1] + offsets  # b size
    columns = corner[:, 1:] + offsets
    patches_to_keep = grid * rows[:, :, None] + columns[:, None, :]  # b size size
    return patches_to_keep.flatten(1)


def take_patches(x: Tensor, patches_to_keep: Tensor | None) -> Tensor:
    """The patches to keep, of each image its own; None: all. x: b n d, indices: b r -> b r d."""
    if patches_to_keep is None:
        return x
    indices = patches_to_keep.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    return x.gather(1, indices)


# ---- Attention -----------------------------------------------------------------------------------


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(dh)) v, and the probabilities: the softmax, after dropout if any.

    query, key, value: b h n dh, where dh = d / h -> b h n dh, b h n n. The query may have fewer
    tokens than key and value; so have the two results then.
    """
    # To scale the query is less work than to scale the scores: n dh products a head, not n n.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    probabilities = F.dropout(scores.softmax(dim=-1), dropout)
    return probabilities @ value, probabilities


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """The same by torch's fused kernel, which never stores the probabilities: None for them."""
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout), None


class Attention(nn.Module):
    """Multi-head self-attention. One fused projection makes queries, keys and values."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.implementation = config.attn_implementation
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: Tensor, output_attentions: bool = False, class_token_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x: b n d -> b n d, and the probabilities b h n n if asked for, else None.

        class_token_only: nothing but what the class token receives, b 1 d (and b h 1 n). It alone
        has a query then, but every token still has a key and a value.
        """
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        if class_token_only:
            query = query[..., :1, :]  # torch 2.6 does not export [:, :1] with a free batch size

        query = rearrange(query, "b n (h dh) -> b h n dh", h=self.num_heads)
        key = rearrange(key, "b n (h dh) -> b h n dh", h=self.num_heads)
        value = rearrange(value, "b n (h dh) -> b h n dh", h=self.num_heads)
        dropout = self.dropout if self.training else 0.0

        if output_attentions or self.implementation == "eager":  # sdpa can't return them
            out, probabilities = eager_attention(query, key, value, dropout)
        else:
            out, probabilities = sdpa_attention(query, key, value, dropout)

        out = self.proj(rearrange(out, "b h n dh -> b n (h dh)"))
        return out, probabilities if output_attentions else None


# ---- Block ---------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # named as in transformers
    "gelu": F.gelu,  # exact, by the error function
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


class MLP(nn.Module):
    """Two linear layers with an activation between them, on every token by itself."""

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """b n d -> b n d."""
        return self.fc2(self.activation(self.fc1(x)))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: with probability `rate` an image's whole branch is 0. x: b n d -> b n d.

    The others are scaled up by 1 / (1 - rate), which keeps the mean.
    """
    if rate == 0 or not training:
        return x
    stays = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * stays / (1 - rate)


class Block(nn.Module):
    """One pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ViTMSNConfig, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout1 = nn.Dropout(config.hidden_dropout_prob)
        self.dropout2 = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path_rate = drop_path_rate

    def forward(
        self, x: Tensor, output_attentions: bool = False, class_token_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x: b n d -> b n d, and the attention probabilities b h n n if asked for, else None.

        class_token_only: compute nothing but the class token, b 1 d.
        """
        attended, probabilities = self.attn(self.norm1(x), output_attentions, class_token_only)
        if class_token_only:
            x = x[..., :1, :]  # as above, for export
        x = x + self.drop_branch(self.dropout1(attended))

        transformed = self.mlp(self.norm2(x))
        x = x + self.drop_branch(self.dropout2(transformed))
        return x, probabilities

    def drop_branch(self, branch: Tensor) -> Tensor:
        """Stochastic depth of a residual branch, in training only."""
        return drop_path(branch, self.drop_path_rate, self.training)


# ---- Encoder (paper, Section 3): a Vision Transformer; its class token represents the image ------


def interpolate_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample the positions of a square grid to another grid of (height, width) patches.

    positions: 1 (1 + n) d -> 1 (1 + height * width) d. The class token's comes first and stays.
    Bicubic, half-pixel centres, no antialiasing, as the official code does for focal views.
    """
    class_position = positions[:, :1]
    side = math.isqrt(positions.shape[1] - 1)
    patch_positions = rearrange(positions[:, 1:], "1 (gh gw) d -> 1 d gh gw", gh=side)
    resampled = F.interpolate(patch_positions, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([class_position, rearrange(resampled, "1 d gh gw -> 1 (gh gw) d")], dim=1)


def init_linear_layers(model: nn.Module, draw: Callable[[Tensor], Tensor]) -> None:
    """Let `draw` fill the weights of all linear layers in place; set their biases to zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class PretrainedMixin:
    """Methods that the backbone and the classifier share with the models of transformers."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **options):
        """Load a model, in eval mode. `model_from_pretrained` documents sources and options."""
        return model_from_pretrained(cls, name_or_path, **options)

    def save_pretrained(self, folder: str | os.PathLike, **options) -> None:
        """Write a folder that transformers loads. `save_model` documents the options."""
        save_model(self, Path(folder), **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **options) -> None:
        """Store only the input of each layer; compute the rest again in the backward pass.

        Whatever is passed is taken without effect: there is one way to do it here.
        """
        backbone_of(self).gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Store all that the backward pass needs."""
        backbone_of(self).gradient_checkpointing = False

    def set_attn_implementation(self, implementation: str) -> None:
        """Compute attention by "sdpa" or "eager" in every layer."""
        replace(self.config, attn_implementation=implementation)  # raises if it is neither
        self.config.attn_implementation = implementation
        for block in backbone_of(self).blocks:
            block.attn.implementation = implementation


class ViTMSNModel(PretrainedMixin, nn.Module):
    """The backbone: patches and a class token through transformer layers.

    use_mask_token: learn a token that can replace masked patches. (MSN itself drops them.)
    """

    def __init__(self, config: ViTMSNConfig, use_mask_token: bool = False):
        super().__init__()
        width = config.hidden_size
        depth = config.num_hidden_layers
        self.config = config
        self.gradient_checkpointing = False

        # Departure: zero at first, as in transformers; officially normal, as in MSNEncoder below.
        # The names of parameters are those of the official release: cls_token is the class token.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if use_mask_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid_size**2, width))
        self.patch_embed = nn.Linear(config.num_channels * config.patch_size**2, width)

        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        init_linear_layers(self, partial(nn.init.normal_, std=config.initializer_range))

    def embed(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        patches_to_keep: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """Pixels to tokens: the class token, then the patches, each plus its position.

        pixel_values: b c height width; bool_masked_pos: b n, True where the mask token goes;
        patches_to_keep: b r -> b (1 + r) d. Patches that are not kept are never embedded.
        Raises ValueError for images or indices of a wrong shape, size or type.
        """
        check_pixels(pixel_values, self.config, interpolate_pos_encoding)
        check_patches_to_keep(patches_to_keep, pixel_values, self.config)
        check_bool_masked_pos(bool_masked_pos, pixel_values, self.config)
        b, _, height, width = pixel_values.shape  # not len(): torch.export would fix its value
        positions = self.positions_for(height, width)
        class_position = positions[:, :1]
        patch_positions = positions[:, 1:].expand(b, -1, -1)

        patches = patchify(pixel_values.to(self.cls_token.dtype), self.config.patch_size)
        tokens = self.patch_embed(take_patches(patches, patches_to_keep))
        if bool_masked_pos is not None:
            tokens = self.replace_masked(tokens, bool_masked_pos, patches_to_keep)
        tokens = tokens + take_patches(patch_positions, patches_to_keep)

        class_token = (self.cls_token + class_position).expand(b, -1, -1)
        tokens = torch.cat([class_token.to(tokens.dtype), tokens], dim=1)
        return F.dropout(tokens, self.config.hidden_dropout_prob, self.training)

    def positions_for(self, height: int, width: int) -> Tensor:
        """Positions for images of height x width pixels, resampled if needed. -> 1 (1 + n) d."""
        p = self.config.patch_size
        grid = (height // p, width // p)
        # Decided as in transformers: an image that is not square is resampled even if it has as
        # many patches as one that is (64 x 16 pixels, and 32 x 32).
        if height == width and grid[0] * grid[1] == self.pos_embed.shape[1] - 1:
            return self.pos_embed
        return interpolate_positions(self.pos_embed, grid)

    def replace_masked(
        self, tokens: Tensor, bool_masked_pos: Tensor, patches_to_keep: Tensor | None
    ) -> Tensor:
        """Put the mask token where bool_masked_pos (b n) is True. tokens: b r d -> b r d."""
        if self.mask_token is None:
            raise ValueError(
                "bool_masked_pos needs a mask token: make the model with use_mask_token=True."
            )
        masked = take_patches(bool_masked_pos.unsqueeze(-1).bool(), patches_to_keep)
        return torch.where(masked, self.mask_token.to(tokens.dtype), tokens)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        patches_to_keep: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        class_token_only: bool = False,
        return_dict: bool | None = None,
    ) -> "ViTMSNModelOutput":
        """All tokens through all layers and the final norm; arguments as in `embed`.

        The output has last_hidden_state (b n d, after the final norm) and, if asked for,
        hidden_states (b n d: embeddings, then each layer's output) and attentions (b h n n of each
        layer). return_dict=False: a tuple of them.
        class_token_only: the last layer and the norm compute the class token alone, which is less
        work; last_hidden_state and the last of hidden_states are b 1 d then.
        """
        tokens = self.embed(
            pixel_values, bool_masked_pos, patches_to_keep, interpolate_pos_encoding
        )
        hidden_states = []
        attentions = []
        if output_hidden_states:
            hidden_states.append(tokens)

        for block in self.blocks:
            only_class_token = class_token_only and block is self.blocks[-1]
            tokens, probabilities = self.run_layer(
                block, tokens, output_attentions, only_class_token
            )
            if output_hidden_states:  # not otherwise: the list would hold them all in memory
                hidden_states.append(tokens)
            if output_attentions:
                attentions.append(probabilities)

        out = ViTMSNModelOutput(
            last_hidden_state=self.norm(tokens),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return out.to_tuple() if return_dict is False else out

    def representation(
        self,
        pixel_values: Tensor,
        patches_to_keep: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """The class token after the last layer, *before* the final norm. -> b d.

        This is the published feature for probing. In the last layer nothing else is computed.
        """
        tokens = self.embed(pixel_values, None, patches_to_keep, interpolate_pos_encoding)
        for block in self.blocks:
            class_token_only = block is self.blocks[-1]
            tokens, _ = self.run_layer(block, tokens, False, class_token_only)
        return tokens[:, 0]

    def run_layer(self, layer: Callable, *arguments):
        """layer(*arguments). With checkpointing, its inside is not stored but computed again."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)


# ---- Classifier ----------------------------------------------------------------------------------


class ViTMSNForImageClassification(PretrainedMixin, nn.Module):
    """The backbone with a linear classifier on the class token.

    Departure: it reads the class token *after* the final norm, as in transformers; the official
    evaluation reads it before (`ViTMSNModel.representation`).
    """

    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.config = config
        self.vit = ViTMSNModel(config)
        self.classifier = nn.Identity()
        if config.num_labels:
            self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        init_linear_layers(self.classifier, partial(nn.init.normal_, std=config.initializer_range))

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool | None = None,
    ) -> "ViTMSNClassifierOutput":
        """pixel_values: b c height width -> logits (b num_labels); with labels, a loss, too.

        labels: b class numbers, or b num_labels for regression and multi-label problems.
        If asked for, the output has hidden_states and attentions as the backbone's.
        """
        out = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            class_token_only=not (output_hidden_states or output_attentions),
        )
        class_token = out.last_hidden_state[..., 0, :]
        logits = self.classifier(class_token)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config)

        out = ViTMSNClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return out.to_tuple() if return_dict is False else out


def classification_loss(logits: Tensor, labels: Tensor, config: ViTMSNConfig) -> Tensor:
    """Mean squared error, cross-entropy or binary cross-entropy. logits: b num_labels -> scalar.

    Which one, config.problem_type says; if it does not, the labels do, as in transformers, and
    their answer is written into the config.
    """
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"

    if config.problem_type == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
    if config.problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1).long())
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


# ---- Similarity Metric and Predictions (paper, Section 3) ----------------------------------------
#
# This section and the next can be copied as they are; then call msn_loss, with prototypes that your
# optimizer updates and a target encoder that you move (as update_target does). They need:
#     import math
#     from collections.abc import Callable
#     from contextlib import AbstractContextManager, nullcontext
#     from typing import NamedTuple
#     import torch
#     import torch.nn.functional as F
#     from einops import rearrange
#     from torch import Tensor
#
# Departure: all probabilities are kept as logarithms. The paper and the official code write them
# plainly, and at temperature 0.1 and sharpening 0.05 a float32 probability rounds to 0, whose
# logarithm is infinite.

AllReduce = Callable[[Tensor, str], Tensor]  # (x, "sum" or "max") -> that of x over all processes


def one_process(x: Tensor, op: str) -> Tensor:
    """With a single process, the sum or maximum over all processes is x itself.

    Runs of many processes pass an all_reduce of their own (train_msn.py)."""
    return x


def autocast(device: torch.device, bfloat16: bool) -> AbstractContextManager:
    """Matrix products in bfloat16; with bfloat16=False in the tensors' own type, whatever is set
    around it. A device without autocast has nothing to switch off."""
    if not bfloat16 and not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def log_assign(z: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """log p = log softmax(z . q / τ): the assignment of each z to the prototypes q, in logarithms.

    z and q are scaled to unit length first, so that z . q is their cosine similarity.
    z: b e, prototypes: k e -> b k.
    """
    cosines = F.normalize(z, dim=-1) @ F.normalize(prototypes, dim=-1).T
    return (cosines / temperature).log_softmax(dim=-1)


def smooth(log_p: Tensor, smoothing: float) -> Tensor:
    """log((1 - s) p + s / k). log_p: b k -> b k.

    Departure: label smoothing of the assignments is in the official code, at weight 0, and not in
    the paper.
    """
    uniform_share = log_p.new_full((), smoothing / log_p.shape[-1])
    return torch.logaddexp(log_p + math.log1p(-smoothing), uniform_share.log())


def sharpen(log_p: Tensor, sharpening: float) -> Tensor:
    """log of p^(1/T), scaled to sum to 1 (T: sharpening, below 1 sharpens). log_p: b k -> b k.

    The same as the paper's softmax at a lower temperature τ⁺ = T τ: 0.025 = 0.25 x 0.1.
    """
    return (log_p / sharpening).log_softmax(dim=-1)


def batch_logsumexp(log_p: Tensor, all_reduce: AllReduce) -> Tensor:
    """log Σ_b p over all processes: what each prototype gets of the batch. log_p: b k -> k."""
    peak = all_reduce(log_p.detach().amax(dim=0), "max")  # as in any logsumexp, nothing overflows
    total = all_reduce((log_p - peak).exp().sum(dim=0), "sum")
    return peak + total.log()


def sinkhorn(log_p: Tensor, iterations: int = 3, all_reduce: AllReduce = one_process) -> Tensor:
    """Sinkhorn balancing (paper, Appendix A.1) in logarithms. log_p: b k, any values -> b k.

    Keeps the targets from all choosing the same few prototypes. Each iteration first scales the
    column of every prototype to the same sum, 1, and then the line of every image to the sum 1.
    After that a column sums to about b / k, where b counts the images of all processes: only the
    sums of lines are exact. (The usual form has sums of 1/k and 1/b; these constants cancel.)
    """
    for _ in range(iterations):
        log_p = log_p - batch_logsumexp(log_p, all_reduce)  # prototypes: each column sums to 1
        log_p = log_p.log_softmax(dim=-1)  # images: each line sums to 1
    return log_p


# ---- Training Objective (paper, Section 3, equation (1)) -----------------------------------------
#
#     minimise   1/(M B) Σ_i Σ_m H(p⁺_i, p_i,m)  -  λ H(p̄)                                     (1)
#
#     p_i,m = softmax(z_i,m . q / τ)                 prediction of anchor view m of image i
#     p⁺_i  = Sinkhorn(softmax(z⁺_i . q / (T τ)))    target of image i; it gets no gradient
#     H(p⁺, p) = - Σ_k p⁺_k log p_k                  low if the anchor view predicts the target
#     p̄ = 1/(M B) Σ_i Σ_m p_i,m                      mean prediction of the batch
#     H(p̄) = - Σ_k p̄_k log p̄_k                       high if all prototypes are in use
#
# In the code images i run along axis b, views m along v and prototypes along k; τ is temperature,
# T is sharpening, λ is memax_weight.


def cross_entropy(log_p: Tensor, p_plus: Tensor) -> Tensor:
    """1/(M B) Σ_i Σ_m H(p⁺_i, p_i,m). log_p: v b k, p_plus: b k, a constant -> scalar."""
    # All views of an image have one target, and H is linear in log p: so average the views first.
    mean_over_views = log_p.mean(dim=0)
    return -(p_plus * mean_over_views).sum(dim=-1).mean()


def me_max(
    log_p: Tensor, log_prior: Tensor | None = None, all_reduce: AllReduce = one_process
) -> Tensor:
    """ME-MAX, mean entropy maximisation, as a term to minimise: KL(p̄ || prior), never negative.

    log_p: (v b) k, log_prior: k or None for the uniform prior -> scalar.
    Departure: with the uniform prior this is log k - H(p̄), as in the official code. The paper has
    - H(p̄): the same gradient, but not 0 where the term is at its best. Other priors are from a
    later paper (PMSN, arXiv 2210.07277).
    """
    log_mean = batch_logsumexp(log_p, all_reduce).log_softmax(dim=-1)  # log p̄: its sum is 1
    log_prior = -math.log(log_p.shape[-1]) if log_prior is None else log_prior.to(log_mean)
    return (log_mean.exp() * (log_mean - log_prior)).sum()


def power_law_prior(num_prototypes: int, exponent: float) -> Tensor:
    """log of a prior proportional to rank^-exponent: few frequent, many rare classes. -> k.

    From PMSN, Section 4, for data whose classes are not of one size. Exponent 0 is uniform.
    """
    ranks = torch.arange(1, num_prototypes + 1, dtype=torch.float64)
    return (-exponent * ranks.log()).log_softmax(dim=0)


def entropy(log_p: Tensor) -> Tensor:
    """Mean entropy of the single predictions, in nats. log_p: (v b) k -> scalar.

    Departure: this term is in the official code, at weight 0, and not in the paper.
    """
    return -(log_p.exp() * log_p).sum(dim=-1).mean()


def count_prototypes_used(p_plus: Tensor, all_reduce: AllReduce) -> Tensor:
    """How many prototypes are the first choice of some target. p_plus: b k -> scalar."""
    first_choices = F.one_hot(p_plus.argmax(dim=-1), p_plus.shape[-1])
    times_chosen = all_reduce(first_choices.sum(dim=0), "sum")
    return (times_chosen > 0).sum()


class MSNLoss(NamedTuple):
    """The objective, its terms, and the target assignments with three statistics of them.

    Two signs of collapse: top_assignment is 1 with one prototype used, or top_assignment and
    bottom_assignment are both 1 / k. All are scalars but target_assignments. print() shows the
    scalars, one a line.
    """

    loss: Tensor  # (1)
    cross_entropy: Tensor  # its first term
    memax: Tensor  # its second term, without λ
    entropy: Tensor
    target_assignments: Tensor  # p⁺: b k, each line sums to 1
    prototypes_used: Tensor  # how many are the first choice of some target
    top_assignment: Tensor  # the highest of each target, averaged
    bottom_assignment: Tensor  # the lowest of each target, averaged

    def __str__(self) -> str:
        scalars = {name: value for name, value in self._asdict().items() if value.ndim == 0}
        return "\n".join(f"{name:<17} {value.item():.6g}" for name, value in scalars.items())


def kind_of(value) -> str:
    """What an error says of a value of a wrong type: name is ..."""
    return "None" if value is None else f"of type {type(value).__name__}"


def check_is_tensor(name: str, value, axes: str) -> None:
    """Raise ValueError for a list of tensors, for None, and for all else that is no tensor."""
    if isinstance(value, Tensor):
        return
    if isinstance(value, (list, tuple)):
        of_tensors = bool(value) and all(isinstance(item, Tensor) for item in value)
        advice = f"torch.tensor({name}) makes one of a list of numbers."
        if of_tensors:
            advice = f"torch.cat({name}) joins a list of them."
        raise ValueError(
            f"{name} is a {type(value).__name__} of {len(value)}; pass one tensor {axes}. {advice}"
        )
    raise ValueError(f"{name} is {kind_of(value)}; pass one tensor {axes}.")


def check_loss_settings(
    temperature: float, sharpening: float, sinkhorn_iterations: int, label_smoothing: float
) -> None:
    """Raise ValueError for numbers that would make the loss nan, or that mean nothing. Tensors are
    taken as they are: to look at their values, the CPU would have to wait for the GPU."""
    settings = (("temperature", temperature, 0.1), ("sharpening", sharpening, 0.25))
    for name, value, in_the_paper in settings:
        if not isinstance(value, Tensor) and not value > 0:
            raise ValueError(f"{name}={value} must be above 0; the paper has {in_the_paper}.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1.")
    if not sinkhorn_iterations >= 0 or sinkhorn_iterations % 1:
        raise ValueError(
            f"sinkhorn_iterations={sinkhorn_iterations} must be a whole number, 0 or more; the "
            "paper has 3, and 0 leaves Sinkhorn out."
        )


def check_log_prior(log_prior: Tensor | None, num_prototypes: int) -> None:
    """Raise ValueError unless this is one logarithm for each prototype, or None."""
    if log_prior is None:
        return
    check_is_tensor("log_prior", log_prior, "(prototypes,)")
    if log_prior.shape != (num_prototypes,):
        raise ValueError(
            f"log_prior has shape {tuple(log_prior.shape)}; pass the logarithms of the shares of "
            f"{num_prototypes} prototypes, as power_law_prior({num_prototypes}, exponent)."
        )


def join_views(anchors: Tensor, targets: Tensor, prototypes: Tensor) -> Tensor:
    """Anchors as (v b) e, from that or from v b e. Raises ValueError if shapes do not match."""
    check_is_tensor("anchors", anchors, "(views * images, width)")
    check_is_tensor("targets", targets, "(images, width)")
    check_is_tensor("prototypes", prototypes, "(number, width)")
    seen = (
        f"anchors {tuple(anchors.shape)}, targets {tuple(targets.shape)}, prototypes "
        f"{tuple(prototypes.shape)}"
    )
    if targets.ndim != 2 or prototypes.ndim != 2 or anchors.ndim not in (2, 3):
        raise ValueError(
            f"{seen}: pass anchors (views, images, width) or (views * images, width), targets "
            "(images, width) and prototypes (number, width)."
        )
    if not (anchors.numel() and targets.numel() and prototypes.numel()):
        raise ValueError(f"{seen}: no axis may be 0; pass one image, view and prototype at least.")

    b, width = targets.shape
    if anchors.shape[-1] != width or prototypes.shape[-1] != width:
        raise ValueError(f"{seen}: the last axis, their width, must be the same.")

    if anchors.ndim == 3:
        if anchors.shape[1] != b:
            turned = "; for (images, views, width) pass anchors.transpose(0, 1)"
            raise ValueError(
                f"{seen}: the second axis of the anchors must be the {b} images"
                f"{turned if anchors.shape[0] == b else ''}."
            )
        return rearrange(anchors, "v b e -> (v b) e")
    if len(anchors) % b:
        raise ValueError(f"{seen}: {len(anchors)} anchors are no whole number of views of {b}.")
    return anchors


def msn_loss(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    sharpening: float = 0.25,
    sinkhorn_iterations: int = 3,
    memax_weight: float = 1.0,
    entropy_weight: float = 0.0,
    label_smoothing: float = 0.0,
    log_prior: Tensor | None = None,
    all_reduce: AllReduce = one_process,
) -> MSNLoss:
    """Equation (1) of projected views. anchors: v b e, or (v b) e: all images of the first view,
    then all of the second, and so on.

    targets: b e; prototypes: k e; sinkhorn_iterations=0 leaves Sinkhorn out.
    Gradients reach the anchors and, by the anchors' side only, the prototypes.
    Raises ValueError if the shapes do not match (in (v b) e, the order can't be seen from them),
    and for a temperature, sharpening, sinkhorn_iterations or label_smoothing out of its range.
    """
    check_loss_settings(temperature, sharpening, sinkhorn_iterations, label_smoothing)
    anchors = join_views(anchors, targets, prototypes)
    check_log_prior(log_prior, len(prototypes))

    # Departure: float32 even under autocast. The official code has no mixed precision.
    with autocast(anchors.device, bfloat16=False):
        dtype = torch.promote_types(prototypes.dtype, torch.float32)
        anchors = anchors.to(dtype)
        targets = targets.to(dtype)
        prototypes = prototypes.to(dtype)

        # log p_i,m: the predictions of the anchor views, (v b) k
        log_p = smooth(log_assign(anchors, prototypes, temperature), label_smoothing)

        # p⁺_i: the targets, b k. Sharpened first, then balanced, and constant in the gradient.
        with torch.no_grad():
            log_p_plus = smooth(log_assign(targets, prototypes, temperature), label_smoothing)
            log_p_plus = sharpen(log_p_plus, sharpening)
            p_plus = sinkhorn(log_p_plus, sinkhorn_iterations, all_reduce).exp()
            prototypes_used = count_prototypes_used(p_plus, all_reduce)

        log_p_views = rearrange(log_p, "(v b) k -> v b k", b=targets.shape[0])
        cross_entropy_term = cross_entropy(log_p_views, p_plus)  # 1/(M B) Σ_i Σ_m H(p⁺_i, p_i,m)
        memax_term = me_max(log_p, log_prior, all_reduce)  # log k - H(p̄)
        entropy_term = entropy(log_p)  # not in (1), and of weight 0

        # equation (1), shifted by λ log k
        loss = cross_entropy_term + memax_weight * memax_term + entropy_weight * entropy_term
        return MSNLoss(
            loss=loss,
            cross_entropy=cross_entropy_term,
            memax=memax_term,
            entropy=entropy_term,
            target_assignments=p_plus,
            prototypes_used=prototypes_used,
            top_assignment=p_plus.amax(dim=-1).mean(),
            bottom_assignment=p_plus.amin(dim=-1).mean(),
        )


# ---- Pretraining model: anchor encoder, target encoder and prototypes ----------------------------


class ProjectionHead(nn.Sequential):
    """Three linear layers, b d -> b e; thrown away after pretraining (paper, Appendix A.1).

    Departure: the paper puts batch norm "at the input and hidden layers"; the official code, and
    so this one, after the two hidden layers only.
    """

    def __init__(self, width: int, hidden_dim: int, output_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_dim)
        self.bn1 = nn.BatchNorm1d(hidden_dim)
        self.gelu1 = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.bn2 = nn.BatchNorm1d(hidden_dim)
        self.gelu2 = nn.GELU()
        self.fc3 = nn.Linear(hidden_dim, output_dim)

    def forward(self, features: Tensor) -> Tensor:
        """b d -> b e. Raises ValueError in training mode for fewer than two images."""
        check_batch_norm(self.bn1, features)
        return super().forward(features)


class MSNEncoder(ViTMSNModel):
    """f_θ: backbone and projection head, from views to vectors to compare with prototypes."""

    def __init__(self, config: ViTMSNConfig, hidden_dim: int, output_dim: int):
        super().__init__(config)
        self.fc = ProjectionHead(config.hidden_size, hidden_dim, output_dim)

        # Departure: cut at two standard deviations. The official code cuts at -2 and 2, which are
        # a hundred standard deviations and cut nothing.
        std = config.initializer_range
        draw = partial(nn.init.trunc_normal_, std=std, a=-2 * std, b=2 * std)
        init_linear_layers(self, draw)
        nn.init.kaiming_normal_(self.patch_embed.weight)
        nn.init.normal_(self.cls_token, std=std)
        nn.init.normal_(self.pos_embed, std=std)

    def forward(self, views: list[Tensor], patches_to_keep: list[Tensor | None]) -> Tensor:
        """Views to projections. views: v tensors b c height width of any sizes -> v b e.

        patches_to_keep: for each view b r, or None for all. Views of one size that keep the same
        number of patches go through together, so batch norm has its own statistics for each size.
        """
        projections = [None] * len(views)
        for members in group_by_shape(views, patches_to_keep):
            images = torch.cat([views[i] for i in members])
            indices = None
            if patches_to_keep[members[0]] is not None:
                indices = torch.cat([patches_to_keep[i] for i in members])

            representation = self.representation(images, indices, interpolate_pos_encoding=True)
            projected = self.fc(self.norm(representation))
            for i, projection in zip(members, projected.chunk(len(members)), strict=True):
                projections[i] = projection
        return torch.stack(projections)


def group_by_shape(views: list[Tensor], patches_to_keep: list[Tensor | None]) -> list[list[int]]:
    """The indices of views that can be one batch: same size, same number of patches to keep."""
    groups = {}
    for i, (view, indices) in enumerate(zip(views, patches_to_keep, strict=True)):
        shape = (view.shape, None if indices is None else indices.shape)
        groups.setdefault(shape, []).append(i)
    return list(groups.values())


@cache
def prior_on(device: torch.device, num_prototypes: int, exponent: float) -> Tensor:
    """power_law_prior on a device, copied there once."""
    with torch.inference_mode(False):  # else what evaluation made could not be used in training
        return power_law_prior(num_prototypes, exponent).to(device)


class ViTMSNForPreTraining(nn.Module):
    """A Masked Siamese Network: anchor encoder and prototypes, which learn, and target encoder.

    The target encoder follows the anchor encoder as a moving average (`update_target`).
    prior_exponent: that of `power_law_prior`; 0 is the uniform prior. loss_options: those of
    `msn_loss`.
    """

    def __init__(
        self,
        config: ViTMSNConfig,
        hidden_dim: int = 2048,
        output_dim: int = 256,
        num_prototypes: int = 1024,
        *,
        prior_exponent: float = 0.0,
        **loss_options,
    ):
        super().__init__()
        self.config = config
        self.prior_exponent = prior_exponent
        self.loss_options = loss_options

        self.anchor_encoder = MSNEncoder(config, hidden_dim, output_dim)
        bound = output_dim**-0.5
        prototypes = torch.empty(num_prototypes, output_dim).uniform_(-bound, bound)
        self.prototypes = nn.Parameter(prototypes)
        self.target_encoder = copy.deepcopy(self.anchor_encoder).requires_grad_(False)

    def forward(
        self,
        target_view: Tensor,
        anchor_views: list[Tensor],
        patches_to_keep: list[Tensor | None] | None = None,
        sharpening: float | None = None,
    ) -> MSNLoss:
        """The objective of one batch. target_view: b c height width; anchor_views: v such tensors.

        patches_to_keep: for each anchor view b r, or None for all.
        sharpening: this step's, where it follows a schedule; None means the constructor's.
        Raises ValueError without anchor views, for views that are not all of the same images, or if
        patches_to_keep does not match them; in training mode, also for a batch of one image.
        """
        check_views(target_view, anchor_views, patches_to_keep, self.config)
        if patches_to_keep is None:
            patches_to_keep = [None] * len(anchor_views)

        anchors = self.anchor_encoder(anchor_views, patches_to_keep)  # v b e
        # The target's batch norm, too, takes the statistics of its own batch, as in the official
        # code: keep the module in train(). Without gradient: the target encoder never learns.
        with torch.no_grad():
            targets = self.target_encoder([target_view], [None])[0]

        options = dict(self.loss_options)
        if sharpening is not None:
            options["sharpening"] = sharpening
        log_prior = None
        if self.prior_exponent:
            device = self.prototypes.device
            log_prior = prior_on(device, len(self.prototypes), self.prior_exponent)
        return msn_loss(anchors, targets, self.prototypes, log_prior=log_prior, **options)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * anchor, for every parameter.

        As in the official code, the buffers of batch norm are not averaged: each encoder has its
        own.
        """
        targets = list(self.target_encoder.parameters())
        anchors = list(self.anchor_encoder.parameters())
        # target + (1 - momentum) (anchor - target), in one call for all of them
        torch._foreach_lerp_(targets, anchors, 1 - momentum)

    def load_pretrained(self, name_or_path: str | os.PathLike) -> list[str]:
        """Start both encoders from stored weights. `load_into_pretraining` documents it."""
        return load_into_pretraining(self, name_or_path)


# ==================================================================================================
# Compatibility with transformers and the original release
#
# Nothing below is part of the method: checks of what users pass in, names of weights, files.
# ==================================================================================================

# ---- Checks --------------------------------------------------------------------------------------

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
ACTIVATIONS.update(  # more names that transformers knows
    gelu_python=F.gelu,
    gelu_fast=partial(F.gelu, approximate="tanh"),
    swish=F.silu,
    mish=F.mish,
    relu6=F.relu6,
    leaky_relu=F.leaky_relu,
    sigmoid=torch.sigmoid,
    tanh=torch.tanh,
)
CHOICES = {
    "hidden_act": tuple(ACTIVATIONS),
    "attn_implementation": ("sdpa", "eager"),
    "problem_type": (None, *PROBLEM_TYPES),
}


def complete_labels(config: ViTMSNConfig) -> None:
    """Fill in whichever of num_labels, id2label and label2id were left out.

    Raises ValueError if they contradict each other.
    """
    if config.id2label is None:
        if config.num_labels is None:
            config.num_labels = 2
        if type(config.num_labels) is not int or not 0 <= config.num_labels <= 10**6:
            raise ValueError(
                f"num_labels={config.num_labels!r} must be a whole number from 0 to a million."
            )
        config.id2label = {i: f"LABEL_{i}" for i in range(config.num_labels)}

    try:  # config.json has the numbers as text
        config.id2label = {int(i): str(name) for i, name in config.id2label.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"id2label={config.id2label!r} must map class numbers to names.") from None

    if config.num_labels not in (None, len(config.id2label)):
        raise ValueError(
            f"num_labels={config.num_labels} but id2label names {len(config.id2label)} classes; "
            "give one."
        )
    config.num_labels = len(config.id2label)
    if config.label2id is None:
        config.label2id = {name: i for i, name in config.id2label.items()}
    object.__setattr__(config, "labels_are_complete", True)


def set_config_field(config: ViTMSNConfig, name: str, value) -> None:
    """Set a field. As in transformers, num_labels and id2label move each other later on."""
    object.__setattr__(config, name, value)
    if not getattr(config, "labels_are_complete", False):
        return
    if name == "num_labels" and value != len(config.id2label):
        id2label = {i: f"LABEL_{i}" for i in range(value)}
        object.__setattr__(config, "id2label", id2label)
        object.__setattr__(config, "label2id", {text: i for i, text in id2label.items()})
    elif name == "id2label":
        object.__setattr__(config, "num_labels", len(value))


def check_config(config: ViTMSNConfig) -> None:
    """Raise ValueError for a value that no model can have, saying what would do."""
    for entry in fields(config):
        name = entry.name
        value = getattr(config, name)
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r} is not known; use one of {CHOICES[name]}.")
        if entry.type is int and (type(value) is not int or value < 1):
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
        if entry.type is float:
            check_float(name, value)
        if entry.type is bool and type(value) is not bool:
            raise ValueError(f"{name}={value!r} must be True or False.")

    width = config.hidden_size
    heads = config.num_attention_heads
    rest = width % heads
    if rest:
        below = max(width - rest, heads)
        above = width - rest + heads
        raise ValueError(
            f"hidden_size={width} is not divisible by num_attention_heads={heads}; use {below} or "
            f"{above}, or another number of heads."
        )

    if config.patch_size > config.image_size:
        raise ValueError(
            f"no patch fits: patch_size={config.patch_size} must be <= "
            f"image_size={config.image_size}."
        )


ANY_SIZE = ("layer_norm_eps", "initializer_range")


def check_float(name: str, value) -> None:
    """Raise ValueError unless it is a number that this field of a config can be."""
    if name in ANY_SIZE:
        if not is_number(value) or value < 0:
            raise ValueError(f"{name}={value!r} must be a number of at least 0.")
    elif not is_number(value) or not 0 <= value <= 1 or (name == "drop_path_rate" and value == 1):
        end = "below 1" if name == "drop_path_rate" else "at most 1"
        raise ValueError(f"{name}={value!r} must be a number of at least 0 and {end}.")


def check_pixels(
    pixel_values: Tensor, config: ViTMSNConfig, any_size: bool, name: str = "pixel_values"
) -> None:
    """Raise ValueError unless these are images for the model; any_size: of one patch or more."""
    channels = config.num_channels
    check_is_tensor(name, pixel_values, f"(images, {channels}, height, width)")
    of_images = pixel_values.ndim == 4 and pixel_values.shape[1] == channels
    if not of_images or not pixel_values.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(pixel_values.shape)} and type {pixel_values.dtype}; "
            f"pass normalised floats (images, {channels}, height, width), as preprocess() makes "
            "them."
        )

    p = config.patch_size
    size = config.image_size
    height, width = pixel_values.shape[-2:]
    if any_size and min(height, width) < p:
        raise ValueError(
            f"{name}: the images are {height} x {width} pixels but need at least one patch of "
            f"{p} x {p}; make them larger."
        )
    if not (any_size or height == width == size):
        raise ValueError(
            f"{name}: the images are {height} x {width} pixels but the model was made for "
            f"{size} x {size}; resize them, or pass interpolate_pos_encoding=True and at least one "
            f"patch of {p} x {p}."
        )


def count_patches(pixel_values: Tensor, config: ViTMSNConfig) -> int:
    """n, the whole patches of each image. pixel_values: b c height width."""
    height, width = pixel_values.shape[-2:]
    return (height // config.patch_size) * (width // config.patch_size)


def check_patches_to_keep(
    patches_to_keep: Tensor | None,
    pixel_values: Tensor,
    config: ViTMSNConfig,
    name: str = "patches_to_keep",
) -> None:
    """Raise ValueError unless these are indices of some of the images' patches, or None."""
    if patches_to_keep is None:
        return
    check_is_tensor(name, patches_to_keep, "(images, patches to keep)")
    b, _, height, width = pixel_values.shape
    n = count_patches(pixel_values, config)
    of_images = patches_to_keep.ndim == 2 and patches_to_keep.shape[0] == b
    if not of_images or not 1 <= patches_to_keep.shape[1] <= n:
        raise ValueError(
            f"{name} has shape {tuple(patches_to_keep.shape)}; pass (images, patches to keep): "
            f"{b} images, 1 to {n} patches of {height} x {width} pixels."
        )
    if patches_to_keep.dtype != torch.int64:
        raise ValueError(
            f"{name} has type {patches_to_keep.dtype}; pass the numbers of the patches as "
            "torch.int64 (by .long() if they are of another integer type)."
        )

    # On a GPU the CPU would have to wait for the values; and while torch.compile or torch.export
    # are at work there are none.
    if patches_to_keep.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = patches_to_keep.aminmax()
        if least < 0 or most >= n:
            raise ValueError(
                f"{name} has numbers from {least} to {most}; the patches of {height} x {width} "
                f"pixels are numbered from 0 to {n - 1}."
            )


def check_bool_masked_pos(
    bool_masked_pos: Tensor | None, pixel_values: Tensor, config: ViTMSNConfig
) -> None:
    """Raise ValueError unless this says of each of the images' patches whether it is masked."""
    if bool_masked_pos is None:
        return
    check_is_tensor("bool_masked_pos", bool_masked_pos, "(images, patches)")
    b = pixel_values.shape[0]
    n = count_patches(pixel_values, config)
    if bool_masked_pos.shape != (b, n):
        raise ValueError(
            f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}; pass (images, patches): "
            f"({b}, {n}), with True where the mask token goes."
        )


def check_views(
    target_view: Tensor,
    anchor_views: list[Tensor],
    patches_to_keep: list[Tensor | None] | None,
    config: ViTMSNConfig,
) -> None:
    """Raise ValueError unless these are views of the same number of images, and masks for them."""
    check_pixels(target_view, config, any_size=True, name="target_view")
    check_is_list("anchor_views", anchor_views, "[view]")
    masks = patches_to_keep
    if masks is None:
        masks = [None] * len(anchor_views)
    check_is_list("patches_to_keep", masks, "[indices]")
    if not anchor_views or len(masks) != len(anchor_views):
        raise ValueError(
            f"{len(anchor_views)} anchor views and {len(masks)} entries of patches_to_keep: give "
            "at least one view, and None or indices for each."
        )

    b = target_view.shape[0]
    for i, (view, indices) in enumerate(zip(anchor_views, masks, strict=True)):
        name = f"anchor_views[{i}]"
        check_pixels(view, config, any_size=True, name=name)
        if view.shape[0] != b:
            raise ValueError(
                f"{name} has {view.shape[0]} images and target_view {b}; all views must be of the "
                "same images, in the same order."
            )
        check_patches_to_keep(indices, view, config, name=f"patches_to_keep[{i}]")


def check_is_list(name: str, value, example: str) -> None:
    """Raise ValueError unless it is a list (or tuple), with an entry for each anchor view."""
    if isinstance(value, (list, tuple)):
        return
    seen = kind_of(value)
    if isinstance(value, Tensor):
        seen = f"one tensor of shape {tuple(value.shape)}"
    raise ValueError(
        f"{name} is {seen}; pass a list of tensors, one for each anchor view, as {example}."
    )


def check_batch_norm(batch_norm: nn.Module, features: Tensor) -> None:
    """Raise ValueError for a batch that is too small for statistics. features: b d.

    Batch norm over several processes counts their images together and judges for itself.
    """
    takes_statistics = type(batch_norm) is nn.BatchNorm1d and batch_norm.training
    if takes_statistics and features.shape[0] < 2:
        raise ValueError(
            f"a batch of {features.shape[0]}: in training mode the batch norm of the projection "
            "head needs two images or more; make the batch larger, or call eval() on the model."
        )


# ---- Outputs -------------------------------------------------------------------------------------

# Clients ask for a dict (transformers' Trainer does). Before 2.7 torch.compile can't trace dicts of
# a class of one's own; there, outputs answer in the same way and are none.
TRACES_DICTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


class ModelOutput(dict if TRACES_DICTS else object):
    """What a model returns, as in transformers: out.logits, out["logits"] or, by position, out[0].

    Fields that are None count as not there. What is there is stored twice, as attribute and in the
    dict, for torch.jit.trace reads dicts past their methods.
    As a whole it is made of a dict or of pairs, too, which accelerate does.
    """

    def __post_init__(self):
        names = self.field_names()
        content = getattr(self, names[0])
        if content is None or isinstance(content, (Tensor, tuple)):
            return
        setattr(self, names[0], None)
        for name, value in dict(content).items():
            self[name] = value

    @classmethod
    def field_names(cls) -> list[str]:
        return list(cls.__dataclass_fields__)

    def __setattr__(self, name: str, value) -> None:
        object.__setattr__(self, name, value)
        if TRACES_DICTS and value is not None:
            dict.__setitem__(self, name, value)
        elif TRACES_DICTS and dict.__contains__(self, name):
            dict.__delitem__(self, name)

    def keys(self) -> list[str]:
        return [name for name in self.field_names() if getattr(self, name) is not None]

    def to_tuple(self) -> tuple:
        """All that is there, in the order of the fields."""
        return tuple([getattr(self, name) for name in self.keys()])

    def values(self) -> list:
        return list(self.to_tuple())

    def items(self) -> list[tuple]:
        return [(name, getattr(self, name)) for name in self.keys()]

    def __iter__(self):
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name) -> bool:
        return name in self.keys()

    def get(self, name: str, default=None):
        return getattr(self, name) if name in self.keys() else default

    def __getitem__(self, key: str | int | slice):
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __setitem__(self, name: str, value) -> None:
        if name not in self.field_names():
            raise KeyError(f"{name!r} is no field of {type(self).__name__}")
        setattr(self, name, value)

    def refuse_change(self, *arguments, **options):
        raise TypeError(f"the fields of {type(self).__name__} can be set, not taken away.")

    __delitem__ = pop = popitem = clear = update = setdefault = refuse_change


@dataclass
class ViTMSNModelOutput(ModelOutput):
    """What the backbone returns. The last two are None unless asked for."""

    last_hidden_state: Tensor | None = None  # b n d, after the final norm
    hidden_states: tuple[Tensor, ...] | None = None  # b n d: embeddings, then each layer's output
    attentions: tuple[Tensor, ...] | None = None  # b h n n of each layer


@dataclass
class ViTMSNClassifierOutput(ModelOutput):
    """What the classifier returns. All but the logits are None unless asked for."""

    loss: Tensor | None = None  # scalar
    logits: Tensor | None = None  # b num_labels
    hidden_states: tuple[Tensor, ...] | None = None  # as in ViTMSNModelOutput
    attentions: tuple[Tensor, ...] | None = None


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.6 warns of a call of its own
    for output_class in (ViTMSNModelOutput, ViTMSNClassifierOutput):
        torch.export.register_dataclass(output_class, serialized_type_name=output_class.__name__)


# ---- config.json ---------------------------------------------------------------------------------


def config_from_dict(cls: type[ViTMSNConfig], values: dict) -> ViTMSNConfig:
    """The config in the content of a config.json. Raises ValueError for another kind of model."""
    if isinstance(values, dict):
        model_type = values.get("model_type", "vit_msn")
    else:
        model_type = type(values).__name__
    if model_type != "vit_msn":
        raise ValueError(f"this config describes {model_type!r}, not a model of type 'vit_msn'.")

    known = {}
    extra = {}
    own_names = {entry.name for entry in fields(cls)} - {"extra", "preprocessor"}
    for name, value in values.items():
        if name in own_names:
            known[name] = value
        elif name not in ("model_type", "architectures"):  # these are written anew
            extra[name] = value
    return cls(**known, extra=extra)


def config_from_pretrained(
    cls: type[ViTMSNConfig], name_or_path: str | os.PathLike
) -> ViTMSNConfig:
    """Read config.json and, where it is, preprocessor_config.json.

    Raises FileNotFoundError, or ValueError that names the file.
    """
    folder = local_folder(name_or_path)
    path = folder / "config.json"
    content = path.read_bytes()
    try:
        config = cls.from_dict(json.loads(content))
        path = folder / "preprocessor_config.json"
        if path.is_file():
            config.preprocessor = json.loads(path.read_bytes())
            if not isinstance(config.preprocessor, dict):
                raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be used: {error}") from error
    return config


def config_to_dict(config: ViTMSNConfig) -> dict:
    """The content of config.json: `extra`, and all fields but those that transformers derives."""
    left_out = {"extra", "preprocessor", "attn_implementation", "num_labels"}
    values = {}
    for name, value in asdict(config).items():
        if value is not None and name not in left_out:
            values[name] = value
    return {**config.extra, **values, "model_type": "vit_msn"}


def save_config(config: ViTMSNConfig, folder: str | os.PathLike) -> None:
    """Write config.json into the folder."""
    write_json(Path(folder) / "config.json", config.to_dict())


def update_config(config: ViTMSNConfig, values: dict) -> None:
    """Set fields; what is no field goes to `extra`. Raises ValueError for values of no model."""
    changes, extra = split_keywords(values)
    changed = config_with(config, {**changes, "extra": {**config.extra, **extra}})
    for entry in fields(config):
        object.__setattr__(config, entry.name, getattr(changed, entry.name))


def split_keywords(values: dict) -> tuple[dict, dict]:
    """Those that are fields of a config, and the others."""
    own_names = {entry.name for entry in fields(ViTMSNConfig)}
    known = {name: value for name, value in values.items() if name in own_names}
    return known, {name: value for name, value in values.items() if name not in own_names}


def config_with(config: ViTMSNConfig, changes: dict) -> ViTMSNConfig:
    """A copy with some fields changed; names of classes that are not given are made anew."""
    changes = dict(changes)
    if changes.get("label2id") is not None and changes.get("id2label") is None:
        changes["id2label"] = {i: name for name, i in changes["label2id"].items()}
    if changes.get("id2label") is not None:
        changes.setdefault("num_labels", None)
        changes.setdefault("label2id", None)
    elif changes.get("num_labels", config.num_labels) not in (None, config.num_labels):
        changes.update(id2label=None, label2id=None)
    else:
        changes.pop("num_labels", None)

    image_size = changes.pop("image_size", None)
    changed = replace(copy.deepcopy(config), **changes)
    return changed if image_size is None else with_image_size(changed, image_size)


def keep_unknown_keywords(init: Callable) -> Callable:
    """The constructor of a config, which then takes any keyword: unknown ones go to `extra`, as
    from_dict does it. One that is nearly a field is announced: it may be a mistake."""

    @wraps(init)
    def init_and_keep(self, *arguments, **words):
        known, unknown = split_keywords(words)
        own_names = [entry.name for entry in fields(ViTMSNConfig)]
        for word in unknown:
            nearest = difflib.get_close_matches(word, own_names, n=1, cutoff=0.8)
            if nearest:
                message = f"{word}= is no field of ViTMSNConfig; did you mean {nearest[0]}=?"
                warnings.warn(message, stacklevel=2)
        if unknown:
            known["extra"] = {**known.get("extra", {}), **unknown}
        init(self, *arguments, **known)

    return init_and_keep


ViTMSNConfig.__init__ = keep_unknown_keywords(ViTMSNConfig.__init__)
ViTMSNConfig.model_type = "vit_msn"
ViTMSNConfig.save_pretrained = save_config
ViTMSNConfig.update = update_config
ViTMSNConfig.to_json_string = lambda config: json.dumps(config.to_dict(), indent=2) + "\n"


# ---- Names of weights ----------------------------------------------------------------------------
#
# The same weights have other names in each layout. Ours are those of the original release, but for
# patch_embed: a convolution there (patch_embed.proj, weight d c p p), a linear layer here (weight
# d (c p p)). Layouts of transformers:
#   - files of all versions, and the memory of versions up to 4: FILE_NAMES
#   - the memory of version 5: FILE_NAMES, but for the parts in MEMORY_5_NAMES
# In classifiers, "vit." precedes all names but classifier's; in files of version 5, only some.
# So when reading it is always taken off.

QKV = ("query", "key", "value")  # three tensors in transformers, one fused here

FILE_NAMES = {  # part of a name in the original release: the same part in files of transformers
    ".cls_token": ".embeddings.cls_token",
    ".mask_token": ".embeddings.mask_token",
    ".pos_embed": ".embeddings.position_embeddings",
    ".norm.": ".layernorm.",
    ".patch_embed.proj.": ".embeddings.patch_embeddings.projection.",
    ".blocks.": ".encoder.layer.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.query.": ".attention.attention.query.",
    ".attn.key.": ".attention.attention.key.",
    ".attn.value.": ".attention.attention.value.",
    ".attn.proj.": ".attention.output.dense.",  # before mlp.fc2, whose name is part of this one
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}

MEMORY_5_NAMES = {  # part of a name in the original release: in the memory of transformers 5
    ".blocks.": ".layers.",
    ".attn.query.": ".attention.q_proj.",
    ".attn.key.": ".attention.k_proj.",
    ".attn.value.": ".attention.v_proj.",
    ".attn.proj.": ".attention.o_proj.",
}


def rename(state: dict[str, Tensor], parts: dict[str, str]) -> dict[str, Tensor]:
    """Replace parts of names (old: new), one after the other; a dot is put before every name."""
    renamed = {}
    for name, value in state.items():
        name = f".{name}"
        for old, new in parts.items():
            name = name.replace(old, new)
        renamed[name[1:]] = value
    return renamed


def without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same weights, this prefix taken off the names that have it."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def without_projection_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's weights of an MSNEncoder: all but the projection head's."""
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def to_original(state: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """Our names -> those of the original release (vits16_800ep.pth.tar)."""
    state = {
        name.replace("patch_embed.", "patch_embed.proj."): value for name, value in state.items()
    }
    weight = state["patch_embed.proj.weight"]
    p = math.isqrt(weight.shape[1] // channels)
    state["patch_embed.proj.weight"] = weight.unflatten(1, (channels, p, p))
    return state


def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the original release -> ours. "module." before a name is taken off."""
    ours = {}
    for name, value in without_prefix(state, "module.").items():
        name = name.replace("patch_embed.proj.", "patch_embed.")
        ours[name] = value.flatten(1) if name == "patch_embed.weight" else value
    return ours


def to_transformers(state: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """Our names, of a backbone or a classifier -> those of transformers' files."""
    is_classifier = "vit.cls_token" in state
    state = without_prefix(without_projection_head(state), "vit.")

    split = {}
    for name, value in to_original(state, channels).items():
        if ".qkv." in name:
            for part, third in zip(QKV, value.chunk(3), strict=True):
                split[name.replace("qkv", part)] = third.contiguous()
        else:
            split[name] = value.contiguous()

    renamed = {}
    for name, value in rename(split, FILE_NAMES).items():
        if is_classifier and not name.startswith("classifier."):
            name = f"vit.{name}"
        renamed[name] = value
    return renamed


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of any layout of transformers -> ours. Names that no table has stay as they are."""
    state = without_prefix(state, "vit.")
    for names in (FILE_NAMES, MEMORY_5_NAMES):
        state = rename(state, {theirs: original for original, theirs in names.items()})

    for query_name in [name for name in state if ".attn.query." in name]:
        parts = [query_name.replace("query", part) for part in QKV]
        if all(part in state for part in parts):
            fused = torch.cat([state.pop(part) for part in parts])
            state[query_name.replace("query", "qkv")] = fused
    return from_original(state)


# ---- Reading weights -----------------------------------------------------------------------------

WEIGHT_FILES = (  # the first of these that a folder holds is read
    "checkpoint.pt",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_tensors(path: Path) -> dict:
    """The content of a file of weights. Nothing in it is ever executed.

    A .safetensors file, a torch file (read by weights_only=True), or an .index.json: then of all
    files that it names. Raises ValueError that names the file if it is damaged or holds more than
    plain values, FileNotFoundError, PermissionError, and ImportError without safetensors.
    """
    try:
        if path.name.endswith(".index.json"):
            return read_shards(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return read_torch_file(path)
    except (FileNotFoundError, PermissionError):
        raise
    except ImportError:
        raise ImportError(
            f"{path} needs a package: pip install safetensors, or use pytorch_model.bin."
        ) from None
    except Exception as error:  # parsers of damaged files raise every kind there is
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if reason.startswith("Weights only"):
            reason = "torch refuses to unpickle it"
        raise ValueError(
            f"{path} can't be read: {reason}. It may be damaged or hold more than plain data."
        ) from error


def read_shards(index: Path) -> dict:
    """The weights of all files that an .index.json names; they must lie beside it."""
    content = json.loads(index.read_text(encoding="utf-8"))
    weights = {}
    shards = sorted(set(content["weight_map"].values()))
    for shard in shards:
        if Path(shard).name != shard or shard.endswith(".json"):
            raise ValueError(f"it names {shard!r}, but only weight files beside the index are read")
    for shard in shards:
        weights |= read_tensors(index.parent / shard)
    return weights


def read_torch_file(path: Path) -> dict:
    """The dict in a file of torch.save. Raises whatever torch raises, or ValueError."""
    if zipfile.is_zipfile(path):  # torch.load does not look at checksums
        damaged = zipfile.ZipFile(path).testzip()
        if damaged:
            raise ValueError(f"its record {damaged} is damaged")

    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
    return content


def may_be_on_the_hub(name: str) -> bool:
    """Whether it looks like OWNER/MODEL, and not like a path into a folder that is here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).parent.is_dir()


HUB_WORDS = ("revision", "token", "cache_dir", "local_files_only")


def local_folder(name_or_path: str | os.PathLike, **hub_words) -> Path:
    """The folder itself, or the one into which huggingface_hub puts the model of that name.

    hub_words: HUB_WORDS, for huggingface_hub. Raises FileNotFoundError if there is no such folder
    and the hub does not give one, and ImportError without huggingface_hub.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)

    name = str(name_or_path)
    if not may_be_on_the_hub(name):
        raise FileNotFoundError(f"{name} is neither a file nor a folder.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{name} is no folder here. A model of the hub: pip install huggingface_hub, or put "
            "its config.json and model.safetensors (or pytorch_model.bin) there."
        ) from None
    wanted = ["config.json", "preprocessor_config.json", *WEIGHT_FILES, "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, **hub_words))
    except Exception as error:  # no such name, no connection, no permission: each has its own kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"{name} is neither a file nor a folder here, and the hub did not give it: {reason}"
        ) from error


def weight_file_of(name_or_path: str | os.PathLike, **hub_words) -> Path:
    """The file itself, or the file of weights in a folder or in a model of the hub."""
    path = Path(name_or_path)
    if path.is_file():
        return path

    folder = local_folder(name_or_path, **hub_words)
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}.")


def read_pretrained(
    name_or_path: str | os.PathLike, config: ViTMSNConfig | None, **hub_words
) -> tuple[ViTMSNConfig, dict]:
    """Config and weights, under our names, of whatever `model_from_pretrained` takes.

    The file's own config is not read if one is passed in.
    """
    path = weight_file_of(name_or_path, **hub_words)
    content = read_tensors(path)
    try:
        if isinstance(content.get("target_encoder"), dict):
            return from_pretraining_checkpoint(content, config)
        weights = {str(name): value for name, value in content.items()}
        config = config or config_beside(path, weights)
        return config, from_timm(from_transformers(weights))
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        # Something is not there, or is no tensor, or has another shape.
        raise ValueError(f"{path} holds no ViT that fits: {error}") from error


def from_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names are ours, but for the classifier's."""
    return {re.sub(r"^head\.", "classifier.", name): value for name, value in weights.items()}


def config_beside(path: Path, content: dict[str, Tensor]) -> ViTMSNConfig:
    """The config of a file of weights: config.json beside it or, without one (what Trainer saves)
    or with timm's, what the shapes tell.

    Warns of the number of heads, which no shape tells. Raises what from_pretrained does.
    """
    values = {}
    with suppress(OSError, ValueError):
        values = json.loads((path.parent / "config.json").read_bytes())
    is_timm = isinstance(values, dict) and "architecture" in values
    weights = from_timm(from_transformers(content))
    if (path.parent / "config.json").is_file() and not is_timm:
        return ViTMSNConfig.from_pretrained(path.parent)
    if "patch_embed.weight" not in weights:
        return ViTMSNConfig.from_pretrained(path.parent)  # raises FileNotFoundError

    convolution = content.get("patch_embed.proj.weight")
    channels = 3 if convolution is None else convolution.shape[1]
    labels = len(weights["classifier.weight"]) if "classifier.weight" in weights else 0
    config = infer_config(to_original(weights, channels), {"num_labels": labels})
    if is_timm:
        config.preprocessor = preprocessor_of_timm(values, config)
    warnings.warn(
        f"{path}: no config.json of ours; by the shapes, {config.num_attention_heads} heads, each "
        "64 wide. If that is wrong, pass config=.",
        stacklevel=5,
    )
    return config


def preprocessor_of_timm(values: dict, config: ViTMSNConfig) -> dict:
    """The preprocessor_config.json that says what timm's config.json does."""
    theirs = values.get("pretrained_cfg", values)
    preprocessor = default_preprocessor(config)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    for ours, name in (("image_mean", "mean"), ("image_std", "std")):
        if name in theirs:
            preprocessor[ours] = list(theirs[name])
    if theirs.get("interpolation") in filters:
        preprocessor["resample"] = int(filters[theirs["interpolation"]])
    return preprocessor


def from_pretraining_checkpoint(
    content: dict, config: ViTMSNConfig | None
) -> tuple[ViTMSNConfig, dict]:
    """Config and weights, of target encoder and prototypes, in an official file or one of ours."""
    parts = {**content["target_encoder"], "prototypes": content.get("prototypes")}
    weights = {}
    for name, value in parts.items():
        if isinstance(value, Tensor):
            weights[str(name).removeprefix("module.")] = value
    config = config or infer_config(weights, content.get("model_config", {}))
    return config, from_original(weights)


def infer_config(state: dict[str, Tensor], values: dict) -> ViTMSNConfig:
    """The config of weights under original names, by their shapes. `values` go before it.

    No shape tells the number of heads; those of the released models are all 64 wide.
    """
    width, channels, p, _ = state["patch_embed.proj.weight"].shape
    layers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    shapes = {
        "hidden_size": width,
        "num_attention_heads": max(width // 64, 1),
        "num_channels": channels,
        "num_hidden_layers": len(layers),
        "intermediate_size": len(state["blocks.0.mlp.fc1.weight"]),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "image_size": p * math.isqrt(state["pos_embed"].shape[1] - 1),
        "patch_size": p,
    }
    return ViTMSNConfig.from_dict({**shapes, **values})


# ---- Loading weights into models, and saving them ------------------------------------------------


def backbone_of(model: nn.Module) -> ViTMSNModel:
    """The backbone in a classifier, or the backbone itself."""
    return getattr(model, "vit", model)


LOAD_WORDS = (  # these mean nothing here
    "low_cpu_mem_usage",
    "use_safetensors",
    "trust_remote_code",
    "force_download",
    "proxies",
    "resume_download",
    "subfolder",
    "variant",
    "from_tf",
    "from_flax",
    "weights_only",
    "offload_folder",
    "offload_state_dict",
    "max_memory",
    "use_auth_token",
    "mirror",
    "return_dict",
)


def model_from_pretrained(
    cls: type[nn.Module],
    name_or_path: str | os.PathLike,
    *,
    config: ViTMSNConfig | None = None,
    torch_dtype: torch.dtype | str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | int | torch.device | dict | None = None,
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    **words,
) -> nn.Module:
    """A ViTMSNModel or ViTMSNForImageClassification with stored weights, in eval mode.

    name_or_path: a folder of transformers or timm, a name on the hub, or a pretraining checkpoint,
    an official .pth.tar or one of ours, of which the target encoder is taken.
    config: only needed for a file without one whose heads are not 64 wide.
    torch_dtype, or dtype: of the weights; None or "auto" means as stored.
    device_map: a device, or "auto": a GPU if there is one.
    ignore_mismatched_sizes: draw a new head for another number of classes.
    output_loading_info: return the model and a dict of missing, unexpected and mismatched names.
    words: any field of the config (with another image_size, positions are resampled), further
    arguments of `cls`, and HUB_WORDS; LOAD_WORDS are taken without effect.
    Raises FileNotFoundError, TypeError for other words, or ValueError that names weights that are
    missing or do not fit.
    """
    changes, words = split_keywords(words)
    parameters = inspect.signature(cls.__init__).parameters
    model_options = {name: words.pop(name) for name in list(words) if name in parameters}
    hub_words = {name: words.pop(name) for name in HUB_WORDS if name in words}
    own_names = tuple(entry.name for entry in fields(ViTMSNConfig))
    refuse_words(words, (*LOAD_WORDS, *HUB_WORDS, *own_names), model_from_pretrained)

    stored_config, weights = read_pretrained(name_or_path, config, **hub_words)
    changes = {name: value for name, value in changes.items() if value is not None}
    config = config_with(stored_config, changes)
    if config.grid_size != stored_config.grid_size:
        weights = resample_positions(weights, config)
        warnings.warn(
            f"{name_or_path}: positions resampled from {stored_config.image_size} to "
            f"{config.image_size} pixels",
            stacklevel=3,
        )

    check_size_of_model(config, weights, str(name_or_path))
    model = cls(config, **model_options)
    new = load_weights(model, weights, str(name_or_path), ignore_mismatched_sizes)
    model.name_or_path = str(name_or_path)

    dtype = torch_dtype or dtype or "auto"
    if dtype == "auto":
        dtype = weights["cls_token"].dtype
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    model = model.to(dtype).to(device_of(device_map)).eval()
    if output_loading_info:
        return model, loading_info(model, weights, new)
    return model


def check_size_of_model(config: ViTMSNConfig, weights: dict[str, Tensor], path: str) -> None:
    """Raise ValueError if a config asks for a model out of all proportion to the stored weights: to
    make it, only to see that they do not fit, could take all memory."""
    d = config.hidden_size
    of_a_layer = 4 * d * d + 2 * d * config.intermediate_size
    of_the_rest = config.grid_size**2 * d + config.num_labels * d
    of_the_rest += d * config.num_channels * config.patch_size**2
    wanted = config.num_hidden_layers * of_a_layer + of_the_rest
    stored = sum(x.numel() for x in weights.values() if isinstance(x, Tensor))
    if wanted > max(100 * stored, 10**8):
        raise ValueError(
            f"{path}: the config asks for {wanted:,} weights, and {stored:,} are there; "
            f"look at hidden_size={d}, intermediate_size={config.intermediate_size}, "
            f"num_hidden_layers={config.num_hidden_layers}, image_size={config.image_size}, "
            f"patch_size={config.patch_size}, num_channels={config.num_channels}."
        )


def device_of(device_map: str | int | torch.device | dict | None) -> torch.device | None:
    """The one device that a device_map names. Raises ValueError for a map to several."""
    if isinstance(device_map, dict):
        if len(set(device_map.values())) != 1:
            raise ValueError(f"device_map={device_map}: the whole model goes to one device.")
        (device_map,) = set(device_map.values())
    if device_map in ("auto", "balanced", "sequential"):
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    return None if device_map is None else torch.device(device_map)


def loading_info(model: nn.Module, weights: dict[str, Tensor], new: list[str]) -> dict:
    """What transformers calls the loading info. new: names that were drawn at random."""
    own = without_prefix(model.state_dict(), "vit.")
    return {
        "missing_keys": [name for name in new if name not in weights],
        "unexpected_keys": [name for name in weights if name not in own],
        "mismatched_keys": [name for name in new if name in weights],
        "error_msgs": [],
    }


class ClientMembers:
    """What clients ask of a model of transformers besides; it becomes part of PretrainedMixin."""

    config_class = ViTMSNConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vit"
    supports_gradient_checkpointing = True
    name_or_path = ""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def num_labels(self) -> int:
        return self.config.num_labels

    @property
    def base_model(self) -> ViTMSNModel:
        return backbone_of(self)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return backbone_of(self).gradient_checkpointing

    def get_input_embeddings(self) -> nn.Module:
        return backbone_of(self).patch_embed

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters hold; exclude_embeddings: without patch_embed's."""
        left_out = set()
        if exclude_embeddings:
            left_out = set(self.get_input_embeddings().parameters())
        count = 0
        for parameter in self.parameters():
            if parameter not in left_out and (parameter.requires_grad or not only_trainable):
                count += parameter.numel()
        return count

    def load_state_dict(self, state_dict: dict[str, Tensor], *arguments, **options):
        """As in torch; a state dict of transformers' class is converted to our names first."""
        names = [f".{name}" for name in state_dict]
        if any(name.endswith(".embeddings.cls_token") for name in names):
            prefix = "vit." if hasattr(self, "vit") else ""
            converted = {}
            for name, value in from_transformers(dict(state_dict)).items():
                is_head = name.startswith("classifier.")
                converted[name if is_head else f"{prefix}{name}"] = value
            state_dict = converted
        return nn.Module.load_state_dict(self, state_dict, *arguments, **options)


for name, member in vars(ClientMembers).items():
    if not name.startswith("__"):
        setattr(PretrainedMixin, name, member)


def load_into_pretraining(
    model: ViTMSNForPreTraining, name_or_path: str | os.PathLike
) -> list[str]:
    """Start both encoders of a pretraining model from stored weights. -> names that stay new.

    Takes what `model_from_pretrained` takes: a backbone alone, or with projection head and
    prototypes, which are used if they have this model's shapes. Positions are resampled.
    """
    _, weights = read_pretrained(name_or_path, model.config)
    prototypes = weights.pop("prototypes", None)
    weights = resample_positions(weights, model.config)
    own = model.anchor_encoder.state_dict()
    for name in own.keys() & weights.keys():
        if name.startswith("fc.") and weights[name].shape != own[name].shape:
            weights = without_projection_head(weights)
            break

    new = load_weights(model.anchor_encoder, weights, str(name_or_path), may_be_new=r"fc\.")
    model.target_encoder.load_state_dict(model.anchor_encoder.state_dict())

    # Prototypes mean nothing to another projection head.
    if prototypes is None or prototypes.shape != model.prototypes.shape or new:
        return [*new, "prototypes"]
    if not torch.isfinite(prototypes).all():
        raise ValueError(f"{name_or_path}: the prototypes are not finite.")
    model.prototypes.data.copy_(prototypes)
    return new


def resample_positions(weights: dict[str, Tensor], config: ViTMSNConfig) -> dict[str, Tensor]:
    """The weights with positions for config's grid of patches, if they were made for another."""
    with suppress(KeyError, IndexError, ValueError, ArithmeticError, RuntimeError):
        positions = weights["pos_embed"]
        if positions.shape[1] != 1 + config.grid_size**2:
            grid = (config.grid_size, config.grid_size)
            return {**weights, "pos_embed": interpolate_positions(positions, grid)}
    return weights  # also if there are no positions, or none of a square: load_weights says so


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    ignore_mismatched_sizes: bool = False,
    may_be_new: str = r"mask_token|classifier\.",
) -> list[str]:
    """Copy weights (our names, without "vit.") into the model. -> names that stay new.

    Warns of what stays new, and of weights that the model has no use for. Raises ValueError that
    begins with `source` and names weights that are not finite, or missing and not `may_be_new` (a
    regular expression), or wrongly shaped; ignore_mismatched_sizes lets these stay new.
    """
    own = without_prefix(model.state_dict(), "vit.")
    found = [name for name in weights if name in own]
    mismatched = [name for name in found if shape_of(weights[name]) != own[name].shape]
    fitting = [name for name in found if name not in mismatched]
    new = [name for name in own if name not in fitting]

    missing = []
    for name in new:
        if name not in mismatched and not re.match(may_be_new, name):
            missing.append(name)
    refuse_weights(source, "missing", missing)

    not_finite = [name for name in fitting if not torch.isfinite(weights[name]).all()]
    refuse_weights(source, "not finite", not_finite)

    if not ignore_mismatched_sizes:
        shapes = []
        for name in mismatched:
            stored = tuple(shape_of(weights[name]) or ())
            shapes.append(f"{name} {stored} instead of {tuple(own[name].shape)}")
        advice = " Use the matching config, or ignore_mismatched_sizes=True to draw them anew."
        refuse_weights(source, "wrongly shaped", shapes, advice)

    useless = []
    for name in weights:
        if name not in own and not re.match(r"fc\.|prototypes|classifier\.|mask_token", name):
            useless.append(name)
    caller = 4  # whoever called from_pretrained or load_pretrained
    if new:
        message = f"{source}: new, drawn at random: {', '.join(new)}"
        warnings.warn(message, stacklevel=caller)
    if useless:
        warnings.warn(f"{source}: not used: {', '.join(useless)}", stacklevel=caller)

    for name in fitting:
        own[name].copy_(weights[name].detach())
    return new


def shape_of(value) -> torch.Size | None:
    """The shape of a tensor; None of anything else that a file may hold."""
    return getattr(value, "shape", None)


def refuse_weights(source: str, problem: str, names: list[str], advice: str = "") -> None:
    """Raise ValueError that shows the first eight of these weights, if there are any."""
    if names:
        shown = ", ".join(names[:8])
        if len(names) > 8:
            shown += " ..."
        raise ValueError(f"{source}: {len(names)} weights are {problem}: {shown}.{advice}")


SAVE_WORDS = ("max_shard_size", "variant", "token", "save_peft_format", "save_original_format")


def save_model(
    model: nn.Module,
    folder: Path,
    *,
    state_dict: dict[str, Tensor] | None = None,
    is_main_process: bool = True,
    safe_serialization: bool = True,
    save_function: Callable | None = None,
    push_to_hub: bool = False,
    **words,
) -> None:
    """Write model.safetensors or, without that package, pytorch_model.bin; then config.json and
    preprocessor_config.json: the one that the config came with, or what `preprocess` does.

    state_dict: weights under our names to write in place of the model's own.
    is_main_process: False writes nothing. safe_serialization: False writes pytorch_model.bin,
    by save_function(weights, path) if there is one.
    words: SAVE_WORDS are taken without effect; the weights are always in one file.
    Raises ValueError for push_to_hub, and TypeError for other words.
    """
    refuse_words(words, SAVE_WORDS, save_model)
    if push_to_hub:
        raise ValueError(
            "push_to_hub is not done here; save, then huggingface_hub.upload_folder(repo_id=..., "
            "folder_path=...)."
        )
    if not is_main_process:
        return

    weights = model.state_dict() if state_dict is None else without_prefix(state_dict, "module.")
    weights = to_transformers(weights, model.config.num_channels)
    written = write_weights(folder, weights, safe_serialization, save_function)
    for name in WEIGHT_FILES:  # else the older ones of the two would be read
        if name not in (written, "checkpoint.pt"):
            (folder / name).unlink(missing_ok=True)

    dtype = next(model.parameters()).dtype
    values = {
        **model.config.to_dict(),
        "architectures": [type(model).__name__],
        "torch_dtype": str(dtype).removeprefix("torch."),  # the key that every version reads
    }
    values.pop("dtype", None)  # the same under its newer key, from a config.json that was read
    write_json(folder / "config.json", values)
    preprocessor = model.config.preprocessor
    if preprocessor is None:
        preprocessor = default_preprocessor(model.config)
    write_json(folder / "preprocessor_config.json", preprocessor)


def write_weights(
    folder: Path, weights: dict[str, Tensor], safely: bool, save_function: Callable | None
) -> str:
    """Write a file of weights that are named as in transformers. -> its name."""
    if safely:
        with suppress(ImportError):
            from safetensors.torch import save

            write_file(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
            return "model.safetensors"

    write = partial(save_function or torch.save, weights)
    write_file(folder / "pytorch_model.bin", write)
    return "pytorch_model.bin"


def refuse_words(words: dict, taken: tuple[str, ...], function: Callable) -> None:
    """Raise TypeError for a keyword that is not among those taken without effect.

    It names the nearest keyword of the function.
    """
    for word in words:
        if word in taken:
            continue
        known = [*inspect.signature(function).parameters, *taken]
        nearest = difflib.get_close_matches(word, known, n=1, cutoff=0)
        raise TypeError(f"{word}= is not known; did you mean {nearest[0]}=?")


# ---- Files ---------------------------------------------------------------------------------------


def write_file(path: Path, content: bytes | Callable) -> None:
    """Write bytes, or what content(file) writes, whole or not at all; make the folder if needed.

    If anything fails, a file of that name that was there before stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: dict) -> None:
    """Write a dict as JSON, whole or not at all."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    # A class named after a folder may be no UTF-8. Its bytes become escapes that JSON knows.
    write_file(path, text.encode(errors="backslashreplace"))


# ---- Pictures: from a file's values to 8-bit pixels ----------------------------------------------

Range = tuple[float, float]  # the values that become black and white
FROM_THE_VALUES: Range = (0.0, 0.0)  # a range that is still to be found, by find_range

# Ranges that files are meant in, as a rule, whatever their format says. 16-bit files often hold
# the 10, 12 or 14 bits of a camera.
INTEGER_RANGES = [(0, 2**bits - 1) for bits in (8, 10, 12, 14, 16)]
FLOAT_RANGES = [(0, 1), (-1, 1), (0, 255), (0, 65535)]

# What undoes each orientation that EXIF knows (tag 0x0112).
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PictureRules:
    """How the values of a picture become 8-bit pixels; the same for all pictures of a data set.

    The two ranges are for pictures of more than 8 bits: the values that become black and white.
    """

    background: str = "white"  # behind transparent pixels: a name, or #rrggbb
    integer_range: Range = FROM_THE_VALUES
    float_range: Range = FROM_THE_VALUES
    max_megapixels: float = 256.0  # larger files are not opened: they could fill the memory
    num_channels: int = 0  # 3: RGB, 1: grey, others: bands as the files have them; 0: found

    def __post_init__(self):
        try:
            ImageColor.getrgb(self.background)
        except (ValueError, AttributeError):
            raise ValueError(
                f"background={self.background!r} is no colour; use a name (white) or #rrggbb."
            ) from None
        for name in ("integer_range", "float_range"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"{name}={low} {high} must be two numbers, the lower one first.")

    @classmethod
    def from_config(cls, config: ViTMSNConfig) -> "PictureRules":
        """Those that the model was trained with, if its config tells them, else the defaults."""
        saved = config.extra.get("picture_rules", {})
        try:
            known = {f.name: saved[f.name] for f in fields(cls) if f.name in saved}
            known["num_channels"] = config.num_channels
            for name in ("integer_range", "float_range"):
                known[name] = tuple(map(float, known.get(name, FROM_THE_VALUES)))
            return cls(**known)
        except (TypeError, ValueError) as error:
            raise ValueError(f"picture_rules={saved!r} of config.json: {error}") from None

    def changes(self) -> dict:
        """What differs from the defaults, by name, for the `extra` of a config, which has
        num_channels of its own."""
        defaults = asdict(PictureRules(num_channels=self.num_channels))
        changed = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        return json.loads(json.dumps(changed))  # lists for pairs, as a config.json has them

    def completed(self, seen: Iterable["Seen"]) -> "PictureRules":
        """With what is still open found on some pictures, which count alike."""
        channels: list[int] = []
        samples: dict[str, list[np.ndarray]] = {"integer_range": [], "float_range": []}
        for num_channels, values in seen:
            channels.append(num_channels)
            if values is None:
                continue
            name = "float_range" if is_float(values) else "integer_range"
            finite = values[np.isfinite(values)]
            if finite.size and getattr(self, name) == FROM_THE_VALUES:
                shares = np.linspace(0, 1, 1001)
                samples[name].append(np.quantile(finite, shares, method="nearest"))

        found = {name: find_range(np.stack(parts)) for name, parts in samples.items() if parts}
        if channels and not self.num_channels:
            found["num_channels"] = max(channels, key=channels.count)  # the commonest
        return replace(self, **found)


class Values(NamedTuple):
    """What a file holds that Pillow does not give in full, or an array."""

    values: np.ndarray  # h w c
    are_colours: bool  # grey or RGB, perhaps with alpha behind; otherwise bands of any meaning
    orientation: int = 1  # by EXIF's numbers
    n_frames: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as an image of Pillow's has them."""
        height, width, _ = self.values.shape
        return width, height


class Seen(NamedTuple):
    """What a picture tells of the rules that its data set needs."""

    num_channels: int
    deep_values: np.ndarray | None  # those of its colours or bands, if they have more than 8 bits


class OtherChannels(ValueError):
    """A picture's channels can't be made the ones that are asked for."""


class MissingPackage(ImportError):
    """A file needs an optional package."""


class TooManyPixels(ValueError):
    """A picture is larger than PictureRules.max_megapixels."""


class PillowsGuards:
    """While pictures are read, by any number of threads: Pillow's own limit of pixels, which it
    does not name when it refuses a picture, is off, and so are its warnings of damaged metadata."""

    def __init__(self):
        self.lock = threading.Lock()
        self.readers = 0

    def __enter__(self):
        with self.lock:
            self.readers += 1
            if self.readers == 1:
                self.limit = Image.MAX_IMAGE_PIXELS
                Image.MAX_IMAGE_PIXELS = None
                self.quiet = warnings.catch_warnings()
                self.quiet.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *error):
        with self.lock:
            self.readers -= 1
            if self.readers == 0:
                self.quiet.__exit__(*error)
                Image.MAX_IMAGE_PIXELS = self.limit


pillows_guards = PillowsGuards()


@contextmanager
def open_picture(path: str | os.PathLike, rules: PictureRules) -> Iterator["Image.Image | Values"]:
    """A picture file, opened by Pillow, or its values where Pillow does not give all of them.

    Raises TooManyPixels, MissingPackage, or whatever Pillow and tifffile raise.
    """
    with pillows_guards:
        image = open_in_full(path)
        if image is None:
            yield read_values(path, rules)
            return
        with image:
            check_size(*image.size, rules)
            yield image


def check_size(width: int, height: int, rules: PictureRules) -> None:
    """Raise TooManyPixels for a picture that is larger than the limit."""
    megapixels = width * height / 1e6
    if megapixels > rules.max_megapixels:
        raise TooManyPixels(
            f"{width} x {height} are {megapixels:.3g} megapixels, above the limit "
            f"max_megapixels={rules.max_megapixels:g}; raise it if you trust the file"
        )


def orientation_of(picture: Image.Image | Values) -> int:
    """How the camera was held, by EXIF's numbers: 1 is upright, which is assumed if the EXIF data
    can't be parsed. Ask for it after the pixels: Pillow turns some formats itself."""
    if isinstance(picture, Values):
        return picture.orientation
    try:
        return picture.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # Pillow's parser raises every kind there is on damaged data
        return 1


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as it was seen when it was taken, from EXIF's number."""
    if orientation not in UPRIGHT:
        return image
    return image.transpose(UPRIGHT[orientation])


def is_deep(image: Image.Image) -> bool:
    """Whether its values are no bytes: 16 or 32 bits, signed or not, or floating-point numbers."""
    return image.mode.startswith("I") or image.mode == "F"


def is_float(values: np.ndarray) -> bool:
    """Whether these are floating-point numbers, of any width."""
    return np.issubdtype(values.dtype, np.floating)


def find_range(values: np.ndarray) -> Range:
    """Which values become black and white, if nobody says: the first of the usual ranges (0 to 255,
    0 to 1023, ..., or 0 to 1, -1 to 1, ...) that holds all values and of which they fill a quarter;
    else from the lowest to the highest value. A thousandth at either end does not count.

    values: numbers of any kind and shape, of one picture or of many.
    """
    usual_ranges = FLOAT_RANGES if is_float(values) else INTEGER_RANGES
    values = values[np.isfinite(values)].astype(np.float64)
    if values.size == 0:
        return (0.0, 1.0)
    low, high = np.quantile(values, (0.001, 0.999))
    if low == high:
        low = values.min()
        high = values.max()

    for usual_low, usual_high in usual_ranges:
        is_inside = usual_low <= low and high <= usual_high
        if is_inside and 4 * (high - low) >= usual_high - usual_low:
            return (float(usual_low), float(usual_high))
    return (float(low), float(high)) if high > low else (float(low), float(low) + 1)


def to_bytes(values: np.ndarray, rules: PictureRules) -> np.ndarray:
    """Values as 0 to 255, by the rules' range or, if they have none, by that of these values.

    What lies outside of it becomes black or white; what is no number becomes black. Bytes stay as
    they are.
    """
    if values.dtype == np.uint8:
        return values
    low, high = rules.float_range if is_float(values) else rules.integer_range
    if (low, high) == FROM_THE_VALUES:
        low, high = find_range(values)
    scaled = (values.astype(np.float64) - low) * 255 / (high - low)
    return np.nan_to_num(scaled.round(), nan=0).clip(0, 255).astype(np.uint8)


def to_layers(picture: Image.Image | Values, rules: PictureRules) -> list[Image.Image]:
    """The present frame of a picture in 8 bits: one image, RGB or grey, or an image of each band.

    Raises OtherChannels.
    """
    if isinstance(picture, Image.Image) and is_deep(picture):
        picture = Values(np.asarray(picture)[..., None], are_colours=True)
    if isinstance(picture, Image.Image):
        return colour_layers(picture, rules)
    if picture.are_colours:
        return colour_layers(colours_to_image(picture.values, rules), rules)

    num_bands = picture.values.shape[-1]
    if rules.num_channels not in (0, num_bands):
        refuse_channels(f"{num_bands} bands", num_bands, rules)
    return [Image.fromarray(to_bytes(band, rules)) for band in np.moveaxis(picture.values, -1, 0)]


def colours_to_image(values: np.ndarray, rules: PictureRules) -> Image.Image:
    """Grey or RGB of any depth, perhaps with alpha behind (h w c), in 8 bits."""
    num_colours = 3 if values.shape[-1] >= 3 else 1
    bands = [to_bytes(values[..., :num_colours], rules)]
    if values.shape[-1] > num_colours:
        alpha = values[..., num_colours:]
        full = 1.0 if is_float(alpha) else np.iinfo(alpha.dtype).max  # whatever range colours use
        bands.append(to_bytes(alpha, PictureRules(integer_range=(0, full), float_range=(0, full))))
    picture = np.concatenate(bands, axis=-1)
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def colour_layers(image: Image.Image, rules: PictureRules) -> list[Image.Image]:
    """to_layers of an 8-bit image in grey or colours: RGB, or grey for one channel, on the
    background where it is transparent; or colours and alpha as bands, if so many are asked for.

    Departure: data sets are usually read by Image.convert("RGB"), as torchvision's are, which drops
    the alpha channel: what is drawn in it alone is lost. (So does the load_image of transformers,
    by which its image processors read paths. Given a PIL image or an array, they keep four
    channels, and composite on white if do_convert_rgb is set.)
    """
    is_transparent = image.has_transparency_data
    if rules.num_channels in (0, 1, 3):
        if is_transparent:
            background = Image.new("RGBA", image.size, rules.background)
            image = Image.alpha_composite(background, image.convert("RGBA"))
        return [image.convert("L" if rules.num_channels == 1 else "RGB")]

    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if is_transparent:
        mode += "A"
    if len(mode) != rules.num_channels:
        refuse_channels(f"{len(mode)} channels ({mode})", 3, rules)
    return list(image.convert(mode).split())


def refuse_channels(seen: str, would_do: int, rules: PictureRules) -> None:
    """Raise OtherChannels, which says what would have to be given."""
    raise OtherChannels(
        f"a picture has {seen}, num_channels={rules.num_channels}; give pictures of "
        f"{rules.num_channels} channels, or num_channels={would_do}"
    )


def is_of_one_colour(layers: list[Image.Image]) -> bool:
    """Whether all pixels of an 8-bit picture are the same."""
    for layer in layers:
        extrema = layer.getextrema()
        bands = [extrema] if layer.mode == "L" else extrema
        if any(low != high for low, high in bands):
            return False
    return True


def first_frame(picture: Image.Image | Values, rules: PictureRules) -> list[Image.Image]:
    """The first frame or page that is not of one colour, by to_layers; if all are, the first one.

    The image is left at that frame. (What a JPEG has beside its picture are no pages, and Values
    are of the right one.)
    """
    if isinstance(picture, Values):
        return to_layers(picture, rules)
    start = picture.tell()
    first = to_layers(picture, rules)
    if picture.format in ("JPEG", "MPO") or not is_of_one_colour(first):
        return first

    for number in range(start + 1, getattr(picture, "n_frames", 1)):
        picture.seek(number)
        frame = to_layers(picture, rules)
        if not is_of_one_colour(frame):
            return frame
    picture.seek(start)
    return first


def upright_layers(picture: Image.Image | Values, rules: PictureRules) -> list[Image.Image]:
    """first_frame as it was seen when it was taken. An image is left at the frame at which it
    was."""
    start = picture.tell() if isinstance(picture, Image.Image) else 0
    layers = first_frame(picture, rules)
    orientation = orientation_of(picture)
    if isinstance(picture, Image.Image):
        picture.seek(start)
    return [turn_upright(layer, orientation) for layer in layers]


def look_at(picture: Image.Image | Values) -> Seen:
    """What a picture tells of the rules that its data set needs. (Grey ones go with RGB.)"""
    if isinstance(picture, Image.Image):
        return Seen(3, np.asarray(picture) if is_deep(picture) else None)
    values = picture.values
    num_channels = values.shape[-1]
    if picture.are_colours:
        values = values[..., : 3 if num_channels >= 3 else 1]
        num_channels = 3
    return Seen(num_channels, None if values.dtype in (np.uint8, np.bool_) else values)


# ---- Files that Pillow does not give in full: arrays, 16-bit colours, bands that are no colours --

NPY_HEAD = b"\x93NUMPY"
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Numbers of the TIFF format: tags, and some of their values.
BITS_PER_SAMPLE = 258
COMPRESSION = 259
TIFF_UNCOMPRESSED = 1
PHOTOMETRIC = 262
TIFF_GREY = (0, 1)  # white is 0, or black is
TIFF_RGB = 2
SAMPLES_PER_PIXEL = 277
EXTRA_SAMPLES = 338  # what each band behind the colours is
TIFF_ALPHA = ((1,), (2,))
SAMPLE_FORMAT = 339
TIFF_UNSIGNED = 1
TIFF_SIGNED = 2


def open_in_full(path: str | os.PathLike) -> Image.Image | None:
    """A file opened by Pillow; None if it does not know the file, or would give a part of it."""
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        return None
    is_whole = True
    if image.format == "PNG":
        is_whole = not has_16_bit_colours(image)
    elif image.format == "TIFF":
        is_whole = pillow_reads_all(image)
    if is_whole:
        return image
    image.close()
    return None


def read_values(path: str | os.PathLike, rules: PictureRules) -> Values:
    """The values of a file that Pillow does not give in full.

    Raises UnidentifiedImageError, TooManyPixels, MissingPackage, or ValueError for a .npy file that
    is no picture.
    """
    with open(path, "rb") as file:
        head = file.read(8)
    if head.startswith(NPY_HEAD):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return array_values(array, rules)
    if head.startswith(PNG_HEAD):
        return png_values(path, rules)
    if head.startswith(TIFF_HEADS):
        return tiff_values(path, rules)
    raise UnidentifiedImageError(f"cannot identify image file {str(path)!r}")


def array_values(array: np.ndarray, rules: PictureRules) -> Values:
    """An array h w, h w c or c h w as a picture.

    The channels are the axis, the last one or the first, that has as many as are asked for; as
    colours have (1, 3 or 4), if colours or nothing are asked for; else the shorter one of the two.
    Raises ValueError for other arrays.
    """
    if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "biuf":
        raise ValueError(
            f"an array of shape {array.shape} and type {array.dtype} is no picture; use numbers "
            "h w, h w c or c h w."
        )
    if array.ndim == 2:
        array = array[..., None]
    wanted = rules.num_channels
    fitting = (1, 3, 4) if wanted in (0, 1, 3) else (wanted,)
    first, _, last = array.shape
    if last not in fitting and (first in fitting or first < last):
        array = np.moveaxis(array, 0, -1)

    height, width, num_channels = array.shape
    check_size(width, height, rules)
    values = np.ascontiguousarray(array)
    if values.dtype == np.bool_:
        values = values * np.uint8(255)
    is_rgba = num_channels == 4 and wanted in (1, 3)  # else nothing says that the fourth is alpha
    return Values(values, are_colours=num_channels in (1, 3) or is_rgba)


def has_16_bit_colours(image: Image.Image) -> bool:
    """Whether a PNG has 16-bit colours, of which Pillow gives the high bytes alone. (It may do so
    for an animated one.)"""
    if image.mode not in ("RGB", "RGBA") or getattr(image, "n_frames", 1) > 1:
        return False
    return any(packing.endswith("16B") for _, _, _, packing in image.tile)


def png_values(path: str | os.PathLike, rules: PictureRules) -> Values:
    """A PNG of 16-bit colours.

    The trick: told that the two bytes of each number are the other way round, Pillow gives the low
    ones. Grey and alpha are four bytes a pixel, which it gives as if they were RGBA.
    """
    halves = []
    for order in ("B", "L"):
        with Image.open(path) as image:
            check_size(*image.size, rules)
            codec, extents, offset, packing = image.tile[0]
            is_grey = packing == "LA;16B"
            packing = "RGBA" if is_grey else f"{image.mode};16{order}"
            image.tile = [(codec, extents, offset, packing)]
            halves.append(np.asarray(image).astype(np.uint16))
            orientation = orientation_of(image)
            transparent = image.info.get("transparency")

    high, low = halves
    if is_grey:
        high, low = high[..., ::2], high[..., 1::2]
    values = 256 * high + low
    if transparent:  # a colour, in place of an alpha channel
        is_seen = (values != transparent).any(axis=-1)
        values = np.dstack([values, is_seen * np.uint16(65535)])
    return Values(values, are_colours=True, orientation=orientation)


def pillow_reads_all(image: Image.Image) -> bool:
    """Whether Pillow gives all that the first page of a TIFF holds.

    It drops the low half of 16-bit colours and bands beyond alpha, and mistakes the sign of some
    whole numbers and the order of bytes where signed and real numbers are compressed. (The colours
    of printers, in 8 bits, are left to it.)
    """
    tags = image.tag_v2
    photometric = tags.get(PHOTOMETRIC, 0)
    num_bands = tags.get(SAMPLES_PER_PIXEL, 1)
    others = tags.get(EXTRA_SAMPLES, ())
    bits = max(tags.get(BITS_PER_SAMPLE, (1,)))
    kind = tags.get(SAMPLE_FORMAT, (TIFF_UNSIGNED,))[0]

    if photometric not in (*TIFF_GREY, TIFF_RGB):
        return True
    if num_bands > 1:
        return bits <= 8 and are_grey_or_rgb(photometric, num_bands, others)
    is_mistaken = (kind, bits) in ((TIFF_SIGNED, 8), (TIFF_UNSIGNED, 32))
    is_compressed = tags.get(COMPRESSION, TIFF_UNCOMPRESSED) != TIFF_UNCOMPRESSED
    is_swapped = kind != TIFF_UNSIGNED and is_compressed and tags.prefix == b"MM"
    return not is_mistaken and not is_swapped


def are_grey_or_rgb(photometric: int, num_bands: int, others: tuple[int, ...]) -> bool:
    """Whether the bands of a TIFF are grey or RGB, perhaps with one of alpha behind.

    others: what the file says that the bands behind are; nothing of one behind RGB means alpha.
    """
    num_colours = 3 if photometric == TIFF_RGB else 1
    is_alpha = others in TIFF_ALPHA or (photometric == TIFF_RGB and not others)
    return num_bands == num_colours or (num_bands == num_colours + 1 and is_alpha)


def tiff_values(path: str | os.PathLike, rules: PictureRules) -> Values:
    """The first page of a TIFF that is not of one value, read by the optional package tifffile.

    Raises MissingPackage, TooManyPixels, or whatever tifffile raises.
    """
    try:
        import tifffile
    except ImportError:
        raise MissingPackage(
            "Pillow does not read all of this TIFF, but tifffile may: pip install tifffile"
        ) from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong is raised, too

    with tifffile.TiffFile(path) as file:
        for page in file.pages:
            check_size(page.imagewidth, page.imagelength, rules)
        page, values = first_tiff_page(file)
        others = tuple(page.extrasamples)
        are_colours = are_grey_or_rgb(page.photometric, values.shape[-1], others)
        orientation = page.tags.valueof(EXIF_ORIENTATION, 1)
        return Values(values, are_colours, orientation, len(file.pages))


def first_tiff_page(file) -> tuple:
    """The first page of a tifffile.TiffFile that is not of one value, and its values; if all are,
    the first one."""
    for page in file.pages:
        values = tiff_page_values(page)
        if (values != values[0, 0]).any():
            return page, values
    page = file.pages[0]
    return page, tiff_page_values(page)


def tiff_page_values(page) -> np.ndarray:
    """The values of a tifffile.TiffPage, h w c.

    Raises ValueError for what is neither grey nor RGB nor bands, and MissingPackage.
    """
    is_known = page.photometric in (*TIFF_GREY, TIFF_RGB)
    if not is_known or page.axes not in ("YX", "YXS", "SYX"):
        raise ValueError(
            f"a TIFF of {page.photometric.name}, axes {page.axes}, is not known here; save it as "
            "grey, RGB or bands, h w c"
        )
    try:
        values = page.asarray(maxworkers=1)
    except (ValueError, KeyError, ImportError) as error:
        if "imagecodecs" not in str(error):
            raise
        raise MissingPackage(
            f"tifffile needs another package for this TIFF: pip install imagecodecs ({error})"
        ) from None

    if page.axes == "YX":
        return values[..., None]
    if page.axes == "SYX":  # band by band
        return np.moveaxis(values, 0, -1)
    return values


# ---- Preprocessing -------------------------------------------------------------------------------

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green and blue, in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


@cache
def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, made once for each device: to copy them there, the host has to wait."""
    with torch.inference_mode(False):  # else what evaluation made could not be used in training
        return torch.tensor(values, dtype=dtype, device=device)


def imagenet_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel; for what is not RGB, the means of the three."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    mean = sum(IMAGENET_MEAN) / 3
    std = sum(IMAGENET_STD) / 3
    return (mean,) * channels, (std,) * channels


def standardize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(pixels - mean) / std of each channel. pixels: ... c height width."""
    mean = constant(mean, pixels.dtype, pixels.device).reshape(-1, 1, 1)
    std = constant(std, pixels.dtype, pixels.device).reshape(-1, 1, 1)
    return torch.addcmul(-mean / std, pixels, 1 / std)  # in one pass over the pixels


def normalize(pixels: Tensor) -> Tensor:
    """From [0, 1] to mean 0 and standard deviation 1 on ImageNet. pixels: ... c height width."""
    return standardize(pixels, *imagenet_statistics(pixels.shape[-3]))


@dataclass(frozen=True)
class Preprocessor:
    """What a preprocessor_config.json says: its words, and transformers' defaults for those that
    it leaves out (ViTImageProcessor's, which are not ImageNet's statistics).

    Raises ValueError for a value that means nothing here.
    """

    do_resize: bool = True
    size: tuple[int, int] = (224, 224)  # height, width
    resample: int = Image.Resampling.BILINEAR
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.5,)  # of each channel, or one for all
    image_std: tuple[float, ...] = (0.5,)

    @classmethod
    def from_config(cls, config: ViTMSNConfig) -> "Preprocessor":
        """That of the folder from which the config came, or else the default."""
        values = config.preprocessor
        if values is None:
            values = default_preprocessor(config)
        try:
            return cls.from_dict(values, config.num_channels)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"preprocessor_config.json asks for what is not done here: {error}. Change it, set "
                "config.preprocessor = None for the default, or make the pixel values yourself."
            ) from error

    @classmethod
    def from_dict(cls, values: dict, channels: int) -> "Preprocessor":
        """From the content of the file. Raises KeyError, TypeError or ValueError."""
        refuse_other_processing(values)
        found = {entry.name: values[entry.name] for entry in fields(cls) if entry.name in values}
        if "size" in found:
            found["size"] = height_and_width(found["size"])
        if found.get("resample", 2) not in list(Image.Resampling):
            raise ValueError(f"resample={found['resample']!r} is no filter of Pillow")

        for name in ("image_mean", "image_std"):
            found[name] = value_of_each_channel(name, values.get(name, 0.5), channels)
        if not is_number(found.get("rescale_factor", 1)):
            raise ValueError(f"rescale_factor={found['rescale_factor']!r} is no number")
        return cls(**found)

    def normalize(self, pixels: Tensor) -> Tensor:
        """(pixels - mean) / std, as far as it is asked for. pixels: ... c height width."""
        if not self.do_normalize:
            return pixels
        return standardize(pixels, self.image_mean, self.image_std)

    def not_statistics(self, config: ViTMSNConfig) -> list[str]:
        """Whatever else than mean and deviation differs from the default, as name=value."""
        default = Preprocessor.from_dict(default_preprocessor(config), config.num_channels)
        changed = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            is_statistic = entry.name in ("image_mean", "image_std")
            if not is_statistic and value != getattr(default, entry.name):
                changed.append(f"{entry.name}={value}")
        return changed


IMAGE_PROCESSORS = ("ViTImageProcessor", "ViTImageProcessorFast", "ViTImageProcessorPil")
EXTRACTORS = ("ViTFeatureExtractor",)  # what the processor was called in old files


def refuse_other_processing(values: dict) -> None:
    """Raise ValueError for a processor of another kind, or a step that is not done here."""
    kind = values.get("image_processor_type") or values.get("feature_extractor_type")
    if kind not in (None, *IMAGE_PROCESSORS, *EXTRACTORS):
        raise ValueError(f"image_processor_type={kind!r}, and only ViTImageProcessor is known")

    known = {entry.name for entry in fields(Preprocessor)} | {"do_convert_rgb"}  # always done
    for name, value in values.items():
        if name.startswith("do_") and name not in known and value:
            raise ValueError(f"{name}={value!r}")


def is_number(value) -> bool:
    """Whether this is a number that a float can hold: not True, nan, infinity or 10**400."""
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float64).max


def height_and_width(size: int | dict) -> tuple[int, int]:
    """A processor's size: one number, or height and width. Raises ValueError for other kinds."""
    if type(size) is int:
        size = {"height": size, "width": size}
    if not isinstance(size, dict) or not {"height", "width"} <= size.keys():
        raise ValueError(f"size={size!r}, and only height and width are known")
    for side in (size["height"], size["width"]):
        if type(side) is not int or side < 1:
            raise ValueError(f"size={size!r} must be whole numbers of at least 1")
    return size["height"], size["width"]


def value_of_each_channel(name: str, values: list | float, channels: int) -> tuple[float, ...]:
    """image_mean or image_std: a number for each channel, or one for all. Raises ValueError."""
    if not isinstance(values, list):
        values = [values]
    if len(values) not in (1, channels) or not all(map(is_number, values)):
        raise ValueError(f"{name}={values} must be {channels} numbers, one for each channel")
    if name == "image_std" and 0 in values:
        raise ValueError(f"image_std={values} has a 0")
    return tuple(values)


def default_preprocessor(config: ViTMSNConfig) -> dict:
    """The preprocessor_config.json of what `preprocess` does for a model without one."""
    mean, std = imagenet_statistics(config.num_channels)
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_processor_type": "ViTImageProcessor",
        "image_std": list(std),
        "resample": int(Image.Resampling.BILINEAR),
        "rescale_factor": 1 / 255,
        "size": {"height": config.image_size, "width": config.image_size},
    }


def with_image_size(config: ViTMSNConfig, image_size: int) -> ViTMSNConfig:
    """The config for images of another size, to which its preprocessor resizes them, too."""
    preprocessor = config.preprocessor
    if preprocessor is not None and image_size != config.image_size:
        preprocessor = {**preprocessor, "size": {"height": image_size, "width": image_size}}
    return replace(config, image_size=image_size, preprocessor=preprocessor)


def preprocess(
    images,
    config: ViTMSNConfig,
    protocol: str = "squash",
    rules: PictureRules | None = None,
) -> Tensor:
    """Pictures, one or a list, to pixel values. -> b c image_size image_size.

    A picture is a path, a PIL image, a numpy array (h w, h w c or c h w) or a tensor (h w, c h w).
    A path gives all of a file: Pillow drops bands beyond four and the low half of 16-bit colours.
    More than 8 bits and transparent pixels are treated by `rules`, or by the `picture_rules` of the
    config, as in the model's training; ranges that are not among them are found on these pictures.
    "squash" resizes both sides to image_size, whatever the picture's proportions.
    "center-crop" resizes the shorter side to 256/224 of it and cuts out the middle.
    Both are bilinear and normalise by ImageNet's statistics, unless the model came with a
    preprocessor_config.json: then its numbers count. Raises ValueError for what can't be done of
    it, for any other protocol, or without images, and OSError for a file that can't be read.
    Departure: the paper evaluates by "center-crop"; the default is that of transformers.
    """
    images = list_pictures(images)
    if protocol not in ("squash", "center-crop") or not images:
        raise ValueError(
            f"{len(images)} images, protocol={protocol!r}: pass at least one, 'squash' or "
            "'center-crop'."
        )

    rules = rules or PictureRules.from_config(config)
    rules = replace(rules, num_channels=config.num_channels)
    seen = []
    for picture in images:
        with opened(picture, rules) as image:
            seen.append(look_at(image))
    rules = rules.completed(seen)

    preprocessor = Preprocessor.from_config(config)
    batch = []
    for picture in images:
        with opened(picture, rules) as image:
            layers = upright_layers(image, rules)
        layers = [to_size(layer, preprocessor, protocol) for layer in layers]
        pixels = np.dstack([np.asarray(layer) for layer in layers])
        batch.append(torch.from_numpy(pixels).permute(2, 0, 1))

    shapes = {pixels.shape for pixels in batch}
    if len(shapes) > 1:  # only if do_resize is off
        sizes = ", ".join(f"{height} x {width}" for _, height, width in sorted(shapes))
        raise ValueError(
            f"preprocessor_config.json has do_resize off, and the pictures are {sizes} pixels; "
            "resize them to one size."
        )
    pixels = torch.stack(batch).float()
    if preprocessor.do_rescale:
        pixels = pixels * preprocessor.rescale_factor
    return preprocessor.normalize(pixels)


def to_size(image: Image.Image, preprocessor: Preprocessor, protocol: str) -> Image.Image:
    """The picture at the preprocessor's size, squashed or its middle."""
    if not preprocessor.do_resize:
        return image
    height, width = preprocessor.size
    if protocol == "squash":
        return image.resize((width, height), preprocessor.resample)
    return center_crop(image, height, width, preprocessor.resample)


def list_pictures(images) -> list:
    """A list of what preprocess takes. Raises ValueError for what is no picture."""
    is_array = isinstance(images, (np.ndarray, Tensor))
    if isinstance(images, (str, os.PathLike, Image.Image)) or (is_array and images.ndim < 4):
        images = [images]
    images = list(images)
    for picture in images:
        if not isinstance(picture, (str, os.PathLike, Image.Image, np.ndarray, Tensor)):
            raise ValueError(
                f"a picture is a path, a PIL image, an array or a tensor, not {type(picture)}."
            )
    return images


@contextmanager
def opened(picture, rules: PictureRules) -> Iterator[Image.Image | Values]:
    """What preprocess takes, as open_picture gives it."""
    if isinstance(picture, (str, os.PathLike)):
        with errors_in_words(picture), open_picture(picture, rules) as file:
            yield file
    elif isinstance(picture, Image.Image):
        yield picture
    else:
        if isinstance(picture, Tensor):
            picture = picture.detach().cpu().numpy()
        yield array_values(picture, rules)


@contextmanager
def errors_in_words(path: str | os.PathLike) -> Iterator[None]:
    """Errors in reading this file name it and say what to do. Their classes stay."""
    try:
        yield
    except FileNotFoundError:
        start = "" if Path(path).is_absolute() else f" from the current folder {Path.cwd()}"
        raise FileNotFoundError(f"{path} is not found{start}; check the path.") from None
    except UnidentifiedImageError:
        raise UnidentifiedImageError(
            f"{path} is no picture that Pillow knows; pass a picture file such as a JPEG or PNG."
        ) from None
    except OSError as error:
        if Path(path).is_dir():
            raise IsADirectoryError(
                f"{path} is a folder; pass a list of the pictures in it, such as "
                f"sorted(Path({str(path)!r}).glob('*.jpg'))."
            ) from None
        if error.strerror:  # of the system: permission denied, too many open files, ...
            raise
        raise OSError(f"{path} is damaged: {error}. Leave it out, or replace it.") from error


def center_crop(image: Image.Image, height: int, width: int, resample: int) -> Image.Image:
    """The middle height x width pixels of the picture, resized to 256/224 of the size at which it
    would just cover them."""
    scale = 256 / 224 * max(height / image.height, width / image.width)
    whole_width = max(width, round(image.width * scale))
    whole_height = max(height, round(image.height * scale))
    left = (whole_width - width) // 2
    top = (whole_height - height) // 2
    image = image.resize((whole_width, whole_height), resample)
    return image.crop((left, top, left + width, top + height))


# ---- Worked example: python vitmsn.py ------------------------------------------------------------
# Numbers for pencil and paper. The prototypes are the axes and the vectors have whole lengths, so a
# cosine is a coordinate divided by the length. This tau makes exp(cosine / tau) = 2^(3 cosine).
EXAMPLE_PROTOTYPES = torch.eye(3, dtype=torch.float64)
EXAMPLE_ANCHORS = torch.tensor([[2, 1, -2], [4, 4, 2]], dtype=torch.float64)
EXAMPLE_TARGETS = torch.tensor([[3, 0, 0], [2, 2, 1]], dtype=torch.float64)
EXAMPLE_TEMPERATURE = 1 / (3 * math.log(2))
EXAMPLE_SHARPENING = 0.5  # p^(1 / T) is p squared
EXAMPLE_SINKHORN_ITERATIONS = 3

SHAPE_LETTERS = {  # the steps of a view, in order; r = n where no patch is dropped
    "pixels": "b c height width",
    "patches": "b n (c p p)",
    "patches to keep": "b r (c p p)",
    "tokens": "b (1 + r) d",
    "attention": "b h (1 + r) (1 + r)",
    "class token": "b d",
    "projection": "b e",
    "assignments": "b k",
}


def worked_example() -> None:
    """Print the shapes on their way, the loss of two images by hand, and what each part is for."""
    show_shapes()
    show_loss_by_hand()
    show_variants()


# Part 1: the shapes
@torch.no_grad()
def show_shapes() -> None:
    """The shapes of two images in ViT-S/16, for a target view, a random view and a focal view."""
    torch.manual_seed(0)
    config = ViTMSNConfig.preset("small-16", num_hidden_layers=2)  # 12 layers have the same shapes
    model = ViTMSNForPreTraining(config)

    images = torch.rand(2, 3, 256, 256)
    target_view = images[:, :, :224, :224]
    random_view = images[:, :, 32:, 32:]
    focal_view = images[:, :, 80:176, 80:176]

    num_patches = config.grid_size**2
    generator = torch.Generator().manual_seed(0)
    patches_to_keep = sample_patches_to_keep(2, num_patches, mask_ratio=0.15, generator=generator)

    columns = [
        follow_view(model.target_encoder, model.prototypes, target_view, None),
        follow_view(model.anchor_encoder, model.prototypes, random_view, patches_to_keep),
        follow_view(model.anchor_encoder, model.prototypes, focal_view, None),
    ]
    out = model(target_view, [random_view, focal_view], [patches_to_keep, None])
    log_k = math.log(len(model.prototypes))

    print("1  THE WAY OF THE SHAPES: ViT-S/16, b = 2 images, v = 2 anchor views")
    print("c = 3 channels, p = 16 pixels, n = (224 / 16)^2 = 196, focal (96 / 16)^2 = 36,")
    print("r = floor(0.85 n) = 166 (15 % masked), d = 384, h = 6, e = 256, k = 1024.")
    print_columns("", "", ["target view", "random view", "focal view"])
    for name, letters in SHAPE_LETTERS.items():
        shapes = [" ".join(map(str, tensors[name].shape)) for tensors in columns]
        print_columns(name, letters, shapes)
    untrained = f"{out.loss:.2f}, near log k = {log_k:.2f}: still a guess"
    print_columns("loss", "(v b) k, b k -> 1", [untrained])


def follow_view(
    encoder: MSNEncoder, prototypes: Tensor, view: Tensor, patches_to_keep: Tensor | None
) -> dict[str, Tensor]:
    """One view on its way from pixels to assignments: a tensor for each name of SHAPE_LETTERS."""
    how = {"patches_to_keep": patches_to_keep, "interpolate_pos_encoding": True}
    patches = patchify(view, encoder.config.patch_size)
    backbone = ViTMSNModel.forward(encoder, view, output_attentions=True, **how)
    projection = encoder([view], [patches_to_keep])[0]

    return {
        "pixels": view,
        "patches": patches,
        "patches to keep": take_patches(patches, patches_to_keep),
        "tokens": encoder.embed(view, **how),
        "attention": backbone.attentions[0],
        "class token": encoder.representation(view, **how),
        "projection": projection,
        "assignments": log_assign(projection, prototypes, temperature=0.1),
    }


def print_columns(name: str, letters: str, columns: list[str]) -> None:
    """A line of the table of shapes."""
    cells = "".join(f"{cell:14}" for cell in columns)
    print(f"{name:16}{letters:22}{cells}".rstrip())


# Part 2: the loss by hand
def show_loss_by_hand() -> None:
    """Equation (1) for two images and three prototypes, step by step."""
    log_p = log_assign(EXAMPLE_ANCHORS, EXAMPLE_PROTOTYPES, EXAMPLE_TEMPERATURE)
    log_p_target = log_assign(EXAMPLE_TARGETS, EXAMPLE_PROTOTYPES, EXAMPLE_TEMPERATURE)

    rounds = [sharpen(log_p_target, EXAMPLE_SHARPENING)]
    for _ in range(EXAMPLE_SINKHORN_ITERATIONS):
        rounds.append(sinkhorn(rounds[-1], iterations=1))
    p_plus = rounds[-1].exp()

    print("\n2  THE LOSS BY HAND: two images, one anchor view each, three prototypes")
    print("q1 = (1 0 0), q2 = (0 1 0), q3 = (0 0 1). p = exp(cos / tau) / their sum, and")
    print(
        f"tau = 1 / (3 log 2) = {EXAMPLE_TEMPERATURE:.2f} (paper: 0.1): exp(cos / tau) = 2^(3 cos)."
    )
    print("Only directions count (anchor 2 is longer). Rounding may move the last digit.")
    print("           vector      cos q1    q2     q3    exp(cos / tau)   p1    p2    p3")
    show_assignments("anchor", EXAMPLE_ANCHORS, log_p)
    show_assignments("target", EXAMPLE_TARGETS, log_p_target)

    show_sharpening(log_p_target, rounds[0])
    show_sinkhorn(torch.stack(rounds).exp())
    show_cross_entropy(log_p, p_plus)
    show_me_max(log_p)
    show_loss()


def show_assignments(name: str, vectors: Tensor, log_p: Tensor) -> None:
    """From vectors to assignments, a line for each image. vectors: b e, log_p: b k."""
    cosines = F.cosine_similarity(vectors[:, None], EXAMPLE_PROTOTYPES, dim=-1)
    powers = (cosines / EXAMPLE_TEMPERATURE).exp()

    for i in range(len(vectors)):
        vector = numbers(vectors[i], "3.0f")
        cosine = numbers(cosines[i], "6.3f")
        power = numbers(powers[i], "4.4g")
        p = numbers(log_p[i].exp())
        print(f"{name} {i + 1} {vector}   {cosine}   {power}   {p}")


def show_sharpening(log_p: Tensor, log_p_plus: Tensor) -> None:
    """Before and after the sum to 1 is restored. log_p, log_p_plus: b k."""
    print(
        f"\nSharpen the targets: p+ = p^(1 / T) / their sum, T = {EXAMPLE_SHARPENING} (paper: 0.25)"
    )
    for i in range(len(log_p)):
        powers = (log_p[i] / EXAMPLE_SHARPENING).exp()
        p_plus = numbers(log_p_plus[i].exp())
        print(f"target {i + 1}   p^2 {numbers(powers)}   sum {powers.sum():.3f}   p+ {p_plus}")


def show_sinkhorn(p_plus: Tensor) -> None:
    """The targets before Sinkhorn and after each of its rounds. p_plus: (1 + rounds) b k."""
    shares = zip(p_plus[0, 0], p_plus[0].sum(dim=0), strict=True)
    quotients = " : ".join(f"{p:.3f}/{column_sum:.3f}" for p, column_sum in shares)
    after = " : ".join(f"{p:.2f}" for p in p_plus[1, 0])

    print("\nSinkhorn: divide columns by their sums, then rows. Columns tend to b / k = 0.67")
    print("             sharpened        round 1          round 2          round 3")
    print("target 1     " + "   ".join(numbers(p, ".2f") for p in p_plus[:, 0]))
    print("target 2     " + "   ".join(numbers(p, ".2f") for p in p_plus[:, 1]))
    print("column sums  " + "   ".join(numbers(p, ".2f") for p in p_plus.sum(dim=1)))
    print("row sums     " + "        ".join(numbers(p, ".2f") for p in p_plus.sum(dim=2)))
    print(f"target 1, round 1: {quotients} = {after}")


def show_cross_entropy(log_p: Tensor, p_plus: Tensor) -> None:
    """The first term of (1), for each image and their mean. log_p, p_plus: b k."""
    print("\nCross-entropy H(p+, p) = sum of p+ (-log p): p+ of the target, p of the anchor")
    for i in range(len(log_p)):
        value = cross_entropy(log_p[None, i : i + 1], p_plus[i : i + 1])
        print(f"image {i + 1}    {products(p_plus[i], -log_p[i])} = {value:.3f}")
    print(f"mean       {cross_entropy(log_p[None], p_plus):.3f}")


def show_me_max(log_p: Tensor) -> None:
    """The second term of (1), from the mean of the anchors' assignments. log_p: b k."""
    mean = log_p.exp().mean(dim=0)
    mean_entropy = entropy(mean[None].log())
    log_k = math.log(len(mean))

    print("\nMe-max = log k - H(mean p): 0 if all prototypes are used alike, at most log k")
    print(f"mean p     {numbers(mean)}")
    print(f"H(mean p)  {products(mean, -mean.log())} = {mean_entropy:.3f}")
    print(f"me-max     {log_k:.3f} - {mean_entropy:.3f} = {me_max(log_p):.3f}")


def show_loss() -> None:
    """Equation (1): the sum of the two terms, and the paper's form of it."""
    out = example_loss(EXAMPLE_ANCHORS, EXAMPLE_TARGETS)
    log_k = math.log(len(EXAMPLE_PROTOTYPES))
    terms = f"{out.cross_entropy:.3f} + 1 x {out.memax:.3f}"  # lambda = 1, as in the paper
    paper_loss = out.loss - log_k

    print(f"\nEquation (1): cross-entropy + lambda me-max = {terms} = {out.loss:.3f}")
    print(
        f"With the paper's -H(mean p) as me-max: {paper_loss:.3f}, less by log k; same gradients."
    )


# Part 3: what each part is for
def show_variants() -> None:
    """The numbers that change when one part is missing, or when all outputs coincide."""
    together = torch.tensor([[3, 0, 0], [3, 0, 0]], dtype=torch.float64)
    apart = torch.tensor([[3, 0, 0], [0, 3, 0]], dtype=torch.float64)

    print("\n3  WHAT EACH PART IS FOR")
    print("                        p+ of image 1   p+ of image 2   H(p+, p)  me-max   loss")
    show_variant("as above", EXAMPLE_ANCHORS, EXAMPLE_TARGETS)
    show_variant("T = 1", EXAMPLE_ANCHORS, EXAMPLE_TARGETS, sharpening=1.0)
    show_variant("no Sinkhorn", EXAMPLE_ANCHORS, EXAMPLE_TARGETS, sinkhorn_iterations=0)
    show_variant("collapse", together, together)
    show_variant("collapse, no Sinkhorn", together, together, sinkhorn_iterations=0)
    show_variant("apart, no Sinkhorn", apart, apart, sinkhorn_iterations=0)
    print("T = 1: no sharpening. Nothing pulls p away from 1/3 1/3 1/3 any more.")
    print("No Sinkhorn: image 2 is torn between q1 and q2 again, and q3 goes short. Targets")
    print("are easier, so the loss is lower. That does not make the model better.")
    print("Collapse: all vectors are 3 0 0. Sinkhorn makes p+ uniform, and both terms rise.")
    print("Without it the cross-entropy finds collapse as good as two images apart (3 0 0")
    print("and 0 3 0): only me-max tells them from each other.")


def show_variant(name: str, anchors: Tensor, targets: Tensor, **changes) -> None:
    """A line of part 3."""
    out = example_loss(anchors, targets, **changes)
    p_plus = "  ".join(numbers(p, ".2f") for p in out.target_assignments)
    print(f"{name:24}{p_plus}  {out.cross_entropy:8.3f}  {out.memax:6.3f}  {out.loss:5.3f}")


def example_loss(anchors: Tensor, targets: Tensor, **changes) -> MSNLoss:
    """msn_loss with the settings of the example, some of them changed."""
    settings = {
        "temperature": EXAMPLE_TEMPERATURE,
        "sharpening": EXAMPLE_SHARPENING,
        "sinkhorn_iterations": EXAMPLE_SINKHORN_ITERATIONS,
    }
    return msn_loss(anchors, targets, EXAMPLE_PROTOTYPES, **{**settings, **changes})


def numbers(values: Tensor, form: str = ".3f") -> str:
    """The numbers of a vector as text."""
    return " ".join(format(value, form) for value in values.tolist())


def products(left: Tensor, right: Tensor) -> str:
    """The products of which a scalar product is the sum, as text."""
    pairs = zip(left.tolist(), right.tolist(), strict=True)
    return " + ".join(f"{a:.3f} x {b:.3f}" for a, b in pairs)


if __name__ == "__main__":
    worked_example()
