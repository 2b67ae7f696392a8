"""Curves through the tokens of a grid: neighbours on the curve are mostly neighbours in the grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
