"""Shares of a cache budget: among the heads of a layer (AdaKV) and among layers (PyramidKV, D2O)."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.methods.common.shares import largest

_ONE = (
    1 << 20
)  # shares as whole numbers: the counts of all devices are equal, and their sum is exact


def adaptive_heads(scores: Tensor, allowed: Tensor, number: Tensor, floor: float) -> Tensor:
    """Divide the entries that a layer keeps among its heads (AdaKV, arXiv 2407.11550, algorithm 1).

    The best entries of all heads together say how many each head would hold; ``floor`` of the budget is
    divided evenly instead, so that no head is left with almost nothing. The scores of the heads must be
    comparable, as attention is: each of its rows sums to one in every head. As the authors' code:
    count = floor * even + (1 - floor) * pooled. That code rounds each head; here the largest
    remainders are rounded up (of equal ones the lower head), so that the sum is exact.

    Args:
        scores: (B, Hk, K), higher is better; NaN is the worst.
        allowed: (B, Hk, K) bool, the entries that compete.
        number: (B,) int64, the mean count of a head.
        floor: share of the budget that is divided evenly, in [0, 1]. The authors use 0.2.

    Returns:
        (B, Hk) int64. Sums to ``number`` * Hk, or to all candidates if there are fewer. No head has more
        than its candidates.
    """
    candidates = allowed.sum(-1)
    total = torch.minimum(number * candidates.shape[1], candidates.sum(1))
    even = _even(candidates, total)
    low = torch.finfo(torch.float32).min
    flat = scores.float().nan_to_num(nan=low, neginf=low).masked_fill(~allowed, -float("inf"))
    pooled = largest(flat.flatten(1), total).view_as(allowed).sum(-1)
    share = round(floor * _ONE)
    exact = share * even + (_ONE - share) * pooled
    down = exact // _ONE
    return down + largest(exact % _ONE, total - down.sum(1))


def pyramid(share: float, layers: int, beta: float = 20) -> list[float]:
    """Compute the share of each layer: an arithmetic decrease (PyramidKV, arXiv 2406.02069, section 4.2).

    The last layer gets ``share / beta`` and the first one what makes ``share`` the mean. If that were
    more than everything, the first layer keeps all and the last one more, as in the authors' code.

    Args:
        share: mean share of the entries that is kept, in (0, 1].
        layers: number of layers.
        beta: how much less than the mean the last layer gets, at least 1; 1 is the same for all. The
            authors use 20.

    Returns:
        ``layers`` shares in (0, 1], whose mean is ``share``.
    """
    top = min(1.0, 2 * share - share / beta)
    step = 2 * (top - share) / max(1, layers - 1)
    return [top - step * layer for layer in range(layers)] if layers > 1 else [share]


def variance_shares(variance: Tensor, share: Tensor) -> Tensor:
    """Compute the share of each layer from how unevenly it attends (D2O, arXiv 2406.13035, section 3.2).

    Layers whose attention is spread evenly, with a low variance, keep more: share * L * softmax_l(-v_l), where
    v_l is the mean over heads of their variances, brought to [0, 1] among the layers. A share above 1 becomes 1,
    and the rest of it goes to the other layers.

    The authors' code brings variances to [0, 1] among the heads of each layer instead, so that the size of a
    layer's variances does not count; with two KV heads all layers would be equal. The part that its bound cuts off is
    lost.

    Args:
        variance: (L, B, Hk) of the column sums of attention, over the columns that are tokens.
        share: (B,) mean share of the entries that is kept, in [0, 1].

    Returns:
        (L, B) float64 in [0, 1], whose mean over layers is ``share``.
    """
    mean = variance.double().mean(-1)
    low, high = mean.aminmax(dim=0)
    weight = torch.softmax(-(mean - low) / (high - low).clamp(min=1e-12), 0)
    falling = weight.sort(dim=0, descending=True).values
    full = torch.arange(len(weight), device=weight.device)[:, None]
    rest = falling.flip(0).cumsum(0).flip(0)
    # The factor of the weights if the first n layers keep everything; n is the least that is enough.
    factor = ((share * len(weight) - full) / rest).clamp(min=0)
    enough = factor * falling <= 1 + 1e-12
    factor = factor.gather(0, enough.int().argmax(0, keepdim=True))
    return (factor * weight).clamp(max=1.0)


def _even(candidates: Tensor, total: Tensor) -> Tensor:
    """Divide ``total`` (B,) evenly among heads of at most ``candidates`` (B, H) each; the first heads
    get one more."""
    bound = candidates.sort(dim=1).values
    heads = bound.shape[1]
    left = torch.arange(heads, 0, -1, device=bound.device)
    # The sum over heads if none may hold more than the bound of this one, and one step further.
    sums = bound.cumsum(1) - bound + bound * left
    full = (sums <= total[:, None]).sum(1, keepdim=True).clamp(max=heads - 1)
    before = (bound.cumsum(1) - bound).gather(1, full)
    level = (total[:, None] - before) // left[full]
    even = torch.minimum(candidates, level)
    more = candidates > level
    return even + (more & (more.cumsum(1) <= (total - even.sum(1))[:, None]))
