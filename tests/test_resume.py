"""A run that was interrupted and continued is the same run, bit for bit; a checkpoint is never lost."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import TINY, assert_same_result, finish, make_pictures, run_here, start

import train_msn
import vitmsn


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def flags(pictures, folder, *more):
    return (*TINY, "--data", pictures, "--output-dir", folder, *more)


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A run that nothing interrupted: 12 steps, 4 an epoch, a checkpoint every 3."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_here(*flags(pictures, folder, "--checkpoint-every", "3")) == 0
    return folder


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.mark.parametrize("call", range(0, 32, 4))
def test_killed_at_any_write_and_resumed_a_run_is_the_same_run(
    call, pictures, whole, tmp_path, monkeypatch
):
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
            run_here(*flags(pictures, folder, "--checkpoint-every", "3"))
    assert run_here(*flags(pictures, folder, "--checkpoint-every", "3", "--resume")) == 0
    assert_same_result(whole, folder)


@pytest.mark.parametrize(("stop", "more"), [(5, ()), (7, ("--num-workers", "2"))])
def test_stopped_mid_epoch_and_resumed_a_run_is_the_same_run(stop, more, pictures, whole, tmp_path):
    folder = tmp_path / "run"
    assert run_here(*flags(pictures, folder, "--max-steps", stop, "--num-workers", "0")) == 0
    assert run_here(*flags(pictures, folder, "--resume", *more)) == 0
    assert_same_result(whole, folder)


def test_bfloat16_runs_resume_bit_for_bit_too(pictures, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert run_here(*flags(pictures, a, "--precision", "bfloat16")) == 0
    assert run_here(*flags(pictures, b, "--precision", "bfloat16", "--max-steps", "5")) == 0
    assert run_here(*flags(pictures, b, "--resume")) == 0
    assert_same_result(a, b)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(number, pictures, tmp_path):
    process = start(*flags(pictures, tmp_path / "run", "--epochs", "100000"))
    while not (tmp_path / "run" / "views.png").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    status, printed = finish(process)
    assert status == 0 and "--resume" in printed
    assert vitmsn.read_tensors(tmp_path / "run" / "checkpoint.pt")["step"] >= 1


def test_a_signal_to_the_whole_job_stops_it_after_the_step_too(pictures, tmp_path):
    process = start(
        *flags(pictures, tmp_path / "run", "--epochs", "100000", "--num-workers", "2"), session=True
    )
    while not (tmp_path / "run" / "views.png").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    status, printed = finish(process)
    assert status == 0 and "stopped after step" in printed, printed
    assert vitmsn.read_tensors(tmp_path / "run" / "checkpoint.pt")["step"] >= 1


def test_a_run_whose_end_failed_is_not_finished(pictures, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert run_here(*flags(pictures, folder, "--max-steps", "2")) == 0
    with monkeypatch.context() as patched:
        patched.setattr(train_msn, "save_neighbours", lambda *_: 1 / 0)
        assert run_here(*flags(pictures, folder, "--max-steps", "5", "--resume")) == 1
    assert run_here(*flags(pictures, folder, "--max-steps", "5", "--resume")) == 0
    assert json.loads((folder / "summary.json").read_text())["step"] == 5


def test_resuming_before_the_first_checkpoint_keeps_the_settings(pictures, tmp_path, capsys):
    folder = tmp_path / "run"
    assert (
        run_here(
            *flags(pictures, folder, "--lr", "0.01", "--crop-scale", "0.5", "1", "--max-steps", "1")
        )
        == 0
    )
    for path in folder.glob("checkpoint*"):
        path.unlink()
    assert run_here("--resume", "--output-dir", folder, "--lr", "0.02") == 2
    assert "started with 0.01" in capsys.readouterr().err
    assert (
        run_here("--resume", "--output-dir", folder, "--max-steps", "2", "--crop-scale", "0.5", "1")
        == 0
    )
    config = train_msn.make_config(
        json.loads((folder / "config.json").read_text()) | {"recipe": "demo"}
    )
    assert (config.lr, config.hidden_size, config.data) == (0.01, 16, str(pictures))
    assert vitmsn.read_tensors(folder / "checkpoint.pt")["step"] == 2


def test_two_runs_that_start_together_do_not_share_a_folder(
    pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    other, opened = Path("runs/demo-001"), train_msn.open_data
    monkeypatch.setattr(
        train_msn, "open_data", lambda config: other.mkdir(parents=True) or opened(config)
    )
    assert run_here(*TINY, "--data", pictures, "--max-steps", "1") == 1
    assert "demo-001" in capsys.readouterr().err and not list(other.iterdir())


def test_a_finished_run_changes_nothing(pictures, whole, capsys):
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
    assert run_here(*flags(pictures, whole, "--resume", *more)) == 2
    printed = capsys.readouterr().err
    assert more[-2] in printed and more[-1] in printed and "started with" in printed


def test_a_folder_that_holds_a_run_is_not_overwritten(pictures, whole, capsys):
    assert run_here(*flags(pictures, whole)) == 2
    assert "--resume" in capsys.readouterr().err


def damage(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def damaged_checkpoint_is_never_used_silently(whole: Path, folder: Path, seed: int) -> bool:
    """Damage the last checkpoint at random; what is loaded must be whole: it or the one before. -> fell back?"""
    rng = random.Random(seed)
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (folder / name).write_bytes((whole / name).read_bytes())
    damage(folder / "checkpoint.pt", rng)
    loaded = train_msn.load_checkpoint(folder)
    fell_back = loaded["step"] == vitmsn.read_tensors(whole / "checkpoint-previous.pt")["step"]
    original = vitmsn.read_tensors(
        whole / ("checkpoint-previous.pt" if fell_back else "checkpoint.pt")
    )
    assert all(
        torch.equal(loaded["target_encoder"][k], v) for k, v in original["target_encoder"].items()
    )
    assert torch.equal(loaded["prototypes"], original["prototypes"])
    return fell_back


def test_a_truncated_or_flipped_checkpoint_is_reported_and_the_one_before_it_used(
    whole, tmp_path, capfd
):
    fallen = sum(
        damaged_checkpoint_is_never_used_silently(whole, tmp_path, seed) for seed in range(40)
    )
    assert fallen > 20  # a bit flipped in the padding of the zip harms nothing
    assert capfd.readouterr().err.count("Trying the checkpoint before it") == fallen


@pytest.mark.slow
def test_five_hundred_damages_of_a_checkpoint(whole, tmp_path):
    fallen = sum(
        damaged_checkpoint_is_never_used_silently(whole, tmp_path, seed)
        for seed in range(1000, 1500)
    )
    print(f"500 damages tried, {fallen} noticed, the others harmless")
    assert fallen > 300


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
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
    make_views, folder = train_msn.make_views, tmp_path / "run"

    def poisoned(batch, config, step, rows):
        views = make_views(batch, config, step, rows)
        return views._replace(target_view=views.target_view * float("nan")) if step == 5 else views

    monkeypatch.setattr(train_msn, "make_views", poisoned)
    assert run_here(*flags(pictures, folder, "--checkpoint-every", "2")) == 1
    printed = capsys.readouterr().err
    assert "step 5" in printed and "cross-entropy" in printed
    content = vitmsn.read_tensors(folder / "checkpoint.pt")
    assert content["step"] == 4 and all(
        torch.isfinite(v).all() for v in content["target_encoder"].values()
    )


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_masks(pictures, whole, tmp_path):
    assert run_here(*flags(pictures, tmp_path / "again")) == 0
    assert_same_result(whole, tmp_path / "again")
    config = train_msn.make_config({"batch_size": 6})
    batch = train_msn.ImagesInMemory(torch.zeros(6, 3, 32, 32, dtype=torch.uint8)).__getitems__(
        list(range(6))
    )
    first, second = (
        train_msn.make_views(
            batch, train_msn.replace(config, seed=seed), 0, slice(0, 6)
        ).patches_to_keep[0]
        for seed in (0, 1)
    )
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_fifty_kills_at_random_moments(pictures, whole, tmp_path):
    rng, kills, folder = random.Random(0), 0, tmp_path / "run"
    arguments = flags(
        pictures, folder, "--checkpoint-every", "3", "--epochs", "30", "--num-workers", "0"
    )
    assert (
        run_here(*flags(pictures, tmp_path / "calm", "--epochs", "30", "--checkpoint-every", "3"))
        == 0
    )
    while kills < 50:
        process = start(*arguments, "--resume")
        started = time.time()
        while "metrics.csv" not in os.listdir(folder) if folder.exists() else True:
            if process.poll() is not None or time.time() - started > 60:
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 4 if kills else 6))
        if process.poll() is not None:  # finished before the kill: start over in a new folder
            assert process.returncode == 0
            assert_same_result(tmp_path / "calm", folder)
            folder = tmp_path / f"run{kills}"
            arguments = flags(
                pictures, folder, "--checkpoint-every", "3", "--epochs", "30", "--num-workers", "0"
            )
            continue
        process.kill()
        process.communicate()
        kills += 1
    status, printed = finish(start(*arguments, "--resume"), 300)
    assert status == 0, printed
    assert_same_result(tmp_path / "calm", folder)


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_is_the_same_run_to_rounding(
    compiler, pictures, whole, tmp_path, monkeypatch
):
    compile_, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module: compiled.append(module) or compile_(module, backend=compiler),
    )
    assert run_here(*flags(pictures, tmp_path / "run", "--compile")) == 0
    assert [next(module.parameters()).requires_grad for module in compiled[:2]] == [
        True,
        False,
    ]  # anchor, target
    for name in ("loss", "grad_norm"):
        ours, theirs = (
            torch.tensor([float(row[name]) for row in train_msn.read_table(folder / "metrics.csv")])
            for folder in (tmp_path / "run", whole)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_sheet_of_prototypes_is_of_those_that_were_trained(
    pictures, whole, tmp_path, monkeypatch
):
    sheets = []
    monkeypatch.setattr(
        train_msn, "save_neighbours", lambda path, encoder, *rest: sheets.append((encoder, *rest))
    )
    assert run_here(*flags(pictures, tmp_path / "run", "--checkpoint-every", "3")) == 0
    saved = vitmsn.read_tensors(whole / "checkpoint.pt")
    assert sheets[1][-1].equal(saved["prototypes"])
    assert sheets[1][0].fc.fc3.weight.equal(saved["target_encoder"]["fc.fc3.weight"])


def test_what_is_resumed_is_checked_by_its_own_settings(whole, monkeypatch):
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
    start_from, folder = tmp_path / "start", tmp_path / "run"
    assert run_here(*flags(pictures, start_from, "--max-steps", "1")) == 0
    assert run_here(*flags(pictures, folder, "--init-from", start_from, "--max-steps", "4")) == 0
    start_from.rename(tmp_path / "gone")
    (folder / "summary.json").unlink()
    capsys.readouterr()
    assert (
        run_here("--resume", "--output-dir", folder, "--max-steps", "2") == 0
    )  # it has 4 behind it already
    assert '"step": 4' in (folder / "summary.json").read_text()
    printed = capsys.readouterr()
    assert "4 of 4 steps are done" in printed.out and "starting from" not in printed.out
