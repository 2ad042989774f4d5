"""Pictures to pixel values: the published processor's numbers, for every mode that Pillow opens."""

import io

import numpy as np
import pytest
import torch
from common import random_picture, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.testing import assert_close

from vitmsn import normalize, preprocess, to_rgb

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def by_hand(image: Image.Image, size: int) -> torch.Tensor:
    """The processor's formula, on a picture that is RGB already."""
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).float()


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_every_mode_go_through_rgb(mode):
    """Any mode of Pillow gives the pixel values of the picture on white, converted to RGB."""
    image = random_picture(mode)
    pixels = preprocess(image, tiny_config())
    assert pixels.shape == (1, 3, 32, 32)
    if mode in ("LA", "RGBA"):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    assert_close(pixels[0], by_hand(image.convert("RGB"), 32), rtol=1e-5, atol=1e-6)


def test_sixteen_bit_pictures_are_scaled_not_clipped():
    """16-bit grey keeps its range of brightness."""
    image = random_picture("I;16")
    grey = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    assert_close(preprocess(image, tiny_config())[0], by_hand(grey, 32), rtol=1e-5, atol=1e-6)
    assert np.asarray(to_rgb(image)).std() > 50  # clipping would leave it white


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_by_their_exif_orientation(orientation):
    """All eight orientations of EXIF are undone."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    random_picture().save(file, format="PNG", exif=exif)
    image = Image.open(file)

    pixels = preprocess(image, tiny_config())[0]
    expected = by_hand(ImageOps.exif_transpose(image).convert("RGB"), 32)
    assert_close(pixels, expected, rtol=1e-5, atol=1e-6)
    if orientation > 1:
        assert not pixels.allclose(by_hand(random_picture(), 32))


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(16, 48))
def test_center_crop_is_resize_of_the_shorter_side_then_the_middle(width, height, size):
    """center-crop is the paper's evaluation: 256 of 224, then the middle."""
    image = random_picture(width=width, height=height)
    scale = size * 256 / 224 / min(width, height)
    resized_width = max(size, round(width * scale))
    resized_height = max(size, round(height * scale))
    left = (resized_width - size) // 2
    top = (resized_height - size) // 2
    resized = image.resize((resized_width, resized_height), Image.Resampling.BILINEAR)
    cropped = resized.crop((left, top, left + size, top + size))

    pixels = preprocess(image, tiny_config(image_size=size), "center-crop")[0]
    assert_close(pixels, by_hand(cropped, size), rtol=1e-5, atol=1e-6)


def test_a_list_of_pictures_of_any_sizes_becomes_one_batch():
    """A list gives what its pictures give one by one."""
    images = [random_picture(), random_picture("L", 10, 70), random_picture("P", 32, 32)]
    batch = preprocess(images, tiny_config())
    assert batch.shape == (3, 3, 32, 32) and batch.dtype == torch.float32
    assert_close(batch, torch.cat([preprocess(image, tiny_config()) for image in images]))


def test_one_channel_models_get_grey():
    """Grey is normalised by the means of ImageNet's three statistics."""
    pixels = preprocess(random_picture(), tiny_config(num_channels=1))
    resized = random_picture().convert("L").resize((32, 32), Image.Resampling.BILINEAR)
    grey = np.asarray(resized) / 255
    expected = torch.from_numpy((grey - MEAN.mean()) / STD.mean()).float()
    assert_close(pixels[0, 0], expected, rtol=1e-5, atol=1e-6)


def test_normalize_gives_imagenet_statistics_mean_0_and_deviation_1():
    """ImageNet's mean becomes 0, one deviation more or less 1 and -1."""
    pixels = torch.tensor(np.stack([MEAN, MEAN + STD, MEAN - STD]))[..., None, None]
    expected = torch.tensor([[0.0] * 3, [1.0] * 3, [-1.0] * 3]).double()
    assert_close(normalize(pixels)[..., 0, 0], expected)


def test_an_unknown_protocol_and_no_pictures_are_refused():
    """What cannot be preprocessed is refused in words."""
    with pytest.raises(ValueError, match="center-crop"):
        preprocess(random_picture(), tiny_config(), "crop")
    with pytest.raises(ValueError, match="at least one"):
        preprocess([], tiny_config())
