"""Attention of one row to chosen keys of a cache, which are gathered once for each key head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def take_columns(x: Tensor, columns: Tensor) -> Tensor:
    """Gather keys or values of a cache, per key head.

    Args:
        x: (B, Hk, S, D), also a part of a longer static cache.
        columns: (B, Hk, n) int64, from 0 on.

    Returns:
        (B, Hk, n, D), contiguous.
    """
    batch, heads, length, dim = x.shape
    apart = [0 if size == 1 else s for size, s in zip(x.shape, x.stride(), strict=True)]
    # Whole rows of one table are copied several times as fast as elements are gathered.
    if dim == 1 or length == 1 or apart[2:] != [dim, 1] or any(s % dim for s in apart[:2]):
        return x.gather(2, columns[..., None].expand(-1, -1, -1, dim))
    sample, head = apart[0] // dim, apart[1] // dim
    table = x.as_strided((sample * (batch - 1) + head * (heads - 1) + length, dim), (dim, 1))
    first = torch.arange(batch, device=x.device)[:, None] * sample
    first = first + torch.arange(heads, device=x.device) * head
    return table.index_select(0, (columns + first[..., None]).flatten()).view(*columns.shape, dim)


def column_attention(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor, seen: Tensor, scale: float
) -> Tensor:
    """Compute the attention of one row to chosen columns, exactly: a softmax over those that are seen.

    Args:
        q: (B, H, 1, D).
        k: (B, Hk, S, D), H a multiple of Hk.
        v: (B, Hk, S, Dv).
        columns: (B, Hk, n) int64 from 0 on, none of them twice among those that are seen.
        seen: (B, Hk, n) bool.
        scale: factor of the scores.

    Returns:
        (B, H, 1, Dv) in the dtype of q; zeros for a head that sees nothing.
    """
    batch, heads, rows, dim = q.shape
    if not columns.shape[2]:
        return q.new_zeros(batch, heads, rows, v.shape[3])
    keys, values = (take_columns(x, columns).to(q.dtype) for x in (k, v))
    none = ~seen.any(2, keepdim=True)[..., None]
    # The query heads of a key head are the rows of one product.
    grouped = q.reshape(batch, k.shape[1], -1, dim)
    mask = seen[:, :, None] | none
    out = F.scaled_dot_product_attention(grouped, keys, values, mask, scale=scale)
    return out.masked_fill(none, 0).view(batch, heads, rows, -1)
