"""Tiles of the grid that are blocks of the kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch

from vtr.kernels import BlockMask, masks
from vtr.methods.common.grid_windows import GridWindow, fit_window
from vtr.methods.common.masked import Grid, GridMask


def filled_tiles(grid: Grid, window: GridWindow, block: int) -> GridMask:
    """Return sliding tiles with every tile a block: the places that it lacks hold no token.

    Args:
        window: tiles per axis, or a share of the grid (:func:`fit_window`).
        block: places of a block.
    """
    tile = dividing_tile(grid, block)
    tiles = tiles_of(grid, tile)
    number = math.prod(tiles)
    near = masks.sliding_tile(tiles, (1, 1, 1), fit_window(window, tiles), block=block)
    places = number * block
    mask = BlockMask.from_blocks(near.to_dense(), q_len=places, k_len=places, block=block)
    order = masks.tile_order(grid, tile)
    axes = torch.unravel_index(order, grid)
    of = torch.zeros_like(order)
    for axis, step, count in zip(axes, tile, tiles, strict=True):
        of = of * count + axis // step
    held = torch.bincount(of, minlength=number)
    # The place of a token: its tile's block, and its number in the tile.
    start = of * block - (held.cumsum(0) - held)[of]
    filled = torch.full((places,), -1, dtype=torch.int64, device="cpu")
    filled[start + torch.arange(order.numel(), device="cpu")] = order
    return GridMask(mask, filled, whole_blocks=True)


def tiles_of(grid: Sequence[int], tile: Sequence[int]) -> tuple[int, ...]:
    """Tiles per axis of a grid; those at its ends may be smaller."""
    return tuple(-(-n // t) for n, t in zip(grid, tile, strict=True))


def dividing_tile(grid: Sequence[int], block: int) -> tuple[int, ...]:
    """The tile of at most ``block`` tokens whose blocks hold the fewest empty places, and of those
    about equal the one with sides most alike."""

    def cost(tile: tuple[int, ...]) -> float:
        places = math.prod(tiles_of(grid, tile)) * block
        sides = [t / min(n, 8) for t, n in zip(tile, grid, strict=True) if n > 1] or [1.0]
        return math.log(places) + 0.04 * math.log(max(sides) / min(sides))

    sizes = [range(1, min(n, block) + 1) for n in grid]
    return min((t for t in product(*sizes) if math.prod(t) <= block), key=cost)
