"""EViT: keep the attentive tokens, fuse the inattentive ones into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.core import budget
from vtr.methods.base import (
    Examples,
    Keep,
    Method,
    ModelInfo,
    Reduction,
    Schedulable,
    ScoredMethod,
    Site,
    TokenMap,
    register,
)


@register
@dataclass(frozen=True)
class EViT(ScoredMethod):
    r"""Token reorganisation, "Not All Patches are What You Need" (ICLR 2022, arXiv 2202.07800).

    At each stage, with s_j the class token's attention to token j in that block (mean over heads,
    not normalised again): the k tokens of highest s_j stay, and the others are fused into one token
    sum_j s_j x_j (section 3.2; not normalised, as in the authors' code). The cut is between
    attention and MLP. An earlier fused token competes like any other.

    .. math::

        s_j = \frac{1}{H} \sum_h A_h[\mathrm{cls}, j], \qquad
        x_{\mathrm{fused}} = \sum_{j \notin \operatorname{top}_k(s)} s_j x_j

    Differences from the authors' code: every prefix token is protected, not only the first (a
    distilled DeiT's second token would otherwise be scored as a patch), and tokens stay in raster
    order, the fused one in the place of its most attended member (outputs do not depend on the
    order where positions are added before the first block). One inattentive token alone is left as it
    is: theirs would be multiplied by its score.

    Args:
        keep: a float is the rate of *each* stage, as in the paper (0.7 leaves 34 % after three); an
            int is the number of tokens after the last stage, reached geometrically; a tuple gives
            each stage's own rate or number. The fused token comes on top.
        layers: 0-based blocks; None is the paper's 3, 6, 9 of 12 (L/4, L/2, 3L/4).
        fuse: False drops the inattentive tokens.
    """

    name: ClassVar[str] = "evit"
    paper: ClassVar[str] = (
        "EViT: Expediting ViTs via Token Reorganizations, ICLR 2022, arXiv 2202.07800"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar = {"encoder": frozenset({"cls_attention"})}
    training: ClassVar[str] = "optional"
    grows: ClassVar[bool] = True

    keep: Keep | tuple[Keep, ...] = 0.7
    layers: tuple[int, ...] | None = None
    fuse: bool = True

    @classmethod
    def examples(cls) -> Examples:
        return {"counted": (cls(keep=0.4, layers=(1,), fuse=False),)}

    def validate(self) -> None:
        super().validate()
        budget.check_flag(self.fuse, "fuse")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return budget.third_points(depth)

    @property
    def extra(self) -> int:
        """Tokens that are left beside those that ``keep`` counts."""
        return int(self.fuse)

    def schedulable(self, info: ModelInfo) -> Schedulable:
        return super().schedulable(info)._replace(least=1 + self.extra)

    def scheduled(self, info: ModelInfo, kept: Sequence[Keep], tokens: int | None = None) -> Method:
        made = super().scheduled(info, kept, tokens)
        assert isinstance(made, EViT) and isinstance(made.keep, tuple)
        if isinstance(made.keep[0], int):  # the fused token is one of those that are left
            return made.replace(keep=tuple(max(1, k - self.extra) for k in made.keep))
        before = (1.0, *made.keep)
        return made.replace(keep=tuple(b / a for a, b in zip(before, made.keep, strict=False)))

    def number(self, site: Site) -> int | Tensor:
        layers = self.layers_of(site.info)
        stage, rate = layers.index(site.layer), self.keep
        if isinstance(rate, tuple):
            rate = rate[stage]
        elif isinstance(rate, int):
            rate = budget.geometric(rate, len(layers), site.map.n_in)[stage]
        # Samples have different numbers of tokens after a method that left them so.
        return (
            budget.count(rate, site.n) if site.valid is None else budget.counts(rate, site.counts)
        )

    def score(self, site: Site) -> Tensor:
        if self.fuse and site.valid is not None:
            raise ValueError(
                f"{self.name} cannot fuse after a method that left the samples of a batch with different "
                "numbers of tokens: use fuse=False, or batch size 1"
            )
        return site.cls_attention()

    def select(
        self, site: Site, score: Tensor, number: int | Tensor, raw: Tensor
    ) -> Reduction | None:
        if not self.fuse or isinstance(number, Tensor):
            return super().select(site, score, number, raw)
        if number == site.n - 1:  # fusing one token would only rescale it
            return None
        # The fused slot's representative is the best of the inattentive, the next of the ranking.
        best = torch.sort(score, dim=1, descending=True, stable=True).indices[:, : number + 1]
        kept, order = best.sort(1)
        fused = (order == number).int().argmax(1, keepdim=True)
        slots = torch.arange(number + 1, device=kept.device).expand_as(kept)
        source = fused.expand(-1, site.n).scatter(1, kept, slots)
        weights = torch.where(source == fused, score, 1.0)
        return Reduction(TokenMap.merged(kept, source), weights, normalize=False)
