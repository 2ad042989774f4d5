"""train_msn.py --ablations: each row of the tables is run with three seeds, once, and written down
at once; after an interruption the same command goes on."""

import json

import pytest
from runs import TINY, make_pictures, run_here

import train_msn
from train_msn import Ablation, parse_flags

ROWS = (Ablation(None, ""), Ablation(8, "", 66.0), Ablation(8, "--mask-ratio 0.5", 64.8))


@pytest.fixture
def flags(tmp_path, monkeypatch) -> tuple:
    """Of a tiny run of two different rows, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_msn, "ABLATIONS", ROWS)
    pictures = make_pictures(tmp_path / "pictures")
    return (*TINY, "--recipe", "demo", "--data", pictures, "--max-steps", 2, "--knn-every", 0)


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_rows_are_run_once_with_three_seeds_and_go_on_after_a_stop(flags, tmp_path, monkeypatch):
    """A run that is stopped leaves those before it in the file; the next call makes what is
    missing. A row of two tables has one run a seed."""
    path = tmp_path / "tables.json"
    train = train_msn.train
    started = []

    def train_until(count):
        def train_or_stop(config, data, folder, *more):
            started.append((config.mask_ratio, config.seed))
            if len(started) <= count:  # else as if a signal had come before the first step
                train(config, data, folder, *more)

        return train_or_stop

    monkeypatch.setattr(train_msn, "train", train_until(2))
    assert run_here(*flags, "--ablations", path) == 0
    assert started == [(0.3, 0), (0.3, 1), (0.3, 2)]
    assert [row["flags"] for row in read(path)["values"]["rows"]] == ["", ""]

    monkeypatch.setattr(train_msn, "train", train_until(7))
    assert run_here(*flags, "--ablations", path) == 0
    assert started[3:] == [(0.3, 2), (0.5, 0), (0.5, 1), (0.5, 2)]
    rows = read(path)["values"]["rows"]
    assert [row["paper, %"] for row in rows] == [None, 66.0, 64.8]
    for row in rows:
        assert len(row["seeds"]) == len(row["prototypes used"]) == 3
        assert row["knn"] == pytest.approx(sum(row["seeds"]) / 3, abs=1e-3)
    assert rows[0]["seeds"] == rows[1]["seeds"]

    assert run_here(*flags, "--ablations", path) == 0
    assert len(started) == 7  # nothing was missing


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"command": "another", "runs": {}}'])
def test_a_file_of_something_else_is_left_alone(text, flags, tmp_path, capsys):
    """It is neither gone on with nor written over."""
    path = tmp_path / "tables.json"
    path.write_text(text)
    assert run_here(*flags, "--ablations", path) == 2
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == text


def test_results_of_other_flags_are_not_mixed(flags, tmp_path, capsys):
    """The file says by which command it was made."""
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"command": "x", "commit": "y", "runs": {}, "values": {"rows": []}}))
    assert run_here(*flags, "--ablations", path) == 2
    assert "give another file" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [("--seed", "3"), ("--output-dir", "x")])
def test_flags_that_the_ablations_set_themselves_are_refused(flag, flags, capsys):
    """Seeds are three, and each run has its own folder."""
    assert run_here(*flags, *flag, "--ablations", "tables.json") == 2
    assert "leave them out" in capsys.readouterr().err


def test_each_ablation_is_a_valid_demo():
    """Its flags are flags of train_msn.py, and go together with the recipe."""
    for ablation in train_msn.ABLATIONS:
        given = parse_flags(ablation.flags.split())
        train_msn.make_config({"recipe": "demo", **given})
    tables = {ablation.table for ablation in train_msn.ABLATIONS}
    assert tables == {None, 7, 8, 9, 11, 12}
