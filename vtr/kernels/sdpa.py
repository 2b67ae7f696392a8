"""Block-sparse attention that gathers key blocks: needs no compiler, runs on any device.

The queries of a few blocks against the keys they see is a dense product, so each step gathers
those keys into a small buffer (nothing where they lie in one run) and works on a score tile that
stays in cache. A plan, made once per mask, groups query blocks: neighbours that see the same keys
run as one flash-attention call, neighbours that share many keys multiply those together.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Flash attention on the CPU works on 64 queries at a time from here on, and on 32 below, where the
# products written out are faster.
_FLASH_ROWS = 192
# A score tile of this many elements (8 MiB) no longer profits from being written out.
_TILE = 1 << 21
# Neighbours multiply their shared keys together from this share of the smaller row on.
_PAIR_SHARE = 0.25


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
    """What one query block sees beside what its group shares."""

    start: int  # first and last query token
    stop: int
    own: Keys  # partial blocks, then full blocks (of which the last may be short)
    partial: Tensor | None  # tiles of the partial blocks
    holes: bool  # some queries may see no key at all


@dataclass
class Group:
    """Neighbouring query blocks that are worked on together."""

    rows: list[Row]
    shared: Keys

    @property
    def width(self) -> int:
        return self.shared.tokens + max(row.own.tokens for row in self.rows)

    @property
    def uniform(self) -> bool:
        return all(row.own.tokens == 0 for row in self.rows)


@dataclass
class Plan:
    """Groups per pattern, and what no one sees."""

    pattern: list[list[int]]
    groups: list[list[Group]]
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

    def lacks(full: list[int]) -> int:
        return bn - ends[1] if full and full[-1] == nk - 1 else 0

    def make(first: int, entries: list[tuple[list[int], list[int], list[int]]]) -> Group:
        common = sorted(set.intersection(*(set(full) for full, _, _ in entries)))
        rows = []
        for i, (full, part, which) in enumerate(entries):
            start = (first + i) * bm
            stop = min(start + bm, q_len)
            left = [c for c in full if c not in common] if len(entries) > 1 else []
            own = Keys.of(part + left, bn, lacks(left), col.device)
            tiles_of = torch.tensor(which, dtype=torch.int64, device=tiles.device)
            holes = not full and not bool(some_key[tiles_of, : stop - start].any(0).all())
            rows.append(Row(start, stop, own, tiles_of if part else None, holes))
        return Group(rows, Keys.of(common, bn, lacks(common), col.device))

    plan = Plan(pattern.tolist(), [], [], ~tiles)
    for p in range(split.numel() // nq):
        groups: list[Group] = []
        empty: list[tuple[int, int]] = []
        r = 0
        while r < nq:
            entry = split_row(p * nq + r)
            if not entry[0] and not entry[1]:
                empty.append((r * bm, min((r + 1) * bm, q_len)))
                r += 1
                continue
            same = r + 1
            while same < nq and not entry[1] and split_row(p * nq + same) == entry:
                same += 1
            entries = [entry] * (same - r)
            if same == r + 1 < nq:
                after = split_row(p * nq + same)
                shared = len(set(entry[0]) & set(after[0]))
                if shared and shared >= _PAIR_SHARE * min(len(entry[0]), len(after[0])):
                    entries.append(after)
            groups.append(make(r, entries))
            r += len(entries)
        plan.groups.append(groups)
        plan.empty.append(empty)
    return plan


@dataclass
class Work:
    """Scratch memory of one call: reused from step to step, so it is touched once and stays in
    cache (allocating it anew costs more in page faults than the gather itself)."""

    keys: Tensor
    values: Tensor
    scores: Tensor

    @classmethod
    def of(
        cls, plan: Plan, dims: list[int], dim: int, dtype: torch.dtype, device: torch.device
    ) -> Work:
        groups = [g for groups in plan.groups for g in groups]
        gathered = max((g.width + dims[3] for g in groups), default=0) * dim
        scores = max(
            (_rows(g) * g.width for g in groups if not _by_flash(g, dtype, device)), default=0
        )
        return cls(
            torch.empty(gathered, dtype=dtype, device=device),
            torch.empty(gathered, dtype=dtype, device=device),
            torch.empty(scores, dtype=dtype, device=device),
        )


def _rows(group: Group) -> int:
    return group.rows[-1].stop - group.rows[0].start


def _by_flash(group: Group, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a group is one call of the CPU's flash attention, which is the faster way for many
    rows, and the only one that accumulates a low-precision product in float32."""
    if device.type != "cpu" or dtype == torch.float64:
        return False
    if dtype != torch.float32:
        return True
    rows = _rows(group)
    return group.uniform and (rows >= _FLASH_ROWS or rows * group.width > _TILE)


def _gather(source: Tensor, keys: Keys, block: int, buffer: Tensor) -> Tensor:
    """(tokens, D) keys or values of one head; ``source`` is (NK bn, D), contiguous."""
    if keys.start is not None:
        return source[keys.start : keys.start + keys.tokens]
    assert keys.blocks is not None
    dim = source.shape[1]
    count = keys.blocks.numel()
    out = buffer[: count * block * dim].view(count, block * dim)
    torch.index_select(source.view(-1, block * dim), 0, keys.blocks, out=out)
    return out.view(-1, dim)[: keys.tokens]


def _mask_partial(scores: Tensor, row: Row, plan: Plan) -> None:
    """-inf where the partial blocks, which come first, keep nothing."""
    assert row.partial is not None
    unseen = plan.unseen[row.partial, : row.stop - row.start]
    count, _, block = unseen.shape
    scores[:, : count * block].unflatten(1, (count, block)).masked_fill_(
        unseen.transpose(0, 1), float("-inf")
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_scale: Tensor | None,
    mask: list[Tensor],
    dims: list[int],
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`vtr.kernels.attention.block_sparse_attention` for the contract."""
    plan = plan_of(mask, dims)
    work_type = q.dtype if q.device.type == "cpu" else torch.promote_types(q.dtype, torch.float32)
    lse_type = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=work_type, device=q.device)
    lse = torch.empty(q.shape[:3] if need_lse else (0,), dtype=lse_type, device=q.device)
    work = Work.of(plan, dims, q.shape[3], work_type, q.device)
    for b, h, p, keys, values in _heads(q, k, v, plan, dims, work_type):
        line = lse[b, h] if need_lse else None
        for start, stop in plan.empty[p]:
            out[b, h, start:stop] = 0
            if line is not None:
                line[start:stop] = float("-inf")
        query = q[b, h].to(work_type)
        for group in plan.groups[p]:
            step = _flash if _by_flash(group, work_type, q.device) else _product
            step(query, keys, values, group, plan, dims[3], scale, work, out[b, h], line)
    if row_scale is not None:
        out *= row_scale.unsqueeze(-1)
    return out.to(q.dtype), lse


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
                keys, values = (
                    torch.nn.functional.pad(t[b, h // group].to(dtype), (0, 0, 0, pad)).contiguous()
                    for t in (k, v)
                )
            yield b, h, line[h if len(line) > 1 else 0], keys, values


def _product(
    query: Tensor, keys: Tensor, values: Tensor, group: Group, plan: Plan, block: int,
    scale: float, work: Work, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    """Scores, softmax and weighted sum written out, on a tile that stays in cache."""
    first, last = group.rows[0].start, group.rows[-1].stop
    shared, width = group.shared, group.width
    scores = work.scores[: (last - first) * width].view(last - first, width)
    target = out[first:last]
    if shared.tokens:
        part = scores[:, : shared.tokens]
        found = _gather(keys, shared, block, work.keys)
        torch.addmm(part, query[first:last], found.t(), beta=0, alpha=scale, out=part)
    for row in group.rows:
        part = scores[row.start - first : row.stop - first, shared.tokens :]
        if row.own.tokens:
            mine = part[:, : row.own.tokens]
            found = _gather(keys, row.own, block, work.keys)
            torch.addmm(mine, query[row.start : row.stop], found.t(), beta=0, alpha=scale, out=mine)
            if row.partial is not None:
                _mask_partial(mine, row, plan)
        if row.own.tokens < part.shape[1]:
            part[:, row.own.tokens :] = float("-inf")
    holes = any(row.holes for row in group.rows)
    top = scores.amax(1) if lse is not None or holes else None
    torch.softmax(scores, 1, out=scores)
    if top is not None:
        nothing = top == float("-inf")
        if holes:
            scores[nothing] = 0
        if lse is not None:
            # The largest weight is exp(top - lse).
            line = top - scores.amax(1).log_()
            lse[first:last] = line.masked_fill_(nothing, float("-inf")) if holes else line
    if shared.tokens:
        found = _gather(values, shared, block, work.values)
        torch.mm(scores[:, : shared.tokens], found, out=target)
    for row in group.rows:
        here = out[row.start : row.stop]
        if row.own.tokens:
            part = scores[row.start - first : row.stop - first, shared.tokens :]
            found = _gather(values, row.own, block, work.values)
            torch.addmm(
                here, part[:, : row.own.tokens], found, beta=int(shared.tokens > 0), out=here
            )


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, group: Group, plan: Plan, block: int,
    scale: float, work: Work, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    """The same through the CPU's flash attention: a uniform group at once, else row by row."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    dim = query.shape[1]
    if group.uniform:
        spans = [(group.rows[0].start, group.rows[-1].stop, group.rows[0])]
    else:
        spans = [(row.start, row.stop, row) for row in group.rows]
    for start, stop, row in spans:
        pair = []
        for source, buffer in ((keys, work.keys), (values, work.values)):
            parts = [
                _gather(source, part, block, space)
                for part, space in (
                    (row.own, buffer),
                    (group.shared, buffer[_space(row.own, block) * dim :]),
                )
                if part.tokens
            ]
            pair.append((parts[0] if len(parts) == 1 else torch.cat(parts))[None, None])
        bias = None
        if row.partial is not None:
            bias = query.new_zeros(1, 1, stop - start, pair[0].shape[2])
            _mask_partial(bias[0, 0], row, plan)
        found, line = flash(query[None, None, start:stop], *pair, attn_mask=bias, scale=scale)
        if row.holes:
            assert bias is not None
            nothing = (bias[0, 0] == float("-inf")).all(1)
            found[0, 0, nothing] = 0
            line = line.view(-1).masked_fill(nothing, float("-inf"))
        out[start:stop] = found[0, 0]
        if lse is not None:
            lse[start:stop] = line.reshape(-1)


def _space(keys: Keys, block: int) -> int:
    return 0 if keys.blocks is None else keys.blocks.numel() * block


def backward(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
    mask: list[Tensor], dims: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, tile by tile in float32 (float64 for float64).

    P = exp(scale q k^T - lse);  dV = P^T dO;  dS = P (dO V^T - delta);  dQ = scale dS K;
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
    work = Work.of(plan, dims, q.shape[3], work_type, q.device)
    for b, h, p, keys, values in _heads(q, k, v, plan, dims, work_type):
        dkeys, dvalues = dk[b, h // group], dv[b, h // group]
        for g in plan.groups[p]:
            for row in g.rows:
                rows = slice(row.start, row.stop)
                query, grad = q[b, h, rows].to(work_type), dout[b, h, rows].to(work_type)
                line = lse[b, h, rows, None]
                line = line.masked_fill(line == float("-inf"), float("inf"))
                for part, masked in ((row.own, row.partial is not None), (g.shared, False)):
                    if not part.tokens:
                        continue
                    found = _gather(keys, part, block, work.keys)
                    scores = torch.mm(query, found.t()).mul_(scale)
                    if masked:
                        _mask_partial(scores, row, plan)
                    weights = scores.sub_(line).exp_()
                    value = _gather(values, part, block, work.values)
                    inner = torch.mm(grad, value.t()).sub_(delta[b, h, rows, None])
                    inner.mul_(weights).mul_(scale)
                    dq[b, h, rows].addmm_(inner, found)
                    _scatter(dvalues, part, block, torch.mm(weights.t(), grad))
                    _scatter(dkeys, part, block, torch.mm(inner.t(), query))
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
        values = torch.nn.functional.pad(values, (0, 0, 0, count * block - values.shape[0]))
    target.view(-1, block * dim).index_add_(0, keys.blocks, values.view(count, block * dim))
