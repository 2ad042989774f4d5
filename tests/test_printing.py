"""What the programs print: a live line that fits the terminal, and this session's figures."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import ROOT, TINY, make_pictures, run_here

import bench
import finetune
import train_msn
from train_msn import (
    LOSS_COLUMNS,
    RECIPE_LINES,
    RECIPES,
    Record,
    StepValues,
    TrainConfig,
    clock_time,
    fit_columns,
    make_config,
    run_program,
    say,
)
from vitmsn import ViTMSNModel

# ---- A terminal, without one ---------------------------------------------------------------------


class Terminal(io.StringIO):
    """Says that it is a terminal, and keeps what is printed inside `with Terminal():`."""

    def __enter__(self):
        self.redirection = contextlib.redirect_stdout(self)
        self.redirection.__enter__()
        return self

    def __exit__(self, *error):
        self.redirection.__exit__(*error)

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that a person sees, none of them wrapped."""
        lines = []
        for line in self.getvalue().split("\n"):
            last_writing = line.split("\r\033[K")[-1]
            lines.append(last_writing)
        return lines

    def longest_writing(self) -> int:
        """Of the lines that stood there at any time, the length of the longest."""
        return max(len(text) for text in re.split("\r\033\\[K|\n", self.getvalue()))


class Clock:
    """Stands for time.perf_counter."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def set_width(monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert shutil.get_terminal_size().columns == columns


def take_steps(record: Record, steps, clock: Clock, seconds: float = 2.0) -> None:
    """Let a record see steps that take so many seconds each."""
    for step in steps:
        clock.now += seconds
        metrics = {**dict.fromkeys(LOSS_COLUMNS, 1.25), "grad_norm": 2.5, "prototypes_used": 64}
        now = StepValues(lr=1e-3, weight_decay=0.1, momentum=0.99, sharpening=0.25)
        record.step(step, (step + 1) / 62, metrics, now)


# ---- The live line -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 100, 140])
def test_the_live_line_is_one_line_below_its_header(width, clock, tmp_path, monkeypatch):
    """Whatever the width, the header stands once, and all updates are written over one line."""
    set_width(monkeypatch, width)
    with Terminal() as terminal:
        record = Record(tmp_path, TrainConfig(), range(620), elapsed=0.0)
        take_steps(record, range(20), clock)

    header, line = terminal.screen()
    assert header.split()[:3] == ["step", "epoch", "images/s"]
    assert line.split()[:3] == ["20/620", "0.3", "512"]
    assert len(header) == len(line)
    assert terminal.longest_writing() < width  # the last column stays free: some terminals wrap


def test_eighty_columns_show_progress_and_all_parts_of_the_loss(clock, tmp_path, monkeypatch):
    """The essential is there on a terminal of 80 columns, up to 9999 steps."""
    set_width(monkeypatch, 80)
    with Terminal() as terminal:
        record = Record(tmp_path, TrainConfig(), range(9999), elapsed=0.0)
        take_steps(record, range(2), clock)
    names = terminal.screen()[0].split()
    expected = "step epoch images/s left loss cross-entropy me-max prototypes"
    assert names == expected.split()


def test_a_terminal_that_grows_wider_gets_more_columns(clock, tmp_path, monkeypatch):
    """The width is that of the moment; new columns come with a new header."""
    set_width(monkeypatch, 60)
    with Terminal() as terminal:
        record = Record(tmp_path, TrainConfig(), range(620), elapsed=0.0)
        take_steps(record, range(3), clock)
        set_width(monkeypatch, 120)
        take_steps(record, range(3, 6), clock)

    narrow, wide, line = terminal.screen()
    assert wide.startswith(narrow) and len(wide) > len(narrow)
    assert line.split()[0] == "6/620"


def test_an_accuracy_stands_above_the_live_line(clock, tmp_path):
    """A line of k-NN takes the live line's place, which comes back below it."""
    with Terminal() as terminal:
        record = Record(tmp_path, TrainConfig(), range(620), elapsed=0.0)
        take_steps(record, range(2), clock)
        record.evaluation(2, 1.0, 0.5)
        take_steps(record, range(2, 4), clock)
    _, accuracy, line = terminal.screen()
    assert accuracy == "epoch 1: k-NN accuracy 0.500"
    assert line.split()[0] == "4/620"


def test_the_last_step_s_line_stays(clock, tmp_path):
    """What is printed after the last step begins on a line of its own."""
    with Terminal() as terminal:
        record = Record(tmp_path, TrainConfig(), range(3), elapsed=0.0)
        take_steps(record, range(3), clock)
        say("done")
    header, line, done, _ = terminal.screen()
    assert line.split()[:4] == ["3/3", "0.0", "512", "0:00:00"]
    assert done == "done" and len(header) == len(line)


def test_speed_and_time_left_are_those_of_this_session(clock, tmp_path):
    """A resumed run says nothing of how fast the sessions before it were."""
    with Terminal() as terminal:
        record = Record(tmp_path, TrainConfig(batch_size=64), range(100, 200), elapsed=1e6)
        take_steps(record, range(100, 110), clock, seconds=2.0)
    step, _, speed, left, *_ = terminal.screen()[1].split()
    assert (step, speed, left) == ("110/200", "32", "0:03:00")


def test_speed_and_time_left_follow_the_last_hundred_steps(clock, tmp_path):
    """When other programs have ended, what they cost is not expected any more."""
    with Terminal() as terminal:
        record = Record(tmp_path, TrainConfig(batch_size=64), range(500), elapsed=0.0)
        take_steps(record, range(300), clock, seconds=20.0)
        take_steps(record, range(300, 400), clock, seconds=2.0)
    step, _, speed, left, *_ = terminal.screen()[1].split()
    assert (step, speed, left) == ("400/500", "32", "0:03:20")


def test_in_a_file_each_line_stays(clock, tmp_path, capsys):
    """Where there is no terminal, nothing is erased: a header, and a line every 20 seconds."""
    record = Record(tmp_path, TrainConfig(), range(620), elapsed=0.0)
    take_steps(record, range(25), clock, seconds=2.0)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "10/620", "20/620"]
    assert "\r" not in printed and "\033" not in printed


@given(
    st.dictionaries(st.text("abc ", min_size=1), st.text("0123.", max_size=9)), st.integers(0, 200)
)
def test_as_many_columns_as_fit_are_shown_in_their_order(cells, width):
    """The lines are those of the first columns, and no wider than asked for."""
    names, values = fit_columns(cells, width)
    assert max(len(names), len(values)) <= width
    whole_names, whole_values = fit_columns(cells, 10**6)
    assert whole_names.startswith(names) and whole_values.startswith(values)


@given(st.integers(0, 100 * 3600 - 1))
def test_clock_time_is_hours_minutes_and_seconds(seconds):
    """Read back, the text is the same number of seconds; it has at most 8 characters."""
    text = clock_time(seconds)
    hours, minutes, rest = map(int, text.split(":"))
    assert hours * 3600 + minutes * 60 + rest == seconds
    assert minutes < 60 and rest < 60 and len(text) <= 8


def test_long_times_are_days_and_hours():
    """From 100 hours on nobody wants seconds."""
    assert clock_time(100 * 3600) == "4d 04h"


# ---- Help, and what comes of a mistyped command line ---------------------------------------------


def help_of(program, words: list[str], capsys) -> str:
    """What a program prints for --help, with single spaces."""
    with pytest.raises(SystemExit) as stop:
        program.main([*words, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_help_names_every_recipe_with_its_line(capsys):
    """Whoever asks for help sees all recipes, what they are for and how long they take."""
    printed = help_of(train_msn, [], capsys)
    assert RECIPE_LINES.keys() == RECIPES.keys()
    for name, line in RECIPE_LINES.items():
        assert f"{name} {line}" in printed
        assert len(f"  {name:<14} {line}") <= 100


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_line_of_a_recipe_says_its_size_and_length(recipe):
    """Pixels, parameters, epochs and GPU hours in the line are those of the settings."""
    config = make_config({"recipe": recipe})
    with torch.device("meta"):
        encoder = ViTMSNModel(config.model_config())
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    line = RECIPE_LINES[recipe]
    assert f"{config.image_size} pixels" in line
    assert float(re.search(r"encoder of ([\d.]+) M parameters", line)[1]) == pytest.approx(
        millions, rel=0.15
    )

    gpu_hours = re.search(r"(\d+) GPU hours", line)
    assert bool(gpu_hours) == (config.data != "imagenette" and config.image_size == 224)
    if gpu_hours:
        flops_per_image = bench.step_flops(config) / config.batch_size
        seconds = flops_per_image * 1_281_167 * config.epochs / (0.4 * 989e12)
        assert f"{config.epochs} epochs" in line
        assert float(gpu_hours[1]) == pytest.approx(seconds / 3600, rel=0.05)


TAKES = [  # command, flags that its help shows, flags that it does not show
    ("", ["--methods", "--l2"], ["--top", "--csv", "--output "]),
    ("train", ["--lr", "--labels-per-class"], ["--methods", "--l2", "--csv"]),
    ("predict", ["CHECKPOINT IMAGES", "--top", "--csv"], ["--checkpoint", "--lr", "--output"]),
    ("attention", ["CHECKPOINT IMAGES", "--output-dir"], ["--top", "--seeds"]),
    ("embed", ["CHECKPOINT IMAGES", "--output "], ["--output-dir", "--top"]),
    ("neighbours", ["CHECKPOINT IMAGES", "--output "], ["--output-dir", "--csv"]),
]


@pytest.mark.parametrize("command, shown, not_shown", TAKES, ids=[row[0] for row in TAKES])
def test_the_help_of_a_command_shows_the_flags_that_it_takes_and_no_others(
    command, shown, not_shown, capsys
):
    """finetune.py's commands say what each of them takes."""
    printed = help_of(finetune, command.split(), capsys)
    options = printed.partition("options:")[2] if command == "" else printed
    for text in shown:
        assert text in printed
    for text in not_shown:
        assert text not in options


def test_the_help_of_train_shows_its_own_defaults(capsys):
    """`train` without flags takes all labels for ten epochs, and its help says so."""
    printed = help_of(finetune, ["train"], capsys)
    assert "(default: 10.0)" in printed.partition("--epochs")[2][:120]
    assert "Raises" not in printed


@pytest.mark.parametrize(
    "words, batch_size",
    [
        (["train"], 64),
        (["train", "--recipe", "base-16"], 8),
        (["train", "--preset", "large-7"], 8),
        (["views", "--recipe", "cifar10"], 64),
    ],
)
def test_the_help_of_a_suite_shows_the_values_that_it_would_take(words, batch_size, capsys):
    """bench.py's help shows the recipe's or the preset's values, not the dataclass's."""
    printed = help_of(bench, words, capsys)
    assert f"(default: {batch_size})" in printed.partition("--batch-size")[2][:80]


@pytest.mark.parametrize(
    "program, word, names",
    [
        (finetune, "predcit", ["train", *finetune.COMMANDS]),
        (finetune, "runs/demo-001", ["train", *finetune.COMMANDS]),
        (bench, "trian", list(bench.SUITES)),
    ],
)
def test_a_misspelt_command_lists_the_commands(program, word, names, capsys):
    """One line names the word and all that could have been meant."""
    assert run_program(program.main, [word, "--lr", "1"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    for name in [word, *names]:
        assert name in line


def test_a_misspelt_command_of_finetune_names_the_nearest(capsys):
    """A slip of the finger names the command that was meant; another word names none."""
    assert run_program(finetune.main, ["atention"]) == 2
    line = capsys.readouterr().err
    assert "or no command for the table. Did you mean attention?" in line
    assert run_program(finetune.main, ["xyz"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


# ---- Before the first step -----------------------------------------------------------------------


@pytest.mark.parametrize("size, recipe", [(20, "cifar10"), (60, "imagenette")])
def test_own_pictures_get_the_recipe_of_their_size(size, recipe, tmp_path, monkeypatch, capsys):
    """Without --recipe the pictures decide, which is said, and the run is named after it."""
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "photos", size=size)
    flags = [*TINY, "--data", "photos", "--max-steps", "1", "--knn-every", "0"]
    assert run_here(*flags) == 0
    out = capsys.readouterr().out
    assert f"no --recipe: {recipe}'s" in out and f" x {size} (" in out
    assert (tmp_path / "runs" / f"{recipe}-001" / "checkpoint.pt").is_file()

    assert run_here(*flags, "--recipe", "demo") == 0
    assert "no --recipe" not in capsys.readouterr().out
    assert (tmp_path / "runs" / "demo-001").is_dir()


def stop_in_step(monkeypatch, stop, number: int) -> None:
    """Let step `number`, from 1, call stop() before it does anything."""
    real_step = train_msn.train_step
    steps = []

    def step(*arguments):
        steps.append(1)
        if len(steps) == number:
            stop()
        return real_step(*arguments)

    monkeypatch.setattr(train_msn, "train_step", step)


def fail() -> None:
    raise RuntimeError("out of memory")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("stop, status", [(fail, 1), (interrupt, 130)])
def test_nothing_is_left_of_a_run_that_ends_before_its_first_step(
    stop, status, tmp_path, monkeypatch
):
    """An error or Ctrl-C in the first step frees the folder; a later one leaves what there is."""
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "photos")
    flags = [*TINY, "--data", "photos", "--checkpoint-every", "1", "--num-workers", "0"]
    with monkeypatch.context() as patched:
        stop_in_step(patched, stop, 1)
        assert run_here(*flags) == status
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]

    with monkeypatch.context() as patched:
        stop_in_step(patched, fail, 2)
        assert run_here(*flags) == 1
    folder = tmp_path / "runs" / "cifar10-001"
    before = {path.name for path in folder.iterdir()}
    assert "checkpoint.pt" in before

    with monkeypatch.context() as patched:
        stop_in_step(patched, stop, 1)
        assert run_here(*flags, "--resume") in (status, 0)
    assert before <= {path.name for path in folder.iterdir()}


def test_a_folder_with_other_things_in_it_keeps_them(tmp_path, monkeypatch):
    """Of a false start in a folder that was there, only what it wrote is taken away."""
    make_pictures(tmp_path / "photos")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    stop_in_step(monkeypatch, fail, 1)
    assert run_here(*TINY, "--data", tmp_path / "photos", "--output-dir", tmp_path / "run") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_rough_count_of_operations_is_near_the_exact_one(recipe):
    """What a run will cost is reckoned from the weights and tokens, within a quarter."""
    config = make_config({"recipe": recipe})
    exact = bench.step_flops(config) / config.batch_size
    assert train_msn.about_flops(config) == pytest.approx(exact, rel=0.25)


def test_a_run_of_weeks_says_what_it_costs_and_what_to_use_instead(monkeypatch, capsys):
    """The published recipe on a CPU is named in days; a small one says nothing."""
    monkeypatch.setattr(train_msn, "seconds_of_product", lambda _: 2 * 512**3 / 50e9)
    cpu = torch.device("cpu")
    train_msn.warn_of_cost(make_config({"recipe": "demo"}), 4000, cpu)
    train_msn.warn_of_cost(make_config({"recipe": "small-16", "max_steps": 1}), 4000, cpu)
    train_msn.warn_of_cost(make_config({"recipe": "small-16"}), 4000, torch.device("cuda"))
    assert capsys.readouterr().err == ""

    train_msn.warn_of_cost(make_config({"recipe": "small-16", "data": "synthetic"}), 4000, cpu)
    line = capsys.readouterr().err
    days = 75.3 * 1024 * 2400 / 50 / 86400
    assert f"at least {round(days)} days" in line and "--recipe demo" in line
    assert line.count("\n") == 1
    train_msn.warn_of_cost(make_config({"recipe": "small-16", "data": "photos"}), 4000, cpu)
    assert "--recipe imagenette" in capsys.readouterr().err


@pytest.mark.parametrize("bfloat16, says", [(0.6, "6.0 times slower"), (0.1, ""), (0.02, "")])
def test_slow_bfloat16_is_said_before_it_starts(bfloat16, says, monkeypatch, capsys):
    """A CPU without units for bfloat16 takes it for longer, by measurement, not by its name."""
    seconds = {torch.bfloat16: bfloat16, torch.float32: 0.1}
    monkeypatch.setattr(train_msn, "seconds_of_product", seconds.get)
    train_msn.warn_of_slow_precision("bfloat16", torch.device("cpu"))
    line = capsys.readouterr().err
    assert says in line and bool(says) == bool(line)
    train_msn.warn_of_slow_precision("float32", torch.device("cpu"))
    assert capsys.readouterr().err == ""


QUICK_CPU = {torch.bfloat16: 0.0025, torch.float32: 0.005}  # seconds of a product


@pytest.mark.parametrize("bfloat16, says", [(0.0025, "2.0 times as fast"), (0.005, ""), (0.1, "")])
def test_a_cpu_that_is_quicker_in_bfloat16_is_told_of(bfloat16, says, monkeypatch, capsys):
    """Where float32 was taken because nothing was asked for, and bfloat16 would save time."""
    seconds = {**QUICK_CPU, torch.bfloat16: bfloat16}
    monkeypatch.setattr(train_msn, "seconds_of_product", seconds.get)
    config = make_config({"recipe": "imagenette", "precision": "float32"})
    train_msn.advise_bfloat16(config, 9000, torch.device("cpu"))
    line = capsys.readouterr().err
    assert says in line and bool(says) == bool(line)
    assert not line or "--precision bfloat16" in line


@pytest.mark.parametrize(
    "changes, device",
    [({"precision": "bfloat16"}, "cpu"), ({}, "cuda"), ({"max_steps": 5}, "cpu")],
)
def test_where_bfloat16_saves_nothing_it_is_not_advised(changes, device, monkeypatch, capsys):
    """It is in use, or the device is no CPU, or the run is short."""
    monkeypatch.setattr(train_msn, "seconds_of_product", QUICK_CPU.get)
    config = make_config({"recipe": "imagenette", "precision": "float32", **changes})
    train_msn.advise_bfloat16(config, 9000, torch.device(device))
    assert capsys.readouterr().err == ""


def test_the_demo_is_in_float32_on_every_cpu(monkeypatch):
    """Its result is in the README, so it is one everywhere; other recipes take what is fast."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    cpu = torch.device("cpu")
    for recipe, precision in (("demo", "float32"), ("imagenette", "bfloat16")):
        wanted = make_config({"recipe": recipe}).precision
        assert train_msn.choose_precision(wanted, cpu) == precision


@pytest.mark.parametrize("flags, told", [((), True), (("--precision", "float32"), False)])
def test_who_asks_for_a_precision_gets_no_advice(flags, told, monkeypatch, tmp_path, capsys):
    """The advice is for a run whose precision nobody chose; the demo's recipe chooses float32."""
    monkeypatch.setattr(train_msn, "seconds_of_product", QUICK_CPU.get)
    monkeypatch.setattr(train_msn, "SHORT_RUN", 0)
    monkeypatch.setattr(train_msn, "choose_precision", lambda wanted, device: "float32")
    make_pictures(tmp_path / "photos")
    folder = ("--data", tmp_path / "photos", "--output-dir", tmp_path / "run", "--max-steps", "1")
    assert run_here(*TINY, *folder, *flags) == 0
    assert ("--precision bfloat16" in capsys.readouterr().err) == told


def test_a_thread_that_is_still_at_work_does_not_change_how_a_program_ends():
    """Nobody waits for it, what was printed arrives, and the exit status is the one asked for."""
    code = (
        "import threading, time, train_msn\n"
        "threading.Thread(target=time.sleep, args=(500,)).start()\n"
        "print('the last line', end='')\n"
        "train_msn.end_program(130)\n"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "the last line", "")


# ---- After a run without labels ------------------------------------------------------------------


@given(n=st.integers(2, 20), d=st.integers(1, 20), seed=st.integers(0, 9))
def test_of_a_collapsed_encoder_one_pair_of_views_agrees_and_the_rank_is_one(n, d, seed):
    """If all features are alike, whatever their lengths, nothing is left of either figure."""
    lengths = torch.rand(2, n, 1, generator=torch.Generator().manual_seed(seed)) + 0.5
    collapsed = lengths * torch.eye(d)[0]
    agreement = train_msn.agreement_of(collapsed)
    assert agreement.mutual_nearest == pytest.approx(1 / n)
    assert agreement.rank == pytest.approx(1)


@given(n=st.integers(2, 12), twins=st.integers(0, 6), seed=st.integers(0, 9))
def test_pairs_are_counted_and_directions_too(n, twins, seed):
    """Of images with a direction each, those agree whose views do; in any order, at any scale."""
    twins = min(twins, n - 2)
    generator = torch.Generator().manual_seed(seed)
    first = torch.eye(n)
    second = torch.eye(n)
    second[twins:] = second[twins:].roll(1, dims=0)  # a view of another image
    order = torch.randperm(n, generator=generator)
    scale = torch.rand(2, n, 1, generator=generator) + 0.5
    agreement = train_msn.agreement_of(scale * torch.stack([first, second])[:, order])
    assert agreement.mutual_nearest == pytest.approx(twins / n)
    assert agreement.rank == pytest.approx(n)


def test_to_be_the_nearest_must_be_mutual():
    """A view that is nearest to many others counts once, for the one that is nearest to it."""
    first = torch.eye(3)
    second = torch.tensor([[1.0, 0.9, 0.9], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0]])
    agreement = train_msn.agreement_of(torch.stack([first, second]))
    assert agreement.mutual_nearest == pytest.approx(1 / 3)


def test_a_run_without_labels_says_what_its_features_are_worth(tmp_path, capsys):
    """Trained, untrained and collapsed stand below each other, and in summary.json."""
    for i, path in enumerate(sorted(make_pictures(tmp_path / "labelled").rglob("*.png"))):
        path.rename(tmp_path / f"{i}.png")
    shutil.rmtree(tmp_path / "labelled")
    flags = [*TINY, "--data", tmp_path, "--output-dir", tmp_path / "run", "--max-steps", "2"]
    assert run_here(*flags) == 0

    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("no labels, so two"))
    assert "each of 30 training images" in lines[start]
    table = [line.rsplit(maxsplit=2) for line in lines[start + 2 : start + 5]]
    assert [name for name, _, _ in table] == [
        "target encoder",
        "untrained encoder",
        "complete collapse",
    ]
    assert table[2][1:] == ["0.033", "1.0"]

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name, found, rank in table[:2]:
        assert float(found) == pytest.approx(summary[name]["mutual_nearest"], abs=6e-4)
        assert float(rank) == pytest.approx(summary[name]["rank"], abs=6e-2)
        assert 1 <= summary[name]["rank"] <= 16


def test_pairs_of_views_are_the_same_in_batches_of_any_size(tmp_path):
    """Views are a function of the seed and the image; an unreadable picture has none."""
    make_pictures(tmp_path, count=8)
    flags = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1}
    config = make_config({**flags, "num_attention_heads": 2, "data": str(tmp_path)})
    cpu = torch.device("cpu")
    encoder = train_msn.build_model(config, train_msn.Processes(0, 1, cpu)).target_encoder
    Path(train_msn.open_data(config).train.paths[3]).write_bytes(b"damaged")
    data = train_msn.open_data(config)

    indices = [0, 2, 3, 4, 7]
    whole = train_msn.embed_pairs(encoder, data.train, indices, config, cpu)
    parts = train_msn.embed_pairs(encoder, data.train, indices, config, cpu, batch_size=2)
    assert whole.shape == (2, 4, 16)
    torch.testing.assert_close(whole, parts)
    assert not torch.allclose(whole[0], whole[1])  # two views, not one twice
