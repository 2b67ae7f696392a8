"""ToMeSD: merge similar tokens before a diffusion block computes, and give each its result back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vtr.methods.base import Examples, ModelInfo, Reduction, Stage, TokenMethod, register
from vtr.methods.common.cells import merge_map
from vtr.methods.common.schedule import Scheduled


@register
@dataclass(frozen=True, kw_only=True)
class ToMeSD(Scheduled, TokenMethod):
    """Token Merging for Stable Diffusion (CVPR workshops 2023, arXiv 2303.17604), for transformers.

    The grid is cut into cells. One token of each cell is a destination, the others are sources; each
    source finds its most similar destination anywhere (cosine of the hidden states at the block's
    input), and the ``ratio`` most similar are merged into the mean. The block's self-attention (and
    MLP) computes on the merged tokens, and each token takes over the result of its destination. The
    map is found anew in every block, since the similarity of tokens changes with depth and step.

    Differences from the authors' code: it works on any transformer with a grid, on video (a cell of
    several frames merges in time) and at any size (cells are cut off at the border); a merged token
    has its destination's place if attention has rotary positions; joint text is not
    touched; the choice of destinations comes from ``seed`` and is the same for all samples.

    Args:
        ratio: share of the tokens that are merged away, up to 1 - 1 / (tokens of a cell).
        cell: (frames, height, width) tokens of a cell.
        merge_attn: merge around the self-attention, as the authors do.
        merge_mlp: merge around the MLP as well (off in the authors' code, which found it to cost
            quality).
        seed: of the destinations, which change with layer and step; None takes each cell's first.
        dense_layers: blocks left alone: the first n (int), or these (tuple of 0-based numbers).
        dense_steps: steps left alone at the start of a run: the first n (int), or a fraction.
    """

    name: ClassVar[str] = "tomesd"
    paper: ClassVar[str] = "Token Merging for Fast Stable Diffusion, CVPRW 2023, arXiv 2303.17604"
    sites: ClassVar[tuple[str, ...]] = ("block",)
    needs: ClassVar = {"block": frozenset({"hidden"})}

    ratio: float = field(default=0.5, kw_only=False)
    cell: tuple[int, int, int] = (1, 2, 2)
    merge_attn: bool = True
    merge_mlp: bool = False
    seed: int | None = 0

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.5), cls(0.5, cell=(3, 1, 2), seed=None)),
            "everything": (cls(0.0),),
        }

    def validate(self) -> None:
        super().validate()
        cell = tuple(self.cell) if isinstance(self.cell, (tuple, list)) else ()
        if len(cell) != 3 or any(type(n) is not int or n < 1 for n in cell):
            raise ValueError(
                f"cell must be positive ints (frames, height, width), got {self.cell!r}"
            )
        self._set("cell", cell)
        most = 1 - 1 / math.prod(cell)
        if isinstance(self.ratio, bool) or not 0 <= self.ratio <= most:
            raise ValueError(
                f"ratio must be from 0 to {most:g} for a cell of {math.prod(cell)} tokens, of which "
                f"one stays, got {self.ratio!r}"
            )
        if not (self.merge_attn or self.merge_mlp):
            raise ValueError("merge_attn and merge_mlp are both False: nothing would be merged")
        if self.seed is not None and type(self.seed) is not int:
            raise ValueError(f"seed must be an int or None, got {self.seed!r}")

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("block", n) for n in self.working_layers(info, "block"))

    def parts(self) -> frozenset[str]:
        """Around what tokens are merged: ``"attention"``, ``"mlp"``."""
        wanted = {"attention": self.merge_attn, "mlp": self.merge_mlp}
        return frozenset(part for part, on in wanted.items() if on)

    def reduce(self, site: Any) -> Reduction | None:
        """The map of a :class:`vtr.diffusion.site.BlockSite`, None in dense steps."""
        if self.is_dense(site):
            return None
        generator = None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(
                (self.seed * 1_000_003 + site.step * 1_009 + site.layer) % 2**63
            )
        found = merge_map(site.hidden, site.grid, self.cell, self.ratio, generator)
        return None if found is None else Reduction(found)
