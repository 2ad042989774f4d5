"""Reading and writing weights: nothing is lost, nothing guessed, nothing in a file executed."""

import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from common import (
    randn,
    randomized,
    tiny_backbone,
    tiny_classifier,
    tiny_config,
    tiny_pretraining,
)
from torch.testing import assert_close

from vitmsn import (
    MSNEncoder,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTMSNForPreTraining,
    ViTMSNModel,
    from_original,
    from_transformers,
    interpolate_positions,
    to_original,
    to_transformers,
    without_projection_head,
)

IMAGES = randn(2, 3, 32, 32)


def backbone(**changes) -> ViTMSNModel:
    return tiny_backbone(**changes).eval()


def classifier(**changes) -> ViTMSNForImageClassification:
    return tiny_classifier(**changes).eval()


def same_weights(weights: dict, other: dict) -> bool:
    """Whether two state dicts have the same names and, bit for bit, the same tensors."""
    return weights.keys() == other.keys() and all(weights[n].equal(other[n]) for n in weights)


def same(model, other) -> bool:
    return same_weights(model.state_dict(), other.state_dict())


def saved(model, folder: Path, write) -> Path:
    """The folder of save_pretrained, its weights written again by `write(weights, folder)`."""
    model.save_pretrained(folder)
    for file in folder.glob("*model*"):
        file.unlink()
    write(to_transformers(model.state_dict(), model.config.num_channels), folder)
    return folder


def as_bin(weights: dict, folder: Path) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


def sharded(weights: dict, folder: Path) -> None:
    names = sorted(weights)
    shards = {
        "pytorch_model-00001-of-00002.bin": names[::2],
        "pytorch_model-00002-of-00002.bin": names[1::2],
    }
    for shard, members in shards.items():
        torch.save({name: weights[name] for name in members}, folder / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def sharded_safetensors(weights: dict, folder: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    sharded(weights, folder)
    for file in folder.glob("*.bin"):
        name = file.name.replace("pytorch_", "").replace(".bin", ".safetensors")
        save_file(torch.load(file), folder / name)
        file.unlink()

    old_index = folder / "pytorch_model.bin.index.json"
    text = old_index.read_text().replace("pytorch_", "").replace(".bin", ".safetensors")
    old_index.unlink()
    (folder / "model.safetensors.index.json").write_text(text)


def original_file(
    path: Path, model: ViTMSNForPreTraining | MSNEncoder, prefix: str = "module.", **more
) -> Path:
    """A checkpoint as the official code writes it, with the model's target encoder."""
    encoder = model.target_encoder if isinstance(model, ViTMSNForPreTraining) else model
    weights = to_original(encoder.state_dict(), encoder.config.num_channels)
    prefixed = {prefix + name: value for name, value in weights.items()}
    torch.save({"target_encoder": prefixed, **more}, path)
    return path


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [backbone, classifier])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": False},
        {"num_channels": 1},
        {"image_size": 35},
        {"num_labels": 0},
        {"extra": {"mystery": [1]}},
    ],
)
def test_save_then_load_gives_the_same_model(make, changes, tmp_path):
    """What save_pretrained writes, from_pretrained reads: weights and config are equal."""
    model = make(**changes)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same(loaded, model)
    assert not loaded.training

    values = loaded.config.to_dict()
    values.pop("torch_dtype")  # of the stored weights, no part of the architecture
    assert values == model.config.to_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [type(model).__name__]
    assert written["model_type"] == "vit_msn"


@pytest.mark.parametrize("write", [as_bin, sharded, sharded_safetensors])
@pytest.mark.parametrize("make", [backbone, classifier])
def test_every_container_is_read(write, make, tmp_path):
    """One file or shards, of torch or safetensors, hold the same model."""
    model = make()
    assert same(type(model).from_pretrained(saved(model, tmp_path, write)), model)


def test_without_the_safetensors_package_a_bin_file_is_written(tmp_path, monkeypatch):
    """safetensors is optional for writing; reading its files says to install it."""
    model = classifier()
    model.save_pretrained(tmp_path / "with")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    model.save_pretrained(tmp_path / "without")
    assert (tmp_path / "without/pytorch_model.bin").is_file()
    assert same(ViTMSNForImageClassification.from_pretrained(tmp_path / "without"), model)
    if (tmp_path / "with/model.safetensors").is_file():
        with pytest.raises(ImportError, match="pip install safetensors"):
            ViTMSNForImageClassification.from_pretrained(tmp_path / "with")


def test_a_file_beside_its_config_can_be_named(tmp_path):
    """A weight file in a folder with config.json is as good as the folder."""
    model = classifier()
    saved(model, tmp_path, as_bin)
    assert same(ViTMSNForImageClassification.from_pretrained(tmp_path / "pytorch_model.bin"), model)


def test_a_backbone_reads_a_classifiers_folder_and_a_classifier_a_backbones(tmp_path):
    """Backbones and classifiers read each other's folders; a new head is announced."""
    model = classifier()
    model.save_pretrained(tmp_path / "classifier")
    body = ViTMSNModel.from_pretrained(tmp_path / "classifier")
    assert same(body, model.vit)
    body.save_pretrained(tmp_path / "backbone")
    with pytest.warns(
        UserWarning, match=r"new, drawn at random: classifier\.weight, classifier\.bias"
    ):
        again = ViTMSNForImageClassification.from_pretrained(tmp_path / "backbone")
    assert same(again.vit, body)
    assert 0 < again.classifier.weight.std() < 0.05 and (again.classifier.bias == 0).all()


def test_the_mask_token_is_written_read_and_announced(tmp_path):
    """The mask token is read if wanted, dropped if not, and announced if new."""
    model = randomized(ViTMSNModel(tiny_config(), use_mask_token=True))
    model.save_pretrained(tmp_path / "with")
    assert same(ViTMSNModel.from_pretrained(tmp_path / "with", use_mask_token=True), model)
    assert ViTMSNModel.from_pretrained(tmp_path / "with").mask_token is None
    backbone().save_pretrained(tmp_path / "without")
    with pytest.warns(UserWarning, match="new, drawn at random: mask_token"):
        ViTMSNModel.from_pretrained(tmp_path / "without", use_mask_token=True)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
def test_the_stored_dtype_is_kept_unless_another_is_asked_for(stored, tmp_path):
    """Loading keeps the stored dtype; torch_dtype and dtype change it."""
    model = backbone().to(stored)
    model.save_pretrained(tmp_path)
    for asked in (None, "auto"):
        loaded = ViTMSNModel.from_pretrained(tmp_path, torch_dtype=asked)
        assert loaded.pos_embed.dtype == stored and same(loaded, model)
    for asked in ({"torch_dtype": torch.float16}, {"dtype": "float16"}, {"torch_dtype": "float16"}):
        assert ViTMSNModel.from_pretrained(tmp_path, **asked).pos_embed.dtype == torch.float16


def test_the_attention_can_be_chosen_at_loading(tmp_path):
    """attn_implementation reaches all layers, and other names are refused."""
    backbone().save_pretrained(tmp_path)
    model = ViTMSNModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert {block.attn.implementation for block in model.blocks} == {"eager"}
    with pytest.raises(ValueError, match="attn_implementation"):
        ViTMSNModel.from_pretrained(tmp_path, attn_implementation="flash")


@pytest.mark.parametrize("make", [backbone, classifier])
@pytest.mark.parametrize("bias", [True, False])
def test_conversion_tables_are_inverse_and_reach_every_tensor(make, bias):
    """Converting to another layout and back gives every tensor back."""
    state = make(qkv_bias=bias, num_channels=2).state_dict()
    converted = to_transformers(state, 2)
    expected = {name.removeprefix("vit."): value for name, value in state.items()}
    assert same_weights(from_transformers(converted), expected)

    # Two of three parts are new where a fused tensor was: in two layers, of weight and bias.
    fused = 2 * (2 if bias else 1)
    assert len(converted) == len(state) + 2 * fused
    if make is backbone:
        assert same_weights(from_original(to_original(state, 2)), state)


# -- the original release and pretraining ----------------------------------------------------------


def original_model(**changes) -> ViTMSNForPreTraining:
    """A pretraining model whose heads are 64 wide, as in the release; its encoders differ."""
    config = tiny_config(hidden_size=128, num_attention_heads=2, intermediate_size=96, **changes)
    model = tiny_pretraining(config).eval()
    randomized(model.target_encoder, seed=1)
    return model


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("bias", [True, False])
def test_an_original_file_is_read_without_a_config(prefix, bias, tmp_path):
    """The shapes of a released checkpoint tell its config; the target encoder is read."""
    model = original_model(qkv_bias=bias)
    path = original_file(
        tmp_path / "vits16_800ep.pth.tar", model, prefix, prototypes=model.prototypes.data
    )
    loaded = ViTMSNModel.from_pretrained(path)
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
        "num_channels",
        "qkv_bias",
    ):
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    assert_close(loaded.representation(IMAGES), model.target_encoder.representation(IMAGES))
    with pytest.warns(UserWarning, match="classifier"):
        model_of_three = ViTMSNForImageClassification.from_pretrained(path, num_labels=3)
    assert model_of_three(IMAGES).logits.shape == (2, 3)


def test_an_original_file_with_other_heads_takes_a_config(tmp_path):
    """If heads are not 64 wide, a config has to say so."""
    encoder = randomized(MSNEncoder(tiny_config(), 20, 16)).eval()  # heads 8 wide
    path = original_file(tmp_path / "a.pth.tar", encoder)
    loaded = ViTMSNModel.from_pretrained(path, config=encoder.config)
    assert_close(loaded.representation(IMAGES), encoder.representation(IMAGES))


def test_pretraining_goes_on_from_an_original_file_with_its_head_and_prototypes(tmp_path):
    """Where all shapes fit, nothing stays new."""
    source = original_model()
    path = original_file(tmp_path / "a.pth.tar", source, prototypes=source.prototypes.data)
    model = ViTMSNForPreTraining(source.config, 20, 16, 12)
    assert model.load_pretrained(path) == []
    assert same(model.anchor_encoder, source.target_encoder)
    assert same(model.target_encoder, source.target_encoder)
    assert model.prototypes.equal(source.prototypes)


@pytest.mark.filterwarnings("ignore:.*new, drawn at random")
def test_pretraining_goes_on_from_a_backbone_alone_with_new_head_and_prototypes(tmp_path):
    """A backbone starts both encoders; head and prototypes stay new."""
    source = original_model().target_encoder
    body = ViTMSNModel(source.config)
    body.load_state_dict(without_projection_head(source.state_dict()))
    body.save_pretrained(tmp_path)
    model = ViTMSNForPreTraining(source.config, 20, 16, 12)
    new = model.load_pretrained(tmp_path)
    head = {f"fc.{name}" for name in model.anchor_encoder.fc.state_dict()}
    assert set(new) == head | {"prototypes"}
    for encoder in (model.anchor_encoder, model.target_encoder):
        assert_close(encoder.representation(IMAGES), body.representation(IMAGES))
    assert same(model.anchor_encoder, model.target_encoder)


@pytest.mark.filterwarnings("ignore:.*new, drawn at random")
def test_prototypes_of_another_head_are_left_out_and_positions_are_resampled(tmp_path):
    """Another head or grid: new head and prototypes, resampled positions."""
    source = original_model()
    path = original_file(tmp_path / "a.pth.tar", source, prototypes=source.prototypes.data)
    config = original_model(image_size=48).config
    model = ViTMSNForPreTraining(config, 24, 16, 12)
    start = model.prototypes.clone()
    assert "prototypes" in model.load_pretrained(path)
    assert model.prototypes.equal(start)
    resampled = interpolate_positions(source.target_encoder.pos_embed.data, (6, 6))
    assert_close(model.anchor_encoder.pos_embed.data, resampled)


# -- what does not fit is said ---------------------------------------------------------------------


def test_another_number_of_labels_is_refused_or_on_demand_announced(
    tmp_path,
):
    """A head of another size is refused, or on demand drawn anew and announced."""
    model = classifier()
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"classifier\.weight \(5, 24\) instead of \(7, 24\).*ignore_mismatched_sizes",
    ):
        ViTMSNForImageClassification.from_pretrained(tmp_path, num_labels=7)
    with pytest.warns(UserWarning, match="new, drawn at random: classifier"):
        loaded = ViTMSNForImageClassification.from_pretrained(
            tmp_path, num_labels=7, ignore_mismatched_sizes=True
        )
    assert loaded.config.num_labels == len(loaded.config.id2label) == 7
    assert loaded(IMAGES).logits.shape == (2, 7)
    assert same(loaded.vit, model.vit)


def test_mismatched_positions_are_named(tmp_path):
    """The error for a wrong shape names the weight and both shapes."""
    backbone().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "image_size": 48}))
    with pytest.raises(ValueError, match=r"pos_embed \(1, 17, 24\) instead of \(1, 37, 24\)"):
        ViTMSNModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [12 * 10**11, 12 * 10**18, 12 * 10**400], ids=["T", "E", "huge"])
@pytest.mark.parametrize(
    "name", ["hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "num_channels"]
)
def test_a_config_out_of_all_proportion_to_its_weights_is_refused_before_memory_is_taken(
    name, size, tmp_path
):
    """Not by torch, which would try, nor by the system, which would end the process."""
    backbone().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: size}))
    with pytest.raises(ValueError, match=rf"the config asks for .*{name}={size}"):
        ViTMSNModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "lost, named",
    [
        ("layernorm.bias", "norm.bias"),
        ("encoder.layer.1.attention.attention.key.weight", "blocks.1.attn.qkv.weight"),
        ("embeddings.patch_embeddings.projection.bias", "patch_embed.bias"),
        ("embeddings.cls_token", "cls_token"),
    ],
)
def test_missing_weights_are_named(lost, named, tmp_path):
    """The error for a missing weight names it by our name."""

    def write_without(weights: dict, folder: Path) -> None:
        weights.pop(lost)
        as_bin(weights, folder)

    folder = saved(backbone(), tmp_path, write_without)
    with pytest.raises(ValueError, match=f"missing.*{named}"):
        ViTMSNModel.from_pretrained(folder)


def test_weights_that_are_not_finite_are_named(tmp_path):
    """Weights that are NaN or infinite are refused by name."""
    model = backbone()
    model.norm.bias.data[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not finite: norm\.bias"):
        ViTMSNModel.from_pretrained(tmp_path)


def test_unexpected_weights_are_named(tmp_path):
    """A weight that the model has no use for is announced."""

    def write_one_more(weights: dict, folder: Path) -> None:
        as_bin({**weights, "pooler.weight": torch.ones(2)}, folder)

    folder = saved(backbone(), tmp_path, write_one_more)
    with pytest.warns(UserWarning, match=r"not used: pooler\.weight") as warned:
        ViTMSNModel.from_pretrained(folder)
    assert warned[0].filename == __file__  # whoever called from_pretrained


def test_a_complete_file_is_loaded_without_a_warning(tmp_path, recwarn):
    """Where everything fits, or is only the head of a classifier, there is no warning."""
    classifier().save_pretrained(tmp_path)
    ViTMSNForImageClassification.from_pretrained(tmp_path)
    ViTMSNModel.from_pretrained(tmp_path)
    assert not recwarn.list


class Payload:
    """A pickle that makes a file when it is loaded by the unsafe way."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_payload_is_refused_and_never_runs(old_format, tmp_path):
    """Loading executes nothing that a file holds."""
    trap = tmp_path / "executed"
    backbone().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    for name in ("pytorch_model.bin", "evil.pth.tar"):
        torch.save(
            {"cls_token": torch.zeros(1), "target_encoder": Payload(str(trap))},
            tmp_path / name,
            _use_new_zipfile_serialization=not old_format,
        )
    for path in (tmp_path, tmp_path / "evil.pth.tar"):
        with pytest.raises(ValueError, match="can't be read"):
            ViTMSNModel.from_pretrained(path)
    assert not trap.exists()


@pytest.mark.parametrize("shard", ["../outside.bin", "/tmp/outside.bin", "sub/inside.bin", ".."])
def test_an_index_that_names_a_path_outside_is_refused(shard, tmp_path):
    """An index of shards reads only files beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    saved(backbone(), folder, lambda weights, folder: torch.save(weights, tmp_path / "outside.bin"))
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"cls_token": shard}})
    )
    with pytest.raises(ValueError, match=r"only weight files beside the index|can't be read"):
        ViTMSNModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 no", b"[1, 2]", b"\x80\x02]q\x00.", b"{" * 5000]
)
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"]
)
def test_a_damaged_file_is_a_value_error_that_names_it(name, content, tmp_path):
    """Whatever is wrong with a file, the error is a ValueError with its name."""
    if name == "model.safetensors":
        pytest.importorskip("safetensors")
    folder = saved(
        backbone(), tmp_path, lambda weights, folder: (folder / name).write_bytes(content)
    )
    with pytest.raises(ValueError, match=name):
        ViTMSNModel.from_pretrained(folder)


def test_a_flipped_bit_in_a_torch_file_is_noticed(tmp_path):
    """The checksums in a torch file are compared."""
    model = backbone()
    folder = saved(model, tmp_path, as_bin)
    content = bytearray((folder / "pytorch_model.bin").read_bytes())
    start_of_norm = content.index(model.norm.weight.detach().numpy().tobytes())
    content[start_of_norm] ^= 1  # a weight, ever so slightly
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin can't be read"):
        ViTMSNModel.from_pretrained(folder)


def test_folders_and_names_without_a_model_are_refused_in_words(tmp_path):
    """A missing file is a FileNotFoundError that says what was looked for."""
    with pytest.raises(FileNotFoundError, match="holds none of"):
        ViTMSNModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        ViTMSNModel.from_pretrained(tmp_path / "nowhere" / "at" / "all")
    as_bin({}, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ViTMSNModel.from_pretrained(tmp_path)


def test_without_huggingface_hub_a_name_says_which_files_to_get(monkeypatch):
    """huggingface_hub is optional; the error says what to put where."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"config\.json and model\.safetensors"):
        ViTMSNConfig.from_pretrained("facebook/vit-msn-small")


@pytest.mark.parametrize("error", [ConnectionError("no connection"), ValueError()])
def test_what_the_hub_does_not_give_is_said_to_be_missing_here_and_there(error, monkeypatch):
    """The hub's own errors speak of snapshots; ours says that the name is no folder, either."""

    def give_nothing(*_, **__):
        raise error

    hub = types.SimpleNamespace(snapshot_download=give_nothing)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    reason = str(error) or "ValueError"
    with pytest.raises(FileNotFoundError, match=f"neither a file nor a folder here.*{reason}"):
        ViTMSNConfig.from_pretrained("some-owner/some-model")


def test_a_path_into_a_folder_that_is_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    """runs/demo-009 looks like OWNER/MODEL, but with a folder runs/ it is a misspelt path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # would be an ImportError
    (tmp_path / "runs").mkdir()
    for name in ("runs/demo-009", "./demo-009", "demo-009"):
        with pytest.raises(FileNotFoundError, match=f"{name} is neither a file nor a folder"):
            ViTMSNModel.from_pretrained(name)


def test_saving_leaves_no_temporary_files_and_a_failure_keeps_the_old_ones(tmp_path, monkeypatch):
    """A folder is never left with half a file."""
    model = backbone()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 3

    def full_disk(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="disk full"):
        randomized(model, seed=5).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
