"""Layouts: which tokens of the grid are in a block. The first of six parts of a mask chosen at run time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vtr.kernels.masks.build import on_cpu
from vtr.kernels.masks.curves import hilbert_order
from vtr.kernels.masks.gilbert import gilbert_frames, gilbert_order
from vtr.kernels.masks.grids import tile_order


@dataclass(frozen=True)
class Layout:
    """An order of the tokens of a grid, cut into blocks of queries and blocks of keys.

    Attributes:
        order: (M,) int64 on the CPU, the raster index of the token in each place, -1 for a place
            without one.
        sides: tokens of a query block, and of a key block. The last ones may have fewer.
    """

    order: Tensor
    sides: tuple[int, int]

    @property
    def places(self) -> int:
        """M, the number of places."""
        return self.order.numel()

    @property
    def blocks(self) -> tuple[int, int]:
        """Numbers of query blocks and of key blocks."""
        return -(-self.places // self.sides[0]), -(-self.places // self.sides[1])

    @cached_property
    def padded(self) -> bool:
        """Tell whether there are places without a token."""
        return bool((self.order < 0).any())

    @cached_property
    def is_raster(self) -> bool:
        """Tell whether the tokens are in the order of the grid."""
        return torch.equal(self.order, torch.arange(self.places, device="cpu"))

    def counts(self, side: int) -> Tensor:
        """Count the tokens of each block along a side, 0 for queries and 1 for keys: (n,) int64."""
        return _cut(self.order >= 0, self.sides[side]).sum(1)

    def block_of(self, side: int) -> Tensor:
        """Return the block of each token along a side: (N,) int64 by raster index."""
        place = (self.order >= 0).nonzero().flatten()
        of = torch.empty(place.numel(), dtype=torch.int64, device="cpu")
        of[self.order[place]] = place // self.sides[side]
        return of


def _cut(x: Tensor, block: int) -> Tensor:
    room = -x.numel() % block
    return torch.cat([x, x.new_zeros(room)]).view(-1, block)


@on_cpu
def ordered(
    shape: Sequence[int], sides: tuple[int, int], order: str | Sequence[int] = "raster"
) -> Layout:
    """Blocks of consecutive tokens in an order: ``"raster"``, one of :data:`CURVES`, or the tokens per axis
    of a tile."""
    if order == "raster":
        return raster(shape, sides)
    if isinstance(order, str):
        return curve(shape, sides, order)
    return tiled(shape, order, sides)


@on_cpu
def raster(shape: Sequence[int], sides: tuple[int, int]) -> Layout:
    """Blocks of consecutive tokens in raster order."""
    return Layout(torch.arange(math.prod(shape), device="cpu"), sides)


CURVES = {"hilbert": hilbert_order, "gilbert": gilbert_order, "gilbert-frames": gilbert_frames}
"""Space-filling curves by name: functions of the grid that return raster indices in order."""


@on_cpu
def curve(shape: Sequence[int], sides: tuple[int, int], name: str = "hilbert") -> Layout:
    """Blocks of consecutive tokens of a space-filling curve.

    Args:
        name: one of :data:`CURVES`. ``"hilbert"`` is the curve of the enclosing cube, ``"gilbert"`` one of
            the grid's own sides, ``"gilbert-frames"`` one of each frame after the other.
    """
    return Layout(CURVES[name](shape), sides)


@on_cpu
def tiled(
    shape: Sequence[int], tile: Sequence[int], sides: tuple[int, int], *, whole: bool = False
) -> Layout:
    """Tokens tile by tile, inside a tile and among tiles in raster order.

    Args:
        tile: tokens per axis of a tile; tiles at the end of the grid may be smaller.
        whole: begin each tile with a new block: a tile that is no multiple of both sides is filled up
            with places without a token.

    Raises:
        ValueError: with ``whole``, the tile is larger than the grid.
    """
    order = tile_order(shape, tile)
    if not whole:
        return Layout(order, sides)
    if any(t > n for t, n in zip(tile, shape, strict=True)):
        raise ValueError(
            f"a tile of {tuple(tile)} tokens (frames, height, width) is larger than the grid "
            f"{tuple(shape)}: give a smaller tile, or make a larger picture or longer video"
        )
    point = torch.stack(torch.unravel_index(order, tuple(shape)))
    number = torch.zeros_like(order)
    for axis, (size, side) in enumerate(zip(shape, tile, strict=True)):
        number = number * -(-size // side) + point[axis] // side
    count = torch.bincount(number)
    unit = math.lcm(*sides)
    room = (count + unit - 1) // unit * unit
    start = room.cumsum(0) - room
    inside = torch.arange(order.numel(), device="cpu") - (count.cumsum(0) - count)[number]
    filled = torch.full((int(room.sum()),), -1, dtype=torch.int64, device="cpu")
    filled[start[number] + inside] = order
    return Layout(filled, sides)
