"""What all tests share: the import path, one Hypothesis profile, a fixed seed."""

import os
import sys
from pathlib import Path

import pretend_device
import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # so that `pytest` works in a fresh clone

# No deadline: the first call into torch takes longer than any. In CI the same examples every time.
settings.register_profile(
    "vitmsn",
    deadline=None,
    max_examples=20,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("vitmsn")

# The first backward pass of a process starts a thread for each device that torch knows by then.
if not pretend_device.MISSING:
    pretend_device.register()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
