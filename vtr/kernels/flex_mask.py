"""Conversion of a block mask to FlexAttention's; :class:`BlockMask` imports it without the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.kernels import csr as _csr


def to_flex(mask: Any, *, lookup: bool = True, columns: bool = True) -> Any:
    """Convert a :class:`vtr.kernels.BlockMask` to FlexAttention's, on the same device.

    ``lookup=False`` leaves out the ``mask_mod`` if no block is partial: compiled kernels never
    call it then, but eager FlexAttention reads only the ``mask_mod``.
    ``columns=False`` leaves out the part that only FlexAttention's own backward reads; torch
    computes it under vmap, which does not run while FLOPs are counted.
    """
    from torch.nn.attention.flex_attention import BlockMask as FlexMask

    (nq, nk), (bm, bn) = mask.grid, mask.block
    row = _csr.row_of(mask.csr)
    slot = torch.arange(row.numel(), device=mask.device)
    which = mask.pattern.long()
    lists: list[Any] = []
    for full in (False, True):
        here = (mask.tile < 0) == full
        start = (mask.row_ptr[:-1] if full else mask.split).long()
        stop = (mask.split if full else mask.row_ptr[1:]).long()
        index = torch.zeros(mask.patterns * nq, nk, dtype=torch.int32, device=mask.device)
        index[row[here], slot[here] - start[row[here]]] = mask.col[here]
        lists.append((stop - start).int().view(-1, nq)[which])
        lists.append(index.view(-1, nq, nk)[which])
    sizes: dict[str, Any] = {
        "BLOCK_SIZE": mask.block,
        "seq_lengths": (mask.q_len, mask.k_len),
    }
    if not columns:
        sizes["compute_q_blocks"] = False
    if not lookup and not mask.tiles.shape[0]:
        return FlexMask.from_kv_blocks(*lists[:4], **sizes)
    tile_of = torch.full((mask.patterns * nq, nk), -2, dtype=torch.int32, device=mask.device)
    tile_of[row, mask.col.long()] = mask.tile
    tile_of = tile_of.view(-1, nq, nk)
    tiles, pattern = mask.tiles, mask.pattern
    samples, heads = (n > 1 for n in pattern.shape)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        one = pattern[b if samples else b * 0, h if heads else h * 0]
        tile = tile_of[one, i // bm, j // bn]
        if not tiles.shape[0]:
            return tile == -1
        return (tile == -1) | (
            (tile >= 0) & tiles[tile.clamp(min=0).long(), (i % bm).long(), (j % bn).long()]
        )

    sizes["mask_mod"] = mask_mod
    return FlexMask.from_kv_blocks(*lists[:4], **sizes)
