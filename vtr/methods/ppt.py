"""PPT: drop the least significant tokens of an image, or merge similar ones, by how uneven the scores are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.core import budget
from vtr.methods.base import (
    Examples,
    Keep,
    Method,
    ModelInfo,
    Presets,
    Reduction,
    Schedulable,
    Site,
    Stage,
    TokenMap,
    TokenMethod,
    register,
)
from vtr.methods.common.matching import bipartite_soft_matching
from vtr.methods.common.merge import by_rank
from vtr.methods.common.removals import even_removals, scheduled_removals
from vtr.methods.common.significance import significance
from vtr.methods.common.uneven import refuse_uneven

PATCHES = 196
"""Visual tokens of the models for which the authors chose their thresholds."""


@register
@dataclass(frozen=True)
class PPT(Presets, TokenMethod):
    r"""Token pruning and pooling (PPT, 2023, arXiv 2310.01812).

    At each of ``layers``, between attention and MLP: tokens are scored as in ATS (class attention, summed over
    heads, times the norm of the value; the scores of an image sum to 1). If the variance of an image's scores
    reaches the threshold, its ``r`` lowest tokens are dropped, else ``r`` pairs are merged as in :class:`ToMe`
    (section 3.4). Every image loses the same number, so that batches stay whole. With ``prop_attn`` attention
    counts each key by its size.

    .. math::

        s_j = \frac{\sum_h A_h[\mathrm{cls}, j] \lVert v_j \rVert}{\sum_i \sum_h A_h[\mathrm{cls}, i] \lVert
        v_i \rVert}, \qquad
        \operatorname{Var}(s) \ge \tau \Big(\frac{196}{N}\Big)^2 \;\Rightarrow\; \text{drop } r \text{
        tokens, else merge } r \text{ pairs}

    Differences from the authors' code: every prefix token is protected (theirs scores a distilled model's second
    one when it drops); tokens stay in raster order, and the order in which theirs would leave them is remembered
    for the next matching; the threshold is multiplied by (196 / N)^2 in models of N visual tokens, since the
    variance of scores that sum to 1 falls so (ours; 1 in the models of the paper).

    Args:
        keep: budget after the last of ``layers``, reached with an equal number at each.
        r: tokens removed at each of ``layers`` (an int, or one per layer), at most half of those there. Give one of
            ``r`` and ``keep``, or neither for the paper's 50 of 196, as a share of the model's tokens.
        threshold: of the variance at 196 visual tokens, at or above which tokens are dropped. 0 always drops, 1
            always merges.
        layers: 0-based blocks; None is the paper's 3, 6, 9 of 12 (L/4, L/2, 3L/4).
        prop_attn: proportional attention; the authors switch it off for off-the-shelf MAE models and in training.
    """

    name: ClassVar[str] = "ppt"
    paper: ClassVar[str] = (
        "PPT: Token Pruning and Pooling for Efficient Vision Transformers, 2023, arXiv 2310.01812"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {
        "encoder": frozenset({"cls_attention", "keys", "values"})
    }
    training: ClassVar[str] = "optional"
    size_weighted: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "deit-small": {"r": 50, "layers": (3, 6, 9), "threshold": 7e-5},
        "deit-small-finetuned": {"r": 50, "layers": (3, 6, 9), "threshold": 6e-5},
    }

    keep: Keep | None = None
    r: int | tuple[int, ...] | None = None
    threshold: float = 7e-5
    layers: tuple[int, ...] | None = None
    prop_attn: bool = True

    @classmethod
    def examples(cls) -> Examples:
        some = (cls(keep=0.4), cls(keep=0.4, threshold=0.0), cls(keep=0.4, threshold=1.0))
        return {"some": some}

    def validate(self) -> None:
        if self.r is not None and self.keep is not None:
            raise ValueError(f"give either r or keep, not both (r={self.r!r}, keep={self.keep!r})")
        if self.keep is not None:
            self._set("keep", budget.check_keep(self.keep))
        if isinstance(self.r, list):
            self._set("r", tuple(self.r))
        for value in self.r if isinstance(self.r, tuple) else (self.r,):
            budget.check_count(value, "r", low=0, none=True)
        budget.check_number(self.threshold, "threshold", 0, 1)
        if self.layers is not None:
            self._set("layers", budget.check_layers(self.layers))
        budget.check_flag(self.prop_attn, "prop_attn")

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        layers = self._layers(info)
        if isinstance(self.r, tuple) and len(self.r) != len(layers):
            raise ValueError(f"r has {len(self.r)} entries for the {len(layers)} layers {layers}")
        return tuple(Stage("encoder", layer) for layer in layers)

    def schedulable(self, info: ModelInfo) -> Schedulable:
        return Schedulable("encoder", tuple(range(info.depth["encoder"])), most=0.5)

    def scheduled(self, info: ModelInfo, kept: Sequence[Keep], tokens: int | None = None) -> Method:
        gone = scheduled_removals(self.name, self.schedulable(info), info, kept, tokens)
        layers = tuple(layer for layer, r in enumerate(gone) if r) or (0,)
        return self.replace(r=tuple(gone[n] for n in layers), layers=layers, keep=None)

    def biased_layers(self, info: ModelInfo) -> frozenset[int]:
        return frozenset(range(info.depth["encoder"])) if self.prop_attn else frozenset()

    def reduce(self, site: Site) -> Reduction | None:
        r = min(self._removed(site), site.n // 2)
        if r <= 0:
            return None
        refuse_uneven(site, self.name)
        score = significance(site)
        uneven = score.var(1, keepdim=True) >= self.threshold * (PATCHES / site.map.n_in) ** 2
        old: Tensor | None = site.memory.get("order")
        merged, order = bipartite_soft_matching(site.key_mean(), r, old, site.prefix)
        rank = torch.sort(score, dim=1, descending=True, stable=True).indices
        dropped, falling = by_rank(rank, site.n - r)
        # The authors leave what is not dropped by falling score, for the next matching.
        site.memory["order"] = torch.where(uneven, falling, order)
        kept = torch.where(uneven, dropped.kept, merged.kept)
        source = torch.where(uneven, dropped.source, merged.source)
        return Reduction(TokenMap.merged(kept, source), site.size)

    def _layers(self, info: ModelInfo) -> tuple[int, ...]:
        depth = info.depth["encoder"]
        if self.layers is None:
            return budget.third_points(depth)
        return budget.fit_layers(self.layers, depth)

    def _removed(self, site: Site) -> int:
        layers = self._layers(site.info)
        number = layers.index(site.layer)
        if self.keep is not None:
            return even_removals(self.keep, site.map.n_in, len(layers), "layers")[number]
        if self.r is None:
            return round(50 * site.map.n_in / PATCHES)
        return self.r[number] if isinstance(self.r, tuple) else self.r
