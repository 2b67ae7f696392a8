"""Windows and tiles that fit a grid of tokens of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

GridWindow = int | float | tuple[int, ...]


def check_window(window: object, name: str = "window") -> GridWindow:
    """A share of the grid (a float in (0, 1]), one positive int, or two or three of them."""
    if isinstance(window, (tuple, list)):
        if len(window) in (2, 3) and all(type(n) is int and n > 0 for n in window):
            return tuple(window)
    elif (type(window) is int and window > 0) or (isinstance(window, float) and 0 < window <= 1):
        return window
    raise ValueError(
        f"{name} must be a float in (0, 1] (a share of the grid), a positive int, or ints for "
        f"(frames, height, width), got {window!r}"
    )


def fit_window(window: GridWindow, counts: Sequence[int]) -> tuple[int, ...]:
    """A window per axis for a grid of ``counts`` tokens (or tiles) per axis.

    An int holds for every axis as far as the axis goes; two ints are height and width; a float is
    the share of the grid, for which the window with the nearest share is taken, with nearly equal
    shares of the axes.
    """
    if isinstance(window, float):
        return _window_of_share(tuple(counts), window)
    if isinstance(window, int):
        return tuple(min(window, n) for n in counts)
    return (1,) * (len(counts) - len(window)) + window


def _window_of_share(counts: tuple[int, ...], share: float) -> tuple[int, ...]:
    total = math.prod(counts)
    even = share ** (1 / max(1, sum(n > 1 for n in counts)))

    def cost(window: tuple[int, ...]) -> float:
        skew = sum(
            abs(math.log(w / (n * even))) for w, n in zip(window, counts, strict=True) if n > 1
        )
        return abs(math.log(math.prod(window) / total / share)) + 0.1 * skew

    # Only sizes about the even one are worth trying: a window far from it is never the best.
    tries = []
    for n in counts:
        near = round(n * even)
        low, high = max(1, min(near // 2, n - 1)), min(n, 2 * near + 1)
        tries.append(range(low if n > 1 else 1, high + 1))
    return min(product(*tries), key=cost)


def compact_tile(shape: Sequence[int], tokens: int) -> tuple[int, ...]:
    """A tile of at least ``tokens`` tokens (or the whole grid) with sides as equal as powers of two
    can be: doubles the shortest side that its axis still holds, the last axis first."""
    tile = [1] * len(shape)
    while math.prod(tile) < tokens:
        room = [i for i, n in enumerate(shape) if tile[i] < n]
        if not room:
            break
        axis = min(room, key=lambda i: (tile[i], -i))
        tile[axis] *= 2
    return tuple(tile)
