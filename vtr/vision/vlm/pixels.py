"""Patches that a vision tower is not given: the site ``pixels``.

A method sees the pixels of every visual token. The tower gets the patches of the tokens that are left, and the tables
(places, windows, ends of the pictures) that it would compute from whole grids. Behind it the tokens that represent
others are repeated, because transformers checks their number, and the repetitions are cut at the entry of the language
model, as those of smaller pictures are (:class:`vtr.vision.vlm.pictures.Coarse`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.compat.transformers import packed_tables
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap
from vtr.core.wrapping import Bound, Entry, PerThread, Threaded
from vtr.errors import UnsupportedMethodError
from vtr.vision.vlm.pictures import Coarse, Patches

if TYPE_CHECKING:
    from vtr.vision.vlm.wrapping import VLMWrapping


def open_pixels(info: ModelInfo, reason: str) -> None:
    """Add the site ``pixels`` to a model's facts, or the ``reason`` why its tower needs whole pictures."""
    if reason:
        info.closed["pixels"] = reason
    else:
        info.depth["pixels"] = 1
        info.signals["pixels"] = frozenset({"hidden"})


class Fewer(NamedTuple):
    """The tokens of a call that its tower computes.

    Attributes:
        stays: (visual tokens,) bool.
        source: (visual tokens,) int64, which of those that stay represents each token.
        frames: visual tokens of each picture.
    """

    stays: Tensor
    source: Tensor
    frames: list[int]


class PixelCalls(Threaded):
    """Gives a tower the patches that a method leaves.

    Attributes:
        fewer: the decision for the call of ``get_image_features`` that runs, None if every patch stays.
    """

    fewer = PerThread[Fewer | None]()

    def __init__(self, owner: VLMWrapping) -> None:
        super().__init__()
        self.owner = owner

    @property
    def entry(self) -> Entry | None:
        """The active method that acts at the site; there is at most one."""
        found = (entry for entry, stage in self.owner.stages() if stage.site == "pixels")
        return next(found, None)

    def install(self) -> None:
        if self.entry is not None:
            tower = self.owner.family.tower(self.owner.inner, "image")
            assert tower is not None
            self.owner.hook(
                tower.register_forward_pre_hook(Bound(self, "narrow"), with_kwargs=True)
            )
            self.owner.hook(tower.register_forward_hook(Bound(self, "widen")))

    def begin(self, modality: str, given: dict[str, Any]) -> Coarse | None:
        """Ask the method about the pictures of a call; None if all patches of all of them stay."""
        self.fewer, entry = None, self.entry
        if entry is None or modality != "image":
            return None
        pictures = self.owner.family.pictures(self.owner.inner, modality, given)
        assert isinstance(pictures, Patches)
        memory: dict[str, Any] = {}
        maps = [
            self._ask(entry, pixels, grid, memory)
            for pixels, grid in zip(pictures.tokens(), pictures.grids, strict=True)
        ]
        lengths = [math.prod(grid) for grid in pictures.grids]
        if all(m.n_out == n for m, n in zip(maps, lengths, strict=True)):
            return None
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        own = [m.kept[0].gather(0, m.source[0]) for m in maps]
        index = torch.cat([x + start for x, start in zip(own, starts, strict=True)])
        place = torch.arange(len(index), device=index.device)
        stays = index == place
        self.fewer = Fewer(stays, (stays.long().cumsum(0) - 1)[index], lengths)
        moves = F.pad((index - place)[:, None], (0, 2)).cpu()
        made = [m.n_out for m in maps]
        return Coarse(entry, moves, list(zip(lengths, made, pictures.patches, strict=True)))

    def _ask(
        self, entry: Entry, pixels: Tensor, grid: tuple[int, int], memory: dict[str, Any]
    ) -> TokenMap:
        whole = TokenMap.identity(1, len(pixels), pixels.device)
        site = Site(
            site="pixels",
            layer=0,
            info=self.owner.info,
            hidden=pixels[None],
            map=whole,
            grid=grid,
            memory=memory,
            training=self.owner.root.training,
            modules=entry.modules_like(pixels),
            notes=self.owner.tracing.notes,
        )
        reduction = entry.token_method.reduce(site)
        if reduction is None:
            return whole
        step = reduction.map
        if step is None or step.has_padding or bool((step.source < 0).any()):
            raise RuntimeError(
                f"{entry.method.name} does not say for every token of a picture which one represents it: return "
                "TokenMap.merged(kept, source)"
            )
        return step

    def narrow(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of the tower for the patches that stay."""
        fewer = self.fewer
        if fewer is None:
            return None
        hidden, grids = args[0] if args else kwargs["hidden_states"], kwargs["grid_thw"]
        tables = narrowed(packed_tables(module, grids), fewer, module.spatial_merge_size**2)
        given = sorted(name for name in tables if kwargs.get(name) is not None)
        if given:
            raise UnsupportedMethodError(
                f"a method leaves patches out, and {', '.join(given)} was computed for all of them: leave it out"
            )
        rows = fewer.stays.to(hidden.device).repeat_interleave(module.spatial_merge_size**2)
        new = {**kwargs, **tables, "grid_thw": grids}
        new.pop("hidden_states", None)
        return (hidden[rows], *args[1:]), new

    def widen(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Repeat each token of a tower's output for all that it represents."""
        if self.fewer is None:
            return
        source = self.fewer.source
        output.pooler_output = output.pooler_output[source.to(output.pooler_output.device)]
        deep = getattr(output, "deepstack_features", None)
        if deep is not None:
            output.deepstack_features = [x[source.to(x.device)] for x in deep]


def narrowed(tables: dict[str, Tensor], fewer: Fewer, unit: int) -> dict[str, Tensor]:
    """The tables of a tower for the patches that stay, ``unit`` of which are one visual token."""
    window, ends = tables.get("window_index"), tables.get("cu_window_seqlens")
    rows = fewer.stays.to(tables["position_ids"].device).repeat_interleave(unit)
    new = {
        name: table[rows.to(table.device)]
        for name, table in tables.items()
        if name not in ("window_index", "cu_window_seqlens")
    }
    stays = fewer.stays.to(rows.device)
    whole = torch.tensor([0, *fewer.frames], device=rows.device).cumsum(0)
    new["cu_seqlens"] = _ends(stays, whole, unit)
    if window is not None and ends is not None:
        # The order of the tokens in windows, among those that stay; a window may become empty.
        stays = fewer.stays.to(window.device)
        inside = stays[window]
        new["window_index"] = (stays.long().cumsum(0) - 1)[window[inside]]
        found = _ends(inside.to(ends.device), ends.long() // unit, unit)
        new["cu_window_seqlens"] = torch.unique_consecutive(found)
    return new


def _ends(stays: Tensor, whole: Tensor, unit: int) -> Tensor:
    """Count the patches in front of the ends of groups of tokens, of which only some stay."""
    before = F.pad(stays.long().cumsum(0), (1, 0))
    return (before[whole] * unit).to(torch.int32)
