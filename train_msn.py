"""Pretrain a ViT with Masked Siamese Networks (Assran et al., 2022, arXiv 2204.07141), on a laptop or a cluster.

    python train_msn.py                                                  # built-in images, minutes on two CPU cores
    python train_msn.py --recipe imagenette --data path/to/imagenette    # a folder of pictures
    torchrun --nproc-per-node=8 train_msn.py --recipe small-16 --data path/to/imagenet --batch-size 1024

Each run has its folder (runs/<recipe>-001, ...): config.json, metrics.csv, knn.csv, pictures, checkpoint.pt, and at
the end encoder/, which transformers loads. `--resume` goes on where it stopped, on a CPU bit for bit.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import pickle
import signal
import sys
import tarfile
import time
import urllib.request
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitmsn import (
    IMAGENET_MEAN, IMAGENET_STD, PRESETS, MSNLoss, ViTMSNConfig, ViTMSNForPreTraining, ViTMSNModel, from_original,
    log_assign, normalize, num_patches_to_keep, one_process, read_tensors, sample_patches_to_keep, to_original, to_rgb,
    write_file)

# ---- Settings: one frozen dataclass, from which the command line is derived ------------------------------------------
ORDER, VIEWS, MASKS, DROPOUT, IMAGES = range(5)  # streams of random numbers, for generator_for

class UsageError(ValueError):
    """What the user asked for can't be done: one line on the terminal, exit status 2."""

def opt(default, text: str, **limits):
    """A field with its help text and, where not every value makes sense, choices or (low, high)."""
    return field(default=default, metadata={"help": text, **limits})

@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. Defaults are the published ViT-S/16 recipe (Appendix A.1) where it names a value."""
    recipe: str = opt("demo", "named settings: they replace the defaults below, other flags replace them")
    data: str = opt("synthetic", "synthetic, cifar10, or a folder of images (train/CLASS/*, val/CLASS/*, or any tree)")
    data_dir: str = opt("data", "where cifar-10-batches-py lies or is downloaded to")
    output_dir: str = opt("", "the run's folder; by default runs/<recipe>-001 or the next free number")
    resume: bool = opt(False, "go on from the run's checkpoint, on the same images, or start if there is none")
    init_from: str = opt("", "start from a run of ours, a transformers folder or an original .pth.tar")
    seed: int = opt(0, "of everything random", range=(0, 2**31 - 1))
    # How long
    epochs: int = opt(800, "length of the run and of the schedules", range=(1, 10**6))
    max_steps: int = opt(0, "stop early, after so many steps (0: never)", range=(0, 10**12))
    batch_size: int = opt(1024, "images per step over all processes", range=(2, 10**6))
    # Model
    image_size: int = opt(224, "pixels, of target view and random anchor views", range=(1, 4096))
    patch_size: int = opt(16, "pixels", range=(1, 4096))
    hidden_size: int = opt(384, "width d of the encoder", range=(1, 10**5))
    num_hidden_layers: int = opt(12, "transformer layers", range=(1, 1000))
    num_attention_heads: int = opt(6, "h", range=(1, 1000))
    intermediate_size: int = opt(0, "width of the MLP; 0 is 4 x hidden size", range=(0, 10**6))
    drop_path_rate: float = opt(0.0, "stochastic depth of the last layer", range=(0, 0.99))
    head_hidden_size: int = opt(2048, "width of the projection head's hidden layers", range=(1, 10**5))
    output_dim: int = opt(256, "e, width of projections and prototypes", range=(1, 10**5))
    num_prototypes: int = opt(1024, "k", range=(2, 10**6))
    # Views and masks
    random_views: int = opt(1, "anchor views that are randomly masked, per image", range=(0, 100))
    focal_views: int = opt(10, "anchor views that are small crops, per image", range=(0, 100))
    focal_size: int = opt(96, "pixels, of focal views", range=(1, 4096))
    mask_ratio: float = opt(0.15, "share of patches dropped from each random anchor view", range=(0, 0.999))
    crop_scale: tuple = opt((0.3, 1.0), "share of the image's area in target and random views", range=(1e-6, 1))
    focal_scale: tuple = opt((0.05, 0.3), "share of the image's area in focal views", range=(1e-6, 1))
    flip: float = opt(0.5, "probability of a horizontal flip", range=(0, 1))
    color_jitter: float = opt(0.5, "strength of the colour jitter, 1 is SimCLR's", range=(0, 1.25))
    jitter: float = opt(0.8, "probability of colour jitter", range=(0, 1))
    grey: float = opt(0.2, "probability of greyscale", range=(0, 1))
    blur: float = opt(0.5, "probability of Gaussian blur", range=(0, 1))
    blur_sigma: tuple = opt((0.1, 2.0), "deviation of the blur in pixels", range=(1e-3, 100))
    anchor_view: str = opt("own", "augmentation of random anchors (table 9)", choices=("own", "recolored", "target"))
    # Objective
    temperature: float = opt(0.1, "tau of the anchor assignments", range=(1e-3, 100))
    sharpening: float = opt(0.25, "T at the start of its schedule: the targets' temperature is T tau", range=(1e-3, 1))
    final_sharpening: float = opt(0.25, "T at the end of its linear schedule", range=(1e-3, 1))
    sinkhorn_iterations: int = opt(3, "0 leaves Sinkhorn out", range=(0, 1000))
    memax_weight: float = opt(1.0, "lambda of equation (1)", range=(0, 10**6))
    prior_exponent: float = opt(0.0, "of PMSN's power-law prior; 0 is uniform, which is me-max", range=(0, 10))
    freeze_prototypes: bool = opt(False, "leave the prototypes where they were drawn (an ablation)")
    # Optimisation
    lr: float = opt(1e-3, "highest learning rate", range=(0, 100))
    start_lr: float = opt(2e-4, "learning rate at the start of the warm-up", range=(0, 100))
    final_lr: float = opt(1e-6, "learning rate at the end of the cosine", range=(0, 100))
    warmup_epochs: float = opt(15.0, "length of the linear warm-up", range=(0, 10**6))
    weight_decay: float = opt(0.04, "of AdamW, at the start of its cosine", range=(0, 100))
    final_weight_decay: float = opt(0.4, "at the end", range=(0, 100))
    clip_grad: float = opt(3.0, "joint norm to which the encoder's gradients are clipped", range=(1e-6, 10**9))
    momentum: float = opt(0.996, "of the target encoder, at the start of its linear schedule", range=(0, 1))
    final_momentum: float = opt(1.0, "at the end", range=(0, 1))
    schedule_stretch: float = opt(1.25, "length of the schedules in runs; above 1 no step has rate 0", range=(1, 10))
    # Machine
    device: str = opt("auto", "where to train", choices=("auto", "cpu", "cuda"))
    precision: str = opt("auto", "auto: bfloat16 where fast", choices=("auto", "float32", "bfloat16", "float64"))
    gradient_checkpointing: bool = opt(False, "keep less, compute more")
    compile: bool = opt(False, "torch.compile both encoders: minutes of waiting, then faster steps")
    num_workers: int = opt(0, "processes that decode images", range=(0, 1000))
    cache_mb: int = opt(1024, "decoded images to keep in memory, MiB, train and val each", range=(0, 10**7))
    checkpoint_every: int = opt(500, "steps between checkpoints", range=(1, 10**9))
    knn_every: int = opt(10, "epochs between k-NN evaluations; 0 for never", range=(0, 10**6))

    def __post_init__(self):
        for f in fields(self):
            check_range(f, getattr(self, f.name))
        if self.random_views + self.focal_views == 0:
            raise UsageError("random_views and focal_views are both 0; give at least one anchor view.")
        for size in {self.image_size, self.focal_size if self.focal_views else self.image_size}:
            if size % self.patch_size:
                raise UsageError(f"a view of {size} pixels is no whole patches; use a multiple of {self.patch_size}.")
        try:
            self.model_config()
            num_patches_to_keep((self.image_size // self.patch_size) ** 2, self.mask_ratio)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def model_config(self) -> ViTMSNConfig:
        """The architecture. Dropout is 0 in pretraining, whatever a hub config says."""
        return ViTMSNConfig(self.hidden_size, self.num_hidden_layers, self.num_attention_heads,
                            self.intermediate_size or 4 * self.hidden_size, image_size=self.image_size,
                            patch_size=self.patch_size, drop_path_rate=self.drop_path_rate)

def check_range(f, value) -> None:
    """Raise UsageError if the value of field f is of another kind or outside its limits."""
    pair, seen = f.type is tuple, f"{f.name}={value!r}"
    values, kinds = (value if pair else (value,)), ((int, float) if f.type in (float, tuple) else (f.type,))
    if not isinstance(values, (tuple, list)) or len(values) != 1 + pair or any(type(v) not in kinds for v in values):
        raise UsageError(f"{seen} must be {'two numbers' if pair else 'of type ' + f.type.__name__}.")
    if value not in f.metadata.get("choices", (value,)):
        raise UsageError(f"{seen} is not known; use one of {', '.join(f.metadata['choices'])}.")
    if "range" in f.metadata:
        low, high = f.metadata["range"]
        if not all(low <= v <= high for v in values) or values[0] > values[-1]:
            raise UsageError(f"{seen} is out of range; use {low} to {high}{', the lower one first' if pair else ''}.")

SMALL = {  # what serves small images and short runs; the README's tables of experiments say how it was found
    "image_size": 32, "patch_size": 4, "num_attention_heads": 3, "head_hidden_size": 512, "output_dim": 128,
    "num_prototypes": 128, "focal_views": 2, "focal_size": 16, "blur": 0.0, "batch_size": 64, "warmup_epochs": 1.0,
    "final_weight_decay": 0.1, "momentum": 0.9, "schedule_stretch": 1.0}
SMALL_PHOTOS = {**SMALL, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "mask_ratio": 0.5,
                "focal_scale": (0.1, 0.4)}
RECIPES = {
    "demo": {**SMALL, "data": "synthetic", "epochs": 10, "hidden_size": 96, "num_hidden_layers": 3, "lr": 3e-3,
             "head_hidden_size": 256, "num_prototypes": 64, "mask_ratio": 0.3, "crop_scale": (0.5, 1.0),
             "focal_scale": (0.15, 0.4), "knn_every": 2},
    "cifar10": {**SMALL_PHOTOS, "data": "cifar10", "epochs": 40, "knn_every": 4},
    "imagenette": {**SMALL_PHOTOS, "data": "imagenette", "epochs": 60, "image_size": 64, "patch_size": 8,
                   "focal_size": 32, "knn_every": 5}}
for name, ratio, epochs in (("small-16", 0.15, 800), ("base-16", 0.3, 600), ("large-16", 0.5, 600),
                            ("base-8", 0.3, 600), ("base-4", 0.7, 300), ("large-7", 0.7, 200)):
    RECIPES[name] = {**PRESETS[name], "mask_ratio": ratio, "epochs": epochs}  # as published (paper, Appendix A.1)
RECIPES["large-7"]["focal_size"] = 98  # views are whole patches: of 7 pixels, this is the nearest to 96
# Flags that a resumed run may change, because the result is the same.
FREE_TO_CHANGE = {"resume", "output_dir", "num_workers", "max_steps", "checkpoint_every", "knn_every", "cache_mb"}

def add_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """One --flag for each field of a dataclass; those that are not given stay out of the result."""
    parser.usage = "%(prog)s [--flag value ...], see %(prog)s --help"
    for f in fields(config_class):
        kind = {"type": f.type, "choices": f.metadata.get("choices")}
        if f.type in (bool, tuple):
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": float, "nargs": 2}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                            help=f"{f.metadata['help']} (default: {f.default})".replace("%", "%%"))

def make_config(given: dict) -> TrainConfig:
    """The recipe's settings, changed by the flags that were given."""
    recipe = given.get("recipe", "demo")
    if recipe not in RECIPES:
        raise UsageError(f"recipe={recipe!r} is not known; use one of {', '.join(RECIPES)}.")
    return TrainConfig(**{**RECIPES[recipe], "recipe": recipe, **given})

def run_program(main, argv: list[str] | None = None) -> int:
    """Run a command line: errors are one line for people, unless --debug asks for the traceback. -> exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        main([a for a in argv if a != "--debug"])
        return 0
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in argv:
            raise
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1

def generator_for(seed: int, *stream: int) -> torch.Generator:
    """A generator that is a pure function of the seed and of what it is for: a stream, then epoch or step, rank."""
    state = np.random.SeedSequence([seed, *stream]).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))

# ---- Data: built-in images, CIFAR-10, or a folder --------------------------------------------------------------------
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"

class Batch(NamedTuple):
    """Images as the data sets below give them."""
    images: Tensor  # b c height width, uint8, smaller ones in the top left corner
    sizes: Tensor  # b 2, height and width of each
    indices: list[int]  # which images of the data set these are
    unreadable: list[str]  # files for which the next readable one stands in

@dataclass(eq=False)
class ImagesInMemory(Dataset):
    """Images of one size. images: n c height width."""
    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        sizes = torch.tensor(self.images.shape[-2:]).expand(len(indices), 2)
        return Batch(self.images[indices], sizes, indices, [])

class ImageFiles(Dataset):
    """Images read when asked for, the shorter side reduced to `side`. check: ValueError if half are unreadable."""
    def __init__(self, paths: list[Path], side: int, cache_bytes: int, check: bool = True):
        self.paths, self.side, self.free_bytes, self.cache = paths, side, cache_bytes, {}
        tried = [self.read(i) is not None for i in range(0, len(paths) if check else 0, max(len(paths) // 32, 1))]
        if 2 * sum(tried) <= len(tried) > 0:
            raise ValueError(f"of {len(tried)} files tried in {paths[0].parent}, only {sum(tried)} are readable.")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> Tensor | None:
        """The image, or None if the file is no readable image."""
        if i in self.cache:
            return self.cache[i]
        try:
            pixels = load_image(self.paths[i], self.side)
        except Exception:  # Pillow's parsers raise every kind there is on damaged files
            return None
        if pixels.nbytes <= self.free_bytes:
            self.cache[i] = pixels
            self.free_bytes -= pixels.nbytes
        return pixels

    def __getitems__(self, indices: list[int]) -> Batch:
        images, used, unreadable = [], [], []
        for i in indices:
            for j in (k % len(self) for k in range(i, i + len(self))):  # the next readable one, the same whoever reads
                if (pixels := self.read(j)) is not None:
                    break
                unreadable.append(str(self.paths[j]))
            else:
                raise OSError(f"none of the {len(self)} image files is readable any more, such as {self.paths[i]}.")
            images.append(pixels)
            used.append(j)
        sizes = torch.tensor([image.shape[-2:] for image in images])
        canvas = torch.zeros(len(images), *sizes.amax(dim=0).tolist(), 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for row, image in zip(canvas, images, strict=True):
            row[:, :image.shape[1], :image.shape[2]] = image
        return Batch(canvas, sizes, used, unreadable)

def load_image(path: Path, side: int) -> Tensor:
    """A picture file as uint8 3 height width, upright, its shorter side at most `side` (the longer: four times)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's own limit, as an error
        with Image.open(path) as image:
            image.draft("RGB", (side, side))  # JPEG: decode at a fraction of the size where that is enough
            image = to_rgb(image)
    scale = min(1, side / min(image.size), 4 * side / max(image.size))
    if scale < 1:
        image = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.BILINEAR, reducing_gap=2)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

# A data set: two Datasets and the class numbers of their images. Without labels or val the last three are None.
Images = namedtuple("Images", "classes train train_labels val val_labels")

def open_data(config: TrainConfig) -> Images:
    """What --data names: synthetic, cifar10, or a folder."""
    if config.data in ("synthetic", "cifar10"):
        return synthetic_images(config.seed) if config.data == "synthetic" else cifar10_images(Path(config.data_dir))
    return folder_images(Path(config.data), 2 * config.image_size, config.cache_mb * 2**20 // (config.num_workers + 1))

def smooth_noise(count: int, size: int, width: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise blurred by `width` pixels, of deviation 1. -> count size size."""
    frequency = np.fft.fftfreq(size)[:, None] ** 2 + np.fft.fftfreq(size) ** 2
    spectrum = np.fft.fft2(rng.standard_normal((count, size, size))) * np.exp(-2 * (np.pi * width) ** 2 * frequency)
    noise = np.fft.ifft2(spectrum).real
    return noise / noise.std(axis=(1, 2), keepdims=True)

cos, sin, tanh, pi = np.cos, np.sin, np.tanh, np.pi
TEXTURES = {  # u, v: phases in two directions at right angles; n(width): smooth noise; all count size size
    "stripes": lambda u, v, n: tanh(3 * sin(u)),
    "checks": lambda u, v, n: tanh(6 * sin(u / 1.4) * sin(v / 1.4)),
    "dots": lambda u, v, n: tanh(4 * (cos(u) + cos(v) - 0.9)),
    "waves": lambda u, v, n: tanh(3 * sin(u + 1.5 * sin(v / 1.5))),
    "honeycomb": lambda u, v, n: tanh(3 * (cos(u) + cos(-u / 2 + v * 0.866) + cos(-u / 2 - v * 0.866) + 0.3)),
    "bricks": lambda u, v, n: 1 - 2.0 * ((cos(v * 2) > 0.75) | (cos(u / 1.2 + pi * (np.floor(v / pi) % 2)) > 0.9)),
    "zigzag": lambda u, v, n: tanh(3 * sin(u + 2.2 * np.arcsin(sin(v / 1.6)))),
    "rings": lambda u, v, n: tanh(3 * sin(2.2 * np.hypot(*((p / 2.5) % (2 * pi) - pi for p in (u, v))))),
    "blobs": lambda u, v, n: tanh(2 * n(1.5)),
    "grain": lambda u, v, n: tanh(2 * n(0.3))}

def draw_texture(texture: Callable, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Grey textures of one kind, each with its own turn, period, phase and bends. -> count size size."""
    turn, period = rng.uniform(0, 2 * pi, (count, 1, 1)), rng.uniform(5, 9, (count, 1, 1))
    y, x = np.mgrid[:size, :size]
    x, y = (axis + 1.5 * smooth_noise(count, size, 5, rng) for axis in (x, y))  # bent: no two images match by pixel
    u = 2 * pi * (cos(turn) * x + sin(turn) * y) / period + rng.uniform(0, 2 * pi, (count, 1, 1))
    v = 2 * pi * (-sin(turn) * x + cos(turn) * y) / period + rng.uniform(0, 2 * pi, (count, 1, 1))
    return texture(u, v, lambda width: smooth_noise(count, size, width, rng))

def synthetic_images(seed: int, train: int = 4000, val: int = 1000, size: int = 32) -> Images:
    """Ten kinds of grey texture. The class is what any two crops of an image have in common; place, turn, period and
    contrast are not, so raw pixels say little. (In colour, colour tells images apart, and the method learns that.)"""
    rng = np.random.default_rng([seed, IMAGES])
    labels, kinds = torch.arange(train + val) % len(TEXTURES), len(TEXTURES)
    pixels = np.empty((train + val, size, size), np.float32)
    for label, texture in enumerate(TEXTURES.values()):
        pixels[label::kinds] = draw_texture(texture, len(labels[label::kinds]), size, rng)
    pixels -= pixels.mean(axis=(1, 2), keepdims=True)  # neither brightness nor contrast may give the kind away
    pixels /= pixels.std(axis=(1, 2), keepdims=True)
    shape = (train + val, 1, 1)
    contrast = rng.uniform(0.4, 1, shape) * rng.choice([-1, 1], shape)
    pixels = 127.5 + 60 * contrast * pixels + rng.uniform(-30, 30, shape) + rng.normal(0, 6, pixels.shape)
    images = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))[:, None].repeat(1, 3, 1, 1)
    return Images(list(TEXTURES), ImagesInMemory(images[:train]), labels[:train], ImagesInMemory(images[train:]),
                  labels[train:])

class PickledArray:
    """Keeps what a pickle would hand to numpy, whose own functions trust it: an array of objects at any address."""
    def __setstate__(self, state):
        self.state = state

class CifarUnpickler(pickle.Unpickler):
    """CIFAR-10's files are pickles. Whatever one wants to call, it gets a PickledArray: nothing of anyone's is run."""
    def find_class(self, module, name):
        return lambda *_: PickledArray()

def read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One of the original batches -> images n 3 32 32 (uint8), labels n. Raises ValueError if it is none."""
    try:
        content = CifarUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        _, shape, _, _, pixels = content[b"data"].state
        labels = torch.tensor(list(bytes([*content[b"labels"]])))  # bytes() takes a flat list of small numbers only
        if shape != (len(labels), 3072) or labels.max() > 9:
            raise ValueError(f"data is {shape} with {len(labels)} labels")
        return torch.tensor(np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)), labels
    except Exception as error:  # an unpickler fed with garbage raises every kind there is
        raise ValueError(f"{path} is no CIFAR-10 python batch: {error}") from None

def cifar10_images(data_dir: Path) -> Images:
    """The data_batch_* files that are there; if there are none, the archive is downloaded, checked and unpacked."""
    found = [f for f in (data_dir, data_dir / "cifar-10-batches-py") if [*f.glob("data_batch_[1-5]")]]
    folder = found[0] if found else download_cifar10(data_dir)
    batches = [read_cifar_batch(path) for path in sorted(folder.glob("data_batch_[1-5]"))]
    train, train_labels = map(torch.cat, zip(*batches, strict=True))
    val, val_labels = read_cifar_batch(folder / "test_batch")
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    return Images(classes, ImagesInMemory(train), train_labels, ImagesInMemory(val), val_labels)

def download_cifar10(data_dir: Path) -> Path:
    """Fetch the archive from the authors' page, check that it is the published one, unpack it into data_dir."""
    print(f"downloading {CIFAR10_URL} (163 MiB)", flush=True)
    with urllib.request.urlopen(CIFAR10_URL, timeout=60) as response:
        archive = response.read()
    if hashlib.sha256(archive).hexdigest() != CIFAR10_SHA256:
        raise ValueError(f"{CIFAR10_URL} is not the published file (its SHA-256 differs); nothing was unpacked.")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):  # one by one: processes of one job may do so at once
            write_file(data_dir / "cifar-10-batches-py" / Path(member.name).name, tar.extractfile(member).read())
    return data_dir / "cifar-10-batches-py"

def image_paths(folder: Path) -> list[Path]:
    """All picture files below a folder, in a fixed order. Raises UsageError if there are none."""
    roots = [folder, *(p for p in folder.glob("*") if p.is_symlink())]  # links to classes, but no links in a circle
    paths = sorted(p for root in roots for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        raise UsageError(f"{folder} is no folder or holds no image ({' '.join(sorted(IMAGE_SUFFIXES))}).")
    return paths

def folder_images(folder: Path, side: int, cache_bytes: int) -> Images:
    """train/CLASS/* and val/CLASS/* (only CLASS folders: labels), or any tree of images without labels."""
    train, val = folder / "train", folder / "val"
    paths = image_paths(train if train.is_dir() else folder)
    images = ImageFiles(paths, side, cache_bytes)
    if not val.is_dir() or any(path.parent.parent != train for path in paths):
        return Images([], images, None, None, None)
    val_paths, classes = image_paths(val), sorted({path.parent.name for path in paths})
    if unknown := sorted({path.parent.name for path in val_paths} - set(classes)):
        raise UsageError(f"{val} has classes that train lacks: {', '.join(unknown[:5])}.")
    labels, val_labels = (torch.tensor([classes.index(p.parent.name) for p in part]) for part in (paths, val_paths))
    return Images(classes, images, labels, ImageFiles(val_paths, side, cache_bytes), val_labels)

def step_batches(config: TrainConfig, num_images: int, steps: range, rows: slice) -> Iterator[list[int]]:
    """The images of each step: this process's rows of a stretch of the epoch's order, drawn from (seed, epoch)."""
    for step in steps:
        epoch, place = divmod(step, num_images // config.batch_size)
        if place == 0 or step == steps.start:
            order = torch.randperm(num_images, generator=generator_for(config.seed, ORDER, epoch))
        yield order[place * config.batch_size:][rows].tolist()

# ---- Input Views (paper, Section 3): crop, flip, colour jitter, greyscale, blur; whole batches on the training device
# Uniform numbers per view and image. They are drawn on the CPU for the global batch, whatever the number of processes.
TRIES = 10  # of a crop that fits
DRAWS = {"crop": 2 * TRIES + 2, "flip": 1, "jitter": 1, "factors": 4, "order": 4, "grey": 1, "blur": 2}

def crop_boxes(u: Tensor, sizes: Tensor, scale: tuple[float, float]) -> Tensor:
    """Random resized crop: area uniform in `scale`, aspect ratio log-uniform in [3/4, 4/3], the first of ten tries that
    fits, else the largest square in the middle. u: b 22 in [0, 1), sizes: b 2 -> b 4 (top, left, height, width)."""
    height, width = sizes.double().unbind(dim=1)
    area = (scale[0] + (scale[1] - scale[0]) * u[:, :TRIES].double()) * (height * width)[:, None]
    ratio = (math.log(3 / 4) + math.log(16 / 9) * u[:, TRIES:2 * TRIES].double()).exp()
    w, h = (area * ratio).sqrt().round().clamp(min=1), (area / ratio).sqrt().round().clamp(min=1)
    fits = (w <= width[:, None]) & (h <= height[:, None])
    first, square = fits.int().argmax(dim=1, keepdim=True), torch.minimum(height, width)
    h, w = (torch.where(fits.any(dim=1), x.gather(1, first)[:, 0], square) for x in (h, w))
    place = torch.where(fits.any(dim=1)[:, None], u[:, 2 * TRIES:].double(), 0.5)
    top, left = (place[:, 0] * (height - h + 1)).floor(), (place[:, 1] * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], dim=1).long()

def resize_matrix(start: Tensor, length: Tensor, num_inputs: int, size: int) -> Tensor:
    """One axis of a bilinear resize with antialiasing (Pillow's): pixels start ... start + length - 1 of num_inputs
    become `size`, each a triangle-weighted mean of those around its centre. start, length: b -> b size num_inputs."""
    scale = (length / size).float()[:, None, None]
    centre = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    position = torch.arange(num_inputs, device=start.device) + 0.5
    weights = (1 - (position - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((position > start[:, None, None]) & (position < (start + length)[:, None, None]))
    return weights / weights.sum(dim=-1, keepdim=True)

def crop_by_products(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """crop_and_resize, all at once: two matrix products for each crop; a flip reverses one of the matrices."""
    # Every box is cut out as a window of the largest one, so that the products run over no more than that.
    window = boxes[:, 2:].amax(dim=0)
    corner = torch.minimum(boxes[:, :2], torch.tensor(images.shape[-2:]) - window)
    start, (height, width) = boxes[:, :2] - corner, window.tolist()
    rows = resize_matrix(start[:, 0], boxes[:, 2], height, size) / 255
    columns = resize_matrix(start[:, 1], boxes[:, 3], width, size)
    columns[flip] = columns[flip].flip(1)
    windows = images.unfold(2, height, 1).unfold(3, width, 1)  # a view: nothing is copied before the next line
    top, left = corner.to(images.device).unbind(dim=1)
    cut = windows[torch.arange(len(boxes), device=images.device) % len(images), :, top, left].float()
    half = torch.bmm(rearrange(cut, "b c h w -> b (c h) w"), columns.to(images.device).transpose(1, 2))
    half = rearrange(half, "b (c h) w -> b h (c w)", h=height)
    return rearrange(torch.bmm(rows.to(images.device), half), "b h (c w) -> b c h w", w=size)

def crop_and_resize(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Cut boxes out of images and resize them; box i is of image i modulo b. images: b c height width (uint8, on the
    device); boxes: (v b) 4, top, left, height, width; flip: (v b) (both on the CPU) -> (v b) c size size, 0 to 1."""
    if images.device.type != "cpu" or max(images.shape[-2:]) <= 64:
        return crop_by_products(images, boxes, flip, size)
    crops = []  # one by one: 2 to 4 times as fast for large pictures on a CPU, in its cache and in whole numbers
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        crop = images[i % len(images)].narrow(1, top, height).narrow(2, left, width)[None]
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
        crops.append(crop.flip(-1) if flip[i] else crop)
    return torch.cat(crops).float().div_(255)

def to_grey(pixels: Tensor) -> Tensor:
    """Luma of RGB (ITU-R 601-2, as Pillow). pixels: b 3 h w -> b 1 h w."""
    red, green, blue = pixels.split(1, dim=1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)

def adjust_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of a full circle; saturation and value stay. pixels: b 3 h w, shift: b 1 1 1."""
    red, green, blue = pixels.split(1, dim=1)
    value, least = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    scale = 1 / (6 * chroma).clamp_(min=1e-8)
    hue = torch.where(value == red, (green - blue).mul_(scale), torch.where(  # in turns of the circle
        value == green, (blue - red).mul_(scale).add_(1 / 3), (red - green).mul_(scale).add_(2 / 3))).add_(shift)
    hue -= hue.floor()  # on a CPU faster than % 1
    # Red is full within a sixth of 0 and nothing within a sixth of 1/2; green and blue are full around 1/3 and 2/3.
    centre, sign, height = hue.new_tensor([[1 / 2, 1 / 3, 2 / 3], [6, -6, -6], [-1, 2, 2]])[..., None, None]
    return torch.addcmul(least, chroma, torch.addcmul(height, sign, (hue - centre).abs_()).clamp_(0, 1))

COLOR_OPERATIONS = (  # brightness, contrast, saturation, hue, as torchvision and Pillow define them
    lambda x, f: (x * f).clamp_(0, 1),
    lambda x, f: torch.lerp(to_grey(x).mean(dim=(1, 2, 3), keepdim=True), x, f).clamp_(0, 1),
    lambda x, f: torch.lerp(to_grey(x), x, f).clamp_(0, 1),
    adjust_hue)

def color_jitter(pixels: Tensor, strength: float, apply: Tensor, u_factors: Tensor, u_order: Tensor) -> Tensor:
    """SimCLR's colour jitter: four adjustments in an order of each image's own. pixels: b 3 h w in [0, 1]; apply: b;
    u_factors, u_order: b 4 (the last three on the CPU: which rows a step takes is known without asking the device)."""
    spread, middle = strength * torch.tensor([0.8, 0.8, 0.8, 0.2]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    low = torch.where(middle > 0, (middle - spread).clamp(min=0), -spread)
    factors = (low + u_factors * (middle + spread - low)).to(pixels.device)[..., None, None, None]
    for kinds in u_order.argsort(dim=1).T:  # every image's first adjustment, then every image's second, ...
        for kind, operation in enumerate(COLOR_OPERATIONS):
            rows = (apply & (kinds == kind)).nonzero()[:, 0].to(pixels.device)
            pixels[rows] = operation(pixels[rows], factors[rows, kind])
    return pixels

def gaussian_blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Blur by a Gaussian, a matrix product per axis; weights that fall outside are left out. sigma: b, in pixels."""
    place = torch.arange(pixels.shape[-1], device=pixels.device)
    exponent = -0.5 * ((place[:, None] - place) / sigma[:, None, None]) ** 2
    # Weights below 2e-9 are dropped: further out they are denormal numbers, which a CPU multiplies 100 times slower.
    weights = exponent.masked_fill(exponent < -20, -math.inf).softmax(dim=-1)[:, None]
    return weights @ pixels @ weights.transpose(-1, -2)

def draw_views(batch: int, views: int, generator: torch.Generator) -> dict[str, Tensor]:
    """All uniform numbers that the views of a batch need: name -> v b count."""
    return {name: torch.rand(views, batch, count, generator=generator) for name, count in DRAWS.items()}

def views_of_one_size(batch: Batch, draws: dict[str, Tensor], config: TrainConfig, size: int, scale: tuple) -> Tensor:
    """v views of each image as the network sees them. draws: name -> (v b) count (on the CPU) -> (v b) 3 size size."""
    boxes = crop_boxes(draws["crop"], batch.sizes.repeat(len(draws["crop"]) // len(batch.sizes), 1), scale)
    pixels = crop_and_resize(batch.images, boxes, draws["flip"][:, 0] < config.flip, size)
    if config.color_jitter > 0:
        apply = draws["jitter"][:, 0] < config.jitter
        pixels = color_jitter(pixels, config.color_jitter, apply, draws["factors"], draws["order"])
    if len(grey := (draws["grey"][:, 0] < config.grey).nonzero()[:, 0].to(pixels.device)):
        pixels[grey] = to_grey(pixels[grey]).expand(-1, 3, -1, -1)
    if len(blurred := (draws["blur"][:, 0] < config.blur).nonzero()[:, 0]):
        low, high = config.blur_sigma
        sigma, blurred = (x.to(pixels.device) for x in (low + (high - low) * draws["blur"][blurred, 1], blurred))
        pixels[blurred] = gaussian_blur(pixels[blurred], sigma)
    return normalize(pixels)

class Views(NamedTuple):
    """What the two encoders see of a batch."""
    target_view: Tensor  # b c height width
    anchor_views: list[Tensor]  # v tensors b c height width: random views, then focal views
    patches_to_keep: list[Tensor | None]  # of each anchor view: b r, or None for all

def make_views(batch: Batch, config: TrainConfig, step: int, rows: slice) -> Views:
    """Target and anchor views (random, then focal), patches to keep of each anchor: functions of images, seed, step."""
    whole, focal = slice(0, 1 + config.random_views), slice(1 + config.random_views, None)
    kinds = [(whole, config.image_size, config.crop_scale), (focal, config.focal_size, config.focal_scale)]
    count = 1 + config.random_views + config.focal_views
    draws, views = draw_views(config.batch_size, count, generator_for(config.seed, VIEWS, step)), []
    if config.anchor_view != "own":  # paper, table 9: the anchor is the target's own view, perhaps in other colours
        for name in draws if config.anchor_view == "target" else ("crop", "flip", "grey", "blur"):
            draws[name][1:1 + config.random_views] = draws[name][:1]
    for which, size, scale in kinds if config.focal_views else kinds[:1]:
        own = {name: u[which, rows].flatten(0, 1) for name, u in draws.items()}
        views += views_of_one_size(batch, own, config, size, scale).split(len(batch.images))
    generator, patches = generator_for(config.seed, MASKS, step), (config.image_size // config.patch_size) ** 2
    masks = [sample_patches_to_keep(config.batch_size, patches, config.mask_ratio, generator)[rows]
             for _ in range(config.random_views)]
    masks = [mask.to(batch.images.device, non_blocking=True) for mask in masks]
    return Views(views[0], views[1:], masks + [None] * config.focal_views)

# ---- Schedules (Appendix A.1) ----------------------------------------------------------------------------------------
StepValues = namedtuple("StepValues", "lr weight_decay momentum sharpening")  # what they say for one step

def linear(step: float, total_steps: float, start: float, final: float) -> float:
    """From start, exact at step 0, to final at total_steps."""
    return start + (final - start) * step / total_steps

def cosine(step: float, total_steps: float, start: float, final: float) -> float:
    """Half a cosine from start at step 0 to final at total_steps; does not turn back after that."""
    return final + (start - final) * (1 + math.cos(math.pi * min(step / total_steps, 1))) / 2

def warmup_cosine(step: float, warmup_steps: int, total_steps: int, start: float, peak: float, final: float) -> float:
    """Linear from start to peak in warmup_steps, then a cosine to final at total_steps."""
    if step < warmup_steps:
        return linear(step, warmup_steps, start, peak)
    return cosine(step - warmup_steps, max(1, total_steps - warmup_steps), peak, final)

def schedule_at(config: TrainConfig, step: int, steps_per_epoch: int) -> StepValues:
    """A pure function of the step (from 0). As published, learning rate and weight decay are advanced before they are
    used, momentum and sharpening after, and all are laid out over `schedule_stretch` times the run."""
    stretched = config.schedule_stretch * steps_per_epoch * config.epochs
    warmup = int(config.warmup_epochs * steps_per_epoch)
    return StepValues(lr=warmup_cosine(step + 1, warmup, int(stretched), config.start_lr, config.lr, config.final_lr),
                      weight_decay=cosine(step + 1, int(stretched), config.weight_decay, config.final_weight_decay),
                      momentum=linear(step, stretched, config.momentum, config.final_momentum),
                      sharpening=linear(step, stretched, config.sharpening, config.final_sharpening))

# ---- Many processes: all that knows of torch.distributed; one process needs none of it -------------------------------
TIMEOUT = timedelta(minutes=20)  # how long processes wait for one another: the first one evaluates by itself

class AllReduce(torch.autograd.Function):
    """Over all processes, for msn_loss: "sum", whose gradient is the sum of all, or "max" (of a detached x)."""
    @staticmethod
    def forward(ctx, x: Tensor, op: str) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return all_processes(grad, "sum"), None

all_processes = AllReduce.apply

class GlobalBatchNorm1d(nn.BatchNorm1d):
    """Batch norm, always of the batch of all processes: for training only (torch's own refuses the CPU). x: rows d."""
    def forward(self, x: Tensor) -> Tensor:
        rows, rank, world = x.to(self.weight.dtype), dist.get_rank(), dist.get_world_size()
        mine = torch.stack(torch.var_mean(rows, dim=0, correction=0))
        # Each process fills its own place, so that one reduction brings all together.
        variances, means = all_processes(F.pad(mine[None], (0, 0, 0, 0, rank, world - rank - 1)), "sum").unbind(dim=1)
        mean, variance = means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() / (1 - 1 / (world * len(x))), self.momentum)
        self.num_batches_tracked += 1
        return ((rows - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)

@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, on which device it computes, and what sums up over all of them."""
    rank: int
    count: int
    device: torch.device
    reduce: Callable[[Tensor, str], Tensor] = one_process

def start_processes(config: TrainConfig) -> Processes:
    """Join the process group that torchrun describes in the environment; without torchrun, one process."""
    count, rank, local = (int(os.environ.get(*name)) for name in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and config.device != "cpu" else 0
    if config.device == "cuda" and not gpus:
        raise UsageError("device='cuda' but torch sees no CUDA device (GPU); use --device cpu or a CUDA build.")
    if config.batch_size % count or config.batch_size // count < 2:
        raise UsageError(f"batch_size={config.batch_size} is no even share, of 2 images or more, for each of {count} "
                         f"processes; use {max(2, math.ceil(config.batch_size / count)) * count}.")
    if gpus:
        if local >= gpus:
            raise UsageError(f"process {local} has no GPU ({gpus} are here); start fewer, or use --device cpu.")
        torch.cuda.set_device(local)
    if count > 1:
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # When torchrun starts workers again, its store still holds the addresses of those that died.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    return Processes(rank, count, device, all_processes if count > 1 else one_process)

# ---- One training step -----------------------------------------------------------------------------------------------
def choose_precision(wanted: str, device: torch.device) -> str:
    """auto is bfloat16 where matrix products in it are fast: CUDA from Ampere on, CPUs with AMX."""
    if wanted == "auto":
        amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
        fast = torch.cuda.get_device_capability(device)[0] >= 8 if device.type == "cuda" else amx
        wanted = "bfloat16" if fast else "float32"
    return wanted

def build_model(config: TrainConfig, processes: Processes) -> ViTMSNForPreTraining:
    """The Masked Siamese Network of these settings, its weights a function of the seed alone."""
    torch.manual_seed(config.seed)
    model = ViTMSNForPreTraining(
        config.model_config(), config.head_hidden_size, config.output_dim, config.num_prototypes,
        temperature=config.temperature, sharpening=config.sharpening, sinkhorn_iterations=config.sinkhorn_iterations,
        memax_weight=config.memax_weight, prior_exponent=config.prior_exponent, all_reduce=processes.reduce)
    if config.init_from:
        new = model.load_pretrained(config.init_from)
        print(f"starting from {config.init_from}; new are: {', '.join(new) or 'none'}", flush=True)
    model.prototypes.requires_grad_(not config.freeze_prototypes)
    # On a CPU the fused kernel's backward pass in bfloat16 takes 3 to 8 times as long as the written-out one.
    slow = (processes.device.type, config.precision) == ("cpu", "bfloat16")
    model.anchor_encoder.set_attn_implementation("eager" if slow else "sdpa")
    if config.gradient_checkpointing:
        model.anchor_encoder.gradient_checkpointing_enable()
    for encoder in (model.anchor_encoder, model.target_encoder) if config.compile else ():
        encoder.compile()
    for module in model.modules():
        if processes.count > 1 and isinstance(module, nn.BatchNorm1d):
            module.__class__ = GlobalBatchNorm1d
    return model.to(processes.device, torch.float64 if config.precision == "float64" else torch.float32).train()

def parameter_groups(model: ViTMSNForPreTraining, weight_decay: float) -> list[dict]:
    """For AdamW, as published: encoder parameters of two or more dimensions decay; biases, norms, prototypes do not."""
    encoder = list(model.anchor_encoder.parameters())
    return [{"params": [p for p in encoder if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in encoder if p.ndim < 2], "weight_decay": 0.0},
            {"params": [model.prototypes], "weight_decay": 0.0}]

def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, target_view: Tensor, anchor_views: list[Tensor],
               patches_to_keep: list[Tensor | None], now: StepValues, clip_grad: float,
               precision: str = "float32") -> tuple[MSNLoss, Tensor]:
    """One update of anchor encoder, prototypes and target encoder -> terms of the loss, norm of the encoder's gradient.
    Raises FloatingPointError, before any weight has changed, if the loss or a gradient is not finite."""
    network = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    optimizer.zero_grad(set_to_none=True)  # before the forward pass, which needs the memory of the last gradients
    with torch.autocast(target_view.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = model(target_view, anchor_views, patches_to_keep, now.sharpening)
    loss.loss.backward()
    # As published, the prototypes' gradient is not part of the norm and is not clipped.
    grad_norm = nn.utils.clip_grad_norm_(network.anchor_encoder.parameters(), clip_grad, foreach=True)
    check = [loss.loss.detach(), grad_norm, *(g.abs().max() for g in [network.prototypes.grad] if g is not None)]
    if not torch.isfinite(torch.stack(check)).all():  # here the host waits for the device
        raise FloatingPointError(f"not finite: loss {loss.loss:.4g}, cross-entropy {loss.cross_entropy:.4g}, me-max "
                                 f"{loss.memax:.4g}, gradient norm {grad_norm:.4g}")
    for group in optimizer.param_groups:
        group["lr"] = now.lr
    optimizer.param_groups[0]["weight_decay"] = now.weight_decay  # the first group is the one that decays
    optimizer.step()
    network.update_target(now.momentum)
    return loss, grad_norm

# ---- Evaluation: k nearest neighbours of frozen features -------------------------------------------------------------
@torch.no_grad()
def embed_images(encoder: ViTMSNModel | None, images: Dataset, indices: list[int], size: int, device: torch.device,
                 batch_size: int = 256) -> tuple[Tensor, list[int]]:
    """Features of whole images squashed to `size`: the class token before the final norm, or (encoder None) raw pixels.
    -> rows d, float32, on the CPU, and which images they are: unreadable ones are left out."""
    features, kept, module = [], [], encoder or nn.Identity()
    training = module.training
    module.eval()
    for wanted in (indices[first:first + batch_size] for first in range(0, len(indices), batch_size)):
        batch = images.__getitems__(wanted)
        right = [row for row, i in enumerate(wanted) if batch.indices[row] == i]
        boxes = torch.cat([torch.zeros_like(batch.sizes), batch.sizes], dim=1)
        whole = crop_and_resize(batch.images.to(device), boxes, torch.zeros(len(boxes), dtype=torch.bool), size)
        pixels = normalize(whole[right])
        state = pixels.flatten(1) if encoder is None else encoder.representation(pixels, interpolate_pos_encoding=True)
        features.append(state.float().cpu())
        kept += [wanted[row] for row in right]
    module.train(training)
    return torch.cat(features), kept

def spread(images: Dataset, count: int) -> list[int]:
    """Indices of at most `count` images, evenly spaced."""
    return torch.linspace(0, len(images) - 1, min(count, len(images))).long().tolist()

def knn_predict(bank: Tensor, bank_labels: Tensor, features: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Class of each row by its k nearest rows in the bank: cosine similarity, votes weighted by exp(similarity / T).
    bank: n d, bank_labels: n, features: m d -> m."""
    bank, features = F.normalize(bank, dim=-1), F.normalize(features, dim=-1)
    classes, predicted = int(bank_labels.max()) + 1, []
    for rows in features.split(1024):
        similarity, nearest = (rows @ bank.T).topk(min(k, len(bank)), dim=-1)
        # Subtracting the row's maximum changes no vote and keeps exp() finite at any temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), classes).scatter_add_(1, bank_labels[nearest], weights)
        predicted.append(votes.argmax(dim=-1))
    return torch.cat(predicted)

def knn_accuracy(encoder: ViTMSNModel | None, data: Images, config: TrainConfig, device: torch.device) -> float:
    """Share of validation images right by k-NN on 20,000 training images. encoder None: raw pixels, 64 x 64 at most."""
    size = config.image_size if encoder else min(config.image_size, 64)  # the published recipes' would take 80 GiB
    train, train_kept = embed_images(encoder, data.train, spread(data.train, 20000), size, device)
    val, val_kept = embed_images(encoder, data.val, list(range(len(data.val))), size, device)
    predicted = knn_predict(train, data.train_labels[train_kept], val)
    return (predicted == data.val_labels[val_kept]).float().mean().item()

# ---- The run's folder: settings, metrics, checkpoints ----------------------------------------------------------------
METRICS = ("step", "epoch", "loss", "cross_entropy", "memax", "entropy", "prototypes_used", "top_assignment",
           "grad_norm", *StepValues._fields, "images_per_second", "elapsed_seconds")
CHECKPOINT = {"target_encoder": dict, "encoder": dict, "prototypes": Tensor, "optimizer": dict, "step": int,
              "elapsed": float, "config": dict}

def open_table(path: Path, columns: tuple[str, ...], keep_before: int) -> TextIO:
    """A CSV file to which rows are printed; when a run is resumed, it loses those after the checkpoint."""
    rows = [row.values() for row in read_table(path) if int(row["step"]) < keep_before]
    write_file(path, "".join(",".join(row) + "\n" for row in (columns, *rows)).encode())
    return open(path, "a", buffering=1, encoding="utf-8")  # a row is written at once

def read_table(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV file; none if it is not there. A last row that was cut off is left out."""
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.is_file() else ""
    return list(csv.DictReader(io.StringIO(whole)))

def save_checkpoint(folder: Path, model: ViTMSNForPreTraining, optimizer: torch.optim.Optimizer, config: TrainConfig,
                    step: int, elapsed: float) -> None:
    """All that resuming needs: no state of random generators, as every draw is a function of seed and step. Encoders
    are stored as in the original release: what reads vits16_800ep.pth.tar reads this. The checkpoint before stays."""
    channels = model.config.num_channels
    content = {"target_encoder": to_original(model.target_encoder.state_dict(), channels),
               "encoder": to_original(model.anchor_encoder.state_dict(), channels),
               "prototypes": model.prototypes.detach(), "optimizer": optimizer.state_dict(), "step": step,
               "elapsed": elapsed, "config": asdict(config), "model_config": model.config.to_dict()}
    newest, last = folder / "checkpoint-next.pt", folder / "checkpoint.pt"
    write_file(newest, lambda file: torch.save(content, file))
    if last.is_file():
        os.replace(last, folder / "checkpoint-previous.pt")
    os.replace(newest, last)

def load_checkpoint(folder: Path) -> dict | None:
    """The newest whole checkpoint of a run, None if there is none; a damaged one is named and the one before taken."""
    names = ("checkpoint-next.pt", "checkpoint.pt", "checkpoint-previous.pt")
    found = [folder / name for name in names if (folder / name).is_file()]
    for path in found:
        try:
            content = read_tensors(path)
            if wrong := [name for name, kind in CHECKPOINT.items() if not isinstance(content.get(name), kind)]:
                raise ValueError(f"{path} is no checkpoint of train_msn.py: {', '.join(wrong)} missing or wrong.")
            return content
        except ValueError as error:
            print(f"{error} Trying the checkpoint before it.", file=sys.stderr, flush=True)
    if found:
        raise ValueError(f"no checkpoint in {folder} can be read; start again in another folder.")
    print(f"there is no checkpoint in {folder}: starting from the beginning", flush=True)

def restore(content: dict, model: ViTMSNForPreTraining, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's content back. Raises ValueError if it is of another architecture or not finite."""
    parts = {"target_encoder.": content["target_encoder"], "anchor_encoder.": content["encoder"]}
    try:
        weights = {part + name: v for part, state in parts.items() for name, v in from_original(state).items()}
        model.load_state_dict({**weights, "prototypes": content["prototypes"]})
        optimizer.load_state_dict({**optimizer.state_dict(), "state": content["optimizer"]["state"]})
        tensors = [(name, v, v.shape) for name, v in model.state_dict().items()]
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
            shapes = {"exp_avg": p.shape, "exp_avg_sq": p.shape, "step": ()}
            tensors += [(name, optimizer.state[p][name], shape) for name, shape in shapes.items()]
        for name, v, shape in tensors:
            if v.shape != shape or not torch.isfinite(v).all() or (name in ("exp_avg_sq", "step") and v.min() < 0):
                raise ValueError(f"{name} is not finite, negative, or of shape {tuple(v.shape)}, not {tuple(shape)}")
    except Exception as error:  # what is in it may be of any kind
        raise ValueError(f"the checkpoint does not fit these settings: {error}") from None

def settle(given: dict, folder: Path) -> tuple[TrainConfig, dict | None]:
    """Settings and checkpoint of a run in `folder`. Raises UsageError if that overwrites a run or contradicts it."""
    config = make_config(given)
    if not config.resume and (folder / "config.json").exists():
        raise UsageError(f"{folder} holds a run; go on with it by --resume, or choose another --output-dir.")
    content = load_checkpoint(folder) if config.resume else None
    if content is None and not (folder / "config.json").exists():
        return config, None
    saved = content["config"] if content else json.loads((folder / "config.json").read_text())
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    for name, value in given.items():
        if name not in FREE_TO_CHANGE and value not in ("auto", saved.get(name)):
            raise UsageError(f"--{name.replace('_', '-')} {value}: {folder} was started with {saved.get(name)}.")
    settings = {**saved, "max_steps": 0, **{name: v for name, v in given.items() if name in FREE_TO_CHANGE}}
    return TrainConfig(**{f.name: settings[f.name] for f in fields(TrainConfig) if f.name in settings}), content

# ---- Pictures --------------------------------------------------------------------------------------------------------
COLORS = ("#1f5fa8", "#c8501e", "#2f8a4a", "#7a4fa0", "#8a6d1f", "#555555", "#c02070")

def to_picture(pixels: Tensor, keep: Tensor | None = None, patch_size: int = 1) -> np.ndarray:
    """A normalised image as uint8, its dropped patches in a pale orange. pixels: 3 h w, keep: kept -> h w 3."""
    std, mean = (pixels.new_tensor(v)[:, None, None] for v in (IMAGENET_STD, IMAGENET_MEAN))
    picture = ((pixels.float() * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()
    if keep is not None:
        side = len(picture) // patch_size
        kept = np.isin(np.arange(side * side), keep.cpu().numpy()).reshape(side, side, 1)
        picture = np.where(kept.repeat(patch_size, 0).repeat(patch_size, 1), picture, np.uint8([255, 220, 180]))
    return picture

def save_sheet(path: Path, rows: list[list[np.ndarray]], header: list[str], cell: int = 96) -> None:
    """A table of pictures, the columns named; those of a row at one scale, so a focal view is seen to be smaller."""
    sheet = Image.new("RGB", (len(header) * (cell + 4), len(rows) * (cell + 4) + 16), "white")
    for column, title in enumerate(header):
        ImageDraw.Draw(sheet).text((column * (cell + 4) + 2, 2), title, fill="black")
    for r, row in enumerate(rows):
        largest = max(max(picture.shape) for picture in row)
        for c, image in enumerate(map(Image.fromarray, row)):
            image = image.resize([max(1, s * cell // largest) for s in image.size], Image.Resampling.NEAREST)
            sheet.paste(image, (c * (cell + 4), 16 + r * (cell + 4)))
    write_file(path, lambda file: sheet.save(file, "PNG", optimize=True))

def save_views(path: Path, views: Views, config: TrainConfig) -> None:
    """A sheet of what the network sees: for a few images the target view and the anchor views with their masks."""
    rows = [[to_picture(view[b], None if mask is None else mask[b], config.patch_size)
             for view, mask in zip([views.target_view, *views.anchor_views], [None, *views.patches_to_keep], strict=True)]
            for b in range(min(6, len(views.target_view)))]
    kinds = ["random view" if mask is not None else "focal view" for mask in views.patches_to_keep]
    save_sheet(path, rows, ["target view", *kinds])

@torch.no_grad()
def save_neighbours(path: Path, encoder: ViTMSNModel, data: Images, size: int, device: torch.device,
                    prototypes: Tensor | None = None) -> None:
    """A sheet: the training images nearest to validation images (if any) or, given prototypes (k e), to those."""
    features, kept = embed_images(encoder, data.train, spread(data.train, 2000), size, device)
    if prototypes is None:
        asked = data.val or data.train
        queries, own = embed_images(encoder, asked, spread(asked, 8), size, device)
        first = [[(asked, i)] for i in own]
    else:
        features = encoder.fc(encoder.norm(features.to(prototypes)))
        choices = log_assign(features, prototypes, 1.0).argmax(dim=-1).bincount(minlength=len(prototypes))
        queries = prototypes[choices.topk(min(8, len(choices))).indices]
        first = [[]] * len(queries)
    nearest = (F.normalize(queries, dim=-1) @ F.normalize(features, dim=-1).T).topk(min(7, len(kept)), dim=-1).indices
    rows = [own + [(data.train, kept[j]) for j in near] for own, near in zip(first, nearest.tolist(), strict=True)]
    rows = [[images.__getitems__([i]).images[0].permute(1, 2, 0).numpy() for images, i in row] for row in rows]
    save_sheet(path, rows, ["query"] * len(first[0]) + [f"nearest {i + 1}" for i in range(nearest.shape[1])])

def save_plot(path: Path, panels: dict[str, dict[str, list[tuple[float, float]]]], log_x: bool = False) -> None:
    """Line plots side by side: panel title -> series name -> points (x, y)."""
    width, height, pad = 360, 260, 48
    scale = np.log10 if log_x else np.asarray
    sheet = Image.new("RGB", (width * len(panels), height + 16 * max(map(len, panels.values()))), "white")
    draw = ImageDraw.Draw(sheet)
    for p, (title, series) in enumerate(panels.items()):
        points = np.array([point for line in series.values() for point in line] or [(1, 0)], dtype=float)
        x0, y0, x1, y1 = *points.min(axis=0), *points.max(axis=0)
        y1 += y1 == y0  # a flat line is drawn at the bottom
        left, top, right, bottom = box = (p * width + pad, 28, (p + 1) * width - 16, height - 28)
        draw.rectangle(box, outline="#bbbbbb")
        draw.text((left, 8), title, fill="black")
        for x, y, at_x, at_y in ((x0, y0, left, bottom), (x1, y1, right, top)):
            draw.text((p * width + 4, at_y - 6), f"{y:.3g}", fill="#555555")
            draw.text((at_x - 12, bottom + 4), f"{x:g}", fill="#555555")
        for s, (name, line) in enumerate(series.items()):
            x, y = np.reshape(line, (-1, 2)).T
            dots = [np.interp(scale(x), scale([x0, x1]), (left, right)), np.interp(y, (y0, y1), (bottom, top))]
            draw.line(np.stack(dots, axis=1).ravel().tolist(), fill=COLORS[s % len(COLORS)], width=2)
            draw.text((left, height - 8 + 16 * s), f"- {name}", fill=COLORS[s % len(COLORS)])
    write_file(path, lambda file: sheet.save(file, "PNG", optimize=True))

def curve(table: list[dict[str, str]], column: str) -> list[tuple[int, float]]:
    """At most some 600 points of a table's column against the step."""
    return [(int(row["step"]), float(row[column])) for row in table[::max(1, len(table) // 300)]]

# ---- The run ---------------------------------------------------------------------------------------------------------
class Record:
    """What a run says: metrics.csv and knn.csv, live progress on a terminal, a plain line now and then in a file."""
    def __init__(self, folder: Path, config: TrainConfig, first_step: int, last_step: int, elapsed: float):
        self.last, self.batch_size, self.live = last_step, config.batch_size, sys.stdout.isatty()
        self.metrics = open_table(folder / "metrics.csv", METRICS, first_step)
        self.knn = open_table(folder / "knn.csv", ("step", "epoch", "accuracy"), first_step + 1)
        self.step_start = self.shown = time.perf_counter()
        self.start = self.step_start - elapsed  # as if the run had never been interrupted

    def step(self, step: int, epoch: float, terms: list[float], used: int, now: StepValues) -> None:
        """A row for each step; a line twice a second on a terminal, every 20 seconds in a file, and for the last."""
        clock, done = time.perf_counter(), step + 1
        print(step, epoch, *terms[:4], used, *terms[4:], *now, self.batch_size / (clock - self.step_start),
              clock - self.start, sep=",", file=self.metrics)
        self.step_start = clock
        if clock - self.shown < (0.5 if self.live else 20) and done < self.last:
            return
        self.shown, pace = clock, (clock - self.start) / done
        line = (f"step {done}/{self.last}  epoch {epoch:.1f}  loss {terms[0]:.3f}  cross-entropy {terms[1]:.3f}  "
                f"me-max {terms[2]:.3f}  prototypes {used}  lr {now.lr:.1e}  {self.batch_size / pace:.0f} images/s  "
                f"{timedelta(seconds=round(pace * (self.last - done)))} left")
        print(f"\r\033[K{line}" if self.live else line, end="" if self.live and done < self.last else "\n", flush=True)

    def evaluation(self, step: int, epoch: float, accuracy: float) -> None:
        print(step, epoch, accuracy, sep=",", file=self.knn)
        print(f"{chr(10) if self.live else ''}epoch {epoch:.0f}: k-NN accuracy {accuracy:.3f}", flush=True)

def announce(config: TrainConfig, folder: Path, data: Images, model: nn.Module, first: int, last: int) -> None:
    """Write the settings to config.json, and say in a few lines what is about to happen."""
    folder.mkdir(parents=True, exist_ok=config.resume or bool(config.output_dir))  # two runs never share a new folder
    (folder / "summary.json").unlink(missing_ok=True)  # it says that a run is finished
    write_file(folder / "config.json", json.dumps(asdict(config), indent=2).encode())
    parameters = sum(p.numel() for p in model.anchor_encoder.parameters()) / 1e6
    labels = f"{len(data.val)} for validation, {len(data.classes)} classes" if data.val else "no labels"
    print(f"run folder {folder}: recipe {config.recipe}, seed {config.seed}; {first} of {last} steps are done\n"
          f"data {config.data}: {len(data.train)} training images, {labels}\nencoder and projection head: "
          f"{parameters:.2f} M parameters; {config.precision} on {model.prototypes.device}", flush=True)

def finish_run(folder: Path, model: ViTMSNForPreTraining, data: Images, config: TrainConfig, step: int, elapsed: float):
    """The encoder as a folder that transformers loads, the pictures, and the comparison with what needs no training."""
    encoder, device = ViTMSNModel(config.model_config()), model.prototypes.device
    encoder.load_state_dict({k: v for k, v in model.target_encoder.state_dict().items() if not k.startswith("fc.")})
    encoder.save_pretrained(folder / "encoder")
    save_neighbours(folder / "neighbours.png", model.target_encoder, data, config.image_size, device)
    metrics, knn = read_table(folder / "metrics.csv"), read_table(folder / "knn.csv")
    save_plot(folder / "curves.png", {
        "loss": {name: curve(metrics, name) for name in ("loss", "cross_entropy", "memax", "entropy")},
        "prototypes in use": {"prototypes_used": curve(metrics, "prototypes_used")},
        "k-NN accuracy": {"target encoder": curve(knn, "accuracy")}})
    summary = {"step": step, "minutes": round(elapsed / 60, 2)}
    alone = build_model(replace(config, init_from=""), Processes(0, 1, device))  # no other process takes part in it
    if data.val is not None:
        for name, candidate in (("target encoder", model.target_encoder), ("untrained encoder", alone.target_encoder),
                                ("raw pixels", None)):
            summary[name] = round(knn_accuracy(candidate, data, config, device), 4)
            print(f"k-NN accuracy, {name + ':':<19} {summary[name]:.3f}", flush=True)
    alone.load_state_dict(model.state_dict())
    save_neighbours(folder / "prototypes.png", alone.target_encoder, data, config.image_size, device, alone.prototypes)
    write_file(folder / "summary.json", json.dumps(summary, indent=2).encode())
    print(f"done in {summary['minutes']} minutes: {folder}/encoder, pictures *.png", flush=True)

def ignore_sigterm(worker: int) -> None:
    """For a process that decodes images: a signal to the whole job must leave it at work until the step is done."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def train(config: TrainConfig, data: Images, folder: Path, content: dict | None, processes: Processes) -> None:
    """The whole run: set up, loop, finish. content: the checkpoint from which it goes on, or None."""
    share, steps_per_epoch = config.batch_size // processes.count, len(data.train) // config.batch_size
    rows = slice(processes.rank * share, (processes.rank + 1) * share)  # of the global batch
    chief, first_step = processes.rank == 0, content["step"] if content else 0
    last_step = max(first_step, min(config.epochs * steps_per_epoch, config.max_steps or math.inf))
    if content and first_step >= last_step and (folder / "summary.json").exists():
        print(f"{folder} is finished ({first_step} steps); nothing to do", flush=True)
        return
    network = build_model(replace(config, init_from="") if content else config, processes)
    optimizer = torch.optim.AdamW(parameter_groups(network, config.weight_decay), fused=True)  # rates: in train_step
    if content:
        restore(content, network, optimizer)
    msn = nn.parallel.DistributedDataParallel(network) if processes.count > 1 else network
    if chief:
        announce(config, folder, data, network, first_step, last_step)
        record = Record(folder, config, first_step, last_step, content["elapsed"] if content else 0.0)
    received, unreadable = [], set()
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one stops after the step, a second one at once
        signal.signal(number, lambda n, _: (received.append(n), signal.signal(n, signal.SIG_DFL)))
    batches = step_batches(config, len(data.train), range(first_step, last_step), rows)
    loader = DataLoader(data.train, batch_sampler=batches, collate_fn=Batch._make, num_workers=config.num_workers,
                        worker_init_fn=ignore_sigterm)
    for step, batch in enumerate(loader, first_step):
        torch.manual_seed(generator_for(config.seed, DROPOUT, step, processes.rank).initial_seed())
        views = make_views(batch._replace(images=batch.images.to(processes.device)), config, step, rows)
        now, epoch = schedule_at(config, step, steps_per_epoch), (step + 1) / steps_per_epoch
        try:
            loss, norm = train_step(msn, optimizer, *views, now, config.clip_grad, config.precision)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step}: {error}; the last checkpoint, if any, is in {folder}.") from None
        terms = [*loss[:4], loss.top_assignment, norm, norm.new_tensor(len(received))]
        *terms, signals = (processes.reduce(torch.stack(terms).detach(), "sum") / processes.count).tolist()
        for path in sorted(set(batch.unreadable) - unreadable):
            unreadable.add(path)
            print(f"\n{path} is no readable image ({len(unreadable)} so far); the next stands in", file=sys.stderr)
        if chief:
            record.step(step, epoch, terms, loss.prototypes_used.item(), now)
            if step == 0:
                save_views(folder / "views.png", views, config)
            if data.val is not None and config.knn_every and (step + 1) % (config.knn_every * steps_per_epoch) == 0:
                record.evaluation(step + 1, epoch, knn_accuracy(network.target_encoder, data, config, processes.device))
            if signals or step + 1 == last_step or (step + 1) % config.checkpoint_every == 0:
                save_checkpoint(folder, network, optimizer, config, step + 1, time.perf_counter() - record.start)
        if signals:
            if chief:
                print(f"\nstopped after step {step + 1}; go on by the same command with --resume --output-dir {folder}")
            return
    if chief:
        finish_run(folder, network, data, config, last_step, time.perf_counter() - record.start)

def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, TrainConfig)
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(parser.parse_args(argv)).items()}
    config = make_config(given)
    folder = Path(config.output_dir)
    if not config.output_dir:  # the newest of this recipe (--resume) or the next free number
        numbers = [p.name.removeprefix(f"{config.recipe}-") for p in Path("runs").glob(f"{config.recipe}-*")]
        last = max((int(n) for n in numbers if n.isdecimal()), default=0)
        folder = Path("runs") / f"{config.recipe}-{max(last, 1) if config.resume else last + 1:03d}"
    config, content = settle(given, folder)
    processes = start_processes(config)
    config = replace(config, precision=choose_precision(config.precision, processes.device))
    data = open_data(config)
    if len(data.train) < config.batch_size:
        raise UsageError(f"{len(data.train)} training images are fewer than batch_size={config.batch_size}; lower it.")
    train(config, data, folder, content, processes)

if __name__ == "__main__":
    sys.exit(run_program(main))
