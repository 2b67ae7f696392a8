"""The site ``windows``: one block of a windowed encoder, such as Swin's or SAM's, in front of its windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.site import ModelInfo


@dataclass(frozen=True)
class WindowGrid:
    """The windows that a block cuts its grid of tokens into.

    Attributes:
        grid: (rows, columns) of tokens.
        size: (rows, columns) of tokens of one window.
        shift: by how many (rows, columns) the grid is rolled before it is cut; (0, 0) is no shift.
        pads_first: whether the grid is padded to whole windows before it is rolled (transformers), or after
            (timm). Padding is at the bottom and on the right.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    pads_first: bool = True

    @property
    def shifted(self) -> bool:
        return any(self.shift)

    @property
    def count(self) -> tuple[int, int]:
        """(rows, columns) of windows."""
        (high, wide), (h, w) = self.grid, self.size
        return -(-high // h), -(-wide // w)

    @property
    def padded(self) -> tuple[int, int]:
        """The grid with its padding."""
        (rows, columns), (h, w) = self.count, self.size
        return rows * h, columns * w

    @property
    def number(self) -> int:
        """Windows of an image."""
        return self.count[0] * self.count[1]

    @property
    def area(self) -> int:
        """Tokens of a window."""
        return self.size[0] * self.size[1]

    def split(self, x: Tensor) -> Tensor:
        """Cut x (B, rows, columns, C) into windows (B, number, area, C). Padding is zero."""
        (high, wide), (rows, columns), (h, w) = self.padded, self.count, self.size
        padding = (0, 0, 0, wide - self.grid[1], 0, high - self.grid[0])
        if self.pads_first:
            x = F.pad(x, padding)
        if self.shifted:
            x = torch.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        if not self.pads_first:
            x = F.pad(x, padding)
        x = x.reshape(len(x), rows, h, columns, w, -1).transpose(2, 3)
        return x.reshape(len(x), self.number, self.area, x.shape[-1])

    def join(self, windows: Tensor) -> Tensor:
        """Undo :meth:`split`: (B, number, area, C) -> (B, rows, columns, C). Padding is cut off."""
        (rows, columns), (h, w) = self.count, self.size
        x = windows.reshape(len(windows), rows, columns, h, w, -1).transpose(2, 3)
        x = x.reshape(len(windows), *self.padded, x.shape[-1])
        if not self.pads_first:
            x = x[:, : self.grid[0], : self.grid[1]]
        if self.shifted:
            x = torch.roll(x, self.shift, (1, 2))
        return x[:, : self.grid[0], : self.grid[1]].contiguous()

    def real(self, device: torch.device) -> Tensor | None:
        """(number, area) bool, False for padding; None without padding."""
        if self.padded == self.grid:
            return None
        return self.split(torch.ones(1, *self.grid, 1, device=device))[0, :, :, 0] > 0

    def places(self, device: torch.device) -> Tensor:
        """(number, area) int64, the place of each token in the padded grid without a shift, row by row."""
        whole = WindowGrid(self.padded, self.size)
        index = torch.arange(self.number * self.area, device=device)
        return whole.split(index.reshape(1, *self.padded, 1))[0, :, :, 0]


class WindowSite:
    """One block of a windowed encoder in one call.

    Attributes:
        layer: 0-based number of the block, counted through all stages.
        info: the model; ``info.stage_depths`` has the blocks of each stage.
        stage: 0-based stage of the block.
        hidden: (B, rows, columns, C), the block's input.
        windows: how the block cuts it; ``site.windows.split(x)`` does it.
        memory: this method's own dict for this call, shared by all its blocks.
        notes: a dict that ends in ``trace.notes``.
        training: whether the model is in training mode.
        modules: the learned modules of this method, or None.
    """

    site = "windows"

    def __init__(
        self,
        *,
        layer: int,
        info: ModelInfo,
        stage: int,
        hidden: Tensor,
        windows: WindowGrid,
        memory: dict[str, Any],
        notes: dict[str, Any] | None = None,
        training: bool = False,
        modules: torch.nn.Module | None = None,
    ) -> None:
        self.layer = layer
        self.info = info
        self.stage = stage
        self.hidden = hidden
        self.windows = windows
        self.memory = memory
        self.notes = {} if notes is None else notes
        self.training = training
        self.modules = modules

    @property
    def batch(self) -> int:
        return self.hidden.shape[0]
