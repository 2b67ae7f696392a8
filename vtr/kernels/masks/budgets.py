"""Budget rules: which blocks of a row are kept, by their scores. The third of six parts of a mask
chosen at run time.

The rules of published methods differ by one block at the edge, which changes a mask of few blocks much:
whether the block that crosses a share is kept, how a share of the blocks is rounded, and how many are
kept at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_ROUNDING: dict[str, Callable[[float], int]] = {
    "floor": math.floor, "ceil": math.ceil, "round": round,
}  # fmt: skip


def number_of(share: float, total: int, *, rounding: str = "floor", least: int = 1) -> int:
    """Return a share of ``total`` blocks as a number of blocks, from ``least`` to ``total``.

    Args:
        share: in [0, 1].
        rounding: ``"floor"`` (SLA, Jenga), ``"ceil"`` (VSA) or ``"round"``.
    """
    # A share such as 1 - 0.9 is not quite a tenth.
    exact = round(share * total, 9)
    return min(total, max(least, _ROUNDING[rounding](exact)))


def top_k(scores: Tensor, number: int) -> Tensor:
    """Keep the ``number`` blocks of highest score in each row.

    Args:
        scores: (..., NK). Of equal scores the first is kept.

    Returns:
        bool of the shape of scores.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :number]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


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
    """
    falling, order = mass.sort(dim=-1, descending=True, stable=True)
    total = falling.sum(-1, keepdim=True, dtype=torch.float64)
    sums = falling.cumsum(-1, dtype=torch.float64)
    number = (sums <= p * total).sum(-1, keepdim=True) + int(crossing)
    keep = torch.arange(mass.shape[-1], device=mass.device) < number.clamp(min=least)
    return torch.zeros_like(keep).scatter_(-1, order, keep)
