"""The class token's attention in training, when tokens that would be gone are there and are not seen."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.core.site import Site


def live_class_attention(site: Site, policy: Tensor | None) -> Tensor:
    """Compute class attention under a policy of the tokens as keys, (B, N) float32, mean over heads.

    Args:
        policy: (B, N) in [0, 1], that under which this block's attention ran; None if all tokens count.
    """
    rows = site.cls_attention(per_head=True)
    if policy is None:
        return rows.mean(1)
    seen = rows * policy[:, None]
    unseen = rows.sum(-1, keepdim=True) - seen.sum(-1, keepdim=True)
    return (seen / (1 - unseen).clamp_min(torch.finfo(rows.dtype).tiny)).mean(1)
