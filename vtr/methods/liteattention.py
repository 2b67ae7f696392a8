"""LiteAttention: tiles that stayed far below the maximum of their rows are skipped in all later steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.kernels.mass import live_tiles
from vtr.methods.base import (
    BlockChoice,
    DynamicAttention,
    Examples,
    Grid,
    GridView,
    check_number,
    register,
)

if TYPE_CHECKING:
    from vtr.kernels.masks.layouts import Layout


@register
@dataclass(frozen=True, kw_only=True)
class LiteAttention(DynamicAttention):
    r"""LiteAttention, temporal sparse attention (arXiv 2511.11062).

    A tile (a block of queries and a block of keys) that hardly counts in one denoising step hardly counts in the
    later ones. In every step attention visits the tiles that are left, and each that stays below the running
    maximum of all its queries by ``threshold`` is left out from the next step on. So the first sparse step
    of a run is dense, a tile that is skipped never comes back in this run, and nothing is estimated: what a step
    leaves out is decided by scores that it computed. Text is dense both ways.

    .. math::

        \text{skip tile } (I, J) \text{ from the next step on if } \;
        \Big(\max_{j \in J} s_{ij} - m_i\Big) \log_2 e \le \mathrm{threshold} \;\text{ for all } i \in I

    A flash-attention kernel could note the tiles while it computes them, as the authors' does. Here a
    second pass looks at the scores of the tiles that were visited (:func:`vtr.kernels.mass.live_tiles`, which has
    the rule and the order of visits); it is not in the trace, which counts attention. The method needs steps that are alike: few-step models
    have none. It is refused in training mode, which has no order of steps.

    Of the authors' numbers, their ablation is near linear in the skipped tiles, as it should be: self-attention
    of Wan 2.1 14B takes 695 s, and 418 s with 42 % of the tiles skipped.

    Args:
        threshold: powers of two below the running maximum; nearer to 0 skips more. The authors' code has
            -10.
        must_do: ranges (first, last + 1) of grid tokens in raster order: blocks of keys that hold one of them are
            never skipped.
        block: 16, 32, 64 or 128 tokens. The authors' tiles are 128 x 176 for heads of 128.
    """

    name: ClassVar[str] = "liteattention"
    paper: ClassVar[str] = "LiteAttention, 2025, arXiv 2511.11062"

    threshold: float = field(default=-10.0, kw_only=False)
    must_do: tuple[tuple[int, int], ...] = ()

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(0.0, block=16),), "everything": (cls(-1000.0, block=16),)}

    def validate(self) -> None:
        super().validate()
        check_number(self.threshold, "threshold", -1e6, 0)
        given = self.must_do if isinstance(self.must_do, (tuple, list)) else (None,)
        ranges = tuple(tuple(r) if isinstance(r, (tuple, list)) else () for r in given)
        if not all(
            len(r) == 2 and all(type(n) is int for n in r) and 0 <= r[0] < r[1] for r in ranges
        ):
            raise ValueError(
                "must_do must be ranges of grid tokens (first, last + 1), such as ((0, 3600),), got "
                f"{self.must_do!r}"
            )
        self._set("must_do", ranges)

    def always(self, grid: Grid, layout: Layout) -> Tensor | None:
        tokens, (rows, columns), side = layout.places, layout.blocks, layout.sides[1]
        kept = torch.zeros(rows, columns, dtype=torch.bool, device="cpu")
        for first, stop in self.must_do:
            if stop > tokens:
                raise ValueError(
                    f"must_do has tokens up to {stop}, and the grid of {grid} (frames, height, width) has "
                    f"{tokens}"
                )
            kept[:, first // side : -(-stop // side)] = True
        return kept

    def choose(self, view: GridView) -> BlockChoice:
        site = view.site
        if site.training:
            raise RuntimeError(
                "LiteAttention carries its skipped tiles from step to step of a generation, and training has "
                "no such steps: call model.eval() to generate, and train under a mask (RadialAttention, "
                "SlidingTile, NeighborhoodAttention)"
            )
        live = site.state.get("live")
        if live is None or live.shape[:2] != view.q.shape[:2]:  # guidance was switched off, say
            size = (*view.q.shape[:2], view.counts_q.numel(), view.counts_k.numel())
            live = torch.ones(size, dtype=torch.bool, device=view.q.device)
        now = self.keep(view, live, live.int())
        site.state["live"] = live_tiles(
            view.q, view.k, now.live, sides=view.sides, scale=view.scale, threshold=self.threshold
        )
        return now
