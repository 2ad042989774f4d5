"""The objective, piece by piece: assignments, sharpening, Sinkhorn, me-max, equation (1)."""

import math
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import randn, randomized, tiny_config, tiny_pretraining
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import vitmsn
from vitmsn import (
    ViTMSNForPreTraining,
    entropy,
    log_assign,
    me_max,
    msn_loss,
    power_law_prior,
    sharpen,
    sinkhorn,
    smooth,
)

seeds = st.integers(0, 2**31)
counts = st.integers(2, 9)
temperatures = st.floats(0.1, 1.0)


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed, dtype=torch.float64)


def log_assignments(b: int, k: int, seed: int, spread: float = 2.0) -> Tensor:
    """b distributions over k prototypes, in logarithms. -> b k."""
    return (spread * doubles(b, k, seed=seed)).log_softmax(dim=-1)


def balanced_assignments(k: int, seed: int) -> Tensor:
    """k distributions, each a shift of the first, so that every column sums to 1, too. -> k k."""
    first = log_assignments(1, k, seed)[0]
    return torch.stack([first.roll(shift) for shift in range(k)])


# -- assignments and sharpening --------------------------------------------------------------------


@given(b=counts, k=counts, e=counts, temperature=temperatures, seed=seeds)
def test_assignments_are_the_softmax_of_cosine_similarities(b, k, e, temperature, seed):
    """p is the softmax of cosine similarities over the temperature."""
    z = doubles(b, e, seed=seed)
    prototypes = doubles(k, e, seed=seed + 1)
    cosines = F.cosine_similarity(z[:, None], prototypes[None], dim=-1)
    expected = (cosines / temperature).softmax(dim=-1)
    assert_close(log_assign(z, prototypes, temperature).exp(), expected)


@given(b=counts, k=counts, smoothing=st.floats(0, 0.9), seed=seeds)
def test_smoothing_mixes_with_the_uniform_distribution(b, k, smoothing, seed):
    """Smoothing by s is (1 - s) p + s / k."""
    log_p = log_assignments(b, k, seed)
    assert_close(smooth(log_p, smoothing).exp(), (1 - smoothing) * log_p.exp() + smoothing / k)


@given(b=counts, k=counts, t=temperatures, seed=seeds)
def test_sharpening_is_a_power_renormalised(b, k, t, seed):
    """Sharpening by T is p^(1/T), scaled to sum to 1."""
    p = log_assignments(b, k, seed).exp()
    power = p ** (1 / t)
    assert_close(sharpen(p.log(), t).exp(), power / power.sum(dim=-1, keepdim=True))


@given(b=counts, k=counts, seed=seeds)
def test_sharpening_by_1_is_the_identity(b, k, seed):
    """T = 1 changes nothing."""
    log_p = log_assignments(b, k, seed)
    assert_close(sharpen(log_p, 1.0), log_p)


@given(b=counts, k=counts, s=temperatures, t=temperatures, seed=seeds)
def test_sharpening_twice_multiplies_the_temperatures(b, k, s, t, seed):
    """Sharpening by S and then by T is sharpening by S T."""
    log_p = log_assignments(b, k, seed)
    assert_close(sharpen(sharpen(log_p, s), t), sharpen(log_p, s * t))


@given(b=counts, k=counts, t=temperatures, seed=seeds)
def test_sharpening_keeps_the_order_and_never_adds_entropy(b, k, t, seed):
    """For T <= 1 the first choice stays the first, and entropy does not grow."""
    log_p = log_assignments(b, k, seed)
    sharp = sharpen(log_p, t)
    assert sharp.argsort(dim=-1).equal(log_p.argsort(dim=-1))
    for before, after in zip(log_p, sharp, strict=True):
        assert entropy(after) <= entropy(before) + 1e-12


# -- Sinkhorn --------------------------------------------------------------------------------------


@given(b=counts, k=counts, iterations=st.integers(1, 5), seed=seeds)
def test_after_every_sinkhorn_iteration_each_image_sums_to_1(b, k, iterations, seed):
    """However many iterations: the assignment of each image is a distribution."""
    log_of_any_positive_matrix = 3 * doubles(b, k, seed=seed)
    sums = sinkhorn(log_of_any_positive_matrix, iterations).exp().sum(dim=1)
    assert_close(sums, torch.ones(b, dtype=torch.float64))


@given(b=counts, k=counts, seed=seeds)
def test_prototype_totals_tend_to_an_even_share(b, k, seed):
    """After many iterations each prototype has b / k of the batch."""
    shares = sinkhorn(log_assignments(b, k, seed, spread=1.0), 400).exp().sum(dim=0)
    assert_close(shares, torch.full((k,), b / k, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@given(n=counts, repeats=st.integers(1, 3), seed=seeds)
def test_a_balanced_matrix_stays_as_it_is(n, repeats, seed):
    """Where images and prototypes are balanced already, Sinkhorn changes nothing."""
    balanced = balanced_assignments(n, seed).repeat(repeats, 1)
    assert_close(sinkhorn(balanced, 3), balanced)


@given(data=st.data(), b=counts, k=counts, seed=seeds)
def test_sinkhorn_commutes_with_permuting_images_and_prototypes(data, b, k, seed):
    """Neither the order of images nor that of prototypes means anything."""
    log_p = log_assignments(b, k, seed)
    images = data.draw(st.permutations(range(b)))
    prototypes = data.draw(st.permutations(range(k)))
    expected = sinkhorn(log_p)[images][:, prototypes]
    assert_close(sinkhorn(log_p[images][:, prototypes]), expected)


@given(b=counts, k=counts, seed=seeds)
def test_sinkhorn_forgets_the_scale_of_a_prototypes_column(b, k, seed):
    """Prototypes are balanced first, so what multiplies a whole column is lost."""
    log_p = log_assignments(b, k, seed)
    log_scales = 5 * doubles(k, seed=seed + 1)
    assert_close(sinkhorn(log_p + log_scales), sinkhorn(log_p))


def test_without_iterations_sinkhorn_changes_nothing():
    """Zero iterations leave Sinkhorn out."""
    log_p = log_assignments(3, 4, 0)
    assert sinkhorn(log_p, 0).equal(log_p)


# -- me-max and entropy ----------------------------------------------------------------------------


@given(n=counts, seed=seeds)
def test_me_max_is_zero_exactly_where_the_mean_prediction_is_uniform(n, seed):
    """me-max is 0 at a uniform mean prediction and positive elsewhere."""
    balanced = balanced_assignments(n, seed)
    assert abs(me_max(balanced)) < 1e-12
    assert me_max(balanced[:1]) > 1e-6


@given(b=counts, k=counts, spread=st.floats(0.1, 50), seed=seeds)
def test_me_max_lies_between_zero_and_log_k(b, k, spread, seed):
    """me-max is never negative, and log k when all images choose one prototype."""
    assert -1e-12 <= me_max(log_assignments(b, k, seed, spread)) <= math.log(k) + 1e-12
    collapsed = torch.full((b, k), -800.0, dtype=torch.float64)
    collapsed[:, 0] = 0
    assert me_max(collapsed) == pytest.approx(math.log(k))


@given(b=counts, k=counts, exponent=st.floats(0, 2), seed=seeds)
def test_with_a_prior_me_max_is_the_divergence_from_it(b, k, exponent, seed):
    """me-max is KL(mean prediction || prior); the prior of exponent 0 is uniform."""
    log_p = log_assignments(b, k, seed)
    log_prior = power_law_prior(k, exponent)
    powers = torch.arange(1, k + 1, dtype=torch.float64) ** -exponent
    assert_close(log_prior.exp(), powers / powers.sum())

    log_mean = log_p.exp().mean(dim=0).log()
    divergence = F.kl_div(log_prior, log_mean, log_target=True, reduction="sum")
    assert_close(me_max(log_p, log_prior), divergence)
    assert abs(me_max(log_prior.expand(b, -1), log_prior)) < 1e-12
    assert_close(me_max(log_p, power_law_prior(k, 0.0)), me_max(log_p))


@given(b=counts, k=counts, seed=seeds)
def test_entropy_is_the_mean_over_single_predictions(b, k, seed):
    """The entropy term averages the entropies of the predictions."""
    log_p = log_assignments(b, k, seed)
    assert_close(entropy(log_p), torch.distributions.Categorical(logits=log_p).entropy().mean())


# -- equation (1) ----------------------------------------------------------------------------------


def loss_inputs(v: int, b: int, k: int, e: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors (v b) e, targets b e and prototypes k e."""
    anchors = doubles(v * b, e, seed=seed)
    targets = doubles(b, e, seed=seed + 1)
    prototypes = doubles(k, e, seed=seed + 2)
    return anchors, targets, prototypes


@given(v=st.integers(1, 4), b=counts, k=counts, e=counts, seed=seeds)
def test_the_loss_is_unchanged_by_rescaling_and_by_rotating_everything_together(v, b, k, e, seed):
    """Only the angles between projections and prototypes matter."""
    anchors, targets, prototypes = loss_inputs(v, b, k, e, seed)
    options = {"entropy_weight": 0.5, "label_smoothing": 0.1}
    expected = msn_loss(anchors, targets, prototypes, **options)

    rescaled = msn_loss(7 * anchors, targets / 3, 2 * prototypes, **options)
    assert_close(rescaled, expected)

    rotation = torch.linalg.qr(doubles(e, e, seed=seed)).Q
    rotated = msn_loss(anchors @ rotation, targets @ rotation, prototypes @ rotation, **options)
    assert_close(rotated, expected)


@given(v=st.integers(1, 4), b=counts, k=counts, seed=seeds)
def test_the_loss_is_equation_1_by_plain_probabilities(v, b, k, seed):
    """Without logarithms, view by view and image by image: the sum that the paper writes."""
    anchors, targets, prototypes = loss_inputs(v, b, k, 5, seed)
    p = log_assign(anchors, prototypes, 0.1).exp().reshape(v, b, k)
    p_plus = log_assign(targets, prototypes, 0.25 * 0.1).exp()
    for _ in range(3):
        p_plus = p_plus / p_plus.sum(dim=0)
        p_plus = p_plus / p_plus.sum(dim=1, keepdim=True)

    total = torch.zeros((), dtype=torch.float64)
    for m in range(v):
        for i in range(b):
            total = total - (p_plus[i] * p[m, i].log()).sum()
    mean = p.mean(dim=(0, 1))
    mean_entropy = -(mean * mean.log()).sum()

    out = msn_loss(anchors, targets, prototypes, memax_weight=2.0)
    assert_close(out.target_assignments, p_plus)
    assert_close(out.cross_entropy, total / (v * b))
    assert_close(out.memax, math.log(k) - mean_entropy)
    assert_close(out.loss, total / (v * b) - 2.0 * mean_entropy + 2.0 * math.log(k))


@given(v=st.integers(1, 4), b=counts, k=counts, seed=seeds)
def test_the_loss_is_the_weighted_sum_of_its_terms(v, b, k, seed):
    """Equation (1) is the sum of its terms, and the statistics fit the targets."""
    out = msn_loss(*loss_inputs(v, b, k, 5, seed), memax_weight=0.7, entropy_weight=0.3)
    assert_close(out.loss, out.cross_entropy + 0.7 * out.memax + 0.3 * out.entropy)
    assert_close(out.target_assignments.sum(dim=1), torch.ones(b, dtype=torch.float64))
    assert out.prototypes_used == len(out.target_assignments.argmax(dim=1).unique())
    assert 0 <= out.bottom_assignment <= 1 / k <= out.top_assignment <= 1


def test_views_of_the_same_image_are_compared_with_its_own_target():
    """Anchors are ordered by view first: view m of image i is record m b + i."""
    _, targets, prototypes = loss_inputs(1, 6, 8, 5, 0)
    right = msn_loss(targets.repeat(3, 1), targets, prototypes).cross_entropy  # view-major
    wrong = msn_loss(targets.repeat_interleave(3, 0), targets, prototypes).cross_entropy
    assert right < wrong


@given(v=st.integers(1, 4), b=counts, k=counts, seed=seeds)
def test_views_may_have_an_axis_of_their_own(v, b, k, seed):
    """Anchors v b e give the same loss as the same anchors in the order (v b) e, bit for bit."""
    anchors, targets, prototypes = loss_inputs(v, b, k, 5, seed)
    joined = msn_loss(anchors, targets, prototypes)
    apart = msn_loss(anchors.reshape(v, b, 5), targets, prototypes)
    for one, other in zip(joined, apart, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "anchors, targets, prototypes, says",
    [
        ((7, 4), (3, 4), (5, 4), "7 anchors are no whole number of views of 3"),
        ((3, 2, 4), (3, 4), (5, 4), r"pass anchors\.transpose\(0, 1\)"),
        ((2, 6, 4), (3, 4), (5, 4), "must be the 3 images"),
        ((4,), (3, 4), (5, 4), r"pass anchors \(views, images, width\)"),
        ((1, 2, 3, 4), (3, 4), (5, 4), r"pass anchors \(views, images, width\)"),
        ((6, 4), (1, 3, 4), (5, 4), r"targets \(1, 3, 4\)"),
        ((6, 4), (3, 4), (4,), r"prototypes \(4,\)"),
        ((0, 4), (0, 4), (5, 4), "no axis may be 0"),
        ((0, 4), (3, 4), (5, 4), "no axis may be 0"),
        ((2, 0, 4), (0, 4), (5, 4), r"anchors \(2, 0, 4\)"),
        ((6, 4), (3, 4), (0, 4), "no axis may be 0"),
        ((6, 5), (3, 4), (5, 4), "must be the same"),
        ((6, 4), (3, 4), (4, 5), "must be the same"),
    ],
)
def test_shapes_that_do_not_match_are_refused_in_words(anchors, targets, prototypes, says):
    """What shapes can show of a wrong order of axes is said, with the shapes and the way out."""
    with pytest.raises(ValueError, match=says):
        msn_loss(randn(*anchors), randn(*targets), randn(*prototypes))


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"anchors": [randn(3, 4), randn(3, 4)]},
            r"anchors is a list of 2; .*torch.cat\(anchors\)",
        ),
        ({"targets": [randn(3, 4)]}, r"targets is a list of 1; pass one tensor \(images, width\)"),
        ({"prototypes": None}, r"prototypes is None; pass one tensor \(number, width\)"),
        ({"targets": 3}, "targets is of type int"),
        ({"temperature": 0}, "temperature=0 must be above 0; the paper has 0.1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be above 0"),
        ({"temperature": math.nan}, "temperature=nan must be above 0"),
        ({"sharpening": 0.0}, "sharpening=0.0 must be above 0; the paper has 0.25"),
        ({"label_smoothing": 1}, "label_smoothing=1 must be at least 0 and below 1"),
        ({"label_smoothing": -0.5}, "label_smoothing=-0.5 must be"),
        ({"sinkhorn_iterations": -1}, "sinkhorn_iterations=-1 must be .* the paper has 3"),
        ({"sinkhorn_iterations": 1.5}, "sinkhorn_iterations=1.5 must be a whole number"),
        ({"log_prior": torch.zeros(4)}, r"log_prior has shape \(4,\); .* power_law_prior\(5, "),
        ({"log_prior": torch.zeros(6, 1)}, r"log_prior has shape \(6, 1\)"),
        ({"log_prior": [0.0] * 5}, r"log_prior is a list of 5; .*torch.tensor\(log_prior\)"),
    ],
)
def test_what_is_no_tensor_and_numbers_that_give_nan_are_refused_in_words(changes, says):
    """A list of views, a forgotten argument and settings that give nan are named, with the way
    out; a list is put right by the call that the message names."""
    inputs = {"anchors": randn(6, 4), "targets": randn(3, 4), "prototypes": randn(5, 4)}
    with pytest.raises(ValueError, match=says):
        msn_loss(**{**inputs, **changes})
    for name in inputs.keys() & changes.keys():
        if isinstance(changes[name], list):
            assert msn_loss(**{**inputs, name: torch.cat(changes[name])}).loss.isfinite()


def test_a_printed_loss_is_its_scalars_one_a_line():
    """print(loss) shows each scalar by name and value, and no tensor of many numbers."""
    anchors, targets, prototypes = (x.requires_grad_() for x in loss_inputs(2, 4, 6, 8, 0))
    out = msn_loss(anchors, targets, prototypes)
    shown = dict(line.split() for line in str(out).splitlines())
    assert list(shown) == [name for name in out._fields if name != "target_assignments"]
    for name, value in shown.items():
        assert float(value) == pytest.approx(getattr(out, name).item(), rel=1e-5)


@given(k=st.sampled_from([2, 100, 1024, 8192]), seed=seeds)
def test_nothing_overflows_at_temperature_and_sharpening_of_a_hundredth(k, seed):
    """Loss and gradients are finite at extreme temperatures and many prototypes."""
    inputs = [x.float().requires_grad_() for x in loss_inputs(2, 8, k, 16, seed)]
    anchors, targets, prototypes = inputs
    for label_smoothing in (0.0, 0.1):
        out = msn_loss(
            anchors,
            targets,
            prototypes,
            temperature=0.01,
            sharpening=0.01,
            entropy_weight=1.0,
            label_smoothing=label_smoothing,
        )
        gradients = torch.autograd.grad(out.loss, (anchors, prototypes))
        assert all(torch.isfinite(x).all() for x in (*out, *gradients))


def test_collapsed_and_perfect_inputs_give_finite_losses_and_gradients():
    """Loss and gradients are finite where all images agree or are opposite."""
    prototypes = torch.eye(4, 4).requires_grad_()
    perfect = torch.eye(4)
    collapsed = torch.eye(4)[:1].repeat(4, 1)
    opposite = -torch.eye(4)
    for targets in (perfect, collapsed, opposite):
        anchors = targets.clone().requires_grad_()
        out = msn_loss(
            anchors, targets, prototypes, temperature=0.01, sharpening=0.01, entropy_weight=1.0
        )
        gradients = torch.autograd.grad(out.loss, (anchors, prototypes))
        assert all(torch.isfinite(x).all() for x in (*out, *gradients))


def test_the_loss_is_computed_in_float32_under_autocast():
    """Autocast does not reach the objective."""
    inputs = [x.float() for x in loss_inputs(2, 4, 6, 8, 0)]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = msn_loss(*inputs)
        halves = msn_loss(*(x.bfloat16() for x in inputs))
    assert_close(under_autocast, msn_loss(*inputs))
    assert halves.loss.dtype == torch.float32


def test_no_gradient_reaches_the_targets():
    """The targets are constants; anchors and prototypes have gradients."""
    anchors, targets, prototypes = (x.requires_grad_() for x in loss_inputs(2, 4, 6, 8, 0))
    msn_loss(anchors, targets, prototypes).loss.backward()
    assert targets.grad is None and (anchors.grad != 0).any() and (prototypes.grad != 0).any()


def test_prototypes_learn_through_the_anchors_side_only():
    """The prototypes' gradient is that of the loss with constant target assignments."""
    anchors, targets, prototypes = loss_inputs(2, 4, 6, 8, 0)
    prototypes.requires_grad_()
    out = msn_loss(anchors, targets, prototypes)
    log_p = log_assign(anchors, prototypes, 0.1)
    constants = out.target_assignments.repeat(2, 1)
    by_hand = -(constants * log_p).sum(dim=1).mean() + me_max(log_p)
    assert_close(
        torch.autograd.grad(out.loss, prototypes), torch.autograd.grad(by_hand, prototypes)
    )


def test_the_two_sections_of_the_objective_run_when_they_are_copied():
    """The two sections of msn_loss need nothing else but the imports that their head names."""
    source = Path(vitmsn.__file__).read_text(encoding="utf-8")
    start = source.index("# ---- Similarity Metric and Predictions")
    end = source.index("# ---- Pretraining model")
    copied = source[start:end]
    imports = []
    for line in copied.splitlines():
        if line.startswith(("#     import ", "#     from ")):
            imports.append(line.removeprefix("#     "))
    assert imports

    names = {"__name__": "copied"}
    exec("\n".join([*imports, copied]), names)
    inputs = loss_inputs(2, 4, 6, 8, 0)
    options = {"entropy_weight": 0.5, "label_smoothing": 0.1}
    out = names["msn_loss"](*inputs, **options, log_prior=names["power_law_prior"](6, 0.5))
    expected = msn_loss(*inputs, **options, log_prior=power_law_prior(6, 0.5))
    assert_close(tuple(out), tuple(expected))


# -- several processes -----------------------------------------------------------------------------


def in_processes(shards: list, work) -> list:
    """work(shard, all_reduce) for every shard at once, in threads that reduce with each other."""
    barrier = threading.Barrier(len(shards))
    slots = [None] * len(shards)
    results = [None] * len(shards)

    def run(rank: int) -> None:
        def all_reduce(x: Tensor, op: str) -> Tensor:
            slots[rank] = x
            barrier.wait()
            stacked = torch.stack(list(slots))
            barrier.wait()
            return stacked.sum(dim=0) if op == "sum" else stacked.amax(dim=0)

        results[rank] = work(shards[rank], all_reduce)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


@given(v=st.integers(1, 3), b=st.sampled_from([4, 8]), k=counts, seed=seeds)
def test_two_processes_that_reduce_see_the_whole_batch(v, b, k, seed):
    """Half batches that all-reduce have the assignments and the loss of the whole one."""
    anchors, targets, prototypes = loss_inputs(v, b, k, 6, seed)
    whole = msn_loss(anchors, targets, prototypes)
    halves = []
    for images in (slice(0, b // 2), slice(b // 2, b)):
        own_anchors = anchors.reshape(v, b, -1)[:, images].flatten(0, 1)
        halves.append((own_anchors, targets[images]))

    def work(half, all_reduce):
        own_anchors, own_targets = half
        return msn_loss(own_anchors, own_targets, prototypes, all_reduce=all_reduce)

    parts = in_processes(halves, work)
    assert_close(torch.cat([part.target_assignments for part in parts]), whole.target_assignments)
    for part in parts:
        assert_close(part.memax, whole.memax)
        assert part.prototypes_used == whole.prototypes_used
    assert_close((parts[0].cross_entropy + parts[1].cross_entropy) / 2, whole.cross_entropy)


# -- the whole step --------------------------------------------------------------------------------


def pretraining(**options) -> ViTMSNForPreTraining:
    """A pretraining model in float64 whose two encoders are equal."""
    model = tiny_pretraining(**options).double()
    model.update_target(0.0)
    return model


def step_inputs(b: int = 4) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """A target view, a masked anchor view and two focal views, and patches_to_keep of the three."""
    large = doubles(2, b, 3, 32, 32, seed=32)
    small = doubles(2, b, 3, 16, 16, seed=16)
    patches_to_keep = torch.stack([torch.randperm(16)[:11] for _ in range(b)])
    return large[0], [large[1], small[0], small[1]], [patches_to_keep, None, None]


def test_every_trainable_tensor_gets_a_gradient_and_no_target_tensor_does():
    """Everything but the target encoder learns, prototypes included."""
    model = pretraining()
    model(*step_inputs()).loss.backward()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        name for name, _ in model.named_parameters() if not name.startswith("target_encoder.")
    }
    assert "prototypes" in trainable
    for name, parameter in model.named_parameters():
        if name not in trainable:
            assert parameter.grad is None, name
        elif name.removeprefix("anchor_encoder.") in ("norm.bias", "fc.fc1.bias", "fc.fc2.bias"):
            assert parameter.grad.abs().max() < 1e-12, name  # batch norm takes constant shifts away
        else:
            assert parameter.grad.abs().max() > 1e-6, name


def test_the_key_bias_alone_of_queries_keys_and_values_has_no_gradient():
    """A shift of all keys cancels in the softmax; of queries and values it does not."""
    model = pretraining()
    model(*step_inputs()).loss.backward()
    for block in model.anchor_encoder.blocks:
        query, key, value = block.attn.qkv.bias.grad.chunk(3)
        assert key.abs().max() < 1e-12 and query.abs().max() > 1e-6 and value.abs().max() > 1e-6


def test_without_masks_all_patches_are_seen():
    """No mask is the mask that keeps every patch."""
    model = pretraining().eval()
    target, views, _ = step_inputs()
    all_patches = torch.arange(16).expand(4, -1)
    whole = model(target, views)
    assert_close(model(target, views, [all_patches, None, None]), whole)
    masked = model(target, views, [all_patches[:, :5], None, None])
    assert not masked.loss.allclose(whole.loss)


def test_views_of_one_size_share_batch_statistics_and_other_sizes_have_their_own():
    """Batch norm sees the views of one size as one batch."""
    encoder = pretraining().anchor_encoder
    _, views, _ = step_inputs()
    together = encoder(views, [None, None, None])
    assert encoder.fc.bn1.num_batches_tracked == 2  # one batch of 32 pixels, one of 16
    joined = encoder([torch.cat(views[1:])], [None])[0]
    assert_close(together[1:].flatten(0, 1), joined)
    assert_close(together[0], encoder(views[:1], [None])[0])


def test_views_of_one_size_that_keep_other_numbers_of_patches_go_through_apart():
    """A whole, a lightly and a heavily masked view of one size are three batches."""
    encoder = pretraining().anchor_encoder
    view = doubles(4, 3, 32, 32)
    masks = [None, torch.arange(11).expand(4, -1), torch.arange(5).expand(4, -1)]
    together = encoder([view, view, view], masks)
    apart = [encoder([view], [mask])[0] for mask in masks]
    assert_close(together, torch.stack(apart))


@pytest.mark.parametrize("views, patches_to_keep", [(0, None), (2, [None])])
def test_masks_that_do_not_match_the_views_are_refused(views, patches_to_keep):
    """Masks that do not match the views are refused, and so are no views."""
    target, anchor_views, _ = step_inputs()
    with pytest.raises(ValueError, match="at least one view"):
        pretraining()(target, anchor_views[:views], patches_to_keep)


def indices(b: int = 4, r: int = 11, first: int = 0) -> Tensor:
    return torch.arange(first, first + r).expand(b, -1)


@pytest.mark.parametrize(
    "views, says",
    [
        ({"target_view": [doubles(4, 3, 32, 32)]}, "target_view is a list of 1; pass one tensor"),
        ({"target_view": None}, "target_view is None"),
        (
            {"target_view": doubles(3, 3, 32, 32)},
            r"anchor_views\[0\] has 4 images and target_view 3",
        ),
        ({"target_view": doubles(4, 3, 32, 2)}, "target_view: .*32 x 2 .*one patch of 8 x 8"),
        ({1: doubles(3, 3, 16, 16)}, r"anchor_views\[1\] has 3 images and target_view 4"),
        ({1: doubles(3, 16, 16)}, r"anchor_views\[1\] has shape \(3, 16, 16\)"),
        ({1: None}, r"anchor_views\[1\] is None"),
        ({1: doubles(4, 3, 32, 2)}, "32 x 2 pixels but need at least one patch .*larger"),
        ({"anchor_views": None}, "anchor_views is None; pass a list of tensors"),
        ({"patches_to_keep": indices()}, r"patches_to_keep is one tensor of .* as \[indices\]"),
        ({"mask": indices(b=3)}, r"patches_to_keep\[0\] has shape \(3, 11\); .*4 images, 1 to 16"),
        ({"mask": indices(r=17)}, r"patches_to_keep\[0\] has shape \(4, 17\)"),
        ({"mask": indices(r=0)}, r"shape \(4, 0\)"),
        ({"mask": indices()[0]}, r"shape \(11,\)"),
        ({"mask": indices().int()}, "type torch.int32; .*long"),
        ({"mask": indices(r=16) > 3}, "type torch.bool; pass the numbers of the patches"),
        ({"mask": indices(first=6)}, "numbers from 6 to 16; the patches .* from 0 to 15"),
        ({"mask": indices(first=-1)}, "numbers from -1 to 9"),
        ({"mask": [0, 1]}, r"patches_to_keep\[0\] is a list of 2"),
    ],
)
def test_views_and_masks_that_do_not_fit_are_refused_in_words(views, says):
    """What is wrong with one of the views or masks is said, with which one it is."""
    target_view, anchor_views, patches_to_keep = step_inputs()
    views = dict(views)
    for key in views.keys() & {1}:
        anchor_views[key] = views.pop(key)
    if "mask" in views:
        patches_to_keep[0] = views.pop("mask")
    given = {
        "target_view": target_view,
        "anchor_views": anchor_views,
        "patches_to_keep": patches_to_keep,
    }
    with pytest.raises(ValueError, match=says) as refusal:
        pretraining()(**{**given, **views})
    assert "interpolate_pos_encoding" not in str(refusal.value)  # the model passes that itself


@pytest.mark.parametrize("b", [0, 1])
def test_a_batch_without_statistics_is_refused_in_training_mode_alone(b):
    """One image has no variance, so batch norm refuses it in words; evaluation takes it."""
    model = pretraining()
    view = doubles(b, 3, 32, 32)
    with pytest.raises(ValueError, match=f"a batch of {b}: .*batch norm .*two images or more"):
        model(view, [view])
    if b == 1:
        assert model.eval()(view, [view]).loss.isfinite()


def test_momentum_1_keeps_the_target_and_0_copies_the_anchor():
    """The two ends of the moving average."""
    model = pretraining()
    randomized(model.anchor_encoder, seed=1)
    before = [p.clone() for p in model.target_encoder.parameters()]
    model.update_target(1.0)
    assert all(a.equal(b) for a, b in zip(model.target_encoder.parameters(), before, strict=True))
    model.update_target(0.0)
    pairs = zip(model.target_encoder.parameters(), model.anchor_encoder.parameters(), strict=True)
    assert all(target.equal(anchor) for target, anchor in pairs)


@given(momentum=st.floats(0, 1), steps=st.integers(1, 10))
def test_many_steps_of_the_moving_average_match_the_closed_form(momentum, steps):
    """t steps leave momentum^t of the start and the rest of the anchor."""
    model = pretraining()
    randomized(model.anchor_encoder, seed=1)
    start = [p.clone() for p in model.target_encoder.parameters()]
    for _ in range(steps):
        model.update_target(momentum)
    for target, anchor, first in zip(
        model.target_encoder.parameters(), model.anchor_encoder.parameters(), start, strict=True
    ):
        assert_close(target, momentum**steps * first + (1 - momentum**steps) * anchor)


def test_each_encoder_has_running_statistics_of_its_own():
    """Running statistics are each encoder's own and are not averaged."""
    model = pretraining()
    model(*step_inputs())
    buffers = {name: buffer.clone() for name, buffer in model.target_encoder.named_buffers()}
    assert buffers["fc.bn1.num_batches_tracked"] == 1  # the target encoder is in training mode, too
    assert model.anchor_encoder.fc.bn1.num_batches_tracked == 2
    model.update_target(0.5)
    for name, buffer in model.target_encoder.named_buffers():
        assert buffer.equal(buffers[name]), name


def test_both_encoders_start_alike_and_prototypes_lie_within_the_published_bound():
    """The target starts as a copy; prototypes are uniform within 1 / sqrt(e)."""
    model = ViTMSNForPreTraining(tiny_config(), 20, 256, 1024)
    pairs = zip(model.target_encoder.parameters(), model.anchor_encoder.parameters(), strict=True)
    for target, anchor in pairs:
        assert target.equal(anchor)
        assert target.data_ptr() != anchor.data_ptr()

    bound = 1 / math.sqrt(256)
    assert model.prototypes.shape == (1024, 256)
    assert 0.99 * bound < model.prototypes.abs().max() <= bound
    assert abs(model.prototypes.std() / (bound / math.sqrt(3)) - 1) < 0.02  # uniform


def test_a_prior_exponent_reaches_the_loss():
    """prior_exponent changes me-max and nothing else."""
    inputs = step_inputs()
    uniform = pretraining(prior_exponent=0.0)(*inputs)
    power = pretraining(prior_exponent=1.0)(*inputs)
    assert not uniform.memax.allclose(power.memax)
    assert uniform.cross_entropy.allclose(power.cross_entropy)


def test_the_sharpening_of_a_step_overrides_the_one_given_at_construction():
    """A schedule's sharpening counts, not the constructor's."""
    inputs = step_inputs()
    by_step = pretraining(sharpening=0.9)(*inputs, sharpening=0.3)
    assert_close(by_step, pretraining(sharpening=0.3)(*inputs))
