"""bench.py: each suite runs on a tiny model and writes what it promises; FLOPs are those that torch counts."""

import itertools
import json
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from common import randn, tiny_config
from torch.utils.flop_counter import FlopCounterMode

import bench
from train_msn import make_config, run_program
from vitmsn import ViTMSNForImageClassification, ViTMSNModel

TINY = [
    "--hidden-size=24",
    "--num-hidden-layers=2",
    "--num-attention-heads=3",
    "--patch-size=8",
    "--image-size=32",
    "--threads=1",
    "--repeats=2",
    "--device=cpu",
]
TRAINING = [
    "--batch-size=4",
    "--focal-size=16",
    "--focal-views=2",
    "--head-hidden-size=16",
    "--num-prototypes=8",
]


def run(tmp_path, capsys, *argv: str) -> tuple[list[dict], str]:
    path = tmp_path / "out.json"
    assert run_program(bench.main, [*argv, *TINY, "--json", str(path)]) == 0, (
        capsys.readouterr().err
    )
    content, printed = json.loads(path.read_text()), capsys.readouterr().out
    machine = content["machine"]
    assert all(
        str(machine[name]) in printed.splitlines()[0] for name in ("machine", "threads", "torch")
    )
    assert printed.count("\n| ") == 2 + len(content["rows"])  # names, dashes, rows
    return content["rows"], printed


def assert_timed(result: dict) -> None:
    assert 0 < result["low"] <= result["median"] <= result["high"]


def test_batch_size_means_batch_sizes_to_inference(tmp_path, capsys):
    rows, _ = run(tmp_path, capsys, "inference", "--batch-size", "3", "--attn", "sdpa")
    assert [row["batch"] for row in rows] == [3]


def test_without_a_suite_it_prints_the_documented_table(tmp_path, capsys):
    rows, _ = run(tmp_path, capsys)
    assert [(row["precision"], row["batch"]) for row in rows] == [
        ("float32", b) for b in (1, 2, 4, 8)
    ]
    for row in rows:
        assert_timed(row["eager"]), assert_timed(row["sdpa"])
        assert (
            row["eager / sdpa"] == row["eager"]["median"] / row["sdpa"]["median"]
            and 0 < row["sdpa, of peak"] < 1
        )


def test_inference_is_set_beside_transformers_in_the_same_run(tmp_path, capsys):
    pytest.importorskip("transformers")
    rows, _ = run(
        tmp_path,
        capsys,
        "inference",
        "--against",
        "transformers",
        "--attn",
        "sdpa",
        "--batch-sizes",
        "2",
        "--head",
        "classifier",
        "--precision",
        "float32",
        "bfloat16",
    )
    assert [row["precision"] for row in rows] == ["float32", "bfloat16"]
    assert all(row["sdpa, transformers / ours"] > 0 for row in rows)


def test_train_shows_the_whole_step_its_memory_and_its_parts(tmp_path, capsys):
    (row,), _ = run(
        tmp_path,
        capsys,
        "train",
        *TRAINING,
        "--attn",
        "eager",
        "--mask-ratio=0.5",
        "--precision=float32",
    )
    assert_timed(row["step"])
    assert row["attention"] == "eager" and row["mask_ratio"] == 0.5 and row["of peak"] > 0
    assert row["step"]["memory"] > 50 and row["images/s"] == 4 / row["step"]["median"]
    assert all(0 < row[part] < 1 for part in ("views", "forward", "backward", "optimizer", "EMA"))


def test_masking_pays_only_for_the_patches_that_are_kept(tmp_path, capsys):
    rows, _ = run(tmp_path, capsys, "masking", *TRAINING, "--no-memory")
    assert [row["mask_ratio"] for row in rows] == [i / 10 for i in range(10)]
    work = [row["GFLOP"] for row in rows]
    assert work == sorted(work, reverse=True) and work[0] > work[-1]


def test_views_are_set_beside_pillow_s(tmp_path, capsys):
    (row,), _ = run(
        tmp_path, capsys, "views", *TRAINING, "--blur", "1", "--source-size", "40", "50"
    )
    assert_timed(row["ours"]), assert_timed(row["Pillow"])
    assert row["views"] == 4 and row["source"] == "40x50" and row["Pillow / ours"] > 0


def test_growth_doubles_one_thing_at_a_time(tmp_path, capsys):
    rows, _ = run(tmp_path, capsys, "growth", *TRAINING, "--no-memory")
    names = ("image_size", "num_prototypes", "focal_views", "batch_size")
    varied = [(name, row[name]) for row in rows for name in names if name in row]
    starts = zip(names, (32, 8, 2, 4), strict=True)
    assert varied == [(name, start * factor) for name, start in starts for factor in (1, 2, 4)]
    for before, row in itertools.pairwise(rows):
        assert row["images/s"] == pytest.approx(row.get("batch_size", 4) / row["step"]["median"])
        if "power" in row:
            assert 2 ** row["power"] == pytest.approx(
                row["step"]["median"] / before["step"]["median"]
            )
    assert ["power" in row for row in rows] == [False, True, True] * len(names)


def killed_when_it_runs():
    return lambda: None, lambda _: os.kill(os.getpid(), signal.SIGKILL)


def test_a_case_that_the_system_kills_is_an_error_not_a_wait():
    args = SimpleNamespace(threads=1, device=torch.device("cpu"))
    with pytest.raises(BrokenProcessPool):
        bench.measure({"too large": (killed_when_it_runs,)}, args, memory=True)


def test_a_wrong_request_is_one_line(capsys):
    assert run_program(bench.main, ["train", "--recipe", "demo", "--threads", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("model_class", [ViTMSNModel, ViTMSNForImageClassification])
def test_forward_flops_are_those_torch_counts(model_class):
    config = tiny_config(attn_implementation="eager", num_labels=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model_class(config)(randn(3, 3, 32, 32))
    assert counter.get_total_flops() == 3 * bench.forward_flops(
        config, 16, model_class is not ViTMSNModel
    )


def test_step_flops_are_those_torch_counts_in_all_but_views_and_fused_attention():
    config = replace(make_config({"batch_size": 4}), precision="float32", mask_ratio=0.5)
    parts = bench.step_parts("", config, "eager", [32, 32], torch.device("cpu"))
    counters = {name: FlopCounterMode(display=False) for name in ("step", "views")}
    for name, counter in counters.items():
        new_input, part = parts[name]
        with counter:
            part(new_input())
    counted = counters["step"].get_total_flops() - counters["views"].get_total_flops()
    assert bench.step_flops(config) == pytest.approx(
        counted, rel=0.03
    )  # the target's attention is fused: not counted
