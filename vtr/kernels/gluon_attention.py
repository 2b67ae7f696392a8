"""Block-sparse flash attention for Hopper in Gluon: the forward kernel and its launch.

The arithmetic is that of :mod:`vtr.kernels.triton_attention`, which calls this module if
:func:`refuses` gives no reason against it, and runs otherwise. The work is divided differently
(warp specialisation as in FlashAttention-3, Shah et al. 2024): one warp copies the key blocks of a row
into two rings of shared memory, one for K and one for V, through the tensor memory accelerator (TMA); each
consumer, a group of four warps, holds 64 queries and has the next scores and the last values in the
tensor cores while it computes weights.

Rings. A slot of a ring has two barriers. ``full`` completes when the copy has arrived (one arrival, with
the bytes expected), ``empty`` when every consumer has read it (one arrival each). Tile n of a program uses
slot n mod STAGES in round n div STAGES; consumers wait for phase ``round & 1`` of ``full``, the producer for
the other phase of ``empty``, which a fresh barrier counts as complete. The memory of the queries is a ring of
one slot, which every row takes in turn, rows without keys as well. ``tests/kernels/test_gluon.py`` plays the
protocol through.

Rows. A program computes one row after the other, and tiles are counted on from row to row, so that the
first keys of a row arrive while the row before is written. :func:`programs` says when a program
gets several rows: with short ones, the start of a program would cost as much as two or three tiles. Long rows
have a program each, which the device starts as room becomes free.

Tails. Descriptors have four axes (batch, head, token, head dim), so that rows past the end of a head read
read as zeros and are not written, whatever lies behind them in memory.

Head dims. Shared memory and tensors have powers of two, so a head dim is split as in the Triton kernel: 80 is
64 + 16, and 72 as well, with eight zeros from the descriptor. Each part has its descriptors, memory and
products. Head dims above 128 are left out: in Triton 3.6 and 3.9 results of 64 x 256 take 128 registers
of a thread, so that 192 and 256 spill 24 bytes with blocks of 128 queries; of 64 queries, two programs with 128
registers each are fewer than the 158 that one instruction for 256 columns needs.
"""

# Device functions are typed by Triton when they are compiled.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vtr.kernels.triton_common import multiprocessors, on_hopper, split_dim

# Renamed in Triton 3.7 or later.
_copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

DIMS = (64, 72, 80, 88, 96, 112, 128)
_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _item(
    turn, ITEMS, PATTERN, stride_pb, stride_ph, heads, items, total, side, ONE_PATTERN: gl.constexpr,
):  # fmt: skip
    """The work of this program in a turn: batch and head (``lane``), query block (-1: nothing), first, middle
    and last entry, part (-1: a whole row), and the key block of the first entry."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    # There and back, over the lists of ``side`` heads at once, which fall: a program with a long row gets a
    # short one next.
    work = turn * programs + gl.where(turn % 2 == 0, place, programs - 1 - place)
    there = work < total
    before = work // (items * side) * side
    within = work - before * items
    beside = gl.minimum(side, total // items - before)
    beside = gl.maximum(beside, 1)  # past the end
    lane = before + within % beside
    entry = ITEMS + (within // beside).to(gl.int64) * 8
    if not ONE_PATTERN:
        b = (lane // heads).to(gl.int64)
        h = (lane % heads).to(gl.int64)
        pattern = gl.load(PATTERN + b * stride_pb + h * stride_ph, mask=there, other=0)
        entry += pattern.to(gl.int64) * items * 8
    # The first copies wait for this read, so one read gets everything if possible.
    row_block = gl.load(entry, mask=there, other=-1)
    first = gl.load(entry + 1, mask=there, other=0)
    middle = gl.load(entry + 2, mask=there, other=0)
    last = gl.load(entry + 3, mask=there, other=0)
    part = gl.load(entry + 4, mask=there, other=-1)
    column = gl.load(entry + 5, mask=there, other=0)
    # Heavy rows have a whole entry besides their parts, which says that there is nothing to do.
    middle = gl.where(row_block >= 0, middle, first)
    last = gl.where(row_block >= 0, last, first)
    return lane, row_block, first, middle, last, part, column


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q1_desc, k1_desc, v1_desc, COL, q_s, k_s, v_s, q1_s, k1_s, v1_s,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    ITEMS, PATTERN, stride_pb, stride_ph, heads, group, items, total, side,
    D0: gl.constexpr, D1: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, MASK_M: gl.constexpr, MASK_N: gl.constexpr,
    BLOCK_N: gl.constexpr, ONE_PATTERN: gl.constexpr,
):  # fmt: skip
    """Copy the queries and the key blocks of each row, one after the other as slots become free: the first
    keys of a row while consumers still work on the row before."""
    SUB_N: gl.constexpr = MASK_N // BLOCK_N
    Q_BYTES: gl.constexpr = GROUPS * (
        q_desc.block_type.nbytes + (q1_desc.block_type.nbytes if D1 > 0 else 0)
    )
    K_BYTES: gl.constexpr = k_desc.block_type.nbytes + (k1_desc.block_type.nbytes if D1 > 0 else 0)
    begun = 0  # tiles of the rows before
    rows = 0
    for turn in range(0, gl.cdiv(total, gl.num_programs(0))):
        lane, row_block, first, _, last, _, column = _item(
            turn, ITEMS, PATTERN, stride_pb, stride_ph, heads, items, total, side, ONE_PATTERN
        )  # fmt: skip
        b = lane // heads
        h = lane % heads
        key_head = h // group
        count = (last - first) * SUB_N
        for j in range(0, count):
            key = column * MASK_N + (j % SUB_N) * BLOCK_N
            following = first + (j + 1) // SUB_N
            column = gl.load(COL + following, mask=following < last, other=0)
            slot = (begun + j) % STAGES
            other_phase = (((begun + j) // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), other_phase)
            mbarrier.expect(k_full.index(slot), K_BYTES)
            _copy_in(k_desc, [b, key_head, key, 0], k_full.index(slot), k_s.index(slot))
            if D1 > 0:
                _copy_in(k1_desc, [b, key_head, key, D0], k_full.index(slot), k1_s.index(slot))
            if j == 0:
                mbarrier.wait(q_empty, (rows & 1) ^ 1)
                mbarrier.expect(q_full, Q_BYTES)
                for g in gl.static_range(GROUPS):
                    row = row_block * MASK_M + g * 64
                    _copy_in(q_desc, [b, h, row, 0], q_full, q_s.index(g))
                    if D1 > 0:
                        _copy_in(q1_desc, [b, h, row, D0], q_full, q1_s.index(g))
            mbarrier.wait(v_empty.index(slot), other_phase)
            mbarrier.expect(v_full.index(slot), K_BYTES)
            _copy_in(v_desc, [b, key_head, key, 0], v_full.index(slot), v_s.index(slot))
            if D1 > 0:
                _copy_in(v1_desc, [b, key_head, key, D0], v_full.index(slot), v1_s.index(slot))
        if row_block >= 0:
            if count == 0:  # nothing to copy, but the memory of the queries takes its turn
                mbarrier.wait(q_empty, (rows & 1) ^ 1)
                mbarrier.arrive(q_full, count=1)
            rows += 1
        begun += count


@gluon.jit
def _bits(
    j, first, TILE, BITS, layout: gl.constexpr, WHICH: gl.constexpr,
    MASK_M: gl.constexpr, MASK_N: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """For each score of a partial tile the word that has its bit: a few registers of every thread."""
    SUB_N: gl.constexpr = MASK_N // BLOCK_N
    tile = gl.load(TILE + first + j // SUB_N).to(gl.int64)
    row = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    words = BITS + (tile * MASK_M + row) * (MASK_N // 32) + (j % SUB_N) * (BLOCK_N // 32)
    bits = gl.zeros([64, BLOCK_N], gl.int32, layout)
    for w in gl.static_range(BLOCK_N // 32):
        word = gl.load(words + w)
        bits = gl.where((column // 32 == w)[None, :], word[:, None], bits)
    return bits


@gluon.jit
def _hide(scores, bits, BLOCK_N: gl.constexpr):
    """The scores whose bit is set, -inf for the others."""
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores.type.layout))
    # Without predicates, which the compiler would collect in words and take apart again: all ones
    # where the bit is set, and 0xff800000 is -inf.
    seen = (bits << (31 - column % 32)[None, :]) >> 31
    hidden = (scores.to(gl.int32, bitcast=True) & seen) | (-0x800000 & ~seen)
    return hidden.to(gl.float32, bitcast=True)


@gluon.jit
def _scores(q, q1, k_s, k1_s, slot, D1: gl.constexpr, BLOCK_N: gl.constexpr):
    """Begin the product of queries and keys."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    keys = k_s.index(slot).reshape([BLOCK_N, q.shape[1]]).permute((1, 0))
    zeros = gl.zeros([64, BLOCK_N], gl.float32, layout)
    later = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
    if D1 > 0:
        keys = k1_s.index(slot).reshape([BLOCK_N, D1]).permute((1, 0))
        later = warpgroup_mma(q1, keys, later, is_async=True)
    return later


@gluon.jit
def _values(weights, acc, v_s, slot, BLOCK_N: gl.constexpr):
    """Begin to add the product of weights and values."""
    D: gl.constexpr = acc.shape[1]
    values = v_s.index(slot).reshape([BLOCK_N, D])
    weights = gl.convert_layout(weights, gl.DotOperandLayout(0, acc.type.layout, 2))
    return warpgroup_mma(weights, values, acc, is_async=True)


@gluon.jit
def _step(
    q, q1, weights, m, total, acc, acc1, k_s, k1_s, v_s, v1_s, k_full, k_empty, v_full, v_empty, turns, j, begun, steps,
    first, scale_log2, TILE, BITS, D1: gl.constexpr, WHICH: gl.constexpr, MASKED: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    MASK_M: gl.constexpr, MASK_N: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Scores of tile j and values of tile j - 1, both in the tensor cores; then the weights of tile j."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    n = begun + j
    slot = n % STAGES
    before = (n - 1) % STAGES
    mbarrier.wait(k_full.index(slot), (n // STAGES) & 1)
    if TURNS:
        mbarrier.wait(turns.index(WHICH), ((steps + j) & 1) ^ WHICH)
    scores_later = _scores(q, q1, k_s, k1_s, slot, D1, BLOCK_N)
    mbarrier.wait(v_full.index(before), ((n - 1) // STAGES) & 1)
    acc_later = _values(weights, acc, v_s, before, BLOCK_N)
    acc1_later = acc1
    if D1 > 0:
        acc1_later = _values(weights, acc1, v1_s, before, BLOCK_N)
    if TURNS:
        mbarrier.arrive(turns.index(1 - WHICH), count=1)
    if MASKED:
        bits = _bits(j, first, TILE, BITS, s_layout, WHICH, MASK_M, MASK_N, BLOCK_N)
    scores = warpgroup_mma_wait(2 if D1 > 0 else 1, [scores_later])
    mbarrier.arrive(k_empty.index(slot), count=1)
    if MASKED:
        scores = _hide(scores, bits, BLOCK_N)
    m_new = gl.maximum(m, gl.max(scores, 1) * scale_log2)
    # A row that has seen nothing yet has m = -inf, and -inf - -inf is NaN.
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    new = gl.exp2(scores * scale_log2 - m_safe[:, None])
    keep = gl.exp2(m - m_safe)
    total = total * keep + gl.sum(new, 1)
    if D1 > 0:
        acc, acc1 = warpgroup_mma_wait(0, [acc_later, acc1_later])
    else:
        acc = warpgroup_mma_wait(0, [acc_later])
    mbarrier.arrive(v_empty.index(before), count=1)
    weights = gl.convert_layout(new.to(weights.dtype), weights.type.layout)
    acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, acc.type.layout))[:, None]
    if D1 > 0:
        acc1 = acc1 * gl.convert_layout(keep, gl.SliceLayout(1, acc1.type.layout))[:, None]
    return weights, m_new, total, acc, acc1


@gluon.jit
def _consume(
    o_desc, o1_desc, TILE, BITS, ROW_SCALE, ADDED, LSE, PART_OUT, PART_LSE,
    q_s, o_s, k_s, v_s, q1_s, o1_s, k1_s, v1_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
    ITEMS, PATTERN, stride_pb, stride_ph, heads, items, total_items, side, parts, q_len, scale_log2,
    WHICH: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    STAGES: gl.constexpr, TURNS: gl.constexpr, APART: gl.constexpr,
    MASK_M: gl.constexpr, MASK_N: gl.constexpr, BLOCK_N: gl.constexpr, ONE_PATTERN: gl.constexpr,
    HAS_ROW_SCALE: gl.constexpr, HAS_ADDED: gl.constexpr,
):  # fmt: skip
    """Compute attention for queries 64 WHICH.. of each row of this program and write the results."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    # Tensors have powers of two: a head dim of 80 is 64 + 16. Without a rest the second part is never used.
    R: gl.constexpr = D1 if D1 > 0 else 16
    r_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    w_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    SUB_N: gl.constexpr = MASK_N // BLOCK_N
    q = q_s.index(WHICH).reshape([64, D0])
    q1 = q
    if D1 > 0:
        q1 = q1_s.index(WHICH).reshape([64, D1])
    begun = 0  # tiles of the rows before
    steps = 0  # the same without the first of each row, which takes no turn
    rows = 0
    lane, row_block, first, middle, last, part, _ = _item(
        0, ITEMS, PATTERN, stride_pb, stride_ph, heads, items, total_items, side, ONE_PATTERN
    )  # fmt: skip
    for turn in range(0, gl.cdiv(total_items, gl.num_programs(0))):
        full = (middle - first) * SUB_N
        count = (last - first) * SUB_N
        m = gl.full([64], float("-inf"), gl.float32, s_rows)
        total = gl.zeros([64], gl.float32, s_rows)
        acc = gl.zeros([64, D0], gl.float32, o_layout)
        acc1 = gl.zeros([64, R], gl.float32, r_layout)
        if row_block >= 0:
            mbarrier.wait(q_full, rows & 1)
        if count > 0:
            start = begun % STAGES
            mbarrier.wait(k_full.index(start), (begun // STAGES) & 1)
            scores = _scores(q, q1, k_s, k1_s, start, D1, BLOCK_N)
            scores = warpgroup_mma_wait(0, [scores])
            mbarrier.arrive(k_empty.index(start), count=1)
            if full == 0:
                bits = _bits(0, first, TILE, BITS, s_layout, WHICH, MASK_M, MASK_N, BLOCK_N)
                scores = _hide(scores, bits, BLOCK_N)
            m = gl.max(scores, 1) * scale_log2
            m_safe = gl.where(m == float("-inf"), 0.0, m)
            new = gl.exp2(scores * scale_log2 - m_safe[:, None])
            total = gl.sum(new, 1)
            weights = gl.convert_layout(new.to(q.dtype), w_layout)
            for j in range(1, full):
                weights, m, total, acc, acc1 = _step(
                    q, q1, weights, m, total, acc, acc1, k_s, k1_s, v_s, v1_s,
                    k_full, k_empty, v_full, v_empty, turns, j,
                    begun, steps, first, scale_log2, TILE, BITS, D1, WHICH, False, STAGES, TURNS,
                    MASK_M, MASK_N, BLOCK_N,
                )  # fmt: skip
            for j in range(gl.maximum(full, 1), count):
                weights, m, total, acc, acc1 = _step(
                    q, q1, weights, m, total, acc, acc1, k_s, k1_s, v_s, v1_s,
                    k_full, k_empty, v_full, v_empty, turns, j,
                    begun, steps, first, scale_log2, TILE, BITS, D1, WHICH, True, STAGES, TURNS,
                    MASK_M, MASK_N, BLOCK_N,
                )  # fmt: skip
            begun += count
            steps += count - 1
            end = (begun - 1) % STAGES
            mbarrier.wait(v_full.index(end), ((begun - 1) // STAGES) & 1)
            acc_later = _values(weights, acc, v_s, end, BLOCK_N)
            if D1 > 0:
                acc1_later = _values(weights, acc1, v1_s, end, BLOCK_N)
                acc, acc1 = warpgroup_mma_wait(0, [acc_later, acc1_later])
            else:
                acc = warpgroup_mma_wait(0, [acc_later])
            mbarrier.arrive(v_empty.index(end), count=1)
        if APART:  # noqa: SIM102, decided when the kernel is compiled
            if row_block >= 0:
                mbarrier.arrive(q_empty, count=1)
        # The next item is read while this row is written.
        next_lane, next_row, next_first, next_middle, next_last, next_part, _ = _item(
            turn + 1, ITEMS, PATTERN, stride_pb, stride_ph, heads, items, total_items, side, ONE_PATTERN
        )  # fmt: skip

        # ---- epilogue ----
        nothing = total == 0.0
        factor = 1.0 / gl.where(nothing, 1.0, total)
        lse = gl.where(nothing, float("-inf"), (m + gl.log2(total)) * 0.6931471805599453)
        local = WHICH * 64 + gl.arange(0, 64, s_rows)
        row = row_block * MASK_M + local
        if part >= 0:
            # A part of a heavy row: kept apart in float32, joined after the launch.
            at = (lane.to(gl.int64) * parts + part) * MASK_M
            line = at + WHICH * 64 + gl.arange(0, 64, o_rows)
            column = gl.arange(0, D0, gl.SliceLayout(0, o_layout))
            out = acc * gl.convert_layout(factor, o_rows)[:, None]
            gl.store(PART_OUT + line[:, None] * D + column[None, :], out)
            if D1 > 0:
                line = at + WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, r_layout))
                column = D0 + gl.arange(0, R, gl.SliceLayout(0, r_layout))
                out1 = acc1 * gl.convert_layout(factor, gl.SliceLayout(1, r_layout))[:, None]
                gl.store(
                    PART_OUT + line[:, None] * D + column[None, :], out1, mask=(column < D)[None, :]
                )
            gl.store(PART_LSE + at + local, lse)
        elif row_block >= 0:
            at = lane.to(gl.int64) * q_len
            if HAS_ROW_SCALE:
                factor *= gl.load(ROW_SCALE + at + row, mask=row < q_len, other=0.0).to(gl.float32)
            out = acc * gl.convert_layout(factor, o_rows)[:, None]
            out1 = acc1 * gl.convert_layout(factor, gl.SliceLayout(1, r_layout))[:, None]
            if HAS_ADDED:
                column = gl.arange(0, D0, gl.SliceLayout(0, o_layout))
                line = lane.to(gl.int64) * ((q_len + MASK_M - 1) // MASK_M) + row_block
                out += gl.load(ADDED + line * D + column).to(gl.float32)[None, :]
                if D1 > 0:
                    column = D0 + gl.arange(0, R, gl.SliceLayout(0, r_layout))
                    more = gl.load(ADDED + line * D + column, mask=column < D, other=0.0)
                    out1 += more.to(gl.float32)[None, :]
            if APART:
                tma.store_wait(0)  # of the row before
            _sync()
            o_s.index(WHICH).reshape([64, D0]).store(out.to(o_s.dtype))
            if D1 > 0:
                o1_s.index(WHICH).reshape([64, D1]).store(out1.to(o_s.dtype))
            fence_async_shared()
            _sync()
            b = lane // heads
            h = lane % heads
            begin = row_block * MASK_M + WHICH * 64
            _copy_out(o_desc, [b, h, begin, 0], o_s.index(WHICH))
            if D1 > 0:
                _copy_out(o1_desc, [b, h, begin, D0], o1_s.index(WHICH))
            gl.store(LSE + at + row, lse, mask=row < q_len)
            if not APART:
                tma.store_wait(0)
        if not APART:  # noqa: SIM102
            if row_block >= 0:
                mbarrier.arrive(q_empty, count=1)
        rows += gl.where(row_block >= 0, 1, 0)
        lane = next_lane
        row_block = next_row
        first = next_first
        middle = next_middle
        last = next_last
        part = next_part
    if APART:
        tma.store_wait(0)


# How long the lists are differs from mask to mask; nothing is gained by knowing it.
@gluon.jit(do_not_specialize=["items", "total", "side", "parts"])
def _hopper_kernel(
    q_desc, k_desc, v_desc, o_desc, q1_desc, k1_desc, v1_desc, o1_desc,
    ROW_SCALE, ADDED, LSE, PART_OUT, PART_LSE, ITEMS, PATTERN, COL, TILE, BITS, stride_pb, stride_ph,
    heads, group, items, total, side, parts, q_len, scale_log2, ONE_PATTERN: gl.constexpr,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    MASK_M: gl.constexpr, MASK_N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, TURNS: gl.constexpr, APART: gl.constexpr,
    HAS_ROW_SCALE: gl.constexpr, HAS_ADDED: gl.constexpr,
):  # fmt: skip
    GROUPS: gl.constexpr = MASK_M // 64
    q_s = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, 64, D0], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, D0], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, D0], v_desc.layout)
    q1_s = q_s
    k1_s = k_s
    v1_s = v_s
    if D1 > 0:
        q1_s = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, 64, D1], q1_desc.layout)
        k1_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, D1], k1_desc.layout)
        v1_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, D1], v1_desc.layout)
    o_s = q_s  # no longer read when a row is written
    o1_s = q1_s
    if APART:
        o_s = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, 64, D0], q_desc.layout)
        if D1 > 0:
            o1_s = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, 64, D1], q1_desc.layout)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], barriers)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], barriers)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=GROUPS)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()

    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (
                o_desc, o1_desc, TILE, BITS, ROW_SCALE, ADDED, LSE, PART_OUT, PART_LSE,
                q_s, o_s, k_s, v_s, q1_s, o1_s, k1_s, v1_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                ITEMS, PATTERN, stride_pb, stride_ph, heads, items, total, side, parts, q_len, scale_log2,
                0, D, D0, D1, STAGES, TURNS, APART, MASK_M, MASK_N, BLOCK_N, ONE_PATTERN, HAS_ROW_SCALE, HAS_ADDED,
            )),
            (_consume, (
                o_desc, o1_desc, TILE, BITS, ROW_SCALE, ADDED, LSE, PART_OUT, PART_LSE,
                q_s, o_s, k_s, v_s, q1_s, o1_s, k1_s, v1_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                ITEMS, PATTERN, stride_pb, stride_ph, heads, items, total, side, parts, q_len, scale_log2,
                1, D, D0, D1, STAGES, TURNS, APART, MASK_M, MASK_N, BLOCK_N, ONE_PATTERN, HAS_ROW_SCALE, HAS_ADDED,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q1_desc, k1_desc, v1_desc, COL, q_s, k_s, v_s, q1_s, k1_s, v1_s,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                ITEMS, PATTERN, stride_pb, stride_ph, heads, group, items, total, side,
                D0, D1, GROUPS, STAGES, MASK_M, MASK_N, BLOCK_N, ONE_PATTERN,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                o_desc, o1_desc, TILE, BITS, ROW_SCALE, ADDED, LSE, PART_OUT, PART_LSE,
                q_s, o_s, k_s, v_s, q1_s, o1_s, k1_s, v1_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                ITEMS, PATTERN, stride_pb, stride_ph, heads, items, total, side, parts, q_len, scale_log2,
                0, D, D0, D1, STAGES, TURNS, APART, MASK_M, MASK_N, BLOCK_N, ONE_PATTERN, HAS_ROW_SCALE, HAS_ADDED,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q1_desc, k1_desc, v1_desc, COL, q_s, k_s, v_s, q1_s, k1_s, v1_s,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                ITEMS, PATTERN, stride_pb, stride_ph, heads, group, items, total, side,
                D0, D1, GROUPS, STAGES, MASK_M, MASK_N, BLOCK_N, ONE_PATTERN,
            )),
        ], [1], [24])  # fmt: skip


# ---- launch -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelPlan:
    """One variant of the kernel: keys of a tile, slots of each ring, and the registers of a thread
    that the program is launched with (None: as many as there are for one program on a processor).

    ``turns``: the groups send their products to the tensor cores by turns. ``apart``: results are written
    from their own shared memory, so that the next queries need not wait; else from that of the queries.
    ``together``: programs that fit a multiprocessor.
    """

    block_n: int
    stages: int
    registers: int | None = None
    turns: bool = False
    apart: bool = True
    together: int = 1


# Bytes of shared memory of a multiprocessor.
_PROCESSOR = 228 * 1024


def plan(dim: int, block: Sequence[int]) -> KernelPlan:
    """The variant for a head dim and a mask's blocks: of 128 queries one program on a processor, of
    64 queries two, each with the shared memory and the registers that there are."""
    width = sum(split_dim(dim))
    together = 128 // block[0]
    keys = min(block[1], 128 // together)
    room = (
        _PROCESSOR // together - 2048
    )  # the system takes one KiB, barriers and the compiler the other
    queries, stage = block[0] * width * 2, 2 * keys * width * 2
    apart = together == 1 and 2 * queries + 2 * stage <= room
    stages = min((room - queries * (1 + apart)) // stage, 512 // keys)
    return KernelPlan(keys, stages, 128 if together == 2 else None, apart=apart, together=together)


# Blocks of 128 keys. A program starts in the time of one or two of them; rows that are dealt out in advance leave
# some of the time idle at the end (see docs/kernels.md).
_LONG_ROW = 16
# Bytes of K and V of the heads whose rows are dealt out at once. They should stay in the second-level cache, of
# which a Hopper GPU has 50 MiB or 60; what does not is read again, which main memory nearly keeps up with.
_BESIDE = 64 << 20


def programs(rows: int, keys: float, plan: KernelPlan, processors: int) -> int:
    """Return how many programs share ``rows`` work items with ``keys`` keys each on average: as many as fit the
    device at once, or one per item if they are long or few."""
    if keys > _LONG_ROW * 128:
        return rows
    return min(rows, processors * plan.together)


def beside(k: Tensor, group: int, heads: int) -> int:
    """Return how many of ``heads`` query heads have their rows dealt out together; ``group`` of them share K and V."""
    each = 2 * k.shape[2] * k.shape[3] * k.element_size()
    return max(1, min(heads, _BESIDE // each * group))


def refuses(q: Tensor, k: Tensor, v: Tensor, block: Sequence[int], scale: float) -> str:
    """Return the reason why a call cannot run here, "" if it can."""
    if not on_hopper(q.device):
        return "the Hopper kernel needs a device of compute capability 9.x"
    if q.dtype not in _ELEMENTS:
        return f"the Hopper kernel computes in bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] not in DIMS:
        *some, last = DIMS
        return f"the Hopper kernel has head dims {', '.join(map(str, some))} and {last}, not {q.shape[-1]}"
    if any(n not in (64, 128) for n in block):
        return f"the Hopper kernel has blocks of 64 and 128 tokens, not {tuple(block)}"
    if not scale > 0:
        return f"the Hopper kernel scales scores by a positive number, not {scale}"
    if not all(_copyable(t) for t in (q, k, v)):
        return (
            "the Hopper kernel copies q, k and v by descriptors: none is empty, each begins at a "
            "multiple of 16 bytes, its last axis is contiguous, and the strides of the others are "
            "positive multiples of 8 elements"
        )
    return ""


def _copyable(t: Tensor) -> bool:
    if t.numel() == 0 or t.data_ptr() % 16 or t.stride(-1) != 1:
        return False
    axes = zip(t.shape[:-1], t.stride()[:-1], strict=True)
    return all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in axes)


@functools.cache
def _layout(rows: int, width: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], _ELEMENTS[dtype])


def _descriptor(t: Tensor, rows: int, width: int) -> TensorDescriptor:
    """A descriptor that copies ``rows`` tokens and ``width`` of their values at a time."""
    strides = list(t.stride())
    for axis in (2, 1, 0):  # the stride of an axis of one is never used, but must be in order
        if t.shape[axis] == 1:
            strides[axis] = t.shape[axis + 1] * strides[axis + 1]
    block = [1, 1, rows, width]
    return TensorDescriptor(t, list(t.shape), strides, block, _layout(rows, width, t.dtype))


def descriptors(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, keys: int
) -> list[TensorDescriptor | None]:
    """The descriptors of the kernel: of the main part of the head dim, then of its rest, if it has one."""
    main, rest = split_dim(q.shape[-1])
    rows = ((q, 64), (k, keys), (v, keys), (out, 64))
    found: list[TensorDescriptor | None] = [_descriptor(t, n, main) for t, n in rows]
    return found + [_descriptor(t, n, rest) if rest else None for t, n in rows]


def constants(
    dim: int, block: Sequence[int], plan: KernelPlan, scaled: bool, adding: bool
) -> dict[str, Any]:
    """The arguments that the kernel is compiled for."""
    main, rest = split_dim(dim)
    return {
        "D": dim, "D0": main, "D1": rest, "MASK_M": block[0], "MASK_N": block[1], "BLOCK_N": plan.block_n,
        "STAGES": plan.stages, "TURNS": plan.turns, "APART": plan.apart, "HAS_ROW_SCALE": scaled, "HAS_ADDED": adding,
        "num_warps": 4, "maxnreg": plan.registers,
    }  # fmt: skip


def launch(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None, out: Tensor,
    lse: Tensor, part_out: Tensor, part_lse: Tensor, lists: Any, mask: list[Tensor],
    block: Sequence[int], scale_log2: float, plan: KernelPlan,
) -> None:  # fmt: skip
    """Fill ``out`` and ``lse``, and for heavy rows ``part_out`` and ``part_lse``, as the Triton kernel
    does; for calls that :func:`refuses` accepts, on the current device. ``lists``: the mask's
    :class:`vtr.kernels.triton_lists.Lists`."""
    pattern, _, _, col, tile = mask[:5]
    items = lists.longer_items
    batch, heads, q_len, dim = q.shape
    steps = [pattern.stride(i) if pattern.shape[i] > 1 else 0 for i in (0, 1)]
    total, group = batch * heads * items.shape[1], heads // k.shape[1]
    launched = programs(total, lists.live * block[1], plan, multiprocessors(q.device))
    # A program per row: the device starts them in order, those of one head together.
    side = 1 if launched == total else beside(k, group, batch * heads)
    _hopper_kernel[(launched,)](
        *descriptors(q, k, v, out, plan.block_n), lse if row_scale is None else row_scale,
        lse if added is None else added, lse, part_out, part_lse,
        items, pattern, col, tile, lists.words, *steps,
        heads, group, items.shape[1], total, side, part_out.shape[1], q_len, scale_log2,
        items.shape[0] == 1,
        **constants(dim, block, plan, row_scale is not None, added is not None),
    )  # fmt: skip
