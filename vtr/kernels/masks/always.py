"""Blocks that are kept whatever their score. The fourth of six parts of a mask chosen at run time.

All are (NQ, NK) bool on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from vtr.kernels.masks.build import on_cpu
from vtr.kernels.masks.layouts import Layout


@on_cpu
def diagonal(layout: Layout) -> Tensor:
    """The key blocks that share a place with the query block."""
    (rows, columns), (bq, bk) = layout.blocks, layout.sides
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    return (row * bq < (column + 1) * bk) & (column * bk < (row + 1) * bq)


@on_cpu
def neighbours(shape: Sequence[int], layout: Layout) -> Tensor:
    """The key blocks that touch the query block in the grid, and those that share a token with it.

    Two blocks touch if a token of one is within one step of a token of the other along every axis
    (the 26 neighbours of a token in a video, 8 in an image).
    """
    rows, columns = (layout.block_of(side).view(*shape) for side in (0, 1))
    touch = torch.zeros(layout.blocks, dtype=torch.bool)
    for step in itertools.product((-1, 0, 1), repeat=len(shape)):
        here = tuple(slice(max(0, -d), n - max(0, d)) for d, n in zip(step, shape, strict=True))
        there = tuple(slice(max(0, d), n - max(0, -d)) for d, n in zip(step, shape, strict=True))
        touch[rows[here].flatten(), columns[there].flatten()] = True
    return touch


@on_cpu
def leading(layout: Layout, number: int) -> Tensor:
    """The first ``number`` key blocks, in all rows (an attention sink)."""
    touch = torch.zeros(layout.blocks, dtype=torch.bool)
    touch[:, :number] = True
    return touch


@on_cpu
def touching(grid: Sequence[int], layout: Layout, near: bool, first_frame: bool) -> Tensor | None:
    """The blocks that Jenga (arXiv 2505.16864) and Rectified SpaAttn (arXiv 2511.19835) always keep.

    Args:
        grid: (frames, height, width) in tokens.
        near: those that touch (:func:`neighbours`).
        first_frame: the leading ``blocks // frames`` query and key blocks among themselves, and each
            block itself.

    Returns:
        None if neither is asked for.
    """
    if not (near or first_frame):
        return None
    found = neighbours(grid, layout) if near else diagonal(layout)
    if first_frame:
        rows, columns = (n // grid[0] for n in layout.blocks)
        found[:rows, :columns] = True
    return found
