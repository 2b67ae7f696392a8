"""Text around a mask of the grid: dense both ways."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.kernels import csr as _csr
from vtr.kernels.blockmask import BlockMask
from vtr.kernels.masks.build import not_negative, on_cpu


@on_cpu
def with_text(mask: BlockMask, text: int, *, whole_blocks: bool = False) -> BlockMask:
    """The mask with ``text`` tokens behind its own: they see, and are seen by, everything.

    Args:
        mask: of N x N tokens, on the CPU.
        text: number of text tokens, from 0 on.
        whole_blocks: make every block that holds a text token whole. A block that holds the last
            tokens of the grid beside text is then dense for these too. It suits masks that know
            whole blocks alone, which then get no partial block.

    Returns:
        A mask of N + text tokens, in the blocks of ``mask``.
    """
    not_negative(text=text)
    if mask.q_len != mask.k_len:
        raise ValueError(
            f"text can be added to a mask of as many queries as keys, got {mask.q_len} x {mask.k_len}"
        )
    if text == 0:
        return mask
    tokens, total, (bm, bn) = mask.q_len, mask.q_len + text, mask.block
    blocks = -(-total // bm), -(-total // bn)
    row, col = tokens // bm, tokens // bn  # the first block that holds text, on either side
    if whole_blocks:
        before = mask.to_dense(blocks=True)
        live = torch.ones(*before.shape[:-2], *blocks, dtype=torch.bool)
        live[..., :row, :col] = before[..., :row, :col]
        return BlockMask.from_blocks(live, q_len=total, k_len=total, block=mask.block)

    old_rows, old_cols = mask.grid
    pattern, count = mask.pattern.long(), mask.patterns
    numbers = torch.full((count, *blocks), _DEAD)
    numbers[:, :old_rows, :old_cols] = _numbers(mask)
    numbers[:, old_rows:] = numbers[:, :, old_cols:] = _FULL
    if row == old_rows and col == old_cols:  # text begins with a block
        return _from_numbers(mask, total, pattern, numbers, mask.tiles)

    # Of the blocks that hold grid and text tokens, equal ones get one tile.
    both = torch.zeros(blocks, dtype=torch.bool)
    both[row:old_rows, :old_cols] = True
    both[:old_rows, col:old_cols] = True
    p, r, c = both.expand(count, -1, -1).nonzero(as_tuple=True)
    kind = torch.stack([numbers[p, r, c], (r == row).long(), (c == col).long()])
    kind, which = kind.unique(dim=1, return_inverse=True)
    known = mask.tiles.shape[0]
    source = torch.cat([mask.tiles, torch.zeros(1, bm, bn).bool(), torch.ones(1, bm, bn).bool()])
    tiles = source[torch.where(kind[0] < 0, known + (kind[0] == _FULL).long(), kind[0])]
    last_row, last_col = (kind[1] == 1)[:, None, None], (kind[2] == 1)[:, None, None]
    i, j = torch.arange(bm)[:, None] + row * bm, torch.arange(bn) + col * bn
    tiles |= (last_row & (i >= tokens)) | (last_col & (j >= tokens))
    tiles &= ~((last_row & (i >= total)) | (last_col & (j >= total)))
    every = torch.cat([mask.tiles, tiles])
    first, same = _csr.unique_rows(every.flatten(1))
    numbers[p, r, c] = known + which
    numbers = torch.where(numbers < 0, numbers, same[numbers.clamp(min=0)])
    return _from_numbers(mask, total, pattern, numbers, every[first])


_DEAD, _FULL = -2, -1


def _numbers(mask: BlockMask) -> Tensor:
    """(patterns, NQ, NK) int64: the tile of each block, or that it is dead or full."""
    rows, cols = mask.grid
    numbers = torch.full((mask.patterns * rows, cols), _DEAD)
    numbers[_csr.row_of(mask.csr), mask.col.long()] = mask.tile.long()
    return numbers.view(mask.patterns, rows, cols)


def _from_numbers(
    mask: BlockMask, total: int, pattern: Tensor, numbers: Tensor, tiles: Tensor
) -> BlockMask:
    p, r, c = (numbers != _DEAD).nonzero(as_tuple=True)
    return BlockMask.from_entries(
        total, total, mask.block, pattern, numbers.shape[0], p * numbers.shape[1] + r, c,
        numbers[p, r, c], tiles,
    )  # fmt: skip
