"""Patchify and mask: the laws of cutting images up and of choosing the patches to keep."""

import math
from fractions import Fraction

import pytest
import torch
from common import randn, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vitmsn import (
    num_patches_to_keep,
    patchify,
    sample_block_to_keep,
    sample_patches_to_keep,
    take_patches,
)

sides = st.integers(1, 9)
seeds = st.integers(0, 2**31)


@given(
    b=st.integers(1, 3),
    c=st.integers(1, 4),
    p=st.integers(1, 5),
    rows=sides,
    columns=sides,
    seed=seeds,
)
def test_patches_are_the_squares_row_by_row(b, c, p, rows, columns, seed):
    """Patch number row * columns + column is the square at that row and column."""
    images = randn(b, c, rows * p, columns * p, seed=seed)
    squares = []
    for top in range(0, rows * p, p):
        for left in range(0, columns * p, p):
            square = images[:, :, top : top + p, left : left + p]
            squares.append(square.flatten(1))
    assert patchify(images, p).equal(torch.stack(squares, dim=1))


@given(
    p=st.integers(2, 5),
    rows=sides,
    columns=sides,
    more_below=st.integers(0, 4),
    more_right=st.integers(0, 4),
)
def test_patchify_drops_the_pixels_that_fill_no_patch(p, rows, columns, more_below, more_right):
    """Pixels beyond the last whole patch change nothing."""
    height = rows * p + more_below % p
    width = columns * p + more_right % p
    images = randn(2, 3, height, width)
    patches = patchify(images, p)
    assert patches.equal(patchify(images[..., : rows * p, : columns * p], p))
    assert patches.shape == (2, rows * columns, 3 * p * p)


def test_patches_run_row_by_row_and_hold_whole_channels():
    """A patch holds its pixels of the first channel, then those of the second."""
    image = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    second_of_lower_row = patchify(image, 2)[0, 4]
    assert second_of_lower_row.tolist() == image[0, :, 2:4, 2:4].flatten().tolist()


@given(n=st.integers(1, 2000), ratio=st.decimals(0, "0.99", places=2).map(float))
def test_the_kept_count_is_the_floor_in_decimal_arithmetic(n, ratio):
    """r is floor(n (1 - ratio)), the ratio taken as the decimal that one types; never 0."""
    expected = math.floor(n * (1 - Fraction(str(ratio))))
    if expected:
        assert num_patches_to_keep(n, ratio) == expected
    else:
        with pytest.raises(ValueError, match="leaves none"):
            num_patches_to_keep(n, ratio)


def test_25_patches_at_ratio_0_8_keep_5_where_floating_point_says_4():
    """The example for which decimal and binary arithmetic differ."""
    assert num_patches_to_keep(25, 0.8) == 5
    assert math.floor(25 * (1 - 0.8)) == 4


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, math.nan])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    """A mask ratio is at least 0 and below 1."""
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
    """Each image keeps exactly r patches, all different, in ascending order."""
    n = side * side
    patches_to_keep = sample_patches_to_keep(batch, n, ratio, seeded(seed))
    assert patches_to_keep.shape == (batch, num_patches_to_keep(n, ratio))
    assert patches_to_keep.dtype == torch.long
    assert (patches_to_keep.diff(dim=1) > 0).all()  # ascending, none twice
    assert patches_to_keep.min() >= 0
    assert patches_to_keep.max() < n


@given(side=sides, seed=seeds)
def test_ratio_0_is_the_identity(side, seed):
    """At ratio 0 every patch stays, in its order."""
    n = side * side
    patches_to_keep = sample_patches_to_keep(2, n, 0.0, seeded(seed))
    assert patches_to_keep.equal(torch.arange(n).expand(2, -1))


def test_the_images_of_a_batch_get_different_masks():
    """Each image has a mask of its own."""
    patches_to_keep = sample_patches_to_keep(50, 100, 0.5, seeded(0))
    assert len(patches_to_keep.unique(dim=0)) > 20


@given(seed=seeds, other=seeds)
def test_the_generator_alone_decides(seed, other):
    """The same generator gives the same masks, whatever torch's global one has drawn."""
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    patches_to_keep = sample_patches_to_keep(4, 49, 0.6, seeded(seed))
    assert torch.get_rng_state().equal(before)  # the global one is not even touched

    torch.manual_seed(other)
    assert sample_patches_to_keep(4, 49, 0.6, seeded(seed)).equal(patches_to_keep)
    if seed != other:
        assert not sample_patches_to_keep(4, 49, 0.6, seeded(other)).equal(patches_to_keep)


def test_every_subset_of_patches_is_equally_likely():
    """A chi-square test does not tell the drawn subsets from uniform ones."""
    draws = 15_000
    pairs = sample_patches_to_keep(draws, 6, 0.65, seeded(0))  # 2 of 6 patches: 15 subsets
    _, counts = pairs.unique(dim=0, return_counts=True)
    assert len(counts) == 15
    expected = draws / 15
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 36.1  # 14 degrees of freedom: 1 in 1000


# -- the focal mask: a block -----------------------------------------------------------------------

blocks = st.tuples(sides, sides).map(sorted)  # size of the block, of the grid


@given(batch=st.integers(1, 5), block=blocks, seed=seeds)
def test_a_block_is_a_square_of_patches_in_ascending_order(batch, block, seed):
    """Each image keeps `size` whole neighbouring columns of `size` neighbouring rows."""
    size, grid = block
    patches_to_keep = sample_block_to_keep(batch, grid, size, seeded(seed))
    assert patches_to_keep.shape == (batch, size * size)
    assert patches_to_keep.dtype == torch.long
    for kept in patches_to_keep.tolist():
        top, left = divmod(kept[0], grid)
        expected = []
        for row in range(top, top + size):
            for column in range(left, left + size):
                expected.append(row * grid + column)
        assert kept == expected
        assert top + size <= grid
        assert left + size <= grid


@given(side=sides, seed=seeds)
def test_a_block_as_large_as_the_grid_is_the_identity(side, seed):
    """Every patch stays then, in its order."""
    patches_to_keep = sample_block_to_keep(2, side, side, seeded(seed))
    assert patches_to_keep.equal(torch.arange(side * side).expand(2, -1))


@given(block=blocks, seed=seeds)
def test_the_generator_alone_decides_on_blocks(block, seed):
    """The same generator gives the same blocks; torch's global one is not touched."""
    size, grid = block
    before = torch.get_rng_state()
    patches_to_keep = sample_block_to_keep(4, grid, size, seeded(seed))
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(seed)
    assert sample_block_to_keep(4, grid, size, seeded(seed)).equal(patches_to_keep)


def test_every_place_of_a_block_is_equally_likely():
    """A chi-square test does not tell the places of blocks from uniform ones; each image has one of
    its own."""
    draws = 16_000
    patches_to_keep = sample_block_to_keep(draws, 6, 3, seeded(0))  # 4 x 4 places
    _, counts = patches_to_keep.unique(dim=0, return_counts=True)
    assert len(counts) == 16
    expected = draws / 16
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 37.7  # 15 degrees of freedom: 1 in 1000


@pytest.mark.parametrize("size", [-1, 0, 5])
def test_a_block_that_does_not_fit_is_refused(size):
    """A block has at least one patch and at most all of them."""
    with pytest.raises(ValueError, match="use a size from 1 to 4"):
        sample_block_to_keep(2, 4, size, seeded(0))


@given(seed=seeds)
def test_take_patches_picks_each_images_own_patches(seed):
    """Each image is indexed by its own line of patches_to_keep; None keeps all patches."""
    x = randn(3, 10, 4, seed=seed)
    patches_to_keep = sample_patches_to_keep(3, 10, 0.6, seeded(seed))
    one_by_one = [x[i, patches_to_keep[i]] for i in range(3)]
    assert_close(take_patches(x, patches_to_keep), torch.stack(one_by_one))
    assert take_patches(x, None) is x
