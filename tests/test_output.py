"""What is shown and what is written: nothing dies of printing, and results have a place before the
work begins. And a launcher's environment, left over, which a program that works alone passes over.
"""

import io
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from common import randomized, tiny_config
from PIL import Image
from runs import TINY, make_pictures

import finetune
import train_msn
import vitmsn

NO_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Pictures of which some names are in Greek and Russian, and a class and a file no UTF-8."""
    folder = make_pictures(tmp_path_factory.mktemp("pictures"))
    for part in ("train", "val"):
        place = folder / part / NO_UTF8
        place.mkdir()
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{NO_UTF8} {i}.png")
        (place / f"{NO_UTF8} broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "classifier"
    config = tiny_config(
        image_size=16, patch_size=8, num_labels=None, id2label={0: "αβγ", 1: NO_UTF8}
    )
    randomized(vitmsn.ViTMSNForImageClassification(config)).save_pretrained(folder)
    return folder


def run(main, *words) -> int:
    return train_msn.run_program(main, [str(word) for word in words])


# -- output that cannot show a character -----------------------------------------------------------


class AsciiOutput:
    """In place of stdout and stderr: what can show nothing but ASCII, and raises otherwise."""

    def __init__(self, monkeypatch):
        self.streams = {}
        for name in ("stdout", "stderr"):
            self.streams[name] = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
            monkeypatch.setattr(sys, name, self.streams[name])

    def text(self) -> str:
        printed = ""
        for stream in self.streams.values():
            stream.flush()
            printed += stream.buffer.getvalue().decode("ascii")
        return printed


def test_a_run_outlives_names_that_the_output_cannot_show(pictures, tmp_path, monkeypatch):
    """Pretraining goes to its end and the table measures it, also with classes and files whose
    names are no UTF-8; what can't be shown is escaped."""
    output = AsciiOutput(monkeypatch)
    run_folder = tmp_path / "ранг"
    status = run(train_msn.main, *TINY, "--data", pictures, "--output-dir", run_folder)
    assert status == 0, output.text()
    assert (run_folder / "summary.json").exists()
    assert "\\u0440" in output.text() and "\\udce9 broken.png" in output.text()

    few = ("--methods", "probe,knn20", "--labels-per-class", "1", "--fraction", "", "--seeds", "0")
    status = run(finetune.main, "--checkpoint", run_folder, *few)
    assert status == 0, output.text()
    assert (run_folder / "finetune" / "table.png").exists()


@pytest.mark.parametrize("command", list(finetune.COMMANDS))
def test_every_command_takes_names_that_the_output_cannot_show(
    command, pictures, classifier, tmp_path, monkeypatch
):
    """Its results are written, and it ends well."""
    flags = {
        "predict": ("--csv", tmp_path / "a.csv"),
        "attention": ("--output-dir", tmp_path),
        "embed": ("--output", tmp_path / "a.npz"),
        "neighbours": ("--output", tmp_path / "a.png"),
    }
    output = AsciiOutput(monkeypatch)
    images = pictures / "val" / NO_UTF8
    assert run(finetune.main, command, classifier, images, *flags[command]) == 0, output.text()
    assert "\\udce9" in output.text()
    written = list(tmp_path.iterdir())
    assert len(written) == (6 if command == "attention" else 1)


def test_predictions_are_written_before_they_are_shown(
    pictures, classifier, tmp_path, monkeypatch, capsys
):
    """If nothing can be shown, the table of --csv is there."""

    def fail(*_, **__):
        raise OSError("nobody reads")

    monkeypatch.setattr("builtins.print", fail)
    monkeypatch.setattr(finetune, "say", lambda *_: None)
    table = tmp_path / "a.csv"
    with pytest.raises(OSError, match="nobody reads"):
        finetune.main(
            ["predict", str(classifier), str(pictures / "val" / NO_UTF8), "--csv", str(table)]
        )
    assert len(table.read_bytes().splitlines()) == 1 + 6 * 2


def test_what_nobody_reads_any_more_ends_no_work():
    """As of `train_msn.py | head -1`: lines are said to a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        train_msn.say("a line", file)
        train_msn.say("another one", file)


# -- places for results ----------------------------------------------------------------------------

PLACES = {
    "": "--output-dir",
    "train": "--output-dir",
    "predict": "--csv",
    "attention": "--output-dir",
    "embed": "--output",
    "neighbours": "--output",
}


@pytest.mark.parametrize("command", list(PLACES))
def test_a_place_for_results_is_tried_before_the_work(
    command, pictures, classifier, tmp_path, monkeypatch, capsys
):
    """What can't be written is refused in one line with the flag that says another place; no work
    is done, and no folder is left."""

    def work(*_, **__):
        raise AssertionError("this is work, whose result would be lost")

    for name in ("measure", "classify_files", "attention_maps", "save_neighbours"):
        monkeypatch.setattr(finetune, name, work)
    monkeypatch.setattr(finetune.Experiment, "trained", work)
    (tmp_path / "file").write_text("no folder")
    flag = PLACES[command]
    place = (flag, tmp_path / "file" / "deep" / "result")
    if command in finetune.COMMANDS:
        if command == "embed":
            monkeypatch.setattr(finetune, "embed_images", work)
        images = pictures / "val" / NO_UTF8
        status = run(finetune.main, command, classifier, images, *place)
    else:
        few = ("--labels-per-class", "1", "--fraction", "", "--data", pictures, *place)
        status = run(finetune.main, *filter(None, [command]), "--checkpoint", classifier, *few)
    line = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and flag in line and "can't be written" in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_trying_a_place_leaves_nothing(tmp_path):
    """No file and no folder that was not there before."""
    (tmp_path / "there").mkdir()
    train_msn.check_writable(tmp_path / "there" / "a" / "b" / "c.csv", "--csv")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with pytest.raises(train_msn.UsageError, match="directory"):
        train_msn.check_writable(tmp_path / "there", "--csv")


# -- a launcher's environment ----------------------------------------------------------------------


def test_what_works_alone_waits_for_nobody(classifier, pictures, tmp_path, monkeypatch):
    """WORLD_SIZE and the like, left over in a terminal, do not matter to finetune.py."""
    monkeypatch.setattr(train_msn, "TIMEOUT", timedelta(seconds=1))
    left_over = {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "10.0.0.1"}
    for name, value in {**left_over, "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    images = pictures / "val" / NO_UTF8
    assert run(finetune.main, "embed", classifier, images, "--output", tmp_path / "a.npz") == 0
    assert not torch.distributed.is_initialized()
