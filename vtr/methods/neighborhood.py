"""NeighborhoodAttention: windows on the token grid, shared by groups of queries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from vtr.kernels import masks
from vtr.methods.base import Examples, Grid, GridMask, MaskedAttention, Presets, register
from vtr.methods.common.grid_windows import GridWindow, check_window, compact_tile, fit_window


@register
@dataclass(frozen=True, kw_only=True)
class NeighborhoodAttention(Presets, MaskedAttention):
    r"""Generalised neighborhood attention, GNA (arXiv 2504.16922).

    Along each axis of the grid, groups of ``stride`` neighbouring queries share the window of the
    group's middle: ``window`` keys, ``dilation`` apart, shifted and not cut at the borders. Text is
    dense both ways. Tokens are reordered tile by tile, so that what a query sees lies in few blocks.

    .. math::

        M_{ij} = \prod_a \Big[\, j_a \in \mathrm{window}_a\Big(\Big\lfloor \frac{i_a}{\mathrm{stride}_a}
        \Big\rfloor\Big) \Big]
        \quad\text{along the axes } a \text{ of the grid}

    The kernel computes every block that a window touches: with a stride of 1 up to twice the share of
    the window. Nothing is wasted if the grid is whole tiles, the stride is the tile and the window
    an odd number of them (section 3 of the paper), which for any grid is what
    :class:`~vtr.methods.SlidingTile` does.

    Args:
        window: keys per axis, as (frames, height, width), (height, width) for images, or one int; a
            float in (0, 1] is the share of the grid, for which a window is found at any resolution.
        stride, dilation: one int, or one per axis as above; not with a window given as a share if
            they do not fit it.
        tile: tokens of a tile as (frames, height, width); None takes one of about ``block`` tokens.
    """

    name: ClassVar[str] = "neighborhood"
    paper: ClassVar[str] = "Generalized Neighborhood Attention, 2025, arXiv 2504.16922"

    PRESETS: ClassVar = {
        "hunyuanvideo": {"window": (18, 24, 24), "stride": (16, 8, 8), "tile": (2, 8, 8)},
    }
    """For 30 x 48 x 80 tokens (0.09 of the grid)."""

    window: GridWindow = field(default=0.25, kw_only=False)
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    tile: tuple[int, ...] | None = None

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.3, block=16),),
            "everything": (cls(1.0, block=16),),
        }

    def validate(self) -> None:
        super().validate()
        self._set("window", check_window(self.window))
        for name in ("stride", "dilation", "tile"):
            value = getattr(self, name)
            if value is None and name == "tile":
                continue
            if isinstance(value, float):
                raise ValueError(f"{name} must be a positive int or several, got {value!r}")
            self._set(name, check_window(value, name))

    def grid_mask(self, grid: Grid) -> GridMask:
        tile = compact_tile(grid, self.block) if self.tile is None else fit_window(self.tile, grid)
        window = fit_window(self.window, grid)
        mask = masks.neighborhood(
            grid,
            window,
            stride=fit_window(self.stride, grid),
            dilation=_dilation(self.dilation, window),
            tile=tile,
            block=self.block,
        )
        return GridMask(mask, masks.tile_order(grid, tile))


def _dilation(dilation: int | tuple[int, ...], window: tuple[int, ...]) -> tuple[int, ...]:
    """Per axis; one int holds if there is more than one key (an image has one frame)."""
    if isinstance(dilation, int):
        return tuple(dilation if keys > 1 else 1 for keys in window)
    return (1,) * (len(window) - len(dilation)) + dilation
