"""Sparse softmax attention beside linear attention, written out: the specification of its kernels.

SLA (arXiv 2509.24006, sections 3 and 4). With phi the feature map, and for query i of block I the keys j
in the key blocks of its set M_I:

    w_ij = phi(q_i) . phi(k_j)
    l_i  = sum_j w_ij v_j / (sum_j w_ij + eps)       (0 if the denominator is 0)

``keys="marginal"``: M_I has the blocks that are neither in the mask (critical) nor negligible, eps = 0.
``keys="all"``: M_I has every block, eps = 1e-5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.kernels.blockmask import BlockMask
from vtr.kernels.keys import without_keys
from vtr.kernels.precision import full_precision
from vtr.kernels.reference import block_sparse_attention_reference

FEATURES = ("softmax", "elu", "relu")
KEYS = ("marginal", "all")
# The released code (thu-ml/SLA, main) adds this to the denominator of attention over all keys.
EPSILON = 1e-5


def feature_map(x: Tensor, feature: str) -> Tensor:
    """Compute phi of queries or keys: the softmax over the head dim, elu + 1, or relu.

    Returns:
        A tensor of the shape of x, in float32 (float64 for float64).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if feature == "softmax":
        return torch.softmax(x, dim=-1)
    return F.elu(x) + 1 if feature == "elu" else torch.relu(x)


def marginal_blocks(mask: BlockMask, negligible: Tensor | None) -> Tensor:
    """Compute the blocks that are neither in the mask nor negligible, as (Bm, Hm, NQ, NK) bool; Bm and Hm
    are 1 or the numbers of samples and heads. A block that the mask holds in part is not marginal."""
    held = mask.to_dense(blocks=True)
    held = held[(None,) * (4 - held.ndim)]
    return ~held if negligible is None else ~(held | negligible)


def sparse_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    feature: str = "softmax",
    keys: str = "marginal",
    negligible: Tensor | None = None,
    keys_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the definition with the whole map in memory; differentiable to any order.

    Args and shapes as :func:`vtr.kernels.sparse_linear_attention`. Computes in float32, or in
    float64 for float64 input, under ``torch.autocast`` too.

    Returns:
        ``(sparse, linear)``: two tensors (B, H, Sq, D) in the dtype of q.
    """
    group = q.shape[1] // k.shape[1]
    with full_precision(q.device):
        rows = feature_map(q, feature)
        columns = feature_map(k, feature).repeat_interleave(group, dim=1)
        weights = rows @ columns.transpose(-1, -2)
        if keys == "marginal":
            blocks = marginal_blocks(mask, negligible)
            blocks = blocks.repeat_interleave(mask.block[0], 2)[:, :, : mask.q_len]
            blocks = blocks.repeat_interleave(mask.block[1], 3)[..., : mask.k_len]
            weights = weights.masked_fill(~blocks, 0.0)
        if keys_valid is not None:
            weights = weights.masked_fill(~keys_valid[:, None, None], 0.0)
        total = weights.sum(-1, keepdim=True) + (EPSILON if keys == "all" else 0.0)
        # Divided by 1 if it is 0, so that no NaN reaches a gradient either.
        weights = weights / total.masked_fill(total == 0.0, 1.0)
        linear = weights @ v.to(weights.dtype).repeat_interleave(group, dim=1)
    seen = mask if keys_valid is None else without_keys(mask, keys_valid)
    sparse, _ = block_sparse_attention_reference(q, k, v, seen, scale=scale)
    return sparse, linear.to(q.dtype)
