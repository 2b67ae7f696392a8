"""Merging by representatives: the map in which each token goes to its representative."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.tokens import TokenMap, top_indices


def by_representative(representative: Tensor) -> TokenMap:
    """The merging map in which token j goes to the slot of ``representative[:, j]``.

    Args:
        representative: (B, N) int64, the representative of each token (its own index if it is kept),
            -1 if it is dropped.
    """
    n = representative.shape[1]
    index = torch.arange(n, device=representative.device)
    stays = representative == index
    number = stays.sum(1)
    kept, has_padding = top_indices(stays.float(), number, stays)
    slot = stays.long().cumsum(1) - 1
    source = slot.gather(1, representative.clamp(min=0)).masked_fill(representative < 0, -1)
    return TokenMap.merged(kept, source, has_padding)


def by_rank(rank: Tensor, number: int, partner: Tensor | None = None) -> tuple[TokenMap, Tensor]:
    """Keep the first tokens of a ranking, merge those that follow into them, and drop the rest.

    Args:
        rank: (B, N) int64, all tokens, the best first.
        number: tokens that stay.
        partner: (B, P) int64, for each of the P tokens that follow, the rank below ``number`` of the token
            that it goes to; None merges none.

    Returns:
        The map, and the slot (B, ``number``) of each token that stays, by its rank.
    """
    kept, position = rank[:, :number].sort(1)
    slots = torch.arange(number, device=rank.device).expand_as(kept)
    slot = torch.empty_like(kept).scatter(1, position, slots)
    source = torch.full_like(rank, -1).scatter(1, kept, slots)
    if partner is not None:
        merged = rank[:, number : number + partner.shape[1]]
        source = source.scatter(1, merged, slot.gather(1, partner))
    return TokenMap.merged(kept, source), slot


@torch.no_grad()
def most_similar(x: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Find for each token behind the first ``number`` the most cosine-similar of them; the first of equal ones.

    Args:
        x: (B, N, C), ``number`` < N.

    Returns:
        its index (B, N - number) int64, and the similarity, float32.
    """
    unit = F.normalize(x.float(), dim=-1)
    similarity, partner = (unit[:, number:] @ unit[:, :number].transpose(1, 2)).max(-1)
    return partner, similarity
