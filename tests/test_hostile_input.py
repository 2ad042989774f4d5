"""Whatever is typed or found in a file gives one clear line.

Exit status 2 is for bad usage, 1 for a failure. First bad command lines, of all programs; then
damaged files of every kind that we read.
"""

import importlib
import io
import json
import re
import socket
import subprocess
import sys
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import ROOT, TINY, make_pictures
from test_data import python2_batch, some_images

import train_msn
from train_msn import UsageError, make_config, run_program
from vitmsn import ViTMSNConfig, ViTMSNForImageClassification, ViTMSNModel, read_tensors

# --- bad command lines ----------------------------------------------------------------------------

# Program, flags, exit status, what the line says. Capitals stand for the paths of the fixture
# `places`.
OWN_ROWS = [
    ("train_msn", "--nonsense 1", 2, "--nonsense"),
    ("train_msn", "picture.jpg", 2, "picture.jpg"),
    ("train_msn", "--seed", 2, "expected one argument"),
    ("train_msn", "--recipe demu", 2, "demo, cifar10, imagenette"),
    (
        "train_msn",
        "--image-size 30",
        2,
        "use patch_size 1 or 2, or views of a multiple of 4",
    ),
    ("train_msn", "--focal-size 15", 2, "a view of 15"),
    ("train_msn", "--patch-size 64", 2, "multiple of 64"),
    ("train_msn", "--random-views 0 --focal-views 0", 2, "at least one anchor view"),
    ("train_msn", "--num-attention-heads 5", 2, "num_attention_heads=5"),
    ("train_msn", "--mask-ratio 0.995", 2, "leaves none"),
    ("train_msn", "--crop-scale 0.8 0.2", 2, "crop_scale"),
    ("train_msn", "--blur-sigma 1", 2, "expected 2 arguments"),
    ("train_msn", "--device cuda", 2, "no cuda device"),
    ("train_msn", "--data nowhere", 2, "nowhere is not found"),
    ("train_msn", "--data FILE", 2, "notes.txt is a file; --data takes"),
    ("train_msn", "--data EMPTY", 2, "holds no image"),
    ("train_msn", "--batch-size 400", 2, "24 training images"),
    ("train_msn", "--output-dir FILE", 2, "notes.txt is a file"),
    ("train_msn", "--output-dir FILE/run", 1, "notes.txt"),
    ("train_msn", "--output-dir BROKEN --resume", 1, "can be read"),
    ("train_msn", "--init-from FILE", 1, "notes.txt can't be read"),
    ("bench", "nonsense", 2, "nonsense"),
    ("train_msn", "--init-from EMPTY", 1, "holds none of"),
    ("train_msn", "--init-from OTHER", 1, "weights are missing"),
    ("train_msn", "--init-from nowhere", 1, "nowhere is neither a file nor a folder"),
    ("finetune", "--nonsense 1", 2, "--nonsense"),
    ("finetune", "--device cuda --checkpoint OTHER --data DATA", 2, "no cuda device"),
    ("bench", "--threads -1", 2, "threads=-1"),
    ("bench", "--device cuda", 2, "GPU"),
    ("bench", "--repeats none", 2, "--repeats"),
    ("bench", "--preset huge-1", 2, "huge-1"),
    ("bench", "train --threads 1 --lr -1", 2, "lr=-1.0"),
    ("bench", "--batch-sizes 0 --threads 1", 2, "batch-sizes"),
    (
        "bench",
        "train --threads 1 --hidden-size 10 --num-attention-heads 3",
        2,
        "num_attention_heads=3",
    ),
]


def field_rows(program: str, config_class: type) -> list[tuple]:
    """Rows like those above: each field out of its range on both sides, of a wrong kind, and not
    among its choices."""
    rows = []
    for f in fields(config_class):
        flag = "--" + f.name.replace("_", "-")
        if "choices" in f.metadata or f.type is bool:
            rows.append((program, f"{flag}=nonsense", 2, flag))
        elif "range" in f.metadata:
            command = "predict OTHER FILE " if f.name == "top" else ""  # of no use to the table
            low, high = f.metadata["range"]
            is_pair = f.type is tuple
            if f.type is int:
                values = [low - 1, high + 1]
            else:
                unit = high / 10 + 1e-6
                values = [low - unit, high + unit, "nan", "inf"]
            for value in values:
                given = f"{flag} {value} {high}" if is_pair else f"{flag}={value}"
                rows.append((program, command + given, 2, f"{f.name}="))
            given = f"{flag} x {high}" if is_pair else f"{flag} x"
            rows.append((program, command + given, 2, flag))
    return rows


def module_of(program: str):
    """The program as a module, or None if its file is not there."""
    return importlib.import_module(program) if (ROOT / f"{program}.py").is_file() else None


ROWS = list(OWN_ROWS)
for program, name in (("train_msn", "TrainConfig"), ("finetune", "FinetuneConfig")):
    if module_of(program):
        ROWS += field_rows(program, getattr(module_of(program), name))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the capitals in the rows stand for."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "notes.txt").write_text("neither a folder nor a checkpoint")
    for name in ("empty", "broken"):
        (folder / name).mkdir()
    (folder / "broken" / "checkpoint.pt").write_bytes(b"cut off")
    config = ViTMSNConfig(8, 1, 1, 8, image_size=16, patch_size=8)
    ViTMSNModel(config).save_pretrained(folder / "other")
    return {
        "FILE": folder / "notes.txt",
        "EMPTY": folder / "empty",
        "OTHER": folder / "other",
        "BROKEN": folder / "broken",
        "DATA": make_pictures(folder / "data"),
    }


def complaint(main, arguments: list[str], capsys) -> tuple[int, str]:
    """Exit status, and the one line that says what was wrong.

    argparse puts a line of usage before it.
    """
    try:
        status = run_program(main, arguments)
    except SystemExit as stop:
        status = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    last = lines.pop()
    assert "error: " in last and len(last) < 500
    assert len(lines) < 2 and all(
        line.startswith("usage: ") or "Trying the checkpoint" in line for line in lines
    )
    return status, last


@pytest.mark.parametrize(
    "program, flags, status, says", ROWS, ids=[f"{row[0]} {row[1]}" for row in ROWS]
)
def test_a_bad_command_line_is_one_clear_line(
    program, flags, status, says, places, tmp_path, monkeypatch, capsys
):
    """A bad value is named in one line, with the exit status of bad usage; nothing is written."""
    module = module_of(program)
    if module is None:
        pytest.skip(f"there is no {program}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = [
        re.sub(r"^[A-Z]+(?=/|$)", lambda found: str(places[found[0]]), part)
        for part in flags.split()
    ]
    own = [*TINY, "--data", str(places["DATA"])] if program == "train_msn" else []
    seen_status, line = complaint(module.main, [*own, *given], capsys)
    assert (seen_status, says in line) == (status, True), line
    assert not list(tmp_path.rglob("*"))  # nothing was begun


@pytest.mark.parametrize("f", fields(train_msn.TrainConfig), ids=lambda f: f.name)
def test_settings_of_a_wrong_kind_are_named(f):
    """In Python too, a setting that is no number, text or pair of its kind is refused by name."""
    none_that_fits = (None, b"1", 1j, [1, 2, 3], {}, (), float("nan"), torch.ones(2))
    for value in (*none_that_fits, "x", True, -1, 10**30):
        is_refused_by_value = "choices" in f.metadata or f.type in (int, float)
        if f.type is not type(value) or is_refused_by_value:
            with pytest.raises(UsageError, match=f"{f.name}="):
                train_msn.TrainConfig(**{f.name: value})


def test_debug_gives_the_traceback_and_a_program_its_exit_status():
    """--debug lets the error through; without it, a program prints one line and exits with 2."""
    with pytest.raises(UsageError, match="epochs=0"):
        run_program(train_msn.main, ["--epochs", "0", "--debug"])
    command = [sys.executable, ROOT / "train_msn.py", "--epochs", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "epochs=0" in done.stderr


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"RANK": "1"}, ""),
        ({"RANK": "0"}, ""),
        ({"RANK": "0", "TAKEN": "1"}, "in use"),
        ({"RANK": "7"}, "7"),
        ({"RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"RANK": "0", "MASTER_PORT": "no"}, "no"),
        ({"RANK": "none"}, "none"),
        ({"WORLD_SIZE": "two"}, "two"),
    ],
)
def test_processes_that_cannot_join_never_run_alone(
    environment, says, places, tmp_path, monkeypatch, capsys
):
    """A process whose group does not come together stops with one line; it never trains alone."""
    monkeypatch.setattr(train_msn, "TIMEOUT", timedelta(seconds=1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        if "TAKEN" in environment:
            taken.listen()
        else:
            taken.close()
        launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in (launcher | environment).items():
            if value:
                monkeypatch.setenv(name, value)
            else:
                monkeypatch.delenv(name, raising=False)
        try:
            own = ["--data", str(places["DATA"]), "--output-dir", str(tmp_path / "run")]
            status = run_program(train_msn.main, [*TINY, *own])
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    assert status in (1, 2) and not (tmp_path / "run").exists()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and says in line, line


# --- arbitrary content of files -------------------------------------------------------------------


SMALLEST = {
    "image_size": 8,
    "patch_size": 4,
    "focal_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_hidden_size": 6,
    "output_dim": 4,
    "num_prototypes": 3,
}


def build():
    """A tiny run's settings, model and optimizer."""
    config = make_config(SMALLEST)
    model = train_msn.build_model(config, train_msn.Processes(0, 1, torch.device("cpu")))
    groups = train_msn.parameter_groups(model, config.weight_decay)
    return config, model, torch.optim.AdamW(groups, fused=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One valid file of every kind: name -> content."""
    folder = tmp_path_factory.mktemp("whole")
    config, model, optimizer = build()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    images = train_msn.ImagesInMemory(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    data = train_msn.Images([], images, None, None, None)
    train_msn.save_checkpoint(folder, model, optimizer, config, data, 3, 1.0)
    for suffix in ("png", "jpg", "gif", "tif", "webp", "bmp"):
        Image.effect_noise((9, 7), 80).convert("RGB").save(folder / f"picture.{suffix}")
    ViTMSNForImageClassification(config.model_config()).save_pretrained(folder)
    (folder / "batch").write_bytes(python2_batch(*some_images(2)))
    torch.save({"a": torch.ones(3)}, folder / "old.bin", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(content: bytes, changes: list, end: int | None) -> bytes:
    """The content with pieces replaced, each (place, bytes removed, bytes put in), and cut off."""
    for at, removed, new in changes:
        content = content[:at] + new + content[at + removed :]
    return content[:end]


def mutated(content: bytes):
    """Cut, overwritten in a few places, or with a piece put in."""
    place = st.integers(0, len(content) - 1)
    changes = st.lists(st.tuples(place, st.integers(0, 2), st.binary(max_size=8)), max_size=4)
    return st.builds(edit, st.just(content), changes, place | st.none())


TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value, dtype=torch.float32).to(dtype),
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from([torch.float32, torch.int64]),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([[], {}, [1], {"a": 1}, [[]], 10**400, -1, 0, "../x", "\ud800"]),
)


def paths_in(value, path: tuple = ()) -> list[tuple]:
    """Every place in a nested dict, as the keys that lead to it."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += paths_in(inner, (*path, key))
    return found


def replaced(content: dict, path: tuple, action: int, value) -> dict:
    """The dict with another value at a place (action 0), without it (1), with one beside it (2)."""
    content = dict(content)
    if len(path) > 1:
        content[path[0]] = replaced(content[path[0]], path[1:], action, value)
    elif action == 1:
        del content[path[0]]
    else:
        content[path[0] if action == 0 else f"{path[0]}.more"] = value
    return content


def changes(content: dict, values=VALUES):
    """One thing to change in a nested dict: the arguments of `replaced`."""
    return st.tuples(st.sampled_from(paths_in(content)), st.integers(0, 2), values)


def load_image_file(content: bytes, folder: Path):
    (folder / "picture.png").write_bytes(content)
    Image.new("RGB", (2, 2)).save(folder / "good.png")
    files = train_msn.ImageFiles([folder / "good.png"], 16, 0)
    files.paths.append(folder / "picture.png")
    batch = files.__getitems__([1])
    assert batch.pixels.dtype == torch.uint8 and batch.indices == [not batch.unreadable]
    if batch.unreadable:
        raise ValueError("refused")


def load_config(content: bytes, folder: Path):
    (folder / "config.json").write_bytes(content)
    config = ViTMSNConfig.from_pretrained(folder)
    assert ViTMSNConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def load_index(content: bytes, folder: Path):
    (folder / "model.safetensors.index.json").write_bytes(content)
    read_tensors(folder / "model.safetensors.index.json")


def load_cifar(content: bytes, folder: Path):
    (folder / "batch").write_bytes(content)
    images, labels = train_msn.read_cifar_batch(folder / "batch")
    assert images.shape == (len(labels), 3, 32, 32) and set(labels.tolist()) <= set(range(10))


def load_weights(content: bytes | dict, folder: Path):
    """By all that takes a file of weights. What is taken is finite and of the right shape."""
    (folder / "config.json").write_text(json.dumps(build()[0].model_config().to_dict()))
    for name in ("checkpoint.pt", "pytorch_model.bin"):
        if isinstance(content, dict):
            torch.save(content, folder / name)
        else:
            (folder / name).write_bytes(content)

    refused = []
    for load in (load_encoder, load_classifier, init_pretraining, resume):
        try:
            model = load(folder)
        except (ValueError, OSError) as error:
            refused.append(str(error))
        else:
            assert all(torch.isfinite(p).all() for p in model.parameters())
    if refused:
        raise ValueError(f"{len(refused)} refused it: {refused}")


def load_encoder(folder: Path) -> torch.nn.Module:
    return ViTMSNModel.from_pretrained(folder / "checkpoint.pt")


def load_classifier(folder: Path) -> torch.nn.Module:
    path = folder / "pytorch_model.bin"
    return ViTMSNForImageClassification.from_pretrained(path, num_labels=3)


def init_pretraining(folder: Path) -> torch.nn.Module:
    _, model, _ = build()
    model.load_pretrained(folder / "checkpoint.pt")
    return model


def resume(folder: Path) -> torch.nn.Module:
    """As --resume does; one step shows that what was taken for the optimizer's state is one."""
    _, model, optimizer = build()
    _, content = train_msn.settle({"output_dir": str(folder), "resume": True}, folder, "demo")
    train_msn.restore(content, model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model


def load_list(content: bytes, folder: Path):
    finetune = module_of("finetune") or pytest.skip("there is no finetune.py")
    (folder / "list.txt").write_bytes(content)
    Image.new("RGB", (2, 2)).save(folder / "good.png")
    images = train_msn.ImageFiles([folder / "good.png"], 16, 0)
    finetune.read_label_list(folder / "list.txt", images)


def changed_json(content: dict):
    """The bytes of a JSON file: the content with one change, or another value."""
    changed = changes(content).map(lambda change: replaced(content, *change))
    return (changed | VALUES).map(json.dumps).map(str.encode)


def targets(whole: dict) -> dict:
    """What is tried: name -> (contents, what reads them)."""
    few_bytes = st.binary(max_size=64)
    pictures = st.sampled_from([v for name, v in whole.items() if name.startswith("picture")])
    checkpoint = torch.load(io.BytesIO(whole["checkpoint.pt"]), weights_only=True)
    config = json.loads(whole["config.json"])
    index = {"metadata": {}, "weight_map": {"a": "old.bin", "b": "b.bin"}}

    configs = few_bytes | mutated(whole["config.json"]) | changed_json(config)
    weights = few_bytes | mutated(whole["checkpoint.pt"]) | mutated(whole["old.bin"])
    lists = few_bytes | st.text().map(lambda text: text.encode("utf-16"))

    def load_changed(change: tuple, folder: Path):
        load_weights(replaced(checkpoint, *change), folder)

    return {
        "image": (few_bytes | pictures.flatmap(mutated), load_image_file),
        "config.json": (configs, load_config),
        "index": (few_bytes | changed_json(index), load_index),
        "CIFAR batch": (few_bytes | mutated(whole["batch"]), load_cifar),
        "label list": (lists, load_list),
        "weights": (weights, load_weights),
        "checkpoint": (changes(checkpoint, VALUES | TENSORS), load_changed),
    }


KINDS = ("image", "config.json", "index", "CIFAR batch", "label list", "weights", "checkpoint")


def tried(kind: str, whole: dict, folder: Path, examples: int) -> tuple[int, int]:
    """Try so many contents; anything but a clean error fails.

    -> how many were tried, and how many of them were refused.
    """
    contents, load = targets(whole)[kind]
    counts = [0, 0]

    @settings(max_examples=examples, phases=[Phase.generate])  # to shrink takes minutes
    @given(contents)
    def trial(content):
        counts[0] += 1
        try:
            load(content, folder)
        except (ValueError, OSError) as error:  # UsageError is a ValueError
            counts[1] += 1
            assert str(error)

    trial()
    return counts[0], counts[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_any_content_of_a_file_is_read_or_refused_by_a_clean_error(kind, whole, tmp_path):
    """Arbitrary bytes, damaged files and files with one thing changed never give another error."""
    tried(kind, whole, tmp_path, 25)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_thousand_malformed_inputs(whole, tmp_path, capsys):
    """The same with 400 contents of each kind, counted."""
    total = refused = 0
    for kind in KINDS:
        number, bad = tried(kind, whole, tmp_path, 400)
        total, refused = total + number, refused + bad
        with capsys.disabled():
            print(f"{kind}: {number} inputs tried, {bad} refused, the others read")
    with capsys.disabled():
        print(f"{total} malformed inputs tried, {refused} refused, none by another error")
    assert total >= 2000 and refused > total / 2


@pytest.mark.parametrize(
    "path, value, says",
    [
        ("prototypes", torch.zeros(1, 4), "prototypes"),
        ("prototypes", torch.tensor(0.0), "prototypes"),
        ("prototypes", torch.full((3, 4), float("nan")), "not finite"),
        ("encoder/norm.bias", None, "norm.bias"),
        ("optimizer/state/3", None, "exp_avg"),
        ("encoder/norm.bias", torch.full((8,), float("inf")), "not finite"),
        ("encoder/norm.bias", torch.zeros(9), "norm.bias"),
        ("encoder/norm.bias", 3, "norm.bias"),
        ("target_encoder/norm.more", torch.zeros(8), "norm.more"),
        ("encoder", {}, "Missing"),
        ("optimizer", {}, "fit"),
        ("optimizer/state/0/exp_avg", torch.zeros(1, 2), "exp_avg"),
        ("optimizer/state/0/exp_avg", "x", "does not fit"),
        ("optimizer/state/0/exp_avg_sq", torch.full((1, 1, 8), float("nan")), "not finite"),
        ("step", "3", "step"),
        ("optimizer/state/4/step", torch.tensor(-9.0), "step is not finite, negative"),
        ("step", None, "step"),
        ("elapsed", None, "elapsed"),
        ("config", [1], "config"),
        ("config/lr", "much", "lr"),
        ("config/hidden_size", 16, "size mismatch"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    path, value, says, whole, places, tmp_path, capsys
):
    """A checkpoint in which one thing is missing or wrong is refused, and that thing is named."""
    content = torch.load(io.BytesIO(whole["checkpoint.pt"]), weights_only=True)
    keys = tuple(int(key) if key.isdigit() else key for key in path.split("/"))
    content["config"] |= {"data": str(places["DATA"]), "batch_size": 6}
    torch.save(replaced(content, keys, int(value is None), value), tmp_path / "checkpoint.pt")
    status = run_program(
        train_msn.main, ["--output-dir", str(tmp_path), "--resume", "--changed-data"]
    )
    printed = capsys.readouterr().err
    assert status in (1, 2) and says in printed and "Traceback" not in printed
