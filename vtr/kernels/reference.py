"""Block-sparse attention written out: the specification that every kernel is tested against.

For query i and the keys j that the mask lets it see (equations in natural logarithms):

    s_ij  = scale * q_i . k_j
    lse_i = log sum_j exp(s_ij)                      (-inf when i sees no key)
    o_i   = row_scale_i * sum_j exp(s_ij - lse_i) v_j + added_I  (the sum is 0 when i sees no key;
                                                                I is the query block of i)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtr.kernels.blockmask import BlockMask
from vtr.kernels.precision import full_precision


def block_sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    row_scale: Tensor | None = None,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the definition with the whole map in memory; differentiable to any order.

    Args and shapes as :func:`vtr.kernels.block_sparse_attention`. Computes in float32, or in
    float64 for float64 input, under ``torch.autocast`` too.

    Returns:
        ``(out, lse)``: (B, H, Sq, D) in the dtype of q, and (B, H, Sq) float32 (float64).
    """
    with full_precision(q.device):
        return _reference(q, k, v, mask, scale, row_scale, added)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None,
    row_scale: Tensor | None, added: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    work = torch.promote_types(q.dtype, torch.float32)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    k = k.to(work).repeat_interleave(group, dim=1)
    v = v.to(work).repeat_interleave(group, dim=1)
    seen = mask.to_dense().to(q.device)
    scores = torch.einsum("bhid,bhjd->bhij", q.to(work), k) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    none = ~seen.any(dim=-1, keepdim=True)
    # The softmax of an empty row is NaN; such rows are computed on zeros and then emptied, so that no
    # NaN reaches a gradient either.
    safe = scores.masked_fill(none, 0.0)
    lse = torch.logsumexp(safe, dim=-1).masked_fill(none.squeeze(-1), float("-inf"))
    weights = torch.softmax(safe, dim=-1).masked_fill(none, 0.0)
    out = torch.einsum("bhij,bhjd->bhid", weights, v)
    if row_scale is not None:
        out = out * row_scale.to(work).unsqueeze(-1)
    if added is not None:
        block_of = torch.arange(mask.q_len, device=q.device) // mask.block[0]
        out = out + added.to(work)[:, :, block_of]
    return out.to(q.dtype), lse
