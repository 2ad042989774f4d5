"""Signals, and workers that die or stall: what is done is kept, and nothing waits for ever.

Workers are the processes that decode images. How Python starts them, by fork, forkserver or spawn,
depends on its version and on the system.
"""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from runs import ROOT, TINY, finish, make_pictures, start, wait_for

import train_msn
import vitmsn


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def start_long(pictures, folder: Path, workers: int, how: str = "", *more) -> subprocess.Popen:
    """Start a run that does not end by itself, in a process group of its own, and wait until it has
    done a step. how: the start method of its workers."""
    environment = {}
    if how:
        # Python runs this before anything else, in all its processes.
        folder.parent.mkdir(parents=True, exist_ok=True)
        lines = f"import multiprocessing\nmultiprocessing.set_start_method({how!r}, force=True)\n"
        (folder.parent / "sitecustomize.py").write_text(lines)
        environment["PYTHONPATH"] = str(folder.parent)
    flags = (*TINY, "--data", pictures, "--output-dir", folder, "--epochs", "100000")
    flags += ("--knn-every", "0", "--num-workers", workers, *more)
    process = start(*flags, session=True, **environment)
    wait_for(folder / "views.png", process)
    return process


def group_of(process: subprocess.Popen) -> list[int]:
    """The processes of its group that live."""
    listed = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


def assert_all_end(process: subprocess.Popen) -> None:
    """Its helpers end soon after it: Python's own, when they notice that it is gone."""
    until = time.time() + 20
    while group_of(process) and time.time() < until:
        time.sleep(0.1)
    left = group_of(process)
    listed = subprocess.run(["ps", "-o", "pid,args", *map(str, left)], capture_output=True)
    assert not left, listed.stdout.decode()


def workers_of(process: subprocess.Popen) -> list[int]:
    """The processes that decode images for it, started by fork."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


def steps_kept(folder: Path) -> int:
    """How many steps the checkpoint has; as many as the table."""
    kept = vitmsn.read_tensors(folder / "checkpoint.pt")["step"]
    lines = train_msn.read_table(folder / "metrics.csv")
    assert [int(line["step"]) for line in lines] == list(range(kept))
    return kept


# -- signals ---------------------------------------------------------------------------------------

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CASES = list(product(SIGNALS, ("fork", "forkserver", "spawn"), (0, 2), ("program", "job")))
FEW = [(signal.SIGINT, "fork", 0, "program"), (signal.SIGTERM, "fork", 2, "job")]
FEW.append((signal.SIGINT, "spawn", 2, "job"))


@pytest.mark.parametrize(
    ("number", "how", "workers", "whom"),
    [case if case in FEW else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_a_signal_stops_a_run_after_the_step_with_a_checkpoint(
    number, how, workers, whom, pictures, tmp_path
):
    """SIGINT and SIGTERM, to the program alone or (Ctrl-C) to the workers of its job as well, leave
    a checkpoint of all steps, exit status 0, a line that says how to go on, and no process."""
    folder = tmp_path / "run"
    process = start_long(pictures, folder, workers, how)
    if whom == "program":
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    status, printed = finish(process)
    kept = steps_kept(folder)
    assert status == 0 and kept >= 1, printed
    assert f"stopped after step {kept}; go on by" in printed and "--resume" in printed, printed
    assert "Traceback" not in printed, printed
    assert_all_end(process)


@pytest.mark.parametrize(("first", "second"), list(product(SIGNALS, SIGNALS)))
def test_a_signal_that_comes_twice_at_once_is_one(first, second):
    """The first asks for a stop, and one right after it changes nothing. In the end the handlers
    are those of before."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with train_msn.StopSignals() as signals:
        assert not signals.received
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), second)
        assert signals.received
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_at_once_only_the_first_signal_raises():
    with pytest.raises(KeyboardInterrupt), train_msn.StopSignals(at_once=True):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # which may not cut short what finally does
            reached_the_end = True
    assert reached_the_end


AT_WORK = """
import hashlib, train_msn
with train_msn.StopSignals():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # for hours, outside of Python
"""


@pytest.mark.parametrize(("first", "second"), [SIGNALS, SIGNALS[::-1]])
def test_a_second_signal_ends_a_process_that_never_gets_to_the_first(first, second):
    """Where the main thread waits outside of Python, as for a GPU or another process, no handler is
    called; the second signal ends the process all the same."""
    command = [sys.executable, "-c", AT_WORK]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    process.send_signal(second)  # at once: this is still the first one
    time.sleep(2 * train_msn.SAME_SIGNAL)
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(timeout=60) == 128 + second


# -- workers that die or stall ---------------------------------------------------------------------


def assert_goes_on(pictures, folder: Path, kept: int) -> None:
    """The checkpoint is good: the same command goes on from it."""
    flags = (*TINY, "--data", pictures, "--output-dir", folder, "--epochs", "100000", "--resume")
    process = start(*flags, "--knn-every", "0", "--max-steps", kept + 1)
    status, printed = finish(process)
    assert status == 0, printed
    assert steps_kept(folder) == kept + 1


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGBUS, marks=pytest.mark.slow)]
)
def test_a_worker_that_dies_loses_no_step(number, pictures, tmp_path):
    """If a worker is killed (for want of memory, or of shared memory, which is SIGBUS), the run
    ends with all its steps kept and says which they are and what may help."""
    folder = tmp_path / "run"
    process = start_long(pictures, folder, 2)
    os.kill(workers_of(process)[0], number)
    status, printed = finish(process)
    kept = steps_kept(folder)
    assert status == 1 and kept >= 1, printed
    for part in (number.name, f"All {kept} steps", "--resume", "--num-workers 1", "shared memory"):
        assert part in printed, printed
    assert "Traceback" not in printed, printed
    assert_all_end(process)
    assert_goes_on(pictures, folder, kept)


def test_workers_that_stall_end_a_run_after_the_time_out(pictures, tmp_path):
    """If the workers do nothing for --batch-timeout seconds, the run ends with its steps kept."""
    folder = tmp_path / "run"
    process = start_long(pictures, folder, 2, "", "--batch-timeout", "2")
    for worker in workers_of(process):
        os.kill(worker, signal.SIGSTOP)
    status, printed = finish(process)
    kept = steps_kept(folder)
    assert status == 1 and kept >= 1, printed
    assert "no images came for 2 s" in printed and f"All {kept} steps" in printed, printed
    assert_all_end(process)


def test_a_signal_stops_a_run_whose_workers_stall(pictures, tmp_path):
    """One signal is enough, long before the time-out."""
    folder = tmp_path / "run"
    process = start_long(pictures, folder, 2)
    for worker in workers_of(process):
        os.kill(worker, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    status, printed = finish(process)
    assert status == 0 and f"stopped after step {steps_kept(folder)}" in printed, printed
    assert_all_end(process)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_pictures_that_vanish_lose_no_step(workers, tmp_path):
    """An error in reading, in a worker or not, is said as it is; the steps before it are kept."""
    pictures = make_pictures(tmp_path / "pictures")
    folder = tmp_path / "run"
    process = start_long(pictures, folder, workers, "", "--cache-mb", "0")
    os.rename(pictures, tmp_path / "gone")
    status, printed = finish(process)
    kept = steps_kept(folder)
    assert status == 1 and f"All {kept} steps" in printed, printed
    assert "--num-workers" not in printed and "Traceback" not in printed, printed


# -- in process ------------------------------------------------------------------------------------


def test_main_works_in_a_thread(pictures, tmp_path):
    """Where no signal handler can be had, a run is as any other; it goes on by --resume."""
    folder = tmp_path / "run"
    flags = [*map(str, (*TINY, "--data", pictures, "--output-dir", folder))]
    before = [signal.getsignal(number) for number in SIGNALS]
    for more in (["--max-steps", "2"], ["--resume"]):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(train_msn.main, [*flags, *more]).result()
    assert (folder / "summary.json").exists()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_handlers_are_put_back_whatever_happens(pictures, tmp_path, monkeypatch):
    """Even after an error in the loop, Ctrl-C means in a notebook what it meant before."""
    before = [signal.getsignal(number) for number in SIGNALS]
    monkeypatch.setattr(train_msn, "train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        flags = (*TINY, "--data", pictures, "--output-dir", tmp_path / "run")
        train_msn.main([*map(str, flags)])
    assert [signal.getsignal(number) for number in SIGNALS] == before
