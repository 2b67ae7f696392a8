"""Expedit: blocks compute on clusters of each window's tokens, from which all tokens are rebuilt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vtr.methods.base import (
    Examples,
    ModelInfo,
    Presets,
    Reduction,
    Stage,
    TokenMethod,
    check_count,
    fit_layers,
    register,
)
from vtr.methods.common.clusters import WindowClusters

if TYPE_CHECKING:
    from vtr.core.window_site import WindowSite


@register
@dataclass(frozen=True)
class Expedit(Presets, TokenMethod):
    r"""Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning (NeurIPS 2022,
    arXiv 2210.01035), as its authors apply it to SAM.

    In front of block ``layer`` the tokens of each window are clustered: centres start as an adaptive average pool of
    the window; then, ``iterations`` times, each token is shared out by softmax(-temperature d^2) over the centres
    at most ``neighbourhood // 2`` cells of the pool away, and each centre becomes the mean of its shares. Blocks
    with windows then compute on windows of sqrt(clusters) x sqrt(clusters) centres, those with global attention on all
    centres; relative positions are resized. In front of block ``until``, or behind the last one, each token is
    rebuilt from the ``nearest`` centres, weighted by exp(-temperature d^2) of its distances d to them when they were
    found.

    .. math::

        Q_{ij} = \operatorname{softmax}_j(-\tau \lVert x_i - c_j \rVert^2), \qquad
        c_j \leftarrow \frac{\sum_i Q_{ij} x_i}{\sum_i Q_{ij}}, \qquad
        \hat x_i = \sum_{j \in \mathrm{nearest}(i)} \frac{e^{-\tau d_{ij}^2}}{\sum_{j'} e^{-\tau d_{ij'}^2}}
        \, c'_j

    Differences from the authors' code: the weights of a token sum to one by default, theirs have an L2 norm of one
    (``weights="norm"``: a token between two equally near centres becomes 1.41 times their mean); the nearest
    centre counts even if its exp() is too small for float32, where theirs gives zero; distances are float32 in half
    precision as well; exactly ``nearest`` centres count, theirs adds those with the same weight as the last.
    As in theirs, the padding of windows at the border is clustered with the other tokens.

    Args:
        layer: 0-based block in front of which tokens are clustered; None is at a quarter of the depth.
        clusters: centres per window, a square number.
        until: 0-based block in front of which they are rebuilt; None is behind the last.
        iterations: of the clustering.
        temperature: of squared distances.
        neighbourhood: side, in cells, of the square of centres that a token may go to; odd.
        nearest: centres that a token is rebuilt from.
        weights: ``"sum"`` or ``"norm"``.
    """

    name: ClassVar[str] = "expedit"
    paper: ClassVar[str] = "Expediting Large-Scale ViT (Expedit), NeurIPS 2022, arXiv 2210.01035"
    sites: ClassVar[tuple[str, ...]] = ("windows",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {"windows": frozenset({"window_tokens"})}
    rejoins: ClassVar[bool] = True

    PRESETS: ClassVar = {
        "sam-vit-h/1.10x": {"layer": 18, "clusters": 121},
        "sam-vit-h/1.19x": {"layer": 14, "clusters": 100},
        "sam-vit-h/1.30x": {"layer": 8, "clusters": 100},
        "sam-vit-h/1.44x": {"layer": 8, "clusters": 81},
        "sam-vit-h/1.49x": {"layer": 6, "clusters": 81},
    }
    """The rows of the authors' table for SAM ViT-H, named by the speed that they measured on a V100."""

    layer: int | None = None
    clusters: int = 100
    until: int | None = None
    iterations: int = 5
    temperature: float = 0.01
    neighbourhood: int = 5
    nearest: int = 20
    weights: str = "sum"

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(1, 9), cls(1, 4, until=3, nearest=2, weights="norm")),
            "everything": (cls(1, 16),),
            "counted": (),
        }

    def validate(self) -> None:
        for name in ("clusters", "iterations", "neighbourhood", "nearest"):
            check_count(getattr(self, name), name)
        if math.isqrt(self.clusters) ** 2 != self.clusters:
            raise ValueError(f"clusters must be a square number, got {self.clusters}")
        if self.neighbourhood % 2 == 0:
            raise ValueError(f"neighbourhood must be odd, got {self.neighbourhood}")
        if isinstance(self.temperature, bool) or not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive, got {self.temperature!r}")
        if self.weights not in ("sum", "norm"):
            raise ValueError(f"weights must be 'sum' or 'norm', got {self.weights!r}")
        for name in ("layer", "until"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ValueError(f"{name} must be an int >= 0 (0-based) or None, got {value!r}")

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        depth = info.depth["windows"]
        first = depth // 4 if self.layer is None else fit_layers((self.layer,), depth, "layer")[0]
        if info.window is not None and self.clusters > info.window**2:
            raise ValueError(
                f"clusters must be at most {info.window**2}, the tokens of a window of {info.family}, got "
                f"{self.clusters}"
            )
        if self.until is None:
            return (Stage("windows", first, "inside"),)
        fit_layers((self.until,), depth, "until")
        if self.until <= first:
            raise ValueError(f"until must be behind block {first}, got {self.until}")
        return (
            Stage("windows", first, "inside"),
            Stage("windows", self.until, "inside", cuts=False),
        )

    def reduce(self, site: WindowSite) -> Reduction | None:
        windows, side = site.windows, math.isqrt(self.clusters)
        if self.clusters == windows.area:
            return None
        if site.layer == self.until:
            return Reduction(None)
        found = WindowClusters(
            windows.split(site.hidden),
            windows.size,
            (side, side),
            iterations=self.iterations,
            temperature=self.temperature,
            reach=self.neighbourhood // 2,
        )
        found.weigh(min(self.nearest, self.clusters), self.weights)
        return Reduction(
            found.map(windows.places(site.hidden.device)),
            tokens=found.centres,
            merging=found,
            grid=(side, side),
        )
