"""A block mask in the format of flash-attn-4: lists of tiles, and the bits of the partial ones.

Blocks of any size are put into the tiles of its kernels (:func:`tiles`): a tile is full if every block that
it touches is full, and otherwise partial if one of them is live. Every pair of a partial tile is looked up
in the bits of the mask, so that the result is exact.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtr.compat.flash_attn import Blocks, mask_value
from vtr.kernels import csr as _csr
from vtr.kernels.blockmask import BlockMask
from vtr.kernels.capture import refuse_capture

Size = tuple[int, int]
# The longest tile on either side: tables reach as far beyond the ends of the tokens.
_LONGEST = 256
# A row with this many times the average work, and this many tiles, is cut into parts of about twice the
# average, as for the Triton kernels (vtr/kernels/triton_attention.py).
_HEAVY = 4.0
_HEAVY_TILES = 32


def tiles(dim: int, capability: int, block: Size) -> tuple[Size, Size]:
    """Choose the (queries, keys) of a tile, forward and backward, among those of flash-attn-4's kernels.

    Args:
        dim: head dim.
        capability: 9 (Hopper) or 10 (Blackwell), the first number of the compute capability.
        block: of the mask.
    """
    if capability == 10:  # two tiles of 128 queries at a time in the forward
        return (256, 128), (128, 128)
    queries = 128 if block[0] % 128 == 0 else 64
    keys = 128 if block[1] % 128 == 0 and dim <= 128 else 64
    back = 128 if dim <= 128 else 96 if dim <= 192 else 64
    return (queries, keys), (128, back)


@functools.cache
def keeps(block: Size, patterns: Size, by_part: bool) -> Callable[..., Any]:
    """Make the function that tells inside a kernel whether a pair is kept; it indexes tables alone.

    Args:
        block: of the mask.
        patterns: numbers of samples and heads with patterns, 1 for a shared one.
        by_part: whether queries are those of the parts of heavy rows, whose tokens a table has.
    """
    (bm, bn), (_, heads) = block, patterns
    by_sample, by_head = (n > 1 for n in patterns)
    words = -(-bn // 32)

    def kept(b: Any, h: Any, i: Any, j: Any, lengths: Any, tables: Any) -> Any:
        b, h, i, j = b[0], h[0], i[0], j[0]
        one = tables[0][(b * heads if by_sample else 0) + (h if by_head else 0)]
        if by_part:
            i = tables[3][one, i]
        tile = tables[1][one, i // bm, j // bn]
        word = tables[2][(tile * bm + i % bm) * words + j % bn // 32]
        return mask_value((word >> (j % 32 if bn % 32 == 0 else j % bn % 32)) & 1)

    return kept


@dataclass
class TileRows:
    """Lists of the live tiles of each row of tiles, by pattern.

    ``partial`` and ``full`` (P, N) int32 count them; ``partial_index`` and ``full_index`` (P, N, most) int32
    name them, ascending.
    """

    partial: Tensor
    partial_index: Tensor
    full: Tensor
    full_index: Tensor

    def by_head(self, pattern: Tensor) -> Blocks:
        """Repeat the lists for the samples and heads of ``pattern`` (Bp, Hp)."""
        which = pattern.long()
        given = (self.partial, self.partial_index, self.full, self.full_index)
        if which.numel() == 1:
            made = [t[int(which)].view(1, 1, *t.shape[1:]) for t in given]
        else:
            made = [t[which] for t in given]
        return made[0], made[1], made[2], made[3]


@dataclass
class Heavy:
    """Rows of tiles with far more work than the average, ``count`` in each pattern, cut into ``pieces``.

    Attributes:
        tokens: (P, count, queries of a tile) int64; past the last token its number again.
        table: (P, count pieces queries) int32, the same for every piece.
        blocks: the lists of all pieces.
    """

    count: int
    pieces: int
    tokens: Tensor
    table: Tensor
    blocks: Blocks


@dataclass
class FlashLists:
    """Tables and lists of a mask that the kernels read, built on first use of the mask.

    Attributes:
        tables: pattern (Bp Hp) int32; (P, rows, columns) int32, the number of the bits of each block; and the
            bits, (numbers bm bn / 32) int32, of which 0 keeps nothing and 1 everything. Each has one
            axis, or one alone in which neighbours are neighbours in memory, as the kernels want.
        blocks: the lists of all rows, in which the heavy ones are empty.
        heavy: None if no row is heavy.
    """

    mask: BlockMask
    forward: Size
    backward: Size
    tables: list[Tensor]
    blocks: Blocks
    heavy: Heavy | None

    @functools.cached_property
    def columns(self) -> Blocks:
        """The lists of the query tiles of each key tile, which the backward alone needs."""
        refuse_capture(self.mask.device, "lists for the backward are built")
        live, full = _in_tiles(self.mask, self.backward)
        return _rows(live.mT, full.mT).by_head(self.mask.pattern)

    def keeps(self, *, by_part: bool = False) -> Callable[..., Any]:
        samples, heads = self.mask.pattern.shape
        return keeps(self.mask.block, (samples, heads), by_part)


_lists: dict[tuple[int, Size, Size], FlashLists] = {}


def lists_of(mask: list[Tensor], dims: list[int], forward: Size, backward: Size) -> FlashLists:
    """Return the lists of a mask for tiles of these sizes; they are released with the mask."""
    key = (int(mask[6]), forward, backward)
    if key not in _lists:
        refuse_capture(mask[3].device, "lists for flash-attn-4 are built")
        made = BlockMask(dims[0], dims[1], (dims[2], dims[3]), *mask[:6])
        _lists[key] = _make(made, forward, backward)
        weakref.finalize(mask[6], _lists.pop, key, None)
    return _lists[key]


def _make(mask: BlockMask, forward: Size, backward: Size) -> FlashLists:
    rows = _rows(*_in_tiles(mask, forward))
    heavy = _cut_heavy(rows, mask, forward[0])
    tables = [mask.pattern.flatten(), _numbers(mask), _bits(mask.tiles).flatten()]
    return FlashLists(mask, forward, backward, tables, rows.by_head(mask.pattern), heavy)


def _numbers(mask: BlockMask) -> Tensor:
    """(P, rows, columns) int32: 0 for an empty block, 1 for a full one, else 2 and its tile."""
    (bm, bn), nq = mask.block, mask.grid[0]
    rows = (mask.q_len + _LONGEST) // bm + 1
    columns = (mask.k_len + _LONGEST) // bn + 2
    made = torch.zeros(mask.patterns, rows, columns, dtype=torch.int32, device=mask.device)
    row = _csr.row_of(mask.csr)
    made[row // nq, row % nq, mask.col.long()] = mask.tile + 2
    return made


def _bits(tiles: Tensor) -> Tensor:
    """Pack (T, bm, bn) bool to (2 + T, bm, ceil(bn / 32)) int32, behind none and all: bit j of word w is
    key 32 w + j."""
    number, bm, bn = tiles.shape
    bits = torch.zeros(number + 2, bm, -(-bn // 32) * 32, dtype=torch.uint8, device=tiles.device)
    bits[1] = 1
    bits[2:, :, :bn] = tiles
    for width in (1, 2, 4):
        bits = bits[..., ::2] | (bits[..., 1::2] << width)
    return bits.contiguous().view(torch.int32)


def _in_tiles(mask: BlockMask, size: Size) -> tuple[Tensor, Tensor]:
    """(P, rows, columns) bool twice: which tiles are live, and which of them are full."""
    nq, nk = mask.grid
    row = _csr.row_of(mask.csr)
    live = torch.zeros(mask.patterns, nq, nk, dtype=torch.bool, device=mask.device)
    live[row // nq, row % nq, mask.col.long()] = True
    full = torch.zeros_like(live)
    full[row // nq, row % nq, mask.col.long()] = mask.tile < 0
    if size == mask.block:
        return live, full
    lengths = (mask.q_len, mask.k_len)
    (top, bottom), (left, right) = (
        _touched(n, tile, block, mask.device)
        for n, tile, block in zip(lengths, size, mask.block, strict=True)
    )
    area = (bottom - top)[:, None] * (right - left)[None, :]

    def count(these: Tensor) -> Tensor:
        sums = torch.zeros(len(these), nq + 1, nk + 1, dtype=torch.int32, device=mask.device)
        sums[:, 1:, 1:] = these.int().cumsum(1).cumsum(2)
        lower, upper = sums[:, bottom], sums[:, top]
        return (lower[:, :, right] - lower[:, :, left]) - (upper[:, :, right] - upper[:, :, left])

    # A tile that reaches beyond the last key is never full: it would need a bounds check.
    inside = (torch.arange(len(left), device=mask.device) + 1) * size[1] <= mask.k_len
    return count(live) > 0, (count(full) == area) & inside


def _touched(length: int, tile: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last (exclusive) block that each tile of an axis touches."""
    start = torch.arange(0, length, tile, device=device)
    stop = (start + tile).clamp(max=length)
    return start // block, (stop + block - 1) // block


def _rows(live: Tensor, full: Tensor) -> TileRows:
    partial = live & ~full
    return TileRows(
        partial.sum(2, dtype=torch.int32), _names(partial),
        full.sum(2, dtype=torch.int32), _names(full),
    )  # fmt: skip


def _names(here: Tensor) -> Tensor:
    """List the True columns of each row, (P, N, most) int32, ascending, 0 behind them."""
    p, r, c = here.nonzero(as_tuple=True)
    place = (here.int().cumsum(2) - 1)[p, r, c]
    most = int(place.max()) + 1 if place.numel() else 1
    made = torch.zeros(*here.shape[:2], most, dtype=torch.int32, device=here.device)
    made[p, r, place.long()] = c.int()
    return made


def _cut_heavy(rows: TileRows, mask: BlockMask, queries: int) -> Heavy | None:
    """Cut heavy rows into pieces, and leave their lists in ``rows`` empty.

    Every pattern gives as many rows, its longest, so that no entry is a hole.
    """
    work = rows.partial + rows.full
    average = float(work.float().mean())
    most = int((work > max(_HEAVY * average, 2 * _HEAVY_TILES)).sum(1).max())
    if not most:
        return None
    chunk = max(_HEAVY_TILES, math.ceil(2 * average))
    pieces = -(-int(work.max()) // chunk)
    which = work.topk(most, dim=1).indices  # (P, most)
    partial, full = rows.partial.gather(1, which), rows.full.gather(1, which)
    start = torch.arange(pieces, device=mask.device) * chunk
    lists: list[Tensor] = []
    # The full tiles of a row come first, then the partial ones.
    for index, count, before in (
        (rows.partial_index, partial, full), (rows.full_index, full, torch.zeros_like(full)),
    ):  # fmt: skip
        first = (start - before[..., None]).clamp(min=0).minimum(count[..., None])
        last = (start + chunk - before[..., None]).clamp(min=0).minimum(count[..., None])
        width = min(chunk, index.shape[2])
        places = (first[..., None] + torch.arange(width, device=mask.device)).clamp(
            max=index.shape[2] - 1
        )
        mine = index.gather(1, which[..., None].expand(-1, -1, index.shape[2]))
        found = mine[:, :, None].expand(-1, -1, pieces, -1).gather(3, places.long())
        lists += [(last - first).int().flatten(1), found.flatten(1, 2).contiguous()]
    rows.partial.scatter_(1, which, 0)
    rows.full.scatter_(1, which, 0)
    tokens = which[..., None] * queries + torch.arange(queries, device=mask.device)
    tokens = tokens.clamp(max=mask.q_len - 1)
    table = tokens[:, :, None].expand(-1, -1, pieces, -1).flatten(1).int().contiguous()
    return Heavy(most, pieces, tokens, table, TileRows(*lists).by_head(mask.pattern))
