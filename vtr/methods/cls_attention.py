"""Top-k by the attention of the class token, at one or more layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtr.core.budget import Keep, check_layers, check_schedule, fit_layers, spread
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.registry import register
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, take, top_indices
from vtr.methods.common.vlm import language, last_used, prune, stage_budget, stored


@register
@dataclass(frozen=True)
class CLSAttention(TokenMethod):
    """Keep the visual tokens that the class token attends to most.

    At each layer of ``layers`` the score is the mean over heads of the class token's attention row
    in that block (EViT's score, arXiv 2202.07800, section 3.1); lower ones are dropped between
    attention and MLP. With ``ensemble=m`` the score is the mean of that layer's row and the rows of
    the m - 1 layers before it, as VTC-CLS combines layers (arXiv 2412.05819, section 3.3).

    Args:
        keep: budget after the last layer (reached geometrically over several layers), or one per
            layer, all of the tokens at the input.
        layers: 0-based encoder layers at which to cut; None is a quarter of the depth, where class
            attention begins to mean something, and for a cut at the prompt (one layer, whose row is
            the score) the layer whose output the projector reads.
        ensemble: number of layers whose rows are averaged.
        site: ``"encoder"``, or ``"prompt"``: the entry of a language model, by the encoder's score;
            None is the prompt where there is one, else the encoder.
    """

    name: ClassVar[str] = "cls-attention"
    paper: ClassVar[str] = "CLS-attention pruning (EViT's score, ICLR 2022, arXiv 2202.07800)"
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt")
    needs: ClassVar = {"encoder": frozenset({"cls_attention"})}
    positions: ClassVar[str] = "compact"

    keep: Keep | tuple[Keep, ...] = 0.5
    layers: tuple[int, ...] | None = None
    ensemble: int = 1
    site: str | None = None

    def validate(self) -> None:
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))
        stages = None if self.layers is None else len(self.layers)
        self._set(
            "keep", check_schedule(self.keep, stages if stages is not None else 1, falling=True)
        )
        if (
            isinstance(self.ensemble, bool)
            or not isinstance(self.ensemble, int)
            or self.ensemble < 1
        ):
            raise ValueError(f"ensemble must be an int >= 1, got {self.ensemble!r}")
        if self.site not in (None, *self.sites):
            raise ValueError(
                f"site must be one of {', '.join(self.sites)} or None, got {self.site!r}"
            )
        if self.site == "prompt":
            self._one_layer()

    def _one_layer(self) -> None:
        if self.layers is not None and len(self.layers) != 1:
            raise ValueError(f"layers must be one layer for a cut at the prompt, got {self.layers}")

    def _at_prompt(self, info: ModelInfo) -> bool:
        return self.site == "prompt" or (self.site is None and "prompt" in info.depth)

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        needs = dict(self.needs)
        if self._at_prompt(info):
            needs["prompt"] = frozenset({"encoder_scores"})
        return needs

    def _layers(self, info: ModelInfo) -> tuple[int, ...]:
        depth = info.depth["encoder"]
        if self.layers is None and self._at_prompt(info):
            return (last_used(info),)
        return (depth // 4,) if self.layers is None else fit_layers(self.layers, depth)

    def _observed(self, info: ModelInfo) -> tuple[int, ...]:
        seen = {
            i
            for layer in self._layers(info)
            for i in range(max(0, layer - self.ensemble + 1), layer + 1)
        }
        return tuple(sorted(seen))

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        if not self._at_prompt(info):
            return tuple(Stage("encoder", layer) for layer in self._observed(info))
        self._one_layer()
        looks = (Stage("encoder", layer, "end", cuts=False) for layer in self._observed(info))
        return (*looks, Stage("prompt", 0))

    def reduce(self, site: Site) -> Reduction | None:
        if self._at_prompt(site.info):
            return self._reduce_prompt(site)
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

    def _reduce_prompt(self, site: Site) -> Reduction | None:
        if site.site == "encoder":
            row, before = site.cls_attention(), site.memory.get("sum")
            site.memory["sum"] = row if before is None else before + row
            return None
        here = language(site)
        return prune(here, here.spread(stored(here, "sum")), stage_budget(here, self.keep, 0, 1))
