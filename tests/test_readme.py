"""Every command and every snippet of the README runs, at a small size: none of them can rot."""

import importlib
import inspect
import re
import shlex

import pytest
import torch
from PIL import Image
from runs import ROOT, TINY, make_pictures, run_here

import train_msn
import vitmsn

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for language, block in BLOCKS
        if language == "bash"
        for line in block.replace("\\\n", " ").splitlines()
        if re.search(r"\w+\.py\b", line)
    }
)
# What makes a command small: it comes last, so it wins.
KNN = TINY.index("--knn-every")
SMALL = {
    "train_msn": (*TINY, "--max-steps", "2", "--knn-every", "0"),
    "learning": (*TINY[:KNN], *TINY[KNN + 2 :]),
    "finetune": ("--steps", "2", "--labels-per-class", "1,2", "--seeds", "0,1"),
    "bench": (
        "--hidden-size",
        "16",
        "--num-hidden-layers",
        "1",
        "--num-attention-heads",
        "2",
        "--patch-size",
        "8",
        "--image-size",
        "16",
        "--focal-size",
        "8",
        "--repeats",
        "1",
        "--threads",
        "1",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the README names: pictures, an original checkpoint, a run."""
    place = tmp_path_factory.mktemp("readme")
    data = make_pictures(place / "data")
    assert (
        run_here(
            *TINY, "--data", data, "--output-dir", place / "runs" / "demo-001", "--max-steps", "2"
        )
        == 0
    )
    Image.new("RGB", (40, 30), "red").save(place / "photo.jpg")
    content = vitmsn.read_tensors(place / "runs" / "demo-001" / "checkpoint.pt")
    torch.save(content, place / "vits16_800ep.pth.tar")
    vitmsn.ViTMSNForImageClassification(
        vitmsn.ViTMSNConfig.from_pretrained(place / "runs" / "demo-001" / "encoder")
    ).save_pretrained(place / "runs" / "demo-001" / "classifier")
    return place


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_readme_runs(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = shlex.split(command.rpartition("&&")[2])
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    module = importlib.import_module(words[script][:-3])
    flags = [re.sub(r"^(path/to/\w+|\.\.\.)$", "data", word) for word in words[script + 1 :]]
    if "cifar10" in flags:
        flags += ["--data", "data"]  # there is nothing to download it from
    subcommand = (
        flags[:1]
        if flags and flags[0] in ("predict", "attention", "embed", "neighbours", "train")
        else []
    )
    small = () if module.__name__ == "finetune" and subcommand else SMALL[module.__name__]
    if flags[:1] == ["learning"]:
        small = SMALL["learning"]
        flags[flags.index("epochs=60")] = "epochs=1"
    status = train_msn.run_program(module.main, [*flags, *small])
    printed = capsys.readouterr()
    assert status == 0, printed.err


@pytest.mark.parametrize("snippet", [block for language, block in BLOCKS if language == "python"])
def test_each_snippet_of_the_readme_runs(snippet, place, monkeypatch):
    monkeypatch.chdir(place)
    for package in ("transformers", "peft", "timm"):
        if re.search(rf"^(from|import) {package}\b", snippet, re.MULTILINE):
            pytest.importorskip(package)
    if "torch.onnx" in snippet:
        pytest.importorskip("onnxscript")
    exec(snippet.replace("facebook/vit-msn-small", "runs/demo-001/encoder"), {})


def test_the_loop_comes_before_line_500():
    """A reader of train_msn.py is at the end of the training loop within its first 500 lines."""
    lines, first = inspect.getsourcelines(train_msn.train)
    assert first + len(lines) <= 500
