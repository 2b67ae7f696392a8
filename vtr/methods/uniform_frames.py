"""Whole frames at even distances: the baseline for video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.core.budget import Keep, check_keep, count
from vtr.core.language_site import LanguageSite
from vtr.core.method import Examples, Reduction, Stage, TokenMethod
from vtr.core.registry import register
from vtr.core.site import ModelInfo
from vtr.methods.common.temporal import Cutting, clips


@register
@dataclass(frozen=True)
class UniformFrames(TokenMethod):
    r"""Keep whole frames at even distances, as if the video had been sampled more coarsely.

    Of T frames the (i + 1/2) T / n-th stay for i = 0 .. n - 1. n does not depend on the content: as many
    whole frames as fit into the budget, at least one. A separator in front of a frame (Video-LLaVA's
    class token) goes with it; one at the end of the video stays, as do still images.

    .. math::

        t_i = \Big\lfloor \big(i + \tfrac{1}{2}\big) \frac{T}{n} \Big\rfloor, \quad i = 0, \dots, n - 1

    Text between frames (Qwen3-VL's timestamps) is not touched.

    Args:
        keep: budget per video, in tokens or as a fraction of them.
    """

    name: ClassVar[str] = "uniform-frames"
    paper: ClassVar[str] = "baseline: whole frames at even distances"
    sites: ClassVar[tuple[str, ...]] = ("prompt",)
    needs: ClassVar = {"prompt": frozenset()}
    positions: ClassVar[str] = "compact"

    keep: Keep = 0.25

    @classmethod
    def examples(cls) -> Examples:
        return {"counted": ()}

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))

    def retained(self, frames: int, tokens: int) -> int:
        """Tokens left of a video of ``frames`` frames of ``tokens`` tokens each, without separators."""
        return max(1, count(self.keep, frames * tokens) // tokens) * tokens

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("prompt", 0),)

    def reduce(self, site: LanguageSite) -> Reduction | None:
        cutting = Cutting(site)
        for clip in clips(site, self.name):
            t, p = clip.tokens.shape
            stays = even(t, self.retained(t, p) // p).to(site.device)
            index = torch.arange(t * p, device=site.device).reshape(t, p)
            cutting.put(clip, torch.where(stays[:, None], index, -1).flatten())
            own = (site.video[clip.sample] == clip.number) & (site.place[clip.sample] < 0)
            for token in own.nonzero()[:, 0].tolist():
                later = (clip.tokens[:, 0] > token).nonzero()[:, 0]
                if len(later) and not bool(stays[later[0]]):
                    cutting.drop(clip.sample, torch.tensor([token], device=site.device))
        return cutting.reduction()


def even(frames: int, number: int) -> Tensor:
    """(frames,) bool: ``number`` frames at even distances."""
    chosen = ((torch.arange(number, device="cpu") + 0.5) * frames / number).long()
    return torch.zeros(frames, dtype=torch.bool, device="cpu").index_fill(0, chosen, True)
