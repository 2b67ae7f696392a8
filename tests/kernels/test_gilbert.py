"""Generalised Hilbert curves: each token once, in short steps, in the published order."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from vtr.kernels.masks.gilbert import gilbert_frames, gilbert_order

PUBLISHED = {
    (3, 5): [0, 5, 10, 11, 6, 1, 2, 3, 8, 7, 12, 13, 14, 9, 4],
    (2, 3, 4): [
        0, 12, 13, 1, 5, 17, 16, 4, 8, 20, 21, 9, 10, 22, 23, 11, 7, 19, 18, 6, 2, 14, 15, 3,
    ],
    (3, 4, 3): [
        0, 12, 15, 3, 4, 16, 13, 1, 2, 14, 5, 17, 29, 26, 25, 24, 27, 28, 31, 30, 33, 34, 35, 23, 32,
        20, 8, 11, 10, 22, 19, 7, 6, 18, 21, 9,
    ],
}  # fmt: skip
"""The order in which the published function (``gilbert_xyz2d``) numbers the tokens of small grids."""


def steps(shape, order):
    """Tokens from each place to the next, along the axes together."""
    place = torch.stack(torch.unravel_index(order, shape), 1)
    return (place[1:] - place[:-1]).abs().sum(1)


def shapes(axes):
    source = random.Random(axes)
    return [tuple(source.randint(1, 13) for _ in range(axes)) for _ in range(40)]


@pytest.mark.parametrize("shape", PUBLISHED)
def test_the_published_order(shape):
    assert gilbert_order(shape).tolist() == PUBLISHED[shape]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_each_token_once_in_short_steps(axes):
    for shape in shapes(axes):
        order = gilbert_order(shape)
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(torch.Size(shape).numel())), shape
        found = steps(shape, order)
        if found.numel():
            assert found.min() >= 1 and found.double().mean() < 1.25, shape
            assert axes == 3 or found.max() <= 2, shape


@pytest.mark.parametrize("shape", [(8,), (8, 8), (4, 16), (8, 8, 8), (4, 6, 10), (2, 4, 12)])
def test_even_sides_take_single_steps(shape):
    assert (steps(shape, gilbert_order(shape)) == 1).all()


def test_a_side_of_one_token_does_not_count():
    for shape in shapes(2):
        wanted = gilbert_order(shape)
        assert torch.equal(gilbert_order((1, *shape)), wanted)
        assert torch.equal(gilbert_order((shape[0], 1, shape[1])), wanted)


def test_blocks_are_compact():
    """Blocks of 64 places in a cube of 16: eight cubes of 4 would have 4 tokens per side."""
    place = torch.stack(torch.unravel_index(gilbert_order((16, 16, 16)), (16, 16, 16)), 1)
    extent = torch.stack([b.amax(0) - b.amin(0) + 1 for b in place.split(64)])
    assert extent.max() <= 6 and extent.double().prod(1).mean() < 100


@pytest.mark.parametrize("grid", [(3, 4, 6), (4, 5, 7), (5, 1, 3), (1, 6, 6), (3, 9, 2)])
def test_frame_by_frame_from_the_nearest_corner(grid):
    frames, height, width = grid
    order = gilbert_frames(grid)
    assert torch.equal(order.sort().values, torch.arange(frames * height * width))
    one = [divmod(i, width) for i in gilbert_order((height, width)).tolist()]
    corner = (0, 0)
    for frame, found in enumerate(order.view(frames, -1).tolist()):
        assert {i // (height * width) for i in found} == {frame}
        cells = [divmod(i % (height * width), width) for i in found]
        assert cells[0] == corner
        mirrored = [(abs(corner[0] - row), abs(corner[1] - column)) for row, column in cells]
        assert mirrored == one
        # The middle of an axis belongs to its far half.
        corner = (
            height - 1 if cells[-1][0] >= height / 2 else 0,
            width - 1 if cells[-1][1] >= width / 2 else 0,
        )


@pytest.mark.parametrize("shape", [(), (2, 2, 2, 2), (0, 3), (3, -1)])
def test_sizes_that_are_none(shape):
    with pytest.raises(ValueError, match="shape"):
        gilbert_order(shape)


def test_it_is_built_on_the_cpu():
    with torch.device("meta"):
        made = [gilbert_order((3, 4)), gilbert_frames((2, 3, 4))]
    assert all(order.device.type == "cpu" for order in made)
    assert len(list(itertools.chain(*made))) == 36
