"""Benchmarks of the model, the pretraining step and the views, on your own machine, CPU or GPU.

    python bench.py                    # eager against SDPA attention, batches of 1, 2, 4 and 8
    python bench.py inference --preset small-16 --threads 1 --against transformers
    python bench.py train --help       # what can be changed in a suite

The suites: inference (forward passes), train (a training step and its parts), masking (what dropped
patches save), growth (what a larger picture, batch, ... costs), views (our views against Pillow's).
Each takes those flags of train_msn.py that change what it measures, and refuses the others.

The cases that a suite compares run in turn (A B A B ...) after a warm-up, each time on new input.
A cell of the table is the median time in ms [lower quartile, upper quartile]; with --memory, the
peak memory in MiB follows. Lines are printed as soon as they are known; stderr says how far it is.
"""

import argparse
import importlib
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor, nn

from train_msn import (
    VIEWS,
    Batch,
    Processes,
    TrainConfig,
    UsageError,
    Views,
    add_flags,
    build_model,
    choose_precision,
    clock_time,
    crop_boxes,
    draw_views,
    first_look,
    generator_for,
    make_config,
    make_views,
    parameter_groups,
    recipe_settings,
    run_program,
    say,
    schedule_at,
    send,
    start_processes,
    train_step,
)
from vitmsn import (
    PRESETS,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTMSNModel,
    autocast,
    normalize,
    num_patches_to_keep,
    write_file,
)

# ---- Measuring -----------------------------------------------------------------------------------

WARM_UPS = 2  # first runs of each case that do not count


@dataclass(frozen=True)
class Setup:
    """Where and how everything is measured."""

    device: torch.device
    threads: int
    repeats: int
    memory: bool  # measure the peak memory, too
    clock: Callable[[], float]  # seconds: of the wall clock, or of this process's computing


class Timed(NamedTuple):
    """Something to time: run(new_input()). Only `run` is timed, not the making of its input."""

    new_input: Callable[[], Any]
    run: Callable[[Any], Any]


class Case:
    """One thing to measure, described by plain fields; each suite has a dataclass of its own.

    Peak memory is measured in a process of its own, which gets the case by pickle. So a case holds
    settings only: the model and the data are made by prepare(), in the process that runs them.
    """

    def prepare(self) -> Timed:
        raise NotImplementedError

    def work(self) -> float:
        """How much there is to compute in a run: what progress reports take its time to follow."""
        return 1.0


class Progress:
    """Says on stderr how far a suite is. Once, after the first run: about how long it will take.
    Then, on a terminal, in one line that is written over and over: where it is, and the time left.

    groups: the cases of the suite, those together that are measured together. other_work: what it
    measures besides, in the unit of Case.work.
    """

    def __init__(self, groups: list[dict[Any, Case]], setup: Setup, other_work: float = 0.0):
        cases = list(chain.from_iterable(group.values() for group in groups))
        self.num_groups = len(groups)
        self.group = 0
        self.work_left = (WARM_UPS + setup.repeats) * sum(case.work() for case in cases)
        self.work_left += other_work
        self.work_seen = 0.0  # of runs whose seconds are known
        self.seconds_seen = 0.0
        self.memory_left = len(cases) if setup.memory else 0  # cases whose memory is to be measured
        self.memory_seconds = 0.0  # that the last of them took
        self.announced = False

    def show(self, where: str) -> None:
        """Say where the suite is, such as "repeat 2 of 10"."""
        if not sys.stderr.isatty():
            return
        left = f"; about {clock_time(self.time_left())} left" if self.announced else ""
        part = f"part {self.group} of {self.num_groups}, " if self.num_groups > 1 else ""
        width = shutil.get_terminal_size().columns - 1
        say(f"{part}{where}{left}"[:width], sys.stderr, stays=False)

    def saw_run(self, work: float, seconds: float) -> None:
        """Learn how long a run with its input took. The first one tells about all others."""
        self.work_seen += work
        self.seconds_seen += seconds
        if not self.announced and self.seconds_seen > 0:
            about = clock_time(self.time_left())
            say(f"this takes about {about} (h:mm:ss)", sys.stderr)
            self.announced = True

    def time_left(self) -> float:
        """Seconds, by those of the work that was done so far."""
        seconds_per_work = self.seconds_seen / self.work_seen
        return self.work_left * seconds_per_work + self.memory_left * self.memory_seconds


def measure(
    cases: dict[Any, Case], setup: Setup, progress: Progress | None = None
) -> dict[Any, dict[str, float]]:
    """Times of all cases and, with setup.memory, their peak memory.

    -> name of the case -> {"median", "low", "high"} in seconds (low and high are the quartiles),
    and "memory" in MiB.
    """
    progress = progress or Progress([cases], setup)
    progress.group += 1
    memory = {}
    if setup.memory:  # before anything runs here: what takes too much only ends that process
        for name, case in cases.items():
            memory[name] = peak_memory(name, case, setup, progress)

    timed = {name: case.prepare() for name, case in cases.items()}
    works = {name: case.work() for name, case in cases.items()}
    results = time_in_turn(timed, works, setup, progress)

    for name, mebibytes in memory.items():
        results[name]["memory"] = mebibytes
    return results


def time_in_turn(
    timed: dict[Any, Timed], works: dict[Any, float], setup: Setup, progress: Progress
) -> dict[Any, dict[str, float]]:
    """Times in turn, A B A B ...: what disturbs the machine then disturbs all alike.

    works: for the progress, in the unit of Case.work.
    """
    seconds = {name: [] for name in timed}
    for i in range(WARM_UPS + setup.repeats):
        turn = f"repeat {i + 1 - WARM_UPS} of {setup.repeats}"
        if i < WARM_UPS:
            turn = f"warm-up {i + 1} of {WARM_UPS}"

        for number, (name, (new_input, run)) in enumerate(timed.items(), 1):
            progress.show(f"{turn}, case {number} of {len(timed)}: {name_text(name)}")
            start = time.perf_counter()
            seconds[name].append(seconds_of(run, new_input(), setup))
            progress.work_left -= works[name]
            progress.saw_run(works[name], time.perf_counter() - start)

    results = {}
    for name, values in seconds.items():
        low, median, high = np.quantile(values[WARM_UPS:], (0.25, 0.5, 0.75)).tolist()
        results[name] = {"median": median, "low": low, "high": high}
    return results


def name_text(name) -> str:
    """The name of a case for people: its parts with commas between them."""
    return ", ".join(map(str, name)) if isinstance(name, tuple) else str(name)


def seconds_of(run: Callable[[Any], Any], x, setup: Setup) -> float:
    """Seconds that run(x) takes, until the device has finished it."""
    # A GPU works on while Python goes ahead. On a CPU there is nothing to wait for.
    synchronize = torch.get_device_module(setup.device).synchronize

    synchronize()
    start = setup.clock()
    run(x)
    synchronize()
    return setup.clock() - start


def peak_memory(name, case: Case, setup: Setup, progress: Progress) -> float:
    """MiB that a case needs at most, measured in a process of its own."""
    progress.show(f"memory of {name_text(name)}, in a process of its own")
    start = time.perf_counter()
    # If the system kills the process, for want of memory, the pool raises BrokenProcessPool.
    with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
        size, seconds = pool.submit(peak_memory_here, case, setup).result()

    progress.memory_left -= 1
    progress.memory_seconds = time.perf_counter() - start
    progress.saw_run(case.work(), seconds)
    return size / 2**20


def peak_memory_here(case: Case, setup: Setup) -> tuple[int, float]:
    """Bytes that this process needs at most: allocated on a GPU, resident on a CPU; and the seconds
    that a run took."""
    torch.set_num_threads(setup.threads)
    new_input, run = case.prepare()
    for _ in range(2):
        start = time.perf_counter()
        run(new_input())
    seconds = time.perf_counter() - start

    if setup.device.type != "cpu":
        return torch.get_device_module(setup.device).max_memory_allocated(), seconds
    # Not getrusage: its maximum includes the process that started this one.
    status = Path("/proc/self/status").read_text()
    kibibytes = re.search(r"VmHWM:\s+(\d+)", status)[1]
    return 1024 * int(kibibytes), seconds


# ---- Operations ----------------------------------------------------------------------------------
# Only matrix products are counted, as by torch's FlopCounterMode.


PEAK_SIDE_CPU = 1024
PEAK_SIDE_GPU = 8192


def matmul_peak(precision: str, setup: Setup) -> float:
    """The best speed of a large square matrix product, in FLOP/s."""
    side = PEAK_SIDE_CPU if setup.device.type == "cpu" else PEAK_SIDE_GPU
    a = torch.randn(side, side, device=setup.device, dtype=getattr(torch, precision))
    seconds = [seconds_of(a.mm, a, setup) for _ in range(5)]
    return 2 * side**3 / min(seconds)


def forward_flops(config: ViTMSNConfig, num_patches: int, class_token_only: bool = True) -> int:
    """FLOPs of one forward pass of one image, a multiply-add counted as two.

    num_patches: how many the encoder sees, without those that a mask drops. class_token_only: in
    the last layer only the class token is computed, which is all that pretraining looks at.
    """
    d = config.hidden_size
    n = 1 + num_patches  # tokens: the class token and the patches
    layers = config.num_hidden_layers

    # Summed over all layers. A layer makes a query, a key and a value of every token. Only the
    # tokens that it hands on attend, and pass through the output projection and the MLP.
    projected = layers * n
    queries = (layers - 1) * n + (1 if class_token_only else n)

    patch_embedding = num_patches * config.num_channels * config.patch_size**2 * d
    query_key_value = projected * 3 * d**2
    output = queries * d**2
    attention = queries * 2 * n * d  # similarities with n keys, and the weighted sum of n values
    mlp = queries * 2 * d * config.intermediate_size

    multiply_adds = patch_embedding + query_key_value + output + attention + mlp
    return 2 * multiply_adds


def head_flops(config: TrainConfig) -> int:
    """FLOPs of one projection of one image and its similarities with the prototypes, forward."""
    d = config.hidden_size
    hidden = config.head_hidden_size
    e = config.output_dim
    projection = d * hidden + hidden**2 + hidden * e
    similarities = e * config.num_prototypes
    return 2 * (projection + similarities)


def anchor_flops(config: TrainConfig, num_patches: int) -> int:
    """FLOPs of one anchor view of one image, forward and backward."""
    model = config.model_config()
    forward = forward_flops(model, num_patches) + head_flops(config)
    # Backward there are two products for each one forward: the gradients of its two factors.
    # But pixels need no gradient, so the patch embedding has only one of the two.
    pixels = num_patches * model.num_channels * model.patch_size**2
    spared = 2 * pixels * model.hidden_size
    return 3 * forward - spared


def step_flops(config: TrainConfig) -> int:
    """FLOPs of one pretraining step: the target view forward, the anchor views also backward."""
    n = (config.image_size // config.patch_size) ** 2  # patches of a target or random view
    r = num_patches_to_keep(n, config.mask_ratio)  # patches to keep of a random view
    n_focal = (config.focal_size // config.patch_size) ** 2

    target = forward_flops(config.model_config(), n) + head_flops(config)
    random = config.random_views * anchor_flops(config, r)
    focal = config.focal_views * anchor_flops(config, n_focal)
    return config.batch_size * (target + random + focal)


# ---- Suites --------------------------------------------------------------------------------------
# A suite is a function that measures cases and yields the records of its table, dicts by column
# name, each as soon as it is known. Its docstring is what `python bench.py SUITE --help` says.

# ---- Suite inference: forward passes


@dataclass(frozen=True)
class ForwardCase(Case):
    """A forward pass without gradients, of a model with random weights."""

    library: str  # "ours" or "transformers"
    config: ViTMSNConfig
    attention: str  # "eager", "sdpa", or "compiled": SDPA through torch.compile
    head: str  # "model" or "classifier"
    precision: str
    batch: int
    device: torch.device

    def prepare(self) -> Timed:
        implementation = "eager" if self.attention == "eager" else "sdpa"
        config = replace(self.config, attn_implementation=implementation)
        dtype = getattr(torch, self.precision)
        build = build_ours if self.library == "ours" else build_transformers
        model = build(config, self.head).to(self.device, dtype).eval()
        if self.attention == "compiled":
            # At batch 1 a GPU spends most of the time on starting kernels; CUDA graphs spare that.
            mode = None if self.device.type == "cpu" else "reduce-overhead"
            model.compile(mode=mode)

        shape = (self.batch, config.num_channels, config.image_size, config.image_size)

        def new_images() -> Tensor:
            return torch.randn(shape, device=self.device).to(dtype)

        @torch.inference_mode()
        def forward(images: Tensor) -> None:
            model(images)

        return Timed(new_images, forward)

    def work(self) -> float:
        class_token_only = self.head == "classifier"
        return self.batch * forward_flops(self.config, self.config.grid_size**2, class_token_only)


def build_ours(config: ViTMSNConfig, head: str) -> nn.Module:
    """Our backbone ("model") or our classifier."""
    return ViTMSNModel(config) if head == "model" else ViTMSNForImageClassification(config)


def import_library(name: str):
    """An optional package. Raises UsageError, which says how to install it, if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"the package {name} is not installed: pip install {name}") from None


def build_transformers(config: ViTMSNConfig, head: str) -> nn.Module:
    """The same model by the transformers library."""
    transformers = import_library("transformers")
    if head == "model":
        auto_class = transformers.AutoModel
    else:
        auto_class = transformers.AutoModelForImageClassification
    theirs = transformers.ViTMSNConfig(**config.to_dict())
    return auto_class.from_config(theirs, attn_implementation=config.attn_implementation)


def inference_suite(config: TrainConfig, args: argparse.Namespace, setup: Setup) -> Iterator[dict]:
    """Forward passes of whole images: the attention implementations, and other libraries, compared.

    A line for each precision and batch size. "Of peak" is the share of the speed that the machine
    reaches in a large matrix product; "transformers / ours" above 1 means that ours is faster.
    """
    groups = {}
    for precision in args.precisions:
        for batch in args.batch_sizes:
            cases = inference_cases(config.model_config(), precision, batch, args, setup)
            groups[precision, batch] = cases
    progress = Progress(list(groups.values()), setup)
    peaks = {precision: matmul_peak(precision, setup) for precision in args.precisions}

    for (precision, batch), cases in groups.items():
        results = measure(cases, setup, progress)
        columns = inference_columns(results, cases, peaks[precision])
        yield {"precision": precision, "batch": batch, **columns}


def inference_cases(
    model_config: ViTMSNConfig, precision: str, batch: int, args: argparse.Namespace, setup: Setup
) -> dict[tuple, ForwardCase]:
    """What one line compares, by attention and library."""
    cases = {}
    for attention in args.attn:
        for library in ("ours", *args.against):
            cases[attention, library] = ForwardCase(
                library=library,
                config=model_config,
                attention=attention,
                head=args.head,
                precision=precision,
                batch=batch,
                device=setup.device,
            )
    return cases


def inference_columns(results: dict, cases: dict[tuple, ForwardCase], peak: float) -> dict:
    """The columns of one precision and batch size: each case's times, and their ratios.

    results and cases: by attention and library.
    """
    columns = {}
    for (attention, library), case in cases.items():
        result = results[attention, library]
        ours = results[attention, "ours"]
        if library == "ours":
            columns[attention] = result
            columns[f"{attention}, of peak"] = case.work() / result["median"] / peak
        else:
            columns[f"{attention}, {library}"] = result
            columns[f"{attention}, {library} / ours"] = result["median"] / ours["median"]

    if "eager" in columns and "sdpa" in columns:
        columns["eager / sdpa"] = columns["eager"]["median"] / columns["sdpa"]["median"]
    return columns


# ---- Suites train, masking and growth: pretraining steps

AS_TRAINED = "as trained"  # the attention implementation that train_msn.py chooses by itself


@dataclass(frozen=True)
class StepCase(Case):
    """One whole pretraining step, from decoded pictures to the moved target encoder."""

    config: TrainConfig
    attention: str  # of the anchor encoder: "eager", "sdpa" or AS_TRAINED
    source_size: list[int]  # height and width of the pictures
    device: torch.device

    def prepare(self) -> Timed:
        return step_parts(self.config, self.attention, self.source_size, self.device)["step"]

    def work(self) -> float:
        return step_flops(self.config)


def step_parts(
    config: TrainConfig, attention: str, source_size: list[int], device: torch.device
) -> dict[str, Timed]:
    """A pretraining step ("step") and each of its parts, all of one model; arguments as StepCase's.

    The input of each part is what the parts before it make, and is not timed.
    """
    model = build_model(config, Processes(0, 1, device))
    if attention != AS_TRAINED:
        model.anchor_encoder.set_attn_implementation(attention)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), fused=True)
    now = schedule_at(config, 1, 100)  # the second step of an epoch of 100 steps
    new_batch, views_of = ViewsCase(config, source_size, device).prepare()

    def step(batch: Batch) -> None:
        views = views_of(batch)
        train_step(model, optimizer, *views, now, config.clip_grad, config.precision)

    def new_views() -> Views:
        return views_of(new_batch())

    def forward(views: Views) -> Tensor:
        with autocast(device, config.precision == "bfloat16"):
            return model(*views, now.sharpening).loss

    def new_loss() -> Tensor:
        return forward(new_views())

    def nothing() -> None:
        return None

    def update_weights(_) -> None:
        optimizer.step()

    def update_target(_) -> None:
        model.update_target(now.momentum)

    return {
        "step": Timed(new_batch, step),
        "views": Timed(new_batch, views_of),
        "forward": Timed(new_views, forward),
        "backward": Timed(new_loss, Tensor.backward),
        "optimizer": Timed(nothing, update_weights),
        "EMA": Timed(nothing, update_target),
    }


def train_suite(config: TrainConfig, args: argparse.Namespace, setup: Setup) -> Iterator[dict]:
    """One pretraining step: its time, its peak memory, and the share that each part takes of it.

    A line for each attention implementation. The parts are timed one by one, so that their shares
    need not add up to 1.
    """
    peak = matmul_peak(config.precision, setup)
    cases = step_cases([config], "mask_ratio", args, setup)
    # Six parts with all that goes before each of them: some three steps.
    work_of_a_part = step_flops(config) / 2
    work_of_all = 6 * len(cases) * (WARM_UPS + setup.repeats) * work_of_a_part
    progress = Progress([cases], setup, other_work=work_of_all)

    for record in step_records(measure(cases, setup, progress), cases, "mask_ratio", peak):
        parts = step_parts(config, record["attention"], args.source_size, setup.device)
        works = dict.fromkeys(parts, work_of_a_part)
        results = time_in_turn(parts, works, setup, progress)
        whole = results.pop("step")
        for part, result in results.items():
            record[part] = result["median"] / whole["median"]
        yield record


def masking_suite(config: TrainConfig, args: argparse.Namespace, setup: Setup) -> Iterator[dict]:
    """What masking saves: a step with mask ratios from 0 to 0.9, without focal views by default.

    A line for each attention implementation and each mask ratio; all are timed in turn, so all
    lines come at the end.
    """
    peak = matmul_peak(config.precision, setup)
    configs = [replace(config, mask_ratio=tenths / 10) for tenths in range(10)]
    cases = step_cases(configs, "mask_ratio", args, setup)
    results = measure(cases, setup, Progress([cases], setup))
    yield from step_records(results, cases, "mask_ratio", peak)


GROWING = ("image_size", "num_prototypes", "focal_views", "batch_size")


def growth_suite(config: TrainConfig, args: argparse.Namespace, setup: Setup) -> Iterator[dict]:
    """What growth costs: a step with one setting doubled and doubled again, the others as given.

    A table for each of image size, prototypes, focal views and batch size, with a line for each
    attention implementation and each value. The time grows as this "power" of the value, since the
    line before: 1 is linear. (Twice the image size makes four times as many patches.)
    """
    peak = matmul_peak(config.precision, setup)
    groups = {}
    for name in GROWING:
        start = max(getattr(config, name), 1)
        configs = [replace(config, **{name: factor * start}) for factor in (1, 2, 4)]
        groups[name] = step_cases(configs, name, args, setup)
    progress = Progress(list(groups.values()), setup)

    for name, cases in groups.items():
        before = None
        for record in step_records(measure(cases, setup, progress), cases, name, peak):
            record["power"] = None
            if before and record[name] > before[name]:  # else another implementation begins
                slower = record["step"]["median"] / before["step"]["median"]
                record["power"] = math.log2(slower)
            before = record
            yield record


def step_cases(
    configs: list[TrainConfig], varied: str, args: argparse.Namespace, setup: Setup
) -> dict[tuple, StepCase]:
    """Whole steps, by attention implementation and the value of the setting that is varied.

    configs: settings that differ in nothing but `varied`.
    """
    cases = {}
    for attention in args.attn:
        for config in configs:
            case = StepCase(config, attention, args.source_size, setup.device)
            cases[attention, getattr(config, varied)] = case
    return cases


def step_records(
    results: dict[tuple, dict], cases: dict[tuple, StepCase], varied: str, peak: float
) -> list[dict]:
    """Records of whole steps. results: of measure(cases); peak: of matmul_peak, in FLOP/s."""
    records = []
    for (attention, value), case in cases.items():
        result = results[attention, value]
        seconds = result["median"]
        record = {
            "attention": attention,
            varied: value,
            "step": result,
            "GFLOP": case.work() / 1e9,
            "images/s": case.config.batch_size / seconds,
            "of peak": case.work() / seconds / peak,
        }
        records.append(record)
    return records


# ---- Suite views: our views against Pillow's


@dataclass(frozen=True)
class ViewsCase(Case):
    """All views of a batch of random pictures by our view generator, on the device."""

    config: TrainConfig
    source_size: list[int]  # height and width of the pictures
    device: torch.device

    def prepare(self) -> Timed:
        count = self.config.batch_size
        height, width = self.source_size
        sizes = torch.tensor([self.source_size] * count)

        def new_batch() -> Batch:
            pixels = torch.randint(256, (count, height, width, 3), dtype=torch.uint8)
            return Batch(pixels.permute(0, 3, 1, 2), sizes, [], [])

        def views_of(batch: Batch) -> Views:
            batch = batch._replace(images=send(batch.images, self.device))
            return make_views(batch, self.config, 0, slice(0, count))

        return Timed(new_batch, views_of)


@dataclass(frozen=True)
class PillowCase(Case):
    """The same views of the same pictures, from the same random numbers, by Pillow."""

    config: TrainConfig
    source_size: list[int]  # height and width of the pictures
    device: torch.device

    def prepare(self) -> Timed:
        new_batch, _ = ViewsCase(self.config, self.source_size, self.device).prepare()

        def new_pictures() -> list[Image.Image]:
            images = new_batch().images.permute(0, 2, 3, 1)
            return [Image.fromarray(pixels.numpy()) for pixels in images]

        def views_of(pictures: list[Image.Image]) -> list[Tensor]:
            return pillow_views(pictures, self.config, self.device)

        return Timed(new_pictures, views_of)


def pillow_views(
    pictures: list[Image.Image], config: TrainConfig, device: torch.device
) -> list[Tensor]:
    """The target view, the random views, the focal views of b pictures of one size.

    -> for each view b 3 size size, normalised, on the device
    """
    whole = (config.image_size, config.crop_scale)
    focal = (config.focal_size, config.focal_scale)
    kinds = [whole] * (1 + config.random_views) + [focal] * config.focal_views
    draws = draw_views(len(pictures), len(kinds), generator_for(config.seed, VIEWS, 0))
    sizes = torch.tensor([[picture.height, picture.width] for picture in pictures])

    views = []
    for v, (size, scale) in enumerate(kinds):
        boxes = crop_boxes(draws["crop"][v], sizes, scale).tolist()
        numbers = {name: of_views[v].tolist() for name, of_views in draws.items()}

        pixels = []
        for b, picture in enumerate(pictures):
            own_numbers = {name: of_pictures[b] for name, of_pictures in numbers.items()}
            pixels.append(pillow_view(picture, boxes[b], own_numbers, config, size))

        view = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device)
        views.append(normalize(view.float() / 255))
    return views


def pillow_view(
    picture: Image.Image,
    box: list[int],
    numbers: dict[str, list[float]],
    config: TrainConfig,
    size: int,
) -> np.ndarray:
    """One view of one picture. -> size size 3, uint8

    box: top, left, height, width. numbers: what draw_views drew for this view of this picture,
    uniform in [0, 1).
    """
    top, left, height, width = box
    corners = (left, top, left + width, top + height)
    picture = picture.resize((size, size), Image.Resampling.BILINEAR, box=corners)

    if numbers["flip"][0] < config.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    if numbers["jitter"][0] < config.jitter:
        picture = pillow_color_jitter(
            picture, config.color_jitter, numbers["factors"], numbers["order"]
        )

    if numbers["grey"][0] < config.grey:
        picture = picture.convert("L").convert("RGB")

    blur, strength = numbers["blur"]
    if blur < config.blur:
        low, high = config.blur_sigma
        sigma = low + (high - low) * strength
        picture = picture.filter(ImageFilter.GaussianBlur(sigma))

    return np.asarray(picture)


# SimCLR's jitter at strength 1: brightness, contrast and saturation change by a factor of up to
# 1 +- 0.8, the hue turns by up to +- 0.2 of the full circle.
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
LARGEST_CHANGE = 0.8
LARGEST_TURN = 0.2


def pillow_color_jitter(
    picture: Image.Image, strength: float, factors: list[float], order: list[float]
) -> Image.Image:
    """Brightness, contrast, saturation and hue, changed in a random order.

    factors: how much each of the four changes; order: whose ranks are their turns; all in [0, 1).
    """
    for kind in np.argsort(order):
        change = strength * (2 * factors[kind] - 1)  # uniform between -strength and strength
        if kind < len(ENHANCERS):
            picture = ENHANCERS[kind](picture).enhance(1 + LARGEST_CHANGE * change)
        else:
            picture = turn_hue(picture, LARGEST_TURN * change)
    return picture


def turn_hue(picture: Image.Image, turn: float) -> Image.Image:
    """Shift the hue by a fraction of the full circle, which Pillow divides into 256."""
    hue, saturation, value = picture.convert("HSV").split()
    shift = np.uint8(round(256 * turn) % 256)
    turned = Image.fromarray(np.asarray(hue) + shift)  # beyond 255, uint8 starts at 0 again
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def views_suite(config: TrainConfig, args: argparse.Namespace, setup: Setup) -> Iterator[dict]:
    """Our view generator against Pillow, which makes one view of one picture at a time, on the CPU.

    "Pillow / ours" above 1 means that ours is faster.
    """
    cases = {
        "ours": ViewsCase(config, args.source_size, setup.device),
        "Pillow": PillowCase(config, args.source_size, setup.device),
    }
    results = measure(cases, setup)

    height, width = args.source_size
    ours = results["ours"]
    pillow = results["Pillow"]
    yield {
        "source": f"{height}x{width}",
        "views": 1 + config.random_views + config.focal_views,
        "ours": ours,
        "Pillow": pillow,
        "Pillow / ours": pillow["median"] / ours["median"],
    }


# ---- The command line ----------------------------------------------------------------------------


def add_common_flags(parser: argparse.ArgumentParser, recipe: str) -> None:
    """Flags of every suite: what to start from (by default `recipe`), where and how to measure."""
    parser.add_argument(
        "--recipe",
        default=argparse.SUPPRESS,
        help="settings to start from; they replace the defaults of the other flags (default: "
        f"{recipe})",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="start from a published model and its pretraining, but with batches of 8 images",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="CPU threads that torch may use (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=10,
        help="how often each case is timed after the warm-up (default: %(default)s)",
    )
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="measure the peak memory of each case, in a process of its own; on a CPU this works "
        "on Linux only, where train, masking and growth do it by default",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the seconds that this process computes, not those that pass: for one thread "
        "on a CPU that is busy with other work",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the machine, the flags and the table to this file; times in seconds, memory "
        "in MiB",
    )


def add_inference_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the suite inference."""
    parser.add_argument(
        "--attn",
        nargs="+",
        choices=("eager", "sdpa", "compiled"),
        default=["eager", "sdpa"],
        help="attention implementations to compare; compiled is SDPA through torch.compile "
        "(default: eager sdpa)",
    )
    parser.add_argument(
        "--precision",
        dest="precisions",
        nargs="+",
        choices=("float32", "float16", "bfloat16"),
        default=["float32"],
        help="number formats of weights and images (default: float32)",
    )
    parser.add_argument(
        "--batch-sizes",
        "--batch-size",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="images per forward pass (default: 1 2 4 8)",
    )
    parser.add_argument(
        "--head",
        choices=("model", "classifier"),
        default="model",
        help="the backbone alone, or with a linear classifier (default: %(default)s)",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        choices=("transformers",),
        default=[],
        help="other libraries to compare with",
    )


def add_step_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the suites train, masking and growth."""
    parser.add_argument(
        "--attn",
        nargs="+",
        choices=("eager", "sdpa"),
        default=[AS_TRAINED],
        help="attention implementations of the anchor encoder to compare (default: the one that "
        "train_msn.py chooses)",
    )
    add_source_size(parser)
    parser.set_defaults(memory=sys.platform == "linux")


def add_views_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the suite views."""
    add_source_size(parser)
    parser.set_defaults(threads=1)  # Pillow has no more


def add_source_size(parser: argparse.ArgumentParser) -> None:
    """The flag of all suites that start from pictures."""
    parser.add_argument(
        "--source-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="pixels of the random pictures that the views are cut from (default: twice the image "
        "size, or the image size itself if that is below 64)",
    )


PRESET_BATCH = 8  # images a step; the published 1024 must be asked for

# What a suite would ignore it refuses, and says what to use instead. These are the settings of
# train_msn.py that no suite looks at ...
NO_FILES = "it reads no files, its pictures are random; use train_msn.py for your own."
NO_RUN = "it times single steps, not a run; use train_msn.py for that."
NO_MODEL = "it makes views and has no model; use bench.py train for a whole step."
REFUSED_BY_ALL = {
    "data": NO_FILES,
    "data_dir": NO_FILES,
    "num_workers": NO_FILES,
    "cache_mb": NO_FILES,
    "output_dir": "it writes nothing but the table; use --json FILE for that.",
    "resume": NO_RUN,
    "max_steps": "use --repeats for the number of steps that are timed.",
    "checkpoint_every": NO_RUN,
    "knn_every": NO_RUN,
}

# ... and these are the settings that make a difference to a suite.
ALL_SETTINGS = {setting.name for setting in fields(TrainConfig)}
STEP_SETTINGS = ALL_SETTINGS - set(REFUSED_BY_ALL)
MODEL_SETTINGS = {
    "recipe",
    "device",
    "image_size",
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
}
VIEWS_SETTINGS = {
    "recipe",
    "device",
    "seed",
    "batch_size",
    "image_size",
    "patch_size",
    "random_views",
    "focal_views",
    "focal_size",
    "mask_ratio",
    "crop_scale",
    "focal_scale",
    "flip",
    "color_jitter",
    "jitter",
    "grey",
    "blur",
    "blur_sigma",
}


@dataclass(frozen=True)
class Suite:
    """A subcommand of bench.py. A new one is a function and an entry in SUITES."""

    run: Callable[[TrainConfig, argparse.Namespace, Setup], Iterator[dict]]  # -> records
    add_flags: Callable[[argparse.ArgumentParser], None]  # its own; they replace train_msn.py's
    settings: set[str]  # of train_msn.py, those that make a difference to it
    instead: str  # what to use in place of the other settings, ...
    refused: dict[str, str] = field(default_factory=dict)  # ... and of single flags
    recipe: str = "demo"  # which settings it starts from, ...
    changes: dict[str, Any] = field(default_factory=dict)  # ... and what is different from them

    def refusals(self) -> dict[str, str]:
        """All flags that the suite refuses (with _ for -), and what to use instead."""
        others = dict.fromkeys(ALL_SETTINGS - self.settings, self.instead)
        return {**others, **REFUSED_BY_ALL, **self.refused}


SUITES = {
    "inference": Suite(
        inference_suite,
        add_inference_flags,
        MODEL_SETTINGS,
        instead="it times forward passes of whole images; use bench.py train for training steps.",
        refused={
            "compile": "use --attn compiled.",
            "source_size": "use --image-size for the size of its images.",
        },
        recipe="base-16",
        changes={"focal_views": 0},  # so that any patch size is allowed
    ),
    "train": Suite(train_suite, add_step_flags, STEP_SETTINGS, instead=NO_RUN),
    "masking": Suite(
        masking_suite,
        add_step_flags,
        STEP_SETTINGS - {"mask_ratio"},
        instead=NO_RUN,
        refused={"mask_ratio": "it measures 0, 0.1, ... 0.9; use bench.py train for one ratio."},
        changes={"focal_views": 0},  # they are not masked, and would hide what masking saves
    ),
    "growth": Suite(growth_suite, add_step_flags, STEP_SETTINGS, instead=NO_RUN),
    "views": Suite(
        views_suite,
        add_views_flags,
        VIEWS_SETTINGS,
        instead=NO_MODEL,
        refused={
            "attn": NO_MODEL,
            "anchor_view": "Pillow's side makes independent views only; use bench.py train.",
        },
    ),
}


class RefusedFlag(argparse.Action):
    """A flag that would change nothing: an error that says what to use instead."""

    def __init__(self, *arguments, suite: str, instead: str, **options):
        super().__init__(*arguments, nargs="*", help=argparse.SUPPRESS, **options)
        self.suite = suite
        self.instead = instead

    def __call__(self, parser, namespace, values, option_string=None):
        raise UsageError(f"bench.py {self.suite} does not take {option_string}: {self.instead}")


def shown_defaults(suite: Suite, preset: str | None, recipe: str | None) -> dict[str, Any]:
    """The settings, by field name, that the help of a suite shows as its defaults."""
    recipe = recipe or suite.recipe
    if preset in PRESETS:
        recipe = preset
    few_images = {"batch_size": PRESET_BATCH} if recipe in PRESETS else {}
    return {**recipe_settings(recipe), **few_images, **suite.changes}


def make_parser(preset: str | None = None, recipe: str | None = None) -> argparse.ArgumentParser:
    """The command line, with a subcommand for each suite.

    preset, recipe: those whose values the help texts show; by default those of each suite.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [" + " | ".join(SUITES) + "] [--flag value ...]; more by SUITE --help",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="suite", prog="bench.py")
    for name, suite in SUITES.items():
        summary = suite.run.__doc__.splitlines()[0]
        # "resolve": a flag that is added again replaces the one before.
        subparser = subparsers.add_parser(
            name,
            usage="%(prog)s [--flag value ...]; more by --help",
            help=summary,
            description=suite.run.__doc__,
            conflict_handler="resolve",
        )
        add_flags(subparser, TrainConfig, shown_defaults(suite, preset, recipe))
        for setting, instead in suite.refusals().items():
            flag = setting.replace("_", "-")
            subparser.add_argument(
                f"--{flag}",
                f"--no-{flag}",
                action=RefusedFlag,
                suite=name,
                instead=instead,
                default=argparse.SUPPRESS,
            )
        start = suite.recipe
        if "hidden_size" in suite.settings:
            start += "; with --hidden-size: small-16"
        add_common_flags(subparser, start)
        suite.add_flags(subparser)
    return parser


def training_config(args: argparse.Namespace, device: torch.device) -> TrainConfig:
    """Settings by the flags that were given, the preset or recipe, and the suite's defaults.

    A hidden size without preset or recipe changes small-16. Raises UsageError if a flag that was
    given has no effect beside the others.
    """
    suite = SUITES[args.suite]
    given = {name: value for name, value in vars(args).items() if name in ALL_SETTINGS}
    if args.preset and "recipe" in given:
        raise UsageError(
            f"--preset {args.preset} and --recipe {given['recipe']} both name the settings to "
            "start from; give one of them."
        )

    recipe = args.preset or given.get("recipe")
    if recipe is None:
        recipe = "small-16" if "hidden_size" in given else suite.recipe
    settings = {"recipe": recipe}
    if recipe in PRESETS:
        settings["batch_size"] = PRESET_BATCH
    config = make_config({**settings, **suite.changes, **given, "device": str(device)})

    for name in ("focal_size", "focal_scale"):
        if name in given and config.focal_views == 0:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} has no effect because there are no focal views; give --focal-views, too."
            )
    return replace(config, precision=choose_precision(config.precision, device))


def make_setup(args: argparse.Namespace) -> Setup:
    """Where and how to measure, by the common flags. Raises UsageError for numbers below 1."""
    counts = [args.threads, args.repeats, *getattr(args, "batch_sizes", [])]
    if min(counts) < 1:
        raise UsageError(
            f"--threads {args.threads}, --repeats {args.repeats} and --batch-sizes must be at "
            "least 1."
        )
    torch.set_num_threads(args.threads)
    processes = start_processes(TrainConfig(device=getattr(args, "device", "auto")))
    clock = time.process_time if args.cpu_time else time.perf_counter
    return Setup(processes.device, args.threads, args.repeats, args.memory, clock)


def describe_machine(args: argparse.Namespace, setup: Setup) -> dict:
    """What a reader of the figures must know: processor, threads, clock, speed, versions."""
    gpu_name = getattr(torch.get_device_module(setup.device), "get_device_name", None)
    machine = {
        "machine": gpu_name() if gpu_name else processor_name(),
        "threads": setup.threads,
        "clock": setup.clock.__name__,
        "float32 matmul GFLOP/s": matmul_peak("float32", setup) / 1e9,
    }
    for library in ("torch", *getattr(args, "against", [])):
        machine[library] = import_library(library).__version__
    return machine


def processor_name() -> str:
    """The model of the CPU where Linux tells it, else the operating system."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return found[1] if found else sys.platform


UNITS = {"image_size": "pixels", "batch": "images", "batch_size": "images", "source": "pixels"}


def column_title(name: str, value) -> str:
    """The name of a column with its unit. value: of any record, as cell_text takes it."""
    if isinstance(value, dict):
        memory = ", MiB" if "memory" in value else ""
        return f"{name}, ms [quartiles]{memory}"
    return f"{name}, {UNITS[name]}" if name in UNITS else name


def cell_text(value) -> str:
    """A cell of the table: a text, a number, a result of measure(), or None, which is empty."""
    if value is None:
        return ""
    if isinstance(value, dict):
        median, low, high = (f"{1000 * value[name]:.4g}" for name in ("median", "low", "high"))
        memory = f", {value['memory']:.0f}" if "memory" in value else ""
        return f"{median} [{low}, {high}]{memory}"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


class Table:
    """Prints records as they come, as tables in Markdown: a new one where the columns change."""

    def __init__(self):
        self.titles: list[str] = []

    def add(self, record: dict) -> None:
        titles = [column_title(name, value) for name, value in record.items()]
        if titles != self.titles:
            if self.titles:
                say("")
            self.titles = titles
            self.print_line(titles)
            self.print_line(["-" * len(title) for title in titles])
        self.print_line([cell_text(value) for value in record.values()])

    def print_line(self, cells: list[str]) -> None:
        """The columns stand below one another, unless a cell is wider than its title."""
        padded = []
        for cell, title in zip(cells, self.titles, strict=True):
            padded.append(cell.ljust(len(title)))
        say("| " + " | ".join(padded) + " |")


def main(argv: list[str]) -> None:
    """The command line; without the name of a suite, inference."""
    if argv and not argv[0].startswith("-") and argv[0] not in SUITES:
        raise UsageError(f"bench.py has no suite {argv[0]}; use {', '.join(SUITES)}.")
    if not argv or argv[0] not in (*SUITES, "-h", "--help"):
        argv = ["inference", *argv]
    preset = first_look(argv, "--preset")
    recipe = first_look(argv, "--recipe")
    args = make_parser(preset, recipe).parse_args(argv)

    setup = make_setup(args)
    config = training_config(args, setup.device)
    if "source_size" in args and args.source_size is None:
        side = config.image_size if config.image_size < 64 else 2 * config.image_size
        args.source_size = [side, side]

    machine = describe_machine(args, setup)
    print(", ".join(f"{name} {cell_text(value)}" for name, value in machine.items()), flush=True)
    print()

    records = []
    table = Table()
    for record in SUITES[args.suite].run(config, args, setup):
        table.add(record)
        records.append(record)
    if args.json:
        flags = {**vars(args), "device": setup.device, "clock": setup.clock}
        content = {"suite": args.suite, "machine": machine, "flags": flags, "rows": records}
        write_file(Path(args.json), json.dumps(content, indent=2, default=str).encode())


if __name__ == "__main__":
    sys.exit(run_program(main))
