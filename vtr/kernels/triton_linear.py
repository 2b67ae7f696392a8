"""Linear attention over the marginal blocks of a mask in Triton: forward, backward, launches.

With x = phi(q), y = phi(k), and T = sum_j y_j^T v_j, t = sum_j y_j over all keys of a head. A row block
lists the fewer of two kinds of key blocks: those that it leaves out, whose share is subtracted from the totals
(s = -1), or its marginal ones, which are added up from zero (s = 1). The loop over the list is attention without
an exponential, w_ij = x_i . y_j, so that no D x D sum is held per block or per row:

    n_i = [s < 0] x_i T + s sum_j w_ij v_j;  z_i = [s < 0] x_i . t + s sum_j w_ij;  l_i = n_i / z_i

Backward, with a_i = s g_i / z_i, b_i = -s (g_i . l_i) / z_i and c_ij = a_i . v_j + b_i:

    dx_i = sum_j c_ij y_j - [s < 0] (a_i T^T + b_i t)
    dy_j = sum_i c_ij x_i + A v_j + r;  dv_j = sum_i w_ij a_i + y_j A
    A = -sum_{s < 0} x_i^T a_i;  r = -sum_{s < 0} b_i x_i
"""

# Device functions are typed by Triton when they are compiled.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtr.kernels.capture import refuse_capture
from vtr.kernels.linear_reference import EPSILON
from vtr.kernels.triton_common import (
    Config,
    amount,
    dot,
    load_row,
    load_rows,
    precision,
    products,
    split_dim,
    store_rows,
    tuned,
    unit_strides,
    upcast,
)
from vtr.kernels.triton_linear_lists import Listed, listed_of

# Tokens of one partial sum of the totals.
_RUN = 2048
# A row whose marginal keys have less than this share of the whole denominator counts as one without any:
# the difference of two nearly equal sums would be noise.
_LEAST = {torch.float32: 1e-5, torch.bfloat16: 1e-4}


# ---- totals -----------------------------------------------------------------------------------


@triton.jit
def _totals_kernel(
    X, Y, WEIGHT, SIGN, PATTERN, SUMS, LINE,
    stride_xb, stride_xh, stride_xs, stride_yb, stride_yh, stride_ys, stride_pb, stride_ph,
    heads, runs, length, blocks,
    D: tl.constexpr, WIDE: tl.constexpr, SLICE: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK_M: tl.constexpr, BY_ROW: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum x_j^T y_j (and weight_j x_j) over a run of tokens; with BY_ROW, minus the sum over the rows whose
    sign is -1."""
    SLICES: tl.constexpr = (D + SLICE - 1) // SLICE
    lane = tl.program_id(0) // (runs * SLICES)
    run = tl.program_id(0) % (runs * SLICES) // SLICES
    part = tl.program_id(0) % SLICES
    b = (lane // heads).to(tl.int64)
    h = (lane % heads).to(tl.int64)
    x_base = X + b * stride_xb * UNIT + h * stride_xh * UNIT
    y_base = Y + b * stride_yb * UNIT + h * stride_yh * UNIT
    signs = SIGN
    if BY_ROW:
        pattern = tl.load(PATTERN + b * stride_pb + h * stride_ph).to(tl.int64)
        signs = SIGN + pattern * blocks
    wide = tl.arange(0, WIDE)
    narrow = part * SLICE + tl.arange(0, SLICE)
    acc = tl.zeros([WIDE, SLICE], dtype=tl.float32)
    line = tl.zeros([WIDE], dtype=tl.float32)
    inner = tl.arange(0, BLOCK_N)
    row = run * RUN + inner
    sign = inner
    if BY_ROW:
        sign = tl.load(signs + row // MASK_M, row < length, other=1)
    for start in range(run * RUN, min((run + 1) * RUN, length), BLOCK_N):
        row = start + inner
        row64 = row.to(tl.int64)
        here = row < length
        if BY_ROW:
            here = here & (sign < 0)
            # One step ahead, so that the rows are prefetched.
            sign = tl.load(signs + (row + BLOCK_N) // MASK_M, row + BLOCK_N < length, other=1)
        inside = here[:, None] & (wide[None, :] < D)
        x = tl.load(x_base + row64[:, None] * stride_xs * UNIT + wide[None, :], inside, other=0.0)
        inside = here[:, None] & (narrow[None, :] < D)
        y = tl.load(y_base + row64[:, None] * stride_ys * UNIT + narrow[None, :], inside, other=0.0)
        acc = dot(tl.trans(x), y, acc, PRECISION, UPCAST)
        if BY_ROW:
            weight = tl.load(WEIGHT + lane.to(tl.int64) * length + row, here, other=0.0)
            line += tl.sum(x.to(tl.float32) * weight[:, None], 0)
        else:
            line += tl.sum(x.to(tl.float32), 0)
    if BY_ROW:
        acc = -acc
        line = -line
    at = (lane * runs + run).to(tl.int64)
    inside = (wide[:, None] < D) & (narrow[None, :] < D)
    tl.store(SUMS + at * (D * D) + wide[:, None] * D + narrow[None, :], acc, inside)
    if part == 0:
        tl.store(LINE + at * D + wide, line, wide < D)


@triton.jit
def _times(
    acc0, acc1, base, row, stride, limit, sums, stride_t, stride_u,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the product of some rows and the (D, D) totals, whose float32 values are multiplied as the sum of
    two in low precision. A slice of the rows at a time: with all, the totals would not fit."""
    left = tl.arange(0, D0)
    right = D0 + tl.arange(0, D1 if D1 > 0 else 1)
    for start in range(0, D, STEP):
        column = start + tl.arange(0, STEP)
        inside = column < D
        x = tl.load(
            base + row[:, None] * stride * UNIT + column[None, :],
            (row[:, None] < limit) & inside[None, :], other=0.0,
        )  # fmt: skip
        pointer = sums + column[:, None] * stride_t
        t = tl.load(pointer + left[None, :] * stride_u, inside[:, None], other=0.0)
        high = t.to(x.dtype)
        acc0 = dot(x, high, acc0, PRECISION, UPCAST)
        if x.dtype != tl.float32:
            acc0 = dot(x, (t - high.to(tl.float32)).to(x.dtype), acc0, PRECISION, UPCAST)
        if D1 > 0:
            both = inside[:, None] & (right[None, :] < D)
            t = tl.load(pointer + right[None, :] * stride_u, both, other=0.0)
            high = t.to(x.dtype)
            acc1 = dot(x, high, acc1, PRECISION, UPCAST)
            if x.dtype != tl.float32:
                acc1 = dot(x, (t - high.to(tl.float32)).to(x.dtype), acc1, PRECISION, UPCAST)
    return acc0, acc1


# ---- forward ----------------------------------------------------------------------------------


@triton.jit
def _item(
    ITEMS, PATTERN, stride_pb, stride_ph, heads, items, MASK_M: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The work of a program: (sample, head) as one number and apart, rows, and entries of its list."""
    SUB_M: tl.constexpr = MASK_M // BLOCK_M
    lane = tl.program_id(0) // (items * SUB_M)
    item = tl.program_id(0) % (items * SUB_M) // SUB_M
    sub = tl.program_id(0) % SUB_M
    b = (lane // heads).to(tl.int64)
    h = (lane % heads).to(tl.int64)
    pattern = tl.load(PATTERN + b * stride_pb + h * stride_ph)
    entry = ITEMS + (pattern.to(tl.int64) * items + item) * 5
    row = tl.load(entry) * MASK_M + sub * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.load(entry + 1)
    middle = tl.load(entry + 2)
    last = tl.load(entry + 3)
    sign = tl.load(entry + 4)
    return lane, b, h, row, first, middle, last, sign


@triton.jit
def _forward_step(
    x0, x1, total, acc0, acc1, y_base, v_base, stride_y, stride_v, key, k_len,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, BOUND: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    y0 = load_rows(y_base, key, stride_y, k_len, 0, D0, D, UNIT, BOUND)
    weights = tl.zeros([x0.shape[0], y0.shape[0]], dtype=tl.float32)
    weights = dot(x0, tl.trans(y0), weights, PRECISION, UPCAST)
    if D1 > 0:
        y1 = load_rows(y_base, key, stride_y, k_len, D0, D1, D, UNIT, BOUND)
        weights = dot(x1, tl.trans(y1), weights, PRECISION, UPCAST)
    total += tl.sum(weights, 1)
    v0 = load_rows(v_base, key, stride_v, k_len, 0, D0, D, UNIT, BOUND)
    weights = weights.to(v0.dtype)
    acc0 = dot(weights, v0, acc0, PRECISION, UPCAST)
    if D1 > 0:
        v1 = load_rows(v_base, key, stride_v, k_len, D0, D1, D, UNIT, BOUND)
        acc1 = dot(weights, v1, acc1, PRECISION, UPCAST)
    return total, acc0, acc1


@triton.jit
def _forward_kernel(
    X, Y, V, SUMS, LINE, OUT, FACTOR, ITEMS, PATTERN, COL,
    stride_xb, stride_xh, stride_xs, stride_yb, stride_yh, stride_ys,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os, stride_pb, stride_ph,
    heads, group, items, q_len, k_len, epsilon, least,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    SUB_N: tl.constexpr = MASK_N // BLOCK_N
    lane, b, h, row, first, middle, last, sign = _item(
        ITEMS, PATTERN, stride_pb, stride_ph, heads, items, MASK_M, BLOCK_M
    )
    kh = h // group
    row64 = row.to(tl.int64)
    x_base = X + b * stride_xb * UNIT + h * stride_xh * UNIT
    y_base = Y + b * stride_yb * UNIT + kh * stride_yh * UNIT
    v_base = V + b * stride_vb * UNIT + kh * stride_vh * UNIT
    x0 = load_rows(x_base, row64, stride_xs, q_len, 0, D0, D, UNIT, True)
    x1 = x0
    if D1 > 0:
        x1 = load_rows(x_base, row64, stride_xs, q_len, D0, D1, D, UNIT, True)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], dtype=tl.float32)
    inner = tl.arange(0, BLOCK_N)
    # One step ahead, as in the attention kernel, so that keys are prefetched.
    block = tl.load(COL + first, first < last, other=0)
    for step in range(first * SUB_N, middle * SUB_N):
        key = (block * MASK_N + (step % SUB_N) * BLOCK_N).to(tl.int64) + inner
        ahead = (step + 1) // SUB_N
        block = tl.load(COL + ahead, ahead < last, other=0)
        total, acc0, acc1 = _forward_step(
            x0, x1, total, acc0, acc1, y_base, v_base, stride_ys, stride_vs, key, k_len,
            D, D0, D1, UNIT, False, PRECISION, UPCAST,
        )  # fmt: skip
    for step in range(middle * SUB_N, last * SUB_N):
        key = (block * MASK_N + (step % SUB_N) * BLOCK_N).to(tl.int64) + inner
        ahead = (step + 1) // SUB_N
        block = tl.load(COL + ahead, ahead < last, other=0)
        total, acc0, acc1 = _forward_step(
            x0, x1, total, acc0, acc1, y_base, v_base, stride_ys, stride_vs, key, k_len,
            D, D0, D1, UNIT, True, PRECISION, UPCAST,
        )  # fmt: skip
    floor = tl.zeros([BLOCK_M], dtype=tl.float32)
    if sign < 0:
        at = b * (heads // group) + kh
        floor += tl.sum(x0.to(tl.float32) * load_row(LINE + at * D, 0, D0, D)[None, :], 1)
        if D1 > 0:
            floor += tl.sum(x1.to(tl.float32) * load_row(LINE + at * D, D0, D1, D)[None, :], 1)
        total = floor - total
        acc0, acc1 = _times(
            -acc0, -acc1, x_base, row64, stride_xs, q_len, SUMS + at * (D * D), D, 1,
            D, D0, D1, UNIT, STEP, PRECISION, UPCAST,
        )  # fmt: skip
    total += epsilon
    alive = total > floor * least
    factor = tl.where(alive, 1.0 / tl.where(alive, total, 1.0), 0.0)
    o_base = OUT + b * stride_ob * UNIT + h * stride_oh * UNIT
    store_rows(o_base, row64, stride_os, q_len, acc0 * factor[:, None], 0, D0, D, UNIT)
    if D1 > 0:
        store_rows(o_base, row64, stride_os, q_len, acc1 * factor[:, None], D0, D1, D, UNIT)
    tl.store(FACTOR + lane.to(tl.int64) * q_len + row, factor, row < q_len)


# ---- backward ---------------------------------------------------------------------------------


@triton.jit
def _dx_step(
    a0, a1, bias, dx0, dx1, y_base, v_base, stride_y, stride_v, key, k_len,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, BOUND: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    v0 = load_rows(v_base, key, stride_v, k_len, 0, D0, D, UNIT, BOUND)
    slope = tl.zeros([a0.shape[0], v0.shape[0]], dtype=tl.float32)
    slope = dot(a0, tl.trans(v0), slope, PRECISION, UPCAST)
    if D1 > 0:
        v1 = load_rows(v_base, key, stride_v, k_len, D0, D1, D, UNIT, BOUND)
        slope = dot(a1, tl.trans(v1), slope, PRECISION, UPCAST)
    # Past the last key the slope is not 0, but the features are.
    y0 = load_rows(y_base, key, stride_y, k_len, 0, D0, D, UNIT, BOUND)
    slope = (slope + bias[:, None]).to(y0.dtype)
    dx0 = dot(slope, y0, dx0, PRECISION, UPCAST)
    if D1 > 0:
        y1 = load_rows(y_base, key, stride_y, k_len, D0, D1, D, UNIT, BOUND)
        dx1 = dot(slope, y1, dx1, PRECISION, UPCAST)
    return dx0, dx1


@triton.jit
def _dx_kernel(
    Y, V, SLOPE, BIAS, SUMS, LINE, DX, ITEMS, PATTERN, COL,
    stride_yb, stride_yh, stride_ys, stride_vb, stride_vh, stride_vs,
    stride_ab, stride_ah, stride_as, stride_ob, stride_oh, stride_os, stride_pb, stride_ph,
    heads, group, items, q_len, k_len,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    SUB_N: tl.constexpr = MASK_N // BLOCK_N
    lane, b, h, row, first, middle, last, sign = _item(
        ITEMS, PATTERN, stride_pb, stride_ph, heads, items, MASK_M, BLOCK_M
    )
    kh = h // group
    row64 = row.to(tl.int64)
    y_base = Y + b * stride_yb * UNIT + kh * stride_yh * UNIT
    v_base = V + b * stride_vb * UNIT + kh * stride_vh * UNIT
    a_base = SLOPE + b * stride_ab * UNIT + h * stride_ah * UNIT
    a0 = load_rows(a_base, row64, stride_as, q_len, 0, D0, D, UNIT, True)
    a1 = a0
    if D1 > 0:
        a1 = load_rows(a_base, row64, stride_as, q_len, D0, D1, D, UNIT, True)
    bias = tl.load(BIAS + lane.to(tl.int64) * q_len + row, row < q_len, other=0.0)
    dx0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    dx1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], dtype=tl.float32)
    inner = tl.arange(0, BLOCK_N)
    block = tl.load(COL + first, first < last, other=0)
    for step in range(first * SUB_N, middle * SUB_N):
        key = (block * MASK_N + (step % SUB_N) * BLOCK_N).to(tl.int64) + inner
        ahead = (step + 1) // SUB_N
        block = tl.load(COL + ahead, ahead < last, other=0)
        dx0, dx1 = _dx_step(
            a0, a1, bias, dx0, dx1, y_base, v_base, stride_ys, stride_vs, key, k_len,
            D, D0, D1, UNIT, False, PRECISION, UPCAST,
        )  # fmt: skip
    for step in range(middle * SUB_N, last * SUB_N):
        key = (block * MASK_N + (step % SUB_N) * BLOCK_N).to(tl.int64) + inner
        ahead = (step + 1) // SUB_N
        block = tl.load(COL + ahead, ahead < last, other=0)
        dx0, dx1 = _dx_step(
            a0, a1, bias, dx0, dx1, y_base, v_base, stride_ys, stride_vs, key, k_len,
            D, D0, D1, UNIT, True, PRECISION, UPCAST,
        )  # fmt: skip
    if sign < 0:
        at = b * (heads // group) + kh
        dx0, dx1 = _times(
            -dx0, -dx1, a_base, row64, stride_as, q_len, SUMS + at * (D * D), 1, D,
            D, D0, D1, UNIT, STEP, PRECISION, UPCAST,
        )  # fmt: skip
        dx0 = -(dx0 + bias[:, None] * load_row(LINE + at * D, 0, D0, D)[None, :])
        if D1 > 0:
            dx1 = -(dx1 + bias[:, None] * load_row(LINE + at * D, D0, D1, D)[None, :])
    o_base = DX + b * stride_ob * UNIT + h * stride_oh * UNIT
    store_rows(o_base, row64, stride_os, q_len, dx0, 0, D0, D, UNIT)
    if D1 > 0:
        store_rows(o_base, row64, stride_os, q_len, dx1, D0, D1, D, UNIT)


@triton.jit
def _dyv_kernel(
    X, Y, V, SLOPE, BIAS, SUMS, LINE, DY, DV, ORDER, ROW_PTR, COL, PATTERN,
    stride_xb, stride_xh, stride_xs, stride_yb, stride_yh, stride_ys,
    stride_vb, stride_vh, stride_vs, stride_ab, stride_ah, stride_as,
    stride_dyb, stride_dyh, stride_dys, stride_dvb, stride_dvh, stride_dvs, stride_pb, stride_ph,
    heads, key_heads, group, columns, q_len, k_len,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    SUB_M: tl.constexpr = MASK_M // BLOCK_M
    SUB_N: tl.constexpr = MASK_N // BLOCK_N
    lane = tl.program_id(0) // (columns * SUB_N)
    place = tl.program_id(0) % (columns * SUB_N) // SUB_N
    sub = tl.program_id(0) % SUB_N
    b = (lane // key_heads).to(tl.int64)
    kh = (lane % key_heads).to(tl.int64)
    # Heads of a group may differ in pattern; the order of the first one's is as good as any.
    leader = tl.load(PATTERN + b * stride_pb + kh * group * stride_ph).to(tl.int64)
    block = tl.load(ORDER + leader * columns + place)
    key = block.to(tl.int64) * MASK_N + sub * BLOCK_N + tl.arange(0, BLOCK_N)
    y_base = Y + b * stride_yb * UNIT + kh * stride_yh * UNIT
    v_base = V + b * stride_vb * UNIT + kh * stride_vh * UNIT
    y0 = load_rows(y_base, key, stride_ys, k_len, 0, D0, D, UNIT, True)
    v0 = load_rows(v_base, key, stride_vs, k_len, 0, D0, D, UNIT, True)
    y1 = y0
    v1 = v0
    if D1 > 0:
        y1 = load_rows(y_base, key, stride_ys, k_len, D0, D1, D, UNIT, True)
        v1 = load_rows(v_base, key, stride_vs, k_len, D0, D1, D, UNIT, True)
    dy0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    dy1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], dtype=tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], dtype=tl.float32)
    inner = tl.arange(0, BLOCK_M)
    for member in range(0, group):
        h = kh * group + member
        pattern = tl.load(PATTERN + b * stride_pb + h * stride_ph).to(tl.int64)
        x_base = X + b * stride_xb * UNIT + h * stride_xh * UNIT
        a_base = SLOPE + b * stride_ab * UNIT + h * stride_ah * UNIT
        bias_base = BIAS + (b * heads + h) * q_len
        entry = pattern * columns + block
        first = tl.load(ROW_PTR + entry)
        last = tl.load(ROW_PTR + entry + 1)
        row_block = tl.load(COL + first, first < last, other=0)
        for step in range(first * SUB_M, last * SUB_M):
            row = (row_block * MASK_M + (step % SUB_M) * BLOCK_M).to(tl.int64) + inner
            ahead = (step + 1) // SUB_M
            row_block = tl.load(COL + ahead, ahead < last, other=0)
            # Keys x queries.
            x0 = load_rows(x_base, row, stride_xs, q_len, 0, D0, D, UNIT, True)
            a0 = load_rows(a_base, row, stride_as, q_len, 0, D0, D, UNIT, True)
            zero = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            weights = dot(y0, tl.trans(x0), zero, PRECISION, UPCAST)
            slope = dot(v0, tl.trans(a0), zero, PRECISION, UPCAST)
            if D1 > 0:
                x1 = load_rows(x_base, row, stride_xs, q_len, D0, D1, D, UNIT, True)
                a1 = load_rows(a_base, row, stride_as, q_len, D0, D1, D, UNIT, True)
                weights = dot(y1, tl.trans(x1), weights, PRECISION, UPCAST)
                slope = dot(v1, tl.trans(a1), slope, PRECISION, UPCAST)
            slope += tl.load(bias_base + row, row < q_len, other=0.0)[None, :]
            weights = weights.to(a0.dtype)
            slope = slope.to(x0.dtype)
            dv0 = dot(weights, a0, dv0, PRECISION, UPCAST)
            dy0 = dot(slope, x0, dy0, PRECISION, UPCAST)
            if D1 > 0:
                dv1 = dot(weights, a1, dv1, PRECISION, UPCAST)
                dy1 = dot(slope, x1, dy1, PRECISION, UPCAST)
    at = b * key_heads + kh
    sums = SUMS + at * (D * D)
    dy0, dy1 = _times(
        dy0,
        dy1,
        v_base,
        key,
        stride_vs,
        k_len,
        sums,
        1,
        D,
        D,
        D0,
        D1,
        UNIT,
        STEP,
        PRECISION,
        UPCAST,
    )
    dv0, dv1 = _times(
        dv0,
        dv1,
        y_base,
        key,
        stride_ys,
        k_len,
        sums,
        D,
        1,
        D,
        D0,
        D1,
        UNIT,
        STEP,
        PRECISION,
        UPCAST,
    )
    dy0 += load_row(LINE + at * D, 0, D0, D)[None, :]
    if D1 > 0:
        dy1 += load_row(LINE + at * D, D0, D1, D)[None, :]
    dy_base = DY + b * stride_dyb * UNIT + kh * stride_dyh * UNIT
    dv_base = DV + b * stride_dvb * UNIT + kh * stride_dvh * UNIT
    store_rows(dy_base, key, stride_dys, k_len, dy0, 0, D0, D, UNIT)
    store_rows(dv_base, key, stride_dvs, k_len, dv0, 0, D0, D, UNIT)
    if D1 > 0:
        store_rows(dy_base, key, stride_dys, k_len, dy1, D0, D1, D, UNIT)
        store_rows(dv_base, key, stride_dvs, k_len, dv1, D0, D1, D, UNIT)


# ---- launches ---------------------------------------------------------------------------------


@functools.cache  # asked in every call
def _configs(kernel: str, dim: int, bm: int, bn: int, kind: str) -> list[Config]:
    """List candidates, one that fits every device first (99 KiB of shared memory). Tiles divide the mask's
    blocks; ``kind`` is that of :func:`vtr.kernels.triton_common.products`."""
    width = sum(split_dim(dim))
    if kind == "exact":
        tries = [(16, 16, 8, 1)] if width > 128 else [(32, 16, 8, 1), (32, 32, 8, 1)]
        if kernel == "dyv":
            tries = [(16, 16, 8, 1)] if width > 64 else [(16, 16, 8, 1), (32, 32, 8, 1)]
    elif kernel == "dyv":
        tries = [(32, 64, 8, 3), (32, 128, 8, 3)] if width <= 128 else [(16, 32, 8, 3)]
        if 128 < width <= 160:  # larger tiles spill
            tries = [(16, 16, 4, 3)]
        if width == 128:  # the ptxas of Triton 3.6 serialises the next one
            tries = [(32, 32, 4, 3), *tries]
        if width <= 64:
            tries = [(32, 64, 4, 3), (64, 64, 8, 3), (64, 128, 8, 3)]
    elif width <= 128:
        tries = [(64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4)]
    else:
        tries = [(32, 32, 4, 3)]
    if kind == "tf32":
        tries = [(32, 32, 4, 2) if width <= 128 else (16, 16, 4, 2), *tries]
    found = [Config(min(m, bm), min(n, bn), w, s) for m, n, w, s in tries]
    return list(dict.fromkeys(found))


def _step(kind: str) -> int:
    """Columns of a slice of the rows that are multiplied by the totals at a time."""
    return 16 if kind == "exact" else 32


def _totals_tile(kind: str) -> tuple[int, int]:
    """Columns of a program of the totals, and tokens of a step: they fit every device."""
    return {"exact": (32, 16), "tf32": (32, 32), "half": (64, 64)}[kind]


def _unit_last(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _pattern_strides(pattern: Tensor) -> list[int]:
    return [pattern.stride(i) if pattern.shape[i] > 1 else 0 for i in (0, 1)]


def _totals(x: Tensor, y: Tensor, weight: Tensor | None, listed: Listed, block: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the sums of x^T y (B, H, D, D) and of x, or of weight x, (B, H, D) in float32."""
    batch, heads, length, dim = x.shape
    runs = -(-length // _RUN)
    kind = products(x.dtype)
    narrow, wide = _totals_tile(kind)
    sums = torch.empty(batch, heads, runs, dim, dim, device=x.device)
    line = torch.empty(batch, heads, runs, dim, device=x.device)
    unit, strides = unit_strides(x, y)
    programs = batch * heads * runs * -(-dim // narrow)
    with torch.cuda.device_of(x):
        _totals_kernel[(programs,)](
            x, y, line if weight is None else weight, listed.sign, listed.pattern, sums, line,
            *strides, *_pattern_strides(listed.pattern), heads, runs, length, listed.grid[1],
            D=dim, WIDE=max(16, triton.next_power_of_2(dim)), SLICE=narrow, UNIT=unit, RUN=_RUN,
            BLOCK_N=wide, MASK_M=block, BY_ROW=weight is not None, PRECISION=precision(x.dtype),
            UPCAST=upcast(x.dtype), num_warps=8, num_stages=3,
        )  # fmt: skip
    return sums.sum(2), line.sum(2)


def forward(
    x: Tensor, y: Tensor, v: Tensor, negligible: Tensor | None, mask: list[Tensor], dims: list[int],
    every: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute l (B, H, Sq, D) in the dtype of x and 1 / z (B, H, Sq) in float32, 0 if z is 0.

    Args:
        x: (B, H, Sq, D), y: (B, Hk, Sk, D), features; v: (B, Hk, Sk, D); float32 or bfloat16.
    """
    x, y, v = _unit_last(x, y, v)
    batch, heads, q_len, dim = x.shape
    listed = listed_of(negligible, mask, dims, every)
    sums, line = _totals(y, v, None, listed, dims[3])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    factor = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    main, rest = split_dim(dim)
    unit, strides = unit_strides(x, y, v, out)
    kind, rows = products(x.dtype), listed.grid[1]
    least = 0.0 if every else _LEAST[x.dtype]

    def launch(config: Config) -> None:
        _forward_kernel[(rows * (dims[2] // config.block_m) * batch * heads,)](
            x, y, v, sums, line, out, factor, listed.items, listed.pattern, listed.rows.col,
            *strides, *_pattern_strides(listed.pattern),
            heads, heads // y.shape[1], rows, q_len, y.shape[2], EPSILON if every else 0.0, least,
            D=dim, D0=main, D1=rest, UNIT=unit, MASK_M=dims[2], MASK_N=dims[3],
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, STEP=_step(kind),
            PRECISION=precision(x.dtype), UPCAST=upcast(x.dtype),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    programs = amount(x.device, rows * batch * heads)
    key = ("linear forward", x.device, x.dtype, kind, dim, *dims[2:], programs)
    with torch.cuda.device_of(x):
        tuned(key, _configs("forward", dim, dims[2], dims[3], kind), launch)
    return out, factor


def backward(
    dout: Tensor, x: Tensor, y: Tensor, v: Tensor, out: Tensor, factor: Tensor,
    negligible: Tensor | None, mask: list[Tensor], dims: list[int], every: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of x, y and v."""
    x, y, v = _unit_last(x, y, v)
    batch, heads, q_len, dim = x.shape
    key_heads, k_len = y.shape[1], y.shape[2]
    listed = listed_of(negligible, mask, dims, every)
    sums, line = _totals(y, v, None, listed, dims[3])
    block_of = torch.arange(q_len, device=x.device) // dims[2]
    weight = factor * listed.sign[listed.pattern.long()][:, :, block_of]
    slope = (dout.float() * weight[..., None]).to(x.dtype)
    bias = (-(dout.float() * out.float()).sum(-1) * weight).contiguous()
    by_row, by_row_line = (
        t.unflatten(1, (key_heads, -1)).sum(2).contiguous()
        for t in _totals(x, slope, bias, listed, dims[2])
    )
    dx, dy, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, y, v))
    main, rest = split_dim(dim)
    unit, strides = unit_strides(x, y, v, slope, dx, dy, dv)
    kind, (_, rows, columns) = products(x.dtype), listed.grid
    shared = {
        "D": dim, "D0": main, "D1": rest, "UNIT": unit, "MASK_M": dims[2], "MASK_N": dims[3],
        "STEP": _step(kind), "PRECISION": precision(x.dtype), "UPCAST": upcast(x.dtype),
    }  # fmt: skip
    if "columns" not in vars(listed) or "order" not in vars(listed):
        refuse_capture(x.device, "the columns of a mask are sorted")
    by, order = listed.columns, listed.order

    def launch_dx(config: Config) -> None:
        _dx_kernel[(rows * (dims[2] // config.block_m) * batch * heads,)](
            y, v, slope, bias, sums, line, dx, listed.items, listed.pattern, listed.rows.col,
            *strides[3:15], *_pattern_strides(listed.pattern),
            heads, heads // key_heads, rows, q_len, k_len,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **shared,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def launch_dyv(config: Config) -> None:
        _dyv_kernel[(columns * (dims[3] // config.block_n) * batch * key_heads,)](
            x, y, v, slope, bias, by_row, by_row_line, dy, dv, order, by.row_ptr, by.col,
            listed.pattern, *strides[:12], *strides[15:], *_pattern_strides(listed.pattern),
            heads, key_heads, heads // key_heads, columns, q_len, k_len,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **shared,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    key = (x.device, x.dtype, kind, dim, *dims[2:])
    with torch.cuda.device_of(x):
        programs = amount(x.device, rows * batch * heads)
        configs = _configs("dx", dim, dims[2], dims[3], kind)
        tuned(("linear dx", *key, programs), configs, launch_dx)
        programs = amount(x.device, columns * batch * key_heads)
        configs = _configs("dyv", dim, dims[2], dims[3], kind)
        tuned(("linear dyv", *key, programs), configs, launch_dyv)
    return dx, dy, dv
