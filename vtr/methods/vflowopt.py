"""VFlowOpt: one importance map from the encoder, pruned progressively, with recycling."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.methods._merge import by_representative
from vtr.signals import Site
from vtr.tokens import TokenMap


def calibrated_context(site: Site, threshold: float, chunk: int = 256) -> Tensor:
    """Attention that each token gets from the tokens that attract attention, (B, N) float32.

    With A the attention map averaged over heads, r_j = mean_i A_ij and K = {j: r_j > t mean(r)}:
    context_i = mean over k in K of A_ki. Where K is empty it is every token (the authors' code
    averages the empty set). Rows are made ``chunk`` at a time.
    """
    received = site.attention_received(chunk)
    alive = torch.ones_like(received) if site.valid is None else site.valid.float()
    mean = (received * alive).sum(1, keepdim=True) / alive.sum(1, keepdim=True)
    chosen = (received > threshold * mean).float() * alive
    chosen = torch.where(chosen.any(1, keepdim=True), chosen, alive)
    q = site.qkv[0][:, :, site.prefix :]
    total = torch.zeros_like(received)
    for start in range(0, site.n, chunk):
        rows = site.attention_from(q[:, :, start : start + chunk])[..., site.prefix :].mean(1)
        total = total + (rows * chosen[:, start : start + chunk, None]).sum(1)
    return total / chosen.sum(1, keepdim=True)


def recycle(importance: Tensor, cell: Tensor, target: Tensor, valid: Tensor) -> TokenMap:
    """Merge the least important tokens by cells until ``target[b]`` tokens are left in row b.

    The m least important tokens are merged within their cells, each into the slot of the cell's most
    important one of them; m is the smallest number that leaves the target. Where even merging all
    leaves more (fewer tokens wanted than there are cells), the most important cells stay and the
    others are dropped.

    Args:
        importance: (B, N) float32.
        cell: (B, N) int64 in 0..N-1: which tokens may be merged with each other.
        target: (B,) int64.
        valid: (B, N) bool.
    """
    batch, n = importance.shape
    device = importance.device
    # Ascending importance, the invalid last; rank[j] is the place of token j.
    order = torch.sort(importance.masked_fill(~valid, float("inf")), dim=1, stable=True).indices
    order = order.gather(1, torch.sort((~valid).gather(1, order).int(), dim=1, stable=True).indices)
    place = torch.arange(n, device=device).expand(batch, n)
    rank = torch.empty_like(order).scatter(1, order, place)
    number = valid.sum(1, keepdim=True)
    first = torch.full_like(rank, n).scatter_reduce(
        1, cell, torch.where(valid, rank, n), "amin", include_self=True
    )
    opens = ((rank == first.gather(1, cell)) & valid).gather(1, order)
    left = number - (place + 1) + opens.long().cumsum(1)  # after merging the first 1..n tokens
    merged = ((left > target[:, None]) & (place < number)).sum(1, keepdim=True) + 1
    merged = torch.where(target[:, None] >= number, 0, merged.minimum(number))
    inside = valid & (rank < merged)
    last = torch.full_like(rank, -1).scatter_reduce(
        1, cell, torch.where(inside, rank, -1), "amax", include_self=True
    )
    head = order.gather(1, last.gather(1, cell).clamp(min=0))
    index = torch.arange(n, device=device).expand(batch, n)
    representative = torch.where(inside, head, index).masked_fill(~valid, -1)
    stays = representative == index
    # Fewer tokens than cells: the least important heads are dropped with their cells.
    surplus = (stays.sum(1) - target).clamp(min=0)
    worst = torch.where(stays.gather(1, order), stays.gather(1, order).long().cumsum(1), 0)
    gone = ((worst > 0) & (worst <= surplus[:, None])).gather(1, rank)
    lost = gone.gather(1, representative.clamp(min=0))
    return by_representative(representative.masked_fill(lost, -1))
