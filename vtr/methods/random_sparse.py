"""Sparse attention that any structured mask has to beat: random blocks, and a window of frames."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.core.registry import register
from vtr.kernels import BlockMask, masks
from vtr.kernels.masks.build import spans
from vtr.methods.common.order import arrange
from vtr.methods.common.static import Layout, StaticSparse

if TYPE_CHECKING:
    from vtr.diffusion.site import AttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class RandomSparse(StaticSparse):
    """Random key blocks, as many for every query block, its own among them; text is dense both ways.

    Every head and layer has its own blocks, the same in every step.

    Args:
        density: share of the key blocks, in (0, 1].
        seed: of the choice.
    """

    name: ClassVar[str] = "random-sparse"
    paper: ClassVar[str] = "baseline: random key blocks"

    density: float = field(default=0.25, kw_only=False)
    seed: int = 0

    def validate(self) -> None:
        super().validate()
        if isinstance(self.density, bool) or not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed must be an int, got {self.seed!r}")

    def layout_key(self, site: AttentionSite) -> tuple[object, ...]:
        return (site.layer, site.q.shape[1])

    def make_layout(self, site: AttentionSite) -> Layout:
        tokens = torch.Size(site.grid).numel()
        heads = site.q.shape[1]
        # Layers are apart, but a seed and its successor must not share masks.
        seed = self.seed * 10_007 + site.layer
        mask = masks.random(tokens, self.density, heads=heads, block=self.block, seed=seed)
        if site.text:
            total = tokens + site.text
            blocks = -(-total // self.block)
            grid = -(-tokens // self.block)
            live = torch.ones(heads, blocks, blocks, dtype=torch.bool, device="cpu")
            live[:, :grid, :grid] = mask.to_dense(blocks=True)
            words = tokens // self.block  # the first block that holds text
            live[:, words:] = True
            live[:, :, words:] = True
            mask = BlockMask.from_blocks(live, q_len=total, k_len=total, block=self.block)
        raster = torch.arange(tokens, device="cpu")
        return Layout(mask, arrange(raster, site.text, site.text_first))


@register
@dataclass(frozen=True, kw_only=True)
class OwnFrame(StaticSparse):
    """Every query sees the frames at most ``radius`` away and the text, text sees everything.

    The mask to beat where motion matters: with ``radius=0`` no frame knows of another in this layer.
    """

    name: ClassVar[str] = "own-frame"
    paper: ClassVar[str] = "baseline: a window of frames"

    radius: int = field(default=0, kw_only=False)

    def validate(self) -> None:
        super().validate()
        if type(self.radius) is not int or self.radius < 0:
            raise ValueError(f"radius must be an int from 0 on, got {self.radius!r}")

    def make_layout(self, site: AttentionSite) -> Layout:
        frames, height, width = site.grid
        tokens, total = frames * height * width, frames * height * width + site.text
        place = torch.arange(total, device="cpu")
        words = place >= tokens
        frame = (place // (height * width)).clamp(max=frames - 1)

        def rule(i: Tensor, j: Tensor) -> Tensor:
            return ((frame[i] - frame[j]).abs() <= self.radius) | words[i] | words[j]

        low, high = spans(frame, self.block)
        some, every = (spans(words.long(), self.block)[i].bool() for i in (1, 0))
        maybe = torch.maximum(low[:, None] - high, low - high[:, None]) <= self.radius
        surely = torch.maximum(high[:, None] - low, high - low[:, None]) <= self.radius
        mask = masks.exact(
            rule, total, total, block=self.block,
            maybe=maybe | some | some[:, None], surely=surely | every | every[:, None],
        )  # fmt: skip
        return Layout(mask, arrange(torch.arange(tokens, device="cpu"), site.text, site.text_first))
