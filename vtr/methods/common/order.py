"""Orders of grid tokens in which a block of consecutive tokens is compact, and the place of text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtr.kernels.masks import tile_order


def hilbert_order(shape: Sequence[int]) -> Tensor:
    """The raster indices of grid tokens along a Hilbert curve, (prod(shape),) int64.

    The curve is that of the enclosing cube with a power of two as its side (Skilling, "Programming
    the Hilbert curve", AIP 2004), of which the tokens of the grid are taken in order: neighbours on
    the curve are neighbours in the grid except at the places at which it leaves the grid.

    Args:
        shape: tokens per axis; axes of one token do not count.
    """
    sizes = [n for n in shape if n > 1]
    if not sizes:
        return torch.zeros(1, dtype=torch.int64, device="cpu")
    bits = max((n - 1).bit_length() for n in sizes)
    axes = [
        t.flatten()
        for t in torch.meshgrid(*(torch.arange(n, device="cpu") for n in sizes), indexing="ij")
    ]
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for i in range(len(axes)):
            flip = (axes[i] >> bit & 1).bool()
            swap = torch.where(flip, 0, (axes[0] ^ axes[i]) & low)
            axes[0] = torch.where(flip, axes[0] ^ low, axes[0] ^ swap)
            if i:
                axes[i] = axes[i] ^ swap
    for i in range(1, len(axes)):
        axes[i] = axes[i] ^ axes[i - 1]
    turn = torch.zeros_like(axes[0])
    for bit in range(bits - 1, 0, -1):
        turn = torch.where((axes[-1] >> bit & 1).bool(), turn ^ ((1 << bit) - 1), turn)
    key = torch.zeros_like(axes[0])
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            key = key << 1 | (axis ^ turn) >> bit & 1
    return key.argsort()


def grid_order(shape: Sequence[int], order: str | Sequence[int]) -> Tensor:
    """Raster indices of grid tokens, (prod(shape),) int64: ``"raster"``, ``"hilbert"``, or tile by
    tile of the size given (tokens per axis)."""
    if order == "hilbert":
        return hilbert_order(shape)
    if order == "raster":
        return torch.arange(torch.Size(shape).numel(), device="cpu")
    return tile_order(shape, [int(n) for n in order])


def check_order(order: object) -> str | tuple[int, int, int]:
    """``"hilbert"``, ``"raster"`` or three positive ints, else ValueError."""
    if order == "hilbert" or order == "raster":
        return str(order)
    tile = tuple(order) if isinstance(order, (tuple, list)) else ()
    if len(tile) == 3 and all(type(n) is int and n > 0 for n in tile):
        return tile[0], tile[1], tile[2]
    raise ValueError(
        f'order must be "hilbert", "raster" or a tile (frames, height, width) of tokens, got {order!r}'
    )


class Arranged(NamedTuple):
    """Tokens put in another order: ``x[:, :, order]`` there, ``y[:, :, back]`` back.

    Attributes:
        order: (M,) int64, the model's index of each place: grid tokens, then text. M > S if some
            places are filled up with tokens that are elsewhere too.
        back: (S,) int64, the place of each token of the model.
    """

    order: Tensor
    back: Tensor

    def to(self, device: torch.device | str) -> Arranged:
        return Arranged(self.order.to(device), self.back.to(device))


def arrange(grid: Tensor, text: int, text_first: bool) -> Arranged | None:
    """The sequence with its grid tokens in the order ``grid`` and the text behind them; None if it
    is in that order already.

    Args:
        grid: (M,) int64, the raster index of the token in each place, on the CPU; -1 for a place
            without one, which is filled up with the first token.
    """
    real = torch.cat([grid >= 0, torch.ones(text, dtype=torch.bool, device="cpu")])
    tokens = int(real.sum()) - text
    words = torch.arange(text, device="cpu") + (0 if text_first else tokens)
    order = torch.cat([grid.clamp(min=0) + (text if text_first else 0), words])
    places = torch.arange(order.numel(), device="cpu")
    if torch.equal(order, places):
        return None
    back = torch.empty(tokens + text, dtype=torch.int64, device="cpu")
    back[order[real]] = places[real]
    return Arranged(order, back)


def reorder(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` (M,) of x (B, H, S, D): (B, H, M, D), contiguous."""
    learns = torch.is_grad_enabled() and x.requires_grad
    if not x.is_cuda or learns or torch.compiler.is_compiling():
        return x.index_select(2, index)
    return select_wide(x, index)


def select_wide(x: Tensor, index: Tensor) -> Tensor:
    """:func:`reorder` in words of 16 bytes if the rows are such words: CUDA's ``index_select``
    moves element by element, and calculates a place for each."""
    steps = (x.shape[3], x.storage_offset(), *x.stride()[:3])
    if x.stride(3) != 1 or any(n * x.element_size() % 16 for n in steps):
        return x.index_select(2, index)
    return x.view(torch.complex128).index_select(2, index).view(x.dtype)


def block_neighbours(shape: Sequence[int], order: Tensor, block: int) -> Tensor:
    """Tell which blocks of the reordered tokens touch: (NB, NB) bool, symmetric, True on the diagonal.

    Two blocks touch when a token of one lies within one step of a token of the other along every
    axis (the 26 neighbours of a token in a video, 8 in an image).

    Args:
        shape: grid. order: (N,) raster index of each place. block: tokens per block.
    """
    count = -(-order.numel() // block)
    of = torch.empty(order.numel(), dtype=torch.int64, device="cpu")
    of[order.cpu()] = torch.arange(order.numel(), device="cpu") // block
    of = of.view(*shape)
    touch = torch.eye(count, dtype=torch.bool, device="cpu")
    for step in itertools.product((-1, 0, 1), repeat=len(shape)):
        if step <= (0,) * len(shape):  # each pair once; the matrix becomes symmetric below
            continue
        here = tuple(slice(max(0, -d), n - max(0, d)) for d, n in zip(step, shape, strict=True))
        there = tuple(slice(max(0, d), n - max(0, -d)) for d, n in zip(step, shape, strict=True))
        touch[of[here].flatten(), of[there].flatten()] = True
    return touch | touch.t()
