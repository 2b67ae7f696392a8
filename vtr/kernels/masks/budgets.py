"""Budget rules: which blocks of a row are kept, by their scores. The third of six parts of a mask
chosen at run time.

The rules of published methods differ by one block at the edge, which changes a mask of few blocks much:
whether the block that crosses a share is kept, how a share of the blocks is rounded, and how many are
kept at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

_ROUNDING: dict[str, Callable[[float], int]] = {
    "floor": math.floor, "ceil": math.ceil, "round": round,
}  # fmt: skip


@overload
def number_of(share: float, total: int, *, rounding: str = "floor", least: int = 1) -> int: ...
@overload
def number_of(share: Tensor, total: int, *, rounding: str = "floor", least: int = 1) -> Tensor: ...
@overload
def number_of(
    share: float | Tensor, total: int, *, rounding: str = "floor", least: int = 1
) -> int | Tensor: ...
def number_of(
    share: float | Tensor, total: int, *, rounding: str = "floor", least: int = 1
) -> int | Tensor:
    """Return a share of ``total`` blocks as a number of blocks, from ``least`` to ``total``.

    Args:
        share: in [0, 1]; or a tensor of shares, for int64 numbers of its shape.
        rounding: ``"floor"`` (SLA, Jenga), ``"ceil"`` (VSA) or ``"round"``.

    Raises:
        ValueError: the share is not in [0, 1].
    """
    if isinstance(share, Tensor):
        # A float32 share such as 0.1 is not quite a tenth.
        exact = (share.double() * total * 1e6).round() / 1e6
        whole = {"floor": torch.floor, "ceil": torch.ceil, "round": torch.round}[rounding](exact)
        return whole.long().clamp(least, total)
    if not 0 <= round(share, 9) <= 1:  # a sum of shares may pass 1 by rounding
        raise ValueError(f"share must be in [0, 1], got {share!r}")
    # A share such as 1 - 0.9 is not quite a tenth.
    near = round(share * total, 9)
    return min(total, max(least, _ROUNDING[rounding](near)))


def top_k(scores: Tensor, number: int | Tensor) -> Tensor:
    """Keep the ``number`` blocks of highest score in each row.

    Args:
        scores: (..., NK). Of equal scores the first is kept.
        number: of all rows, from 0 to NK; or of each row, (...) int64 or what broadcasts to it.

    Returns:
        bool of the shape of scores.

    Raises:
        ValueError: an int is not from 0 to NK.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    if isinstance(number, Tensor):
        place = torch.arange(scores.shape[-1], device=scores.device)
        chosen = (place < number[..., None]).expand_as(scores)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, chosen)
    if not 0 <= number <= scores.shape[-1]:
        raise ValueError(f"number must be from 0 to {scores.shape[-1]} (the blocks), got {number}")
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :number], True)


def top_p(mass: Tensor, p: float, *, crossing: bool = True, least: int = 1) -> Tensor:
    """Keep the blocks of largest mass until their sum reaches the share ``p`` of their row.

    Args:
        mass: (..., NK), not negative.
        p: in [0, 1].
        crossing: whether the block with which the sum passes ``p`` is kept (SVG2, Jenga, BSA), or only
            those before it (SpargeAttn). A sum that is exactly ``p`` has not passed it.
        least: blocks that are kept at least.

    Returns:
        bool of the shape of mass.

    Raises:
        ValueError: ``p`` is not in [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p!r}")
    falling, order = mass.sort(dim=-1, descending=True, stable=True)
    total = falling.sum(-1, keepdim=True, dtype=torch.float64)
    sums = falling.cumsum(-1, dtype=torch.float64)
    number = (sums <= p * total).sum(-1, keepdim=True) + int(crossing)
    keep = torch.arange(mass.shape[-1], device=mass.device) < number.clamp(min=least)
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def top_k_by_recall(mass: Tensor, density: float, recall: float = 0.8) -> Tensor:
    """Keep the blocks of largest mass in each row, the same number in all rows of a head: fewer in heads whose
    mass is in few blocks, and more in others (AdaSpa, arXiv 2502.21079, section 4.3).

    Of H heads, n keep more than the share ``recall`` of their mass at the given density d. The n that
    keep the largest share get d / 2, the n that keep the smallest 3 d / 2, the others d.

    Args:
        mass: (B, H, NQ, NK), not negative.
        density: d, share of the blocks of a row, in (0, 1]; rounded to blocks, at least one.
        recall: n is at most H / 2, so that the mean over the heads stays d. For a d above 2 / 3 the two
            groups differ from it by 1 - d instead of d / 2.

    Returns:
        bool of the shape of mass.
    """
    heads, total = mass.shape[1], mass.shape[-1]
    rank = mass.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    step = min(density / 2, 1 - density)
    few, middle, many = (
        number_of(d, total, rounding="round") for d in (density - step, density, density + step)
    )
    kept = (mass * (rank < middle)).sum((2, 3), dtype=torch.float64)
    share = kept / mass.sum((2, 3), dtype=torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
    groups = (share > recall).sum(1, keepdim=True).clamp(max=heads // 2)
    place = share.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    number = torch.where(place < groups, few, torch.where(place >= heads - groups, many, middle))
    return rank < number[..., None, None]


def percentile(scores: Tensor, share: float | Tensor) -> Tensor:
    """Keep the blocks of a head whose scores are highest, by one threshold for all of its rows.

    The threshold is the ``int((1 - share) n)``-th lowest of the head's n scores, and blocks that reach it are
    kept (DraftAttention, arXiv 2505.14708): one more than the share, and all that are equal to it. A row
    of low scores may keep nothing.

    Args:
        scores: (..., NQ, NK).
        share: in (0, 1], of all heads, or a tensor of shares that broadcasts to (..., 1).

    Returns:
        bool of the shape of scores.
    """
    flat = scores.flatten(-2)
    if isinstance(share, Tensor):
        number = number_of(1 - share, flat.shape[-1], least=0).expand(*flat.shape[:-1], 1)
        edge = flat.sort(dim=-1).values.gather(-1, (number - 1).clamp(min=0))
        return scores >= edge.masked_fill(number == 0, -torch.inf)[..., None]
    dropped = number_of(1 - share, flat.shape[-1], least=0)
    if dropped == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores >= flat.kthvalue(dropped).values[..., None, None]
