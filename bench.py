"""Benchmarks of the model, the pretraining step and the views, on your own machine, CPU or GPU.

    python bench.py                    # eager against SDPA attention, batches of 1, 2, 4 and 8
    python bench.py inference --preset small-16 --threads 1 --against transformers
    python bench.py train --help       # what can be changed in a suite
    python bench.py learning --help    # seconds of training until k-NN reaches an accuracy
    python bench.py gpu                # all that needs a GPU: checks and times, in 25 minutes

The suites: inference (forward passes), train (a training step and its parts), masking (what dropped
patches save), growth (what a larger picture, batch, ... costs), views (our views against Pillow's),
loader (pictures read from files on one core, and how many cores a GPU needs for that).
Each takes those flags of train_msn.py that change what it measures, and refuses the others.

The cases that a suite compares run in turn (A B A B ...) after a warm-up, each time on new input.
A cell of the table is the median time in ms [lower quartile, upper quartile]; with --memory, the
peak memory in MiB follows. Lines are printed as soon as they are known; stderr says how far it is.
"""

import argparse
import gc
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from train_msn import (
    CHOICE,
    RECIPES,
    VIEWS,
    Batch,
    ImageFiles,
    Images,
    Processes,
    StepValues,
    TrainConfig,
    UsageError,
    Views,
    add_flags,
    build_model,
    build_optimizer,
    check_writable,
    choose_precision,
    clock_time,
    commit_here,
    crop_boxes,
    draw_views,
    embed_images,
    find_pictures,
    first_look,
    generator_for,
    knn_accuracy,
    knn_predict,
    make_config,
    make_views,
    open_data,
    parameter_groups,
    processor_name,
    read_checkpoint,
    recipe_for,
    recipe_settings,
    restore_weights,
    run_program,
    say,
    schedule_at,
    seed_drop_path,
    set_threads,
    settle,
    start_alone,
    step_batches,
    step_inputs,
    synthetic_images,
    train,
    train_step,
    with_tuples,
)
from vitmsn import (
    IMAGENET_STD,
    PRESETS,
    MSNEncoder,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTMSNForPreTraining,
    ViTMSNModel,
    autocast,
    eager_attention,
    from_original,
    msn_loss,
    normalize,
    num_patches_to_keep,
    sdpa_attention,
    sinkhorn,
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
    if setup.device.type == "cuda":
        return seconds_by_events(run, x)
    start = setup.clock()
    run(x)
    synchronize()
    return setup.clock() - start


def seconds_by_events(run: Callable[[Any], Any], x) -> float:
    """Seconds on the GPU's own clock, from when it could begin with run(x) until it is done."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    run(x)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000  # from milliseconds


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
    compiler: str = "inductor"  # backend of torch.compile

    def prepare(self) -> Timed:
        implementation = "eager" if self.attention == "eager" else "sdpa"
        config = replace(self.config, attn_implementation=implementation)
        dtype = getattr(torch, self.precision)
        build = build_ours if self.library == "ours" else build_transformers
        model = build(config, self.head).to(self.device, dtype).eval()
        if self.attention == "compiled":
            # At batch 1 a GPU spends most of the time on starting kernels; CUDA graphs spare that.
            mode = None if self.device.type == "cpu" else "reduce-overhead"
            model.compile(backend=self.compiler, mode=mode)

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
                compiler=args.compiler,
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
    """One whole pretraining step, from pictures on the device to the moved target encoder."""

    config: TrainConfig
    attention: str  # of the anchor encoder: "eager", "sdpa" or AS_TRAINED
    source_size: list[int]  # height and width of the pictures
    device: torch.device
    compiler: str | None = None  # of compile_encoders

    def prepare(self) -> Timed:
        parts = step_parts(
            self.config, self.attention, self.source_size, self.device, self.compiler
        )
        return parts["step"]

    def work(self) -> float:
        return step_flops(self.config)


def step_parts(
    config: TrainConfig,
    attention: str,
    source_size: list[int],
    device: torch.device,
    compiler: str | None = None,
) -> dict[str, Timed]:
    """A pretraining step ("step") and each of its parts, all of one model; arguments as StepCase's.

    The input of each part is what the parts before it make, and is not timed.
    """
    model = build_model(config, Processes(0, 1, device))
    compile_encoders(model, compiler)
    if attention != AS_TRAINED:
        model.anchor_encoder.set_attn_implementation(attention)
    optimizer = build_optimizer(model, config)
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


def compile_encoders(model: ViTMSNForPreTraining, compiler: str | None) -> None:
    """What --compile of train_msn.py does, by any backend of torch.compile; None: nothing."""
    if compiler:
        torch.compiler.reset()  # of one function, torch keeps eight compiled ones and no more
        model.anchor_encoder.compile(backend=compiler)
        model.target_encoder.compile(backend=compiler)


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
    """All views of a batch of random pictures by our view generator, on the device.

    The pictures are there already: a run copies them while the step before computes.
    """

    config: TrainConfig
    source_size: list[int]  # height and width of the pictures
    device: torch.device

    def prepare(self) -> Timed:
        count = self.config.batch_size
        height, width = self.source_size
        sizes = torch.tensor([self.source_size] * count)

        def new_batch() -> Batch:
            pixels = torch.randint(256, (count * height * width * 3,), dtype=torch.uint8)
            return Batch(pixels, sizes, [], []).on(self.device)

        def views_of(batch: Batch) -> Views:
            return make_views(batch, self.config, 0, slice(0, count))

        return Timed(new_batch, views_of)


@dataclass(frozen=True)
class PillowCase(Case):
    """The same views of the same pictures, from the same random numbers, by Pillow."""

    config: TrainConfig
    source_size: list[int]  # height and width of the pictures
    device: torch.device

    def prepare(self) -> Timed:
        new_batch, _ = ViewsCase(self.config, self.source_size, torch.device("cpu")).prepare()

        def new_pictures() -> list[Image.Image]:
            images = new_batch().images
            return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in images]

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


# ---- Suite loader: pictures from files to batches

BATCHES = 8  # of each run
MEGAPIXELS = 96  # of each run, if a batch can be as large as that takes
JPEG_QUALITY = 90
H100_IMAGES_PER_SECOND = 1932  # a compiled step of small-16: assets/results/gpu.json, "step"
NUM_MADE = 4  # different pictures of a size, of which one is upright


@dataclass(frozen=True)
class LoaderCase(Case):
    """Batches read from files, as a training run does it, without making views of them."""

    paths: list[Path]
    side: int  # to which the shorter side is reduced
    batch: int
    workers: int  # processes that read; 0: this one does
    megapixels: float  # of a picture

    def prepare(self) -> Timed:
        files = ImageFiles(self.paths, self.side, cache_bytes=0, check=False)
        order = [i % len(files) for i in range(BATCHES * self.batch)]
        loader = DataLoader(
            files,
            batch_sampler=[order[k::BATCHES] for k in range(BATCHES)],
            collate_fn=Batch._make,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

        def read_all(_) -> None:
            for batch in loader:
                batch.pixels[::4096].sum()  # each page of memory is looked at, as by a copy
                batch.give_back()

        return Timed(lambda: None, read_all)

    def work(self) -> float:
        return BATCHES * self.batch * self.megapixels


def loader_suite(config: TrainConfig, args: argparse.Namespace, setup: Setup) -> Iterator[dict]:
    """JPEGs from files to batches on one CPU core: images/s by size and by number of workers.

    A core is shared by the process that trains and the workers, which are processes that decode (0:
    the first one does). Pictures are made: noise with the spectrum of photographs, a quarter of
    them upright. Times are of one image; with --cpu-time (on Linux) they are those that all these
    processes compute, which a busy machine hardly changes.

    "Cores a GPU" is how many such cores keep up with a GPU whose training step takes as many
    images/s as stands beside. By default that is what one H100 took of small-16, compiled; of other
    settings as many as are the same number of operations.
    """
    if args.cpu_time:
        setup = replace(setup, clock=seconds_of_all_processes)
    gpu_speed = args.gpu_images_per_second
    if not gpu_speed:
        small_16 = make_config({"recipe": "small-16"})
        speed = H100_IMAGES_PER_SECOND * step_flops(small_16) / small_16.batch_size  # in FLOP/s
        gpu_speed = speed / (step_flops(config) / config.batch_size)

    with tempfile.TemporaryDirectory() as folder, one_core():
        groups = {}
        for source, paths in sources_of(args, Path(folder)).items():
            groups[source] = loader_cases(paths, config, args.workers)
        progress = Progress(list(groups.values()), setup)

        for source, cases in groups.items():
            results = measure(cases, setup, progress)
            for workers, case in cases.items():
                images = BATCHES * case.batch
                result = results[workers]
                kilobytes = sum(path.stat().st_size for path in case.paths) / 1e3
                yield {
                    "source": source,
                    "kB a file": kilobytes / len(case.paths),
                    "workers": workers,
                    "one image": of_one(result, images),
                    "images/s": images / result["median"],
                    "GPU images/s": gpu_speed,
                    "cores a GPU": gpu_speed * result["median"] / images,
                }


def seconds_of_all_processes() -> float:
    """Seconds that this process and those that it started, and that still run, have computed."""
    seconds = time.process_time()
    for process in multiprocessing.active_children():
        nanoseconds = Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]
        seconds += int(nanoseconds) / 1e9
    return seconds


def of_one(result: dict[str, float], images: int) -> dict[str, float]:
    """Times of one image, from those of many. (Memory is not divided.)"""
    times = {name: result[name] / images for name in ("median", "low", "high")}
    return {**result, **times}


@contextmanager
def one_core() -> Iterator[None]:
    """Holds this process, and those that it starts, to one core, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        say("this system can't hold processes to one core: figures are of all cores", sys.stderr)
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more than cores
            yield
    finally:
        os.sched_setaffinity(0, cores)


def sources_of(args: argparse.Namespace, folder: Path) -> dict[str, list[Path]]:
    """The pictures to read, by what they are called: those of --data, or JPEGs made in a folder."""
    if args.pictures:
        return {args.pictures: find_pictures(Path(args.pictures)).pictures}
    sources = {}
    rng = np.random.default_rng(0)
    for height, width in args.source_sizes:
        say(f"making pictures of {height}x{width} pixels", sys.stderr)
        paths = []
        for number in range(NUM_MADE):
            pixels = like_a_photograph(height, width, rng)
            picture = Image.fromarray(pixels.swapaxes(0, 1) if number == 0 else pixels)
            paths.append(folder / f"{height}x{width}-{number}.jpg")
            picture.save(paths[-1], quality=JPEG_QUALITY)
        sources[f"{height}x{width}"] = paths
    return sources


def like_a_photograph(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose spectrum falls as that of photographs, so that JPEG has as much to do. A file of
    500 x 375 pixels has some 100 kB, about as those of ImageNet. -> height width 3, uint8"""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no mean
    planes = []
    for _ in range(4):
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**1.2
        plane = np.fft.irfft2(spectrum, (height, width))
        planes.append(plane / plane.std())
    brightness, *colours = planes
    pixels = 127 + 50 * (brightness[..., None] + 0.25 * np.stack(colours, axis=2))
    return pixels.clip(0, 255).astype(np.uint8)


def loader_cases(
    paths: list[Path], config: TrainConfig, workers: list[int]
) -> dict[int, LoaderCase]:
    """What is measured of one source, by number of workers."""
    sizes = []
    for path in paths[:100]:
        with Image.open(path) as picture:
            sizes.append(picture.width * picture.height)
    megapixels = sum(sizes) / len(sizes) / 1e6
    batch = min(config.batch_size, max(1, round(MEGAPIXELS / BATCHES / megapixels)))
    side = 2 * config.image_size  # as open_data has it
    return {n: LoaderCase(paths, side, batch, n, megapixels) for n in workers}


# ---- The report of a GPU: python bench.py gpu ----------------------------------------------------
# One command for all that needs a GPU. A part of the report is a function that yields lines, each
# with the title of the table that it belongs to. The parts come first, then how long each takes
# (REPORT_PARTS), then the command. Without a GPU they run at toy size.


@dataclass(frozen=True)
class ReportSize:
    """How large the parts of the report are."""

    name: str
    changes: dict[str, Any]  # of the settings of every recipe
    attention_shape: tuple[int, ...]  # b h n dh, of part 1
    precisions: tuple[str, ...]  # of forward passes
    batch_sizes: tuple[int, ...]  # of forward passes
    compiled_batch_sizes: tuple[int, ...]  # fewer, because each takes half a minute to compile
    run_steps: int  # of the run that is killed and resumed
    checked_precisions: tuple[str, ...]  # in which compiled steps are checked
    step_recipes: tuple[str, ...]
    smallest_batch: int  # from here on, a step's batch is doubled while it fits into the memory
    largest_batch: int
    masking_batch_sizes: dict[str, int]  # recipe -> images a step
    views_batch: int
    pillow_batch: int
    source_size: list[int]  # height and width of the pictures
    compiler: str  # backend of torch.compile
    imagenette: dict[str, Any]  # changes of the recipe imagenette-128
    imagenette_epochs: int  # between two evaluations


FULL = ReportSize(
    name="full",
    changes={},
    attention_shape=(4, 12, 197, 64),  # that of base-16
    precisions=("float32", "float16", "bfloat16"),
    batch_sizes=(1, 2, 4, 8),
    compiled_batch_sizes=(1, 8),
    run_steps=200,
    checked_precisions=("bfloat16",),
    step_recipes=("small-16", "base-16"),
    smallest_batch=64,
    largest_batch=1024,
    masking_batch_sizes={"small-16": 256, "large-7": 16},
    views_batch=128,
    pillow_batch=16,
    source_size=[375, 500],  # the commonest size of ImageNet's pictures
    compiler="inductor",
    imagenette={},
    imagenette_epochs=25,
)
TOY = ReportSize(
    name="toy",
    changes={
        "image_size": 32,
        "patch_size": 8,
        "focal_size": 16,
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "head_hidden_size": 16,
        "output_dim": 8,
        "num_prototypes": 8,
    },
    attention_shape=(2, 3, 17, 8),
    precisions=("float32",),
    batch_sizes=(1, 2),
    compiled_batch_sizes=(1,),
    run_steps=8,
    checked_precisions=("float32",),
    step_recipes=("small-16",),
    smallest_batch=2,
    largest_batch=4,
    masking_batch_sizes={"small-16": 4},
    views_batch=4,
    pillow_batch=2,
    source_size=[40, 50],
    compiler="eager",  # traces as the other does, and compiles nothing
    imagenette={"batch_size": 4, "epochs": 2},
    imagenette_epochs=1,
)


@dataclass
class Report:
    """What all parts share."""

    size: ReportSize
    setup: Setup
    data: str  # the folder of Imagenette, or "" without it
    path: Path  # the file
    content: dict  # of the file
    earlier: dict  # what the file held before, of unfinished parts too
    deadline: float  # of time.monotonic()
    errors: dict[str, str] = field(default_factory=dict)  # part -> why it ended early

    @property
    def device(self) -> torch.device:
        return self.setup.device

    def config(self, recipe: str, **changes) -> TrainConfig:
        """The settings of a recipe, at the size of this report."""
        device = {"device": self.device.type}
        return make_config({"recipe": recipe, **device, **self.size.changes, **changes})

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        write_file(self.path, json.dumps(self.content, indent=2, default=str).encode())


Line = tuple[str, dict]  # title of a table, and a record of it


class NoProgress(Progress):
    """For what is timed without a word."""

    def __init__(self):
        self.work_left = 0.0

    def show(self, where: str) -> None:
        pass

    def saw_run(self, work: float, seconds: float) -> None:
        pass


def time_quietly(timed: dict[str, Timed], setup: Setup) -> dict[str, dict[str, float]]:
    """time_in_turn, without a word."""
    return time_in_turn(timed, dict.fromkeys(timed, 0.0), setup, NoProgress())


def free_memory(device: torch.device) -> None:
    """Give back what is gone to a GPU: models, batches, what was compiled; start its peak anew."""
    if device.type == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---- Report, part 1: does the GPU compute what the CPU computes?

GOLDEN = Path(__file__).resolve().parent / "tests" / "golden"
SDPA_BACKENDS = ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")

# How far attention may be off what it is in float64, as a share of the largest number.
PRECISION_LIMITS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2}


class NotAvailable(Exception):
    """Something that this device does not have, which is no mistake."""


def correctness_part(report: Report) -> Iterator[Line]:
    """The GPU computes what the CPU computes; if a line says "WRONG", no time below means much."""
    groups = (golden_checks, attention_checks, device_checks, compile_checks, run_checks)
    for group in groups:
        for record in group(report):
            yield "correctness", record
        free_memory(report.device)


def check(what: str, difference: Callable[[], float], limit: float) -> dict:
    """A record of part 1: a difference, which must not be above its limit.

    The difference is that of `distance`, where nothing else is said.
    """
    record = {"check": what, "difference": None, "limit": limit}
    try:
        record["difference"] = difference()
        record["verdict"] = "ok" if record["difference"] <= limit else "WRONG"  # so is NaN
    except NotAvailable as reason:
        record["verdict"] = f"not available: {reason}"
    except Exception as error:  # whatever it is, the other checks can go on
        record["verdict"] = f"WRONG: {type(error).__name__}: {' '.join(str(error).split())}"
    return record


def no_difference(what: str, verdict: str) -> dict:
    """A record of part 1 that only says something."""
    return {"check": what, "difference": None, "limit": None, "verdict": verdict}


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected number."""
    actual = actual.detach().cpu().double()
    expected = expected.detach().cpu().double()
    largest = expected.abs().max().item() or 1.0
    return (actual - expected).abs().max().item() / largest


# The golden numbers, in float32: tests/golden/README.md says what they are. (The tests compare them
# in float64, which not every device has.)


def golden_checks(report: Report) -> Iterator[dict]:
    """The published code's numbers, on the device."""
    if not GOLDEN.is_dir():
        yield no_difference("golden numbers", "not available: there is no folder tests/golden")
        return
    device = report.device
    yield check("golden: loss, gradients", partial(golden_loss, device), 1e-4)
    yield check("golden: Sinkhorn", partial(golden_sinkhorn, device), 1e-4)
    yield check("golden: encoder", partial(golden_encoder, device), 1e-3)
    yield check("golden: ten training steps", partial(golden_training, device), 1e-3)


def golden_arrays(name: str, device: torch.device) -> dict[str, Tensor]:
    """The numbers of a golden file, those with a fraction as float32."""
    arrays = {}
    with np.load(GOLDEN / f"{name}.npz") as file:
        for key in file.files:
            array = file[key]
            if array.dtype.kind in "iufb":  # others are names
                value = torch.from_numpy(np.array(array))
                value = value.float() if value.is_floating_point() else value
                arrays[key] = value.to(device)
    return arrays


def below(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays whose names begin with a prefix, by the rest of their names."""
    return {
        key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)
    }


def golden_loss(device: torch.device) -> float:
    """The largest distance of any case: loss, targets and gradients."""
    arrays = golden_arrays("loss", device)
    distances = []
    for i in range(int(arrays["num_cases"])):
        case = below(arrays, f"c{i}_")
        anchors = case["anchors"].requires_grad_()
        prototypes = case["prototypes"].requires_grad_()
        out = msn_loss(
            anchors,
            case["targets"],
            prototypes,
            temperature=case["tau"].item(),
            sharpening=case["sharpen"].item(),
            label_smoothing=case["smoothing"].item(),
            sinkhorn_iterations=3 * int(case["sinkhorn"]),
            memax_weight=int(case["use_memax"]) * case["w_memax"].item(),
            entropy_weight=int(case["use_entropy"]) * case["w_ent"].item(),
        )
        out.loss.backward()
        distances += [
            distance(out.loss, case["total"]),
            distance(out.target_assignments, case["assignment"]),
            distance(anchors.grad, case["grad_anchors"]),
            distance(prototypes.grad, case["grad_prototypes"]),
        ]
    return max(distances)


def golden_sinkhorn(device: torch.device) -> float:
    """The largest distance of any case, after three iterations."""
    arrays = golden_arrays("sinkhorn", device)
    distances = []
    for i in range(int(arrays["num_cases"])):
        balanced = sinkhorn(arrays[f"s{i}_in"].log(), iterations=3).exp()
        distances.append(distance(balanced, arrays[f"s{i}_out3"]))
    return max(distances)


def golden_config(arrays: dict[str, Tensor], weights: dict[str, Tensor]) -> ViTMSNConfig:
    """The architecture of a golden file, one of whose encoders has these weights."""
    return ViTMSNConfig(
        hidden_size=int(arrays["dim"]),
        num_hidden_layers=int(arrays["depth"]),
        num_attention_heads=int(arrays["heads"]),
        intermediate_size=len(weights["blocks.0.mlp.fc1.weight"]),
        image_size=int(arrays["img"]),
        patch_size=int(arrays["patch"]),
    )


def golden_encoder(device: torch.device) -> float:
    """The largest distance of the projections of whole, masked and small images."""
    arrays = golden_arrays("backbone", device)
    weights = below(arrays, "w/")
    encoder = MSNEncoder(
        golden_config(arrays, weights), int(arrays["hidden"]), int(arrays["out"])
    ).to(device)
    encoder.load_state_dict(from_original(weights))

    x = arrays["x"]
    small = arrays["x_small"]
    views = [x, x.flip(-1), small, small.flip(-2)]
    patches_to_keep = arrays["keep"].expand(len(x), -1)
    projections = encoder(views, [patches_to_keep, patches_to_keep, None, None]).flatten(0, 1)
    whole = encoder([x], [None])[0]  # batch statistics: the call before this one changes nothing
    return max(distance(projections, arrays["multi_train"]), distance(whole, arrays["proj_train"]))


def golden_training(device: torch.device) -> float:
    """The largest distance of losses and gradient norms in ten updates."""
    arrays = golden_arrays("train", device)
    model = golden_model(arrays).to(device)
    decay = arrays["step_wd"][0].item()
    optimizer = torch.optim.AdamW(parameter_groups(model, decay), eps=arrays["adam_eps"].item())

    losses = []
    norms = []
    for step in range(int(arrays["steps"])):
        now = StepValues(
            lr=arrays["step_lr"][step].item(),
            weight_decay=arrays["step_wd"][step].item(),
            momentum=arrays["step_ema"][step].item(),
            sharpening=arrays["step_T"][step].item(),
        )
        views = golden_views(arrays, step)
        _, metrics = train_step(model, optimizer, *views, now, arrays["cfg/clip_grad"].item())
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    return max(
        distance(torch.tensor(losses), arrays["step_total"]),
        distance(torch.tensor(norms), arrays["step_grad_norm"]),
    )


def golden_model(arrays: dict[str, Tensor]) -> ViTMSNForPreTraining:
    """The model of train.npz before its first step."""
    weights = below(arrays, "init/")
    model = ViTMSNForPreTraining(
        golden_config(arrays, weights),
        int(arrays["hidden"]),
        int(arrays["out"]),
        int(arrays["K"]),
        temperature=arrays["cfg/temperature"].item(),
        memax_weight=arrays["cfg/memax_weight"].item(),
    )
    model.anchor_encoder.load_state_dict(from_original(weights))
    model.target_encoder.load_state_dict(from_original(weights))
    with torch.no_grad():
        model.prototypes.copy_(arrays["init_prototypes"])
    return model


def golden_views(arrays: dict[str, Tensor], step: int) -> Views:
    """The views of an update: the stored batches come again and again."""
    large = arrays["views_large"]
    small = arrays["views_small"]
    batch = step % len(large)
    target_view, *random_views = large[batch]
    focal_views = list(small[batch])
    patches_to_keep = arrays["keep"][step].expand(len(target_view), -1)
    masks = [patches_to_keep] * len(random_views) + [None] * len(focal_views)
    return Views(target_view, [*random_views, *focal_views], masks)


def attention_checks(report: Report) -> Iterator[dict]:
    """Attention in each number format, eager and by each kernel that SDPA can choose from."""
    for precision, limit in PRECISION_LIMITS.items():
        for name in ("eager", *SDPA_BACKENDS):
            what = f"attention: {name.lower()} in {precision} = eager in float64"
            difference = partial(attention_difference, name, precision, report)
            yield check(what, difference, limit)


def attention_difference(name: str, precision: str, report: Report) -> float:
    """The largest distance of outputs and gradients, for queries of all tokens and of one.

    name: "eager" or a kernel of SDPA.
    """
    b, h, n, dh = report.size.attention_shape
    torch.manual_seed(0)
    distances = []
    for num_queries in (n, 1):  # 1: the class token's, in the last layer
        shapes = [(b, h, num_queries, dh), (b, h, n, dh), (b, h, n, dh)]
        inputs = [torch.randn(shape).to(getattr(torch, precision)) for shape in shapes]
        weights = torch.randn(shapes[0])

        expected = attention_and_gradients(
            eager_attention, [x.double() for x in inputs], weights.double()
        )
        on_device = [x.to(report.device) for x in inputs]
        attend = eager_attention if name == "eager" else partial(attend_by_kernel, name)
        actual = attention_and_gradients(attend, on_device, weights.to(on_device[0]))
        distances += [distance(*pair) for pair in zip(actual, expected, strict=True)]
    return max(distances)


def attention_and_gradients(
    attend: Callable, inputs: list[Tensor], weights: Tensor
) -> list[Tensor]:
    """The output, and the gradients of its weighted sum by query, key and value."""
    inputs = [x.requires_grad_() for x in inputs]
    out, _ = attend(*inputs)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def attend_by_kernel(name: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
    """sdpa_attention by one kernel alone. Raises NotAvailable if it does not take these inputs."""
    try:
        with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, name)):
            warnings.simplefilter("ignore")  # which say why it does not take them
            return sdpa_attention(query, key, value)
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            raise NotAvailable("SDPA has no such kernel for this device and precision") from None
        raise


def device_checks(report: Report) -> Iterator[dict]:
    """Views, a training step and k-NN, on the device and on the CPU."""
    views_difference = partial(difference_of_views, report)
    yield check("views: CPU = device (mean of grey levels)", views_difference, 1.0)
    yield check("views: masks are the same", partial(difference_of_masks, report), 0.0)

    def step_difference() -> float:
        config = report.config("small-16", batch_size=8, precision="float32")
        on_device = step_numbers(config, report.device, report)
        return distance(on_device, step_numbers(config, torch.device("cpu"), report))

    yield check("a step: CPU = device", step_difference, 1e-3)
    knn_difference = partial(difference_of_knn, report)
    yield check("k-NN: CPU = device (share of images with another class)", knn_difference, 0.02)


def same_batch(config: TrainConfig, source_size: list[int]) -> Batch:
    """Random pictures, at each call the same ones."""
    new_batch, _ = ViewsCase(config, source_size, torch.device("cpu")).prepare()
    torch.manual_seed(0)
    return new_batch()


def views_on_both(report: Report) -> tuple[Views, Views]:
    """Views of the same pictures, made by the CPU and by the device."""
    config = report.config("small-16", batch_size=8)
    batch = same_batch(config, report.size.source_size)
    made = []
    for device in (torch.device("cpu"), report.device):
        _, views_of = ViewsCase(config, report.size.source_size, device).prepare()
        made.append(views_of(batch.on(device)))
    return tuple(made)


def difference_of_views(report: Report) -> float:
    """How many grey levels the CPU's and the device's views differ, in the mean of all pixels."""
    cpu_views, device_views = views_on_both(report)
    grey_levels = []
    pairs = zip(
        [cpu_views.target_view, *cpu_views.anchor_views],
        [device_views.target_view, *device_views.anchor_views],
        strict=True,
    )
    for cpu_view, device_view in pairs:
        difference = (cpu_view - device_view.cpu()).abs().mean().item()
        grey_levels.append(difference * 255 * sum(IMAGENET_STD) / 3)
    return max(grey_levels)


def difference_of_masks(report: Report) -> float:
    """How many of the indices of the patches to keep are not the same."""
    cpu_views, device_views = views_on_both(report)
    count = 0
    pairs = zip(cpu_views.patches_to_keep, device_views.patches_to_keep, strict=True)
    for cpu_mask, device_mask in pairs:
        if cpu_mask is not None:
            count += (cpu_mask != device_mask.cpu()).sum().item()
    return float(count)


def step_numbers(
    config: TrainConfig, device: torch.device, report: Report, compiler: str | None = None
) -> Tensor:
    """Loss and gradient norm of one training step, from the same views on any device. -> 2"""
    cpu = torch.device("cpu")
    _, views_of = ViewsCase(config, report.size.source_size, cpu).prepare()
    views = views_of(same_batch(config, report.size.source_size))

    model = build_model(config, Processes(0, 1, device))
    compile_encoders(model, compiler)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay))
    now = schedule_at(config, 1, 100)
    _, metrics = train_step(
        model,
        optimizer,
        views.target_view.to(device),
        [view.to(device) for view in views.anchor_views],
        [mask if mask is None else mask.to(device) for mask in views.patches_to_keep],
        now,
        config.clip_grad,
        config.precision,
    )
    return torch.tensor([metrics["loss"], metrics["grad_norm"]])


def difference_of_knn(report: Report) -> float:
    """The share of images to which k-NN gives another class on the device than on the CPU."""
    data = synthetic_images(seed=0, train=500, val=100)
    config = make_config({"recipe": "demo", "precision": "float32"})
    predicted = []
    for device in (torch.device("cpu"), report.device):
        encoder = build_model(config, Processes(0, 1, device)).target_encoder
        train, _ = embed_images(encoder, data.train, list(range(500)), config.image_size, device)
        val, _ = embed_images(encoder, data.val, list(range(100)), config.image_size, device)
        predicted.append(knn_predict(train, data.train_labels, val).cpu())
    return (predicted[0] != predicted[1]).float().mean().item()


def compile_checks(report: Report) -> Iterator[dict]:
    """A step of compiled encoders and one of plain ones."""
    few_layers = 2  # all are compiled alike, and twelve take a minute
    for precision in report.size.checked_precisions:
        limit = 10 * PRECISION_LIMITS[precision]  # a step is long, and rounding adds up
        config = report.config(
            "small-16", batch_size=8, precision=precision, num_hidden_layers=few_layers
        )

        def difference(config=config) -> float:
            compiled = step_numbers(config, report.device, report, report.size.compiler)
            return distance(compiled, step_numbers(config, report.device, report))

        yield check(f"a step: compiled = not compiled, {precision}", difference, limit)


def run_checks(report: Report) -> Iterator[dict]:
    """A run twice, and once more killed half-way and resumed; what may vary, and why."""
    steps = report.size.run_steps
    with tempfile.TemporaryDirectory() as place:
        first = Path(place) / "first"
        again = Path(place) / "again"
        killed = Path(place) / "killed"
        given = short_run(report, Path(place) / "pictures")

        def same_seed_difference() -> float:
            train_here(given, first)
            train_here(given, again)
            return distance_of_runs(first, again)

        def resumed_difference() -> float:
            train_and_kill(given, killed)
            train_here(given, killed, resume=True)
            return distance_of_runs(first, killed)

        # Some kernels add up in the order in which they happen to finish, so that on a GPU the bits
        # may differ from run to run, and training makes such differences grow.
        record = check(f"same seed twice, {steps} steps", same_seed_difference, math.inf)
        spread = record["difference"] or 0.0
        if record["verdict"] == "ok":
            record["verdict"] = "ok: not the same bits" if spread else "ok: the same bits"
        yield {**record, "limit": None}
        limit = 10 * spread
        yield check(f"killed and resumed = in one go, {steps} steps", resumed_difference, limit)

    names = ", ".join(operations_that_vary(report)) or "none"
    yield no_difference("operations whose bits may vary", names)


def short_run(report: Report, folder: Path) -> dict[str, Any]:
    """The flags of a short run on pictures that are made here."""
    num_pictures = 32
    batch_size = 8
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(num_pictures):
        pixels = rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")

    steps = report.size.run_steps
    return {
        "recipe": "demo",
        "data": str(folder),
        "device": report.device.type,
        "batch_size": batch_size,
        "epochs": steps * batch_size // num_pictures,
        "checkpoint_every": steps // 2,
        "initializer_range": 0.02,
        **report.size.changes,
    }


def train_here(
    given: dict[str, Any], folder: Path, resume: bool = False, data: Images | None = None
) -> None:
    """A run of train_msn.py in this process, without its lines.

    given: flags by field name. data: the images, if they are open already.
    """
    given = {**given, "output_dir": str(folder), "resume": resume}
    with redirect_stdout(io.StringIO()):
        folder.mkdir(parents=True, exist_ok=True)
        config, content = settle(given, folder, given["recipe"])
        processes = Processes(0, 1, start_alone(config.device))
        precision = choose_precision(config.precision, processes.device)
        config = replace(config, precision=precision)
        train(config, data or open_data(config), folder, content, processes)
    if not (folder / "summary.json").exists():  # the run has noticed Ctrl-C and stopped early
        raise KeyboardInterrupt


def train_and_kill(given: dict[str, Any], folder: Path) -> None:
    """Start a run as a program, and kill it as soon as its first checkpoint is there."""
    program = Path(__file__).resolve().parent / "train_msn.py"
    command = [sys.executable, str(program), "--output-dir", str(folder)]
    for name, value in given.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    # With another number of threads, sums are rounded differently.
    command += ["--threads", str(torch.get_num_threads())]

    log = folder.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        while process.poll() is None and not (folder / "checkpoint.pt").exists():
            time.sleep(0.01)
        process.kill()
        process.wait()
    if not (folder / "checkpoint.pt").exists():
        raise RuntimeError(f"train_msn.py wrote no checkpoint; it said: {log.read_text()[-500:]}")


def distance_of_runs(first: Path, second: Path) -> float:
    """The largest distance between two runs' weights, tensor by tensor."""
    contents = [read_checkpoint(folder / "checkpoint.pt") for folder in (first, second)]
    distances = []
    for encoder in ("encoder", "target_encoder"):
        for name, expected in contents[0][encoder].items():
            distances.append(distance(contents[1][encoder][name], expected))
    distances.append(distance(contents[1]["prototypes"], contents[0]["prototypes"]))
    return max(distances)


def operations_that_vary(report: Report) -> list[str]:
    """Which operations of a training step need not give the same bits twice, as torch says."""
    config = report.config("small-16", batch_size=8, precision="float32")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step_numbers(config, report.device, report)
    finally:
        torch.use_deterministic_algorithms(False)

    pattern = r"(.+?) (does not have a deterministic|defaults to a non-deterministic)"
    found = [re.match(pattern, str(warning.message)) for warning in caught]
    return sorted({match[1] for match in found if match})


# ---- Report, part 2: forward passes

# Eager over SDPA by batch size: base-16, float32, an A100, from the documentation of transformers.
PUBLISHED_RATIOS = {1: 1.17, 2: 1.33, 4: 1.33, 8: 1.33}


def inference_part(report: Report) -> Iterator[Line]:
    """The documented table of base-16, beside that of transformers if it is installed."""
    config = report.config("base-16", focal_views=0)
    args = argparse.Namespace(head="model", compiler=report.size.compiler)
    for precision in report.size.precisions:
        args.precisions = [precision]
        args.batch_sizes = report.size.batch_sizes
        args.attn = ["eager", "sdpa"]
        args.against = installed("transformers")
        for record in inference_suite(config, args, report.setup):
            published = PUBLISHED_RATIOS.get(record["batch"]) if precision == "float32" else None
            yield "inference, base-16", {**record, "published eager / sdpa": published}

        args.batch_sizes = report.size.compiled_batch_sizes
        args.attn = ["compiled"]
        args.against = []
        for record in inference_suite(config, args, report.setup):
            yield "inference, base-16, compiled", record
        free_memory(report.device)


def installed(package: str) -> list[str]:
    """The name of a package in a list, which is empty if the package is not installed."""
    return [package] if importlib.util.find_spec(package) else []


# ---- Report, part 3: the training step

STEP_REPEATS = 6  # a step takes long enough to need no more


def step_part(report: Report) -> Iterator[Line]:
    """The training step at the largest batch that fits: how fast it is, and where its time goes."""
    peak = matmul_peak("bfloat16", report.setup)
    for recipe in report.size.step_recipes:
        config = report.config(recipe, precision="bfloat16")
        batch = largest_batch(config, report)
        config = replace(config, batch_size=batch)
        # Eager attention stores the probabilities, and float32 takes twice the memory.
        slow = replace(config, precision="float32")
        slow = replace(slow, batch_size=largest_batch(slow, report, "eager"))

        baseline = record_that_fits(slow, "eager", report)
        plain = record_that_fits(config, "sdpa", report)
        compiled = record_that_fits(config, "sdpa", report, report.size.compiler)
        records = {
            "float32, eager": baseline,
            "bfloat16, SDPA": plain,
            "bfloat16, SDPA, compiled": compiled,
        }
        for variant, record in records.items():
            first = {"recipe": recipe, "variant": variant}
            of_peak = {"of bfloat16 peak": record["TFLOP/s"] * 1e12 / peak}
            times = {"times float32 eager": record["images/s"] / baseline["images/s"]}
            yield "training step", {**first, **record, **of_peak, **times}

        config = replace(config, batch_size=plain["batch"])
        yield "parts of a step, of its time", {"recipe": recipe, **shares_of_parts(config, report)}
        yield (
            "kinds of work, of a step's time",
            {"recipe": recipe, **shares_of_work(config, report)},
        )
        free_memory(report.device)


def largest_batch(config: TrainConfig, report: Report, attention: str = "sdpa") -> int:
    """The largest power of two, within the bounds of the size, whose step fits into the memory."""
    batch = report.size.smallest_batch
    while batch < report.size.largest_batch:
        if not step_fits(replace(config, batch_size=2 * batch), report, attention):
            break
        batch *= 2
    return batch


def step_fits(config: TrainConfig, report: Report, attention: str) -> bool:
    """Whether two steps run without running out of memory: the first makes AdamW's state."""
    fits = True
    try:
        step = step_parts(config, attention, report.size.source_size, report.device)["step"]
        batch = step.new_input()
        for _ in range(2):
            step.run(batch)
    except torch.OutOfMemoryError:
        fits = False
    step = None
    free_memory(report.device)
    return fits


def record_that_fits(
    config: TrainConfig, attention: str, report: Report, compiler: str | None = None
) -> dict:
    """step_record, of half as many images if those of largest_batch do not fit after all: the same
    step can need more memory the next time, where what is free lies in too small pieces."""
    record = None
    while record is None:
        try:
            record = step_record(config, attention, report, compiler)
        except torch.OutOfMemoryError:
            if config.batch_size == 1:
                raise
            config = replace(config, batch_size=config.batch_size // 2)
            free_memory(report.device)
    return record


def step_record(
    config: TrainConfig, attention: str, report: Report, compiler: str | None = None
) -> dict:
    """Time, peak memory (on a GPU) and speed of a training step."""
    parts = step_parts(config, attention, report.size.source_size, report.device, compiler)
    step = with_one_input(parts["step"])
    setup = replace(report.setup, repeats=min(STEP_REPEATS, report.setup.repeats))
    free_memory(report.device)
    result = time_quietly({"step": step}, setup)["step"]
    if report.device.type == "cuda":
        result["memory"] = torch.cuda.max_memory_allocated() / 2**20

    seconds = result["median"]
    return {
        "batch": config.batch_size,
        "step": result,
        "images/s": config.batch_size / seconds,
        "TFLOP/s": step_flops(config) / seconds / 1e12,
    }


def with_one_input(timed: Timed) -> Timed:
    """The same thing to time, with one input for all runs: pictures take long to make."""
    one_input = timed.new_input()
    return Timed(lambda: one_input, timed.run)


def shares_of_parts(config: TrainConfig, report: Report) -> dict[str, float]:
    """The time of each part of a step, over that of the step."""
    parts = step_parts(config, "sdpa", report.size.source_size, report.device)
    results = time_quietly(parts, replace(report.setup, repeats=3))
    whole = results.pop("step")["median"]
    return {part: result["median"] / whole for part, result in results.items()}


# Kinds of work, and what is in the names of torch's operations that do it; the first that fits.
KINDS_OF_WORK = {
    "attention": ("attention", "softmax"),
    "matrix products": ("mm", "linear", "matmul"),
    "norms": ("norm",),
    "activations": ("gelu",),
    "optimizer, EMA": ("adam", "foreach", "lerp"),
    "copies, casts": ("copy", "cat", "index", "gather", "scatter", "clone", "contiguous"),
    "other operations": ("",),
}


def shares_of_work(config: TrainConfig, report: Report) -> dict[str, float]:
    """What share of a step's time each kind of operation takes; in the rest, the device waits."""
    on_gpu = report.device.type == "cuda"
    parts = step_parts(config, "sdpa", report.size.source_size, report.device)
    step = with_one_input(parts["step"])
    setup = replace(report.setup, repeats=3)
    seconds = time_quietly({"step": step}, setup)["step"]["median"]

    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        seconds_of(step.run, step.new_input(), report.setup)

    shares = dict.fromkeys(KINDS_OF_WORK, 0.0)
    for event in profiler.key_averages():
        # On a GPU, the time of a kernel counts for the operation that started it.
        own_time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.key.startswith("aten::"):
            shares[kind_of_work(event.key)] += own_time / 1e6 / seconds
    shares["waiting for the host"] = max(0.0, 1 - sum(shares.values()))
    return shares


def kind_of_work(operation: str) -> str:
    """The kind of work of one of torch's operations, such as aten::addmm."""
    for kind, parts_of_names in KINDS_OF_WORK.items():
        if any(part in operation for part in parts_of_names):
            return kind
    raise ValueError(f"{operation} is of no kind; let the last of KINDS_OF_WORK take everything.")


# ---- Report, part 4: masking

PUBLISHED_MASKING = {  # mask ratio -> GB a GPU, images/s; large-7, 2 images a GPU, eight A100
    0.0: (26, 415),
    0.3: (21, 480),
    0.5: (18, 525),
    0.7: (17, 600),
}


def masking_part(report: Report) -> Iterator[Line]:
    """What masking saves, with ten focal views, which are not masked (paper, table 10)."""
    for recipe, batch in report.size.masking_batch_sizes.items():
        unmasked = None
        for ratio, (gigabytes, images_per_second) in PUBLISHED_MASKING.items():
            changes = {"mask_ratio": ratio, "focal_views": 10, "batch_size": batch}
            config = report.config(recipe, precision="bfloat16", **changes)
            record = step_record(config, "sdpa", report)
            unmasked = unmasked or record["images/s"]
            record = {"recipe": recipe, "mask ratio": ratio, **record}
            record["times unmasked"] = record["images/s"] / unmasked
            published = recipe == "large-7"
            ratio_of_speeds = images_per_second / PUBLISHED_MASKING[0.0][1]
            record["published times unmasked"] = ratio_of_speeds if published else None
            record["published GB"] = gigabytes if published else None
            yield "masking, ten focal views", record
            free_memory(report.device)


# ---- Report, part 5: views


def views_part(report: Report) -> Iterator[Line]:
    """All views of a batch on the device, against Pillow on one core of the CPU."""
    config = report.config("small-16", batch_size=report.size.views_batch)
    pillow_config = replace(config, batch_size=report.size.pillow_batch)
    cpu = torch.device("cpu")
    source_size = report.size.source_size
    pillow = PillowCase(pillow_config, source_size, cpu).prepare()
    ours = with_one_input(ViewsCase(config, source_size, report.device).prepare())

    pillow_setup = replace(report.setup, device=cpu, repeats=min(3, report.setup.repeats))
    pillow_seconds = time_quietly({"Pillow": pillow}, pillow_setup)["Pillow"]["median"]
    result = time_quietly({"ours": ours}, report.setup)["ours"]
    speed = config.batch_size / result["median"]
    pillow_speed = pillow_config.batch_size / pillow_seconds

    record = {
        "source": f"{source_size[0]}x{source_size[1]}",
        "views": 1 + config.random_views + config.focal_views,
        "batch": config.batch_size,
        "ours": result,
        "images/s": speed,
        "Pillow's images/s": pillow_speed,
        "times Pillow": speed / pillow_speed,
    }
    yield "views", record


# ---- Report, part 6: a run on Imagenette

PUBLISHED_IMAGENETTE = (
    "Lightly, MSN ViT-S: k-NN 0.828 in 515.5 min on an A6000 (its best method: 0.902); "
    "LeJEPA, ViT-S/8: probe 0.907 in 200 min"
)
EVALUATION_SECONDS = 60  # at most, for k-NN, the probe and the end of a run


def imagenette_part(report: Report) -> Iterator[Line]:
    """k-NN and the logistic probe against time, in a run of the recipe imagenette-128.

    The run stops when the time is over; a second call goes on with it. Needs --data.
    """
    title = "imagenette-128"
    folder = report.path.with_name(report.path.stem + "-imagenette")
    given = {
        "recipe": "imagenette-128",
        "data": report.data,
        "device": report.device.type,
        "knn_every": 0,  # the evaluations below take their place
        **report.size.changes,
        **report.size.imagenette,
    }
    config = make_config(given)
    data = open_data(config)
    if data.val is None:
        raise UsageError(f"{report.data} has no labels, so no k-NN: {data.why_no_labels}.")

    steps_per_epoch = len(data.train) // config.batch_size
    records = finished_stretches(report, title, folder)
    for record in records:
        yield title, record
    done = records[-1]["epoch"] if records else 0
    seconds = imagenette_seconds() * report.size.imagenette_epochs / config.epochs
    if report.size is TOY:
        seconds = 0.0
    while done < config.epochs:
        if report.seconds_left() < seconds:
            raise TimeIsOver
        start = time.monotonic()
        done = min(done + report.size.imagenette_epochs, config.epochs)
        given["max_steps"] = done * steps_per_epoch
        train_here(given, folder, bool(records), data)
        record = {"epoch": done, **accuracies(folder, data, config, report.device)}
        records.append(record)
        yield title, record
        seconds = time.monotonic() - start  # as long as the next stretch will take


class TimeIsOver(Exception):
    """A part is not finished, and is to go on at the next call."""


def finished_stretches(report: Report, title: str, folder: Path) -> list[dict]:
    """The records of an earlier call, if its run is still there to go on with."""
    earlier = report.earlier.get("imagenette", {}).get(title, [])
    if not earlier:
        shutil.rmtree(folder, ignore_errors=True)  # a run that has no record yet
        return []
    return earlier


def accuracies(
    folder: Path, data: Images, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Minutes of training so far, and what k-NN and the logistic probe get right."""
    from finetune import FinetuneConfig, center_and_scale, fit_logistic_probe

    content = read_checkpoint(folder / "checkpoint.pt")
    model = build_model(config, Processes(0, 1, device))
    restore_weights(content, model)
    encoder = model.target_encoder
    all_train = list(range(len(data.train)))
    all_val = list(range(len(data.val)))
    train_features, kept = embed_images(encoder, data.train, all_train, config.image_size, device)
    val_features, val_kept = embed_images(encoder, data.val, all_val, config.image_size, device)
    labels = data.train_labels[kept]
    val_labels = data.val_labels[val_kept]

    prepared = center_and_scale(train_features)
    weights = fit_logistic_probe(
        prepared, labels, len(data.classes), FinetuneConfig.l2, tolerance=1e-6
    )
    predicted = {
        "k-NN": knn_predict(train_features, labels, val_features),
        "probe": (center_and_scale(val_features) @ weights.T).argmax(dim=-1),
    }
    result = {"minutes": content["elapsed"] / 60}
    for name, classes in predicted.items():
        result[name] = (classes == val_labels).float().mean().item()
    return result


# ---- Report: its parts, and how long they take

# The card that the times at full size are computed for: what it reaches of an H100's peak (989
# TFLOP/s in 16 bits, 67 in float32) in large models, and in small ones.
ASSUMED_SPEED = {"float32": 0.4 * 67e12, "float16": 0.4 * 989e12, "bfloat16": 0.4 * 989e12}
ASSUMED_SPEED_SMALL = 0.15 * 989e12
ASSUMPTION = "computed, not measured: 40 % of an H100's peak, 15 % in the run of part 6"
COMPILE_SECONDS = 60  # of both encoders of a training step
GPU_REPEATS = 20  # the default of --repeats
MODEL_SECONDS = 3  # to make a model on the CPU
PILLOW_SECONDS = 0.003  # a view
IMAGENETTE_IMAGES = 9469


def correctness_seconds() -> float:
    """About how long the check of correctness takes on a GPU."""
    program_start = 20
    runs = 3.5 * FULL.run_steps * 0.02
    steps_on_cpu = 30
    return 2 * COMPILE_SECONDS + program_start + runs + steps_on_cpu


def inference_seconds() -> float:
    """Both libraries, eager and SDPA; 30 repeats."""
    config = ViTMSNConfig.preset("base-16")
    seconds = 0.0
    for precision in FULL.precisions:
        for batch in FULL.batch_sizes:
            flops = batch * forward_flops(config, config.grid_size**2, class_token_only=False)
            at_least = 0.01  # a forward pass starts some hundred kernels
            one = max(at_least, flops / ASSUMED_SPEED[precision])
            seconds += 4 * (MODEL_SECONDS + (WARM_UPS + GPU_REPEATS) * one)
        seconds += len(FULL.compiled_batch_sizes) * COMPILE_SECONDS / 2  # forward only
    return seconds


def steps_seconds(config: TrainConfig, precision: str, steps: int) -> float:
    """So many training steps, and the making of their model."""
    return MODEL_SECONDS + steps * step_flops(config) / ASSUMED_SPEED[precision]


def step_seconds() -> float:
    """Batches of 512 images, in float32 of 128; as many steps again to find the batch size."""
    seconds = 0.0
    for recipe in FULL.step_recipes:
        steps = 2 * (WARM_UPS + STEP_REPEATS)
        config = make_config({"recipe": recipe, "batch_size": 512})
        slow = replace(config, batch_size=128)
        seconds += 4 * steps_seconds(config, "bfloat16", steps)
        seconds += 2 * steps_seconds(slow, "float32", steps) + COMPILE_SECONDS
    return seconds


def masking_seconds() -> float:
    """About how long it takes to measure what masking saves, on a GPU."""
    seconds = 0.0
    for recipe, batch in FULL.masking_batch_sizes.items():
        for ratio in PUBLISHED_MASKING:
            config = make_config({"recipe": recipe, "mask_ratio": ratio, "batch_size": batch})
            seconds += steps_seconds(config, "bfloat16", WARM_UPS + STEP_REPEATS)
            seconds += MODEL_SECONDS
    return seconds


def views_seconds() -> float:
    """About how long views take to measure on a GPU, and Pillow's beside them."""
    config = make_config({"recipe": "small-16"})
    views = 1 + config.random_views + config.focal_views
    pillow = (WARM_UPS + 3) * FULL.pillow_batch * views * PILLOW_SECONDS
    return pillow + (WARM_UPS + GPU_REPEATS) * 0.1


def imagenette_seconds() -> float:
    """About how long the recipe imagenette-128 trains on a GPU, evaluations included."""
    config = make_config({"recipe": "imagenette-128"})
    images = config.epochs * IMAGENETTE_IMAGES
    training = images * step_flops(config) / config.batch_size / ASSUMED_SPEED_SMALL
    evaluations = math.ceil(config.epochs / FULL.imagenette_epochs)
    return training + evaluations * EVALUATION_SECONDS


class ReportPart(NamedTuple):
    """A part of the report."""

    run: Callable[[Report], Iterator[Line]]
    full_seconds: Callable[[], float]  # that it takes at full size, by arithmetic


REPORT_PARTS = {
    "correctness": ReportPart(correctness_part, correctness_seconds),
    "inference": ReportPart(inference_part, inference_seconds),
    "step": ReportPart(step_part, step_seconds),
    "masking": ReportPart(masking_part, masking_seconds),
    "views": ReportPart(views_part, views_seconds),
    "imagenette": ReportPart(imagenette_part, imagenette_seconds),
}


def open_report(args: argparse.Namespace, setup: Setup) -> Report:
    """A new report, or that of the file. Raises UsageError if the file is of another kind."""
    size = TOY if setup.device.type == "cpu" else FULL
    path = Path(args.json or f"runs/gpu{'-toy' if size is TOY else ''}.json")
    check_writable(path, "--json")
    details = describe_machine(args, setup)
    content = {
        "what": f"bench.py gpu at {size.name} size: times in seconds, memory in MiB",
        "machine": details["machine"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit_here(),
        "command": "python bench.py gpu" + (" --data path/to/imagenette" if args.data else ""),
        "seeds": [0],
        "details": details,
        "seconds": {},  # that each finished part took
        "values": {},  # part -> title of a table -> its records
    }
    earlier = read_report(path, content) if path.exists() else {"seconds": {}, "values": {}}
    for name in earlier["seconds"]:
        content["seconds"][name] = earlier["seconds"][name]
        content["values"][name] = earlier["values"][name]
    deadline = time.monotonic() + 60 * args.minutes
    return Report(size, setup, args.data, path, content, earlier["values"], deadline)


def read_report(path: Path, content: dict) -> dict:
    """The content of a file to go on with, which must be like the new content."""
    try:
        earlier = json.loads(path.read_text())
        seen = {name: earlier[name] for name in ("what", "machine", "torch", "seconds", "values")}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is no report of bench.py gpu; give another --json.") from None
    for name in ("what", "machine", "torch"):
        if seen[name] != content[name]:
            raise UsageError(
                f"{path} is of {seen[name]!r}, not of {content[name]!r}; give another --json."
            )
    return earlier


def run_part(name: str, part: ReportPart, report: Report) -> None:
    """Run a part, writing down each line at once. An error ends the part, and not the report."""
    needed = EVALUATION_SECONDS if name == "imagenette" else part.full_seconds()  # it can stop
    if report.size is FULL and report.seconds_left() < needed:
        say(f"{name}: no time left; the same command goes on with it")
        return

    say(f"{name} ...")
    start = time.monotonic()
    tables = report.content["values"][name] = {}
    try:
        for title, record in part.run(report):
            tables.setdefault(title, []).append(record)
            report.save()
    except TimeIsOver:
        say(f"{name}: no time left; the same command goes on with it")
    except Exception as error:  # such as a kernel that this GPU lacks: the other parts can go on
        text = " ".join(str(error).split())
        report.errors[name] = f"{type(error).__name__}: {text}"
        say(f"{name}: {report.errors[name]}", sys.stderr)
    else:
        report.content["seconds"][name] = time.monotonic() - start
        report.save()
        say(f"{name}: {report.content['seconds'][name]:.0f} s")
    free_memory(report.device)


def print_report(report: Report) -> None:
    """All tables, then the content of the file."""
    for tables in report.content["values"].values():
        for title, records in tables.items():
            print(f"\n{title}\n")
            table = Table()
            for record in records:
                table.add(record)
    print(f"\n{report.path}:")
    print(json.dumps(report.content, default=str), flush=True)


def raise_if_wrong(report: Report) -> None:
    """Raise RuntimeError if a check of part 1 went wrong or a part ended with an error."""
    records = report.content["values"].get("correctness", {}).get("correctness", [])
    wrong = [record["check"] for record in records if record["verdict"].startswith("WRONG")]
    problems = [f"{name} ended with an error" for name in report.errors]
    if wrong:
        problems.append(f"{len(wrong)} of {len(records)} checks are WRONG, such as {wrong[0]!r}")
    if problems:
        raise RuntimeError("; ".join(problems))


def report_main(argv: list[str]) -> None:
    """All that needs a GPU, by one command: first it is checked that the GPU computes what the CPU
    computes, then times are measured.

    Six parts: correctness, forward passes, the training step, masking, views, and a run on
    Imagenette (--data). Each line of their tables is in a file as soon as it is known, and the same
    command goes on after the last part that is finished. Without a GPU the same parts run at toy
    size: that shows that the command works, and says nothing of a GPU.
    """
    args = report_parser().parse_args(argv)
    config = TrainConfig(device=args.device, threads=args.threads)
    set_threads(config.threads, config.hidden_size)
    setup = make_setup(args, start_alone(config.device))
    report = open_report(args, setup)
    details = report.content["details"].items()
    print(", ".join(f"{name} {cell_text(value)}" for name, value in details))
    if report.size is TOY:
        print("There is no GPU: toy sizes, which show that the command works, and nothing more.")
    print(f"At full size, in minutes ({ASSUMPTION}):")
    for name, part in REPORT_PARTS.items():
        print(f"  {name:<12}{part.full_seconds() / 60:5.1f}")

    for name, part in REPORT_PARTS.items():
        if name in report.content["seconds"]:
            say(f"{name}: done by an earlier call")
        elif name == "imagenette" and not report.data:
            say(f"{name}: left out; --data path/to/imagenette runs it")
        else:
            run_part(name, part, report)

    print_report(report)
    raise_if_wrong(report)


def report_parser() -> argparse.ArgumentParser:
    """The flags of the report."""
    parser = argparse.ArgumentParser(prog="bench.py gpu", description=report_main.__doc__)
    parser.add_argument(
        "--data",
        default="",
        metavar="FOLDER",
        help="Imagenette (train/CLASS/*, val/CLASS/*), for the part imagenette, which is left out "
        "without it",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="the report, to write or to go on with (default: runs/gpu.json)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=25,
        help="time for this call; what does not fit into it is for the next (default: %(default)g)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="intra-op threads; 0: as many as torch takes (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=GPU_REPEATS,
        help="how often each case is timed after the warm-up, training steps at most "
        f"{STEP_REPEATS} times (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.set_defaults(memory=False, cpu_time=False)  # which are of the suites
    return parser


# ---- Learning: python bench.py learning ----------------------------------------------------------
# One number, one clock: how many seconds of training until the representation is worth so much?

HELD_BACK = 5  # one in so many training images is not trained on: by these, recipes are chosen
ACCURACIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(eq=False)
class Subset(Dataset):
    """Some images of a data set, with numbers of their own."""

    images: Dataset
    members: list[int]  # their numbers there

    def __post_init__(self):
        self.number_here = {member: i for i, member in enumerate(self.members)}

    def __len__(self) -> int:
        return len(self.members)

    def __getitems__(self, indices: list[int]) -> Batch:
        batch = self.images.__getitems__([self.members[i] for i in indices])
        # What stands in for an unreadable file may be no member; it has no number here.
        return batch._replace(indices=[self.number_here.get(j, -1) for j in batch.indices])


def hold_back(data: Images) -> tuple[Images, Images]:
    """Take a fixed fifth of the training images away. -> the data set with that fifth in place of
    the validation images, to choose recipes by; and with the validation images, to report."""
    order = torch.randperm(len(data.train), generator=generator_for(0, CHOICE, 1))
    count = len(order) // HELD_BACK
    held = order[:count].sort().values
    rest = order[count:].sort().values

    train = Subset(data.train, rest.tolist())
    to_report = data._replace(train=train, train_labels=data.train_labels[rest])
    held_images = Subset(data.train, held.tolist())
    to_choose = to_report._replace(val=held_images, val_labels=data.train_labels[held])
    return to_choose, to_report


class Measured(NamedTuple):
    """What a recipe was worth at some time."""

    epoch: int
    seconds: float  # of training so far, views included
    accuracy: float  # k-NN, on the images held back


class Learner:
    """A training run that goes from epoch to epoch when it is told to, and counts the seconds.

    The seconds of evaluation and set-up do not count.
    """

    def __init__(self, config: TrainConfig, data: Images, setup: Setup):
        self.config = config
        self.data = data
        self.setup = setup
        self.model = build_model(config, Processes(0, 1, setup.device))
        self.optimizer = build_optimizer(self.model, config)
        self.steps_per_epoch = len(data.train) // config.batch_size
        self.epoch = 0
        self.seconds = 0.0
        self.measured: list[Measured] = []

    def share_done(self) -> float:
        return self.epoch / self.config.epochs

    def epoch_work(self) -> float:
        """As Case.work."""
        return float(self.steps_per_epoch * step_flops(self.config))

    def train_epoch(self) -> None:
        first = self.epoch * self.steps_per_epoch
        steps = range(first, first + self.steps_per_epoch)
        self.seconds += seconds_of(self.run_steps, steps, self.setup)
        self.epoch += 1

    def run_steps(self, steps: range) -> None:
        """The same steps as train() makes, with the same results."""
        config = self.config
        whole = slice(0, config.batch_size)
        orders = step_batches(config, len(self.data.train), steps, whole)
        batches = map(self.data.train.__getitems__, orders)
        inputs = step_inputs(batches, config, steps, whole, self.setup.device)
        for step, (views, _) in enumerate(inputs, steps.start):
            seed_drop_path(config.seed, step, 0)
            now = schedule_at(config, step, self.steps_per_epoch)
            train_step(self.model, self.optimizer, *views, now, config.clip_grad, config.precision)

    def evaluate(self) -> Measured:
        """k-NN on the images held back, which is noted down."""
        encoder = self.model.target_encoder
        accuracy = knn_accuracy(encoder, self.data, self.config, self.setup.device)
        self.measured.append(Measured(self.epoch, self.seconds, accuracy))
        return self.measured[-1]

    def seconds_to(self, accuracy: float) -> float | None:
        """Seconds of training after which an evaluation first gave this accuracy, or more."""
        for measured in self.measured:
            if measured.accuracy >= accuracy:
                return measured.seconds
        return None


class LearningReport:
    """Prints records as they come, and keeps all of them in a file."""

    def __init__(self, path: Path | None, about: dict):
        self.path = path
        self.content = {**about, "values": {}}
        self.table = Table()

    def add(self, title: str, record: dict) -> None:
        self.table.add(record)
        self.content["values"].setdefault(title, []).append(record)
        if self.path:
            write_file(self.path, json.dumps(self.content, indent=2).encode())

    def records(self, title: str) -> list[dict]:
        return self.content["values"].get(title, [])


def learn_in_turn(
    learners: dict[str, Learner], every: int, seed: int, report: LearningReport, progress: Progress
) -> None:
    """Train all of them to their ends, epoch by epoch, always the one that is furthest behind: what
    disturbs the machine then disturbs all alike. `every` so many epochs there is an evaluation."""
    for name, learner in learners.items():
        report.add("curves", curve_record(seed, name, learner.evaluate()))
    while True:
        unfinished = [name for name, learner in learners.items() if learner.share_done() < 1]
        if not unfinished:
            return
        name = min(unfinished, key=lambda name: learners[name].share_done())
        learner = learners[name]

        start = time.perf_counter()
        progress.show(f"seed {seed}, {name}, epoch {learner.epoch + 1} of {learner.config.epochs}")
        learner.train_epoch()
        if learner.epoch % every == 0 or learner.share_done() == 1:
            report.add("curves", curve_record(seed, name, learner.evaluate()))
        progress.work_left -= learner.epoch_work()
        progress.saw_run(learner.epoch_work(), time.perf_counter() - start)


def curve_record(seed: int, name: str, measured: Measured) -> dict:
    """One evaluation of one run, as a line of the table: recipe, epoch, CPU seconds, k-NN."""
    return {
        "seed": seed,
        "recipe": name,
        "epoch": measured.epoch,
        "seconds": measured.seconds,
        "k-NN": measured.accuracy,
    }


def seconds_records(
    learners: dict[str, Learner], accuracies: list[float], seed: int
) -> Iterator[dict]:
    """After how many seconds each recipe first reached each accuracy, and what A took over B; last
    the accuracy with which the last recipe ended."""
    *_, last_name = learners
    at_end = learners[last_name].measured[-1].accuracy
    wanted = [(f"{accuracy:g}", accuracy) for accuracy in accuracies]
    wanted.append((f"{last_name}'s end", at_end))
    for target, accuracy in wanted:
        record = {"seed": seed, "reaches": target, "k-NN": accuracy}
        times = {name: learner.seconds_to(accuracy) for name, learner in learners.items()}
        for name, seconds in times.items():
            record[f"{name}, s"] = seconds
        if len(times) == 2:
            a, b = times.values()
            record["A over B"] = a / b if a is not None and b else None
        yield record


def mean_records(records: list[dict], keys: tuple[str, ...]) -> Iterator[dict]:
    """For records that agree in `keys`: how many there are (one a seed), how many have all numbers,
    and mean and standard deviation, over those, of each number."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)

    for group_key, members in groups.items():
        complete = [member for member in members if None not in member.values()]
        result = dict(zip(keys, group_key, strict=True))
        result["seeds"] = f"{len(complete)} of {len(members)}"
        for name in members[0]:
            if name in keys or name == "seed":
                continue
            values = [member[name] for member in complete]
            result[name] = float(np.mean(values)) if values else None
            result[f"± {name}"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        yield result


def learning_main(argv: list[str]) -> None:
    """How many seconds of training a recipe takes until k-NN reaches given accuracies, on a fixed
    fifth of the training images that is held back, and not trained on. Validation images are looked
    at once, at the end of each run.

    Seconds are those of all threads of this process on a CPU, and the device's own on a GPU: of
    reading, views and steps, not of set-up and evaluation. Two recipes, A and B, are trained in
    turn, epoch by epoch. B is what --against and --set name=value say; all other flags, which are
    those of train_msn.py, are of both:

        python bench.py learning --recipe demo --set initializer_range=0.02 epochs=6 --seeds 0,1,2
    """
    recipe = first_look(argv, "--recipe") or recipe_for(first_look(argv, "--data") or "synthetic")
    args = learning_parser(recipe).parse_args(argv)
    configs = learning_configs(args, recipe, args.seeds[0])
    if args.json:
        check_writable(Path(args.json), "--json")
    device = start_alone(configs["A"].device)
    set_threads(configs["A"].threads, configs["A"].hidden_size)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    setup = Setup(device, torch.get_num_threads(), 0, False, clock)

    report = open_learning_report(args, argv, configs, setup)
    progress = None
    data_sets: dict[str, Images] = {}
    for seed in args.seeds:
        configs = learning_configs(args, recipe, seed)
        learners = {}
        for name, config in configs.items():
            config = replace(config, precision=choose_precision(config.precision, device))
            data = data_for(config, data_sets)
            learners[name] = prepare_learner(config, data, setup)
        if progress is None:
            works = [learner.epoch_work() * learner.config.epochs for learner in learners.values()]
            progress = Progress([], setup, len(args.seeds) * sum(works))

        learn_in_turn(learners, args.every, seed, report, progress)
        for record in seconds_records(learners, args.accuracies, seed):
            report.add("seconds", record)
        for name, learner in learners.items():
            report.add("ends", end_record(name, learner, seed, args.validation, data_sets))

    for record in mean_records(report.records("seconds"), ("reaches",)):
        report.add("seconds, means", record)
    for record in mean_records(report.records("ends"), ("recipe",)):
        report.add("ends, means", record)


def data_key(config: TrainConfig) -> str:
    """What decides on the images of a configuration."""
    seed = config.seed if config.data == "synthetic" else None
    return repr((config.data, config.data_dir, config.image_size, seed, config.picture_rules()))


def data_for(config: TrainConfig, data_sets: dict[str, Images]) -> Images:
    """The images of a configuration, opened once. Raises UsageError for what can't be measured."""
    key = data_key(config)
    if key not in data_sets:
        data_sets[key] = open_data(config)
    data = data_sets[key]
    if data.val is None:
        raise UsageError(f"{config.data} has no labels, so no k-NN: {data.why_no_labels}.")
    count = len(data.train) - len(data.train) // HELD_BACK
    if count < config.batch_size:
        raise UsageError(
            f"{count} training images, without those held back, are fewer than "
            f"batch_size={config.batch_size}; lower it."
        )
    return data


def prepare_learner(config: TrainConfig, data: Images, setup: Setup) -> Learner:
    """A learner at its start. What is slow only once is done before: to read and decode pictures,
    which the data set keeps, and a first step."""
    to_choose, _ = hold_back(data)
    every_image = [*range(len(to_choose.train))]
    embed_images(None, to_choose.train, every_image, config.patch_size, setup.device)
    Learner(config, to_choose, setup).run_steps(range(1))
    return Learner(config, to_choose, setup)


def end_record(
    name: str, learner: Learner, seed: int, validation: bool, data_sets: dict[str, Images]
) -> dict:
    """Where a run ended: with `validation`, with its accuracy on validation images, too."""
    end = learner.measured[-1]
    record = {"seed": seed, "recipe": name, "seconds": end.seconds, "held back": end.accuracy}
    if validation:
        _, to_report = hold_back(data_sets[data_key(learner.config)])
        encoder = learner.model.target_encoder
        device = learner.setup.device
        record["validation"] = knn_accuracy(encoder, to_report, learner.config, device)
    return record


def learning_configs(args: argparse.Namespace, recipe: str, seed: int) -> dict[str, TrainConfig]:
    """The recipes to train: A and, if flags name it, B."""
    given = with_tuples({name: x for name, x in vars(args).items() if name in ALL_SETTINGS})
    given = {**given, "seed": seed}
    configs = {"A": make_config({**given, "recipe": recipe})}
    if args.against or args.set:
        changes = dict(setting_of(text) for text in args.set)
        configs["B"] = make_config({**given, **changes, "recipe": args.against or recipe})
    return configs


def setting_of(text: str) -> tuple[str, Any]:
    """A field's name and its value, out of name=value. Raises UsageError."""
    name, _, value = text.partition("=")
    name = name.replace("-", "_")
    kinds = {setting.name: setting.type for setting in fields(TrainConfig)}
    if name not in kinds or name == "recipe" or name in LEARNING_REFUSES:
        raise UsageError(f"--set {text}: {name} is no setting of B; use name=value.")

    kind = kinds[name]
    try:
        if kind is bool:
            return name, {"yes": True, "no": False}[value]
        if kind is tuple:
            low, high = value.split(",")
            return name, (float(low), float(high))
        return name, kind(value)
    except (KeyError, ValueError):
        wanted = {bool: "yes or no", tuple: "two numbers with a comma"}.get(kind, kind.__name__)
        raise UsageError(f"--set {text}: {name} must be {wanted}.") from None


def open_learning_report(
    args: argparse.Namespace, argv: list[str], configs: dict[str, TrainConfig], setup: Setup
) -> LearningReport:
    """A report that says what is measured, how and where; it is printed, too."""
    details = describe_machine(argparse.Namespace(), setup)
    on_cpu = setup.device.type == "cpu"
    details["clock"] = "CPU seconds of all threads" if on_cpu else "seconds of the device"
    print(", ".join(f"{name} {cell_text(value)}" for name, value in details.items()), flush=True)

    of_machine = {"data", "data_dir", "output_dir", "seed"}  # paths have no place in results
    settings = {}
    for name, config in configs.items():
        values = asdict(config)
        settings[name] = {key: values[key] for key in values.keys() - of_machine}
        changes = " ".join(args.set) if name == "B" else ""
        print(f"{name}: recipe {config.recipe}, {config.epochs} epochs {changes}".rstrip())
    print()

    command = shlex.join(["python", "bench.py", "learning", *argv])
    for path in {configs["A"].data, args.json} - {"synthetic", "cifar10", None}:
        command = command.replace(path, "path/to/" + Path(path).name)
    about = {
        "what": f"bench.py learning: {details['clock']} until k-NN reaches an accuracy on a fifth "
        "of the training images, which is held back",
        "machine": details["machine"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit_here(),
        "command": command,
        "seeds": args.seeds,
        "details": details,
        "settings": settings,
    }
    return LearningReport(Path(args.json) if args.json else None, about)


READS_ITSELF = "pictures are read by the process itself, whose seconds are counted."
LEARNING_REFUSES = {
    "seed": "use --seeds 0,1,2.",
    "max_steps": "use --epochs.",
    "knn_every": "use --every.",
    "output_dir": "it writes no run; use --json FILE for the figures.",
    "resume": "it writes no run to go on with.",
    "checkpoint_every": "it writes no run.",
    "num_workers": READS_ITSELF,
    "batch_timeout": READS_ITSELF,
}


def learning_parser(recipe: str) -> argparse.ArgumentParser:
    """The flags of bench.py learning; the help shows the values of this recipe."""
    parser = argparse.ArgumentParser(
        prog="bench.py learning",
        usage="%(prog)s [--flag value ...]; more by --help",
        description=learning_main.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    defaults = {**recipe_settings(recipe), "recipe": recipe}
    add_flags(parser, TrainConfig, defaults, hidden=LEARNING_REFUSES)
    add_refusals(parser, "learning", LEARNING_REFUSES)
    parser.add_argument("--against", choices=RECIPES, help="the recipe B (default: that of A)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="what is different in B"
    )
    parser.add_argument(
        "--seeds", type=numbers_of(int), default=[0], metavar="N,N", help="(default: 0)"
    )
    parser.add_argument(
        "--accuracies",
        type=numbers_of(float),
        default=list(ACCURACIES),
        metavar="X,X",
        help="those to reach (default: 0.3 to 0.9; that with which B ends always is one of them)",
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="epochs between evaluations (default: 1)"
    )
    parser.add_argument(
        "--validation",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="look at validation images at the end; --no-validation while recipes are compared",
    )
    parser.add_argument("--json", metavar="FILE", help="write all of it to this file, too")
    return parser


def numbers_of(kind: type) -> Callable[[str], list]:
    """For argparse: numbers with commas between them."""

    def numbers(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    return numbers


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
    parser.set_defaults(compiler="inductor")


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


def add_loader_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the suite loader."""
    parser.add_argument(
        "--source-sizes",
        type=size_of_text,
        nargs="+",
        metavar="HEIGHTxWIDTH",
        default=[(375, 500), (768, 1024), (3000, 4000)],
        help="pixels of the JPEGs that are made and read (default: 375x500 768x1024 3000x4000)",
    )
    parser.add_argument(
        "--data",
        dest="pictures",
        metavar="FOLDER",
        help="read the pictures of this folder, in place of made ones",
    )
    parser.add_argument(
        "--num-workers",
        dest="workers",
        type=int,
        nargs="+",
        metavar="N",
        default=[0, 1, 2],
        help="how many processes decode, all on the same core (default: 0 1 2)",
    )
    parser.add_argument(
        "--gpu-images-per-second",
        type=float,
        default=0.0,
        metavar="X",
        help="what a GPU takes: images/s of bench.py train or of bench.py gpu there (default: what "
        f"is as much work as {H100_IMAGES_PER_SECOND} of small-16, which one H100 takes)",
    )
    parser.set_defaults(threads=1)


def size_of_text(text: str) -> tuple[int, int]:
    """Height and width in pixels, of a text such as 375x500."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is no size such as 375x500")
    return int(found[1]), int(found[2])


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
    "batch_timeout": NO_FILES,
    "cache_mb": NO_FILES,
    "output_dir": "it writes nothing but the table; use --json FILE for that.",
    "resume": NO_RUN,
    "changed_data": NO_RUN,
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
    "threads",
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
    "threads",
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

LOADER_SETTINGS = (MODEL_SETTINGS - {"device"}) | {  # they say how much a GPU has to compute
    "batch_size",
    "random_views",
    "focal_views",
    "focal_size",
    "mask_ratio",
    "head_hidden_size",
    "output_dim",
    "num_prototypes",
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
        add_source_size,
        VIEWS_SETTINGS,
        instead=NO_MODEL,
        refused={
            "attn": NO_MODEL,
            "anchor_view": "Pillow's side makes independent views only; use bench.py train.",
            "focal_mask": "Pillow's side makes small crops; use bench.py train.",
        },
        changes={"threads": 1},  # Pillow has no more
    ),
    "loader": Suite(
        loader_suite,
        add_loader_flags,
        LOADER_SETTINGS,
        instead="it reads pictures and makes no views; use bench.py views or train.",
        refused={
            "device": "it reads pictures on the CPU; use bench.py train for a device.",
            "source_size": "use --source-sizes.",
        },
        recipe="small-16",
        changes={"batch_size": 64},
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


def add_refusals(parser: argparse.ArgumentParser, suite: str, refusals: dict[str, str]) -> None:
    """Flags that a suite refuses (with _ for -), and what to use instead."""
    for setting, instead in refusals.items():
        flag = setting.replace("_", "-")
        parser.add_argument(
            f"--{flag}",
            f"--no-{flag}",
            action=RefusedFlag,
            suite=suite,
            instead=instead,
            default=argparse.SUPPRESS,
        )


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
        usage="%(prog)s ["
        + " | ".join((*SUITES, "gpu"))
        + "] [--flag value ...]; more by SUITE --help",
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
        add_refusals(subparser, name, suite.refusals())
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

    for name in ("focal_size", "focal_scale", "focal_mask"):
        if name in given and config.focal_views == 0:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} has no effect because there are no focal views; give --focal-views, too."
            )
    return replace(config, precision=choose_precision(config.precision, device))


def make_setup(args: argparse.Namespace, device: torch.device) -> Setup:
    """How to measure, by the common flags. Raises UsageError for numbers below 1."""
    counts = [args.repeats, *getattr(args, "batch_sizes", [])]
    if min(counts) < 1:
        raise UsageError(f"--repeats {args.repeats} and --batch-sizes must be at least 1.")
    clock = time.process_time if args.cpu_time else time.perf_counter
    return Setup(device, torch.get_num_threads(), args.repeats, args.memory, clock)


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
        median, low, high = (in_ms(value[name]) for name in ("median", "low", "high"))
        memory = f", {value['memory']:.0f}" if "memory" in value else ""
        return f"{median} [{low}, {high}]{memory}"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


def in_ms(seconds: float) -> str:
    """Milliseconds: four digits, and never fewer than all those before the point."""
    ms = 1000 * seconds
    return f"{ms:.4g}" if ms < 1000 else f"{ms:.0f}"


class Table:
    """Prints records as they come, as tables in Markdown: a new one where the columns change."""

    def __init__(self):
        self.titles: list[str] = []
        self.widths: list[int] = []

    def add(self, record: dict) -> None:
        titles = [column_title(name, value) for name, value in record.items()]
        cells = [cell_text(value) for value in record.values()]
        if titles != self.titles:
            if self.titles:
                say("")
            self.titles = titles
            self.widths = [max(map(len, pair)) for pair in zip(titles, cells, strict=True)]
            self.print_line(titles)
            self.print_line(["-" * width for width in self.widths])
        self.print_line(cells)

    def print_line(self, cells: list[str]) -> None:
        """The columns stand below one another, unless a cell is wider than title and first cell."""
        padded = []
        for cell, width in zip(cells, self.widths, strict=True):
            padded.append(cell.ljust(width))
        say("| " + " | ".join(padded) + " |")


def main(argv: list[str]) -> None:
    """The command line; without the name of a suite, inference."""
    if argv and argv[0] == "gpu":
        return report_main(argv[1:])
    if argv and argv[0] == "learning":
        return learning_main(argv[1:])
    if argv and not argv[0].startswith("-") and argv[0] not in SUITES:
        raise UsageError(
            f"bench.py has no suite {argv[0]}; use {', '.join(SUITES)}, learning or gpu."
        )
    if not argv or argv[0] not in (*SUITES, "-h", "--help"):
        argv = ["inference", *argv]
    preset = first_look(argv, "--preset")
    recipe = first_look(argv, "--recipe")
    args = make_parser(preset, recipe).parse_args(argv)

    if args.json:
        check_writable(Path(args.json), "--json")
    device = start_alone(getattr(args, "device", "auto"))
    config = training_config(args, device)
    set_threads(config.threads, config.hidden_size)
    setup = make_setup(args, device)
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
