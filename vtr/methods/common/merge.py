"""Merging by representatives: the map in which each token goes to its representative."""

from __future__ import annotations

import torch
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
