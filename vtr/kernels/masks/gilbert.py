"""Generalised Hilbert curves ("gilbert") of grids of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtr.kernels.masks.build import on_cpu, positive


@on_cpu
def gilbert_order(shape: Sequence[int]) -> Tensor:
    """Return the raster indices of grid tokens along a generalised Hilbert curve, (prod(shape),) int64.

    The curve (Cerveny, "gilbert", 2018) fills a box of any size: the box is cut at about half of its
    sides into two, three or five boxes whose curves join, until one side alone is longer than 1.
    Consecutive tokens are neighbours in the grid if its sides are even; odd sides cost a few longer steps.

    Args:
        shape: tokens per axis, one to three axes. The curve runs first along the longest; of equal
            ones along the last, so that the order of a video is that of Jenga (arXiv 2505.16864).

    Raises:
        ValueError: there are more axes, or a size is not positive.
    """
    sizes = tuple(shape)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"shape must have one to three axes, got {sizes}")
    for size in sizes:
        positive(shape=size)
    sizes = (1,) * (3 - len(sizes)) + sizes
    rest = [2, 1, 0]
    longest = max(rest, key=lambda axis: sizes[axis])
    rest.remove(longest)
    sides = [_Side(axis, sizes[axis]) for axis in (longest, *rest)]
    strides = (sizes[1] * sizes[2], sizes[2], 1)
    lines = torch.tensor(_lines(sides, strides), dtype=torch.int64, device="cpu")
    start, step, count = lines.unbind(1)
    number = torch.arange(math.prod(sizes), device="cpu")
    of = torch.repeat_interleave(torch.arange(count.numel(), device="cpu"), count)
    return start[of] + step[of] * (number - (count.cumsum(0) - count)[of])


class _Side(NamedTuple):
    """One side of a box: its axis, and its length in the direction of the curve (with a sign)."""

    axis: int
    length: int

    @property
    def step(self) -> int:
        return 1 if self.length > 0 else -1

    def cut(self) -> tuple[_Side, _Side]:
        """Cut in two. The first part is even if the side is longer than 2, which lets curves join."""
        half = self.length // 2
        if half % 2 and abs(self.length) > 2:
            half += self.step
        return _Side(self.axis, half), _Side(self.axis, self.length - half)

    def back(self) -> _Side:
        return _Side(self.axis, -self.length)


def _lines(sides: Sequence[_Side], strides: Sequence[int]) -> list[tuple[int, int, int]]:
    """The straight lines of the curve: raster index of the first token, step, number of tokens."""
    lines = []

    def at(start: int, *moves: tuple[_Side, int]) -> int:
        """The place after some sides, each less a number of tokens."""
        return start + sum((s.length - less * s.step) * strides[s.axis] for s, less in moves)

    a, b, c = sides
    boxes: list[tuple[int, _Side, _Side, _Side]] = [(0, a, b, c)]
    while boxes:
        start, a, b, c = boxes.pop()
        w, h, d = (abs(side.length) for side in (a, b, c))
        if not (w and h and d):
            continue
        if (w, h, d).count(1) >= 2:
            line = max((a, b, c), key=lambda side: abs(side.length))
            lines.append((start, line.step * strides[line.axis], abs(line.length)))
            continue
        (a1, a2), (b1, b2), (c1, c2) = a.cut(), b.cut(), c.cut()
        if 2 * w > 3 * h and 2 * w > 3 * d:
            parts = [(start, a1, b, c), (at(start, (a1, 0)), a2, b, c)]
        elif 3 * h > 4 * d:
            parts = [
                (start, b1, c, a1),
                (at(start, (b1, 0)), a, b2, c),
                (at(start, (a, 1), (b1, 1)), b1.back(), c, a2.back()),
            ]
        elif 3 * d > 4 * h:
            parts = [
                (start, c1, a1, b),
                (at(start, (c1, 0)), a, b, c2),
                (at(start, (a, 1), (c1, 1)), c1.back(), a2.back(), b),
            ]
        else:
            parts = [
                (start, b1, c1, a1),
                (at(start, (b1, 0)), c, a1, b2),
                (at(start, (b1, 1), (c, 1)), a, b1.back(), c2.back()),
                (at(start, (a, 1), (b1, 0), (c, 1)), c.back(), a2.back(), b2),
                (at(start, (a, 1), (b1, 1)), b1.back(), c1, a2.back()),
            ]
        boxes.extend(reversed(parts))
    return lines


@on_cpu
def gilbert_frames(grid: Sequence[int]) -> Tensor:
    """Return the raster indices of grid tokens frame by frame, each frame along :func:`gilbert_order`.

    The curve of a frame is mirrored so that it starts in the corner nearest to the end of the last
    one. Jenga (arXiv 2505.16864) orders the tokens of Wan so: its leading blocks are the first frame.

    Args:
        grid: (frames, height, width) in tokens.
    """
    frames, height, width = grid
    row, column = torch.unravel_index(gilbert_order((height, width)), (height, width))
    orders, down, right = [], False, False
    for frame in range(frames):
        rows = height - 1 - row if down else row
        columns = width - 1 - column if right else column
        orders.append((frame * height + rows) * width + columns)
        down, right = 2 * int(rows[-1]) >= height, 2 * int(columns[-1]) >= width
    return torch.cat(orders)
