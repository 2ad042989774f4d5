"""The objective, piece by piece: assignments, sharpening, Sinkhorn, me-max, the loss, the moving average."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from common import randn, randomized, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

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

seeds, counts = st.integers(0, 2**31), st.integers(2, 9)
temperatures = st.floats(0.1, 1.0)


def log_rows(b: int, k: int, seed: int, spread: float = 2.0) -> Tensor:
    """b distributions over k prototypes, in logs."""
    return (spread * randn(b, k, seed=seed, dtype=torch.float64)).log_softmax(dim=-1)


def row_entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(dim=-1)


@given(b=counts, k=counts, e=counts, temperature=temperatures, seed=seeds)
def test_assignments_are_the_softmax_of_cosine_similarities(b, k, e, temperature, seed):
    z, prototypes = (
        randn(b, e, seed=seed, dtype=torch.float64),
        randn(k, e, seed=seed + 1, dtype=torch.float64),
    )
    cosines = F.cosine_similarity(z[:, None], prototypes[None], dim=-1)
    assert_close(
        log_assign(z, prototypes, temperature).exp(), (cosines / temperature).softmax(dim=-1)
    )


@given(b=counts, k=counts, smoothing=st.floats(0, 0.9), seed=seeds)
def test_smoothing_mixes_with_the_uniform_distribution(b, k, smoothing, seed):
    log_p = log_rows(b, k, seed)
    assert_close(smooth(log_p, smoothing).exp(), (1 - smoothing) * log_p.exp() + smoothing / k)


@given(b=counts, k=counts, t=temperatures, seed=seeds)
def test_sharpening_is_a_power_renormalised(b, k, t, seed):
    p = log_rows(b, k, seed).exp()
    assert_close(sharpen(p.log(), t).exp(), p ** (1 / t) / (p ** (1 / t)).sum(dim=-1, keepdim=True))


@given(b=counts, k=counts, seed=seeds)
def test_sharpening_by_1_is_the_identity(b, k, seed):
    log_p = log_rows(b, k, seed)
    assert_close(sharpen(log_p, 1.0), log_p)


@given(b=counts, k=counts, s=temperatures, t=temperatures, seed=seeds)
def test_sharpening_twice_multiplies_the_temperatures(b, k, s, t, seed):
    log_p = log_rows(b, k, seed)
    assert_close(sharpen(sharpen(log_p, s), t), sharpen(log_p, s * t))


@given(b=counts, k=counts, t=temperatures, seed=seeds)
def test_sharpening_keeps_the_order_and_never_adds_entropy(b, k, t, seed):
    log_p = log_rows(b, k, seed)
    sharp = sharpen(log_p, t)
    assert sharp.argsort(dim=-1).equal(log_p.argsort(dim=-1))
    assert (row_entropy(sharp) <= row_entropy(log_p) + 1e-12).all()


@given(b=counts, k=counts, iterations=st.integers(1, 5), seed=seeds)
def test_after_every_sinkhorn_iteration_each_image_sums_to_1(b, k, iterations, seed):
    any_positive_matrix = 3 * randn(b, k, seed=seed, dtype=torch.float64)
    sums = sinkhorn(any_positive_matrix, iterations).exp().sum(dim=1)
    assert_close(sums, torch.ones(b, dtype=torch.float64))


@given(b=counts, k=counts, seed=seeds)
def test_prototype_totals_tend_to_an_even_share(b, k, seed):
    shares = sinkhorn(log_rows(b, k, seed, spread=1.0), 400).exp().sum(dim=0)
    assert_close(shares, torch.full((k,), b / k, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@given(n=counts, repeats=st.integers(1, 3), seed=seeds)
def test_a_balanced_matrix_stays_as_it_is(n, repeats, seed):
    row = log_rows(1, n, seed)[0]
    balanced = torch.stack([row.roll(shift) for shift in range(n)]).repeat(repeats, 1)
    assert_close(sinkhorn(balanced, 3), balanced)


@given(data=st.data(), b=counts, k=counts, seed=seeds)
def test_sinkhorn_commutes_with_permuting_images_and_prototypes(data, b, k, seed):
    log_p = log_rows(b, k, seed)
    rows, columns = data.draw(st.permutations(range(b))), data.draw(st.permutations(range(k)))
    assert_close(sinkhorn(log_p[rows][:, columns]), sinkhorn(log_p)[rows][:, columns])


@given(b=counts, k=counts, seed=seeds)
def test_sinkhorn_forgets_the_scale_of_a_prototypes_column(b, k, seed):
    log_p = log_rows(b, k, seed)
    assert_close(
        sinkhorn(log_p + 5 * randn(k, seed=seed + 1, dtype=torch.float64)), sinkhorn(log_p)
    )


def test_without_iterations_sinkhorn_changes_nothing():
    assert sinkhorn(log_rows(3, 4, 0), 0).equal(log_rows(3, 4, 0))


@given(n=counts, seed=seeds)
def test_me_max_is_zero_exactly_where_the_mean_prediction_is_uniform(n, seed):
    row = log_rows(1, n, seed)[0]
    assert abs(me_max(torch.stack([row.roll(shift) for shift in range(n)]))) < 1e-12
    assert me_max(row[None]) > 1e-6


@given(b=counts, k=counts, spread=st.floats(0.1, 50), seed=seeds)
def test_me_max_lies_between_zero_and_log_k(b, k, spread, seed):
    assert -1e-12 <= me_max(log_rows(b, k, seed, spread)) <= math.log(k) + 1e-12
    collapsed = torch.full((b, k), -800.0, dtype=torch.float64)
    collapsed[:, 0] = 0
    assert me_max(collapsed) == pytest.approx(math.log(k))


@given(b=counts, k=counts, exponent=st.floats(0, 2), seed=seeds)
def test_with_a_prior_me_max_is_the_divergence_from_it(b, k, exponent, seed):
    log_p, prior = log_rows(b, k, seed), power_law_prior(k, exponent)
    ranks = torch.arange(1, k + 1, dtype=torch.float64)
    assert_close(prior.exp().double(), ranks**-exponent / (ranks**-exponent).sum())
    divergence = F.kl_div(
        prior.double(), log_p.exp().mean(dim=0).log(), log_target=True, reduction="sum"
    )
    assert_close(me_max(log_p, prior), divergence)
    assert abs(me_max(prior.expand(b, -1).double(), prior)) < 1e-12
    assert_close(me_max(log_p, power_law_prior(k, 0.0)), me_max(log_p))


@given(b=counts, k=counts, seed=seeds)
def test_entropy_is_the_mean_over_single_predictions(b, k, seed):
    log_p = log_rows(b, k, seed)
    assert_close(entropy(log_p), torch.distributions.Categorical(logits=log_p).entropy().mean())


def loss_inputs(v: int, b: int, k: int, e: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        randn(rows, e, seed=seed + i, dtype=torch.float64) for i, rows in enumerate((v * b, b, k))
    )


@given(v=st.integers(1, 4), b=counts, k=counts, e=counts, seed=seeds)
def test_the_loss_is_unchanged_by_rescaling_and_by_rotating_everything_together(v, b, k, e, seed):
    anchors, targets, prototypes = inputs = loss_inputs(v, b, k, e, seed)
    options = {"entropy_weight": 0.5, "label_smoothing": 0.1}
    rotation = torch.linalg.qr(randn(e, e, seed=seed, dtype=torch.float64)).Q
    expected = msn_loss(*inputs, **options)
    assert_close(msn_loss(7 * anchors, targets / 3, 2 * prototypes, **options), expected)
    assert_close(msn_loss(*(x @ rotation for x in inputs), **options), expected)


@given(v=st.integers(1, 4), b=counts, k=counts, seed=seeds)
def test_the_loss_is_the_weighted_sum_of_its_terms(v, b, k, seed):
    out = msn_loss(*loss_inputs(v, b, k, 5, seed), memax_weight=0.7, entropy_weight=0.3)
    assert_close(out.loss, out.cross_entropy + 0.7 * out.memax + 0.3 * out.entropy)
    assert_close(out.target_assignments.sum(dim=1), torch.ones(b, dtype=torch.float64))
    assert out.prototypes_used == len(out.target_assignments.argmax(dim=1).unique())
    assert 0 <= out.bottom_assignment <= 1 / k <= out.top_assignment <= 1


def test_views_of_the_same_image_are_compared_with_its_own_target():
    _, targets, prototypes = loss_inputs(1, 6, 8, 5, 0)
    right = msn_loss(targets.repeat(3, 1), targets, prototypes).cross_entropy  # view-major
    wrong = msn_loss(targets.repeat_interleave(3, 0), targets, prototypes).cross_entropy
    assert right < wrong


def test_anchor_rows_that_are_no_whole_number_of_views_are_refused():
    with pytest.raises(ValueError, match="whole number of views"):
        msn_loss(randn(7, 4), randn(3, 4), randn(5, 4))


@given(k=st.sampled_from([2, 100, 1024, 8192]), seed=seeds)
def test_nothing_overflows_at_temperature_and_sharpening_of_a_hundredth(k, seed):
    anchors, targets, prototypes = (
        x.float().requires_grad_() for x in loss_inputs(2, 8, k, 16, seed)
    )
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
    prototypes = torch.eye(4, 4).requires_grad_()
    for rows in (torch.eye(4), torch.eye(4)[:1].repeat(4, 1), -torch.eye(4)):
        anchors = rows.clone().requires_grad_()
        out = msn_loss(
            anchors, rows, prototypes, temperature=0.01, sharpening=0.01, entropy_weight=1.0
        )
        assert all(
            torch.isfinite(x).all()
            for x in (*out, *torch.autograd.grad(out.loss, (anchors, prototypes)))
        )


def test_the_loss_is_computed_in_float32_under_autocast():
    inputs = [x.float() for x in loss_inputs(2, 4, 6, 8, 0)]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = msn_loss(*inputs)
        halves = msn_loss(*(x.bfloat16() for x in inputs))
    assert_close(under_autocast, msn_loss(*inputs))
    assert halves.loss.dtype == torch.float32


def test_no_gradient_reaches_the_targets():
    anchors, targets, prototypes = (x.requires_grad_() for x in loss_inputs(2, 4, 6, 8, 0))
    msn_loss(anchors, targets, prototypes).loss.backward()
    assert targets.grad is None and (anchors.grad != 0).any() and (prototypes.grad != 0).any()


def test_prototypes_learn_through_the_anchors_side_only():
    anchors, targets, prototypes = loss_inputs(2, 4, 6, 8, 0)
    prototypes.requires_grad_()
    out = msn_loss(anchors, targets, prototypes)
    log_p = log_assign(anchors, prototypes, 0.1)
    by_hand = -(out.target_assignments.repeat(2, 1) * log_p).sum(dim=1).mean() + me_max(
        log_p
    )  # assignments: constants
    gradients = [torch.autograd.grad(loss, prototypes)[0] for loss in (out.loss, by_hand)]
    assert_close(*gradients)


def in_processes(shards: list, work) -> list:
    """work(shard, all_reduce) for every shard at once, in threads that reduce with each other."""
    barrier, slots, results = (
        threading.Barrier(len(shards)),
        [None] * len(shards),
        [None] * len(shards),
    )

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
    anchors, targets, prototypes = loss_inputs(v, b, k, 6, seed)
    whole = msn_loss(anchors, targets, prototypes)
    halves = [
        (anchors.reshape(v, b, -1)[:, rows].flatten(0, 1), targets[rows])
        for rows in (slice(0, b // 2), slice(b // 2, b))
    ]
    parts = in_processes(
        halves, lambda shard, all_reduce: msn_loss(*shard, prototypes, all_reduce=all_reduce)
    )
    assert_close(torch.cat([part.target_assignments for part in parts]), whole.target_assignments)
    for part in parts:
        assert_close(part.memax, whole.memax)
        assert part.prototypes_used == whole.prototypes_used
    assert_close((parts[0].cross_entropy + parts[1].cross_entropy) / 2, whole.cross_entropy)


# -- the whole step --------------------------------------------------------------------------------


def pretraining(**options) -> ViTMSNForPreTraining:
    model = randomized(ViTMSNForPreTraining(tiny_config(), 20, 16, 12, **options)).double()
    model.update_target(0.0)
    return model


def step_inputs(b: int = 4) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    large, small = (randn(3, b, 3, size, size, seed=size, dtype=torch.float64) for size in (32, 16))
    keep = torch.stack([torch.randperm(16)[:11] for _ in range(b)])
    return large[0], [large[1], small[0], small[1]], [keep, None, None]


def test_every_trainable_tensor_gets_a_gradient_and_no_target_tensor_does():
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
    model = pretraining()
    model(*step_inputs()).loss.backward()
    for block in model.anchor_encoder.blocks:
        query, key, value = block.attn.qkv.bias.grad.chunk(3)
        assert key.abs().max() < 1e-12 and query.abs().max() > 1e-6 and value.abs().max() > 1e-6


def test_without_masks_all_patches_are_seen():
    model, (target, views, _) = pretraining().eval(), step_inputs()
    everything = torch.arange(16).expand(4, -1)
    assert_close(model(target, views), model(target, views, [everything, None, None]))
    assert not model(target, views).loss.allclose(
        model(target, views, [everything[:, :5], None, None]).loss
    )


def test_views_of_one_size_share_batch_statistics_and_other_sizes_have_their_own():
    model, (_, views, _) = pretraining(), step_inputs()
    encoder = model.anchor_encoder
    together = encoder(views, [None, None, None])
    assert encoder.fc.bn1.num_batches_tracked == 2  # one batch of 32 pixels, one of 16
    joined = encoder([torch.cat(views[1:])], [None])[0]
    assert_close(together[1:].flatten(0, 1), joined)
    assert_close(together[0], encoder(views[:1], [None])[0])


@pytest.mark.parametrize("views, keep", [(0, None), (2, [None])])
def test_a_mask_or_none_is_wanted_for_each_of_at_least_one_view(views, keep):
    target, anchor_views, _ = step_inputs()
    with pytest.raises(ValueError, match="at least one view"):
        pretraining()(target, anchor_views[:views], keep)


def test_momentum_1_keeps_the_target_and_0_copies_the_anchor():
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
    model = pretraining()
    randomized(model.anchor_encoder, seed=1)
    start = [p.clone() for p in model.target_encoder.parameters()]
    for _ in range(steps):
        model.update_target(momentum)
    for target, anchor, first in zip(
        model.target_encoder.parameters(), model.anchor_encoder.parameters(), start, strict=True
    ):
        assert_close(target, momentum**steps * first + (1 - momentum**steps) * anchor)


def test_the_moving_average_leaves_buffers_alone_while_forward_moves_each_encoders_own():
    model = pretraining()
    model(*step_inputs())
    buffers = {name: buffer.clone() for name, buffer in model.target_encoder.named_buffers()}
    assert buffers["fc.bn1.num_batches_tracked"] == 1  # the target encoder is in training mode, too
    assert model.anchor_encoder.fc.bn1.num_batches_tracked == 2
    model.update_target(0.5)
    for name, buffer in model.target_encoder.named_buffers():
        assert buffer.equal(buffers[name]), name


def test_both_encoders_start_alike_and_prototypes_lie_within_the_published_bound():
    model = ViTMSNForPreTraining(tiny_config(), 20, 256, 1024)
    for target, anchor in zip(
        model.target_encoder.parameters(), model.anchor_encoder.parameters(), strict=True
    ):
        assert target.equal(anchor) and target.data_ptr() != anchor.data_ptr()
    bound = 1 / math.sqrt(256)
    assert (
        model.prototypes.shape == (1024, 256)
        and 0.99 * bound < model.prototypes.abs().max() <= bound
    )
    assert abs(model.prototypes.std() / (bound / math.sqrt(3)) - 1) < 0.02  # uniform


def test_a_prior_exponent_reaches_the_loss():
    inputs = step_inputs()
    uniform, power = (pretraining(prior_exponent=exponent)(*inputs) for exponent in (0.0, 1.0))
    assert not uniform.memax.allclose(power.memax) and uniform.cross_entropy.allclose(
        power.cross_entropy
    )


def test_the_sharpening_of_a_step_overrides_the_one_given_at_construction():
    inputs = step_inputs()
    by_step = pretraining(sharpening=0.9)(*inputs, sharpening=0.3)
    assert_close(by_step, pretraining(sharpening=0.3)(*inputs))
