"""ATS: sample tokens by the distribution of their scores, so that each image keeps its own number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vtr.core.budget import Keep, check_layers, check_schedule, count, fit_layers
from vtr.methods.base import (
    Examples,
    ModelInfo,
    Reduction,
    Site,
    Stage,
    TokenMap,
    TokenMethod,
    register,
    top_indices,
)
from vtr.methods.common.inverse_sampling import inverse_transform_sample
from vtr.methods.common.significance import significance


@register
@dataclass(frozen=True)
class ATS(TokenMethod):
    r"""Adaptive Token Sampling (ATS, ECCV 2022, arXiv 2111.15667).

    At each of ``layers`` tokens are scored by the class token's attention, summed over heads, times the norm of
    their value (section 3.1), and sampled at even steps of the cumulative distribution of the scores
    (:func:`~vtr.methods.common.inverse_sampling.inverse_transform_sample`, section 3.2). Samples that meet in
    one token count once: an image keeps fewer tokens, the more its scores are concentrated. The token of lowest
    score is never sampled if there are others.

    .. math::

        s_j = \frac{\sum_h A_h[\mathrm{cls}, j] \, \lVert v_j \rVert}{\sum_i \sum_h A_h[\mathrm{cls}, i] \,
        \lVert v_i \rVert},
        \qquad C_j = \sum_{i \le j} s_i, \qquad \text{sample } j = C^{-1}(u), \; u \text{ at even steps}

    The cut is between attention and MLP. The paper leaves the rows of the others out of the attention itself,
    which gives the same numbers and saves a little more.

    Differences from the authors' code: a batch gives each image the tokens that it keeps alone (theirs lets padding
    take part in the distribution, so that an image in a batch may keep its lowest token); with fewer samples than
    tokens all tokens can be sampled, as in the paper (theirs leaves out as many of the lowest ones); budgets below
    eight tokens are allowed; every prefix token is protected; tokens stay in raster order (theirs by rising score).

    Args:
        keep: samples at each layer: an int, a share of the tokens at the model's input, or one per layer. It is the
            most that can be left, not the number that is. The authors' 1.0 leaves the number to the scores.
        layers: 0-based blocks; None is all from L/4 on, the authors' 3 to 11 of 12.
    """

    name: ClassVar[str] = "ats"
    paper: ClassVar[str] = (
        "ATS: Adaptive Token Sampling For Efficient Vision Transformers, ECCV 2022, arXiv 2111.15667"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {
        "encoder": frozenset({"cls_attention", "values"})
    }
    training: ClassVar[str] = "optional"
    data_dependent: ClassVar[bool] = True

    keep: Keep | tuple[Keep, ...] = 1.0
    layers: tuple[int, ...] | None = None

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(keep=0.4), cls()), "everything": (), "counted": ()}

    def validate(self) -> None:
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))
        stages = None if self.layers is None else len(self.layers)
        self._set("keep", check_schedule(self.keep, stages))

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("encoder", layer) for layer in self._layers(info))

    def reduce(self, site: Site) -> Reduction | None:
        keep = self.keep
        if isinstance(keep, tuple):
            keep = keep[self._layers(site.info).index(site.layer)]
        score = significance(site)
        taken = inverse_transform_sample(score, count(keep, site.map.n_in), site.valid)
        kept, has_padding = top_indices(taken.float(), taken.sum(1), taken)
        if kept.shape[1] == site.n and not has_padding:
            return None
        return Reduction(TokenMap.keep(kept, site.n, has_padding))

    def _layers(self, info: ModelInfo) -> tuple[int, ...]:
        depth = info.depth["encoder"]
        if self.layers is None:
            layers = tuple(range(depth // 4, depth))
        else:
            layers = fit_layers(self.layers, depth)
        if isinstance(self.keep, tuple) and len(self.keep) != len(layers):
            raise ValueError(
                f"keep has {len(self.keep)} entries for the {len(layers)} layers {layers}"
            )
        return layers
