"""Tiny pictures and pretraining runs for the tests, and what a finished run leaves behind."""

import csv
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_msn

ROOT = Path(__file__).resolve().parent.parent


def as_flags(**settings) -> tuple[str, ...]:
    """Settings as a command line has them: hidden_size=16 -> --hidden-size 16."""
    flags = []
    for name, value in settings.items():
        flags += ["--" + name.replace("_", "-"), str(value)]
    return tuple(flags)


# A run of 12 steps (make_pictures) that takes a second.
TINY = as_flags(
    batch_size=6,
    epochs=3,
    image_size=16,
    patch_size=4,
    focal_size=8,
    focal_views=2,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_hidden_size=16,
    output_dim=8,
    num_prototypes=5,
    initializer_range=0.02,  # from larger weights, rounding grows within ten steps
    warmup_epochs=1,
    device="cpu",
    threads=1,
    knn_every=1,
)


# -- pictures --------------------------------------------------------------------------------------


def save_picture(path: Path, picture, **options) -> Path:
    """Write an array or a PIL image to a file, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, **options)
    return path


def make_grey_pictures(folder: Path, *names: str, size: int = 6) -> Path:
    """Pictures of one grey each: 0, 10, 20, ..."""
    for i, name in enumerate(names):
        save_picture(folder / name, np.full((size, size), 10 * i % 256, np.uint8))
    return folder


def random_pictures(
    rng: np.random.Generator, count: int, low: int = 1, high: int = 60
) -> list[np.ndarray]:
    """Noise in colour (h w 3), each side from low to high - 1 pixels."""
    pictures = []
    for _ in range(count):
        height, width = rng.integers(low, high, 2)
        pictures.append(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return pictures


def as_batch(pictures: list[np.ndarray]) -> train_msn.Batch:
    """Pictures (h w 3) of any sizes as a data set gives them."""
    images = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
    return train_msn.pack(images, list(range(len(pictures))))


def write_png(path: Path, values: np.ndarray, transparent: tuple[int, ...] = ()) -> Path:
    """A PNG of 16-bit values h w c: grey and alpha, RGB or RGBA; transparent: a colour of RGB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", checksum)

    height, width, channels = values.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">LLBBBBB", width, height, 16, kind, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    colour = struct.pack(">HHH", *transparent) if transparent else b""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", colour) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )
    return path


def write_tiff(path: Path, *pages: np.ndarray, colours: str = "minisblack", **options) -> Path:
    """A TIFF of pages h w c, as the package tifffile writes it; tests that need it skip without.

    colours: "rgb" if the first three are; band_by_band: each band by itself.
    """
    tifffile = pytest.importorskip("tifffile")
    byteorder = options.pop("byteorder", "<")
    band_by_band = options.pop("band_by_band", False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path, byteorder=byteorder) as file:
        for values in pages:
            layout = "separate" if band_by_band else "contig"
            if values.shape[2] == 1:
                values = values[..., 0]
                layout = None
            elif band_by_band:
                values = np.moveaxis(values, 2, 0)
            file.write(values, photometric=colours, planarconfig=layout, metadata=None, **options)
    return path


def write_array(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)
    return path


def make_pictures(folder: Path, count: int = 24, classes: int = 2, size: int = 20) -> Path:
    """train/ and val/ of random colour pictures, names with spaces and letters beyond ASCII."""
    rng = np.random.default_rng(0)
    for part, number in (("train", count), ("val", max(count // 4, classes))):
        for i in range(number):
            tint = np.array([80, 40, 0]) * (i % classes)
            pixels = rng.integers(0, 150, (size, size + i % 5, 3)) + tint
            class_folder = folder / part / f"class {'αβγδ'[i % classes]}"
            save_picture(class_folder / f"пример {i}.png", pixels.astype(np.uint8))
    return folder


# -- runs ------------------------------------------------------------------------------------------


def run_here(*flags) -> int:
    """Run train_msn.py in this process -> exit status."""
    return train_msn.run_program(train_msn.main, [*map(str, flags)])


def start(
    *flags, processes: int = 0, restarts: int = 0, session: bool = False, **environment: str
) -> subprocess.Popen:
    """Start train_msn.py as a program, by torchrun if `processes` is given.

    session: in a process group of its own.
    """
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}", "--master-port=0"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return subprocess.Popen(
        [*command, str(ROOT / "train_msn.py"), *map(str, flags)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=session,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until the file is there, or the process has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str]:
    """Wait for it -> exit status, everything that it printed."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out + err


# -- results ---------------------------------------------------------------------------------------

# What may differ between a run that was interrupted and one that was not: of the checkpoint ...
FREE_IN_CHECKPOINT = (
    "/elapsed",
    "/config/data",
    "/config/output_dir",
    "/config/resume",
    "/config/num_workers",
    "/config/max_steps",
    "/config/checkpoint_every",
)
# ... and of metrics.csv.
FREE_IN_TABLES = ("images_per_second", "elapsed_seconds")


def flatten(value, name: str = "") -> dict:
    """Every leaf of a nested checkpoint by its path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    leaves = {}
    for key, inner in items:
        leaves |= flatten(inner, f"{name}/{key}")
    return leaves


def read_columns(path: Path) -> dict[str, list[str]]:
    """A table by its columns."""
    with open(path, encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return {name: [line[name] for line in lines] for name in (lines[0] if lines else ())}


def result(folder: Path) -> dict:
    """All of a run that must not depend on how often it was interrupted: weights, optimizer state,
    prototypes, k-NN and metrics."""
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    kept = {
        name: value
        for name, value in flatten(content).items()
        if not name.startswith(FREE_IN_CHECKPOINT)
    }
    for table in ("metrics.csv", "knn.csv"):
        for name, values in read_columns(folder / table).items():
            if name not in FREE_IN_TABLES:
                kept[f"{table}/{name}"] = values
    return kept


def assert_same_result(a: Path, b: Path) -> None:
    """Two runs have the same result, bit for bit."""
    first, second = result(a), result(b)
    assert first.keys() == second.keys()
    different = []
    for name, value in first.items():
        same = torch.equal if isinstance(value, torch.Tensor) else type(value).__eq__
        if not same(value, second[name]):
            different.append(name)
    assert not different, different[:10]
