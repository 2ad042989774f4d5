"""Views are what Pillow would make of the picture, and a function of (seed, step) alone.

Schedules, k-NN and the sheet of neighbours against plain loops.
"""

import colorsys
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from runs import as_batch, random_pictures
from torch.testing import assert_close

import train_msn
import vitmsn
from train_msn import (
    COLOR_OPERATIONS,
    DRAWS,
    LARGE,
    MOST_WASTE,
    RECIPES,
    TRIES,
    Batch,
    Images,
    ImagesInMemory,
    Processes,
    color_jitter,
    cosine,
    crop_and_resize,
    crop_boxes,
    draw_views,
    gaussian_blur,
    generator_for,
    knn_predict,
    like_sized,
    linear,
    make_config,
    make_views,
    pack,
    schedule_at,
    synthetic_images,
    to_grey,
    views_of_one_size,
    warmup_cosine,
)

SEEDS = st.integers(0, 2**31 - 1)
STEP_OF_GREY = 1.5 / 255  # Pillow rounds to whole greys, twice
CPU = torch.device("cpu")


def as_pixels(image: Image.Image) -> torch.Tensor:
    """c h w from 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def random_colours(
    rng: np.random.Generator, count: int = 3, size: int = 9
) -> tuple[list[Image.Image], torch.Tensor]:
    """The same noise as PIL images and as b 3 size size."""
    images = [Image.fromarray(p) for p in rng.integers(0, 256, (count, size, size, 3), np.uint8)]
    return images, torch.stack([as_pixels(image) for image in images])


# -- crop, resize, flip ----------------------------------------------------------------------------


def crop_small(batch: Batch, *arguments) -> torch.Tensor:
    """What crop_and_resize does with small pictures: all at once, by products of matrices."""
    assert batch.sizes.max() <= LARGE
    return crop_and_resize(batch, *arguments)


def crop_large(batch: Batch, *arguments) -> torch.Tensor:
    """What crop_and_resize does with large pictures on a CPU: one by one; here on small ones."""
    with mock.patch.object(train_msn, "LARGE", 0):
        return crop_and_resize(batch, *arguments)


# torch's resize of whole numbers rounds after each axis, as Pillow's: rarely they differ by two.
@pytest.mark.parametrize("crop, greys", [(crop_small, 1), (crop_large, 2)])
@given(SEEDS, st.sampled_from([1, 4, 16, 33, 96]))
def test_crop_and_resize_is_pillows_crop_then_bilinear_resize(crop, greys, seed, size):
    """Any box of any picture, resized to any size, is what Pillow gives, to one or two greys."""
    rng = np.random.default_rng(seed)
    pictures = random_pictures(rng, 5)
    pictures = [*pictures, *pictures]  # two views of each
    boxes = []
    for picture in pictures:
        top, bottom = np.sort(rng.integers(0, picture.shape[0], 2))
        left, right = np.sort(rng.integers(0, picture.shape[1], 2))
        boxes.append([top, left, bottom - top + 1, right - left + 1])
    boxes = torch.tensor(np.array(boxes))

    ours = crop(as_batch(pictures[:5]), boxes, torch.zeros(10, dtype=torch.bool), size)
    for view, picture, (top, left, height, width) in zip(
        ours, pictures, boxes.tolist(), strict=True
    ):
        theirs = Image.fromarray(picture).crop((left, top, left + width, top + height))
        theirs = theirs.resize((size, size), Image.Resampling.BILINEAR)
        assert (view - as_pixels(theirs)).abs().max() <= (greys + 0.1) / 255


@pytest.mark.parametrize("crop", [crop_small, crop_large])
@given(SEEDS)
def test_a_flip_mirrors_the_views_that_it_is_asked_for(crop, seed):
    """Flipped views are the plain ones from right to left, the others are unchanged."""
    batch = as_batch(random_pictures(np.random.default_rng(seed), 3))
    boxes = torch.cat([torch.zeros_like(batch.sizes), batch.sizes], dim=1)
    flip = torch.tensor([True, False, True])
    plain = crop(batch, boxes, flip & False, 12)
    flipped = crop(batch, boxes, flip, 12)
    assert_close(flipped[0], plain[0].flip(-1), rtol=0, atol=0)
    assert_close(flipped[1], plain[1], rtol=0, atol=0)
    assert_close(flipped[2], plain[2].flip(-1), rtol=0, atol=0)


SIZES = st.lists(st.tuples(st.integers(1, 80), st.integers(1, 80)), min_size=1, max_size=8)
UNLIKE_SIZES = st.lists(
    st.tuples(st.sampled_from([1, 8, 900]), st.integers(1, 900)), min_size=1, max_size=8
)


@given(SIZES | UNLIKE_SIZES)
def test_windows_are_never_many_times_as_large_as_their_boxes(sizes):
    """Each box is in one group, and all windows together waste no more than is allowed."""
    sizes = torch.tensor(sizes)
    groups = like_sized(sizes)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(sizes)))
    windows = sum(len(group) * sizes[group].amax(dim=0).prod() for group in groups)
    assert windows <= MOST_WASTE * sizes.prod(dim=1).sum()


def test_very_wide_beside_very_tall_pictures_are_cropped_as_they_are_alone():
    """Boxes that go through in groups come out in their places."""
    rng = np.random.default_rng(0)
    shapes = [(2, 60, 3), (60, 2, 3), (40, 40, 3), (1, 64, 3), (64, 1, 3)]
    pictures = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    sizes = as_batch(pictures).sizes
    boxes = torch.cat([torch.zeros_like(sizes), sizes], dim=1)
    assert len(like_sized(sizes)) > 1
    together = crop_small(as_batch(pictures), boxes, torch.zeros(5, dtype=torch.bool), 12)
    for i, picture in enumerate(pictures):
        alone = crop_small(as_batch([picture]), boxes[[i]], torch.zeros(1, dtype=torch.bool), 12)
        assert_close(together[[i]], alone, rtol=0, atol=1e-6)


@given(SEEDS, SIZES, st.floats(1e-3, 1), st.sampled_from([0.0, 0.5, 1 - 2**-24]))
def test_boxes_lie_inside_the_image_and_hold_a_pixel(seed, sizes, low, corner):
    """Whatever the numbers, the image and the scale, a box is inside and not empty."""
    sizes = torch.tensor(sizes)
    u = torch.rand(len(sizes), DRAWS["crop"], generator=torch.Generator().manual_seed(seed))
    place = u[:, 2 * TRIES :]
    place[place < 0.5] = corner
    boxes = crop_boxes(u, sizes, (low, 1.0))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


def test_areas_are_uniform_aspect_ratios_log_uniform_and_places_uniform():
    """Crops are distributed as SimCLR's: Kolmogorov-Smirnov tests at 1 %, and whole pixels."""
    n = 20000
    sizes = torch.tensor([1000, 1400])
    u = torch.rand(n, DRAWS["crop"], generator=torch.Generator().manual_seed(0))
    top, left, height, width = crop_boxes(u, sizes.expand(n, 2), (0.1, 0.5)).double().T
    log_aspect = (width / height).log() / math.log(4 / 3)
    assert log_aspect.abs().max() < 1.01
    uniform = {
        "area": (height * width / sizes.prod() - 0.1) / (0.5 - 0.1),
        "aspect": (log_aspect + 1) / 2,
        "top": (top + 0.5) / (1000 - height + 1),
        "left": (left + 0.5) / (1400 - width + 1),
    }
    for name, value in uniform.items():
        distance = (value.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
        assert distance < 1.63 / math.sqrt(n) + 2e-3, name


def test_the_first_try_that_fits_is_taken_else_the_square_in_the_middle():
    """Of ten tries the first that fits; if none does, the largest square, centred."""
    never = 0.9999  # all of the area, and as wide as can be
    u = torch.full((2, DRAWS["crop"]), never)
    u[0, [2, 4]] = torch.tensor([0.25, 0.0])  # tries 2 and 4 have these areas ...
    u[0, [TRIES + 2, TRIES + 4]] = 0.5  # ... and are squares
    side = round(40 * math.sqrt(0.04 + 0.25 * 0.96))
    assert crop_boxes(u[:1], torch.tensor([[40, 40]]), (0.04, 1.0))[0, 2:].tolist() == [side] * 2
    assert crop_boxes(u[1:], torch.tensor([[10, 31]]), (1.0, 1.0)).tolist() == [[0, 11, 10, 10]]


def test_the_place_of_a_box_goes_from_the_first_to_the_last_that_is_inside():
    """The last two numbers are the place from top to bottom, then from left to right."""
    u = torch.full((1, DRAWS["crop"]), 0.5)
    for ends in ([0.0, 0.0], [0.0, 1 - 2**-24], [1 - 2**-24, 0.0]):
        u[0, 2 * TRIES :] = torch.tensor(ends)
        top, left, height, width = crop_boxes(u, torch.tensor([[50, 70]]), (0.2, 0.3))[0].tolist()
        assert top == (50 - height if ends[0] else 0)
        assert left == (70 - width if ends[1] else 0)


# -- colour and blur -------------------------------------------------------------------------------

ENHANCERS = {0: ImageEnhance.Brightness, 1: ImageEnhance.Contrast, 2: ImageEnhance.Color}


@pytest.mark.parametrize("kind", ENHANCERS)
@given(SEEDS, st.floats(0, 2))
def test_brightness_contrast_and_saturation_are_pillows(kind, seed, factor):
    """The three factors do what Pillow's enhancers do, to a grey level."""
    images, pixels = random_colours(np.random.default_rng(seed))
    ours = COLOR_OPERATIONS[kind](pixels, torch.full((len(images), 1, 1, 1), factor))
    theirs = torch.stack([as_pixels(ENHANCERS[kind](image).enhance(factor)) for image in images])
    limit = torch.full((len(images), 1, 1, 1), STEP_OF_GREY)
    if kind == 1:  # Pillow rounds each grey before it takes their mean, which is off by so much
        rounded = torch.stack([torch.from_numpy(np.array(i.convert("L"))) for i in images]) / 255
        limit += (rounded[:, None] - to_grey(pixels)).mean(dim=(1, 2, 3), keepdim=True).abs()
    assert ((ours - theirs).abs() <= limit).all()


@given(SEEDS, st.floats(0, 2))
def test_contrast_is_its_formula(seed, factor):
    """Contrast moves each pixel away from the mean grey of its image, by the factor."""
    _, pixels = random_colours(np.random.default_rng(seed))
    x = pixels.double().numpy()
    luma = np.array([0.299, 0.587, 0.114])
    mean = np.tensordot(luma, x, (0, 1)).mean(axis=(1, 2))[:, None, None, None]
    expected = torch.from_numpy(np.clip(mean + factor * (x - mean), 0, 1))
    ours = COLOR_OPERATIONS[1](pixels, torch.full((len(x), 1, 1, 1), factor))
    assert_close(ours.double(), expected, rtol=0, atol=2e-6)


@given(SEEDS, st.floats(-1, 1))
def test_hue_turns_hsv_and_keeps_saturation_and_value(seed, shift):
    """A shift of the hue is Python's colorsys: to HSV, h + shift modulo 1, and back."""
    _, pixels = random_colours(np.random.default_rng(seed), count=2, size=4)
    pixels[0, :, 0] = pixels[0, :1, 0]  # greys have no hue
    ours = COLOR_OPERATIONS[3](pixels, torch.full((2, 1, 1, 1), shift))

    theirs = []
    for rgb in pixels.permute(0, 2, 3, 1).reshape(-1, 3).double().tolist():
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        theirs.append(colorsys.hsv_to_rgb((h + shift) % 1, s, v))
    assert_close(ours.permute(0, 2, 3, 1).reshape(-1, 3), torch.tensor(theirs), rtol=0, atol=1e-5)


@given(SEEDS)
def test_grey_is_pillows_luma(seed):
    """Greyscale weighs the channels as Pillow does."""
    images, pixels = random_colours(np.random.default_rng(seed))
    for image, grey in zip(images, to_grey(pixels), strict=True):
        theirs = torch.from_numpy(np.array(ImageOps.grayscale(image))) / 255
        assert (grey[0] - theirs).abs().max() <= 0.51 / 255


@given(SEEDS, st.floats(0, 1.25))
def test_jitter_applies_four_operations_in_an_order_of_each_images_own(seed, strength):
    """Colour jitter, image by image: factors from u_factors, the order from u_order."""
    rng = np.random.default_rng(seed)
    _, pixels = random_colours(rng, count=4)
    apply = torch.tensor([True, True, True, False])
    u_factors = torch.from_numpy(rng.random((4, 4), dtype=np.float32))
    u_order = torch.from_numpy(rng.random((4, 4), dtype=np.float32))
    expected = pixels.clone()
    for b in range(3):
        for kind in u_order[b].argsort().tolist():
            if kind == 3:
                low, high = -0.2 * strength, 0.2 * strength
            else:
                low, high = max(0, 1 - 0.8 * strength), 1 + 0.8 * strength
            factor = torch.full((1, 1, 1, 1), low + (high - low) * u_factors[b, kind].item())
            expected[b] = COLOR_OPERATIONS[kind](expected[b : b + 1], factor)[0]
    ours = color_jitter(pixels.clone(), strength, apply, u_factors, u_order)
    assert_close(ours, expected, rtol=0, atol=1e-5)


@given(SEEDS, st.lists(st.floats(0.01, 9), min_size=3, max_size=3))
def test_blur_is_a_gaussian_mean_of_what_lies_inside(seed, sigmas):
    """Each blurred pixel is a mean of the image's pixels, weighted by a Gaussian."""
    _, pixels = random_colours(np.random.default_rng(seed))
    place = np.arange(9)
    expected = np.empty_like(pixels.numpy())
    for b, sigma in enumerate(sigmas):
        weights = np.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
        weights /= weights.sum(axis=1, keepdims=True)
        expected[b] = np.einsum("yi,cij,xj->cyx", weights, pixels[b].numpy(), weights)
    ours = gaussian_blur(pixels, torch.tensor(sigmas))
    assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes, law",
    [
        ({"grey": 1.0}, lambda view, plain: view.std(dim=0).max() < 1e-6),
        ({"blur": 1.0}, lambda view, plain: view.std() < plain.std()),
        ({}, torch.equal),
        ({"flip": 1.0}, lambda view, plain: view.equal(plain.flip(-1))),
        ({"jitter": 1.0}, lambda view, plain: not torch.allclose(view, plain)),
    ],
)
def test_probability_1_does_it_always_and_0_never(changes, law):
    """Each augmentation happens to all images at probability 1, and to none at 0."""
    never = replace(make_config({}), grey=0.0, blur=0.0, flip=0.0, jitter=0.0)
    batch = as_batch(random_pictures(np.random.default_rng(0), 4, 20))
    draws = draw_views(4, 1, torch.Generator().manual_seed(0))
    mean = torch.tensor(vitmsn.IMAGENET_MEAN)[:, None, None]
    deviation = torch.tensor(vitmsn.IMAGENET_STD)[:, None, None]

    def view_of(config):
        (view,) = views_of_one_size(batch, draws, config, 16, (0.5, 1.0))
        return view * deviation + mean

    changed = view_of(replace(never, **changes))
    for view, plain in zip(changed, view_of(never), strict=True):
        assert law(view, plain)


def test_blur_goes_from_the_lower_to_the_higher_deviation():
    """The second number of a blur says where between the two deviations it lies."""
    config = replace(make_config({}), grey=0.0, color_jitter=0.0, flip=0.0, blur_sigma=(0.5, 2.0))
    batch = as_batch(random_pictures(np.random.default_rng(0), 1, 20))
    draws = draw_views(1, 1, torch.Generator().manual_seed(0))
    draws["blur"][..., 0] = 0.5
    (plain,) = views_of_one_size(batch, draws, replace(config, blur=0.0), 16, (0.5, 1.0))
    for u in (0.0, 0.25, 0.999):
        draws["blur"][..., 1] = u
        (blurred,) = views_of_one_size(batch, draws, replace(config, blur=1.0), 16, (0.5, 1.0))
        expected = gaussian_blur(plain, torch.tensor([0.5 + 1.5 * u]))
        assert_close(blurred, expected, rtol=0, atol=1e-5)


# -- all views of a step ---------------------------------------------------------------------------

CONFIG = make_config(
    {"batch_size": 12, "focal_views": 2, "random_views": 2, "blur": 0.5, "seed": 3}
)
BATCH = as_batch(random_pictures(np.random.default_rng(1), 12))
ALL = slice(0, 12)


def part_of(batch: Batch, my_images: slice) -> Batch:
    """What one process loads: its images."""
    return pack(batch.images[my_images], batch.indices[my_images])


@pytest.mark.parametrize("focal_mask", [False, True])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_views_and_masks_are_the_same_however_the_batch_is_shared(count, focal_mask):
    """The views of all processes together are those of one process with the whole batch."""
    config = replace(CONFIG, focal_mask=focal_mask)
    parts = [Processes(rank, count, CPU).share_of(12) for rank in range(count)]
    views = make_views(BATCH, config, 5, ALL)
    shared = [make_views(part_of(BATCH, part), config, 5, part) for part in parts]

    limit = {"rtol": 0, "atol": 1e-5}  # in deviations of 1
    assert_close(torch.cat([part.target_view for part in shared]), views.target_view, **limit)
    for v, whole in enumerate(views.anchor_views):
        assert_close(torch.cat([part.anchor_views[v] for part in shared]), whole, **limit)
    for v in range(4 if focal_mask else 2):
        joined = torch.cat([part.patches_to_keep[v] for part in shared])
        assert joined.equal(views.patches_to_keep[v])
    if not focal_mask:
        assert views.patches_to_keep[2:] == [None, None]


def tensors_of(config, step: int) -> list[torch.Tensor]:
    """Target view, two random views, two focal views, two masks."""
    views = make_views(BATCH, config, step, ALL)
    return [views.target_view, *views.anchor_views, *views.patches_to_keep[:2]]


def test_views_are_a_pure_function_of_seed_and_step():
    """The same seed and step give the same views; another of either changes every one."""
    first = tensors_of(CONFIG, 5)
    torch.rand(7)  # the global generator says nothing
    for a, b in zip(first, tensors_of(CONFIG, 5), strict=True):
        assert a.equal(b)
    for other in (tensors_of(CONFIG, 6), tensors_of(replace(CONFIG, seed=4), 5)):
        for a, b in zip(first, other, strict=True):
            assert not a.equal(b)


def test_each_view_of_a_step_has_its_size_and_draws_of_its_own():
    """Target and random views are large, focal views small, masks keep 44 of 64; no two agree."""
    tensors = tensors_of(CONFIG, 5)
    shapes = [tuple(x.shape) for x in tensors]
    assert shapes == [(12, 3, 32, 32)] * 3 + [(12, 3, 16, 16)] * 2 + [(12, 44)] * 2
    for i, a in enumerate(tensors):
        for b in tensors[:i]:
            assert not a.equal(b)


@pytest.mark.parametrize(
    "changes, alike",
    [
        ({"anchor_view": "target"}, True),
        ({"anchor_view": "recolored"}, False),
        ({"anchor_view": "recolored", "jitter": 0.0}, True),
        ({"anchor_view": "own", "jitter": 0.0}, False),
    ],
)
def test_random_views_can_be_the_target_view_or_that_in_other_colours(changes, alike):
    """Table 9: random views are views of their own, the target's in other colours, or it itself."""
    views = make_views(BATCH, replace(CONFIG, **changes), 5, ALL)
    for random_view in views.anchor_views[:2]:
        assert random_view.equal(views.target_view) == alike
    first_focal, second_focal = views.anchor_views[2:]
    assert not first_focal.equal(second_focal)


def test_with_a_focal_mask_focal_views_are_large_views_of_which_a_block_stays():
    """The block is as large as the small crop was, in patches, and has a place of its own in each
    view and image. Target view, random views and their masks are as without."""
    plain = make_views(BATCH, CONFIG, 5, ALL)
    views = make_views(BATCH, replace(CONFIG, focal_mask=True), 5, ALL)
    assert_close(views.target_view, plain.target_view, rtol=0, atol=1e-5)
    for v in range(2):
        assert_close(views.anchor_views[v], plain.anchor_views[v], rtol=0, atol=1e-5)
        assert views.patches_to_keep[v].equal(plain.patches_to_keep[v])

    for view, kept in zip(views.anchor_views[2:], views.patches_to_keep[2:], strict=True):
        assert view.shape == (12, 3, 32, 32)
        assert kept.shape == (12, 16)  # 4 x 4 of 8 x 8
        corner = kept[:, :1]
        block = torch.arange(4)[:, None] * 8 + torch.arange(4)
        assert (kept - corner).equal(block.flatten().expand(12, -1))
        assert len(corner.unique()) > 3
    assert not views.patches_to_keep[2].equal(views.patches_to_keep[3])


def test_the_sheet_of_views_shows_what_a_focal_mask_drops(monkeypatch):
    """Its column is named focal view, and all of it is pale orange but the block."""
    config = replace(CONFIG, focal_mask=True)
    sheets = {}
    monkeypatch.setattr(train_msn, "save_sheet", lambda *given, **more: sheets.update(given=given))
    train_msn.save_views(Path("views.png"), make_views(BATCH, config, 5, ALL), config)
    _, strips, header = sheets["given"]
    assert header == ["target view", *["random view"] * 2, *["focal view"] * 2]
    for strip in strips:
        for tile in strip.tiles[3:]:
            dropped = (tile.picture == train_msn.DROPPED).all(axis=-1)
            assert dropped.sum() == 32 * 32 - 16 * 16


def test_a_block_larger_than_the_view_is_refused():
    """The error names both settings."""
    with pytest.raises(train_msn.UsageError, match=r"focal_size=32.*image_size=16"):
        make_config({"image_size": 16, "focal_size": 32, "focal_mask": True})


# -- schedules -------------------------------------------------------------------------------------

RATES = st.floats(0, 10)
STEPS = st.integers(1, 100)


def check_curve(values: list[float], ends: tuple[float, ...], shortest: int) -> None:
    """Starts and ends there, stays between, and nowhere jumps. shortest: of its parts, in steps."""
    assert (values[0], values[-1]) == pytest.approx((ends[0], ends[-1]), abs=1e-12)
    assert min(ends) - 1e-12 <= min(values) and max(values) <= max(ends) + 1e-12
    widest = max(abs(a - b) for a, b in pairwise(ends))
    steepest = max(abs(a - b) for a, b in pairwise(values))
    assert steepest <= widest * math.pi / 2 / shortest + 1e-9


@given(STEPS, RATES, RATES)
def test_linear_and_cosine_go_from_start_to_final_without_a_jump(total, start, final):
    """Both shapes reach their end points, leave the range between them nowhere, and do not jump."""
    for shape in (linear, cosine):
        values = [shape(step, total, start, final) for step in range(total + 1)]
        check_curve(values, (start, final), total)
    assert linear(0, total, start, final) == start
    assert cosine(3 * total, total, start, final) == pytest.approx(final)  # it does not turn back


@given(STEPS, STEPS, RATES, RATES, RATES)
def test_the_learning_rate_warms_up_to_its_peak_and_then_decays(warmup, decay, start, peak, final):
    """From start, exactly, to the peak at the end of the warm-up, then to final, without a jump."""
    total = warmup + decay
    values = [warmup_cosine(step, warmup, total, start, peak, final) for step in range(total + 1)]
    check_curve(values, (start, peak, final), min(warmup, decay))
    assert values[0] == start
    assert values[warmup] == pytest.approx(peak, abs=1e-12)


@given(st.integers(1, 40), st.integers(1, 20), st.floats(0, 30), st.floats(1, 2))
def test_what_a_step_uses_is_a_function_of_the_step_between_the_configured_values(
    steps_per_epoch, epochs, warmup, stretch
):
    """Each scheduled value depends on the step alone and stays between its end points."""
    ends = {"final_sharpening": 0.1, "momentum": 0.9, "final_momentum": 0.99}
    c = replace(
        make_config({}), epochs=epochs, warmup_epochs=warmup, schedule_stretch=stretch, **ends
    )
    steps = range(epochs * steps_per_epoch)
    values = [schedule_at(c, step, steps_per_epoch) for step in steps]
    assert values == [schedule_at(c, step, steps_per_epoch) for step in steps]
    assert (values[0].momentum, values[0].sharpening) == (c.momentum, c.sharpening)
    limits = {
        "lr": (c.start_lr, c.lr, c.final_lr),
        "weight_decay": (c.weight_decay, c.final_weight_decay),
        "momentum": (c.momentum, c.final_momentum),
        "sharpening": (c.sharpening, c.final_sharpening),
    }
    for name, ends in limits.items():
        for value in values:
            assert min(ends) - 1e-12 <= getattr(value, name) <= max(ends) + 1e-12


def test_published_schedules_are_laid_out_over_a_quarter_more_than_the_run():
    """Warm-up by a line and decay by a cosine, one step ahead; momentum and T by lines from 0."""
    changes = {"epochs": 40, "warmup_epochs": 10, "final_sharpening": 0.1}
    config = replace(make_config({"recipe": "small-16"}), **changes)
    per_epoch, run = 4, 160
    laid_out = 1.25 * run  # 200 steps, of which 40 are the warm-up
    for step in range(run):
        now = schedule_at(config, step, per_epoch)
        if step + 1 < 40:
            lr = 2e-4 + (1e-3 - 2e-4) * (step + 1) / 40
        else:
            half_turn = math.pi * (step + 1 - 40) / (laid_out - 40)
            lr = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(half_turn)) / 2
        assert now.lr == pytest.approx(lr, rel=1e-9)
        decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * (step + 1) / laid_out)) / 2
        assert now.weight_decay == pytest.approx(decay, rel=1e-9)
        assert now.momentum == pytest.approx(0.996 + 0.004 * step / laid_out, rel=1e-9)
        assert now.sharpening == pytest.approx(0.25 - 0.15 * step / laid_out, rel=1e-9)


def tiny_model(**changes):
    """Settings of a model that runs in a millisecond, and the model."""
    shape = {"hidden_size": 12, "num_hidden_layers": 1, "head_hidden_size": 8, "output_dim": 4}
    config = make_config({**shape, "num_prototypes": 4, **changes})
    return config, train_msn.build_model(config, Processes(0, 1, CPU))


def test_weight_decay_that_starts_at_0_rises_all_the_same():
    """The group that decays is known by its place, not by its first value."""
    config, model = tiny_model(weight_decay=0.0, final_weight_decay=0.4, batch_size=4)
    groups = train_msn.parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    my_images = slice(0, 4)
    for step in range(3):
        views = make_views(part_of(BATCH, my_images), config, step, my_images)
        now = schedule_at(config, step, 3)
        train_msn.train_step(model, optimizer, *views, now, 3.0)
        assert now.weight_decay > 0
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert decays == [now.weight_decay, 0, 0]


# -- k nearest neighbours --------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 30), st.integers(1, 40), st.floats(0.01, 1))
def test_knn_is_a_plain_loop_over_neighbours(seed, n, k, temperature):
    """The class with most votes: of the k most similar, each weighs exp(similarity / T)."""
    rng = np.random.default_rng(seed)
    bank = rng.standard_normal((n, 5))
    labels = rng.integers(0, 4, n)
    queries = rng.standard_normal((7, 5))
    votes = np.zeros((7, labels.max() + 1))
    for q, query in enumerate(queries):
        similarity = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        for i in np.argsort(-similarity)[:k]:
            votes[q, labels[i]] += math.exp(similarity[i] / temperature)

    bank = torch.tensor(bank).float()
    queries = torch.tensor(queries).float()
    ours = knn_predict(bank, torch.tensor(labels), queries, k, temperature)
    won = votes[np.arange(7), ours]
    assert np.allclose(won, votes.max(axis=1), rtol=1e-3)  # a tie may go either way


@given(SEEDS, st.sampled_from([1e-30, 1e-6, 0.07]))
def test_an_image_is_its_own_nearest_neighbour_at_any_temperature(seed, temperature):
    """k = 1 gives each image its own label; so does any k if the temperature is near 0."""
    rng = np.random.default_rng(seed)
    features = torch.tensor(rng.standard_normal((12, 6))).float()
    labels = torch.tensor(rng.permutation(12))
    assert knn_predict(features, labels, 3 * features, 1, temperature).equal(labels)
    if temperature < 0.01:
        assert knn_predict(features, labels, features, 12, temperature).equal(labels)


def test_raw_pixels_are_compared_at_64_at_most(monkeypatch):
    """The baseline of raw pixels takes images of at most 64 x 64, else it would fill the memory."""
    sizes = []
    embed_images = train_msn.embed_images

    def watched(encoder, images, indices, size, device):
        sizes.append(size)
        return embed_images(encoder, images, indices, size, device)

    monkeypatch.setattr(train_msn, "embed_images", watched)
    data = synthetic_images(0, train=20, val=10)
    for size in (32, 96):
        train_msn.knn_accuracy(None, data, replace(make_config({}), image_size=size), CPU)
    assert sizes == [32, 32, 64, 64]


def test_knn_accuracy_takes_the_settings_training_images_and_is_1_on_them():
    """Validation images that are training images are all right."""
    pictures = random_pictures(np.random.default_rng(0), 10, 8, 9)
    images = ImagesInMemory(torch.stack(as_batch(pictures).images))
    data = Images(list("abcdefghij"), images, torch.arange(10), images, torch.arange(10))
    config = make_config({"image_size": 8, "focal_size": 8})
    assert train_msn.knn_accuracy(None, data, config, CPU) == 1.0


# -- pictures --------------------------------------------------------------------------------------


def test_a_picture_of_a_view_shows_its_pixels_and_dropped_patches_in_pale_orange():
    """Normalising is undone; patches that are kept stay as they are, the others get one colour."""
    picture = random_pictures(np.random.default_rng(0), 1, 8, 9)[0]
    pixels = train_msn.normalize(torch.from_numpy(picture).permute(2, 0, 1) / 255)
    whole = train_msn.to_picture(pixels)
    assert np.abs(whole.astype(int) - picture).max() <= 1

    shown = train_msn.to_picture(pixels, torch.tensor([0, 3]), patch_size=4)
    expected = whole.copy()
    expected[:4, 4:] = expected[4:, :4] = train_msn.DROPPED
    assert (shown == expected).all()


@pytest.fixture
def neighbours(monkeypatch, tmp_path):
    """60 images, of which the last five are also for validation (the last one first), and a
    function that gives header and image numbers of the sheet that save_neighbours makes, and what
    the sheet says in words."""
    _, model = tiny_model(image_size=8, focal_size=8, num_prototypes=9)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), np.uint8)
    images = ImagesInMemory(torch.from_numpy(pixels))
    val = ImagesInMemory(images.images.flip(0)[:5])
    data = Images([], images, None, val, None)
    number = {picture.transpose(1, 2, 0).tobytes(): i for i, picture in enumerate(pixels)}
    sheets = []
    monkeypatch.setattr(
        train_msn, "save_sheet", lambda path, lines, header, note: sheets.append((lines, header))
    )

    def sheet(prototypes=None, data=data):
        train_msn.save_neighbours(
            tmp_path / "a.png", model.target_encoder, data, 8, CPU, prototypes
        )
        lines, header = sheets.pop()
        rows = [[number[tile.picture.tobytes()] for tile in line.tiles] for line in lines]
        return header, rows, lines

    features = model.target_encoder.eval().representation(train_msn.normalize(images.images / 255))
    model.train()
    return model, features, sheet, data


def test_a_sheet_of_neighbours_shows_each_image_beside_those_most_like_it(neighbours):
    """A line for each validation image: the image, then training images by cosine similarity."""
    _, features, sheet, _ = neighbours
    header, rows, _ = sheet()
    similarity = torch.cosine_similarity(features[:, None], features, dim=-1)
    assert header == ["query", *(f"nearest {i}" for i in range(1, 8))]
    assert [row[0] for row in rows] == [59, 58, 57, 56, 55]
    for row in rows:
        assert row[1:] == similarity[row[0]].argsort(descending=True)[:7].tolist()


def test_a_sheet_of_prototypes_shows_what_is_most_like_those_chosen_most(neighbours):
    """A line for each of the eight prototypes that are first choice most often."""
    model, features, sheet, _ = neighbours
    header, rows, lines = sheet(model.prototypes)
    projections = model.target_encoder.fc(model.target_encoder.norm(features))
    similarity = torch.cosine_similarity(model.prototypes[:, None], projections, dim=-1)
    assert header == [f"nearest {i}" for i in range(1, 8)]

    nearest = similarity.argsort(dim=1, descending=True)[:, :7].tolist()
    shown = [nearest.index(row) for row in rows]
    popularity = similarity.argmax(dim=0).bincount(minlength=9)
    assert popularity[shown].tolist() == popularity.sort(descending=True).values[:8].tolist()
    for prototype, line in zip(shown, lines, strict=True):
        assert line.title[0] == f"prototype {prototype}"
        assert line.title[2] == f"{popularity[prototype]} of 60 images"


def test_a_sheet_of_neighbours_marks_those_of_the_querys_class(neighbours):
    """A frame and a name for each: one colour if the class is the query's, else the other."""
    _, _, sheet, data = neighbours
    labels = torch.arange(60) % 3
    data = data._replace(
        classes=["a", "b", "c"], train_labels=labels, val_labels=labels.flip(0)[:5]
    )
    _, rows, lines = sheet(data=data)
    for row, line in zip(rows, lines, strict=True):
        query_class = row[0] % 3
        assert line.tiles[0].caption == data.classes[query_class]
        for i, tile in zip(row[1:], line.tiles[1:], strict=True):
            is_right = i % 3 == query_class
            assert tile.color == (train_msn.RIGHT if is_right else train_msn.WRONG)
            assert tile.caption == ("" if is_right else "x ") + data.classes[i % 3]


def test_without_validation_images_no_query_is_among_its_neighbours(neighbours):
    """Training images stand in as queries, and none is found as its own neighbour."""
    _, _, sheet, data = neighbours
    _, rows, _ = sheet(data=data._replace(val=None))
    assert len(rows) == 8
    for row in rows:
        assert row[0] not in row[1:]


def test_a_prototype_is_named_after_the_commonest_class_of_those_that_choose_it(neighbours):
    """With labels, the words beside a line say which class most of them are and how many."""
    model, features, sheet, data = neighbours
    labels = (torch.arange(60) >= 20).long()
    data = data._replace(classes=["few", "many"], train_labels=labels)
    _, _, lines = sheet(model.prototypes, data)

    projections = model.target_encoder.fc(model.target_encoder.norm(features))
    similarity = torch.cosine_similarity(model.prototypes[:, None], projections, dim=-1)
    choices = similarity.argmax(dim=0)
    for line in lines:
        chosen_by = labels[choices == int(line.title[0].split()[1])]
        if len(chosen_by):
            share = chosen_by.bincount().max().item() / len(chosen_by)
            name = data.classes[chosen_by.bincount().argmax()]
            assert line.title[3] == f"{100 * share:.0f} % {name}"


@given(count=st.integers(0, 50), length=st.integers(1, 60))
def test_some_images_are_a_fixed_choice_without_repeats(count, length):
    """As many as asked for or as there are, ascending, and the same every time."""
    images = ImagesInMemory(torch.zeros(length, 3, 1, 1, dtype=torch.uint8))
    chosen = train_msn.some_of(images, count)
    assert len(chosen) == min(count, length) and chosen == sorted(set(chosen))
    assert chosen == train_msn.some_of(images, count) and all(0 <= i < length for i in chosen)


def test_some_images_miss_no_class_that_takes_turns_with_others():
    """Half of the built-in images are of all ten classes; every second one would be of five."""
    data = synthetic_images(0, train=400, val=10)
    labels = data.train_labels[train_msn.some_of(data.train, 200)]
    assert labels.bincount(minlength=10).min() > 0


def test_the_picture_of_gradients_shows_what_a_backward_pass_gives(monkeypatch):
    """For each part of the model the norm of the gradient of each term; none of the target's."""
    config, model = tiny_model()
    views = train_msn.pictured_views(synthetic_images(0, train=8, val=10), config, 6, CPU)
    shown = []
    monkeypatch.setattr(train_msn, "save_gradient_flow", lambda path, norms: shown.append(norms))
    train_msn.save_gradients(Path("a.png"), model, views)

    for name, by_part in shown[0].items():
        model.zero_grad(set_to_none=True)
        terms = model(*views)
        (terms.cross_entropy if name == "cross-entropy" else terms.memax).backward()
        squares = {"prototypes": model.prototypes.grad.square().sum(), "target encoder": 0.0}
        everything = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
        assert by_part["target encoder"] == 0
        assert by_part["prototypes"] == pytest.approx(squares["prototypes"].sqrt().item(), rel=1e-4)
        total = sum(norm**2 for norm in by_part.values())
        assert total == pytest.approx(everything.item(), rel=1e-4)


def test_the_picture_of_assignments_shows_them_before_and_after(monkeypatch):
    """Three maps of one batch: each image sums to 1, and Sinkhorn evens out the prototypes."""
    config, model = tiny_model(num_prototypes=5)
    views = train_msn.pictured_views(synthetic_images(0, train=12, val=10), config, 6, CPU)
    shown = []
    monkeypatch.setattr(train_msn, "save_heat_maps", lambda path, maps, *names: shown.extend(maps))
    train_msn.save_assignments(Path("a.png"), model, views, config)

    plain, sharpened, balanced = (heat_map.values for heat_map in shown)
    for values in (plain, sharpened, balanced):
        assert values.shape == (6, 5)
        np.testing.assert_allclose(values.sum(axis=1), 1, rtol=1e-5)
    powers = plain ** (1 / config.sharpening)
    np.testing.assert_allclose(sharpened, powers / powers.sum(axis=1, keepdims=True), rtol=1e-4)
    assert balanced.sum(axis=0).std() < sharpened.sum(axis=0).std()
    assert (np.diff(balanced.argmax(axis=1)) >= 0).all()


# -- the built-in images and the recipes -----------------------------------------------------------


def test_the_built_in_images_are_a_function_of_the_seed_and_balanced_in_class_and_brightness():
    """Ten classes of equal size that brightness does not tell apart, drawn from the seed alone."""
    data = synthetic_images(0, train=1000, val=100)
    again = synthetic_images(0, train=1000, val=100)
    other = synthetic_images(1, train=1000, val=100)
    assert data.train.images.equal(again.train.images)
    assert not data.train.images.equal(other.train.images)
    assert data.train_labels.bincount().tolist() == [100] * 10 and len(data.classes) == 10
    assert data.val_labels.bincount().tolist() == [10] * 10

    greys = data.train.images.float().mean(dim=(1, 2, 3))
    for label in range(10):
        of_class = greys[data.train_labels == label]
        # Uniform in 127.5 +- 30, each class mean within four of its standard errors.
        assert abs(of_class.mean() - 127.5) < 4 * 60 / math.sqrt(12 * 100) + 1
        assert of_class.std() == pytest.approx(60 / math.sqrt(12), rel=0.3)


def test_the_built_in_classes_are_the_textures_that_they_are_named_after():
    """Neighbouring pixels differ more in grain than in any other class, and least in blobs."""
    data = synthetic_images(0, train=500, val=10)
    pixels = data.train.images[:, 0].float()
    roughness = pixels.diff(dim=-1).abs().mean(dim=(1, 2)) / pixels.std(dim=(1, 2))
    by_class = [roughness[data.train_labels == c].mean().item() for c in range(10)]
    assert data.classes[int(np.argmax(by_class))] == "grain"
    assert data.classes[int(np.argmin(by_class))] == "blobs"


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_is_a_valid_run_on_the_images_that_it_is_named_after(recipe):
    """A recipe's settings go together, and the small ones name their data."""
    config = make_config({"recipe": recipe})
    assert config.recipe == recipe
    expected = {"cifar10": "cifar10", "imagenette": "imagenette", "imagenette-128": "imagenette"}
    assert config.data == expected.get(recipe, "synthetic")


PUBLISHED = {  # paper, Section 4 and Appendix A.1: width, layers, patch size, mask ratio, epochs
    "small-16": (384, 12, 16, 0.15, 800),
    "base-16": (768, 12, 16, 0.3, 600),
    "large-16": (1024, 24, 16, 0.5, 600),
    "base-8": (768, 12, 8, 0.3, 600),
    "base-4": (768, 12, 4, 0.7, 300),
    "large-7": (1024, 24, 7, 0.7, 200),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_published_recipes_have_the_papers_values(recipe):
    """Shape, masking and length are the table's; the rest is common to all."""
    c = make_config({"recipe": recipe})
    shape = (c.hidden_size, c.num_hidden_layers, c.patch_size)
    assert (*shape, c.mask_ratio, c.epochs) == PUBLISHED[recipe]
    assert (c.batch_size, c.num_prototypes, c.output_dim, c.focal_views) == (1024, 1024, 256, 10)
    assert (c.temperature, c.sharpening, c.sinkhorn_iterations) == (0.1, 0.25, 3)
    assert (c.lr, c.weight_decay, c.final_weight_decay, c.momentum) == (1e-3, 0.04, 0.4, 0.996)


@pytest.mark.parametrize(
    "seed, stream, number",
    [
        (0, (), 6375474604893067239),
        (0, (1, 0), 8514611595815388268),
        (3, (1, 7), 1959411802850569424),
        (2**31 - 1, (3, 7, 2), 8763199160917818782),
    ],
)
def test_random_numbers_are_those_of_earlier_versions(seed, stream, number):
    """Numbers are fixed for good: a run that a later version resumes must get the same ones."""
    assert generator_for(seed, *stream).initial_seed() == number
