"""Work lists of a mask for the Triton and Hopper kernels, for the forward and the backward."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from vtr.kernels import csr as _csr
from vtr.kernels.capture import refuse_capture
from vtr.kernels.csr import Csr


@dataclass
class Lists:
    """Work lists of a mask for the kernels, built on first use of the mask.

    ``items`` (P, I, 5) int32: query block (-1: nothing), first, middle and last entry, and the
    part of ``heavy`` that it is (-1: a whole row); the longest first, so that no long row is left
    for the end. ``heavy`` (P, R) int64: the rows that were cut, each into ``pieces``, -1 for none.
    ``live``: the mean number of live blocks of a row. ``words``: the pairs that partial blocks keep (:func:`vtr.kernels.triton_common.pack_tiles`).
    """

    items: Tensor
    heavy: Tensor
    pieces: int
    live: float
    words: Tensor
    rows: Csr
    grid: tuple[int, int, int]  # patterns, query blocks, key blocks

    @functools.cached_property
    def longer_items(self) -> Tensor:
        """``items`` and the key block of the first entry, (P, I, 8) int32, so that a forward
        kernel begins to copy after one read."""
        refuse_capture(self.items.device, "work lists are built")
        longer = self.items.new_zeros(*self.items.shape[:2], 8)
        longer[..., :5] = self.items
        col = self.rows.col
        if col.numel():
            longer[..., 5] = col[self.items[..., 1].clamp(max=col.numel() - 1)]
        return longer

    # Only the backward needs it: a mask that is computed in every call without training never does.
    @functools.cached_property
    def columns(self) -> Csr:
        """The entries of the mask by key blocks."""
        return _csr.transpose(self.rows, *self.grid)

    @functools.cached_property
    def order(self) -> Tensor:
        """(P, NK) int32 key blocks, the most used first."""
        ptr = self.columns.row_ptr
        used = (ptr[1:] - ptr[:-1]).view(self.grid[0], self.grid[2])
        return used.argsort(dim=1, descending=True, stable=True).int().contiguous()
