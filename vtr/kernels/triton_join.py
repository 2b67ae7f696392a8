"""Join heavy rows of the Triton forward from their parts, in one kernel that reads nothing back.

With the parts p of a row's keys attended apart: lse = log sum_p exp(lse_p),
out = row_scale sum_p exp(lse_p - lse) out_p + added.
"""

# Device functions are typed by Triton when they are compiled.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtr.kernels.triton_common import load_row, load_rows, split_dim, store_rows


@triton.jit(do_not_specialize=["most", "pieces"])
def _join_kernel(
    OUT, LSE, PART_OUT, PART_LSE, ROW_SCALE, ADDED, PATTERN, HEAVY,
    stride_pb, stride_ph, heads, most, pieces, q_len,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK_M: tl.constexpr, ROWS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, HAS_ADDED: tl.constexpr,
):  # fmt: skip
    SUB: tl.constexpr = MASK_M // ROWS
    lane = tl.program_id(0) // (most * SUB)
    which = tl.program_id(0) % (most * SUB) // SUB
    sub = tl.program_id(0) % SUB
    b = (lane // heads).to(tl.int64)
    h = (lane % heads).to(tl.int64)
    pattern = tl.load(PATTERN + b * stride_pb + h * stride_ph).to(tl.int64)
    row_block = tl.load(HEAVY + pattern * most + which)
    if row_block >= 0:
        local = sub * ROWS + tl.arange(0, ROWS)
        first = (lane.to(tl.int64) * most + which) * pieces
        top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        for piece in range(0, pieces):
            top = tl.maximum(top, tl.load(PART_LSE + (first + piece) * MASK_M + local))
        # Rows without keys in any part: -inf - -inf would be NaN.
        base = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros([ROWS], dtype=tl.float32)
        acc0 = tl.zeros([ROWS, D0], dtype=tl.float32)
        acc1 = tl.zeros([ROWS, D1 if D1 > 0 else 1], dtype=tl.float32)
        for piece in range(0, pieces):
            at = (first + piece) * MASK_M + local
            weight = tl.exp(tl.load(PART_LSE + at) - base)
            total += weight
            end = (first + piece + 1) * MASK_M
            acc0 += weight[:, None] * load_rows(PART_OUT, at, D, end, 0, D0, D, 1, False)
            if D1 > 0:
                acc1 += weight[:, None] * load_rows(PART_OUT, at, D, end, D0, D1, D, 1, False)
        nothing = total == 0.0
        factor = 1.0 / tl.where(nothing, 1.0, total)
        lse = tl.where(nothing, float("-inf"), base + tl.log(tl.where(nothing, 1.0, total)))
        row = row_block * MASK_M + local
        at = lane.to(tl.int64) * q_len + row
        if HAS_ROW_SCALE:
            factor *= tl.load(ROW_SCALE + at, row < q_len, other=0.0).to(tl.float32)
        out0 = acc0 * factor[:, None]
        out1 = acc1 * factor[:, None]
        if HAS_ADDED:
            line = lane.to(tl.int64) * tl.cdiv(q_len, MASK_M) + row_block
            out0 += load_row(ADDED + line * D, 0, D0, D)[None, :]
            if D1 > 0:
                out1 += load_row(ADDED + line * D, D0, D1, D)[None, :]
        o_base = OUT + lane.to(tl.int64) * q_len * D
        store_rows(o_base, row, D, q_len, out0, 0, D0, D, 1)
        if D1 > 0:
            store_rows(o_base, row, D, q_len, out1, D0, D1, D, 1)
        tl.store(LSE + at, lse, row < q_len)


def join(
    out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, row_scale: Tensor | None,
    added: Tensor | None, pattern: Tensor, heavy: Tensor, block: int,
) -> None:  # fmt: skip
    """Write the heavy rows of ``out`` and ``lse``.

    Args:
        out: (B, H, Sq, D). lse: (B, H, Sq) float32. Both contiguous, as all others are.
        part_out: (B H, R pieces, block, D) float32. part_lse: (B H, R pieces, block) float32.
        row_scale: (B, H, Sq) or None. added: (B, H, NQ, D) or None.
        pattern: (Bp, Hp) int32. heavy: (P, R) int64 query blocks, -1 for none.
    """
    batch, heads, q_len, dim = out.shape
    most = heavy.shape[1]
    main, rest = split_dim(dim)
    steps = [pattern.stride(i) if pattern.shape[i] > 1 else 0 for i in (0, 1)]
    height = 16
    with torch.cuda.device_of(out):
        _join_kernel[(batch * heads * most * (block // height),)](
            out, lse, part_out, part_lse, out if row_scale is None else row_scale,
            out if added is None else added, pattern, heavy, *steps,
            heads, most, part_out.shape[1] // most, q_len,
            D=dim, D0=main, D1=rest, MASK_M=block, ROWS=height,
            HAS_ROW_SCALE=row_scale is not None, HAS_ADDED=added is not None,
        )  # fmt: skip
