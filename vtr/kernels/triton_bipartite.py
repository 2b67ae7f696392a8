"""Best match per row in Triton: score tiles in registers, a running maximum, nothing else kept."""

# Device functions are typed by Triton when they are compiled.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtr.kernels.triton_common import dot, unit_strides, upcast


@triton.jit
def _match_kernel(
    A, B, MASK, SCORE, INDEX, stride_ab, stride_an, stride_bb, stride_bn, stride_mb,
    rows, columns,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # One axis of programs: the others end at 65,535, fewer than the samples of windowed attention.
    tiles = tl.cdiv(rows, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row64 = row.to(tl.int64)
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    index = tl.zeros([BLOCK_M], dtype=tl.int32)
    inner = tl.arange(0, CHUNK)
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        scores = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for at in range(0, D, CHUNK):
            d = at + inner
            a = tl.load(
                A + b * stride_ab * UNIT + row64[:, None] * stride_an * UNIT + d[None, :],
                (row[:, None] < rows) & (d[None, :] < D), other=0.0,
            )  # fmt: skip
            other = tl.load(
                B + b * stride_bb * UNIT
                + column.to(tl.int64)[None, :] * stride_bn * UNIT + d[:, None],
                (column[None, :] < columns) & (d[:, None] < D), other=0.0,
            )  # fmt: skip
            scores = dot(a, other, scores, "ieee", UPCAST)
        inside = column < columns
        if HAS_MASK:
            inside = inside & (tl.load(MASK + b * stride_mb + column, inside, other=0) != 0)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        top = tl.max(scores, 1)
        # The lowest column among equals; a later tile must be better, not equal.
        first = tl.min(tl.where(scores == top[:, None], column[None, :], 2147483647), 1)
        better = top > best
        best = tl.where(better, top, best)
        index = tl.where(better, first, index)
    tl.store(SCORE + b * rows + row, best, row < rows)
    tl.store(INDEX + b * rows + row, index.to(tl.int64), row < rows)


@torch.library.custom_op("vtr::bipartite_match", mutates_args=())
def match(a: Tensor, b: Tensor, b_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`vtr.kernels.bipartite_match`; ``b_mask`` (Nb,) or (B, Nb) bool."""
    a, b = (t if t.stride(-1) == 1 else t.contiguous() for t in (a, b))
    batch, rows, dim = a.shape
    score = torch.empty(batch, rows, dtype=torch.float32, device=a.device)
    index = torch.empty(batch, rows, dtype=torch.int64, device=a.device)
    bits = a if b_mask is None else b_mask.contiguous().view(torch.uint8)
    own = b_mask is not None and b_mask.ndim == 2 and b_mask.shape[0] > 1
    block = 64 if rows > 16 else 16
    unit, strides = unit_strides(a, b)
    with torch.cuda.device_of(a):  # Triton launches on the current device, wherever the tensors are
        _match_kernel[(triton.cdiv(rows, block) * batch,)](
            a, b, bits, score, index, *strides, b.shape[1] if own else 0, rows, b.shape[1],
            D=dim, CHUNK=min(64, max(16, triton.next_power_of_2(dim))), BLOCK_M=block, BLOCK_N=64,
            UNIT=unit, HAS_MASK=b_mask is not None, UPCAST=upcast(a.dtype), num_warps=4,
        )  # fmt: skip
    return score, index


@match.register_fake
def _(a: Tensor, b: Tensor, b_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[:2], dtype=torch.float32), a.new_empty(
        a.shape[:2], dtype=torch.int64
    )


@register_flop_formula(torch.ops.vtr.bipartite_match)
def _flops(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1] * a[2]
