"""Views are what Pillow would make of the picture, and a pure function of (seed, step); schedules and k-NN by laws."""

import colorsys
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch.testing import assert_close

import train_msn
from train_msn import (
    COLOR_OPERATIONS,
    DRAWS,
    TRIES,
    Batch,
    color_jitter,
    cosine,
    crop_boxes,
    crop_and_resize,
    crop_by_products,
    gaussian_blur,
    knn_predict,
    linear,
    make_config,
    views_of_one_size,
    make_views,
    schedule_at,
    to_grey,
    warmup_cosine,
)

SEEDS = st.integers(0, 2**31 - 1)
STEP_OF_GREY = 1.5 / 255  # Pillow rounds to whole greys, twice


def padded(pictures: list[np.ndarray]) -> Batch:
    """Pictures (h w 3) of any sizes as the loader gives them: in the top left corner of a canvas."""
    sizes = torch.tensor([picture.shape[:2] for picture in pictures])
    canvas = torch.zeros(len(pictures), 3, *sizes.amax(dim=0).tolist(), dtype=torch.uint8)
    for row, picture in zip(canvas, pictures, strict=True):
        row[:, : picture.shape[0], : picture.shape[1]] = torch.from_numpy(picture).permute(2, 0, 1)
    return Batch(canvas, sizes, list(range(len(pictures))), [])


def random_pictures(
    rng: np.random.Generator, count: int, low: int = 1, high: int = 60
) -> list[np.ndarray]:
    return [
        rng.integers(0, 256, (*rng.integers(low, high, 2), 3), dtype=np.uint8) for _ in range(count)
    ]


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def colours(
    rng: np.random.Generator, count: int = 3, size: int = 9
) -> tuple[list[Image.Image], torch.Tensor]:
    pictures = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pictures], torch.from_numpy(pictures).permute(
        0, 3, 1, 2
    ).float() / 255


# -- crop, resize, flip ----------------------------------------------------------------------------


def crop_one_by_one(images: torch.Tensor, *arguments) -> torch.Tensor:
    """What crop_and_resize does with large pictures on a CPU: of a canvas of more than 64 pixels."""
    return crop_and_resize(torch.nn.functional.pad(images, (0, 65, 0, 65)), *arguments)


@pytest.mark.parametrize("crop", [crop_one_by_one, crop_by_products])
@given(SEEDS, st.sampled_from([1, 4, 16, 33, 96]))
def test_crop_and_resize_is_pillows_crop_then_bilinear_resize(crop, seed, size):
    rng = np.random.default_rng(seed)
    pictures = random_pictures(rng, 5)
    twice = [*pictures, *pictures]  # two views of each
    ends = [np.sort([rng.integers(0, side, 2) for side in p.shape[:2]], axis=1) for p in twice]
    boxes = torch.tensor(np.array([[*e[:, 0], *(e[:, 1] - e[:, 0] + 1)] for e in ends]))
    ours = crop(padded(pictures).images, boxes, torch.zeros(10, dtype=torch.bool), size)
    for view, picture, (top, left, height, width) in zip(ours, twice, boxes.tolist(), strict=True):
        theirs = Image.fromarray(picture).crop((left, top, left + width, top + height))
        theirs = theirs.resize((size, size), Image.Resampling.BILINEAR)
        assert (view - pixels_of(theirs)).abs().max() <= STEP_OF_GREY


@pytest.mark.parametrize("crop", [crop_one_by_one, crop_by_products])
@given(SEEDS)
def test_a_flip_reverses_columns_of_the_images_it_is_asked_for(crop, seed):
    batch, flip = (
        padded(random_pictures(np.random.default_rng(seed), 3)),
        torch.tensor([True, False, True]),
    )
    boxes = torch.cat([torch.zeros_like(batch.sizes), batch.sizes], dim=1)
    plain, flipped = (crop(batch.images, boxes, which, 12) for which in (flip & False, flip))
    assert_close(
        flipped, torch.where(flip[:, None, None, None], plain.flip(-1), plain), rtol=0, atol=1e-6
    )


@given(
    SEEDS,
    st.lists(st.tuples(st.integers(1, 80), st.integers(1, 80)), min_size=1, max_size=8),
    st.floats(1e-3, 1),
    st.sampled_from([0.0, 0.5, 1 - 2**-24]),
)
def test_boxes_lie_inside_the_image_and_hold_a_pixel(seed, sizes, low, corner):
    u = torch.rand(len(sizes), DRAWS["crop"], generator=torch.Generator().manual_seed(seed))
    u[:, 2 * TRIES :] = torch.where(u[:, 2 * TRIES :] < 0.5, corner, u[:, 2 * TRIES :])
    boxes, sizes = crop_boxes(u, torch.tensor(sizes), (low, 1.0)), torch.tensor(sizes)
    assert (
        (boxes[:, :2] >= 0).all()
        and (boxes[:, 2:] >= 1).all()
        and (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
    )


def test_areas_are_uniform_aspect_ratios_log_uniform_and_places_uniform():
    n, sizes, scale = 20000, torch.tensor([1000, 1400]), (0.1, 0.5)
    u = torch.rand(n, DRAWS["crop"], generator=torch.Generator().manual_seed(0))
    top, left, height, width = crop_boxes(u, sizes.expand(n, 2), scale).double().unbind(dim=1)
    area, aspect = height * width / sizes.prod(), (width / height).log() / math.log(4 / 3)
    assert aspect.abs().max() < 1.01
    for what, value in {
        "area": (area - scale[0]) / (scale[1] - scale[0]),
        "aspect": (aspect + 1) / 2,
        "top": (top + 0.5) / (1000 - height + 1),
        "left": (left + 0.5) / (1400 - width + 1),
    }.items():
        distance = (value.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
        assert distance < 1.63 / math.sqrt(n) + 2e-3, (
            what
        )  # Kolmogorov and Smirnov at 1 %, and whole pixels


def test_the_first_try_that_fits_is_taken_else_the_square_in_the_middle():
    u = torch.full(
        (2, DRAWS["crop"]), 0.9999
    )  # of the whole area and as wide as can be: fits no square
    u[0, [2, 4]], u[0, [TRIES + 2, TRIES + 4]] = (
        torch.tensor([0.25, 0.0]),
        0.5,
    )  # tries 2 and 4 are squares that fit
    assert crop_boxes(u, torch.full((2, 2), 40), (0.04, 1.0))[0, 2:].tolist() == [
        21,
        21,
    ]  # 0.04 + 0.25 * 0.96, rooted
    assert crop_boxes(u[1:], torch.tensor([[10, 31]]), (1.0, 1.0)).tolist() == [[0, 11, 10, 10]]


# -- colour and blur -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, enhance",
    [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)],
)
@given(SEEDS, st.floats(0, 2))
def test_brightness_contrast_and_saturation_are_pillows(kind, enhance, seed, factor):
    images, pixels = colours(np.random.default_rng(seed))
    ours = COLOR_OPERATIONS[kind](pixels, torch.full((len(images), 1, 1, 1), factor))
    theirs = torch.stack([pixels_of(enhance(image).enhance(factor)) for image in images])
    off = torch.zeros(len(images), 1, 1, 1)
    if (
        kind == 1
    ):  # Pillow rounds each grey before it takes their mean; by so much its mean is another than ours
        rounded = (
            torch.stack([torch.from_numpy(np.array(image.convert("L"))) for image in images])[
                :, None
            ]
            / 255
        )
        off = (rounded - to_grey(pixels)).mean(dim=(1, 2, 3), keepdim=True).abs()
    assert ((ours - theirs).abs() - off).max() <= STEP_OF_GREY


@given(SEEDS, st.floats(0, 2))
def test_contrast_is_its_formula(seed, factor):
    _, pixels = colours(np.random.default_rng(seed))
    x, weights = pixels.double().numpy(), np.array([0.299, 0.587, 0.114])
    mean = np.tensordot(weights, x, (0, 1)).mean(axis=(1, 2))[:, None, None, None]
    ours = COLOR_OPERATIONS[1](pixels, torch.full((len(x), 1, 1, 1), factor))
    assert_close(
        ours.double(),
        torch.from_numpy(np.clip(mean + factor * (x - mean), 0, 1)),
        rtol=0,
        atol=2e-6,
    )


@given(SEEDS, st.floats(-1, 1))
def test_hue_turns_hsv_and_keeps_saturation_and_value(seed, shift):
    _, pixels = colours(np.random.default_rng(seed), count=2, size=4)
    pixels[0, :, 0] = pixels[0, :1, 0]  # greys have no hue
    ours = COLOR_OPERATIONS[3](pixels, torch.full((2, 1, 1, 1), shift))

    def turned(rgb):
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((h + shift) % 1, s, v)

    theirs = [turned(rgb) for rgb in pixels.permute(0, 2, 3, 1).reshape(-1, 3).double().tolist()]
    assert_close(ours.permute(0, 2, 3, 1).reshape(-1, 3), torch.tensor(theirs), rtol=0, atol=1e-5)


@given(SEEDS)
def test_grey_is_pillows_luma(seed):
    images, pixels = colours(np.random.default_rng(seed))
    theirs = (
        torch.stack(
            [torch.from_numpy(np.array(ImageOps.grayscale(image)))[None] for image in images]
        )
        / 255
    )
    assert (to_grey(pixels) - theirs).abs().max() <= 0.51 / 255


@given(SEEDS, st.floats(0, 1.25))
def test_jitter_applies_four_operations_in_an_order_of_each_images_own(seed, strength):
    rng = np.random.default_rng(seed)
    _, pixels = colours(rng, count=4)
    apply = torch.tensor([True, True, True, False])
    u_factors, u_order = (torch.from_numpy(rng.random((4, 4), dtype=np.float32)) for _ in range(2))
    expected = pixels.clone()
    for b in range(3):
        for kind in u_order[b].argsort().tolist():
            spread = (0.2 if kind == 3 else 0.8) * strength
            low, high = (-spread, spread) if kind == 3 else (max(0, 1 - spread), 1 + spread)
            factor = torch.tensor(low + (high - low) * u_factors[b, kind].item()).reshape(
                1, 1, 1, 1
            )
            expected[b] = COLOR_OPERATIONS[kind](expected[b : b + 1], factor)[0]
    assert_close(
        color_jitter(pixels.clone(), strength, apply, u_factors, u_order),
        expected,
        rtol=0,
        atol=1e-5,
    )


@given(SEEDS, st.lists(st.floats(0.01, 9), min_size=3, max_size=3))
def test_blur_is_a_gaussian_mean_of_what_lies_inside(seed, sigmas):
    _, pixels = colours(np.random.default_rng(seed))
    expected = np.empty_like(pixels.numpy())
    for b, sigma in enumerate(sigmas):
        weights = np.array(
            [[math.exp(-((i - j) ** 2) / (2 * sigma**2)) for j in range(9)] for i in range(9)]
        )
        weights /= weights.sum(axis=1, keepdims=True)
        expected[b] = np.einsum("yi,cij,xj->cyx", weights, pixels[b].numpy(), weights)
    assert_close(
        gaussian_blur(pixels, torch.tensor(sigmas)), torch.from_numpy(expected), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "changes, law",
    [
        ({"grey": 1.0}, lambda view, plain: view.std(dim=1).max() < 1e-6),
        ({"blur": 1.0}, lambda view, plain: view.std() < plain.std()),
        ({}, torch.equal),
        ({"flip": 1.0}, lambda view, plain: view.equal(plain.flip(-1))),
        ({"jitter": 1.0}, lambda view, plain: not torch.allclose(view, plain)),
    ],
)
def test_probability_1_does_it_always_and_0_never(changes, law):
    config = replace(
        make_config({}), **{"grey": 0.0, "blur": 0.0, "flip": 0.0, "jitter": 0.0, **changes}
    )
    never = replace(config, grey=0.0, blur=0.0, flip=0.0, jitter=0.0)
    batch = padded(random_pictures(np.random.default_rng(0), 4, 20))
    draws = {
        name: u[0]
        for name, u in train_msn.draw_views(4, 1, torch.Generator().manual_seed(0)).items()
    }
    deviation = torch.tensor(train_msn.IMAGENET_STD)[:, None, None]
    mean = torch.tensor(train_msn.IMAGENET_MEAN)[:, None, None]
    view, plain = (
        views_of_one_size(batch, draws, c, 16, (0.5, 1.0)) * deviation + mean
        for c in (config, never)
    )
    assert all(law(view[b : b + 1], plain[b : b + 1]) for b in range(4))


# -- all views of a step ---------------------------------------------------------------------------

CONFIG = make_config(
    {"batch_size": 12, "focal_views": 2, "random_views": 2, "blur": 0.5, "seed": 3}
)
BATCH = padded(random_pictures(np.random.default_rng(1), 12))


def rows_of(batch: Batch, rows: slice) -> Batch:
    """What one process loads: its rows, in a canvas that fits them."""
    sizes = batch.sizes[rows]
    height, width = sizes.amax(dim=0).tolist()
    return Batch(batch.images[rows, :, :height, :width], sizes, batch.indices[rows], [])


@pytest.mark.parametrize("count", [2, 3, 6])
def test_views_and_masks_are_the_same_however_the_batch_is_shared(count):
    share = 12 // count
    parts = [slice(i * share, (i + 1) * share) for i in range(count)]
    views = make_views(BATCH, CONFIG, 5, slice(0, 12))
    shared = [make_views(rows_of(BATCH, rows), CONFIG, 5, rows) for rows in parts]
    limit = {"rtol": 0, "atol": 1e-5}  # in deviations of 1
    assert_close(torch.cat([part.target_view for part in shared]), views.target_view, **limit)
    for v, whole in enumerate(views.anchor_views):
        assert_close(torch.cat([part.anchor_views[v] for part in shared]), whole, **limit)
    for v, whole in enumerate(views.patches_to_keep):
        assert (
            whole is None
            if v >= 2
            else torch.cat([part.patches_to_keep[v] for part in shared]).equal(whole)
        )


def test_views_are_a_pure_function_of_seed_and_step():
    def all_tensors(step, **changes):
        torch.rand(step + len(changes))  # the global generator says nothing
        views = make_views(BATCH, replace(CONFIG, **changes), step, slice(0, 12))
        return [views.target_view, *views.anchor_views, *views.patches_to_keep[:2]]

    first = all_tensors(5)
    assert all(a.equal(b) for a, b in zip(first, all_tensors(5), strict=True))
    for other in (all_tensors(6), all_tensors(5, seed=4)):
        assert not any(a.equal(b) for a, b in zip(first, other, strict=True))
    assert [tuple(x.shape) for x in first] == [(12, 3, 32, 32)] * 3 + [(12, 3, 16, 16)] * 2 + [
        (12, 44)
    ] * 2
    assert not any(
        a.equal(b) for i, a in enumerate(first[:3]) for b in first[:i]
    )  # each view has its own draws


def test_anchors_can_be_the_targets_own_pixels_or_those_in_other_colours():
    target, (*anchors, _, _), _ = make_views(
        BATCH, replace(CONFIG, anchor_view="target"), 5, slice(0, 12)
    )
    assert all(anchor.equal(target) for anchor in anchors)
    target, (*anchors, _, _), _ = make_views(
        BATCH, replace(CONFIG, anchor_view="recolored"), 5, slice(0, 12)
    )
    assert not any(anchor.equal(target) for anchor in anchors)
    target, (*anchors, _, _), _ = make_views(
        BATCH, replace(CONFIG, anchor_view="recolored", jitter=0.0), 5, slice(0, 12)
    )
    assert all(anchor.equal(target) for anchor in anchors)


# -- schedules -------------------------------------------------------------------------------------

RATES, STEPS = st.floats(0, 10), st.integers(1, 100)


@given(STEPS, STEPS, RATES, RATES, RATES)
def test_schedules_start_exactly_do_not_jump_and_stay_between_their_end_points(
    warmup, total, start, peak, final
):
    curves = {
        (start, final): [
            [f(i, total, start, final) for i in range(total + 1)] for f in (linear, cosine)
        ],
        (start, peak, final): [
            [
                warmup_cosine(i, warmup, warmup + total, start, peak, final)
                for i in range(warmup + total + 1)
            ]
        ],
    }
    for ends, values in ((ends, values) for ends, curve in curves.items() for values in curve):
        assert (values[0], values[-1]) == pytest.approx((ends[0], ends[-1]), abs=1e-12)
        assert min(ends) - 1e-12 <= min(values) and max(values) <= max(ends) + 1e-12
        steepest = max(abs(a - b) for a, b in pairwise(ends)) * math.pi / 2
        assert max(abs(a - b) for a, b in pairwise(values)) <= steepest / min(warmup, total) + 1e-9
    assert warmup_cosine(warmup, warmup, warmup + total, start, peak, final) == pytest.approx(
        peak, abs=1e-12
    )
    assert (
        linear(0, total, start, final)
        == start
        == warmup_cosine(0, warmup, total, start, peak, final)
    )
    assert cosine(3 * total, total, start, final) == pytest.approx(final)  # it does not turn back


@given(st.integers(1, 40), st.integers(1, 20), st.floats(0, 30), st.floats(1, 2))
def test_what_a_step_uses_is_a_function_of_the_step_between_the_configured_values(
    per_epoch, epochs, warmup, stretch
):
    c = replace(
        make_config({}),
        epochs=epochs,
        warmup_epochs=warmup,
        schedule_stretch=stretch,
        final_sharpening=0.1,
        momentum=0.9,
        final_momentum=0.99,
    )
    values = [schedule_at(c, step, per_epoch) for step in range(epochs * per_epoch)]
    assert values == [schedule_at(c, step, per_epoch) for step in range(epochs * per_epoch)]
    assert (values[0].momentum, values[0].sharpening) == (c.momentum, c.sharpening)
    limits = (
        (c.start_lr, c.lr, c.final_lr),
        (c.weight_decay, c.final_weight_decay),
        (c.momentum, c.final_momentum),
        (c.sharpening, c.final_sharpening),
    )
    for ends, column in zip(limits, zip(*values, strict=True), strict=True):
        assert min(ends) - 1e-12 <= min(column) and max(column) <= max(ends) + 1e-12


def test_weight_decay_that_starts_at_0_rises_all_the_same():
    config = make_config(
        {
            "weight_decay": 0.0,
            "final_weight_decay": 0.4,
            "batch_size": 4,
            "hidden_size": 12,
            "num_hidden_layers": 1,
            "head_hidden_size": 8,
            "output_dim": 4,
            "num_prototypes": 4,
        }
    )
    model = train_msn.build_model(config, train_msn.Processes(0, 1, torch.device("cpu")))
    optimizer, decays = (
        torch.optim.AdamW(train_msn.parameter_groups(model, config.weight_decay), fused=True),
        [],
    )
    for step in range(3):
        views = make_views(rows_of(BATCH, slice(0, 4)), config, step, slice(0, 4))
        train_msn.train_step(model, optimizer, *views, schedule_at(config, step, 3), 3.0)
        decays.append([group["weight_decay"] for group in optimizer.param_groups])
    assert (
        decays == [[schedule_at(config, step, 3).weight_decay, 0, 0] for step in range(3)]
        and decays[2][0] > 0
    )


# -- k nearest neighbours --------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 30), st.integers(1, 40), st.floats(0.01, 1))
def test_knn_is_a_plain_loop_over_neighbours(seed, n, k, temperature):
    rng = np.random.default_rng(seed)
    train, labels, queries = (
        rng.standard_normal((n, 5)),
        rng.integers(0, 4, n),
        rng.standard_normal((7, 5)),
    )
    votes = np.zeros((7, labels.max() + 1))
    for q, query in enumerate(queries):
        similarity = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
        for i in np.argsort(-similarity)[:k]:
            votes[q, labels[i]] += math.exp(similarity[i] / temperature)
    ours = knn_predict(
        torch.tensor(train).float(),
        torch.tensor(labels),
        torch.tensor(queries).float(),
        k,
        temperature,
    )
    assert np.allclose(
        votes[np.arange(7), ours], votes.max(axis=1), rtol=1e-3
    )  # a tie may go either way


@given(SEEDS, st.sampled_from([1e-30, 1e-6, 0.07]))
def test_an_image_is_its_own_nearest_neighbour_at_any_temperature(seed, temperature):
    rng = np.random.default_rng(seed)
    train, labels = (
        torch.tensor(rng.standard_normal((12, 6))).float(),
        torch.tensor(rng.permutation(12)),
    )
    assert knn_predict(train, labels, 3 * train, 1, temperature).equal(
        labels
    )  # lengths do not count
    if temperature < 0.01:
        assert knn_predict(train, labels, train, 12, temperature).equal(labels)


def test_raw_pixels_are_compared_at_64_at_most(monkeypatch):
    sizes, embed = [], train_msn.embed_images
    monkeypatch.setattr(
        train_msn, "embed_images", lambda *given: sizes.append(given[3]) or embed(*given)
    )
    data = train_msn.synthetic_images(0, train=20, val=10)
    for size in (32, 96):
        train_msn.knn_accuracy(
            None, data, replace(make_config({}), image_size=size), torch.device("cpu")
        )
    assert sizes == [32, 32, 64, 64]


def test_knn_accuracy_takes_the_settings_training_images_and_is_1_on_them():
    images = train_msn.ImagesInMemory(
        torch.from_numpy(
            np.stack([p[:8, :8] for p in random_pictures(np.random.default_rng(0), 10, 8)])
        ).permute(0, 3, 1, 2)
    )
    data = train_msn.Images(list("abcdefghij"), images, torch.arange(10), images, torch.arange(10))
    config = make_config({"image_size": 8, "focal_size": 8})
    assert train_msn.knn_accuracy(None, data, config, torch.device("cpu")) == 1.0


@pytest.mark.parametrize("of_prototypes", [False, True])
def test_a_sheet_of_neighbours_shows_what_a_plain_loop_finds(of_prototypes, tmp_path, monkeypatch):
    config = make_config(
        {
            "image_size": 8,
            "focal_size": 8,
            "hidden_size": 12,
            "num_hidden_layers": 1,
            "head_hidden_size": 8,
            "output_dim": 4,
            "num_prototypes": 9,
        }
    )
    model, sheets = (
        train_msn.build_model(config, train_msn.Processes(0, 1, torch.device("cpu"))),
        [],
    )
    pixels = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), np.uint8)
    images = train_msn.ImagesInMemory(torch.from_numpy(pixels))
    data = train_msn.Images(
        list("abcdefghij"), images, None, train_msn.ImagesInMemory(images.images.flip(0)[:5]), None
    )
    monkeypatch.setattr(
        train_msn, "save_sheet", lambda path, rows, header: sheets.append((rows, header))
    )
    encoder = model.target_encoder
    train_msn.save_neighbours(
        tmp_path / "a.png",
        encoder,
        data,
        8,
        torch.device("cpu"),
        model.prototypes if of_prototypes else None,
    )
    ((rows, header),) = sheets
    features = encoder.eval().representation(train_msn.normalize(images.images / 255))
    shown = [
        [
            [(i == torch.from_numpy(p).permute(2, 0, 1)).all().item() for i in images.images].index(
                True
            )
            for p in row
        ]
        for row in rows
    ]
    if of_prototypes:
        features = encoder.train().fc(encoder.norm(features))
        similarity = torch.cosine_similarity(model.prototypes[:, None], features, dim=-1)
        votes = similarity.argmax(dim=0).bincount(minlength=9)
        assert header == [f"nearest {i}" for i in range(1, 8)] and len(shown) == 8
        rows_of = [similarity.argsort(dim=1, descending=True)[c, :7].tolist() for c in range(9)]
        chosen = [rows_of.index(row) for row in shown]
        assert votes[chosen].tolist() == votes.sort(descending=True).values[:8].tolist()
    else:
        similarity = torch.cosine_similarity(features[:, None], features, dim=-1)
        assert header[:2] == ["query", "nearest 1"] and [row[0] for row in shown] == [
            59,
            58,
            57,
            56,
            55,
        ]
        assert [row[1:] for row in shown] == similarity[55:].flip(0).argsort(
            dim=1, descending=True
        )[:, :7].tolist()
