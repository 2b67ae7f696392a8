"""Sparse prefills that any method has to beat: random key blocks, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import Examples, PrefillMethod, check_count, check_share, register
from vtr.methods.common.key_blocks import BlockGrid, best_blocks, even_numbers, shares

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class RandomBlocks(PrefillMethod):
    r"""Every block of rows sees random key blocks among those before it.

    Each layer and head has its own, the same for every sample and every call of the same lengths. The first
    block and the diagonal, which every sparse prefill keeps, count: of the others every block of rows has
    the same share, within one block, so that the whole mask has the density.

    .. math::

        M_{IJ} = [\,J = 0\,] \lor [\,J = I\,] \lor [\,J \in S_I\,], \qquad S_I \sim \mathrm{Uniform}\{S
        \subset \{1, \dots, I - 1\}\}

    Args:
        density: share of the causal key blocks, in (0, 1].
        seed: of the choice.
    """

    name: ClassVar[str] = "random-blocks"
    paper: ClassVar[str] = "baseline: random key blocks"

    density: float = field(default=0.25, kw_only=False)
    seed: int = 0

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.3, block=16, last_rows=1),),
            "everything": (cls(1.0, block=16, last_rows=1),),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.density, "density")
        check_count(self.seed, "seed", low=0)

    def blocks(self, site: LanguageAttentionSite) -> Tensor:
        grid, (batch, heads) = BlockGrid.of(site, self.sides), site.q.shape[:2]
        # Drawn on the CPU, so that all devices choose alike; a seed and its successor must not share layers.
        generator = torch.Generator().manual_seed(self.seed * 10_007 + site.layer)
        size = (heads, grid.row_blocks, grid.key_blocks)
        rank = torch.rand(size, generator=generator, device="cpu").to(
            grid.device, non_blocking=True
        )
        always, visible = grid.always(), grid.visible()
        free = visible & ~always
        goal = (self.density * visible.sum() - always.sum()).clamp(min=0)
        number = shares(goal / free.sum().clamp(min=1), free.sum(-1))
        return (always | best_blocks(rank, number, free)).expand(batch, *size)


@register
@dataclass(frozen=True, kw_only=True)
class LocalWindow(PrefillMethod):
    r"""Every block of rows sees the most recent key blocks, and the first.

    It is the baseline of sparse prefills beside random blocks: what is asked about far from its place is lost, and
    what is near is kept whole. Nothing is estimated, so that it costs nothing to find.

    .. math::

        M_{IJ} = [\,I - w < J \le I\,] \lor [\,J = 0\,]

    Args:
        density: share of the causal key blocks, in (0, 1]. The window that has it is equally long for
            all rows, within one block; the first block counts.
        window: keys that a row sees at least, up to its own, instead of ``density``.
    """

    name: ClassVar[str] = "local-window"
    paper: ClassVar[str] = "baseline: a window of recent keys"

    density: float = field(default=0.25, kw_only=False)
    window: int | None = None

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.3, block=16, last_rows=1), cls(window=1, block=16, last_rows=1)),
            "everything": (cls(1.0, block=16, last_rows=1),),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.density, "density")
        check_count(self.window, "window", none=True)

    def blocks(self, site: LanguageAttentionSite) -> Tensor:
        grid = BlockGrid.of(site, self.sides)
        if self.window is not None:
            first = grid.recent(self.window)
        else:
            visible, newest = grid.visible(), grid.newest()
            counts = visible.sum(-1)
            number = even_numbers(self.density, counts, grid.key_blocks)
            # One of the number is the first block, unless the window reaches it.
            near = (number - visible[:, 0].long()).clamp(min=1)
            first = torch.where(number >= counts, 0, newest - near + 1)
        column = torch.arange(grid.key_blocks, device=grid.device)
        keep = grid.always() | (grid.visible() & (column >= first[:, None]))
        return keep.expand(site.q.shape[0], 1, -1, -1)
