"""Density-peaks clustering over k nearest neighbours, for many sets of tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.methods.common.temporal import best

_INF = float("inf")


def distances(x: Tensor) -> Tensor:
    """Euclidean distances over sqrt(C): (F, M, C) -> (F, M, M) float32.

    By a matrix product, on features without their mean (which no distance contains), so that little of
    the float32 is lost to the difference of squares. Symmetric to the bit: two tokens that are each
    other's nearest have one density.
    """
    x = x.float()
    x = x - x.mean(1, keepdim=True)
    square = x.square().sum(-1)
    product = x @ x.mT
    gap = square[:, :, None] + square[:, None] - (product + product.mT)
    gap.diagonal(dim1=1, dim2=2).zero_()
    return (gap.clamp(min=0) / x.shape[-1]).sqrt()


def peaks(distance: Tensor, valid: Tensor, k: int) -> Tensor:
    """Score each token as the centre of a cluster: its density times its distance to denser ones.

    The density is exp(-mean d^2) over the k nearest tokens, itself among them; the distance is that to
    the nearest denser token, or the largest of the set if none is denser. Of two tokens of one
    density the first counts as denser (the authors of this family of methods add noise instead).

    Args:
        distance: (F, M, M).
        valid: (F, M) bool, the tokens of each set.
        k: number of neighbours; fewer if the set has fewer.

    Returns:
        (F, M) float32, -inf for tokens that are not valid.
    """
    pair = valid[:, :, None] & valid[:, None]
    near = distance.masked_fill(~pair, _INF).topk(min(k, distance.shape[-1]), -1, largest=False)
    real = near.values < _INF
    total = near.values.masked_fill(~real, 0.0).square().sum(-1)
    density = torch.exp(-total / real.sum(-1).clamp(min=1))
    index = torch.arange(density.shape[-1], device=density.device)
    tie = (density[:, None] == density[:, :, None]) & (index[None, :] < index[:, None])
    denser = ((density[:, None] > density[:, :, None]) | tie) & pair
    gap = distance.masked_fill(~denser, _INF).amin(-1)
    largest = distance.masked_fill(~pair, 0.0).amax((1, 2))[:, None]
    gap = torch.where(denser.any(-1), gap, largest)
    return (density * gap).masked_fill(~valid, -_INF)


def cluster(x: Tensor, valid: Tensor, number: Tensor, k: int) -> Tensor:
    """Clusters of each set of tokens.

    Args:
        x: (F, M, C).
        valid: (F, M) bool.
        number: (F,) int64 clusters of each set, at most its tokens; a set may have none.
        k: neighbours of the density.

    Returns:
        (F, M) int64, the centre of each token's cluster (its own index for a centre), -1 for tokens that
        are not valid and in sets without clusters.
    """
    distance = distances(x)
    centre = best(peaks(distance, valid, k), number, valid)
    nearest = distance.masked_fill(~centre[:, None], _INF).argmin(-1)
    index = torch.arange(x.shape[1], device=x.device)
    assigned = torch.where(centre, index, nearest)
    return assigned.masked_fill(~valid | ~centre.any(-1, keepdim=True), -1)


def mean_weights(assigned: Tensor, beta: float | None = None) -> Tensor:
    """Weights by which the tokens of each cluster are summed.

    A plain mean; with ``beta`` the centre gets max(1 / size, beta) and the others share the rest.

    Args:
        assigned: (F, M) int64 centres, -1 for tokens in no cluster (weight 0).
    """
    m = assigned.shape[1]
    slot = torch.where(assigned < 0, m, assigned)
    size = torch.zeros(assigned.shape[0], m + 1, device=assigned.device)
    size = size.scatter_add(1, slot, torch.ones_like(slot, dtype=torch.float32)).gather(1, slot)
    weights = 1.0 / size
    if beta is not None:
        head = weights.clamp(min=beta).masked_fill(size == 1, 1.0)
        others = (1.0 - head) / (size - 1).clamp(min=1)
        weights = torch.where(assigned == torch.arange(m, device=assigned.device), head, others)
    return weights.masked_fill(assigned < 0, 0.0)
