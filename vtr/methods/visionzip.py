"""VisionZip: the dominant tokens, and the rest merged into a few contextual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.budget import Keep, check_keep, counts
from vtr.method import Method, Reduction, Stage, register
from vtr.methods._merge import by_representative
from vtr.signals import ModelInfo, Site
from vtr.tokens import TokenMap, take, top_indices

SHARE = 5 / 32


def dominant(score: Tensor, number: Tensor, valid: Tensor) -> Tensor:
    """(B, N) bool: the ``number[b]`` best tokens of each row by ``score`` (B, N)."""
    kept, padded = top_indices(score, number, valid)
    out = torch.zeros(*valid.shape[:1], valid.shape[1] + 1, dtype=torch.bool, device=valid.device)
    slot = torch.where(kept < 0, valid.shape[1], kept) if padded else kept
    return out.scatter(1, slot, True)[:, :-1]


def contextual(keys: Tensor, rest: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and assignment of the tokens that are not dominant.

    With n of them in raster order, the targets are the first, the (1 + step)-th and so on, ``number``
    in all, with step = max(1, n // number); every other one goes to the target whose key is most
    similar (cosine).

    Args:
        keys: (B, N, D), averaged over heads.
        rest: (B, N) bool, the tokens in question.
        number: (B,) int64 targets per row, at most the number of ``rest``.

    Returns:
        representative (B, N) int64 (a target's own index, the target's index of an assigned token,
        -1 elsewhere), and is_target (B, N) bool.
    """
    n = rest.sum(1)
    step = torch.div(n, number.clamp(min=1), rounding_mode="floor").clamp(min=1)[:, None]
    rank = rest.long().cumsum(1) - 1
    is_target = rest & (rank % step == 0) & (torch.div(rank, step, rounding_mode="floor") < number[:, None])
    unit = F.normalize(keys.float(), dim=-1)
    targets, _ = top_indices(is_target.float(), is_target.sum(1), is_target)
    likeness = unit @ take(unit, targets.clamp(min=0)).transpose(1, 2)
    nearest = likeness.masked_fill((targets < 0)[:, None], -float("inf"))
    if targets.shape[1] == 0:
        return torch.full_like(rank, -1), is_target
    best = targets.gather(1, nearest.argmax(2))
    index = torch.arange(rest.shape[1], device=rest.device)
    representative = torch.where(is_target, index, best)
    return representative.masked_fill(~rest | (number == 0)[:, None], -1), is_target
