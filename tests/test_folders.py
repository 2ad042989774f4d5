"""What a tree of pictures is: which files are pictures, to train on or to validate with.

Whatever is passed over is counted and said.
"""

import numpy as np
import pytest
import torch
from common import tiny_backbone
from hypothesis import given
from hypothesis import strategies as st
from runs import TINY, make_grey_pictures, make_pictures, run_here, save_picture

import finetune
import train_msn
from train_msn import UsageError, find_pictures, folder_images, make_config, sort_pictures
from vitmsn import PictureRules

CACHE = 2**20
RAMP = np.arange(0, 252, 7, dtype=np.uint8).reshape(6, 6)
TREE = ("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")


def open_tree(folder, *names):
    """A folder of pictures of these names (other files get text), opened."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in train_msn.picture_endings():
            save_picture(path, RAMP)
        else:
            path.write_text(f"file {i}")
    return folder_images(folder, 8, CACHE)


def names_of(images, folder) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in images.paths]


# -- classes and labels ----------------------------------------------------------------------------


def test_a_folder_of_classes_has_labels_and_validation_images(tmp_path):
    """train/CLASS/* and val/CLASS/* give class names in order, labels, and validation images."""
    names = ("train/b/1.png", "train/a c/2.JPG", "train/ä/3.webp", "val/ä/4.bmp")
    data = folder_images(make_grey_pictures(tmp_path, *names), 8, CACHE)
    assert data.classes == ["a c", "b", "ä"] and [len(data.train), len(data.val)] == [3, 1]
    assert data.train_labels.tolist() == [0, 1, 2] and data.val_labels.tolist() == [2]
    assert data.val.__getitems__([0]).pixels.unique().tolist() == [30]
    assert data.why_no_labels == ""


def test_the_class_is_the_first_folder_below_the_split_however_deep(tmp_path):
    """Folders inside of a class folder change nothing."""
    names = ("train/a/1.png", "train/a/x/y/2.png", "train/b/x/3.png", "val/a/deep/4.png")
    data = open_tree(tmp_path, *names)
    assert data.classes == ["a", "b"] and data.train_labels.tolist() == [0, 0, 1]
    assert data.val_labels.tolist() == [0] and not data.notes


def test_a_class_written_in_two_ways_is_one(tmp_path):
    """ä as one letter and as an a with dots, as another file system writes it, are one class."""
    data = open_tree(tmp_path, "train/\u00e4/1.png", "train/b/2.png", "val/a\u0308/3.png")
    assert data.classes == ["b", "\u00e4"] and data.val_labels.tolist() == [1]


def test_strays_beside_the_class_folders_are_named_and_passed_over(tmp_path):
    """A few pictures in no class folder cost neither the labels nor the k-NN."""
    data = open_tree(tmp_path, *TREE, "train/cover.png", "val/cover.png", "cover.png")
    assert names_of(data.train, tmp_path) == list(TREE[:2])
    assert names_of(data.val, tmp_path) == list(TREE[2:])
    (line,) = data.notes
    assert "2 in no class folder (train/cover.png, val/cover.png)" in line
    assert "1 outside of train/ and val (cover.png)" in line


@pytest.mark.parametrize(
    "names, says",
    [
        (("1.png", "2.png"), "has no folder val"),
        (("deep/er/1.png", "deep/2.png"), "has no folder val"),
        (("train/1.png", "train/2.png"), "has no folder val"),
        (("train/a/1.png", "train/b/2.png"), "has no folder val"),
        (("train/1.png", "train/2.png", "val/a/3.png"), "2 of 2 pictures in .*train are in no"),
        (("train/a/1.png", "train/b/2.png", "val/3.png"), "1 of 1 pictures in .*val are in no"),
        (
            ("train/a/1.png", "train/b/2.png", "val/c/3.png"),
            "val.c is of a class that .*train lacks",
        ),
    ],
)
def test_without_labels_all_training_images_are_taken_and_the_reason_is_said(names, says, tmp_path):
    """Pretraining needs no labels: it goes on without validation, and says why."""
    data = open_tree(tmp_path, *names)
    assert len(data.train) == 2 and data.train_labels is data.val is data.val_labels is None
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(data.why_no_labels)
    assert data.notes == (f"no labels, so no k-NN: {data.why_no_labels}",)


# -- splits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("val", ["val", "Val", "VALID", "validation", "test", "Test"])
@pytest.mark.parametrize("train", ["train", "Train", "training"])
def test_the_split_is_known_by_its_usual_names_whatever_their_case(train, val, tmp_path):
    """Each usual name of train and val does what the plain one does; another name is said."""
    names = [name.replace("train", train).replace("val", val) for name in TREE]
    data = open_tree(tmp_path, *names)
    assert data.classes == ["a", "b"] and names_of(data.val, tmp_path) == names[2:]
    assert names_of(data.train, tmp_path) == names[:2]
    assert len(data.notes) == (train != "train") + (val != "val")


def test_of_several_folders_to_validate_with_val_comes_first_and_none_is_trained_on(tmp_path):
    """val before valid before test; the line says which one counts and which do not."""
    more = ("test/a/5.png", "valid/b/6.png")
    data = open_tree(tmp_path, *TREE, *more)
    assert names_of(data.val, tmp_path) == list(TREE[2:]) and len(data.train) == 2
    assert data.notes[0].endswith("val, not those in valid, test")
    for name in TREE[2:]:
        (tmp_path / name).unlink()
    data = folder_images(tmp_path, 8, CACHE)
    assert names_of(data.val, tmp_path) == ["valid/b/6.png"] and len(data.train) == 2


def test_without_a_folder_train_all_but_the_validation_images_are_trained_on(tmp_path):
    """Classes beside a folder test: they are the training images, with labels."""
    data = open_tree(tmp_path, "a/1.png", "b/2.png", "b/3.png", "test/a/4.png", "test/b/5.png")
    assert data.classes == ["a", "b"] and data.train_labels.tolist() == [0, 1, 1]
    assert data.val_labels.tolist() == [0, 1]


def test_the_split_may_lie_in_a_folder_within_the_folder(tmp_path):
    """An archive that was unpacked into a folder of its own is found there, which is said."""
    data = open_tree(tmp_path, *(f"pets/v2/{name}" for name in TREE), "notes.txt")
    assert data.classes == ["a", "b"] and len(data.train) == len(data.val) == 2
    assert any(str(tmp_path / "pets" / "v2" / "train") in note for note in data.notes)


FOLDERS = st.lists(st.sampled_from(["train", "val", "test", "Val", "a", "b"]), max_size=3)


@given(st.lists(FOLDERS, min_size=1, max_size=12))
def test_every_picture_is_trained_on_validated_with_or_counted_once(tmp_path_factory, trees):
    """Whatever the tree: no picture is both, none vanishes, and none of val is trained on."""
    folder = tmp_path_factory.mktemp("tree")
    paths = [folder.joinpath(*parts, f"{i}.png") for i, parts in enumerate(trees)]
    found = train_msn.FoundFiles(folder, sorted(paths), {})
    try:
        tree = sort_pictures(found)
    except UsageError:
        assert all({"val", "test", "Val"} & {*parts} for parts in trees)
        return
    passed_over = [path for paths in found.passed_over.values() for path in paths]
    assert sorted([*tree.train, *tree.val, *passed_over]) == sorted(paths)
    if not tree.why_no_labels:
        assert all(path.parent != tree.train_folder for path in tree.train)


# -- what is no picture ----------------------------------------------------------------------------


def test_what_a_desktop_a_notebook_or_a_file_server_leaves_behind_is_no_picture(tmp_path):
    """Hidden files and folders are neither classes nor pictures, anywhere; they are counted."""
    hidden = (
        ".DS_Store",
        "train/.ipynb_checkpoints/1-checkpoint.png",
        "train/a/._1.png",
        "val/b/@eaDir/4.png",
        "__MACOSX/train/a/1.png",
    )
    data = open_tree(tmp_path, *TREE, *hidden)
    assert data.classes == ["a", "b"] and len(data.train) == len(data.val) == 2
    assert data.notes == ("passed over: 5 hidden",)
    assert len(find_pictures(tmp_path).pictures) == 4


def test_a_hidden_folder_that_is_asked_for_is_opened(tmp_path):
    """Only names below the folder count, not those on the way to it."""
    data = open_tree(tmp_path / ".cache" / "pets", *TREE)
    assert len(data.train) == 2 and data.notes == ()


def test_pictures_are_what_pillow_can_open_and_all_else_is_counted_by_ending(tmp_path):
    """All endings that Pillow registers are taken; others are counted, by ending."""
    save_picture(tmp_path / "1.JFIF", RAMP, format="jpeg")
    save_picture(tmp_path / "2.jp2", RAMP)
    save_picture(tmp_path / "3.tga", RAMP)
    for name in ("notes.txt", "a.mp4", "b.MP4", "c.mpg", "README", "d.xyz"):
        (tmp_path / name).write_text("text")
    data = folder_images(tmp_path, 8, CACHE)
    assert names_of(data.train, tmp_path) == ["1.JFIF", "2.jp2", "3.tga"]
    counts = "2 .mp4, 1 without an ending (README), 1 .xyz, 1 .mpg, 1 .txt"
    assert set(data.notes[-1].removeprefix("passed over: ").split(", ")) == set(counts.split(", "))


@pytest.mark.parametrize(
    "names, says",
    [
        ((), "holds no image .* it is empty"),
        (("a.txt", "b/c.heix"), "holds no image .* 1 .txt, 1 .heix"),
        (("val/a/1.png", "train/readme.md"), "all of them are in val; to train on those"),
        (None, "nowhere is not found"),
    ],
)
def test_folders_that_cannot_be_trained_on_are_refused(names, says, tmp_path):
    """A folder without images to train on is refused with the reason."""
    with pytest.raises(UsageError, match=says):
        if names is None:
            folder_images(tmp_path / "nowhere", 8, CACHE)
        open_tree(tmp_path, *names)


def test_links_are_followed_but_not_in_circles(tmp_path):
    """Class folders may be symbolic links; links in a circle do no harm and are counted."""
    folder = make_pictures(tmp_path / "data")
    direct = train_msn.open_data(make_config({"data": str(folder)}))
    for part in ("train", "val"):
        (tmp_path / "links" / part).mkdir(parents=True)
        for name in (folder / part).iterdir():
            (tmp_path / "links" / part / name.name).symlink_to(name)
            (name / "circle").symlink_to(name)
    (tmp_path / "links" / "train" / "gone.png").symlink_to(tmp_path / "nowhere")
    linked = train_msn.open_data(make_config({"data": str(tmp_path / "links")}))
    assert linked.classes == direct.classes and linked.train_labels.equal(direct.train_labels)
    assert [p.name for p in linked.train.paths] == [p.name for p in direct.train.paths]
    assert "4 links back up" in linked.notes[0] and "1 no files" in linked.notes[0]


# -- programs --------------------------------------------------------------------------------------


def test_a_run_says_what_it_took_in_at_most_twelve_lines(tmp_path, capsys):
    """A tree with everything at once trains, and its first lines count all that is passed over."""
    folder = make_pictures(tmp_path / "data")
    (folder / "val").rename(folder / "Validation")
    for i in range(20):
        (folder / f"file.kind{i}").write_text("text")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    for name in ("train/cover.png", "test/1.png", "extra/1.png"):
        save_picture(folder / name, RAMP)
    flags = ("--data", folder, "--output-dir", tmp_path / "run", "--max-steps", 1)
    assert run_here(*TINY, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines[: 1 + next(i for i, line in enumerate(lines) if "M parameters" in line)]
    assert len(start) <= 12
    said = "\n".join(start)
    for fact in (
        "24 training images, 6 for validation, 2 classes",
        f"validation images are those in {folder / 'Validation'}, not those in test",
        "2 outside of train/ and val (extra/1.png, test/1.png)",
        "1 in no class folder (train/cover.png)",
        "1 hidden",
        "for other reasons",
    ):
        assert fact in said


def test_what_needs_labels_names_the_folder_and_the_reason(tmp_path):
    """Pretraining goes on with pictures in val/ itself; the label table can't, and says why."""
    for name in ("train/a/1.png", "train/b/2.png", "val/3.png"):
        save_picture(tmp_path / name, RAMP)
    with pytest.raises(UsageError, match=r"takes labels, .*val are in no class folder") as refusal:
        finetune.open_labelled_data(str(tmp_path), {}, tiny_backbone(), PictureRules())
    assert str(tmp_path / "val") in str(refusal.value)


def test_a_column_with_too_few_pictures_is_left_out_alone():
    """A class that is smaller than a column asks for costs that column, not the table."""
    labels = torch.tensor([0] * 8 + [1] * 3)
    pixels = torch.zeros(11, 3, 8, 8, dtype=torch.uint8)
    images = train_msn.ImagesInMemory(pixels)
    data = train_msn.Images(["many", "few"], images, labels, images, labels)
    config = finetune.FinetuneConfig(labels_per_class="1,5,2", fraction="", methods="probe")
    columns, _ = finetune.draw_columns(config, data, set())
    assert list(columns) == ["1/class", "2/class", "100 %"]
    with pytest.raises(UsageError, match="class few has 3 images"):
        config = finetune.FinetuneConfig(labels_per_class="5", fraction="", full=False)
        finetune.draw_columns(config, data, set())
