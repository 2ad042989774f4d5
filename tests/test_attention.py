"""The parts of the encoder: attention, stochastic depth, and what dropping patches means."""

import pytest
import torch
import torch.nn.functional as F
from common import randn, randomized, seeded, tiny_backbone, tiny_config
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vitmsn import (
    ACTIVATIONS,
    Attention,
    Block,
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


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, seed=seed, dtype=torch.float64)


@given(
    b=st.integers(1, 3),
    h=st.integers(1, 4),
    asking=st.integers(1, 7),
    n=st.integers(1, 9),
    d=st.integers(1, 16),
    dtype=st.sampled_from(list(LIMITS)),
    seed=seeds,
)
def test_attention_written_out_equals_the_fused_kernel(b, h, asking, n, d, dtype, seed):
    """softmax(q k^T / sqrt(d_h)) v, written out, is what torch's fused kernel computes."""
    query = randn(b, h, asking, d, seed=seed).to(dtype)
    key = randn(b, h, n, d, seed=seed + 1).to(dtype)
    value = randn(b, h, n, d, seed=seed + 2).to(dtype)

    written_out, probabilities = eager_attention(query, key, value)
    fused, no_probabilities = sdpa_attention(query, key, value)

    limit = LIMITS[dtype]
    assert no_probabilities is None
    assert written_out.dtype == fused.dtype == dtype
    assert_close(written_out, fused, rtol=limit, atol=limit)
    assert_close(probabilities @ value, written_out)
    sums = probabilities.double().sum(dim=-1)
    assert_close(sums, torch.ones_like(sums), rtol=0, atol=limit)


@given(seed=seeds, channels=st.integers(1, 3), bias=st.booleans())
def test_both_implementations_give_the_same_outputs_and_gradients(seed, channels, bias):
    """A whole backbone may use either implementation: neither outputs nor gradients change."""
    x = doubles(2, channels, 32, 32, seed=seed)
    outputs = []
    gradients = []
    for implementation in ("eager", "sdpa"):
        model = tiny_backbone(
            seed, num_channels=channels, qkv_bias=bias, attn_implementation=implementation
        ).double()
        out = model(x).last_hidden_state
        (out * doubles(*out.shape, seed=1)).sum().backward()
        outputs.append(out)
        gradients.append([p.grad for p in model.parameters()])
    assert_close(*outputs, rtol=1e-10, atol=1e-11)
    assert_close(*gradients, rtol=1e-8, atol=1e-9)


@given(seed=seeds, bias=st.booleans())
def test_the_class_token_alone_gets_the_output_that_it_gets_among_all(seed, bias):
    """The shorter way through attention and block gives the first token of the whole way."""
    config = tiny_config(qkv_bias=bias)
    x = doubles(2, 9, 24, seed=seed)

    attention = randomized(Attention(config), seed=seed).double()
    attended, _ = attention(x)
    assert_close(attention(x, class_token_only=True)[0], attended[:, :1])

    block = randomized(Block(config, drop_path_rate=0.0), seed=seed).double()
    tokens, _ = block(x)
    assert_close(block(x, class_token_only=True)[0], tokens[:, :1])


@given(seed=seeds, ratio=st.sampled_from([0.15, 0.3, 0.5, 0.7]))
def test_dropping_patches_is_masking_them_as_keys(seed, ratio):
    """Dropped patches have the effect of patches that no token attends to."""
    model = tiny_backbone(seed).double()
    x = doubles(3, 3, 32, 32, seed=seed)
    patches_to_keep = sample_patches_to_keep(3, 16, ratio, seeded(seed))
    class_token = torch.zeros(3, 1, dtype=torch.long)
    tokens_to_keep = torch.cat([class_token, patches_to_keep + 1], dim=1)
    all_hidden = torch.full((3, 17), float("-inf"), dtype=torch.float64)
    hidden = all_hidden.scatter(1, tokens_to_keep, 0.0)

    tokens = model.embed(x)  # of all patches, but no one looks at those that are hidden
    for block in model.blocks:
        qkv = block.attn.qkv(block.norm1(tokens))
        q, k, v = qkv.unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 8**0.5 + hidden[:, None, None, :]
        attended = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        tokens = tokens + block.attn.proj(attended)
        tokens = tokens + block.mlp(block.norm2(tokens))

    indices = tokens_to_keep.unsqueeze(-1).expand(-1, -1, 24)
    expected = model.norm(tokens).gather(1, indices)
    assert_close(model(x, patches_to_keep=patches_to_keep).last_hidden_state, expected)
    assert_close(model.norm(model.representation(x, patches_to_keep)), expected[:, 0])


@given(order=st.permutations(range(16)), seed=seeds)
def test_without_positions_permuting_patches_permutes_outputs(order, seed):
    """Only positions tell patches apart: without them the order of patches means nothing."""
    model = tiny_backbone(seed).double()
    model.pos_embed.data.zero_()
    x = doubles(2, 3, 32, 32, seed=seed)
    permuted_x = rearrange(
        patchify(x, 8)[:, order], "b (gh gw) (c p1 p2) -> b c (gh p1) (gw p2)", gh=4, p1=8, p2=8
    )

    out = model(x).last_hidden_state
    permuted = model(permuted_x).last_hidden_state
    assert_close(permuted[:, 0], out[:, 0])
    assert_close(permuted[:, 1:], out[:, 1:][:, order])


@given(order=st.permutations(range(16)), seed=seeds)
def test_with_positions_the_kept_indices_may_come_in_any_order(order, seed):
    """A patch keeps its own position wherever its index stands in patches_to_keep."""
    model = tiny_backbone(seed).double()
    x = doubles(2, 3, 32, 32, seed=seed)
    patches_to_keep = torch.tensor(order).expand(2, -1)
    out = model(x, patches_to_keep=patches_to_keep).last_hidden_state
    assert_close(out[:, 1:], model(x).last_hidden_state[:, 1:][:, order])


def test_the_patch_embedding_is_a_convolution_whose_stride_is_its_size():
    """Patchify and a linear layer are a convolution of patches that do not overlap."""
    model = tiny_backbone()
    x = randn(2, 3, 32, 32)
    kernels = model.patch_embed.weight.reshape(24, 3, 8, 8)
    convolution = F.conv2d(x, kernels, model.patch_embed.bias, stride=8)
    embedded = model.patch_embed(patchify(x, 8))
    assert_close(embedded, convolution.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_resampled_positions_keep_the_class_token_and_constants(rows, columns):
    """Resampling leaves the class token's position, constants and the same grid alone."""
    positions = randn(1, 17, 6)
    resampled = interpolate_positions(positions, (rows, columns))
    assert resampled.shape == (1, 1 + rows * columns, 6)
    assert resampled[:, 0].equal(positions[:, 0])

    constant = interpolate_positions(torch.ones(1, 17, 6), (rows, columns))
    assert_close(constant, torch.ones(1, 1 + rows * columns, 6))
    assert_close(interpolate_positions(positions, (4, 4)), positions)


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
    """An image's branch is dropped whole or scaled by 1 / (1 - rate); the mean stays."""
    x = torch.ones(20_000, 2, 3)
    dropped = drop_path(x, 0.3, training=True)
    values = {round(value, 4) for value in dropped.unique().tolist()}
    assert values == {0.0, round(1 / 0.7, 4)}
    assert dropped.flatten(1).amax(1).equal(dropped.flatten(1).amin(1))  # whole branches
    assert abs(dropped.mean() - 1) < 0.03
    assert drop_path(x, 0.3, training=False) is x
    assert drop_path(x, 0.0, training=True) is x


def test_stochastic_depth_rises_linearly_to_the_last_layer():
    """The drop rate is 0 in the first layer and the configured one in the last."""
    model = ViTMSNModel(tiny_config(num_hidden_layers=5, drop_path_rate=0.4))
    rates = [block.drop_path_rate for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    "name", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"]
)
def test_dropout_acts_in_training_only(name):
    """In eval mode no dropout rate changes the output."""
    model = tiny_backbone(**{name: 0.5})
    x = randn(4, 3, 32, 32)
    assert not model(x).last_hidden_state.allclose(model(x).last_hidden_state)
    model.eval()
    assert_close(model(x).last_hidden_state, tiny_backbone()(x).last_hidden_state)


def gelu_by_tanh(x):
    return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize(
    "name, formula",
    [
        ("gelu", lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
        ("gelu_new", gelu_by_tanh),
        ("gelu_pytorch_tanh", gelu_by_tanh),
        ("quick_gelu", lambda x: x / (1 + torch.exp(-1.702 * x))),
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
    ],
)
def test_activations_are_their_formulas(name, formula):
    """Each activation equals its formula."""
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert_close(ACTIVATIONS[name](x), formula(x))


def test_initial_weights_are_drawn_as_transformers_draws_them():
    """Weights are normal with deviation 0.02; biases, tokens and positions are 0."""
    model = ViTMSNModel(tiny_config(hidden_size=96, intermediate_size=384), use_mask_token=True)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias") or name in ("cls_token", "pos_embed", "mask_token"):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.std() / 0.02 - 1) < 0.05, name


def test_initial_weights_of_pretraining_are_drawn_as_published():
    """Pretraining starts from cut normal weights, He-normal patches and normal positions."""
    encoder = MSNEncoder(tiny_config(hidden_size=96, intermediate_size=384, image_size=64), 128, 64)
    he_deviation = (2 / (3 * 8 * 8)) ** 0.5
    assert abs(encoder.patch_embed.weight.std() / he_deviation - 1) < 0.05
    assert abs(encoder.pos_embed.std() / 0.02 - 1) < 0.1
    assert abs(encoder.cls_token.std() / 0.02 - 1) < 0.3
    assert encoder.pos_embed.abs().max() > 0.04  # not cut

    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 2 and name != "patch_embed.weight":
            assert 0.03 < parameter.abs().max() <= 0.04, name  # cut at two standard deviations
            assert abs(parameter.std() / (0.02 * 0.8796) - 1) < 0.05, name  # what the cut leaves
        elif parameter.ndim == 1 and "norm" not in name and "bn" not in name:
            assert (parameter == 0).all(), name
