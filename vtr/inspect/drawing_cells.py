"""Cells of grids, with the tokens of a stage that are drawn in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtr.core.language_site import View
from vtr.core.trace import StageRecord


class Picture(NamedTuple):
    """A picture, or the frames of a video: ``cells`` (T, rows * columns) int64, the token of each cell
    among the stage's input tokens, -1 for none. ``whole``: whether the grid lies on the whole picture."""

    name: str
    grid: tuple[int, int]
    cells: Tensor
    times: tuple[float, ...] | None
    whole: bool = True

    @property
    def tokens(self) -> int:
        return int((self.cells >= 0).sum())


def pictures_of(
    stage: StageRecord,
    sample: int,
    which: int | None,
    wants: str | None,
    shape: Sequence[int] | None,
) -> list[Picture]:
    """List what can be drawn of a sample at a stage: one picture or video, or several views of an image.

    ``shape``: (height, width, ...) of the image that was given, or None.
    """
    known = None if stage.frames is None else stage.frames.videos[sample]
    where = f"of sample {sample} at {stage.site}[{stage.layer}]"
    if known is None:
        grid = stage.grid_of(sample)
        if which is not None or grid is None or len(grid) not in (2, 3):
            raise ValueError(
                f"the grid of {stage.total.n_in} tokens {where} is not a known rectangle; draw needs "
                "height x width tokens (in a vision-language model: one image in the prompt)"
                if which is None
                else f"which={which}: the tokens {where} are not those of a prompt"
            )
        grid = (1, *grid) if len(grid) == 2 else grid
        cells = torch.arange(grid[0] * grid[1] * grid[2], device="cpu").reshape(grid[0], -1)
        return [Picture("", (grid[1], grid[2]), cells, None)]
    if which is None:
        fits = [i for i, span in enumerate(known) if wants in (None, span.kind)]
        if len(fits) != 1:
            kinds = ", ".join(f"{i}: {span.kind}" for i, span in enumerate(known))
            what = wants or "picture"
            found = f"{len(fits)} {what}s: choose with which=" if fits else f"no {what}"
            raise ValueError(f"the prompt {where} has {found} ({kinds or 'nothing'})")
        which = fits[0]
    if not 0 <= which < len(known):
        raise ValueError(f"which must be in 0..{len(known) - 1} {where}, got {which}")
    span = known[which]
    assert stage.frames is not None
    if span.grid is not None:
        mine = (stage.frames.video[sample] == which) & (stage.frames.frame[sample] >= 0)
        tokens = mine.nonzero().flatten().cpu()
        frame = stage.frames.frame[sample].cpu()[tokens]
        place = stage.frames.place[sample].cpu()[tokens]
        first = sum(s.frames for s in known[:which])
        cells = torch.full((span.frames, span.grid[0] * span.grid[1]), -1, device="cpu")
        cells[frame - first, place] = tokens
        return [Picture("", span.grid, cells, span.times)]
    out = [_view(view, span.start, shape) for view in span.views]
    if not out:
        raise ValueError(
            f"the grid of the {span.length} tokens of {span.kind} {which} {where} is not a known "
            "rectangle, nor are its parts"
        )
    return out


def _view(view: View, start: int, shape: Sequence[int] | None) -> Picture:
    """Arrange the tokens of a view in a grid; those of tiles side by side."""
    rows, cols = view.grid
    tile = (
        torch.arange(rows, device="cpu")[:, None] * view.stride
        + torch.arange(cols, device="cpu")
        + start
        + view.start
    )
    if view.tiles == 1:
        return Picture(view.name, view.grid, tile.reshape(1, -1), None, view.raster)
    cells = tile + torch.arange(view.tiles, device="cpu")[:, None, None] * (rows * view.stride)
    if view.raster and shape is not None:
        down, across = _layout(view.tiles, shape[1] / shape[0])
        cells = cells.unflatten(0, (down, across)).transpose(1, 2)
        grid = (down * rows, across * cols)
        return Picture(view.name, grid, cells.reshape(1, -1), None)
    # A cell of nothing between them, and after the last one.
    across = math.ceil(math.sqrt(view.tiles))
    down = math.ceil(view.tiles / across)
    spaced = torch.full((down * across, rows + 1, cols + 1), -1, device="cpu")
    spaced[: view.tiles, :rows, :cols] = cells
    spaced = spaced.unflatten(0, (down, across)).transpose(1, 2)
    spaced = spaced.reshape(down * (rows + 1), across * (cols + 1))[:-1, :-1]
    grid = (spaced.shape[0], spaced.shape[1])
    name = f"{view.name} in their order"
    return Picture(name, grid, spaced.reshape(1, -1), None, False)


def _layout(tiles: int, aspect: float) -> tuple[int, int]:
    """Choose (rows, columns) of tiles whose shape is closest to an image's width over height."""
    fits = [(tiles // c, c) for c in range(1, tiles + 1) if tiles % c == 0]
    return min(fits, key=lambda fit: abs(fit[1] / fit[0] - aspect))
