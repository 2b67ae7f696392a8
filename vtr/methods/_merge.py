"""Merging by representatives, and the clustering that merging methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.tokens import TokenMap, top_indices


def by_representative(representative: Tensor) -> TokenMap:
    """The merging map in which token j goes to the slot of ``representative[:, j]``.

    Args:
        representative: (B, N) int64, the token that stands for each token (its own index where it
            stays), -1 where it is dropped.
    """
    n = representative.shape[1]
    index = torch.arange(n, device=representative.device)
    stays = representative == index
    number = stays.sum(1)
    kept, padded = top_indices(stays.float(), number, stays)
    slot = stays.long().cumsum(1) - 1
    source = slot.gather(1, representative.clamp(min=0)).masked_fill(representative < 0, -1)
    return TokenMap.merged(kept, source, padded)


def dpc_knn(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Density-peaks clustering over k nearest neighbours, with k = ``clusters``.

    Distances are Euclidean over sqrt(C); the density of a token is exp(-mean d^2) over its k nearest
    (itself among them); a centre scores its density times the distance to the nearest denser token
    (to the farthest token where none is denser). Ties go to the lower index.

    Args:
        x: (M, C) features.
        clusters: number of clusters, at most M.

    Returns:
        centres (clusters,) ascending indices, and assignment (M,) indices of each token's centre.
    """
    x = x.float()
    m = x.shape[0]
    distance = torch.cdist(x[None], x[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
    distance = distance / x.shape[1] ** 0.5
    near = distance.topk(min(clusters, m), dim=1, largest=False).values
    density = torch.exp(-near.square().mean(1))
    denser = density[None, :] > density[:, None]
    gap = distance.masked_fill(~denser, float("inf")).amin(1)
    gap = torch.where(denser.any(1), gap, distance.max())
    order = torch.sort(density * gap, descending=True, stable=True).indices
    centres = order[:clusters].sort().values
    assignment = centres[distance[:, centres].argmin(1)]
    assignment[centres] = centres
    return centres, assignment
