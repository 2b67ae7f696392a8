"""Search for the key blocks with the largest scores without a look at every key: HiP, InfiniteHiP.

Both assume that the scores of neighbouring keys are alike: a run of key blocks is judged by a few of its
keys. Runs are halved (:func:`tree_search`) or cut into shorter ones (:func:`stage_search`) until a run is
one key block. All blocks of rows are searched at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vtr.kernels.precision import full_precision
from vtr.methods.common.key_blocks import BlockGrid

PLACES = ("first", "center", "even")


@dataclass
class Search:
    """The rows and keys of a search.

    Attributes:
        q: (B, H, L, D). k: (B, Hk, S, D), H a multiple of Hk.
        grid: their blocks.
        low, high: (NQ,) int64, the range of key blocks that each block of rows searches.
        stride: every stride-th row of a block is compared with the keys.
        flops: of the comparisons so far, per sample.
    """

    q: Tensor
    k: Tensor
    grid: BlockGrid
    low: Tensor
    high: Tensor
    stride: int = 1
    flops: float = 0.0

    def rows(self, part: slice) -> Tensor:
        """(B, H, rows, stride-th rows of a block, D) float32, the compared rows of some blocks."""
        return self.q[:, :, self.grid.row_index(part, self.stride)].float()

    def scores(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The largest product of a block's compared rows with each of its keys ``tokens``.

        Args:
            rows: (B, H, R, n, D) of :meth:`rows`.
            tokens: (B, H, R, T) int64 key columns; those past the end count as the last key.

        Returns:
            (B, H, R, T) float32.
        """
        (batch, heads), device = tokens.shape[:2], tokens.device
        self.flops += 2 * rows.shape[3] * rows.shape[4] * tokens[0].numel()
        b = torch.arange(batch, device=device)[:, None, None, None]
        h = torch.arange(heads, device=device)[:, None, None] // (heads // self.k.shape[1])
        keys = self.k[b, h, tokens.clamp(max=self.grid.keys - 1)].float()
        with full_precision(device):
            return (rows @ keys.transpose(-1, -2)).amax(-2)

    def mask(self, start: Tensor, chosen: Tensor) -> Tensor:
        """(B, H, NQ, NK) bool from the chosen key blocks (B, H, NQ, G) and which of them count."""
        live = torch.zeros(
            *start.shape[:3], self.grid.key_blocks, dtype=torch.int8, device=start.device
        )
        index = start.clamp(max=self.grid.key_blocks - 1)
        return live.scatter_reduce(-1, index, chosen.to(torch.int8), "amax").bool()


def check_stages(stages: object, block: int) -> tuple[tuple[int, int], ...]:
    """Return the stages of :func:`stage_search` as a tuple of pairs, or raise a ``ValueError``."""
    pairs = [_pair(s) for s in stages] if isinstance(stages, (tuple, list)) else []
    chunks = [chunk for chunk, _ in pairs]
    if (
        not chunks
        or chunks[-1] != block
        or any(not b or a <= b or a % b for a, b in pairwise(chunks))
        or any(keep < chunk for chunk, keep in pairs)
    ):
        raise ValueError(
            "pruning must be pairs (chunk, keep) in keys, each chunk a multiple of the next, the last "
            f"chunk equal to block ({block}), keep at least a chunk; got {stages!r}"
        )
    return tuple(pairs)


def _pair(stage: object) -> tuple[int, int]:
    """A stage, or one that is refused."""
    if isinstance(stage, (tuple, list)) and len(stage) == 2 and all(type(n) is int for n in stage):
        return stage[0], stage[1]
    return 0, 0


def _best(scores: Tensor, number: int, *items: Tensor) -> list[Tensor]:
    """The items (..., T) with the ``number`` best scores, of equal scores the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :number]
    return [item.expand(scores.shape).gather(-1, order) for item in items]


def tree_search(search: Search, groups: int, probes: int, place: str = "first") -> Tensor:
    """Find the best ``groups`` key blocks per block of rows by halving (HiP, arXiv 2406.09827).

    The range is cut into ``groups`` runs of equal length. Every run is halved, a half is judged by
    ``probes`` of its keys, the best ``groups`` halves remain, until all are single key blocks. A range of at
    most ``groups`` blocks is kept whole.

    Args:
        probes: keys by which a half is judged.
        place: of them in it: ``"first"``, ``"center"``, or ``"even"``, at equal distances.

    Returns:
        (B, H, NQ, NK) bool.
    """
    grid, (batch, heads) = search.grid, search.q.shape[:2]
    cuts = torch.arange(groups + 1, device=grid.device)
    length = (search.high - search.low).clamp(min=0)[:, None]
    bounds = search.low[:, None] + length * cuts // groups
    shape = (batch, heads, -1, groups)
    start = bounds[None, None, :, :-1].expand(shape)
    end = bounds[None, None, :, 1:].expand(shape)
    rounds = math.ceil(math.log2(max(1, -(-grid.key_blocks // groups))))
    # The first keys of a run are those of its first half: that half is judged already.
    known = place == "first" and probes <= grid.sides[1] and rounds > 0
    score = _judge(search, start, end, probes, place) if known else None
    for _ in range(rounds):
        middle = (start + end + 1) // 2
        first = _judge(search, start, middle, probes, place) if score is None else score
        scores = torch.cat([first, _judge(search, middle, end, probes, place)], -1)
        start, end = torch.cat([start, middle], -1), torch.cat([middle, end], -1)
        start, end, best = _best(scores, groups, start, end, scores)
        score = best if known else None
    return search.mask(start, end > start)


def _judge(search: Search, start: Tensor, end: Tensor, probes: int, place: str) -> Tensor:
    """(B, H, NQ, T), the largest product of a run's probes; -inf for a run without keys."""
    side = search.grid.sides[1]
    first = start * side
    length = ((end * side).clamp(max=search.grid.keys) - first)[..., None]
    step = torch.arange(probes, device=start.device)
    if place == "first":
        offset = step.expand(*length.shape[:-1], probes)
    elif place == "center":
        offset = (length - probes).clamp(min=0) // 2 + step
    else:
        offset = (2 * step + 1) * length // (2 * probes)
    tokens = (first[..., None] + offset.minimum((length - 1).clamp(min=0))).flatten(-2)
    elements = tokens[:, :, 0].numel() * search.q.shape[3]
    scores = torch.cat(
        [
            search.scores(search.rows(part), tokens[:, :, part])
            for part in search.grid.pieces(elements)
        ],
        dim=2,
    )
    return scores.unflatten(-1, (-1, probes)).amax(-1).masked_fill(end <= start, -torch.inf)


def stage_search(search: Search, stages: Sequence[tuple[int, int]]) -> Tensor:
    """Find the best key blocks per block of rows in stages (InfiniteHiP, arXiv 2502.08910).

    A stage cuts the runs that the one before it kept into runs of ``chunk`` keys, finds a key that represents
    each, and keeps the ``keep / chunk`` runs whose representative has the largest score. The
    representative is found by halving: the first keys of both halves are compared, the better half remains,
    down to one key. A stage that would keep all is passed over.

    Args:
        pruning: (chunk, keep) in keys; chunks are multiples of a key block and of the next chunk, the
            last is one key block.

    Returns:
        (B, H, NQ, NK) bool.
    """
    grid, (batch, heads) = search.grid, search.q.shape[:2]
    side = grid.sides[1]
    wide = stages[0][0] // side
    lead = torch.arange(-(-grid.key_blocks // wide), device=grid.device) * wide
    start = (search.low[:, None] + lead).expand(batch, heads, -1, -1)
    for number, (chunk, keep) in enumerate(stages):
        if number:
            ratio = stages[number - 1][0] // chunk
            inner = torch.arange(ratio, device=grid.device) * (chunk // side)
            start = (start[..., None] + inner).flatten(-2)
        if start.shape[-1] > keep // chunk:
            scores = torch.cat(
                [
                    _represent(search, start[:, :, part], part, chunk)
                    for part in grid.pieces(batch * heads * start.shape[-1] * search.q.shape[3])
                ],
                dim=2,
            )
            (start,) = _best(scores, keep // chunk, start)
    return search.mask(start, start < search.high[:, None])


def _represent(search: Search, start: Tensor, part: slice, chunk: int) -> Tensor:
    """(B, H, R, T), the score of the representative of each run of ``chunk`` keys."""
    rows, side = search.rows(part), search.grid.sides[1]
    token = start * side
    # A run ends with the range: keys behind it are kept anyway, or not seen.
    end = torch.minimum(token + chunk, search.high[part, None] * side).clamp(max=search.grid.keys)
    score = search.scores(rows, token)
    for _ in range(math.ceil(math.log2(chunk))):
        middle = (token + end + 1) // 2
        other = search.scores(rows, middle).masked_fill(middle >= end, -torch.inf)
        better = other > score
        token, end = torch.where(better, middle, token), torch.where(better, end, middle)
        score = torch.maximum(score, other)
    return score.masked_fill(start >= search.high[part, None], -torch.inf)
