"""SlidingTile: windows of whole tiles around each tile of the grid."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vtr.kernels import masks
from vtr.methods.base import (
    Examples,
    Grid,
    GridMask,
    MaskedAttention,
    ModelInfo,
    Presets,
    Stage,
    register,
)
from vtr.methods.common.grid_windows import GridWindow, check_window, fit_window
from vtr.methods.common.tiles import filled_tiles, tiles_of
from vtr.methods.common.windows import load_windows

if TYPE_CHECKING:
    from vtr.diffusion.site import DiffusionAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class SlidingTile(Presets, MaskedAttention):
    r"""Sliding Tile Attention (ICML 2025, arXiv 2502.04507).

    The grid is cut into tiles; each tile sees the tiles of a window around it, shifted at the borders
    so that every tile sees a full window. Text is dense both ways. With tiles of a multiple of
    ``block`` tokens in a grid of whole tiles every block is dense or empty; a grid that is not has
    smaller tiles at its ends, and some partial blocks. ``tile=None`` is for any grid: a tile of at
    most ``block`` tokens that divides the grid best, filled up to a block, so that the
    work is that of the window whatever the size.

    .. math::

        M_{IJ} = \prod_a \Big[\,|J_a - c_a(I_a)| \le \tfrac{1}{2} (\mathrm{window}_a - 1)\,\Big], \qquad
        c_a \text{ shifted so that the window lies in the grid}

    Without training the authors search a window for every step, layer and head. Their table for
    HunyuanVideo (50 steps) leaves the first 15 steps dense, in which it differs from the 12 of the
    paper; then each head has one of five windows. ``table`` reads it, or another one that their search
    has written. One window for all heads is the setting for fine-tuned weights.

    Args:
        window: tiles per axis, as (frames, height, width), (height, width) for images, or one int; a
            float in (0, 1] is the share of the grid. Not used with ``table``.
        tile: tokens of a tile as (frames, height, width) or (height, width), or None. The authors
            take (6, 8, 8).
        table: a JSON file of windows, ``{"step_layer_head": [frames, height, width]}``, read when the
            method is applied. The model's layers (dual-stream blocks first) and heads, the steps of
            the run, and the tiles of the grid (the largest window along each axis) must be the
            table's. Steps and layers in which all heads have the whole grid are dense.
    """

    name: ClassVar[str] = "sliding-tile"
    paper: ClassVar[str] = "Sliding Tile Attention, ICML 2025, arXiv 2502.04507"

    PRESETS: ClassVar = {
        "hunyuanvideo": {"window": (5, 5, 5), "tile": (6, 8, 8), "dense_steps": 0.25},
        "hunyuanvideo-tuned": {"window": (3, 3, 3), "tile": (6, 8, 8), "dense_steps": 0.25},
        "hunyuanvideo-searched": {"tile": (6, 8, 8), "table": "mask_strategy_hunyuan.json"},
    }
    """For 30 x 48 x 80 tokens: the two windows of the authors' tables (0.42 and 0.09 of the grid; the
    smaller one is theirs for fine-tuned weights), the same for all heads, with the paper's 12 dense
    steps of 50; and the released search, whose file is not part of this package: it is
    ``assets/mask_strategy_hunyuan.json`` on FastVideo's branch ``sta_do_not_delete``, read from the
    working directory or from ``preset("hunyuanvideo-searched", table=path)``."""

    window: GridWindow = field(default=0.25, kw_only=False)
    tile: tuple[int, ...] | None = None
    table: str | None = None

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.4, tile=(1, 2, 2), block=16),),
            "everything": (cls(1.0, tile=(2, 2, 2), block=16),),
        }

    def validate(self) -> None:
        super().validate()
        self._set("window", check_window(self.window))
        if self.table is not None and not (isinstance(self.table, str) and self.tile is not None):
            raise ValueError(
                "table must be the path of a JSON file of windows, which count tiles: give "
                f"tile=(6, 8, 8) with it; got table={self.table!r}, tile={self.tile!r}"
            )
        if self.tile is None:
            return
        if not isinstance(self.tile, (tuple, list)) or len(self.tile) not in (2, 3):
            raise ValueError(f"tile must be ints for (frames, height, width), got {self.tile!r}")
        self._set("tile", check_window(self.tile, "tile"))

    def stays(self) -> bool:
        return self.table is None

    def mask_key(self, site: DiffusionAttentionSite) -> tuple[object, ...]:
        return (self.window,)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        if self.table is not None:
            load_windows(self.table).check_model(info)
        return super().stages(info)

    def grid_mask(self, grid: Grid) -> GridMask:
        if self.tile is None:
            return filled_tiles(grid, self.window, self.block)
        tile = fit_window(self.tile, grid)
        tiles = tiles_of(grid, tile)
        window = fit_window(self.window, tiles)
        if any(w > n for w, n in zip(window, tiles, strict=True)):
            raise ValueError(
                f"window={self.window} of tiles {tile} is for a larger grid: {grid} tokens "
                f"(frames, height, width) are {tiles} tiles. Give window as a share of the grid "
                "(window=0.25), and tile=None for a tile that fits it"
            )
        mask = masks.sliding_tile(grid, tile, window, block=self.block)
        return GridMask(mask, masks.tile_order(grid, tile))

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        if self.table is None:
            return super().attend(site)
        table = load_windows(self.table)
        table.check_run(site, tiles_of(site.grid, fit_window(self.tile or (), site.grid)))
        return table.attend(
            site, lambda window: replace(self, window=window, table=None).sequence_mask(site)
        )
