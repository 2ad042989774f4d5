"""From the values in a file to the pixels that a network sees: depth, alpha, frames, limits.

Nothing of a picture is lost without a word, and all that read pictures read them alike.
"""

import json
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from common import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from runs import TINY, run_here, save_picture, write_array, write_png, write_tiff
from torch.testing import assert_close

import finetune
import train_msn
from train_msn import ImageFiles, folder_images, load_image, why_unreadable
from vitmsn import (
    OtherChannels,
    PictureRules,
    ViTMSNConfig,
    array_values,
    find_range,
    open_picture,
    preprocess,
    to_bytes,
    upright_layers,
)

CACHE = 2**20
RAMP = np.linspace(0, 1, 12 * 8).reshape(8, 12)  # no two pixels alike
BYTES = np.round(255 * RAMP).astype(np.uint8)


def pixels_of(folder, **rules) -> np.ndarray:
    """All pictures of a folder as a network's data set gives them: b c height width."""
    data = folder_images(folder, 64, CACHE, PictureRules(**rules))
    return np.stack(data.train.__getitems__(list(range(len(data.train)))).images)


def bands_of(count: int, scale: float = 255, dtype=np.uint8) -> np.ndarray:
    """A picture 8 x 12 of so many bands, no two alike."""
    bands = [np.roll(RAMP, k, axis=1) for k in range(count)]
    return (np.stack(bands, axis=2) * scale).round().astype(dtype)


def values_in(path: Path) -> np.ndarray:
    """What is read of a file, h w c."""
    with open_picture(path, PictureRules()) as picture:
        return picture.values


# -- depth -----------------------------------------------------------------------------------------

DEEP = {
    "8 of 16 bits": (RAMP * 255).round().astype(np.uint16),
    "10 of 16 bits": (RAMP * 1023).round().astype(np.uint16),
    "12 of 16 bits": (RAMP * 4095).round().astype(np.uint16),
    "all 16 bits": (RAMP * 65535).round().astype(np.uint16),
    "16 bits around an offset": (30000 + RAMP * 900).astype(np.uint16),
    "signed": (RAMP * 4000 - 1000).round().astype(np.int32),
    "floats from 0 to 1": RAMP.astype(np.float32),
    "floats from -1 to 1": (2 * RAMP - 1).astype(np.float32),
    "floats up to 255": (RAMP * 255).astype(np.float32),
    "floats above 255": (RAMP * 9000).astype(np.float32),
}


@pytest.mark.parametrize("values", DEEP.values(), ids=DEEP)
def test_a_picture_of_any_depth_keeps_its_levels(values, tmp_path):
    """Whatever the range that the values fill, black to white is what the network sees."""
    save_picture(tmp_path / "1.tif", values)
    save_picture(tmp_path / "2.tif", values[::-1].copy())
    for seen, expected in zip(pixels_of(tmp_path), (BYTES, BYTES[::-1]), strict=True):
        assert np.abs(seen.astype(int) - expected).max() <= 1


def test_the_range_is_the_same_for_a_whole_data_set_and_is_said_once(tmp_path):
    """A picture half as bright stays half as bright; validation follows training."""
    dark = (RAMP * 2000).astype(np.uint16)
    for i, values in enumerate((dark, 2 * dark)):
        save_picture(tmp_path / "train" / "a" / f"{i}.png", values)
        save_picture(tmp_path / "train" / "b" / f"{i}.png", BYTES)
    save_picture(tmp_path / "val" / "a" / "1.png", dark)
    data = folder_images(tmp_path, 64, CACHE)
    half, full = np.stack(data.train.__getitems__([0, 1]).images).astype(int)
    assert np.abs(2 * half - full).max() <= 1 and 240 < full.max() < 255
    assert np.array_equal(data.val.__getitems__([0]).images[0], half)
    assert data.picture_rules.integer_range == (0, 4095)
    (line,) = [note for note in data.notes if "4095" in note]
    assert "--integer-range" in line


def test_the_range_can_be_given(tmp_path):
    """A flag sets the values of black and white; then nothing is found, and nothing is said."""
    save_picture(tmp_path / "1.png", (RAMP * 4095).astype(np.uint16))
    seen = pixels_of(tmp_path, integer_range=(0, 65535))
    assert seen.max() == 16  # as dark as the full range of 16 bits makes it
    assert not [
        n
        for n in folder_images(tmp_path, 8, 0, PictureRules("white", (0, 9))).notes
        if "8 bits" in n
    ]


@given(
    arrays(
        st.sampled_from([np.uint16, np.int32, np.float32]),
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        elements={"min_value": 0, "max_value": 60000},
    )
)
def test_order_is_kept_and_the_found_range_holds_nearly_all_values(values):
    """A brighter value never becomes darker, and a picture that is not of one colour stays so."""
    low, high = find_range(values)
    seen = to_bytes(values, PictureRules())
    order = values.ravel().argsort()
    assert low < high and (np.diff(seen.ravel()[order].astype(int)) >= 0).all()
    if values.min() < values.max():
        assert seen.min() < seen.max()


def test_values_that_are_no_numbers_do_no_harm():
    """NaN is black, infinity white; the range is found on the others."""
    values = np.array([[0, 0.5, 1, np.nan, np.inf, -np.inf]], np.float32)
    assert to_bytes(values, PictureRules()).tolist() == [[0, 128, 255, 0, 255, 0]]


@pytest.mark.parametrize("values", [BYTES // 9, (BYTES // 9)[..., None].repeat(3, axis=2)])
def test_bytes_stay_as_they_are(values, tmp_path):
    """A dark picture of 8 bits is dark, in whatever form it comes and whatever others hold."""
    rules = PictureRules(integer_range=(0, 4095))
    expected = preprocess(Image.fromarray(values), tiny_config())
    assert_close(preprocess(values, tiny_config(), rules=rules), expected)
    path = write_array(tmp_path / "1.npy", values)
    assert load_image(path, 64, rules).max() == values.max()


# -- 16-bit colours and other TIFFs ----------------------------------------------------------------


def colours_of_16_bits(channels: int, bits: int) -> np.ndarray:
    """Two channels are grey and alpha, four are RGB and alpha, which is opaque."""
    values = bands_of(channels, 2**bits - 1, np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65535
    return values


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_colours_of_16_bits_keep_their_levels(suffix, channels, bits, tmp_path):
    """PNGs and TIFFs of 16-bit colours, with and without alpha, of which Pillow gives 8 bits."""
    values = colours_of_16_bits(channels, bits)
    if suffix == "png":
        path = write_png(tmp_path / "1.png", values)
    else:
        colours = "minisblack" if channels == 2 else "rgb"
        has_alpha = channels in (2, 4)
        options = {"extrasamples": ("unassalpha",)} if has_alpha else {}
        path = write_tiff(tmp_path / "1.tif", values, colours=colours, **options)
    assert np.array_equal(values_in(path), values)

    seen = load_image(path, 64).astype(int)
    num_colours = 1 if channels == 2 else 3
    assert np.abs(seen - bands_of(num_colours)).max() <= 1
    assert len(np.unique(seen)) > 90


def test_a_png_of_16_bit_colours_may_declare_one_of_them_transparent(tmp_path):
    """That colour becomes the background, and nothing else does."""
    values = colours_of_16_bits(3, 16)
    values[0, 0] = 1, 2, 3
    path = write_png(tmp_path / "1.png", values, transparent=(1, 2, 3))
    seen = load_image(path, 64).astype(int)
    assert (seen[0, 0] == 255).all()
    assert np.abs(seen - bands_of(3)).reshape(-1, 3)[1:].max() <= 1


@given(data=st.data())
def test_every_tiff_is_read_as_it_was_written(data, tmp_path):
    """Any number of bands and kind of number, however they are laid out and packed."""
    kind = data.draw(st.sampled_from(["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"]))
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * 2, st.integers(1, 6)))
    values = data.draw(arrays(kind, shape))
    compression = data.draw(st.sampled_from([None, "zlib"]))
    keeps_differences = compression and kind[0] != "f" and data.draw(st.booleans())
    path = write_tiff(
        tmp_path / "1.tif",
        values,
        byteorder=data.draw(st.sampled_from("<>")),
        band_by_band=data.draw(st.booleans()),
        compression=compression,
        predictor=keeps_differences or None,
        rowsperstrip=data.draw(st.integers(1, 9)),
    )
    with open_picture(path, PictureRules()) as picture:
        read = np.asarray(picture) if isinstance(picture, Image.Image) else picture.values
    assert np.array_equal(read.reshape(shape), values, equal_nan=kind[0] == "f")


@pytest.mark.parametrize(
    "kind, options",
    [
        ("i1", {}),
        ("u4", {}),
        ("i2", {"byteorder": ">", "compression": "zlib"}),
        ("f4", {"byteorder": ">", "compression": "zlib"}),
    ],
)
def test_tiffs_that_pillow_misreads_are_read_as_they_were_written(kind, options, tmp_path):
    """Of these Pillow mistakes the sign or the order of bytes, without a word."""
    bits = np.arange(96 * np.dtype(kind).itemsize, dtype=np.uint8)[::-1].copy()
    values = bits.view(kind).reshape(8, 12, 1)
    path = write_tiff(tmp_path / "1.tif", values, **options)
    assert np.array_equal(values_in(path), values, equal_nan=kind == "f4")


def test_a_tiff_of_another_meaning_is_refused_in_words(tmp_path):
    """Numbers of a table of 16-bit colours are no brightness."""
    table = np.zeros((3, 65536), np.uint16)
    values = bands_of(1, 4095, np.uint16)
    path = write_tiff(tmp_path / "1.tif", values, colours="palette", colormap=table)
    with pytest.raises(ValueError, match=r"a TIFF of PALETTE, .* save it as grey, RGB or bands"):
        preprocess(path, tiny_config())


@pytest.mark.parametrize("opens", [True, False])
def test_without_tifffile_what_needs_it_is_refused_by_its_name(opens, tmp_path, monkeypatch):
    """Whether Pillow opens a TIFF and would drop a band, or does not open it."""
    monkeypatch.setitem(sys.modules, "tifffile", None)  # as if it were not installed
    path = tmp_path / "bad.tif"
    if opens:
        Image.frombytes("RGBX", (12, 8), bands_of(4).tobytes()).save(path)
    else:
        Image.fromarray(BYTES).save(path)
        bits = struct.pack("<HHLH", 258, 3, 1, 8)
        path.write_bytes(path.read_bytes().replace(bits, bits[:-2] + struct.pack("<H", 64)))
    with pytest.raises(ImportError, match="pip install tifffile"):
        preprocess(path, tiny_config())

    for i in range(3):
        save_picture(tmp_path / f"{i}.png", bands_of(3))
    (note,) = folder_images(tmp_path, 8, CACHE).notes[2:]
    assert note == (
        "1 of 4 files tried can't be read: 1 in need of a package: Pillow does not read all of "
        "this TIFF, but tifffile may: pip install tifffile (bad.tif)"
    )


def test_a_tiff_that_tifffile_cannot_unpack_names_the_package_that_it_needs(tmp_path, monkeypatch):
    """Some kinds of compression need imagecodecs."""
    path = write_tiff(tmp_path / "1.tif", bands_of(5))
    tifffile = pytest.importorskip("tifffile")

    def fail(*_, **__):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", fail)
    files = ImageFiles([path], 8, 0, check=False)
    assert files.read(0) is None
    assert files.why(0).startswith("in need of a package: tifffile needs")
    assert "pip install imagecodecs (<COMPRESSION.LZW" in files.why(0)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_a_truncated_tiff_of_bands_is_unreadable_and_nothing_else_is_said(share, tmp_path, caplog):
    """Never half a picture, and no line in the log of the package that reads it."""
    path = write_tiff(tmp_path / "1.tif", bands_of(5), compression="zlib")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    files = ImageFiles([path], 8, 0, check=False)
    assert files.read(0) is None and files.why(0)
    assert not caplog.records


# -- channels --------------------------------------------------------------------------------------

WRITERS = {
    "tif": lambda path, bands: write_tiff(path.with_suffix(".tif"), bands),
    "tif, RGB and more": lambda path, bands: write_tiff(
        path.with_suffix(".tif"),
        bands,
        colours="rgb",
        extrasamples=["unspecified"] * (bands.shape[2] - 3),
    ),
    "tif, bands apart": lambda path, bands: write_tiff(
        path.with_suffix(".tif"), bands, band_by_band=True
    ),
    "npy": lambda path, bands: write_array(path.with_suffix(".npy"), bands),
    "npy, bands first": lambda path, bands: write_array(
        path.with_suffix(".npy"), np.moveaxis(bands, 2, 0)
    ),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("count", [4, 5, 7])
def test_every_band_is_seen_and_how_many_there_are_is_found_and_said(count, write, tmp_path):
    """Four bands that are no alpha, five, and more: none vanishes, in training and preprocess."""
    bands = bands_of(count)
    path = write(tmp_path / "1", bands)
    data = folder_images(tmp_path, 64, CACHE)
    assert data.picture_rules.num_channels == count
    assert f"{count} bands" in data.notes[-1]
    seen = data.train.__getitems__([0]).images[0]
    assert np.array_equal(seen.permute(1, 2, 0), bands)

    assert train_msn.usual_size(data.train.paths) == (12, 8)

    config = tiny_config(num_channels=count)
    pixels = preprocess(path, config)
    assert pixels.shape == (1, count, 32, 32)
    assert_close(preprocess(bands, config), pixels)
    assert_close(preprocess(torch.from_numpy(bands).permute(2, 0, 1), config), pixels)


def test_num_channels_is_a_setting(tmp_path):
    """1 makes grey of colours, 4 takes alpha as it is, 3 composites it."""
    rgba = Image.fromarray(bands_of(4))
    path = save_picture(tmp_path / "1.png", rgba)
    assert load_image(path, 64).shape == (8, 12, 3)
    assert load_image(path, 64, PictureRules(num_channels=1)).shape == (8, 12, 1)
    seen = load_image(path, 64, PictureRules(num_channels=4))
    assert np.array_equal(seen, bands_of(4))
    assert preprocess(path, tiny_config(num_channels=4)).shape == (1, 4, 32, 32)
    grey = preprocess(path, tiny_config(num_channels=1), rules=PictureRules())
    assert grey.shape == (1, 1, 32, 32)  # the model says it, whatever the rules say
    assert_close(preprocess(np.asarray(rgba), tiny_config()), preprocess(rgba, tiny_config()))


@pytest.mark.parametrize(
    "picture, channels, says",
    [
        (bands_of(5), 3, r"has 5 bands, num_channels=3; give .* 3 channels, or num_channels=5"),
        (bands_of(2), 1, r"has 2 bands"),
        (Image.new("RGB", (4, 4)), 4, r"3 channels \(RGB\), num_channels=4; give .* 4 channels"),
        (Image.new("L", (4, 4)), 2, r"1 channels \(L\)"),
        (bands_of(1)[..., 0], 5, r"1 channels \(L\), num_channels=5"),
    ],
)
def test_pictures_of_other_channels_are_refused_with_what_would_do(picture, channels, says):
    """No channel is dropped or made up; the message names what there is and what is wanted."""
    with pytest.raises(OtherChannels, match=says):
        preprocess(picture, tiny_config(num_channels=channels))


def test_odd_pictures_among_others_are_said_as_what_they_are(tmp_path):
    """The commonest number of channels counts; files of another are counted with the reason."""
    for i in range(5):
        write_array(tmp_path / f"{i}.npy", bands_of(3))
    write_array(tmp_path / "5.npy", bands_of(5))
    data = folder_images(tmp_path, 64, CACHE)
    assert data.picture_rules.num_channels == 3
    said = "1 of 6 files tried can't be read: 1 of other channels: a picture has 5 bands"
    assert any(note.startswith(said) for note in data.notes)


@pytest.mark.parametrize(
    "shape, channels, expected",
    [
        ((7, 9, 3), 3, (7, 9, 3)),
        ((3, 7, 9), 3, (7, 9, 3)),
        ((1, 9, 3), 3, (1, 9, 3)),
        ((7, 9), 3, (7, 9, 1)),
        ((7, 9, 5), 0, (7, 9, 5)),
        ((5, 7, 9), 0, (7, 9, 5)),
        ((3, 9, 5), 5, (3, 9, 5)),
        ((3, 9, 5), 3, (9, 5, 3)),
    ],
)
def test_the_channels_of_an_array_are_the_axis_that_fits(shape, channels, expected):
    """The last axis or the first, by their lengths and by what is asked for."""
    picture = array_values(np.zeros(shape, np.uint8), PictureRules(num_channels=channels))
    assert picture.values.shape == expected


def test_arrays_beside_pictures_are_passed_over(tmp_path):
    """Beside pictures, .npy files are taken for features or labels, and counted."""
    save_picture(tmp_path / "1.png", BYTES)
    write_array(tmp_path / "features.npy", np.zeros((4, 7)))
    data = folder_images(tmp_path, 64, CACHE)
    assert len(data.train) == 1 and data.notes[1] == "passed over: 1 .npy"


@pytest.mark.parametrize("wrong", [np.zeros(7), np.array(["x"]), np.zeros((2, 3, 4, 5))])
def test_arrays_that_are_no_pictures_are_unreadable_in_words(wrong, tmp_path):
    """Labels, texts and stacks in .npy files are no pictures; nothing in them is run."""
    path = write_array(tmp_path / "1.npy", wrong)
    files = ImageFiles([path], 8, 0, check=False)
    assert files.read(0) is None and "is no picture" in files.why(0)
    np.save(path, np.array([{}], object), allow_pickle=True)
    assert files.read(0) is None and "Python objects" in files.why(0)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_views_of_what_is_no_rgb_have_brightness_contrast_and_blur_alone(channels):
    """All bands of a view change alike: equal bands stay equal, whatever is drawn."""
    config = train_msn.make_config({"grey": 1.0, "jitter": 1.0, "blur": 0.5, "batch_size": 4})
    one = torch.randint(0, 256, (4, 1, 40, 40), dtype=torch.uint8)
    batch = train_msn.ImagesInMemory(one.expand(-1, channels, -1, -1)).__getitems__([0, 1, 2, 3])
    views = train_msn.make_views(batch, config, 0, slice(0, 4))
    for view in (views.target_view, *views.anchor_views):
        assert view.shape[1] == channels and view.isfinite().all()
        assert_close(view, view[:, :1].expand_as(view))


@pytest.mark.parametrize("channels", [1, 5])
def test_a_run_on_bands_trains_evaluates_and_is_used(channels, tmp_path, monkeypatch):
    """train_msn.py, the table, train, predict, attention, embed and neighbours on such pictures."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for i in range(2 * count):
            bands = rng.integers(0, 120 + 100 * (i % 2), (20, 20, 5), dtype=np.uint8)
            path = tmp_path / "data" / part / "ab"[i % 2] / f"{i}"
            if channels == 5:
                write_array(path.with_suffix(".npy"), bands)
            else:
                save_picture(path.with_suffix(".png"), bands[..., :3])
    run = tmp_path / "run"
    flags = ("--data", tmp_path / "data", "--output-dir", run, "--max-steps", 2)
    flags += ("--num-channels", channels) if channels == 1 else ()
    assert run_here(*TINY, *flags) == 0
    assert ViTMSNConfig.from_pretrained(run / "encoder").num_channels == channels
    assert {path.name for path in run.glob("*.png")} >= {"views.png", "neighbours.png"}

    monkeypatch.chdir(tmp_path)
    labels = ["--checkpoint", "run", "--steps", "1", "--labels-per-class", "2", "--seeds", "0"]
    table = [*labels, "--methods", "probe,finetune,untrained,pixels,knn20", "--no-full"]
    pictures = [str(path) for path in (tmp_path / "data" / "val").rglob("*.*")][:2]
    commands = [table, ["train", *labels], ["predict", "run/classifier", *pictures]]
    commands += [["attention", "run", pictures[0]]]
    commands += [[name, "run", *pictures] for name in ("embed", "neighbours")]
    for command in commands:
        assert train_msn.run_program(finetune.main, command) == 0


def test_the_built_in_images_are_of_three_channels(capsys):
    """Another number is refused in words."""
    assert run_here(*TINY, "--num-channels", 4) == 2
    assert "the images of synthetic have 3" in capsys.readouterr().err


# -- alpha -----------------------------------------------------------------------------------------


def shape_in_alpha(colour: int) -> Image.Image:
    """A picture of one colour, whose content is its alpha channel."""
    flat = Image.new("L", (12, 8), colour)
    return Image.merge("RGBA", [flat, flat, flat, Image.fromarray(BYTES)])


def test_what_is_drawn_in_the_alpha_channel_alone_is_seen_by_all(tmp_path):
    """Training, preprocess and predict composite on white, or on the background that is given."""
    path = save_picture(tmp_path / "icon.png", shape_in_alpha(0))
    seen = load_image(path, 64)
    assert np.array_equal(seen[..., 0], 255 - BYTES)
    (layer,) = upright_layers(Image.open(path), PictureRules())
    assert np.array_equal(np.asarray(layer)[..., 0], 255 - BYTES)
    black = load_image(path, 64, PictureRules(background="black"))
    assert not black.any()

    config = tiny_config(extra={"picture_rules": {"background": "black"}})
    assert preprocess(path, config).unique().numel() == 3  # one colour: three numbers
    assert preprocess(path, tiny_config()).unique().numel() > 3


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "RGB"])
def test_every_way_to_be_transparent_shows_the_background(mode, tmp_path):
    """Alpha channels, palettes and colours that are declared transparent all become white."""
    declared = {"P": 0, "L": 0, "RGB": (0, 0, 0)}  # black is what is transparent
    options = {"transparency": declared[mode]} if mode in declared else {}
    Image.new(mode, (4, 4)).save(tmp_path / "1.png", **options)
    assert load_image(tmp_path / "1.png", 64).min() == 255


# -- frames ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_the_first_frame_or_page_that_is_not_of_one_colour_is_taken(suffix, tmp_path):
    """A blank first frame is passed over; several pages are said once."""
    blank = Image.new("L", (12, 8))
    frames = [blank, Image.fromarray(BYTES), Image.fromarray(255 - BYTES)]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"1.{suffix}"
    blank.save(path, save_all=True, append_images=frames[1:], **options)
    assert np.abs(load_image(path, 64)[..., 0].astype(int) - BYTES).max() <= 1
    with Image.open(path) as image:
        (layer,) = upright_layers(image, PictureRules())
        assert np.abs(np.asarray(layer)[..., 0].astype(int) - BYTES).max() <= 1
        assert image.tell() == 0  # the caller's picture is left where it was
    notes = folder_images(tmp_path, 8, CACHE).notes
    assert sum("1 of 1 pictures tried have several frames" in note for note in notes) == 1


# -- pictures of one colour ------------------------------------------------------------------------


def test_pictures_of_one_colour_are_counted_and_named(tmp_path):
    """18 of 36: the line says so, with names."""
    for i in range(36):
        save_picture(tmp_path / f"{i:02d}.png", BYTES if i % 2 else np.full_like(BYTES, i))
    notes = folder_images(tmp_path, 8, CACHE).notes
    line = "18 of 36 pictures tried are of one colour: 00.png, 02.png, 04.png, ..."
    assert line in notes


# -- EXIF ------------------------------------------------------------------------------------------


@given(exif=st.binary(max_size=60), suffix=st.sampled_from(["jpg", "png", "webp", "tif"]))
def test_exif_data_that_cannot_be_parsed_costs_nothing(exif, suffix, tmp_path):
    """The pixels are fine, so the picture is: whatever the EXIF data."""
    path = tmp_path / f"1.{suffix}"
    image = Image.fromarray(np.stack([BYTES] * 3, axis=2))
    if suffix == "tif":
        image.save(path)
    else:
        image.save(path, exif=b"Exif\0\0MM\0*\0\0\0\10" + exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and not a word is said
        assert sorted(load_image(path, 64).shape) == [3, 8, 12]
        assert preprocess(path, tiny_config()).isfinite().all()


def test_an_exif_entry_that_points_nowhere_is_no_reason_to_refuse(tmp_path):
    """An entry of a length and at a place that do not exist: Pillow raises struct.error."""
    entry = struct.pack(">HHHLL", 1, 0x0112, 3, 0xFFFF, 0xFFFFFFF0)
    path = tmp_path / "1.jpg"
    Image.fromarray(BYTES).save(path, exif=b"Exif\0\0MM\0*\0\0\0\10" + entry, quality=100)
    assert np.abs(load_image(path, 64)[..., 0].astype(int) - BYTES).max() <= 2


def test_the_first_page_of_a_tiff_of_bands_that_is_not_blank_is_taken(tmp_path):
    """As with other pictures, also of 16-bit colours and five bands; pages are said."""
    for bands in (bands_of(5), bands_of(3, 65535, np.uint16)):
        colours = "rgb" if bands.shape[2] == 3 else "minisblack"
        blank = np.zeros_like(bands)
        path = write_tiff(tmp_path / "1.tif", blank, bands, bands[::-1], colours=colours)
        assert np.array_equal(values_in(path), bands)
        assert any("several frames" in note for note in folder_images(tmp_path, 8, CACHE).notes)
        path = write_tiff(tmp_path / "1.tif", blank, blank + 1, colours=colours)
        assert not values_in(path).any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_values_are_turned_upright(orientation, tmp_path):
    """A TIFF of bands with an orientation is turned as one of colours is."""
    plain = save_picture(tmp_path / "1.png", bands_of(3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(plain).save(tmp_path / "2.png", exif=exif)
    tag = (0x0112, "H", 1, orientation, True)
    path = write_tiff(tmp_path / "1.tif", bands_of(5), extratags=[tag])
    assert np.array_equal(load_image(path, 64)[..., :3], load_image(tmp_path / "2.png", 64))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_files_are_turned_upright(orientation, suffix, tmp_path):
    """What is stored turned is read as it was before, in every format that knows EXIF."""
    upright = Image.fromarray(np.stack([BYTES, 255 - BYTES, BYTES // 2], axis=2))
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    turned = upright if stored is None else upright.transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    turned.save(tmp_path / f"1.{suffix}", exif=exif, **options)
    seen = load_image(tmp_path / f"1.{suffix}", 64)
    assert np.abs(seen.astype(int) - np.asarray(upright)).max() <= 4


# -- limits and reasons ----------------------------------------------------------------------------


def test_the_limit_of_pixels_is_a_setting_and_is_named_with_the_size(tmp_path):
    """Above Pillow's own limit a picture is read; above ours the reason names limit and size."""
    path = save_picture(tmp_path / "large.png", np.tile(BYTES, (10, 10)))
    rules = PictureRules(max_megapixels=0.005)
    files = ImageFiles([path], 8, 0, check=False, rules=rules)
    assert files.read(0) is None
    assert "120 x 80 are 0.0096 megapixels, above the limit max_megapixels=0.005" in files.why(0)

    array = write_array(tmp_path / "large.npy", np.zeros((80, 120, 5)))
    assert ImageFiles([array], 8, 0, check=False, rules=rules).read(0) is None

    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = 100
        assert load_image(path, 8).shape == (8, 12, 3)
        assert Image.MAX_IMAGE_PIXELS == 100
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_the_limit_of_pixels_is_one_for_all_pages_of_a_tiff_of_bands(tmp_path):
    """A second page that is larger is not opened, either."""
    path = write_tiff(tmp_path / "1.tif", bands_of(5), np.tile(bands_of(5), (10, 10, 1)))
    files = ImageFiles([path], 8, 0, check=False, rules=PictureRules(max_megapixels=0.005))
    assert files.read(0) is None and files.why(0).startswith("too large: 120 x 80")


@pytest.mark.parametrize(
    "error, says",
    [
        (MemoryError(), "out of memory"),
        (PermissionError(13, "Permission denied"), "permission denied"),
        (OSError(24, "Too many open files"), "too many open files"),
        (OSError("image file is truncated (3 bytes not processed)"), "damaged: image file is tru"),
        (ValueError(), "damaged: ValueError"),
    ],
)
def test_each_reason_is_said_as_what_it_is(error, says, tmp_path, monkeypatch):
    """No memory and no permission are not a damaged picture."""
    path = save_picture(tmp_path / "1.png", BYTES)
    files = ImageFiles([path], 8, 0)

    def fail(*_):
        raise error

    monkeypatch.setattr(train_msn, "load_image", fail)
    assert files.read(0) is None and files.why(0).startswith(says)
    assert why_unreadable(error) == files.why(0)


def test_the_start_counts_what_cannot_be_read_by_reason(tmp_path):
    """Of a folder with a few bad files, the line gives each reason with its count."""
    for i in range(8):
        save_picture(tmp_path / f"{i}.png", BYTES)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "8.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "9.png").write_bytes(b"text")
    (tmp_path / "a.png").write_bytes(b"text")
    (note,) = folder_images(tmp_path, 8, CACHE).notes[1:]
    assert note.startswith("3 of 11 files tried can't be read: 1 damaged: ")
    assert "2 no picture that Pillow knows (9.png, a.png)" in note


# -- JPEG decoded at a fraction of its size --------------------------------------------------------


def test_a_jpeg_that_is_decoded_at_a_fraction_of_its_size_is_not_stretched(tmp_path):
    """What the reduction costs, against a full decode, is no shift: halves, quarters, eighths."""
    rows = np.sin(np.arange(421) / 30)[:, None]
    columns = np.sin(np.arange(637) / 25)
    picture = Image.fromarray((127 + 60 * (rows + columns)).astype(np.uint8))
    picture.save(tmp_path / "1.jpg", quality=98)
    for side in (40, 96, 200):
        seen = load_image(tmp_path / "1.jpg", side)[..., 0].astype(float)
        full = picture.resize(seen.shape[::-1], Image.Resampling.BILINEAR)
        assert np.abs(seen - np.asarray(full)).mean() < 0.8  # 3.1 and 1.1, with the box ignored


# -- preprocess ------------------------------------------------------------------------------------


def test_preprocess_takes_paths_pictures_arrays_and_tensors_alike(tmp_path):
    """One picture in any form, alone or in a list, gives the same pixel values."""
    colours = np.stack([BYTES, 255 - BYTES, BYTES // 2], axis=2)
    path = save_picture(tmp_path / "1.png", colours)
    channels_first = np.moveaxis(colours, -1, 0).copy()
    forms = [path, str(path), Image.open(path), colours, channels_first]
    forms += [torch.from_numpy(colours), torch.from_numpy(channels_first)]
    expected = preprocess(Image.open(path), tiny_config())
    for form in forms:
        assert_close(preprocess(form, tiny_config()), expected)
    assert_close(preprocess(forms, tiny_config()), expected.expand(len(forms), -1, -1, -1))
    batch = np.stack([colours, colours])
    assert_close(preprocess(batch, tiny_config()), expected.expand(2, -1, -1, -1))


def test_preprocess_gives_floats_and_16_bits_their_range():
    """Floats from 0 to 1 and 16 bits are what the same picture is in bytes, to rounding."""
    expected = preprocess(BYTES, tiny_config())
    for values in (RAMP, RAMP.astype(np.float32), (RAMP * 65535).astype(np.uint16)):
        assert (preprocess(values, tiny_config()) - expected).abs().max() < 0.03


@pytest.mark.parametrize("wrong", [np.zeros((2, 5, 7)), np.zeros(3), np.zeros((0, 4)), 3, None])
def test_preprocess_refuses_what_is_no_picture_in_words(wrong):
    """An array of another shape, or something else, is named."""
    with pytest.raises(ValueError, match="picture"):
        preprocess([wrong], tiny_config())


# -- what a run finds stays with its encoder -------------------------------------------------------


def test_a_run_keeps_what_it_found_and_its_encoder_tells_it(tmp_path, capsys):
    """16-bit pictures: the run's settings, its encoder and predictions all have the range."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for i in range(count):
            values = rng.integers(0, 1000 + 3000 * (i % 2), (20, 20), dtype=np.uint16)
            save_picture(tmp_path / "data" / part / "ab"[i % 2] / f"{i}.png", values)
    flags = ("--data", tmp_path / "data", "--output-dir", tmp_path / "run", "--max-steps", 1)
    assert run_here(*TINY, *flags) == 0
    assert "0 becomes black, 4095 white" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["integer_range"] == [0, 4095]
    config = ViTMSNConfig.from_pretrained(tmp_path / "run" / "encoder")
    assert config.extra["picture_rules"] == {"integer_range": [0, 4095]}

    dark = save_picture(tmp_path / "dark.png", np.asarray([[0, 1000], [500, 200]], np.uint16))
    model = finetune.load_model(finetune.FinetuneConfig(checkpoint=str(tmp_path / "run")))
    pictures = finetune.open_pictures([str(dark)], model, finetune.FinetuneConfig())
    assert pictures.read(0).max() == round(1000 / 4095 * 255)


@pytest.mark.parametrize(
    "saved", [3, {"background": "no colour"}, {"integer_range": "x"}, {"float_range": [2, 1]}]
)
def test_nonsense_in_a_config_is_refused_in_words(saved):
    """A config.json whose rules for pictures are none is named."""
    with pytest.raises(ValueError, match="picture_rules="):
        preprocess(BYTES, tiny_config(extra={"picture_rules": saved}))
