"""ViTMSN: the Vision Transformer of Masked Siamese Networks, and its self-supervised objective, in one file.

Paper: Assran et al., "Masked Siamese Networks for Label-Efficient Learning", ECCV 2022, arXiv 2204.07141v1, whose
section and equation numbers we use. The file follows its Section 3 from top to bottom (the random augmentations are in
train_msn.py): patchify and mask, encoder, similarity metric and predictions, training objective, pretraining.

Backbone and classifier are those of Hugging Face transformers: the same numbers from the same weights, in both
directions. Pretraining is the official code's, by its numbers (tests/test_golden.py); "Departure:" marks what differs.

    model = ViTMSNForImageClassification.from_pretrained("facebook/vit-msn-small", num_labels=10)
    logits = model(preprocess(images, model.config)).logits

Shapes are written in the letters of the einops patterns (in brackets the paper's):
    b images          v anchor views per image (M)    n tokens or patches    r patches that remain of n, the patches to keep
    k prototypes (K)  e width of the projection (d)   d width of the encoder h attention heads
    c channels        p patch size in pixels (N)
"""
import copy
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---- Configuration ---------------------------------------------------------------------------------------------------
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # gelu: exact
    "gelu_new": partial(F.gelu, approximate="tanh"), "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
CHOICES = {"hidden_act": tuple(ACTIVATIONS), "attn_implementation": ("sdpa", "eager"),
           "problem_type": (None, "regression", "single_label_classification", "multi_label_classification")}
PRESETS = {  # the published shapes (paper, Section 4)
    "small-16": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 16},
    "base-16": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16},
    "base-8": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 8},
    "base-4": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 4},
    "large-16": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16},
    "large-7": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 7},
}

@dataclass
class ViTMSNConfig:
    """Architecture of a ViTMSN, named as in transformers. Raises ValueError for values that no model can have."""
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int = 224  # pixels
    patch_size: int = 16  # pixels
    num_channels: int = 3
    qkv_bias: bool = True
    num_labels: int | None = None  # None: as many as id2label names, else 2. 0: the head is the identity
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None  # None: inferred from the labels at the first loss
    attn_implementation: str = "sdpa"
    drop_path_rate: float = 0.0
    extra: dict = field(default_factory=dict)  # other keys of a config.json; to_dict writes them back

    def __post_init__(self):
        if self.id2label is None:
            self.num_labels = 2 if self.num_labels is None else self.num_labels
            if type(self.num_labels) is not int or not 0 <= self.num_labels <= 10**6:
                raise ValueError(f"num_labels={self.num_labels!r} must be a whole number from 0 to a million.")
            self.id2label = {i: f"LABEL_{i}" for i in range(self.num_labels)}
        try:
            self.id2label = {int(i): str(name) for i, name in self.id2label.items()}
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"id2label={self.id2label!r} must map class numbers to names.") from None
        if self.num_labels not in (None, len(self.id2label)):
            raise ValueError(f"num_labels={self.num_labels} but id2label names {len(self.id2label)} classes; give one.")
        self.num_labels = len(self.id2label)
        self.label2id = {name: i for i, name in self.id2label.items()} if self.label2id is None else self.label2id
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in CHOICES and value not in CHOICES[f.name]:
                raise ValueError(f"{f.name}={value!r} is not known; use one of {CHOICES[f.name]}.")
            if f.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{f.name}={value!r} must be a whole number of at least 1.")
            if f.type is float and (type(value) not in (int, float) or not 0 <= value < 1):
                raise ValueError(f"{f.name}={value!r} must be a number of at least 0 and below 1.")
            if f.type is bool and type(value) is not bool:
                raise ValueError(f"{f.name}={value!r} must be True or False.")
        width, heads = self.hidden_size, self.num_attention_heads
        if rest := width % heads:
            raise ValueError(f"hidden_size={width} is not divisible by num_attention_heads={heads}; use "
                             f"{max(width - rest, heads)} or {width - rest + heads}, or another number of heads.")
        if self.patch_size > self.image_size:
            raise ValueError(f"no patch fits: patch_size={self.patch_size} must be <= image_size={self.image_size}.")

    @classmethod
    def preset(cls, name: str, **changes) -> "ViTMSNConfig":
        """One of the published shapes (`PRESETS`), with any field changed."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known; use one of {', '.join(PRESETS)}.")
        shape = PRESETS[name]
        return cls(**{**shape, "intermediate_size": 4 * shape["hidden_size"], **changes})

    @classmethod
    def from_dict(cls, values: dict) -> "ViTMSNConfig":
        """From the content of a config.json; unknown keys go to `extra`."""
        kind = values.get("model_type", "vit_msn") if isinstance(values, dict) else type(values).__name__
        if kind != "vit_msn":
            raise ValueError(f"this config describes {kind!r}, not a model of type 'vit_msn'.")
        known = {f.name for f in fields(cls)} - {"extra"}
        extra = {key: value for key, value in values.items() if key not in known | {"model_type", "architectures"}}
        return cls(**{key: value for key, value in values.items() if key in known}, extra=extra)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike) -> "ViTMSNConfig":
        """Read the config.json of a folder or of a model on the Hugging Face hub."""
        path = local_folder(name_or_path) / "config.json"
        content = path.read_bytes()  # raises FileNotFoundError
        try:
            return cls.from_dict(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} can't be used: {error}") from error

    def to_dict(self) -> dict:
        """The content of config.json, as transformers writes and reads it (how attention is computed is no part)."""
        left_out = {"extra", "attn_implementation", "num_labels"}
        values = {key: value for key, value in asdict(self).items() if value is not None and key not in left_out}
        return {**self.extra, **values, "model_type": "vit_msn"}

    @property
    def grid_size(self) -> int:
        """Patches along each side of a whole image."""
        return self.image_size // self.patch_size

# ---- Outputs, loading and saving: the surface of transformers, no part of the method --------------------------------
@dataclass
class ViTMSNModelOutput:
    """What the backbone returns. The last two are None unless asked for."""
    last_hidden_state: Tensor  # b n d, after the final norm
    hidden_states: tuple[Tensor, ...] | None = None  # b n d: the embeddings, then each layer's output, before that norm
    attentions: tuple[Tensor, ...] | None = None  # b h n n of each layer

@dataclass
class ViTMSNClassifierOutput:
    """logits: b num_labels. loss: scalar, if labels were given. The others as in ViTMSNModelOutput."""
    logits: Tensor
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

for output in (ViTMSNModelOutput, ViTMSNClassifierOutput):  # so that torch.export can look into them
    torch.export.register_dataclass(output, serialized_type_name=output.__name__)

class PretrainedMixin:
    """What the backbone and the classifier share of transformers' surface."""
    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, *, config: ViTMSNConfig | None = None,
                        attn_implementation: str | None = None, torch_dtype: torch.dtype | str | None = None,
                        dtype: torch.dtype | str | None = None, num_labels: int | None = None,
                        ignore_mismatched_sizes: bool = False, **model_options):
        """Load a transformers folder or hub name, or the target encoder of an original .pth.tar or of ours; eval mode.
        torch_dtype (or dtype): None means the stored one. config: only needed for an original file whose heads are
        not 64 wide. Raises ValueError that names missing or wrongly shaped weights, FileNotFoundError."""
        config, weights = read_pretrained(name_or_path, config)
        changes = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        if num_labels not in (None, config.num_labels):
            changes |= {"num_labels": num_labels, "id2label": None, "label2id": None}
        model = cls(replace(copy.deepcopy(config), **changes), **model_options)
        load_weights(model, weights, str(name_or_path), ignore_mismatched_sizes)
        dtype = torch_dtype or dtype or "auto"
        if isinstance(dtype, str):
            dtype = weights["cls_token"].dtype if dtype == "auto" else getattr(torch, dtype)
        return model.to(dtype).eval()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json and model.safetensors (without that package: pytorch_model.bin) for transformers 4 or 5."""
        folder = Path(folder)
        weights = to_transformers(self.state_dict(), self.config.num_channels)
        try:
            from safetensors.torch import save as to_bytes
            write_file(folder / "model.safetensors", to_bytes(weights, metadata={"format": "pt"}))
        except ImportError:
            write_file(folder / "pytorch_model.bin", lambda file: torch.save(weights, file))
        values = {**self.config.to_dict(), "architectures": [type(self).__name__],
                  "torch_dtype": str(next(self.parameters()).dtype).removeprefix("torch.")}
        values.pop("dtype", None)  # transformers 4.57's and 5's word for torch_dtype, which every version reads
        write_file(folder / "config.json", json.dumps(values, indent=2, ensure_ascii=False).encode())

    def gradient_checkpointing_enable(self) -> None:
        """In training, keep only each layer's input and compute the rest again in the backward pass."""
        getattr(self, "vit", self).gradient_checkpointing = True

    def set_attn_implementation(self, implementation: str) -> None:
        """"sdpa" or "eager", for every layer."""
        replace(self.config, attn_implementation=implementation)  # refuses any other
        self.config.attn_implementation = implementation
        for block in getattr(self, "vit", self).blocks:
            block.attn.implementation = implementation

# ---- Patchify and Mask (paper, Section 3) ----------------------------------------------------------------------------
def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Non-overlapping patches, row by row; pixels that fill none are dropped. b c height width -> b n (c p p)."""
    p = patch_size
    height, width = images.shape[-2] // p * p, images.shape[-1] // p * p
    return rearrange(images[..., :height, :width], "b c (gh p1) (gw p2) -> b (gh gw) (c p1 p2)", p1=p, p2=p)

def num_patches_to_keep(num_patches: int, mask_ratio: float) -> int:
    """floor(n (1 - ratio)), in decimals: 25 patches at 0.8 keep 5, not 4. Raises ValueError if none would be left."""
    kept = math.floor(num_patches * (1 - Fraction(str(mask_ratio)))) if 0 <= mask_ratio < 1 else 0
    if kept < 1:
        raise ValueError(f"mask_ratio={mask_ratio} leaves none of {num_patches} patches or is not in [0, 1); lower it.")
    return kept

def sample_patches_to_keep(batch: int, num_patches: int, mask_ratio: float, generator: torch.Generator) -> Tensor:
    """Random mask: which patches stay, ascending, every subset equally likely, by `generator` alone -> (b, kept).
    (The paper's focal mask is a small crop, a view that loses no patches.) Departure: the official code draws one mask
    for the whole batch; the paper masks views, so each image here has a mask of its own."""
    kept = num_patches_to_keep(num_patches, mask_ratio)
    order = torch.rand(batch, num_patches, generator=generator, device=generator.device).argsort(dim=1)
    return order[:, :kept].sort(dim=1).values

def take_patches(x: Tensor, patches_to_keep: Tensor | None) -> Tensor:
    """Rows of x that stay. x: b n d, patches_to_keep: b kept, None for all -> b kept d."""
    return x if patches_to_keep is None else x.gather(1, patches_to_keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

# ---- Encoder: a pre-norm Vision Transformer whose class token is the representation (paper, Section 3, "Encoder") ----
def interpolate_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample the positions of a square grid to (rows, columns): bicubic, half-pixel centres, no antialiasing.
    positions: 1 (1 + n) d -> 1 (1 + rows * columns) d. The class token's position is left alone."""
    patches = rearrange(positions[:, 1:], "1 (gh gw) d -> 1 d gh gw", gh=math.isqrt(positions.shape[1] - 1))
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], rearrange(patches, "1 d gh gw -> 1 (gh gw) d")], dim=1)

def eager_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d_h)) v, and the softmax. q: b h nq d_h; k, v: b h n d_h -> (b h nq d_h, b h nq n)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # scales n * d_h numbers instead of n * n
    probabilities = F.dropout(scores.softmax(dim=-1), dropout)
    return probabilities @ value, probabilities

def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> tuple[Tensor, None]:
    """The same by torch's fused kernel, which never holds the h * nq * n probabilities and so can't return them."""
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout), None

def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: drop an image's residual branch with probability `rate`, scale the others up. x: b n d."""
    if rate == 0 or not training:
        return x
    return x * (torch.rand(len(x), 1, 1, device=x.device) >= rate) / (1 - rate)

class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""
    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.num_heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.implementation = config.attn_implementation
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, class_token_only: bool = False, output_attentions: bool = False) -> tuple:
        """x: b n d -> b n d (b 1 d with class_token_only), and the probabilities b h n n if they were asked for."""
        if class_token_only:  # one query asks, but every token is still a key and a value
            width, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
            query = F.linear(x[:, :1], weight[:width], None if bias is None else bias[:width])
            qkv = query, *F.linear(x, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
        else:
            qkv = self.qkv(x).chunk(3, dim=-1)  # views of one tensor: nothing is copied
        query, key, value = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in qkv)
        attend = sdpa_attention if self.implementation == "sdpa" and not output_attentions else eager_attention
        out, probabilities = attend(query, key, value, self.dropout if self.training else 0.0)
        return self.proj(rearrange(out, "b h n d -> b n (h d)")), probabilities if output_attentions else None

class MLP(nn.Module):
    """Two linear layers with an activation between them, on every token by itself. b n d -> b n d."""
    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))

class Block(nn.Module):
    """One pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""
    def __init__(self, config: ViTMSNConfig, drop_path_rate: float):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps), Attention(config)
        self.norm2, self.mlp = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps), MLP(config)
        self.dropout, self.drop_path_rate = nn.Dropout(config.hidden_dropout_prob), drop_path_rate

    def forward(self, x: Tensor, class_token_only: bool = False, output_attentions: bool = False) -> tuple:
        """x: b n d -> b n d, or b 1 d with class_token_only; attention probabilities b h n n or None."""
        attended, probabilities = self.attn(self.norm1(x), class_token_only, output_attentions)
        x = x[:, :1] if class_token_only else x
        x = x + drop_path(self.dropout(attended), self.drop_path_rate, self.training)
        return x + drop_path(self.dropout(self.mlp(self.norm2(x))), self.drop_path_rate, self.training), probabilities

def init_linear_layers(model: nn.Module, draw: Callable[[Tensor], Tensor]) -> None:
    """Weights of all linear layers as `draw` draws them in place, biases zero."""
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        draw(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

class ViTMSNModel(PretrainedMixin, nn.Module):
    """The backbone. `use_mask_token` adds a learnable token that replaces masked patches (MSN itself drops them)."""
    def __init__(self, config: ViTMSNConfig, use_mask_token: bool = False):
        super().__init__()
        self.config, width, depth = config, config.hidden_size, config.num_hidden_layers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if use_mask_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid_size**2, width))
        self.patch_embed = nn.Linear(config.num_channels * config.patch_size**2, width)  # a convolution of stride p
        self.blocks = nn.ModuleList(Block(config, config.drop_path_rate * i / max(depth - 1, 1)) for i in range(depth))
        self.norm, self.gradient_checkpointing = nn.LayerNorm(width, eps=config.layer_norm_eps), False
        init_linear_layers(self, partial(nn.init.normal_, std=config.initializer_range))  # as transformers does

    def embed(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None,
              patches_to_keep: Tensor | None = None, interpolate_pos_encoding: bool = False) -> Tensor:
        """Pixels to tokens with positions, class token first; patches that are not kept are never embedded.
        pixel_values: b c height width, bool_masked_pos: b n, patches_to_keep: b kept -> b (1 + n or kept) d."""
        size, channels, p = self.config.image_size, self.config.num_channels, self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)} and type {pixel_values.dtype}; pass "
                             f"normalised floats (images, {channels}, height, width), as preprocess() makes them.")
        height, width = pixel_values.shape[-2:]
        if min(height, width) < p or not (interpolate_pos_encoding or height == width == size):
            raise ValueError(f"the images are {height} x {width} pixels but the model was made for {size} x {size}; "
                             f"resize, or pass interpolate_pos_encoding=True and at least one patch of {p} x {p}.")
        patches, positions = patchify(pixel_values.to(self.patch_embed.weight.dtype), p), self.pos_embed
        # As transformers decides it: 64 x 16 pixels of a 32-pixel model make as many patches but are resampled.
        if patches.shape[1] != positions.shape[1] - 1 or height != width:
            positions = interpolate_positions(positions, (height // p, width // p))
        patch_positions = take_patches(positions[:, 1:].expand(len(patches), -1, -1), patches_to_keep)
        tokens = self.patch_embed(take_patches(patches, patches_to_keep))
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos needs a mask token: make the model with use_mask_token=True.")
            masked = take_patches(bool_masked_pos.unsqueeze(-1).bool(), patches_to_keep)
            tokens = torch.where(masked, self.mask_token.to(tokens.dtype), tokens)
        class_token = (self.cls_token + positions[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([class_token.to(tokens.dtype), tokens + patch_positions], dim=1)
        return F.dropout(tokens, self.config.hidden_dropout_prob, self.training)

    def representation(self, pixel_values: Tensor, patches_to_keep: Tensor | None = None,
                    interpolate_pos_encoding: bool = False) -> Tensor:
        """The class token after the last layer, *before* the final norm: the published feature for probing. -> b d."""
        tokens = self.embed(pixel_values, None, patches_to_keep, interpolate_pos_encoding)
        for i, block in enumerate(self.blocks, 1):  # in the last layer only the class token is computed
            tokens, _ = self._run(block, tokens, i == len(self.blocks), False)
        return tokens[:, 0]

    def _run(self, block: Block, *arguments) -> tuple[Tensor, Tensor | None]:
        recompute = self.gradient_checkpointing and self.training
        return checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None,
                patches_to_keep: Tensor | None = None, interpolate_pos_encoding: bool = False,
                output_hidden_states: bool = False, output_attentions: bool = False) -> ViTMSNModelOutput:
        """pixel_values: b c height width; bool_masked_pos: b n, True: masked; patches_to_keep: b kept, None for all."""
        tokens = self.embed(pixel_values, bool_masked_pos, patches_to_keep, interpolate_pos_encoding)
        hidden_states, attentions = [tokens] if output_hidden_states else [], []
        for block in self.blocks:
            tokens, probabilities = self._run(block, tokens, False, output_attentions)
            hidden_states += [tokens] if output_hidden_states else []  # else all would stay in memory
            attentions += [probabilities] if output_attentions else []
        return ViTMSNModelOutput(self.norm(tokens), tuple(hidden_states) or None, tuple(attentions) or None)

# ---- Classifier ------------------------------------------------------------------------------------------------------
def classification_loss(logits: Tensor, labels: Tensor, config: ViTMSNConfig) -> Tensor:
    """Mean squared error, cross-entropy or binary cross-entropy. logits: b num_labels -> scalar."""
    if config.problem_type is None:  # inferred once, as transformers does
        kind = "single_label" if labels.dtype in (torch.long, torch.int) else "multi_label"
        config.problem_type = "regression" if config.num_labels == 1 else f"{kind}_classification"
    if config.problem_type == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
    if config.problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1).long())
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

class ViTMSNForImageClassification(PretrainedMixin, nn.Module):
    """The backbone with a linear head on the class token (after the final norm, as in transformers)."""
    def __init__(self, config: ViTMSNConfig):
        super().__init__()
        self.config, self.vit = config, ViTMSNModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        init_linear_layers(self.classifier, partial(nn.init.normal_, std=config.initializer_range))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, interpolate_pos_encoding: bool = False,
                output_hidden_states: bool = False, output_attentions: bool = False) -> ViTMSNClassifierOutput:
        """pixel_values: b c height width; labels: b class numbers, or b num_labels for regression and multi-label."""
        if output_hidden_states or output_attentions:
            out = self.vit(pixel_values, None, None, interpolate_pos_encoding, output_hidden_states, output_attentions)
            state, extras = out.last_hidden_state[:, 0], (out.hidden_states, out.attentions)
        else:
            state, extras = self.vit.norm(self.vit.representation(pixel_values, None, interpolate_pos_encoding)), ()
        logits = self.classifier(state)
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        return ViTMSNClassifierOutput(logits, loss, *extras)

# ---- Similarity Metric and Predictions (paper, Section 3) ------------------------------------------------------------
# In the log domain throughout: at temperature 0.1, sharpening 0.05 a float32 p rounds to 0, and its log is infinite.
AllReduce = Callable[[Tensor, str], Tensor]  # x, "sum" or "max" -> that of x over all processes

def one_process(x: Tensor, op: str) -> Tensor:
    """The reduction over all processes if there is but one. train_msn.py has the other."""
    return x

def log_assign(z: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """log p(prototype | view) = log softmax of the cosine similarities / tau. z: b e, prototypes: k e -> b k."""
    return (F.normalize(z, dim=-1) @ F.normalize(prototypes, dim=-1).T / temperature).log_softmax(dim=-1)

def smooth(log_p: Tensor, smoothing: float) -> Tensor:
    """Label smoothing of the prototype labels (not in the paper): log((1 - s) p + s / k). log_p: b k -> b k."""
    return torch.logaddexp(log_p + math.log1p(-smoothing), log_p.new_full((), smoothing / log_p.shape[-1]).log())

def sharpen(log_p: Tensor, sharpening: float) -> Tensor:
    """p^(1/T) renormalised: the paper's softmax at tau+ = T tau (T: sharpening; 0.25 x 0.1). log_p: b k -> b k."""
    return (log_p / sharpening).log_softmax(dim=-1)

def batch_logsumexp(log_p: Tensor, all_reduce: AllReduce) -> Tensor:
    """log of the sum of p over the rows of all processes: how much mass each prototype gets. log_p: b k -> k."""
    peak = all_reduce(log_p.detach().amax(dim=0), "max")
    return peak + all_reduce((log_p - peak).exp().sum(dim=0), "sum").log()

def sinkhorn(log_p: Tensor, iterations: int = 3, all_reduce: AllReduce = one_process) -> Tensor:
    """Sinkhorn balancing (paper, Appendix A.1): each prototype gets the same share of the batch, then each view sums
    to 1 (in the end only this is exact). The constants of the usual form cancel. log_p: b k (any values) -> b k."""
    for _ in range(iterations):
        log_p = (log_p - batch_logsumexp(log_p, all_reduce)).log_softmax(dim=-1)
    return log_p

# ---- Training Objective (paper, Section 3, equation (1)) -------------------------------------------------------------
def cross_entropy(log_p: Tensor, targets: Tensor) -> Tensor:
    """H(p+, p), mean over all anchor views: the first term of (1). log_p: v b k, targets: b k (no gradient)."""
    return -(targets * log_p.mean(dim=0)).sum(dim=-1).mean()  # views share a target: averaged first, nothing is tiled

def me_max(log_p: Tensor, log_prior: Tensor | None = None, all_reduce: AllReduce = one_process) -> Tensor:
    """ME-MAX: KL(mean prediction || prior) >= 0, to be minimised. log_p: rows k -> scalar. Uniform prior (None): log k
    - H(mean prediction), the second term of (1) shifted to be 0 at best. Another prior is PMSN (arXiv 2210.07277)."""
    log_mean = batch_logsumexp(log_p, all_reduce).log_softmax(dim=-1)  # rows sum to 1: divides by their number
    log_prior = -math.log(log_p.shape[-1]) if log_prior is None else log_prior.to(log_mean)
    return (log_mean.exp() * (log_mean - log_prior)).sum()

def entropy(log_p: Tensor) -> Tensor:
    """Mean entropy of the single predictions, in nats (not in the paper; weight 0). log_p: rows k -> scalar."""
    return -(log_p.exp() * log_p).sum(dim=-1).mean()

def power_law_prior(num_prototypes: int, exponent: float) -> Tensor:
    """log of a prior like rank^-exponent (PMSN, Section 4): few frequent, many rare classes. 0: uniform. -> k."""
    return (-exponent * torch.arange(1, num_prototypes + 1, dtype=torch.float64).log()).log_softmax(dim=0)

class MSNLoss(NamedTuple):
    """Scalars but target_assignments. Collapsed: top_assignment 1, 1 prototype used; or top = bottom = 1 / k."""
    loss: Tensor
    cross_entropy: Tensor
    memax: Tensor
    entropy: Tensor
    target_assignments: Tensor  # b k, rows sum to 1
    prototypes_used: Tensor  # how many are some target's first choice
    top_assignment: Tensor  # each target's highest, their mean
    bottom_assignment: Tensor  # each target's lowest, their mean

def msn_loss(anchors: Tensor, targets: Tensor, prototypes: Tensor, *, temperature: float = 0.1,
             sharpening: float = 0.25, sinkhorn_iterations: int = 3, memax_weight: float = 1.0,
             entropy_weight: float = 0.0, label_smoothing: float = 0.0, log_prior: Tensor | None = None,
             all_reduce: AllReduce = one_process) -> MSNLoss:
    """The objective (1), its lambda being memax_weight, and its terms. anchors: (v b) e, view-major; targets: b e;
    prototypes: k e. Gradients reach the anchors and, on the anchors' side only, the prototypes. Departure: at least
    float32 even under autocast (the official code has no mixed precision). sinkhorn_iterations=0 leaves it out."""
    if len(anchors) % len(targets):
        raise ValueError(f"{len(anchors)} anchor rows are no whole number of views of {len(targets)} target rows.")
    with torch.autocast(anchors.device.type, enabled=False):
        working = torch.promote_types(prototypes.dtype, torch.float32)
        anchors, targets, prototypes = (x.to(working) for x in (anchors, targets, prototypes))
        log_p = smooth(log_assign(anchors, prototypes, temperature), label_smoothing)
        with torch.no_grad():
            log_plus = smooth(log_assign(targets, prototypes, temperature), label_smoothing)
            p_plus = sinkhorn(sharpen(log_plus, sharpening), sinkhorn_iterations, all_reduce).exp()
            used = (all_reduce(F.one_hot(p_plus.argmax(dim=-1), p_plus.shape[-1]).sum(dim=0), "sum") > 0).sum()
        ce = cross_entropy(rearrange(log_p, "(v b) k -> v b k", b=len(targets)), p_plus)
        memax, ent = me_max(log_p, log_prior, all_reduce), entropy(log_p)
        total = ce + memax_weight * memax + entropy_weight * ent
        return MSNLoss(total, ce, memax, ent, p_plus, used, p_plus.amax(dim=-1).mean(), p_plus.amin(dim=-1).mean())

# ---- Pretraining: anchor encoder, target encoder and prototypes ------------------------------------------------------
class ProjectionHead(nn.Sequential):
    """Three linear layers, rows d -> rows e; thrown away after pretraining (paper, Appendix A.1). Departure: the paper
    puts batch norm "at the input and hidden layers"; the released code, and so we, after the two hidden layers only."""
    def __init__(self, width: int, hidden_dim: int, output_dim: int):
        super().__init__()
        self.fc1, self.bn1, self.gelu1 = nn.Linear(width, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.GELU()
        self.fc2, self.bn2, self.gelu2 = nn.Linear(hidden_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.GELU()
        self.fc3 = nn.Linear(hidden_dim, output_dim)

class MSNEncoder(ViTMSNModel):
    """f_theta: the backbone with the projection head, from views to the vectors that are compared with prototypes."""
    def __init__(self, config: ViTMSNConfig, hidden_dim: int, output_dim: int):
        super().__init__(config)
        self.fc = ProjectionHead(config.hidden_size, hidden_dim, output_dim)
        std = config.initializer_range
        # Departure: cut at two standard deviations. Officially at +-2, a hundred of them: never.
        init_linear_layers(self, partial(nn.init.trunc_normal_, std=std, a=-2 * std, b=2 * std))
        nn.init.kaiming_normal_(self.patch_embed.weight)
        nn.init.normal_(self.cls_token, std=std)
        nn.init.normal_(self.pos_embed, std=std)

    def forward(self, views: list[Tensor], patches_to_keep: list[Tensor | None]) -> Tensor:
        """views: v tensors b c height width of any sizes, patches_to_keep: b kept or None for each -> v b e.
        Views of one size and kept count go through together, so batch norm has its statistics per resolution."""
        shapes = [(view.shape, getattr(keep, "shape", None)) for view, keep in zip(views, patches_to_keep, strict=True)]
        projections: dict[int, Tensor] = {}
        for shape in dict.fromkeys(shapes):
            members = [i for i in range(len(views)) if shapes[i] == shape]
            keep = None if shape[1] is None else torch.cat([patches_to_keep[i] for i in members])
            state = self.representation(torch.cat([views[i] for i in members]), keep, interpolate_pos_encoding=True)
            projections.update(zip(members, self.fc(self.norm(state)).chunk(len(members)), strict=True))
        return torch.stack([projections[i] for i in range(len(views))])

class ViTMSNForPreTraining(nn.Module):
    """Masked Siamese Network: anchor encoder and prototypes, which learn, and the target encoder, which follows.
    loss_options are those of msn_loss; `prior_exponent` is power_law_prior's (0: the uniform prior)."""
    def __init__(self, config: ViTMSNConfig, hidden_dim: int = 2048, output_dim: int = 256, num_prototypes: int = 1024,
                 *, prior_exponent: float = 0.0, **loss_options):
        super().__init__()
        self.config, self.prior_exponent, self.loss_options = config, prior_exponent, loss_options
        bound = output_dim**-0.5
        self.anchor_encoder = MSNEncoder(config, hidden_dim, output_dim)
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, output_dim).uniform_(-bound, bound))
        self.target_encoder = copy.deepcopy(self.anchor_encoder).requires_grad_(False)

    def forward(self, target_view: Tensor, anchor_views: list[Tensor],
                patches_to_keep: list[Tensor | None] | None = None, sharpening: float | None = None) -> MSNLoss:
        """target_view: b c height width; anchor_views: v tensors, each with its patches_to_keep (b kept) or None.
        sharpening: this step's value, where it follows a schedule; else the one given at construction."""
        keep = [None] * len(anchor_views) if patches_to_keep is None else patches_to_keep
        if not anchor_views or len(keep) != len(anchor_views):
            raise ValueError(f"{len(anchor_views)} anchor views and {len(keep)} entries of patches_to_keep: give at "
                             "least one view, and None or indices for each.")
        anchors = rearrange(self.anchor_encoder(anchor_views, keep), "v b e -> (v b) e")
        # As published, the target's head, too, takes its batch's own statistics, so keep the module in train(). Its
        # running ones are its own: update_target skips buffers. The backbone has no batch norm, so features need none.
        with torch.no_grad():
            targets = self.target_encoder([target_view], [None])[0]
        options = self.loss_options if sharpening is None else {**self.loss_options, "sharpening": sharpening}
        prior = power_law_prior(len(self.prototypes), self.prior_exponent) if self.prior_exponent else None
        return msn_loss(anchors, targets, self.prototypes, log_prior=prior, **options)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * anchor, the parameters only, not the buffers of batch norm."""
        torch._foreach_lerp_([*self.target_encoder.parameters()], [*self.anchor_encoder.parameters()], 1 - momentum)

    def load_pretrained(self, name_or_path: str | os.PathLike) -> list[str]:
        """Start both encoders from weights that from_pretrained reads: a backbone alone, or with projection head and
        prototypes where they are there in these shapes. Positions are resampled. Returns the names that stay new."""
        _, weights = read_pretrained(name_or_path, self.config)
        own = self.anchor_encoder.state_dict()
        fits = all(weights[name].shape == own[name].shape for name in own.keys() & weights.keys() if name[:3] == "fc.")
        weights = {name: value for name, value in weights.items() if fits or not name.startswith("fc.")}
        with suppress(KeyError, IndexError, ValueError, ArithmeticError, RuntimeError):  # load_weights will name it
            if weights["pos_embed"].shape[1] != own["pos_embed"].shape[1]:
                weights["pos_embed"] = interpolate_positions(weights["pos_embed"], (self.config.grid_size,) * 2)
        prototypes = weights.pop("prototypes", None)
        new = load_weights(self.anchor_encoder, weights, str(name_or_path), may_be_new=r"fc\.")
        self.target_encoder.load_state_dict(self.anchor_encoder.state_dict())
        if prototypes is None or prototypes.shape != self.prototypes.shape or new:
            return [*new, "prototypes"]  # prototypes mean nothing to another head
        if not torch.isfinite(prototypes).all():
            raise ValueError(f"{name_or_path}: the prototypes are not finite.")
        self.prototypes.data.copy_(prototypes)
        return new

# ---- Reading and writing weights -------------------------------------------------------------------------------------
def to_original(state: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """An encoder's state dict as in the original release (vits16_800ep.pth.tar): patch_embed d (c p p) -> d c p p."""
    p = math.isqrt(state["patch_embed.weight"].shape[1] // channels)
    state = {name.replace("patch_embed.", "patch_embed.proj."): value for name, value in state.items()}
    return {**state, "patch_embed.proj.weight": state["patch_embed.proj.weight"].unflatten(1, (channels, p, p))}

def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of to_original; a leading `module.` is taken off."""
    state = {name.removeprefix("module.").replace("patch_embed.proj.", "patch_embed."): v for name, v in state.items()}
    return {name: value.flatten(1) if name == "patch_embed.weight" else value for name, value in state.items()}

# In classifiers "vit." precedes all names but `classifier`, in files of version 5 only some: it is always taken off.
QKV = ("query", "key", "value")  # three tensors there, one of ours
TRANSFORMERS_NAMES = (  # parts of names: original; in files, and in memory up to version 4; in memory since version 5
    (".cls_token", ".embeddings.cls_token"), (".mask_token", ".embeddings.mask_token"),
    (".pos_embed", ".embeddings.position_embeddings"), (".norm.", ".layernorm."),
    (".patch_embed.proj.", ".embeddings.patch_embeddings.projection."), (".blocks.", ".encoder.layer.", ".layers."),
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
    *((f".attn.{x}.", f".attention.attention.{x}.", f".attention.{x[0]}_proj.") for x in QKV),
    (".attn.proj.", ".attention.output.dense.", ".attention.o_proj."),
    (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."))
WEIGHT_FILES = ("checkpoint.pt", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                "pytorch_model.bin.index.json")

def rename(state: dict[str, Tensor], parts: list[tuple[str, str]]) -> dict[str, Tensor]:
    """The state dict with each of these parts of names replaced, in this order; a dot precedes every name."""
    for old, new in parts:
        state = {f".{name}".replace(old, new)[1:]: value for name, value in state.items()}
    return state

def to_transformers(state: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """Our state dict under the names of transformers' files; a classifier's backbone under `vit.`."""
    prefix, split = "vit." if "vit.cls_token" in state else "", {}
    state = {name.removeprefix("vit."): value for name, value in state.items() if not name.startswith("fc.")}
    for name, value in to_original(state, channels).items():
        parts = QKV if ".qkv." in name else ("",)
        for part, tensor in zip(parts, value.chunk(len(parts)), strict=True):
            split[name.replace("qkv", part)] = tensor.contiguous()
    renamed = rename(split, [(ours, theirs) for ours, theirs, *_ in TRANSFORMERS_NAMES])
    return {name if name.startswith("classifier.") else prefix + name: value for name, value in renamed.items()}

def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any of the five layouts of transformers -> our names. Names that are not in the table stay as they are."""
    state = {name.removeprefix("vit."): value for name, value in state.items()}
    state = rename(state, [(theirs, ours) for ours, *others in TRANSFORMERS_NAMES for theirs in others])
    for query in [name for name in state if ".attn.query." in name]:
        names = [query.replace("query", part) for part in QKV]
        if all(name in state for name in names):
            state[query.replace("query", "qkv")] = torch.cat([state.pop(name) for name in names])
    return from_original(state)

def infer_config(state: dict[str, Tensor], values: dict) -> ViTMSNConfig:
    """The architecture from the shapes of an original file, whose heads are 64 wide unless `values` says otherwise."""
    width, channels, p, _ = state["patch_embed.proj.weight"].shape
    sizes = {"hidden_size": width, "num_attention_heads": max(width // 64, 1), "num_channels": channels,
             "num_hidden_layers": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
             "intermediate_size": len(state["blocks.0.mlp.fc1.weight"]), "qkv_bias": "blocks.0.attn.qkv.bias" in state,
             "image_size": p * math.isqrt(state["pos_embed"].shape[1] - 1), "patch_size": p}
    return ViTMSNConfig.from_dict({**sizes, **values})

def read_tensors(path: Path) -> dict:
    """The content of a .safetensors file, of a torch file by weights_only=True (nothing in it is ever executed), or of
    all files that an .index.json names. Raises ValueError, naming the file, for what is damaged or not plain values."""
    try:
        if path.name.endswith(".index.json"):
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            if outside := [name for name in shards if Path(name).name != name or name.endswith(".json")]:
                raise ValueError(f"it names {outside[0]!r}, but only weight files beside the index are read")
            return {name: value for shard in shards for name, value in read_tensors(path.parent / shard).items()}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):  # torch.load checks no checksums
            raise ValueError(f"its record {bad} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
        return content
    except (FileNotFoundError, PermissionError):
        raise
    except ImportError:
        raise ImportError(f"{path} needs a package: pip install safetensors, or use pytorch_model.bin.") from None
    except Exception as error:  # parsers of damaged files raise every kind there is
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reason = "torch refuses to unpickle it" if reason.startswith("Weights only") else reason
        raise ValueError(f"{path} can't be read: {reason}. It may be damaged or hold more than plain data.") from error

def local_folder(name_or_path: str | os.PathLike) -> Path:
    """The folder itself, or where huggingface_hub puts the model of that name."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
        raise FileNotFoundError(f"{name_or_path} is neither a file nor a folder.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(f"{name_or_path} is no folder here. A model of the hub: pip install huggingface_hub, or put "
                          "its config.json and model.safetensors (or pytorch_model.bin) there.") from None
    return Path(snapshot_download(str(name_or_path), allow_patterns=["config.json", *WEIGHT_FILES, "*.safetensors"]))

def read_pretrained(name_or_path: str | os.PathLike, config: ViTMSNConfig | None) -> tuple[ViTMSNConfig, dict]:
    """Configuration and weights, under our names, of whatever from_pretrained takes."""
    path = Path(name_or_path)
    if not path.is_file():
        folder = local_folder(name_or_path)
        path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}.")
    content = read_tensors(path)
    try:
        if not isinstance(content.get("target_encoder"), dict):
            config = config or ViTMSNConfig.from_pretrained(path.parent)
            return config, from_transformers({str(name): value for name, value in content.items()})
        values = {**content["target_encoder"], "prototypes": content.get("prototypes")}
        state = {str(name).removeprefix("module."): x for name, x in values.items() if isinstance(x, Tensor)}
        config = config or infer_config(state, content.get("model_config", {}))
        return config, from_original(state)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:  # not there, or no tensors
        raise ValueError(f"{path} holds no ViT that fits: {error}") from error

def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str, ignore_mismatched_sizes: bool = False,
                 may_be_new: str = r"mask_token|classifier\.") -> list[str]:
    """Copy weights (our names, no `vit.`) into the model; what is new is announced and returned.
    Raises ValueError naming what is missing, wrongly shaped or not finite; warns of what the model has no use for."""
    own = {name.removeprefix("vit."): value for name, value in model.state_dict().items()}
    found = {name: value for name, value in weights.items() if name in own}
    wrong = {name: f"{name} {tuple(getattr(value, 'shape', ()))} instead of {tuple(own[name].shape)}"
             for name, value in found.items() if getattr(value, "shape", None) != own[name].shape}
    new = [name for name in own if name not in found or name in wrong]
    optional = r"fc\.|prototypes|classifier\.|mask_token"
    unused = [name for name in weights if name not in own and not re.match(optional, name)]
    problems = {"missing": [name for name in new if name not in wrong and not re.match(may_be_new, name)],
                "not finite": [name for name in found if name not in wrong and not torch.isfinite(found[name]).all()],
                "wrongly shaped": [] if ignore_mismatched_sizes else list(wrong.values())}
    advice = {"wrongly shaped": " Use the matching config, or ignore_mismatched_sizes=True to draw them anew."}
    for problem, names in problems.items():
        if names:
            shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
            raise ValueError(f"{source}: {len(names)} weights are {problem}: {shown}.{advice.get(problem, '')}")
    for problem, names in (("new, drawn at random", new), ("not used", unused)):
        if names:
            warnings.warn(f"{source}: {problem}: {', '.join(names)}", stacklevel=3)
    for name in found.keys() - wrong.keys():
        own[name].copy_(found[name].detach())
    return new

def write_file(path: Path, content: bytes | Callable) -> None:
    """Write bytes, or what content(file) writes, whole or not at all: then the old file stays. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

# ---- Preprocessing ---------------------------------------------------------------------------------------------------
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

def to_rgb(image: Image.Image, channels: int = 3) -> Image.Image:
    """Any picture upright, in 8-bit RGB (channels=1: grey). 16-bit grey is scaled, not clipped; alpha is dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # whole numbers up to 65535
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB" if channels == 3 else "L")

def normalize(pixels: Tensor) -> Tensor:
    """[0, 1] -> ImageNet's mean 0 and standard deviation 1 per channel. pixels: ... c height width."""
    mean, std = pixels.new_tensor(IMAGENET_MEAN), pixels.new_tensor(IMAGENET_STD)
    if pixels.shape[-3] != 3:  # a grey image gets the mean of the three
        mean, std = mean.mean(), std.mean()
    return torch.addcmul((-mean / std).reshape(-1, 1, 1), pixels, (1 / std).reshape(-1, 1, 1))

def preprocess(images, config: ViTMSNConfig, protocol: str = "squash") -> Tensor:
    """PIL images (one or a list) -> b c image_size image_size: bilinear, ImageNet mean and deviation. "squash" (the
    published processor) ignores the aspect ratio; "center-crop" (the paper's evaluation) cuts the middle 224/256."""
    images, size = [images] if isinstance(images, Image.Image) else list(images), config.image_size
    if protocol not in ("squash", "center-crop") or not images:
        raise ValueError(f"{len(images)} images, protocol={protocol!r}: pass at least one, 'squash' or 'center-crop'.")
    rows = []
    for image in images:
        image = to_rgb(image, config.num_channels)
        scale = size * 256 / 224 / min(image.size)
        width, height = (size if protocol == "squash" else max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
        rows.append(torch.from_numpy(np.array(image)).reshape(size, size, -1).permute(2, 0, 1))
    return normalize(torch.stack(rows).float() / 255)


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
    print(f"The paper has -H(mean p) for me-max: {paper_loss:.3f}, less by log k; same gradients.")


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
