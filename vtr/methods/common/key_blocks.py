"""Key blocks of a sparse prefill: which of them a block of rows may see, and how many it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from vtr.methods.common.shares import largest

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_side(value: object, name: str) -> None:
    """Raise a ``ValueError`` that names the option unless it is a side of blocks that all kernels have."""
    if isinstance(value, bool) or value not in (16, 32, 64, 128):
        raise ValueError(f"{name} must be 16, 32, 64 or 128, got {value!r}")


class HasKeys(Protocol):
    """An attention call: ``q`` (B, H, L, D) and ``k`` (B, Hk, S, D), whose rows are the last L columns."""

    @property
    def q(self) -> Tensor: ...

    @property
    def k(self) -> Tensor: ...

    @property
    def window(self) -> int | None: ...


class BlockGrid(NamedTuple):
    """The blocks of L rows and S keys; row i of the call is column S - L + i, and sees up to it.

    Attributes:
        rows, keys: L and S.
        sides: (rows, keys) per block; the last block of each may be shorter.
        device: of the tensors that the methods return.
        window: keys that a row of a sliding-window layer sees, its own among them; None is all.
    """

    rows: int
    keys: int
    sides: tuple[int, int]
    device: torch.device
    window: int | None = None

    @classmethod
    def of(cls, site: HasKeys, sides: tuple[int, int]) -> BlockGrid:
        return cls(site.q.shape[2], site.k.shape[2], sides, site.q.device, site.window)

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // self.sides[0])

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.sides[1])

    def first_column(self) -> Tensor:
        """(NQ,) int64, the column of the first row of each block of rows."""
        start = torch.arange(self.row_blocks, device=self.device) * self.sides[0]
        return start + self.keys - self.rows

    def last_column(self) -> Tensor:
        """(NQ,) int64, the column of the last row of each block of rows."""
        return (self.first_column() + self.sides[0] - 1).clamp(max=self.keys - 1)

    def newest(self) -> Tensor:
        """(NQ,) int64, the last key block of which a row of the block sees a key."""
        return self.last_column() // self.sides[1]

    def oldest(self) -> Tensor:
        """(NQ,) int64, the first key block of which a row of the block sees a key."""
        return self.recent(self.keys if self.window is None else self.window)

    def visible(self) -> Tensor:
        """(NQ, NK) bool, the key blocks of which a row of the block sees a key."""
        column = self._columns()
        return (column >= self.oldest()[:, None]) & (column <= self.newest()[:, None])

    def always(self) -> Tensor:
        """(NQ, NK) bool, the visible key blocks that every sparse prefill keeps: the first, and those of
        the rows themselves."""
        own = self._columns() >= (self.first_column() // self.sides[1])[:, None]
        return self.visible() & (own | (self._columns() == 0))

    def recent(self, tokens: int) -> Tensor:
        """(NQ,) int64, the first key block of which a row of the block has a key among the last
        ``tokens`` up to its own."""
        return (self.first_column() - tokens + 1).clamp(min=0) // self.sides[1]

    def row_index(self, part: slice, stride: int = 1) -> Tensor:
        """(blocks, n) int64, every stride-th row of some blocks; a shorter last block repeats its
        last one, which changes no maximum."""
        start = torch.arange(part.start, part.stop, device=self.device)[:, None] * self.sides[0]
        last = (self.rows - 1 - start) // stride * stride
        step = torch.arange(0, self.sides[0], stride, device=self.device)
        return start + torch.minimum(step, last)

    def pieces(self, elements: int, limit: int = 1 << 24) -> Iterator[slice]:
        """Cut the blocks of rows into runs of at most ``limit`` elements, ``elements`` per block."""
        step = max(1, limit // max(1, elements))
        for start in range(0, self.row_blocks, step):
            yield slice(start, min(start + step, self.row_blocks))

    def _columns(self) -> Tensor:
        return torch.arange(self.key_blocks, device=self.device)


def best_blocks(scores: Tensor, number: Tensor, among: Tensor) -> Tensor:
    """Keep the ``number`` best key blocks of each block of rows; of equal scores the first.

    Args:
        scores: (..., NQ, NK).
        number: int64, broadcasts to (..., NQ); as many as there are if it is larger.
        among: bool, broadcasts to scores: the blocks to choose from.

    Returns:
        bool tensor, of the shape that the three have together.
    """
    return largest(scores.masked_fill(~among, -torch.inf), number) & among


def shares(share: float | Tensor, counts: Tensor) -> Tensor:
    """Numbers per row that are ``share`` of its count within 1, and whose sum is ``share`` of the sum of
    the counts, rounded.

    Args:
        share: from 0 to 1.
        counts: (NQ,) int64.

    Returns:
        (NQ,) int64 from 0 to ``counts``.
    """
    total = torch.floor(share * counts.cumsum(0).double() + 0.5).long()
    return total.diff(prepend=total.new_zeros(1)).clamp(max=counts)


def even_numbers(share: float, counts: Tensor, most: int) -> Tensor:
    """The same number in every row, or the row's count if that is smaller, so that the sum is the
    ``share`` of the sum of ``counts``, rounded; what is left over goes to the last rows, one each.

    Args:
        counts: (NQ,) int64; to be exact, not falling.
        most: the largest count at most.

    Returns:
        (NQ,) int64 from 0 to ``counts``.
    """
    goal = torch.floor(share * counts.sum().double() + 0.5).long()
    widths = torch.arange(most + 1, device=counts.device)
    totals = torch.minimum(counts[:, None], widths).sum(0)
    width = (totals <= goal).sum() - 1
    extra = goal - torch.where(totals <= goal, totals, 0).amax()
    row = torch.arange(counts.shape[0], device=counts.device)
    return torch.minimum(counts, width + (row >= counts.shape[0] - extra))
