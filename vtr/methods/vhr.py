"""VHR: heads whose output depends most on the image count more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods.base import (
    Examples,
    LanguageAttentionMethod,
    LanguageAttentionSite,
    ModelInfo,
    Stage,
    check_layers,
    check_number,
    fit_layers,
    register,
)
from vtr.methods.common.divergence import MeanDivergence, divergence, vision_aware
from vtr.methods.common.planned import planned

SOURCES = ("sample", "plan")


@register
@dataclass(frozen=True, kw_only=True)
class VHR(LanguageAttentionMethod):
    r"""Vision-aware Head Reinforcement (ACL 2025, arXiv 2412.13949): vision-aware heads are scaled up.

    The divergence of a head is the Euclidean distance between its output at a prompt's last token with and without
    the image (equation 4). A head whose divergence, and whose squared output without the image, are
    both above their means plus one standard deviation over the layer's heads counts as 0 (equation 6). Heads above the median
    of their layer are chosen (equation 7), and their outputs are multiplied by ``scale`` in all rows of the
    prompt and of what follows. Attention itself is not changed. Layers are treated one after the other, each behind
    those that are reinforced already.

    .. math::

        \mathrm{VHD}_h = \lVert o_h - o_h^{\mathrm{no~image}} \rVert_2, \qquad
        o_h \leftarrow \alpha \, o_h \;\text{ if }\; \mathrm{VHD}_h > \operatorname{median}_{h'}
        \mathrm{VHD}_{h'}

    "Without the image" is our reading: in the same call, the last row's attention is normalised again
    without visual keys. The authors run the model a second time on the text alone, so that text tokens have not seen
    the image in layers below either. Ours needs one row per layer and no second run. The deviation is that
    of a sample (``torch.std``). They report CHAIR_s of 33.3 instead of 49.7 for LLaVA-1.5-7B, and worse
    results with more layers than the last 14.

    Args:
        scale: the paper's alpha; 1 changes nothing.
        layers: layers to reinforce; None is the second one and the last 14 of 32 (the paper's for
            LLaVA), or the same share of another depth.
        heads: ``"sample"`` chooses heads for each prompt, as the paper does. ``"plan"`` takes those of a plan
            (:func:`vtr.calibrate`), of mean divergence; the paper finds heads fixed by another sample much weaker
            (table 4: CHAIR_s of 44.7).
    """

    name: ClassVar[str] = "vhr"
    paper: ClassVar[str] = (
        "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence, ACL 2025, arXiv 2412.13949"
    )
    calibrated: ClassVar[bool] = True

    scale: float = field(default=2.0, kw_only=False)
    layers: tuple[int, ...] | None = None
    heads: str = "sample"

    def validate(self) -> None:
        super().validate()
        check_number(self.scale, "scale", 0, float("inf"))
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))
        if self.heads not in SOURCES:
            raise ValueError(f"heads must be one of {', '.join(SOURCES)}, got {self.heads!r}")

    @classmethod
    def examples(cls) -> Examples:
        # Rounding may change which heads are above the median: a small factor keeps its effect small.
        return {"some": (cls(1.25),), "everything": (cls(1.0),)}

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        depth = info.depth["attention"]
        first = depth - max(1, round(depth * 14 / 32))
        layers = (
            {1, *range(first, depth)} if self.layers is None else fit_layers(self.layers, depth)
        )
        return tuple(s for s in super().stages(info) if s.layer in layers)

    def attend(self, site: LanguageAttentionSite) -> Tensor:
        out = site.dense()
        if self.scale == 1 or (chosen := self._chosen(site)) is None:
            return out
        return torch.where(chosen[:, :, None, None], out * self.scale, out)

    def _chosen(self, site: LanguageAttentionSite) -> Tensor | None:
        """Choose heads at the first prompt that has an image, (B, H) bool; None before any prompt."""
        if self.heads == "plan":
            heads = planned(site, "heads", VHR, 'choose them for each prompt with heads="sample"')
            heads = heads[site.layer].to(site.q.device)
            return heads & site.visual.any(1, keepdim=True)
        chosen: Tensor | None = site.state.get("heads")
        if site.phase != "decode":
            new = vision_aware(*divergence(site))
            # Heads stay those of the first image, whose keys and values were computed with them.
            chosen = (
                new if chosen is None else torch.where(chosen.any(1, keepdim=True), chosen, new)
            )
            site.state["heads"] = chosen
        return chosen

    def needs_table(self, info: ModelInfo) -> bool:
        return self.heads == "plan"

    def calibrator(self, info: ModelInfo) -> MeanDivergence:
        """Collect the divergence of every head."""
        return MeanDivergence()
