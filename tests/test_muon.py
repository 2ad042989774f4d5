"""Muon: what orthogonalizing does to a matrix, one step by hand, and runs that use it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import TINY, finish, make_pictures, run_here, start
from torch.testing import assert_close

import train_msn
from vitmsn import read_tensors

SIDES = st.tuples(st.integers(1, 8), st.integers(1, 12)).map(sorted)
SEEDS = st.integers(0, 10**6)


@given(sides=SIDES, count=st.integers(1, 3), seed=SEEDS)
def test_orthogonalizing_keeps_singular_vectors_and_makes_singular_values_about_one(
    sides, count, seed
):
    """In the basis of a matrix's singular vectors the result is diagonal, with entries near 1 for
    all singular values that are not tiny."""
    torch.manual_seed(seed)
    matrices = torch.randn(count, *sides, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    turned = left.mT @ train_msn.orthogonalize(matrices) @ right.mT

    diagonal = turned.diagonal(dim1=-2, dim2=-1)
    assert_close(turned, torch.diag_embed(diagonal), rtol=0, atol=1e-8)
    assert (diagonal < 1.25).all()
    shares = values / values.norm(dim=-1, keepdim=True)
    assert (diagonal[shares > 0.005] > 0.65).all()


@given(sides=SIDES, seed=SEEDS, factor=st.floats(1e-6, 1e6))
def test_orthogonalizing_does_not_see_how_long_a_matrix_is(sides, seed, factor):
    """orthogonalize(c M) = orthogonalize(M) for every c > 0, and 0 stays 0."""
    torch.manual_seed(seed)
    matrices = torch.randn(1, *sides)
    expected = train_msn.orthogonalize(matrices)
    assert_close(train_msn.orthogonalize(factor * matrices), expected, rtol=0, atol=2e-3)
    assert not train_msn.orthogonalize(torch.zeros(1, *sides)).any()


@given(sides=SIDES, seed=SEEDS)
def test_of_an_orthogonal_matrix_all_directions_stay_alike(sides, seed):
    """A matrix whose singular values are equal keeps its directions: it changes by one factor."""
    torch.manual_seed(seed)
    matrices = torch.linalg.qr(torch.randn(1, *sides, dtype=torch.float64).mT).Q.mT
    result = train_msn.orthogonalize(matrices)
    factor = result.norm() / matrices.norm()
    assert 0.65 < factor < 1.25
    assert_close(result, factor * matrices, rtol=0, atol=1e-9)


@given(side=st.integers(1, 8), seed=SEEDS)
def test_to_orthogonalize_and_to_transpose_commute(side, seed):
    """So it does not matter along which side a tall matrix is turned."""
    torch.manual_seed(seed)
    matrices = torch.randn(2, side, side, dtype=torch.float64)
    transposed = train_msn.orthogonalize(matrices.mT.contiguous())
    assert_close(transposed, train_msn.orthogonalize(matrices).mT, rtol=0, atol=1e-9)


@given(sides=SIDES, seed=SEEDS)
def test_rounding_of_a_gradient_stays_small(sides, seed):
    """In float32 a change of a millionth moves the result by at most a thousandth of its length."""
    torch.manual_seed(seed)
    matrices = torch.randn(1, *sides)
    noise = torch.randn(1, *sides)
    changed = matrices + 1e-6 * matrices.norm() / noise.norm() * noise
    one = train_msn.orthogonalize(matrices)
    other = train_msn.orthogonalize(changed)
    assert (other - one).norm() < 1e-3 * one.norm()


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=SEEDS)
@settings(max_examples=30)
def test_two_steps_of_muon_by_hand(rows, columns, seed):
    """Nesterov's mean of gradients, orthogonalized, 0.2 sqrt(longer side) long; then decay."""
    torch.manual_seed(seed)
    start_value = torch.randn(rows, columns, dtype=torch.float64)
    parameter = torch.nn.Parameter(start_value.clone())
    group = {"params": [parameter], "pieces": 1, "weight_decay": 0.1, "decays": True}
    optimizer = train_msn.Muon([group])
    optimizer.param_groups[0]["lr"] = 0.01

    expected = start_value
    mean = torch.zeros_like(start_value)
    for _ in range(2):
        gradient = torch.randn(rows, columns, dtype=torch.float64)
        parameter.grad = gradient
        optimizer.step()

        mean = 0.95 * mean + 0.05 * gradient
        direction = 0.05 * gradient + 0.95 * mean
        if rows > columns:
            direction = train_msn.orthogonalize(direction.T[None])[0].T
        else:
            direction = train_msn.orthogonalize(direction[None])[0]
        length = 0.2 * max(rows, columns) ** 0.5
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * length * direction
    assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-9)


def test_query_key_and_value_are_matrices_of_their_own():
    """A parameter of three pieces moves as three parameters do."""
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(12, 4))
    parts = [torch.nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    fused.grad = torch.randn(12, 4) * torch.tensor([1.0] * 4 + [100.0] * 4 + [0.01] * 4)[:, None]
    for part, gradient in zip(parts, fused.grad.chunk(3), strict=True):
        part.grad = gradient.clone()
    for params, pieces in (([fused], 3), (parts, 1)):
        group = {"params": params, "pieces": pieces, "weight_decay": 0.0}
        optimizer = train_msn.Muon([group])
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
    assert_close(fused.detach(), torch.cat([part.detach() for part in parts]), rtol=0, atol=1e-6)


def test_each_parameter_is_in_one_group_and_muon_has_the_matrices_of_the_layers():
    """Muon and AdamW share the parameters that learn; what decays is what decays under AdamW."""
    config = train_msn.make_config({"recipe": "demo", "muon": True})
    model = train_msn.build_model(config, train_msn.Processes(0, 1, torch.device("cpu")))
    optimizer = train_msn.build_optimizer(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    by_muon = [names[id(p)] for group in optimizer.muon.param_groups for p in group["params"]]
    by_adamw = [names[id(p)] for group in optimizer.adamw.param_groups for p in group["params"]]
    matrices = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    layers = range(config.num_hidden_layers)
    expected = [f"anchor_encoder.blocks.{i}.{name}" for i in layers for name in matrices]
    assert sorted(by_muon) == sorted(expected)

    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(by_muon + by_adamw) == sorted(learning)
    plain = train_msn.parameter_groups(model, config.weight_decay)
    for groups in (optimizer.param_groups, plain):
        decaying = {names[id(p)] for g in groups if g["decays"] for p in g["params"]}
        several = {name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
        assert decaying == several - {"prototypes"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run by Muon, and its pictures."""
    folder = tmp_path_factory.mktemp("muon")
    pictures = make_pictures(folder / "pictures")
    assert run_here(*TINY, "--muon", "--data", pictures, "--output-dir", folder / "run") == 0
    return pictures, folder / "run"


def test_a_run_by_muon_stopped_and_resumed_is_the_same_run(whole, tmp_path):
    """The momentum of Muon is in the checkpoint: weights are the same, bit for bit."""
    pictures, expected = whole
    flags = (*TINY, "--muon", "--data", pictures, "--output-dir", tmp_path / "run")
    assert run_here(*flags, "--max-steps", 5) == 0
    assert run_here(*flags, "--resume") == 0
    for name in ("encoder", "target_encoder"):
        one = read_tensors(expected / "checkpoint.pt")[name]
        other = read_tensors(tmp_path / "run" / "checkpoint.pt")[name]
        for key, value in one.items():
            assert torch.equal(value, other[key]), key


def test_two_processes_with_muon_give_the_weights_of_one(whole, tmp_path):
    """As with AdamW, in float64: how many processes share a batch changes nothing."""
    pictures, _ = whole
    exact = ("--muon", "--precision", "float64", "--max-steps", 10, "--knn-every", 0)
    flags = (*TINY, *exact, "--data", pictures, "--output-dir")
    assert run_here(*flags, tmp_path / "one") == 0
    status, printed = finish(start(*flags, tmp_path / "two", processes=2))
    assert status == 0, printed
    one = read_tensors(tmp_path / "one" / "checkpoint.pt")["target_encoder"]
    two = read_tensors(tmp_path / "two" / "checkpoint.pt")["target_encoder"]
    for key, value in one.items():
        assert_close(two[key], value, rtol=0, atol=1e-5, msg=key)
