"""Tiny pretraining runs for the tests: pictures, flags, and what a finished run leaves behind."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train_msn

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--batch-size",
    "6",
    "--epochs",
    "3",
    "--image-size",
    "16",
    "--patch-size",
    "4",
    "--focal-size",
    "8",
    "--focal-views",
    "2",
    "--hidden-size",
    "16",
    "--num-hidden-layers",
    "2",
    "--num-attention-heads",
    "2",
    "--head-hidden-size",
    "16",
    "--output-dim",
    "8",
    "--num-prototypes",
    "5",
    "--warmup-epochs",
    "1",
    "--device",
    "cpu",
    "--knn-every",
    "1",
)


def make_pictures(folder: Path, count: int = 24, classes: int = 2, size: int = 20) -> Path:
    """train/ and val/ of random colour pictures, whose names have spaces and letters beyond ASCII."""
    rng = np.random.default_rng(0)
    for part, number in (("train", count), ("val", max(count // 4, classes))):
        for i in range(number):
            path = folder / part / f"class {'αβγδ'[i % classes]}" / f"пример {i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            tint = np.array([80, 40, 0]) * (i % classes)
            pixels = rng.integers(0, 150, (size, size + i % 5, 3)) + tint
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def run_here(*flags: str) -> int:
    """Run train_msn.py in this process; signal handlers are put back. -> exit status."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train_msn.run_program(train_msn.main, [*map(str, flags)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(
    *flags: str, processes: int = 0, restarts: int = 0, session: bool = False, **environment: str
) -> subprocess.Popen:
    """Start train_msn.py as a program, by torchrun if `processes` is given, in a process group of its own (session)."""
    launcher = (
        [
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            f"--max-restarts={restarts}",
            "--master-port=0",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
        ]
        if processes
        else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train_msn.py"), *map(str, flags)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=session,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str]:
    """Wait for it -> exit status, everything that it printed."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out + err


def flatten(value, name: str = "") -> dict:
    """Every leaf of a nested checkpoint by its path."""
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in flatten(inner, f"{name}/{key}").items()
        }
    if isinstance(value, (list, tuple)):
        return {
            k: v for i, inner in enumerate(value) for k, v in flatten(inner, f"{name}/{i}").items()
        }
    return {name: value}


def result(folder: Path) -> dict:
    """All of a run that must not depend on how often it was interrupted: weights, optimizer state, prototypes, k-NN
    and metrics but for their two columns of time."""
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    kept = {
        k: v
        for k, v in flatten(content).items()
        if not k.startswith(
            (
                "/elapsed",
                "/config/output_dir",
                "/config/resume",
                "/config/num_workers",
                "/config/max_steps",
                "/config/checkpoint_every",
            )
        )
    }
    for name in ("metrics.csv", "knn.csv"):
        with open(folder / name, encoding="utf-8") as file:
            for i, row in enumerate(csv.DictReader(file)):
                kept |= {
                    f"{name}/{i}/{k}": v
                    for k, v in row.items()
                    if k not in ("images_per_second", "elapsed_seconds")
                }
    return kept


def assert_same_result(a: Path, b: Path) -> None:
    """Bit for bit."""
    first, second = result(a), result(b)
    assert first.keys() == second.keys()
    different = [
        k
        for k, v in first.items()
        if not (torch.equal(v, second[k]) if isinstance(v, torch.Tensor) else v == second[k])
    ]
    assert not different, different[:10]
