"""Adaptive halting of tokens (A-ViT, arXiv 2112.07658, section 3): the shares by which layers are mixed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(eq=False)
class Halting:
    """The state of halting behind a layer, for the T tokens of the input: protected ones, then visual ones.

    Attributes:
        spent: (B, T) float32, sum of the halting scores so far.
        out: (B, T, C) float32 (or float64), sum of the layers' outputs, each with its share.
        ponder: (B, T) float32, layers computed plus remainder (N + R of the paper).
        running: (B, T) bool, tokens that have not halted.
    """

    spent: Tensor
    out: Tensor
    ponder: Tensor
    running: Tensor

    @classmethod
    def start(cls, batch: int, tokens: int, x: Tensor) -> Halting:
        """No token has halted. ``x`` (B, t, C) are hidden states, for width, device and dtype."""
        zeros = torch.zeros(batch, tokens, device=x.device)
        wide = torch.promote_types(x.dtype, torch.float32)
        out = torch.zeros(batch, tokens, x.shape[2], dtype=wide, device=x.device)
        return cls(zeros, out, zeros, torch.ones_like(zeros, dtype=torch.bool))

    def step(self, x: Tensor, score: Tensor, eps: float) -> Halting:
        """Add a layer's output.

        Args:
            x: (B, T, C) outputs, anything finite for tokens that are gone.
            score: (B, T) float32 halting scores.
            eps: a token halts once the sum of its scores reaches 1 - eps, with the remainder as its share.
        """
        done = self.running & (self.spent + score >= 1 - eps)
        rest = 1 - self.spent
        share = torch.where(done, rest, score) * self.running
        return Halting(
            self.spent + score * self.running,
            self.out + share[..., None].to(self.out.dtype) * x.to(self.out.dtype),
            self.ponder + self.running + rest * done,
            self.running & ~done,
        )


def prior(depth: int, target: int) -> list[float]:
    """Density of a normal distribution about layer ``target`` with deviation 1, scaled so that the layers before
    it have 0.98 together."""
    density = [math.exp(-0.5 * (i - target) ** 2) for i in range(depth)]
    total = sum(density[:target])
    return [0.98 * d / total for d in density]


def prior_distance(means: Tensor, target: int) -> Tensor:
    """KL divergence of the prior from the layers' mean halting scores (L,), divided by L.

    The scores are divided by their sum and held in [0.01, 0.99], as in the authors' code.
    """
    wanted = means.new_tensor(prior(len(means), target))
    found = (means / means.sum()).clamp(0.01, 0.99)
    return F.kl_div(found.log(), wanted, reduction="sum") / len(means)
