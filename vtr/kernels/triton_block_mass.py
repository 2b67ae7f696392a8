"""Exact attention per tile in Triton: see :mod:`vtr.kernels.mass` for what is computed.

A program holds some queries of one block and walks over the keys, so that no score leaves the chip.
"""

# Device functions are typed by Triton when they are compiled.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtr.kernels.triton_common import (
    Config,
    amount,
    dot,
    load_rows,
    precision,
    products,
    split_dim,
    tuned,
    unit_strides,
    upcast,
)

_LOG2E = math.log2(math.e)


@triton.jit
def _scores(
    q0, q1, k_base, stride_k, key, k_len, seen_base,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, HAS_KEYS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of keys before the scale, and which keys are seen."""
    k0 = load_rows(k_base, key, stride_k, k_len, 0, D0, D, UNIT, True)
    scores = tl.zeros([q0.shape[0], k0.shape[0]], dtype=tl.float32)
    scores = dot(q0, tl.trans(k0), scores, PRECISION, UPCAST)
    if D1 > 0:
        k1 = load_rows(k_base, key, stride_k, k_len, D0, D1, D, UNIT, True)
        scores = dot(q1, tl.trans(k1), scores, PRECISION, UPCAST)
    seen = key < k_len
    if HAS_KEYS:
        seen = seen & (tl.load(seen_base + key, seen, other=0) != 0)
    return scores, seen[None, :]


@triton.jit
def _mass_kernel(
    Q, K, LSE, SEEN, MASS,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_seen,
    heads, group, rows, tiles, q_len, k_len, scale_log2, largest,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_KEYS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum of one tile BLOCK_M x BLOCK_N; the caller adds up those of a block."""
    lane = tl.program_id(0) // rows
    line = tl.program_id(0) % rows
    b = (lane // heads).to(tl.int64)
    h = (lane % heads).to(tl.int64)
    row = line * BLOCK_M + tl.arange(0, BLOCK_M)
    row64 = row.to(tl.int64)
    q_base = Q + b * stride_qb * UNIT + h * stride_qh * UNIT
    k_base = K + b * stride_kb * UNIT + (h // group) * stride_kh * UNIT
    q0 = load_rows(q_base, row64, stride_qs, q_len, 0, D0, D, UNIT, True)
    q1 = q0
    if D1 > 0:
        q1 = load_rows(q_base, row64, stride_qs, q_len, D0, D1, D, UNIT, True)
    at = lane.to(tl.int64) * q_len
    lse = tl.load(LSE + at + row, row < q_len, other=float("inf")) * 1.4426950408889634
    inner = tl.arange(0, BLOCK_N)
    out = MASS + (lane.to(tl.int64) * rows + line) * tiles
    for tile in range(0, tiles):
        key = (tile * BLOCK_N + inner).to(tl.int64)
        scores, seen = _scores(
            q0, q1, k_base, stride_ks, key, k_len, SEEN + b * stride_seen,
            D, D0, D1, UNIT, HAS_KEYS, PRECISION, UPCAST,
        )  # fmt: skip
        weights = tl.exp2(tl.minimum(tl.fma(scores, scale_log2, -lse[:, None]), largest))
        weights = tl.where(seen, weights, 0.0)
        tl.store(out + tile, tl.sum(tl.sum(weights, 1), 0))


@triton.jit
def _live_kernel(
    Q, K, COUNTS, SEEN, VISITED, MANY, LIVE,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_counts, stride_seen,
    heads, group, rows, blocks, columns, q_len, k_len, scale_log2, threshold,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_KEYS: tl.constexpr, HAS_COUNTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Decide which tiles BLOCK_M queries of a block keep: VISITED lists them in the order of the visit, MANY of
    them for each block of queries; others cost nothing."""
    SUB_M: tl.constexpr = MASK_M // BLOCK_M
    SUB_N: tl.constexpr = MASK_N // BLOCK_N
    lane = tl.program_id(0) // rows
    line = tl.program_id(0) % rows
    b = (lane // heads).to(tl.int64)
    h = (lane % heads).to(tl.int64)
    row = line * BLOCK_M + tl.arange(0, BLOCK_M)
    row64 = row.to(tl.int64)
    q_base = Q + b * stride_qb * UNIT + h * stride_qh * UNIT
    k_base = K + b * stride_kb * UNIT + (h // group) * stride_kh * UNIT
    q0 = load_rows(q_base, row64, stride_qs, q_len, 0, D0, D, UNIT, True)
    q1 = q0
    if D1 > 0:
        q1 = load_rows(q_base, row64, stride_qs, q_len, D0, D1, D, UNIT, True)
    counts = row < q_len
    if HAS_COUNTS:
        counts = counts & (tl.load(COUNTS + b * stride_counts + row, counts, other=0) != 0)
    before = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    inner = tl.arange(0, BLOCK_N)
    at = lane.to(tl.int64) * blocks + line // SUB_M
    visited = VISITED + at * columns
    many = tl.load(MANY + at)
    out = LIVE + (lane.to(tl.int64) * rows + line) * columns
    own = before
    # One step ahead, as in the attention kernel, so that keys are prefetched.
    column = tl.load(visited, many > 0, other=0)
    for step in range(0, many * SUB_N):
        present, sub = column, step % SUB_N
        ahead = (step + 1) // SUB_N
        column = tl.load(visited + ahead, ahead < many, other=0)
        key = (present * MASK_N + sub * BLOCK_N + inner).to(tl.int64)
        scores, seen = _scores(
            q0, q1, k_base, stride_ks, key, k_len, SEEN + b * stride_seen,
            D, D0, D1, UNIT, HAS_KEYS, PRECISION, UPCAST,
        )  # fmt: skip
        scores = tl.where(seen, scores * scale_log2, float("-inf"))
        own = tl.maximum(own, tl.max(scores, 1))
        # A row that has seen nothing has -inf, and -inf - -inf is NaN.
        some = own > float("-inf")
        near = (before == float("-inf")) | (
            tl.where(some, own, 0.0) - tl.where(some, before, 0.0) > threshold
        )
        keeps = tl.max((near & some & counts).to(tl.int32), 0)
        whole = sub == SUB_N - 1
        tl.store(out + present, keeps, whole)
        before = tl.where(whole, tl.maximum(before, own), before)
        own = tl.where(whole, float("-inf"), own)


# ---- launches ---------------------------------------------------------------------------------


@functools.cache  # asked in every call
def _configs(dim: int, bm: int, bn: int, kind: str) -> list[Config]:
    """List candidates, one that fits every device first (99 KiB of shared memory)."""
    width = sum(split_dim(dim))
    if kind == "exact":
        tries = [(32, 16, 8, 1)] if width > 128 else [(32, 16, 8, 1), (32, 32, 8, 1)]
    elif width <= 128:
        tries = [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)]
    else:
        tries = [(64, 32, 4, 3), (64, 64, 8, 3)]
    if kind == "tf32":
        tries = [(32, 32, 4, 2) if width <= 128 else (32, 16, 4, 2), *tries]
    found = [Config(min(m, bm), min(n, bn), w, s) for m, n, w, s in tries]
    return list(dict.fromkeys(found))


def _bytes(flags: Tensor | None, instead: Tensor) -> tuple[Tensor, int]:
    """Flags (B or 1, S) as bytes, and the stride of their samples."""
    if flags is None:
        return instead, 0
    flags = flags.contiguous().view(torch.uint8)
    return flags, flags.stride(0) if flags.shape[0] > 1 else 0


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, sides: tuple[int, int], scale: float, keys: Tensor | None,
    largest: float,
) -> Tensor:  # fmt: skip
    """Compute (B, H, NQ, NK) float32; ``lse`` is +inf for rows that do not count."""
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    batch, heads, q_len, dim = q.shape
    grid = (-(-q_len // sides[0]), -(-k.shape[2] // sides[1]))
    main, rest = split_dim(dim)
    unit, strides = unit_strides(q, k)
    lse = lse.float().contiguous()
    seen, stride_seen = _bytes(keys, q)
    found: list[Tensor] = []

    def launch(config: Config) -> None:
        down, across = sides[0] // config.block_m, sides[1] // config.block_n
        rows, tiles = grid[0] * down, grid[1] * across
        mass = torch.empty(batch, heads, rows, tiles, dtype=torch.float32, device=q.device)
        _mass_kernel[(batch * heads * rows,)](
            q, k, lse, seen, mass, *strides, stride_seen, heads, heads // k.shape[1], rows, tiles,
            q_len, k.shape[2], scale * _LOG2E, largest * _LOG2E,
            D=dim, D0=main, D1=rest, UNIT=unit, MASK_M=sides[0], MASK_N=sides[1],
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, HAS_KEYS=keys is not None,
            PRECISION=precision(q.dtype), UPCAST=upcast(q.dtype),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        mass = mass.unflatten(3, (grid[1], across)).unflatten(2, (grid[0], down))
        found[:] = [mass.sum((3, 5))]

    kind = products(q.dtype)
    programs = amount(q.device, grid[0] * batch * heads)
    with torch.cuda.device_of(q):
        tuned(
            ("block mass", q.device, q.dtype, kind, dim, *sides, programs),
            _configs(dim, *sides, kind), launch,
        )  # fmt: skip
    return found[0]


def live_tiles(
    q: Tensor, k: Tensor, visited: Tensor, sides: tuple[int, int], scale: float, threshold: float,
    queries: Tensor | None, keys: Tensor | None,
) -> Tensor:  # fmt: skip
    """Compute (B, H, NQ, NK) bool."""
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    batch, heads, q_len, dim = q.shape
    blocks, columns = visited.shape[2:]
    main, rest = split_dim(dim)
    unit, strides = unit_strides(q, k)
    seen, stride_seen = _bytes(keys, q)
    counts, stride_counts = _bytes(queries, q)
    # The last column first; what was not visited is behind the others.
    listed = visited.flip(3).byte().argsort(dim=3, descending=True, stable=True)
    listed, many = (columns - 1 - listed).int(), visited.sum(3, dtype=torch.int32)
    found: list[Tensor] = []

    def launch(config: Config) -> None:
        down = sides[0] // config.block_m
        live = torch.zeros(batch, heads, blocks * down, columns, dtype=torch.uint8, device=q.device)
        _live_kernel[(batch * heads * blocks * down,)](
            q, k, counts, seen, listed, many, live, *strides, stride_counts, stride_seen,
            heads, heads // k.shape[1], blocks * down, blocks, columns, q_len, k.shape[2],
            scale * _LOG2E, threshold,
            D=dim, D0=main, D1=rest, UNIT=unit, MASK_M=sides[0], MASK_N=sides[1],
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, HAS_KEYS=keys is not None,
            HAS_COUNTS=queries is not None, PRECISION=precision(q.dtype), UPCAST=upcast(q.dtype),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        found[:] = [live.unflatten(2, (blocks, down)).amax(3).bool()]

    kind = products(q.dtype)
    programs = amount(q.device, blocks * batch * heads)
    with torch.cuda.device_of(q):
        tuned(
            ("live tiles", q.device, q.dtype, kind, dim, *sides, programs),
            _configs(dim, *sides, kind), launch,
        )  # fmt: skip
    return found[0]
