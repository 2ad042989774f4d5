"""Benchmarks of the model, the pretraining step and the view generator, on your own machine, CPU or GPU.

    python bench.py                             # the documented table: eager against SDPA, float32, batches 1 2 4 8
    python bench.py inference --preset small-16 --threads 1 --against transformers

Every suite takes the flags of train_msn.py. What is compared runs interleaved (A B A B ...) after a warm-up, on inputs
that are new at each repeat. A cell is the median time in ms [quartiles], with --memory also the peak in MiB.
"""
import argparse
import json
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from train_msn import (
    VIEWS, Batch, Processes, TrainConfig, UsageError, Views, add_flags, build_model, choose_precision, crop_boxes, draw_views,
    generator_for, make_config, make_views, parameter_groups, run_program, schedule_at, start_processes, train_step)
from vitmsn import (
    PRESETS, ViTMSNConfig, ViTMSNForImageClassification, ViTMSNModel, normalize, num_patches_to_keep, write_file)

# ---- Measuring. A case is a tuple (make, *arguments): make gives two functions, of a new input and what to time ------
def seconds_of(run, x, args: argparse.Namespace) -> float:
    """Time of run(x) by the clock, until the device has done it."""
    synchronize = getattr(torch, args.device.type).synchronize  # on a CPU there is nothing to wait for
    synchronize()
    start = args.clock()
    run(x)
    synchronize()
    return args.clock() - start

def measure(cases: dict, args: argparse.Namespace, memory: bool) -> dict:
    """Seconds (median, quartiles) and MiB of each case. Interleaved: what disturbs the machine disturbs all alike."""
    results, seconds = {name: {} for name in cases}, {name: [] for name in cases}
    for name, case in cases.items() if memory else ():
        with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:  # killed, it says so
            results[name]["memory"] = pool.submit(peak_memory, args.threads, args.device, *case).result() / 2**20
    ready = {name: make(*arguments) for name, (make, *arguments) in cases.items()}
    for _ in range(2 + args.repeats):  # the first two warm up
        for name, (new_input, run) in ready.items():
            seconds[name].append(seconds_of(run, new_input(), args))
    for name, result in results.items():
        result["median"], result["low"], result["high"] = np.quantile(seconds[name][2:], (0.5, 0.25, 0.75)).tolist()
    return results

def peak_memory(threads: int, device: torch.device, make, *arguments) -> int:
    """In a process of its own: bytes that this case needs at most, allocated on CUDA, on a CPU resident."""
    torch.set_num_threads(threads)
    new_input, run = make(*arguments)
    for _ in range(2):
        run(new_input())
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage: its maximum includes the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

def matmul_peak(precision: str, args: argparse.Namespace) -> float:
    """The best FLOP/s of a large square matrix product."""
    side = 8192 if args.device.type == "cuda" else 1024
    a = torch.randn(side, side, device=args.device, dtype=getattr(torch, precision))
    return 2 * side**3 / min(seconds_of(a.mm, a, args) for _ in range(5))

def forward_flops(config: ViTMSNConfig, patches: int, class_token_only: bool = True) -> int:
    """Of one image through the encoder, a product and its sum as two. class_token_only: in the last layer."""
    d, n = config.hidden_size, 1 + patches
    queries = n * (config.num_hidden_layers - 1) + (1 if class_token_only else n)  # in all layers; the keys: n in each
    linear = queries * d * (2 * d + 2 * config.intermediate_size) + config.num_hidden_layers * n * 2 * d * d
    return 2 * (patches * config.num_channels * config.patch_size**2 * d + linear + 2 * queries * n * d)

def step_flops(config: TrainConfig) -> int:
    """Of one pretraining step: the target's forward pass, the anchors' and their backward pass, twice as much."""
    model, hidden, e = config.model_config(), config.head_hidden_size, config.output_dim
    whole, focal = ((size // config.patch_size) ** 2 for size in (config.image_size, config.focal_size))
    anchors = [num_patches_to_keep(whole, config.mask_ratio)] * config.random_views + [focal] * config.focal_views
    head = 2 * (config.hidden_size * hidden + hidden**2 + hidden * e + e * config.num_prototypes)
    pixels = 2 * 3 * config.patch_size**2 * config.hidden_size  # need no gradient: one product less for each patch
    per_image = sum(3 * (forward_flops(model, n) + head) - n * pixels for n in anchors)
    return config.batch_size * (per_image + forward_flops(model, whole) + head)

# ---- Suites: each returns the rows of its table ----------------------------------------------------------------------
def forward_case(library: str, config: ViTMSNConfig, attn: str, head: str, precision: str, batch: int, device):
    """A forward pass without autograd, of our model or that of transformers, with random weights."""
    config.attn_implementation = "eager" if attn == "eager" else "sdpa"
    if library == "ours":
        model = {"model": ViTMSNModel, "classifier": ViTMSNForImageClassification}[head](config)
    else:
        import transformers
        auto = {"model": transformers.AutoModel, "classifier": transformers.AutoModelForImageClassification}[head]
        theirs = transformers.ViTMSNConfig(**config.to_dict())
        model = auto.from_config(theirs, attn_implementation=config.attn_implementation)
    dtype = getattr(torch, precision)
    model = model.to(device, dtype).eval()
    if attn == "compiled":  # CUDA graphs spare the launches, which at batch 1 take most of the time
        model.compile(mode="reduce-overhead" if device.type == "cuda" else None)
    shape = batch, config.num_channels, config.image_size, config.image_size
    return lambda: torch.randn(shape, device=device).to(dtype), torch.inference_mode()(model)

def inference(args: argparse.Namespace) -> list[dict]:
    """A row for each precision and batch size, a column for each attention path and library."""
    config, rows = training_config(args, "base-16", focal_views=0).model_config(), []
    flops = forward_flops(config, config.grid_size**2, args.head == "classifier")
    for precision in args.precisions:
        peak = matmul_peak(precision, args)
        for batch in args.batch_sizes:
            row, rest = {"precision": precision, "batch": batch}, (args.head, precision, batch, args.device)
            results = measure({(attn, library): (forward_case, library, config, attn, *rest)
                               for attn in args.attn for library in ("ours", *args.against)}, args, args.memory)
            for attn in args.attn:
                ours = results[attn, "ours"]["median"]
                row |= {attn: results[attn, "ours"], f"{attn}, of peak": batch * flops / ours / peak}
                for other in args.against:
                    result = results[attn, other]
                    row |= {f"{attn}, {other}": result, f"{attn}, {other} / ours": result["median"] / ours}
            if {"eager", "sdpa"} <= set(args.attn):
                row["eager / sdpa"] = row["eager"]["median"] / row["sdpa"]["median"]
            rows.append(row)
    return rows

def views_case(config: TrainConfig, source: list[int], device: torch.device):
    """All views of a batch of decoded pictures of `source` = height, width."""
    sizes = torch.tensor([source] * config.batch_size)
    return (lambda: Batch(torch.randint(256, (len(sizes), *source, 3), dtype=torch.uint8).movedim(3, 1), sizes, [], []),
            lambda x: make_views(x._replace(images=x.images.to(device)), config, 0, slice(0, len(sizes))))

def step_parts(part: str, config: TrainConfig, attn: str, source: list[int], device: torch.device):
    """One part of a pretraining step from decoded pictures, or ("") all by name. attn: of the anchor encoder."""
    model, (pictures, views_of) = build_model(config, Processes(0, 1, device)), views_case(config, source, device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), fused=True)
    now = schedule_at(config, 1, 100)
    model.anchor_encoder.set_attn_implementation(attn or model.anchor_encoder.config.attn_implementation)

    def step(batch: Batch) -> None:
        train_step(model, optimizer, *views_of(batch), now, config.clip_grad, config.precision)

    def forward(views: Views) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            return model(*views, now.sharpening).loss

    case = {"step": (pictures, step), "views": (pictures, views_of), "forward": (lambda: views_of(pictures()), forward),
            "backward": (lambda: forward(views_of(pictures())), Tensor.backward),
            "optimizer": (lambda: None, lambda _: optimizer.step()),
            "EMA": (lambda: None, lambda _: model.update_target(now.momentum))}
    return case[part] if part else case

def train(args: argparse.Namespace) -> list[dict]:
    """A row for each attention path and each value of what varies: a mask ratio, a size, a number."""
    unmasked = {"focal_views": 0} if args.suite == "masking" else {}  # focal views would hide what masking spares
    base, rows = training_config(args, **unmasked), []
    peak = matmul_peak(base.precision, args)
    series = {"train": {"mask_ratio": [base.mask_ratio]}, "masking": {"mask_ratio": [i / 10 for i in range(10)]},
              "growth": {field: [max(getattr(base, field), 1) * factor for factor in (1, 2, 4)]
                         for field in ("image_size", "num_prototypes", "focal_views", "batch_size")}}[args.suite]
    for field, values in series.items():
        configs = {value: replace(base, **{field: value}) for value in values}
        cases = {(attn, value): (step_parts, "step", config, attn, args.source_size, args.device)
                 for attn in args.attn for value, config in configs.items()}
        for (attn, value), result in measure(cases, args, args.memory).items():
            flops, seconds = step_flops(configs[value]), result["median"]
            rows.append({"attention": attn or "as trained", field: value, "step": result, "GFLOP": flops / 1e9,
                         "images/s": configs[value].batch_size / seconds, "of peak": flops / seconds / peak})
            if args.suite == "growth" and value > values[0]:  # of what varies, for the time; a size's 2 is linear
                rows[-1]["power"] = np.log2(seconds / rows[-2]["step"]["median"])
            if args.suite == "train":
                parts = step_parts("", *cases[attn, value][2:])
                times = measure({part: (parts.get, part) for part in parts}, args, memory=False)
                rows[-1] |= {part: times[part]["median"] / times["step"]["median"] for part in list(parts)[1:]}
    return rows

def pillow_view(image: Image.Image, box: list[int], u: dict[str, list], config: TrainConfig, size: int) -> np.ndarray:
    """A view the usual way: one picture at a time, by Pillow, from the same random numbers. -> size size 3."""
    top, left, height, width = box
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    if u["flip"][0] < config.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for kind in np.argsort(u["order"]) if u["jitter"][0] < config.jitter else ():
        change = config.color_jitter * (2 * u["factors"][kind] - 1)
        if kind < 3:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
            image = enhance(image).enhance(1 + 0.8 * change)
        else:
            hue, *others = image.convert("HSV").split()
            turned = Image.fromarray(np.asarray(hue) + np.uint8(round(0.2 * 256 * change) % 256))
            image = Image.merge("HSV", (turned, *others)).convert("RGB")
    image = image.convert("L").convert("RGB") if u["grey"][0] < config.grey else image
    if u["blur"][0] < config.blur:
        image = image.filter(ImageFilter.GaussianBlur(float(np.interp(u["blur"][1], (0, 1), config.blur_sigma))))
    return np.asarray(image)

def pillow_case(config: TrainConfig, source: list[int], device: torch.device):
    """The same views as views_case's, by Pillow."""
    pictures, sizes = views_case(config, source, device)[0], torch.tensor([source] * config.batch_size)
    views = [(config.image_size, config.crop_scale)] * (1 + config.random_views)
    views += [(config.focal_size, config.focal_scale)] * config.focal_views

    def run(images: list[Image.Image]) -> None:
        draws = draw_views(len(images), len(views), generator_for(config.seed, VIEWS, 0))
        for v, (size, scale) in enumerate(views):
            boxes, u = crop_boxes(draws["crop"][v], sizes, scale).tolist(), {k: x[v].tolist() for k, x in draws.items()}
            pixels = np.stack([pillow_view(image, boxes[b], {name: rows[b] for name, rows in u.items()}, config, size)
                               for b, image in enumerate(images)])
            normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device).float() / 255)

    return lambda: [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pictures().images], run

def views(args: argparse.Namespace) -> list[dict]:
    """The view generator against Pillow, which computes one picture at a time on the CPU."""
    config = training_config(args)
    results = measure({name: (case, config, args.source_size, args.device)
                       for name, case in (("ours", views_case), ("Pillow", pillow_case))}, args, args.memory)
    return [{"source": "{}x{}".format(*args.source_size), "views": 1 + config.random_views + config.focal_views,
             **results, "Pillow / ours": results["Pillow"]["median"] / results["ours"]["median"]}]

# ---- The command line ------------------------------------------------------------------------------------------------
SUITES = {"inference": inference, "masking": train, "train": train, "growth": train, "views": views}

def training_config(args: argparse.Namespace, recipe: str = "demo", **defaults) -> TrainConfig:
    """Settings by train_msn.py's flags: a preset's or recipe's; a bare width changes small-16; else `recipe`."""
    given = {name: value for name, value in vars(args).items() if name in TrainConfig.__dataclass_fields__}
    recipe = args.preset or given.get("recipe") or ("small-16" if "hidden_size" in given else recipe)
    small_batch = {"batch_size": 8} if recipe in PRESETS else {}  # the published 1024 must be asked for
    config = make_config({**small_batch, **defaults, **given, "recipe": recipe, "device": args.device.type})
    args.source_size = args.source_size or [config.image_size * (1 if config.image_size < 64 else 2)] * 2
    return replace(config, precision=choose_precision(config.precision, args.device))

def make_parser() -> argparse.ArgumentParser:
    """One subcommand for each suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = parser.add_subparsers(dest="suite")
    for name, suite in SUITES.items():
        sub = suites.add_parser(name, description=suite.__doc__, conflict_handler="resolve")
        add_flags(sub, TrainConfig)
        flag = sub.add_argument
        flag("--preset", choices=PRESETS, help="a published shape and its pretraining")
        flag("--threads", type=int, default=1 if name == "views" else torch.get_num_threads())
        flag("--repeats", type=int, default=10)
        flag("--memory", action=argparse.BooleanOptionalAction, default=sys.platform == "linux" and suite is train)
        flag("--cpu-time", action="store_true", help="not the clock's: for one thread on a busy machine")
        flag("--source-size", type=int, nargs=2, help="height and width of the decoded pictures")
        flag("--json", help="file for machine, flags and rows; times in seconds, memory in MiB")
        if name != "inference":
            flag("--attn", nargs="+", choices=("eager", "sdpa"), default=[""])
            continue
        flag("--attn", nargs="+", choices=("eager", "sdpa", "compiled"), default=["eager", "sdpa"])
        dtypes = ("float32", "float16", "bfloat16")
        flag("--precision", dest="precisions", nargs="+", choices=dtypes, default=["float32"])
        flag("--batch-sizes", "--batch-size", type=int, nargs="+", default=[1, 2, 4, 8])
        flag("--head", choices=("model", "classifier"), default="model")
        flag("--against", nargs="+", choices=("transformers",), default=[])
    return parser

def show(value) -> str:
    """A cell of the table: a text, a number, or a Result of measure()."""
    if isinstance(value, dict):
        times = "{:.4g} [{:.4g}, {:.4g}]".format(*(1000 * value[name] for name in ("median", "low", "high")))
        return times + (f", {value['memory']:.0f} MiB" if "memory" in value else "")
    return (f"{value:.3g}" if value < 100 else f"{value:.0f}") if isinstance(value, float) else str(value)

def main(argv: list[str]) -> None:
    """The command line; without a suite, inference."""
    args = make_parser().parse_args(argv if argv and argv[0] in (*SUITES, "-h", "--help") else ["inference", *argv])
    if min(args.threads, args.repeats, *getattr(args, "batch_sizes", ())) < 1:
        raise UsageError(f"--threads {args.threads}, --repeats {args.repeats} and --batch-sizes must be at least 1.")
    torch.set_num_threads(args.threads)
    args.device = start_processes(TrainConfig(device=getattr(args, "device", "auto"))).device
    args.clock = time.process_time if args.cpu_time else time.perf_counter
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)|\Z", info.read_text())[1] if info.exists() else sys.platform
    machine = {"machine": torch.cuda.get_device_name() if args.device.type == "cuda" else cpu, "threads": args.threads,
               "clock": args.clock.__name__, "float32 matmul GFLOP/s": matmul_peak("float32", args) / 1e9,
               **{name: __import__(name).__version__ for name in ("torch", *getattr(args, "against", ()))}}
    print(", ".join(f"{name} {show(value)}" for name, value in machine.items()), end="\n\n", flush=True)
    rows = SUITES[args.suite](args)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, ["---"] * len(columns), *([show(row.get(name, "")) for name in columns] for row in rows)]
    print(*("| " + " | ".join(line) + " |" for line in cells), sep="\n")
    if args.json:
        content = {"suite": args.suite, "machine": machine, "flags": vars(args), "rows": rows}
        write_file(Path(args.json), json.dumps(content, indent=2, default=str).encode())

if __name__ == "__main__":
    sys.exit(run_program(main))
