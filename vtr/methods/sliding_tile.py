"""SlidingTile: windows of whole tiles around each tile of the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.core.method import Stage
from vtr.core.presets import Presets
from vtr.core.registry import register
from vtr.kernels import BlockMask, masks
from vtr.kernels.keys import without_keys
from vtr.methods.common.order import Arranged, arrange, grid_order
from vtr.methods.common.static import Layout, StaticSparse, Window, check_window, fit_window, sparse
from vtr.methods.common.windows import WindowTable, load_windows

if TYPE_CHECKING:
    from vtr.core.site import ModelInfo
    from vtr.diffusion.site import AttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class SlidingTile(Presets, StaticSparse):
    """Sliding Tile Attention (ICML 2025, arXiv 2502.04507).

    The grid is cut into tiles; each tile sees the tiles of a window around it, shifted at the borders
    so that every tile sees a full window. Text is dense both ways. With tiles of a multiple of
    ``block`` tokens in a grid of whole tiles every block is dense or empty; a grid that is not has
    smaller tiles at its ends, and some partial blocks. ``tile=None`` is for any grid: a tile of at
    most ``block`` tokens that divides the grid best, filled up to a block of its own, so that the
    work is that of the window whatever the size.

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

    window: Window = field(default=0.25, kw_only=False)
    tile: tuple[int, ...] | None = None
    table: str | None = None

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

    def layout_key(self, site: AttentionSite) -> tuple[object, ...]:
        return (self.window,)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        if self.table is not None:
            table, layers = load_windows(self.table), info.depth.get("attention", 0)
            if (table.layers, table.heads) != (layers, info.heads):
                raise ValueError(
                    f"table={self.table!r} is for {table.layers} layers of {table.heads} heads; "
                    f"{info.family} here has {layers} of {info.heads}"
                )
        return super().stages(info)

    def attend(self, site: AttentionSite) -> Tensor:
        if self.table is None:
            return super().attend(site)
        table = load_windows(self.table)
        _check_run(table, self.tile or (), site)
        chosen = table.index[site.step, site.layer]
        numbers = chosen.unique().tolist()
        if [table.windows[n] for n in numbers] == [table.whole]:
            dense: Tensor = site.dense()
            return dense

        def make() -> list[Tensor]:
            own = [(chosen == n).nonzero().squeeze(1) for n in numbers]
            return [t.to(site.q.device) for t in (*own, torch.cat(own).argsort())]

        *heads, back = site.for_size(("heads", site.step, site.layer), make)
        parts, work = [], site.notes.get("work", 0.0)
        for number, own in zip(numbers, heads, strict=True):
            of_window = replace(self, window=table.windows[number], table=None)
            parts.append(sparse(site, of_window.layout(site), heads=own)[0])
        site.notes["density"] = site.notes["work"] - work
        return torch.cat(parts, 1).index_select(1, back)

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


def _check_run(table: WindowTable, tile: Window, site: AttentionSite) -> None:
    """Raise where a run is not one of the table."""
    if site.training:
        raise RuntimeError(
            "a table has windows for the steps of a generation, and training has no such steps: "
            "train under one window (window=)"
        )
    if site.q.shape[1] != table.heads:
        raise RuntimeError(
            f"the table has windows for {table.heads} heads, and {site.q.shape[1]} are here: heads "
            "that are split between processes are not known by number"
        )
    if site.steps not in (None, table.steps) or site.step >= table.steps:
        raise RuntimeError(
            f"the table is for {table.steps} denoising steps, this run has "
            f"{site.steps or 'more'}: call the pipeline with num_inference_steps={table.steps}"
        )
    tile = fit_window(tile, site.grid)
    tiles = tuple(-(-n // t) for n, t in zip(site.grid, tile, strict=True))
    if tiles != table.whole:
        raise RuntimeError(
            f"the table is for {table.whole} tiles; {site.grid} tokens (frames, height, width) are "
            f"{tiles} tiles of {tile}"
        )


def dividing_tile(grid: Sequence[int], block: int) -> tuple[int, ...]:
    """The tile of at most ``block`` tokens whose blocks hold the fewest empty places, and of those
    about equal the one with sides most alike."""

    def cost(tile: tuple[int, ...]) -> float:
        places = math.prod(-(-n // t) for n, t in zip(grid, tile, strict=True)) * block
        sides = [t / min(n, 8) for t, n in zip(tile, grid, strict=True) if n > 1] or [1.0]
        return math.log(places) + 0.04 * math.log(max(sides) / min(sides))

    sizes = [range(1, min(n, block) + 1) for n in grid]
    return min((t for t in product(*sizes) if math.prod(t) <= block), key=cost)
