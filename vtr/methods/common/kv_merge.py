"""Merging the entries that leave a KV cache into those that stay, per KV head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PAIRS = 1 << 26  # similarities that are held at a time


def nearest(parts: tuple[Tensor, ...], losers: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Find the target of the same head that is most similar to each loser.

    The similarity is the product of the cosines of several tensors. If there are several, negative cosines
    count as 0, so that two opposites are not alike.

    Args:
        parts: one or more tensors (B, Hk, K, D): keys, or keys and values.
        losers: (B, Hk, K) bool, entries that leave.
        targets: (B, Hk, K) bool, entries into which they may be merged.

    Returns:
        similarity (B, Hk, K) float32, -inf for entries that do not leave and in heads without targets; and the
        entry (B, Hk, K) int64 that it is with, for others their own.
    """
    batch, heads, entries = losers.shape
    most = torch.stack([losers.sum(-1).max(), targets.sum(-1).max()]).tolist()
    similarity = torch.full(losers.shape, -torch.inf, device=losers.device)
    target = torch.arange(entries, device=losers.device).repeat(batch, heads, 1)
    if not all(most):
        return similarity, target
    gone, there = first(losers, most[0]), first(targets, most[1])
    absent = ~targets.gather(2, there)[:, :, None]
    centres = [directions(x, there) for x in parts]
    step = max(1, _PAIRS // (batch * heads * most[1]))
    for index in gone.split(step, 2):
        alike = torch.ones(1, device=losers.device)
        for x, centre in zip(parts, centres, strict=True):
            cosine = directions(x, index) @ centre.mT
            alike = alike * (cosine if len(parts) == 1 else cosine.clamp(min=0))
        value, place = alike.masked_fill(absent, -torch.inf).max(-1)
        own = ~losers.gather(2, index) | (value == -torch.inf)
        similarity.scatter_(2, index, value.masked_fill(own, -torch.inf))
        target.scatter_(2, index, torch.where(own, index, there.gather(2, place)))
    return similarity, target


def merged(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Replace each entry by the weighted mean of the entries that are merged into it.

    The weights of a mean are divided by their sum, so that merging equal entries leaves them as they are.

    Args:
        x: (B, Hk, K, D).
        weight: (B, Hk, K) float32, not negative; 0 for entries that are merged into none. An entry into which
            others are merged counts with its own weight, which is positive.
        target: (B, Hk, K) int64, the entry into which each one is merged; its own if it stays.

    Returns:
        (B, Hk, K, D) in the dtype of x. Entries into which nothing is merged are unchanged.
    """
    total = torch.zeros_like(weight).scatter_add(2, target, weight)
    share = weight / total.gather(2, target).clamp(min=torch.finfo(weight.dtype).tiny)
    index = target[..., None].expand_as(x)
    mean = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    mean = mean.scatter_add(2, index, x.float() * share[..., None])
    return torch.where(receives(weight, target)[..., None], mean.to(x.dtype), x)


def receives(weight: Tensor, target: Tensor) -> Tensor:
    """(B, Hk, K) bool, the entries into which others are merged; arguments as for :func:`merged`."""
    moves = (target != torch.arange(target.shape[2], device=target.device)) & (weight > 0)
    return torch.zeros_like(target).scatter_add(2, target, moves.long()) > 0


def first(chosen: Tensor, number: int) -> Tensor:
    """(B, Hk, number) int64, the chosen entries (B, Hk, K) bool in order, then others."""
    return torch.sort((~chosen).int(), dim=2, stable=True).indices[:, :, :number]


def directions(x: Tensor, index: Tensor) -> Tensor:
    """Entries ``index`` (B, Hk, N) of x (B, Hk, K, D), of length 1, float32."""
    rows = x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))
    return F.normalize(rows.float(), dim=-1)
