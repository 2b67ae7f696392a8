"""Merging or pruning tokens of a grid, of which one in each cell stays."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.tokens import TokenMap, take
from vtr.kernels import bipartite_match
from vtr.kernels.precision import full_precision


@torch.no_grad()
def merge_map(
    hidden: Tensor,
    grid: tuple[int, int, int],
    cell: tuple[int, int, int],
    ratio: float,
    generator: torch.Generator | None = None,
) -> TokenMap | None:
    """Merge the ``int(ratio * N)`` tokens that are most like a destination (section 3 of the paper).

    Args:
        hidden: (B, N, C) grid tokens in raster order, compared by cosine.
        cell: tokens per axis of a cell, of which one is a destination.
        generator: draws it; None takes the first.

    Returns:
        The map, destinations representing what was merged into them; None if nothing is merged.
    """
    number, device = hidden.shape[1], hidden.device
    source, target = cell_split(grid, cell, generator)
    merged = min(int(ratio * number), source.numel())
    if merged == 0:
        return None
    # Without waiting: what is copied from ordinary memory is taken before the call returns.
    source, target = (t.to(device, non_blocking=True) for t in (source, target))
    metric = F.normalize(hidden.float(), dim=-1)
    score, partner = bipartite_match(metric[:, source], metric[:, target])
    rank = torch.sort(score, dim=1, descending=True, stable=True).indices
    gone = source[rank[:, :merged]]
    to = target[partner.gather(1, rank[:, :merged])]
    kept, slot = _without(gone, number)
    return TokenMap.merged(kept, slot.scatter(1, gone, slot.gather(1, to)))


@torch.no_grad()
def prune_map(
    hidden: Tensor,
    grid: tuple[int, int, int],
    cell: tuple[int, int, int],
    ratio: float,
    noise: Tensor | None = None,
) -> TokenMap | None:
    """Prune the ``int(ratio * N)`` tokens that are most like a base token (SiTo, AAAI 2025).

    The base token of a cell is the one of the largest sum of its cosines to all tokens, plus ``noise``;
    that sum is its product with the sum of the unit vectors, in float32. All other matches are computed
    in tiles, so that no matrix of N x N is held.

    Args:
        hidden: (B, N, C) grid tokens in raster order, compared by cosine.
        cell: tokens per axis of a cell, of which one is a base token.
        noise: (N,) float32 on the CPU, the same for all samples; None adds none.

    Returns:
        The map, each pruned token in the slot of the kept token that is most like it; None if nothing is
        pruned.
    """
    number, device = hidden.shape[1], hidden.device
    places = cells(grid, cell)
    pruned = min(int(ratio * number), number - len(places))
    if pruned <= 0:
        return None
    places = places.to(device, non_blocking=True)
    metric = F.normalize(hidden.float(), dim=-1)
    with full_precision(device):
        score = torch.bmm(metric, metric.sum(1)[..., None]).squeeze(2)
    if noise is not None:
        score = score + noise.to(device, non_blocking=True)
    in_cell = score[:, places.clamp(min=0)].masked_fill(places < 0, float("-inf"))
    base = places.expand(len(hidden), -1, -1).gather(2, in_cell.max(2, keepdim=True).indices)[
        ..., 0
    ]
    source = _without(base, number)[0]
    like, partner = bipartite_match(take(metric, source), take(metric, base))
    rank = torch.sort(like, dim=1, descending=True, stable=True).indices
    first, last = rank[:, :pruned], rank[:, pruned:]
    gone, rest = source.gather(1, first), source.gather(1, last)
    to = base.gather(1, partner.gather(1, first))
    if rest.shape[1]:
        other, nearest = bipartite_match(take(metric, gone), take(metric, rest))
        to = torch.where(other > like.gather(1, first), rest.gather(1, nearest), to)
    kept, slot = _without(gone, number)
    return TokenMap.merged(kept, slot.scatter(1, gone, slot.gather(1, to)))


def cells(grid: tuple[int, int, int], cell: tuple[int, int, int]) -> Tensor:
    """Raster indices of the tokens of each cell, (cells, tokens) int64 ascending on the CPU; a cell that is
    cut off at the border ends with -1."""
    frames, height, width = grid
    number = torch.arange(frames * height * width, device="cpu").view(1, 1, *grid)
    pad = [n for size, step in zip(grid[::-1], cell[::-1], strict=True) for n in (0, -size % step)]
    number = F.pad(number, pad, value=frames * height * width)[0, 0]
    for axis, step in enumerate(cell):
        number = number.unflatten(2 * axis, (-1, step))
    found = number.permute(0, 2, 4, 1, 3, 5).reshape(-1, math.prod(cell)).sort(1).values
    return found.masked_fill(found == frames * height * width, -1)


def _without(gone: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Indices that stay of ``number`` if ``gone`` (B, K) go, (B, number - K) ascending, and the slot of each
    index that stays, (B, number)."""
    batch, fewer = gone.shape[0], number - gone.shape[1]
    stays = torch.ones(batch, number, dtype=torch.bool, device=gone.device).scatter_(1, gone, False)
    slot = stays.long().cumsum(1) - 1
    index = torch.arange(number, device=gone.device).expand_as(slot)
    # Not ``index[stays]``, which would wait for the device to count them.
    kept = torch.empty(batch, fewer + 1, dtype=torch.int64, device=gone.device)
    kept = kept.scatter_(1, torch.where(stays, slot, fewer), index)
    return kept[:, :-1].contiguous(), slot


def cell_split(
    grid: tuple[int, int, int], cell: tuple[int, int, int], generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Raster indices of the sources and of the destinations, one in each cell, ascending, int64."""
    axes = torch.meshgrid(*(torch.arange(n, device="cpu") for n in grid), indexing="ij")
    number = torch.zeros(grid, dtype=torch.int64, device="cpu")
    for axis, size, step in zip(axes, grid, cell, strict=True):
        number = number * -(-size // step) + axis // step
    number = number.flatten()
    cells = int(number[-1]) + 1
    if generator is None:
        draw = torch.arange(number.numel(), 0, -1, dtype=torch.float64, device="cpu")
    else:
        draw = torch.rand(number.numel(), generator=generator, dtype=torch.float64, device="cpu")
    best = torch.full((cells,), -1.0, dtype=torch.float64, device="cpu").scatter_reduce(
        0, number, draw, "amax"
    )
    target = draw == best[number]
    return (~target).nonzero().squeeze(1), target.nonzero().squeeze(1)
