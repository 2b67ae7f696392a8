"""Evo-ViT: half of the tokens evolve, the others wait and rejoin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.core.budget import (
    Keep,
    check_flag,
    check_layers,
    check_number,
    check_schedule,
    count,
    fit_layers,
)
from vtr.methods.base import (
    Examples,
    ModelInfo,
    Reduction,
    Site,
    Stage,
    TokenMethod,
    register,
)
from vtr.methods.common.freezing import freeze, rejoin, thawed


@register
@dataclass(frozen=True)
class EvoViT(TokenMethod):
    r"""Slow-fast token evolution (Evo-ViT, AAAI 2022, arXiv 2108.01390).

    The importance of a token is a running mean of the class token's attention to it: g <- (1 - a) g + a A_cls after
    each block that it goes through (section 3.2, global class attention). Before each of ``layers`` the most
    important tokens are chosen; they alone go through the blocks of the stage. The others keep their features and
    their importance as placeholders, rejoin at the end of the stage, and may be chosen for the next one.

    .. math::

        g_j \leftarrow (1 - a) \, g_j + a \, \frac{1}{H} \sum_h A_h[\mathrm{cls}, j], \qquad
        \text{blocks of a stage compute } \operatorname{top}_k(g)

    As in the authors' code for DeiT, placeholders are not updated. The paper's fast update by a representative
    token, which that code leaves out since it gains nothing on DeiT, is not here either. The paper trains from
    scratch, and a second head on the mean of all tokens; here the method is applied to a model as it is, and the
    model pools as it does. A share of the tokens is rounded up (theirs down).

    Args:
        keep: tokens that evolve in each stage, of all tokens; a tuple gives one per stage.
        layers: 0-based blocks before which to choose, all >= 1; None is the paper's 4 and 8 of 12 (L/3, 2L/3).
        momentum: a, the weight of the newest attention.
        final_rejoin: after the last block the placeholders rejoin as well (for pooling over tokens and dense
            outputs). False leaves the tokens that evolved.
    """

    name: ClassVar[str] = "evo-vit"
    paper: ClassVar[str] = (
        "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer, AAAI 2022, arXiv 2108.01390"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {"encoder": frozenset({"cls_attention"})}
    training: ClassVar[str] = "optional"
    alone: ClassVar[bool] = True
    carries_gradients: ClassVar[bool] = True

    keep: Keep | tuple[Keep, ...] = 0.5
    layers: tuple[int, ...] | None = None
    momentum: float = 0.5
    final_rejoin: bool = True

    @classmethod
    def examples(cls) -> Examples:
        return {"counted": ()}

    def validate(self) -> None:
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))
            if self.layers[0] < 1:  # type: ignore[index]
                raise ValueError("layers must be >= 1: tokens are chosen between two blocks")
        stages = None if self.layers is None else len(self.layers)
        self._set("keep", check_schedule(self.keep, stages))
        check_number(self.momentum, "momentum", 0, 1)
        check_flag(self.final_rejoin, "final_rejoin")

    @property
    def rejoins(self) -> bool:  # type: ignore[override]
        return self.final_rejoin

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        starts, last = self._layers(info), info.depth["encoder"] - 1
        cuts = {layer - 1 for layer in starts} | {last}
        return tuple(Stage("encoder", n, "end", cuts=n in cuts) for n in range(last + 1))

    def reduce(self, site: Site) -> Reduction | None:
        layers, last = self._layers(site.info), site.layer == site.info.depth["encoder"] - 1
        numbers = self._numbers(site.map.n_in, len(layers))
        if min(numbers) >= site.map.n_in:
            return None
        memory, waiting = site.memory, site.memory.get("waiting")
        if last:
            joins = waiting is not None and self.final_rejoin
            return rejoin(thawed(site, waiting)) if joins else None
        self._remember(site)
        if site.layer + 1 not in layers:
            return None
        x = thawed(site, waiting)
        memory["waiting"] = x
        return freeze(x, memory["importance"], numbers[layers.index(site.layer + 1)])

    def _remember(self, site: Site) -> None:
        """Count the class attention of this block to the tokens that went through it."""
        new = site.cls_attention().detach()
        old: Tensor | None = site.memory.get("importance")
        if old is not None:
            mixed = (1 - self.momentum) * old.gather(1, site.index) + self.momentum * new
            new = old.scatter(1, site.index, mixed)
        site.memory["importance"] = new

    def _numbers(self, tokens: int, stages: int) -> tuple[int, ...]:
        keeps = self.keep if isinstance(self.keep, tuple) else (self.keep,) * stages
        return tuple(count(keep, tokens) for keep in keeps)

    def _layers(self, info: ModelInfo) -> tuple[int, ...]:
        depth = info.depth["encoder"]
        if self.layers is None:
            layers = tuple(sorted({n for n in (depth // 3, 2 * depth // 3) if n >= 1}))
        else:
            layers = fit_layers(self.layers, depth)
        if isinstance(self.keep, tuple) and len(self.keep) != len(layers):
            raise ValueError(
                f"keep has {len(self.keep)} entries for the {len(layers)} layers {layers}"
            )
        return layers
