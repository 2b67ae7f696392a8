"""Chunks of keys of different length, which end where an image, a frame or a text ends."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtr.kernels import pool_blocks
from vtr.kernels.precision import full_precision
from vtr.methods.common.key_blocks import BlockGrid


def chunk_starts(marks: tuple[Tensor, ...], longest: int) -> Tensor:
    """Cut sequences where a mark changes, and longer runs into the fewest equal parts.

    Args:
        marks: (B, S) tensors, such as the image and the frame of each token.
        longest: tokens of a part.

    Returns:
        (B, S) bool, True for the first token of each chunk.
    """
    changes = torch.stack([pad(m[:, 1:] != m[:, :-1], (1, 0), value=True) for m in marks]).any(0)
    column = torch.arange(changes.shape[1], device=changes.device).expand(changes.shape)
    first = torch.where(changes, column, 0).cummax(1).values
    run = changes.long().cumsum(1) - 1
    length = torch.zeros_like(run).scatter_add_(1, run, torch.ones_like(run)).gather(1, run)
    part = (column - first) * (-(-length // longest)) // length
    return changes | pad(part[:, 1:] != part[:, :-1], (1, 0), value=True)


def chunk_scores(q: Tensor, k: Tensor, starts: Tensor, grid: BlockGrid) -> Tensor:
    """Score key blocks by the best of the chunks of their keys (DHSA, arXiv 2510.24606).

    A chunk of n keys has the score ``mean(rows) . mean(keys) sqrt(n)``, for the rows of a block.

    Args:
        q: (B, H, L, D). k: (B, Hk, S, D).
        starts: (B, S) bool, the first token of each chunk; the first of each sample among them.

    Returns:
        (B, H, NQ, NK) float32.
    """
    chunk = starts.long().cumsum(1) - 1
    columns, most = grid.keys, int(chunk[:, -1].max()) + 1  # waits for the device
    place = torch.arange(columns, device=q.device).expand(starts.shape)
    bounds = torch.where(starts, place, columns).sort(1).values[:, :most]
    size = torch.cat([bounds[:, 1:], torch.full_like(bounds[:, :1], columns)], 1) - bounds
    total = pad(k.double().cumsum(2), (0, 0, 1, 0))  # float64: chunks are differences of it
    at = bounds[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    sums = total.gather(2, at + size[:, None, :, None]) - total.gather(2, at)
    means = (sums / size.clamp(min=1).sqrt()[:, None, :, None]).float()
    rows = pool_blocks(q, grid.sides[0]).float().unflatten(1, (k.shape[1], -1))
    with full_precision(q.device):
        scores = (rows @ means.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    found = [
        _largest(scores[:, :, part], chunk, grid.sides[1])
        for part in grid.pieces(q.shape[0] * q.shape[1] * columns)
    ]
    return torch.cat(found, 2)


def _largest(scores: Tensor, chunk: Tensor, block: int) -> Tensor:
    """Chunk scores (B, H, R, C) to the largest of each block of keys, (B, H, R, NK)."""
    keys = scores.gather(3, chunk[:, None, None].expand(*scores.shape[:3], -1))
    keys = pad(keys, (0, -keys.shape[-1] % block), value=-torch.inf)
    return keys.unflatten(-1, (-1, block)).amax(-1)
