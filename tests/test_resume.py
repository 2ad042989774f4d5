"""A run that was interrupted and continued is the same run, bit for bit.

A checkpoint is never lost, and the right run is found again.
"""

import json
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import (
    TINY,
    as_batch,
    assert_same_result,
    finish,
    make_pictures,
    random_pictures,
    read_columns,
    run_here,
    start,
)

import train_msn
import vitmsn


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def flags(pictures, folder, *more):
    return (*TINY, "--data", pictures, "--output-dir", folder, *more)


EVERY_3 = ("--checkpoint-every", "3")


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A run that nothing interrupted: 12 steps, 4 an epoch, a checkpoint every 3."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_here(*flags(pictures, folder, *EVERY_3)) == 0
    return folder


# -- interrupted runs ------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.mark.parametrize("call", range(0, 32, 4))
def test_killed_at_any_write_and_resumed_a_run_is_the_same_run(
    call, pictures, whole, tmp_path, monkeypatch
):
    """A run that dies while it writes a file, whichever, goes on as if nothing had happened."""
    folder, calls = tmp_path / "run", iter(range(10**6))

    def deadly(function):
        def wrapper(*arguments, **options):
            if next(calls) >= call:
                raise Killed
            return function(*arguments, **options)

        return wrapper

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", deadly(os.replace))
        patched.setattr(os, "fsync", deadly(os.fsync))
        with pytest.raises(Killed):
            run_here(*flags(pictures, folder, *EVERY_3))
    assert run_here(*flags(pictures, folder, *EVERY_3, "--resume")) == 0
    assert_same_result(whole, folder)


@pytest.mark.parametrize(("stop", "more"), [(5, ()), (7, ("--num-workers", "2"))])
def test_stopped_mid_epoch_and_resumed_a_run_is_the_same_run(stop, more, pictures, whole, tmp_path):
    """Neither where a run stops nor the number of workers afterwards changes its result."""
    folder = tmp_path / "run"
    assert run_here(*flags(pictures, folder, "--max-steps", stop, "--num-workers", "0")) == 0
    assert run_here(*flags(pictures, folder, "--resume", *more)) == 0
    assert_same_result(whole, folder)


def test_bfloat16_runs_resume_bit_for_bit_too(pictures, tmp_path):
    """Resuming is exact in mixed precision as well."""
    a, b = tmp_path / "a", tmp_path / "b"
    assert run_here(*flags(pictures, a, "--precision", "bfloat16")) == 0
    assert run_here(*flags(pictures, b, "--precision", "bfloat16", "--max-steps", "5")) == 0
    assert run_here(*flags(pictures, b, "--resume")) == 0
    assert_same_result(a, b)


# -- the images of a resumed run -------------------------------------------------------------------


def test_data_that_moved_is_accepted_where_it_is_now(pictures, whole, tmp_path):
    """With a new --data that holds the same pictures, a run goes on bit for bit."""
    old, new, folder = tmp_path / "old", tmp_path / "elsewhere" / "new", tmp_path / "run"
    shutil.copytree(pictures, old)
    assert run_here(*flags(old, folder, "--max-steps", "5")) == 0
    new.parent.mkdir()
    old.rename(new)
    assert run_here(*flags(new, folder, "--resume")) == 0
    assert_same_result(whole, folder)


def add_one(data: Path) -> None:
    picture = min(data.glob("train/*/*.png"))
    shutil.copy(picture, picture.with_name("a new one.png"))


def remove_one(data: Path) -> None:
    min(data.glob("train/*/*.png")).unlink()


def rename_one(data: Path) -> None:
    picture = min(data.glob("train/*/*.png"))
    picture.rename(picture.with_name("another name.png"))


@pytest.mark.parametrize("change", [add_one, remove_one, rename_one])
def test_other_images_are_refused_unless_a_flag_accepts_them(change, pictures, tmp_path, capsys):
    """Pictures that were added, removed or renamed since change what an epoch is, so a run does not
    go on with them unasked. Once accepted, they are the run's own."""
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(pictures, data)
    assert run_here(*flags(data, folder, "--max-steps", "2")) == 0
    change(data)
    before = (folder / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert run_here(*flags(data, folder, "--resume")) == 2
    line = capsys.readouterr().err
    assert "training images" in line and "--changed-data" in line and line.count("\n") == 1
    assert (folder / "checkpoint.pt").read_bytes() == before

    more = ("--resume", "--changed-data", "--max-steps", "3")
    assert run_here(*flags(data, folder, *more)) == 0
    assert "an epoch is now" in capsys.readouterr().err
    assert run_here(*flags(data, folder, "--resume", "--max-steps", "4")) == 0
    assert "an epoch is now" not in capsys.readouterr().err


def test_new_validation_images_stop_no_run(pictures, tmp_path):
    """Only the images that are trained on make a run another one."""
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(pictures, data)
    assert run_here(*flags(data, folder, "--max-steps", "2")) == 0
    picture = min(data.glob("val/*/*.png"))
    shutil.copy(picture, picture.with_name("a new one.png"))
    assert run_here(*flags(data, folder, "--resume", "--max-steps", "3")) == 0


def test_a_checkpoint_that_knows_no_images_goes_on(pictures, whole, tmp_path):
    """As of versions that did not store which images they were."""
    folder = tmp_path / "run"
    assert run_here(*flags(pictures, folder, "--max-steps", "5")) == 0
    content = vitmsn.read_tensors(folder / "checkpoint.pt")
    del content["data"]
    torch.save(content, folder / "checkpoint.pt")
    assert run_here(*flags(pictures, folder, "--resume")) == 0
    assert_same_result(whole, folder)


@settings(max_examples=20)
@given(st.lists(st.text("ab/é.", min_size=1), max_size=5), st.text("abc", min_size=1))
def test_the_digest_of_names_depends_on_the_names_within_the_folder_only(names, place):
    """The same names have the same digest wherever the folder is; others have another one."""

    def digest(folder, names):
        return train_msn.digest_of_names([folder / f"x{name}" for name in names], folder)

    here, there = Path("/here"), Path("/there") / place
    assert digest(here, names) == digest(there, names)
    assert digest(here, [*names, "more"]) != digest(here, names)
    assert digest(here, ["ab"]) != digest(here, ["a", "b"])


def test_a_run_whose_end_failed_is_not_finished(pictures, tmp_path, monkeypatch):
    """If the last pictures can't be made, the run is resumed, not taken for finished."""
    folder = tmp_path / "run"
    assert run_here(*flags(pictures, folder, "--max-steps", "2")) == 0
    with monkeypatch.context() as patched:
        patched.setattr(train_msn, "save_neighbours", lambda *_: 1 / 0)
        assert run_here(*flags(pictures, folder, "--max-steps", "5", "--resume")) == 1
    assert run_here(*flags(pictures, folder, "--max-steps", "5", "--resume")) == 0
    assert json.loads((folder / "summary.json").read_text())["step"] == 5


@pytest.mark.slow
def test_fifty_kills_at_random_moments(pictures, tmp_path):
    """However often a run is killed and resumed, its result is that of a calm one."""
    rng, kills, folder = random.Random(0), 0, tmp_path / "run"
    more = (*EVERY_3, "--epochs", "30", "--num-workers", "0")
    assert run_here(*flags(pictures, tmp_path / "calm", *more)) == 0
    while kills < 50:
        process = start(*flags(pictures, folder, *more, "--resume"))
        started = time.time()
        while not (folder / "metrics.csv").exists() and time.time() - started < 60:
            if process.poll() is not None:
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 4 if kills else 6))
        if process.poll() is not None:  # finished before the kill: start over in a new folder
            assert process.returncode == 0
            assert_same_result(tmp_path / "calm", folder)
            folder = tmp_path / f"run{kills}"
            continue
        process.kill()
        process.communicate()
        kills += 1
    status, printed = finish(start(*flags(pictures, folder, *more, "--resume")), 300)
    assert status == 0, printed
    assert_same_result(tmp_path / "calm", folder)


# -- settings and folders of resumed runs ----------------------------------------------------------


def test_resuming_before_the_first_checkpoint_keeps_the_settings(pictures, tmp_path, capsys):
    """Without a checkpoint, config.json says with which settings a run was started."""
    folder = tmp_path / "run"
    settings = ("--lr", "0.01", "--crop-scale", "0.5", "1")
    assert run_here(*flags(pictures, folder, *settings, "--max-steps", "1")) == 0
    for path in folder.glob("checkpoint*"):
        path.unlink()

    here = ("--resume", "--output-dir", folder)
    assert run_here(*here, "--lr", "0.02") == 2
    assert "started with 0.01" in capsys.readouterr().err
    assert run_here(*here, "--max-steps", "2", "--crop-scale", "0.5", "1") == 0
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["lr"], saved["hidden_size"], saved["data"]) == (0.01, 16, str(pictures))
    assert vitmsn.read_tensors(folder / "checkpoint.pt")["step"] == 2


def test_two_runs_that_start_together_do_not_share_a_folder(
    pictures, tmp_path, monkeypatch, capsys
):
    """If another run takes the next free number first, the later one ends with an error."""
    monkeypatch.chdir(tmp_path)
    other, open_data = Path("runs/cifar10-001"), train_msn.open_data

    def open_data_late(config):
        other.mkdir(parents=True)
        return open_data(config)

    monkeypatch.setattr(train_msn, "open_data", open_data_late)
    assert run_here(*TINY, "--data", pictures, "--max-steps", "1") == 2
    assert (
        "another run has just taken the folder runs/cifar10-001" in capsys.readouterr().err
        and not list(other.iterdir())
    )


def write_at(path: Path, seconds: int) -> Path:
    """An empty file that was written so long after 1970. -> its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (seconds, seconds))
    return path.parent


def test_the_newest_run_is_the_one_whose_checkpoint_was_written_last(tmp_path, monkeypatch):
    """By the time of its checkpoint, or of its settings as long as there is none."""
    monkeypatch.chdir(tmp_path)
    assert train_msn.newest_run() is None
    runs = Path("runs")
    runs.mkdir()
    (runs / "demo-009").mkdir()
    assert train_msn.newest_run("demo") is None  # nothing was begun there

    write_at(runs / "demo-001" / "config.json", 900)
    first = write_at(runs / "demo-001" / "checkpoint.pt", 300)
    second = write_at(runs / "demo-002" / "checkpoint.pt", 200)
    other = write_at(runs / "small-16-001" / "checkpoint.pt", 400)
    assert train_msn.newest_run() == train_msn.newest_run("small-16") == other
    assert train_msn.newest_run("demo") == first
    assert train_msn.newest_run("small") is None

    begun = write_at(runs / "demo-003" / "config.json", 500)
    assert train_msn.newest_run() == train_msn.newest_run("demo") == begun
    assert train_msn.runs_by_age("demo", with_checkpoint=True) == [first, second]
    write_at(second / "checkpoint.pt", 600)
    assert train_msn.newest_run("demo") == second


def test_a_run_without_a_folder_gets_the_next_number_or_with_resume_the_newest_run(
    tmp_path, monkeypatch
):
    """--output-dir, else the newest run of the recipe for --resume, else the next free number."""
    monkeypatch.chdir(tmp_path)
    demo = train_msn.make_config({})
    again = replace(demo, resume=True)
    runs = Path("runs")
    assert train_msn.choose_folder(replace(demo, output_dir="here")) == Path("here")
    assert train_msn.choose_folder(demo) == train_msn.choose_folder(again) == runs / "demo-001"

    second = write_at(runs / "demo-002" / "config.json", 100)
    write_at(runs / "demo-x" / "config.json", 200)
    write_at(runs / "cifar10-007" / "config.json", 200)
    assert train_msn.choose_folder(demo) == runs / "demo-003"
    assert train_msn.choose_folder(again) == second


def test_a_finished_run_changes_nothing(pictures, whole, capsys):
    """To resume a finished run says so and touches no file."""
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    assert run_here(*flags(pictures, whole, "--resume")) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "more", [("--lr", "0.5"), ("--hidden-size", "32"), ("--no-freeze-prototypes", "--seed", "4")]
)
def test_a_flag_that_contradicts_the_saved_settings_names_both_values(
    more, pictures, whole, capsys
):
    """A resumed run takes no other value of what changes its result."""
    assert run_here(*flags(pictures, whole, "--resume", *more)) == 2
    printed = capsys.readouterr().err
    assert more[-2] in printed and more[-1] in printed and "started with" in printed


def test_a_folder_that_holds_a_run_is_not_overwritten(pictures, whole, capsys):
    """A new run in the folder of another is refused."""
    assert run_here(*flags(pictures, whole)) == 2
    assert "--resume" in capsys.readouterr().err


def test_what_is_resumed_is_checked_by_its_own_settings(whole, monkeypatch):
    """Saved settings, not the recipe's, decide on device and batch size."""
    seen = []

    def processes(config):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_msn, "start_processes", processes)
    run_here("--resume", "--output-dir", whole)
    assert seen[0].batch_size == 6 and seen[0].device == "cpu"  # not the demo's 64 and auto


def test_a_run_goes_on_where_it_was_whatever_became_of_its_start_and_end(
    pictures, tmp_path, capsys
):
    """Neither the weights it started from nor a smaller --max-steps matter to a resumed run."""
    start_from, folder = tmp_path / "start", tmp_path / "run"
    assert run_here(*flags(pictures, start_from, "--max-steps", "1")) == 0
    assert run_here(*flags(pictures, folder, "--init-from", start_from, "--max-steps", "4")) == 0
    start_from.rename(tmp_path / "gone")
    (folder / "summary.json").unlink()
    capsys.readouterr()
    assert run_here("--resume", "--output-dir", folder, "--max-steps", "2") == 0
    assert json.loads((folder / "summary.json").read_text())["step"] == 4
    printed = capsys.readouterr().out
    assert "4 of 4 steps are done" in printed and "starting from" not in printed


# -- checkpoints -----------------------------------------------------------------------------------


def damage(path: Path, rng: random.Random) -> None:
    """Cut a file somewhere, or flip one of its bits."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def falls_back(whole: Path, folder: Path, seed: int) -> bool:
    """Damage the last checkpoint at random; assert that what is loaded is whole.

    Returns whether it is the checkpoint before.
    """
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (folder / name).write_bytes((whole / name).read_bytes())
    damage(folder / "checkpoint.pt", random.Random(seed))
    loaded = train_msn.load_checkpoint(folder)
    last = vitmsn.read_tensors(whole / "checkpoint.pt")
    previous = vitmsn.read_tensors(whole / "checkpoint-previous.pt")
    fell_back = loaded["step"] == previous["step"]
    original = previous if fell_back else last
    for name, value in original["target_encoder"].items():
        assert torch.equal(loaded["target_encoder"][name], value)
    assert torch.equal(loaded["prototypes"], original["prototypes"])
    return fell_back


def test_a_truncated_or_flipped_checkpoint_is_reported_and_the_one_before_it_used(
    whole, tmp_path, capfd
):
    """A damaged checkpoint is never used, and its replacement is announced."""
    fallen = sum(falls_back(whole, tmp_path, seed) for seed in range(40))
    assert fallen > 20  # a bit flipped in the padding of the zip harms nothing
    assert capfd.readouterr().err.count("Trying the checkpoint before it") == fallen


def test_of_several_whole_checkpoints_the_newest_is_taken(whole, tmp_path):
    """Killed between writing a checkpoint and giving it its name, a run loses nothing."""
    for source, target in (("previous", "previous"), ("previous", ""), ("", "next")):
        name = f"checkpoint-{source}.pt" if source else "checkpoint.pt"
        copy = f"checkpoint-{target}.pt" if target else "checkpoint.pt"
        (tmp_path / copy).write_bytes((whole / name).read_bytes())
    assert train_msn.load_checkpoint(tmp_path)["step"] == 12
    (tmp_path / "checkpoint-next.pt").unlink()
    assert train_msn.load_checkpoint(tmp_path)["step"] == 9


@pytest.mark.slow
def test_five_hundred_damages_of_a_checkpoint(whole, tmp_path):
    """The same for five hundred damages."""
    fallen = sum(falls_back(whole, tmp_path, seed) for seed in range(1000, 1500))
    print(f"500 damages tried, {fallen} noticed, the others harmless")
    assert fallen > 300


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    """A file that can't be written whole stays as it was, with nothing beside it."""
    vitmsn.write_file(tmp_path / "a", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        vitmsn.write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_step(
    pictures, tmp_path, monkeypatch, capsys
):
    """NaN in a view ends the run, named by its step, and no checkpoint ever holds one."""
    make_views, folder = train_msn.make_views, tmp_path / "run"

    def poisoned(batch, config, step, my_images):
        views = make_views(batch, config, step, my_images)
        return views._replace(target_view=views.target_view * float("nan")) if step == 5 else views

    monkeypatch.setattr(train_msn, "make_views", poisoned)
    assert run_here(*flags(pictures, folder, "--checkpoint-every", "2")) == 1
    printed = capsys.readouterr().err
    assert "step 5" in printed and "cross-entropy" in printed
    content = vitmsn.read_tensors(folder / "checkpoint.pt")
    assert content["step"] == 4
    assert all(torch.isfinite(v).all() for v in content["target_encoder"].values())


# -- one result for one seed -----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_masks(pictures, whole, tmp_path):
    """A run is a function of its settings, and masks are a function of the seed."""
    assert run_here(*flags(pictures, tmp_path / "again")) == 0
    assert_same_result(whole, tmp_path / "again")
    config = train_msn.make_config({"batch_size": 6})
    batch = as_batch(random_pictures(np.random.default_rng(0), 6))
    masks = []
    for seed in (0, 1):
        views = train_msn.make_views(batch, replace(config, seed=seed), 0, slice(0, 6))
        masks.append(views.patches_to_keep[0])
    assert not torch.equal(*masks)


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_is_the_same_run_to_rounding(
    compiler, pictures, whole, tmp_path, monkeypatch
):
    """--compile compiles both encoders and changes no loss and no gradient."""
    compile_, compiled = torch.nn.Module.compile, []

    def watched(module):
        compiled.append(next(module.parameters()).requires_grad)
        compile_(module, backend=compiler)

    monkeypatch.setattr(torch.nn.Module, "compile", watched)
    assert run_here(*flags(pictures, tmp_path / "run", "--compile")) == 0
    assert compiled[:2] == [True, False]  # anchor, target
    ours, theirs = (read_columns(f / "metrics.csv") for f in (tmp_path / "run", whole))
    for name in ("loss", "grad_norm"):
        a, b = (torch.tensor([float(x) for x in columns[name]]) for columns in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_the_sheet_of_prototypes_is_of_those_that_were_trained(
    pictures, whole, tmp_path, monkeypatch
):
    """prototypes.png shows the trained prototypes through the trained projection head."""
    sheets = []

    def watched(path, encoder, data, size, device, prototypes=None):
        sheets.append((path.name, encoder, prototypes))

    monkeypatch.setattr(train_msn, "save_neighbours", watched)
    assert run_here(*flags(pictures, tmp_path / "run", *EVERY_3)) == 0
    saved = vitmsn.read_tensors(whole / "checkpoint.pt")
    name, encoder, prototypes = sheets[1]
    assert name == "prototypes.png" and prototypes.equal(saved["prototypes"])
    assert encoder.fc.fc3.weight.equal(saved["target_encoder"]["fc.fc3.weight"])


# -- what a run says -------------------------------------------------------------------------------


def test_every_column_of_metrics_is_what_its_name_says(whole):
    """The columns are in order, the loss is equation (1) of its terms, rates are the schedules'."""
    columns = read_columns(whole / "metrics.csv")
    assert tuple(columns) == train_msn.METRICS
    config = train_msn.make_config({"recipe": "demo", **saved_settings(whole)})
    assert columns["step"] == [str(step) for step in range(12)]
    numbers = {name: [float(x) for x in values] for name, values in columns.items()}
    assert numbers["epoch"] == [(step + 1) / 4 for step in range(12)]
    for step in range(12):
        loss = numbers["cross_entropy"][step] + config.memax_weight * numbers["memax"][step]
        assert numbers["loss"][step] == pytest.approx(loss, rel=1e-5)
        now = train_msn.schedule_at(config, step, 4)
        for name, value in now._asdict().items():
            assert numbers[name][step] == value
        assert 1 <= numbers["prototypes_used"][step] <= config.num_prototypes
        assert 1 / config.num_prototypes <= numbers["top_assignment"][step] <= 1
    for before, after, speed in zip(
        numbers["elapsed_seconds"],
        numbers["elapsed_seconds"][1:],
        numbers["images_per_second"][1:],
        strict=False,
    ):
        assert speed * (after - before) == pytest.approx(config.batch_size, rel=1e-6)


def saved_settings(folder: Path) -> dict:
    return train_msn.with_tuples(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("recipe", train_msn.RECIPES)
def test_help_shows_the_values_of_the_recipe_that_is_asked_for(recipe, capsys):
    """--help prints as defaults what a run with that --recipe would take."""
    with pytest.raises(SystemExit) as stop:
        train_msn.main(["--help", "--recipe", recipe])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    config = train_msn.make_config({"recipe": recipe})
    low, high = config.crop_scale
    expected = {"crop_scale": f"{low} {high}"}
    for name in ("epochs", "batch_size", "mask_ratio", "momentum"):
        expected[name] = str(getattr(config, name))
    for name, value in expected.items():
        flag = f"--{name.replace('_', '-')} "
        described = printed.rpartition(flag)[2]
        assert described.partition("(default: ")[2].startswith(f"{value})"), name


def test_help_without_a_recipe_is_of_the_demo(capsys):
    """A bare --help shows what a bare run does: 10 epochs, not the published 800."""
    with pytest.raises(SystemExit):
        train_msn.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "length of the run and of the schedules (default: 10)" in printed
