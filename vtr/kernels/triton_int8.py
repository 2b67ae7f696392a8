"""Block-sparse flash attention with queries and keys of 8 bits in Triton (:mod:`vtr.kernels.int8`).

The integers are written once, by one program for each block, in rows that are padded to whole blocks and to
multiples of 32 channels, so that no load of the main loop has bounds; the scores are products of integers on
tensor cores, with twice the rate of bfloat16. Weights and values are multiplied as in
:mod:`vtr.kernels.triton_attention`, whose work lists, joined rows and tiles are used.
"""

# Device functions are typed by Triton when they are compiled.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtr.kernels import triton_join
from vtr.kernels.int8 import mean_key, shift
from vtr.kernels.triton_attention import _configs, lists_of
from vtr.kernels.triton_common import (
    Config,
    amount,
    dot,
    expand_words,
    load_row,
    load_rows,
    load_words,
    precision,
    products,
    split_dim,
    tuned,
    unit_strides,
    upcast,
    write_rows,
)

_LOG2E = math.log2(math.e)


def split_channels(dim: int) -> tuple[int, int]:
    """Split a head dim as :func:`split_dim` does, into parts that products of 8 bits take: 32 at least."""
    main, rest = split_dim(dim)
    return main, max(32, rest) if rest else 0


# ---- rounding ---------------------------------------------------------------------------------


@triton.jit
def _nearest(x, step):
    """Round x / step to the nearest integer, ties to even: adding 1.5 x 2^23 leaves no room for fractions."""
    return tl.math.div_rn(x, tl.zeros_like(x) + step) + 12582912.0 - 12582912.0


@triton.jit
def _round_kernel(
    X, MEAN, LEVEL, STEP,
    stride_xb, stride_xh, stride_xs,
    heads, blocks, length,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, SIDE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row = block * SIDE + tl.arange(0, SIDE)
    base = X + (lane // heads).to(tl.int64) * stride_xb * UNIT
    base += (lane % heads).to(tl.int64) * stride_xh * UNIT
    row64 = row.to(tl.int64)
    x0 = load_rows(base, row64, stride_xs, length, 0, D0, D, UNIT, True).to(tl.float32)
    x1 = x0
    if D1 > 0:
        x1 = load_rows(base, row64, stride_xs, length, D0, D1, D, UNIT, True).to(tl.float32)
    if HAS_MEAN:
        mean = MEAN + lane.to(tl.int64) * D
        x0 = tl.where(row[:, None] < length, x0 - load_row(mean, 0, D0, D)[None, :], 0.0)
        if D1 > 0:
            x1 = tl.where(row[:, None] < length, x1 - load_row(mean, D0, D1, D)[None, :], 0.0)
    most = tl.max(tl.max(tl.abs(x0), 1), 0)
    if D1 > 0:
        most = tl.maximum(most, tl.max(tl.max(tl.abs(x1), 1), 0))
    # The least normal float32, so that no step is 0.
    step = tl.maximum(tl.math.div_rn(most, 127.0), 1.1754943508222875e-38)
    tl.store(STEP + tl.program_id(0), step)
    out = LEVEL + (lane.to(tl.int64) * blocks * SIDE + row64)[:, None] * (D0 + D1)
    tl.store(out + tl.arange(0, D0)[None, :], _nearest(x0, step).to(tl.int8))
    if D1 > 0:
        tl.store(out + D0 + tl.arange(0, D1)[None, :], _nearest(x1, step).to(tl.int8))


def rounded(x: Tensor, side: int, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute :func:`vtr.kernels.int8.rounded`, the same numbers, in one kernel.

    Returns:
        The integers (B, H, NB side, W) int8, zero in the padding, and the steps (B, H, NB) float32.
    """
    batch, heads, length, dim = x.shape
    main, rest = split_channels(dim)
    blocks = -(-length // side)
    level = torch.empty(batch, heads, blocks * side, main + rest, dtype=torch.int8, device=x.device)
    step = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    unit, strides = unit_strides(x)
    with torch.cuda.device_of(x):
        _round_kernel[(batch * heads * blocks,)](
            x, step if mean is None else mean.contiguous(), level, step, *strides,
            heads, blocks, length,
            D=dim, D0=main, D1=rest, UNIT=unit, SIDE=side, HAS_MEAN=mean is not None,
            num_warps=8 if side * main >= 8192 else 4,
        )  # fmt: skip
    return level, step


# ---- attention --------------------------------------------------------------------------------


@triton.jit
def _step(
    q0, q1, m, total, acc0, acc1, k_base, v_base, stride_v, key, k_len, seen, factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E1: tl.constexpr, UNIT: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys: scores of integers, running maximum and sum, weighted values."""
    line = k_base + key[:, None] * (D0 + E1)
    found = tl.dot(q0, tl.trans(tl.load(line + tl.arange(0, D0)[None, :])), out_dtype=tl.int32)
    if E1 > 0:
        k1 = tl.load(line + D0 + tl.arange(0, E1)[None, :])
        found = tl.dot(q1, tl.trans(k1), found, out_dtype=tl.int32)
    scores = found.to(tl.float32)
    if MASKED:
        # Scaled first: the factor may be 0, which -inf must not meet.
        scores = tl.where(seen, scores * factor, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        # A row that has seen nothing yet has m = -inf, and -inf - -inf is NaN.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weights = tl.exp2(scores - m_safe[:, None])
    else:
        m_new = tl.maximum(m, tl.max(scores, 1) * factor)
        m_safe = m_new
        weights = tl.exp2(tl.fma(scores, factor, -m_safe[:, None]))
    keep = tl.exp2(m - m_safe)
    total = total * keep + tl.sum(weights, 1)
    v0 = load_rows(v_base, key, stride_v, k_len, 0, D0, D, UNIT, MASKED)
    weights = weights.to(v0.dtype)
    acc0 = dot(weights, v0, acc0 * keep[:, None], PRECISION, UPCAST)
    if D1 > 0:
        v1 = load_rows(v_base, key, stride_v, k_len, D0, D1, D, UNIT, MASKED)
        acc1 = dot(weights, v1, acc1 * keep[:, None], PRECISION, UPCAST)
    return m_new, total, acc0, acc1


@triton.jit(do_not_specialize=["items", "parts"])
def _forward_kernel(
    LEVEL_Q, STEP_Q, LEVEL_K, STEP_K, V, ROW_SCALE, ADDED, OUT, LSE, PART_OUT, PART_LSE,
    ITEMS, PATTERN, COL, TILE, TILES,
    stride_vb, stride_vh, stride_vs, stride_pb, stride_ph,
    heads, group, items, parts, q_len, k_len, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E1: tl.constexpr, UNIT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FIELDS: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, HAS_ADDED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    SUB_M: tl.constexpr = MASK_M // BLOCK_M
    SUB_N: tl.constexpr = MASK_N // BLOCK_N
    BITS: tl.constexpr = 32 if MASK_N >= 32 else MASK_N
    WORDS: tl.constexpr = MASK_N // BITS
    lane = tl.program_id(0) // (items * SUB_M)
    item = tl.program_id(0) % (items * SUB_M) // SUB_M
    sub = tl.program_id(0) % SUB_M
    b = (lane // heads).to(tl.int64)
    h = (lane % heads).to(tl.int64)
    pattern = tl.load(PATTERN + b * stride_pb + h * stride_ph)
    entry = ITEMS + (pattern.to(tl.int64) * items + item) * FIELDS
    row_block = tl.load(entry)
    first = tl.load(entry + 1)
    middle = tl.load(entry + 2)
    last = tl.load(entry + 3)
    part = tl.load(entry + 4)
    if row_block >= 0:
        rows = tl.cdiv(q_len, MASK_M)
        columns = tl.cdiv(k_len, MASK_N)
        lane64 = lane.to(tl.int64)
        k_lane = b * (heads // group) + h // group
        k_base = LEVEL_K + k_lane * columns * MASK_N * (D0 + E1)
        v_base = V + b * stride_vb * UNIT + (h // group) * stride_vh * UNIT
        step_k = STEP_K + k_lane * columns
        offset = tl.arange(0, BLOCK_M)
        row = row_block * MASK_M + sub * BLOCK_M + offset
        line = LEVEL_Q + (lane64 * rows * MASK_M + row)[:, None] * (D0 + E1)
        q0 = tl.load(line + tl.arange(0, D0)[None, :])
        q1 = q0
        if E1 > 0:
            q1 = tl.load(line + D0 + tl.arange(0, E1)[None, :])
        scale = scale_log2 * tl.load(STEP_Q + lane64 * rows + row_block)
        m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
        acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], dtype=tl.float32)
        inner = tl.arange(0, BLOCK_N)

        # Blocks are read one step ahead, see :mod:`vtr.kernels.triton_attention`.
        block = tl.load(COL + first, first < last, other=0)
        for step in range(first * SUB_N, middle * SUB_N):
            key = (block * MASK_N + (step % SUB_N) * BLOCK_N).to(tl.int64) + inner
            factor = scale * tl.load(step_k + block)
            ahead = (step + 1) // SUB_N
            block = tl.load(COL + ahead, ahead < last, other=0)
            m, total, acc0, acc1 = _step(
                q0, q1, m, total, acc0, acc1, k_base, v_base, stride_vs, key, k_len, True, factor,
                D, D0, D1, E1, UNIT, False, PRECISION, UPCAST,
            )  # fmt: skip
        tile = tl.load(TILE + middle, middle < last, other=0)
        within = sub * BLOCK_M + offset
        words = load_words(TILES, tile, within, 0, MASK_M, WORDS, BITS, BLOCK_N, False)
        tile = tl.load(TILE + middle + 1 // SUB_N, middle + 1 // SUB_N < last, other=0)
        for step in range(middle * SUB_N, last * SUB_N):
            column = step % SUB_N * BLOCK_N
            key = (block * MASK_N + column).to(tl.int64) + inner
            factor = scale * tl.load(step_k + block)
            seen = expand_words(words, column, BITS, BLOCK_N, False)
            after = (step + 1) % SUB_N * BLOCK_N
            words = load_words(TILES, tile, within, after, MASK_M, WORDS, BITS, BLOCK_N, False)
            block = tl.load(COL + (step + 1) // SUB_N, (step + 1) // SUB_N < last, other=0)
            tile = tl.load(TILE + (step + 2) // SUB_N, (step + 2) // SUB_N < last, other=0)
            m, total, acc0, acc1 = _step(
                q0, q1, m, total, acc0, acc1, k_base, v_base, stride_vs, key, k_len, seen, factor,
                D, D0, D1, E1, UNIT, True, PRECISION, UPCAST,
            )  # fmt: skip

        write_rows(
            acc0, acc1, m, total, OUT + lane64 * q_len * D, D, ROW_SCALE, ADDED, LSE, PART_OUT, PART_LSE,
            lane, row_block, part, parts, sub * BLOCK_M + offset, q_len,
            D, D0, D1, 1, MASK_M, HAS_ROW_SCALE, HAS_ADDED,
        )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
    mask: list[Tensor], dims: list[int], scale: float, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`vtr.kernels.int8_reference.int8_attention_reference` for the contract; the LSE lacks the
    mean key if it is not needed."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    batch, heads, q_len, dim = q.shape
    mean = mean_key(k)
    q_level, q_step = rounded(q, dims[2])
    k_level, k_step = rounded(k, dims[3], mean)
    sign = scale
    if scale <= 0.0:  # the kernel scales the maximum of a row, which wants a scale above 0
        q_level, sign = (-q_level, -scale) if scale < 0.0 else (torch.zeros_like(q_level), 1.0)
    pattern, _, _, col, tile = mask[:5]
    lists = lists_of(mask, dims)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    parts = lists.heavy.shape[1] * lists.pieces
    part_out = torch.empty(batch * heads, parts, dims[2], dim, device=q.device)
    part_lse = torch.empty(batch * heads, parts, dims[2], device=q.device)
    row_scale = None if row_scale is None else row_scale.contiguous()
    added = None if added is None else added.contiguous()
    main, rest = split_dim(dim)
    items = lists.items.shape[1]
    steps = [pattern.stride(i) if pattern.shape[i] > 1 else 0 for i in (0, 1)]
    unit, strides = unit_strides(v)

    def launch(config: Config) -> None:
        _forward_kernel[(items * (dims[2] // config.block_m) * batch * heads,)](
            q_level, q_step, k_level, k_step, v, out if row_scale is None else row_scale,
            out if added is None else added, out, lse, part_out, part_lse,
            lists.items, pattern, col, tile, lists.words,
            *strides, *steps,
            heads, heads // k.shape[1], items, parts, q_len, k.shape[2], sign * _LOG2E,
            D=dim, D0=main, D1=rest, E1=split_channels(dim)[1], UNIT=unit,
            MASK_M=dims[2], MASK_N=dims[3], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            FIELDS=lists.items.shape[2], HAS_ROW_SCALE=row_scale is not None,
            HAS_ADDED=added is not None, PRECISION=precision(v.dtype), UPCAST=upcast(v.dtype),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    kind = products(q.dtype)
    programs = amount(q.device, items * batch * heads)
    key = ("int8", q.device, q.dtype, kind, dim, *dims[2:], programs)
    with torch.cuda.device_of(q):  # Triton launches on the current device, wherever the tensors are
        tuned(key, _configs(dim, dims[2], dims[3], kind), launch)
        if parts:
            triton_join.join(
                out, lse, part_out, part_lse, row_scale, added, pattern, lists.heavy, dims[2]
            )
    return out, lse + shift(q, mean, scale) if need_lse else lse
