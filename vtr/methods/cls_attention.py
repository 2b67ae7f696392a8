"""Top-k by the attention of the class token, at one or more layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vtr.core.budget import check_count, check_schedule, fit_layers
from vtr.core.tokens import take
from vtr.methods.base import Keep, ModelInfo, Reduction, ScoredMethod, Site, Stage, register
from vtr.methods.common.looks import add_class_row


@register
@dataclass(frozen=True)
class CLSAttention(ScoredMethod):
    r"""Keep the visual tokens that the class token attends to most.

    At each layer of ``layers`` the score is the mean over heads of the class token's attention row
    in that block (EViT's score, arXiv 2202.07800, section 3.1); lower ones are dropped between
    attention and MLP. With ``ensemble=m`` the score is the mean of that layer's row and the rows of
    the m - 1 layers before it, as VTC-CLS combines layers (arXiv 2412.05819, section 3.3).

    .. math::

        s_j = \frac{1}{m H} \sum_{l = L - m + 1}^{L} \sum_h A^l_h[\mathrm{cls}, j]

    Args:
        keep: budget after the last layer (reached geometrically over several layers), or one per
            layer, all of the tokens at the input.
        layers: 0-based encoder layers at which to cut; None is a quarter of the depth, where class
            attention begins to mean something, and for a cut at the prompt (one layer, whose row is
            the score) the layer whose output the projector reads.
        ensemble: number of layers whose rows are averaged.
        site: ``"encoder"``, or ``"prompt"``: the entry of a language model, by the encoder's score;
            None is the prompt if the model has one, else the encoder.
    """

    name: ClassVar[str] = "cls-attention"
    paper: ClassVar[str] = "CLS-attention pruning (EViT's score, ICLR 2022, arXiv 2202.07800)"
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt")
    needs: ClassVar = {
        "encoder": frozenset({"cls_attention"}),
        "prompt": frozenset({"encoder_scores"}),
    }
    positions: ClassVar[str] = "compact"

    keep: Keep | tuple[Keep, ...] = 0.5
    layers: tuple[int, ...] | None = None
    ensemble: int = 1
    site: str | None = None

    def validate(self) -> None:
        super().validate()
        if self.layers is None:  # which is one layer
            self._set("keep", check_schedule(self.keep, 1))
        check_count(self.ensemble, "ensemble")

    def layers_of(self, info: ModelInfo) -> tuple[int, ...]:
        if self.layers is None and self.site_of(info) == "prompt":
            return (info.last_layer,)
        depth = info.depth["encoder"]
        return (depth // 4,) if self.layers is None else fit_layers(self.layers, depth)

    def looks(self, info: ModelInfo) -> list[int]:
        seen = (self._window(layer) for layer in self.layers_of(info))
        return sorted({layer for window in seen for layer in window})

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        if self.site_of(info) == "prompt":
            return super().stages(info)
        cuts = self.scheduled_layers(info)
        return tuple(Stage("encoder", i, cuts=i in cuts) for i in self.looks(info))

    def look(self, site: Site) -> None:
        if self.site_of(site.info) == "prompt":
            add_class_row(site, self.name)
        else:
            site.memory.setdefault("rows", {})[site.layer] = site.cls_attention()

    def score(self, site: Any) -> Tensor:
        if site.site == "prompt":
            return site.spread(site.stored("score"))  # type: ignore[no-any-return]
        used = [site.memory["rows"][i] for i in self._window(site.layer)]
        total: Tensor = sum(used[1:], start=used[0])
        return total / len(used)

    def reduce(self, site: Any) -> Reduction | None:
        if site.site == "encoder":
            self.look(site)  # a later layer may read it, whatever is cut here
            if self.site_of(site.info) == "prompt" or site.layer not in self.layers_of(site.info):
                return None
        return super().reduce(site)

    def select(
        self, site: Any, score: Tensor, number: int | Tensor, raw: Tensor
    ) -> Reduction | None:
        cut = super().select(site, score, number, raw)
        if cut is not None and cut.map is not None and site.site == "encoder":
            rows, kept = site.memory["rows"], cut.map.kept.clamp(min=0)
            site.memory["rows"] = {layer: take(row, kept) for layer, row in rows.items()}
        return cut

    def _window(self, layer: int) -> range:
        return range(max(0, layer - self.ensemble + 1), layer + 1)
