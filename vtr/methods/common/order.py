"""Orders of grid tokens in which a block of consecutive tokens is compact, and the place of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtr.kernels.masks import hilbert_order, tile_order
from vtr.kernels.masks.layouts import CURVES


def grid_order(shape: Sequence[int], order: str | Sequence[int]) -> Tensor:
    """Raster indices of grid tokens, (prod(shape),) int64: ``"raster"``, ``"hilbert"``, or tile by
    tile of the size given (tokens per axis)."""
    if order == "hilbert":
        return hilbert_order(shape)
    if order == "raster":
        return torch.arange(torch.Size(shape).numel(), device="cpu")
    return tile_order(shape, [int(n) for n in order])


def check_order(order: object) -> str | tuple[int, int, int]:
    """The name of an order of :func:`vtr.kernels.masks.layouts.ordered`, or three positive ints, else ValueError."""
    if isinstance(order, str) and order in ("raster", *CURVES):
        return order
    tile = _three(order)
    if tile is None:
        names = ", ".join(f'"{name}"' for name in ("raster", *CURVES))
        raise ValueError(
            f"order must be {names} or a tile (frames, height, width) of tokens, got {order!r}"
        )
    return tile


def check_tile(tile: object) -> tuple[int, int, int]:
    """Three positive ints, else ValueError."""
    found = _three(tile)
    if found is None:
        raise ValueError(f"tile must be positive ints (frames, height, width), got {tile!r}")
    return found


def _three(value: object) -> tuple[int, int, int] | None:
    found = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(found) == 3 and all(type(n) is int and n > 0 for n in found):
        return found[0], found[1], found[2]
    return None


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
