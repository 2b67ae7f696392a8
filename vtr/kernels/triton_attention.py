"""Block-sparse flash attention in Triton: the forward kernel and its launch.

Online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) over the key blocks
of a compressed row. In base 2, with the scale applied to the float32 scores:

    t_ij = scale log2(e) q_i . k_j
    m'   = max(m, max_j t_ij);  a = 2^(m - m');  p_ij = 2^(t_ij - m')
    l    = a l + sum_j p_ij;    o = a o + sum_j p_ij v_j
    out  = row_scale o / l + added;   lse = (m + log2 l) ln 2

Full blocks come first, without any mask, then partial blocks with theirs. The epilogue follows the two
loops: a factor per row, and a row added per query block.
"""

# Device functions are typed by Triton when they are compiled.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import contextlib
import functools
import math
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtr.kernels import hopper_verdict, triton_backward, triton_join
from vtr.kernels.capture import refuse_capture
from vtr.kernels.csr import Csr
from vtr.kernels.kept import Call
from vtr.kernels.triton_common import (
    Config,
    amount,
    dot,
    expand_words,
    fixed,
    interpreting,
    load_rows,
    load_words,
    multiprocessors,
    on_hopper,
    pack_tiles,
    precision,
    products,
    split_dim,
    tuned,
    unit_strides,
    upcast,
    write_rows,
)
from vtr.kernels.triton_lists import Lists

_LOG2E = math.log2(math.e)
# A row with this many times the average work (text queries, which see everything) is cut into
# parts of about twice the average, which are joined by their LSE: else the last programs would
# run alone for as long as such a row takes.
_HEAVY = 4.0
_HEAVY_BLOCKS = 32
# Rows of fewer keys on average count as short: what a program does before its first product (about two
# microseconds) is 3 % of the time of 4,096 keys and 15 % of 800.
_SHORT = 4096


@triton.jit
def _step(
    q0, q1, m, total, acc0, acc1, k_base, v_base, stride_k, stride_v, key, k_len, seen, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys: scores, running maximum and sum, weighted values."""
    k0 = load_rows(k_base, key, stride_k, k_len, 0, D0, D, UNIT, MASKED)
    scores = tl.zeros([q0.shape[0], k0.shape[0]], dtype=tl.float32)
    scores = dot(q0, tl.trans(k0), scores, PRECISION, UPCAST)
    if D1 > 0:
        k1 = load_rows(k_base, key, stride_k, k_len, D0, D1, D, UNIT, MASKED)
        scores = dot(q1, tl.trans(k1), scores, PRECISION, UPCAST)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    # m is scaled, the scores are not: one multiply-add each. Right for a scale above 0 alone.
    m_new = tl.maximum(m, tl.max(scores, 1) * scale_log2)
    # A row that has seen nothing yet has m = -inf, and -inf - -inf is NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    weights = tl.exp2(tl.fma(scores, scale_log2, -m_safe[:, None]))
    keep = tl.exp2(m - m_safe)
    total = total * keep + tl.sum(weights, 1)
    v0 = load_rows(v_base, key, stride_v, k_len, 0, D0, D, UNIT, MASKED)
    weights = weights.to(v0.dtype)
    acc0 = dot(weights, v0, acc0 * keep[:, None], PRECISION, UPCAST)
    if D1 > 0:
        v1 = load_rows(v_base, key, stride_v, k_len, D0, D1, D, UNIT, MASKED)
        acc1 = dot(weights, v1, acc1 * keep[:, None], PRECISION, UPCAST)
    return m_new, total, acc0, acc1


# How long the lists are differs from mask to mask; nothing is gained by knowing it.
@triton.jit(do_not_specialize=["items", "parts", "places"])
def _forward_kernel(
    Q, K, V, ROW_SCALE, ADDED, OUT, LSE, PART_OUT, PART_LSE,
    ITEMS, PATTERN, COL, TILE, TILES, CLAIMED,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os,
    stride_pb, stride_ph,
    heads, group, items, parts, places, q_len, k_len, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, HAS_ADDED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Attend the queries of ``places``: BLOCK_M queries of an item of a lane (sample and head). A program
    takes one of them; with THREADS > 0, the threads of a program, it walks until none is left.
    """
    SUB_M: tl.constexpr = MASK_M // BLOCK_M
    SUB_N: tl.constexpr = MASK_N // BLOCK_N
    BITS: tl.constexpr = 32 if MASK_N >= 32 else MASK_N
    WORDS: tl.constexpr = MASK_N // BITS
    # One axis of programs, the heads outermost: the others end at 65,535.
    place = tl.program_id(0)
    while place < places:
        lane = place // (items * SUB_M)
        item = place % (items * SUB_M) // SUB_M
        sub = place % SUB_M
        b = (lane // heads).to(tl.int64)
        h = (lane % heads).to(tl.int64)
        pattern = tl.load(PATTERN + b * stride_pb + h * stride_ph)
        entry = ITEMS + (pattern.to(tl.int64) * items + item) * 8
        row_block = tl.load(entry)
        first = tl.load(entry + 1)
        middle = tl.load(entry + 2)
        last = tl.load(entry + 3)
        part = tl.load(entry + 4)
        block = tl.load(entry + 5)
        # Longer lists of other patterns are filled up with items of row block -1.
        last = tl.where(row_block < 0, first, last)
        middle = tl.minimum(middle, last)
        offset = tl.arange(0, BLOCK_M)
        row = tl.maximum(row_block, 0) * MASK_M + sub * BLOCK_M + offset
        q_base = Q + b * stride_qb * UNIT + h * stride_qh * UNIT
        k_base = K + b * stride_kb * UNIT + (h // group) * stride_kh * UNIT
        v_base = V + b * stride_vb * UNIT + (h // group) * stride_vh * UNIT
        q0 = load_rows(q_base, row.to(tl.int64), stride_qs, q_len, 0, D0, D, UNIT, True)
        q1 = q0
        if D1 > 0:
            q1 = load_rows(q_base, row.to(tl.int64), stride_qs, q_len, D0, D1, D, UNIT, True)
        m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
        acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], dtype=tl.float32)
        inner = tl.arange(0, BLOCK_N)

        # The block of the next step is read one step ahead: the compiler does not prefetch a load
        # that waits for another load of the same step.
        for step in range(first * SUB_N, middle * SUB_N):
            key = (block * MASK_N + (step % SUB_N) * BLOCK_N).to(tl.int64) + inner
            ahead = (step + 1) // SUB_N
            block = tl.load(COL + ahead, ahead < last, other=0)
            m, total, acc0, acc1 = _step(
                q0, q1, m, total, acc0, acc1, k_base, v_base, stride_ks, stride_vs, key, k_len, True,
                scale_log2, D, D0, D1, UNIT, False, PRECISION, UPCAST,
            )  # fmt: skip
        # The bits of a partial block too, into registers: through shared memory they would take the
        # room of a stage of keys. Its number therefore is read two steps ahead.
        tile = tl.load(TILE + middle, middle < last, other=0)
        within = sub * BLOCK_M + offset
        words = load_words(TILES, tile, within, 0, MASK_M, WORDS, BITS, BLOCK_N, False)
        tile = tl.load(TILE + middle + 1 // SUB_N, middle + 1 // SUB_N < last, other=0)
        for step in range(middle * SUB_N, last * SUB_N):
            column = step % SUB_N * BLOCK_N
            key = (block * MASK_N + column).to(tl.int64) + inner
            seen = expand_words(words, column, BITS, BLOCK_N, False)
            words = load_words(
                TILES,
                tile,
                within,
                (step + 1) % SUB_N * BLOCK_N,
                MASK_M,
                WORDS,
                BITS,
                BLOCK_N,
                False,
            )
            block = tl.load(COL + (step + 1) // SUB_N, (step + 1) // SUB_N < last, other=0)
            tile = tl.load(TILE + (step + 2) // SUB_N, (step + 2) // SUB_N < last, other=0)
            m, total, acc0, acc1 = _step(
                q0, q1, m, total, acc0, acc1, k_base, v_base, stride_ks, stride_vs, key, k_len, seen,
                scale_log2, D, D0, D1, UNIT, True, PRECISION, UPCAST,
            )  # fmt: skip

        if THREADS > 0:
            # The next place is whatever no program has begun: lengths differ, and shares fixed in advance
            # would leave programs idle. One thread counts, and none waits for it before the results are
            # written.
            thread = tl.arange(0, THREADS)
            claimed = tl.atomic_add(CLAIMED + thread, 1, thread == 0, sem="relaxed")

        o_base = OUT + b * stride_ob * UNIT + h * stride_oh * UNIT
        write_rows(
            acc0, acc1, m, total, o_base, stride_os, ROW_SCALE, ADDED, LSE, PART_OUT, PART_LSE,
            lane, row_block, part, parts, sub * BLOCK_M + offset, q_len,
            D, D0, D1, UNIT, MASK_M, HAS_ROW_SCALE, HAS_ADDED,
        )  # fmt: skip
        if THREADS > 0:
            place = tl.num_programs(0) + tl.sum(tl.where(thread == 0, claimed, 0))
        else:
            place = places


# ---- work lists -------------------------------------------------------------------------------


_lists: dict[int, Lists] = {}


def lists_of(mask: list[Tensor], dims: list[int]) -> Lists:
    key = int(mask[6])
    if key not in _lists:
        refuse_capture(mask[3].device, "work lists are built")
        _lists[key] = _make_lists(mask, dims)
        weakref.finalize(mask[6], _lists.pop, key, None)
    return _lists[key]


def _make_lists(mask: list[Tensor], dims: list[int]) -> Lists:
    _, row_ptr, split, col, tile, tiles = mask[:6]
    q_len, k_len, bm, bn = dims
    nq, nk = -(-q_len // bm), -(-k_len // bn)
    patterns = split.numel() // nq
    first, last = row_ptr[:-1].view(-1, nq), row_ptr[1:].view(-1, nq)
    middle = split.view(-1, nq)
    count = last - first
    mean = count.float().mean().double()
    is_heavy = count > (_HEAVY * mean).clamp(min=2 * _HEAVY_BLOCKS)
    facts = torch.stack([mean, is_heavy.sum(1).max().double(), count.max().double()])
    average, most, longest = facts.tolist()  # one look at the device
    most, chunk = int(most), max(_HEAVY_BLOCKS, math.ceil(2 * average))
    pieces = -(-int(longest) // chunk) if most else 0

    row = torch.arange(nq, dtype=torch.int32, device=col.device).expand(patterns, nq)
    whole = torch.stack([row, first, middle, last, torch.full_like(row, -1)], -1)
    whole[..., 0][is_heavy] = -1
    by_weight = is_heavy.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    heavy = by_weight.masked_fill(~is_heavy.gather(1, by_weight), -1)
    items = whole
    if most:
        number = torch.arange(most * pieces, dtype=torch.int32, device=col.device)
        r, piece = heavy[:, number // pieces], number % pieces
        begin, border, end = (t.gather(1, r.clamp(min=0)) for t in (first, middle, last))
        start = torch.minimum(begin + piece * chunk, end)
        stop = torch.minimum(start + chunk, end)
        border = torch.minimum(torch.maximum(border, start), stop)
        parts = torch.stack([r.int(), start, border, stop, number.expand_as(start)], -1)
        items = torch.cat([whole, parts], 1)
    length = items[..., 3] - items[..., 1]
    order = torch.where(items[..., 0] < 0, -1, length).argsort(dim=1, descending=True, stable=True)
    items = items.gather(1, order.unsqueeze(-1).expand_as(items)).int().contiguous()

    rows = Csr(row_ptr, split, col, tile)
    return Lists(items, heavy, pieces, average, pack_tiles(tiles), rows, (patterns, nq, nk))


@functools.cache  # asked in every call
def _configs(dim: int, bm: int, bn: int, kind: str, short: bool = False) -> list[Config]:
    """List candidates, one that fits every device first (99 KiB of shared memory). Tiles divide the mask's
    blocks; ``kind`` is that of :func:`vtr.kernels.triton_common.products`. ``short``: with persistent
    programs, for many short rows.

    Candidates have three stages at least: with two, the compiler copies the next keys only after it
    has used the present ones, and waits for them at once. 128 x 128 was slower than 128 x 64 at every
    point measured on an H200, except for head dims of 72 to 96.
    """
    width = sum(split_dim(dim))
    if kind == "exact":
        tries = [(32, 16, 8, 2), (64, 16, 8, 2), (32, 32, 8, 2)]
        if width <= 96:
            tries = [(32, 32, 8, 2), (64, 32, 8, 2)]
        elif width > 128:
            tries = [(32, 16, 8, 2), (16, 16, 4, 2)]
        found = [Config(min(m, bm), min(n, bn), w, s) for m, n, w, s in tries]
        return list(dict.fromkeys(found))
    if width <= 64:
        tries = [(64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 8, 5)]
    elif width <= 96:
        tries = [
            (64, 64, 4, 3),
            (128, 64, 8, 3),
            (128, 64, 8, 4),
            (128, 64, 8, 5),
            (128, 128, 8, 3),
        ]
    elif width <= 128:
        tries = [(64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 8, 5)]
    elif width <= 192:
        tries = [(64, 32, 4, 3), (64, 64, 8, 3), (128, 32, 8, 3), (128, 32, 8, 4), (128, 64, 8, 3)]
    else:
        tries = [(64, 16, 4, 3), (64, 64, 8, 3), (128, 32, 8, 3), (128, 32, 8, 4)]
    if kind == "tf32":  # twice the bytes
        tries = [(64, 32, 4, 2) if width <= 128 else (32, 16, 4, 2), *tries]
    if min(bm, bn) < 64:  # tiles too small for so many warps
        m, n = min(64, bm), min(64, bn)
        fit = [(m, n, w, s) for w in (4, 2, 1) for s in (3, 4) if m * width <= 2048 * w]
        tries = [tries[0], *fit]
    found = [Config(min(m, bm), min(n, bn), w, s) for m, n, w, s in tries]
    if short and kind == "half" and min(bm, bn) >= 64:
        # Of wider heads they spill. Small blocks have many programs per multiprocessor, which hide each
        # other's beginnings.
        if width <= 128:
            found += [Config(64, 64, 4, 3, 3 if dim in (32, 64) else 2)]
            found += [Config(min(128, bm), 64, 8, 4, 1)] if bm >= 128 else []
        elif width <= 192:
            found += [Config(min(128, bm), 32, 8, 4, 1)]
    return list(dict.fromkeys(found))


_forced: str | None = os.environ.get("VTR_FORWARD_KERNEL")
if _forced not in ("gluon", "triton", None):
    raise ValueError(f'VTR_FORWARD_KERNEL must be "gluon" or "triton", not "{_forced}"')


@contextlib.contextmanager
def forward_kernel(name: str | None) -> Iterator[None]:
    """Force the forward kernel inside the block: ``"gluon"`` (the Hopper kernel; raises if it cannot
    run), ``"triton"``, or ``None`` for the default: on devices of compute capability 9.x the faster of the two
    if the Hopper kernel works on this machine (:mod:`vtr.kernels.hopper_verdict`), else ``"triton"``.

    The environment variable ``VTR_FORWARD_KERNEL`` sets the same for a whole process."""
    global _forced
    if name not in ("gluon", "triton", None):
        raise ValueError(f'name must be "gluon", "triton" or None, not "{name}"')
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _gluon() -> Any:
    """Load the module of the Hopper kernel, or return the reason why this Triton cannot (its Gluon is
    experimental)."""
    if interpreting():
        return "Gluon has no interpreter"
    try:
        from vtr.kernels import gluon_attention
    except (ImportError, AttributeError) as error:
        return f"the Gluon of the installed triton package lacks a name: {error}"
    return gluon_attention


# A candidate for tuning beside the tiles: the Hopper kernel, which has its own.
_HOPPER = Config(0, 0, 0, 0)


def _hopper(q: Tensor, k: Tensor, v: Tensor, block: list[int], scale: float) -> Any:
    """Return the module of the Hopper kernel if it can run this call and was requested or has proven itself on
    this machine, else None."""
    if _forced == "triton" or not (_forced or on_hopper(q.device)):
        return None
    module = _gluon()
    why = module if isinstance(module, str) else module.refuses(q, k, v, block, scale)
    if why and _forced:
        raise RuntimeError(
            f"{why}; the Triton kernel runs without forward_kernel and VTR_FORWARD_KERNEL"
        )
    return None if why or not (_forced or hopper_verdict.works(q.device)) else module


def forward(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
    mask: list[Tensor], dims: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`vtr.kernels.attention.block_sparse_attention` for the contract."""
    return keeping(q, k, v, row_scale, added, mask, dims, scale)[:2]


def keeping(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
    mask: list[Tensor], dims: list[int], scale: float,
) -> tuple[Tensor, Tensor, Call | None]:  # fmt: skip
    """Compute :func:`forward`, and what the next call of the same kind may use; None if that cannot be."""
    given = q, k, v, row_scale, added
    if scale <= 0.0:  # the kernel scales the maximum of a row, which wants a scale above 0
        q, scale = (-q, -scale) if scale < 0.0 else (torch.zeros_like(q), 1.0)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    pattern, _, _, col, tile = mask[:5]
    batch, heads, q_len, dim = q.shape
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

    unit, strides = unit_strides(q, k, v, out)
    hopper = _hopper(q, k, v, dims[2:], scale)
    scaled, adding, scale_log2 = row_scale is not None, added is not None, scale * _LOG2E
    tensors = (
        q, k, v, q if row_scale is None else row_scale, q if added is None else added, out, lse,
        part_out, part_lse,
    )  # fmt: skip

    def launch(config: Config) -> Callable[..., Any]:
        """Launch, and return a function that does it again with other ``tensors``."""
        if config == _HOPPER:
            again = _hopper_again(hopper, scaled, adding, lists, mask, dims[2:], scale_log2, dim)
            again(*tensors)
            return again
        places = programs = items * (dims[2] // config.block_m) * batch * heads
        claimed, threads = lists.items, 0
        if config.persistent:
            programs = min(places, config.persistent * multiprocessors(q.device))
            claimed, threads = pattern.new_zeros(1), 32 * config.warps
        tables = lists.longer_items, pattern, col, tile, lists.words
        numbers: tuple[Any, ...] = (
            *strides, *steps,
            heads, heads // k.shape[1], items, parts, places, q_len, k.shape[2], scale_log2,
        )  # fmt: skip
        constants = dict(
            D=dim, D0=main, D1=rest, UNIT=unit, MASK_M=dims[2], MASK_N=dims[3],
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, HAS_ROW_SCALE=scaled,
            HAS_ADDED=adding, PRECISION=precision(q.dtype), UPCAST=upcast(q.dtype),
            THREADS=threads, num_warps=config.warps, num_stages=config.stages,
            **config.register_limit,
        )  # fmt: skip
        made = _forward_kernel[(programs,)](*tensors, *tables, claimed, *numbers, **constants)
        if not config.persistent:
            after = (*tables, claimed, *numbers)
            return fixed(_forward_kernel, made, programs, after, constants)
        start = fixed(_forward_kernel, made, programs, numbers, constants)
        return lambda *tensors: start(*tensors, *tables, pattern.new_zeros(1))

    kind = products(q.dtype)
    programs = amount(q.device, items * batch * heads)
    length = "short" if lists.live * dims[3] < _SHORT else "long"
    key: tuple[Any, ...] = (
        "forward", q.device, q.dtype, kind, dim, *dims[2:], programs, length,
    )  # fmt: skip
    configs = _configs(dim, dims[2], dims[3], kind, length == "short" and programs != "few")
    if hopper is not None:
        key, configs = (*key, "hopper"), [*configs, _HOPPER]
    with torch.cuda.device_of(q):  # Triton launches on the current device, wherever the tensors are
        if hopper is not None and _forced:
            launched = launch(_HOPPER)
        else:
            launched = tuned(key, configs, launch)
        if parts:
            triton_join.join(
                out, lse, part_out, part_lse, row_scale, added, pattern, lists.heavy, dims[2]
            )
    as_given = all(a is b for a, b in zip(given, (q, k, v, row_scale, added), strict=True))
    if launched is None or not as_given or not out.numel():
        return out, lse, None
    return out, lse, _kept(launched, q, out, lse, parts, lists, mask, dims, scale)


def _hopper_again(
    module: Any, scaled: bool, adding: bool, lists: Lists, mask: list[Tensor], block: list[int],
    scale_log2: float, dim: int,
) -> Callable[..., None]:  # fmt: skip
    """Return a function of a launch's tensors that runs the Hopper kernel with all else fixed."""
    plan = module.plan(dim, block)

    def again(
        q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor, added: Tensor, *results: Tensor
    ) -> None:
        module.launch(
            q, k, v, row_scale if scaled else None, added if adding else None, *results, lists,
            mask, block, scale_log2, plan,
        )  # fmt: skip

    return again


def _kept(
    launch: Callable[..., Any], q: Tensor, out: Tensor, lse: Tensor, parts: int, lists: Lists,
    mask: list[Tensor], dims: list[int], scale: float,
) -> Call:  # fmt: skip
    """Return a forward whose choices are fixed and whose lists are built, for calls that differ in the
    values of their tensors alone. See :mod:`vtr.kernels.kept`."""
    forced, exact = _forced, precision(q.dtype)
    shape, strides, dtype, device = out.shape, out.stride(), out.dtype, out.device
    lse_shape, lse_strides, index = lse.shape, lse.stride(), device.index
    like_q = q.stride() == strides
    single = dtype == torch.float32
    rows = shape[0] * shape[1], parts, dims[2]

    def run(
        q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if forced != _forced or (single and exact != precision(dtype)):  # chosen anew meanwhile
            return forward(q, k, v, row_scale, added, mask, dims, scale)
        # Not ``torch.empty``, which takes longer to read its arguments than to allocate.
        if like_q:
            out = torch.empty_like(q)
        else:
            out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        lse = torch.empty_strided(lse_shape, lse_strides, dtype=torch.float32, device=device)
        if index is not None and torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                fill(q, k, v, row_scale, added, out, lse)
        else:
            fill(q, k, v, row_scale, added, out, lse)
        return out, lse

    def fill(
        q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
        out: Tensor, lse: Tensor,
    ) -> None:  # fmt: skip
        scales, lines = q if row_scale is None else row_scale, q if added is None else added
        if not parts:
            launch(q, k, v, scales, lines, out, lse, lse, lse)
            return
        part_out = torch.empty(*rows, shape[3], dtype=torch.float32, device=device)
        part_lse = torch.empty(rows, dtype=torch.float32, device=device)
        launch(q, k, v, scales, lines, out, lse, part_out, part_lse)
        triton_join.join(
            out, lse, part_out, part_lse, row_scale, added, mask[0], lists.heavy, dims[2]
        )

    return run


def backward(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
    mask: list[Tensor], dims: list[int], scale: float,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Compute gradients of q, k and v (see :mod:`vtr.kernels.triton_backward`)."""
    return triton_backward.backward(
        dout, delta, q, k, v, lse, mask, dims, scale, lists_of(mask, dims)
    )
