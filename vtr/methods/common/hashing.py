"""Random numbers from a seed and an index, the same on every device."""

from __future__ import annotations

from torch import Tensor

_MASK = 0xFFFFFFFF


def hashed(seed: int, index: Tensor) -> Tensor:
    """Compute a 32-bit integer hash of a seed and of each index (int64 from 0 on), of the index's shape.

    Tensor arithmetic, because a generator cannot be created inside a compiled graph, and because the
    same seed then gives the same numbers on every device.
    """
    x = (index + 1) * 0x9E3779B9 + (seed * 0x85EBCA6B & _MASK) & _MASK
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * factor & _MASK
    return x ^ (x >> 15)
