"""Merging tokens of a grid into one token of each cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.tokens import TokenMap
from vtr.kernels import bipartite_match


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
    stays = torch.ones(hidden.shape[:2], dtype=torch.bool, device=device).scatter_(1, gone, False)
    slot = stays.long().cumsum(1) - 1
    index = torch.arange(number, device=device).expand_as(slot)
    # Not ``index[stays]``, which would wait for the device to count them.
    kept = torch.empty(hidden.shape[0], number - merged + 1, dtype=torch.int64, device=device)
    kept = kept.scatter_(1, torch.where(stays, slot, number - merged), index)
    kept = kept[:, :-1].contiguous()
    return TokenMap.merged(kept, slot.scatter(1, gone, slot.gather(1, to)))


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
