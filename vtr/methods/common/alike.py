"""Merging of what is alike, as many tokens as are: windows of the grid, and pairs (ALGM, arXiv 2406.09936)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.site import Site
from vtr.core.tokens import TokenMap, take
from vtr.methods.common.merge import by_representative


@torch.no_grad()
def merge_windows(
    site: Site, window: int, threshold: float, together: bool, name: str = "algm"
) -> tuple[TokenMap | None, Tensor | None]:
    """Merge the windows of the grid whose tokens are alike.

    Args:
        site: with all tokens of the model's input; the windows of a video lie within its frames.
        window: side in tokens.
        threshold: least mean cosine over the pairs of a window.
        together: merge the same number of windows in all samples, the least.
        name: of the method, for errors.

    Returns:
        The map, None if nothing merges; and the order (B, N_out) int64 of its slots: merged windows by falling
        similarity, then the other tokens, padding last.

    Raises:
        ValueError: no known grid, another method has cut before, or sides that are no multiples of the window.
    """
    if site.grid is None or site.n != math.prod(site.grid):
        raise ValueError(
            f"{name} merges windows of the whole grid, and here are {site.n} tokens of the grid {site.grid}: "
            "apply it alone, to a model with a known grid"
        )
    height, width = site.grid[-2:]
    if height % window or width % window:
        raise ValueError(
            f"window={window} must divide the grid of {height} x {width} tokens: resize the images"
        )
    index = torch.arange(site.n, device=site.device).view(-1, height, width)  # by frame
    windows = index.unfold(1, window, window).unfold(2, window, window).reshape(-1, window**2)
    x = F.normalize(
        site.hidden.double() if site.hidden.dtype == torch.float64 else site.hidden.float(), dim=-1
    )
    members = x[:, windows]  # (B, windows, members, C)
    pairs = members @ members.transpose(-2, -1)
    size = window**2
    own = pairs.diagonal(dim1=-2, dim2=-1).sum(-1)
    alike = (pairs.sum((-2, -1)) - own) / (size * (size - 1))
    number = (alike >= threshold).sum(1)
    rank = torch.sort(alike, dim=1, descending=True, stable=True).indices
    if together:
        number = number.amin().expand_as(number)
    chosen = torch.zeros_like(alike, dtype=torch.bool)
    within = torch.arange(alike.shape[1], device=site.device) < number[:, None]
    chosen = chosen.scatter(1, rank, within)
    # A merged window is held by its last token, as in the authors' code; tokens stay in raster order here.
    heads = torch.where(chosen[..., None], windows[:, -1:], windows)
    representative = torch.empty_like(x[..., 0], dtype=torch.long)
    representative = representative.scatter(
        1, windows.flatten().expand(site.batch, -1), heads.flatten(1)
    )
    step = by_representative(representative)
    return step, _order(step, rank, within, windows, representative)


def _order(
    step: TokenMap, rank: Tensor, within: Tensor, windows: Tensor, representative: Tensor
) -> Tensor:
    """The authors' order of the slots: merged windows by rank, single tokens in raster order, padding."""
    batch, n = representative.shape
    place = torch.arange(n, device=rank.device).repeat(batch, 1) + n  # singles behind the merged
    last = windows[:, -1][rank]  # (B, windows), the representatives by rank
    ranks = torch.arange(rank.shape[1], device=rank.device).expand_as(rank)
    place = place.scatter(1, last, torch.where(within, ranks, place.gather(1, last)))
    key = place.gather(1, step.kept.clamp(min=0)).masked_fill(step.kept < 0, 3 * n)
    return torch.argsort(key, dim=1, stable=True)


@torch.no_grad()
def merge_pairs(site: Site, order: Tensor | None, number: int, together: bool) -> TokenMap | None:
    """Merge the pairs of an alternating split that are more alike than mean + standard deviation / ``number``.

    Args:
        site: cosines are of its hidden states.
        order: (B, N) int64, tokens in the order that is split, padding last; None is the raster order.
        number: 1-based number of the block.
        together: one threshold for the batch, and the least number of pairs.

    Returns:
        The map, None if there are fewer than two pairs to compare.
    """
    x = site.hidden
    n, device = site.n, site.device
    if order is None:
        order = torch.arange(n, device=device).expand(site.batch, n)
    shift = site.prefix % 2  # protected tokens in front take part in the alternation
    a, b = order[:, shift::2], order[:, 1 - shift :: 2]
    if a.shape[1] < 2 or b.shape[1] < 1:
        return None
    x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
    valid = site.valid_mask
    cosine = take(x, a) @ take(x, b).transpose(1, 2)
    cosine = cosine.masked_fill(~valid.gather(1, b)[:, None], -float("inf"))
    best, partner = cosine.max(-1)
    here = valid.gather(1, a) & (best > -float("inf"))
    count = here.sum(1)
    mean = best.masked_fill(~here, 0).sum(1) / count
    spread = (best - mean[:, None]).masked_fill(~here, 0).square().sum(1) / (count - 1)
    deviation = spread.sqrt()
    if together:
        mean, deviation = mean.mean().expand_as(mean), deviation.mean().expand_as(deviation)
    above = here & (best >= (mean + deviation / number)[:, None])  # NaN with a single pair: none
    moved = above.sum(1)
    if together:
        moved = moved.amin().expand_as(moved)
    rank = torch.sort(best.masked_fill(~here, -float("inf")), dim=1, descending=True, stable=True)
    places = torch.arange(a.shape[1], device=device).expand_as(a)
    goes = torch.zeros_like(above).scatter(1, rank.indices, places < moved[:, None])
    target = torch.where(goes, b.gather(1, partner), a)
    representative = torch.where(valid, torch.arange(n, device=device), -1)
    representative = representative.scatter(1, a, torch.where(valid.gather(1, a), target, -1))
    return by_representative(representative)
