"""Patchify and Mask: the laws of cutting images up and of choosing the patches that stay."""

import math
from fractions import Fraction

import pytest
import torch
from common import randn
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vitmsn import num_patches_to_keep, patchify, sample_patches_to_keep, take_patches

sides, seeds = st.integers(1, 9), st.integers(0, 2**31)
ratios = st.decimals(0, "0.99", places=2).map(float)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    b=st.integers(1, 3),
    c=st.integers(1, 4),
    p=st.integers(1, 5),
    rows=sides,
    columns=sides,
    seed=seeds,
)
def test_patches_are_the_squares_row_by_row(b, c, p, rows, columns, seed):
    images = randn(b, c, rows * p, columns * p, seed=seed)
    squares = [
        images[:, :, i : i + p, j : j + p].flatten(1)
        for i in range(0, rows * p, p)
        for j in range(0, columns * p, p)
    ]
    assert patchify(images, p).equal(torch.stack(squares, dim=1))


@given(
    p=st.integers(2, 5),
    rows=sides,
    columns=sides,
    more=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_patchify_drops_the_pixels_that_fill_no_patch(p, rows, columns, more):
    height, width = rows * p + more[0] % p, columns * p + more[1] % p
    images = randn(2, 3, height, width)
    assert patchify(images, p).equal(patchify(images[..., : rows * p, : columns * p], p))
    assert patchify(images, p).shape == (2, rows * columns, 3 * p * p)


def test_patches_run_row_by_row_and_hold_whole_channels():
    image = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    second_of_lower_row = patchify(image, 2)[0, 4]
    assert second_of_lower_row.tolist() == image[0, :, 2:4, 2:4].flatten().tolist()


@given(n=st.integers(1, 2000), ratio=ratios)
def test_the_kept_count_is_the_floor_in_decimal_arithmetic(n, ratio):
    kept = math.floor(n * (1 - Fraction(str(ratio))))
    if kept:
        assert num_patches_to_keep(n, ratio) == kept
    else:
        with pytest.raises(ValueError, match="leaves none"):
            num_patches_to_keep(n, ratio)


def test_25_patches_at_ratio_0_8_keep_5_where_floating_point_says_4():
    assert num_patches_to_keep(25, 0.8) == 5 and math.floor(25 * (1 - 0.8)) == 4


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, math.nan])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        num_patches_to_keep(16, ratio)


@given(
    batch=st.integers(1, 5),
    side=st.integers(2, 9),
    ratio=st.decimals(0, "0.7", places=2).map(float),
    seed=seeds,
)
def test_masks_keep_an_exact_number_of_different_patches_in_ascending_order(
    batch, side, ratio, seed
):
    mask = sample_patches_to_keep(batch, side * side, ratio, generator(seed))
    assert (
        mask.shape == (batch, num_patches_to_keep(side * side, ratio)) and mask.dtype == torch.long
    )
    assert (mask.diff(dim=1) > 0).all()  # ascending, none twice
    assert mask.min() >= 0 and mask.max() < side * side


@given(side=sides, seed=seeds)
def test_ratio_0_is_the_identity(side, seed):
    assert sample_patches_to_keep(2, side * side, 0.0, generator(seed)).equal(
        torch.arange(side * side).expand(2, -1)
    )


def test_the_images_of_a_batch_get_different_masks():
    assert (
        len({tuple(mask) for mask in sample_patches_to_keep(50, 100, 0.5, generator(0)).tolist()})
        > 20
    )


@given(seed=seeds, other=seeds)
def test_the_generator_alone_decides(seed, other):
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    mask = sample_patches_to_keep(4, 49, 0.6, generator(seed))
    assert torch.get_rng_state().equal(before)  # the global one is not even touched
    torch.manual_seed(other)
    assert sample_patches_to_keep(4, 49, 0.6, generator(seed)).equal(mask)
    if seed != other:
        assert not sample_patches_to_keep(4, 49, 0.6, generator(other)).equal(mask)


def test_every_subset_of_patches_is_equally_likely():
    draws = 15_000
    masks = sample_patches_to_keep(draws, 6, 0.65, generator(0)).tolist()  # 2 of 6: 15 subsets
    counts = torch.tensor(
        [masks.count(list(pair)) for pair in torch.combinations(torch.arange(6)).tolist()]
    ).double()
    assert counts.sum() == draws
    chi_square = ((counts - draws / 15) ** 2 / (draws / 15)).sum()
    assert chi_square < 36.1  # 14 degrees of freedom: 1 in 1000


@given(seed=seeds)
def test_take_patches_picks_each_images_own_rows(seed):
    x, keep = randn(3, 10, 4, seed=seed), sample_patches_to_keep(3, 10, 0.6, generator(seed))
    assert_close(
        take_patches(x, keep), torch.stack([rows[own] for rows, own in zip(x, keep, strict=True)])
    )
