"""K-means by cosine similarity and by Euclidean distance, for many sets of tokens at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.tokens import take, top_indices
from vtr.kernels.precision import full_precision


def k_means(x: Tensor, valid: Tensor, number: Tensor, rounds: int = 10) -> Tensor:
    """Cluster the tokens of each sample by the direction of their features.

    The first centres are tokens at equal distances in raster order. In each round every token joins the
    centre of highest cosine (the first of equals), and a centre becomes the mean of the unit vectors of its
    tokens. The token that a cluster began with stays in it, so that no cluster becomes empty and no random
    number is drawn.

    Args:
        x: (B, N, C), in any floating dtype; computed in float32.
        valid: (B, N) bool, the tokens to cluster.
        number: (B,) int64 clusters of each sample, at most its valid tokens; 0 clusters nothing.
        rounds: rounds of assignment.

    Returns:
        (B, N) int64, the token that each token's cluster began with; -1 for other tokens.
    """
    is_seed, bucket = _spaced(valid, number)
    seeds, _ = top_indices(is_seed.float(), is_seed.sum(1), is_seed)
    if seeds.shape[1] == 0:
        return torch.full_like(bucket, -1)
    unit = F.normalize(x.float(), dim=-1) * valid[..., None]
    centres = take(unit, seeds.clamp(min=0))
    cluster = bucket
    for _ in range(rounds):
        with full_precision(x.device):
            likeness = unit @ F.normalize(centres, dim=-1).mT
        nearest = likeness.masked_fill((seeds < 0)[:, None], -float("inf")).argmax(-1)
        cluster = torch.where(is_seed, bucket, nearest)
        index = cluster[..., None].expand(-1, -1, x.shape[2])
        centres = torch.zeros_like(centres).scatter_add(1, index, unit)
    return seeds.gather(1, cluster).masked_fill(~valid | (number == 0)[:, None], -1)


def _spaced(valid: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the valid tokens of each row into ``number`` runs of equal length, give or take one.

    Returns:
        (B, N) bool, the first token of each run, and (B, N) int64, the run of each token.
    """
    total, number = valid.sum(1, keepdim=True).clamp(min=1), number[:, None]
    rank = valid.long().cumsum(1) - 1
    run = torch.div(rank * number, total, rounding_mode="floor")
    before = torch.div((rank - 1) * number, total, rounding_mode="floor")
    first = valid & (number > 0) & ((rank == 0) | (run > before))
    return first, run.clamp(min=0)


class Clusters(NamedTuple):
    """Sets of tokens in clusters.

    Attributes:
        label: (..., N) int64, the cluster of each token.
        centres: (..., C, D) float32, the mean of each cluster; of an empty one, the centre that it had.
        sizes: (..., C) int64, tokens of each cluster, from 0 on.
    """

    label: Tensor
    centres: Tensor
    sizes: Tensor


_AT_ONCE = 1 << 26
"""Distances that are held at once: 256 MiB in float32."""


@torch.no_grad()
def euclidean_k_means(x: Tensor, start: int | Tensor, rounds: int) -> Clusters:
    """Cluster the tokens of each set by Euclidean distance.

    In each round every token joins the nearest centre (the first of equals), and a centre becomes the mean
    of its tokens. A centre without tokens stays. No random number is drawn, and no sum depends on the order
    of threads.

    Args:
        x: (..., N, D), in any floating dtype; computed in float32 (float64 for float64).
        start: (..., C, D), the first centres, such as those of the last denoising step; or the number C
            of clusters, at most N: the first centres are then tokens at equal distances.
        rounds: rounds, at least 1.

    Returns:
        :class:`Clusters`.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    tokens = x.reshape(-1, *x.shape[-2:]).to(work)
    if isinstance(start, int):
        places = torch.arange(start, device=x.device) * x.shape[-2] // start
        centres = tokens[:, places]
    else:
        centres = start.reshape(-1, *start.shape[-2:]).to(work)
    number = centres.shape[1]
    step = max(1, _AT_ONCE // (tokens.shape[0] * number))
    parts = tokens.split(step, 1)
    for _ in range(rounds):
        length = centres.square().sum(-1)[:, None] / 2
        label, total = [], torch.zeros_like(centres)
        sizes = torch.zeros_like(centres[..., 0])
        for part in parts:
            with full_precision(x.device):
                label.append((part @ centres.mT - length).argmax(-1))
                own = F.one_hot(label[-1], number).to(work)
                total += own.mT @ part
            sizes += own.sum(1)
        mean = total / sizes.clamp(min=1)[..., None]
        centres = torch.where(sizes[..., None] > 0, mean, centres)
    outer = x.shape[:-2]
    return Clusters(
        torch.cat(label, 1).view(*outer, -1),
        centres.view(*outer, number, -1),
        sizes.long().view(*outer, number),
    )
