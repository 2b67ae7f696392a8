"""The site ``image``: pictures before they become patches, where a cut is a smaller picture."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vtr.compat.transformers import INTERPOLATES
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap

if TYPE_CHECKING:
    from vtr.core.wrapping import Entry, Wrapping

Grid = tuple[int, int]


class Smaller(NamedTuple):
    """A decision: pictures of ``before`` (rows, columns) tokens get ``grid``; ``map`` joins the two."""

    entry: Entry
    before: Grid
    grid: Grid
    map: TokenMap


def open_image(info: ModelInfo, reason: str) -> None:
    """Add the site ``image`` to a model's facts, or the ``reason`` why it takes no smaller pictures."""
    if reason:
        info.closed["image"] = reason
    else:
        info.depth["image"] = 1
        info.signals["image"] = frozenset({"hidden"})


def entry_of(owner: Wrapping) -> Entry | None:
    """The active method that acts at the site ``image``; there is at most one."""
    return next((entry for entry, stage in owner.stages() if stage.site == "image"), None)


def ask(
    owner: Wrapping,
    entry: Entry,
    batch: int,
    grid: Grid,
    like: Tensor,
    memory: dict[str, Any],
    notes: dict[str, Any],
) -> Smaller | None:
    """Ask a method what it does with ``batch`` pictures of ``grid`` tokens; None if it leaves them."""
    tokens = grid[0] * grid[1]
    site = Site(
        site="image",
        layer=0,
        info=owner.info,
        hidden=like.new_empty(batch, tokens, 0),
        map=TokenMap.identity(batch, tokens, like.device),
        grid=grid,
        memory=memory,
        training=owner.root.training,
        modules=entry.modules_like(like),
        notes=notes,
    )
    reduction = entry.token_method.reduce(site)
    if reduction is None:
        return None
    if reduction.map is None or reduction.grid is None:
        raise RuntimeError(f"{entry.method.name} returned no map or no grid for a picture")
    return Smaller(entry, grid, reduction.grid, reduction.map)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (..., C, H, W) at another size, by the antialiased bicubic filter of Pillow."""
    flat = images.reshape(-1, *images.shape[-3:])
    out = F.interpolate(flat.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return out.to(images.dtype).reshape(*images.shape[:-2], *size)


def at_any_size(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for an embedding of transformers with which it interpolates its positions."""
    if INTERPOLATES in inspect.signature(type(module).forward).parameters:
        kwargs = {**kwargs, INTERPOLATES: True}
    return args, kwargs
