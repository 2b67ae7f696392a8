"""HiRED: the picture as a whole says how many tokens each of its tiles keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods.base import (
    Keep,
    LanguageSite,
    ModelInfo,
    Presets,
    ScoredMethod,
    Site,
    VisualSpan,
    check_number,
    register,
)
from vtr.methods.common.crops import SEPARATORS, Crops, crops_of, picture_budgets, proportional


@register
@dataclass(frozen=True)
class HiRED(Presets, ScoredMethod):
    r"""HiRED (AAAI 2025, arXiv 2408.10945): a budget per tile from class attention in the first layer.

    The whole picture (the base crop of LLaVA-NeXT, the thumbnail of InternVL) gets the ``alpha`` share of the
    budget. Its 1 - ``alpha`` tokens with the most class attention in the first encoder layer say where
    content is: a tile's share of the rest is the share of them that lie in its region. In every crop the tokens
    stay that have the most class attention in the layer whose output the projector reads (sum over heads). A
    picture of one crop keeps its best tokens; so does every frame of a video, with equal shares.

    .. math::

        b_t = (1 - \alpha) B \, \frac{|\{j \in \operatorname{top}(A^{\mathrm{first}}) : j \in
        \mathrm{region}(t)\}|}{|\operatorname{top}(A^{\mathrm{first}})|},
        \qquad \text{tile } t \text{ keeps its } b_t \text{ tokens of largest } \sum_h
        A^{\mathrm{last}}_h[\mathrm{cls}, j]

    If a model does not tell how its tiles lie in the picture (InternVL), they get shares in proportion to their
    tokens.

    Differences from the authors' code: a tile's region is its rectangle of the whole picture (theirs
    cuts the raster of tokens into as many runs as there are tiles, which are stripes: 2 x 2 tiles get the four
    horizontal quarters); budgets are exact, what is above a crop's tokens goes to the others (theirs rounds
    down and loses it); they are counted after the padding of tiles is cut off, with separators (newlines)
    dropped first (theirs packs neither); batches of any size.

    Args:
        keep: budget per image; the paper's is a share.
        alpha: share of the budget that goes to the whole picture.
    """

    name: ClassVar[str] = "hired"
    paper: ClassVar[str] = (
        "HiRED: Attention-Guided Token Dropping for High-Resolution VLMs, AAAI 2025, arXiv 2408.10945"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt")
    site: ClassVar[str] = "prompt"
    needs: ClassVar = {
        "encoder": frozenset({"cls_attention"}),
        "prompt": frozenset({"encoder_scores"}),
    }
    positions: ClassVar[str] = "compact"

    PRESETS: ClassVar = {
        "llava-next-7b/20%": {"keep": 0.2},
        "llava-next-7b/10%": {"keep": 0.1},
        "llava-1.5-7b/20%": {"keep": 0.2},
    }
    """Token budgets of the authors' scripts (20 %) and README (10 %), with the ``alpha`` of the scripts."""

    keep: Keep = 0.2
    alpha: float = 0.5

    def validate(self) -> None:
        super().validate()
        check_number(self.alpha, "alpha", 0, 1)

    def looks(self, info: ModelInfo) -> tuple[int, ...]:
        return (0,) if info.last_layer == 0 else (0, info.last_layer)

    def look(self, site: Site) -> None:
        row = site.cls_attention()
        if site.layer == 0:
            site.memory["content"] = row
        if site.layer == site.info.last_layer:
            site.memory["score"] = row

    def score(self, site: LanguageSite) -> Tensor:
        content = site.stored("content")
        crops, rows = crops_of(site, content), content.cpu()
        number = [0] * len(crops.size)
        for (sample, picture), (budget, groups) in picture_budgets(site, self.keep, crops).items():
            span = site.videos[sample][picture]
            for g, n in zip(groups, self._parts(span, budget, groups, crops, rows), strict=True):
                number[g] = n
        return crops.mark(site, crops.best(site.spread(site.stored("score")), number)).float()

    def _parts(
        self, span: VisualSpan, budget: int, groups: list[int], crops: Crops, rows: Tensor
    ) -> list[int]:
        """Tokens that each group of a picture keeps."""
        content = [g for g in groups if crops.row[g] != SEPARATORS]
        rooms = [crops.size[g] for g in content]
        inside = min(budget, sum(rooms))
        names = [view.name for view in span.views]
        whole = -1 if "thumbnail" in names else 0 if "whole image" in names else None
        if whole is None or len(content) < 2:
            parts = proportional(inside, rooms, rooms)
        else:
            tiles = [g for g in content if g != content[whole]]
            grid = tile_grid(span, len(tiles), rows.shape[1])
            room = [crops.size[g] for g in tiles]
            weights = room
            if grid is not None:
                weights = content_of_tiles(rows[crops.row[content[whole]]], grid, self.alpha)
            own = min(int(inside * self.alpha + 1e-9), crops.size[content[whole]])
            own += max(0, inside - own - sum(room))
            shares = dict(zip(tiles, proportional(inside - own, weights, room), strict=True))
            parts = [shares.get(g, own) for g in content]
        return parts + [budget - inside] * (len(groups) - len(content))


def tile_grid(span: VisualSpan, tiles: int, patches: int) -> tuple[int, int] | None:
    """Find the (rows, columns) of the tiles of a picture; None if the model does not tell."""
    side = math.isqrt(patches)
    for view in span.views:
        grid = (-(-view.grid[0] // side), -(-view.grid[1] // side))
        if view.name == "crops" and math.prod(grid) == tiles:
            return grid
    return None


def content_of_tiles(row: Tensor, grid: tuple[int, int], alpha: float) -> list[int]:
    """Count the tokens with the most attention in each tile's region of the whole picture.

    Args:
        row: (patches,) attention of the whole picture's square grid.
        grid: (rows, columns) of the tiles.
        alpha: all but this share of the patches are counted, rounded down.
    """
    side = math.isqrt(row.shape[0])
    wanted = int(row.shape[0] * (1 - alpha) + 1e-9)
    best = torch.sort(row.float(), descending=True, stable=True).indices[:wanted]
    tile = (best // side) * grid[0] // side * grid[1] + (best % side) * grid[1] // side
    return torch.bincount(tile, minlength=math.prod(grid)).tolist()
