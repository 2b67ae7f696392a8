"""Tables of windows per denoising step, layer and head, as FastVideo's mask search writes them."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtr.methods.common.masked import SequenceMask, masked_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtr.core.site import ModelInfo
    from vtr.diffusion.site import DiffusionAttentionSite

Window = tuple[int, int, int]


@dataclass(frozen=True)
class WindowTable:
    """Windows of tiles (frames, height, width) by step, layer and head.

    Attributes:
        path: the file, or what else it comes from.
        windows: the different ones.
        index: (steps, layers, heads) int64, the window of each.
    """

    path: str
    windows: tuple[Window, ...]
    index: Tensor

    @property
    def steps(self) -> int:
        return self.index.shape[0]

    @property
    def layers(self) -> int:
        return self.index.shape[1]

    @property
    def heads(self) -> int:
        return self.index.shape[2]

    @property
    def whole(self) -> Window:
        """The largest window along each axis: the tiles of the grid that the table is for."""
        frames, height, width = (max(axis) for axis in zip(*self.windows, strict=True))
        return frames, height, width

    def check_model(self, info: ModelInfo) -> None:
        """Raise ``ValueError`` if the table is for another number of layers or heads."""
        layers = info.depth.get("attention", 0)
        if (self.layers, self.heads) != (layers, info.heads):
            raise ValueError(
                f"table={self.path!r} is for {self.layers} layers of {self.heads} heads; "
                f"{info.family} here has {layers} of {info.heads}"
            )

    def check_run(self, site: DiffusionAttentionSite, tiles: tuple[int, ...]) -> None:
        """Raise ``RuntimeError`` if the call is of a run that the table is not for.

        Args:
            tiles: of the site's grid, per axis.
        """
        if site.training:
            raise RuntimeError(
                "a table has windows for the steps of a generation, and training has no such steps: "
                "train under one window (window=)"
            )
        if site.q.shape[1] != self.heads:
            raise RuntimeError(
                f"the table has windows for {self.heads} heads, and {site.q.shape[1]} are here: "
                "heads that are split between processes are not known by number"
            )
        if site.steps not in (None, self.steps) or site.step >= self.steps:
            raise RuntimeError(
                f"the table is for {self.steps} denoising steps, this run has "
                f"{site.steps or 'more'}: call the pipeline with num_inference_steps={self.steps}"
            )
        if tiles != self.whole:
            raise RuntimeError(
                f"the table is for {self.whole} tiles; {site.grid} tokens (frames, height, width) "
                f"are {tiles} tiles here"
            )

    def is_whole(self, site: DiffusionAttentionSite) -> bool:
        """Tell whether all heads of this step and layer have the whole grid."""
        numbers = self.index[site.step, site.layer].unique().tolist()
        return [self.windows[n] for n in numbers] == [self.whole]

    def heads_by_window(
        self, site: DiffusionAttentionSite
    ) -> tuple[list[tuple[Window, Tensor]], Tensor]:
        """The heads (n,) int64 of each window in this step and layer, and (heads,) int64, where each
        head is when they are put one after the other; on the device of ``site.q``."""
        chosen = self.index[site.step, site.layer]
        numbers = chosen.unique().tolist()

        def build() -> list[Tensor]:
            own = [(chosen == n).nonzero().squeeze(1) for n in numbers]
            return [t.to(site.q.device) for t in (*own, torch.cat(own).argsort())]

        *own, back = site.for_size(("heads", site.step, site.layer), build)
        return list(zip((self.windows[n] for n in numbers), own, strict=True)), back

    def attend(
        self, site: DiffusionAttentionSite, mask_of: Callable[[Window], SequenceMask]
    ) -> Tensor:
        """Compute the attention of this step and layer, each head under the mask of its window; dense if
        all heads have the whole grid."""
        if self.is_whole(site):
            dense: Tensor = site.dense()
            return dense
        heads, back = self.heads_by_window(site)
        parts, work = [], site.notes.get("work", 0.0)
        for window, own in heads:
            parts.append(masked_attention(site, mask_of(window), heads=own)[0])
        site.notes["density"] = site.notes["work"] - work
        return torch.cat(parts, 1).index_select(1, back)


def load_windows(path: str) -> WindowTable:
    """Read a JSON file ``{"step_layer_head": [frames, height, width]}`` with an entry for each.

    Raises:
        ValueError: there is no such file, or it is not such a table; the message says what is wrong.
    """
    try:
        found = os.stat(path)
    except OSError:
        raise ValueError(
            f"table={path!r}: there is no such file. FastVideo releases one for HunyuanVideo as "
            "assets/mask_strategy_hunyuan.json on its branch sta_do_not_delete "
            "(github.com/hao-ai-lab/FastVideo); give the path to your copy as table="
        ) from None
    return _load(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=4)
def _load(path: str, changed: int, size: int) -> WindowTable:
    try:
        with open(path, encoding="utf-8") as file:
            entries = {
                tuple(map(int, key.split("_"))): tuple(window)
                for key, window in json.load(file).items()
            }
        steps, layers, heads = (max(axis) + 1 for axis in zip(*entries, strict=True))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"table={path!r} is no JSON object of {{'step_layer_head': [frames, height, width]}}: "
            f"{error}"
        ) from None
    for key, window in entries.items():
        if len(window) != 3 or any(type(n) is not int or n < 1 for n in window):
            raise ValueError(
                f"table={path!r}: the window of step, layer and head {key} must be three positive "
                f"ints (tiles), got {list(window)}"
            )
    if len(entries) != steps * layers * heads:
        every = ((s, n, h) for s in range(steps) for n in range(layers) for h in range(heads))
        missing = next(key for key in every if key not in entries)
        raise ValueError(
            f"table={path!r} has {len(entries)} windows for {steps} steps, {layers} layers and "
            f"{heads} heads; the first that lacks one is {missing}"
        )
    windows = tuple(sorted(set(entries.values())))
    number = {window: n for n, window in enumerate(windows)}
    index = torch.empty(steps, layers, heads, dtype=torch.int64, device="cpu")
    flat = [number[entries[key]] for key in sorted(entries)]
    index.view(-1).copy_(torch.tensor(flat, device="cpu"))
    return WindowTable(path, windows, index)  # type: ignore[arg-type]
