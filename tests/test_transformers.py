"""The same model as in transformers: equal numbers from equal weights, in both directions.

Run with transformers 4.57 and 5.x, skipped without it. The published shapes are marked slow:
pytest -m slow tests/test_transformers.py
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from common import TINY, randn, randomized
from torch.testing import assert_close

from vitmsn import PRESETS, ViTMSNConfig, ViTMSNForImageClassification, ViTMSNModel

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LIMIT = {"rtol": 0, "atol": 2e-5}  # float32
IMPLEMENTATIONS = ("eager", "sdpa")
OURS = {
    "ViTMSNModel": ViTMSNModel,
    "ViTMSNForImageClassification": ViTMSNForImageClassification,
}
SMALL = {key: value for key, value in TINY.items() if key != "num_labels"}
ODD = {
    "plain": {},
    "no qkv bias": {"qkv_bias": False},
    "one channel": {"num_channels": 1},
    "size no multiple": {"image_size": 37},
    "one layer": {"num_hidden_layers": 1},
    "eps": {"layer_norm_eps": 0.1},
    **{
        act: {"hidden_act": act}
        for act in ("gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
    },
}


def theirs(kind: str, implementation: str = "eager", mask_token: bool = False, **changes):
    """A model of transformers with random weights, in eval mode."""
    config = transformers.ViTMSNConfig(**{**SMALL, **changes})
    config._attn_implementation = implementation
    options = {"use_mask_token": True} if mask_token else {}
    return randomized(getattr(transformers, kind)(config, **options), std=0.05).eval()


def pixels(
    config, height: int | None = None, width: int | None = None, images: int = 2
) -> torch.Tensor:
    return randn(
        images, config.num_channels, height or config.image_size, width or config.image_size
    )


@torch.no_grad()
def assert_same_backbone(ours: ViTMSNModel, reference, images: torch.Tensor, masked=None) -> None:
    resample = images.shape[-2:] != (ours.config.image_size,) * 2
    options = {"interpolate_pos_encoding": resample, "bool_masked_pos": masked}
    expected = reference(images, output_hidden_states=True, output_attentions=True, **options)
    for implementation in IMPLEMENTATIONS:
        ours.set_attn_implementation(implementation)
        out = ours(images, output_hidden_states=True, output_attentions=True, **options)
        assert_close(out.last_hidden_state, expected.last_hidden_state, **LIMIT)
        assert_close(ours(images, **options).last_hidden_state, expected.last_hidden_state, **LIMIT)
        assert len(out.hidden_states) == ours.config.num_hidden_layers + 1
        assert len(out.attentions) == ours.config.num_hidden_layers
        assert_close(list(out.hidden_states), list(expected.hidden_states), **LIMIT)
        assert_close(list(out.attentions), list(expected.attentions), **LIMIT)


def assert_same_model(ours, reference, images: int = 2) -> None:
    """Of a backbone all that it returns; of a classifier the logits, too."""
    images = pixels(ours.config, images=images)
    if isinstance(ours, ViTMSNModel):
        assert_same_backbone(ours, reference, images)
        return
    assert_same_backbone(ours.vit, reference.vit, images)
    with torch.no_grad():
        assert_close(ours(images).logits, reference(images).logits, **LIMIT)


def from_folder_of(model, folder: Path, cls=ViTMSNModel, **options):
    model.save_pretrained(folder)
    return cls.from_pretrained(folder, **options)


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_states_and_attentions_are_the_same(changes, tmp_path):
    """All hidden states and attentions agree, for every kind of config."""
    reference = theirs("ViTMSNModel", **changes)
    assert_same_backbone(from_folder_of(reference, tmp_path), reference, pixels(reference.config))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_both_attention_implementations_are_the_same(implementation, tmp_path):
    """Either implementation of attention agrees with the same one there."""
    reference = theirs("ViTMSNModel", implementation)
    ours = from_folder_of(reference, tmp_path, attn_implementation=implementation)
    images = pixels(reference.config)
    with torch.no_grad():
        assert_close(ours(images).last_hidden_state, reference(images).last_hidden_state, **LIMIT)


@pytest.mark.parametrize(
    "height, width", [(64, 64), (16, 16), (8, 8), (48, 24), (16, 64), (64, 16), (45, 29)]
)
def test_resampled_positions_are_the_same_up_down_and_not_square(height, width, tmp_path):
    """Images of other sizes and shapes agree."""
    reference = theirs("ViTMSNModel")
    assert_same_backbone(
        from_folder_of(reference, tmp_path), reference, pixels(reference.config, height, width)
    )


def test_the_mask_token_is_the_same(tmp_path):
    """Masked patches agree."""
    reference = theirs("ViTMSNModel", mask_token=True)
    masked = torch.rand(2, 16) < 0.5
    ours = from_folder_of(reference, tmp_path, use_mask_token=True)
    assert_same_backbone(ours, reference, pixels(reference.config), masked)


@pytest.mark.parametrize(
    "problem, num_labels, labels",
    [
        ("regression", 1, torch.tensor([0.5, -1.0])),
        ("regression", 3, randn(2, 3)),
        (None, 1, torch.tensor([0.5, -1.0])),
        ("single_label_classification", 3, torch.tensor([2, 0])),
        (None, 3, torch.tensor([2, 0])),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
        (None, 3, torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
    ],
)
def test_logits_and_losses_of_every_problem_are_the_same(problem, num_labels, labels, tmp_path):
    """Logits, losses and the inferred kind of problem agree."""
    reference = theirs("ViTMSNForImageClassification", num_labels=num_labels, problem_type=problem)
    ours = from_folder_of(reference, tmp_path, ViTMSNForImageClassification)
    images = pixels(reference.config)
    assert ours.config.num_labels == num_labels
    with torch.no_grad():
        expected = reference(images, labels=labels)
        for implementation in IMPLEMENTATIONS:
            ours.set_attn_implementation(implementation)
            out = ours(images, labels=labels)
            assert_close(out.logits, expected.logits, **LIMIT)
            assert_close(out.loss, expected.loss, **LIMIT)
    assert ours.config.problem_type == reference.config.problem_type


def test_gradients_are_the_same(tmp_path):
    """Gradients agree at both ends of the model."""
    reference = theirs("ViTMSNForImageClassification", num_labels=3)
    ours = from_folder_of(reference, tmp_path, ViTMSNForImageClassification)
    images = pixels(reference.config)
    for model in (ours, reference):
        model(images, labels=torch.tensor([2, 0])).loss.backward()
    assert_close(ours.classifier.weight.grad, reference.classifier.weight.grad, **LIMIT)
    positions = dict(reference.named_parameters())["vit.embeddings.position_embeddings"]
    assert_close(ours.vit.pos_embed.grad, positions.grad, **LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_the_published_shapes_give_the_same_numbers(preset, tmp_path):
    """The six models of the paper agree."""
    config = ViTMSNConfig.preset(preset)
    reference = theirs(
        "ViTMSNForImageClassification",
        image_size=14 * config.patch_size,  # 196 patches in each, so few pixels
        num_labels=10,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        patch_size=config.patch_size,
    )
    with torch.no_grad():  # deviation 0.02, as transformers draws: 0.05 would saturate such widths
        for parameter in reference.parameters():
            if parameter.ndim > 1:
                parameter *= 0.4
    assert_same_model(
        from_folder_of(reference, tmp_path, ViTMSNForImageClassification), reference, images=1
    )


# -- files -----------------------------------------------------------------------------------------


def old_names(model) -> dict[str, torch.Tensor]:
    """Layout A or B: names as in files of transformers of every version."""
    names = {
        r"^layers\.": "encoder.layer.",
        r"\.attention\.q_proj\.": ".attention.attention.query.",
        r"\.attention\.k_proj\.": ".attention.attention.key.",
        r"\.attention\.v_proj\.": ".attention.attention.value.",
        r"\.attention\.o_proj\.": ".attention.output.dense.",
        r"\.mlp\.fc1\.": ".intermediate.dense.",
        r"\.mlp\.fc2\.": ".output.dense.",
    }
    state = {}
    for name, value in model.state_dict().items():
        prefix = "vit." if name.startswith("vit.") else ""
        name = name.removeprefix("vit.")
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        state[prefix + name] = value.contiguous()
    return state


def new_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layout D or E from A or B: the names in the memory of transformers 5."""
    for old, new in (
        ("encoder.layer.", "layers."),
        ("attention.output.dense", "attention.o_proj"),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ):
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


def half_prefixed_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layout C from B: files of transformers 5, whose layers lack the prefix `vit.`."""
    return {name.replace("vit.encoder.", "encoder."): value for name, value in state.items()}


class Layout(NamedTuple):
    """How to make a layout from old_names of a model of this kind, and how its layers begin."""

    kind: str
    rename: Callable[[dict], dict]
    layers: str


LAYOUTS = {
    "A": Layout("ViTMSNModel", dict, "encoder."),
    "B": Layout("ViTMSNForImageClassification", dict, "vit.encoder."),
    "C": Layout("ViTMSNForImageClassification", half_prefixed_names, "encoder."),
    "D": Layout("ViTMSNModel", new_names, "layers."),
    "E": Layout("ViTMSNForImageClassification", new_names, "vit.layers."),
}


def write_bin(state, folder):
    torch.save(state, folder / "pytorch_model.bin")


def write_safetensors(state, folder):
    safetensors.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_shards(state, folder):
    shards = {f"model-0000{i + 1}-of-00003.safetensors": sorted(state)[i::3] for i in range(3)}
    for shard, names in shards.items():
        members = {name: state[name] for name in names}
        safetensors.save_file(members, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", [write_bin, write_safetensors, write_shards])
@pytest.mark.parametrize("bias", [True, False])
def test_all_five_layouts_are_read_from_all_containers(layout, write, bias, tmp_path, recwarn):
    """Every layout of names in every kind of file is read, without a warning."""
    kind, rename, layers = LAYOUTS[layout]
    reference = theirs(kind, num_labels=3, qkv_bias=bias)
    state = rename(old_names(reference))
    assert any(name.startswith(layers) for name in state)
    reference.config.save_pretrained(tmp_path)
    write(state, tmp_path)

    ours = OURS[kind].from_pretrained(tmp_path)
    for warning in recwarn.list:
        assert "vitmsn" not in str(warning.filename)
        assert str(tmp_path) not in str(warning.message)
    assert_same_model(ours, reference)


@pytest.mark.parametrize("kind", OURS)
def test_shards_that_transformers_writes_are_read(kind, tmp_path):
    """A model that transformers cut into shards is read."""
    reference = theirs(kind, num_labels=3)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    body = ViTMSNModel.from_pretrained(tmp_path)
    assert_same_backbone(body, getattr(reference, "vit", reference), pixels(reference.config))


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_transformers_reads_our_folders_with_no_key_left_over(kind, changes, container, tmp_path):
    """What we write, transformers loads completely."""
    config = ViTMSNConfig(**{**SMALL, **changes, "num_labels": 3})
    ours = randomized(OURS[kind](config), std=0.05).eval()
    ours.save_pretrained(tmp_path)
    if container == "bin":
        weights = safetensors.load_file(tmp_path / "model.safetensors")
        torch.save(weights, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()

    reference, report = getattr(transformers, kind).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference.set_attn_implementation("eager")
    assert_same_model(ours, reference)


def test_the_auto_classes_load_our_folders_and_their_configs_agree(tmp_path):
    """AutoModel finds the class, the labels and all settings."""
    labels = {0: "cat", 1: "dog", 2: "bird"}
    config = ViTMSNConfig(
        **SMALL, id2label=labels, hidden_dropout_prob=0.1, problem_type="regression"
    )
    randomized(ViTMSNForImageClassification(config)).to(torch.bfloat16).save_pretrained(tmp_path)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, torch_dtype="auto"
    )
    assert isinstance(model, transformers.ViTMSNForImageClassification)
    assert model.dtype == torch.bfloat16
    assert isinstance(transformers.AutoModel.from_pretrained(tmp_path), transformers.ViTMSNModel)
    assert model.config.id2label == labels and model.config.num_labels == 3
    assert model.config.label2id == {name: i for i, name in labels.items()}
    for name, value in config.to_dict().items():
        assert getattr(model.config, name) == value, name


def test_default_configs_are_the_same_and_one_of_transformers_is_read(tmp_path):
    """Default configs agree, and one written there is read without a loss."""
    reference = transformers.ViTMSNConfig()
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "initializer_range",
        "layer_norm_eps",
        "image_size",
        "patch_size",
        "num_channels",
        "qkv_bias",
        "num_labels",
        "id2label",
        "label2id",
    ):
        assert getattr(reference, name) == getattr(ViTMSNConfig(), name), name
    reference.save_pretrained(tmp_path)
    ours = ViTMSNConfig.from_pretrained(tmp_path).to_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: ours[key] for key in written if key != "architectures"} == written


def test_images_that_transformers_refuses_are_refused():
    """Both refuse images of another size and of another number of channels."""
    reference = theirs("ViTMSNModel")
    ours = ViTMSNModel(ViTMSNConfig(**SMALL))
    for images in (randn(1, 3, 48, 48), randn(1, 1, 32, 32)):
        for model in (reference, ours):
            with pytest.raises(ValueError):
                model(images)
