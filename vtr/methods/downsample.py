"""Smaller pictures: the baseline that a reduction of tokens has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.core.budget import Keep, check_keep, count
from vtr.core.method import Examples, Reduction, Stage, TokenMethod
from vtr.core.registry import register
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap


@register
@dataclass(frozen=True)
class Downsample(TokenMethod):
    r"""Give the model a smaller picture, so that it has fewer tokens.

    This is the plain baseline of VTC-Bench (arXiv 2510.07143), which beats many methods there on common
    benchmarks. The pixels are resized with an antialiased bicubic filter, as Pillow's ``BICUBIC``, and
    the model does the rest: it interpolates its own positions to the smaller grid, and computes what the
    bare model computes from the smaller picture. VTC-Bench divides height and width by 2, 3, 4, 5 or 10:
    ``keep=1/4, 1/9, 1/16, 1/25, 1/100``.

    .. math::

        h' = \lfloor s h \rfloor, \; w' = \lfloor s w \rfloor \quad\text{with the largest } s \text{ for
        which } h' w' \le \mathrm{keep}

    This differs from resizing a file before the processor: the pixels are the normalised ones of the
    model's input, so that they are not rounded to 8 bits again, and the processor's output (a square,
    tiles) is resized as it is. A model that reads tiles gets as many as before, each of them smaller.

    The new grid is the largest with the picture's proportions (``floor(s * rows)`` by ``floor(s *
    columns)`` for one ``s``) whose tokens are at most ``keep``. So a square stays a square: of 12 x 12
    tokens ``keep=72`` leaves 8 x 8. In a language model the tokens are numbered anew, as for a smaller
    picture; with m-RoPE (Qwen) along both axes.

    Args:
        keep: budget of each picture: an image, a tile or crop of one, a frame of a video.
    """

    name: ClassVar[str] = "downsample"
    paper: ClassVar[str] = "baseline: a smaller picture (VTC-Bench, ACL 2026, arXiv 2510.07143)"
    sites: ClassVar[tuple[str, ...]] = ("image",)
    positions: ClassVar[str] = "compact"

    keep: Keep = 0.25

    @classmethod
    def examples(cls) -> Examples:
        return {"counted": ()}

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("image", 0),)

    def reduce(self, site: Site) -> Reduction | None:
        assert site.grid is not None and len(site.grid) == 2
        grid = (site.grid[0], site.grid[1])
        small = smaller(grid, count(self.keep, site.n))
        if small == grid:
            return None
        kept, source = (x.expand(site.batch, -1) for x in cells(grid, small, site.device))
        return Reduction(TokenMap.merged(kept, source), grid=small)


def smaller(grid: tuple[int, int], most: int) -> tuple[int, int]:
    """Rows and columns of the largest grid of the same proportions with at most ``most`` cells."""
    best = (1, 1)
    # Rounded down, the two change only when s times one of them is whole.
    for axis in (0, 1):
        for n in range(1, grid[axis] + 1):
            other = max(1, n * grid[1 - axis] // grid[axis])
            found = (n, other) if axis == 0 else (other, n)
            if best[0] * best[1] < found[0] * found[1] <= most:
                best = found
    return best


def cells(
    grid: tuple[int, int], small: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Find the cells of a grid that those of a smaller one cover.

    Returns:
        kept (1, small cells) int64: for each smaller cell the cell nearest its centre; source (1, cells)
        int64: the smaller cell that the upper left corner of each cell lies in.
    """
    kept, source = [], []
    for n, m in zip(grid, small, strict=True):
        source.append(torch.arange(n, device=device) * m // n)
        number = torch.arange(m, device=device)
        # The centre's cell may belong to the one before, where cells shrink by less than half.
        kept.append(torch.maximum((2 * number + 1) * n // (2 * m), -(-number * n // m)))
    return (
        (kept[0][:, None] * grid[1] + kept[1]).reshape(1, -1),
        (source[0][:, None] * small[1] + source[1]).reshape(1, -1),
    )
