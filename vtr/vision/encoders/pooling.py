"""Pooling: the mean over merged tokens, and the learned probe of a tower (SigLIP)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def has_pooling(tower: Any) -> bool:
    """Tell whether a tower ends in such a head, of transformers' form."""
    head = getattr(tower, "head", None)
    return (
        isinstance(getattr(head, "attention", None), nn.MultiheadAttention)
        and isinstance(getattr(head, "probe", None), nn.Parameter)
        and hasattr(tower, "post_layernorm")
    )


class Pooling:
    """Calls a tower's head on hidden states of one of its layers."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> attention of the probe, mean over heads, (B, N) float32, and output (B, C)."""
        head = self.tower.head
        x = self.tower.post_layernorm(hidden)
        probe = head.probe.expand(x.shape[0], -1, -1).to(x.dtype)
        out, weights = head.attention(probe, x, x, need_weights=True)
        out = out + head.mlp(head.layernorm(out))
        return weights[:, 0].float(), out[:, 0]


def log_sizes(sizes: Tensor) -> Tensor:
    """Logarithm of (B, N) sizes, -inf for those of 0, with a gradient of 0 there."""
    tiny = torch.finfo(sizes.dtype).tiny
    return torch.where(sizes > 0, sizes.clamp_min(tiny).log(), -float("inf"))


def weighted_mean(x: Tensor, sizes: Tensor) -> Tensor:
    """Mean of x (B, N, C) over tokens, each counted ``sizes`` (B, N) times; summed in float32."""
    weights = (sizes / sizes.sum(1, keepdim=True))[..., None]
    return (
        (x.float() * weights).sum(1).to(x.dtype)
        if x.dtype != torch.float64
        else (x * weights).sum(1)
    )
