"""SlidingTile: windows of whole tiles around each tile of the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, ClassVar

import torch

from vtr.kernels import BlockMask, masks
from vtr.kernels.keys import without_keys
from vtr.method import register
from vtr.methods._order import Arranged, arrange, grid_order
from vtr.methods._presets import Presets
from vtr.methods._static import Layout, StaticSparse, Window, check_window, fit_window

if TYPE_CHECKING:
    from vtr.diffusion.site import AttentionSite


@register
@dataclass(frozen=True)
class SlidingTile(Presets, StaticSparse):
    """Sliding Tile Attention (ICML 2025, arXiv 2502.04507), without its search of windows per head.

    The grid is cut into tiles; each tile sees the tiles of a window around it, shifted at the borders
    so that every tile sees a full window. Text is dense both ways. With tiles of a multiple of
    ``block`` tokens in a grid of whole tiles every block is dense or empty; a grid that is not has
    smaller tiles at its ends, and some partial blocks. ``tile=None`` is for any grid: a tile of at
    most ``block`` tokens that divides the grid best, filled up to a block of its own, so that the
    work is that of the window whatever the size.

    Args:
        window: tiles per axis, as (frames, height, width), (height, width) for images, or one int; a
            float in (0, 1] is the share of the grid.
        tile: tokens of a tile as (frames, height, width) or (height, width), or None. The authors
            take (6, 8, 8).
    """

    name: ClassVar[str] = "sliding-tile"
    paper: ClassVar[str] = "Sliding Tile Attention, ICML 2025, arXiv 2502.04507"

    PRESETS: ClassVar = {
        "hunyuanvideo": {"window": (5, 5, 5), "tile": (6, 8, 8), "dense_steps": 0.24},
        "hunyuanvideo-tuned": {"window": (3, 3, 3), "tile": (6, 8, 8), "dense_steps": 0.24},
    }
    """For 30 x 48 x 80 tokens: the two windows of the authors' tables (0.42 and 0.09 of the grid; the
    smaller one is theirs for fine-tuned weights), the same for all heads."""

    window: Window = 0.25
    tile: tuple[int, ...] | None = None

    def validate(self) -> None:
        super().validate()
        self._set("window", check_window(self.window))
        if self.tile is None:
            return
        if not isinstance(self.tile, (tuple, list)) or len(self.tile) not in (2, 3):
            raise ValueError(f"tile must be ints for (frames, height, width), got {self.tile!r}")
        self._set("tile", check_window(self.tile, "tile"))

    def make_layout(self, site: AttentionSite) -> Layout:
        if self.tile is None:
            return self._filled(site)
        tile = fit_window(self.tile, site.grid)
        tiles = tuple(-(-n // t) for n, t in zip(site.grid, tile, strict=True))
        window = fit_window(self.window, tiles)
        if any(w > n for w, n in zip(window, tiles, strict=True)):
            raise ValueError(
                f"window={self.window} of tiles {tile} is for a larger grid: {site.grid} tokens "
                f"(frames, height, width) are {tiles} tiles. Give window as a share of the grid "
                "(window=0.25), and tile=None for a tile that fits it"
            )
        mask = masks.sliding_tile(site.grid, tile, window, text=site.text, block=self.block)
        return Layout(mask, arrange(grid_order(site.grid, tile), site.text, site.text_first))

    def _filled(self, site: AttentionSite) -> Layout:
        """Every tile a block: what it lacks is filled with tokens that nobody sees."""
        tile = dividing_tile(site.grid, self.block)
        tiles = tuple(-(-n // t) for n, t in zip(site.grid, tile, strict=True))
        number, tokens = math.prod(tiles), math.prod(site.grid)
        near = masks.sliding_tile(
            tiles, (1, 1, 1), fit_window(self.window, tiles), block=self.block
        )
        places = number * self.block
        blocks = number + -(-site.text // self.block)
        live = torch.ones(blocks, blocks, dtype=torch.bool, device="cpu")
        live[:number, :number] = near.to_dense()
        total = places + site.text
        mask = BlockMask.from_blocks(live, q_len=total, k_len=total, block=self.block)

        order = grid_order(site.grid, tile)
        axes = torch.unravel_index(order, site.grid)
        of = torch.zeros_like(order)
        for axis, step, count in zip(axes, tile, tiles, strict=True):
            of = of * count + axis // step
        held = torch.bincount(of, minlength=number)
        # The place of a token: its tile's block, and its number in the tile.
        place = of * self.block + torch.arange(tokens, device="cpu") - (held.cumsum(0) - held)[of]
        real = torch.zeros(total, dtype=torch.bool, device="cpu")
        real[place] = True
        real[places:] = True
        first = site.text if site.text_first else 0
        words = torch.arange(site.text, device="cpu") + (0 if site.text_first else tokens)
        source = torch.full((total,), first, dtype=torch.int64, device="cpu")
        source[place] = order + first
        source[places:] = words
        back = torch.empty(tokens + site.text, dtype=torch.int64, device="cpu")
        back[order + first] = place
        back[words] = torch.arange(places, total, device="cpu")
        if not bool(real.all()):
            mask = without_keys(mask, real[None])
        return Layout(mask, Arranged(source, back))


def dividing_tile(grid: Sequence[int], block: int) -> tuple[int, ...]:
    """The tile of at most ``block`` tokens whose blocks hold the fewest empty places, and of those
    about equal the one with sides most alike."""

    def cost(tile: tuple[int, ...]) -> float:
        places = math.prod(-(-n // t) for n, t in zip(grid, tile, strict=True)) * block
        sides = [t / min(n, 8) for t, n in zip(tile, grid, strict=True) if n > 1] or [1.0]
        return math.log(places) + 0.04 * math.log(max(sides) / min(sides))

    sizes = [range(1, min(n, block) + 1) for n in grid]
    return min((t for t in product(*sizes) if math.prod(t) <= block), key=cost)
