"""SearchedTile: sliding tiles with a window for every step, layer and head, searched on the model itself."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import (
    AttentionMethod,
    Examples,
    ModelInfo,
    Presets,
    check_share,
    masked_attention,
    register,
)
from vtr.methods.common.grid_windows import check_window, fit_window
from vtr.methods.common.tiles import dividing_tile, tiles_of
from vtr.methods.common.windows import WindowTable
from vtr.methods.sliding_tile import SlidingTile

if TYPE_CHECKING:
    from vtr.diffusion.site import DiffusionAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class SearchedTile(Presets, AttentionMethod):
    r"""Sliding Tile Attention with searched windows (ICML 2025, arXiv 2502.04507, training-free).

    ``vtr.calibrate(pipe, batches, vtr.SearchedTile(0.25))`` runs the pipeline densely on some prompts, and
    computes in every step, layer and head what the head would give under each candidate window. Each
    head takes the window whose output is nearest to the dense one, by the squared difference averaged over tokens,
    channels, prompts and guidance branches. The plan holds the windows, for one model, one size of video and one
    number of steps; other ones are refused by name. Tiles and windows are those of :class:`SlidingTile`,
    and text is dense both ways.

    .. math::

        w^*_{t, l, h} = \arg\min_{w \,:\, |w| \le \mathrm{density} \cdot |\mathrm{tiles}|} \; \lVert
        o_{\mathrm{dense}} - o_w \rVert^2

    Candidates are all windows that cover at most ``density`` of the tiles and cannot grow along any axis without
    covering more: flat ones, long ones, and those between. Against the paper: the authors name the
    candidates by hand. Their searched file for HunyuanVideo is read by ``SlidingTile(table=...)``.

    Args:
        density: share of the tiles that a window may cover, in (0, 1].
        windows: candidates, each as tiles (frames, height, width), instead of those by ``density``.
        tile: tokens of a tile, or None, as in :class:`SlidingTile`.
    """

    name: ClassVar[str] = "searched-tile"
    paper: ClassVar[str] = "Sliding Tile Attention, ICML 2025, arXiv 2502.04507"
    calibrated: ClassVar[bool] = True

    PRESETS: ClassVar = {"hunyuanvideo": {"tile": (6, 8, 8), "dense_steps": 0.24}}
    """Tiles and the dense steps (12 of 50) of the paper, for 30 x 48 x 80 tokens."""

    density: float = field(default=0.25, kw_only=False)
    windows: tuple[tuple[int, ...], ...] | None = None
    tile: tuple[int, ...] | None = None

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.3, tile=(1, 2, 2), block=16),),
            "everything": (cls(1.0, tile=(2, 2, 2), block=16),),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.density, "density")
        if self.tile is not None:
            self._set("tile", check_window(tuple(self.tile), "tile"))
        if self.windows is not None:
            found = tuple(check_window(tuple(w), "windows") for w in self.windows)
            if not found:
                raise ValueError("windows must name at least one candidate, or be None, got ()")
            self._set("windows", found)

    def tiles(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Tiles of a grid of tokens per axis."""
        tile = dividing_tile(grid, self.block) if self.tile is None else fit_window(self.tile, grid)
        return tiles_of(grid, tile)

    def candidates(self, tiles: tuple[int, ...]) -> list[tuple[int, ...]]:
        """List the windows to choose from. Raises ``ValueError`` if one is larger than the grid."""
        if self.windows is not None:
            found = [fit_window(window, tiles) for window in self.windows]
            for window in found:
                if any(w > n for w, n in zip(window, tiles, strict=True)):
                    raise ValueError(f"windows: {window} is larger than the grid of {tiles} tiles")
            return found
        most = max(1, int(self.density * math.prod(tiles) + 1e-9))
        fits = {
            w for w in itertools.product(*(range(1, n + 1) for n in tiles)) if math.prod(w) <= most
        }
        return sorted(w for w in fits if not any(larger in fits for larger in _grown(w)))

    def mask_of(self, site: DiffusionAttentionSite, window: tuple[int, ...]) -> Any:
        """Return the mask of a window over grid and text."""
        return SlidingTile(window, tile=self.tile, block=self.block).sequence_mask(site)

    def calibrator(self, info: ModelInfo) -> WindowSearch:
        return WindowSearch(self, frozenset(self.working_layers(info, "attention")))

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        index, windows, grid = (site.table[name] for name in ("window", "windows", "grid"))
        if site.grid != tuple(grid.tolist()):
            raise RuntimeError(
                f"SearchedTile was calibrated for {tuple(grid.tolist())} tokens (frames, height, width), and "
                f"here are {site.grid}: calibrate on this size"
            )
        known: Any = tuple(tuple(window) for window in windows.tolist())
        table = WindowTable("the plan", known, index)
        table.check_run(site, table.whole)
        return table.attend(site, lambda window: self.mask_of(site, window))


def _grown(window: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple(n + (i == axis) for i, n in enumerate(window)) for axis in range(len(window))]


class WindowSearch:
    """Measures how far each candidate window takes each head from its dense output.

    Its table: ``window`` (steps, layers, heads) int64, rows of ``windows`` (W + 1, 3) int64, of which the last
    is the whole grid, for dense steps and layers; ``error`` (steps, layers, heads, W) float32, the mean
    squared difference, 0 there; ``grid`` (3,) int64 in tokens.
    """

    def __init__(self, method: SearchedTile, layers: frozenset[int]) -> None:
        self.method, self.layers = method, layers
        self.run: tuple[Any, ...] = ()
        self.windows: list[tuple[int, ...]] = []
        self.error: dict[tuple[int, int], Tensor] = {}
        self.samples: dict[tuple[int, int], int] = {}

    def see(self, site: DiffusionAttentionSite) -> None:
        run = (site.grid, site.steps, site.layers, site.q.shape[1])
        if not self.run:
            self.run = run
            self.windows = self.method.candidates(self.method.tiles(site.grid))
        if run != self.run:
            raise ValueError(
                "all batches must have one size and one number of steps: (grid, steps, layers, heads) was "
                f"{self.run}, and is {run}"
            )
        if site.layer not in self.layers or self.method.is_dense(site):
            return
        tokens = slice(site.first, site.first + site.tokens)
        full = site.dense()[:, :, tokens].float()
        apart = [
            masked_attention(site, self.method.mask_of(site, window))[0][:, :, tokens].float()
            - full
            for window in self.windows
        ]
        error = torch.stack(
            [a.square().mean((2, 3), dtype=torch.float64).sum(0) for a in apart], -1
        )
        place = site.step, site.layer
        self.error[place] = self.error.get(place, 0.0) + error.cpu()
        self.samples[place] = self.samples.get(place, 0) + full.shape[0]

    def finish(self) -> dict[str, Tensor]:
        if not self.error:
            raise ValueError(
                "every step and layer of the batches is dense: there was nothing to search"
            )
        grid, steps, layers, heads = self.run
        steps = steps or 1 + max(step for step, _ in self.error)
        number = len(self.windows)
        index = torch.full((steps, layers, heads), number, device="cpu")
        found = torch.zeros(steps, layers, heads, number, device="cpu")
        for place, error in self.error.items():
            found[place] = (error / self.samples[place]).float()
            index[place] = error.argmin(-1)
        every = [*self.windows, self.method.tiles(grid)]
        return {
            "window": index,
            "windows": torch.tensor(every, device="cpu"),
            "error": found,
            "grid": torch.tensor(grid, device="cpu"),
        }
