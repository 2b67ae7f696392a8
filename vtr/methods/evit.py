"""EViT: keep the attentive tokens, fuse the inattentive ones into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtr.core.budget import (
    Keep,
    check_flag,
    check_layers,
    check_schedule,
    count,
    counts,
    fit_layers,
    geometric,
    third_points,
)
from vtr.core.method import Examples, Reduction, Stage, TokenMethod
from vtr.core.registry import register
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, top_indices


@register
@dataclass(frozen=True)
class EViT(TokenMethod):
    """Token reorganisation, "Not All Patches are What You Need" (ICLR 2022, arXiv 2202.07800).

    At each stage, with s_j the class token's attention to token j in that block (mean over heads,
    not normalised again): the k tokens of highest s_j stay, and the others are fused into one token
    sum_j s_j x_j (section 3.2; not normalised, as in the authors' code). The cut is between
    attention and MLP. An earlier fused token competes like any other.

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

    keep: Keep | tuple[Keep, ...] = 0.7
    layers: tuple[int, ...] | None = None
    fuse: bool = True

    @classmethod
    def examples(cls) -> Examples:
        return {"counted": (cls(keep=0.4, layers=(1,), fuse=False),)}

    def validate(self) -> None:
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))
        self._set(
            "keep", check_schedule(self.keep, None if self.layers is None else len(self.layers))
        )
        check_flag(self.fuse, "fuse")

    def _layers(self, info: ModelInfo) -> tuple[int, ...]:
        depth = info.depth["encoder"]
        layers = third_points(depth) if self.layers is None else fit_layers(self.layers, depth)
        if isinstance(self.keep, tuple) and len(self.keep) != len(layers):
            raise ValueError(
                f"keep has {len(self.keep)} entries for the {len(layers)} layers {layers}"
            )
        return layers

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("encoder", layer) for layer in self._layers(info))

    def _rate(self, site: Site) -> Keep:
        """What this stage leaves: a share of the tokens here, or a number."""
        layers = self._layers(site.info)
        stage = layers.index(site.layer)
        if isinstance(self.keep, tuple):
            return self.keep[stage]
        if isinstance(self.keep, int):
            return geometric(self.keep, len(layers), site.map.n_in)[stage]
        return self.keep

    def reduce(self, site: Site) -> Reduction | None:
        rate = self._rate(site)
        if site.valid is not None:
            return self._reduce_padded(site, rate)
        k = count(rate, site.n)
        if k == site.n:
            return None
        s = site.cls_attention()
        if not self.fuse:
            return Reduction(TokenMap.keep(top_indices(s, k)[0], site.n))
        if k == site.n - 1:  # fusing one token would only rescale it
            return None
        # The fused slot's representative is the best of the inattentive: the (k+1)-th of the ranking.
        best = torch.sort(s, dim=1, descending=True, stable=True).indices[:, : k + 1]
        kept, order = best.sort(1)
        fused = (order == k).int().argmax(1, keepdim=True)
        source = fused.expand(-1, site.n).scatter(
            1, kept, torch.arange(k + 1, device=kept.device).expand_as(kept)
        )
        step = TokenMap.merged(kept, source)
        weights = torch.where(source == fused, s, 1.0)
        return Reduction(step, weights, normalize=False)

    def _reduce_padded(self, site: Site, rate: Keep) -> Reduction | None:
        """After a method that left the samples with different numbers of tokens: a rate is of its own."""
        here = site.valid.sum(1)  # type: ignore[union-attr]
        k = counts(rate, here)
        if bool((k == here).all()):
            return None
        if self.fuse:
            raise ValueError(
                "evit cannot fuse after a method that left the samples of a batch with different "
                "numbers of tokens: use fuse=False, or batch size 1"
            )
        kept, padded = top_indices(site.cls_attention(), k, site.valid)
        return Reduction(TokenMap.keep(kept, site.n, padded))
