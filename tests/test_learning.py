"""bench.py learning: what its clock counts, what it holds back, and that it trains as train_msn.py
does."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import TINY, make_pictures, run_here

import bench
import train_msn
from train_msn import run_program

CPU = torch.device("cpu")
# Flags of a tiny run, but those that bench.py learning refuses.
KNN = TINY.index("--knn-every")
FLAGS = ("--recipe", "demo", *TINY[:KNN], *TINY[KNN + 2 :])


def setup_with(clock) -> bench.Setup:
    return bench.Setup(CPU, 1, 0, False, clock)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("learning") / "pictures", count=30)


def learning(*argv) -> int:
    """Run `bench.py learning` -> exit status."""
    return run_program(bench.main, ["learning", *map(str, argv)])


# -- what is held back -----------------------------------------------------------------------------


def numbered_images(count: int) -> train_msn.Images:
    """Each image is its number, and so is its label."""
    numbers = torch.arange(count)
    images = numbers.to(torch.uint8)[:, None, None, None].expand(count, 3, 1, 1)
    in_memory = train_msn.ImagesInMemory(images)
    return train_msn.Images([], in_memory, numbers, in_memory, numbers)


@given(count=st.integers(5, 200))
def test_a_fifth_is_held_back_and_the_rest_is_trained_on(count):
    """Each training image is in one of two parts, with its label, always in the same one."""
    to_choose, to_report = bench.hold_back(numbered_images(count))
    assert len(to_choose.val) == count // 5
    together = torch.cat([to_choose.train_labels, to_choose.val_labels])
    assert together.sort().values.equal(torch.arange(count))
    for images, labels in (
        (to_choose.train, to_choose.train_labels),
        (to_choose.val, to_choose.val_labels),
    ):
        batch = images.__getitems__(list(range(len(images))))
        assert [int(image[0, 0, 0]) for image in batch.images] == labels.tolist()
        assert batch.indices == list(range(len(images)))

    assert to_report.train_labels.equal(to_choose.train_labels)
    assert len(to_report.val) == count
    again, _ = bench.hold_back(numbered_images(count))
    assert again.val_labels.equal(to_choose.val_labels)


def test_what_stands_in_for_an_unreadable_image_is_not_taken_for_it():
    """Its number is none of the subset, or another one of it: then it gets no label of another."""
    images = numbered_images(10).train
    batch = images.__getitems__([2, 3])._replace(indices=[7, 4])  # 7 and 4 stand in for 2 and 3
    broken = SimpleNamespace(__getitems__=lambda indices: batch)
    assert bench.Subset(broken, [2, 3, 4]).__getitems__([0, 1]).indices == [-1, 2]


# -- the run and its clock -------------------------------------------------------------------------


def test_epochs_of_the_benchmark_are_those_of_a_run(pictures, tmp_path):
    """Without images held back, the weights are those that train_msn.py gives, bit for bit."""
    flags = ("--recipe", "demo", *TINY, "--data", pictures)
    assert run_here(*flags, "--output-dir", tmp_path / "run") == 0
    given = train_msn.parse_flags([*TINY, "--data", str(pictures)])
    config = train_msn.make_config({"recipe": "demo", **given, "precision": "float32"})
    learner = bench.Learner(config, train_msn.open_data(config), setup_with(lambda: 0.0))
    while learner.share_done() < 1:
        learner.train_epoch()
        learner.evaluate()

    expected = train_msn.build_model(config, train_msn.Processes(0, 1, CPU))
    content = train_msn.read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    train_msn.restore_weights(content, expected)
    weights = learner.model.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_the_clock_counts_views_and_steps_and_no_evaluation(pictures, monkeypatch):
    """Each kind of work takes its own time of a clock that only it moves."""
    now = [0.0]

    def takes(seconds: float, function):
        def timed(*arguments, **options):
            now[0] += seconds
            return function(*arguments, **options)

        return timed

    monkeypatch.setattr(train_msn, "make_views", takes(1, train_msn.make_views))
    monkeypatch.setattr(bench, "train_step", takes(10, bench.train_step))
    monkeypatch.setattr(bench, "knn_accuracy", takes(1000, bench.knn_accuracy))
    given = train_msn.parse_flags([*TINY, "--data", str(pictures)])
    config = train_msn.make_config({"recipe": "demo", **given, "precision": "float32"})
    learner = bench.Learner(config, train_msn.open_data(config), setup_with(lambda: now[0]))

    seconds = []
    for _ in range(2):
        learner.evaluate()
        learner.train_epoch()
        seconds.append(learner.seconds)
    assert seconds == [5 * 11, 10 * 11]  # 30 images in batches of 6


@given(
    accuracies=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    wanted=st.floats(0, 1),
)
def test_the_time_to_an_accuracy_is_that_of_the_first_evaluation_that_gave_it(accuracies, wanted):
    """None if none did; later ones that fall below it change nothing."""
    learner = bench.Learner.__new__(bench.Learner)
    measured = [bench.Measured(i, 10.0 * i, value) for i, value in enumerate(accuracies)]
    learner.measured = measured
    reached = [m.seconds for m in measured if m.accuracy >= wanted]
    assert learner.seconds_to(wanted) == (min(reached) if reached else None)


def test_recipes_take_turns_by_the_share_that_is_done():
    """Of two epochs and of four: A B B A B B."""
    turns = []

    class Counter:
        def __init__(self, name: str, epochs: int):
            self.name = name
            self.config = SimpleNamespace(epochs=epochs)
            self.epoch = 0

        def share_done(self):
            return self.epoch / self.config.epochs

        def train_epoch(self):
            turns.append(self.name)
            self.epoch += 1

        def evaluate(self):
            return bench.Measured(self.epoch, 0.0, 0.0)

        def epoch_work(self):
            return 1.0

    learners = {"A": Counter("A", 2), "B": Counter("B", 4)}
    report = bench.LearningReport(None, {})
    progress = bench.Progress([], setup_with(lambda: 0.0), 6.0)
    bench.learn_in_turn(learners, 2, 0, report, progress)
    assert "".join(turns) == "ABBABB"
    epochs = [(line["recipe"], line["epoch"]) for line in report.records("curves")]
    assert epochs == [("A", 0), ("B", 0), ("B", 2), ("A", 2), ("B", 4)]


# -- the command -----------------------------------------------------------------------------------


def test_two_recipes_are_set_side_by_side(pictures, tmp_path, capsys):
    """A curve, the seconds to each accuracy and their ratio, and one look at validation a run."""
    path = tmp_path / "learning.json"
    flags = (*FLAGS, "--data", pictures, "--seeds", "0,1", "--accuracies", "0,2", "--json", path)
    assert learning(*flags, "--epochs", 2, "--set", "muon=yes", "epochs=1") == 0
    content = json.loads(path.read_text())
    assert str(pictures) not in path.read_text()
    assert (content["settings"]["A"]["muon"], content["settings"]["B"]["muon"]) == (False, True)

    values = content["values"]
    of_a = [line["epoch"] for line in values["curves"] if line["recipe"] == "A"]
    of_b = [line["epoch"] for line in values["curves"] if line["recipe"] == "B"]
    assert (of_a, of_b) == ([0, 1, 2] * 2, [0, 1] * 2)
    assert [line["reaches"] for line in values["seconds"]] == ["0", "2", "B's end"] * 2
    for line in values["seconds"]:
        seconds = [line["A, s"], line["B, s"]]
        assert (seconds == [None, None]) == (line["reaches"] == "2")  # no accuracy is above 1
    assert len(values["ends"]) == 4
    assert all(0 <= line["validation"] <= 1 for line in values["ends"])
    assert [line["seeds"] for line in values["ends, means"]] == ["2 of 2"] * 2
    assert "| A over B |" in capsys.readouterr().out


def test_the_ratio_is_what_a_took_over_what_b_took():
    """None where one of them never got there; last is the accuracy with which B ended."""
    learners = {}
    for name, seconds in (("A", 10.0), ("B", 40.0)):
        learner = object.__new__(bench.Learner)
        learner.measured = [bench.Measured(1, seconds, 0.5), bench.Measured(2, 2 * seconds, 0.6)]
        learners[name] = learner
    learners["A"].measured.append(bench.Measured(3, 30.0, 0.7))

    records = list(bench.seconds_records(learners, [0.5, 0.7], 0))
    assert [record["reaches"] for record in records] == ["0.5", "0.7", "B's end"]
    assert [record["k-NN"] for record in records] == [0.5, 0.7, 0.6]
    assert [record["A, s"] for record in records] == [10.0, 30.0, 20.0]
    assert [record["B, s"] for record in records] == [40.0, None, 80.0]
    assert [record["A over B"] for record in records] == [0.25, None, 0.25]


def test_means_are_over_the_seeds_that_have_all_numbers():
    """Mean and standard deviation of two of three seeds."""
    records = [
        {"seed": 0, "reaches": "0.5", "A, s": 1.0},
        {"seed": 1, "reaches": "0.5", "A, s": 3.0},
        {"seed": 2, "reaches": "0.5", "A, s": None},
    ]
    (mean,) = bench.mean_records(records, ("reaches",))
    deviation = pytest.approx(2**0.5)
    assert mean == {"reaches": "0.5", "seeds": "2 of 3", "A, s": 2.0, "± A, s": deviation}


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("muon=no", ("muon", False)),
        ("focal-views=3", ("focal_views", 3)),
        ("lr=1e-3", ("lr", 1e-3)),
        ("focal_scale=0.1,0.4", ("focal_scale", (0.1, 0.4))),
        ("anchor_view=target", ("anchor_view", "target")),
    ],
)
def test_a_setting_of_b_has_the_type_of_its_field(text, setting):
    assert bench.setting_of(text) == setting


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--set", "learning_rate=1"), "no setting of B"),
        (("--set", "lr=fast"), "lr must be float"),
        (("--set", "muon=1"), "yes or no"),
        (("--set", "seed=3"), "no setting of B"),
        (("--seed", "3"), "use --seeds"),
        (("--knn-every", "3"), "use --every"),
        (("--batch-size", "40"), "24 training images, without those held back"),
    ],
)
def test_what_can_not_be_measured_is_said_in_one_line(flags, complaint, pictures, capsys):
    """The error names the flag and what to use instead."""
    assert learning(*FLAGS, "--data", pictures, *flags) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_pictures_without_labels_are_refused(tmp_path, capsys):
    """There is no k-NN without classes."""
    pictures = make_pictures(tmp_path / "pictures")
    assert learning(*FLAGS, "--data", pictures / "train") == 2
    assert "no labels" in capsys.readouterr().err
