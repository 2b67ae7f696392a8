"""The same token mask in blocks of another size: index work behind :meth:`BlockMask.with_block`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.kernels import csr as _csr

# Elements that are written at a time while tiles are drawn.
_AT_ONCE = 1 << 25


def retile(mask: Any, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the entries of a :class:`vtr.kernels.BlockMask` in other blocks, for ``BlockMask.from_entries``.

    A new block is cut out of the old blocks that overlap it. Two new blocks are equal if they are cut out
    of the same tiles at the same places, so that tokens are looked at once for each such combination, and
    not at all for blocks that full blocks cover.

    Returns:
        ``(row, col, tile, tiles)``: the rows, ``pattern * NQ + query block``, key blocks and tiles (-1: full)
        of the new blocks that are not empty, and the distinct tiles (T, bm, bn).
    """
    (old_m, old_n), (new_m, new_n) = mask.block, block
    old_nq, (nq, nk) = mask.grid[0], (-(-mask.q_len // new_m), -(-mask.k_len // new_n))
    device = mask.device
    row, col, tile = _csr.row_of(mask.csr), mask.col.long(), mask.tile.long()
    pattern, row = row // old_nq, row % old_nq

    # ---- every overlap of an old block and a new one ----
    first_i, many_i = _overlapped(row, old_m, new_m, mask.q_len)
    first_j, many_j = _overlapped(col, old_n, new_n, mask.k_len)
    number = many_i * many_j
    at = torch.repeat_interleave(number)
    within = torch.arange(at.numel(), device=device) - (number.cumsum(0) - number)[at]
    i = first_i[at] + within // many_j[at]
    j = first_j[at] + within % many_j[at]
    row, col, tile = row[at], col[at], tile[at]
    place, which = ((pattern[at] * nq + i) * nk + j).unique(return_inverse=True)

    # ---- new blocks that are full ----
    height = _shared(row, old_m, i, new_m, mask.q_len)
    width = _shared(col, old_n, j, new_n, mask.k_len)
    covered = torch.zeros_like(place).scatter_add(0, which, (height * width) * (tile < 0))
    reach = (mask.q_len - place // nk % nq * new_m).clamp(max=new_m)
    full = covered == reach * (mask.k_len - place % nk * new_n).clamp(max=new_n)

    # ---- what the others are cut out of: a tile, and how much further on it begins ----
    rest = ~full[which]
    last = (row[rest] == old_nq - 1).long()
    source = torch.where(tile[rest] < 0, mask.tiles.shape[0] + last, tile[rest])
    down = row[rest] * old_m - i[rest] * new_m + old_m
    across = col[rest] * old_n - j[rest] * new_n + old_n
    code = (source * (old_m + new_m) + down) * (old_n + new_n) + across
    pieces, code = code.unique(return_inverse=True)
    table, of = _combinations(which[rest], code, pieces.numel())
    # A full block has a tile here; the one of the last row ends with the queries.
    ends = torch.zeros(2, old_m, old_n, dtype=torch.bool, device=device)
    ends[0], ends[1, : mask.q_len - (old_nq - 1) * old_m] = True, True
    tiles, kind = _draw(torch.cat([mask.tiles, ends]), pieces, table, mask.block, block)

    new_tile = torch.full_like(place, -1)
    partial = (~full).nonzero().squeeze(1)
    new_tile[partial] = kind[of]
    live = full.clone()
    live[partial] = tiles.flatten(1).any(1)[kind[of]]
    place, new_tile = place[live], new_tile[live]
    return place // nk, place % nk, new_tile, tiles


def _overlapped(index: Tensor, old: int, new: int, length: int) -> tuple[Tensor, Tensor]:
    """Find the first new block that each old block overlaps, and how many it overlaps."""
    first = index * old // new
    return first, (((index + 1) * old).clamp(max=length) - 1) // new - first + 1


def _shared(index: Tensor, old: int, other: Tensor, new: int, length: int) -> Tensor:
    """Count the tokens that old block ``index`` and new block ``other`` share."""
    stop = torch.minimum((index + 1) * old, (other + 1) * new).clamp(max=length)
    return stop - torch.maximum(index * old, other * new)


def _combinations(block: Tensor, code: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Find the distinct sets of codes that blocks have.

    Args:
        block: (n,) int64, the block of each piece. code: (n,) int64, its code, below ``codes``.

    Returns:
        (U, most) int64, the codes of each set, -1 for none; and the set of each block, in rising order
        of the blocks.
    """
    order = torch.argsort(block * max(1, codes) + code)
    block, code = block[order], code[order]
    _, line, counts = block.unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(len(line), device=line.device) - (counts.cumsum(0) - counts)[line]
    most = int(counts.max()) if len(counts) else 0
    table = torch.full((len(counts), most), -1, dtype=torch.int64, device=line.device)
    table[line, rank] = code
    # Column by column, so that only numbers are sorted and never rows.
    same = torch.zeros_like(counts)
    for column in table.unbind(1):
        same = (same * (codes + 1) + column + 1).unique(return_inverse=True)[1]
    one = torch.zeros(
        int(same.max()) + 1 if len(same) else 0, dtype=torch.int64, device=same.device
    )
    one[same] = torch.arange(len(same), device=same.device)
    return table[one], same


def _draw(
    source: Tensor, pieces: Tensor, table: Tensor, old: tuple[int, int], new: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Draw the tokens of each set of pieces; returns the distinct tiles, and the tile of each set."""
    (old_m, old_n), (new_m, new_n), device = old, new, source.device
    number = pieces // ((old_m + new_m) * (old_n + new_n))
    down = pieces // (old_n + new_n) % (old_m + new_m) - old_m
    across = pieces % (old_n + new_n) - old_n
    a, b = torch.arange(new_m, device=device), torch.arange(new_n, device=device)
    kinds = [torch.zeros(0, dtype=torch.int64, device=device)]
    found = [torch.zeros(0, new_m, new_n, dtype=torch.bool, device=device)]
    for part in table.split(max(1, _AT_ONCE // (new_m * new_n))):
        drawn = torch.zeros(len(part), new_m, new_n, dtype=torch.bool, device=device)
        for piece in part.unbind(1):
            there, piece = piece >= 0, piece.clamp(min=0)
            y, x = a - down[piece, None], b - across[piece, None]
            inside = ((y >= 0) & (y < old_m) & there[:, None])[:, :, None]
            inside = inside & ((x >= 0) & (x < old_n))[:, None]
            y, x = y.clamp(0, old_m - 1)[:, :, None], x.clamp(0, old_n - 1)[:, None]
            drawn |= source[number[piece, None, None], y, x] & inside
        first, classes = _csr.unique_rows(drawn.flatten(1))
        kinds.append(classes + sum(len(tiles) for tiles in found))
        found.append(drawn[first])
    tiles, kind = torch.cat(found), torch.cat(kinds)
    if len(found) > 2:
        first, classes = _csr.unique_rows(tiles.flatten(1))
        tiles, kind = tiles[first], classes[kind]
    return tiles, kind
