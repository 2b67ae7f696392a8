"""The epilogue after a row's softmax, for calls in which the kernel does not do it itself."""

from __future__ import annotations

import torch
from torch import Tensor


def finish(out: Tensor, row_scale: Tensor | None, added: Tensor | None, block: int) -> Tensor:
    """Compute ``row_scale_i out_i + added_I`` with I the block of ``block`` queries that holds i.

    Args:
        out: (B, H, Sq, D). row_scale: (B, H, Sq) or None. added: (B, H, ceil(Sq / block), D) or None.

    Returns:
        (B, H, Sq, D) in the widest of the dtypes, so that it is rounded once.
    """
    if row_scale is not None:
        out = out * row_scale.unsqueeze(-1)
    if added is not None:
        block_of = torch.arange(out.shape[2], device=out.device) // block
        out = out + added[:, :, block_of]
    return out
