"""Attention between the means of the tiles of a grid (VSA, arXiv 2505.13389)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtr.kernels.masks import scores
from vtr.kernels.masks.layouts import Layout
from vtr.kernels.precision import full_precision

if TYPE_CHECKING:
    from vtr.methods.common.dynamic import GridView


class CoarseTiles:
    """The tiles of a layout that begins each with a new block, and their blocks.

    Attributes:
        number: of tiles, T.
        of: (NB,) int64, the tile of each block; None if each is one block.
        first: (T,) int64, the first block of each tile.
        places: (M,) int64, the raster index of the token in each place, 0 in places without one.
    """

    def __init__(
        self, layout: Layout, grid: Sequence[int], tile: Sequence[int], device: torch.device
    ) -> None:
        self.places = layout.order.clamp(min=0).to(device)
        number = torch.zeros(layout.blocks[0], dtype=torch.int64, device="cpu")
        starts = torch.unravel_index(layout.order[:: layout.sides[0]], tuple(grid))
        for start, size, side in zip(starts, grid, tile, strict=True):
            number = number * -(-size // side) + start // side
        of, count = number.unique_consecutive(return_inverse=True, return_counts=True)[1:]
        self.number = count.numel()
        self.of = None if self.number == of.numel() else of.to(device)
        self.first = (count.cumsum(0) - count).to(device)

    def means(self, view: GridView, x: Tensor, side: int) -> Tensor:
        """Compute the mean of the tokens of each tile, (B, H, T, D) float32.

        Args:
            x: (B, H, M, D) queries (side 0), or keys or values (side 1).
        """
        found = view.means(x, side)
        if self.of is None:
            return found
        counts = (view.counts_q, view.counts_k)[side].to(found.dtype)
        total = found.new_zeros(*found.shape[:2], self.number, found.shape[3])
        total = total.index_add(2, self.of, found * counts[:, None])
        return total / counts.new_zeros(self.number).index_add(0, self.of, counts)[:, None]

    def scores(self, view: GridView) -> Tensor:
        """Score pairs of tiles by the product of their means, (B, H, T, T) float32."""
        rows, columns = self.means(view, view.q, 0), self.means(view, view.k, 1)
        return scores.pooled(rows, columns, scale=view.scale)

    def attention(self, view: GridView) -> Tensor:
        """Compute attention between the means of tiles for each block, (B, H, NB, D) float32.

        Gradients flow to q, k and v.
        """
        with full_precision(view.q.device):
            values = scores.per_head(self.means(view, view.v, 1), view.q.shape[1])
            out = self.scores(view).softmax(-1) @ values
        return out if self.of is None else out.index_select(2, self.of)

    def to_blocks(self, pairs: Tensor) -> Tensor:
        """Repeat what belongs to pairs of tiles (..., T, T) for their blocks, (..., NB, NB)."""
        if self.of is None:
            return pairs
        return pairs.index_select(-2, self.of).index_select(-1, self.of)

    def of_blocks(self, pairs: Tensor) -> Tensor:
        """Undo :meth:`to_blocks`."""
        if self.of is None:
            return pairs
        return pairs.index_select(-2, self.first).index_select(-1, self.first)
