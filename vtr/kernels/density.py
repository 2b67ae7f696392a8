"""The density of a mask, without waiting for the device."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from vtr.kernels.blockmask import BlockMask

_KNOWN: weakref.WeakKeyDictionary[BlockMask, Tensor] = weakref.WeakKeyDictionary()


def density(mask: BlockMask) -> Tensor:
    """:attr:`BlockMask.density` as a float64 tensor (), without waiting for the device; kept for
    masks that are seen again."""
    found = _KNOWN.get(mask)
    if found is None:
        nq = mask.grid[0]
        entry = torch.arange(mask.col.numel(), dtype=mask.row_ptr.dtype, device=mask.device)
        row = torch.searchsorted(mask.row_ptr[1:], entry, right=True)
        height = (mask.q_len - row % nq * mask.block[0]).clamp(max=mask.block[0])
        width = (mask.k_len - mask.col.long() * mask.block[1]).clamp(max=mask.block[1])
        share = torch.zeros(mask.patterns, dtype=torch.float64, device=mask.device)
        share.index_add_(0, row // nq, (height * width).double())
        found = share[mask.pattern.long()].mean() / (mask.q_len * mask.k_len)
        _KNOWN[mask] = found
    return found
