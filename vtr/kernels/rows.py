"""Attention rows of a few queries, for methods that score tokens, without the N x N map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtr.kernels.precision import full_precision


def attention_rows(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute attention probabilities of a few query rows over all keys, softmax in float32.

    Costs O(R N) memory for R query rows; differentiable; ``torch.autocast`` does not lower the
    precision. Used for signals such as the attention of CLS or of the last text token, where only
    those rows of the map are needed.

    Args:
        q: (B, H, R, D) float32, bfloat16 or float16 (float64 is kept): the query rows.
        k: (B, Hk, N, D), same dtype and device as ``q``; ``H`` is a multiple of ``Hk``
            (grouped-query attention: query head ``h`` reads key head ``h // (H // Hk)``).
        bias: added to the scaled scores before the softmax. Either (B, N) or (N,), one value per
            key, or a tensor of four dimensions that broadcasts to (B, H, R, N). In a bool tensor,
            True means that a key may be attended.
        scale: factor of the scores; 1 / sqrt(D) when None.

    Returns:
        (B, H, R, N) float32 (float64 for float64 input); each row sums to 1, or is all zero when
        every key of it is masked.

    Raises:
        ValueError: shapes, devices, dtypes or head counts do not fit together.
    """
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"attention_rows needs q (B, H, R, D) and k (B, Hk, N, D); got {tuple(q.shape)} and "
            f"{tuple(k.shape)}. Add the missing axes with unsqueeze."
        )
    batch, heads, dim = q.shape[0], q.shape[1], q.shape[3]
    key_heads = k.shape[1]
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head dimension"
        )
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {key_heads} key heads")
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"q is {q.dtype} on {q.device}, k is {k.dtype} on {k.device}; convert one of them"
        )
    if not q.is_floating_point():
        raise ValueError(f"attention_rows needs floating-point q and k, got {q.dtype}")
    scale = 1.0 / math.sqrt(dim) if scale is None else float(scale)
    # Autocast would round the product to its low precision, whatever the inputs are converted to.
    with full_precision(q.device):
        return _rows(q, k, bias, scale)


def _rows(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    batch, heads, rows, dim = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    # Query heads of one key head become rows of one product, so k is read once per group.
    grouped = q.to(work).reshape(batch, key_heads, heads // key_heads * rows, dim) * scale
    scores = torch.matmul(grouped, k.to(work).transpose(-1, -2))
    scores = scores.reshape(batch, heads, rows, keys)
    if bias is None:
        return torch.softmax(scores, dim=-1)

    if bias.device != q.device:
        raise ValueError(f"bias is on {bias.device}, q on {q.device}; move it there")
    shape = tuple(bias.shape)
    if bias.ndim in (1, 2):
        if shape[-1] != keys or (bias.ndim == 2 and shape[0] not in (1, batch)):
            raise ValueError(f"a bias per key must be ({keys},) or ({batch}, {keys}), got {shape}")
        bias = bias.reshape(-1, 1, 1, keys)
    else:
        try:
            fits = torch.broadcast_shapes(shape, scores.shape) == scores.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"bias {shape} does not broadcast to (B, H, R, N) = {tuple(scores.shape)}"
            )
    # A row without any key: softmax of all -inf is NaN, the attention of nothing is zero. The
    # scores are replaced before the softmax, so that the gradient stays finite as well.
    if bias.dtype == torch.bool:
        empty = ~bias.any(dim=-1, keepdim=True)
        scores = torch.where(bias | empty, scores, -torch.inf)
    else:
        scores = scores + bias.to(work)
        empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
        scores = scores.masked_fill(empty, 0.0)
    out = torch.softmax(scores, dim=-1)
    # In place unless the gradient needs what softmax has returned.
    return out.masked_fill(empty, 0.0) if out.requires_grad else out.masked_fill_(empty, 0.0)
