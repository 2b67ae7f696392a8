"""Block-sparse attention that gathers key blocks: needs no compiler, runs on any device.

The queries of a block against the keys they see are a dense product, so each step gathers those
keys into a small buffer (not if they are one run of tokens) and works on a score tile that stays
in cache. A plan, computed once per mask, lists the keys of each step; neighbouring query blocks that
see the same keys share a step.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.compat.torch import cpu_flash
from vtr.kernels import product, sdpa_small
from vtr.kernels.epilogue import finish

# With oneDNN, all steps are written out, in tiles of at most this many scores (8 MiB).
_ONEDNN_TILE = 1 << 21
# Otherwise steps between these numbers of queries: below 192 the CPU's flash attention takes 32 at
# a time and loses a tenth of its speed by that.
_PRODUCT_ROWS = range(96, 192)
# A tile of this many scores (4 MiB) or more no longer profits from being written out then.
_TILE = 1 << 20
# Flash attention is a quarter slower with a mask: masked keys are computed apart if there are so many others.
_APART = 512


@dataclass
class Keys:
    """Key blocks of a step: a run of tokens, or blocks to gather."""

    tokens: int
    start: int | None  # first token of a run, None: gather
    blocks: Tensor | None

    @classmethod
    def of(cls, columns: list[int], block: int, short: int) -> Keys:
        """``short``: how many tokens the last of these blocks lacks."""
        tokens = len(columns) * block - short
        if all(b - a == 1 for a, b in itertools.pairwise(columns)):
            return cls(tokens, columns[0] * block if columns else 0, None)
        return cls(tokens, None, torch.tensor(columns, dtype=torch.int64, device="cpu"))


@dataclass
class QueryStep:
    """One step: some neighbouring queries that see the same keys."""

    start: int  # first and last query token
    stop: int
    keys: Keys  # partial blocks, then full blocks (of which the last may be short)
    partial: Tensor | None  # tiles of the partial blocks
    holes: bool  # some queries may see no key at all
    tiles: tuple[int, ...] = ()  # the same tiles as numbers


@dataclass
class StepPlan:
    """Steps per pattern, and the queries that see nothing."""

    pattern: list[list[int]]
    rows: list[list[QueryStep]]
    empty: list[list[tuple[int, int]]]
    unseen: Tensor = field(repr=False)  # (T, bm, bn) bool, True: masked


_plans: dict[int, StepPlan] = {}


def plan_of(mask: list[Tensor], dims: list[int]) -> StepPlan:
    """The plan of a mask (its tensors and [q_len, k_len, bm, bn]), made on first use."""
    ident = mask[6]
    key = int(ident)
    if key not in _plans:
        _plans[key] = _make_plan(mask, dims)
        weakref.finalize(ident, _plans.pop, key, None)
    return _plans[key]


def _make_plan(mask: list[Tensor], dims: list[int]) -> StepPlan:
    pattern, row_ptr, split, col, tile, tiles = mask[:6]
    q_len, k_len, bm, bn = dims
    nq, nk = -(-q_len // bm), -(-k_len // bn)
    # Two reads from the device and, at the end, one copy to it, for any number of rows.
    index = (row_ptr, split, col, tile, pattern.flatten())
    sizes = [t.numel() for t in index]
    ptr, mid, cols, ids, of = (t.tolist() for t in torch.cat(index).cpu().split(sizes))
    heads = pattern.shape[1]
    ends = (q_len - (nq - 1) * bm, k_len - (nk - 1) * bn)
    # Partial only because the keys end there: full as far as it goes.
    reach = [tiles[:, :height, : ends[1]].flatten(1).all(1) for height in (bm, ends[0])]
    facts = torch.cat([torch.stack(reach, 1), tiles.any(2)], 1).cpu()
    short = {last: facts[:, int(last)].tolist() for last in (False, True)}
    some_key = facts[:, 2:]

    def split_row(at: int) -> tuple[list[int], list[int], list[int]]:
        full, part, which = cols[ptr[at] : mid[at]], [], []
        for i in range(mid[at], ptr[at + 1]):
            if cols[i] == nk - 1 and short[at % nq == nq - 1][ids[i]]:
                full = [*full, cols[i]]
            else:
                part.append(cols[i])
                which.append(ids[i])
        return full, part, which

    def make(
        first: int, last: int, full: list[int], part: list[int], which: list[int]
    ) -> QueryStep:
        start, stop = first * bm, min(last * bm, q_len)
        short = bn - ends[1] if full and full[-1] == nk - 1 else 0
        tiles_of = torch.tensor(which, dtype=torch.int64, device="cpu")
        holes = not full and not bool(some_key[tiles_of, : stop - start].any(0).all())
        keys = Keys.of(part + full, bn, short)
        return QueryStep(start, stop, keys, tiles_of if part else None, holes, tuple(which))

    plan = StepPlan([of[i : i + heads] for i in range(0, len(of), heads)], [], [], ~tiles)
    for p in range(split.numel() // nq):
        rows: list[QueryStep] = []
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
    _move([row for rows in plan.rows for row in rows], col.device)
    return plan


def _move(rows: list[QueryStep], device: torch.device) -> None:
    """Copy the rows' indices to the device, all at once."""
    places: list[tuple[QueryStep | Keys, str, Tensor]] = []
    for row in rows:
        if row.partial is not None:
            places.append((row, "partial", row.partial))
        if row.keys.blocks is not None:
            places.append((row.keys, "blocks", row.keys.blocks))
    if places and device.type != "cpu":
        held = [index for *_, index in places]
        moved = torch.cat(held).to(device).split([len(index) for index in held])
        for (owner, name, _), index in zip(places, moved, strict=True):
            setattr(owner, name, index)


class Scratch:
    """The way in which the steps of one call are computed, and their memory. It is reused from step
    to step, so that it stays in cache; new allocations would cost more in page faults than the
    gather itself."""

    def __init__(
        self, plan: StepPlan, block: int, dim: int, dtype: torch.dtype, device: torch.device
    ):
        self.onednn = product.has_onednn(dtype, device)
        self.flash = device.type == "cpu" and dtype != torch.float64 and not self.onednn
        self.exact = dtype == torch.float32  # flash alone accumulates half products in float32
        self.dim = dim
        rows = [row for rows in plan.rows for row in rows]
        blocks = max((r.keys.blocks.numel() for r in rows if r.keys.blocks is not None), default=0)
        scores = max((self._written(r) for r in rows), default=0)
        self.keys = torch.empty(blocks, block * dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.flat = torch.empty(scores, dtype=dtype, device=device)
        self.shape = (-1, block * dim)
        self._scores: dict[tuple[int, int], Tensor] = {}
        self._parts: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._steps: dict[tuple[int, int, int], tuple[Tensor, ...]] = {}
        self._bias: tuple[Any, Tensor, Tensor | None] | None = None

    def by_flash(self, row: QueryStep) -> bool:
        """Tell whether a step calls the CPU's flash attention, or does two products and a softmax."""
        if not self.flash:
            return False
        height = row.stop - row.start
        return not (self.exact and height in _PRODUCT_ROWS and height * row.keys.tokens < _TILE)

    def _written(self, row: QueryStep) -> int:
        """Scores of the largest tile that needs memory here: oneDNN has its own, but is not used
        for small tiles, and the last tile of any step may be small."""
        scores = (row.stop - row.start) * row.keys.tokens
        if self.onednn:
            return min(scores, product.LEAST // self.dim)
        return 0 if self.by_flash(row) else scores

    def height(self, row: QueryStep) -> int:
        """Queries of a tile of scores."""
        most = _ONEDNN_TILE // max(1, row.keys.tokens) if self.onednn else row.stop - row.start
        return max(1, min(row.stop - row.start, most))

    def step(self, row: QueryStep) -> tuple[Tensor, ...]:
        """Memory of a step with gathered keys: its scores, its key and value blocks, and these as
        (D, tokens) and (tokens, D)."""
        assert row.keys.blocks is not None
        key = (row.stop - row.start, row.keys.blocks.numel(), row.keys.tokens)
        if key not in self._steps:
            kept, weighed, by_key, by_value = self._part(row.keys)
            self._steps[key] = (self._room(key[0], key[2]), kept, weighed, by_key.t(), by_value)
        return self._steps[key]

    def times(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply a (M, K) by the transpose of b (N, K)."""
        if self.onednn and a.shape[0] * b.shape[0] * a.shape[1] >= product.LEAST:
            return product.onednn(a, b)
        return torch.mm(a, b.t())

    def scores(self, query: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Compute (queries, tokens) scaled scores; overwrites those of the step before."""
        shape = (query.shape[0], keys.shape[0])
        if self.onednn and shape[0] * shape[1] * self.dim >= product.LEAST:
            return product.onednn(query * scale, keys)
        scores = self._room(*shape)
        return torch.addmm(scores, query, keys.t(), beta=0, alpha=scale, out=scores)

    def weigh(self, weights: Tensor, values: Tensor, out: Tensor) -> None:
        """Compute out = weights (queries, tokens) times values (tokens, D)."""
        if self.onednn and weights.numel() * self.dim >= product.LEAST:
            out.copy_(product.onednn(weights, values.t()))
        else:
            torch.mm(weights, values, out=out)

    def gather(self, keys: Keys, source: Tensor, which: int) -> Tensor:
        """Gather (tokens, D) keys (which 0) or values (1) of one head; source is (NK bn, D)."""
        if keys.blocks is None:
            assert keys.start is not None
            return source[keys.start : keys.start + keys.tokens]
        parts = self._part(keys)
        torch.index_select(source.view(self.shape), 0, keys.blocks, out=parts[which])
        return parts[2 + which]

    def bias(
        self, row: QueryStep, plan: StepPlan, heads: int, tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        """The bias (1, 1, heads * queries, tokens) that masks the partial blocks of a step, and which
        of these queries see nothing in it, None if all see something. Causal masks have the same one in
        nearly all steps: the last is kept."""
        key = (row.tiles, row.stop - row.start, heads, tokens)
        if self._bias is None or self._bias[0] != key:
            bias = self.keys.new_zeros(row.stop - row.start, tokens)
            _mask_partial(bias, row, plan)
            nothing = None
            if row.holes or tokens < row.keys.tokens:
                nothing = (bias == float("-inf")).all(1)
                nothing = nothing.repeat(heads) if bool(nothing.any()) else None
            bias = bias.repeat(heads, 1) if heads > 1 else bias
            self._bias = key, bias[None, None], nothing
        return self._bias[1:]

    def _part(self, keys: Keys) -> tuple[Tensor, ...]:
        """Memory for key and value blocks, and these as (tokens, D)."""
        assert keys.blocks is not None
        key = (keys.blocks.numel(), keys.tokens)
        if key not in self._parts:
            cut = [t[: key[0]] for t in (self.keys, self.values)]
            self._parts[key] = (*cut, *(t.view(-1, self.dim)[: key[1]] for t in cut))
        return self._parts[key]

    def _room(self, queries: int, tokens: int) -> Tensor:
        if (queries, tokens) not in self._scores:
            self._scores[queries, tokens] = self.flat[: queries * tokens].view(queries, tokens)
        return self._scores[queries, tokens]


def _mask_partial(scores: Tensor, row: QueryStep, plan: StepPlan, first: int = 0) -> None:
    """Set scores to -inf for the pairs that the partial blocks, which come first, do not keep;
    ``first``: the first query of the scores in the row."""
    assert row.partial is not None
    unseen = plan.unseen[row.partial, first : first + scores.shape[0]]
    count, _, block = unseen.shape
    scores[:, : count * block].unflatten(1, (count, block)).masked_fill_(
        unseen.transpose(0, 1), float("-inf")
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None,
    mask: list[Tensor], dims: list[int], scale: float, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`vtr.kernels.attention.block_sparse_attention` for the contract."""
    columns = sdpa_small.columns_of(mask, dims)
    if columns is not None:
        out, lse = sdpa_small.forward(q, k, v, mask[0], columns, dims, scale)
        lse = lse if need_lse else lse.new_empty(0)
        return finish(out, row_scale, added, dims[2]).to(q.dtype), lse
    plan = plan_of(mask, dims)
    lse_type = torch.promote_types(q.dtype, torch.float32)
    flash = q.device.type == "cpu" and not product.gains(q.dtype, q.device)
    work = q.dtype if flash else lse_type
    out = torch.empty(q.shape, dtype=work, device=q.device)
    lse = torch.empty(q.shape[:3] if need_lse else (0,), dtype=lse_type, device=q.device)
    scratch = Scratch(plan, dims[3], q.shape[3], work, q.device)
    stack = flash and product.stacks(work, q.device)
    for b, heads, p, keys, values in _heads(q, k, v, plan, dims, work, stack):
        query, target = q[b, heads].to(work), out[b, heads]
        line = lse[b, heads] if need_lse else None
        for start, stop in plan.empty[p]:
            target[:, start:stop] = 0
            if line is not None:
                line[:, start:stop] = float("-inf")
        blocks = keys.view(scratch.shape), values.view(scratch.shape)
        plain = line is None and not scratch.onednn
        for row in plan.rows[p]:
            if scratch.by_flash(row):
                _flash(query, keys, values, row, plan, scale, scratch, target, line)
            elif not plain or row.partial is not None or row.keys.blocks is None:
                own = None if line is None else line[0]
                _product(query[0], keys, values, row, plan, scale, scratch, target[0], own)
            else:
                # _product without a detour: at low density, where a step takes a third of a
                # millisecond, what Python does in between counts.
                scores, kept, weighed, by_key, by_value = scratch.step(row)
                torch.index_select(blocks[0], 0, row.keys.blocks, out=kept)
                part = query[0, row.start : row.stop]
                torch.addmm(scores, part, by_key, beta=0, alpha=scale, out=scores)
                torch.softmax(scores, 1, out=scores)
                torch.index_select(blocks[1], 0, row.keys.blocks, out=weighed)
                torch.mm(scores, by_value, out=target[0, row.start : row.stop])
    return finish(out, row_scale, added, dims[2]).to(q.dtype), lse


def _heads(
    q: Tensor, k: Tensor, v: Tensor, plan: StepPlan, dims: list[int], dtype: torch.dtype, stack: bool
) -> Iterator[tuple[int, slice, int, Tensor, Tensor]]:  # fmt: skip
    """Yield every head, or with ``stack`` neighbours of one key head that share a pattern, with the
    pattern and with keys and values, padded to whole blocks."""
    group = q.shape[1] // k.shape[1]
    pad = -dims[1] % dims[3]
    for b in range(q.shape[0]):
        line = plan.pattern[b if len(plan.pattern) > 1 else 0]
        if len(line) == 1:
            line = line * q.shape[1]
        for kv in range(k.shape[1]):
            keys, values = (t[b, kv].to(dtype) for t in (k, v))
            if pad:
                keys, values = (F.pad(t, (0, 0, 0, pad)) for t in (keys, values))
            keys, values = keys.contiguous(), values.contiguous()
            h, last = kv * group, (kv + 1) * group
            while h < last:
                after = h + 1
                while stack and after < last and line[after] == line[h]:
                    after += 1
                yield b, slice(h, after), line[h], keys, values
                h = after


def _product(
    query: Tensor, keys: Tensor, values: Tensor, row: QueryStep, plan: StepPlan, scale: float,
    scratch: Scratch, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    """Compute scores, softmax and weighted sum one by one, on tiles that stay in cache."""
    key, value = scratch.gather(row.keys, keys, 0), None
    height = scratch.height(row)
    for start in range(row.start, row.stop, height):
        here = slice(start, min(start + height, row.stop))
        scores = scratch.scores(query[here], key, scale)
        if row.partial is not None:
            _mask_partial(scores, row, plan, start - row.start)
        top = scores.amax(1) if lse is not None or row.holes else None
        torch.softmax(scores, 1, out=scores)
        if top is not None:
            nothing = top == float("-inf")
            if row.holes:
                scores[nothing] = 0
            if lse is not None:
                # The largest weight is exp(top - lse).
                line = top - scores.amax(1).log_()
                lse[here] = line.masked_fill_(nothing, float("-inf"))
        if value is None:
            value = scratch.gather(row.keys, values, 1)
        scratch.weigh(scores, value, out[here])


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, row: QueryStep, plan: StepPlan, scale: float,
    scratch: Scratch, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    """Compute the same through the CPU's flash attention.

    ``query`` and ``out`` (G, S, D), ``lse`` (G, S): heads that share keys and pattern are computed as more
    queries of one head, since flash attention prepares keys and values anew in every call.
    """
    here = slice(row.start, row.stop)
    stacked = query[:, here].reshape(1, 1, -1, query.shape[2])
    key, value = (scratch.gather(row.keys, t, i)[None, None] for i, t in enumerate((keys, values)))
    if row.partial is None:
        found, line = cpu_flash(stacked, key, value, None, scale)
    else:
        block = plan.unseen.shape[2]
        cut = row.partial.numel() * block
        if scratch.exact or row.keys.tokens - cut < _APART:
            cut = row.keys.tokens
        bias, nothing = scratch.bias(row, plan, len(query), cut)
        found, line = cpu_flash(stacked, key[:, :, :cut], value[:, :, :cut], bias, scale)
        if nothing is not None:
            found[0, 0, nothing] = 0
            line = line.view(-1).masked_fill(nothing, float("-inf"))
        if cut < row.keys.tokens:
            rest = cpu_flash(stacked, key[:, :, cut:], value[:, :, cut:], None, scale)
            found, line = _joined((found, line), rest)
    out[:, here] = found[0, 0].view(len(query), -1, query.shape[2])
    if lse is not None:
        lse[:, here] = line.reshape(len(query), -1)


def _joined(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from that over some keys and over the others, each (1, 1, N, D) with its LSE;
    every query sees some of the others."""
    share = torch.sigmoid(one[1].reshape(-1) - other[1].reshape(-1))
    joined = torch.lerp(other[0].float(), one[0].float(), share[None, None, :, None])
    return joined, torch.logaddexp(one[1].reshape(-1), other[1].reshape(-1))


def backward(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
    mask: list[Tensor], dims: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute gradients of q, k and v, tile by tile in float32 (float64 for float64).

    P = softmax(scale q k^T);  dV = P^T dO;  dS = P (dO V^T - delta);  dQ = scale dS K;
    dK = scale dS^T Q. ``delta`` (B, H, Sq) is rowsum(dO O), less the gradient of the LSE.
    """
    columns = sdpa_small.columns_of(mask, dims)
    if columns is not None:
        return sdpa_small.backward(dout, delta, q, k, v, mask[0], columns, dims, scale)
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
    for b, heads, p, keys, values in _heads(q, k, v, plan, dims, work_type, False):
        h = heads.start
        dkeys, dvalues = dk[b, h // group], dv[b, h // group]
        for row in plan.rows[p]:
            rows = slice(row.start, row.stop)
            query, grad = q[b, h, rows].to(work_type), dout[b, h, rows].to(work_type)
            found = scratch.gather(row.keys, keys, 0)
            weights = scratch.times(query, found).mul_(scale)
            if row.partial is not None:
                _mask_partial(weights, row, plan)
            # A step holds all keys of its queries, so P is a softmax: on the CPU four times as
            # fast as the exponential by itself.
            torch.softmax(weights, 1, out=weights)
            if row.holes:
                weights[lse[b, h, rows] == float("-inf")] = 0
            value = scratch.gather(row.keys, values, 1)
            slope = scratch.times(grad, value).sub_(delta[b, h, rows, None])
            slope.mul_(weights).mul_(scale)
            dq[b, h, rows] = scratch.times(slope, found.t())
            _scatter(dvalues, row.keys, block, scratch.times(weights.t(), grad.t()))
            _scatter(dkeys, row.keys, block, scratch.times(slope.t(), query.t()))
    cut = slice(0, dims[1])
    return dq.to(q.dtype), dk[:, :, cut].to(k.dtype), dv[:, :, cut].to(v.dtype)


def _scatter(target: Tensor, keys: Keys, block: int, values: Tensor) -> None:
    """Add (tokens, D) values to the blocks they came from."""
    if keys.start is not None:
        target[keys.start : keys.start + keys.tokens] += values
        return
    assert keys.blocks is not None
    count, dim = keys.blocks.numel(), target.shape[1]
    if values.shape[0] < count * block:
        values = F.pad(values, (0, 0, 0, count * block - values.shape[0]))
    target.view(-1, block * dim).index_add_(0, keys.blocks, values.view(count, block * dim))
