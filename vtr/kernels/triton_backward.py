"""Block-sparse flash attention in Triton: the backward kernels.

With P = exp(scale q k^T - lse) recomputed tile by tile, and delta_i = dO_i . O_i less the gradient
of the LSE (FlashAttention-2, Dao 2023, appendix B):

    dV = P^T dO;  dP = dO V^T;  dS = P (dP - delta);  dQ = scale dS K;  dK = scale dS^T Q

One kernel walks the rows of the mask for dQ, one its columns for dK and dV: no atomics, so the
gradients are the same in every run.
"""

# Device functions are typed by Triton when they are compiled.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtr.kernels.capture import refuse_capture
from vtr.kernels.triton_common import (
    Config,
    amount,
    dot,
    expand_words,
    load_rows,
    load_words,
    precision,
    products,
    split_dim,
    store_rows,
    tuned,
    unit_strides,
    upcast,
)

if TYPE_CHECKING:
    from vtr.kernels.triton_lists import Lists

_LOG2E = math.log2(math.e)


@triton.jit
def _dq_step(
    q0, q1, g0, g1, line, delta, dq0, dq1, k_base, v_base, stride_k, stride_v, key, k_len, seen,
    scale_log2, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    k0 = load_rows(k_base, key, stride_k, k_len, 0, D0, D, UNIT, MASKED)
    v0 = load_rows(v_base, key, stride_v, k_len, 0, D0, D, UNIT, MASKED)
    zero = tl.zeros([q0.shape[0], k0.shape[0]], dtype=tl.float32)
    scores = dot(q0, tl.trans(k0), zero, PRECISION, UPCAST)
    inner = dot(g0, tl.trans(v0), zero, PRECISION, UPCAST)
    if D1 > 0:
        k1 = load_rows(k_base, key, stride_k, k_len, D0, D1, D, UNIT, MASKED)
        v1 = load_rows(v_base, key, stride_v, k_len, D0, D1, D, UNIT, MASKED)
        scores = dot(q1, tl.trans(k1), scores, PRECISION, UPCAST)
        inner = dot(g1, tl.trans(v1), inner, PRECISION, UPCAST)
    weights = tl.exp2(tl.fma(scores, scale_log2, -line[:, None]))
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    slope = weights * (inner - delta[:, None])
    slope = slope.to(k0.dtype)
    dq0 = dot(slope, k0, dq0, PRECISION, UPCAST)
    if D1 > 0:
        dq1 = dot(slope, k1, dq1, PRECISION, UPCAST)
    return dq0, dq1


@triton.jit
def _dq_kernel(
    Q, K, V, DOUT, LSE, DELTA, DQ, ITEMS, PATTERN, COL, TILE, TILES,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gs,
    stride_ob, stride_oh, stride_os, stride_pb, stride_ph,
    heads, group, items, q_len, k_len, scale, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    entry = ITEMS + (pattern.to(tl.int64) * items + item) * 4
    row_block = tl.load(entry)
    first = tl.load(entry + 1)
    middle = tl.load(entry + 2)
    last = tl.load(entry + 3)
    offset = tl.arange(0, BLOCK_M)
    row = row_block * MASK_M + sub * BLOCK_M + offset
    row64 = row.to(tl.int64)
    q_base = Q + b * stride_qb * UNIT + h * stride_qh * UNIT
    g_base = DOUT + b * stride_gb * UNIT + h * stride_gh * UNIT
    k_base = K + b * stride_kb * UNIT + (h // group) * stride_kh * UNIT
    v_base = V + b * stride_vb * UNIT + (h // group) * stride_vh * UNIT
    q0 = load_rows(q_base, row64, stride_qs, q_len, 0, D0, D, UNIT, True)
    g0 = load_rows(g_base, row64, stride_gs, q_len, 0, D0, D, UNIT, True)
    q1 = q0
    g1 = g0
    if D1 > 0:
        q1 = load_rows(q_base, row64, stride_qs, q_len, D0, D1, D, UNIT, True)
        g1 = load_rows(g_base, row64, stride_gs, q_len, D0, D1, D, UNIT, True)
    at = lane.to(tl.int64) * q_len
    line = tl.load(LSE + at + row, row < q_len, other=float("inf"))
    # exp2(t - inf) = 0: a row without keys has no weights.
    line = tl.where(line == float("-inf"), float("inf"), line * 1.4426950408889634)
    delta = tl.load(DELTA + at + row, row < q_len, other=0.0)
    dq0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    dq1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], dtype=tl.float32)
    inner = tl.arange(0, BLOCK_N)
    # One step ahead, as in the forward, so that K and V are prefetched.
    block = tl.load(COL + first, first < last, other=0)
    for step in range(first * SUB_N, middle * SUB_N):
        key = (block * MASK_N + (step % SUB_N) * BLOCK_N).to(tl.int64) + inner
        ahead = (step + 1) // SUB_N
        block = tl.load(COL + ahead, ahead < last, other=0)
        dq0, dq1 = _dq_step(
            q0, q1, g0, g1, line, delta, dq0, dq1, k_base, v_base, stride_ks, stride_vs, key,
            k_len, True, scale_log2, D, D0, D1, UNIT, False, PRECISION, UPCAST,
        )  # fmt: skip
    tile = tl.load(TILE + middle, middle < last, other=0)
    within = sub * BLOCK_M + offset
    words = load_words(TILES, tile, within, 0, MASK_M, WORDS, BITS, BLOCK_N, False)
    tile = tl.load(TILE + middle + 1 // SUB_N, middle + 1 // SUB_N < last, other=0)
    for step in range(middle * SUB_N, last * SUB_N):
        column = step % SUB_N * BLOCK_N
        key = (block * MASK_N + column).to(tl.int64) + inner
        seen = expand_words(words, column, BITS, BLOCK_N, False)
        words = load_words(
            TILES, tile, within, (step + 1) % SUB_N * BLOCK_N, MASK_M, WORDS, BITS, BLOCK_N, False
        )
        block = tl.load(COL + (step + 1) // SUB_N, (step + 1) // SUB_N < last, other=0)
        tile = tl.load(TILE + (step + 2) // SUB_N, (step + 2) // SUB_N < last, other=0)
        dq0, dq1 = _dq_step(
            q0, q1, g0, g1, line, delta, dq0, dq1, k_base, v_base, stride_ks, stride_vs, key,
            k_len, seen, scale_log2, D, D0, D1, UNIT, True, PRECISION, UPCAST,
        )  # fmt: skip
    o_base = DQ + b * stride_ob * UNIT + h * stride_oh * UNIT
    store_rows(o_base, row64, stride_os, q_len, dq0 * scale, 0, D0, D, UNIT)
    if D1 > 0:
        store_rows(o_base, row64, stride_os, q_len, dq1 * scale, D0, D1, D, UNIT)


@triton.jit
def _dkv_step(
    k0, k1, v0, v1, dk0, dk1, dv0, dv1, q_base, g_base, stride_q, stride_g, line_base, delta_base,
    row, q_len, seen, scale_log2, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    UNIT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of queries; scores are kept as keys x queries."""
    q0 = load_rows(q_base, row, stride_q, q_len, 0, D0, D, UNIT, True)
    g0 = load_rows(g_base, row, stride_g, q_len, 0, D0, D, UNIT, True)
    zero = tl.zeros([k0.shape[0], q0.shape[0]], dtype=tl.float32)
    scores = dot(k0, tl.trans(q0), zero, PRECISION, UPCAST)
    inner = dot(v0, tl.trans(g0), zero, PRECISION, UPCAST)
    if D1 > 0:
        q1 = load_rows(q_base, row, stride_q, q_len, D0, D1, D, UNIT, True)
        g1 = load_rows(g_base, row, stride_g, q_len, D0, D1, D, UNIT, True)
        scores = dot(k1, tl.trans(q1), scores, PRECISION, UPCAST)
        inner = dot(v1, tl.trans(g1), inner, PRECISION, UPCAST)
    line = tl.load(line_base + row, row < q_len, other=float("inf"))
    line = tl.where(line == float("-inf"), float("inf"), line * 1.4426950408889634)
    delta = tl.load(delta_base + row, row < q_len, other=0.0)
    weights = tl.exp2(tl.fma(scores, scale_log2, -line[None, :]))
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    slope = weights * (inner - delta[None, :])
    weights = weights.to(g0.dtype)
    slope = slope.to(q0.dtype)
    dv0 = dot(weights, g0, dv0, PRECISION, UPCAST)
    dk0 = dot(slope, q0, dk0, PRECISION, UPCAST)
    if D1 > 0:
        dv1 = dot(weights, g1, dv1, PRECISION, UPCAST)
        dk1 = dot(slope, q1, dk1, PRECISION, UPCAST)
    return dk0, dk1, dv0, dv1


@triton.jit
def _dkv_kernel(
    Q, K, V, DOUT, LSE, DELTA, DK, DV, ORDER, ROW_PTR, SPLIT, COL, TILE, PATTERN, TILES,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gs,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, stride_pb, stride_ph,
    heads, key_heads, group, columns, q_len, k_len, scale, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    SUB_M: tl.constexpr = MASK_M // BLOCK_M
    SUB_N: tl.constexpr = MASK_N // BLOCK_N
    BITS: tl.constexpr = 32 if MASK_N >= 32 else MASK_N
    WORDS: tl.constexpr = MASK_N // BITS
    lane = tl.program_id(0) // (columns * SUB_N)
    place = tl.program_id(0) % (columns * SUB_N) // SUB_N
    sub = tl.program_id(0) % SUB_N
    b = (lane // key_heads).to(tl.int64)
    kh = (lane % key_heads).to(tl.int64)
    # Heads of a group may differ in pattern; the order of the first one's is as good as any.
    leader = tl.load(PATTERN + b * stride_pb + kh * group * stride_ph).to(tl.int64)
    block = tl.load(ORDER + leader * columns + place)
    offset = tl.arange(0, BLOCK_N)
    column = sub * BLOCK_N + offset
    key = block.to(tl.int64) * MASK_N + column
    k_base = K + b * stride_kb * UNIT + kh * stride_kh * UNIT
    v_base = V + b * stride_vb * UNIT + kh * stride_vh * UNIT
    k0 = load_rows(k_base, key, stride_ks, k_len, 0, D0, D, UNIT, True)
    v0 = load_rows(v_base, key, stride_vs, k_len, 0, D0, D, UNIT, True)
    k1 = k0
    v1 = v0
    if D1 > 0:
        k1 = load_rows(k_base, key, stride_ks, k_len, D0, D1, D, UNIT, True)
        v1 = load_rows(v_base, key, stride_vs, k_len, D0, D1, D, UNIT, True)
    dk0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    dk1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], dtype=tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], dtype=tl.float32)
    inner = tl.arange(0, BLOCK_M)
    for member in range(0, group):
        h = kh * group + member
        pattern = tl.load(PATTERN + b * stride_pb + h * stride_ph).to(tl.int64)
        q_base = Q + b * stride_qb * UNIT + h * stride_qh * UNIT
        g_base = DOUT + b * stride_gb * UNIT + h * stride_gh * UNIT
        at = (b * heads + h) * q_len
        entry = pattern * columns + block
        first = tl.load(ROW_PTR + entry)
        middle = tl.load(SPLIT + entry)
        last = tl.load(ROW_PTR + entry + 1)
        row_block = tl.load(COL + first, first < last, other=0)
        for step in range(first * SUB_M, middle * SUB_M):
            row = (row_block * MASK_M + (step % SUB_M) * BLOCK_M).to(tl.int64) + inner
            ahead = (step + 1) // SUB_M
            row_block = tl.load(COL + ahead, ahead < last, other=0)
            dk0, dk1, dv0, dv1 = _dkv_step(
                k0, k1, v0, v1, dk0, dk1, dv0, dv1, q_base, g_base, stride_qs, stride_gs,
                LSE + at, DELTA + at, row, q_len, True, scale_log2,
                D, D0, D1, UNIT, False, PRECISION, UPCAST,
            )  # fmt: skip
        tile = tl.load(TILE + middle, middle < last, other=0)
        words = load_words(TILES, tile, inner, sub * BLOCK_N, MASK_M, WORDS, BITS, BLOCK_N, True)
        tile = tl.load(TILE + middle + 1 // SUB_M, middle + 1 // SUB_M < last, other=0)
        for step in range(middle * SUB_M, last * SUB_M):
            row = (row_block * MASK_M + step % SUB_M * BLOCK_M).to(tl.int64) + inner
            seen = expand_words(words, sub * BLOCK_N, BITS, BLOCK_N, True)
            within = (step + 1) % SUB_M * BLOCK_M + inner
            words = load_words(
                TILES, tile, within, sub * BLOCK_N, MASK_M, WORDS, BITS, BLOCK_N, True
            )
            row_block = tl.load(COL + (step + 1) // SUB_M, (step + 1) // SUB_M < last, other=0)
            tile = tl.load(TILE + (step + 2) // SUB_M, (step + 2) // SUB_M < last, other=0)
            dk0, dk1, dv0, dv1 = _dkv_step(
                k0, k1, v0, v1, dk0, dk1, dv0, dv1, q_base, g_base, stride_qs, stride_gs,
                LSE + at, DELTA + at, row, q_len, seen, scale_log2,
                D, D0, D1, UNIT, True, PRECISION, UPCAST,
            )  # fmt: skip
    dk_base = DK + b * stride_dkb * UNIT + kh * stride_dkh * UNIT
    dv_base = DV + b * stride_dvb * UNIT + kh * stride_dvh * UNIT
    store_rows(dk_base, key, stride_dks, k_len, dk0 * scale, 0, D0, D, UNIT)
    store_rows(dv_base, key, stride_dvs, k_len, dv0, 0, D0, D, UNIT)
    if D1 > 0:
        store_rows(dk_base, key, stride_dks, k_len, dk1 * scale, D0, D1, D, UNIT)
        store_rows(dv_base, key, stride_dvs, k_len, dv1, D0, D1, D, UNIT)


@functools.cache  # asked in every call
def _configs(kernel: str, dim: int, bm: int, bn: int, kind: str) -> list[Config]:
    """List candidates as for the forward, but smaller: the backward holds two more products, and the kernel
    over columns (``kernel="dkv"``) two sums, for which few queries at a time leave it registers."""
    width = sum(split_dim(dim))
    if kind == "exact":
        tries = [(16, 16, 8, 1), (32, 32, 8, 1)] if width > 64 else [(32, 32, 8, 1), (32, 32, 8, 2)]
        if width > 128:
            tries = [(16, 16, 8, 1)]
    elif kernel == "dq":
        if width <= 96:
            tries = [(64, 64, 4, 3), (64, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)]
        elif width <= 128:
            tries = [(64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3), (128, 64, 8, 3)]
        else:
            tries = [(16, 32, 4, 3), (64, 32, 8, 3), (128, 32, 8, 3)]
            tries += [(64, 64, 8, 3)] if width <= 192 else []
    elif width <= 64:
        tries = [(32, 64, 4, 3), (32, 128, 8, 3), (64, 64, 8, 3), (64, 128, 8, 3)]
    elif width <= 128:
        tries = [(32, 64, 8, 3), (32, 128, 8, 3)]
    elif width <= 192:
        tries = [(16, 64, 8, 3), (32, 64, 8, 3)] if width <= 160 else [(16, 64, 8, 3)]
    else:
        tries = [(16, 32, 8, 3), (16, 64, 8, 3)]
    if kind == "tf32":
        tries = [(32, 32, 4, 2) if width <= 128 else (16, 16, 4, 2), *tries]
    found = [Config(min(m, bm), min(n, bn), w, s) for m, n, w, s in tries]
    return list(dict.fromkeys(found))


def backward(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
    mask: list[Tensor], dims: list[int], scale: float, lists: Lists,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute dq, dk, dv; ``delta`` (B, H, Sq) float32."""
    q, k, v, dout = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, dout))
    pattern, row_ptr, split, col, tile = mask[:5]
    batch, heads, q_len, dim = q.shape
    key_heads, k_len = k.shape[1], k.shape[2]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    lse, delta = lse.contiguous(), delta.float().contiguous()
    steps = [pattern.stride(i) if pattern.shape[i] > 1 else 0 for i in (0, 1)]
    main, rest = split_dim(dim)
    rows, columns = -(-q_len // dims[2]), -(-k_len // dims[3])
    first, last = row_ptr[:-1].view(-1, rows), row_ptr[1:].view(-1, rows)
    order = (last - first).argsort(dim=1, descending=True, stable=True)
    items = torch.stack(
        [order.int(), *(t.gather(1, order) for t in (first, split.view(-1, rows), last))], -1
    ).contiguous()
    # One unit for both kernels: dq, dk and dv are contiguous, as long as q, k and v.
    unit, strides = unit_strides(q, k, v, dout, dq, dk, dv)
    inputs, of_dq, of_dkv = strides[:12], strides[12:15], strides[15:]
    shared = {
        "D": dim, "D0": main, "D1": rest, "UNIT": unit, "MASK_M": dims[2], "MASK_N": dims[3],
        "PRECISION": precision(q.dtype), "UPCAST": upcast(q.dtype),
    }  # fmt: skip
    if "columns" not in vars(lists) or "order" not in vars(lists):
        refuse_capture(q.device, "the columns of a mask are sorted")
    by, by_use = lists.columns, lists.order

    def launch_dq(config: Config) -> None:
        _dq_kernel[(rows * (dims[2] // config.block_m) * batch * heads,)](
            q, k, v, dout, lse, delta, dq, items, pattern, col, tile, lists.words,
            *inputs, *of_dq, *steps,
            heads, heads // key_heads, rows, q_len, k_len, scale, scale * _LOG2E,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **shared,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def launch_dkv(config: Config) -> None:
        _dkv_kernel[(columns * (dims[3] // config.block_n) * batch * key_heads,)](
            q, k, v, dout, lse, delta, dk, dv, by_use,
            by.row_ptr, by.split, by.col, by.tile, pattern, lists.words,
            *inputs, *of_dkv, *steps,
            heads, key_heads, heads // key_heads, columns, q_len, k_len, scale, scale * _LOG2E,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **shared,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    kind = products(q.dtype)
    key = (q.device, q.dtype, kind, dim, *dims[2:])
    with torch.cuda.device_of(q):  # Triton launches on the current device, wherever the tensors are
        programs = amount(q.device, rows * batch * heads)
        tuned(("dq", *key, programs), _configs("dq", dim, dims[2], dims[3], kind), launch_dq)
        programs = amount(q.device, columns * batch * key_heads)
        tuned(("dkv", *key, programs), _configs("dkv", dim, dims[2], dims[3], kind), launch_dkv)
    return dq, dk, dv
