"""Top-k by the attention of the class token, at one or more layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtr.budget import Keep, check_layers, check_schedule, fit_layers, spread
from vtr.method import Method, Reduction, Stage, register
from vtr.signals import ModelInfo, Site
from vtr.tokens import TokenMap, take, top_indices


@register
@dataclass(frozen=True)
class CLSAttention(Method):
    """Keep the visual tokens that the class token attends to most.

    At each layer of ``layers`` the score is the mean over heads of the class token's attention row
    in that block (EViT's score, arXiv 2202.07800, section 3.1); lower ones are dropped between
    attention and MLP. With ``ensemble=m`` the score is the mean of that layer's row and the rows of
    the m - 1 layers before it, as VTC-CLS combines layers (arXiv 2412.05819, section 3.3).

    Args:
        keep: budget after the last layer (reached geometrically over several layers), or one per
            layer, all of the tokens at the input.
        layers: 0-based encoder layers at which to cut; None is a quarter of the depth, where class
            attention begins to mean something.
        ensemble: number of layers whose rows are averaged.
    """

    name: ClassVar[str] = "cls-attention"
    paper: ClassVar[str] = "CLS-attention pruning (EViT's score, ICLR 2022, arXiv 2202.07800)"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar = {"encoder": frozenset({"cls_attention"})}

    keep: Keep | tuple[Keep, ...] = 0.5
    layers: tuple[int, ...] | None = None
    ensemble: int = 1

    def validate(self) -> None:
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))
        stages = None if self.layers is None else len(self.layers)
        self._set("keep", check_schedule(self.keep, stages if stages is not None else 1, falling=True))
        if isinstance(self.ensemble, bool) or not isinstance(self.ensemble, int) or self.ensemble < 1:
            raise ValueError(f"ensemble must be an int >= 1, got {self.ensemble!r}")

    def _layers(self, info: ModelInfo) -> tuple[int, ...]:
        depth = info.depth["encoder"]
        return (depth // 4,) if self.layers is None else fit_layers(self.layers, depth)

    def _observed(self, info: ModelInfo) -> tuple[int, ...]:
        seen = {
            i for layer in self._layers(info) for i in range(max(0, layer - self.ensemble + 1), layer + 1)
        }
        return tuple(sorted(seen))

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("encoder", layer) for layer in self._observed(info))

    def reduce(self, site: Site) -> Reduction | None:
        layers = self._layers(site.info)
        plan = spread(self.keep, len(layers), site.map.n_in)
        if all(k >= site.map.n_in for k in plan):
            return None
        rows = site.memory.setdefault("rows", {})
        row = site.cls_attention()
        rows[site.layer] = row
        if site.layer not in layers:
            return None
        k = min(plan[layers.index(site.layer)], site.n)
        if k == site.n:
            return None
        used = [rows[i] for i in range(max(0, site.layer - self.ensemble + 1), site.layer + 1)]
        score = sum(used[1:], start=used[0]) / len(used)
        kept, padded = top_indices(score, k, site.valid)
        step = TokenMap.keep(kept, site.n, padded)
        for layer in rows:
            rows[layer] = take(rows[layer], kept.clamp(min=0) if padded else kept)
        return Reduction(step)
