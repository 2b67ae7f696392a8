"""SpAtten's cascades (HPCA 2021, arXiv 2012.09852): what is pruned in a layer stays out of all later ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtr.kernels.masks.budgets import top_k

if TYPE_CHECKING:
    from vtr.core.encoder_attention import EncoderAttentionSite


def first_pruned(start: float, depth: int) -> int:
    """Return the first layer that prunes, if a share ``start`` of ``depth`` layers in front prunes nothing."""
    return min(depth - 1, math.ceil(start * depth - 1e-9))


def linear_counts(whole: int, left: int, stages: int) -> tuple[int, ...]:
    """Count what is left of ``whole`` after each of ``stages`` prunings, in equal steps that end at ``left``."""
    return tuple(whole - round((whole - left) * i / stages) for i in range(1, stages + 1))


def heads_left(alive: Tensor, importance: Tensor, number: int) -> Tensor:
    """Keep the ``number`` most important heads among those that are alive.

    Args:
        alive: (..., H) bool.
        importance: (..., H).

    Returns:
        (..., H) bool. Of equal heads the first is kept.
    """
    return alive & top_k(importance.masked_fill(~alive, -torch.inf), number)


class HeadImportance:
    """Measures the importance of heads on data, for a choice that is the same for all images.

    Args:
        depth, heads: of the model.
        counts: layer to the number of heads that it computes, for the layers that leave some out.
    """

    def __init__(self, depth: int, heads: int, counts: dict[int, int]) -> None:
        self.sums = torch.zeros(depth, heads, dtype=torch.float64, device="cpu")
        self.counts = counts

    def see(self, site: EncoderAttentionSite) -> None:
        """Add the absolute outputs of the heads of one dense layer."""
        self.sums[site.layer] += output_size(site, site.dense()).sum(0).double().cpu()

    def finish(self) -> dict[str, Tensor]:
        """Return ``heads``, (layers, H) bool: the heads that each layer computes."""
        alive = torch.ones(self.sums.shape[1], dtype=torch.bool, device="cpu")
        table = []
        for layer in range(len(self.sums)):
            if layer in self.counts:
                alive = heads_left(alive, self.sums[:layer].sum(0), self.counts[layer])
            table.append(alive)
        return {"heads": torch.stack(table)}


def output_size(site: EncoderAttentionSite, out: Tensor) -> Tensor:
    """Sum the absolute values of what each head returns, (B, H, T, D) to (B, H) float32, without padding."""
    size = out.float().abs().sum(3)
    return (size if site.valid is None else size * site.valid[:, None]).sum(2)
