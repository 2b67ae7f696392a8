"""SlidingTile: windows of whole tiles around each tile of the grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vtr.kernels import masks
from vtr.method import register
from vtr.methods._order import arrange, grid_order
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
    smaller tiles at its ends, and some partial blocks.

    Args:
        window: tiles per axis, as (frames, height, width), (height, width) for images, or one int; a
            float in (0, 1] is the share of the grid.
        tile: tokens of a tile as (frames, height, width).
    """

    name: ClassVar[str] = "sliding-tile"
    paper: ClassVar[str] = "Sliding Tile Attention, ICML 2025, arXiv 2502.04507"

    PRESETS: ClassVar = {
        "hunyuanvideo": {"window": (5, 5, 5), "dense_steps": 0.24},
        "hunyuanvideo-tuned": {"window": (3, 3, 3), "dense_steps": 0.24},
    }
    """For 30 x 48 x 80 tokens: the two windows of the authors' tables (0.42 and 0.09 of the grid; the
    smaller one is theirs for fine-tuned weights), the same for all heads."""

    window: Window = 0.25
    tile: tuple[int, ...] = (6, 8, 8)

    def validate(self) -> None:
        super().validate()
        self._set("window", check_window(self.window))
        if not isinstance(self.tile, (tuple, list)) or len(self.tile) not in (2, 3):
            raise ValueError(f"tile must be ints for (frames, height, width), got {self.tile!r}")
        self._set("tile", check_window(self.tile, "tile"))

    def make_layout(self, site: AttentionSite) -> Layout:
        tile = fit_window(self.tile, site.grid)
        tiles = tuple(-(-n // t) for n, t in zip(site.grid, tile, strict=True))
        mask = masks.sliding_tile(
            site.grid, tile, fit_window(self.window, tiles), text=site.text, block=self.block
        )
        return Layout(mask, arrange(grid_order(site.grid, tile), site.text, site.text_first))
