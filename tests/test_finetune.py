"""finetune.py: the probe against its oracle, labelled sets, fine-tuning, no leak from validation, the command line."""

import csv
import io
import json
import os
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import assert_relatively_close, randn, randomized, tiny_config
from PIL import Image

import finetune
from finetune import (
    FinetuneConfig,
    center_and_scale,
    classify,
    draw_labelled,
    fit_logistic_probe,
    layerwise_groups,
    measure,
    open_experiment,
    train_classifier,
)
from train_msn import ImagesInMemory, UsageError, run_program
from vitmsn import ViTMSNForImageClassification, ViTMSNModel, preprocess

GOLDEN = Path(__file__).parent / "golden" / "logistic.npz"
CLASSES = ["blå bær", "красный", "緑 茶"]  # names of folders: no ASCII, a space


def synthetic_rows(
    n: int, d: int, classes: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy points around one centre per class, as the probe gets them."""
    labels = torch.arange(n) % classes
    return center_and_scale(
        randn(n, d, seed=seed) + 0.7 * randn(classes, d, seed=seed + 1)[labels]
    ), labels


def gradient_norm(w, rows, labels, l2):
    p = (rows @ w.T).softmax(dim=-1) - F.one_hot(labels, len(w))
    return (p.T @ rows / len(rows) + l2 / len(rows) * w).norm().item()


# --- the logistic probe ---


def test_the_probe_finds_the_golden_minimiser():
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN).items()}
    rows, test_rows = center_and_scale(golden["train_x"]), center_and_scale(golden["test_x"])
    assert_relatively_close(rows, golden["train_rows"], 1e-12)
    assert_relatively_close(test_rows, golden["test_rows"], 1e-12)
    labels = golden["train_y"].long()
    for i in range(int(golden["num_lambdas"])):
        l2, expected = golden[f"lambda{i}"].item(), golden[f"W{i}"]
        w = fit_logistic_probe(rows, labels, len(expected), l2)
        objective = F.cross_entropy(rows @ w.T, labels) + l2 / len(rows) / 2 * w.square().sum()
        assert_relatively_close(w, expected, 1e-9, f"W at lambda {l2}")
        assert_relatively_close(
            objective, golden[f"objective{i}"], 1e-12, f"objective at lambda {l2}"
        )
        assert torch.equal((test_rows @ w.T).argmax(dim=-1), golden[f"test_pred{i}"].long())


@pytest.mark.parametrize("n, d, classes", [(12, 200, 4), (300, 16, 7), (64, 64, 2)])
@pytest.mark.parametrize("l2", [2.5e-4, 0.0025, 1.0])
def test_the_probe_is_scikit_learns(n, d, classes, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rows, labels = synthetic_rows(n, d, classes)
    w = fit_logistic_probe(rows, labels, classes, l2)
    assert gradient_norm(w, rows, labels, l2) < 1e-11
    if classes > 2:  # two classes are another parametrisation there
        theirs = linear_model.LogisticRegression(
            C=1 / l2, fit_intercept=False, tol=1e-8, max_iter=5000
        )
        assert_relatively_close(w, theirs.fit(rows.numpy(), labels.numpy()).coef_, 1e-3)


def test_rows_are_centred_and_of_unit_length():
    rows = center_and_scale(3 + 5 * randn(6, 9))
    assert rows.dtype == torch.float64
    assert_relatively_close(rows.mean(dim=1), torch.zeros(6), 1e-15)
    assert_relatively_close(rows.norm(dim=1), torch.ones(6), 1e-12)


def test_shuffled_labels_score_at_chance():
    rows, labels = synthetic_rows(600, 32, 5)
    shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    accuracy = {}
    for name, given in (("true", labels), ("shuffled", shuffled)):
        w = fit_logistic_probe(rows[:300], given[:300], 5, 0.0025)
        accuracy[name] = ((rows[300:] @ w.T).argmax(dim=-1) == labels[300:]).double().mean().item()
    assert accuracy["true"] > 0.85
    assert abs(accuracy["shuffled"] - 0.2) < 0.09  # four standard deviations of 300 guesses


# --- labelled sets ---


def test_draws_are_stratified_reproducible_and_nested():
    labels = torch.arange(80) % 4
    labels[::7] = -1  # may not be drawn
    five = draw_labelled(labels, 5, seed=3)
    assert torch.equal(
        labels[five], torch.arange(4).repeat_interleave(5)
    )  # class by class; none of those marked -1
    assert len(set(five)) == 20
    assert five == draw_labelled(labels, 5, seed=3) != draw_labelled(labels, 5, seed=4)
    assert set(draw_labelled(labels, 2, seed=3)) < set(five)
    assert labels[draw_labelled(labels, [1, 0, 3, 2], seed=0)].tolist() == [0, 2, 2, 2, 3, 3]
    torch.manual_seed(9)
    torch.rand(5)  # the global generator has no say
    assert five == draw_labelled(labels, 5, seed=3)
    with pytest.raises(UsageError, match=r"class fig has 17 images .* 18"):
        draw_labelled(labels, 18, 0, ["fig", "kiwi", "pear", "plum"])


# --- fine-tuning ---


def test_layer_decay_gives_each_parameter_its_rate():
    model = ViTMSNForImageClassification(tiny_config(num_hidden_layers=3))
    groups = layerwise_groups(model, 1.0, 0.5, 0.1)
    found = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert (
        sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    )
    rates = {
        "classifier": 1,
        "vit.norm": 1,
        "vit.blocks.2": 0.5,
        "vit.blocks.1": 0.25,
        "vit.blocks.0": 0.125,
        "vit.patch_embed": 0.0625,
        "vit.cls_token": 0.0625,
        "vit.pos_embed": 0.0625,
    }
    for name, parameter in model.named_parameters():
        rate = next(rate for prefix, rate in rates.items() if name.startswith(prefix))
        assert found[id(parameter)] == (rate, 0.1 if parameter.ndim > 1 else 0.0), name


def colored_images(n: int, seed: int) -> tuple[ImagesInMemory, torch.Tensor]:
    """Noise with one bright channel, which is the class."""
    labels = torch.arange(n) % 3
    pixels = torch.randint(
        60, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    pixels[torch.arange(n), labels] += 120
    return ImagesInMemory(pixels), labels


def test_training_learns_repeats_itself_and_looks_at_labelled_images_only():
    config = FinetuneConfig(steps=30, lr=3e-3, batch_size=8, drop_path_rate=0.0)
    images, labels = colored_images(60, 0)
    labelled = list(range(12))
    poisoned = ImagesInMemory(images.images.clone()), labels.clone()
    poisoned[0].images[12:] = 255
    poisoned[1][12:] = -100  # cross_entropy would leave these out, or fail
    results = []
    config = replace(config, crop_scale=(0.3, 1.0))
    for data, given in ((images, labels), (images, labels), poisoned):
        model = finetune.build_classifier(
            randomized(ViTMSNModel(tiny_config(image_size=16, patch_size=8))), CLASSES, config, None
        )
        train_classifier(model, data, given, labelled, config, config.lr, 0.8, seed=0)
        results.append(model)
    for other in results[1:]:
        assert all(
            torch.equal(a, b)
            for a, b in zip(results[0].parameters(), other.parameters(), strict=True)
        )
    assert not results[0].training
    assert (
        classify(results[0], images, list(range(12, 60))).argmax(dim=-1) == labels[12:]
    ).double().mean() > 0.9


def test_a_loss_that_is_not_finite_stops_training():
    images, labels = colored_images(6, 0)
    model = ViTMSNForImageClassification(tiny_config(image_size=16, patch_size=8, num_labels=3))
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        train_classifier(model, images, labels, list(range(6)), FinetuneConfig(), 1e-3, 1.0, 0)


# --- the commands, on pictures made here ---


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with data (train/CLASS/*, val/CLASS/*) and an encoder, and what `train` makes of them."""
    folder, rng = tmp_path_factory.mktemp("wörld"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for c, name in enumerate(CLASSES):
            (folder / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
                pixels[..., c] += 120
                Image.fromarray(pixels).save(folder / "data" / part / name / f"{part} {c} {i}é.png")
    torch.manual_seed(0)
    randomized(ViTMSNModel(tiny_config(image_size=16, patch_size=8))).save_pretrained(
        folder / "encoder"
    )
    assert (
        run(folder, "train", "--lr", "3e-3", "--epochs", "5", "--output-dir", folder / "classifier")
        == 0
    )
    return folder


def run(folder: Path, *arguments, data: bool = True) -> int:
    """finetune.py's exit status, with the folder's encoder and data unless a command has its own."""
    own = [
        "--checkpoint",
        folder / "encoder",
        "--data",
        folder / "data",
        "--steps",
        "10",
        "--batch-size",
        "8",
    ]
    return run_program(finetune.main, [str(a) for a in (*arguments, *(own if data else []))])


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_the_table_has_every_method_and_column(world, capsys):
    flags = (
        "--labels-per-class",
        "1,2",
        "--fraction",
        "0.25",
        "--seeds",
        "0,1",
        "--output-dir",
        world / "table",
    )
    assert run(world, *flags, "--methods", ",".join(finetune.METHODS)) == 0
    rows, out = table(world / "table" / "table.csv"), capsys.readouterr().out
    assert {row["method"] for row in rows} == set(finetune.METHODS)
    cells = {(row["method"], row["column"]): row for row in rows}
    assert ("finetune", "100 %") not in cells and float(cells["probe", "100 %"]["mean"]) == 1
    draws = [float(x) for x in cells["pixels", "2/class"]["draws"].split()]
    assert_relatively_close(float(cells["pixels", "2/class"]["mean"]), np.mean(draws), 1e-12)
    assert_relatively_close(float(cells["pixels", "2/class"]["sd"]), np.std(draws, ddof=1), 1e-12)
    assert cells["scratch", "25 %"]["labels_per_class"] == "2.0" and "no draw uses" in out
    assert "±" in out and (world / "table" / "table.png").stat().st_size > 1000
    assert json.loads((world / "table" / "config.json").read_text())["steps"] == 10


def test_no_draw_uses_the_tuning_part_and_no_result_depends_on_validation(
    world, monkeypatch, tmp_path
):
    config = FinetuneConfig(
        checkpoint=str(world / "encoder"),
        data=str(world / "data"),
        labels_per_class="1,3",
        full=False,
        fraction="",
        seeds="0,1",
        steps=5,
        methods=",".join(finetune.METHODS),
    )
    predictions, honest, made = [], finetune.open_data, finetune.Experiment.predict

    def corrupted(train_config):
        data = honest(train_config)
        return data._replace(val_labels=data.val_labels.flip(0))

    def recorded(experiment, *arguments):
        predictions[-1].append((made(experiment, *arguments), experiment.scratch_lr))
        return predictions[-1][-1][0]

    monkeypatch.setattr(finetune.Experiment, "predict", recorded)
    for source in (honest, corrupted):
        predictions.append([])
        monkeypatch.setattr(finetune, "open_data", source)
        experiment, val_labels, _ = open_experiment(config)
        assert experiment.data.val_labels is None
        drawn = {i for draws in experiment.columns.values() for draw in draws for i in draw}
        assert len(experiment.tuning) >= 6 and not drawn & set(experiment.tuning)
        measure(experiment, val_labels, tmp_path)
    assert len(predictions[0]) == len(finetune.METHODS) * 2 * 2
    for (first, rate), (second, other_rate) in zip(*predictions, strict=True):
        assert torch.equal(first, second) and rate == other_rate


def test_a_saved_classifier_predicts_the_same_when_loaded(world):
    paths = sorted((world / "data" / "val").rglob("*.png"))
    model = ViTMSNForImageClassification.from_pretrained(world / "classifier")
    assert list(model.config.id2label.values()) == sorted(CLASSES)
    logits = model(preprocess([Image.open(path) for path in paths], model.config)).logits
    ours = classify(model, finetune.ImageFiles(paths, 32, 0, check=False), list(range(len(paths))))
    assert_relatively_close(
        logits.softmax(dim=-1), ours, 0.02
    )  # two resizes that round differently
    assert [model.config.id2label[c] for c in logits.argmax(dim=-1).tolist()] == [
        path.parent.name for path in paths
    ]
    assert [float(row["accuracy"]) for row in table(world / "classifier" / "accuracy.csv")] == [
        1.0
    ] * 4


def test_fine_tuning_starts_as_the_probe():
    images, labels = colored_images(12, 0)
    encoder = randomized(ViTMSNModel(tiny_config(image_size=16)))
    rows = center_and_scale(
        finetune.embed_images(encoder, images, list(range(12)), 16, torch.device("cpu"))[0]
    )
    w = fit_logistic_probe(rows, labels, 3, 0.1)
    model = finetune.build_classifier(encoder, CLASSES, FinetuneConfig(), w).eval()
    assert_relatively_close(
        classify(model, images, list(range(12))), (rows @ w.T).softmax(dim=-1), 1e-4
    )


def test_saving_changes_no_prediction(tmp_path):
    images, _ = colored_images(9, 0)
    model = randomized(
        ViTMSNForImageClassification(tiny_config(image_size=16, num_labels=3))
    ).eval()
    model.save_pretrained(tmp_path)
    loaded = finetune.load_model(FinetuneConfig(checkpoint=str(tmp_path)), classifier=True)
    assert torch.equal(classify(model, images, [0, 4, 8]), classify(loaded, images, [0, 4, 8]))


def test_predict_names_skips_and_counts_what_it_cannot_read(world, capsys, tmp_path):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (30, 20), (0, 0, 200)).save(tmp_path / "sub" / "blau ü.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("not an image, and not named like one")
    flags = ("--top", "2", "--csv", tmp_path / "out.csv")
    assert run(world, "predict", world / "classifier", tmp_path, *flags, data=False) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and "blau ü.png: " + sorted(CLASSES)[2] in out
    assert (
        "broken.jpg is no readable image" in err
        and "1 pictures, 1 unreadable" in err
        and "notes" not in err
    )
    rows = table(tmp_path / "out.csv")
    assert [row["place"] for row in rows] == ["1", "2"] and rows[0]["class"] == sorted(CLASSES)[2]


def test_embed_writes_one_row_per_image_with_its_path_and_class(world, tmp_path):
    flags = ("--output", tmp_path / "new" / "f.npz")
    assert run(world, "embed", world / "encoder", world / "data" / "val", *flags, data=False) == 0
    content = np.load(tmp_path / "new" / "f.npz")
    assert content["features"].shape == (12, 24) and content["features"].dtype == np.float32
    assert [Path(path).parent.name for path in content["paths"]] == content["classes"].tolist()
    encoder = ViTMSNModel.from_pretrained(world / "encoder")
    expected = encoder.representation(preprocess(Image.open(content["paths"][5]), encoder.config))
    assert_relatively_close(content["features"][5], expected[0], 0.02)


def test_a_name_that_is_no_utf8_stays_in_the_table(tmp_path):
    finetune.write_csv(tmp_path / "new" / "a.csv", ("image",), [(os.fsdecode(b"caf\xe9.png"),)])
    assert (tmp_path / "new" / "a.csv").read_bytes() == b"image\ncaf\xe9.png\n"


def test_a_rate_from_scratch_is_tuned_on_all_classes(monkeypatch):
    labels, seen = torch.arange(3).repeat_interleave(7), []
    scores = torch.zeros(21, 3)
    data = finetune.Images(CLASSES, None, labels, None, None)
    experiment = finetune.Experiment(FinetuneConfig(), {}, data, [], {}, list(range(21)))
    monkeypatch.setattr(
        finetune.Experiment, "trained", lambda self, method, fit, seed, lr: seen.append(fit)
    )
    monkeypatch.setattr(
        finetune, "classify", lambda model, images, held: seen.append(held) or scores[held]
    )
    assert experiment.scratch_lr in finetune.SCRATCH_RATES and len(seen) == 6
    fit, held = seen[:2]
    assert labels[fit].tolist() == [0, 0, 1, 1, 2, 2] and sorted(fit + held) == list(range(21))


def test_draws_are_trained_by_their_own_seeds(tmp_path, monkeypatch):
    seeds, data = [], finetune.Images(CLASSES, None, torch.arange(3), None, None)
    columns = {"1/class": [[0], [1]], "100 %": [[0, 1, 2]]}
    experiment = finetune.Experiment(
        FinetuneConfig(methods="probe", seeds="7,5"), {}, data, [0], columns, []
    )
    predict = lambda self, method, draw, seed: seeds.append(seed) or torch.zeros(1)  # noqa: E731
    monkeypatch.setattr(finetune.Experiment, "predict", predict)
    measure(experiment, torch.zeros(1), tmp_path)
    assert seeds == [7, 5, 7]


def test_train_tells_of_no_class_that_no_validation_image_shows(world, tmp_path, capsys):
    assert (
        run(
            world,
            "train",
            "--labels-per-class",
            "1",
            "--val-images",
            "1",
            "--steps",
            "1",
            "--epochs",
            "0",
            "--output-dir",
            tmp_path,
        )
        == 0
    )
    assert len(table(tmp_path / "accuracy.csv")) == 2 and "nan" not in capsys.readouterr().out


def test_attention_and_neighbours_draw_sheets(world, tmp_path):
    picture = next((world / "data" / "val").rglob("*.png"))
    assert (
        run(
            world,
            "attention",
            world / "classifier",
            picture,
            "--output-dir",
            tmp_path / "a",
            "--image-size",
            "32",
            data=False,
        )
        == 0
    )
    with Image.open(tmp_path / "a" / f"0000-{picture.stem}.png") as sheet:
        assert sheet.size == (4 * 228, 228 + 16)  # the picture and three heads
    assert (
        run(
            world,
            "neighbours",
            world / "encoder",
            world / "data",
            "--output",
            tmp_path / "n.png",
            data=False,
        )
        == 0
    )
    with Image.open(tmp_path / "n.png") as sheet:
        assert sheet.size == (8 * 100, 8 * 100 + 16)  # eight queries, each with its seven nearest


def test_a_label_list_is_the_labelled_set(world, tmp_path):
    train = world / "data" / "train"
    listed = [next((train / name).glob("*2é.png")) for name in CLASSES]
    (tmp_path / "a.txt").write_text(
        "\n".join(path.name for path in listed) + "\n", encoding="utf-8"
    )
    longer = [f"{path.parent.name}/{path.name}" for path in reversed(listed)]
    (tmp_path / "b.txt").write_text("\n".join(longer), encoding="utf-8")
    experiment, _, _ = open_experiment(
        FinetuneConfig(
            checkpoint=str(world / "encoder"),
            data=str(world / "data"),
            label_list=f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}",
        )
    )
    assert list(experiment.columns) == ["listed"]
    first, second = experiment.columns["listed"]
    assert first == second and {experiment.data.train.paths[i] for i in first} == set(listed)


def test_an_unreadable_training_image_is_replaced_in_the_draws_and_counted(world, capsys, tmp_path):
    config = FinetuneConfig(
        checkpoint=str(world / "encoder"), data=str(tmp_path), labels_per_class="2", fraction=""
    )
    (tmp_path / "train").symlink_to(world / "data" / "train")
    for name in CLASSES:
        (tmp_path / "val" / name).mkdir(parents=True)
        picture = next((world / "data" / "val" / name).glob("*1é.png"))
        (tmp_path / "val" / name / "1.png").write_bytes(picture.read_bytes())
    before, _, _ = open_experiment(config)
    broken = before.columns["2/class"][0][0]
    monkey = finetune.ImageFiles.read
    try:
        finetune.ImageFiles.read = lambda images, i: (
            None if len(images) == 24 and i == broken else monkey(images, i)
        )
        after, _, _ = open_experiment(config)
    finally:
        finetune.ImageFiles.read = monkey
    assert after.columns["2/class"][0] != before.columns["2/class"][0]
    labels = after.data.train_labels[after.columns["2/class"][0]]
    assert (
        torch.equal(labels, torch.tensor([0, 0, 1, 1, 2, 2]))
        and broken not in after.columns["100 %"][0]
    )
    assert "(1 so far)" in capsys.readouterr().err


BAD = [
    (("--labels-per-class", "9"), "has 8 images to draw from, fewer than the 9"),
    (("--labels-per-class", "two"), "must be numbers"),
    (("--labels-per-class", "0"), "out of range"),
    (("--methods", "probe,magic"), "magic is not known"),
    (("--fraction", "1.5"), "out of range"),
    (("--seeds", "much"), "must be numbers"),
    (("--l2", "0"), "out of range"),
    (("--seeds", ""), "at least one of each"),
    (("--methods", ""), "at least one of each"),
    (("--image-size", "20"), "no whole number of this checkpoint's patches of 8"),
    (("--checkpoint", "nowhere"), "neither a file nor a folder"),
    (("--data", "nowhere"), "no folder"),
    (("--label-list", "nowhere.txt"), "can't be read"),
    (("train", "--labels-per-class", "1,2"), "one labelled set"),
]


@pytest.mark.parametrize(
    "arguments, message", BAD, ids=[" ".join(arguments) for arguments, _ in BAD]
)
def test_bad_usage_is_one_clear_line_and_status_2(
    world, capsys, monkeypatch, tmp_path, arguments, message
):
    monkeypatch.chdir(tmp_path)
    command, flags = (arguments[:1], arguments[1:]) if arguments[0] == "train" else ((), arguments)
    own = [
        f"--{name}={world / place}" for name, place in (("checkpoint", "encoder"), ("data", "data"))
    ]
    assert run_program(finetune.main, [*command, *own, *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_other_bad_input_says_what_to_do(world, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        sys.modules, "huggingface_hub", None
    )  # as if it were not installed: nothing is fetched
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"")
    for part, names in (("train", "ab"), ("val", "abc")):
        for name in names:
            (tmp_path / "odd" / part / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / "odd" / part / name / "1.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(
        (world / "encoder" / "config.json").read_text()
    )
    (tmp_path / "broken" / "pytorch_model.bin").write_bytes(b"not torch")
    for arguments, status, message in [
        ((), 2, "there is no run in runs/"),
        (("predict", world / "encoder", "x.png"), 2, "has no classifier"),
        (("predict", world / "classifier", "empty"), 2, "holds no image"),
        (
            ("predict", world / "classifier", "bad.png"),
            2,
            "none of the 1 files is a readable image",
        ),
        (
            ("predict", world / "classifier", "bad.png", "--lr", "1"),
            2,
            "predict has no use for --lr",
        ),
        (
            ("predict", "a.png", "b.png", "--checkpoint", "c"),
            2,
            "predict has no use for --checkpoint",
        ),
        (("--csv", "a.csv"), 2, "the table has no use for --csv"),
        (("train", "--top", "1"), 2, "train has no use"),
        (
            (
                "--checkpoint",
                world / "encoder",
                "--data",
                world / "data",
                "--labels-per-class",
                "",
                "--fraction",
                "",
                "--no-full",
            ),
            2,
            "no column is asked for",
        ),
        (("predict", "a/b", "c.png"), 1, "is no folder here"),
        (("neighbours", world / "encoder", "odd/train/a/1.png"), 2, "two pictures or more"),
        (("embed", "broken", "odd"), 1, "pytorch_model.bin can't be read"),
        (("--checkpoint", world / "encoder"), 2, "pass --data"),
        (("--checkpoint", world / "encoder", "--data", "odd"), 2, "classes that train lacks: c"),
        (("--checkpoint", world / "encoder", "--data", "odd/train"), 2, "the data must be folders"),
    ]:
        assert run_program(finetune.main, [str(a) for a in arguments]) == status, arguments
        err = capsys.readouterr().err
        assert message in err.splitlines()[-1], (arguments, err)


def test_a_label_list_of_damaged_images_only_is_refused(world, capsys, monkeypatch, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    damaged = sorted((tmp_path / "data" / "train" / CLASSES[0]).iterdir())[0]
    damaged.write_bytes(b"")
    (tmp_path / "list.txt").write_text(damaged.name, encoding="utf-8")
    flags = (
        "--checkpoint",
        world / "encoder",
        "--data",
        tmp_path / "data",
        "--label-list",
        tmp_path / "list.txt",
    )
    assert run_program(finetune.main, [str(flag) for flag in flags]) == 2
    assert "none of a label list" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "all_labels"),
    [
        ((), True),
        (("--fraction", "1"), True),
        (("--fraction", "1.0"), True),
        (("--fraction", "0.5"), False),
        (("--labels-per-class", "2"), False),
    ],
)
def test_train_augments_strongly_only_with_all_labels(flags, all_labels, monkeypatch):
    configs = []
    monkeypatch.setattr(finetune, "train_and_save", configs.append)
    finetune.main(["train", *flags])
    assert configs[0].crop_scale == ((0.3, 1.0) if all_labels else (0.8, 1.0))
    assert configs[0].drop_path_rate == (0.1 if all_labels else 0.0)


def test_transformers_loads_the_classifier_and_agrees(world):
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.ViTMSNForImageClassification.from_pretrained(
            world / "classifier"
        ).eval()
    ours, pixels = (
        ViTMSNForImageClassification.from_pretrained(world / "classifier"),
        randn(2, 3, 16, 16),
    )
    assert list(theirs.config.id2label.values()) == sorted(CLASSES)
    with torch.no_grad():
        assert_relatively_close(ours(pixels).logits, theirs(pixels).logits, 1e-5)
