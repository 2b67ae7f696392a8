"""Anchors and stripes of AnchorAttention (arXiv 2505.23520), on q, k and v without a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.stopwatch import Stopwatch
from vtr.kernels import BlockMask, block_sparse_attention, merge_states, pool_blocks
from vtr.kernels.masks import causal_blocks
from vtr.kernels.precision import full_precision
from vtr.methods.common.pictures import blocks_of, note_blocks

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite

# Scores that are held at a time: they stay in a cache of the CPU, and fill a GPU.
SCORES = {"cpu": 1 << 21, "cuda": 1 << 26}
# Key tokens times channels that are gathered at a time (256 MiB of bfloat16).
GATHERED = 1 << 27


@dataclass(frozen=True)
class Anchors:
    """The keys that a row always attends to: the first blocks, and the local window of its group.

    Row i is column ``offset + i``. Groups of rows start at row 0. The local window of a group starts
    at the key block that holds the group's first column, and ends at the row.

    Attributes:
        rows, keys: numbers of query rows L and of keys S.
        block: tokens of a block of rows or keys.
        group: rows of a group, a multiple of ``block``.
        first: tokens at the start of the sequence that every row attends to, a multiple of ``block``.
        window: of a sliding-window layer, or None.
    """

    rows: int
    keys: int
    block: int
    group: int
    first: int
    window: int | None = None

    @property
    def offset(self) -> int:
        return self.keys - self.rows

    @property
    def local(self) -> int:
        """First column of the local window of group 0."""
        return self.offset // self.block * self.block

    @property
    def groups(self) -> int:
        return -(-self.rows // self.group)

    def blocks(self, device: torch.device) -> Tensor:
        """(1, 1, NQ, NK) bool: the blocks of keys that hold the anchor of each block of rows, and
        later ones, which causality takes away."""
        i = torch.arange(-(-self.rows // self.block), device=device)[:, None]
        j = torch.arange(-(-self.keys // self.block), device=device)
        start = self.local + i * self.block // self.group * self.group
        return ((j * self.block < self.first) | (j * self.block >= start))[None, None]

    def numbers(self, device: torch.device) -> Tensor:
        """Count the anchor keys that each row sees, (L,) int64."""
        row = torch.arange(self.rows, device=device)
        place, start = row + self.offset, self.local + row // self.group * self.group
        least = torch.zeros_like(row) if self.window is None else (place - self.window + 1).clamp(0)
        own = place - torch.maximum(start, least) + 1
        return own + (start.clamp(max=self.first) - least).clamp(0)


def anchored_attention(
    site: LanguageAttentionSite, anchors: Anchors, theta: float, heads: int, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute attention to the anchors and the stripes, each pair once.

    Args:
        site: without padding.
        theta, heads: as in :func:`stripe_keys`.
        counted: (B, L) bool, the rows whose pairs are counted.

    Returns:
        (B, H, L, D) in the dtype of q; and the number of pairs, mean of the heads, () float64.
    """
    q, k, v = site.q, site.k, site.v
    mask = causal_blocks(
        anchors.blocks(q.device), q_len=anchors.rows, k_len=anchors.keys, block=anchors.block,
        window=site.window,
    )  # fmt: skip
    options: dict[str, Any] = {"scale": site.scale, "backend": site.backend}
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, **options)
    pairs = (anchors.numbers(q.device) * counted).sum().double()
    pieces, done, seen = [], 0, []
    for first, kept in _found(site, anchors, theta, heads):
        seen.append(_seen(kept, anchors))
        pairs = pairs + stripe_pairs(kept, first, anchors, counted)
        for rows, part, line in stripe_attention(q, k, v, kept, first, anchors, **options):
            joined = merge_states(out[:, :, rows], lse[:, :, rows], part, line)[0]
            pieces += [out[:, :, done : rows.start], joined]
            done = rows.stop
    blocks = torch.cat(seen, 2).repeat_interleave(anchors.group // anchors.block, 2)
    blocks = blocks[:, :, : -(-anchors.rows // anchors.block)] | anchors.blocks(q.device)
    note_blocks(site, blocks, counted, anchors.block)
    return torch.cat([*pieces, out[:, :, done:]], 2), pairs


def _seen(kept: Tensor, anchors: Anchors) -> Tensor:
    """Tell which blocks of all keys hold a stripe, (B, heads, n, NK)."""
    return blocks_of(F.pad(kept, (0, anchors.keys - kept.shape[3])), anchors.block)


def _found(
    site: LanguageAttentionSite, anchors: Anchors, theta: float, heads: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield the stripes of some groups at a time, and note what finding them takes."""
    q, k, scale = site.q, site.k, site.scale
    blocks = -(-anchors.rows // anchors.block)
    products = anchors.rows * (anchors.group / 2 + anchors.first) + blocks * anchors.keys
    site.spend(2.0 * q.shape[1] * q.shape[3] * products)
    watch = Stopwatch(site.notes, "finding", q.device)
    with watch, torch.no_grad():
        search = stripe_keys(q, k, row_maxima(q, k, anchors, scale), anchors, scale, theta, heads)
        found = next(search, None)
    while found is not None:
        yield found
        with watch, torch.no_grad():
            found = next(search, None)


def row_maxima(q: Tensor, k: Tensor, anchors: Anchors, scale: float) -> Tensor:
    """Compute the largest scaled score of each row among its anchor keys.

    Products are computed in the dtype of q, as in the authors' kernel.

    Args:
        q: (B, H, L, D). k: (B, Hk, S, D), H a multiple of Hk.

    Returns:
        (B, H, L) float32.
    """
    (batch, heads, rows, dim), kv = q.shape, k.shape[1]
    block, group, count = anchors.block, anchors.group, anchors.groups
    shift = anchors.offset - anchors.local
    device = q.device
    query = F.pad(q * scale, (0, 0, 0, count * group - rows))
    query = query.view(batch, kv, heads // kv, count, group, dim)
    own = k[:, :, anchors.local :]
    own = F.pad(own, (0, 0, 0, count * group + block - own.shape[2])).unfold(
        2, group + block, group
    )
    first = k[:, :, None, : anchors.first].transpose(-1, -2)
    inside = torch.arange(block, device=device)[:, None]
    found = torch.empty(batch, kv, count, heads // kv, group, device=device)
    width = batch * heads * block * (group + block + anchors.first)
    step = max(1, SCORES.get(device.type, SCORES["cpu"]) // width)
    for a in range(0, count, step):
        b = min(count, a + step)
        for r in range(0, group, block):
            part = query[:, :, :, a:b, r : r + block].transpose(2, 3).flatten(3, 4)
            stop = shift + r + block
            with full_precision(device):
                local = (part @ own[:, :, a:b, :, :stop]).unflatten(3, (-1, block))
                early = (part @ first).unflatten(3, (-1, block))
            place = inside + shift + r  # of the rows, counted from the start of the local window
            local.masked_fill_(_hidden(place, stop, anchors.window), float("-inf"))
            place = (
                place + (anchors.local + torch.arange(a, b, device=device) * group)[:, None, None]
            )
            hidden = _hidden(place, first.shape[-1], anchors.window)
            early.masked_fill_(hidden[:, None], float("-inf"))
            top = local.amax(-1)
            if early.shape[-1]:
                top = torch.maximum(top, early.amax(-1))
            found[:, :, a:b, :, r : r + block] = top
    return found.transpose(2, 3).reshape(batch, heads, -1)[:, :, :rows]


def _hidden(place: Tensor, keys: int, window: int | None) -> Tensor:
    """Tell which of the first ``keys`` keys a row at ``place`` (..., 1) does not see."""
    key = torch.arange(keys, device=place.device)
    hidden = key > place
    return hidden if window is None else hidden | (key <= place - window)


def stripe_keys(
    q: Tensor, k: Tensor, maxima: Tensor, anchors: Anchors, scale: float, theta: float, heads: int
) -> Iterator[tuple[int, Tensor]]:
    """Find the stripes of each group: the keys between the first blocks and the local window whose
    score for a pooled block of rows is at most ``theta`` below the block's mean anchor maximum.

    Args:
        q: (B, H, L, D). k: (B, Hk, S, D). maxima: (B, H, L), from :func:`row_maxima`.
        theta: in units of the scaled scores; inf keeps every key, -inf none.
        heads: H for stripes per query head; Hk for the union over the query heads of a KV head.

    Yields:
        The first group of a run of n groups, and (B, heads, n, columns) bool: the keys of each.
    """
    batch, kv = q.shape[0], k.shape[1]
    per, count = anchors.group // anchors.block, anchors.groups
    device = q.device
    pooled = pool_blocks(q, anchors.block).unflatten(1, (kv, -1)) * scale
    bar = pool_blocks(maxima[..., None], anchors.block)[..., 0].unflatten(1, (kv, -1)) - theta
    missing = count * per - bar.shape[-1]
    pooled, bar = F.pad(pooled, (0, 0, 0, missing)), F.pad(bar, (0, missing), value=float("inf"))
    keys = k.to(pooled.dtype)[:, :, None].transpose(-1, -2)
    step = max(
        1, SCORES.get(device.type, SCORES["cpu"]) * 4 // (q.shape[1] * batch * per * k.shape[2])
    )
    for a in range(0, count, step):
        b = min(count, a + step)
        stop = anchors.local + (b - 1) * anchors.group
        with full_precision(device):
            scores = pooled[:, :, :, a * per : b * per] @ keys[..., :stop]
        kept = scores >= bar[:, :, :, a * per : b * per, None]
        kept = kept.unflatten(3, (b - a, per)).any(4)
        kept = kept.flatten(1, 2) if heads != kv else kept.any(2)
        start = torch.arange(a, b, device=device)[:, None] * anchors.group
        key = torch.arange(stop, device=device)
        between = (key >= anchors.first) & (key < anchors.local + start)
        if anchors.window is not None:
            between &= key > anchors.offset + start - anchors.window
        yield a, kept & between


def stripe_pairs(kept: Tensor, first: int, anchors: Anchors, counted: Tensor) -> Tensor:
    """Count the pairs of a row and a stripe that it sees, () float64: over the samples, mean of the heads.

    Args:
        kept: (B, heads, n, columns) bool, the stripes of the n groups from ``first`` on.
        counted: (B, L) bool, the rows that count.
    """
    before = F.pad(counted.long().cumsum(1), (1, 0))  # rows that count before each row
    start = (first + torch.arange(kept.shape[2], device=kept.device)) * anchors.group
    stop = (start + anchors.group).clamp(max=anchors.rows)[:, None]
    if anchors.window is not None:
        key = torch.arange(kept.shape[3], device=kept.device)
        last = key + anchors.window - anchors.offset
        stop = torch.minimum(stop, torch.maximum(last, start[:, None]))
    rows = before[:, stop] - before[:, start][..., None]
    return (kept.sum(1) * rows).sum().double() / kept.shape[1]


def stripe_attention(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, first: int, anchors: Anchors, *, scale: float,
    backend: str = "auto",
) -> Iterator[tuple[slice, Tensor, Tensor]]:  # fmt: skip
    """Compute the attention of groups of rows to their stripes alone.

    The keys of each group are gathered one behind the other, each group from a new block on, so that
    one call of the block-sparse kernel computes all heads and groups with their own numbers of keys.

    Args:
        q: (B, H, L, D). k, v: (B, Hk, S, D).
        kept: (B, H or Hk, n, columns) bool, the stripes of the n groups from ``first`` on.

    Yields:
        The rows of a run of groups, their outputs (B, H, rows, D) and LSEs (B, H, rows).
    """
    most = kept.sum(-1).amax((0, 1)).tolist()
    limit = max(1, GATHERED // (kept.shape[0] * kept.shape[1] * k.shape[3]))
    a = 0
    while a < len(most):
        b, total = a + 1, most[a]
        while b < len(most) and total + most[b] <= limit:
            total, b = total + most[b], b + 1
        start = (first + a) * anchors.group
        rows = slice(start, min(anchors.rows, (first + b) * anchors.group))
        if total:
            part = kept[:, :, a:b]
            yield rows, *_gathered(q[:, :, rows], k, v, part, start, anchors, scale, backend)
        a = b


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, start: int, anchors: Anchors, scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from rows that begin at row ``start``, a group's first, to the kept keys of their groups."""
    batch, maps = kept.shape[:2]
    packed = _Packed.of(kept, min(anchors.block, 64))
    place = packed.place.view(batch, maps, -1)
    sample = torch.arange(batch, device=q.device)[:, None, None]
    head = (torch.arange(maps, device=q.device) * k.shape[1] // maps)[:, None]
    mask = packed.mask(q.shape[2], start, anchors)
    pattern = mask.pattern.view(batch, maps).repeat_interleave(q.shape[1] // maps, 1)
    out = block_sparse_attention(
        q, k[sample, head, place], v[sample, head, place], replace(mask, pattern=pattern),
        scale=scale, return_lse=True, backend=backend,
    )  # fmt: skip
    assert isinstance(out, tuple)
    return out


@dataclass(frozen=True)
class _Packed:
    """The kept keys of several groups in one sequence of blocks, each group from a new block on.

    M heads, n groups, E blocks that hold keys, all in their order.

    Attributes:
        block: tokens of a block.
        place: (M, P) int64 column of each packed key; 0 for what fills up a group's last block.
        head, group, column: (E,) int64, where a block belongs and which of the packed blocks it is.
        fill: (E,) int64, how many keys a block holds.
    """

    block: int
    place: Tensor
    head: Tensor
    group: Tensor
    column: Tensor
    fill: Tensor

    @classmethod
    def of(cls, kept: Tensor, block: int) -> _Packed:
        """Pack the keys that ``kept`` (B, heads, n, columns) keeps; M is B times heads."""
        lines = kept.flatten(0, 1)
        heads, groups = lines.shape[:2]
        number = lines.sum(-1)
        blocks = (number + block - 1) // block
        begin = (blocks.cumsum(1) - blocks).flatten()
        many = int(blocks.sum(1).amax())
        head, _, key = lines.nonzero(as_tuple=True)
        line, rank = _ranks(number.flatten())
        place = torch.zeros(heads, many * block, dtype=torch.int64, device=kept.device)
        place[head, begin[line] * block + rank] = key
        line, rank = _ranks(blocks.flatten())
        fill = (number.flatten()[line] - rank * block).clamp(max=block)
        return cls(block, place, line // groups, line % groups, begin[line] + rank, fill)

    def mask(self, rows: int, start: int, anchors: Anchors) -> BlockMask:
        """Build the mask of ``rows`` rows from row ``start`` on, whose groups are the packed ones, with
        one pattern per head."""
        (heads, keys), device = self.place.shape, self.place.device
        bm, bn, per = anchors.block, self.block, anchors.group // anchors.block
        nq = -(-rows // bm)
        row = (self.group[:, None] * per + torch.arange(per, device=device)).flatten()
        inside = row < nq
        row = row[inside]
        head, column, fill = (
            x.repeat_interleave(per)[inside] for x in (self.head, self.column, self.fill)
        )
        key = torch.arange(bn, device=device)
        if anchors.window is None:
            tile = torch.where(fill < bn, fill - 1, -1)
            tiles = (key < torch.arange(1, bn, device=device)[:, None, None]).expand(-1, bm, -1)
        else:
            tile = torch.arange(row.numel(), device=device)
            query = anchors.offset + start + row[:, None] * bm + torch.arange(bm, device=device)
            seen = self.place.view(heads, -1, bn)[head, column][:, None]
            tiles = seen > query[..., None] - anchors.window
            tiles &= key < fill[:, None, None]
        pattern = torch.arange(heads, device=device)[None]
        return BlockMask.from_entries(
            rows, keys, (bm, bn), pattern, heads, head * nq + row, column, tile, tiles
        )


def _ranks(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Number the elements of consecutive runs of the given lengths: the run of each, its rank there."""
    run = torch.arange(numbers.numel(), device=numbers.device).repeat_interleave(numbers)
    begin = numbers.cumsum(0) - numbers
    return run, torch.arange(run.numel(), device=numbers.device) - begin[run]
