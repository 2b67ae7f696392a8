"""TPS: each pruned token is squeezed into the most similar token that stays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods.base import Reduction, Site, register, take
from vtr.methods.common.merge import by_rank, most_similar
from vtr.methods.evit import EViT


@register
@dataclass(frozen=True)
class TPS(EViT):
    r"""Token Pruning and Squeezing with class attention (eTPS, CVPR 2023, arXiv 2304.10716).

    Stages, scores and numbers are those of :class:`EViT` without the fused token. Each dropped token p goes to the
    most cosine-similar kept token i, and y_i = (e x_i + sum_p exp(cos_ip) x_p) / (e + sum_p exp(cos_ip)) (section
    3.3). Sizes are not counted: the paper leaves attention and pooling as they are.

    .. math::

        y_i = \frac{e \, x_i + \sum_{p \to i} e^{\cos(x_p, x_i)} x_p}{e + \sum_{p \to i} e^{\cos(x_p, x_i)}}

    Differences from the authors' code, which has the form with DynamicViT's predictors alone (dTPS) and squeezes
    before a block: the cut is between attention and MLP, as EViT's; of two kept tokens that are equally similar
    the first gets the token (theirs gives it to both).

    Args:
        keep, layers: as in :class:`EViT`.
        fuse: squeeze; False drops the tokens.
    """

    name: ClassVar[str] = "tps"
    paper: ClassVar[str] = (
        "TPS: Joint Token Pruning and Squeezing Towards More Aggressive Compression of Vision Transformers, "
        "CVPR 2023, arXiv 2304.10716"
    )

    @property
    def extra(self) -> int:
        return 0

    def select(
        self, site: Site, score: Tensor, number: int | Tensor, raw: Tensor
    ) -> Reduction | None:
        if not self.fuse or isinstance(number, Tensor):
            return super().select(site, score, number, raw)
        order = torch.sort(score, dim=1, descending=True, stable=True).indices
        partner, similarity = most_similar(take(site.hidden, order), number)
        step, _ = by_rank(order, number, partner)
        own = torch.full_like(score, math.e)
        like = similarity.exp().to(own.dtype)
        return Reduction(step, own.scatter(1, order[:, number:], like))
