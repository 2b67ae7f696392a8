"""ToMeSD: merge similar tokens before a diffusion block computes, and give each its result back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.method import Examples, Reduction, Stage, TokenMethod
from vtr.core.registry import register
from vtr.core.tokens import TokenMap
from vtr.kernels import bipartite_match
from vtr.methods.common.schedule import Scheduled

if TYPE_CHECKING:
    from vtr.core.site import ModelInfo


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
    stands at its destination's place where attention has rotary positions; joint text is not
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


@torch.no_grad()
def merge_map(
    hidden: Tensor,
    grid: tuple[int, int, int],
    cell: tuple[int, int, int],
    ratio: float,
    generator: torch.Generator | None = None,
) -> TokenMap | None:
    """Merge the ``int(ratio * N)`` tokens that are most like a destination (section 3 of the paper).

    Args:
        hidden: (B, N, C) grid tokens in raster order, compared by cosine.
        cell: tokens per axis of a cell, of which one is a destination.
        generator: draws it; None takes the first.

    Returns:
        The map, destinations standing for what was merged into them; None where nothing is merged.
    """
    number, device = hidden.shape[1], hidden.device
    source, target = cell_split(grid, cell, generator)
    merged = min(int(ratio * number), source.numel())
    if merged == 0:
        return None
    # Without waiting: what is copied from ordinary memory is taken before the call returns.
    source, target = (t.to(device, non_blocking=True) for t in (source, target))
    metric = F.normalize(hidden.float(), dim=-1)
    score, partner = bipartite_match(metric[:, source], metric[:, target])
    rank = torch.sort(score, dim=1, descending=True, stable=True).indices
    gone = source[rank[:, :merged]]
    to = target[partner.gather(1, rank[:, :merged])]
    stays = torch.ones(hidden.shape[:2], dtype=torch.bool, device=device).scatter_(1, gone, False)
    slot = stays.long().cumsum(1) - 1
    index = torch.arange(number, device=device).expand_as(slot)
    # Not ``index[stays]``, which would wait for the device to count them.
    kept = torch.empty(hidden.shape[0], number - merged + 1, dtype=torch.int64, device=device)
    kept = kept.scatter_(1, torch.where(stays, slot, number - merged), index)
    kept = kept[:, :-1].contiguous()
    return TokenMap.merged(kept, slot.scatter(1, gone, slot.gather(1, to)))


def cell_split(
    grid: tuple[int, int, int], cell: tuple[int, int, int], generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Raster indices of the sources and of the destinations, one in each cell, ascending, int64."""
    axes = torch.meshgrid(*(torch.arange(n, device="cpu") for n in grid), indexing="ij")
    number = torch.zeros(grid, dtype=torch.int64, device="cpu")
    for axis, size, step in zip(axes, grid, cell, strict=True):
        number = number * -(-size // step) + axis // step
    number = number.flatten()
    cells = int(number[-1]) + 1
    if generator is None:
        draw = torch.arange(number.numel(), 0, -1, dtype=torch.float64, device="cpu")
    else:
        draw = torch.rand(number.numel(), generator=generator, dtype=torch.float64, device="cpu")
    best = torch.full((cells,), -1.0, dtype=torch.float64, device="cpu").scatter_reduce(
        0, number, draw, "amax"
    )
    target = draw == best[number]
    return (~target).nonzero().squeeze(1), target.nonzero().squeeze(1)
