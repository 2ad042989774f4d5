"""The number of processes changes nothing: same batch, views, masks, losses and weights."""

import csv
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import TINY, finish, make_pictures, run_here, start

import vitmsn
from train_msn import GlobalBatchNorm1d


@pytest.fixture(scope="module")
def one_process_group(tmp_path_factory):
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1),
        rank=0,
        world_size=1,
    )
    yield
    dist.destroy_process_group()


@settings(deadline=None)
@given(
    rows=st.integers(2, 20),
    mean=st.floats(-1e4, 1e4),
    deviation=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)
def test_the_batch_norm_of_many_processes_is_torchs(rows, mean, deviation, seed, one_process_group):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = GlobalBatchNorm1d(3).double(), torch.nn.BatchNorm1d(3).double()
    for _ in range(2):  # the second time from moved running statistics
        x = mean + deviation * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        torch.testing.assert_close(ours(a), theirs(b), rtol=1e-5, atol=1e-5)
        weight = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        for norm, leaf in ((ours, a), (theirs, b)):
            (norm(leaf) * weight).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, -333.3, 1e4])
def test_batch_norm_of_rows_that_are_all_alike_is_finite_in_float32(value, one_process_group):
    norm = GlobalBatchNorm1d(50)
    x = (
        (value * (1 + 0.1 * torch.rand(50, generator=torch.Generator().manual_seed(0))))
        .repeat(7, 1)
        .requires_grad_()
    )
    norm(x).sum().backward()
    assert torch.isfinite(norm(x)).all() and torch.isfinite(x.grad).all()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def flags(pictures, folder, *more):
    return (
        *TINY,
        "--data",
        pictures,
        "--output-dir",
        folder,
        "--precision",
        "float64",
        "--max-steps",
        "10",
        "--memax-weight",
        "2",
        "--knn-every",
        "0",
        *more,
    )


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert run_here(*flags(pictures, folder)) == 0
    return folder


def losses(folder):
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return torch.tensor(
        [
            [
                float(row[k])
                for k in (
                    "loss",
                    "cross_entropy",
                    "memax",
                    "entropy",
                    "prototypes_used",
                    "grad_norm",
                )
            ]
            for row in rows
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_many_processes_give_the_losses_and_weights_of_one(count, pictures, alone, tmp_path):
    status, printed = finish(start(*flags(pictures, tmp_path / "run"), processes=count))
    assert status == 0, printed
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone), rtol=1e-5, atol=1e-9)
    one, many = (
        vitmsn.read_tensors(folder / "checkpoint.pt") for folder in (alone, tmp_path / "run")
    )
    torch.testing.assert_close(many["prototypes"], one["prototypes"], rtol=0, atol=1e-5)
    for name in one["encoder"]:
        for part in ("encoder", "target_encoder"):
            torch.testing.assert_close(
                many[part][name], one[part][name], rtol=0, atol=1e-5, msg=f"{part} {name}"
            )


def test_a_batch_that_the_processes_cant_share_evenly_is_refused(pictures, tmp_path):
    status, printed = finish(
        start(*flags(pictures, tmp_path / "run", "--batch-size", "7"), processes=2)
    )
    assert status != 0 and "is no even share" in printed


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 3])
def test_a_rank_that_dies_ends_the_job_or_under_max_restarts_goes_on_from_the_checkpoint(
    restarts, pictures, tmp_path
):
    folder = tmp_path / "run"
    process = start(
        *flags(
            pictures,
            folder,
            "--resume",
            "--epochs",
            "100000",
            "--max-steps",
            "100",
            "--checkpoint-every",
            "1",
        ),
        processes=2,
        restarts=restarts,
    )
    while not (folder / "checkpoint.pt").exists():
        time.sleep(0.1)
        assert process.poll() is None
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    status, printed = finish(process)
    went_on = re.search("[1-9][0-9]* of 100 steps are done", printed) is not None
    assert (status == 0, went_on, (folder / "summary.json").exists()) == (restarts > 0,) * 3, (
        printed
    )
    steps = [
        line.split(",")[0]
        for line in (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()[1:]
    ]
    assert [int(step) for step in steps] == list(range(100 if restarts else len(steps)))


@pytest.mark.slow
def test_a_bad_file_is_named_once_by_all_processes_together(pictures, tmp_path):
    data = shutil.copytree(pictures, tmp_path / "data")
    bad = sorted(data.glob("train/*/*"))[3]
    bad.write_bytes(b"no picture")
    status, printed = finish(start(*flags(data, tmp_path / "run"), processes=2))
    assert status == 0 and printed.count(str(bad)) == 1, printed
