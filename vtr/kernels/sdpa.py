"""Block-sparse attention that gathers key blocks: needs no compiler, runs on any device.

The queries of a block against the keys they see are a dense product, so each step gathers those
keys into a small buffer (nothing where they lie in one run) and works on a score tile that stays
in cache. A plan, made once per mask, says what each step gathers; neighbours that see the same
keys are one step.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.kernels.epilogue import finish

# Between these numbers of queries the products written out beat the CPU's flash attention, which
# works on 32 queries at a time below 192 and loses a tenth of its speed by that.
_PRODUCT_ROWS = range(96, 192)
# A score tile of this many elements (4 MiB) or more no longer profits from being written out.
_TILE = 1 << 20


@dataclass
class Keys:
    """Some key blocks: a run of tokens, or blocks to gather."""

    tokens: int
    start: int | None  # first token of a run, None: gather
    blocks: Tensor | None

    @classmethod
    def of(cls, columns: list[int], block: int, short: int, device: torch.device) -> Keys:
        """``short``: how many tokens the last of these blocks lacks."""
        tokens = len(columns) * block - short
        if all(b - a == 1 for a, b in itertools.pairwise(columns)):
            return cls(tokens, columns[0] * block if columns else 0, None)
        return cls(tokens, None, torch.tensor(columns, dtype=torch.int64, device=device))


@dataclass
class Row:
    """One step: some neighbouring queries that see the same keys."""

    start: int  # first and last query token
    stop: int
    keys: Keys  # partial blocks, then full blocks (of which the last may be short)
    partial: Tensor | None  # tiles of the partial blocks
    holes: bool  # some queries may see no key at all


@dataclass
class Plan:
    """Steps per pattern, and the queries that see nothing."""

    pattern: list[list[int]]
    rows: list[list[Row]]
    empty: list[list[tuple[int, int]]]
    unseen: Tensor = field(repr=False)  # (T, bm, bn) bool, True: masked


_plans: dict[int, Plan] = {}


def plan_of(mask: list[Tensor], dims: list[int]) -> Plan:
    """The plan of a mask (its tensors and [q_len, k_len, bm, bn]), made on first use."""
    ident = mask[6]
    key = int(ident)
    if key not in _plans:
        _plans[key] = _make_plan(mask, dims)
        weakref.finalize(ident, _plans.pop, key, None)
    return _plans[key]


def _make_plan(mask: list[Tensor], dims: list[int]) -> Plan:
    pattern, row_ptr, split, col, tile, tiles = mask[:6]
    q_len, k_len, bm, bn = dims
    nq, nk = -(-q_len // bm), -(-k_len // bn)
    ptr, mid, cols, ids = (t.tolist() for t in (row_ptr, split, col, tile))
    ends = (q_len - (nq - 1) * bm, k_len - (nk - 1) * bn)
    # Partial only because the keys end there: full as far as it goes.
    short = {
        last: tiles[:, : ends[0] if last else bm, : ends[1]].flatten(1).all(1).tolist()
        for last in (False, True)
    }
    some_key = tiles.any(2)

    def split_row(at: int) -> tuple[list[int], list[int], list[int]]:
        full, part, which = cols[ptr[at] : mid[at]], [], []
        for i in range(mid[at], ptr[at + 1]):
            if cols[i] == nk - 1 and short[at % nq == nq - 1][ids[i]]:
                full = [*full, cols[i]]
            else:
                part.append(cols[i])
                which.append(ids[i])
        return full, part, which

    def make(first: int, last: int, full: list[int], part: list[int], which: list[int]) -> Row:
        start, stop = first * bm, min(last * bm, q_len)
        short = bn - ends[1] if full and full[-1] == nk - 1 else 0
        tiles_of = torch.tensor(which, dtype=torch.int64, device=tiles.device)
        holes = not full and not bool(some_key[tiles_of, : stop - start].any(0).all())
        keys = Keys.of(part + full, bn, short, col.device)
        return Row(start, stop, keys, tiles_of if part else None, holes)

    plan = Plan(pattern.tolist(), [], [], ~tiles)
    for p in range(split.numel() // nq):
        rows: list[Row] = []
        empty: list[tuple[int, int]] = []
        r = 0
        while r < nq:
            entry = split_row(p * nq + r)
            after = r + 1
            while after < nq and not entry[1] and split_row(p * nq + after) == entry:
                after += 1
            if entry[0] or entry[1]:
                rows.append(make(r, after, *entry))
            else:
                empty.append((r * bm, min(after * bm, q_len)))
            r = after
        plan.rows.append(rows)
        plan.empty.append(empty)
    return plan


def _by_product(row: Row, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a step is two products and a softmax, or one call of the CPU's flash attention,
    the only one of the two that accumulates a low-precision product in float32."""
    if device.type != "cpu" or dtype == torch.float64:
        return True
    height = row.stop - row.start
    return dtype == torch.float32 and height in _PRODUCT_ROWS and height * row.keys.tokens < _TILE


class Scratch:
    """Memory of one call, reused from step to step: it is touched once and stays in cache, while
    allocating it anew would cost more in page faults than the gather itself."""

    def __init__(self, plan: Plan, block: int, dim: int, dtype: torch.dtype, device: torch.device):
        rows = [row for rows in plan.rows for row in rows]
        blocks = max((r.keys.blocks.numel() for r in rows if r.keys.blocks is not None), default=0)
        scores = max(
            ((r.stop - r.start) * r.keys.tokens for r in rows if _by_product(r, dtype, device)),
            default=0,
        )
        self.keys = torch.empty(blocks, block * dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.flat = torch.empty(scores, dtype=dtype, device=device)
        self.shape = (-1, block * dim)
        self.dim = dim
        self._scores: dict[tuple[int, int], Tensor] = {}
        self._steps: dict[tuple[int, int, int], tuple[Tensor, ...]] = {}
        self._parts: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def scores(self, row: Row) -> Tensor:
        """(queries, tokens) scores of a step."""
        key = (row.stop - row.start, row.keys.tokens)
        if key not in self._scores:
            self._scores[key] = self.flat[: key[0] * key[1]].view(key)
        return self._scores[key]

    def step(self, row: Row) -> tuple[Tensor, ...]:
        """Scores, room for key and value blocks, and those as (D, tokens) and (tokens, D)."""
        assert row.keys.blocks is not None
        key = (row.stop - row.start, row.keys.blocks.numel(), row.keys.tokens)
        if key not in self._steps:
            kept, weighed = self.keys[: key[1]], self.values[: key[1]]
            by_key, by_value = (t.view(-1, self.dim)[: key[2]] for t in (kept, weighed))
            self._steps[key] = (self.scores(row), kept, weighed, by_key.t(), by_value)
        return self._steps[key]

    def gather(self, keys: Keys, source: Tensor, which: int) -> Tensor:
        """(tokens, D) keys (which 0) or values (1) of one head; source is (NK bn, D)."""
        if keys.blocks is None:
            assert keys.start is not None
            return source[keys.start : keys.start + keys.tokens]
        key = (keys.blocks.numel(), keys.tokens)
        if key not in self._parts:
            cut = [t[: key[0]] for t in (self.keys, self.values)]
            self._parts[key] = (*cut, *(t.view(-1, self.dim)[: key[1]] for t in cut))
        parts = self._parts[key]
        torch.index_select(source.view(self.shape), 0, keys.blocks, out=parts[which])
        return parts[2 + which]


def _mask_partial(scores: Tensor, row: Row, plan: Plan) -> None:
    """-inf where the partial blocks, which come first, keep nothing."""
    assert row.partial is not None
    unseen = plan.unseen[row.partial, : row.stop - row.start]
    count, _, block = unseen.shape
    scores[:, : count * block].unflatten(1, (count, block)).masked_fill_(
        unseen.transpose(0, 1), float("-inf")
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
    mask: list[Tensor], dims: list[int], scale: float, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`vtr.kernels.attention.block_sparse_attention` for the contract."""
    plan = plan_of(mask, dims)
    work = q.dtype if q.device.type == "cpu" else torch.promote_types(q.dtype, torch.float32)
    lse_type = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=work, device=q.device)
    lse = torch.empty(q.shape[:3] if need_lse else (0,), dtype=lse_type, device=q.device)
    scratch = Scratch(plan, dims[3], q.shape[3], work, q.device)
    for b, h, p, keys, values in _heads(q, k, v, plan, dims, work):
        query, target = q[b, h].to(work), out[b, h]
        line = lse[b, h] if need_lse else None
        for start, stop in plan.empty[p]:
            target[start:stop] = 0
            if line is not None:
                line[start:stop] = float("-inf")
        blocks = keys.view(scratch.shape), values.view(scratch.shape)
        for row in plan.rows[p]:
            if not _by_product(row, work, q.device):
                _flash(query, keys, values, row, plan, scale, scratch, target, line)
            elif line is not None or row.partial is not None or row.keys.blocks is None:
                _product(query, keys, values, row, plan, scale, scratch, target, line)
            else:
                # The common step without a detour: at low density, where a step takes a third of a
                # millisecond, what Python does in between counts.
                scores, kept, weighed, by_key, by_value = scratch.step(row)
                torch.index_select(blocks[0], 0, row.keys.blocks, out=kept)
                part = query[row.start : row.stop]
                torch.addmm(scores, part, by_key, beta=0, alpha=scale, out=scores)
                torch.softmax(scores, 1, out=scores)
                torch.index_select(blocks[1], 0, row.keys.blocks, out=weighed)
                torch.mm(scores, by_value, out=target[row.start : row.stop])
    return finish(out, row_scale, added, dims[2]).to(q.dtype), lse


def _heads(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, dims: list[int], dtype: torch.dtype
) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
    """Every head with its pattern and its keys and values, padded to whole blocks."""
    group = q.shape[1] // k.shape[1]
    pad = -dims[1] % dims[3]
    for b in range(q.shape[0]):
        line = plan.pattern[b if len(plan.pattern) > 1 else 0]
        for h in range(q.shape[1]):
            if h % group == 0:
                keys, values = (t[b, h // group].to(dtype) for t in (k, v))
                if pad:
                    keys, values = (F.pad(t, (0, 0, 0, pad)) for t in (keys, values))
                keys, values = keys.contiguous(), values.contiguous()
            yield b, h, line[h if len(line) > 1 else 0], keys, values


def _product(
    query: Tensor, keys: Tensor, values: Tensor, row: Row, plan: Plan, scale: float,
    scratch: Scratch, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    """Scores, softmax and weighted sum written out, on a tile that stays in cache."""
    scores = scratch.scores(row)
    found = scratch.gather(row.keys, keys, 0)
    torch.addmm(scores, query[row.start : row.stop], found.t(), beta=0, alpha=scale, out=scores)
    if row.partial is not None:
        _mask_partial(scores, row, plan)
    top = scores.amax(1) if lse is not None or row.holes else None
    torch.softmax(scores, 1, out=scores)
    if top is not None:
        nothing = top == float("-inf")
        if row.holes:
            scores[nothing] = 0
        if lse is not None:
            # The largest weight is exp(top - lse).
            line = top - scores.amax(1).log_()
            lse[row.start : row.stop] = line.masked_fill_(nothing, float("-inf"))
    found = scratch.gather(row.keys, values, 1)
    torch.mm(scores, found, out=out[row.start : row.stop])


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, row: Row, plan: Plan, scale: float,
    scratch: Scratch, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    """The same through the CPU's flash attention."""
    here = slice(row.start, row.stop)
    pair = [scratch.gather(row.keys, t, i)[None, None] for i, t in enumerate((keys, values))]
    bias = None
    if row.partial is not None:
        bias = query.new_zeros(1, 1, row.stop - row.start, row.keys.tokens)
        _mask_partial(bias[0, 0], row, plan)
    found, line = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None, None, here], *pair, attn_mask=bias, scale=scale
    )
    if row.holes and bias is not None:
        nothing = (bias[0, 0] == float("-inf")).all(1)
        found[0, 0, nothing] = 0
        line = line.view(-1).masked_fill(nothing, float("-inf"))
    out[here] = found[0, 0]
    if lse is not None:
        lse[here] = line.reshape(-1)


def backward(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
    mask: list[Tensor], dims: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, tile by tile in float32 (float64 for float64).

    P = softmax(scale q k^T);  dV = P^T dO;  dS = P (dO V^T - delta);  dQ = scale dS K;
    dK = scale dS^T Q. ``delta`` (B, H, Sq) is rowsum(dO O), less the gradient of the LSE.
    """
    plan = plan_of(mask, dims)
    work_type = torch.promote_types(q.dtype, torch.float32)
    block = dims[3]
    group = q.shape[1] // k.shape[1]
    dq = torch.zeros(q.shape, dtype=work_type, device=q.device)
    pad = -dims[1] % block
    shape = (*k.shape[:2], k.shape[2] + pad, k.shape[3])
    dk = torch.zeros(shape, dtype=work_type, device=q.device)
    dv = torch.zeros(shape, dtype=work_type, device=q.device)
    scratch = Scratch(plan, block, q.shape[3], work_type, q.device)
    for b, h, p, keys, values in _heads(q, k, v, plan, dims, work_type):
        dkeys, dvalues = dk[b, h // group], dv[b, h // group]
        for row in plan.rows[p]:
            rows = slice(row.start, row.stop)
            query, grad = q[b, h, rows].to(work_type), dout[b, h, rows].to(work_type)
            found = scratch.gather(row.keys, keys, 0)
            weights = torch.mm(query, found.t()).mul_(scale)
            if row.partial is not None:
                _mask_partial(weights, row, plan)
            # A step holds all keys of its queries, so P is a softmax: on the CPU four times as
            # fast as the exponential by itself.
            torch.softmax(weights, 1, out=weights)
            if row.holes:
                weights[lse[b, h, rows] == float("-inf")] = 0
            value = scratch.gather(row.keys, values, 1)
            slope = torch.mm(grad, value.t()).sub_(delta[b, h, rows, None])
            slope.mul_(weights).mul_(scale)
            torch.mm(slope, found, out=dq[b, h, rows])
            _scatter(dvalues, row.keys, block, torch.mm(weights.t(), grad))
            _scatter(dkeys, row.keys, block, torch.mm(slope.t(), query))
    cut = slice(0, dims[1])
    return dq.to(q.dtype), dk[:, :, cut].to(k.dtype), dv[:, :, cut].to(v.dtype)


def _scatter(target: Tensor, keys: Keys, block: int, values: Tensor) -> None:
    """Adds (tokens, D) values to the blocks they came from."""
    if keys.start is not None:
        target[keys.start : keys.start + keys.tokens] += values
        return
    assert keys.blocks is not None
    count, dim = keys.blocks.numel(), target.shape[1]
    if values.shape[0] < count * block:
        values = F.pad(values, (0, 0, 0, count * block - values.shape[0]))
    target.view(-1, block * dim).index_add_(0, keys.blocks, values.view(count, block * dim))
