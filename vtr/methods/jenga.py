"""Jenga: blocks of a space-filling curve, by their share and their place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vtr.kernels.masks import always, budgets, layouts
from vtr.kernels.masks.layouts import Layout
from vtr.kernels.masks.scores import pooled
from vtr.methods.base import (
    BlockChoice,
    DynamicAttention,
    Examples,
    Grid,
    GridView,
    Presets,
    check_flag,
    check_number,
    check_share,
    register,
)
from vtr.methods.common.order import check_order
from vtr.methods.common.raised import attention_with_raised_text


@register
@dataclass(frozen=True, kw_only=True)
class Jenga(Presets, DynamicAttention):
    r"""The block mask of Jenga (arXiv 2505.16864).

    Tokens are put in order along a generalised Hilbert curve. ``P_IJ = softmax_J(scale mean(q_I) . mean(k_J))``
    over the grid's blocks. A query block keeps, in falling order of P, those whose running sum is at most
    ``p`` and one more, at least ``1 - drop`` of the blocks (rounded down), and those that touch it in the
    grid. Text is dense both ways, and its logits may be raised.

    .. math::

        P_{IJ} = \operatorname{softmax}_J(\bar q_I \cdot \bar k_J / \sqrt{d}), \qquad
        \text{keep by falling } P \text{ until } \sum_J P_{IJ} > p, \text{ at least } 1 - \mathrm{drop}
        \text{ of the blocks, and neighbours}

    :class:`~vtr.methods.RectifiedSparse` with ``rectify=False`` has the same rule with another P, in which its
    text has a share.

    Jenga is more than this mask: it also generates at a lower resolution first, and skips steps with
    TeaCache. Most of its published speed comes from these two, which are not part of this package.

    Differences from the authors' code: a ragged last block has the mean of its tokens, theirs is
    filled up with zeros that count. Their ``drop`` grows with the steps, here it is one number.

    Args:
        drop: at most this share of the grid blocks is skipped, in [0, 1].
        p: share of P that the kept blocks must pass, in [0, 1].
        order: ``"gilbert"``, ``"gilbert-frames"`` (theirs for Wan), ``"hilbert"``, ``"raster"``, or a tile.
        neighbours: blocks that touch the query block in the grid are always kept, itself among them.
        first_frame: the leading ``blocks // frames`` blocks always see each other (theirs for Wan).
        text_gain: the weight of text is multiplied by 2 to this power, which is at least 0. While Jenga
            generates at a smaller size it takes log2(full size / size) / 2, sizes in tokens of a frame, so that text
            keeps its share beside fewer tokens.
    """

    name: ClassVar[str] = "jenga"
    paper: ClassVar[str] = "Jenga, NeurIPS 2025, arXiv 2505.16864"

    PRESETS: ClassVar = {
        "hunyuanvideo": {},
        "wan2.1-t2v-1.3b": {
            "p": 0.9, "order": "gilbert-frames", "first_frame": True, "dense_steps": 2,
        },
        "wan2.1-t2v-14b": {
            "drop": 0.7, "p": 0.8, "order": "gilbert-frames", "first_frame": True, "dense_steps": 2,
        },
    }  # fmt: skip
    """The masks of the authors' base scripts at full resolution, with the ``drop`` of the first half of the 50
    steps; in the second half they take 0.1 more. On Wan it grows from 0 to that in the first five
    steps, of which the first two are dense."""

    tabled: ClassVar[bool] = True

    drop: float = field(default=0.75, kw_only=False)
    p: float = 0.3
    order: str | tuple[int, int, int] = "gilbert"
    neighbours: bool = True
    first_frame: bool = False
    text_gain: float = 0.0

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (
                cls(drop=0.5, p=0.1, neighbours=False, block=16),
                cls(drop=0.7, p=0.1, first_frame=True, text_gain=0.5, block=16),
            ),
            "everything": (cls(drop=0.0, block=16),),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.drop, "drop", zero=True)
        check_share(self.p, "p", zero=True)
        self._set("order", check_order(self.order))
        check_flag(self.neighbours, "neighbours")
        check_flag(self.first_frame, "first_frame")
        check_number(self.text_gain, "text_gain", 0, 64)

    def layout(self, grid: Grid) -> Layout:
        return layouts.ordered(grid, self.sides, self.order)

    def scores(self, view: GridView) -> Tensor:
        return torch.softmax(pooled(view.q_means, view.k_means, scale=view.scale), -1)

    def budget(self, scores: Tensor, view: GridView) -> Tensor:
        number = budgets.number_of(self.share(view, 1 - self.drop), scores.shape[-1])
        return budgets.top_k(scores, number) | budgets.top_p(scores, self.p)

    def always(self, grid: Grid, layout: Layout) -> Tensor | None:
        return always.touching(grid, layout, self.neighbours, self.first_frame)

    def compute(self, view: GridView, chosen: BlockChoice) -> Tensor:
        if not (self.text_gain and view.text):
            return super().compute(view, chosen)
        return attention_with_raised_text(view, chosen.mask, self.text_gain)
