"""Pretrain a ViT with Masked Siamese Networks (Assran et al., 2022, arXiv 2204.07141).

    python train_msn.py                                  # built-in images, minutes on two CPU cores
    python train_msn.py --recipe imagenette --data path/to/imagenette         # a folder of pictures
    torchrun --nproc-per-node=8 train_msn.py --recipe small-16 --data path/to/imagenet

Each run has its folder (runs/<recipe>-001, ...): config.json, metrics.csv, knn.csv, pictures,
checkpoint.pt, and at the end encoder/, which transformers loads. `--resume` goes on where it
stopped, on a CPU bit for bit.
"""

# The method comes first in this file: settings, views, schedules, one step, the loop. What the loop
# calls stands below it: recipes, augmentations, model and optimizer, data sets, k-NN, the folder of
# a run, many processes, pictures, command line. Shapes are written in the letters of vitmsn.py.

import argparse
import csv
import errno
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import platform
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vitmsn import Preprocessor, constant, imagenet_statistics, normalize
from vitmsn import FROM_THE_VALUES, PictureRules, Seen, Values
from vitmsn import MissingPackage, OtherChannels, TooManyPixels
from vitmsn import PRESETS, MSNLoss, ViTMSNConfig, ViTMSNForPreTraining, ViTMSNModel
from vitmsn import first_frame, look_at, open_picture, orientation_of, turn_upright
from vitmsn import from_original, read_tensors, to_original, write_file
from vitmsn import AllReduce, autocast, log_assign, num_patches_to_keep, one_process
from vitmsn import sample_block_to_keep, sample_patches_to_keep, sharpen, sinkhorn

# ---- Settings: one frozen dataclass, from which the command line is derived ----------------------
PRECISIONS = ("auto", "float32", "bfloat16", "float64")
ANY = (-1e12, 1e12)  # a range of no meaning
THREADS_HELP = "intra-op threads; 0: training takes what is quickest at its start, else by size"


def opt(default, text: str, **limits):
    """A field with its help text and, where not every value makes sense, choices or a range."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. Defaults: the published ViT-S/16 recipe, where it names a value."""

    recipe: str = opt(
        "demo",
        "named settings: they replace these defaults; other flags come on top. Without it, own "
        "pictures get cifar10's or imagenette's, by their size",
    )
    data: str = opt("synthetic", "synthetic, cifar10, or a folder (train/CLASS/*, val/CLASS/*)")
    data_dir: str = opt("data", "where cifar-10-batches-py lies or is downloaded to")
    output_dir: str = opt("", "the run's folder; without it the next free runs/<recipe>-001")
    resume: bool = opt(False, "go on from the run's checkpoint, or start if there is none")
    changed_data: bool = opt(False, "resume, too, if pictures were added, removed or renamed")
    init_from: str = opt("", "start from a run, a transformers folder or an original .pth.tar")
    seed: int = opt(0, "of everything random", range=(0, 2**31 - 1))
    # How long
    epochs: int = opt(800, "length of the run and of the schedules", range=(1, 10**6))
    max_steps: int = opt(0, "stop early, after so many steps (0: never)", range=(0, 10**12))
    batch_size: int = opt(1024, "images per step over all processes", range=(2, 10**6))
    # Model
    image_size: int = opt(224, "pixels, of target and random views", range=(1, 4096))
    patch_size: int = opt(16, "pixels", range=(1, 4096))
    hidden_size: int = opt(384, "width d of the encoder", range=(1, 10**5))
    num_hidden_layers: int = opt(12, "transformer layers", range=(1, 1000))
    num_attention_heads: int = opt(6, "h", range=(1, 1000))
    intermediate_size: int = opt(0, "width of the MLP; 0 is 4 x hidden size", range=(0, 10**6))
    initializer_range: float = opt(0.02, "deviation of weights at the start", range=(1e-6, 0.99))
    drop_path_rate: float = opt(0.0, "stochastic depth, at its last layer", range=(0, 0.99))
    head_hidden_size: int = opt(2048, "width of the head's hidden layers", range=(1, 10**5))
    output_dim: int = opt(256, "e, width of projections and prototypes", range=(1, 10**5))
    num_prototypes: int = opt(1024, "k", range=(2, 10**6))
    # Views and masks
    random_views: int = opt(1, "anchor views that are randomly masked, per image", range=(0, 100))
    focal_views: int = opt(10, "anchor views that are small crops, per image", range=(0, 100))
    focal_size: int = opt(96, "pixels, of focal views", range=(1, 4096))
    focal_mask: bool = opt(
        False, "focal views are large views with all but a block of focal_size pixels dropped"
    )
    mask_ratio: float = opt(0.15, "share of patches dropped from random views", range=(0, 0.999))
    crop_scale: tuple = opt((0.3, 1.0), "share of the area, of large views", range=(1e-6, 1))
    focal_scale: tuple = opt((0.05, 0.3), "share of the area, of small crops", range=(1e-6, 1))
    flip: float = opt(0.5, "probability of a horizontal flip", range=(0, 1))
    color_jitter: float = opt(0.5, "strength of the colour jitter, 1 is SimCLR's", range=(0, 1.25))
    jitter: float = opt(0.8, "probability of colour jitter", range=(0, 1))
    grey: float = opt(0.2, "probability of greyscale", range=(0, 1))
    blur: float = opt(0.5, "probability of Gaussian blur", range=(0, 1))
    blur_sigma: tuple = opt((0.1, 2.0), "deviation of the blur in pixels", range=(1e-3, 100))
    anchor_view: str = opt(
        "own",
        "random views: crop and colours of their own, or of the target view, with another jitter "
        "(recolored) or with the same one (target), as in table 9",
        choices=("own", "recolored", "target"),
    )
    # Pictures from files (the same rules for all of them)
    background: str = opt("white", "behind transparent pixels: a name, or #rrggbb")
    integer_range: tuple = opt(
        (0, 0), "16- and 32-bit values for black and white; 0 0: found on a sample", range=ANY
    )
    float_range: tuple = opt((0, 0), "the same of floating-point values", range=ANY)
    max_megapixels: float = opt(256.0, "larger pictures are passed over", range=(1e-6, 10**6))
    num_channels: int = opt(0, "3 is RGB, 1 grey; 0: bands if there are, else 3", range=(0, 10**4))
    # Objective
    temperature: float = opt(0.1, "tau of the anchor assignments", range=(1e-3, 100))
    sharpening: float = opt(0.25, "T at the start; T tau is of the targets", range=(1e-3, 1))
    final_sharpening: float = opt(0.25, "T at the end of its linear schedule", range=(1e-3, 1))
    sinkhorn_iterations: int = opt(3, "0 leaves Sinkhorn out", range=(0, 1000))
    memax_weight: float = opt(1.0, "lambda of equation (1)", range=(0, 10**6))
    prior_exponent: float = opt(0.0, "of PMSN's power-law prior; 0: uniform", range=(0, 10))
    freeze_prototypes: bool = opt(False, "leave the prototypes where they were drawn (an ablation)")
    # Optimisation
    lr: float = opt(1e-3, "highest learning rate", range=(0, 100))
    start_lr: float = opt(2e-4, "learning rate at the start of the warm-up", range=(0, 100))
    final_lr: float = opt(1e-6, "learning rate at the end of the cosine", range=(0, 100))
    warmup_epochs: float = opt(15.0, "length of the linear warm-up", range=(0, 10**6))
    muon: bool = opt(False, "Muon, not AdamW, for the matrices of the anchor encoder's layers")
    weight_decay: float = opt(0.04, "of AdamW, at the start of its cosine", range=(0, 100))
    final_weight_decay: float = opt(0.4, "at the end", range=(0, 100))
    clip_grad: float = opt(3.0, "limit of the encoder's gradient norm", range=(1e-6, 10**9))
    momentum: float = opt(0.996, "of the target encoder, at the start", range=(0, 1))
    final_momentum: float = opt(1.0, "at the end of its linear schedule", range=(0, 1))
    schedule_stretch: float = opt(1.25, "length of schedules / length of the run", range=(1, 10))
    # Machine
    device: str = opt("auto", "auto: a GPU if there is one, else cpu; or any that torch knows")
    threads: int = opt(0, THREADS_HELP, range=(0, 1024))
    precision: str = opt("auto", "auto: bfloat16 on GPUs, CPUs with AMX", choices=PRECISIONS)
    gradient_checkpointing: bool = opt(False, "keep less, compute more")
    compile: bool = opt(False, "torch.compile both encoders: minutes of waiting, then faster steps")
    num_workers: int = opt(0, "processes that decode images", range=(0, 1000))
    batch_timeout: float = opt(300.0, "seconds to wait for them", range=(1, 10**6))
    cache_mb: int = opt(1024, "MiB of decoded images kept, train and val each", range=(0, 10**7))
    checkpoint_every: int = opt(500, "steps between checkpoints", range=(1, 10**9))
    knn_every: int = opt(10, "epochs between k-NN evaluations; 0 for never", range=(0, 10**6))

    def __post_init__(self):
        check_settings(self)  # raises UsageError

    def picture_rules(self) -> PictureRules:
        """How pictures from files become pixels. Raises ValueError for what is no background."""
        names = [f.name for f in fields(PictureRules)]
        return PictureRules(**{name: getattr(self, name) for name in names})

    def model_config(self) -> ViTMSNConfig:
        """The architecture, and the rules for pictures, where they are not the usual ones."""
        return model_config_of(self)


# ---- Random numbers: each draw is a function of the seed and of what it is for -------------------
ORDER, VIEWS, MASKS, DROPOUT, IMAGES, CHOICE, PAIRS = range(7)  # streams, for generator_for


def generator_for(seed: int, *stream: int) -> torch.Generator:
    """A generator for one purpose: a stream, then epoch or step, and process if each has its own.

    Departure: officially, generators have a state, which a resumed run starts anew. A function of
    the seed and the step has none to save, and gives a resumed run the same numbers.
    """
    high, low = np.random.SeedSequence([seed, *stream]).generate_state(2)
    return torch.Generator().manual_seed(int(high) << 31 ^ int(low))


# ---- What a data set gives for a step (the data sets: below the loop) ----------------------------
class Batch(NamedTuple):
    """Images as a data set gives them, of any sizes."""

    pixels: Tensor  # uint8, of one image after another, each height width c
    sizes: Tensor  # b 2, height and width of each
    indices: list[int]  # which images of the data set these are
    unreadable: list[str]  # files for which the next readable one stands in, and why
    in_use: Tensor | None = None  # of memory that is lent: see BatchMemory

    @property
    def channels(self) -> int:
        return len(self.pixels) // int(self.sizes.prod(dim=1).sum())

    @property
    def images(self) -> list[Tensor]:
        """Each image, c height width. Copies nothing."""
        lengths = self.channels * self.sizes.prod(dim=1)
        images = []
        for pixels, size in zip(self.pixels.split(lengths.tolist()), self.sizes, strict=True):
            images.append(pixels.view(*size.tolist(), self.channels).permute(2, 0, 1))
        return images

    def on(self, device: torch.device) -> "Batch":
        """The same with the pixels on a device."""
        return self._replace(pixels=send(self.pixels, device))

    def give_back(self) -> None:
        """Say that the pixels are not needed any more: their memory may be used again."""
        if self.in_use is not None:
            self.in_use.zero_()


# ---- Input Views (paper, Section 3): crop, flip, colour jitter, greyscale, blur ------------------
class Views(NamedTuple):
    """What the two encoders see of a batch."""

    target_view: Tensor  # b c height width
    anchor_views: list[Tensor]  # v tensors b c height width: random views, then focal views
    patches_to_keep: list[Tensor | None]  # of each anchor view: b r, or None for all


TRIES = 10  # of a crop that fits
# How many uniform numbers each decision takes, for each view of each image.
DRAWS = {
    "crop": TRIES + TRIES + 2,  # areas, aspect ratios, place
    "flip": 1,  # whether
    "jitter": 1,  # whether
    "factors": 4,  # how much: brightness, contrast, saturation, hue
    "order": 4,  # in which order
    "grey": 1,  # whether
    "blur": 2,  # whether, how much
}


def draw_views(batch: int, views: int, generator: torch.Generator) -> dict[str, Tensor]:
    """All uniform numbers that the views of a batch need, on the CPU: name -> v b count."""
    return {
        name: torch.rand(views, batch, count, generator=generator) for name, count in DRAWS.items()
    }


def make_views(batch: Batch, config: TrainConfig, step: int, my_images: slice) -> Views:
    """Target view, random views and focal views of each image, and the patches to keep of each.

    Each view has a crop and colours of its own: an anchor view is not the target view with patches
    missing (that is anchor_view="target", table 9). Large views are the target view and the random
    views, which lose patches; focal views are small crops, which lose none. (With focal_mask, focal
    views are large views, too, of which one block of patches stays.)

    A function of images, seed and step: numbers are drawn for the global batch, of which `batch`
    holds the part `my_images`, so that the number of processes changes nothing.
    """
    num_views = 1 + config.random_views + config.focal_views
    num_small = 0 if config.focal_mask else config.focal_views
    num_large = num_views - num_small
    generator = generator_for(config.seed, VIEWS, step)
    draws = draw_views(config.batch_size, num_views, generator)
    copy_target_draws(draws, config)  # nothing, but for table 9's variants
    draws = {name: numbers[:, my_images] for name, numbers in draws.items()}

    # The target view and the random views, and focal views to be masked: large crops of one size.
    large_draws = {name: numbers[:num_large] for name, numbers in draws.items()}
    large = views_of_one_size(batch, large_draws, config, config.image_size, config.crop_scale)
    target_view, *anchor_views = large

    # The focal views: small crops.
    # Departure: the paper speaks of a focal mask, which keeps one block of a large view's patches.
    # As in the official code, a focal view is a small crop instead, and no mask is laid on it,
    # unless focal_mask asks for that.
    if num_small:
        focal_draws = {name: numbers[num_large:] for name, numbers in draws.items()}
        focal = views_of_one_size(batch, focal_draws, config, config.focal_size, config.focal_scale)
        anchor_views.extend(focal)

    masks = draw_masks(config, step)
    patches_to_keep: list[Tensor | None] = [None] * len(anchor_views)
    for i, mask in enumerate(masks):
        patches_to_keep[i] = send(mask[my_images], batch.pixels.device)
    return Views(target_view, anchor_views, patches_to_keep)


def draw_masks(config: TrainConfig, step: int) -> list[Tensor]:
    """Which patches the anchor encoder sees of the global batch's random views and, with
    focal_mask, of its focal views. -> for each view b r, on the CPU."""
    generator = generator_for(config.seed, MASKS, step)
    grid = config.image_size // config.patch_size
    masks = []
    for _ in range(config.random_views):
        mask = sample_patches_to_keep(config.batch_size, grid**2, config.mask_ratio, generator)
        masks.append(mask)
    if config.focal_mask:
        block = config.focal_size // config.patch_size
        for _ in range(config.focal_views):
            masks.append(sample_block_to_keep(config.batch_size, grid, block, generator))
    return masks


def views_of_one_size(
    batch: Batch, draws: dict[str, Tensor], config: TrainConfig, size: int, scale: tuple
) -> tuple[Tensor, ...]:
    """v views of each image. draws: name -> v b count -> v tensors b c size size, normalised.

    Of images that are not RGB, only brightness and contrast are jittered, and none becomes grey.
    """
    num_views = len(draws["crop"])
    draws = {name: numbers.flatten(0, 1) for name, numbers in draws.items()}  # (v b) count

    boxes = crop_boxes(draws["crop"], batch.sizes.repeat(num_views, 1), scale)
    flip = draws["flip"][:, 0] < config.flip
    pixels = crop_and_resize(batch, boxes, flip, size)

    if config.color_jitter > 0:
        jitter = draws["jitter"][:, 0] < config.jitter
        strength = config.color_jitter
        pixels = color_jitter(pixels, strength, jitter, draws["factors"], draws["order"])

    if is_rgb(pixels):
        grey = send(places_of(draws["grey"][:, 0] < config.grey), pixels.device)
        pixels[grey] = to_grey(pixels[grey]).expand(-1, 3, -1, -1)

    blurred = draws["blur"][:, 0] < config.blur
    if blurred.any():
        low, high = config.blur_sigma
        sigma = low + (high - low) * draws["blur"][blurred, 1]
        places = send(places_of(blurred), pixels.device)
        pixels[places] = gaussian_blur(pixels[places], send(sigma, pixels.device))
    return normalize(pixels).split(len(batch.sizes))


# ---- Schedules (Appendix A.1) --------------------------------------------------------------------
class StepValues(NamedTuple):
    """What the schedules say for one step."""

    lr: float
    weight_decay: float
    momentum: float
    sharpening: float


def linear(step: float, total_steps: float, start: float, final: float) -> float:
    """From start, exact at step 0, to final at total_steps."""
    return start + (final - start) * step / total_steps


def cosine(step: float, total_steps: float, start: float, final: float) -> float:
    """Half a cosine from start at step 0 to final at total_steps; does not turn back after that."""
    progress = min(step / total_steps, 1)
    return final + (start - final) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(
    step: float, warmup_steps: int, total_steps: int, start: float, peak: float, final: float
) -> float:
    """Linear from start to peak in warmup_steps, then a cosine to final at total_steps."""
    if step < warmup_steps:
        return linear(step, warmup_steps, start, peak)
    return cosine(step - warmup_steps, max(1, total_steps - warmup_steps), peak, final)


def schedule_at(config: TrainConfig, step: int, steps_per_epoch: int) -> StepValues:
    """The values of a step (from 0): a pure function. As in the official code, learning rate and
    weight decay are advanced before they are used (hence step + 1) and take a whole number of
    steps as the length of their schedule; momentum and sharpening do neither."""
    # Departure: the paper's schedules end with the run; as in the official code, they are laid out
    # over 1.25 runs (over 1 in the small recipes).
    total = config.schedule_stretch * steps_per_epoch * config.epochs
    whole = int(total)
    warmup = int(config.warmup_epochs * steps_per_epoch)
    return StepValues(
        lr=warmup_cosine(step + 1, warmup, whole, config.start_lr, config.lr, config.final_lr),
        weight_decay=cosine(step + 1, whole, config.weight_decay, config.final_weight_decay),
        momentum=linear(step, total, config.momentum, config.final_momentum),
        sharpening=linear(step, total, config.sharpening, config.final_sharpening),
    )


# ---- One training step ---------------------------------------------------------------------------
def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    target_view: Tensor,
    anchor_views: list[Tensor],
    patches_to_keep: list[Tensor | None],
    now: StepValues,
    clip_grad: float,
    precision: str = "float32",
    all_reduce: AllReduce = one_process,
) -> tuple[MSNLoss, dict[str, float]]:
    """One update of anchor encoder, prototypes and target encoder, from one batch of views.

    model: a ViTMSNForPreTraining, or one inside DistributedDataParallel; target_view, anchor_views,
    patches_to_keep: the fields of Views. Returns the terms of the loss, and what metrics.csv says
    of them and of the gradient before it is clipped. Raises FloatingPointError, before any weight
    has changed, if the loss or a gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)  # before the forward pass, which needs that memory
    with autocast(target_view.device, precision == "bfloat16"):
        terms = model(target_view, anchor_views, patches_to_keep, now.sharpening)
    terms.loss.backward()

    # As in the official code, the prototypes' gradient is not part of the norm and is not clipped.
    unwrapped = getattr(model, "module", model)  # out of DistributedDataParallel
    encoder_parameters = unwrapped.anchor_encoder.parameters()
    grad_norm = nn.utils.clip_grad_norm_(encoder_parameters, clip_grad, foreach=True)
    metrics = read_metrics(terms, grad_norm, unwrapped.prototypes.grad, all_reduce)

    for group in optimizer.param_groups:
        group["lr"] = now.lr
        if group["decays"]:  # as parameter_groups says
            group["weight_decay"] = now.weight_decay
    optimizer.step()
    unwrapped.update_target(now.momentum)
    return terms, metrics


# ---- The loop ------------------------------------------------------------------------------------
def train(
    config: TrainConfig, data: "Images", folder: Path, content: dict | None, processes: "Processes"
) -> None:
    """A whole run: set up, loop, finish. content: the checkpoint to go on from, or None."""
    steps_per_epoch = len(data.train) // config.batch_size
    steps = steps_to_do(config, steps_per_epoch, content)
    if content and not steps and (folder / "summary.json").exists():
        say(f"{folder} is finished ({steps.start} steps); nothing to do")
        return

    model, optimizer = set_up(config, content, processes)
    wrapped = processes.parallel(model)
    reduce = processes.reduce
    if processes.is_first:
        announce(config, folder, data, model, steps)
        record = Record(folder, config, steps, content["elapsed"] if content else 0.0)
    unreadable = UnreadableFiles()
    my_images = processes.share_of(config.batch_size)
    inputs = InputsAhead(config, data.train, steps, my_images, processes.device)
    done = steps.start
    at_once = done == 0 and processes.count == 1  # nothing can be lost: Ctrl-C need not wait

    with StopSignals(at_once) as signals, inputs:
        for step in steps:
            current = inputs.next(signals)
            if processes.any(current is None):  # all of them stop before the same step
                break
            seed_drop_path(config.seed, step, processes.rank)
            now = schedule_at(config, step, steps_per_epoch)
            views = current.views
            try:
                _, metrics = train_step(
                    wrapped, optimizer, *views, now, config.clip_grad, config.precision, reduce
                )
            except FloatingPointError as error:
                note = f"step {step}: {error}; the last checkpoint, if any, is in {folder}."
                raise FloatingPointError(note) from None
            signals.at_once = False
            unreadable.announce(current.unreadable)
            done = step + 1

            if processes.is_first:
                epoch = done / steps_per_epoch
                record.step(step, epoch, metrics, now)
                if step == 0:
                    save_views(folder / "views.png", views, config)
                if data.val is not None and is_due(done, config.knn_every * steps_per_epoch):
                    accuracy = knn_accuracy(model.target_encoder, data, config, processes.device)
                    record.evaluation(done, epoch, accuracy)
                if done == steps.stop or is_due(done, config.checkpoint_every):
                    save_checkpoint(folder, model, optimizer, config, data, done, record.elapsed())

        if processes.any(signals.received) or done < steps.stop:
            if processes.is_first and done > steps.start:
                save_checkpoint(folder, model, optimizer, config, data, done, record.elapsed())
            say_stopped(folder, done, steps, inputs, processes)
            return

    if processes.is_first:
        finish_run(folder, model, data, config, steps.stop, record.elapsed(), processes)


def set_up(
    config: TrainConfig, content: dict | None, processes: "Processes"
) -> tuple[ViTMSNForPreTraining, "torch.optim.Optimizer | MuonAndAdamW"]:
    """Model and optimizer of a new run, or of the checkpoint to go on from."""
    model = build_model(replace(config, init_from="") if content else config, processes)
    optimizer = build_optimizer(model, config)
    if content:
        restore(content, model, optimizer)
    return model, optimizer


def say_stopped(
    folder: Path, done: int, steps: range, inputs: "InputsAhead", processes: "Processes"
) -> None:
    """Say that the run stopped early, and how to go on. Raises RuntimeError if that was because an
    input could not be had."""
    go_on = f"go on by the same command with --resume --output-dir {folder}"
    if processes.is_first and inputs.error is None:
        say(f"stopped after step {done}; {go_on}")
    processes.any(False)  # wait for the first one to say it: an error ends all processes
    if inputs.error is None:
        return

    last_line = str(inputs.error).strip().rpartition("\n")[2]  # torch puts a traceback before it
    problem = last_line.rstrip(".") or type(inputs.error).__name__
    kept = f"All {done} steps that are done are kept; " if done > steps.start else ""
    raise RuntimeError(f"{problem}. {kept}{go_on}{inputs.advice()}.") from inputs.error


def steps_to_do(config: TrainConfig, steps_per_epoch: int, content: dict | None) -> range:
    """The numbers of the steps that are left, after those of a checkpoint, if any."""
    first_step = content["step"] if content else 0
    last_step = config.epochs * steps_per_epoch
    if config.max_steps:
        last_step = min(last_step, config.max_steps)
    return range(first_step, max(first_step, last_step))


def is_due(done: int, every: int) -> bool:
    """Whether it is time, after `done` steps, for what happens once in `every` steps (0: never)."""
    return every > 0 and done % every == 0


def seed_drop_path(seed: int, step: int, rank: int) -> None:
    """Seed the global generator, which only stochastic depth draws from."""
    torch.manual_seed(generator_for(seed, DROPOUT, step, rank).initial_seed())


class StepInput(NamedTuple):
    """What a step takes from the data set."""

    views: Views
    unreadable: list[str]  # files for which the next readable one stands in


def step_inputs(
    batches: Iterator[Batch],
    config: TrainConfig,
    steps: range,
    my_images: slice,
    device: torch.device,
) -> Iterator[StepInput]:
    """The views of each step, on the device."""
    for step, batch in enumerate(batches, steps.start):
        views = make_views(batch.on(device), config, step, my_images)
        batch.give_back()
        yield StepInput(views, batch.unreadable)


@torch.no_grad()
def read_metrics(
    terms: MSNLoss, grad_norm: Tensor, prototype_grad: Tensor | None, all_reduce: AllReduce
) -> dict[str, float]:
    """What metrics.csv says of a step: means over all processes, by column.

    Raises FloatingPointError if one of them, or the prototypes' gradient (None: they do not learn),
    is not finite. Here, once a step, the host waits for the device, which gives all the numbers in
    one copy.
    """
    columns = {
        "loss": terms.loss,
        "cross_entropy": terms.cross_entropy,
        "memax": terms.memax,
        "entropy": terms.entropy,
        "prototypes_used": terms.prototypes_used,  # counted over all processes already
        "top_assignment": terms.top_assignment,
        "grad_norm": grad_norm,
    }
    numbers = list(columns.values())
    if prototype_grad is not None:
        numbers.append(prototype_grad.abs().max())
    means = all_reduce(torch.stack(numbers), "mean").tolist()

    metrics = dict(zip(columns, means, strict=False))  # without the prototypes' gradient
    if not all(map(math.isfinite, means)):
        raise FloatingPointError(
            f"not finite: loss {metrics['loss']:.4g}, "
            f"cross-entropy {metrics['cross_entropy']:.4g}, me-max {metrics['memax']:.4g}, "
            f"gradient norm {metrics['grad_norm']:.4g}"
        )
    metrics["prototypes_used"] = round(metrics["prototypes_used"])
    return metrics


class StopSignals:
    """Notices SIGINT and SIGTERM. The first one asks for a stop after the step; a second one, of
    either kind, ends the program at once, if it comes SAME_SIGNAL seconds later or more: the
    command `timeout`, for one, sends its signal twice.

    A context manager, after which the handlers are those of before. Only the main thread can have
    handlers: in another one, nothing is noticed.

    Python calls a handler when the main thread is back from whatever it computes or waits for,
    which may be never. So the second signal has a thread of its own, which is told by a socket.

    at_once: the first one does, too, by KeyboardInterrupt: before the first step nothing is lost by
    it. Not with many processes, which have to stop together.
    """

    def __init__(self, at_once: bool = False):
        self.received = False
        self.at_once = at_once
        self.before: dict[int, Any] = {}  # signal -> its handler

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in STOP_SIGNALS:
            self.before[number] = signal.signal(number, self.notice)
        self.told, self.teller = socket.socketpair()
        self.teller.setblocking(False)
        self.before_fd = signal.set_wakeup_fd(self.teller.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.end_at_the_second, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        if not self.before:
            return
        signal.set_wakeup_fd(self.before_fd)
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self.teller.close()  # which ends the thread

    def end_at_the_second(self) -> None:
        """What the thread does: it ends the process at the second stop signal."""
        first_at = None
        while True:
            told = self.told.recv(1)  # the number of a signal; nothing when the teller is closed
            if not told:
                return
            if told[0] not in STOP_SIGNALS:
                continue
            now = time.monotonic()
            if first_at is None:
                first_at = now
            elif now - first_at >= SAME_SIGNAL:
                os._exit(128 + told[0])  # the exit status that a shell gives for this signal

    def notice(self, number: int, frame) -> None:
        """The handler of both."""
        is_first = not self.received
        self.received = True
        if self.at_once and is_first:
            raise KeyboardInterrupt


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SIGNAL = 0.1  # seconds


# ---- Recipes: values of the settings for each data set -------------------------------------------
# For small images and short runs; the README's tables of experiments say how it was found.
SMALL = {
    "image_size": 32,
    "patch_size": 4,
    "num_attention_heads": 3,
    "head_hidden_size": 512,
    "output_dim": 128,
    "num_prototypes": 128,
    "focal_views": 2,
    "focal_size": 16,
    "blur": 0.0,
    "batch_size": 64,
    "warmup_epochs": 1.0,
    # Departure: published are 0.4, 0.996 and 1.25, which suit runs of many thousand steps.
    "final_weight_decay": 0.1,
    "momentum": 0.9,
    "schedule_stretch": 1.0,
}
# Departure: published are AdamW, 0.001 and 0.02. In short runs of small encoders these learn most.
QUICK = {"muon": True, "lr": 2e-3, "initializer_range": 0.05}
PHOTOS = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "mask_ratio": 0.5}
SMALL_PHOTOS = {**SMALL, **PHOTOS, "focal_scale": (0.1, 0.4), **QUICK}
RECIPES = {
    "demo": {
        **SMALL,
        "data": "synthetic",
        "epochs": 10,
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "head_hidden_size": 256,
        "num_prototypes": 64,
        # Departure: 1 / sqrt(hidden_size). The published 0.02 is so small for so short a run that
        # the residual branches start near 0, and learning some 100 steps later.
        "initializer_range": 0.1,
        "lr": 3e-3,
        "mask_ratio": 0.3,
        "crop_scale": (0.5, 1.0),
        "focal_scale": (0.15, 0.4),
        "knn_every": 2,
        "precision": "float32",  # also where bfloat16 is faster: one result on every machine
    },
    "cifar10": {**SMALL_PHOTOS, "data": "cifar10", "epochs": 40, "knn_every": 4},
    "imagenette": {
        **SMALL_PHOTOS,
        "data": "imagenette",
        "image_size": 64,
        "patch_size": 8,
        "focal_size": 32,
        "epochs": 60,
        "knn_every": 5,
    },
    # For a GPU: the size of ViT-S/16, with patches of 8 pixels. Not run yet.
    "imagenette-128": {
        **SMALL,
        "data": "imagenette",
        "image_size": 128,
        "patch_size": 8,
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "focal_views": 4,
        "focal_size": 64,
        "focal_scale": (0.1, 0.4),
        "mask_ratio": 0.5,
        "blur": 0.5,
        "batch_size": 256,
        "epochs": 200,
        "warmup_epochs": 10.0,
        "momentum": 0.99,
        "knn_every": 25,
    },
    # The paper's own (Appendix A.1).
    "small-16": {**PRESETS["small-16"], "mask_ratio": 0.15, "epochs": 800},
    "base-16": {**PRESETS["base-16"], "mask_ratio": 0.3, "epochs": 600},
    "large-16": {**PRESETS["large-16"], "mask_ratio": 0.5, "epochs": 600},
    "base-8": {**PRESETS["base-8"], "mask_ratio": 0.3, "epochs": 600},
    "base-4": {**PRESETS["base-4"], "mask_ratio": 0.7, "epochs": 300},
    # Departure: focal views of 98 pixels, not 96, since a view is whole patches, here of 7 pixels.
    "large-7": {**PRESETS["large-7"], "mask_ratio": 0.7, "epochs": 200, "focal_size": 98},
}
# What --help says of each: data, size, how long on what. GPU hours are arithmetic, not measured:
# all operations by bench.step_flops, on ImageNet, at 40 % of an H100's peak in bfloat16.
RECIPE_LINES = {
    "demo": "built-in textures, 32 pixels; encoder of 0.3 M parameters; minutes on 2 CPU cores",
    "cifar10": "CIFAR-10, 32 pixels; encoder of 0.8 M parameters; some 4 hours on 2 CPU cores",
    "imagenette": "Imagenette or yours, 64 pixels; encoder of 0.8 M parameters; "
    "2 hours on 2 CPU cores",
    "imagenette-128": "Imagenette, 128 pixels; encoder of 21 M parameters; "
    "200 epochs; GPU; not run yet",
    "small-16": "ImageNet, 224 pixels; encoder of 22 M parameters; 800 epochs; some 54 GPU hours",
    "base-16": "ImageNet, 224 pixels; encoder of 86 M parameters; 600 epochs; some 150 GPU hours",
    "large-16": "ImageNet, 224 pixels; encoder of 303 M parameters; 600 epochs; some 510 GPU hours",
    "base-8": "ImageNet, 224 pixels; encoder of 86 M parameters; 600 epochs; some 620 GPU hours",
    "base-4": "ImageNet, 224 pixels; encoder of 88 M parameters; 300 epochs; some 1200 GPU hours",
    "large-7": "ImageNet, 224 pixels; encoder of 304 M parameters; 200 epochs; some 870 GPU hours",
}


# ---- Augmentations: what views_of_one_size calls, for whole batches on the training device -------
def copy_target_draws(draws: dict[str, Tensor], config: TrainConfig) -> None:
    """Let random views share draws with the target view, in place (anchor_view, paper, table 9).

    own: they share none, as usual. recolored: the target view's crop, flip, grey and blur, but a
    colour jitter of their own. target: all of them, so they show the target view's very pixels.
    """
    copied = {"own": (), "recolored": ("crop", "flip", "grey", "blur"), "target": tuple(DRAWS)}
    for name in copied[config.anchor_view]:
        target_draws = draws[name][:1]
        draws[name][1 : 1 + config.random_views] = target_draws


RATIO_LOW = 3 / 4  # of width to height, in crops
RATIO_HIGH = 4 / 3
LARGE = 64  # pixels; larger images are resized one by one on a CPU


def crop_boxes(u: Tensor, sizes: Tensor, scale: tuple[float, float]) -> Tensor:
    """Random resized crop: which box of each image a view shows.

    The rule: a try is an area, uniform between the shares `scale` of the image's, and an aspect
    ratio, log-uniform between 3/4 and 4/3. The first of ten tries that fits into the image is
    taken, at a uniform place. If none fits, it is the largest square, in the middle.
    u: b 22, uniform in [0, 1); sizes: b 2, height and width -> b 4, top, left, height, width.
    """
    u_area, u_ratio, u_place = u.double().split([TRIES, TRIES, 2], dim=1)
    image_height, image_width = sizes.double().unbind(dim=1)

    low, high = scale
    share = low + (high - low) * u_area
    area = share * (image_height * image_width)[:, None]
    log_ratio = math.log(RATIO_LOW) + math.log(RATIO_HIGH / RATIO_LOW) * u_ratio
    ratio = log_ratio.exp()
    heights = (area / ratio).sqrt().round().clamp(min=1)  # b tries
    widths = (area * ratio).sqrt().round().clamp(min=1)

    fits = (heights <= image_height[:, None]) & (widths <= image_width[:, None])
    any_fits = fits.any(dim=1)
    first = fits.int().argmax(dim=1, keepdim=True)  # argmax gives the first of equal values
    square = torch.minimum(image_height, image_width)
    height = torch.where(any_fits, heights.gather(1, first)[:, 0], square)
    width = torch.where(any_fits, widths.gather(1, first)[:, 0], square)

    place = torch.where(any_fits[:, None], u_place, 0.5)
    top = (place[:, 0] * (image_height - height + 1)).floor()
    left = (place[:, 1] * (image_width - width + 1)).floor()
    return torch.stack([top, left, height, width], dim=1).long()


def crop_and_resize(batch: Batch, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Cut boxes out of images, resize them, and mirror those that `flip` says.

    batch: its pixels on the device. boxes: (v b) 4, top, left, height, width, and flip: (v b), both
    on the CPU; box i is of image i modulo b. -> (v b) c size size, from 0 to 1.
    Departure: Pillow's bilinear resize with antialiasing, but only to a grey level, rarely two.
    """
    # Why two ways: on a CPU, one by one is 2 to 4 times as fast for large pictures, which then stay
    # in its cache, as whole numbers. On a GPU, and for small pictures, all at once is faster.
    device = batch.pixels.device
    if device.type == "cpu" and batch.sizes.max() > LARGE:
        crops = crop_one_by_one(batch, boxes, size)
    else:
        crops = crop_by_products(batch, boxes, size)

    flipped = send(places_of(flip), device)
    crops[flipped] = crops[flipped].flip(-1)
    return crops


def places_of(chosen: Tensor) -> Tensor:
    """Where a mask is true. Masks are on the CPU: from a device, the host would have to wait."""
    return chosen.nonzero()[:, 0]


def send(x: Tensor, device: torch.device) -> Tensor:
    """x, from the CPU, on the device. The host goes on at once: from pinned memory, which the
    system leaves where it is, a device reads by itself."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def crop_one_by_one(batch: Batch, boxes: Tensor, size: int) -> Tensor:
    """Crops of crop_and_resize, by torch's own resize."""
    images = batch.images
    crops = []
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        image = images[i % len(images)]
        crop = image[None, :, top : top + height, left : left + width]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    return torch.cat(crops).float().div_(255)


def crop_by_products(batch: Batch, boxes: Tensor, size: int) -> Tensor:
    """Crops of crop_and_resize, all at once, as products of matrices.

    The idea: each pixel of a resized crop is a weighted mean of the image's pixels, and each weight
    is one number for the pixel's row times one for its column. So a crop is row_weights @ image @
    column_weights^T; resize_matrix gives both matrices (size height, size width).

    The trick: weights are 0 outside of the box, so most of that product is for nothing. Each image
    is first cut to a window around its box. All windows are as high as the highest box and as wide
    as the widest, so that they stack into one tensor; only where boxes are very unlike, they go
    through in groups.
    """
    images = torch.arange(len(boxes)) % len(batch.sizes)
    groups = like_sized(boxes[:, 2:])
    crops = []
    for group in groups:
        crops.append(crop_group(batch, images[group], boxes[group], size))
    if len(groups) == 1:
        return crops[0]
    places = torch.cat(groups).argsort()
    return torch.cat(crops)[send(places, batch.pixels.device)]


MOST_WASTE = 4  # how many times as large as the boxes their windows may be


def like_sized(sizes: Tensor) -> list[Tensor]:
    """Which boxes go together, that windows of one size waste little: all, or those whose heights
    and widths lie between the same powers of two. sizes: b 2 -> indices of each group."""
    largest = sizes.amax(dim=0)
    if len(sizes) * largest.prod() <= MOST_WASTE * sizes.prod(dim=1).sum():
        return [torch.arange(len(sizes))]
    _, kind = sizes.double().log2().ceil().unique(dim=0, return_inverse=True)
    return [places_of(kind == number) for number in range(int(kind.max()) + 1)]


def crop_group(batch: Batch, images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops of crop_by_products, by windows of one size. images: n, which one each box is of;
    boxes: n 4 -> n c size size."""
    device = batch.pixels.device
    window_size = boxes[:, 2:].amax(dim=0)
    window_height, window_width = window_size.tolist()
    image_size = batch.sizes[images]
    corner = torch.minimum(boxes[:, :2], image_size - window_size).clamp(min=0)

    boxes, corner, image_size = (send(x, device) for x in (boxes, corner, image_size))
    start = boxes[:, :2] - corner  # of each box in its window
    row_weights = resize_matrix(start[:, 0], boxes[:, 2], window_height, size) / 255
    column_weights = resize_matrix(start[:, 1], boxes[:, 3], window_width, size)

    # A row of a window is a stretch of batch.pixels. Windows that are larger than their image stick
    # out at the bottom and on the right. What is there does not matter: its weight is 0.
    lengths = batch.channels * batch.sizes.prod(dim=1)
    first = send((lengths.cumsum(dim=0) - lengths)[images], device)[:, None]
    row = corner[:, :1] + torch.arange(window_height, device=device)
    row = torch.minimum(row, image_size[:, :1] - 1)
    place = row * image_size[:, 1:] + corner[:, 1:]  # in its image
    row_length = batch.channels * window_width
    all_stretches = F.pad(batch.pixels, (0, row_length)).unfold(0, row_length, 1)  # copies nothing
    rows = all_stretches[first + batch.channels * place]  # n window_height row_length

    # All channels have the same weights, so they go through each product below or beside another.
    channels_below = rearrange(rows, "b h (w c) -> b (c h) w", c=batch.channels).float()
    narrow = torch.bmm(channels_below, column_weights.transpose(1, 2))
    channels_beside = rearrange(narrow, "b (c h) w -> b h (c w)", h=window_height)
    crops = torch.bmm(row_weights, channels_beside)
    return rearrange(crops, "b h (c w) -> b c h w", w=size)


def resize_matrix(start: Tensor, length: Tensor, num_inputs: int, size: int) -> Tensor:
    """One axis of a bilinear resize with antialiasing: the weights of inputs in each output.

    Inputs start ... start + length - 1 become `size` outputs. Each is a mean of the inputs around
    its centre, with weights that fall in a straight line to 0: a triangle, as wide as two outputs,
    or two inputs if those are wider. start, length: b -> b size num_inputs.
    """
    start = start[:, None, None]
    length = length[:, None, None]
    inputs_per_output = (length / size).float()
    output = torch.arange(size, device=start.device)[:, None]
    centre = start + (output + 0.5) * inputs_per_output
    position = torch.arange(num_inputs, device=start.device) + 0.5

    distance = (position - centre).abs_() / inputs_per_output.clamp(min=1)
    weights = (1 - distance).clamp_(min=0)
    weights *= (position > start) & (position < start + length)
    return weights / weights.sum(dim=-1, keepdim=True)


def is_rgb(pixels: Tensor) -> bool:
    """Whether these are colours: all else are bands of any meaning. pixels: b c h w."""
    return pixels.shape[1] == 3


def to_grey(pixels: Tensor) -> Tensor:
    """Luma of RGB (ITU-R 601-2, as in Pillow), or the mean of other bands. b c h w -> b 1 h w."""
    if not is_rgb(pixels):
        return pixels.mean(dim=1, keepdim=True)
    red, green, blue = pixels.split(1, dim=1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def adjust_brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Mix with black, or go away from it. pixels: b c h w, factor: b 1 1 1 (1: as it is)."""
    return (pixels * factor).clamp_(0, 1)


def adjust_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Mix with the image's mean grey. pixels: b c h w, factor: b 1 1 1 (1: as it is)."""
    mean_grey = to_grey(pixels).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean_grey, pixels, factor).clamp_(0, 1)


def adjust_saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Mix with the image in greys. pixels: b 3 h w, factor: b 1 1 1 (1: as it is)."""
    return torch.lerp(to_grey(pixels), pixels, factor).clamp_(0, 1)


def adjust_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of a full circle; saturation and value stay.

    RGB to HSV, add to the hue, and back. pixels: b 3 h w, shift: b 1 1 1 (0: as it is).
    """
    red, green, blue = pixels.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least

    # To HSV. The hue, in turns of the circle: red is at 0, green at 1/3, blue at 2/3. The largest
    # channel says at which of them it is, the other two how far from it. (Greys get some hue, which
    # chroma 0 takes away again.)
    scale = 1 / (6 * chroma).clamp_(min=1e-8)
    hue = (red - green).mul_(scale).add_(2 / 3)  # if blue is the largest
    hue = torch.where(value == green, (blue - red).mul_(scale).add_(1 / 3), hue)
    hue = torch.where(value == red, (green - blue).mul_(scale), hue)

    hue += shift
    hue -= hue.floor()  # back into [0, 1); on a CPU faster than % 1

    # Back to RGB: each channel is least + chroma * how full it is. The usual way picks one of six
    # formulas, for each sixth of the circle. But "how full" is one function of the hue: a hill with
    # a flat top and straight slopes, which is a distance, clamped. Red is full within a sixth of 0
    # and empty within a sixth of 1/2; green and blue are full within a sixth of 1/3 and 2/3. So all
    # channels take the same few steps, without a choice for each pixel, which is fast.
    centre = constant((1 / 2, 1 / 3, 2 / 3), hue.dtype, hue.device)[:, None, None]
    slope = constant((6, -6, -6), hue.dtype, hue.device)[:, None, None]
    height = constant((-1, 2, 2), hue.dtype, hue.device)[:, None, None]
    fullness = torch.addcmul(height, slope, (hue - centre).abs_()).clamp_(0, 1)
    return torch.addcmul(least, chroma, fullness)


# As torchvision and Pillow define them, in the order of the random factors. The last two are for
# RGB alone.
COLOR_OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def color_jitter(
    pixels: Tensor, strength: float, apply: Tensor, u_factors: Tensor, u_order: Tensor
) -> Tensor:
    """SimCLR's colour jitter, in place: four adjustments, in an order of each image's own.

    Of what is not RGB, the first two. pixels: b c h w in [0, 1]; apply: b, which images;
    u_factors, u_order: b 4, uniform in [0, 1).
    """
    # Brightness, contrast and saturation are factors around 1, hue is a shift around 0.
    middle = torch.tensor([1.0, 1.0, 1.0, 0.0])
    spread = strength * torch.tensor([0.8, 0.8, 0.8, 0.2])
    high = middle + spread
    low = torch.where(middle > 0, (middle - spread).clamp(min=0), -spread)  # no factor below 0
    factors = send(low + u_factors * (high - low), pixels.device)[..., None, None, None]

    # The images that brightness comes first in, those that contrast comes first in, ... those that
    # hue comes last in: 16 lists, sent to the device as one.
    order = u_order.argsort(dim=1)  # b 4: which operation comes first, second, ... in each image
    operations = COLOR_OPERATIONS if is_rgb(pixels) else COLOR_OPERATIONS[:2]
    lists = []
    for place in range(len(COLOR_OPERATIONS)):
        for kind in range(len(operations)):
            lists.append(places_of(apply & (order[:, place] == kind)))
    lengths = [len(images) for images in lists]
    remaining = iter(send(torch.cat(lists), pixels.device).split(lengths))

    for _ in range(len(COLOR_OPERATIONS)):
        for kind, operation in enumerate(operations):
            images = next(remaining)
            pixels[images] = operation(pixels[images], factors[images, kind])
    return pixels


def gaussian_blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Blur by a Gaussian, a product of matrices for each axis. pixels: b c h h; sigma: b, pixels.

    Weights of pixels that would lie outside are left out.
    """
    place = torch.arange(pixels.shape[-1], device=pixels.device)
    distance = place[:, None] - place
    exponent = -0.5 * (distance / sigma[:, None, None]) ** 2
    # Weights below 2e-9 are dropped: further out they are denormal, 100 times slower on a CPU.
    exponent = exponent.masked_fill(exponent < -20, -math.inf)
    weights = exponent.softmax(dim=-1)[:, None]  # b 1 h h
    return weights @ pixels @ weights.transpose(-1, -2)


# ---- Model and optimizer -------------------------------------------------------------------------
def model_config_of(config: TrainConfig) -> ViTMSNConfig:
    """The architecture, and the rules for pictures, where they are not the usual ones. Dropout is 0
    in pretraining, whatever a hub config says."""
    rules = config.picture_rules().changes()
    return ViTMSNConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size or 4 * config.hidden_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels or 3,
        initializer_range=config.initializer_range,
        drop_path_rate=config.drop_path_rate,
        extra={"picture_rules": rules} if rules else {},
    )


def build_model(config: TrainConfig, processes: "Processes") -> ViTMSNForPreTraining:
    """The Masked Siamese Network of these settings, its weights a function of the seed alone."""
    torch.manual_seed(config.seed)
    model = ViTMSNForPreTraining(
        config.model_config(),
        config.head_hidden_size,
        config.output_dim,
        config.num_prototypes,
        temperature=config.temperature,
        sharpening=config.sharpening,
        sinkhorn_iterations=config.sinkhorn_iterations,
        memax_weight=config.memax_weight,
        prior_exponent=config.prior_exponent,
        all_reduce=processes.reduce,
    )
    if config.init_from:
        new = model.load_pretrained(config.init_from)
        say(f"starting from {config.init_from}; new are: {', '.join(new) or 'none'}")
    model.prototypes.requires_grad_(not config.freeze_prototypes)

    # On a CPU the fused kernel's backward pass in bfloat16 takes 3 to 8 times as long.
    slow = processes.device.type == "cpu" and config.precision == "bfloat16"
    model.anchor_encoder.set_attn_implementation("eager" if slow else "sdpa")
    if config.gradient_checkpointing:
        model.anchor_encoder.gradient_checkpointing_enable()
    if config.compile:
        model.anchor_encoder.compile()
        model.target_encoder.compile()
    if processes.count > 1:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.__class__ = GlobalBatchNorm1d
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return model.to(processes.device, dtype).train()


def build_optimizer(
    model: ViTMSNForPreTraining, config: TrainConfig
) -> "torch.optim.Optimizer | MuonAndAdamW":
    """AdamW for all parameters or, with the setting muon, Muon for most of them."""
    groups = parameter_groups(model, config.weight_decay)
    if not config.muon:
        return torch.optim.AdamW(groups, fused=True)
    return MuonAndAdamW(*without_matrices_of_layers(groups, model))


def parameter_groups(model: ViTMSNForPreTraining, weight_decay: float) -> list[dict]:
    """Groups for AdamW; train_step sets their learning rates, and the decay of those that decay.

    As in the official code, encoder parameters of two or more dimensions decay; biases, norms and
    prototypes do not.
    """
    encoder = list(model.anchor_encoder.parameters())
    matrices = [p for p in encoder if p.ndim >= 2]
    vectors = [p for p in encoder if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay, "decays": True},
        {"params": vectors, "weight_decay": 0.0, "decays": False},
        {"params": [model.prototypes], "weight_decay": 0.0, "decays": False},
    ]


# Muon (Jordan et al., 2024; here with the scale of Liu et al., 2025), an optimizer for matrices.
# Departure: the paper trains with AdamW alone, and so do the published recipes. On Imagenette, Muon
# reaches in 20 epochs what AdamW reaches in 60 (README).


def without_matrices_of_layers(
    groups: list[dict], model: ViTMSNForPreTraining
) -> tuple[list[dict], list[dict]]:
    """Groups for Muon, the matrices of the anchor encoder's layers, and for AdamW, the rest."""
    fused = []  # query, key and value, one below another: three matrices in one
    single = []
    for name, parameter in model.anchor_encoder.blocks.named_parameters():
        if parameter.ndim == 2:
            kind = fused if name.endswith("qkv.weight") else single
            kind.append(parameter)

    decay = {"weight_decay": groups[0]["weight_decay"], "decays": True}
    for_muon = [{"params": single, "pieces": 1, **decay}, {"params": fused, "pieces": 3, **decay}]
    taken = {id(parameter) for parameter in single + fused}
    for_adamw = []
    for group in groups:
        left = [parameter for parameter in group["params"] if id(parameter) not in taken]
        for_adamw.append({**group, "params": left})
    return for_muon, for_adamw


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Each matrix with nearly all of its singular values between 0.7 and 1.2, its singular vectors
    as they were.

    Newton and Schulz's iteration: x <- a x + b (x x^T) x + c (x x^T)^2 x. Products of x and x^T
    leave the singular vectors alone, and turn a singular value s into a s + b s^3 + c s^5. With the
    numbers below, each iteration pushes singular values in (0, 1] towards 1, small ones fastest.
    All in products of matrices, which is quick where a singular value decomposition is slow.
    matrices: m rows columns, rows <= columns, float32 -> the same.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    norm = matrices.norm(dim=(-2, -1), keepdim=True)  # no singular value is larger
    x = matrices / norm.clamp(min=1e-20)
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, then a step in which all directions of a matrix are as long: orthogonalize.

    A gradient has a few large singular values and many small ones, so most directions of a matrix
    learn slowly. Groups have "pieces": how many matrices, one below another, a parameter holds.
    The learning rate and the decay are AdamW's, since a step is about as long as one of AdamW's:
    the root mean square of its entries is 0.2 times the learning rate.
    """

    def __init__(self, groups: list[dict], momentum: float = 0.95):
        super().__init__(groups, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                direction = self.direction(parameter, group["momentum"])
                pieces = zip(
                    parameter.chunk(group["pieces"]),
                    direction.chunk(group["pieces"]),
                    strict=True,
                )
                for piece, piece_direction in pieces:
                    by_shape.setdefault(piece.shape, []).append((piece, piece_direction))

            # Matrices of one shape together, because many small products are slow one by one.
            for pieces in by_shape.values():
                update(pieces, group["lr"], group["weight_decay"])

    def direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """The mean of past gradients, as Nesterov has it: with the newest one counted once more."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum)


def update(pieces: list[tuple[Tensor, Tensor]], lr: float, weight_decay: float) -> None:
    """Move matrices of one shape along their orthogonalized directions, in place."""
    directions = torch.stack([direction for _, direction in pieces])
    rows, columns = directions.shape[-2:]
    wide = directions if rows <= columns else directions.mT
    wide = orthogonalize(wide)
    directions = wide if rows <= columns else wide.mT
    # Now the root mean square of a direction's entries is 1 / sqrt(the longer side).
    directions = 0.2 * max(rows, columns) ** 0.5 * directions

    for (piece, _), direction in zip(pieces, directions, strict=True):
        piece.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr)


class MuonAndAdamW:
    """Muon for some parameters and AdamW for others, used like one of torch's optimizers."""

    def __init__(self, for_muon: list[dict], for_adamw: list[dict]):
        self.muon = Muon(for_muon)
        self.adamw = torch.optim.AdamW(for_adamw, fused=True)

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        return {**self.muon.state, **self.adamw.state}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict:
        muon = self.muon.state_dict()["state"]
        adamw = self.adamw.state_dict()["state"]
        return {"state": {"muon": muon, "adamw": adamw}}

    def load_state_dict(self, content: dict) -> None:
        for part, name in ((self.muon, "muon"), (self.adamw, "adamw")):
            part.load_state_dict({**part.state_dict(), "state": content["state"][name]})


SMALL_WIDTH = 192  # models narrower than this are small


def set_threads(threads: int, hidden_size: int) -> None:
    """How many threads share each operation on the CPU. 0: one if the model is small, else as many
    as torch takes.

    In a small model an operation is so short that a second thread wins little; and if other
    programs keep the cores busy, every operation waits until its last thread had a turn.
    """
    if threads == 0 and hidden_size < SMALL_WIDTH:
        threads = 1
    if threads:
        torch.set_num_threads(threads)


def quickest_threads(config: TrainConfig) -> int:
    """How many threads, 1, 2, 4, ..., make operations of the model's size quickest now.

    More threads are quicker while the cores have nothing else to do. If other programs keep them
    busy, every operation waits for the thread whose turn comes last, and one is quicker than two.
    (The next step's views are made by one more thread, which is alone.)
    """
    num_patches = (config.image_size // config.patch_size) ** 2
    num_tokens = config.batch_size * (1 + num_patches)
    tokens = torch.ones(min(num_tokens, 1024), config.hidden_size)
    weights = torch.ones(config.hidden_size, 4 * config.hidden_size)

    most = torch.get_num_threads()
    if most == 1:
        return 1
    best = 1
    seconds = seconds_of_a_lap(tokens, weights, best)
    while 2 * best <= most:
        seconds_of_more = seconds_of_a_lap(tokens, weights, 2 * best)
        if seconds_of_more > WORTH_MORE * seconds:
            break
        best *= 2
        seconds = seconds_of_more
    return best


def seconds_of_a_lap(tokens: Tensor, weights: Tensor, threads: int) -> float:
    """How long the first half of an MLP takes, in the mean of a race. Sets the threads."""
    torch.set_num_threads(threads)
    nn.functional.gelu(tokens @ weights)  # here new threads are started
    start = time.perf_counter()
    laps = 0
    elapsed = 0.0
    while elapsed < RACE_SECONDS:
        nn.functional.gelu(tokens @ weights)
        laps += 1
        elapsed = time.perf_counter() - start
    return elapsed / laps


WORTH_MORE = 0.8  # twice the threads are taken if a lap needs at most this share of the time
RACE_SECONDS = 0.2  # long enough that other programs have their turn, too


def choose_precision(wanted: str, device: torch.device) -> str:
    """auto is bfloat16 where matrix products in it are fast: CUDA from Ampere on, CPUs with AMX.

    Departure: the official code computes in float32. (Weights and the loss stay float32.)
    Raises UsageError for a precision that the device does not have.
    """
    if wanted == "bfloat16" and not torch.amp.is_autocast_available(device.type):
        raise UsageError(f"precision='bfloat16': torch has none on {device}; use float32.")
    if wanted == "float64" and device.type == "mps":
        raise UsageError(f"precision='float64': {device} has none; use float32.")
    if wanted != "auto":
        return wanted

    fast = False
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        fast = major >= 8
    if device.type == "cpu":
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # not in every torch
        fast = has_amx is not None and has_amx()
    return "bfloat16" if fast else "float32"


# ---- Data sets: built-in images, CIFAR-10, or a folder -------------------------------------------
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR10_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


def pack(images: list[Tensor], indices: list[int]) -> Batch:
    """A batch of images, each c height width."""
    pixels = torch.cat([image.permute(1, 2, 0).flatten() for image in images])
    sizes = torch.tensor([image.shape[1:] for image in images])
    return Batch(pixels, sizes, indices, [])


class Images(NamedTuple):
    """Images to train on and to validate with. Without labels both labels and val are None."""

    classes: list[str]
    train: Dataset
    train_labels: Tensor | None  # class numbers
    val: Dataset | None
    val_labels: Tensor | None
    picture_rules: PictureRules | None = None  # by which files were read
    why_no_labels: str = ""  # where there are none
    notes: tuple[str, ...] = ()  # lines that say what was taken of a folder, and what was not
    names_digest: str = ""  # of the training images' names, by which a resumed run knows them


def open_data(config: TrainConfig) -> Images:
    """What --data names: synthetic, cifar10, or a folder."""
    if config.data in ("synthetic", "cifar10") and config.num_channels not in (0, 3):
        raise UsageError(
            f"num_channels={config.num_channels}: the images of {config.data} have 3; use 3, or "
            "pass a folder of pictures."
        )
    if config.data == "synthetic":
        return synthetic_images(config.seed)
    if config.data == "cifar10":
        return cifar10_images(Path(config.data_dir))
    readers = config.num_workers + 1  # the main process reads too
    cache_bytes = config.cache_mb * 2**20 // readers
    rules = config.picture_rules()
    return folder_images(Path(config.data), 2 * config.image_size, cache_bytes, rules)


@dataclass(eq=False)
class ImagesInMemory(Dataset):
    """Images of one size. images: n c height width."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        return pack(list(self.images[indices]), indices)


class ImageFiles(Dataset):
    """Picture files, read when asked for, with their shorter side reduced to `side` pixels.

    Up to cache_bytes of decoded images are kept. A sample is read at once: it completes the rules,
    and `sample` says what it is like. Raises ValueError if half of it is unreadable. check=False
    reads none.
    """

    def __init__(
        self,
        paths: list[Path],
        side: int,
        cache_bytes: int,
        check: bool = True,
        rules: PictureRules | None = None,
    ):
        self.paths = paths
        self.side = side
        self.free_bytes = cache_bytes
        self.cache: dict[int, np.ndarray] = {}
        self.rules = rules or PictureRules()
        self.reasons: dict[int, str] = {}  # why a file could not be read
        self.memory = BatchMemory()
        if check:
            self.sample = self.read_sample()
            self.sample.refuse_if_unreadable()

    def read_sample(self) -> "PictureSample":
        """What some of the files are like, evenly spaced: all of them, if they are few."""
        count = min(len(self), SAMPLE)
        tried = [k * len(self) // count for k in range(count)]
        self.rules = self.rules.completed(self.look_at(tried))

        sample = PictureSample(count)
        for i in tried:
            path = self.paths[i]
            pixels = self.read(i)
            if pixels is None:
                sample.unreadable[path] = self.why(i)
                continue
            if has_one_colour(pixels):
                sample.of_one_colour.append(path)
            with open_picture(path, self.rules) as picture:
                if has_several_frames(picture):
                    sample.of_several_frames.append(path)
                if has_alpha(picture):
                    sample.with_alpha.append(path)
        return sample

    def look_at(self, indices: list[int]) -> Iterator[Seen]:
        """What those pictures that can be read tell of the rules for all."""
        for i in indices:
            with suppress(Exception):  # it is said when the picture is read
                with open_picture(self.paths[i], self.rules) as picture:
                    seen = look_at(picture)
                yield seen

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> np.ndarray | None:
        """The image as of load_image, or None if the file can't be read; `reasons` says why."""
        if i in self.cache:
            return self.cache[i]
        try:
            pixels = load_image(self.paths[i], self.side, self.rules)
        except Exception as error:  # Pillow's parsers raise every kind there is on damaged files
            self.reasons[i] = why_unreadable(error)
            return None
        if pixels.nbytes <= self.free_bytes:
            self.cache[i] = pixels
            self.free_bytes -= pixels.nbytes
        return pixels

    def why(self, i: int) -> str:
        """Why a file could not be read."""
        return self.reasons.get(i, "not read")

    def next_readable(self, i: int, unreadable: list[str]) -> tuple[int, np.ndarray]:
        """The first readable file from i on (after the last comes the first): its number and image.

        It stands in for file i, the same one whoever reads. Files that it passes over are appended
        to `unreadable`, with the reason. Raises OSError if there is no readable file at all.
        """
        for offset in range(len(self)):
            j = (i + offset) % len(self)
            pixels = self.read(j)
            if pixels is not None:
                return j, pixels
            unreadable.append(f"{self.paths[j]}: {self.why(j)}")
        raise OSError(
            f"none of the {len(self)} image files is readable any more, such as {unreadable[0]}."
        )

    def __getitems__(self, indices: list[int]) -> Batch:
        sizes = []
        used = []
        unreadable: list[str] = []
        memory = self.memory.take()
        end = 0
        for i in indices:
            j, image = self.next_readable(i, unreadable)
            start = end
            end += image.size
            if end > len(memory.pixels):
                memory = self.memory.larger(memory, end)
            memory.pixels.numpy()[start:end] = image.reshape(-1)
            sizes.append(image.shape[:2])
            used.append(j)

        self.memory.lend(memory)
        pixels = memory.pixels[:end]
        return Batch(pixels, torch.tensor(sizes), used, unreadable, memory.in_use)


class Memory(NamedTuple):
    """A piece of memory for the pixels of a batch."""

    pixels: Tensor  # uint8
    in_use: Tensor  # 1 number: 1 while a batch is lent out in it


class BatchMemory:
    """Memory for batches, which is used again when a batch is given back.

    Why: a system gives out memory page by page, each one when it is first written to. For pictures
    that takes as long as to decode them. A process that decodes for another one needs memory that
    both share, which is dearer still. If nobody calls Batch.give_back, each batch has memory of
    its own.
    """

    def __init__(self):
        self.size = 0  # bytes of pixels, enough for the largest batch so far
        self.kept: deque[Memory] = deque(maxlen=MOST_KEPT)  # threads may share it

    def take(self) -> Memory:
        """A piece that is not in use, for this thread alone until it is lent."""
        for _ in range(len(self.kept)):
            with suppress(IndexError):  # another thread has it now
                piece = self.kept.popleft()
                if piece.in_use:
                    self.kept.append(piece)
                elif len(piece.pixels) >= self.size:
                    return piece

        memory = torch.empty(HEADER + self.size, dtype=torch.uint8)
        if get_worker_info() is not None:
            memory.share_memory_()
        return Memory(memory[HEADER:], memory[:1])

    def lend(self, piece: Memory) -> None:
        """Let a batch have a piece, until it is given back."""
        piece.in_use.fill_(1)
        self.kept.append(piece)

    def larger(self, piece: Memory, size: int) -> Memory:
        """Another piece with the content of this one, larger by half or of that many bytes."""
        self.size = max(size, 3 * self.size // 2)
        new = self.take()
        new.pixels[: len(piece.pixels)] = piece.pixels
        return new


HEADER = 64  # bytes before the pixels
MOST_KEPT = 8  # pieces: more are in use only where batches are collected


class UnreadableFiles:
    """Names each file that cannot be read, the first time that it is met, with a count."""

    def __init__(self):
        self.known: set[str] = set()

    def announce(self, files: list[str]) -> None:
        for file in sorted(set(files) - self.known):
            self.known.add(file)
            note = f"skipped {file} ({len(self.known)} so far); the next one stands in"
            say(f"\n{note}", sys.stderr)


def why_unreadable(error: Exception) -> str:
    """What an error in reading a file says to people: its kind, a colon, more if there is more."""
    if isinstance(error, TooManyPixels):
        return f"too large: {error}"
    if isinstance(error, OtherChannels):
        return f"of other channels: {error}"
    if isinstance(error, MissingPackage):
        return f"in need of a package: {error}"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, UnidentifiedImageError):
        return "no picture that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()  # permission denied, no such file or directory, ...
    details = " ".join(str(error).split())[:100]
    return f"damaged: {details or type(error).__name__}"


def load_image(path: Path, side: int, rules: PictureRules | None = None) -> np.ndarray:
    """A picture file as uint8, height width c, upright.

    Its shorter side is reduced to at most `side` pixels, and its longer one to at most four times
    that. Raises TooManyPixels, OtherChannels and whatever Pillow raises.
    """
    rules = rules or PictureRules()
    drafted = None
    with open_picture(path, rules) as picture:
        if isinstance(picture, Image.Image):
            drafted = picture.draft("RGB", (side, side))  # JPEG: decode at a fraction of the size
        layers = first_frame(picture, rules)
        orientation = orientation_of(picture)

    # A fraction of the size may end within the last row and column, which are wider than the rest
    # of the picture then. So what is resized is the fractional box that the picture fills.
    box = drafted[1] if drafted else (0, 0, *layers[0].size)
    width, height = box[2:]
    scale = min(1, side / min(width, height), 4 * side / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size != (width, height):
        how = Image.Resampling.BILINEAR
        layers = [layer.resize(size, how, box, reducing_gap=2) for layer in layers]
    layers = [turn_upright(layer, orientation) for layer in layers]
    return np.asarray(layers[0]) if layers[0].mode == "RGB" else np.dstack(layers)


# Pillow would give the memory of each picture back to the system and get it anew, page by page,
# which takes longer than to decode it. Now it keeps up to 4 blocks (of at most 16 MiB).
Image.core.set_blocks_max(4)


# ---- What a sample of the pictures is like: said at the start, so that nothing goes wrong quietly
SAMPLE = 128  # pictures that are read at the start


@dataclass
class PictureSample:
    """What was found among some picture files."""

    tried: int
    unreadable: dict[Path, str] = field(default_factory=dict)  # file -> why
    of_one_colour: list[Path] = field(default_factory=list)
    of_several_frames: list[Path] = field(default_factory=list)
    with_alpha: list[Path] = field(default_factory=list)

    def __add__(self, other: "PictureSample") -> "PictureSample":
        return PictureSample(
            self.tried + other.tried,
            self.unreadable | other.unreadable,
            self.of_one_colour + other.of_one_colour,
            self.of_several_frames + other.of_several_frames,
            self.with_alpha + other.with_alpha,
        )

    def reasons(self, folder: Path | None) -> str:
        """Why how many files can't be read: the kinds of reasons, each with the first of its kind
        in full and some names."""
        kinds: dict[str, list[Path]] = {}
        for path, reason in self.unreadable.items():
            kinds.setdefault(reason.partition(":")[0], []).append(path)
        parts = []
        for paths in kinds.values():
            first_reason = self.unreadable[paths[0]]
            parts.append(f"{len(paths)} {first_reason} ({some_names(paths, folder)})")
        return "; ".join(parts)

    def refuse_if_unreadable(self) -> None:
        """Raise ValueError if half of the files or more can't be read."""
        if 2 * len(self.unreadable) >= self.tried > 0:
            folder = next(iter(self.unreadable)).parent
            raise ValueError(
                f"of {self.tried} files tried in {folder}, only "
                f"{self.tried - len(self.unreadable)} are readable: {self.reasons(folder)}."
            )

    def notes(self, folder: Path | None, rules: PictureRules, wanted: PictureRules) -> list[str]:
        """Lines on what is unusual. wanted: the rules that were asked for, rules: as completed."""
        notes = []
        if self.unreadable:
            notes.append(
                f"{len(self.unreadable)} of {self.tried} files tried can't be read: "
                + self.reasons(folder)
            )
        if self.of_one_colour:
            notes.append(
                f"{len(self.of_one_colour)} of {self.tried} pictures tried are of one colour: "
                + some_names(self.of_one_colour, folder)
            )
        if self.of_several_frames:
            notes.append(
                f"{len(self.of_several_frames)} of {self.tried} pictures tried have several frames "
                "or pages: the first that is not of one colour is taken"
            )
        if self.with_alpha and rules.num_channels in (1, 3):
            notes.append(
                f"{len(self.with_alpha)} of {self.tried} pictures tried have an alpha channel: "
                f"they are put on {rules.background} (--background sets it)"
            )
        for name, kind in (("integer_range", "more than 8 bits"), ("float_range", "real numbers")):
            low, high = getattr(rules, name)
            if (low, high) != FROM_THE_VALUES and getattr(wanted, name) == FROM_THE_VALUES:
                flag = "--" + name.replace("_", "-")
                notes.append(
                    f"pictures of {kind}: {low:g} becomes black, {high:g} white (found on those "
                    f"tried; {flag} sets it)"
                )
        if rules.num_channels != 3 and not wanted.num_channels:
            notes.append(
                f"pictures of {rules.num_channels} bands, not colours (--num-channels sets it)"
            )
        return notes


def has_one_colour(pixels: np.ndarray) -> bool:
    """Whether all pixels of an image (height width c) are the same."""
    return bool((pixels == pixels[:1, :1]).all())


def has_several_frames(picture: Image.Image | Values) -> bool:
    """Whether a picture is an animation or has pages (a JPEG has none)."""
    is_jpeg = getattr(picture, "format", "") in ("JPEG", "MPO")
    return not is_jpeg and getattr(picture, "n_frames", 1) > 1


def has_alpha(picture: Image.Image | Values) -> bool:
    """Whether a picture in grey or colours may be transparent."""
    if isinstance(picture, Values):
        return picture.are_colours and picture.values.shape[-1] in (2, 4)
    return picture.has_transparency_data


def step_batches(
    config: TrainConfig, num_images: int, steps: range, my_images: slice
) -> Iterator[list[int]]:
    """Which images each step takes: a stretch of the epoch's order, and of it this process's part.

    The order is a function of seed and epoch.
    """
    for step in steps:
        epoch, place = divmod(step, num_images // config.batch_size)
        if place == 0 or step == steps.start:
            order = torch.randperm(num_images, generator=generator_for(config.seed, ORDER, epoch))
        first = place * config.batch_size
        yield order[first:][my_images].tolist()


# ---- Inputs made ahead: images by workers, which may die or stall, and views by a thread ---------
class Made(NamedTuple):
    """What the thread of InputsAhead hands over."""

    current: StepInput | None = None
    ready: Any = None  # the event of a device that has made it
    error: Exception | None = None  # why there is none


class InputsAhead:
    """The input of each step, made by a thread while the step before it computes.

    On a device, copies and views are queued in a stream of their own, beside the step's; a device
    without streams (mps) makes them in turn. A context manager: in the end, the thread and the
    workers, which are the processes that decode images, are ended.

    Why a thread waits for the workers: to wait for one that was stopped can take forever, and
    nothing ends it. And if torch sees a worker die, it raises an error in the main thread, wherever
    that is, such as between two halves of an update; from another thread it does not.

    The thread blocks SIGINT and SIGTERM for itself and with that, however processes are started,
    for all workers from their first moment on: Ctrl-C in a terminal reaches every process of a job,
    and no worker may end before the step is done.
    """

    def __init__(
        self,
        config: TrainConfig,
        images: Dataset,
        steps: range,
        my_images: slice,
        device: torch.device,
    ):
        self.loader = DataLoader(
            images,
            batch_sampler=step_batches(config, len(images), steps, my_images),
            collate_fn=Batch._make,  # a data set gives whole batches
            num_workers=config.num_workers,
            worker_init_fn=ignore_stop_signals,
        )
        self.inputs = step_inputs(self.batches(), config, steps, my_images, device)
        self.timeout = config.batch_timeout
        self.error: Exception | None = None  # why there is no next input
        self.workers: list[multiprocessing.Process] = []
        self.device = device
        self.module = torch.get_device_module(device)
        self.stream = None
        if device.type != "cpu" and hasattr(self.module, "Stream"):
            self.stream = self.module.Stream(device)
        self.in_turn = device.type != "cpu" and self.stream is None

        self.closing = False
        self.wanted = threading.Semaphore(0)  # how many inputs the thread may make
        self.made: queue.SimpleQueue[Made] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def __enter__(self) -> "InputsAhead":
        if not self.in_turn:
            self.wanted.release()
        self.thread.start()
        return self

    def next(self, signals: "StopSignals") -> StepInput | None:
        """The input of the next step. None if a signal asks for a stop, or if it can't be had: then
        `error` says why."""
        if self.in_turn:
            self.wanted.release()
        made = self.wait(signals)
        if made.error is not None:
            self.error = self.death_of_a_worker() or made.error
        if made.current is None:
            return None
        if self.stream is not None:
            take_over(made.current.views, made.ready, self.module.current_stream(self.device))
        if not self.in_turn:
            self.wanted.release()  # for the step after this one
        return made.current

    def wait(self, signals: "StopSignals") -> Made:
        """What the thread has made, once it has. Of no content if a signal asks for a stop."""
        waited = 0.0  # not by the clock, which goes on while the job is suspended
        while not signals.received:
            with suppress(queue.Empty):
                return self.made.get(timeout=POLL)
            waited += POLL
            if waited >= self.timeout:
                note = f"no images came for {self.timeout:g} s (--batch-timeout)"
                return Made(error=WorkerError(note))
        return Made()

    def work(self) -> None:
        """What the thread does."""
        torch.set_num_threads(1)  # of its own: more would take the cores from those of the step
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            if multiprocessing.get_start_method() != "fork":
                resource_tracker.ensure_running()  # which would take the block away
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        while True:
            self.wanted.acquire()
            if self.closing:
                self.inputs.close()  # with that, torch ends the workers
                return
            self.made.put(self.make())

    def make(self) -> Made:
        """The next input, or the error that came instead."""
        try:
            if self.stream is None:
                return Made(next(self.inputs))
            with self.module.stream(self.stream):
                return Made(next(self.inputs), self.stream.record_event())
        except Exception as error:  # whatever happened, the steps that are done must be kept
            return Made(error=error)

    def batches(self) -> Iterator[Batch]:
        """The batches of the loader, whose workers are known then."""
        others = multiprocessing.active_children()
        batches = iter(self.loader)  # this starts the workers
        self.workers = [p for p in multiprocessing.active_children() if p not in others]
        yield from batches

    def death_of_a_worker(self) -> Exception | None:
        """An error with the reason, if a worker has ended by a signal or an error."""
        multiprocessing.connection.wait([w.sentinel for w in self.workers], timeout=1)
        for worker in self.workers:
            if worker.exitcode:
                how = how_it_ended(worker.exitcode)
                return WorkerError(f"a process that decodes images {how}")
        return None

    def advice(self) -> str:
        """What may help, to be appended to how to go on."""
        if not isinstance(self.error, WorkerError):
            return ""
        if not self.loader.num_workers:
            return ", from a faster disk or with a longer --batch-timeout"
        fewer = self.loader.num_workers // 2
        advice = f", with fewer workers (--num-workers {fewer})"
        shared_memory = Path("/dev/shm")
        if shared_memory.is_dir():
            space = shutil.disk_usage(shared_memory)
            advice += (
                f" or more shared memory ({shared_memory} has {space.total >> 20} MiB; "
                "docker run --shm-size 8g)"
            )
        return advice

    def __exit__(self, *error) -> None:
        self.closing = True
        self.wanted.release()
        self.thread.join(PATIENCE)
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.join(PATIENCE)


POLL = 0.25  # seconds between two looks at whether a stop is asked for
PATIENCE = 5  # seconds for a thread or a process to end


class WorkerError(RuntimeError):
    """A process that decodes images died, or gave none for too long."""


def how_it_ended(exit_code: int) -> str:
    """In words, from a Process's exit code, which is minus the number of a signal."""
    if exit_code > 0:
        return f"ended with an error (exit status {exit_code})"
    name = signal.Signals(-exit_code).name
    causes = {"SIGKILL": " (often for want of memory)", "SIGBUS": " (no room in shared memory)"}
    return f"was ended by {name}{causes.get(name, '')}"


def ignore_stop_signals(worker: int) -> None:
    """For a worker: what stops the job leaves it at work until the step is done. (Where signals
    can't be blocked, that is from here on.)"""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def take_over(views: Views, ready, stream) -> None:
    """Let a device's stream of work use views that another one makes, once they are ready."""
    stream.wait_event(ready)  # the device waits, the host goes on
    for x in (views.target_view, *views.anchor_views, *views.patches_to_keep):
        if x is not None:
            x.record_stream(stream)  # its memory is in use until this stream is done with it


# ---- A folder of pictures: which files are pictures, and which of them are for what --------------
# Folders of these names, in capitals or not, hold the pictures to train on and to validate with.
# Where there are several, the first one of the list counts.
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test")
# What desktops and file servers leave behind, beside names that begin with a dot.
LEFT_BEHIND = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information")
ONLY_IDENTIFIED = ("BUFR", "GRIB", "HDF5", "MPEG")  # formats that Pillow knows but never decodes
ARRAYS = ".npy"  # pictures, too, where there are no others
MOST_REASONS = 8  # that a line gives, the commonest ones
MOST_NAMES = 3  # of files that it names


@dataclass
class FoundFiles:
    """The picture files below a folder, in a fixed order, and what was passed over, by reason."""

    folder: Path
    pictures: list[Path]
    passed_over: dict[str, list[Path]]  # reason -> files and folders

    def pass_over(self, reason: str, paths: list[Path]) -> None:
        if paths:
            self.passed_over.setdefault(reason, []).extend(paths)

    def summary(self) -> list[str]:
        """A line that counts what was passed over, at the end by the endings of files that Pillow
        does not open; none if there is nothing."""
        if not self.passed_over:
            return []
        by_count = sorted(self.passed_over.items(), key=lambda item: -len(item[1]))
        endings = [item for item in by_count if item[0].startswith(".")]
        in_order = [item for item in by_count if item not in endings] + endings
        parts = []
        for reason, paths in in_order[:MOST_REASONS]:
            part = f"{len(paths)} {reason}"
            if not reason.startswith(("hidden", ".")):  # those names are of no interest
                part += f" ({some_names(paths, self.folder)})"
            parts.append(part)
        rest = sum(len(paths) for _, paths in in_order[MOST_REASONS:])
        if rest:
            parts.append(f"{rest} for other reasons")
        return ["passed over: " + ", ".join(parts)]


def some_names(paths: list[Path], folder: Path | None) -> str:
    """The first few paths for a line of text, as seen from a folder if there is one."""
    names = [str(path.relative_to(folder) if folder else path) for path in paths[:MOST_NAMES]]
    if len(paths) > MOST_NAMES:
        names.append("...")
    return ", ".join(names)


def picture_endings() -> set[str]:
    """The endings of files that Pillow says it can open, such as ".png"."""
    formats = Image.registered_extensions()
    openable = Image.OPEN.keys() - set(ONLY_IDENTIFIED)
    return {ending for ending, name in formats.items() if name in openable}


def find_pictures(folder: Path) -> FoundFiles:
    """All picture files below a folder. Raises UsageError if there are none.

    Hidden files and folders are neither pictures nor looked into. Links are followed, but not those
    that lead back up. Arrays are pictures if there are no others: beside some, they may be features
    or labels.
    """
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "is not found"
        raise UsageError(
            f"{folder} {problem}; --data takes synthetic, cifar10 or a folder of pictures."
        )
    found = FoundFiles(folder, [], {})
    look_into(folder, (), picture_endings(), found)
    if not found.pictures:
        found.pictures = found.passed_over.pop(ARRAYS, [])
    found.pictures.sort()
    if not found.pictures:
        reasons = "; ".join(found.summary()) or "it is empty"
        raise UsageError(f"{folder} holds no image that Pillow can open; {reasons}.")
    return found


def look_into(folder: Path, above: tuple[str, ...], endings: set[str], found: FoundFiles) -> None:
    """Sort the content of a folder into pictures and what is passed over.

    above: the folders in which it lies, up to the first one, as real paths.
    """
    here = (*above, os.path.realpath(folder))
    try:
        with os.scandir(folder) as content:
            entries = sorted(content, key=lambda entry: entry.name)
    except OSError as error:
        found.pass_over(f"not to be opened: {error.strerror}", [folder])
        return

    for entry in entries:
        path = folder / entry.name
        ending = path.suffix.lower()
        if entry.name.startswith(".") or entry.name in LEFT_BEHIND:
            found.pass_over("hidden", [path])
        elif entry.is_dir():
            if os.path.realpath(path) in here:
                found.pass_over("links back up", [path])
            else:
                look_into(path, here, endings, found)
        elif not entry.is_file():
            found.pass_over("no files (links to nothing, devices)", [path])
        elif ending in endings:
            found.pictures.append(path)
        else:
            found.pass_over(ending or "without an ending", [path])


class PictureTree(NamedTuple):
    """Which pictures of a folder are for what. Without labels, those of val are for nothing."""

    train: list[Path]
    val: list[Path]
    train_folder: Path  # the names of classes are those of the folders right below it
    val_folder: Path
    why_no_labels: str
    notes: tuple[str, ...]


def sort_pictures(found: FoundFiles) -> PictureTree:
    """Decide what a tree of pictures is, and say what was decided.

    Pictures to train on lie in train/, those to validate with in val/; both may have other names
    (TRAIN_NAMES, VAL_NAMES), and lie in a folder within the folder. Where there is no train/, all
    pictures outside of val/ are to train on. The class of a picture is the first folder below
    train/ or val/. A few pictures without one are passed over, if there are labels; they need both
    folders divided into classes, and all classes of val/ in train/. Raises UsageError if there is
    no picture to train on.
    """
    root = common_folder(found)
    members: dict[str, list[Path]] = {}  # first folder below root -> its pictures
    for path in found.pictures:
        members.setdefault(first_folder(path, root), []).append(path)
    train_names = folders_called(TRAIN_NAMES, members)
    val_names = folders_called(VAL_NAMES, members)
    val_members = [members.pop(name) for name in val_names]

    if train_names:
        train_folder = root / train_names[0]
        train = members.pop(train_names[0])
        unused = val_members[1:] + list(members.values())
        found.pass_over(f"outside of {train_folder.name}/ and val", sorted(chain_of(unused)))
    else:
        train_folder = root
        train = sorted(chain_of(list(members.values())))
        found.pass_over("in other folders for validation", sorted(chain_of(val_members[1:])))
    if not train:
        raise UsageError(
            f"{root} holds no image to train on: all of them are in {' and '.join(val_names)}; "
            "to train on those, pass their folder as --data."
        )

    tree = PictureTree(train, [], train_folder, root, "", ())
    if val_names:
        tree = tree._replace(val=val_members[0], val_folder=root / val_names[0])
    tree = tree._replace(why_no_labels=why_no_labels(tree))
    if not tree.why_no_labels:
        tree = without_strays(tree, found)
    return tree._replace(notes=tree_notes(tree, found, val_names))


def chain_of(lists: list[list[Path]]) -> list[Path]:
    """One list of all."""
    return [path for paths in lists for path in paths]


def first_folder(path: Path, folder: Path) -> str:
    """The name of the first folder on the way from a folder down to a file; "" if there is none."""
    parts = path.parts[len(folder.parts) : -1]
    return parts[0] if parts else ""


def class_name(path: Path, folder: Path) -> str:
    """The class of a picture below train/ or val/, "" if it has none: the name of the first folder.

    Letters that a file system may write in two ways (ä as one, or as an a with dots) are the same.
    """
    return unicodedata.normalize("NFC", first_folder(path, folder))


def common_folder(found: FoundFiles) -> Path:
    """The folder itself or, while all that it holds is in one folder, that one."""
    folder = found.folder
    while True:
        names = {first_folder(path, folder) for path in found.pictures}
        name = names.pop()
        if names or not name or name.lower() in TRAIN_NAMES + VAL_NAMES:
            return folder
        folder = folder / name


def folders_called(wanted: tuple[str, ...], names: Iterable[str]) -> list[str]:
    """Those of the names that are wanted, in capitals or not, in the order in which they are."""
    found = [name for name in names if name.lower() in wanted]
    return sorted(found, key=lambda name: (wanted.index(name.lower()), name.lower() != name, name))


def why_no_labels(tree: PictureTree) -> str:
    """Why the pictures of a tree have no labels; "" if they have."""
    if not tree.val:
        return f"{tree.val_folder} has no folder {', '.join(VAL_NAMES[:-1])} or {VAL_NAMES[-1]}"

    for folder, paths in ((tree.train_folder, tree.train), (tree.val_folder, tree.val)):
        strays = [path for path in paths if not class_name(path, folder)]
        if 2 * len(strays) >= len(paths):
            return f"{len(strays)} of {len(paths)} pictures in {folder} are in no class folder"

    classes = {class_name(path, tree.train_folder) for path in tree.train}
    for path in tree.val:
        name = class_name(path, tree.val_folder)
        if name and name not in classes:
            return f"{tree.val_folder / name} is of a class that {tree.train_folder} lacks"
    return ""


def without_strays(tree: PictureTree, found: FoundFiles) -> PictureTree:
    """The tree without the pictures that lie in no class folder, which are passed over."""
    train = [path for path in tree.train if class_name(path, tree.train_folder)]
    val = [path for path in tree.val if class_name(path, tree.val_folder)]
    strays = sorted({*tree.train, *tree.val} - {*train, *val})
    found.pass_over("in no class folder", strays)
    return tree._replace(train=train, val=val)


def tree_notes(tree: PictureTree, found: FoundFiles, val_names: list[str]) -> tuple[str, ...]:
    """Lines that say what was decided, where it is not what the usual names say."""
    notes = []
    if val_names and tree.train_folder != found.folder / "train":
        notes.append(f"training images are those in {tree.train_folder}")
    if tree.val and (tree.val_folder != found.folder / "val" or len(val_names) > 1):
        note = f"validation images are those in {tree.val_folder}"
        if len(val_names) > 1:
            note += f", not those in {', '.join(val_names[1:])}"
        notes.append(note)
    if tree.why_no_labels:
        notes.append(f"no labels, so no k-NN: {tree.why_no_labels}")
    taken = tree.train if tree.why_no_labels else tree.train + tree.val
    endings = Counter(path.suffix.lower() for path in taken)
    if len(endings) > 1:
        counts = [f"{count} {ending}" for ending, count in endings.most_common()]
        notes.append(f"taken: {', '.join(counts)}")
    return (*notes, *found.summary())


def folder_images(
    folder: Path, side: int, cache_bytes: int, rules: PictureRules | None = None
) -> Images:
    """The pictures of a folder, with labels where sort_pictures finds them."""
    wanted = rules or PictureRules()
    tree = sort_pictures(find_pictures(folder))
    train = ImageFiles(tree.train, side, cache_bytes, rules=wanted)
    if tree.why_no_labels:
        notes = (*tree.notes, *train.sample.notes(folder, train.rules, wanted))
        no_labels = Images([], train, None, None, None, train.rules, tree.why_no_labels, notes)
        return no_labels._replace(names_digest=digest_of_names(tree.train, folder))

    val = ImageFiles(tree.val, side, cache_bytes, rules=train.rules)
    train.rules = val.rules  # it may have found what no picture of train could tell
    sample = train.sample + val.sample
    train_names = [class_name(path, tree.train_folder) for path in tree.train]
    val_names = [class_name(path, tree.val_folder) for path in tree.val]
    classes = sorted(set(train_names))
    number = {name: i for i, name in enumerate(classes)}
    return Images(
        classes,
        train,
        train_labels=torch.tensor([number[name] for name in train_names]),
        val=val,
        val_labels=torch.tensor([number[name] for name in val_names]),
        picture_rules=val.rules,
        notes=(*tree.notes, *sample.notes(folder, val.rules, wanted)),
        names_digest=digest_of_names(tree.train, folder),
    )


def digest_of_names(paths: list[Path], folder: Path) -> str:
    """A digest of the names of files within a folder: wherever that is, it is the same."""
    prefix = len(os.path.join(folder, ""))
    names = hashlib.sha256()
    for path in paths:
        name = os.fspath(path)[prefix:].replace(os.sep, "/")
        names.update(os.fsencode(name) + b"\0")
    return names.hexdigest()


# ---- The built-in images: ten kinds of grey texture ----------------------------------------------
# A texture is a function of u and v, phases in two directions at right angles (both count size
# size), and of noise(width): smooth noise of that shape. Values lie in [-1, 1]: tanh makes edges of
# a wave, the sharper the larger the factor before it.
TWO_PI = 2 * np.pi
SIN_60 = 0.866


def stripes(u, v, noise):
    """Parallel bands."""
    sharpness = 3
    return np.tanh(sharpness * np.sin(u))


def checks(u, v, noise):
    """Squares of two greys, as on a chess board."""
    sharpness = 6
    width = 1.4  # of a square, in stripes
    return np.tanh(sharpness * np.sin(u / width) * np.sin(v / width))


def dots(u, v, noise):
    """Round spots on a square grid."""
    sharpness = 4
    threshold = 0.9  # the larger, the smaller the dots
    return np.tanh(sharpness * (np.cos(u) + np.cos(v) - threshold))


def waves(u, v, noise):
    """Bands that swing in curves."""
    sharpness = 3
    swing = 1.5
    length = 1.5
    return np.tanh(sharpness * np.sin(u + swing * np.sin(v / length)))


def honeycomb(u, v, noise):
    """Spots on a grid of triangles, each with six neighbours."""
    sharpness = 3
    threshold = -0.3
    at_60_degrees = np.cos(-u / 2 + v * SIN_60)
    at_120_degrees = np.cos(-u / 2 - v * SIN_60)
    return np.tanh(sharpness * (np.cos(u) + at_60_degrees + at_120_degrees - threshold))


def bricks(u, v, noise):
    """A wall: flat bricks, dark joints, every other row shifted by half a brick."""
    length = 1.2
    odd_row = np.floor(v / np.pi) % 2  # shifted by half a brick
    joint_below = np.cos(v * 2) > 0.75
    joint_beside = np.cos(u / length + np.pi * odd_row) > 0.9
    return 1 - 2.0 * (joint_below | joint_beside)


def zigzag(u, v, noise):
    """Bands that turn at sharp corners."""
    sharpness = 3
    swing = 2.2
    length = 1.6
    triangle_wave = np.arcsin(np.sin(v / length))
    return np.tanh(sharpness * np.sin(u + swing * triangle_wave))


def rings(u, v, noise):
    """Circles around one centre, in each cell of a square grid."""
    sharpness = 3
    density = 2.2
    cell = 2.5  # each square cell has its own set of rings
    x = (u / cell) % TWO_PI - np.pi
    y = (v / cell) % TWO_PI - np.pi
    return np.tanh(sharpness * np.sin(density * np.hypot(x, y)))


def blobs(u, v, noise):
    """Smooth noise, coarse: patches without a direction."""
    sharpness = 2
    return np.tanh(sharpness * noise(width=1.5))


def grain(u, v, noise):
    """The same noise, fine, as sand."""
    sharpness = 2
    return np.tanh(sharpness * noise(width=0.3))


TEXTURES = (stripes, checks, dots, waves, honeycomb, bricks, zigzag, rings, blobs, grain)
PERIODS = (5, 9)  # pixels, from stripe to stripe
BEND = 1.5  # pixels: by how much a texture is bent, so that no two images match pixel by pixel
BEND_WIDTH = 5  # pixels: how smoothly
CONTRASTS = (0.4, 1)
BRIGHTNESS = 30  # greys up and down
PIXEL_NOISE = 6  # greys
MIDDLE_GREY = 127.5
GREYS_PER_DEVIATION = 60


def smooth_noise(count: int, size: int, width: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise blurred by `width` pixels, of deviation 1. -> count size size."""
    frequency = np.fft.fftfreq(size)
    squared = frequency[:, None] ** 2 + frequency**2
    blur = np.exp(-2 * (np.pi * width) ** 2 * squared)  # the Fourier transform of a Gaussian
    spectrum = np.fft.fft2(rng.standard_normal((count, size, size))) * blur
    noise = np.fft.ifft2(spectrum).real
    return noise / noise.std(axis=(1, 2), keepdims=True)


def draw_texture(texture: Callable, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Images of one texture, each with its own turn, period, place, bends. -> count size size."""
    one_each = (count, 1, 1)
    turn = rng.uniform(0, TWO_PI, one_each)
    period = rng.uniform(*PERIODS, one_each)

    y, x = np.mgrid[:size, :size]
    x = x + BEND * smooth_noise(count, size, BEND_WIDTH, rng)
    y = y + BEND * smooth_noise(count, size, BEND_WIDTH, rng)
    along = np.cos(turn) * x + np.sin(turn) * y
    across = -np.sin(turn) * x + np.cos(turn) * y
    u = TWO_PI * along / period + rng.uniform(0, TWO_PI, one_each)
    v = TWO_PI * across / period + rng.uniform(0, TWO_PI, one_each)

    def noise(width: float) -> np.ndarray:
        return smooth_noise(count, size, width, rng)

    return texture(u, v, noise)


def synthetic_images(seed: int, train: int = 4000, val: int = 1000, size: int = 32) -> Images:
    """The built-in data set: the class of an image is the kind of its texture.

    That is what any two crops of an image have in common. Place, turn, period and contrast are not,
    so raw pixels say little. (In colour, colour tells images apart, and the method learns that.)
    """
    rng = np.random.default_rng([seed, IMAGES])
    count = train + val
    labels = torch.arange(count) % len(TEXTURES)
    pixels = np.empty((count, size, size), np.float32)
    for label, texture in enumerate(TEXTURES):
        members = slice(label, None, len(TEXTURES))
        pixels[members] = draw_texture(texture, len(labels[members]), size, rng)

    # Neither brightness nor contrast may give the kind away.
    pixels -= pixels.mean(axis=(1, 2), keepdims=True)
    pixels /= pixels.std(axis=(1, 2), keepdims=True)
    one_each = (count, 1, 1)
    contrast = rng.uniform(*CONTRASTS, one_each) * rng.choice([-1, 1], one_each)
    brightness = rng.uniform(-BRIGHTNESS, BRIGHTNESS, one_each)
    pixel_noise = rng.normal(0, PIXEL_NOISE, pixels.shape)
    pixels = MIDDLE_GREY + GREYS_PER_DEVIATION * contrast * pixels + brightness + pixel_noise

    grey = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))[:, None]
    images = grey.repeat(1, 3, 1, 1)
    return Images(
        classes=[texture.__name__ for texture in TEXTURES],
        train=ImagesInMemory(images[:train]),
        train_labels=labels[:train],
        val=ImagesInMemory(images[train:]),
        val_labels=labels[train:],
    )


# ---- CIFAR-10: its files are pickles, which may call any function; here they call none -----------
class PickledArray:
    """Keeps what a pickle would hand to numpy, which trusts it: it makes arrays at any address."""

    def __setstate__(self, state):
        self.state = state


class CifarUnpickler(pickle.Unpickler):
    """Whatever function a pickle wants to call, a PickledArray comes out, and nothing is run."""

    def find_class(self, module, name):
        def instead(*arguments):
            return PickledArray()

        return instead


def read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One of the original batches -> images n 3 32 32 (uint8), labels n. Raises ValueError if it is
    none."""
    try:
        content = CifarUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        _, shape, _, _, pixels = content[b"data"].state  # as numpy pickles an array
        flat_labels = bytes([*content[b"labels"]])  # bytes() takes nothing but small numbers
        labels = torch.tensor(list(flat_labels))
        if shape != (len(labels), 3 * 32 * 32) or labels.max() > 9:
            raise ValueError(f"data is {shape} with {len(labels)} labels")
        images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)
        return torch.tensor(images), labels
    except Exception as error:  # an unpickler fed with garbage raises every kind there is
        raise ValueError(f"{path} is no CIFAR-10 python batch: {error}") from None


def cifar10_images(data_dir: Path) -> Images:
    """The data_batch_* files that are there, here or in cifar-10-batches-py/; if there are none,
    the archive is downloaded, checked and unpacked."""
    pattern = "data_batch_[1-5]"
    for folder in (data_dir, data_dir / "cifar-10-batches-py"):
        if any(folder.glob(pattern)):
            break
    else:
        folder = download_cifar10(data_dir)

    images = []
    labels = []
    for path in sorted(folder.glob(pattern)):
        batch_images, batch_labels = read_cifar_batch(path)
        images.append(batch_images)
        labels.append(batch_labels)
    val_images, val_labels = read_cifar_batch(folder / "test_batch")
    train = ImagesInMemory(torch.cat(images))
    return Images(CIFAR10_CLASSES, train, torch.cat(labels), ImagesInMemory(val_images), val_labels)


def download_cifar10(data_dir: Path) -> Path:
    """Fetch the archive from the authors' page and unpack it into data_dir. Raises ValueError if it
    is not the published one."""
    say(f"downloading {CIFAR10_URL} (163 MiB)")
    with urllib.request.urlopen(CIFAR10_URL, timeout=60) as response:
        archive = response.read()
    if hashlib.sha256(archive).hexdigest() != CIFAR10_SHA256:
        raise ValueError(
            f"{CIFAR10_URL} is not the published file (its SHA-256 differs); nothing was unpacked."
        )
    folder = data_dir / "cifar-10-batches-py"
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isfile():  # written whole: the processes of one job may all do so at once
                content = tar.extractfile(member).read()
                write_file(folder / Path(member.name).name, content)  # never outside of the folder
    return folder


# ---- Evaluation: k nearest neighbours of frozen features -----------------------------------------
@torch.no_grad()
def embed_images(
    encoder: ViTMSNModel | None,
    images: Dataset,
    indices: list[int],
    size: int,
    device: torch.device,
    batch_size: int = 256,
) -> tuple[Tensor, list[int]]:
    """Features of images, each squashed to `size`: the class token before the final norm.

    encoder None: the pixels themselves. Returns features (n d, float32, on the CPU) and which
    images they are of: unreadable ones are left out.
    """
    module = encoder or nn.Identity()
    was_training = module.training
    module.eval()
    features = []
    kept = []
    for first in range(0, len(indices), batch_size):
        wanted = indices[first : first + batch_size]
        batch = images.__getitems__(wanted)
        readable = [place for place, i in enumerate(wanted) if batch.indices[place] == i]
        pixels = squash(batch, size, device)
        batch.give_back()
        if len(readable) < len(wanted):
            pixels = pixels[send(torch.tensor(readable), device)]
        if encoder is None:
            part = normalize(pixels).flatten(1)
        else:
            pixels = Preprocessor.from_config(encoder.config).normalize(pixels)
            part = encoder.representation(pixels, interpolate_pos_encoding=True)
        features.append(part.float().cpu())
        kept += [wanted[place] for place in readable]
    module.train(was_training)
    return torch.cat(features), kept


def squash(batch: Batch, size: int, device: torch.device) -> Tensor:
    """Whole images resized to a square. -> b c size size, from 0 to 1.

    Departure: the paper evaluates on the middle of an image, cut out after a resize that keeps its
    shape. (preprocess in vitmsn.py has both.)
    """
    corner = torch.zeros_like(batch.sizes)
    boxes = torch.cat([corner, batch.sizes], dim=1)
    no_flip = torch.zeros(len(boxes), dtype=torch.bool)
    return crop_and_resize(batch.on(device), boxes, no_flip, size)


def some_of(images: Dataset, count: int) -> list[int]:
    """Indices of at most `count` images, ascending: a random choice, the same every time.

    (Evenly spaced ones would miss classes if these take turns in the data set.)
    """
    order = torch.randperm(len(images), generator=generator_for(0, CHOICE))
    return order[:count].sort().values.tolist()


def knn_predict(
    bank: Tensor, bank_labels: Tensor, features: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """The class of each feature, by a vote of the k nearest in the bank.

    A vote weighs exp(cosine similarity / temperature).
    bank: n d, bank_labels: n, features: m d -> m.
    """
    bank = F.normalize(bank, dim=-1)
    features = F.normalize(features, dim=-1)
    num_classes = int(bank_labels.max()) + 1
    predicted = []
    for queries in features.split(1024):
        similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=-1)
        # Less the largest: that changes no vote and keeps exp() finite at any temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(queries), num_classes)
        votes.scatter_add_(1, bank_labels[nearest], weights)
        predicted.append(votes.argmax(dim=-1))
    return torch.cat(predicted)


def knn_accuracy(
    encoder: ViTMSNModel | None, data: Images, config: TrainConfig, device: torch.device
) -> float:
    """Share of validation images that k-NN on 20,000 training images gets right.

    encoder None: raw pixels, of at most 64 x 64 (those of the published recipes take 80 GiB).
    """
    size = config.image_size if encoder else min(config.image_size, 64)
    train, train_kept = embed_images(encoder, data.train, some_of(data.train, 20000), size, device)
    val, val_kept = embed_images(encoder, data.val, list(range(len(data.val))), size, device)
    predicted = knn_predict(train, data.train_labels[train_kept], val)
    return (predicted == data.val_labels[val_kept]).float().mean().item()


def compare_with_labels(
    encoders: dict[str, ViTMSNModel], data: Images, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Print the accuracy by k-NN of each encoder and of raw pixels. -> the same, by name."""
    accuracies = {}
    for name, encoder in {**encoders, "raw pixels": None}.items():
        accuracies[name] = round(knn_accuracy(encoder, data, config, device), 4)
        say(f"k-NN accuracy, {name + ':':<19} {accuracies[name]:.3f}")
    return accuracies


# ---- Evaluation without labels: are two views of an image each other's nearest? ------------------
class Agreement(NamedTuple):
    """What features of two views of n images show without labels; 1 / n and 1 if all are alike."""

    # Share of the images whose two views are each other's nearest, by cosine similarity.
    mutual_nearest: float
    # How many directions the features fill, from 1 to d: exp of the entropy of their singular
    # values, scaled to sum to 1 (RankMe, arXiv 2210.02885). A high rank alone proves nothing:
    # random features have it, too.
    rank: float


def agreement_of(features: Tensor) -> Agreement:
    """features: 2 n d, of two views of each image."""
    first, second = F.normalize(features.double(), dim=-1)
    similarity = first @ second.T
    images = torch.arange(len(first))
    nearest_second = similarity.argmax(dim=1)
    nearest_first = similarity.argmax(dim=0)
    mutual = (nearest_second == images) & (nearest_first == images)

    singular_values = torch.linalg.svdvals(first)
    share = singular_values / singular_values.sum()
    rank = torch.special.entr(share).sum().exp()
    return Agreement(mutual.double().mean().item(), rank.item())


@torch.no_grad()
def embed_pairs(
    encoder: ViTMSNModel,
    images: Dataset,
    indices: list[int],
    config: TrainConfig,
    device: torch.device,
    batch_size: int = 256,
) -> Tensor:
    """Features of two target views of each image, on the CPU. -> 2 n d, without unreadable ones."""
    draws = draw_views(len(indices), 2, generator_for(config.seed, PAIRS))
    was_training = encoder.training
    encoder.eval()
    features = []
    for first in range(0, len(indices), batch_size):
        part = slice(first, first + batch_size)
        batch = images.__getitems__(indices[part])
        own_draws = {name: numbers[:, part] for name, numbers in draws.items()}
        views = views_of_one_size(
            batch.on(device), own_draws, config, config.image_size, config.crop_scale
        )
        batch.give_back()

        readable = torch.tensor(batch.indices) == torch.tensor(indices[part])
        of_both = []
        for view in views:
            seen = view[send(places_of(readable), device)]
            of_both.append(encoder.representation(seen, interpolate_pos_encoding=True))
        features.append(torch.stack(of_both).float().cpu())
    encoder.train(was_training)
    return torch.cat(features, dim=1)


def compare_without_labels(
    encoders: dict[str, ViTMSNModel], data: Images, config: TrainConfig, device: torch.device
) -> dict[str, dict]:
    """Print the agreement of each encoder, on a thousand training images. -> the same, by name."""
    indices = some_of(data.train, 1000)
    say(
        f"no labels, so two target views of each of {len(indices)} training images are compared:\n"
        f"{'':<19}  each other's nearest  rank, at most {config.hidden_size}",
    )
    agreements = {}
    for name, encoder in encoders.items():
        agreement = agreement_of(embed_pairs(encoder, data.train, indices, config, device))
        say(agreement_line(name, agreement))
        agreements[name] = {key: round(value, 4) for key, value in agreement._asdict().items()}
    say(
        f"{agreement_line('complete collapse', Agreement(1 / len(indices), 1.0))}\n"
        "A run that collapses finds hardly more pairs than its untrained encoder, and its rank "
        "falls.",
    )
    return agreements


def agreement_line(name: str, agreement: Agreement) -> str:
    """A line of the table of compare_without_labels."""
    return f"{name:<19}  {agreement.mutual_nearest:>20.3f}  {agreement.rank:>4.1f}"


# ---- The run's folder: which one, settings, metrics, checkpoints ---------------------------------
RUNS = Path("runs")
LOSS_COLUMNS = ("loss", "cross_entropy", "memax", "entropy", "prototypes_used", "top_assignment")
TIME_COLUMNS = ("images_per_second", "elapsed_seconds")
METRICS = ("step", "epoch", *LOSS_COLUMNS, "grad_norm", *StepValues._fields, *TIME_COLUMNS)
KNN_COLUMNS = ("step", "epoch", "accuracy")
CHECKPOINT = {  # what one must hold
    "target_encoder": dict,
    "encoder": dict,
    "prototypes": Tensor,
    "optimizer": dict,
    "step": int,
    "elapsed": float,
    "config": dict,
}
# Flags that a resumed run may change, because the result is the same.
FREE_TO_CHANGE = {
    "resume",
    "changed_data",
    "output_dir",
    "num_workers",
    "batch_timeout",
    "max_steps",
    "checkpoint_every",
    "knn_every",
    "cache_mb",
}


def run_number(folder: Path, recipe: str) -> int:
    """The number of a folder named <recipe>-<number>; 0 for other names."""
    name, _, number = folder.name.rpartition("-")
    return int(number) if name == recipe and number.isdecimal() else 0


def newest_run(recipe: str | None = None) -> Path | None:
    """The first of runs_by_age, None if there is none."""
    return next(iter(runs_by_age(recipe)), None)


def runs_by_age(recipe: str | None = None, with_checkpoint: bool = False) -> list[Path]:
    """The folders in runs/, the one written to last first: the time of its checkpoint or, before
    the first one, of its settings.

    recipe: only <recipe>-<number>. with_checkpoint: only runs that have one.
    """
    times = {}
    for folder in sorted(RUNS.glob("*")):
        if recipe is not None and not run_number(folder, recipe):
            continue
        names = ["checkpoint.pt"] if with_checkpoint else ["checkpoint.pt", "config.json"]
        found = [folder / name for name in names if (folder / name).is_file()]
        if found:
            times[folder] = found[0].stat().st_mtime
    return sorted(times, key=times.get, reverse=True)


LARGE_PICTURES = 48  # pixels of the shorter side, from which on 64 pixels show more than 32 do


def recipe_for(data: str) -> str:
    """The recipe where none is asked for: for own pictures by their size, which is said."""
    if data == "synthetic":
        return "demo"
    if data == "cifar10":
        return "cifar10"
    size = usual_size(find_pictures(Path(data)).pictures)
    if size is None:
        return "imagenette"  # open_data says that none is readable

    width, height = size
    recipe = "imagenette" if min(width, height) >= LARGE_PICTURES else "cifar10"
    if os.environ.get("RANK", "0") == "0":
        pixels = RECIPES[recipe]["image_size"]
        say(
            f"no --recipe: {recipe}'s, at {pixels} pixels, for pictures of about "
            f"{width} x {height} (all recipes: --help)",
        )
    return recipe


def usual_size(paths: list[Path]) -> tuple[int, int] | None:
    """Median width and height of some 32 of these pictures, or None if none of them is readable."""
    sizes = []
    for path in paths[:: math.ceil(len(paths) / 32)]:
        try:
            with open_picture(path, PictureRules()) as image:
                sizes.append(image.size)
        except Exception:  # Pillow's parsers raise every kind there is; open_data counts them
            continue
    if not sizes:
        return None
    width, height = np.median(sizes, axis=0)
    return int(width), int(height)


def choose_folder(config: TrainConfig) -> Path:
    """--output-dir, else the newest run of the recipe (--resume) or the next free number."""
    if config.output_dir:
        return Path(config.output_dir)
    newest = newest_run(config.recipe) if config.resume else None
    if newest is not None:
        return newest
    numbers = [run_number(folder, config.recipe) for folder in RUNS.glob("*")]
    return RUNS / f"{config.recipe}-{max(numbers, default=0) + 1:03d}"


def settle(given: dict, folder: Path, recipe: str) -> tuple[TrainConfig, dict | None]:
    """Settings and checkpoint of a run in `folder`, a new one by the recipe. Raises UsageError if
    that would overwrite a run or contradict its settings."""
    config = make_config({"recipe": recipe, **given})
    settings_file = folder / "config.json"
    if not config.resume and settings_file.exists():
        raise UsageError(
            f"{folder} holds a run; go on with it by --resume, or choose another --output-dir."
        )
    content = load_checkpoint(folder) if config.resume else None
    if content is None and not settings_file.exists():
        return config, None

    saved = content["config"] if content else json.loads(settings_file.read_text())
    saved = with_tuples(saved)
    free_names = set(FREE_TO_CHANGE)
    if content and "data" in content:  # then check_same_images knows whether it has only moved
        free_names.add("data")
    for name, value in given.items():
        if name not in free_names and value not in ("auto", saved.get(name)):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {value}: {folder} was started with {saved.get(name)}.")
    free = {name: value for name, value in given.items() if name in free_names}
    settings = {**saved, "max_steps": 0, "changed_data": False, **free}
    known = {f.name for f in fields(TrainConfig)}
    settings = {name: value for name, value in settings.items() if name in known}
    return TrainConfig(**settings), content


def identity_of(data: Images) -> dict:
    """By which a resumed run knows its images again."""
    return {"images": len(data.train), "names": data.names_digest}


def check_same_images(content: dict | None, data: Images, config: TrainConfig) -> None:
    """Raise UsageError if a run would go on with other images than before, unless --changed-data
    accepts them: what an epoch is, and so all schedules, depend on how many there are."""
    before = (content or {}).get("data")  # older checkpoints do not have it
    now = identity_of(data)
    if not isinstance(before, dict) or before == now:
        return

    change = (
        f"{config.data} has {now['images']} training images, and the run had "
        f"{before.get('images')}: some were added, removed or renamed"
    )
    if now["images"] == before.get("images"):
        change = f"the {now['images']} training images of {config.data} have not the names they had"
    if not config.changed_data:
        raise UsageError(
            f"{change}. Give the --data that the run began with (it may have moved), or go on with "
            "these by --changed-data."
        )
    say(f"{change}; an epoch is now {now['images'] // config.batch_size} steps", sys.stderr)


def with_tuples(settings: dict) -> dict:
    """Pairs as TrainConfig has them: JSON, checkpoints and argparse make lists of them."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }


def announce(
    config: TrainConfig, folder: Path, data: Images, model: ViTMSNForPreTraining, steps: range
) -> None:
    """Write the settings to config.json, and say in a few lines what is about to happen."""
    (folder / "summary.json").unlink(missing_ok=True)  # it says that a run is finished
    write_file(folder / "config.json", json.dumps(asdict(config), indent=2).encode())

    million_parameters = sum(p.numel() for p in model.anchor_encoder.parameters()) / 1e6
    labels = "no labels"
    if data.val:
        labels = f"{len(data.val)} for validation, {len(data.classes)} classes"
    device = model.prototypes.device
    threads = f", --threads {config.threads}" if device.type == "cpu" else ""
    lines = (
        f"run folder {folder}: recipe {config.recipe}, seed {config.seed}; "
        f"{steps.start} of {steps.stop} steps are done",
        f"data {config.data}: {len(data.train)} training images, {labels}",
        *data.notes,
        f"encoder and projection head: {million_parameters:.2f} M parameters; "
        f"{config.precision} on {device}{threads}",
    )
    say("\n".join(lines))


def read_table(path: Path) -> list[dict[str, str]]:
    """The whole lines of a CSV file, each by column name; none if it is not there. A last line that
    was cut off is left out."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return list(csv.DictReader(io.StringIO(whole)))


def open_table(path: Path, columns: tuple[str, ...], keep_before: int) -> TextIO:
    """A CSV file to append to. Of a resumed run, lines of steps from keep_before on are dropped."""
    lines = [",".join(columns)]
    for line in read_table(path):
        if int(line["step"]) < keep_before:
            lines.append(",".join(line.values()))
    write_file(path, "".join(f"{line}\n" for line in lines).encode())
    return open(path, "a", buffering=1, encoding="utf-8")  # each line is written at once


class Record:
    """What a run says of its progress: metrics.csv, knn.csv, and lines on the terminal."""

    def __init__(self, folder: Path, config: TrainConfig, steps: range, elapsed: float):
        self.batch_size = config.batch_size
        self.live = sys.stdout.isatty()
        self.pause = 0.5 if self.live else 20  # seconds between lines
        metrics = open_table(folder / "metrics.csv", METRICS, steps.start)
        knn = open_table(folder / "knn.csv", KNN_COLUMNS, steps.start + 1)
        self.metrics = csv.DictWriter(metrics, METRICS, lineterminator="\n")
        self.knn = csv.DictWriter(knn, KNN_COLUMNS, lineterminator="\n")

        self.steps = steps
        now = time.perf_counter()
        self.start = now - elapsed  # as if the run had never been interrupted
        self.ends = deque([now], maxlen=RECENT + 1)  # of the last steps
        self.shown = now  # when the last line was
        self.header = ""  # the names of its columns, as they were printed last

    def elapsed(self) -> float:
        """Seconds of training, over all resumptions."""
        return time.perf_counter() - self.start

    def step(self, step: int, epoch: float, metrics: dict[str, float], now: StepValues) -> None:
        """Write down one step, and show it if it is the last one or time for a line."""
        clock = time.perf_counter()
        seconds = clock - self.ends[-1]
        self.ends.append(clock)
        line = {"step": step, "epoch": epoch, **metrics, **now._asdict()}
        line["images_per_second"] = self.batch_size / seconds
        line["elapsed_seconds"] = clock - self.start
        self.metrics.writerow(line)

        if clock - self.shown >= self.pause or step + 1 == self.steps.stop:
            self.shown = clock
            self.show(line)

    def show(self, line: dict[str, float]) -> None:
        """Print a line of metrics.csv for people: on a terminal in place of the one before, and no
        wider than the terminal is now. The columns are named above it, once."""
        done = line["step"] + 1
        seconds_per_step = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        steps_left = self.steps.stop - done
        cells = {
            "step": f"{done}/{self.steps.stop}".rjust(2 * len(str(self.steps.stop)) + 1),
            "epoch": f"{line['epoch']:.1f}",
            "images/s": f"{self.batch_size / seconds_per_step:.0f}",
            "left": clock_time(seconds_per_step * steps_left),
            "loss": f"{line['loss']:.3f}",
            "cross-entropy": f"{line['cross_entropy']:.3f}",
            "me-max": f"{line['memax']:.3f}",
            "prototypes": f"{line['prototypes_used']:.0f}",  # ... in use
            "lr": f"{line['lr']:.1e}",
            "gradient norm": f"{line['grad_norm']:.2f}",
            "top assignment": f"{line['top_assignment']:.3f}",
            "momentum": f"{line['momentum']:.4f}",
        }
        header, text = fit_columns(cells, shutil.get_terminal_size().columns - 1)
        if header != self.header:
            say(header)
            self.header = header
        say(text, stays=not self.live or not steps_left)

    def evaluation(self, step: int, epoch: float, accuracy: float) -> None:
        """Write down and show an accuracy by k-NN."""
        self.knn.writerow({"step": step, "epoch": epoch, "accuracy": accuracy})
        say(f"epoch {epoch:.0f}: k-NN accuracy {accuracy:.3f}")


RECENT = 100  # steps, of whose speed the shown line is: other programs come and go

COLUMN_WIDTHS = {
    "epoch": 5,
    "left": 8,
    "loss": 6,
    "lr": 7,
}  # where the name is narrower than the values


def fit_columns(cells: dict[str, str], width: int) -> tuple[str, str]:
    """Names and values as two lines, of the first columns that fit into `width` characters."""
    names = ""
    values = ""
    for name, value in cells.items():
        column_width = max(len(name), len(value), COLUMN_WIDTHS.get(name, 0))
        if len(names) + column_width > width:
            break
        names += name.rjust(column_width) + "  "
        values += value.rjust(column_width) + "  "
    return names.rstrip(), values.rstrip()


def clock_time(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03; from 100 hours on, days and hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 100:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{hours // 24}d {hours % 24:02}h"


ERASE_LINE = "\r\033[K"  # for terminals: back to the start of the line, and clear it


def say(text: str, file: TextIO | None = None, stays: bool = True) -> None:
    """Print a line, on a terminal in place of the last one that was said not to stay.

    Work does not end because of that: if nobody reads any more (`| head`), or the disk of a log is
    full, nothing else is printed from then on.
    """
    file = file or sys.stdout
    start = ERASE_LINE if file.isatty() else ""
    try:
        print(start + text, end="\n" if stays else "", file=file, flush=True)
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), file.fileno())


def show_all_names() -> None:
    """Let what the encoding of the output has no letter for be shown as \\u0444 or the like. As it
    stands, Python ends the program: for a name of a file, after hours of work."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")


def save_checkpoint(
    folder: Path,
    model: ViTMSNForPreTraining,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    data: Images,
    step: int,
    elapsed: float,
) -> None:
    """Write all that resuming needs; the checkpoint before it stays as checkpoint-previous.pt.

    No state of random generators is among it: every draw is a function of seed and step. Encoders
    are stored as in the original release: what reads vits16_800ep.pth.tar reads this.
    """
    channels = model.config.num_channels
    content = {
        "target_encoder": to_original(model.target_encoder.state_dict(), channels),
        "encoder": to_original(model.anchor_encoder.state_dict(), channels),
        "prototypes": model.prototypes.detach(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "elapsed": elapsed,
        "config": asdict(config),
        "data": identity_of(data),
        "model_config": model.config.to_dict(),
    }
    newest = folder / "checkpoint-next.pt"
    last = folder / "checkpoint.pt"
    write_file(newest, lambda file: torch.save(content, file))
    if last.is_file():
        os.replace(last, folder / "checkpoint-previous.pt")
    os.replace(newest, last)


def load_checkpoint(folder: Path) -> dict | None:
    """The newest whole checkpoint of a run, None if there is none. A damaged one is named, and the
    one before it taken. Raises ValueError if all are damaged."""
    names = ("checkpoint-next.pt", "checkpoint.pt", "checkpoint-previous.pt")
    found = [folder / name for name in names if (folder / name).is_file()]
    for path in found:
        try:
            return read_checkpoint(path)
        except ValueError as error:
            say(f"{error} Trying the checkpoint before it.", sys.stderr)
    if found:
        raise ValueError(f"no checkpoint in {folder} can be read; start again in another folder.")
    say(f"there is no checkpoint in {folder}: starting from the beginning")
    return None


def read_checkpoint(path: Path) -> dict:
    """The content of a file by save_checkpoint. Raises ValueError if it is none or damaged."""
    content = read_tensors(path)
    wrong = [name for name, kind in CHECKPOINT.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise ValueError(
            f"{path} is no checkpoint of train_msn.py: {', '.join(wrong)} missing or wrong."
        )
    return content


def restore(content: dict, model: ViTMSNForPreTraining, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's content back. Raises ValueError if it is of another architecture or not
    finite."""
    try:
        restore_weights(content, model)
        state = {**optimizer.state_dict(), "state": content["optimizer"]["state"]}
        optimizer.load_state_dict(state)
        check_optimizer_state(optimizer)
    except Exception as error:  # what is in it may be of any kind
        raise ValueError(f"the checkpoint does not fit these settings: {error}") from None


def restore_weights(content: dict, model: ViTMSNForPreTraining) -> None:
    """Encoders and prototypes of a checkpoint. load_state_dict checks names and shapes."""
    weights = {"prototypes": content["prototypes"]}
    for name, value in from_original(content["target_encoder"]).items():
        weights[f"target_encoder.{name}"] = value
    for name, value in from_original(content["encoder"]).items():
        weights[f"anchor_encoder.{name}"] = value
    model.load_state_dict(weights)
    for name, value in model.state_dict().items():
        check_tensor(name, value, value.shape)


def check_optimizer_state(optimizer: "torch.optim.Optimizer | MuonAndAdamW") -> None:
    """Raise ValueError unless each parameter that learns has AdamW's three tensors, or Muon's."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            state = optimizer.state[parameter]
            if "pieces" in group:  # of Muon
                check_tensor("momentum_buffer", state["momentum_buffer"], parameter.shape)
                continue
            check_tensor("exp_avg", state["exp_avg"], parameter.shape)
            check_tensor("exp_avg_sq", state["exp_avg_sq"], parameter.shape, least=0)
            check_tensor("step", state["step"], (), least=0)


def check_tensor(name: str, value: Tensor, shape: tuple, least: float = -math.inf) -> None:
    """Raise ValueError if a tensor is of another shape, not finite, or somewhere below `least`."""
    if value.shape != shape or not torch.isfinite(value).all() or value.min() < least:
        raise ValueError(
            f"{name} is not finite, negative, or of shape {tuple(value.shape)}, not {tuple(shape)}"
        )


def finish_run(
    folder: Path,
    model: ViTMSNForPreTraining,
    data: Images,
    config: TrainConfig,
    step: int,
    elapsed: float,
    processes: "Processes",
) -> None:
    """Write the encoder as a folder that transformers loads, the pictures, and summary.json with a
    comparison: what are features worth without any training?"""
    device = processes.device
    save_encoder(folder / "encoder", model, config)

    alone = Processes(0, 1, device)  # no other process takes part in this
    twin = build_model(replace(config, init_from="", compile=False), alone)
    candidates = {
        "target encoder": model.target_encoder,
        "untrained encoder": twin.target_encoder,
    }
    summary = {"step": step, "minutes": round(elapsed / 60, 2)}
    if data.val is not None:
        summary.update(compare_with_labels(candidates, data, config, device))
    else:
        summary.update(compare_without_labels(candidates, data, config, device))

    # From here on the twin has the trained weights. In `model`, batch norm in the projection head
    # would wait for the other processes.
    twin.load_state_dict(model.state_dict())
    save_pictures(folder, twin, data, config, summary, config.batch_size // processes.count)
    write_file(folder / "summary.json", json.dumps(summary, indent=2).encode())
    took = clock_time(elapsed)
    say(f"done in {took} (h:mm:ss): {folder}/encoder, pictures *.png")


def save_encoder(folder: Path, model: ViTMSNForPreTraining, config: TrainConfig) -> None:
    """The target encoder without its projection head, as a folder that transformers loads."""
    weights = model.target_encoder.state_dict()
    encoder = ViTMSNModel(config.model_config())
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    encoder.save_pretrained(folder)


# ---- Many processes: all that knows of torch.distributed; one process needs none of it -----------
TIMEOUT = timedelta(minutes=20)  # how long processes wait for one another: the first one evaluates


class AllProcesses(torch.autograd.Function):
    """The sum, the largest or the mean over all processes, for msn_loss and metrics. op: "sum",
    whose gradient is the sum of all processes' gradients, or "max" or "mean", of a detached x."""

    @staticmethod
    def forward(ctx, x: Tensor, op: str) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        return x / dist.get_world_size() if op == "mean" else x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return all_processes(grad, "sum"), None


all_processes = AllProcesses.apply


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """Batch norm by the statistics of the batch of all processes, for training only. x: b d.

    (torch's own, SyncBatchNorm, refuses the CPU.)
    """

    def forward(self, x: Tensor) -> Tensor:
        rank = dist.get_rank()
        count = dist.get_world_size()
        values = x.to(self.weight.dtype)
        mine = torch.stack(torch.var_mean(values, dim=0, correction=0))  # 2 d: variance, mean

        # Each process fills its own place among zeros, so that one sum brings all together.
        everyones = F.pad(mine[None], (0, 0, 0, 0, rank, count - rank - 1))  # processes 2 d
        variances, means = all_processes(everyones, "sum").unbind(dim=1)
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + means.var(dim=0, correction=0)

        unbiased = variance.detach() / (1 - 1 / (count * len(x)))
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        self.num_batches_tracked += 1
        normalised = (values - mean) * (variance + self.eps).rsqrt()
        return (normalised * self.weight + self.bias).to(x.dtype)


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, on which device it computes, and what reduces (to the
    sum, the largest or the mean) over all of them."""

    rank: int
    count: int
    device: torch.device
    reduce: Callable[[Tensor, str], Tensor] = one_process

    @property
    def is_first(self) -> bool:
        """The first process alone writes files and prints progress."""
        return self.rank == 0

    def share_of(self, batch_size: int) -> slice:
        """Which images of the global batch are this process's."""
        size = batch_size // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model with gradients that are means over all processes."""
        return nn.parallel.DistributedDataParallel(model) if self.count > 1 else model

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. All processes must ask."""
        if self.count == 1:
            return flag
        number = torch.full((), float(flag), device=self.device)
        return bool(self.reduce(number, "max"))  # here the host waits for the device


def start_alone(device: str) -> torch.device:
    """The device of a program that is one process, whatever a launcher has left in the environment.
    Raises UsageError if it is not there."""
    found = find_device(device)
    return found if found.type == "cpu" else device_of_process(found, 0, 1)


def start_processes(config: TrainConfig) -> Processes:
    """Join the process group that torchrun describes in the environment; without torchrun, one
    process. Raises UsageError for devices and batch sizes that such processes can't have."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # among the processes of this machine
    device = find_device(config.device)

    if config.batch_size % count or config.batch_size // count < 2:
        good = max(2, math.ceil(config.batch_size / count)) * count
        raise UsageError(
            f"batch_size={config.batch_size} is no even share, of 2 images or more, for each of "
            f"{count} processes; use {good}."
        )
    if device.type != "cpu":
        device = device_of_process(device, local_rank, count)
    if count == 1:
        return Processes(rank, count, device)
    join_process_group(rank, count, dist.get_default_backend_for_device(device))
    return Processes(rank, count, device, all_processes)


CHOSEN_BY_AUTO = ("cuda", "xpu")  # others, such as mps, are used when they are named


def find_device(name: str) -> torch.device:
    """The device of a name such as cpu, cuda or cuda:1; auto: a GPU, or else the CPU. Raises
    UsageError if it is not there."""
    if name == "auto":
        there = [kind for kind in CHOSEN_BY_AUTO if count_devices(torch.device(kind))]
        return torch.device(there[0] if there else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device={name!r} is not known to torch; use auto, cpu or cuda.") from None
    if not count_devices(device):
        raise UsageError(
            f"device={name!r} but torch sees no {device.type} device (GPU); use --device cpu, or a "
            f"build of torch for {device.type}."
        )
    return device


def count_devices(device: torch.device) -> int:
    """How many devices of this type are there."""
    try:
        return torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError):  # torch knows the name and has nothing behind it
        return 0


def device_of_process(device: torch.device, local_rank: int, count: int) -> torch.device:
    """The GPU of this process, from now on the one that is meant without a number. Raises
    UsageError if there are too few."""
    gpus = count_devices(device)
    if device.index is not None and count > 1:
        raise UsageError(f"device={device} is one for {count} processes; use {device.type}.")
    index = local_rank if device.index is None else device.index
    if index >= gpus:
        raise UsageError(
            f"process {local_rank} has no GPU {device.type}:{index} ({gpus} are here); start fewer "
            "processes, or use --device cpu."
        )
    module = torch.get_device_module(device)
    if hasattr(module, "set_device"):  # where there can be more than one
        module.set_device(index)
    return torch.device(device.type, index)


def join_process_group(rank: int, count: int, backend: str) -> None:
    """Meet the other processes, where torchrun says, and wait until all are there."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun has not started this one
        say(
            f"process {rank} of {count}, as WORLD_SIZE says: waits for the others at "
            f"{os.environ.get('MASTER_ADDR')} (to train alone, unset WORLD_SIZE)",
            sys.stderr,
        )
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # When torchrun starts workers again, its store still holds the addresses of those that died.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(restart, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)


# ---- Drawing: sheets of pictures, plots, heat maps, and a diagram. Nothing here knows a model ----
# Colours, and sizes in pixels: large enough for a slide.
COLORS = ("#1f5fa8", "#c8501e", "#2f8a4a", "#7a4fa0", "#8a6d1f", "#555555", "#c02070")
RIGHT = "#2f8a4a"  # frames of pictures whose class is the one that was asked for
WRONG = "#d0312d"
BLACK = "#111111"
GREY = "#666666"
FRAME = "#aaaaaa"
GRID = "#e6e6e6"
LETTERS = 22  # height of the font
SMALL_LETTERS = 18
LINE_HEIGHT = LETTERS + 6
GAP = 8  # between pictures


class Box(NamedTuple):
    """A rectangle of pixels."""

    left: float
    top: float
    right: float
    bottom: float


class Canvas:
    """A white picture to draw on. Places are in pixels from its upper left corner."""

    def __init__(self, width: float, height: float):
        size = (math.ceil(width), math.ceil(height))
        self.image = Image.new("RGB", size, "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        color: str = BLACK,
        size: int = LETTERS,
        anchor: str = "la",
    ) -> None:
        """Text in Pillow's built-in font, which knows Latin letters only.

        anchor: where in the text the place is: "l", "m" or "r" (left, middle, right), then "a", "m"
        or "d" (top, middle, bottom).
        """
        font = ImageFont.load_default(size)
        self.pen.text((x, y), text, color, font, anchor)

    def line(self, x1: float, y1: float, x2: float, y2: float, color: str, width: int = 2) -> None:
        self.pen.line((x1, y1, x2, y2), color, width)

    def dashes(self, left: float, right: float, y: float, color: str) -> None:
        """A dashed line from left to right."""
        for x in range(round(left), round(right), 20):
            self.line(x, y, min(x + 10, right), y, color, width=3)

    def dot(self, x: float, y: float, color: str) -> None:
        radius = 5
        box = (x - radius, y - radius, x + radius, y + radius)
        self.pen.ellipse(box, color)

    def frame(self, box: Box, color: str, width: int = 2) -> None:
        self.pen.rectangle(box, outline=color, width=width)

    def bar(self, box: Box, color: str) -> None:
        self.pen.rectangle(box, color)

    def save(self, path: Path) -> None:
        write_file(path, lambda file: self.image.save(file, "PNG"))


def text_width(text: str, size: int) -> int:
    """In pixels."""
    return math.ceil(ImageFont.load_default(size).getlength(text))


def fitting_size(text: str, width: float, size: int) -> int:
    """The size of letters, at most `size`, at which a text is no wider than `width`; at least 8."""
    share = width / max(1, text_width(text, size))
    return max(8, min(size, math.floor(size * share)))


# ---- Sheets of pictures
class Tile(NamedTuple):
    """A picture on a sheet."""

    picture: np.ndarray  # h w 3, uint8
    caption: str = ""  # below it
    color: str = ""  # of its frame and caption; none without


@dataclass
class Strip:
    """A line of a sheet: a few words on its left, and its pictures."""

    tiles: list[Tile]
    title: list[str] = field(default_factory=list)  # lines of text


def save_sheet(
    path: Path, strips: list[Strip], header: list[str], cell: int = 128, note: str = ""
) -> None:
    """A table of pictures, its columns named. Pictures of one strip are to one scale, so that a
    focal view is seen to be smaller. cell: pixels, of the largest picture in each strip; note: a
    sentence below the table."""
    left = GAP
    captions = 0
    for strip in strips:
        for text in strip.title:
            left = max(left, text_width(text, SMALL_LETTERS) + 2 * GAP)
        if any(tile.caption for tile in strip.tiles):
            captions = SMALL_LETTERS + GAP
    top = LETTERS + 2 * GAP
    pitch = cell + GAP + captions
    bottom = top + len(strips) * pitch

    columns = column_places(strips, header, cell, left)
    width = max(columns[-1], text_width(note, SMALL_LETTERS) + 2 * GAP)
    canvas = Canvas(width, bottom + LINE_HEIGHT if note else bottom)
    for x, title in zip(columns, header, strict=False):  # the last place is where the sheet ends
        canvas.text(x, GAP, title)

    for row, strip in enumerate(strips):
        y = top + row * pitch
        for number, text in enumerate(strip.title):
            canvas.text(GAP, y + number * LINE_HEIGHT, text, size=SMALL_LETTERS)
        for x, tile in zip(columns, strip.tiles, strict=False):
            draw_tile(canvas, x, y, tile, strip, cell)
    canvas.text(GAP, bottom, note, GREY, SMALL_LETTERS)
    canvas.save(path)


def drawn_size(tile: Tile, strip: Strip, cell: int) -> tuple[int, int]:
    """Width and height of a tile on the sheet."""
    largest = max(max(other.picture.shape[:2]) for other in strip.tiles)
    height, width = tile.picture.shape[:2]
    return max(1, width * cell // largest), max(1, height * cell // largest)


def column_places(strips: list[Strip], header: list[str], cell: int, left: int) -> list[int]:
    """Where each column begins, and where the last one ends. A column is as wide as its widest
    picture, or its title."""
    places = [left]
    for column, title in enumerate(header):
        column_width = text_width(title, LETTERS)
        for strip in strips:
            if column < len(strip.tiles):
                width, _ = drawn_size(strip.tiles[column], strip, cell)
                column_width = max(column_width, width)
        places.append(places[-1] + column_width + GAP)
    return places


def draw_tile(canvas: Canvas, x: int, y: int, tile: Tile, strip: Strip, cell: int) -> None:
    """A picture, its frame, and its caption below the cell."""
    image = Image.fromarray(tile.picture)
    width, height = drawn_size(tile, strip, cell)
    # Enlarged pixels stay squares: what a network sees should look as coarse as it is.
    is_enlarged = width > image.width
    how = Image.Resampling.NEAREST if is_enlarged else Image.Resampling.LANCZOS
    canvas.image.paste(image.resize((width, height), how), (x, y))

    if tile.color:
        box = Box(x, y, x + width - 1, y + height - 1)
        canvas.frame(box, tile.color, width=5)
    if tile.caption:
        size = fitting_size(tile.caption, width, SMALL_LETTERS)
        canvas.text(x, y + cell + 3, tile.caption, tile.color or BLACK, size)


# ---- Line plots
class Point(NamedTuple):
    """Of a curve."""

    x: float
    y: float
    error: float = 0.0  # half the length of its error bar


@dataclass
class Panel:
    """A plot: curves, and horizontal lines to compare them with."""

    title: str
    x_label: str
    curves: dict[str, list[Point]]  # by name
    levels: dict[str, float] = field(default_factory=dict)  # heights of dashed lines, by name
    log_x: bool = False
    x_ticks: dict[float, str] | None = None  # where the axis has which text; None: round numbers
    y_range: tuple[float, float] | None = None  # None: all that there is


class Range(NamedTuple):
    """What an axis shows."""

    low: float
    high: float


PANEL_WIDTH = 720
PANEL_HEIGHT = 400  # without the names of the curves


def save_plot(path: Path, panels: list[Panel]) -> None:
    """Line plots, two of them side by side, the names of the curves below each."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    most_names = max(len(panel.curves) + len(panel.levels) for panel in panels)
    pitch = PANEL_HEIGHT + most_names * LINE_HEIGHT + GAP
    canvas = Canvas(columns * PANEL_WIDTH, rows * pitch)

    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        x = column * PANEL_WIDTH
        y = row * pitch
        box = Box(x + 90, y + 50, x + PANEL_WIDTH - 60, y + PANEL_HEIGHT - 70)
        draw_panel(canvas, box, panel)
        draw_names(canvas, box, panel)
    canvas.save(path)


def draw_panel(canvas: Canvas, box: Box, panel: Panel) -> None:
    """Axes with their names and numbers, then levels, then curves with their error bars."""
    x_range, y_range = ranges_of(panel)
    canvas.text(box.left, box.top - 14, panel.title, anchor="ld")
    canvas.text(box.right, box.bottom + 36, panel.x_label, GREY, SMALL_LETTERS, "ra")

    draw_y_axis(canvas, box, y_range)
    x_ticks = panel.x_ticks
    if x_ticks is None:
        x_ticks = round_ticks(x_range)
    for x, text in x_ticks.items():
        at_x = place_of(x, x_range, box.left, box.right, panel.log_x)
        canvas.line(at_x, box.bottom, at_x, box.bottom + 6, FRAME)
        canvas.text(at_x, box.bottom + 10, text, GREY, SMALL_LETTERS, "ma")
    canvas.frame(box, FRAME)

    number_of_levels = len(panel.curves)  # their colours come after those of the curves
    for number, level in enumerate(panel.levels.values(), number_of_levels):
        at_y = place_of(level, y_range, box.bottom, box.top)
        canvas.dashes(box.left, box.right, at_y, color_of(number))
    for number, curve in enumerate(panel.curves.values()):
        dots = []
        for point in curve:
            at_x = place_of(point.x, x_range, box.left, box.right, panel.log_x)
            at_y = place_of(point.y, y_range, box.bottom, box.top)
            at_top = place_of(point.y + point.error, y_range, box.bottom, box.top)
            dots.append(Point(at_x, at_y, at_y - at_top))
        draw_curve(canvas, dots, color_of(number))


def draw_y_axis(canvas: Canvas, box: Box, y_range: Range) -> None:
    """Round numbers on the left, each with a pale line through the box."""
    for y, text in round_ticks(y_range).items():
        at_y = place_of(y, y_range, box.bottom, box.top)
        canvas.line(box.left, at_y, box.right, at_y, GRID, width=1)
        canvas.text(box.left - 8, at_y, text, GREY, SMALL_LETTERS, "rm")


def draw_curve(canvas: Canvas, dots: list[Point], color: str) -> None:
    """A line from dot to dot, dots if they are few, and error bars. dots: in pixels."""
    for start, end in itertools.pairwise(dots):
        canvas.line(start.x, start.y, end.x, end.y, color, width=3)
    for x, y, error in dots:
        if len(dots) <= 20:
            canvas.dot(x, y, color)
        if error:
            canvas.line(x, y - error, x, y + error, color)
            canvas.line(x - 6, y - error, x + 6, y - error, color)
            canvas.line(x - 6, y + error, x + 6, y + error, color)


def draw_names(canvas: Canvas, box: Box, panel: Panel) -> None:
    """The names of curves and levels, each beside a piece of its line."""
    y = box.bottom + 74
    names = [*panel.curves, *panel.levels]
    for number, name in enumerate(names):
        color = color_of(number)
        if name in panel.curves:
            canvas.line(box.left, y, box.left + 40, y, color, width=3)
        else:
            canvas.dashes(box.left, box.left + 40, y, color)
        canvas.text(box.left + 52, y, name, color, SMALL_LETTERS, "lm")
        y += LINE_HEIGHT


def color_of(number: int) -> str:
    """Of a curve or level of a panel."""
    return COLORS[number % len(COLORS)]


def ranges_of(panel: Panel) -> tuple[Range, Range]:
    """What the two axes of a panel show: all points and levels, with some room above and below."""
    x = []
    y = list(panel.levels.values())
    for curve in panel.curves.values():
        for point in curve:
            x.append(point.x)
            y.append(point.y - point.error)
            y.append(point.y + point.error)

    x_low = min(x, default=0.0) if panel.log_x else 0.0
    x_range = not_empty(x_low, max(x, default=1.0))
    if panel.y_range:
        return x_range, Range(*panel.y_range)

    y_range = not_empty(min(y, default=0.0), max(y, default=1.0))
    room = (y_range.high - y_range.low) * 0.06
    low = y_range.low - room
    if y_range.low >= 0:
        low = max(low, 0.0)
    return x_range, Range(low, y_range.high + room)


def not_empty(low: float, high: float) -> Range:
    """A range that has a length, even around a single value."""
    return Range(low, high if high > low else low + 1)


def place_of(value: float, of: Range, start: float, end: float, log: bool = False) -> float:
    """Where a value is between two places, in pixels."""
    low, high = of
    if log:
        value = math.log(value)
        low = math.log(low)
        high = math.log(high)
    return start + (end - start) * (value - low) / (high - low)


def round_ticks(of: Range) -> dict[float, str]:
    """Some round numbers in a range, 4 to 11 of them, with their texts."""
    rough_step = (of.high - of.low) / 4
    power = 10 ** math.floor(math.log10(rough_step))
    step = power
    for factor in (2, 5):
        if factor * power <= rough_step:
            step = factor * power

    first = math.ceil(of.low / step - 1e-9)
    last = math.floor(of.high / step + 1e-9)
    ticks = {}
    for number in range(first, last + 1):
        ticks[number * step] = f"{number * step:.6g}"
    return ticks


# ---- Heat maps
@dataclass
class HeatMap:
    """A matrix of numbers from 0 to 1, with the sums of its columns as bars below it."""

    title: str
    values: np.ndarray  # rows columns
    notes: list[str]  # lines of text below


MAP_SIDE = 448
MAP_COLOR = (13, 60, 120)  # of a 1; 0 is white
BARS_HEIGHT = 110


def save_heat_maps(path: Path, maps: list[HeatMap], column_name: str, row_name: str) -> None:
    """Heat maps side by side, all to one scale: 0 is white, 1 is dark. Bars to one scale, too."""
    left = 20
    top = LETTERS + 6 * GAP
    pitch = MAP_SIDE + 60
    bars_top = top + MAP_SIDE + 36
    notes_top = bars_top + BARS_HEIGHT + 20
    most_notes = max(len(heat_map.notes) for heat_map in maps)
    canvas = Canvas(left + len(maps) * pitch, notes_top + most_notes * LINE_HEIGHT + GAP)

    highest = max(heat_map.values.sum(axis=0).max() for heat_map in maps)
    for number, heat_map in enumerate(maps):
        x = left + number * pitch
        canvas.text(x, GAP, heat_map.title)
        canvas.text(x, top - 4, row_name, GREY, SMALL_LETTERS, "ld")
        draw_map(canvas, x, top, heat_map.values)
        size = fitting_size(column_name, MAP_SIDE, SMALL_LETTERS)
        canvas.text(x, top + MAP_SIDE + 4, column_name, GREY, size)
        bars = Box(x, bars_top, x + MAP_SIDE, bars_top + BARS_HEIGHT)
        draw_bars(canvas, bars, heat_map.values.sum(axis=0), highest)
        for line, note in enumerate(heat_map.notes):
            canvas.text(x, notes_top + line * LINE_HEIGHT, note, GREY, SMALL_LETTERS)
    canvas.save(path)


def draw_map(canvas: Canvas, x: int, y: int, values: np.ndarray) -> None:
    """A square of MAP_SIDE pixels: a rectangle for each number."""
    size = (MAP_SIDE, MAP_SIDE)
    image = Image.fromarray(map_colors(values))
    canvas.image.paste(image.resize(size, Image.Resampling.NEAREST), (x, y))
    canvas.frame(Box(x, y, x + MAP_SIDE - 1, y + MAP_SIDE - 1), FRAME, width=1)


def map_colors(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 as colours from white to MAP_COLOR. rows columns -> rows columns 3."""
    white = np.full(3, 255.0)
    share = np.clip(values, 0, 1)[..., None]
    return (white + share * (MAP_COLOR - white)).round().astype(np.uint8)


def draw_bars(canvas: Canvas, box: Box, heights: np.ndarray, highest: float) -> None:
    """A bar for each number, and a dashed line at their mean."""
    scale = Range(0, highest)
    edges = np.linspace(box.left, box.right, len(heights) + 1)
    for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
        top = place_of(height, scale, box.bottom, box.top)
        canvas.bar(Box(left, top, max(left, right - 1), box.bottom), COLORS[0])
    mean = place_of(heights.mean(), scale, box.bottom, box.top)
    canvas.dashes(box.left, box.right, mean, COLORS[1])


# ---- The flow of the gradient
class Node(NamedTuple):
    """A box of the diagram."""

    x: int  # its middle
    y: int
    text: str
    more: str
    color: str = BLACK


NODE_WIDTH = 240
NODE_HEIGHT = 84
CROSS_ENTROPY_COLOR = COLORS[1]
ME_MAX_COLOR = COLORS[0]
BOTH_COLOR = COLORS[3]
NODES = {
    "anchor views": Node(150, 130, "anchor views", "masked, or small crops"),
    "anchor encoder": Node(500, 130, "anchor encoder", "learns"),
    "p": Node(850, 130, "assignments p", "softmax(cosines / tau)"),
    "me-max": Node(1200, 130, "me-max", "log k - H(mean p)", ME_MAX_COLOR),
    "prototypes": Node(850, 300, "prototypes", "learn"),
    "cross-entropy": Node(1200, 300, "cross-entropy", "H(p+, p)", CROSS_ENTROPY_COLOR),
    "target view": Node(150, 470, "target view", "whole"),
    "target encoder": Node(500, 470, "target encoder", "does not learn"),
    "p+": Node(850, 470, "assignments p+", "sharpened, Sinkhorn"),
}
FORWARD = (
    ("anchor views", "anchor encoder"),
    ("anchor encoder", "p"),
    ("p", "me-max"),
    ("prototypes", "p"),
    ("p", "cross-entropy"),
    ("target view", "target encoder"),
    ("target encoder", "p+"),
    ("prototypes", "p+"),
    ("p+", "cross-entropy"),
)
BACKWARD = (  # from, to, colour of the term whose gradient it is
    ("me-max", "p", ME_MAX_COLOR),
    ("cross-entropy", "p", CROSS_ENTROPY_COLOR),
    ("p", "prototypes", BOTH_COLOR),
    ("p", "anchor encoder", BOTH_COLOR),
)
STOPPED = ("p+", "cross-entropy")  # the forward arrow along which no gradient comes back

Norms = dict[str, dict[str, float]]  # term of the loss -> part of the model -> norm of gradient


def save_gradient_flow(path: Path, norms: Norms) -> None:
    """The way of the gradient as a diagram, and how large it is in each part of the model."""
    canvas = Canvas(1360, 940)
    canvas.text(30, 20, "Where the gradient flows: forward in grey, backward in colour")
    for start, end in FORWARD:
        draw_arrow(canvas, NODES[start], NODES[end], GREY)
    for start, end, color in BACKWARD:
        draw_arrow(canvas, NODES[start], NODES[end], color)
    canvas.text(675, 95, "of both", BOTH_COLOR, SMALL_LETTERS, "mm")
    draw_stop(canvas, *STOPPED)

    # The moving average is no way for the gradient: weights are copied down, and nothing goes up.
    draw_arrow(canvas, NODES["anchor encoder"], NODES["target encoder"], GREY, dashed=True)
    canvas.text(530, 290, "moving average", GREY, SMALL_LETTERS, "lm")
    canvas.text(530, 314, "of the weights", GREY, SMALL_LETTERS, "lm")
    for node in NODES.values():
        draw_node(canvas, node)
    draw_norms(canvas, Box(100, 620, 1320, 830), norms)
    canvas.save(path)


def draw_node(canvas: Canvas, node: Node) -> None:
    """A box with two lines of text."""
    left = node.x - NODE_WIDTH // 2
    top = node.y - NODE_HEIGHT // 2
    box = Box(left, top, left + NODE_WIDTH, top + NODE_HEIGHT)
    canvas.bar(box, "white")
    canvas.frame(box, node.color, width=3)
    canvas.text(node.x, node.y - 14, node.text, node.color, anchor="mm")
    canvas.text(node.x, node.y + 18, node.more, GREY, SMALL_LETTERS, "mm")


class Arrow(NamedTuple):
    """An arrow: places and directions are vectors (x, y)."""

    start: np.ndarray
    end: np.ndarray
    along: np.ndarray  # of length 1
    aside: np.ndarray  # of length 1, to its right


def arrow_between(first: Node, last: Node) -> Arrow:
    """From the edge of a box to the edge of another, a little to the right of the middle, so that
    an arrow of the other direction has its place beside it."""
    a = np.array([first.x, first.y], float)
    b = np.array([last.x, last.y], float)
    along = (b - a) / np.linalg.norm(b - a)
    aside = np.array([-along[1], along[0]])
    shift = 10 * aside
    start = a + shift + way_out(along, shift) * along
    end = b + shift - way_out(-along, shift) * along
    return Arrow(start, end, along, aside)


def way_out(along: np.ndarray, inside: np.ndarray) -> float:
    """How far it is from a point in a box to its edge in a direction. inside: from the middle."""
    half = np.array([NODE_WIDTH, NODE_HEIGHT]) / 2
    to_edge = half - np.sign(along) * inside
    return float(np.min(to_edge / np.maximum(np.abs(along), 1e-9)))


def draw_arrow(canvas: Canvas, first: Node, last: Node, color: str, dashed: bool = False) -> None:
    """An arrow from box to box."""
    arrow = arrow_between(first, last)
    neck = arrow.end - 16 * arrow.along
    length = np.linalg.norm(neck - arrow.start)
    dash = 10 if dashed else length
    for at in np.arange(0, length, 2 * dash):
        a = arrow.start + at * arrow.along
        b = arrow.start + min(at + dash, length) * arrow.along
        canvas.line(*a, *b, color, width=4)

    left = neck - 8 * arrow.aside
    right = neck + 8 * arrow.aside
    canvas.pen.polygon([*arrow.end, *left, *right], color)


def draw_stop(canvas: Canvas, first: str, last: str) -> None:
    """A bar across the arrow between two boxes: no gradient comes back along it."""
    arrow = arrow_between(NODES[first], NODES[last])
    middle = (arrow.start + arrow.end) / 2
    left = middle - 24 * arrow.aside
    right = middle + 24 * arrow.aside
    canvas.line(*left, *right, WRONG, width=8)
    x, y = middle
    canvas.text(x + 34, y + 26, "no gradient (stopped)", WRONG, SMALL_LETTERS)


def draw_norms(canvas: Canvas, box: Box, norms: Norms) -> None:
    """Bars: a group for each part of the model, a bar for each term of the loss."""
    terms = list(norms)
    parts = list(norms[terms[0]])
    highest = max(max(by_part.values()) for by_part in norms.values())
    y_range = Range(0, 1.1 * highest or 1.0)
    canvas.text(box.left, box.top - 12, "norm of the gradient of one batch", anchor="ld")
    draw_y_axis(canvas, box, y_range)

    colors = (CROSS_ENTROPY_COLOR, ME_MAX_COLOR)
    pitch = (box.right - box.left) / len(parts)
    width = 0.35 * pitch
    for group, part in enumerate(parts):
        left = box.left + (group + 0.15) * pitch
        for term, color in zip(terms, colors, strict=True):
            norm = norms[term][part]
            top = place_of(norm, y_range, box.bottom, box.top)
            canvas.bar(Box(left, top, left + width - 4, box.bottom), color)
            text = f"{norm:.2g}"
            size = fitting_size(text, width, SMALL_LETTERS)
            canvas.text(left + width / 2, top - 4, text, color, size, "md")
            left += width
        size = fitting_size(part, pitch - 8, SMALL_LETTERS)
        canvas.text(box.left + (group + 0.5) * pitch, box.bottom + 10, part, BLACK, size, "ma")
    for number, (term, color) in enumerate(zip(terms, colors, strict=True)):
        canvas.text(box.left + 300 * number, box.bottom + 56, f"of {term}", color)


# ---- Pictures: what they show, of a run and of its data ------------------------------------------
NEIGHBOURS = 7  # in a line of a sheet
DROPPED = np.uint8([255, 220, 180])  # a pale orange, for patches that the encoder does not see
MOST_POINTS = 100  # of a curve
BASELINES = ("untrained encoder", "raw pixels")  # beside the target encoder in summary.json
PICTURED = 64  # images whose assignments and gradients are drawn, and prototypes, at most


def save_pictures(
    folder: Path,
    model: ViTMSNForPreTraining,
    data: Images,
    config: TrainConfig,
    summary: dict[str, float],
    batch: int,
) -> None:
    """All pictures of a finished run but views.png. summary: with the accuracies of the baselines;
    batch: as many images as surely fit into memory."""
    device = model.prototypes.device
    baselines = {name: summary[name] for name in BASELINES if name in summary}
    save_curves(folder, config, baselines)

    encoder = model.target_encoder
    save_neighbours(folder / "neighbours.png", encoder, data, config.image_size, device)
    path = folder / "prototypes.png"
    save_neighbours(path, encoder, data, config.image_size, device, model.prototypes)

    views = pictured_views(data, config, min(PICTURED, batch), device)
    save_assignments(folder / "assignments.png", model, views, config)
    save_gradients(folder / "gradients.png", model, views)


def to_picture(
    pixels: Tensor, patches_to_keep: Tensor | None = None, patch_size: int = 1
) -> np.ndarray:
    """A normalised image as uint8, its dropped patches in a pale orange. pixels: c h w,
    patches_to_keep: r, None for all -> h w 3."""
    mean, std = imagenet_statistics(len(pixels))
    mean = constant(mean, pixels.dtype, pixels.device)[:, None, None]
    std = constant(std, pixels.dtype, pixels.device)[:, None, None]
    values = (pixels.float() * std + mean).clamp(0, 1) * 255
    picture = as_colours(values.byte())
    if patches_to_keep is None:
        return picture

    side = len(picture) // patch_size
    is_kept = np.isin(np.arange(side * side), patches_to_keep.cpu().numpy())
    is_kept = is_kept.reshape(side, side, 1)
    is_kept = is_kept.repeat(patch_size, 0).repeat(patch_size, 1)  # from patches to pixels
    return np.where(is_kept, picture, DROPPED)


def as_colours(pixels: Tensor) -> np.ndarray:
    """What people are shown of an image: RGB, the first three of more bands, or the first one of
    fewer, in grey. pixels: c h w, uint8 -> h w 3."""
    shown = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    return shown.permute(1, 2, 0).cpu().numpy()


def save_views(path: Path, views: Views, config: TrainConfig) -> None:
    """A sheet of what the encoders see: for a few images the target view and the anchor views, with
    their masks."""
    header = ["target view"]
    header += ["random view"] * config.random_views
    header += ["focal view"] * config.focal_views

    strips = []
    for b in range(min(4, len(views.target_view))):
        strip = Strip([Tile(to_picture(views.target_view[b]))])
        for view, keep in zip(views.anchor_views, views.patches_to_keep, strict=True):
            kept = None if keep is None else keep[b]
            strip.tiles.append(Tile(to_picture(view[b], kept, config.patch_size)))
        strips.append(strip)
    note = "orange: patches that were dropped; the encoder does not see them"
    save_sheet(path, strips, header, cell=240, note=note)


@torch.no_grad()
def save_neighbours(
    path: Path,
    encoder: ViTMSNModel,
    data: Images,
    size: int,
    device: torch.device,
    prototypes: Tensor | None = None,
) -> None:
    """A sheet of training images: those nearest to a few validation images (to training images, if
    there are no others) or, given prototypes (k e), those nearest to a few of them."""
    note = ""
    if prototypes is not None:
        header, strips = neighbours_of_prototypes(encoder, data, size, device, prototypes)
    else:
        header, strips = neighbours_of_images(encoder, data, size, device)
        if data.train_labels is not None:
            note = "green: of the query's class; red, with an x: of another class"
    save_sheet(path, strips, header, note=note)


def neighbours_of_images(
    encoder: ViTMSNModel, data: Images, size: int, device: torch.device
) -> tuple[list[str], list[Strip]]:
    """Titles, and for each of eight images the image itself and its nearest training images."""
    images = data.train if data.val is None else data.val
    labels = data.train_labels if data.val is None else data.val_labels
    query_indices = queries_of(images, labels)
    bank_indices = some_of(data.train, 2000)
    if data.val is None:
        bank_indices = sorted(set(bank_indices) - set(query_indices))  # no query is its own

    features, kept = embed_images(encoder, data.train, bank_indices, size, device)
    queries, query_indices = embed_images(encoder, images, query_indices, size, device)
    strips = []
    for i, nearest in zip(query_indices, nearest_features(queries, features), strict=True):
        query_class = class_of(data, labels, i)
        strip = Strip([Tile(picture_of(images, i), query_class)])
        for place in nearest:
            name = class_of(data, data.train_labels, kept[place])
            picture = picture_of(data.train, kept[place])
            if not name:
                strip.tiles.append(Tile(picture))
            elif name == query_class:
                strip.tiles.append(Tile(picture, name, RIGHT))
            else:
                strip.tiles.append(Tile(picture, "x " + name, WRONG))
        strips.append(strip)
    return ["query", *nearest_titles(features)], strips


def queries_of(images: Dataset, labels: Tensor | None) -> list[int]:
    """Eight images to look for the neighbours of: of as many classes as there are, if possible."""
    if labels is None:
        return some_of(images, 8)
    by_class = labels.argsort(stable=True)
    return by_class[evenly_spaced(len(labels), 8)].tolist()


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, from the first one to the last. (As float32, as
    torch.linspace would have it, 20 million is rounded to beyond the last one.)"""
    if count <= most:
        return list(range(count))
    return [place * (count - 1) // (most - 1) for place in range(most)]


def class_of(data: Images, labels: Tensor | None, i: int) -> str:
    """The class of an image; "" without labels."""
    return "" if labels is None else data.classes[labels[i]]


def neighbours_of_prototypes(
    encoder: ViTMSNModel, data: Images, size: int, device: torch.device, prototypes: Tensor
) -> tuple[list[str], list[Strip]]:
    """Titles, and for each of the eight prototypes that most images choose, its nearest images."""
    features, kept = embed_images(encoder, data.train, some_of(data.train, 2000), size, device)
    projections = encoder.fc(encoder.norm(features.to(prototypes)))
    choices = log_assign(projections, prototypes, 1.0).argmax(dim=-1).cpu()
    popularity = choices.bincount(minlength=len(prototypes))
    most_popular = popularity.topk(min(8, len(prototypes))).indices

    strips = []
    nearest_images = nearest_features(prototypes[most_popular.to(prototypes.device)], projections)
    for prototype, nearest in zip(most_popular.tolist(), nearest_images, strict=True):
        choosers = [
            i for i, choice in zip(kept, choices.tolist(), strict=True) if choice == prototype
        ]
        title = [
            f"prototype {prototype}",
            "first choice of",
            f"{len(choosers)} of {len(kept)} images",
        ]
        if data.train_labels is not None and choosers:
            counts = data.train_labels[choosers].bincount()
            share = counts.max().item() / len(choosers)
            title.append(f"{100 * share:.0f} % {data.classes[counts.argmax()]}")
        tiles = [Tile(picture_of(data.train, kept[place])) for place in nearest]
        strips.append(Strip(tiles, title))
    return nearest_titles(features), strips


def nearest_features(queries: Tensor, features: Tensor) -> list[list[int]]:
    """For each query the places of the seven features most like it, by cosine. m d, n d -> m 7."""
    similarity = F.normalize(queries, dim=-1) @ F.normalize(features, dim=-1).T
    return similarity.topk(min(NEIGHBOURS, len(features)), dim=-1).indices.tolist()


def nearest_titles(features: Tensor) -> list[str]:
    """One for each column of nearest_features."""
    return [f"nearest {place + 1}" for place in range(min(NEIGHBOURS, len(features)))]


def picture_of(images: Dataset, i: int) -> np.ndarray:
    """Image i of a data set as people are shown it, h w 3."""
    return as_colours(images.__getitems__([i]).images[0])


def save_curves(folder: Path, config: TrainConfig, baselines: dict[str, float]) -> None:
    """curves.png of a run: the terms of the loss, prototypes in use, and k-NN accuracy beside that
    of the baselines (name -> accuracy), against the epoch."""
    metrics = read_table(folder / "metrics.csv")
    knn = read_table(folder / "knn.csv")
    log_k = math.log(config.num_prototypes)
    most_used = min(config.num_prototypes, config.batch_size)
    used = {"first choice of some target": smooth_curve(metrics, "prototypes_used")}

    panels = [
        Panel(
            "cross-entropy and entropy, in nats",
            "epoch",
            {
                "cross-entropy, the first term of (1)": smooth_curve(metrics, "cross_entropy"),
                "entropy of single anchor assignments": smooth_curve(metrics, "entropy"),
            },
            {f"log k = {log_k:.2f}: an assignment that says nothing": log_k},
        ),
        Panel(
            "me-max, the second term of (1), in nats",
            "epoch",
            {
                "log k - H(mean p): 0 if all prototypes are used alike": smooth_curve(
                    metrics, "memax"
                )
            },
        ),
        Panel(
            "prototypes in use",
            "epoch",
            used,
            {f"{most_used}: the most that a batch can use": most_used},
            y_range=(0, most_used * 1.05),
        ),
    ]
    if knn:
        accuracy = [Point(float(line["epoch"]), float(line["accuracy"])) for line in knn]
        panel = Panel("k-NN accuracy", "epoch", {"target encoder": accuracy}, baselines)
        panel.y_range = (0, 1)
        panels.append(panel)
    save_plot(folder / "curves.png", panels)


def smooth_curve(table: list[dict[str, str]], column: str) -> list[Point]:
    """A column against the epoch: at most some 100 points, each a mean of the lines up to it."""
    count = math.ceil(len(table) / MOST_POINTS)
    points = []
    for first in range(0, len(table), count):
        lines = table[first : first + count]
        mean = np.mean([float(line[column]) for line in lines])
        points.append(Point(float(lines[-1]["epoch"]), float(mean)))
    return points


def pictured_views(data: Images, config: TrainConfig, count: int, device: torch.device) -> Views:
    """Views of `count` training images, made as those of the run's first step."""
    batch = data.train.__getitems__(some_of(data.train, count))
    return make_views(batch.on(device), replace(config, batch_size=count), 0, slice(0, count))


@torch.no_grad()
def save_assignments(
    path: Path, model: ViTMSNForPreTraining, views: Views, config: TrainConfig
) -> None:
    """Heat maps of a batch's target assignments, b k: as they are, sharpened, and balanced.

    Columns are at most 64 prototypes, those that get most of the batch before balancing first; rows
    are images, in the order of their first choices after it.
    """
    projections = model.target_encoder([views.target_view], [None])[0]
    log_p = log_assign(projections, model.prototypes, config.temperature)
    sharpened = sharpen(log_p, config.sharpening)
    balanced = sinkhorn(sharpened, config.sinkhorn_iterations)

    columns = log_p.exp().sum(dim=0).argsort(descending=True)[:PICTURED]
    first_choices = balanced[:, columns].argmax(dim=-1)
    rows = first_choices.argsort(stable=True)
    rounds = config.sinkhorn_iterations
    titles = {
        f"softmax(cosines / {config.temperature:g})": log_p,
        f"sharpened, T = {config.sharpening:g}": sharpened,
        f"balanced: Sinkhorn, {rounds} rounds" if rounds else "without Sinkhorn the same": balanced,
    }
    maps = []
    for title, logarithms in titles.items():
        p = logarithms.exp()
        sums = p.sum(dim=0)
        notes = [
            f"largest entry of an image: {p.amax(dim=-1).mean():.2f} in the mean",
            f"a prototype gets {sums.min():.2f} to {sums.max():.2f} images",
            f"(dashed: an even share, {len(p) / p.shape[1]:.2f})",
        ]
        maps.append(HeatMap(title, p[rows][:, columns].cpu().numpy(), notes))
    save_heat_maps(path, maps, "columns: prototypes; bars: images that each gets", "rows: images")


def save_gradients(path: Path, model: ViTMSNForPreTraining, views: Views) -> None:
    """Where the gradient of each term of (1) flows, and how large it is in each part."""
    terms = model(*views)
    norms = {
        "cross-entropy": gradient_norms(terms.cross_entropy, model),
        "me-max": gradient_norms(terms.memax, model),
    }
    save_gradient_flow(path, norms)


def gradient_norms(term: Tensor, model: ViTMSNForPreTraining) -> dict[str, float]:
    """The norm of a term's gradient in each part of the model; 0 in those that do not learn."""
    learning = {}
    squares = {}  # sums of squares, by part
    for name, parameter in model.named_parameters():
        squares.setdefault(part_of(name), 0.0)
        if parameter.requires_grad:
            learning[name] = parameter

    parameters = list(learning.values())
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    for name, gradient in zip(learning, gradients, strict=True):
        if gradient is not None:
            squares[part_of(name)] += gradient.square().sum().item()
    return {part: math.sqrt(square) for part, square in squares.items()}


def part_of(name: str) -> str:
    """The part of a ViTMSNForPreTraining that a parameter of this name belongs to."""
    encoder, _, name = name.partition(".")
    if encoder != "anchor_encoder":
        return encoder.replace("_", " ")  # prototypes, target encoder
    if name.startswith("blocks."):
        return f"layer {int(name.split('.')[1]) + 1}"
    if name.startswith(("fc.", "norm.")):
        return "head"
    return "patches, positions"


# ---- The paper's ablations: python train_msn.py --ablations FILE ---------------------------------
class Ablation(NamedTuple):
    """A run in which one thing is different from the recipe."""

    table: int | None  # of the paper, None if it is in none of them
    flags: str
    paper: float | None = None  # accuracy there, in %, with 1 % of ImageNet's labels


# Those from which most is to be learned stand first. A row of two tables is run once.
ABLATIONS = (
    Ablation(None, ""),
    Ablation(7, "--focal-views 0 --mask-ratio 0", 49.3),
    Ablation(7, "--random-views 0 --focal-views 1", 39.3),
    Ablation(7, "--focal-views 0 --mask-ratio 0.5", 52.3),
    Ablation(7, "--focal-views 1 --mask-ratio 0.5", 59.8),
    Ablation(None, "--focal-mask"),
    Ablation(11, "--sinkhorn-iterations 0", 60.8),
    Ablation(11, "--sinkhorn-iterations 0 --memax-weight 5", 67.2),
    Ablation(None, "--memax-weight 0"),
    Ablation(None, "--memax-weight 0 --sinkhorn-iterations 0"),
    Ablation(9, "--focal-views 0 --mask-ratio 0.5 --anchor-view target", 7.0),
    Ablation(9, "--focal-views 0 --mask-ratio 0.5 --anchor-view recolored", 48.7),
    Ablation(9, "--focal-views 0 --mask-ratio 0.5", 52.3),
    Ablation(8, "--mask-ratio 0"),
    Ablation(8, "", 66.0),
    Ablation(8, "--mask-ratio 0.5", 64.8),
    Ablation(12, "--num-prototypes 16"),
    Ablation(12, "--num-prototypes 256"),
    Ablation(8, "--mask-ratio 0.7"),
    Ablation(12, "--num-prototypes 32"),
    Ablation(8, "--mask-ratio 0.9"),
    Ablation(None, "--freeze-prototypes"),
)
ABLATION_SEEDS = (0, 1, 2)


def run_ablations(file: str, argv: list[str]) -> None:
    """Run each row of the ablation tables with three seeds; argv: flags of all of them.

    The result of each run goes into the file at once; the same command goes on where it stopped.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("--ablations is for one process; start it without torchrun.")
    if first_look(argv, "--seed") or first_look(argv, "--output-dir"):
        raise UsageError("--ablations chooses --seed and --output-dir itself; leave them out.")
    path = Path(file)
    content = open_ablations(path, argv)
    done = content["runs"]

    for flags in dict.fromkeys(ablation.flags for ablation in ABLATIONS):
        for seed in ABLATION_SEEDS:
            if str(seed) in done.get(flags, {}):
                continue
            say(f"\nablation {flags or '(the recipe itself)'}, seed {seed}")
            name = "_".join([*flags.replace("--", "").split(), f"seed-{seed}"])
            folder = RUNS / path.stem / name
            of_run = ["--seed", str(seed), "--output-dir", str(folder), "--resume"]
            main([*argv, *flags.split(), *of_run])
            if not (folder / "summary.json").exists():
                return  # stopped by a signal, as was said

            done.setdefault(flags, {})[str(seed)] = ablation_result(folder)
            content["values"]["rows"] = ablation_rows(done)
            write_file(path, json.dumps(content, indent=2, ensure_ascii=False).encode())
    say(f"{path} is complete")


def open_ablations(path: Path, argv: list[str]) -> dict:
    """The content of the file, or that of a new one. Raises UsageError if it is of other flags."""
    command = " ".join(["python train_msn.py FLAGS", *argv])
    about = {
        "what": "The paper's ablations: k-NN accuracy on validation images",
        "machine": processor_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit_here(),
        "command": command,
        "seeds": list(ABLATION_SEEDS),
        "runs": {},
        "values": {"rows": []},
    }
    if not path.exists():
        return about
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        earlier = content["command"]
        about["runs"] = content["runs"]
        about["values"] = content["values"]
        commits = content["commit"].split(", ")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is no file of ablations; give another one.") from None
    if earlier != command:
        raise UsageError(f"{path} is of {earlier!r}, not of {command!r}; give another file.")
    about["commit"] = ", ".join(dict.fromkeys([*commits, about["commit"]]))
    return about


def ablation_result(folder: Path) -> dict[str, float]:
    """What a finished run gave."""
    summary = json.loads((folder / "summary.json").read_text())
    used = int(read_table(folder / "metrics.csv")[-1]["prototypes_used"])
    return {"knn": summary["target encoder"], "prototypes used": used}


def ablation_rows(done: dict[str, dict[str, dict]]) -> list[dict]:
    """The rows of the tables, for which there are results. done: flags -> seed -> result."""
    rows = []
    for ablation in ABLATIONS:
        results = done.get(ablation.flags)
        if not results:
            continue
        accuracies = [results[seed]["knn"] for seed in sorted(results)]
        deviation = np.std(accuracies, ddof=1) if len(accuracies) > 1 else 0
        rows.append(
            {
                "table": ablation.table,
                "flags": ablation.flags,
                "paper, %": ablation.paper,
                "knn": round(float(np.mean(accuracies)), 3),
                "deviation": round(float(deviation), 3),
                "seeds": accuracies,
                "prototypes used": [results[seed]["prototypes used"] for seed in sorted(results)],
            }
        )
    return rows


def commit_here() -> str:
    """The commit of this folder, or "unknown" where it is none."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor_name() -> str:
    """The model of the CPU where Linux tells it, else the operating system."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return found[1] if found else sys.platform


# ---- Command line --------------------------------------------------------------------------------
class UsageError(ValueError):
    """What the user asked for can't be done: one line on the terminal, exit status 2."""


def check_writable(path: Path, flag: str) -> None:
    """Raise UsageError if no file can be written at this path: before the work whose result it is
    to hold. flag: which one says another place."""
    made = [folder for folder in path.parents if not folder.exists()]
    test = path.with_name(f".{path.name}.test")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        write_file(test, b"")
        test.unlink()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(
            f"{path} can't be written ({reason}); choose another place by {flag}."
        ) from None
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def run_program(main: Callable[[list[str]], Any], argv: list[str] | None = None) -> int:
    """Run a command line -> exit status. Errors are one line for people, unless --debug asks for
    the traceback."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    show_all_names()
    try:
        main([argument for argument in argv if argument != "--debug"])
        return 0
    except KeyboardInterrupt:
        say("stopped.", sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        one_line = " ".join(str(error).split())
        say(f"error: {one_line or type(error).__name__}", sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def check_settings(config: TrainConfig) -> None:
    """Raise UsageError for values that are out of range or do not go together."""
    for f in fields(config):
        check_range(f, getattr(config, f.name))

    if config.random_views + config.focal_views == 0:
        raise UsageError("random_views and focal_views are both 0; give at least one anchor view.")
    sizes = [config.image_size]
    if config.focal_views:
        sizes.append(config.focal_size)
    for size in sizes:
        if size % config.patch_size:
            raise UsageError(
                f"a view of {size} pixels is no whole number of patches of {config.patch_size}; "
                f"{sizes_that_go(sizes, config.patch_size)}."
            )
    if config.focal_mask and config.focal_size > config.image_size:
        raise UsageError(
            f"focal_mask keeps a block of focal_size={config.focal_size} pixels of a view of "
            f"image_size={config.image_size}, which is smaller; lower focal_size."
        )
    try:
        config.model_config()  # checks the rules for pictures too
        num_patches_to_keep((config.image_size // config.patch_size) ** 2, config.mask_ratio)
    except ValueError as error:
        raise UsageError(str(error)) from None


def sizes_that_go(view_sizes: list[int], patch_size: int) -> str:
    """Which patch sizes go with views of these sizes, and which views with this patch size."""
    common = math.gcd(*view_sizes)
    divisors = [str(size) for size in range(1, common + 1) if common % size == 0]
    patch_sizes = " or ".join(divisors[-8:])
    return f"use patch_size {patch_sizes}, or views of a multiple of {patch_size} pixels"


def check_range(f: Field, value) -> None:
    """Raise UsageError if the value of a field is of another kind than that, or out of its range or
    choices (see opt)."""
    seen = f"{f.name}={value!r}"
    is_pair = f.type is tuple
    if not is_of_kind(value, f.type):
        kind = "two numbers" if is_pair else f"of type {f.type.__name__}"
        raise UsageError(f"{seen} must be {kind}.")

    choices = f.metadata.get("choices")
    if choices and value not in choices:
        raise UsageError(f"{seen} is not known; use one of {', '.join(choices)}.")

    if "range" in f.metadata:
        low, high = f.metadata["range"]
        numbers = value if is_pair else [value]
        inside = all(low <= number <= high for number in numbers)  # NaN is not
        if not inside or numbers[0] > numbers[-1]:
            order = ", the lower one first" if is_pair else ""
            raise UsageError(f"{seen} is out of range; use {low} to {high}{order}.")


def is_of_kind(value, kind: type) -> bool:
    """Whether a value is of a field's type. A float may be a whole number, a tuple is two numbers,
    and True is no number."""
    if kind is tuple:
        is_pair = isinstance(value, (tuple, list)) and len(value) == 2
        return is_pair and all(type(number) in (int, float) for number in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def add_flags(
    parser: argparse.ArgumentParser,
    config_class: type,
    defaults: dict | None = None,
    hidden: Collection[str] = (),
) -> None:
    """One --flag for each field of a dataclass; those that are not given stay out of the result.

    defaults: values by field name that the help text shows in place of the dataclass's own.
    hidden: fields that it does not show.
    """
    for f in fields(config_class):
        options = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if f.name not in hidden:
            default = (defaults or {}).get(f.name, f.default)
            options["help"] = help_text(f, default).replace("%", "%%")
        choices = f.metadata.get("choices")
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif f.type is tuple:
            options |= {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[f.type]
            options |= {"type": f.type, "choices": choices, "metavar": None if choices else metavar}
        parser.add_argument("--" + f.name.replace("_", "-"), **options)


def help_text(f: Field, default) -> str:
    """What --help says of a field: its own text and, unless that is empty, the default."""
    if f.type is bool:
        default = "yes" if default else "no"
    if f.type is tuple:
        low, high = default
        default = f"{low} {high}"
    return f.metadata["help"] + (f" (default: {default})" if default != "" else "")


def recipe_settings(recipe: str) -> dict:
    """The values of a recipe, by field name."""
    if recipe not in RECIPES:
        raise UsageError(f"recipe={recipe!r} is not known; use one of {', '.join(RECIPES)}.")
    return RECIPES[recipe]


def make_config(given: dict) -> TrainConfig:
    """The recipe's settings, changed by the flags that were given."""
    recipe = given.get("recipe", "demo")
    return TrainConfig(**{**recipe_settings(recipe), "recipe": recipe, **given})


def first_look(argv: list[str], flag: str) -> str | None:
    """The value of one flag of a command line, before the rest of it is looked at."""
    parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    parser.add_argument(flag, dest="value", nargs="?")
    return parser.parse_known_args(argv)[0].value


def parse_flags(argv: list[str]) -> dict:
    """The flags that were given, by field name. --help shows the values of the recipe asked for."""
    recipe = first_look(argv, "--recipe") or "demo"
    recipe_list = "\n".join(f"  {name:<14} {line}" for name, line in RECIPE_LINES.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--recipe NAME] [--data WHERE] [--flag value ...]; more by --help",
        description=f"{__doc__}\nrecipes:\n{recipe_list}\n\n(defaults: of the recipe {recipe})",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ablations",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="run the paper's tables 7, 8, 9, 11 and 12 by this recipe, and write them to FILE",
    )
    add_flags(parser, TrainConfig, defaults={**recipe_settings(recipe), "recipe": recipe})
    return with_tuples(vars(parser.parse_args(argv)))


def split_flag(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of one flag of a command line, None without it, and all the others."""
    parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    known, others = parser.parse_known_args(argv)
    return known.value, others


def main(argv: list[str]) -> None:
    """The command line."""
    given = parse_flags(argv)
    if "ablations" in given:
        return run_ablations(*split_flag(argv, "--ablations"))
    recipe = given.get("recipe") or recipe_for(given.get("data", "synthetic"))
    folder = choose_folder(make_config({"recipe": recipe, **given}))
    config, content = settle(given, folder, recipe)
    processes = start_processes(config)
    if config.threads == 0:
        config = replace(config, threads=quickest_threads(config))  # kept for a resumed run
    torch.set_num_threads(config.threads)
    nobody_chose = config.precision == "auto"
    config = replace(config, precision=choose_precision(config.precision, processes.device))
    data = open_data(config)
    check_same_images(content, data, config)
    if data.picture_rules:  # so that the run's folder and its encoder know what was found
        found = data.picture_rules
        names = ("integer_range", "float_range", "num_channels")
        config = replace(config, **{name: getattr(found, name) for name in names})
    if len(data.train) < config.batch_size:
        raise UsageError(
            f"{len(data.train)} training images are fewer than batch_size={config.batch_size}; "
            "lower it by --batch-size, or take a recipe for small data (--help lists them)."
        )
    if not processes.is_first:
        train(config, data, folder, content, processes)
        return

    warn_of_slow_precision(config.precision, processes.device)
    if nobody_chose:
        advise_bfloat16(config, len(data.train), processes.device)
    warn_of_cost(config, len(data.train), processes.device)
    with claimed(folder, may_exist=config.resume or bool(config.output_dir)):
        train(config, data, folder, content, processes)


@contextmanager
def claimed(folder: Path, may_exist: bool) -> Iterator[None]:
    """The folder of a run, made if it is not there. If what follows ends by an error or a signal
    before the first step of a new run, what it has written is taken away again. Raises UsageError
    if it is a file, or there when it must not be: another run has taken the same number."""
    is_new = not (folder / "config.json").exists()
    try:
        folder.mkdir(parents=True, exist_ok=may_exist)
    except FileExistsError:
        if folder.is_dir():
            problem = f"another run has just taken the folder {folder}; start again."
        else:
            problem = f"{folder} is a file; --output-dir names a folder."
        raise UsageError(problem) from None
    try:
        yield
    except BaseException:
        if is_new and not read_table(folder / "metrics.csv"):
            remove_empty_run(folder)
        raise


def remove_empty_run(folder: Path) -> None:
    """Remove a run that has no step: its settings, its empty tables, and its folder if that is
    empty then."""
    for name in ("config.json", "metrics.csv", "knn.csv"):
        (folder / name).unlink(missing_ok=True)
    for place in (folder, RUNS):
        with suppress(OSError):  # it is not empty, or not there
            place.rmdir()


def warn_of_slow_precision(precision: str, device: torch.device) -> None:
    """Say so if the machine has no fast bfloat16 but is asked for it."""
    if precision != "bfloat16" or device.type != "cpu":
        return
    ratio = seconds_of_product(torch.bfloat16) / seconds_of_product(torch.float32)
    if ratio > 1.5:
        say(
            f"this CPU is {ratio:.1f} times slower in bfloat16 than in float32 (it has no units "
            "for it); --precision float32 is faster.",
            sys.stderr,
        )


PRODUCT_SIDE = 512


def seconds_of_product(dtype: torch.dtype) -> float:
    """The least seconds that a product of two square matrices takes on the CPU."""
    a = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE).to(dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return min(seconds)


SHORT_RUN = 600  # seconds
LONG_RUN = 24 * 3600


def advise_bfloat16(config: TrainConfig, num_images: int, device: torch.device) -> None:
    """Say so if "auto" gave float32, a CPU is faster in bfloat16, and the run is not a short one.

    That is a CPU with AVX512-BF16: about twice as fast, not many times as with AMX, and so whether
    a run rounds more is left to its user.
    """
    if config.precision != "float32" or device.type != "cpu":
        return
    seconds = flops_of_run(config, num_images) / flops_per_second()
    ratio = seconds_of_product(torch.float32) / seconds_of_product(torch.bfloat16)
    if seconds > SHORT_RUN and ratio > 1.5:
        say(
            f"this CPU is {ratio:.1f} times as fast in bfloat16 as in float32; --precision "
            "bfloat16 takes less time and rounds more.",
            sys.stderr,
        )


def warn_of_cost(config: TrainConfig, num_images: int, device: torch.device) -> None:
    """Say so if a run on a CPU will take longer than a day, and what to use instead."""
    if device.type != "cpu":
        return
    speed = flops_per_second()
    seconds = flops_of_run(config, num_images) / speed
    if seconds > LONG_RUN:
        steps = steps_to_do(config, num_images // config.batch_size, None)
        small = "demo" if config.data == "synthetic" else "imagenette"
        say(
            f"{len(steps)} steps of {config.batch_size} images will take this CPU at least "
            f"{round(seconds / 86400)} days ({about_flops(config) / 1e9:.0f} GFLOP an image at "
            f"{speed / 1e9:.0f} GFLOP/s); for a CPU there is --recipe {small}.",
            sys.stderr,
        )


def flops_per_second() -> float:
    """How fast the CPU multiplies matrices in float32: about the most that a step reaches."""
    return 2 * PRODUCT_SIDE**3 / seconds_of_product(torch.float32)


def flops_of_run(config: TrainConfig, num_images: int) -> float:
    """Operations of all steps of a run, roughly."""
    steps = steps_to_do(config, num_images // config.batch_size, None)
    return len(steps) * config.batch_size * about_flops(config)


def about_flops(config: TrainConfig) -> float:
    """Operations of a step for each image, roughly: a multiplication and an addition for each
    weight and token, three times as many for anchor views, which go backward too. (bench.py counts
    them exactly.)"""
    d = config.hidden_size
    mlp = config.intermediate_size or 4 * d
    weights = config.num_hidden_layers * (4 * d**2 + 2 * d * mlp)
    patches = (config.image_size // config.patch_size) ** 2
    focal_patches = (config.focal_size // config.patch_size) ** 2
    random_tokens = config.random_views * num_patches_to_keep(patches, config.mask_ratio)
    focal_tokens = config.focal_views * focal_patches
    return 2 * weights * (patches + 3 * (random_tokens + focal_tokens))


def end_program(status: int) -> None:
    """End with this exit status; without Python's own clearing up if there are other processes or
    threads. Nothing that we have open needs the clearing up but what is still to be printed.

    The threads of gloo give tensors back to Python when a reduction is done. If Python is already
    clearing up by then, the process dies of it, now and then, after all its work is done. And a
    thread that is still at work on an input when a run is stopped is torn out of the middle of
    torch, which aborts.
    """
    in_a_group = dist.is_available() and dist.is_initialized()
    if in_a_group or threading.active_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    end_program(run_program(main))
