"""DraftAttention: blocks of a frame's patches, chosen by one threshold per head."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vtr.kernels.masks import budgets, layouts
from vtr.kernels.masks.layouts import Layout
from vtr.kernels.masks.scores import pooled
from vtr.methods.base import DynamicAttention, Examples, Grid, GridView, check_share, register


@register
@dataclass(frozen=True, kw_only=True)
class DraftAttention(DynamicAttention):
    r"""Draft attention (arXiv 2505.14708): the map of downsampled frames decides for their patches.

    Tokens are put in order patch by patch, a patch of 8 x 16 tokens of one frame being a block of 128.
    The draft is ``softmax_J(scale mean(q_I) . mean(k_J))`` over all patches of the video. Of the draft of a
    head, the ``density`` largest entries are kept, whatever their rows: one threshold per head and
    sample, at which the entry on it is kept too. Text sees, and is seen by, everything.

    .. math::

        P = \operatorname{softmax}_J\!\left(\bar q_I \cdot \bar k_J / \sqrt{d}\right), \qquad
        M_{IJ} = [\,P_{IJ} \ge \theta\,], \quad \theta \text{ the } (1 - \mathrm{density}) \text{ quantile
        of the head's } P

    A row may have no entry above the threshold. The authors' models live on their text columns then;
    here such a row keeps its best block, if it sees no text.

    Differences from the authors' code: height and width need not divide, as patches at the end of a frame
    are filled up with empty places and their means are those of their tokens; several samples.

    Args:
        density: share of the entries of a head's map that is kept, in (0, 1]. The authors take 0.1.
        patch: (height, width) tokens, at most ``block`` of them.
    """

    name: ClassVar[str] = "draft-attention"
    paper: ClassVar[str] = "DraftAttention, 2025, arXiv 2505.14708"

    tabled: ClassVar[bool] = True

    density: float = field(default=0.1, kw_only=False)
    patch: tuple[int, int] = (8, 16)

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.3, patch=(2, 4), block=16),),
            "everything": (cls(1.0, patch=(2, 4), block=16),),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.density, "density")
        patch = tuple(self.patch) if isinstance(self.patch, (tuple, list)) else ()
        if len(patch) != 2 or any(type(n) is not int or n < 1 for n in patch):
            raise ValueError(f"patch must be positive ints (height, width), got {self.patch!r}")
        if math.prod(patch) > self.block:
            raise ValueError(
                f"patch {patch} has {math.prod(patch)} tokens, and a block holds {self.block}: give a "
                "smaller patch or a larger block"
            )
        self._set("patch", patch)

    def layout(self, grid: Grid) -> Layout:
        return layouts.tiled(grid, (1, *self.patch), self.sides, whole=True)

    def scores(self, view: GridView) -> Tensor:
        return torch.softmax(pooled(view.q_means, view.k_means, scale=view.scale), -1)

    def budget(self, scores: Tensor, view: GridView) -> Tensor:
        return budgets.percentile(scores, self.share(view, self.density))
