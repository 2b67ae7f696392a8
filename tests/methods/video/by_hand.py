"""Scenes, and what several formulas share, written out token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SEEDS = range(4)


def clip(t: int, p: int, c: int = 12, seed: int = 0, noise: float = 0.6) -> Tensor:
    """A scene that changes twice: some places nearly static, some not; no two tokens are equal."""
    g = torch.Generator().manual_seed(seed)
    scenes = torch.randn(3, p, c, generator=g)
    moving = torch.rand(t, p, 1, generator=g) < 0.4
    x = scenes[(torch.arange(t) * 3 // max(t, 1)).clamp(max=2)]
    x = x + noise * moving * torch.randn(t, p, c, generator=g)
    return x + 0.03 * torch.randn(t, p, c, generator=g)


def cos(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def top(values: list[float], number: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:number]


def dpc(x: Tensor, k: int) -> list[float]:
    """Density times gap of each of (M, C) tokens."""
    m, c = x.shape
    d = [
        [float((x[i].double() - x[j].double()).norm()) / c**0.5 for j in range(m)] for i in range(m)
    ]
    rho = [math.exp(-sum(v * v for v in sorted(row)[:k]) / min(k, m)) for row in d]
    far = max(map(max, d))
    out = []
    for i in range(m):
        denser = [d[i][j] for j in range(m) if rho[j] > rho[i]]
        out.append(rho[i] * (min(denser) if denser else far))
    return out


def summed(stands: Tensor, weights: Tensor, x: Tensor) -> dict[int, Tensor]:
    """What each slot becomes."""
    flat = x.reshape(-1, x.shape[-1]).double()
    out: dict[int, Tensor] = {}
    for i, (to, w) in enumerate(zip(stands.tolist(), weights.tolist(), strict=True)):
        if to >= 0:
            out[to] = out.get(to, torch.zeros(x.shape[-1]).double()) + w * flat[i]
    return out
