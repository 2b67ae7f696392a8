"""Join two attentions over disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute attention over the union of two disjoint key sets from the attentions over each.

    ``lse = log(exp(lse_a) + exp(lse_b))``, ``out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)``
    (the identity behind flash attention and ring parallelism). Exact; differentiable.

    Args:
        out_a, out_b: (..., S, D), normalised outputs.
        lse_a, lse_b: (..., S), natural log-sum-exp; -inf for a row that saw no key.

    Returns:
        ``(out, lse)``: out in the dtype of ``out_a``, lse in float32 (float64 for float64).
        A row without keys on both sides is zero, with -inf as its LSE.

    Raises:
        ValueError: shapes or devices differ.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or lse_a.shape != out_a.shape[:-1]:
        raise ValueError(
            "merge_states needs two outputs (..., S, D) and their LSEs (..., S) of equal shapes; "
            f"got {tuple(out_a.shape)}, {tuple(lse_a.shape)}, {tuple(out_b.shape)}, "
            f"{tuple(lse_b.shape)}"
        )
    if len({t.device for t in (out_a, lse_a, out_b, lse_b)}) > 1:
        raise ValueError("merge_states needs all four tensors on one device")
    work = torch.promote_types(torch.promote_types(lse_a.dtype, lse_b.dtype), torch.float32)
    lse_a, lse_b = lse_a.to(work), lse_b.to(work)
    top = torch.maximum(lse_a, lse_b)
    none = top == float("-inf")
    # If both sides are empty the difference -inf - -inf would be NaN, forward and backward.
    top = top.detach().masked_fill(none, 0.0)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = (weight_a + weight_b).masked_fill(none, 1.0)
    share_a, share_b = (weight_a / total).unsqueeze(-1), (weight_b / total).unsqueeze(-1)
    out = out_a.to(work) * share_a + out_b.to(work) * share_b
    lse = (top + torch.log(total)).masked_fill(none, float("-inf"))
    return out.to(out_a.dtype), lse
