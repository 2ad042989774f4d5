"""Memory stays flat: over steps, and whatever the number of images in a folder."""

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT, TINY, as_flags, make_grey_pictures

# Runs train_msn.py and prints resident MiB after each step: the present one (Linux), else the
# highest so far.
MEASURED = """
import json, os, resource, sys
import train_msn
def resident():
    try:
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
seen, train_step = [], train_msn.train_step
def measured(*arguments, **options):
    result = train_step(*arguments, **options)
    seen.append(resident())
    return result
train_msn.train_step = measured
status = train_msn.run_program(train_msn.main)
print(json.dumps(seen))
sys.exit(status)
"""


def resident_memory(**settings) -> list[float]:
    """MiB after each step of a run."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *TINY, *as_flags(**settings)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def make_large_pictures(folder, count: int):
    """Pictures that take 117 KiB each when decoded."""
    return make_grey_pictures(folder, *(f"{i}.png" for i in range(count)), size=200)


@pytest.mark.slow
def test_two_thousand_steps_take_no_more_memory_than_a_hundred(tmp_path, capsys):
    """What a run holds does not grow with its steps."""
    seen = resident_memory(
        data=make_large_pictures(tmp_path / "data", 60),
        output_dir=tmp_path / "run",
        epochs=200,
        cache_mb=1,
        knn_every=0,
        checkpoint_every=200,
    )
    growth = max(seen[-100:]) - max(seen[:100])
    with capsys.disabled():
        print(
            f"{len(seen)} steps: {seen[99]:.1f} MiB resident after 100, "
            f"{seen[-1]:.1f} at the end: {growth:+.2f} MiB"
        )
    assert len(seen) == 2000 and growth < 3


@pytest.mark.slow
def test_ten_times_as_many_images_take_no_more_memory(tmp_path, capsys):
    """What a run holds does not grow with its data set beyond --cache-mb."""
    peaks = []
    for count in (120, 1200):  # 14 and 137 MiB when decoded
        seen = resident_memory(
            data=make_large_pictures(tmp_path / str(count), count),
            output_dir=tmp_path / f"run{count}",
            epochs=2400 // count,
            image_size=128,
            patch_size=32,
            focal_size=32,
            cache_mb=2,
        )
        peaks.append(max(seen))
    with capsys.disabled():
        print(f"120 images: {peaks[0]:.1f} MiB at most, 1,200 images: {peaks[1]:.1f} MiB")
    assert peaks[1] - peaks[0] < 10
