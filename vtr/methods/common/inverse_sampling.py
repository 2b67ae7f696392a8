"""Deterministic sampling of tokens by the inverse of the distribution of their scores (ATS, ECCV 2022)."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_transform_sample(score: Tensor, samples: int, valid: Tensor | None = None) -> Tensor:
    """Choose tokens at even steps of the scores' cumulative distribution (section 3.2, equation 5).

    The scores are sorted ascending and summed up to a distribution, which is brought to [0, 1]. ``samples``
    values at even distances from the smallest positive one to 1 each take the token whose value is nearest, the
    lower one of two. Tokens that are taken several times stay once, so that an image whose scores are
    concentrated keeps fewer.

    Args:
        score: (B, N) float32, not negative.
        samples: at least 1. One sample is the token with the highest score.
        valid: (B, N) bool, False for padding; or None. A row has at least one valid token.

    Returns:
        (B, N) bool, True for the tokens that are taken: at least one per row, at most ``samples``.
    """
    if valid is None:
        valid = torch.ones_like(score, dtype=torch.bool)
    rising, order = score.masked_fill(~valid, float("inf")).sort(dim=1, stable=True)
    real = rising.isfinite()
    total = torch.where(real, rising, 0).cumsum(1)
    low, high = total[:, :1], total[:, -1:]
    share = (total - low) / (high - low).clamp_min(torch.finfo(score.dtype).tiny)
    start = torch.where(share > 0, share, 1).amin(1, keepdim=True)
    steps = torch.linspace(0, 1, samples, device=score.device) if samples > 1 else score.new_ones(1)
    wanted = start + (1 - start) * steps
    share = share.masked_fill(~real, float("inf"))
    above = torch.searchsorted(share, wanted).clamp(max=score.shape[1] - 1)
    below = (above - 1).clamp(min=0)
    nearer_below = wanted - share.gather(1, below) <= share.gather(1, above) - wanted
    picked = torch.where(nearer_below, below, above)
    # Of tokens with one value (scores of zero) the first is taken.
    picked = torch.searchsorted(share, share.gather(1, picked))
    taken = torch.zeros_like(valid).scatter(1, order.gather(1, picked), True)
    return taken & valid
