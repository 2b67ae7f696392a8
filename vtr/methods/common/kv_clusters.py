"""Clusters of the entries that leave a KV cache, each summed into one entry."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.methods.common.dpc_knn import cluster
from vtr.methods.common.kv_merge import first


def summed(
    k: Tensor, v: Tensor, losers: Tensor, share: float, neighbours: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster the entries that leave, per KV head, by density peaks of their keys, and sum each cluster.

    Args:
        k, v: (B, Hk, K, D).
        losers: (B, Hk, K) bool, entries that leave.
        share: clusters of a head, as a share of its losers, rounded up.
        neighbours: of which the density of an entry is computed.

    Returns:
        (B, Hk, K) bool, the entries that hold a sum, the centres of clusters; and k and v, in which each centre
        holds the sum of its cluster and all others are as they were.
    """
    number = losers.sum(-1)
    most = int(number.max())
    if not most:
        return torch.zeros_like(losers), k, v
    index = first(losers, most)  # (B, Hk, M)
    valid = losers.gather(2, index).flatten(0, 1)
    rows = index[..., None].expand(-1, -1, -1, k.shape[3])
    clusters = torch.ceil(number.flatten() * share - 1e-9).long()
    centre = cluster(k.gather(2, rows).flatten(0, 1), valid, clusters, neighbours)
    centre = centre.unflatten(0, losers.shape[:2])
    joins = centre >= 0
    target = index.gather(2, centre.clamp(min=0))
    centres = torch.zeros_like(losers, dtype=torch.int64).scatter_add(2, target, joins.long()) > 0
    made = [_sums(x, index, target, joins, centres) for x in (k, v)]
    return centres, made[0], made[1]


def _sums(x: Tensor, index: Tensor, target: Tensor, joins: Tensor, centres: Tensor) -> Tensor:
    rows, targets = (i[..., None].expand(-1, -1, -1, x.shape[3]) for i in (index, target))
    values = x.gather(2, rows).float() * joins[..., None]
    total = torch.zeros(x.shape, device=x.device).scatter_add(2, targets, values)
    return torch.where(centres[..., None], total.to(x.dtype), x)
