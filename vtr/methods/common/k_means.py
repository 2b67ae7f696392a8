"""K-means by cosine similarity, for many sets of tokens at once."""

from __future__ import annotations

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
