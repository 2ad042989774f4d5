"""Backbone and classifier as users meet them: configuration, inputs, outputs, torch's tools."""

import json

import pytest
import torch
import torch.nn.functional as F
from common import (
    randn,
    randomized,
    tiny_backbone,
    tiny_classifier,
    tiny_config,
    tiny_pretraining,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import train_msn
from vitmsn import (
    PRESETS,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTMSNForPreTraining,
    ViTMSNModel,
)


# -- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, says",
    [
        ({"hidden_size": 100, "num_attention_heads": 12}, "use 96 or 108"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": 24.0}, "hidden_size=24.0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"intermediate_size": "40"}, "intermediate_size='40'"),
        ({"image_size": [224, 224]}, "image_size"),
        ({"patch_size": None}, "patch_size"),
        ({"image_size": 8, "patch_size": 16}, "no patch fits"),
        ({"num_channels": 0}, "num_channels"),
        ({"hidden_act": "swish2"}, "use one of"),
        ({"hidden_dropout_prob": 1.1}, "hidden_dropout_prob"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps"),  # no float is as large
        ({"qkv_bias": 1}, "qkv_bias"),
        ({"num_labels": -1}, "num_labels=-1"),
        ({"num_labels": 3, "id2label": {0: "cat", 1: "dog"}}, "names 2 classes"),
        ({"id2label": ["cat", "dog"]}, "id2label"),
        ({"problem_type": "ranking"}, "problem_type"),
        ({"attn_implementation": "flash"}, "sdpa"),
    ],
)
def test_values_no_model_can_have_are_refused_with_what_to_do(values, says):
    """A config that no model can have is refused by a message that names the field."""
    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        ViTMSNConfig(**values)


def test_the_defaults_are_those_of_transformers():
    """A config without arguments is the one of transformers."""
    expected = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "qkv_bias": True,
        "num_labels": 2,
    }
    assert {name: getattr(ViTMSNConfig(), name) for name in expected} == expected


def test_presets_are_the_published_shapes():
    """The presets are the six models of the paper, and any field can be changed."""
    shapes = {}
    for name in PRESETS:
        config = ViTMSNConfig.preset(name)
        shapes[name] = (
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.patch_size,
            config.intermediate_size,
        )
    assert shapes == {
        "small-16": (384, 12, 6, 16, 1536),
        "base-16": (768, 12, 12, 16, 3072),
        "base-8": (768, 12, 12, 8, 3072),
        "base-4": (768, 12, 12, 4, 3072),
        "large-16": (1024, 24, 16, 16, 4096),
        "large-7": (1024, 24, 16, 7, 4096),
    }
    assert ViTMSNConfig.preset("small-16", num_labels=3).num_labels == 3
    with pytest.raises(ValueError, match="small-16"):
        ViTMSNConfig.preset("huge-1")


words = st.text('aZ_ "é☃/', max_size=5)
json_values = (
    st.none() | st.booleans() | st.integers() | words | st.lists(st.integers(), max_size=2)
)
unknown = st.dictionaries(words.map("x_".__add__), json_values, max_size=4)


@given(
    labels=st.lists(words, max_size=5, unique=True),
    extra=unknown,
    bias=st.booleans(),
    problem=st.sampled_from([None, "regression", "multi_label_classification"]),
)
def test_a_config_survives_config_json_with_keys_it_does_not_know(labels, extra, bias, problem):
    """Writing and reading config.json gives an equal config, unknown keys included."""
    config = tiny_config(
        num_labels=None,
        id2label=dict(enumerate(labels)),
        qkv_bias=bias,
        problem_type=problem,
        extra=extra,
    )
    written = json.loads(json.dumps(config.to_dict()))
    assert ViTMSNConfig.from_dict(written) == config
    assert written["model_type"] == "vit_msn"
    assert {key: written[key] for key in extra} == extra
    assert config.num_labels == len(labels)
    assert config.label2id == {name: i for i, name in enumerate(labels)}


@pytest.mark.parametrize(
    "content, says",
    [
        ({"model_type": "bert"}, "'bert'"),
        ([1], "list"),
        ({"hidden_size": 10, "num_attention_heads": 4}, "divisible"),
    ],
)
def test_a_config_of_something_else_is_refused(content, says, tmp_path):
    """A config.json of another model, or of none, is refused in words."""
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says):
        ViTMSNConfig.from_pretrained(tmp_path)


# -- inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pixels, says",
    [
        (torch.zeros(1, 3, 16, 16), "interpolate_pos_encoding"),
        (torch.zeros(1, 3, 32, 40), "32 x 40"),
        (torch.zeros(1, 1, 32, 32), "preprocess"),
        (torch.zeros(3, 32, 32), "shape"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.long), "int64"),
    ],
)
def test_pixels_of_a_wrong_size_channels_or_kind_are_refused_with_what_to_pass(pixels, says):
    """Wrong images are refused by a message that says what to pass."""
    for model in (tiny_backbone(), tiny_classifier()):
        with pytest.raises(ValueError, match=says):
            model(pixels)


def test_images_smaller_than_a_patch_are_refused():
    """An image has to hold at least one patch; no word is passed that would change that."""
    with pytest.raises(ValueError, match="7 x 40 pixels but need at least one patch") as refusal:
        tiny_backbone()(torch.zeros(1, 3, 7, 40), interpolate_pos_encoding=True)
    assert "interpolate_pos_encoding" not in str(refusal.value)


def test_patches_to_keep_of_other_images_are_refused():
    """The backbone, too, says what is wrong with indices that do not fit its images."""
    model = tiny_backbone()
    images = randn(2, 3, 32, 32)
    for indices in (torch.arange(3).expand(4, -1), torch.tensor([[0, 16], [1, 2]])):
        with pytest.raises(ValueError, match=r"patches_to_keep has .*32 x 32 pixels"):
            model(images, patches_to_keep=indices)


@pytest.mark.parametrize("shape", [(2, 15), (1, 16), (16,), (2, 4, 4), (2, 16, 1)])
def test_masked_positions_of_other_images_are_refused(shape):
    """A shape that would fit by broadcasting is refused, too: it would mask other patches."""
    model = ViTMSNModel(tiny_config(), use_mask_token=True)
    says = r"bool_masked_pos has shape .*; pass \(images, patches\): \(2, 16\)"
    with pytest.raises(ValueError, match=says):
        model(randn(2, 3, 32, 32), torch.zeros(shape, dtype=torch.bool))


@given(height=st.integers(8, 70), width=st.integers(8, 70))
def test_any_image_of_at_least_one_patch_can_be_interpolated_to(height, width):
    """With resampled positions any height and width of a patch or more works."""
    out = tiny_backbone()(
        randn(1, 3, height, width), interpolate_pos_encoding=True
    ).last_hidden_state
    assert out.shape == (1, 1 + height // 8 * (width // 8), 24)


def test_as_many_patches_in_another_shape_are_resampled():
    """An image that is not square gets resampled positions even if the count fits."""
    model = tiny_backbone()
    image = randn(1, 3, 64, 16)  # 16 patches, as in 32 x 32
    tokens = model.embed(image, interpolate_pos_encoding=True)

    square = model.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    positions = F.interpolate(square, (8, 2), mode="bicubic").flatten(2).transpose(1, 2)
    model.pos_embed.data = torch.zeros_like(model.pos_embed)
    without_positions = model.embed(image, interpolate_pos_encoding=True)
    assert_close(tokens[:, 1:], without_positions[:, 1:] + positions)


def test_an_image_size_that_is_no_multiple_of_the_patch_drops_the_rest():
    """Pixels that fill no patch do not reach the output."""
    model = tiny_backbone(image_size=35)
    images = randn(2, 3, 35, 35)
    changed = images.clone()
    changed[..., 32:, :] = 100
    changed[..., :, 32:] = 100
    assert model(images).last_hidden_state.equal(model(changed).last_hidden_state)


def test_pixels_are_cast_to_the_weights_dtype():
    """The dtype of the weights decides, not that of the pixels."""
    images = randn(2, 3, 32, 32)
    model = tiny_backbone()
    assert_close(model(images.double()).last_hidden_state, model(images).last_hidden_state)
    assert model.double()(images).last_hidden_state.dtype == torch.float64


def test_masked_patches_are_replaced_by_the_mask_token():
    """The mask token and the patch's position stand where bool_masked_pos is True."""
    model = randomized(ViTMSNModel(tiny_config(), use_mask_token=True))
    images = randn(2, 3, 32, 32)
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[0, 3] = True
    masked[1, 5] = True

    tokens = model.embed(images, masked)
    plain = model.embed(images)
    changed = torch.cat([torch.zeros(2, 1, dtype=torch.bool), masked], dim=1)
    assert tokens[~changed].equal(plain[~changed])
    assert_close(tokens[0, 4], (model.mask_token + model.pos_embed[:, 4:5])[0, 0])

    by_numbers = model(images, masked.int()).last_hidden_state
    assert by_numbers.equal(model(images, masked).last_hidden_state)

    patches_to_keep = torch.tensor([[3, 7], [3, 7]])
    assert_close(model.embed(images, masked, patches_to_keep), tokens[:, [0, 4, 8]])
    with pytest.raises(ValueError, match="use_mask_token=True"):
        tiny_backbone()(images, masked)


# -- outputs ---------------------------------------------------------------------------------------


@given(
    layers=st.integers(1, 4),
    implementation=st.sampled_from(["sdpa", "eager"]),
    r=st.integers(1, 16),
)
def test_the_outputs_asked_for_are_complete_and_consistent(layers, implementation, r):
    """Hidden states and attentions of every layer fit the last state and each other."""
    model = tiny_backbone(num_hidden_layers=layers, attn_implementation=implementation)
    images = randn(2, 3, 32, 32)
    patches_to_keep = torch.arange(r).expand(2, -1)
    out = model(
        images, patches_to_keep=patches_to_keep, output_hidden_states=True, output_attentions=True
    )

    plain = model(images, patches_to_keep=patches_to_keep)
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert_close(plain.last_hidden_state, out.last_hidden_state)

    assert len(out.hidden_states) == layers + 1
    assert out.hidden_states[0].equal(model.embed(images, patches_to_keep=patches_to_keep))
    assert model.norm(out.hidden_states[-1]).equal(out.last_hidden_state)
    assert_close(model.representation(images, patches_to_keep), out.hidden_states[-1][:, 0])

    assert len(out.attentions) == layers
    for attention in out.attentions:
        assert attention.shape == (2, 3, 1 + r, 1 + r)
        assert_close(attention.sum(dim=-1), torch.ones(2, 3, 1 + r))


@given(seed=st.integers(0, 2**31), size=st.sampled_from([16, 32, 48]))
def test_logits_are_the_same_with_and_without_hidden_states(seed, size):
    """The shorter way through the last layer gives the same logits."""
    model = tiny_classifier()
    images = randn(3, 3, size, size, seed=seed)
    out = model(images, interpolate_pos_encoding=True, output_hidden_states=True)
    shorter = model(images, interpolate_pos_encoding=True)
    assert_close(shorter.logits, out.logits, rtol=1e-4, atol=1e-5)
    class_token = model.vit.norm(out.hidden_states[-1][:, 0])
    assert_close(out.logits, model.classifier(class_token))


def test_no_labels_make_the_head_the_identity():
    """With num_labels=0 the logits are the normalised class token."""
    model = tiny_classifier(num_labels=0)
    images = randn(2, 3, 32, 32)
    class_token = model.vit(images).last_hidden_state[:, 0]
    assert_close(model(images).logits, class_token, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "num_labels, labels, problem",
    [
        (1, torch.tensor([0.5, -1.0]), "regression"),
        (1, torch.tensor([[0], [1]]), "regression"),
        (5, torch.tensor([4, 0]), "single_label_classification"),
        (5, torch.tensor([[4], [0]], dtype=torch.int64), "single_label_classification"),
        (5, torch.tensor([[0.0, 1, 0, 1, 1], [0, 0, 0, 1, 0]]), "multi_label_classification"),
    ],
)
def test_the_kind_of_problem_is_inferred_from_the_labels(num_labels, labels, problem):
    """Labels decide between the three losses, which equal their formulas."""
    model = tiny_classifier(num_labels=num_labels)
    images = randn(2, 3, 32, 32)
    out = model(images, labels=labels)
    if problem == "regression":
        expected = ((out.logits.flatten() - labels.flatten()) ** 2).mean()
    elif problem == "single_label_classification":
        expected = F.nll_loss(out.logits.log_softmax(-1), labels.flatten())
    else:
        signs = 2 * labels - 1
        expected = -F.logsigmoid(signs * out.logits).mean()
    assert model.config.problem_type == problem
    assert_close(out.loss, expected)
    assert model(images).loss is None


def test_a_constructor_leaves_training_mode_on():
    """A new model is in training mode, as any module of torch."""
    assert ViTMSNModel(tiny_config()).training
    assert ViTMSNForImageClassification(tiny_config()).training


# -- training and torch's tools --------------------------------------------------------------------


def masked_and_focal_view(b: int) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Two anchor views, the first of which keeps 9 of 16 patches, and their patches_to_keep."""
    views = [randn(b, 3, 32, 32), randn(b, 3, 16, 16)]
    return views, [torch.arange(9).expand(b, -1), None]


def test_gradient_checkpointing_gives_the_same_gradients_even_with_dropout():
    """Computing layers again in the backward pass changes no gradient."""
    gradients = []
    for enable in (False, True):
        model = tiny_classifier(
            hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, drop_path_rate=0.3
        )
        if enable:
            model.gradient_checkpointing_enable()
        calls = []
        for block in model.vit.blocks:
            block.mlp.fc1.register_forward_hook(lambda *_, calls=calls: calls.append(1))

        torch.manual_seed(3)
        model(randn(4, 3, 32, 32), labels=torch.arange(4)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert len(calls) == len(model.vit.blocks) * (2 if enable else 1)
    assert_close(*gradients)


def test_the_attention_of_every_layer_can_be_switched():
    """set_attn_implementation reaches the config and all layers, and refuses other names."""
    model = tiny_classifier()
    model.set_attn_implementation("eager")
    assert model.config.attn_implementation == "eager"
    assert {block.attn.implementation for block in model.vit.blocks} == {"eager"}
    with pytest.raises(ValueError, match="sdpa"):
        model.set_attn_implementation("flash")


@pytest.mark.parametrize("make", [tiny_backbone, tiny_classifier])
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(make, compiler):
    """torch.compile finds no graph break, and the outputs stay the same."""
    model = make().eval()
    images = randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    with torch.no_grad():
        assert_close(vars(compiled(pixel_values=images)), vars(model(images)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_pretraining_loss_compiles_as_one_graph():
    """The whole of a pretraining forward pass compiles without a graph break."""
    model = tiny_pretraining()
    views, patches_to_keep = masked_and_focal_view(4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(views[0], views, patches_to_keep)
    assert_close(compiled(views[0], views, patches_to_keep).loss, expected.loss)


@pytest.mark.parametrize("make", [tiny_backbone, tiny_classifier])
def test_exports_with_pixel_values_named_or_not(make):
    """torch.export gives the same outputs from positional and from named arguments."""
    model = make().eval()
    images = randn(2, 3, 32, 32)
    for positional, named in (((images,), {}), ((), {"pixel_values": images})):
        exported = torch.export.export(model, positional, named).module()
        assert_close(vars(exported(*positional, **named)), vars(model(images)))


@pytest.mark.parametrize("make", [tiny_backbone, tiny_classifier])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_a_free_batch_size(make, implementation, strict):
    """One exported graph takes batches of any size, with positions resampled or not."""
    model = make(attn_implementation=implementation).eval()
    for size in (48,) if strict else (32, 48):  # strict takes seconds
        options = {"interpolate_pos_encoding": size != 32}
        exported = torch.export.export(
            model,
            (randn(2, 3, size, size),),
            options,
            dynamic_shapes={
                "pixel_values": {0: torch.export.Dim("batch")},
                "interpolate_pos_encoding": None,
            },
            strict=strict,
        ).module()
        for b in (1, 2, 5):
            images = randn(b, 3, size, size)
            actual = exported(images, **options)
            assert_close(vars(actual), vars(model(images, **options)))


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_half_precision_stays_near_float32(dtype, limit, implementation):
    """Models in bfloat16 and float16 give nearly the logits of float32."""
    model = tiny_classifier(attn_implementation=implementation).eval()
    images = randn(4, 3, 32, 32)
    logits = model(images).logits
    half = model.to(dtype)(images).logits
    assert half.dtype == dtype
    assert (half.float() - logits).abs().max() < limit * logits.abs().max()


def test_a_classifier_trains_under_autocast():
    """Under autocast the loss is near float32's and all gradients are finite."""
    model = tiny_classifier()
    images = randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, labels=torch.arange(4))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert_close(out.logits.float(), model(images).logits, rtol=0.1, atol=0.1)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


def test_pretraining_under_autocast_gives_a_float32_loss_near_the_float32_one():
    """Under autocast the objective is computed in float32."""
    model = tiny_pretraining()
    views, patches_to_keep = masked_and_focal_view(8)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(views[0], views, patches_to_keep)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    in_float32 = model(views[0], views, patches_to_keep)
    assert_close(out.loss, in_float32.loss, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_models_built_on_the_meta_device_take_weights_later():
    """A model can be made without memory and filled by load_state_dict."""
    for make in (
        lambda: ViTMSNModel(tiny_config(), use_mask_token=True),
        lambda: ViTMSNForImageClassification(tiny_config()),
        lambda: ViTMSNForPreTraining(tiny_config(), 20, 16, 12, prior_exponent=0.5),
    ):
        with torch.device("meta"):
            empty = make()
        assert all(p.is_meta for p in empty.parameters())
        source = randomized(make()).eval()
        filled = empty.to_empty(device="cpu").eval()
        filled.load_state_dict(source.state_dict())
        images = randn(4, 3, 32, 32)
        inputs = (images, [images]) if isinstance(source, ViTMSNForPreTraining) else (images,)
        actual = torch.utils._pytree.tree_leaves(filled(*inputs))
        expected = torch.utils._pytree.tree_leaves(source(*inputs))
        assert_close(actual, expected)


def test_pretraining_starts_with_the_deviation_that_the_settings_name():
    """Every matrix of the blocks is drawn with initializer_range, cut at two deviations, which
    leaves 0.88 of it."""
    for deviation in (0.02, 0.1):
        config = train_msn.make_config({"initializer_range": deviation})
        processes = train_msn.Processes(0, 1, torch.device("cpu"))
        encoder = train_msn.build_model(config, processes).anchor_encoder
        for name, weight in encoder.blocks.named_parameters():
            if weight.ndim == 2:
                assert weight.std().item() == pytest.approx(0.88 * deviation, rel=0.03), name
                assert weight.abs().max() <= 2 * deviation, name


def test_one_tensor_in_place_of_a_list_of_anchor_views_says_what_to_pass():
    """A batch of images is no list of views: it would be taken for views of one image each."""
    model = tiny_pretraining()
    images = randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"pass a list of tensors, .* as \[view\]"):
        model(images, images)
    assert model(images, [images]).loss.isfinite()


# -- every weight is used by calling the module that owns it ---------------------------------------

WHOLE = {"backbone": ViTMSNModel, "classifier": ViTMSNForImageClassification}


class Doubled(torch.nn.Module):
    """A wrapper as adapters use them: what the layer gives, twice. It has no weight of its own."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *arguments):
        return 2 * self.layer(*arguments)


@pytest.mark.parametrize("kind", WHOLE)
def test_every_module_is_called_once_in_a_forward_pass(kind):
    """A hook on any module sees exactly one call, at the same place as its weights' use."""
    model = randomized(WHOLE[kind](tiny_config())).eval()
    calls = dict.fromkeys((name for name, _ in model.named_modules()), 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(count(name))
    model(randn(2, 3, 32, 32))
    calls.pop("blocks", None)  # lists of modules are not called
    calls.pop("vit.blocks", None)
    assert {name: number for name, number in calls.items() if number != 1} == {}


@pytest.mark.parametrize("kind", WHOLE)
def test_every_linear_layer_can_be_replaced_by_a_wrapper(kind):
    """The output follows what stands in a layer's place, wherever it is in the model."""
    images = randn(2, 3, 32, 32)
    model = randomized(WHOLE[kind](tiny_config())).eval()
    names = [name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)]

    def outputs():
        with torch.no_grad():
            out = model(images)
        return out.last_hidden_state if kind == "backbone" else out.logits

    expected = outputs()
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = getattr(owner, child)
        setattr(owner, child, Doubled(layer))
        assert not torch.allclose(outputs(), expected, atol=1e-4), name
        setattr(owner, child, layer)
    assert torch.equal(outputs(), expected)
