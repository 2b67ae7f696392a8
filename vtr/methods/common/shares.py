"""Selection by cumulative share: the fewest of the largest entries whose sum reaches a share."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.kernels.masks.budgets import top_k


def count_to_share(mass: Tensor, share: float) -> Tensor:
    """Count the fewest of the largest entries whose sum reaches a share of the whole.

    The entry that reaches the share is counted.

    Args:
        mass: (..., N) not negative.
        share: in (0, 1]; 1 is all N entries.

    Returns:
        (...) int64, from 1 to N.
    """
    if share >= 1:
        return torch.full(mass.shape[:-1], mass.shape[-1], dtype=torch.int64, device=mass.device)
    # In float64: thousands of rounded steps in float32 would move the count.
    sums = mass.sort(dim=-1, descending=True).values.cumsum(-1, dtype=torch.float64)
    return ((sums < share * sums[..., -1:]).sum(-1) + 1).clamp(max=mass.shape[-1])


def reach_share(mass: Tensor, share: float | Tensor, always: Tensor | None = None) -> Tensor:
    """Select the fewest of the largest entries whose sum reaches a share of the whole.

    The entry that reaches the share is selected. Of equal entries the first is taken.

    Args:
        mass: (..., N) not negative.
        share: in [0, 1], or a tensor that broadcasts to (..., 1). With 1 all entries are selected, those
            of mass 0 among them; with 0 nothing but ``always``.
        always: bool, broadcasts to mass: entries that are selected whatever their mass. Their sum
            counts first, as in the authors' code of XAttention.

    Returns:
        bool of the shape of mass.
    """
    if isinstance(share, Tensor):
        share = share.to(mass.device, torch.float64)
    else:  # filled on the device: a number that is copied there would make the host wait
        share = torch.full((), share, dtype=torch.float64, device=mass.device)
    goal = share * mass.sum(-1, keepdim=True, dtype=torch.float64)
    rest, given = mass, torch.zeros_like(goal)
    if always is not None:
        rest = mass.masked_fill(always, 0)
        given = (mass - rest).sum(-1, keepdim=True, dtype=torch.float64)
    falling, order = rest.sort(dim=-1, descending=True, stable=True)
    before = falling.cumsum(-1, dtype=torch.float64) - falling
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    chosen = chosen.scatter(-1, order, (given + before < goal) | (share >= 1))
    return chosen if always is None else chosen | always


def largest(mass: Tensor, count: Tensor) -> Tensor:
    """Select the largest entries, a separate number in each row.

    Args:
        mass: (..., N). Of equal entries the first is taken.
        count: (...) int64, or what broadcasts to it.

    Returns:
        bool of the shape of mass.
    """
    return top_k(mass, count)


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Compute the square root of the Jensen-Shannon divergence of distributions over the last axis.

    In nats, from 0 to sqrt(log 2) = 0.83. An entry of 0 adds 0, so that probabilities that
    underflow give no NaN.
    """
    middle = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny)
    parts = torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)
    return (parts.sum(-1) / 2).clamp(min=0).sqrt()
