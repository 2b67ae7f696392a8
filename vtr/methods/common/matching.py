"""Bipartite soft matching (ToMe, ICLR 2023, arXiv 2210.09461)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.tokens import TokenMap, take
from vtr.kernels import bipartite_match


@torch.no_grad()
def bipartite_soft_matching(
    metric: Tensor, r: int, order: Tensor | None = None, prefix: int = 0
) -> tuple[TokenMap, Tensor]:
    """Merge the ``r`` most similar pairs of an alternating split (section 3, figure 1 of the paper).

    Args:
        metric: (B, N, D), compared by cosine.
        r: pairs to merge, at most N // 2.
        order: (B, N) int64, the tokens in the order whose alternate positions make A and B; None is
            the raster order.
        prefix: protected tokens in front, which shift the alternation.

    Returns:
        The map, and the order (B, N - r) of its slots for the next call: what is left of A (ascending;
        by falling similarity without a prefix, as in the authors' code), then B.
    """
    batch, n, _ = metric.shape
    device = metric.device
    metric = F.normalize(metric.float(), dim=-1)
    if order is None:
        index = torch.arange(n, device=device)
        a, b = index[prefix % 2 :: 2], index[1 - prefix % 2 :: 2]
        a, b = a.expand(batch, -1), b.expand(batch, -1)
        metric_a, metric_b = metric[:, prefix % 2 :: 2], metric[:, 1 - prefix % 2 :: 2]
    else:
        a, b = order[:, prefix % 2 :: 2], order[:, 1 - prefix % 2 :: 2]
        metric_a, metric_b = take(metric, a), take(metric, b)
    score, partner = bipartite_match(metric_a.contiguous(), metric_b.contiguous())
    r = min(r, a.shape[1])
    rank = torch.sort(score, dim=1, descending=True, stable=True).indices
    moved, stay = rank[:, :r], rank[:, r:]
    if prefix:
        stay = stay.sort(1).values
    rest, sources = a.gather(1, stay), a.gather(1, moved)
    targets = b.gather(1, partner.gather(1, moved))
    survivors = torch.cat([rest, b], 1)
    kept, position = survivors.sort(1)
    slot_of = torch.empty_like(survivors).scatter(
        1, position, torch.arange(n - r, device=device).expand(batch, -1)
    )
    source = torch.empty(batch, n, dtype=torch.long, device=device).scatter(1, survivors, slot_of)
    source = source.scatter(1, sources, source.gather(1, targets))
    return TokenMap.merged(kept, source), slot_of
