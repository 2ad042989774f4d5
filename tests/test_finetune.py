"""finetune.py: the probe against its oracles, labelled sets, fine-tuning, the table, the commands.

In the order of the file. No test needs data from outside: pictures are made here.
"""

import csv
import io
import json
import os
import shlex
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
from torch import Tensor

import finetune
from finetune import (
    FinetuneConfig,
    center_and_scale,
    classify,
    draw_labelled,
    fit_logistic_probe,
    hessian_product,
    layerwise_groups,
    line_search,
    measure,
    newton_step,
    open_experiment,
    probe_objective,
    train_classifier,
)
from train_msn import ImagesInMemory, UsageError, pack, run_program
from vitmsn import ViTMSNForImageClassification, ViTMSNModel, preprocess, to_original

GOLDEN = Path(__file__).parent / "golden" / "logistic.npz"
CLASSES = ["blå bær", "красный", "緑 茶"]  # names of folders: no ASCII, a space

# --- the logistic probe ---------------------------------------------------------------------------


def clustered_features(n: int, d: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy points around one centre per class, as the probe gets them; and their labels."""
    labels = torch.arange(n) % classes
    centers = 0.7 * randn(classes, d, seed=seed + 1)
    return center_and_scale(randn(n, d, seed=seed) + centers[labels]), labels


def objective_by_definition(w: Tensor, features: Tensor, labels: Tensor, l2: float) -> Tensor:
    """L(W) as the comment above the probe has it, image by image."""
    n = len(features)
    loss = sum(-(w @ x).log_softmax(dim=0)[y] for x, y in zip(features, labels, strict=True))
    return loss / n + (l2 / n) / 2 * (w**2).sum()


def gradient_by_definition(w: Tensor, features: Tensor, labels: Tensor, l2: float) -> Tensor:
    w = w.clone().requires_grad_(True)
    objective_by_definition(w, features, labels, l2).backward()
    return w.grad


def hessian_by_definition(w: Tensor, features: Tensor, labels: Tensor, l2: float) -> Tensor:
    """All second derivatives of L. -> (classes d) (classes d)."""
    hessian = torch.autograd.functional.hessian(
        lambda w: objective_by_definition(w, features, labels, l2), w
    )
    return hessian.reshape(w.numel(), w.numel())


def test_the_probe_finds_the_golden_minimiser():
    """Features, W, objective and predictions are those of the reference, at each of its lambdas."""
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN).items()}
    features = center_and_scale(golden["train_x"])
    test_features = center_and_scale(golden["test_x"])
    assert_relatively_close(features, golden["train_rows"], 1e-12)
    assert_relatively_close(test_features, golden["test_rows"], 1e-12)

    labels = golden["train_y"].long()
    for i in range(int(golden["num_lambdas"])):
        l2 = golden[f"lambda{i}"].item()
        expected = golden[f"W{i}"]
        w = fit_logistic_probe(features, labels, len(expected), l2)
        assert_relatively_close(w, expected, 1e-9, f"W at lambda {l2}")
        objective = probe_objective(features, labels, w, l2)
        assert_relatively_close(objective, golden[f"objective{i}"], 1e-12, f"lambda {l2}")
        predicted = (test_features @ w.T).argmax(dim=-1)
        assert torch.equal(predicted, golden[f"test_pred{i}"].long())


@pytest.mark.parametrize("n, d, classes", [(12, 200, 4), (300, 16, 7), (64, 64, 2)])
@pytest.mark.parametrize("l2", [2.5e-4, 0.0025, 1.0])
def test_at_the_probe_the_gradient_is_zero(n, d, classes, l2):
    """With fewer images than features and with more, W is the minimiser: its gradient is 0."""
    features, labels = clustered_features(n, d, classes)
    w = fit_logistic_probe(features, labels, classes, l2)
    assert gradient_by_definition(w, features, labels, l2).norm() < 1e-11


@pytest.mark.parametrize("n, d, classes", [(12, 200, 4), (300, 16, 7)])
@pytest.mark.parametrize("l2", [2.5e-4, 0.0025, 1.0])
def test_the_probe_is_scikit_learns(n, d, classes, l2):
    """Scikit-learn's LogisticRegression with C = 1 / lambda and no intercept has the same W."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clustered_features(n, d, classes)
    theirs = linear_model.LogisticRegression(
        C=1 / l2, fit_intercept=False, tol=1e-8, max_iter=5000
    ).fit(features.numpy(), labels.numpy())
    w = fit_logistic_probe(features, labels, classes, l2)
    assert_relatively_close(w, theirs.coef_, 1e-3)


def test_the_objective_and_the_hessian_are_those_of_the_formula():
    """L(W) and H D are what the definition of L gives, image by image and by autograd."""
    features, labels = clustered_features(9, 5, 3)
    w = randn(3, 5, seed=2, dtype=torch.float64)
    direction = randn(3, 5, seed=3, dtype=torch.float64)

    expected = objective_by_definition(w, features, labels, 0.3)
    assert_relatively_close(probe_objective(features, labels, w, 0.3), expected, 1e-12)

    hessian = hessian_by_definition(w, features, labels, 0.3)
    expected = (hessian @ direction.flatten()).reshape(3, 5)
    p = (features @ w.T).softmax(dim=-1)
    assert_relatively_close(hessian_product(features, p, direction, 0.3), expected, 1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_conjugate_gradients_solve_for_the_newton_step(scale):
    """What is left of the gradient after H step is a tenth, or |gradient|^2 where that is less."""
    features, labels = clustered_features(30, 6, 4)
    w = 5 * randn(4, 6, seed=2, dtype=torch.float64)
    p = (features @ w.T).softmax(dim=-1)
    gradient = scale * randn(4, 6, seed=3, dtype=torch.float64)

    step = newton_step(features, p, gradient, 0.01)
    hessian = hessian_by_definition(w, features, labels, 0.01)
    residual = gradient.flatten() - hessian @ step.flatten()
    assert residual.norm() <= min(0.1, gradient.norm()) * gradient.norm() * (1 + 1e-9)


def test_of_two_classes_the_preconditioner_is_half_the_hessian(monkeypatch):
    """With two classes and next to no regularisation, the first round gives the exact step."""
    features, labels = clustered_features(40, 6, 2)
    w = randn(2, 6, seed=2, dtype=torch.float64)
    p = (features @ w.T).softmax(dim=-1)
    gradient = gradient_by_definition(w, features, labels, 0.0)
    products = []

    def count(*arguments):
        products.append(hessian_product(*arguments))
        return products[-1]

    monkeypatch.setattr(finetune, "hessian_product", count)
    newton_step(features, p, 1e-6 * gradient, 1e-9)
    assert len(products) == 1


@pytest.mark.parametrize("times, share", [(1, 1.0), (10, 0.125), (1000, 2.0**-9)])
def test_a_step_that_is_too_long_is_halved_until_the_objective_does_not_rise(times, share):
    """The line search takes all of a Newton step, and a part of one that is made too long."""
    features, labels = clustered_features(30, 6, 4)
    w = torch.zeros(4, 6, dtype=torch.float64)
    gradient = gradient_by_definition(w, features, labels, 1.0)
    hessian = hessian_by_definition(w, features, labels, 1.0)
    newton = torch.linalg.solve(hessian, gradient.flatten()).reshape(4, 6)

    taken = line_search(features, labels, w, times * newton, 1.0)
    assert taken == share

    before = probe_objective(features, labels, w, 1.0)
    assert probe_objective(features, labels, w - taken * times * newton, 1.0) <= before
    if taken < 1:
        assert probe_objective(features, labels, w - 2 * taken * times * newton, 1.0) > before


def test_features_are_centred_and_of_unit_length():
    """Each image's features have mean 0 and length 1, in float64."""
    features = center_and_scale(3 + 5 * randn(6, 9))
    assert features.dtype == torch.float64
    assert_relatively_close(features.mean(dim=1), torch.zeros(6), 1e-15)
    assert_relatively_close(features.norm(dim=1), torch.ones(6), 1e-12)


def test_shuffled_labels_score_at_chance():
    """A probe learns from true labels, and nothing from shuffled ones."""
    features, labels = clustered_features(600, 32, 5)
    shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    accuracy = {}
    for name, given in (("true", labels), ("shuffled", shuffled)):
        w = fit_logistic_probe(features[:300], given[:300], 5, 0.0025)
        predicted = (features[300:] @ w.T).argmax(dim=-1)
        accuracy[name] = (predicted == labels[300:]).double().mean().item()
    assert accuracy["true"] > 0.85
    assert abs(accuracy["shuffled"] - 0.2) < 0.09  # four standard deviations of 300 guesses


# --- labelled sets --------------------------------------------------------------------------------


def test_draws_are_stratified_reproducible_and_nested():
    """A draw has the wanted number of each class, depends on its seed only, and contains less."""
    labels = torch.arange(80) % 4
    labels[::7] = -1  # may not be drawn
    five = draw_labelled(labels, 5, seed=3)
    # Class by class; none of those marked -1.
    assert torch.equal(labels[five], torch.arange(4).repeat_interleave(5))
    assert len(set(five)) == 20
    assert five == draw_labelled(labels, 5, seed=3) != draw_labelled(labels, 5, seed=4)
    assert set(draw_labelled(labels, 2, seed=3)) < set(five)
    assert labels[draw_labelled(labels, [1, 0, 3, 2], seed=0)].tolist() == [0, 2, 2, 2, 3, 3]

    torch.manual_seed(9)
    torch.rand(5)  # the global generator has no say
    assert five == draw_labelled(labels, 5, seed=3)
    with pytest.raises(UsageError, match=r"class fig has 17 images .* 18"):
        draw_labelled(labels, 18, 0, ["fig", "kiwi", "pear", "plum"])


def unlabelled_experiment(labels: Tensor, config: FinetuneConfig, columns: dict, tuning: list):
    """An experiment without images, for what only looks at labels."""
    data = finetune.Images(CLASSES, None, labels, None, None)
    return finetune.Experiment(config, {}, data, [0], columns, tuning)


def test_a_share_of_the_labels_is_a_share_of_each_class():
    """A column of 25 % has a quarter of each class, rounded, and no class without an image."""
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 1)
    config = FinetuneConfig(labels_per_class="3", fraction="0.25,1")
    data = finetune.Images(CLASSES, None, labels, None, None)
    assert finetune.images_per_class(config, data) == {"3/class": 3, "25 %": [10, 2, 1]}


# --- fine-tuning ----------------------------------------------------------------------------------


def test_layer_decay_gives_each_parameter_its_rate():
    """A layer learns at `decay` times the rate of the one above it; only matrices decay."""
    model = ViTMSNForImageClassification(tiny_config(num_hidden_layers=3))
    found = {}
    for group in layerwise_groups(model, 1.0, 0.5, 0.1):
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    assert len(found) == len(list(model.parameters()))

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


def test_the_learning_rate_rises_for_a_tenth_of_the_steps_then_falls():
    """No step has rate 0, the highest comes after a tenth of the steps, the last is the lowest."""
    factors = [finetune.learning_rate_factor(step, 100) for step in range(100)]
    assert_relatively_close(factors[:10], [(step + 1) / 10 for step in range(10)], 1e-12)
    assert max(factors) == factors[9] == 1
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert 0 < factors[-1] < 0.001


def test_batches_show_each_image_once_before_any_comes_again():
    """Whatever the batch size, each round of the batches is an order of all labelled images."""
    indices = [3, 5, 8, 11, 20]
    generator = torch.Generator().manual_seed(0)
    batches = finetune.shuffled_batches(indices, 2, generator)
    seen = [i for _ in range(10) for i in next(batches)]
    rounds = [seen[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(order) == indices for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_a_crop_of_the_whole_image_is_the_image_half_of_them_flipped():
    """Crops of square images at scale 1 that don't fit are whole; flips are left to right."""
    images = torch.randint(0, 256, (200, 3, 1, 8), dtype=torch.uint8)
    images = images.expand(-1, -1, 8, -1)  # all lines alike, so only the direction matters
    generator = torch.Generator().manual_seed(0)
    batch = pack(list(images), list(range(200)))
    views = finetune.crop_and_flip(batch, (1.0, 1.0), 8, generator)
    # At scale 1 a crop of another shape than the image's own does not fit: it is the whole image.
    whole = finetune.normalize(images.float() / 255)
    same = (views - whole).abs().amax(dim=(1, 2, 3)) < 1e-4
    flipped = (views - whole.flip(-1)).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert (same | flipped).all()
    assert 70 < flipped.sum() < 130  # four standard deviations around a half


def colored_images(n: int, seed: int) -> tuple[ImagesInMemory, Tensor]:
    """Noise with one bright channel, which is the class."""
    labels = torch.arange(n) % 3
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(60, (n, 3, 16, 16), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(n), labels] += 120
    return ImagesInMemory(pixels), labels


def tiny_encoder(**changes) -> ViTMSNModel:
    return randomized(ViTMSNModel(tiny_config(image_size=16, **changes)))


def test_training_learns_repeats_itself_and_looks_at_labelled_images_only():
    """The trained weights are a function of the labelled images, their labels and the seed."""
    config = FinetuneConfig(steps=30, batch_size=8, crop_scale=(0.3, 1.0))
    images, labels = colored_images(60, 0)
    labelled = list(range(12))
    poisoned_images = ImagesInMemory(images.images.clone())
    poisoned_images.images[12:] = 255
    poisoned_labels = labels.clone()
    poisoned_labels[12:] = -100  # cross_entropy would leave these out, or fail

    models = []
    for data, given in ((images, labels), (images, labels), (poisoned_images, poisoned_labels)):
        model = finetune.build_classifier(tiny_encoder(patch_size=8), CLASSES, config, None)
        train_classifier(model, data, given, labelled, config, 3e-3, 0.8, seed=0)
        models.append(model)

    first, *others = models
    for other in others:
        for a, b in zip(first.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    assert not first.training
    predicted = classify(first, images, list(range(12, 60))).argmax(dim=-1)
    assert (predicted == labels[12:]).double().mean() > 0.9


def test_training_is_adamw_with_smoothed_labels_clipped_gradients_and_the_schedule():
    """The weights after three steps are those of the same three steps written out here."""
    config = FinetuneConfig(steps=3, batch_size=4, label_smoothing=0.2, precision="float32")
    images, labels = colored_images(10, 0)
    trained, expected = (
        finetune.build_classifier(tiny_encoder(patch_size=8), CLASSES, config, None)
        for _ in range(2)
    )
    for model in (trained, expected):
        torch.nn.init.normal_(
            model.classifier.weight, std=20, generator=torch.Generator().manual_seed(0)
        )
    train_classifier(trained, images, labels, list(range(10)), config, 1e-3, 0.8, seed=5)

    generator = finetune.generator_for(5, finetune.CROPS)
    batches = finetune.shuffled_batches(list(range(10)), 4, generator)
    optimizer = torch.optim.AdamW(layerwise_groups(expected.train(), 1e-3, 0.8, 0.05), fused=True)
    highest = [group["lr"] for group in optimizer.param_groups]
    norms = []
    for step in range(3):
        batch = images.__getitems__(next(batches))
        pixels = finetune.crop_and_flip(batch, (0.8, 1.0), 16, generator)
        for group, lr in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = lr * finetune.learning_rate_factor(step, 3)
        log_p = expected(pixels).logits.log_softmax(dim=-1)
        targets = 0.8 * F.one_hot(labels[batch.indices], 3) + 0.2 / 3
        optimizer.zero_grad()
        (-(targets * log_p).sum(dim=-1).mean()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(expected.parameters(), 3.0))
        optimizer.step()

    assert max(norms) > 3  # clipping had something to do
    start = finetune.build_classifier(tiny_encoder(patch_size=8), CLASSES, config, None)
    for name in ("vit.pos_embed", "vit.cls_token", "classifier.weight"):
        first = start.get_parameter(name)
        moved = expected.get_parameter(name) - first
        assert moved.abs().max() > 1e-5
        assert_relatively_close(trained.get_parameter(name) - first, moved, 0.01, name)


def test_epochs_lengthen_training_and_its_progress_is_told_ten_times(capsys):
    """The number of steps is --steps, or what --epochs passes take where that is more."""
    images, labels = colored_images(30, 0)
    config = FinetuneConfig(steps=3, epochs=4.0, batch_size=6)
    model = finetune.build_classifier(tiny_encoder(patch_size=8), CLASSES, config, None)
    train_classifier(model, images, labels, list(range(30)), config, 1e-3, 0.8, 0, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/20" for step in range(2, 21, 2)]


def test_a_loss_that_is_not_finite_stops_training():
    """Training that diverges ends with an error that names the step, not with a useless model."""
    images, labels = colored_images(6, 0)
    model = ViTMSNForImageClassification(tiny_config(image_size=16, patch_size=8, num_labels=3))
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        train_classifier(model, images, labels, list(range(6)), FinetuneConfig(), 1e-3, 1.0, 0)


def test_fine_tuning_starts_as_the_probe():
    """Before its first step, the classifier gives the probabilities of the probe it starts from."""
    images, labels = colored_images(12, 0)
    everything = list(range(12))
    encoder = tiny_encoder()
    device = torch.device("cpu")
    representations, _ = finetune.embed_images(encoder, images, everything, 16, device)
    features = center_and_scale(representations)
    w = fit_logistic_probe(features, labels, 3, 0.1)

    model = finetune.build_classifier(encoder, CLASSES, FinetuneConfig(), w).eval()
    expected = (features @ w.T).softmax(dim=-1)
    assert_relatively_close(classify(model, images, everything), expected, 1e-4)


def test_saving_changes_no_prediction(tmp_path):
    """A classifier that is saved and loaded again gives the same probabilities, bit for bit."""
    images, _ = colored_images(9, 0)
    config = tiny_config(image_size=16, num_labels=3)
    model = randomized(ViTMSNForImageClassification(config)).eval()
    model.save_pretrained(tmp_path)
    loaded = finetune.load_model(FinetuneConfig(checkpoint=str(tmp_path)), classifier=True)
    assert torch.equal(classify(model, images, [0, 4, 8]), classify(loaded, images, [0, 4, 8]))


# --- the table ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with data/ (train/CLASS/*, val/CLASS/*), encoder/ and the classifier/ of `train`."""
    folder = tmp_path_factory.mktemp("wörld")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for c, name in enumerate(CLASSES):
            (folder / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
                pixels[..., c] += 120
                Image.fromarray(pixels).save(folder / "data" / part / name / f"{part} {c} {i}é.png")
    torch.manual_seed(0)
    tiny_encoder(patch_size=8).save_pretrained(folder / "encoder")
    classifier = folder / "classifier"
    assert run_on(folder, "train", lr=3e-3, epochs=5, output_dir=classifier) == 0
    return folder


def run(*words, **flags) -> int:
    """finetune.py's exit status, with flags such as --lr from arguments such as lr."""
    arguments = [str(word) for word in words]
    for name, value in flags.items():
        arguments.append(f"--{name.replace('_', '-')}={value}")
    return run_program(finetune.main, arguments)


def run_on(world: Path, *words, **flags) -> int:
    """The same with the encoder and the data of `world`, ten steps unless a flag says else."""
    own = {"checkpoint": world / "encoder", "data": world / "data", "steps": 10, "batch_size": 8}
    return run(*words, **{**own, **flags})


def settings_on(world: Path, **changes) -> FinetuneConfig:
    """Settings with the encoder and the data of `world`."""
    return FinetuneConfig(checkpoint=str(world / "encoder"), data=str(world / "data"), **changes)


def read_csv(path: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_slow_precision_is_said_before_the_table_is_made(world, tmp_path, monkeypatch):
    """The device is asked whether it is quick in the precision that was asked for."""
    asked = []
    monkeypatch.setattr(finetune, "warn_of_slow_precision", lambda *how: asked.append(how))
    flags = {"precision": "bfloat16", "device": "cpu", "methods": "probe", "output_dir": tmp_path}
    assert run_on(world, **flags) == 0
    assert asked == [("bfloat16", torch.device("cpu"))]


def test_the_table_has_every_method_and_column(world, capsys):
    """Every method is measured in every column, trained ones with all labels only on demand."""
    folder = world / "table"
    methods = ",".join(finetune.METHODS)
    flags = {"labels_per_class": "1,2", "fraction": 0.25, "seeds": "0,1", "methods": methods}
    assert run_on(world, **flags, output_dir=folder) == 0
    out, err = capsys.readouterr()

    cells = {(cell["method"], cell["column"]): cell for cell in read_csv(folder / "table.csv")}
    columns = ["1/class", "2/class", "25 %"]
    expected = {(method, column) for method in finetune.METHODS for column in columns}
    frozen = [method for method in finetune.METHODS if method not in ("finetune", "scratch")]
    assert set(cells) == expected | {(method, "100 %") for method in frozen}

    cell = cells["pixels", "2/class"]
    draws = [float(x) for x in cell["draws"].split()]
    assert_relatively_close(float(cell["mean"]), np.mean(draws), 1e-12)
    assert_relatively_close(float(cell["sd"]), np.std(draws, ddof=1), 1e-12)
    assert float(cells["probe", "100 %"]["mean"]) == 1
    assert cells["probe", "100 %"]["sd"] == ""
    assert cells["scratch", "25 %"]["labels_per_class"] == "2.0"

    printed = next(line for line in out.splitlines() if line.startswith("pixels")).split()
    assert printed[4:7] == [f"{100 * np.mean(draws):.1f}", "±", f"{100 * float(cell['sd']):.1f}"]
    assert "no draw uses" in err
    assert (folder / "table.png").stat().st_size > 1000
    assert json.loads((folder / "config.json").read_text())["steps"] == 10


def test_no_draw_uses_the_tuning_part_and_no_result_depends_on_validation(
    world, monkeypatch, tmp_path
):
    """With other validation labels, every prediction and all that is chosen are the same."""
    config = settings_on(
        world,
        labels_per_class="1,3",
        full=False,
        fraction="",
        seeds="0,1",
        steps=5,
        methods=",".join(finetune.METHODS),
    )
    open_honestly = finetune.open_data
    predict = finetune.Experiment.predict
    made = []  # predictions and rates, of the table that is being measured

    def open_corrupted(train_config):
        data = open_honestly(train_config)
        return data._replace(val_labels=data.val_labels.flip(0))

    def record(experiment, *arguments):
        prediction = predict(experiment, *arguments)
        chosen = {key: value for key, value in experiment.cache.items() if len(key) == 2}
        made.append((prediction, chosen))
        return prediction

    monkeypatch.setattr(finetune.Experiment, "predict", record)
    results = []
    for source in (open_honestly, open_corrupted):
        monkeypatch.setattr(finetune, "open_data", source)
        experiment, val_labels, _ = open_experiment(config)
        assert experiment.data.val_labels is None
        drawn = {i for draw in finetune.all_draws(experiment.columns) for i in draw}
        assert len(experiment.tuning) >= 6 and not drawn & set(experiment.tuning)
        measure(experiment, val_labels, tmp_path)
        results.append(list(made))
        made.clear()

    honest, corrupted = results
    assert len(honest) == len(finetune.METHODS) * 2 * 2
    for (prediction, chosen), (other, other_chosen) in zip(honest, corrupted, strict=True):
        assert torch.equal(prediction, other) and chosen == other_chosen
    assert chosen.keys() == {
        ("l2", "probe"),
        ("l2", "untrained"),
        ("l2", "pixels"),
        ("lr", "finetune"),
        ("scratch_lr", "scratch"),
    }


def test_frozen_features_are_those_of_the_named_encoder(world):
    """Pretrained is the checkpoint's encoder, untrained another one; raw pixels are few."""
    config = settings_on(world, pixel_size=4, full=False, fraction="", labels_per_class="2")
    experiment, _, _ = open_experiment(config)
    device = torch.device("cpu")
    for kind, size in (("pretrained", 16), ("untrained", 16), ("pixels", 4)):
        encoder = experiment.encoders[kind]
        expected, _ = finetune.embed_images(encoder, experiment.data.train, [0, 5], size, device)
        assert torch.equal(experiment.features(kind, "train", [0, 5]), expected)
        assert not torch.equal(experiment.features(kind, "val", [0, 5]), expected)

    pretrained = ViTMSNModel.from_pretrained(world / "encoder")
    assert torch.equal(experiment.encoders["pretrained"].pos_embed, pretrained.pos_embed)
    assert not torch.equal(experiment.encoders["untrained"].pos_embed, pretrained.pos_embed)


@pytest.mark.parametrize(
    "method, kind",
    [
        ("probe", "pretrained"),
        ("knn1", "pretrained"),
        ("knn20", "pretrained"),
        ("knn200", "pretrained"),
        ("untrained", "untrained"),
        ("pixels", "pixels"),
    ],
)
def test_a_method_on_frozen_features_sees_its_own_kind(method, kind, monkeypatch):
    """Probe and k-NN take the pretrained encoder; the baselines an untrained one or raw pixels."""
    labels = torch.arange(12) % 3
    experiment = unlabelled_experiment(labels, FinetuneConfig(), {}, [])
    asked = []

    def features(self, kind, part, indices):
        asked.append((kind, part))
        return F.one_hot(labels[indices], 4).float()  # three classes: the centred ones differ

    monkeypatch.setattr(finetune.Experiment, "features", features)
    assert experiment.predict(method, [0, 1, 2, 3], 0).tolist() == [0]  # validation image 0
    assert asked == [(kind, "train"), (kind, "val")]


def test_the_published_settings_of_probe_and_nearest_neighbours(monkeypatch):
    """The probe has lambda --l2; knn1 has one neighbour, knn20 and knn200 20 and 200."""
    experiment = unlabelled_experiment(torch.arange(6) % 3, FinetuneConfig(l2=0.5), {}, [])
    asked = []

    def fit(features, labels, num_classes, l2, tolerance):
        asked.append((num_classes, l2, tolerance))
        return torch.zeros(num_classes, features.shape[1], dtype=torch.float64)

    def vote(bank, labels, features, k, temperature):
        asked.append((k, temperature))

    monkeypatch.setattr(finetune.Experiment, "features", lambda *arguments: torch.ones(6, 4))
    monkeypatch.setattr(finetune, "fit_logistic_probe", fit)
    monkeypatch.setattr(finetune, "knn_predict", vote)
    for method in ("probe", "knn1", "knn20", "knn200"):
        experiment.predict(method, list(range(6)), 0)
    assert asked == [(3, 0.5, 1e-8), (1, 0.07), (20, 0.07), (200, 0.1)]


def test_published_shapes_keep_the_published_lambda():
    """From width 384 on lambda is 0.0025 unless one is given; only below it is one chosen."""
    config = FinetuneConfig(methods="probe,untrained,pixels,finetune")
    published = finetune.with_published_settings(config, 384)
    assert (published.l2, published.lr) == (0.0025, 5e-4)
    assert not finetune.is_to_choose(published)
    given = finetune.with_published_settings(FinetuneConfig(l2=0.5, lr=0.01), 384)
    assert (given.l2, given.lr) == (0.5, 0.01)
    assert finetune.with_published_settings(config, 383) == config
    assert finetune.is_to_choose(config)
    assert not finetune.is_to_choose(replace(config, l2=0.5, lr=0.01))


def test_the_lambda_that_predicts_most_tuning_images_is_taken(monkeypatch):
    """All five folds count: each fifth is labelled once, and the others are predicted."""
    labels = torch.arange(3).repeat_interleave(10)
    experiment = unlabelled_experiment(labels, FinetuneConfig(), {}, list(range(30)))
    labelled = []

    def predict(self, method, indices, seed, part, wanted):
        if self.config.l2 == 2.5e-4:
            labelled.append(indices)
        right = {2.5e-5: 0.5, 2.5e-4: 0.75, 0.0025: 0.7, 0.025: 0.1}[self.config.l2]
        truth = labels[wanted].clone()
        truth[round(right * len(wanted)) :] = -1
        return truth

    monkeypatch.setattr(finetune.Experiment, "predict_images", predict)
    assert experiment.chosen("l2", "probe") == 2.5e-4
    assert sorted(i for fold in labelled for i in fold) == list(range(30))
    assert [labels[fold].tolist() for fold in labelled] == [[0, 0, 1, 1, 2, 2]] * 5
    assert experiment.chosen("l2", "probe") == 2.5e-4 and len(labelled) == 5  # once for all


def test_without_tuning_images_the_defaults_hold():
    """One image of each class, or none, is too few to choose on."""
    for tuning in ([], [0, 1, 2]):
        experiment = unlabelled_experiment(torch.arange(6) % 3, FinetuneConfig(), {}, tuning)
        assert experiment.chosen("l2", "probe") == 0.0025
        assert experiment.chosen("lr", "finetune") == 5e-4
        assert experiment.chosen("scratch_lr", "scratch") == 1e-3


def test_fine_tuning_starts_from_a_mild_probe_and_scratch_from_nothing(monkeypatch):
    """Fine-tuning: pretrained encoder, probe of lambda 0.1, layer decay. Scratch: none of them."""
    encoders = {"pretrained": "ours", "untrained": "new"}
    experiment = unlabelled_experiment(torch.arange(6) % 3, FinetuneConfig(), {}, [])
    experiment = replace(experiment, encoders=encoders)
    asked = []

    def fit(features, labels, num_classes, l2, tolerance):
        asked.append((l2, tolerance))
        return "probe"

    def build(encoder, classes, config, probe):
        asked.append((encoder, probe))

    def train(model, images, labels, indices, config, lr, layer_decay, seed, verbose):
        asked.append((indices, lr, layer_decay, seed))

    monkeypatch.setattr(finetune.Experiment, "features", lambda *arguments: torch.ones(2, 4))
    monkeypatch.setattr(finetune, "fit_logistic_probe", fit)
    monkeypatch.setattr(finetune, "build_classifier", build)
    monkeypatch.setattr(finetune, "train_classifier", train)
    experiment.trained("finetune", [0, 4], 7, 0.01)
    assert asked == [(0.1, 1e-6), ("ours", "probe"), ([0, 4], 0.01, 0.65, 7)]
    asked.clear()
    experiment.trained("scratch", [0, 4], 7, 0.01)
    assert asked == [("new", None), ([0, 4], 0.01, 1.0, 7)]


def test_the_validation_images_are_the_same_every_time():
    """--val-images takes a part that no seed and no other random number changes; 0 takes all."""
    images = ImagesInMemory(torch.zeros(50, 3, 2, 2))
    data = finetune.Images(CLASSES, None, None, images, None)
    config = FinetuneConfig(val_images=20)
    chosen = finetune.choose_validation_images(config, data, set())
    torch.rand(1)
    assert finetune.choose_validation_images(replace(config, seeds="5"), data, set()) == chosen
    assert len(set(chosen)) == 20 and chosen == sorted(chosen) != list(range(20))
    assert finetune.choose_validation_images(FinetuneConfig(), data, set()) == list(range(50))


def test_a_cell_has_mean_and_sample_deviation_over_its_draws(monkeypatch):
    """Of draws right in 1/4 and 3/4 of the images: mean 1/2, deviation (n - 1) of 1 / sqrt(8)."""
    columns = {"1/class": [[0, 1, 2], [3, 4, 5]]}
    experiment = unlabelled_experiment(torch.arange(6) % 3, FinetuneConfig(), columns, [])
    truth = torch.tensor([0, 1, 2, 0])
    predicted = {0: torch.tensor([0, 0, 0, 1]), 1: torch.tensor([0, 1, 2, 1])}
    monkeypatch.setattr(finetune.Experiment, "predict", lambda self, m, draw, seed: predicted[seed])
    cell = finetune.measure_cell(experiment, "probe", "1/class", truth)
    assert tuple(cell) == finetune.CELL_COLUMNS
    assert (cell["labels"], cell["labels_per_class"], cell["draws"]) == (3, 1, "0.25 0.75")
    assert_relatively_close([cell["mean"], cell["sd"]], [0.5, 8**-0.5], 1e-6)


def cell_of(method: str, column: str, labels_per_class: float, mean: float, sd) -> dict:
    """A cell of the table, as far as its plot needs it."""
    numbers = {"labels_per_class": labels_per_class, "mean": mean, "sd": sd}
    return {"method": method, "column": column, **numbers}


def test_a_curve_runs_from_few_labels_to_many():
    """The plot has a line per method: accuracy in % and its deviation over labelled images per
    class, left to right. Shares of the labels are no points of it; all labels are."""
    cells = [
        cell_of("probe", "5/class", 5.0, 0.6, 0.1),
        cell_of("pixels", "5/class", 5.0, 0.2, 0.05),
        cell_of("probe", "1 %", 0.4, 0.3, 0.1),
        cell_of("probe", "1/class", 1.0, 0.7, ""),
        cell_of("probe", "100 %", 40.0, 0.9, ""),
    ]
    panel = finetune.accuracy_panel(cells)
    probe = [(1.0, 70.0, 0.0), (5.0, 60.0, 10.0), (40.0, 90.0, 0.0)]
    assert panel.curves == {"probe": probe, "pixels": [(5.0, 20.0, 5.0)]}
    assert panel.x_ticks == {1.0: "1", 5.0: "5", 40.0: "all (40)"} and panel.log_x


def test_the_rate_from_scratch_is_tuned_on_all_classes(monkeypatch):
    """Every fifth tuning image of each class trains, the others test; the best rate is taken."""
    labels = torch.arange(3).repeat_interleave(7)
    experiment = unlabelled_experiment(labels, FinetuneConfig(), {}, list(range(21)))
    trained = []
    tested = []
    rates = finetune.CHOICES["scratch_lr"].candidates
    best = rates[2]

    def train(self, method, indices, seed, lr):
        trained.append(indices)
        return lr

    def predict(lr, images, indices):
        tested.append(indices)
        return F.one_hot(labels if lr == best else 0 * labels, 3)[indices]

    monkeypatch.setattr(finetune.Experiment, "trained", train)
    monkeypatch.setattr(finetune, "classify", predict)
    assert experiment.chosen("scratch_lr", "scratch") == best
    assert len(trained) == len(tested) == len(rates)
    assert labels[trained[0]].tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(trained[0] + tested[0]) == list(range(21))


def test_draws_are_trained_by_their_own_seeds(tmp_path, monkeypatch):
    """Draw i is made and trained with seed i; the only draw of all labels with the first."""
    columns = {"1/class": [[0], [1]], "100 %": [[0, 1, 2]]}
    config = FinetuneConfig(methods="probe", seeds="7,5")
    experiment = unlabelled_experiment(torch.arange(3), config, columns, [])
    seeds = []

    def predict(self, method, indices, seed):
        seeds.append(seed)
        return torch.zeros(1)

    monkeypatch.setattr(finetune.Experiment, "predict", predict)
    measure(experiment, torch.zeros(1), tmp_path)
    assert seeds == [7, 5, 7]


def test_a_label_list_is_the_labelled_set(world, tmp_path):
    """A line may be the name of a file or CLASS/NAME, in any order: the same labelled set."""
    train = world / "data" / "train"
    listed = [next((train / name).glob("*2é.png")) for name in CLASSES]
    names = [path.name for path in listed]
    (tmp_path / "a.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    longer = [f"{path.parent.name}/{path.name}" for path in reversed(listed)]
    (tmp_path / "b.txt").write_text("\n".join(longer), encoding="utf-8")

    lists = f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}"
    experiment, _, _ = open_experiment(settings_on(world, label_list=lists))
    assert list(experiment.columns) == ["listed"]
    first, second = experiment.columns["listed"]
    assert first == second and {experiment.data.train.paths[i] for i in first} == set(listed)


def test_a_label_list_of_nothing_or_of_an_unknown_name_is_refused(world, tmp_path, capsys):
    """A list without a name, or with one that no training image has, is refused by a clear line."""
    (tmp_path / "a.txt").write_text("\n \n")
    assert run_on(world, label_list=tmp_path / "a.txt") == 2
    assert "a.txt names no training image" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("train 0 1é.png\nwho.png\n", encoding="utf-8")
    assert run_on(world, label_list=tmp_path / "a.txt") == 2
    assert "1 of 2 lines name no training image or several: who.png." in capsys.readouterr().err


def test_a_label_list_of_damaged_images_only_is_refused(world, capsys, tmp_path):
    """A labelled set must have an image that can be read."""
    shutil.copytree(world / "data", tmp_path / "data")
    damaged = min((tmp_path / "data" / "train" / CLASSES[0]).iterdir())
    damaged.write_bytes(b"")
    (tmp_path / "list.txt").write_text(damaged.name, encoding="utf-8")
    assert run_on(world, data=tmp_path / "data", label_list=tmp_path / "list.txt") == 2
    assert "none of a label list" in capsys.readouterr().err.splitlines()[-1]


def test_an_unreadable_training_image_is_replaced_in_the_draws_and_counted(
    world, capsys, monkeypatch, tmp_path
):
    """A draw takes the next image of the class in its place, and keeps its size."""
    (tmp_path / "train").symlink_to(world / "data" / "train")
    for name in CLASSES:
        (tmp_path / "val" / name).mkdir(parents=True)
        picture = next((world / "data" / "val" / name).glob("*1é.png"))
        (tmp_path / "val" / name / "1.png").write_bytes(picture.read_bytes())
    config = replace(settings_on(world, labels_per_class="2", fraction=""), data=str(tmp_path))
    before, _, _ = open_experiment(config)
    broken = before.columns["2/class"][0][0]
    read = finetune.ImageFiles.read

    def fail_for_one(images, i):
        is_broken = len(images) == 24 and i == broken  # 24: the training images
        return None if is_broken else read(images, i)

    monkeypatch.setattr(finetune.ImageFiles, "read", fail_for_one)
    after, _, _ = open_experiment(config)
    draw = after.columns["2/class"][0]
    assert broken not in draw
    assert set(before.columns["2/class"][0]) - {broken} < set(draw)
    assert after.data.train_labels[draw].tolist() == [0, 0, 1, 1, 2, 2]
    assert broken not in after.columns["100 %"][0]
    assert "(1 so far)" in capsys.readouterr().err


def test_a_name_that_is_no_utf8_stays_in_the_table(tmp_path):
    """The bytes of a file's name are written as they are."""
    record = {"image": os.fsdecode(b"caf\xe9.png")}
    finetune.write_csv(tmp_path / "new" / "a.csv", ("image",), [record])
    assert (tmp_path / "new" / "a.csv").read_bytes() == b"image\ncaf\xe9.png\n"


# --- the commands ---------------------------------------------------------------------------------


def test_a_saved_classifier_predicts_the_same_when_loaded(world):
    """What `train` leaves behind is a classifier that knows the names of its classes."""
    paths = sorted((world / "data" / "val").rglob("*.png"))
    model = ViTMSNForImageClassification.from_pretrained(world / "classifier")
    assert list(model.config.id2label.values()) == sorted(CLASSES)

    logits = model(preprocess([Image.open(path) for path in paths], model.config)).logits
    ours = classify(model, finetune.ImageFiles(paths, 32, 0, check=False), list(range(len(paths))))
    # 0.02: two ways to resize that round differently
    assert_relatively_close(logits.softmax(dim=-1), ours, 0.02)
    names = [model.config.id2label[c] for c in logits.argmax(dim=-1).tolist()]
    assert names == [path.parent.name for path in paths]


def test_accuracy_is_told_for_each_class_and_for_all(world):
    """accuracy.csv has a line for each class and one for all validation images."""
    records = read_csv(world / "classifier" / "accuracy.csv")
    assert [record["class"] for record in records] == [*sorted(CLASSES), "all"]
    assert [record["images"] for record in records] == ["4", "4", "4", "12"]
    assert [float(record["accuracy"]) for record in records] == [1.0] * 4

    predicted = torch.tensor([0, 0, 1, 2, 2])
    truth = torch.tensor([0, 0, 0, 2, 1])
    records = finetune.class_accuracies(predicted, truth, ["a", "b", "c"])
    accuracies = [(record["class"], record["images"], record["accuracy"]) for record in records]
    assert accuracies == [("a", 3, 2 / 3), ("b", 1, 0), ("c", 1, 1), ("all", 5, 3 / 5)]


def test_a_class_without_validation_images_has_no_accuracy(world, tmp_path, capsys):
    """With a single validation image, accuracy.csv has its class and the line for all, no NaN."""
    flags = {"labels_per_class": 1, "val_images": 1, "steps": 1, "epochs": 0}
    assert run_on(world, "train", **flags, output_dir=tmp_path) == 0
    assert len(read_csv(tmp_path / "accuracy.csv")) == 2
    assert "nan" not in capsys.readouterr().out


def test_predict_names_skips_and_counts_what_it_cannot_read(world, capsys, tmp_path):
    """One line for each picture; a broken one is named and counted, other files are left alone."""
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (30, 20), (0, 0, 200)).save(tmp_path / "sub" / "blau ü.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("not an image, and not named like one")
    table = tmp_path / "out.csv"
    assert run("predict", world / "classifier", tmp_path, top=2, csv=table) == 0

    out, err = capsys.readouterr()
    blue = sorted(CLASSES)[2]
    assert len(out.splitlines()) == 1 and f"blau ü.png: {blue}" in out
    assert (
        "broken.jpg: no picture that Pillow knows" in err
        and "1 picture, 1 unreadable file skipped" in err
    )
    assert "notes" not in err
    records = read_csv(table)
    assert [record["place"] for record in records] == ["1", "2"]
    assert records[0]["class"] == blue
    assert float(records[0]["probability"]) > float(records[1]["probability"])


def test_commands_follow_the_models_own_preprocessor(world, tmp_path, capsys):
    """predict does all that preprocessor_config.json says; embed its statistics, and says what
    else it leaves out."""
    picture = next((world / "data" / "val").rglob("*.png"))
    table = tmp_path / "out.csv"
    features = tmp_path / "f.npz"
    numbers = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    numbers["size"] = {"height": 24, "width": 40}
    for part in ("encoder", "classifier"):
        shutil.copytree(world / part, tmp_path / part)
        (tmp_path / part / "preprocessor_config.json").write_text(json.dumps(numbers))

    assert run("predict", tmp_path / "classifier", picture, top=1, csv=table) == 0
    model = ViTMSNForImageClassification.from_pretrained(tmp_path / "classifier")
    pixels = preprocess(picture, model.config)
    logits = model(pixels, interpolate_pos_encoding=True).logits
    expected = logits.softmax(dim=-1).max().item()
    assert float(read_csv(table)[0]["probability"]) == pytest.approx(expected, abs=1e-6)
    assert "not followed" not in capsys.readouterr().err

    assert run("embed", tmp_path / "encoder", picture, output=features) == 0
    err = capsys.readouterr().err
    assert "resample=3 is not followed" in err and "size=(24, 40) is not followed" in err
    model = ViTMSNModel.from_pretrained(tmp_path / "encoder")
    model.config.preprocessor = {**numbers, "resample": 2, "size": model.config.image_size}
    expected = model.representation(preprocess(picture, model.config))
    assert_relatively_close(np.load(features)["features"], expected, 0.02)


def test_embed_writes_features_path_and_class_of_each_image(world, tmp_path):
    """features.npz has the representation of each picture, its path and its folder's name."""
    target = tmp_path / "new" / "f.npz"
    assert run("embed", world / "encoder", world / "data" / "val", output=target) == 0
    content = np.load(target)
    assert content["features"].shape == (12, 24) and content["features"].dtype == np.float32
    assert [Path(path).parent.name for path in content["paths"]] == content["classes"].tolist()
    encoder = ViTMSNModel.from_pretrained(world / "encoder")
    expected = encoder.representation(preprocess(Image.open(content["paths"][5]), encoder.config))
    assert_relatively_close(content["features"][5], expected[0], 0.02)


def test_attention_draws_the_picture_and_every_head(world, tmp_path):
    """The sheet has the picture, what the model sees, and the three heads, at any image size."""
    picture = next((world / "data" / "val").rglob("*.png"))
    status = run("attention", world / "classifier", picture, output_dir=tmp_path, image_size=32)
    assert status == 0
    with Image.open(tmp_path / f"0000-{picture.stem}.png") as sheet:
        cell = finetune.ATTENTION_CELL
        assert 5 * cell < sheet.width < 5.3 * cell and cell < sheet.height < 1.3 * cell


def test_attention_maps_are_what_the_class_token_gives_to_the_patches(world):
    """Each map is the last layer's attention of token 0 to the patches, in their places."""
    config = FinetuneConfig(checkpoint=str(world / "encoder"), image_size=32)
    model = finetune.load_model(config)  # 4 x 4 patches
    path = next((world / "data" / "val").rglob("*.png"))
    pictures = finetune.ImageFiles([path], 64, 0, check=False)
    picture, maps = finetune.attention_maps(model, pictures, 0)
    assert picture.shape == (32, 32, 3) and maps.shape == (3, 32, 32)

    pixels = preprocess(Image.open(path), model.config)
    with torch.no_grad():
        attentions = model(pixels, output_attentions=True).attentions[-1]
    expected = attentions[0, :, 0, 1:].reshape(3, 4, 4)
    expected = F.interpolate(expected[None], (32, 32), mode="bilinear")[0]
    assert_relatively_close(maps, expected, 0.02)


def test_a_picture_is_orange_where_the_attention_is():
    """The place with least attention is plain grey, the one with most nearly the colour."""
    picture = np.full((2, 2, 3), 200, np.uint8)
    attention_map = torch.tensor([[0.1, 0.2], [0.3, 0.5]])
    shown = finetune.highlight(picture, attention_map)
    assert shown.dtype == np.uint8

    share = finetune.MOST_HIGHLIGHT * (attention_map - 0.1) / 0.4
    blue = 200 * (1 - share)  # there is no blue in the colour
    assert np.abs(shown[..., 2] - blue.numpy()).max() <= 0.51
    assert shown[0, 0].tolist() == [200, 200, 200]
    assert (finetune.highlight(picture, torch.ones(2, 2)) == picture).all()


def test_sheets_go_into_the_folder_of_the_run(world, tmp_path, capsys, monkeypatch):
    """Attention maps and neighbours lie beside the checkpoint that they are of, unless told."""
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "demo-001"
    shutil.copytree(world / "encoder", run_dir / "encoder")
    shutil.copytree(world / "data" / "val", tmp_path / "photos")
    (run_dir / "checkpoint.pt").touch()

    picture = next(Path("photos").rglob("*.png"))
    assert run("attention", "runs/demo-001/encoder", picture) == 0
    printed = capsys.readouterr()
    assert "1 picture, 0 unreadable files skipped" in printed.err
    assert "written: 1 sheet in " in printed.out
    assert run("neighbours", "runs/demo-001/encoder", picture.parent) == 0
    assert (run_dir / "attention" / f"0000-{picture.stem}.png").is_file()
    assert (run_dir / "neighbours" / f"{picture.parent.name}.png").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "photos"}


def test_neighbours_draws_eight_queries_each_with_its_seven_nearest(world, tmp_path):
    """The sheet of 36 pictures has eight lines of one query and seven neighbours."""
    target = tmp_path / "n.png"
    assert run("neighbours", world / "encoder", world / "data", output=target) == 0
    with Image.open(target) as sheet:
        assert 8 * 128 < sheet.width < 8.8 * 128 and 8 * 128 < sheet.height < 8.8 * 128


def test_no_query_is_among_its_own_neighbours(world, tmp_path, monkeypatch):
    """The pictures are shared out between queries and those searched for neighbours."""
    searched = []
    monkeypatch.setattr(
        finetune, "save_neighbours", lambda path, model, data, *rest: searched.append(data)
    )
    assert run("neighbours", world / "encoder", world / "data", output=tmp_path / "n.png") == 0
    queries = searched[0].val.paths
    others = searched[0].train.paths
    assert len(queries) == 8 and len(others) == 28
    assert not set(queries) & set(others)


# --- bad input ------------------------------------------------------------------------------------

BAD = [  # words, flags, what the line says
    (("train",), {"labels_per_class": "9"}, "has 8 images to draw from, fewer than the 9"),
    ((), {"labels_per_class": "two"}, "must be numbers"),
    ((), {"labels_per_class": "0"}, "out of range"),
    ((), {"methods": "probe,magic"}, "magic is not known"),
    ((), {"fraction": "1.5"}, "out of range"),
    ((), {"seeds": "much"}, "must be numbers"),
    ((), {"l2": "-1"}, "out of range"),
    ((), {"seeds": ""}, "at least one of each"),
    ((), {"methods": ""}, "at least one of each"),
    ((), {"image_size": "20"}, "no whole number of this checkpoint's patches of 8"),
    ((), {"checkpoint": "nowhere"}, "neither a file nor a folder"),
    ((), {"data": "nowhere"}, "nowhere is not found"),
    ((), {"label_list": "nowhere.txt"}, "can't be read"),
    (("train",), {"labels_per_class": "1,2"}, "one labelled set"),
]


@pytest.mark.parametrize(
    "words, flags, message", BAD, ids=[f"{' '.join(row[0])} {row[1]}" for row in BAD]
)
def test_bad_usage_is_one_clear_line_and_status_2(
    world, capsys, monkeypatch, tmp_path, words, flags, message
):
    """Bad usage gives exit status 2 and one line that says what was wrong, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    own = {"checkpoint": world / "encoder", "data": world / "data"}
    assert run(*words, **{**own, **flags}) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def odd_places(world, monkeypatch, tmp_path):
    """The current folder, in which nothing is as it should be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"")
    for part, names in (("train", "ab"), ("val", "abc")):
        for name in names:
            (tmp_path / "odd" / part / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / "odd" / part / name / "1.png")
    (tmp_path / "broken").mkdir()
    config = (world / "encoder" / "config.json").read_text()
    (tmp_path / "broken" / "config.json").write_text(config)
    (tmp_path / "broken" / "pytorch_model.bin").write_bytes(b"not torch")


ENCODER = "--checkpoint ENCODER"
ODD = [  # arguments (capitals: the folders of `world`), exit status, what the last line says
    ("", 2, "there is no run in runs/"),
    ("predict ENCODER x.png", 2, "has no classifier"),
    ("predict CLASSIFIER empty", 2, "holds no image"),
    ("predict CLASSIFIER bad.png", 2, "no readable picture in 1 file."),
    ("predict CLASSIFIER gone.png", 2, "gone.png is not found"),
    ("predict bad.png CLASSIFIER", 2, "finetune.py predict CLASSIFIER bad.png"),
    ("attention odd ENCODER", 2, "the checkpoint comes first"),
    ("attention bad.png odd", 2, "bad.png is no checkpoint; the checkpoint comes first"),
    ("embed runs/demo-7/encoder odd", 2, "there is no checkpoint runs/demo-7/encoder"),
    ("--checkpoint odd/demo-7", 2, "there is no checkpoint odd/demo-7"),
    ("predict CLASSIFIER bad.png --lr 1", 2, "predict has no use for --lr"),
    ("predict a.png b.png --checkpoint c", 2, "predict has no use for --checkpoint"),
    ("--csv a.csv", 2, "the table has no use for --csv"),
    ("train --top 1", 2, "train has no use"),
    (
        f"{ENCODER} --data DATA --labels-per-class= --fraction= --no-full",
        2,
        "no column is asked for",
    ),
    ("predict a/b c.png", 1, "is no folder here"),
    ("neighbours ENCODER odd/train/a/1.png", 2, "two pictures or more"),
    ("embed broken odd", 1, "pytorch_model.bin can't be read"),
    (ENCODER, 2, "pass --data"),
    (f"{ENCODER} --data odd", 2, "odd/val/c is of a class that odd/train lacks"),
    (f"{ENCODER} --data odd/train", 2, "odd/train has no folder val"),
]


@pytest.mark.parametrize("arguments, status, message", ODD, ids=[row[0] for row in ODD])
def test_other_bad_input_says_what_to_do(
    arguments, status, message, world, odd_places, capsys, monkeypatch
):
    """Missing, empty and damaged files, and flags that a command does not take, are told apart."""
    # As if huggingface_hub were not installed: nothing is fetched.
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    places = {name.upper(): str(world / name) for name in ("encoder", "classifier", "data")}
    words = [places.get(word, word) for word in arguments.split()]
    message = " ".join(places.get(word, word) for word in message.split())
    assert run(*words) == status
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1], err


@pytest.mark.parametrize("saved, data", [({}, ["--data", "FOLDER"]), ({"data": "photos"}, [])])
def test_without_a_classifier_predict_says_the_command_that_makes_one(
    saved, data, world, tmp_path, capsys
):
    """The command can be pasted: with this checkpoint, and --data where no run says the images."""
    folder = tmp_path / "a run"
    shutil.copytree(world / "encoder", folder / "encoder")
    (folder / "checkpoint.pt").touch()
    (folder / "config.json").write_text(json.dumps(saved))
    assert run("predict", folder / "encoder", "x.png") == 2
    command = capsys.readouterr().err.rpartition("make one: python finetune.py ")[2]
    checkpoint = str(folder / "encoder")
    assert shlex.split(command) == ["train", "--checkpoint", checkpoint, *data]


def test_without_a_checkpoint_the_newest_run_with_labels_is_taken(
    world, odd_places, tmp_path, capsys, monkeypatch
):
    """Which run it is, and which newer one is passed over because it has no labels, is said."""
    monkeypatch.setattr(finetune, "measure", lambda *_: None)
    for age, (name, data) in enumerate([("plain", "odd/val"), ("demo-001", world / "data")]):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"data": str(data)}))
        encoder = ViTMSNModel.from_pretrained(world / "encoder")
        content = {
            "target_encoder": to_original(encoder.state_dict(), 3),
            "model_config": encoder.config.to_dict(),
        }
        torch.save(content, folder / "checkpoint.pt")
        os.utime(folder / "checkpoint.pt", times=(1000 - age, 1000 - age))

    assert run(labels_per_class="1", fraction="", methods="probe") == 0
    out, err = capsys.readouterr()
    assert out == ""  # nothing of this is a line of the table
    assert "runs/plain is on images without labels: passed over" in err
    assert "the newest run: runs/demo-001" in err

    shutil.rmtree(tmp_path / "runs" / "demo-001")
    assert run() == 2
    assert "all runs in runs/ are on images without labels" in capsys.readouterr().err


def test_only_the_lines_of_the_table_go_to_stdout(world, capsys, tmp_path):
    """The table can be cut out of what a pipe gets; all that is said beside it is on stderr."""
    own = {"checkpoint": world / "encoder", "data": world / "data", "output_dir": tmp_path}
    flags = {"methods": "scratch,probe", "labels_per_class": "1", "fraction": "", "steps": "1"}
    assert run(**own, **flags) == 0
    out, err = capsys.readouterr()
    starts = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert starts == ["accuracy", "1/class", "scratch", "probe"]
    assert "scratch: --scratch-lr" in err and "written: " in err


@pytest.mark.parametrize(
    "flags, all_labels",
    [
        ((), True),
        (("--fraction", "1"), True),
        (("--fraction", "1.0"), True),
        (("--fraction", "0.5"), False),
        (("--labels-per-class", "2"), False),
    ],
)
def test_train_augments_strongly_only_with_all_labels(flags, all_labels, monkeypatch):
    """With all labels `train` crops smaller and drops paths; with few it does neither."""
    configs = []
    monkeypatch.setattr(finetune, "train_and_save", configs.append)
    finetune.main(["train", *flags])
    assert configs[0].crop_scale == ((0.3, 1.0) if all_labels else (0.8, 1.0))
    assert configs[0].drop_path_rate == (0.1 if all_labels else 0.0)


def test_transformers_loads_the_classifier_and_agrees(world):
    """What `train` saves is a classifier for transformers, with the same names and logits."""
    transformers = pytest.importorskip("transformers")
    folder = world / "classifier"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.ViTMSNForImageClassification.from_pretrained(folder).eval()
    assert list(theirs.config.id2label.values()) == sorted(CLASSES)

    ours = ViTMSNForImageClassification.from_pretrained(folder)
    pixels = randn(2, 3, 16, 16)
    with torch.no_grad():
        assert_relatively_close(ours(pixels).logits, theirs(pixels).logits, 1e-5)
