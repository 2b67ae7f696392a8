"""PyramidDrop: fewer and fewer visual tokens, stage by stage through the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.methods.base import (
    Keep,
    LanguageSite,
    ModelInfo,
    Presets,
    Stage,
    TextScoredMethod,
    check_layers,
    register,
)
from vtr.methods.common.text import last_text_row


@register
@dataclass(frozen=True)
class PyramidDrop(Presets, TextScoredMethod):
    r"""PyramidDrop (CVPR 2025, arXiv 2410.17247): a pyramid of visual tokens in the language model.

    Before each layer of ``layers`` the visual tokens are ranked by the attention that the last
    prompt token would pay to them there: query and keys are computed from the hidden states that enter
    this layer, with its own norm, projections and rotary embedding; softmax over all keys, mean over
    heads. The best are kept in raster order, with positions renumbered (the authors' choice).

    .. math::

        s_j = \frac{1}{H} \sum_h \operatorname{softmax}_j\big(q_h[\mathrm{last}] \cdot k_h[j] /
        \sqrt{d}\big), \qquad
        n_{s + 1} = \mathrm{keep}_s \, n_0

    Only that one row is computed, so that every attention backend works. Differences from the
    authors' code: left padding and several images work (theirs: right padding, one span per
    sample), and a fraction is rounded up as everywhere here (theirs down).

    Args:
        keep: visual tokens after each stage, all of the number at the entry of the language model
            (the released ratios: 0.5, 0.25, 0.125), or the number after the last stage, reached by
            one ratio per stage.
        layers: 0-based layers that get fewer tokens, >= 1; None is 8, 16, 24 for language models of 32 and
            of 40 layers (the authors' 7B and 13B), and L/4, L/2, 3L/4 for others.
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "PyramidDrop: Accelerating Your LVLMs, CVPR 2025, arXiv 2410.17247"
    sites: ClassVar[tuple[str, ...]] = ("decoder",)
    needs: ClassVar = {"decoder": frozenset({"text_attention"})}
    positions: ClassVar[str] = "compact"
    grows: ClassVar[bool] = True

    PRESETS: ClassVar = {
        "llava-1.5-7b/270": {"keep": (288, 144, 72), "layers": (8, 16, 24)},
        "llava-1.5-13b/230": {"keep": (288, 144, 72), "layers": (8, 16, 24)},
        "llava-next-7b/47%": {"keep": (0.5, 0.25, 0.125), "layers": (8, 16, 24)},
        "llava-1.5-7b/192": {"keep": (312, 156, 78), "layers": (2, 10, 20)},
        "llava-1.5-7b/128": {"keep": (184, 92, 46), "layers": (2, 10, 20)},
        "llava-1.5-7b/64": {"keep": (56, 28, 14), "layers": (2, 10, 20)},
    }
    """By the tokens on average over the layers (of 576, or the share). The first three are the authors'
    scripts. They published rows of 192, 128 and 64 without the settings: that of 128 is taken from the
    scripts of attention debiasing (arXiv 2508.17807), and the others have its layers and halvings."""

    keep: Keep | tuple[Keep, ...] = (0.5, 0.25, 0.125)
    layers: tuple[int, ...] | None = None

    def validate(self) -> None:
        if self.layers is not None and check_layers(self.layers)[0] < 1:
            raise ValueError(f"layers must be >= 1 (cuts are before them), got {self.layers}")
        super().validate()

    def default_layers(self, depth: int) -> tuple[int, ...]:
        if depth in (32, 40):
            return (8, 16, 24)
        return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4} - {0}))

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("decoder", layer, "start") for layer in self.scheduled_layers(info))

    def score(self, site: LanguageSite) -> Tensor:
        return last_text_row(site)
