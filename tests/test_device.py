"""Every function that takes a device or a batch, on a device: the CPU's results, and few waits.

The device is tests/pretend_device.py, whose own tests come first.
"""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pretend_device
import pytest
import torch
import torch.nn.functional as F
from common import assert_relatively_close, randn, randomized, tiny_config
from PIL import Image
from pretend_device import Wait, count_waits
from runs import flatten, make_pictures
from torch import nn
from torch.utils._pytree import tree_map

import bench
import finetune
import train_msn
import vitmsn
from train_msn import Batch, Processes, pack

pytestmark = pytest.mark.skipif(bool(pretend_device.MISSING), reason=pretend_device.MISSING)

CPU = torch.device("cpu")


@pytest.fixture
def device():
    with pretend_device.plugged_in() as device:
        yield device


def assert_same_on_the_device(function, device, limit: float = 1e-5, **options) -> None:
    """function(device, **options) gives the same tensors on the CPU and on the device, each there.

    It may give one tensor, or lists, tuples and dicts of tensors and numbers."""
    torch.manual_seed(0)
    expected = flatten(function(CPU, **options))
    torch.manual_seed(0)
    actual = flatten(function(device, **options))

    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            continue
        ours = actual[name]
        if isinstance(value, torch.Tensor):
            assert ours.device.type == device.type, name
            ours = ours.cpu()
        torch.testing.assert_close(
            ours, value, rtol=limit, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- the pretence itself ---


def test_arithmetic_and_gradients_are_those_of_the_cpu(device):
    """A small network, forward and backward, in place and by views."""

    def gradients(device):
        layer = nn.Linear(4, 3)
        nn.init.constant_(layer.weight, 0.3)
        layer.to(device)
        x = randn(5, 4).to(device).requires_grad_()
        y = layer(x.t().contiguous().t()).softmax(dim=-1)
        y = torch.cat([y[:2].mul(2).add_(1), y[2:]])
        y.square().sum().backward()
        return y.detach(), x.grad, layer.weight.grad

    assert_same_on_the_device(gradients, device)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, cpu: x + cpu,
        lambda x, cpu: cpu * x,
        lambda x, cpu: x @ cpu,
        lambda x, cpu: torch.where(x > 0, x, cpu),
        lambda x, cpu: torch.cat([x, cpu]),
        lambda x, cpu: torch.stack([x.sum(), cpu.sum()]),
        lambda x, cpu: x.gather(1, cpu.long()),
        lambda x, cpu: x.masked_fill(cpu > 0, 0),
        lambda x, cpu: cpu[x.long()],
        lambda x, cpu: x.mul_(cpu),
        lambda x, cpu: nn.Linear(3, 3)(x),
        lambda x, cpu: torch.rand(3, device=x.device, generator=torch.Generator()),
        lambda x, cpu: torch.randperm(3, device=x.device, generator=torch.Generator()),
    ],
)
def test_what_mixes_two_devices_is_refused(device, mix):
    x = torch.ones(3, 3, device=device)
    with pytest.raises(RuntimeError, match=r"same device|device type for generator"):
        mix(x, torch.ones(3, 3))


def test_single_numbers_and_indices_may_come_from_the_cpu(device):
    """As with CUDA."""
    x = torch.arange(3.0, device=device)
    assert (x + torch.tensor(1.0)).tolist() == [1, 2, 3]
    assert x[torch.tensor([2, 0])].tolist() == [2, 0]
    assert torch.tensor(2.0).mul(x).device == device


WAITING = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "boolean mask as an index": lambda x: x[x > 1],
    "list as an index": lambda x: x[[0, 1]],
    "values from Python": lambda x: x.new_tensor([1.0]),
    "copy to the host": lambda x: x.cpu(),
    "copy from the host": lambda x: x.copy_(torch.ones(3)),
    "__format__": lambda x: f"{x.sum():.3f}",
    "masked_select": lambda x: x.masked_select(x > 1),
    "bincount": lambda x: x.long().bincount(),
    "synchronize": lambda x: torch.get_device_module(x.device).synchronize(),
}


@pytest.mark.parametrize("reason", WAITING)
def test_what_makes_the_host_wait_is_counted_where_it_happens(device, reason):
    x = torch.arange(3.0, device=device)

    def here():
        WAITING[reason](x)

    with count_waits() as waits:
        here()
    assert waits == {Wait("test_device.here", reason): 1}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool(x.any()),
        lambda x: float(x.sum()),
        lambda x: int(x.argmax()),
        lambda x: x.__setitem__(x > 1, 0.0),
        lambda x: x.__setitem__([0], 0.0),
        lambda x: x[torch.tensor([0])],
        lambda x: x[x.long()[0]],
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        lambda x: torch.ones(3).pin_memory().to(x.device),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: torch.where(x > 1),
        lambda x: x.unique(),
        lambda x: torch.save(x, "/dev/null"),
    ],
)
def test_other_ways_to_wait_are_counted_too(device, wait):
    x = torch.arange(3.0, device=device)
    with count_waits() as waits:
        wait(x)
    assert sum(waits.values()) > 0


def test_work_that_is_only_queued_makes_nobody_wait(device):
    """Arithmetic, random numbers, copies of pinned memory, and what happens on the CPU alone."""
    pinned = torch.arange(3.0).pin_memory()
    with count_waits() as waits:
        x = pinned.to(device, non_blocking=True)
        y = (x * 2 + torch.rand(3, device=device)).sort().values
        y[0] = 0.0
        z = y[torch.zeros(2, dtype=torch.long, device=device)].sum()
        host = torch.stack([z, y.max()]).to("cpu", non_blocking=True)
        host.shape[0], len(y), torch.ones(3).sum().item(), torch.ones(3).nonzero()
    assert not waits


def test_a_copy_nobody_waited_for_holds_garbage(device):
    """Until an event, or anything else, has made the host wait."""
    x = torch.arange(3.0, device=device)
    host = x.to("cpu", non_blocking=True)
    event = torch.get_device_module(device).Event()
    event.record()
    assert host.isnan().all()
    event.synchronize()
    assert host.tolist() == [0, 1, 2]


def test_the_device_is_there_only_while_it_is_plugged_in():
    with pretend_device.plugged_in():
        assert torch.accelerator.is_available()
    assert not torch.accelerator.is_available()


# Three mistakes planted in a training step, each as small as it can be.


def step_without_a_mistake(weight, x, mask):
    loss = torch.where(mask, weight * x, 0.0).square().sum()
    loss.backward()
    with torch.no_grad():
        weight -= 0.1 * weight.grad
    return loss.detach()


def step_with_a_constant_on_the_cpu(weight, x, mask):
    mean = torch.tensor([0.5, 0.4, 0.4])
    return step_without_a_mistake(weight, x - mean, mask)


def step_with_an_item(weight, x, mask):
    loss = step_without_a_mistake(weight, x, mask)
    return loss / max(loss.item(), 1.0)


def step_with_the_mask_on_the_cpu(weight, x, mask):
    return step_without_a_mistake(weight, x, torch.ones(3, dtype=torch.bool))


def run_step(step, device) -> Counter:
    weight = torch.ones(3, device=device, requires_grad=True)
    x = torch.ones(3, device=device)
    mask = torch.ones(3, dtype=torch.bool, device=device)
    with count_waits() as waits:
        step(weight, x, mask)
    return waits


def test_a_step_without_a_mistake_passes(device):
    assert not run_step(step_without_a_mistake, device)


@pytest.mark.parametrize("step", [step_with_a_constant_on_the_cpu, step_with_the_mask_on_the_cpu])
def test_a_tensor_left_on_the_cpu_is_caught(device, step):
    run_step(step, CPU)  # there it is no mistake
    with pytest.raises(RuntimeError, match="same device"):
        run_step(step, device)


def test_an_item_in_a_step_is_caught(device):
    assert run_step(step_with_an_item, device) == {Wait("test_device.step_with_an_item", "item"): 1}


# --- the model ---


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_encoder_on_the_device_equals_the_cpu(device, attention):
    """Forward, masked, at another size, with hidden states and attentions; and no wait in it."""

    def outputs(device):
        config = tiny_config(attn_implementation=attention)
        model = randomized(vitmsn.ViTMSNModel(config, use_mask_token=True)).to(device).eval()
        images = randn(2, 3, 32, 32).to(device)
        large = randn(2, 3, 40, 48).to(device)
        masked = (randn(2, 16) > 0).to(device)
        keep = torch.tensor([[0, 3, 7], [1, 2, 15]]).to(device)

        with torch.no_grad(), count_waits() as waits:
            plain = model(images, output_hidden_states=True, output_attentions=True)
            hidden = model(images, bool_masked_pos=masked, patches_to_keep=keep)
            resized = model(large, interpolate_pos_encoding=True)
            representation = model.representation(images, keep)
        assert not waits
        return (
            plain.last_hidden_state,
            plain.hidden_states,
            plain.attentions,
            hidden.last_hidden_state,
            resized.last_hidden_state,
            representation,
        )

    assert_same_on_the_device(outputs, device)


@pytest.mark.parametrize(
    ("labels", "num_labels"),
    [([1, 0], 5), ([[0.3], [0.7]], 1), ([[1.0, 0, 1], [0, 0, 1]], 3)],
    ids=["one label", "regression", "several labels"],
)
def test_the_classifier_on_the_device_equals_the_cpu(device, labels, num_labels):
    def loss_and_gradient(device):
        model = vitmsn.ViTMSNForImageClassification(tiny_config(num_labels=num_labels))
        model = randomized(model).to(device)
        images = randn(2, 3, 32, 32).to(device)
        targets = torch.tensor(labels).to(device)
        with count_waits() as waits:
            output = model(images, targets)
            output.loss.backward()
        assert not waits
        return output.logits.detach(), output.loss.detach(), model.classifier.weight.grad

    assert_same_on_the_device(loss_and_gradient, device)


LOSSES = [
    {},
    {"sinkhorn_iterations": 0, "entropy_weight": 0.3, "label_smoothing": 0.1},
    {"log_prior": vitmsn.power_law_prior(7, 0.5)},
]


@pytest.mark.parametrize("options", LOSSES, ids=["published", "other terms", "a prior"])
def test_the_objective_on_the_device_equals_the_cpu(device, options):
    def terms(device):
        anchors = randn(12, 8).to(device).requires_grad_()
        targets = randn(4, 8, seed=1).to(device)
        prototypes = randn(7, 8, seed=2).to(device).requires_grad_()
        own = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        with count_waits() as waits:
            loss = vitmsn.msn_loss(anchors, targets, prototypes, **own)
            loss.loss.backward()
        assert not waits
        return [term.detach() for term in loss], anchors.grad, prototypes.grad

    assert_same_on_the_device(terms, device)


def test_pictures_go_from_preprocess_to_the_device(device):
    """And give the CPU's logits."""
    pictures = [Image.fromarray(np.full((40, 50, 3), 9 * i, np.uint8)) for i in range(3)]

    def logits(device):
        model = randomized(vitmsn.ViTMSNForImageClassification(tiny_config())).to(device).eval()
        with torch.no_grad():
            return model(vitmsn.preprocess(pictures, model.config).to(device)).logits

    assert_same_on_the_device(logits, device)


def test_a_model_saved_from_the_device_loads_anywhere(device, tmp_path):
    pytest.importorskip("safetensors")
    model = randomized(vitmsn.ViTMSNForImageClassification(tiny_config()))
    model.to(device).save_pretrained(tmp_path)
    loaded = vitmsn.ViTMSNForImageClassification.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert value.device == device
        assert torch.equal(loaded.state_dict()[name], value.cpu()), name


# --- views and masks ---

STEP = dict(
    recipe="demo",
    batch_size=6,
    epochs=4,
    image_size=16,
    patch_size=4,
    focal_views=2,
    focal_size=8,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_hidden_size=16,
    output_dim=8,
    num_prototypes=5,
    warmup_epochs=1.0,
    blur=0.5,
    knn_every=0,
    checkpoint_every=1000,
    device="cpu",
    precision="float32",
)


def make_config(**changes) -> train_msn.TrainConfig:
    return train_msn.make_config({**STEP, **changes})


def smooth(height: int, width: int, count: int) -> torch.Tensor:
    """Smooth coloured pictures, as photographs are. -> count 3 height width, uint8"""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1).mul(255).byte()


def pictures_of(height: int, width: int, count: int = 6) -> Batch:
    """Smooth coloured pictures of three widths."""
    images = smooth(height, width, count)
    images = [image[:, :, : width - i % 3] for i, image in enumerate(images)]
    return pack(images, list(range(count)))


def views_on(device, batch: Batch, config: train_msn.TrainConfig) -> train_msn.Views:
    return train_msn.make_views(batch.on(device), config, 1, slice(0, len(batch.sizes)))


@pytest.mark.parametrize("anchor_view", ["own", "recolored", "target"])
@pytest.mark.parametrize("focal_mask", [False, True])
def test_views_of_small_pictures_on_the_device_equal_the_cpu(device, anchor_view, focal_mask):
    """With every augmentation; the masks with them."""
    changes = {"anchor_view": anchor_view, "focal_mask": focal_mask}
    config = make_config(random_views=2, mask_ratio=0.3, **changes)
    assert_same_on_the_device(views_on, device, batch=pictures_of(33, 40), config=config)


def test_views_of_large_pictures_on_the_device_equal_the_cpu_to_a_grey_level(device):
    """The CPU crops large pictures one by one and in whole numbers: a rounding, so one grey level.

    Without changes of colour, which would multiply it."""
    config = make_config(image_size=32, color_jitter=0.0, grey=0.0, blur=0.0)
    batch = pictures_of(90, 120)
    expected, actual = (
        flatten(views_on(CPU, batch, config)),
        flatten(views_on(device, batch, config)),
    )
    grey_level = 1 / 255 / min(vitmsn.IMAGENET_STD)
    for name, value in expected.items():
        if value is None:
            continue
        assert (actual[name].cpu() - value).abs().max() <= 1.01 * grey_level, name


def test_crops_of_large_pictures_on_the_device_equal_the_cpu(device):
    """Exactly the same way of computing: here nothing is rounded."""
    batch = pictures_of(90, 120)
    u = torch.rand(12, train_msn.DRAWS["crop"])
    boxes = train_msn.crop_boxes(u, batch.sizes.repeat(2, 1), (0.3, 1.0))

    def crops(device):
        return train_msn.crop_by_products(batch.on(device), boxes, 24)

    assert_same_on_the_device(crops, device)


def test_each_augmentation_on_the_device_equals_the_cpu(device):
    """The functions of pixels, by themselves."""
    pixels = torch.rand(4, 3, 8, 8)
    shift = torch.rand(4, 1, 1, 1)
    sigma = 0.1 + torch.rand(4)
    factors = torch.rand(4, 4)
    order = torch.rand(4, 4)
    apply = torch.tensor([True, False, True, True])

    def augmented(device):
        x = pixels.to(device)
        return (
            vitmsn.normalize(x),
            vitmsn.normalize(x[:, :1]),
            train_msn.to_grey(x),
            train_msn.adjust_hue(x.clone(), shift.to(device)),
            train_msn.gaussian_blur(x, sigma.to(device)),
            train_msn.color_jitter(x.clone(), 0.5, apply, factors, order),
        )

    assert_same_on_the_device(augmented, device)


# --- a training step ---


def two_steps(device, precision: str, **changes) -> dict:
    """The terms of two steps, and what they leave: weights, target, state of the optimizer."""
    config = make_config(precision=precision, **changes)
    model = train_msn.build_model(config, Processes(0, 1, device))
    groups = train_msn.parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    terms = []
    for step in range(2):
        views = views_on(CPU, pictures_of(33, 40), config)  # the same, to the last bit
        views = tree_map(lambda x: x if x is None else x.to(device), views)
        now = train_msn.schedule_at(config, step, 4)
        loss, metrics = train_msn.train_step(
            model, optimizer, *views, now, config.clip_grad, config.precision
        )
        terms.append([*(term.detach() for term in loss), metrics])
    moments = {i: optimizer.state[p] for i, p in enumerate(model.parameters()) if p.requires_grad}
    return {"terms": terms, "model": dict(model.state_dict()), "optimizer": moments}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"random_views": 0, "prior_exponent": 0.25, "freeze_prototypes": True},
        {"gradient_checkpointing": True, "drop_path_rate": 0.3},
    ],
    ids=["demo", "focal views and a prior", "checkpointing and stochastic depth"],
)
def test_training_steps_on_the_device_equal_the_cpu(device, changes):
    """Loss, gradients, AdamW, target update; in float64, so that no rounding hides a mistake."""
    assert_same_on_the_device(two_steps, device, 1e-9, precision="float64", **changes)


def test_a_loss_that_is_not_finite_stops_a_step_on_the_device(device):
    """Before any weight has changed, and it says what was not finite."""
    config = make_config()
    model = train_msn.build_model(config, Processes(0, 1, device))
    optimizer = torch.optim.AdamW(train_msn.parameter_groups(model, 0.1), fused=True)
    views = views_on(device, pictures_of(33, 40), config)
    views.target_view[0, 0, 0, 0] = float("nan")
    before = {name: value.cpu() for name, value in model.named_parameters()}
    now = train_msn.schedule_at(config, 0, 4)
    with pytest.raises(FloatingPointError, match="loss nan"):
        train_msn.train_step(model, optimizer, *views, now, config.clip_grad)
    for name, value in model.named_parameters():
        assert torch.equal(value.cpu(), before[name]), name


# --- k-NN ---


class WithGaps(train_msn.ImagesInMemory):
    """Every fifth file is unreadable: the next one stands in."""

    def __getitems__(self, indices):
        read = [i + 1 if i % 5 == 0 else i for i in indices]
        return super().__getitems__(read)._replace(indices=read)


def embed_on(device, images=None, encoder: bool = True, batch_size: int = 4):
    model = randomized(vitmsn.ViTMSNModel(tiny_config())).to(device) if encoder else None
    images = images or train_msn.ImagesInMemory(smooth(36, 33, 12))
    return train_msn.embed_images(model, images, list(range(11)), 32, device, batch_size)


@pytest.mark.parametrize("encoder", [True, False], ids=["encoder", "pixels"])
def test_features_from_the_device_equal_the_cpu(device, encoder):
    """Also where images are left out; they come to the CPU."""
    images = WithGaps(smooth(36, 33, 12))
    expected, kept = embed_on(CPU, images, encoder)
    actual, also_kept = embed_on(device, images, encoder)
    assert also_kept == kept == [1, 2, 3, 4, 6, 7, 8, 9]
    assert actual.device == CPU
    assert_relatively_close(actual, expected, 1e-5)


@pytest.mark.parametrize("gaps", [False, True], ids=["all readable", "unreadable files"])
def test_evaluation_waits_once_a_batch(device, gaps):
    """For the features on their way to the CPU."""
    kind = WithGaps if gaps else train_msn.ImagesInMemory
    images = kind(smooth(36, 33, 12))
    with count_waits() as one_batch:
        embed_on(device, images, batch_size=11)
    with count_waits() as four_batches:
        embed_on(device, images, batch_size=3)
    assert four_batches - one_batch == {Wait("train_msn.embed_images", "copy to the host"): 3}


def test_neighbours_on_the_device_give_the_cpus_classes(device):
    images = train_msn.ImagesInMemory(smooth(36, 33, 12))
    labels = torch.arange(12) % 3
    data = train_msn.Images(["a", "b", "c"], images, labels, images, labels)
    config = make_config(image_size=32, patch_size=8)
    model = randomized(vitmsn.ViTMSNModel(tiny_config()))

    def accuracies(device):
        encoder = model.to(device)
        with_encoder = train_msn.knn_accuracy(encoder, data, config, device)
        return with_encoder, train_msn.knn_accuracy(None, data, config, device)

    assert accuracies(device) == accuracies(CPU)


def test_knn_predict_takes_features_of_the_device(device):
    bank = randn(30, 8)
    labels = torch.arange(30) % 4
    features = randn(9, 8, seed=1)

    def classes(device):
        return train_msn.knn_predict(bank.to(device), labels.to(device), features.to(device), 5)

    assert_same_on_the_device(classes, device)


# --- a whole run ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), size=70)


def train_on(device, pictures: Path, folder: Path, **changes) -> Counter:
    """A run from the first step to the last picture -> the waits in it."""
    config = make_config(data=str(pictures), output_dir=str(folder), **changes)
    content = train_msn.load_checkpoint(folder) if config.resume else None
    with count_waits() as waits:
        data = train_msn.open_data(config)
        train_msn.train(config, data, folder, content, Processes(0, 1, device))
    return waits


def table_of(path: Path) -> dict[str, list[float]]:
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    columns = {name: [] for name in rows.fieldnames}
    for row in rows:
        for name, value in row.items():
            columns[name].append(float(value))
    return columns


def assert_same_metrics(actual: Path, expected: Path, limit: float) -> None:
    columns = table_of(expected / "metrics.csv")
    for name, values in columns.items():
        if name not in ("images_per_second", "elapsed_seconds"):
            ours = table_of(actual / "metrics.csv")[name]
            assert_relatively_close(ours, values, limit, name)


def names_of_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_same_picture(actual: Path, expected: Path, grey_levels: int) -> None:
    pixels = [np.asarray(Image.open(path), dtype=int) for path in (actual, expected)]
    assert pixels[0].shape == pixels[1].shape
    assert np.abs(pixels[0] - pixels[1]).max() <= grey_levels


# The places at which a step of the loop makes the host wait, and why it must.
STEP_WAITS = {
    # No weight may change if the loss is not finite; the metrics come in the same copy.
    Wait("train_msn.read_metrics", "tolist"),
}


EVERYTHING = {"random_views": 2, "mask_ratio": 0.3, "prior_exponent": 0.25, "drop_path_rate": 0.2}


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["demo", "prior and stochastic depth"])
def test_a_step_of_the_loop_waits_only_at_named_places(device, pictures, tmp_path, options):
    """What a run of seven steps waits more than one of three, once for each of the four."""
    three = train_on(device, pictures, tmp_path / "three", max_steps=3, **options)
    seven = train_on(device, pictures, tmp_path / "seven", max_steps=7, **options)
    assert seven - three == {wait: 4 for wait in STEP_WAITS}
    assert len(STEP_WAITS) <= 3


def test_a_run_on_the_device_equals_one_on_the_cpu(device, pictures, tmp_path):
    """Metrics, k-NN, every file; nearly, as the CPU crops these pictures in whole numbers."""
    ours = tmp_path / "device"
    cpus = tmp_path / "cpu"
    options = {"epochs": 2, "knn_every": 1, "precision": "float64", "color_jitter": 0.0}
    train_on(device, pictures, ours, **options)
    train_on(CPU, pictures, cpus, **options)

    assert_same_metrics(ours, cpus, 1e-2)
    assert table_of(ours / "knn.csv") == table_of(cpus / "knn.csv")
    assert names_of_files(ours) == names_of_files(cpus)
    assert_same_picture(ours / "views.png", cpus / "views.png", 2)


def test_a_run_on_the_device_resumes_there_bit_for_bit(device, pictures, tmp_path):
    """As on the CPU; and its checkpoint goes on on the CPU."""
    train_on(device, pictures, tmp_path / "whole", max_steps=6)
    train_on(device, pictures, tmp_path / "parts", max_steps=3)
    train_on(device, pictures, tmp_path / "parts", max_steps=6, resume=True)
    assert_same_metrics(tmp_path / "parts", tmp_path / "whole", 0.0)

    train_on(CPU, pictures, tmp_path / "parts", max_steps=8, resume=True)
    assert len(table_of(tmp_path / "parts/metrics.csv")["step"]) == 8


# --- finetune.py ---

TABLE = (
    *("--methods", "probe,finetune,scratch,untrained,pixels,knn20,knn200"),
    *("--labels-per-class", "1,2", "--seeds", "0,1", "--steps", "2", "--batch-size", "2"),
    *("--precision", "float32"),
)
TRAIN = ("--labels-per-class", "3", "--epochs", "1", "--precision", "float32")


@pytest.fixture(scope="module")
def run_folder(pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_on(CPU, pictures, folder, epochs=1)
    return folder


def finetune_on(device, monkeypatch, *argv) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "start_alone", lambda name: device)
        finetune.main([*map(str, argv)])


def test_the_table_on_the_device_equals_the_cpu(device, run_folder, tmp_path, monkeypatch):
    """Every method: probes, trained cells, baselines."""
    for name, where in (("cpu", CPU), ("device", device)):
        flags = ("--checkpoint", run_folder, "--output-dir", tmp_path / name, *TABLE)
        finetune_on(where, monkeypatch, *flags)
    assert (tmp_path / "device/table.csv").read_text() == (tmp_path / "cpu/table.csv").read_text()


def test_using_a_model_on_the_device_equals_the_cpu(
    device, run_folder, pictures, tmp_path, monkeypatch
):
    """train, predict, attention, embed, neighbours: what they write, but for rounded crops."""
    for name, where in (("cpu", CPU), ("device", device)):
        folder = tmp_path / name
        images = pictures / "val"
        classifier = folder / "classifier"
        commands = (
            ("train", "--checkpoint", run_folder, *TRAIN, "--output-dir", classifier),
            ("predict", classifier, images, "--csv", folder / "classes.csv"),
            ("attention", run_folder, images, "--output-dir", folder / "attention"),
            ("embed", run_folder, images, "--output", folder / "features.npz"),
            ("neighbours", run_folder, images, "--output", folder / "neighbours.png"),
        )
        for command in commands:
            finetune_on(where, monkeypatch, *command)

    ours = tmp_path / "device"
    cpus = tmp_path / "cpu"
    assert names_of_files(ours) == names_of_files(cpus)
    for path in (cpus / "attention").iterdir():
        assert_same_picture(ours / "attention" / path.name, path, 4)

    features = np.load(ours / "features.npz")
    expected = np.load(cpus / "features.npz")
    assert_relatively_close(features["features"], expected["features"], 1e-2)
    assert list(features["paths"]) == list(expected["paths"])
    probabilities = column_of(ours / "classes.csv")
    expected = column_of(cpus / "classes.csv")
    assert_relatively_close(probabilities, expected, 1e-2)


def column_of(path: Path, name: str = "probability") -> list[float]:
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    return [float(row[name]) for row in rows]


def train_classifier_on(device, steps: int = 3):
    """A classifier after some steps on pictures in memory, and the waits of those steps."""
    config = finetune.FinetuneConfig(steps=steps, batch_size=4, precision="float32", device="cpu")
    encoder = randomized(vitmsn.ViTMSNModel(tiny_config())).to(device)
    model = finetune.build_classifier(encoder, ["a", "b"], config, randn(2, 24).to(device))
    images = train_msn.ImagesInMemory(smooth(36, 33, 12))
    labels = torch.arange(12) % 2
    with count_waits() as waits:
        finetune.train_classifier(
            model, images, labels, list(range(10)), config, 1e-3, 0.65, seed=0
        )
    return model, waits


def test_classifier_training_on_the_device_equals_the_cpu(device):
    """The probabilities that it gives after a few steps."""
    images = train_msn.ImagesInMemory(smooth(36, 33, 12))
    expected, actual = (
        finetune.classify(train_classifier_on(d)[0], images, list(range(12))) for d in (CPU, device)
    )
    assert actual.device == CPU
    assert_relatively_close(actual, expected, 1e-4)


CLASSIFIER_WAITS = {Wait("finetune.check_finite", "item")}  # is the loss finite


def test_a_step_of_classifier_training_waits_only_at_named_places(device):
    _, three = train_classifier_on(device, steps=3)
    _, seven = train_classifier_on(device, steps=7)
    assert seven - three == {wait: 4 for wait in CLASSIFIER_WAITS}


def test_the_probe_on_the_device_equals_the_cpu(device):
    rows = finetune.center_and_scale(randn(12, 6))
    labels = torch.arange(12) % 3

    def weights(device):
        return finetune.fit_logistic_probe(rows.to(device), labels.to(device), 3, 0.1, 1e-8)

    assert_same_on_the_device(weights, device, 1e-6)


# --- the flag, and bench.py ---


@pytest.mark.parametrize(
    "config", [train_msn.make_config, lambda given: finetune.FinetuneConfig(**given)]
)
def test_the_flag_takes_any_device_that_torch_knows(device, config):
    config({"device": "pretend"})


def test_a_device_that_is_not_there_is_named():
    """Its name is known, but it is not plugged in."""
    pretend_device.register()
    config = make_config(device="pretend")
    with pytest.raises(train_msn.UsageError, match="pretend"):
        train_msn.start_processes(config)


def test_the_automatic_choice_is_the_device_that_is_there(device, monkeypatch):
    """If it is one of those that are chosen without being named."""
    assert train_msn.start_processes(make_config(device="auto")).device == CPU
    monkeypatch.setattr(train_msn, "CHOSEN_BY_AUTO", ("cuda", "pretend"))
    assert train_msn.start_processes(make_config(device="auto")).device == device


BENCH_VIEWS = ("--image-size", "16", "--patch-size", "4")
BENCH_MODEL = (
    *("--hidden-size", "16", "--num-hidden-layers", "2", "--num-attention-heads", "2"),
    *BENCH_VIEWS,
)
SUITES = {
    "inference": (*BENCH_MODEL, "--batch-sizes", "1"),
    "views": (*BENCH_VIEWS, "--focal-size", "8", "--batch-size", "4"),
    "train": (*BENCH_MODEL, "--focal-size", "8", "--batch-size", "4"),
}


@pytest.mark.parametrize("suite", SUITES)
def test_benchmarks_run_on_the_device(device, suite, capsys, monkeypatch):
    """Each suite prints its table."""
    monkeypatch.setattr(bench, "PEAK_SIDE_GPU", 64)
    flags = (*SUITES[suite], "--repeats", "1", "--no-memory", "--device", "pretend")
    bench.main([suite, *flags])
    assert "|" in capsys.readouterr().out
