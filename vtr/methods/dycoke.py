"""DyCoke: thin frames that repeat the one before; then a KV cache that follows the newest token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.budget import Keep, check_keep, count
from vtr.method import Method, Reduction, Stage, register
from vtr.methods._temporal import Cutting, best, clips, neighbour_similarity
from vtr.methods._vlm import language
from vtr.signals import ModelInfo, Site

WINDOW = 4


@register
@dataclass(frozen=True)
class DyCoke(Method):
    """DyCoke (CVPR 2025, arXiv 2411.15024), the part before the language model: temporal merging.

    In windows of four frames the first stays whole. Frames 1 and 3 are compared with the frame before
    them, frame 2 with frame 0, place by place (cosine of the embeddings, before any thinning); of each
    of the three the ``keep`` least similar tokens stay, the others are dropped. A frame without its
    partner (at the end of a video) is compared with what there is of its window: the first stays whole.

    The number of tokens left does not depend on the content: of every four frames of P tokens
    P + 3 ``count(keep, P)``, 47.5 % at the published K = 0.7.

    Differences from the authors' code: tokens stay in raster order (theirs are ordered by dissimilarity
    inside a frame, which gives them other positions than their places have); a fraction is rounded up
    as everywhere here (at K = 0.7 and 196 tokens 59 instead of 58).

    Args:
        keep: budget per thinned frame, three of every four: 1 - K of the paper. An int is a number of
            tokens per thinned frame.
    """

    name: ClassVar[str] = "dycoke"
    paper: ClassVar[str] = (
        "DyCoke: Dynamic Compression of Tokens for Fast Video LLMs, CVPR 2025, arXiv 2411.15024"
    )
    sites: ClassVar[tuple[str, ...]] = ("prompt",)
    needs: ClassVar = {"prompt": frozenset({"hidden"})}
    positions: ClassVar[str] = "compact"

    keep: Keep = 0.3

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))

    def retained(self, frames: int, tokens: int) -> int:
        """Tokens left of a video of ``frames`` frames of ``tokens`` tokens each."""
        whole = -(-frames // WINDOW)
        return whole * tokens + (frames - whole) * count(self.keep, tokens)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("prompt", 0),)

    def reduce(self, site: Site) -> Reduction | None:
        return self._thin(site)

    def _thin(self, site: Site) -> Reduction | None:
        here = language(site)
        cutting = Cutting(here)
        for clip in clips(here, self.name):
            stays = thin(clip.of(here.hidden), count(self.keep, clip.tokens.shape[1]))
            index = torch.arange(stays.numel(), device=site.device)
            cutting.put(clip, torch.where(stays.flatten(), index, -1))
        return cutting.reduction()


def thin(x: Tensor, number: int) -> Tensor:
    """Which tokens of (T, P, C) features stay, (T, P) bool: ``number`` of each thinned frame."""
    t, p, _ = x.shape
    likeness = torch.zeros(t, p, device=x.device)
    if t > 1:
        before = neighbour_similarity(x)
        likeness[1::2] = before[::2]
    if t > 2:
        second = neighbour_similarity(x, 2)[::WINDOW]
        likeness[2::WINDOW] = second
    numbers = torch.full((t,), number, device=x.device)
    numbers[::WINDOW] = p
    return best(-likeness, numbers, torch.ones_like(likeness, dtype=torch.bool))
