"""The ``sdpa`` backend for masks of small blocks, all rows of which keep as many: one batched product.

Row by row, what Python does between the products of 16 x 80 scores costs more than the products. Masks
of top-k methods have the same number of blocks in every row, so that many rows fit one batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

# Scores of a row of blocks, up to which rows are worth batching, and numbers of gathered keys in one batch.
_TILE = 1 << 13
_BATCH = 1 << 21

_columns: dict[int, Tensor | None] = {}


def columns_of(mask: list[Tensor], dims: list[int]) -> Tensor | None:
    """Return the key blocks of each row of blocks, (patterns, NQ, n) int64, found once per mask; None if the
    mask is not of that kind: other numbers in other rows, partial blocks, large blocks, or not on the CPU."""
    ident = mask[6]
    key = int(ident) if ident.device.type == "cpu" else None
    if key is None or mask[3].device.type != "cpu":
        return None
    if key not in _columns:
        _columns[key] = _find(mask, dims)
        weakref.finalize(ident, _columns.pop, key, None)
    return _columns[key]


def _find(mask: list[Tensor], dims: list[int]) -> Tensor | None:
    _, row_ptr, split, col = mask[:4]
    q_len, k_len, bm, bn = dims
    if q_len % bm or k_len % bn or not torch.equal(split, row_ptr[1:]):
        return None
    rows = split.numel()
    number = col.numel() // rows
    same = torch.equal(row_ptr, torch.arange(rows + 1, device="cpu").to(row_ptr.dtype) * number)
    if number == 0 or not same or number * bn * bm > _TILE:
        return None
    return col.long().view(-1, q_len // bm, number)


class _Batches:
    """Batches of rows of blocks, all heads and samples in one line."""

    def __init__(self, k: Tensor, heads: int, columns: Tensor, pattern: Tensor, dims: list[int]):
        (batch, kv, _, self.dim), (_, k_len, self.bm, self.bn) = k.shape, dims
        rows = columns[pattern.long().expand(batch, heads)]  # (B, H, NQ, n)
        head = torch.arange(heads, device="cpu") // (heads // kv)
        first = (torch.arange(batch, device="cpu")[:, None] * kv + head) * (k_len // self.bn)
        self.index = (rows + first[:, :, None, None]).flatten(0, 2)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of blocks, and the numbers of their key blocks in one line."""
        size = max(1, _BATCH // (self.index.shape[1] * self.bn * self.dim))
        for start in range(0, len(self.index), size):
            here = slice(start, min(start + size, len(self.index)))
            yield here, self.index[here].flatten()

    def queries(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, Sq, D) as (rows of blocks, bm, D)."""
        return x.to(dtype).reshape(-1, self.bm, x.shape[-1])

    def keys(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, Hk, Sk, D) as (key blocks, bn D)."""
        return x.to(dtype).reshape(-1, self.bn * self.dim)

    def gather(self, x: Tensor, which: Tensor) -> Tensor:
        """(rows of blocks, their keys, D)."""
        return x.index_select(0, which).view(-1, self.index.shape[1] * self.bn, self.dim)


def forward(
    q: Tensor, k: Tensor, v: Tensor, pattern: Tensor, columns: Tensor, dims: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the output (B, H, Sq, D) and the LSE (B, H, Sq), both in float32 (float64 for float64)."""
    work = torch.promote_types(q.dtype, torch.float32)
    batches = _Batches(k, q.shape[1], columns, pattern, dims)
    query, keys, values = batches.queries(q, work), batches.keys(k, work), batches.keys(v, work)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:2])
    for here, which in batches:
        scores = torch.bmm(query[here], batches.gather(keys, which).mT).mul_(scale)
        top = scores.amax(-1)
        torch.softmax(scores, -1, out=scores)
        # The largest weight is exp(top - lse).
        torch.sub(top, scores.amax(-1).log_(), out=lse[here])
        torch.bmm(scores, batches.gather(values, which), out=out[here])
    return out.view(q.shape), lse.view(q.shape[:3])


def backward(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: Tensor, columns: Tensor,
    dims: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute what :func:`vtr.kernels.sdpa.backward` does, in the same dtypes."""
    work = torch.promote_types(q.dtype, torch.float32)
    batches = _Batches(k, q.shape[1], columns, pattern, dims)
    query, grad = batches.queries(q, work), batches.queries(dout, work)
    keys, values = batches.keys(k, work), batches.keys(v, work)
    less = delta.to(work).reshape(-1, batches.bm, 1)
    dq, dk, dv = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
    for here, which in batches:
        found = batches.gather(keys, which)
        weights = torch.bmm(query[here], found.mT).mul_(scale)
        torch.softmax(weights, -1, out=weights)
        slope = torch.bmm(grad[here], batches.gather(values, which).mT).sub_(less[here])
        slope.mul_(weights).mul_(scale)
        torch.bmm(slope, found, out=dq[here])
        dk.index_add_(0, which, torch.bmm(slope.mT, query[here]).view(-1, keys.shape[1]))
        dv.index_add_(0, which, torch.bmm(weights.mT, grad[here]).view(-1, keys.shape[1]))
    return (
        dq.view(q.shape).to(q.dtype),
        dk.view(k.shape).to(k.dtype),
        dv.view(v.shape).to(v.dtype),
    )
