"""The encoder's parts: attention, stochastic depth, and what dropping and permuting patches means."""

import pytest
import torch
import torch.nn.functional as F
from common import randn, randomized, tiny_config
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vitmsn import (
    ACTIVATIONS,
    Attention,
    MSNEncoder,
    ViTMSNModel,
    drop_path,
    eager_attention,
    interpolate_positions,
    patchify,
    sample_patches_to_keep,
    sdpa_attention,
)

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
seeds = st.integers(0, 2**31)


@given(
    b=st.integers(1, 3),
    h=st.integers(1, 4),
    nq=st.integers(1, 7),
    n=st.integers(1, 9),
    d=st.integers(1, 16),
    dtype=st.sampled_from(list(LIMITS)),
    seed=seeds,
)
def test_attention_written_out_equals_the_fused_kernel(b, h, nq, n, d, dtype, seed):
    query, key, value = (
        randn(b, h, rows, d, seed=seed + i).to(dtype) for i, rows in enumerate((nq, n, n))
    )
    written_out, probabilities = eager_attention(query, key, value)
    fused, nothing = sdpa_attention(query, key, value)
    assert nothing is None and written_out.dtype == fused.dtype == dtype
    assert_close(written_out, fused, rtol=LIMITS[dtype], atol=LIMITS[dtype])
    assert_close(probabilities @ value, written_out)
    assert_close(
        probabilities.double().sum(dim=-1),
        torch.ones(b, h, nq).double(),
        rtol=0,
        atol=LIMITS[dtype],
    )


@given(seed=seeds, channels=st.integers(1, 3), bias=st.booleans())
def test_both_implementations_give_the_same_outputs_and_gradients(seed, channels, bias):
    x, gradients, outputs = randn(2, channels, 32, 32, seed=seed, dtype=torch.float64), [], []
    for implementation in ("eager", "sdpa"):
        config = tiny_config(
            num_channels=channels, qkv_bias=bias, attn_implementation=implementation
        )
        model = randomized(ViTMSNModel(config), seed=seed).double()
        outputs.append(model(x).last_hidden_state)
        (outputs[-1] * randn(*outputs[-1].shape, seed=1, dtype=torch.float64)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert_close(*outputs, rtol=1e-10, atol=1e-11)
    assert_close(*gradients, rtol=1e-8, atol=1e-9)


@given(seed=seeds)
def test_when_only_the_class_token_asks_its_answer_is_unchanged(seed):
    attention = randomized(Attention(tiny_config()), seed=seed).double()
    x = randn(2, 9, 24, seed=seed, dtype=torch.float64)
    for probabilities in (False, True):
        (short, p), (full, full_p) = (
            attention(x, True, probabilities),
            attention(x, False, probabilities),
        )
        assert_close(short, full[:, :1])
        assert (p is None) if not probabilities else p.allclose(full_p[:, :, :1])


@given(seed=seeds, ratio=st.sampled_from([0.15, 0.3, 0.5, 0.7]))
def test_dropping_patches_is_masking_them_as_keys(seed, ratio):
    model = randomized(ViTMSNModel(tiny_config()), seed=seed).double()
    x = randn(3, 3, 32, 32, seed=seed, dtype=torch.float64)
    keep = sample_patches_to_keep(3, 16, ratio, torch.Generator().manual_seed(seed))
    rows = torch.cat(
        [torch.zeros(3, 1, dtype=torch.long), keep + 1], dim=1
    )  # the class token stays
    hidden = torch.full((3, 17), float("-inf"), dtype=torch.float64).scatter(1, rows, 0.0)

    tokens = model.embed(x)  # all of them, but no one looks at those that are masked
    for block in model.blocks:
        q, k, v = (
            block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        )
        scores = q @ k.transpose(-1, -2) / 8**0.5 + hidden[:, None, None, :]
        tokens = tokens + block.attn.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
    expected = model.norm(tokens).gather(1, rows.unsqueeze(-1).expand(-1, -1, 24))
    assert_close(model(x, patches_to_keep=keep).last_hidden_state, expected)
    assert_close(model.norm(model.representation(x, keep)), expected[:, 0])


@given(order=st.permutations(range(16)), seed=seeds)
def test_without_positions_permuting_patches_permutes_outputs(order, seed):
    model = randomized(ViTMSNModel(tiny_config()), seed=seed).double()
    model.pos_embed.data.zero_()
    x = randn(2, 3, 32, 32, seed=seed, dtype=torch.float64)
    out = model(x).last_hidden_state
    moved = rearrange(
        patchify(x, 8)[:, order], "b (gh gw) (c p1 p2) -> b c (gh p1) (gw p2)", gh=4, p1=8, p2=8
    )
    permuted = model(moved).last_hidden_state
    assert_close(permuted[:, 0], out[:, 0])
    assert_close(permuted[:, 1:], out[:, 1:][:, order])


@given(order=st.permutations(range(16)), seed=seeds)
def test_with_positions_the_kept_indices_may_come_in_any_order(order, seed):
    model = randomized(ViTMSNModel(tiny_config()), seed=seed).double()
    x, order = randn(2, 3, 32, 32, seed=seed, dtype=torch.float64), torch.tensor(order)
    out = model(x, patches_to_keep=order.expand(2, -1)).last_hidden_state
    assert_close(out[:, 1:], model(x).last_hidden_state[:, 1:][:, order])


def test_the_patch_embedding_is_a_convolution_whose_stride_is_its_size():
    model = randomized(ViTMSNModel(tiny_config()))
    x = randn(2, 3, 32, 32)
    convolution = F.conv2d(
        x, model.patch_embed.weight.reshape(24, 3, 8, 8), model.patch_embed.bias, stride=8
    )
    assert_close(
        model.patch_embed(patchify(x, 8)),
        convolution.flatten(2).transpose(1, 2),
        rtol=1e-4,
        atol=1e-5,
    )


@given(rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_resampled_positions_keep_the_class_token_and_constants(rows, columns):
    positions = randn(1, 17, 6)
    resampled = interpolate_positions(positions, (rows, columns))
    assert resampled.shape == (1, 1 + rows * columns, 6) and resampled[:, 0].equal(positions[:, 0])
    constant = torch.ones(1, 17, 6)
    assert_close(
        interpolate_positions(constant, (rows, columns)), torch.ones(1, 1 + rows * columns, 6)
    )
    assert_close(interpolate_positions(positions, (4, 4)), positions)


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
    x = torch.ones(20_000, 2, 3)
    dropped = drop_path(x, 0.3, training=True)
    assert {round(value, 4) for value in dropped.unique().tolist()} == {0.0, round(1 / 0.7, 4)}
    assert (
        dropped.flatten(1).amax(1) == dropped.flatten(1).amin(1)
    ).all()  # an image's branch, whole
    assert abs(dropped.mean() - 1) < 0.03
    assert drop_path(x, 0.3, training=False) is x and drop_path(x, 0.0, training=True) is x


def test_stochastic_depth_rises_linearly_to_the_last_layer():
    model = ViTMSNModel(tiny_config(num_hidden_layers=5, drop_path_rate=0.4))
    assert [block.drop_path_rate for block in model.blocks] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )


@pytest.mark.parametrize(
    "name", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"]
)
def test_dropout_acts_in_training_only(name):
    model = randomized(ViTMSNModel(tiny_config(**{name: 0.5})))
    x = randn(4, 3, 32, 32)
    assert not model(x).last_hidden_state.allclose(model(x).last_hidden_state)
    model.eval()
    plain = randomized(ViTMSNModel(tiny_config()))
    assert_close(model(x).last_hidden_state, plain(x).last_hidden_state)


@pytest.mark.parametrize(
    "name, formula",
    [
        ("gelu", lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
        (
            "gelu_new",
            lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
        ),
        (
            "gelu_pytorch_tanh",
            lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
        ),
        ("quick_gelu", lambda x: x / (1 + torch.exp(-1.702 * x))),
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
    ],
)
def test_activations_are_their_formulas(name, formula):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert_close(ACTIVATIONS[name](x), formula(x))


def test_initial_weights_are_drawn_as_transformers_draws_them():
    model = ViTMSNModel(tiny_config(hidden_size=96, intermediate_size=384), use_mask_token=True)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias") or name in ("cls_token", "pos_embed", "mask_token"):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.std() / 0.02 - 1) < 0.05, name


def test_initial_weights_of_pretraining_are_drawn_as_published():
    encoder = MSNEncoder(tiny_config(hidden_size=96, intermediate_size=384, image_size=64), 128, 64)
    assert abs(encoder.patch_embed.weight.std() / (2 / (3 * 8 * 8)) ** 0.5 - 1) < 0.05  # He
    assert (
        abs(encoder.pos_embed.std() / 0.02 - 1) < 0.1
        and abs(encoder.cls_token.std() / 0.02 - 1) < 0.3
    )
    assert encoder.pos_embed.abs().max() > 0.04  # normal, not truncated
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 2 and name != "patch_embed.weight":
            assert 0.03 < parameter.abs().max() <= 0.04, (
                name
            )  # truncated at two standard deviations
            assert abs(parameter.std() / (0.02 * 0.8796) - 1) < 0.05, name  # what the cut leaves
        elif parameter.ndim == 1 and "norm" not in name and "bn" not in name:
            assert (parameter == 0).all(), name
