"""Block-sparse attention with queries and keys of 8 bits, written out: the specification of
``quantize="int8"``, see :mod:`vtr.kernels.int8` for its equations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtr.kernels.blockmask import BlockMask
from vtr.kernels.epilogue import finish
from vtr.kernels.int8 import mean_key, rounded, shift
from vtr.kernels.precision import full_precision
from vtr.kernels.standard_blocks import standard_block


@torch.no_grad()
def int8_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    row_scale: Tensor | None = None,
    added: Tensor | None = None,
    smooth: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute the definition with the whole map in memory; the products of integers are exact.

    Args and shapes as :func:`vtr.kernels.block_sparse_attention`.
        smooth: subtract the mean key before keys are rounded; False shows what that is good for.

    Returns:
        ``(out, lse)``: (B, H, Sq, D) in the dtype of q, and (B, H, Sq) float32 (float64 for float64).
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    group, (bm, bn) = q.shape[1] // k.shape[1], standard_block(mask.block)
    mean = mean_key(k) if smooth else torch.zeros_like(mean_key(k))
    q_level, q_step = rounded(q, bm)
    k_level, k_step = (t.repeat_interleave(group, 1) for t in rounded(k, bn, mean))
    work = q_step.dtype
    with full_precision(q.device):
        # Sums of 127 x 127 x D: float32 holds them exactly up to D = 1040.
        product = q_level.to(work) @ k_level.to(work).transpose(-1, -2)
        a = q_step.repeat_interleave(bm, 2)[:, :, : q.shape[2], None]
        c = k_step.repeat_interleave(bn, 2)[:, :, None, : k.shape[2]]
        seen = mask.to_dense().to(q.device)
        none = ~seen.any(-1, keepdim=True)
        scores = (product * (a * c * scale)).masked_fill(~seen & ~none, -torch.inf)
        lse = scores.logsumexp(-1) + shift(q, mean, scale)
        weights = scores.softmax(-1).masked_fill(none, 0.0)
        out = weights @ v.to(work).repeat_interleave(group, 1)
    lse = lse.masked_fill(none.squeeze(-1), -torch.inf)
    return finish(out, row_scale, added, mask.block[0]).to(q.dtype), lse
