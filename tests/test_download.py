"""A folder as people have it, the export of a photo library: it trains, evaluates and is used, and
every command says what of it was taken, what was not and why."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import TINY, run_here, save_picture, write_png

import finetune
import train_msn

TRAIN_EACH = 9  # pictures of each class
VAL_EACH = 3


def photo(i: int, bright: int) -> np.ndarray:
    """Noise, brighter in one class than in the other."""
    rng = np.random.default_rng(i)
    return rng.integers(80 * bright, 120 + 80 * bright, (24, 20 + i % 9, 3)).astype(np.uint8)


def make_download(folder: Path) -> Path:
    """Two classes, nine and three pictures each, in all kinds of files, and much that is none."""
    library = folder / "Photo Library"
    for bright, name in enumerate(("Cats", "Dogs & others")):
        for part, count in (("Training", TRAIN_EACH), ("Validation", VAL_EACH)):
            for i in range(count):
                picture = Image.fromarray(photo(10 * i + bright, bright))
                save_picture(library / part / name / f"IMG_{i:04d}.JPG", picture, quality=95)

    cats = library / "Training" / "Cats"
    dogs = library / "Training" / "Dogs & others"
    change(cats / "IMG_0001.JPG", ".png")
    change(cats / "IMG_0002.JPG", ".webp")
    change(cats / "IMG_0003.JPG", ".jfif", format="jpeg")
    change(cats / "IMG_0004.JPG", ".jp2")
    (dogs / "2019" / "holidays").mkdir(parents=True)
    (dogs / "IMG_0000.JPG").rename(dogs / "2019" / "holidays" / "IMG_0000.JPG")

    # 16 bits of which 12 are used, in grey and in colour; alpha; a blank first page; broken EXIF.
    for path, pixels in (
        (cats / "IMG_0005.JPG", photo(5, 0)),
        (dogs / "IMG_0005.JPG", photo(6, 1)),
    ):
        path.unlink()
        write_png(path.with_suffix(".png"), pixels.astype(np.uint16) * 16)
    (dogs / "IMG_0006.JPG").unlink()
    save_picture(dogs / "IMG_0006.tif", photo(7, 1)[..., 0].astype(np.uint16) * 16)
    for path in (cats / "IMG_0006.JPG", cats / "IMG_0007.JPG"):
        path.unlink()
        pixels = photo(8, 0)
        save_picture(path.with_suffix(".png"), np.dstack([0 * pixels, pixels[..., :1]]))
    (dogs / "IMG_0007.JPG").unlink()
    pages = [np.zeros((24, 20, 3), np.uint8), photo(9, 1)[:, :20]]
    first, second = map(Image.fromarray, pages)
    save_picture(dogs / "IMG_0007.gif", first, save_all=True, append_images=[second])
    save_picture(dogs / "IMG_0008.JPG", photo(11, 1), exif=b"Exif\0\0MM\0*\0\0\0\10\0\7broken")

    # What is no picture to train on: one truncated, films, notes, a stray, and what desktops leave
    # behind.
    whole = (cats / "IMG_0008.JPG").read_bytes()
    (cats / "IMG_0008.JPG").write_bytes(whole[: len(whole) // 2])
    save_picture(library / "Training" / "cover.png", photo(13, 0))
    for name in ("MOV_0001.MOV", "MOV_0002.mov", "notes.txt"):
        (cats / name).write_text("text")
    for name in (".DS_Store", "Training/Cats/._IMG_0000.JPG", "Training/.thumbnails/1.jpg"):
        path = library / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0\5\26\7")
    return folder


def change(path: Path, ending: str, **options) -> None:
    """Save a picture in another format."""
    with Image.open(path) as image:
        image.save(path.with_suffix(ending), **options)
    path.unlink()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("download")


def said_of(folder: Path) -> list[str]:
    """What is said of the whole folder, by all commands that look at it in full."""
    library = folder / "Photo Library"
    return [
        f"training images are those in {library}/Training",
        f"validation images are those in {library}/Validation",
        "taken: 14 .jpg, 5 .png, 1 .webp, 1 .jfif, 1 .jp2, 1 .tif, 1 .gif",
        "passed over: 3 hidden, 1 in no class folder (Photo Library/Training/cover.png), 2 .mov, "
        "1 .txt",
        "1 of 24 files tried can't be read: 1 damaged: image file is truncated (N bytes not "
        "processed) (Photo Library/Training/Cats/IMG_0008.JPG)",
        "1 of 24 pictures tried have several frames or pages: the first that is not of one colour "
        "is taken",
        "2 of 24 pictures tried have an alpha channel: they are put on white (--background sets "
        "it)",
        "pictures of more than 8 bits: 0 becomes black, 4095 white (found on those tried; "
        "--integer-range sets it)",
    ]


def test_a_real_download_trains_and_its_first_lines_say_all(place, capsys):
    """At most twelve lines say what was taken, what was passed over and why; nothing else does."""
    data = make_download(place / "data")
    flags = ("--data", data, "--output-dir", place / "run", "--max-steps", 3)
    assert run_here(*TINY, *flags) == 0
    lines = re.sub(r"\d+ bytes not", "N bytes not", capsys.readouterr().out).splitlines()

    end = next(i for i, line in enumerate(lines) if line.startswith("encoder and projection head"))
    start_up = lines[: end + 1]
    assert len(start_up) <= 12
    counts = f"data {data}: 18 training images, 6 for validation, 2 classes"
    assert start_up[-len(said_of(data)) - 2 : -1] == [counts, *said_of(data)]


def test_its_run_is_evaluated_and_used(place, capsys, monkeypatch):
    """The table, train, predict and embed say the same of it, once, and leave out what is no
    picture."""
    monkeypatch.chdir(place)
    labels = ["--checkpoint", "run", "--steps", "1", "--labels-per-class", "2", "--seeds", "0"]
    table = [*labels, "--methods", "probe,finetune,untrained,pixels,knn20"]
    assert train_msn.run_program(finetune.main, table) == 0
    said = capsys.readouterr().err
    for line in said_of(place / "data"):
        known = line.startswith("pictures of more than 8 bits")  # from pretraining
        assert re.sub(r"\d+ bytes not", "N bytes not", said).count(line) == (0 if known else 1)
    assert train_msn.run_program(finetune.main, ["train", *labels]) == 0
    capsys.readouterr()

    pictures = 24 + 1 - 1  # the stray is a picture, too
    assert train_msn.run_program(finetune.main, ["predict", "run/classifier", "data"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == pictures
    assert f"{pictures} pictures, 1 unreadable file skipped" in printed.err
    assert "data: passed over: 3 hidden, 2 .mov, 1 .txt" in printed.err
    assert train_msn.run_program(finetune.main, ["embed", "run", "data"]) == 0
    features = np.load(place / "features.npz")
    assert len(features["paths"]) == pictures and np.isfinite(features["features"]).all()
    dogs = [name for name in features["paths"] if "holidays" in name]
    assert len(dogs) == 1 and features["classes"][list(features["paths"]).index(dogs[0])]
