"""Pictures to pixel values: the published processor's numbers, for every mode that Pillow opens."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from common import random_picture, tiny_classifier, tiny_config
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.testing import assert_close

from vitmsn import (
    PictureRules,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTMSNModel,
    normalize,
    preprocess,
    upright_layers,
)

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
    (seen,) = upright_layers(image, PictureRules())
    assert np.asarray(seen).std() > 50  # clipping would leave it white


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
    assume(abs(max(width, height) * scale % 1 - 0.5) > 1e-9)  # else either neighbour will do
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


def test_files_that_are_no_pictures_are_refused_by_name_with_what_to_do(tmp_path, monkeypatch):
    """A missing file, a text, a folder and a cut-off picture are told apart, in our words."""
    monkeypatch.chdir(tmp_path)
    random_picture(width=200, height=200).save("whole.jpg")
    content = Path("whole.jpg").read_bytes()
    Path("cut.jpg").write_bytes(content[: len(content) // 2])
    Path("notes.txt").write_text("no picture")
    Path("photos").mkdir()

    refusals = [
        (
            "nope.jpg",
            FileNotFoundError,
            "nope.jpg is not found from the current folder .*; check the path",
        ),
        (tmp_path / "nope.jpg", FileNotFoundError, "nope.jpg is not found; check the path"),
        ("notes.txt", UnidentifiedImageError, "notes.txt is no picture that Pillow knows; pass"),
        ("photos", IsADirectoryError, "photos is a folder; pass a list of the pictures in it"),
        ("cut.jpg", OSError, "cut.jpg is damaged: .*truncated.* Leave it out, or replace it"),
    ]
    for path, error, says in refusals:
        with pytest.raises(error, match=says) as refusal:
            preprocess(["whole.jpg", path], tiny_config())
        assert "Errno" not in str(refusal.value)


# -- preprocessor_config.json ----------------------------------------------------------------------


def folder_with(preprocessor: dict | None, folder: Path, **changes) -> Path:
    """A saved model whose preprocessor_config.json is this one, or none."""
    tiny_classifier(**changes).save_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def test_saved_folders_say_how_pictures_become_pixels(tmp_path):
    """preprocessor_config.json is what image processors read, and says what preprocess does."""
    model = tiny_classifier()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN.tolist(),
        "image_std": STD.tolist(),
    }
    picture = random_picture()
    loaded = ViTMSNForImageClassification.from_pretrained(tmp_path).config
    assert_close(preprocess(picture, loaded), preprocess(picture, model.config), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_saved_preprocessor_changes_no_pixel(channels, tmp_path):
    """Saved and loaded, a model sees the same pixels, in colour and in grey."""
    model = tiny_classifier(num_channels=channels)
    model.save_pretrained(tmp_path)
    config = ViTMSNConfig.from_pretrained(tmp_path)
    assert config.preprocessor is not None
    for protocol in ("squash", "center-crop"):
        pixels = preprocess(random_picture(), config, protocol)
        assert_close(pixels, preprocess(random_picture(), model.config, protocol), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_saved_preprocessor_has_statistics_of_each_channel(channels, tmp_path):
    """As many means and deviations as there are channels: transformers insists on it."""
    tiny_classifier(num_channels=channels).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert len(saved["image_mean"]) == len(saved["image_std"]) == channels


def test_a_preprocessor_that_a_folder_brought_along_is_kept(tmp_path):
    """Loading and saving again loses nothing of the file, whatever is in it."""
    brought = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "other": [1]}
    model = ViTMSNModel.from_pretrained(folder_with(brought, tmp_path / "old"))
    model.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new/preprocessor_config.json").read_text()) == brought
    assert "preprocessor" not in (tmp_path / "new/config.json").read_text()


@given(
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    resample=st.sampled_from(list(Image.Resampling)),
    mean=st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    std=st.lists(st.floats(0.1, 2), min_size=3, max_size=3),
    factor=st.sampled_from([1 / 255, 1 / 127.5, 1.0]),
    switches=st.fixed_dictionaries(
        {name: st.booleans() for name in ("do_resize", "do_rescale", "do_normalize")}
    ),
)
def test_preprocess_follows_every_number_of_the_folder(
    height, width, resample, mean, std, factor, switches
):
    """Size, filter, factor, mean, deviation and switches are those of preprocessor_config.json."""
    config = tiny_config(
        preprocessor={
            "size": {"height": height, "width": width},
            "resample": int(resample),
            "image_mean": mean,
            "image_std": std,
            "rescale_factor": factor,
            **switches,
        }
    )
    image = random_picture()
    pixels = preprocess(image, config)[0].permute(1, 2, 0).double().numpy()

    expected = np.asarray(
        image.resize((width, height), resample) if switches["do_resize"] else image
    )
    expected = expected * (factor if switches["do_rescale"] else 1)
    if switches["do_normalize"]:
        expected = (expected - mean) / std
    np.testing.assert_allclose(pixels, expected, rtol=1e-5, atol=1e-4)


def test_what_a_file_leaves_out_is_as_in_transformers():
    """Missing words have ViTImageProcessor's defaults: 224 pixels, mean and deviation 0.5."""
    pixels = preprocess(random_picture(), tiny_config(preprocessor={"other": 1}))
    resized = random_picture().resize((224, 224), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.asarray(resized) / 127.5 - 1).permute(2, 0, 1).float()
    assert_close(pixels[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "values, named",
    [
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_pad": True}, "do_pad"),
        ({"size": {"shortest_edge": 32}}, "shortest_edge"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"resample": 17}, "resample=17"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": "grey"}, "image_mean"),
        ({"size": {"height": 0, "width": 4}}, "size"),
        ({"rescale_factor": None}, "rescale_factor"),
        ({"image_std": [0, 1, 1]}, "image_std"),
    ],
)
def test_what_preprocess_can_not_follow_is_named(values, named):
    """A step or number of the file that is not done here is refused by its name, not left out."""
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json.*({named})"):
        preprocess(random_picture(), tiny_config(preprocessor=values))


def test_pictures_of_several_sizes_need_resizing():
    """With do_resize off, pictures must be of one size, and the error says so."""
    config = tiny_config(preprocessor={"do_resize": False})
    with pytest.raises(ValueError, match=r"do_resize off.*10 x 20"):
        preprocess([random_picture(), random_picture(width=20, height=10)], config)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_damaged_preprocessor_file_is_named(content, tmp_path):
    """Whatever is wrong with the file, the error names it."""
    folder = folder_with({}, tmp_path)
    (folder / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json can't be used"):
        ViTMSNModel.from_pretrained(folder)
