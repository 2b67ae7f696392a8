"""Block scores from pooled queries and keys, by which dynamic masks choose their blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtr.kernels.precision import full_precision


def pool_blocks(x: Tensor, block: int) -> Tensor:
    """Compute the mean of each block of tokens; a shorter last block over the tokens it has.

    Args:
        x: (..., S, D) floating point.
        block: tokens per block.

    Returns:
        (..., ceil(S / block), D) float32 (float64 for float64).
    """
    if block < 1 or x.ndim < 2 or x.shape[-2] == 0:
        raise ValueError(
            f"pool_blocks needs x (..., S, D) with S >= 1 and block >= 1, got {tuple(x.shape)} and "
            f"{block}"
        )
    work = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[-2]
    whole = length // block
    parts = []
    if whole:
        head = x[..., : whole * block, :].unflatten(-2, (whole, block))
        parts.append(head.mean(dim=-2, dtype=work))
    if whole * block < length:
        parts.append(x[..., whole * block :, :].mean(dim=-2, keepdim=True, dtype=work))
    return torch.cat(parts, dim=-2)


def pooled_block_scores(
    q: Tensor,
    k: Tensor,
    *,
    block: int | tuple[int, int] = 128,
    scale: float | None = None,
    softmax: bool = True,
) -> Tensor:
    """Estimate the attention of each query block to each key block from block means.

    ``p_ab = softmax_b(scale mean(q_a) . mean(k_b) + log n_b)`` with n_b the tokens of key block b:
    a mean counts once for each of its tokens, so a shorter last block counts less. This is the estimate
    of SLA (arXiv 2509.24006) and, with its weighting by size, of Rectified SpaAttn
    (arXiv 2511.19835). O(NQ NK) memory; ``torch.autocast`` does not lower the precision.

    Args:
        q: (B, H, Sq, D). k: (B, Hk, Sk, D), H a multiple of Hk.
        block: (query, key) tokens per block.
        softmax: False returns the logits.

    Returns:
        (B, H, NQ, NK) float32; rows sum to 1 with ``softmax``.
    """
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"need q (B, H, Sq, D) and k (B, Hk, Sk, D), got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    bm, bn = (block, block) if isinstance(block, int) else block
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    rows, columns = pool_blocks(q, bm), pool_blocks(k, bn)
    group = q.shape[1] // k.shape[1]
    rows = rows.unflatten(1, (k.shape[1], group)) * scale
    with full_precision(q.device):
        logits = (rows @ columns.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    start = torch.arange(columns.shape[2], device=k.device) * bn
    logits = logits + (k.shape[2] - start).clamp(max=bn).to(logits.dtype).log()
    return torch.softmax(logits, dim=-1) if softmax else logits
