"""bench.py: its counts are torch's, its suites hold what they promise, no flag is ignored."""

import itertools
import json
import os
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from common import randn, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import make_pictures
from torch.utils.flop_counter import FlopCounterMode

import bench
from train_msn import (
    Processes,
    TrainConfig,
    UsageError,
    build_model,
    make_config,
    pack,
    run_program,
)
from vitmsn import IMAGENET_STD, ViTMSNForImageClassification, ViTMSNModel

CPU = torch.device("cpu")
QUICK = ["--threads=1", "--repeats=2", "--device=cpu"]
TINY_MODEL = [
    "--hidden-size=24",
    "--num-hidden-layers=2",
    "--num-attention-heads=3",
    "--patch-size=8",
    "--image-size=32",
]
TINY_VIEWS = [
    "--patch-size=8",
    "--image-size=32",
    "--batch-size=4",
    "--focal-size=16",
    "--focal-views=2",
]
TINY_STEP = [*TINY_MODEL, *TINY_VIEWS, "--head-hidden-size=16", "--num-prototypes=8"]


def run(tmp_path, capsys, *argv: str) -> list[dict]:
    """Run bench.py quickly, compare what it prints with what it writes. -> the table's records"""
    path = tmp_path / "out.json"
    status = run_program(bench.main, [*argv, *QUICK, "--json", str(path)])
    printed = capsys.readouterr()
    assert status == 0, printed.err

    content = json.loads(path.read_text())
    first_line = printed.out.splitlines()[0]
    for name in ("machine", "threads", "torch"):
        assert str(content["machine"][name]) in first_line

    table_lines = [line for line in printed.out.splitlines() if line.startswith("| ")]
    num_tables = len([line for line in table_lines if line.startswith("| --")])
    names_and_dashes = 2
    assert len(table_lines) == names_and_dashes * num_tables + len(content["rows"])
    assert num_tables == (4 if argv[0] == "growth" else 1)
    return content["rows"]


def assert_timed(result: dict) -> None:
    assert 0 < result["low"] <= result["median"] <= result["high"]


# ---- Measuring


class FakeClock:
    """A clock that goes on only when it is told to."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


def fake_setup(**changes) -> bench.Setup:
    return replace(bench.Setup(CPU, 1, 1, False, FakeClock()), **changes)


def no_progress(setup: bench.Setup) -> bench.Progress:
    return bench.Progress([], setup)


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=9))
def test_only_runs_after_the_warm_up_are_timed_and_never_the_making_of_their_input(durations):
    """The result is the quartiles of run's durations, without the warm-up and the inputs."""
    setup = fake_setup(repeats=len(durations))
    all_durations = iter([1000.0] * bench.WARM_UPS + durations)

    def new_input() -> float:
        setup.clock.advance(10_000)
        return next(all_durations)

    timed = {"one": bench.Timed(new_input, setup.clock.advance)}
    result = bench.time_in_turn(timed, {"one": 1.0}, setup, no_progress(setup))["one"]
    expected = torch.tensor(durations, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    assert [result["low"], result["median"], result["high"]] == pytest.approx(expected.tolist())


def test_the_cases_run_in_turn():
    """What is compared runs A B A B ..., each time on a new input."""
    events = []
    timed = {}
    for name in ("A", "B"):
        inputs = itertools.count()
        timed[name] = bench.Timed(
            lambda name=name, inputs=inputs: (name, next(inputs)), events.append
        )
    setup = fake_setup(repeats=2)
    bench.time_in_turn(timed, {"A": 1.0, "B": 1.0}, setup, no_progress(setup))
    assert events == [(name, i) for i in range(bench.WARM_UPS + 2) for name in ("A", "B")]


@dataclass(frozen=True)
class LargeCase(bench.Case):
    """Touches so many MiB when it runs."""

    mebibytes: int

    def prepare(self) -> bench.Timed:
        return bench.Timed(lambda: self.mebibytes * 2**20, bytearray)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_run():
    """A case that touches 300 MiB more than another needs 300 MiB more, and not this process's."""
    setup = fake_setup(memory=True)
    results = bench.measure({"small": LargeCase(1), "large": LargeCase(301)}, setup)
    difference = results["large"]["memory"] - results["small"]["memory"]
    assert difference == pytest.approx(300, rel=0.01)


class KilledCase(bench.Case):
    """Ends its own process, as the system does when memory runs out."""

    def prepare(self) -> bench.Timed:
        return bench.Timed(lambda: signal.SIGKILL, lambda kill: os.kill(os.getpid(), kill))


def test_a_case_that_the_system_kills_is_an_error_not_a_wait():
    with pytest.raises(BrokenProcessPool):
        bench.measure({"too large": KilledCase()}, fake_setup(memory=True))


# ---- What is said while it measures


class SlowCase(bench.Case):
    """Sleeps a hundredth of a second for each unit of its work."""

    def __init__(self, units: float):
        self.units = units

    def prepare(self) -> bench.Timed:
        return bench.Timed(lambda: 0.01 * self.units, time.sleep)

    def work(self) -> float:
        return self.units


def test_the_first_run_tells_how_long_all_of_it_will_take():
    """Time left is the work left at the speed so far, and 0 at the end, over all groups."""
    setup = fake_setup(repeats=3)
    groups = [{"short": SlowCase(1), "long": SlowCase(2)}, {"longer": SlowCase(4)}]
    progress = bench.Progress(groups, setup)
    runs_of_each = bench.WARM_UPS + 3
    progress.saw_run(work=2, seconds=10)
    assert progress.time_left() == runs_of_each * (1 + 2 + 4) * 10 / 2

    for group in groups:
        bench.measure(group, setup, progress)
    assert progress.time_left() == pytest.approx(0)
    assert progress.group == 2


def test_memory_that_is_yet_to_be_measured_counts_as_long_as_the_last_time():
    """Each case takes a process of its own, which takes longer to start than to run."""
    cases = {name: SlowCase(1) for name in "abc"}
    progress = bench.Progress([cases], fake_setup(memory=True, repeats=1))
    progress.saw_run(work=1, seconds=1)
    progress.memory_left = 2
    progress.memory_seconds = 5
    assert progress.time_left() == 3 * (bench.WARM_UPS + 1) + 2 * 5


def test_without_a_terminal_only_the_whole_time_is_said(capsys):
    """A file gets one line on how long it takes, and no line that is written over."""
    bench.measure({("eager", 3): SlowCase(0.1)}, fake_setup(repeats=2))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "this takes about 0:00:00 (h:mm:ss)\n"


def test_on_a_terminal_case_repeat_and_time_left_stand_in_one_line(monkeypatch, capsys):
    """The line names the part, the repeat, the case and the time left, and is written over."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    setup = fake_setup(repeats=2)
    groups = [{("eager", 3): SlowCase(0.1), ("sdpa", 3): SlowCase(0.1)}] * 2
    bench.measure(groups[0], setup, bench.Progress(groups, setup))

    first, *others = capsys.readouterr().err.split("\r\033[K")[1:]
    assert first == "part 1 of 2, warm-up 1 of 2, case 1 of 2: eager, 3"
    assert others[0].startswith("this takes about 0:00:0") and others[0].endswith("\n")
    assert others[-1] == ("part 1 of 2, repeat 2 of 2, case 2 of 2: sdpa, 3; about 0:00:00 left")
    assert not any("\n" in text for text in others[1:])
    assert max(map(len, others)) < 80


def test_a_line_of_the_table_is_printed_as_soon_as_it_is_known(monkeypatch, capsys):
    """When a line is measured, those before it stand there already."""
    seen = []

    def measure_and_look(cases, *_):
        seen.append(capsys.readouterr().out.count("| float32"))
        return {name: {"median": 1.0, "low": 1.0, "high": 1.0} for name in cases}

    monkeypatch.setattr(bench, "measure", measure_and_look)
    assert run_program(bench.main, ["inference", *TINY_MODEL, "--batch-sizes", "1", "2", "3"]) == 0
    assert seen == [0, 1, 1]  # of what was printed since the last look


def test_the_titles_of_columns_have_units(capsys):
    """Times are in ms, memory in MiB, sizes in pixels or images."""
    table = bench.Table()
    time_and_memory = {"median": 1.0, "low": 0.5, "high": 2.0, "memory": 99.7}
    table.add({"image_size": 32, "step": time_and_memory, "power": None})
    table.add({"image_size": 64, "step": time_and_memory, "power": 1.5})
    table.add({"batch_size": 8, "step": {"median": 1.0, "low": 0.5, "high": 2.0}})
    assert capsys.readouterr().out.splitlines() == [
        "| image_size, pixels | step, ms [quartiles], MiB | power |",
        "| ------------------ | ------------------------- | ----- |",
        "| 32                 | 1000 [500, 2000], 100     |       |",
        "| 64                 | 1000 [500, 2000], 100     | 1.5   |",
        "",
        "| batch_size, images | step, ms [quartiles] |",
        "| ------------------ | -------------------- |",
        "| 8                  | 1000 [500, 2000]     |",
    ]


# ---- Operations


def test_matmul_peak_counts_a_multiply_add_as_two():
    """FLOP/s are those that torch counts, by the seconds of the fastest of the products."""
    setup = fake_setup()
    ticks = itertools.count()
    slow_then_fast = replace(setup, clock=lambda: float(next(ticks)))  # each product: one second
    with FlopCounterMode(display=False) as counter:
        speed = bench.matmul_peak("float32", slow_then_fast)
    assert speed == counter.get_total_flops() / 5


@pytest.mark.parametrize("model_class", [ViTMSNModel, ViTMSNForImageClassification])
def test_forward_flops_are_those_torch_counts(model_class):
    """A forward pass costs exactly the FLOPs that torch counts.

    The backbone computes all tokens in its last layer, the classifier the class token only.
    """
    config = tiny_config(attn_implementation="eager", num_labels=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model_class(config)(randn(3, 3, 32, 32))
    class_token_only = model_class is ViTMSNForImageClassification
    assert counter.get_total_flops() == 3 * bench.forward_flops(config, 16, class_token_only)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"random_views": 2, "focal_views": 3, "mask_ratio": 0.5},
        {"focal_views": 0},
        {"focal_views": 2, "focal_mask": True},
        {"random_views": 0, "head_hidden_size": 40, "output_dim": 24, "num_prototypes": 7},
    ],
)
def test_step_flops_are_those_torch_counts(changes):
    """A step's forward and backward passes cost exactly the FLOPs that torch counts."""
    config = make_config({"batch_size": 4, "precision": "float32", **changes})
    model = build_model(config, Processes(0, 1, CPU))
    for encoder in (model.anchor_encoder, model.target_encoder):
        encoder.set_attn_implementation("eager")  # of the fused kernel torch counts nothing
    new_batch, views_of = bench.ViewsCase(config, [32, 32], CPU).prepare()
    views = views_of(new_batch())

    with FlopCounterMode(display=False) as counter:
        model(*views).loss.backward()
    assert counter.get_total_flops() == bench.step_flops(config)


# ---- Suites


def test_without_a_suite_it_prints_the_documented_table(tmp_path, capsys):
    records = run(tmp_path, capsys, *TINY_MODEL)
    assert [record["precision"] for record in records] == ["float32"] * 4
    assert [record["batch"] for record in records] == [1, 2, 4, 8]
    for record in records:
        assert_timed(record["eager"])
        assert_timed(record["sdpa"])
        ratio = record["eager"]["median"] / record["sdpa"]["median"]
        assert record["eager / sdpa"] == ratio
        assert record["sdpa, of peak"] > 0


def test_batch_size_means_batch_sizes_to_inference(tmp_path, capsys):
    records = run(tmp_path, capsys, "inference", *TINY_MODEL, "--batch-size", "3", "--attn", "sdpa")
    assert [record["batch"] for record in records] == [3]


def test_the_share_of_the_peak_is_the_speed_over_that_of_a_matrix_product():
    """Of peak = batch x FLOPs of an image / seconds / peak; a ratio is theirs over ours."""
    case = bench.ForwardCase("ours", tiny_config(), "sdpa", "classifier", "float32", 3, CPU)
    cases = {("sdpa", "ours"): case, ("sdpa", "other"): replace(case, library="other")}
    results = {("sdpa", "ours"): {"median": 0.5}, ("sdpa", "other"): {"median": 2.0}}
    columns = bench.inference_columns(results, cases, peak=1e9)

    flops = 3 * bench.forward_flops(tiny_config(), 16, class_token_only=True)
    assert columns["sdpa, of peak"] == pytest.approx(flops / 0.5 / 1e9)
    assert columns["sdpa, other / ours"] == 4


def test_inference_is_set_beside_transformers_in_the_same_run(tmp_path, capsys):
    pytest.importorskip("transformers")
    flags = "--against transformers --attn sdpa --batch-sizes 2 --head classifier"
    precisions = ("--precision", "float32", "bfloat16")
    records = run(tmp_path, capsys, "inference", *TINY_MODEL, *flags.split(), *precisions)
    assert [record["precision"] for record in records] == ["float32", "bfloat16"]
    for record in records:
        ratio = record["sdpa, transformers"]["median"] / record["sdpa"]["median"]
        assert record["sdpa, transformers / ours"] == ratio


def test_train_shows_the_whole_step_its_memory_and_its_parts(tmp_path, capsys):
    flags = ("--attn", "eager", "--mask-ratio=0.5", "--precision=float32")
    (record,) = run(tmp_path, capsys, "train", *TINY_STEP, *flags)
    assert_timed(record["step"])
    assert record["attention"] == "eager"
    assert record["mask_ratio"] == 0.5
    assert record["of peak"] > 0
    assert record["step"]["memory"] > 50
    assert record["images/s"] == 4 / record["step"]["median"]
    for part in ("views", "forward", "backward", "optimizer", "EMA"):
        assert 0 < record[part] < 1


def test_a_step_s_share_of_the_peak_is_its_speed_over_that_of_a_matrix_product():
    """Of peak = FLOPs of the step / seconds / peak."""
    config = make_config({})
    args = SimpleNamespace(attn=["sdpa"], source_size=[32, 32])
    cases = bench.step_cases([config], "mask_ratio", args, fake_setup())
    results = {name: {"median": 0.5} for name in cases}
    (record,) = bench.step_records(results, cases, "mask_ratio", 1e9)
    assert record["of peak"] == pytest.approx(bench.step_flops(config) / 0.5 / 1e9)
    assert record["GFLOP"] == pytest.approx(bench.step_flops(config) / 1e9)


def test_a_part_s_share_is_its_time_over_that_of_the_step(tmp_path, capsys, monkeypatch):
    """A part that takes a second of a step of four has the share 1/4."""

    def made_up_times(timed: dict, *_) -> dict:
        return {name: {"median": 4.0 if name == "step" else 1.0} for name in timed}

    times = {"median": 4.0, "low": 4.0, "high": 4.0}
    monkeypatch.setattr(bench, "measure", lambda cases, *_: dict.fromkeys(cases, times))
    monkeypatch.setattr(bench, "time_in_turn", made_up_times)
    (record,) = run(tmp_path, capsys, "train", *TINY_STEP)
    for part in ("views", "forward", "backward", "optimizer", "EMA"):
        assert record[part] == 1 / 4


def test_each_part_of_a_step_does_its_work(monkeypatch):
    """Backward makes gradients, optimizer moves the anchor encoder, EMA the target encoder."""
    config = make_config({"batch_size": 4, "precision": "float32"})
    model = build_model(config, Processes(0, 1, CPU))
    monkeypatch.setattr(bench, "build_model", lambda *_: model)
    parts = bench.step_parts(config, "sdpa", [32, 32], CPU)
    anchor = model.anchor_encoder.patch_embed.weight
    target = model.target_encoder.patch_embed.weight

    def run_part(name: str) -> tuple[bool, bool, bool]:
        """Are there gradients now? Did the anchor encoder move, did the target encoder?"""
        before = anchor.detach().clone(), target.detach().clone()
        new_input, part = parts[name]
        part(new_input())
        moved = [
            not torch.equal(old, now) for old, now in zip(before, (anchor, target), strict=True)
        ]
        return anchor.grad is not None, *moved

    assert run_part("views") == (False, False, False)
    assert run_part("forward") == (False, False, False)
    assert run_part("backward") == (True, False, False)
    assert run_part("optimizer") == (True, True, False)
    assert run_part("EMA") == (True, False, True)
    assert run_part("step") == (True, True, True)


def test_masking_pays_only_for_the_patches_to_keep(tmp_path, capsys):
    """The higher the mask ratio, the fewer the operations of a step."""
    records = run(tmp_path, capsys, "masking", *TINY_STEP, "--no-memory")
    assert [record["mask_ratio"] for record in records] == [i / 10 for i in range(10)]
    work = [record["GFLOP"] for record in records]
    assert work == sorted(work, reverse=True)
    assert work[0] > work[-1]


def test_growth_doubles_one_setting_at_a_time(tmp_path, capsys):
    """Each setting is doubled twice; power is the exponent by which the step's time follows."""
    records = run(tmp_path, capsys, "growth", *TINY_STEP, "--no-memory", "--attn", "eager", "sdpa")
    starts = {"image_size": 32, "num_prototypes": 8, "focal_views": 2, "batch_size": 4}
    expected = []
    for name, start in starts.items():
        for attention in ("eager", "sdpa"):
            expected += [(attention, name, start * factor) for factor in (1, 2, 4)]

    varied = []
    for record in records:
        (name,) = starts.keys() & record.keys()
        varied.append((record["attention"], name, record[name]))
    assert varied == expected

    assert [record["power"] is None for record in records] == [True, False, False] * 8
    for before, record in itertools.pairwise(records):
        seconds = record["step"]["median"]
        assert record["images/s"] == pytest.approx(record.get("batch_size", 4) / seconds)
        if record["power"] is not None:
            assert 2 ** record["power"] == pytest.approx(seconds / before["step"]["median"])


def test_our_views_are_set_beside_those_of_pillow(tmp_path, capsys):
    (record,) = run(tmp_path, capsys, "views", *TINY_VIEWS, "--source-size", "40", "50")
    assert_timed(record["ours"])
    assert_timed(record["Pillow"])
    assert record["views"] == 4
    assert record["source"] == "40x50"
    assert record["Pillow / ours"] == record["Pillow"]["median"] / record["ours"]["median"]


NO_COLOUR_CHANGES = {"color_jitter": 0.0, "grey": 0.0, "blur": 0.0}


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, 1.0),
        ({"color_jitter": 1.0, "jitter": 1.0}, 2.0),
        ({"color_jitter": 1.0, "jitter": 0.5}, 2.0),
        ({"grey": 0.5}, 1.0),
        ({"blur": 0.5, "blur_sigma": (0.5, 3.0)}, 1.0),
    ],
)
def test_pillow_makes_the_views_that_we_make(changes, limit):
    """From the same pictures and random numbers, Pillow's views are ours to a grey level or two."""
    config = make_config({"batch_size": 16, **NO_COLOUR_CHANGES, **changes})
    # Smooth pictures: how two libraries treat noise of a pixel's size is not what is compared.
    coarse = torch.randint(256, (16, 3, 4, 5)).float()
    images = F.interpolate(coarse, (40, 50), mode="bilinear").byte()
    _, our_views_of = bench.ViewsCase(config, [40, 50], CPU).prepare()
    _, pillow_views_of = bench.PillowCase(config, [40, 50], CPU).prepare()

    ours = our_views_of(pack(list(images), []))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pillow = pillow_views_of(pictures)

    grey_level = 1 / 255 / torch.tensor(IMAGENET_STD).mean()
    for our_view, pillow_view in zip([ours.target_view, *ours.anchor_views], pillow, strict=True):
        assert our_view.shape == pillow_view.shape
        assert (our_view - pillow_view).abs().mean() < limit * grey_level


# ---- Suite loader


def run_loader(path: Path, *argv: str) -> list[dict]:
    argv = ["loader", "--threads=1", "--repeats=2", "--json", str(path), *argv]
    assert run_program(bench.main, argv) == 0
    return json.loads(path.read_text())["rows"]


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what processes compute")


@ON_LINUX
def test_loader_reads_pictures_of_each_size_by_each_number_of_workers(tmp_path, capsys):
    """The cores that a GPU needs are its images/s over those of a core."""
    cores = os.sched_getaffinity(0)
    rows = run_loader(
        tmp_path / "a.json",
        *("--source-sizes", "24x32", "48x64"),
        *("--num-workers", "0", "1"),
        *("--batch-size", "4", "--gpu-images-per-second", "1000"),
    )
    cases = [(row["source"], row["workers"]) for row in rows]
    assert cases == [("24x32", 0), ("24x32", 1), ("48x64", 0), ("48x64", 1)]
    for row in rows:
        assert row["images/s"] == pytest.approx(1 / row["one image"]["median"])
        assert row["cores a GPU"] == pytest.approx(1000 / row["images/s"])
    assert os.sched_getaffinity(0) == cores
    assert "DataLoader" not in capsys.readouterr().err


@ON_LINUX
def test_loader_takes_a_folder_of_pictures_and_by_default_the_speed_of_an_h100(tmp_path):
    """What was measured of small-16; of other settings as many operations."""
    folder = make_pictures(tmp_path / "data")
    rows = run_loader(
        tmp_path / "a.json", "--data", str(folder), "--num-workers", "0", "--cpu-time"
    )
    assert [row["source"] for row in rows] == [str(folder)]
    results = Path(bench.__file__).parent / "assets" / "results" / "gpu.json"
    measured = json.loads(results.read_text())["values"]["step"]["images/s"][-1]
    assert rows[0]["GPU images/s"] == pytest.approx(measured)

    (of_base,) = run_loader(
        tmp_path / "b.json",
        *("--data", str(folder), "--num-workers", "0"),
        *("--hidden-size", "768", "--num-attention-heads", "12"),
    )
    assert 0.2 * measured < of_base["GPU images/s"] < 0.35 * measured  # four times the work


@ON_LINUX
def test_what_workers_compute_counts():
    """The clock of loader goes on while a process that this one started computes."""
    worker = torch.multiprocessing.get_context("fork").Process(target=compute_until_killed)
    before = bench.seconds_of_all_processes()
    own = time.process_time()
    worker.start()
    while bench.seconds_of_all_processes() - before < 0.4:
        time.sleep(0.02)
        assert worker.is_alive()
    assert time.process_time() - own < 0.3
    worker.kill()
    worker.join()


def compute_until_killed() -> None:
    while True:
        pass


@pytest.mark.parametrize("text", ["10", "0x5", "axb", "5x"])
def test_what_is_no_size_of_a_picture_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        bench.main(["loader", "--source-sizes", text])
    assert "375x500" in capsys.readouterr().err


# ---- Flags


@pytest.mark.parametrize(
    ("command", "flag", "instead"),
    [
        ("inference --compile", "--compile", "--attn compiled"),
        ("--compile", "--compile", "--attn compiled"),
        ("inference --source-size 30 40", "--source-size", "--image-size"),
        ("inference --seed=3", "--seed", "bench.py train"),
        ("masking --mask-ratio 0.5", "--mask-ratio", "bench.py train"),
        ("masking --focal-size 16", "--focal-size", "--focal-views"),
        ("train --data photos", "--data", "train_msn.py"),
        ("train --output-dir here", "--output-dir", "--json"),
        ("growth --max-steps=3", "--max-steps", "--repeats"),
        ("views --attn eager", "--attn", "bench.py train"),
        ("views --no-compile", "--no-compile", "bench.py train"),
        ("views --hidden-size 24", "--hidden-size", "bench.py train"),
        ("train --preset base-16 --recipe demo", "--recipe demo", "give one"),
    ],
)
def test_a_flag_without_effect_is_refused_in_one_line_that_says_what_to_use(
    command, flag, instead, capsys
):
    assert run_program(bench.main, command.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert flag in error
    assert instead in error


@pytest.mark.parametrize("name", bench.SUITES)
def test_a_suite_takes_each_setting_of_train_msn_or_names_what_to_use_instead(name):
    """No flag of train_msn.py is unknown to a suite: what it does not take, it refuses in words."""
    parser = bench.make_parser()
    replaced = {"inference": {"precision", "batch_size"}, "loader": {"data", "num_workers"}}
    refused = bench.ALL_SETTINGS - bench.SUITES[name].settings - replaced.get(name, set())
    for setting in refused:
        flag = "--" + setting.replace("_", "-")
        with pytest.raises(UsageError, match=f"bench.py {name} does not take {flag}: .*use .*\\."):
            parser.parse_args([name, flag, "1"])


class RecordedConfig(TrainConfig):
    """Settings that note in `read` which of them are looked at."""

    read: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str):
        type(self).read.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("name", ["inference", "train", "views", "loader"])
def test_every_setting_that_a_suite_takes_is_looked_at(name):
    """No suite ignores a flag: what it takes is read between its start and its last record."""
    suite = bench.SUITES[name]
    settings = make_config({"batch_size": 4, "blur": 1.0, "precision": "float32"})
    config = RecordedConfig(**{f.name: getattr(settings, f.name) for f in fields(settings)})
    setup = bench.Setup(CPU, 1, 1, False, time.perf_counter)
    args = SimpleNamespace(source_size=[32, 32], attn=["sdpa"], head="model", against=[])
    args.precisions = ["float32"]
    args.compiler = "inductor"
    args.batch_sizes = [1]
    args.pictures = None
    args.source_sizes = [(24, 32)]
    args.workers = [0]
    args.cpu_time = False
    args.gpu_images_per_second = 0.0

    RecordedConfig.read.clear()
    list(suite.run(config, args, setup))
    used_before = {"recipe", "device", "threads"}
    assert suite.settings - used_before <= RecordedConfig.read


def test_masking_and_growth_take_the_settings_of_train():
    """The suites of pretraining steps differ in the setting that they vary, and in nothing else."""
    train = bench.SUITES["train"].settings
    assert bench.SUITES["growth"].settings == train
    assert bench.SUITES["masking"].settings == train - {"mask_ratio"}


def test_the_help_of_a_suite_shows_the_flags_that_it_takes_and_no_others(capsys):
    with pytest.raises(SystemExit):
        bench.main(["inference", "--help"])
    printed = capsys.readouterr().out
    for flag in ("--hidden-size", "--batch-sizes", "--precision", "--against", "--repeats"):
        assert flag in printed
    for flag in ("--compile", "--mask-ratio", "--source-size", "--lr"):
        assert flag not in printed


@pytest.mark.parametrize(
    ("command", "recipe", "batch_size", "focal_views"),
    [
        ("train", "demo", 64, 2),
        ("train --recipe imagenette", "imagenette", 64, 2),
        ("train --preset base-16", "base-16", 8, 10),
        ("train --preset base-16 --batch-size 32", "base-16", 32, 10),
        ("train --hidden-size 192", "small-16", 8, 10),
        ("masking --recipe demo", "demo", 64, 0),
        ("masking --focal-views 3", "demo", 64, 3),
        ("inference", "base-16", 8, 0),
    ],
)
def test_flags_win_over_the_suite_and_the_suite_over_the_recipe(
    command, recipe, batch_size, focal_views
):
    """A flag replaces what the suite changes in the settings, and that what the recipe says."""
    args = bench.make_parser().parse_args(command.split())
    config = bench.training_config(args, CPU)
    assert config.recipe == recipe
    assert config.batch_size == batch_size
    assert config.focal_views == focal_views


def test_a_number_below_one_is_refused_in_one_line(capsys):
    assert run_program(bench.main, ["train", "--recipe", "demo", "--repeats", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("eager", "eager"),
        (8, "8"),
        (0.12345, "0.123"),
        (1234.6, "1235"),
        ({"median": 0.0123456, "low": 0.01, "high": 2.0}, "12.35 [10, 2000]"),
        ({"median": 11.3149, "low": 9.9996, "high": 123.4567}, "11315 [10000, 123457]"),
        ({"median": 1.0, "low": 0.5, "high": 2.0, "memory": 99.7}, "1000 [500, 2000], 100"),
        (None, ""),
    ],
)
def test_a_cell_shows_times_in_milliseconds_and_memory_in_mebibytes(value, text):
    assert bench.cell_text(value) == text


def test_a_library_that_is_not_there_says_how_to_install_it(monkeypatch, capsys):
    """An optional package is named with its pip command, before anything is measured."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run_program(bench.main, ["inference", "--against", "transformers"]) == 2
    assert "pip install transformers" in capsys.readouterr().err


# ---- The report


@pytest.fixture(scope="module")
def toy_report(tmp_path_factory) -> Path:
    """The file of `bench.py gpu` at toy size, with a run on a folder of pictures."""
    place = tmp_path_factory.mktemp("report")
    data = make_pictures(place / "pictures")
    path = place / "gpu.json"
    assert run_report(path, "--data", str(data)) == 0
    return path


def run_report(path: Path, *argv: str) -> int:
    """Run `bench.py gpu` on the CPU, which is at toy size. -> exit status"""
    return run_program(bench.main, ["gpu", *QUICK, "--json", str(path), *argv])


def test_without_a_gpu_the_report_runs_all_its_parts_at_toy_size(toy_report):
    """On a CPU, which equals itself, every check is right, and every part has its tables."""
    content = json.loads(toy_report.read_text())
    assert "toy" in content["what"]
    assert list(content["seconds"]) == list(content["values"]) == list(bench.REPORT_PARTS)

    verdicts = [record["verdict"] for record in content["values"]["correctness"]["correctness"]]
    assert not [verdict for verdict in verdicts if verdict.startswith("WRONG")]
    assert sum(verdict.startswith("ok") for verdict in verdicts) > 15

    steps = content["values"]["step"]["training step"]
    assert [record["variant"] for record in steps] == [
        "float32, eager",
        "bfloat16, SDPA",
        "bfloat16, SDPA, compiled",
    ]
    ratios = [record["mask ratio"] for record in content["values"]["masking"].popitem()[1]]
    assert ratios == [0, 0.3, 0.5, 0.7]
    assert [record["epoch"] for record in content["values"]["imagenette"].popitem()[1]] == [1, 2]


def test_the_lines_of_a_table_of_the_report_have_the_same_columns(toy_report):
    for tables in json.loads(toy_report.read_text())["values"].values():
        for records in tables.values():
            assert all(record.keys() == records[0].keys() for record in records)


def test_a_second_call_of_the_report_runs_only_what_is_missing(toy_report, tmp_path, monkeypatch):
    """Finished parts stay as they are in the file; the others run, and begin anew."""
    content = json.loads(toy_report.read_text())
    del content["seconds"]["views"]
    content["values"]["views"] = {"views": ["half a part"]}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content))
    run_parts = []
    run_part = bench.run_part

    def watched(name: str, *arguments) -> None:
        run_parts.append(name)
        run_part(name, *arguments)

    monkeypatch.setattr(bench, "run_part", watched)
    assert run_report(path, "--data", "pictures") == 0
    assert run_parts == ["views"]
    after = json.loads(path.read_text())
    assert after["values"]["views"]["views"][0]["source"] == "40x50"
    for name in set(bench.REPORT_PARTS) - {"views"}:
        assert after["values"][name] == content["values"][name]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{}", "no report"), ("not JSON", "no report"), ('["what"]', "no report")],
)
def test_a_file_that_is_no_report_is_left_alone(text, complaint, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    assert run_report(path) == 2
    assert complaint in capsys.readouterr().err
    assert path.read_text() == text


def test_a_report_of_another_machine_is_left_alone(toy_report, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    content = {**json.loads(toy_report.read_text()), "machine": "another one"}
    path.write_text(json.dumps(content))
    assert run_report(path) == 2
    assert "another one" in capsys.readouterr().err
    assert json.loads(path.read_text()) == content


def empty_report(path: Path, size: bench.ReportSize = bench.TOY) -> bench.Report:
    content = {"seconds": {}, "values": {}}
    return bench.Report(size, fake_setup(), "", path, content, {}, time.monotonic() + 1000)


def made_up_part(*lines: tuple[str, dict], error: Exception | None = None) -> bench.ReportPart:
    """A part that yields these lines, and then raises an error, if one is given."""

    def run(report: bench.Report):
        yield from lines
        if error:
            raise error

    return bench.ReportPart(run, lambda: 100.0)


def test_each_line_of_the_report_is_in_the_file_before_the_next_one_is_made(tmp_path):
    report = empty_report(tmp_path / "gpu.json")
    seen = []

    def run(report: bench.Report):
        for i in range(3):
            if report.path.exists():
                seen.append(json.loads(report.path.read_text())["values"]["part"]["table"])
            yield "table", {"i": i}

    bench.run_part("part", bench.ReportPart(run, lambda: 1.0), report)
    assert seen == [[{"i": 0}], [{"i": 0}, {"i": 1}]]


def test_a_part_that_ends_with_an_error_is_named_at_the_end_and_not_finished(tmp_path, capsys):
    """Its lines are kept, the parts after it can run, and the report ends with an error."""
    report = empty_report(tmp_path / "gpu.json")
    bench.run_part("one", made_up_part(("table", {"i": 0}), error=ValueError("no")), report)
    bench.run_part("two", made_up_part(("table", {"i": 1})), report)
    assert list(report.content["seconds"]) == ["two"]
    assert report.content["values"]["one"] == {"table": [{"i": 0}]}
    assert "one: ValueError: no" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="one ended with an error"):
        bench.raise_if_wrong(report)


def test_a_part_that_does_not_fit_into_the_time_is_left_for_the_next_call(tmp_path):
    """At full size, what takes longer than is left does not begin."""
    report = empty_report(tmp_path / "gpu.json", bench.FULL)
    report.deadline = time.monotonic() + 99
    bench.run_part("part", made_up_part(("table", {"i": 0})), report)
    assert report.content == {"seconds": {}, "values": {}}
    report.deadline = time.monotonic() + 110
    bench.run_part("part", made_up_part(("table", {"i": 0})), report)
    assert list(report.content["seconds"]) == ["part"]


def test_a_part_that_finds_its_time_over_goes_on_at_the_next_call(tmp_path):
    report = empty_report(tmp_path / "gpu.json")
    bench.run_part("part", made_up_part(("table", {"i": 0}), error=bench.TimeIsOver()), report)
    assert report.content["seconds"] == {}
    bench.raise_if_wrong(report)  # which it does not


def raise_not_available() -> float:
    raise bench.NotAvailable("reason")


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (lambda: 0.1, "ok"),
        (lambda: 0.11, "WRONG"),
        (lambda: float("nan"), "WRONG"),
        (lambda: 1 / 0, "WRONG: ZeroDivisionError: division by zero"),
        (raise_not_available, "not available: reason"),
    ],
)
def test_a_check_is_wrong_above_its_limit_or_if_it_fails(difference, verdict):
    assert bench.check("what", difference, limit=0.1)["verdict"] == verdict


def test_wrong_attention_is_found_and_ends_the_report_with_an_error(tmp_path, monkeypatch):
    """SDPA without the scale by the square root of the head's width is WRONG in each kernel."""

    def unscaled(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, scale=1.0), None

    report = empty_report(tmp_path / "gpu.json")
    monkeypatch.setattr(bench, "sdpa_attention", unscaled)
    records = list(bench.attention_checks(report))
    for record in records:
        right = "eager in" in record["check"].split(" = ")[0]
        expected = ("ok",) if right else ("WRONG", "not available")
        assert record["verdict"].startswith(expected), record

    report.content["values"]["correctness"] = {"correctness": records}
    with pytest.raises(RuntimeError, match="checks are WRONG"):
        bench.raise_if_wrong(report)


@given(st.integers(0, 12))
def test_the_largest_batch_is_the_largest_power_of_two_that_fits(exponent):
    """Between the smallest and the largest that are tried."""
    fits = 2**exponent
    report = empty_report(Path("gpu.json"), replace(bench.FULL, largest_batch=1024))
    config = make_config({"recipe": "small-16"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "step_fits", lambda config, *_: config.batch_size <= fits)
        found = bench.largest_batch(config, report)
    assert found == min(max(fits, bench.FULL.smallest_batch), 1024)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::_scaled_dot_product_flash_attention", "attention"),
        ("aten::addmm", "matrix products"),
        ("aten::native_layer_norm_backward", "norms"),
        ("aten::_fused_adamw_", "optimizer, EMA"),
        ("aten::_foreach_lerp_", "optimizer, EMA"),
        ("aten::_to_copy", "copies, casts"),
        ("aten::mul", "other operations"),
    ],
)
def test_operations_are_of_the_kind_that_their_names_say(operation, kind):
    assert bench.kind_of_work(operation) == kind


def test_all_of_the_report_but_the_long_run_fits_into_the_time_of_one_call():
    """25 minutes at full size, by the arithmetic that is printed; the run takes what is left."""
    minutes = {name: part.full_seconds() / 60 for name, part in bench.REPORT_PARTS.items()}
    assert min(minutes.values()) > 0
    assert sum(minutes.values()) - minutes["imagenette"] < 20
