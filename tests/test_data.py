"""Every kind of picture and of CIFAR-10 batch is read right, or refused in words.

(test_folders.py is about trees of pictures, test_pixels.py about depth, alpha and channels.)

Nothing in a data file is ever executed.
"""

import hashlib
import http.client
import io
import os
import pickle
import tarfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import TINY, make_grey_pictures, make_pictures, run_here, save_picture
from torch.utils.data import DataLoader

import train_msn
from train_msn import (
    Batch,
    ImageFiles,
    cifar10_images,
    find_pictures,
    load_image,
    make_config,
    read_cifar_batch,
    step_batches,
)

# 12 wide, 8 high, no two pixels alike.
RAMP = np.linspace(0, 255, 12 * 8).reshape(8, 12).astype(np.uint8)
CACHE = 2**20


@pytest.mark.parametrize("count", [1, 5])
def test_fewer_images_than_the_batch_say_how_many_there_are(count, tmp_path, capsys):
    """A data set that is smaller than one batch is refused with both numbers."""
    make_grey_pictures(tmp_path / "data", *(f"{i}.png" for i in range(count)))
    assert run_here(*TINY, "--data", tmp_path / "data", "--output-dir", tmp_path / "run") == 2
    assert f"{count} training images are fewer than batch_size=6" in capsys.readouterr().err


# -- pictures --------------------------------------------------------------------------------------

GREY, SIXTEEN = Image.fromarray(RAMP), RAMP.astype(np.uint16) * 257
BIG_ENDIAN = Image.frombytes("I;16B", (12, 8), SIXTEEN.astype(">u2").tobytes())
COLOUR = np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 90)], axis=2)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What one sees of transparent pixels on a white background."""
    share = alpha / 255 if pixels.ndim == 2 else alpha[..., None] / 255
    return np.round(share * pixels + (1 - share) * 255)


EXIF = Image.Exif()
EXIF[0x0112] = 6  # lies on its left side


@pytest.mark.parametrize(
    "name, picture, options, expected, limit",
    [
        ("grey.png", RAMP, {}, RAMP, 0),
        ("colour.bmp", COLOUR, {}, COLOUR, 0),
        ("16-bit.png", SIXTEEN, {}, RAMP, 0),
        ("black-and-white.png", GREY.convert("1", dither=0), {}, (RAMP > 127) * 255, 0),
        ("palette.gif", GREY.convert("P"), {}, RAMP, 0),
        ("grey alpha.png", Image.merge("LA", [GREY] * 2), {}, on_white(RAMP, RAMP), 1),
        ("16-bit.tif", SIXTEEN, {}, RAMP, 0),
        ("big-endian.tif", BIG_ENDIAN, {}, RAMP, 0),
        ("alpha.png", np.dstack([COLOUR, RAMP]), {}, on_white(COLOUR, RAMP), 1),
        (
            "alpha.webp",
            np.dstack([COLOUR, np.full_like(RAMP, 9)]),
            {"lossless": True, "exact": True},
            on_white(COLOUR, np.full_like(RAMP, 9)),
            1,
        ),
        ("cmyk.jpg", Image.fromarray(COLOUR).convert("CMYK"), {"quality": 100}, COLOUR, 4),
        ("cmyk.tif", Image.fromarray(COLOUR).convert("CMYK"), {}, COLOUR, 1),
        ("grey.jpg", RAMP, {"quality": 100}, RAMP, 2),
        ("turned.png", COLOUR, {"exif": EXIF}, np.rot90(COLOUR, -1), 0),
        (
            "animated.gif",
            GREY,
            {"save_all": True, "append_images": [Image.fromarray(255 - RAMP)]},
            RAMP,
            0,
        ),
        ("pixel.png", RAMP[:1, :1], {}, RAMP[:1, :1], 0),
        ("fälschlich .JPG", RAMP, {"format": "png"}, RAMP, 0),
    ],
)
def test_every_kind_of_picture_is_read_as_upright_rgb(
    name, picture, options, expected, limit, tmp_path
):
    """Whatever the format, mode, depth or orientation: uint8 RGB, upright, the right pixels."""
    pixels = load_image(save_picture(tmp_path / name, picture, **options), 64)
    expected = expected if expected.ndim == 3 else np.stack([expected] * 3, axis=2)
    assert pixels.dtype == np.uint8 and pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= limit


@pytest.mark.parametrize(
    "size, side, expected",
    [
        ((300, 200), 100, (100, 150)),
        ((40, 30), 100, (30, 40)),
        ((4000, 2), 8, (1, 32)),
        ((1, 5000), 16, (64, 1)),
        ((2000, 1000), 50, (50, 100)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_large_pictures_are_reduced_to_a_shorter_side_or_four_times_that(
    size, side, expected, suffix, tmp_path
):
    """The shorter side becomes `side`, unless the longer one would be above four times that."""
    path = save_picture(tmp_path / f"a.{suffix}", Image.linear_gradient("L").resize(size))
    pixels = load_image(path, side)
    assert pixels.shape == (*expected, 3)
    small = Image.linear_gradient("L").resize(
        expected[::-1], Image.Resampling.BILINEAR, reducing_gap=2
    )
    assert np.abs(pixels.astype(int) - np.asarray(small)[..., None]).mean() < 8


# -- files that cannot be read ---------------------------------------------------------------------


def damaged(folder: Path) -> list[Path]:
    """One of every kind of file that is no readable picture, sorted in among readable ones."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    whole = {
        s: save_picture(folder / f"0.{s}", noise).read_bytes()
        for s in ("png", "jpg", "gif", "tif", "webp")
    }
    contents = {
        "1 empty.png": b"",
        "1 text.jpg": "Bäume".encode(),
        "1 zip.png": b"PK\x03\x04",
        "1 svg.png": b"<svg/>",
        **{
            f"1 cut.{suffix}": content[: len(content) * 2 // 3] for suffix, content in whole.items()
        },
        **{f"1 head.{suffix}": content[:20] for suffix, content in whole.items()},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(folder / name for name in contents)


@pytest.fixture
def mixed(tmp_path):
    """24 good pictures, each of its own grey; in the middle those that are damaged."""
    names = [f"train/{'0' if i < 12 else '2'} {i:02d}.png" for i in range(24)]
    make_grey_pictures(tmp_path, *names)
    return tmp_path / "train", damaged(tmp_path / "train")


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:Corrupt EXIF data")
def test_the_next_readable_picture_stands_in_the_same_for_every_rank_and_number_of_workers(mixed):
    """For an unreadable file its next readable one stands in, on any rank with any workers."""
    folder, bad = mixed
    files = ImageFiles(find_pictures(folder).pictures, 8, 0)
    first = files.paths.index(bad[0])
    batch = files.__getitems__(list(range(len(files))))
    good = [i for i, path in enumerate(files.paths) if path not in bad]
    assert batch.indices == [next((g for g in good if g >= i), good[0]) for i in range(len(files))]
    assert {line.partition(": ")[0] for line in batch.unreadable} == set(map(str, bad))
    assert batch.images[first].equal(batch.images[batch.indices[first]])
    config = make_config({"batch_size": 12})
    alone = list(step_batches(config, len(files), range(6), slice(0, 12)))
    second_of_two = list(step_batches(config, len(files), range(6), slice(6, 12)))
    for workers in (0, 2):
        loaders = [
            DataLoader(files, batch_sampler=batches, collate_fn=Batch._make, num_workers=workers)
            for batches in (alone, second_of_two)
        ]
        for whole, half in zip(*loaders, strict=True):
            assert whole.indices[6:] == half.indices
            for image, same in zip(whole.images[6:], half.images, strict=True):
                assert image.equal(same)


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 8), st.integers(0, 99))
def test_an_epoch_takes_each_image_once_in_an_order_of_its_own(size, steps_per_epoch, rest, seed):
    """Whole batches of all images, none twice; another order in the next epoch.

    What is left over is less than a batch. Wherever a run starts, its steps take the same images.
    """
    num_images = size * steps_per_epoch + min(rest, size - 1)
    config = make_config({"batch_size": size, "seed": seed})

    def images_of(steps: range) -> list[list[int]]:
        return list(step_batches(config, num_images, steps, slice(0, size)))

    two_epochs = images_of(range(2 * steps_per_epoch))
    first, second = two_epochs[:steps_per_epoch], two_epochs[steps_per_epoch:]
    for epoch in (first, second):
        taken = [i for batch in epoch for i in batch]
        assert len(set(taken)) == len(taken) == size * steps_per_epoch
        assert set(taken) <= set(range(num_images))
    if num_images > 20:
        assert first != second
    for start in range(2 * steps_per_epoch):
        assert images_of(range(start, 2 * steps_per_epoch)) == two_epochs[start:]


def test_a_run_names_each_unreadable_file_once_with_a_count_and_goes_on(tmp_path, capsys):
    """A run goes on past unreadable files, and names each of them once, with a count."""
    folder = make_pictures(tmp_path / "data")
    bad = [min((folder / "train").iterdir()) / name for name in ("zero.png", "text.jpg")]
    bad[0].write_bytes(b"")
    bad[1].write_text("nothing to see")
    assert run_here(*TINY, "--data", folder, "--output-dir", tmp_path / "run") == 0
    printed = capsys.readouterr().err
    assert all(printed.count(str(path)) == 1 for path in bad)
    assert "1 so far" in printed and "2 so far" in printed


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_mostly_unreadable_folder_is_refused_with_counts(tmp_path):
    """If half of the files that are tried are unreadable, the folder is refused with counts."""
    bad = damaged(tmp_path)
    with pytest.raises(
        ValueError, match=rf"of {len(bad) + 5} files tried in .*, only 5 are readable"
    ):
        ImageFiles(find_pictures(tmp_path).pictures, 8, 0)


def test_files_that_vanish_during_a_run_are_an_error_in_words(tmp_path):
    """If no file is readable any more, the error says so."""
    folder = make_grey_pictures(tmp_path, "1.png", "2.png")
    files = ImageFiles(find_pictures(folder).pictures, 8, 0)
    for path in files.paths:
        path.unlink()
    with pytest.raises((ValueError, OSError), match="readable"):
        files.__getitems__([0, 1])


def test_a_batch_costs_the_sum_of_its_pictures(tmp_path):
    """A very wide and a very tall picture beside small ones: nothing is as wide and as tall."""
    shapes = [(200, 3), (3, 200), *[(4, 5)] * 20]
    for i, shape in enumerate(shapes):
        save_picture(tmp_path / f"{i:02d}.png", np.full(shape, i, np.uint8))
    batch = ImageFiles(find_pictures(tmp_path).pictures, 50, 0).__getitems__(list(range(22)))
    assert batch.pixels.untyped_storage().nbytes() < 2 * sum(3 * h * w for h, w in shapes)
    for i, (image, shape) in enumerate(zip(batch.images, shapes, strict=True)):
        assert image.shape == (3, *shape) and (image == i).all()


def grey_files(folder: Path, count: int = 24) -> ImageFiles:
    """Pictures of one grey each, of several sizes."""
    for i in range(count):
        save_picture(folder / f"{i:02d}.png", np.full((4 + i % 7, 5 + i % 3), 10 * i, np.uint8))
    return ImageFiles(find_pictures(folder).pictures, 64, 0)


def assert_greys(batch: Batch) -> None:
    for image, i in zip(batch.images, batch.indices, strict=True):
        assert image.shape == (3, 4 + i % 7, 5 + i % 3) and (image == 10 * i).all()


def test_memory_of_a_batch_is_used_again_once_it_is_given_back_and_not_before(tmp_path):
    """What is not given back stays as it is, whatever is read after it."""
    files = grey_files(tmp_path)
    first, second = files.__getitems__([23, 22]), files.__getitems__([0, 1])
    first.give_back()
    third = files.__getitems__([9, 8])
    assert third.pixels.data_ptr() == first.pixels.data_ptr() != second.pixels.data_ptr()
    others = [files.__getitems__([i, i + 1]) for i in range(2, 22)]
    for batch in (second, third, *others):
        assert_greys(batch)


def test_threads_that_read_at_once_do_not_share_memory(tmp_path):
    """One thread reads the next batch while another one evaluates."""
    files = grey_files(tmp_path)

    def read(first: int) -> None:
        for i in range(100):
            batch = files.__getitems__([(first + i) % 24, (first + 3 * i) % 24])
            assert_greys(batch)
            batch.give_back()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(4)))  # raises what they raise


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("give_back", [True, False])
def test_workers_never_write_to_a_batch_before_it_is_given_back(give_back, tmp_path):
    """However long a batch is kept, it is what was read; growing batches too."""
    files = grey_files(tmp_path)
    lists = [list(range(i % 20, i % 20 + 1 + i % 4)) for i in range(40)]
    kept = []
    for batch in DataLoader(files, batch_sampler=lists, collate_fn=Batch._make, num_workers=2):
        kept.append(batch)
        if give_back and len(kept) > 3:
            oldest = kept.pop(0)
            assert_greys(oldest)
            oldest.give_back()
    for batch in kept:
        assert_greys(batch)


def test_pillow_keeps_its_memory_from_one_picture_to_the_next(tmp_path):
    """To get it anew takes longer than to decode a picture."""
    files = grey_files(tmp_path)
    before = Image.core.get_stats()["reused_blocks"]
    files.__getitems__(list(range(10)))
    assert Image.core.get_stats()["reused_blocks"] - before >= 10


@pytest.mark.parametrize("pictures_that_fit", [0, 3, 100])
def test_decoded_pictures_are_kept_up_to_the_stated_size_and_read_alike(
    pictures_that_fit, tmp_path
):
    """The cache never exceeds its size, and what comes out of it is what was read."""
    make_grey_pictures(tmp_path, *(f"{i:02d}.png" for i in range(10)))
    limit = pictures_that_fit * 108 + 50  # a picture of 6 x 6 x 3 takes 108 bytes
    files = ImageFiles(find_pictures(tmp_path).pictures, 8, limit)
    once, again = (files.__getitems__(list(range(10))).pixels for _ in range(2))
    assert once.equal(again) and len(files.cache) == min(pictures_that_fit, 10)
    kept = sum(image.nbytes for image in files.cache.values())
    assert kept <= limit


def test_workers_share_the_stated_cache(tmp_path):
    """The stated cache is divided among all processes that read."""
    make_pictures(tmp_path)
    kept = []
    for workers in (0, 3):
        given = {"data": str(tmp_path), "cache_mb": 8, "num_workers": workers}
        files = train_msn.open_data(make_config(given)).train
        kept.append(files.free_bytes + sum(image.nbytes for image in files.cache.values()))
    assert kept == [8 * 2**20, 2 * 2**20]  # the main process reads too


# -- CIFAR-10 --------------------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def python2_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Opcode by opcode what Python 2 and numpy 1 wrote: strings are bytes, no numpy._core."""
    minus_one = b"J\xff\xff\xff\xff"
    shape = b"M" + len(pixels).to_bytes(2, "little") + b"M\x00\x0c\x86"
    dtype = (
        b"cnumpy\ndtype\n"
        + string(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + string(b"|")
        + b"NNN"
        + 2 * minus_one
        + b"K\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + string(b"b")
        + b"\x87R(K\x01"
        + shape
        + dtype
        + b"\x89T"
        + pixels.nbytes.to_bytes(4, "little")
        + pixels.tobytes()
        + b"tb"
    )
    items = [
        string(b"labels") + b"](" + b"".join(b"K" + bytes([x]) for x in labels) + b"e",
        string(b"data") + array,
        string(b"batch_label") + string(b"training batch 1 of 5"),
        string(b"filenames") + b"](" + string(b"a.png") + b"e",
    ]
    return b"\x80\x02}(" + b"".join(items) + b"u."


def python3_batch(protocol: int):
    return lambda pixels, labels: pickle.dumps(
        {b"data": pixels, b"labels": labels, b"batch_label": b"x"}, protocol
    )


def some_images(count: int, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, 10, count).tolist()


@pytest.mark.parametrize("write", [python2_batch, python3_batch(3), python3_batch(4)])
def test_batches_are_read_as_the_authors_wrote_them_and_as_python_3_does(write, tmp_path):
    """CIFAR-10 batches pickled by Python 2 or 3 give the same images and labels."""
    for i, name in enumerate(("data_batch_1", "data_batch_4", "test_batch")):
        (tmp_path / name).write_bytes(write(*some_images(3 + i, i)))
    data = cifar10_images(tmp_path)
    assert [len(data.train), len(data.val)] == [7, 5] and data.classes[3] == "cat"
    assert data.train_labels.tolist() == some_images(3)[1] + some_images(4, 1)[1]
    assert data.train.images.dtype == torch.uint8 and data.val_labels.dtype == torch.int64
    expected = np.concatenate([some_images(3)[0], some_images(4, 1)[0]]).reshape(7, 3, 32, 32)
    assert (data.train.images.numpy() == expected).all()


class Payload:
    """A pickle that calls a function with arguments when it is loaded by the unsafe way."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def nested(depth: int) -> list:
    """A list that is small in a file and 10^depth numbers long when written out."""
    return [nested(depth - 1)] * 10 if depth else [0]


@pytest.mark.parametrize(
    "content",
    [
        lambda trap: pickle.dumps(Payload(os.mkdir, trap), 2),
        lambda trap: pickle.dumps({b"data": Payload(os.mkdir, trap)}, 4),
        lambda trap: f"c__builtin__\neval\n(S'open({trap!r}, \"w\")'\ntR.".encode(),
        lambda trap: f"cposix\nsystem\n(S'mkdir {trap}'\ntR.".encode(),
        # Not code, but as bad: an array of objects at addresses that the file chooses, and a list
        # that fills all memory.
        lambda trap: pickle.dumps(
            {b"data": Payload(np.ndarray, (1,), np.dtype("O"), b"\x01" * 8), b"labels": [1]}, 2
        ),
        lambda trap: pickle.dumps(
            {b"data": np.zeros((1, 3072), np.uint8), b"labels": nested(12)}, 4
        ),
        lambda trap: pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": 10**11}, 4),
        lambda trap: pickle.dumps({b"data": np.zeros((1, 3072), object), b"labels": [1]}, 2),
        lambda trap: pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, 2),
        lambda trap: pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, 2),
        lambda trap: pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}, 2),
        lambda trap: b"",
        lambda trap: pickle.dumps([1, 2], 2),
    ],
)
def test_a_hostile_or_damaged_batch_is_refused_and_nothing_runs(content, tmp_path):
    """No pickle can run code or fill the memory: it is read as a batch or refused by name."""
    (tmp_path / "test_batch").write_bytes(python2_batch(*some_images(2)))
    (tmp_path / "data_batch_1").write_bytes(content(str(tmp_path / "executed")))
    with pytest.raises(ValueError, match=r"data_batch_1 is no CIFAR-10 python batch"):
        cifar10_images(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_batches_without_the_test_batch_are_not_downloaded_again_but_named(tmp_path, monkeypatch):
    """If some batches are there but the test batch is not, it is named; nothing is fetched."""
    (tmp_path / "data_batch_1").write_bytes(python2_batch(*some_images(2)))
    monkeypatch.setattr(
        train_msn.urllib.request, "urlopen", lambda *_, **__: pytest.fail("downloads")
    )
    with pytest.raises(ValueError, match="test_batch"):
        train_msn.cifar10_images(tmp_path)


FILES = [
    f"cifar-10-batches-py/{name}"
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
]


def archive(*more: str) -> bytes:
    """The six batches, beside other members."""
    file, content = io.BytesIO(), python2_batch(*some_images(2))
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name in (*more, *FILES):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def serve(monkeypatch, content: bytes | Exception):
    class Response(io.BytesIO):
        def read(self, *size):
            if isinstance(content, Exception):
                raise content
            return super().read(*size)

    body = b"" if isinstance(content, Exception) else content
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response(body))


def test_a_download_is_unpacked_and_used(tmp_path, monkeypatch):
    """The archive with the published checksum is unpacked, its six batches and nothing else."""
    content = archive()
    serve(monkeypatch, content)
    monkeypatch.setattr(train_msn, "CIFAR10_SHA256", hashlib.sha256(content).hexdigest())
    assert len(cifar10_images(tmp_path / "data" / "here").train) == 10
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert written == [f"data/here/{name}" for name in FILES]


@pytest.mark.parametrize("name", ["../escaped", "cifar-10-batches-py/../../escaped"])
def test_no_archive_writes_outside_of_its_folder(name, tmp_path, monkeypatch):
    """Paths inside an archive cannot lead out of the folder that it is unpacked to."""
    content = archive(name)
    serve(monkeypatch, content)
    monkeypatch.setattr(train_msn, "CIFAR10_SHA256", hashlib.sha256(content).hexdigest())
    cifar10_images(tmp_path / "data")
    assert {p.parent for p in tmp_path.rglob("*") if p.is_file()} == {
        tmp_path / "data" / "cifar-10-batches-py"
    }


@pytest.mark.parametrize(
    "content, says",
    [
        (archive(), "SHA-256"),
        (b"<html>moved</html>", "SHA-256"),
        (b"", "SHA-256"),
        (http.client.IncompleteRead(b"12", 34), "IncompleteRead"),
        (ConnectionResetError("reset by peer"), "reset by peer"),
    ],
    ids=["another archive", "a page", "nothing", "half of it", "no connection"],
)
def test_a_download_that_is_not_the_published_file_is_not_unpacked(
    content, says, tmp_path, monkeypatch, capsys
):
    """A download that is cut off or is another file leaves nothing behind, and says why."""
    serve(monkeypatch, content)
    folders = ("--data-dir", tmp_path / "data", "--output-dir", tmp_path / "run")
    assert run_here("--recipe", "cifar10", *folders) == 1
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_real_batches_are_read_if_they_are_here():
    """The authors' own test batch is read, where it is at hand."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar-10-batches-py"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    images, labels = read_cifar_batch(folder / "test_batch")
    assert len(images) == len(labels) == 2000 and labels.bincount().tolist()[0] == 196
