"""--threads: how many threads share an operation, in all three programs, and what depends on it."""

import json

from dataclasses import replace

import pytest
import torch
from common import tiny_backbone
from runs import TINY, make_pictures, result, run_here

import bench
import finetune
import train_msn
from train_msn import run_program


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    """What torch would take if nobody asked."""
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize(
    ("threads", "width", "expected"),
    [(0, 96, 1), (0, 191, 1), (0, 192, 2), (0, 384, 2), (3, 96, 3), (3, 384, 3), (1, 384, 1)],
)
def test_a_small_model_takes_one_thread_unless_told_otherwise(
    two_threads, threads, width, expected
):
    """0 is one thread below a width of 192, and what torch takes from there on."""
    train_msn.set_threads(threads, width)
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1: 1.0, 2: 0.6, 4: 0.3, 8: 0.2}, 8),  # free cores
        ({1: 1.0, 2: 0.6, 4: 0.5, 8: 0.1}, 2),  # four win too little, and eight are not tried
        ({1: 1.0, 2: 0.9}, 1),
        ({1: 1.0, 2: 9.0}, 1),  # busy ones
    ],
)
def test_twice_the_threads_are_taken_if_they_win_a_race(monkeypatch, seconds, expected):
    """1, 2, 4, ... run against each other, up to as many as torch would take."""
    torch.set_num_threads(11)
    monkeypatch.setattr(train_msn, "seconds_of_a_lap", lambda x, y, threads: seconds[threads])
    assert train_msn.quickest_threads(train_msn.make_config({})) == expected


def test_a_race_is_run_with_as_many_threads_as_it_says(two_threads):
    """It takes some time, and sets the number of threads."""
    tokens = torch.ones(4, 8)
    assert 0 < train_msn.seconds_of_a_lap(tokens, torch.ones(8, 4), 3) < train_msn.RACE_SECONDS
    assert torch.get_num_threads() == 3


def with_watched_threads(monkeypatch) -> dict[str, int]:
    """The number of threads that each part of training has, filled when it runs."""
    seen = {}

    def watch(name):
        real = getattr(train_msn, name)

        def watched(*arguments):
            if name not in seen:  # at the end of a run, the main thread makes views, too
                seen[name] = torch.get_num_threads()
            return real(*arguments)

        monkeypatch.setattr(train_msn, name, watched)

    watch("train_step")
    watch("make_views")
    return seen


def test_train_msn_takes_threads(two_threads, pictures, tmp_path, monkeypatch, capsys):
    """The flag holds for steps. The thread that makes the next step's views has no others."""
    seen = with_watched_threads(monkeypatch)
    flags = ["--output-dir", tmp_path / "run", "--max-steps", 3, "--threads", 3]
    assert run_here(*TINY, "--data", pictures, *flags) == 0
    assert seen == {"train_step": 3, "make_views": 1}
    assert "float32 on cpu, --threads 3" in capsys.readouterr().out


def test_a_resumed_run_takes_as_many_threads_as_it_started_with(
    two_threads, pictures, tmp_path, monkeypatch
):
    """What was quickest at the start is kept, so that the run ends with the same bits."""
    monkeypatch.setattr(train_msn, "quickest_threads", lambda config: 2)
    run = [*TINY, "--threads", 0, "--data", pictures, "--output-dir", tmp_path / "run"]
    assert run_here(*run, "--max-steps", 3) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["threads"] == 2

    monkeypatch.setattr(train_msn, "quickest_threads", lambda config: 1)
    seen = with_watched_threads(monkeypatch)
    assert run_here("--resume", "--output-dir", tmp_path / "run") == 0
    assert seen["train_step"] == 2


@pytest.mark.parametrize(("flags", "expected"), [([], 1), (["--threads", "3"], 3)])
def test_finetune_takes_threads(two_threads, pictures, tmp_path, flags, expected):
    """Using a model takes the flag's threads, and one for a small model without it."""
    tiny_backbone().save_pretrained(tmp_path / "model")
    output = tmp_path / "features.npz"
    command = ["embed", tmp_path / "model", pictures / "val", "--output", output, *flags]
    assert run_program(finetune.main, [*map(str, command), "--device", "cpu"]) == 0
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train --recipe demo", 1),
        ("train --preset small-16", 2),
        ("inference", 2),
        ("inference --threads 3", 3),
        ("views", 1),
    ],
)
def test_bench_takes_threads(two_threads, monkeypatch, command, expected):
    """A suite takes the threads that train_msn.py would take for that model; views one."""
    seen = []

    def run(config, args, setup):
        """A suite without cases."""
        seen.extend([setup.threads, torch.get_num_threads()])
        return iter(())

    name = command.split()[0]
    monkeypatch.setitem(bench.SUITES, name, replace(bench.SUITES[name], run=run))
    bench.main([*command.split(), "--device", "cpu"])
    assert seen == [expected, expected]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_depends_on_the_flag_and_on_nothing_else(pictures, tmp_path, threads):
    """The same value gives the same bits, however many threads torch would take by itself."""
    results = []
    for of_torch in (1, 2):
        torch.set_num_threads(of_torch)
        folder = tmp_path / f"run-{of_torch}"
        flags = ["--threads", threads, "--max-steps", 6]
        assert run_here(*TINY, "--data", pictures, "--output-dir", folder, *flags) == 0
        results.append(result(folder))

    first, second = results
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name
