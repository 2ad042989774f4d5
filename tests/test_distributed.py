"""The number of processes changes nothing: same batch, views, masks, losses and weights."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from runs import ROOT, TINY, finish, make_pictures, read_columns, run_here, start, wait_for
from torch.testing import assert_close

import vitmsn
from train_msn import (
    GlobalBatchNorm1d,
    Processes,
    all_processes,
    seed_drop_path,
)

# -- in a group of one process ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process_group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@given(
    batch=st.integers(2, 20),
    mean=st.floats(-1e4, 1e4),
    deviation=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)
def test_the_batch_norm_of_many_processes_is_torchs(
    batch, mean, deviation, seed, one_process_group
):
    """Outputs, gradients and running statistics are those of nn.BatchNorm1d in training."""
    generator = torch.Generator().manual_seed(seed)

    def randn():
        return torch.randn(batch, 3, generator=generator, dtype=torch.float64)

    ours, theirs = GlobalBatchNorm1d(3).double(), torch.nn.BatchNorm1d(3).double()
    for _ in range(2):  # the second time from moved running statistics
        x = mean + deviation * randn()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        assert_close(ours(a), theirs(b), rtol=1e-5, atol=1e-5)
        weight = randn()
        (ours(a) * weight).sum().backward()
        (theirs(b) * weight).sum().backward()
        assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, -333.3, 1e4])
def test_batch_norm_of_features_that_are_all_alike_is_finite_in_float32(value, one_process_group):
    """Where the variance is 0, output and gradient are finite all the same."""
    norm = GlobalBatchNorm1d(50)
    feature = value * (1 + 0.1 * torch.rand(50, generator=torch.Generator().manual_seed(0)))
    x = feature.repeat(7, 1).requires_grad_()
    out = norm(x)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()


def test_all_processes_hear_of_a_flag_and_have_the_same_mean(one_process_group):
    """A group of one process says what a process without a group says."""
    values = torch.tensor([1.5, -2.0])
    for reduce in ({}, {"reduce": all_processes}):
        processes = Processes(0, 1, torch.device("cpu"), **reduce)
        assert processes.any(True) is True and processes.any(False) is False
        assert processes.reduce(values, "mean").tolist() == [1.5, -2.0]


@given(st.integers(1, 8), st.integers(2, 9))
def test_the_shares_of_all_processes_are_the_batch(count, size):
    """Each image of the global batch belongs to one process, in order."""
    batch = list(range(count * size))
    joined = []
    for rank in range(count):
        joined += batch[Processes(rank, count, None).share_of(len(batch))]
    assert joined == batch


def test_stochastic_depth_draws_its_own_numbers_in_each_step_and_process():
    """The same seed, step and process give the same numbers; another of them gives others."""
    drawn = {}
    for case in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        seed_drop_path(*case)
        drawn[case] = torch.rand(3).tolist()
        seed_drop_path(*case)
        assert torch.rand(3).tolist() == drawn[case]
    assert len({tuple(numbers) for numbers in drawn.values()}) == 4


# -- runs of several processes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


EXACT = ("--precision", "float64", "--max-steps", "10", "--memax-weight", "2", "--knn-every", "0")


def flags(pictures, folder, *more):
    return (*TINY, "--data", pictures, "--output-dir", folder, *EXACT, *more)


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert run_here(*flags(pictures, folder)) == 0
    return folder


LOSSES = (
    *("loss", "cross_entropy", "memax", "entropy"),
    *("prototypes_used", "top_assignment", "grad_norm"),
)


def losses(folder) -> torch.Tensor:
    columns = read_columns(folder / "metrics.csv")
    return torch.tensor([[float(x) for x in columns[name]] for name in LOSSES]).double()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_many_processes_give_the_losses_and_weights_of_one(count, pictures, alone, tmp_path):
    """Losses, gradient norms, encoders and prototypes agree to rounding, step by step."""
    status, printed = finish(start(*flags(pictures, tmp_path / "run"), processes=count))
    assert status == 0, printed
    assert_close(losses(tmp_path / "run"), losses(alone), rtol=1e-5, atol=1e-9)
    one = vitmsn.read_tensors(alone / "checkpoint.pt")
    many = vitmsn.read_tensors(tmp_path / "run" / "checkpoint.pt")
    assert_close(many["prototypes"], one["prototypes"], rtol=0, atol=1e-5)
    for part in ("encoder", "target_encoder"):
        for name, expected in one[part].items():
            assert_close(many[part][name], expected, rtol=0, atol=1e-5, msg=f"{part} {name}")


def test_a_batch_that_the_processes_cant_share_evenly_is_refused(pictures, tmp_path):
    """Each process must get the same number of images, or the means would be wrong."""
    odd = flags(pictures, tmp_path / "run", "--batch-size", "7")
    status, printed = finish(start(*odd, processes=2))
    assert status != 0 and "is no even share" in printed


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(pictures, tmp_path):
    """All processes hear of it, stop after one step, and leave a checkpoint."""
    folder = tmp_path / "run"
    more = ("--epochs", "100000", "--max-steps", "100000")
    process = start(*flags(pictures, folder, *more), processes=2)
    wait_for(folder / "views.png", process)
    os.kill(workers_of(process)[-1], signal.SIGTERM)
    status, printed = finish(process)
    assert status == 0 and printed.count("stopped after step") == 1, printed
    assert vitmsn.read_tensors(folder / "checkpoint.pt")["step"] >= 1


def workers_of(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 3])
def test_a_rank_that_dies_ends_the_job_or_under_max_restarts_goes_on_from_the_checkpoint(
    restarts, pictures, tmp_path
):
    """A dead process never leaves the others waiting; restarted, the run loses no step."""
    folder = tmp_path / "run"
    lengths = ("--epochs", "100000", "--max-steps", "100", "--checkpoint-every", "1")
    process = start(*flags(pictures, folder, "--resume", *lengths), processes=2, restarts=restarts)
    wait_for(folder / "checkpoint.pt", process)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    status, printed = finish(process)
    went_on = re.search("[1-9][0-9]* of 100 steps are done", printed) is not None
    finished = (folder / "summary.json").exists()
    assert (status == 0, went_on, finished) == (restarts > 0,) * 3, printed
    steps = [int(step) for step in read_columns(folder / "metrics.csv")["step"]]
    assert steps == list(range(100 if restarts else len(steps)))


@pytest.mark.slow
def test_each_process_names_a_bad_file_once(pictures, tmp_path):
    """The process that would read a file names it, once: so at most as often as processes."""
    data = shutil.copytree(pictures, tmp_path / "data")
    bad = sorted(data.glob("train/*/*"))[3]
    bad.write_bytes(b"no picture")
    status, printed = finish(start(*flags(data, tmp_path / "run"), processes=2))
    assert (
        status == 0
        and 1 <= printed.count(f"skipped {bad}: no picture that Pillow knows (1 so far)") <= 2
    ), printed
    assert printed.count(str(bad)) == printed.count("(1 so far)"), printed


ENDING = """
import atexit, sys
import torch.distributed as dist
import train_msn
if sys.argv[1:]:
    store = dist.FileStore(sys.argv[1], 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
atexit.register(print, "cleared up")
print("all is printed", end=" ")
train_msn.end_program(7)
"""


def test_one_of_many_processes_ends_without_pythons_clearing_up(tmp_path):
    """Exit status and output are as ever; only in a process group nothing is cleared up."""
    for group, printed in (
        ([], "all is printed cleared up\n"),
        ([str(tmp_path / "a")], "all is printed "),
    ):
        command = [sys.executable, "-c", ENDING, *group]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
        assert (ended.returncode, ended.stdout) == (7, printed), ended.stderr
