"""Blocks of SAM's encoder: the tokens of every window are merged, and rebuilt behind the blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vtr.core.method import Reduction
from vtr.core.window_site import WindowGrid
from vtr.vision.encoders.blocks import linear_flops
from vtr.vision.windows.wrapping import MergedTokens, WindowCall, WindowWrapping


class SamRunner:
    """Computes a block of a SAM of timm, (B, rows, columns, C), on merged tokens while there are some.

    A block with windows is cut into windows of merged tokens, one with global attention sees all of them. The
    attention resizes its relative positions to what it is given.

    Args:
        block: the module.
        side: of the windows of the encoder's blocks.
        last: whether it is the encoder's last block.
    """

    stage = 0
    norms = ("norm1", "norm2")

    def __init__(self, block: nn.Module, side: int, last: bool) -> None:
        self.block: Any = block
        self.side = side
        self.last = last

    def attend(self, x: Tensor) -> Tensor:
        """The attention branch of windows x (M, side, side, C), or of a whole grid."""
        out: Tensor = self.block.drop_path1(self.block.ls1(self.block.attn(x)))
        return out

    def feed(self, x: Tensor) -> Tensor:
        """The MLP branch of x (B, rows, columns, C)."""
        out: Tensor = self.block.drop_path2(self.block.ls2(self.block.mlp(x)))
        return out

    def run(
        self, owner: WindowWrapping, call: WindowCall, layer: int, x: Tensor, args: Any, kwargs: Any
    ) -> Any:
        width = x.shape[-1]
        grid = (x.shape[1], x.shape[2]) if call.held is None else call.held.windows.grid
        whole = WindowGrid(grid, (self.side, self.side))
        dense, cost = self.flops(whole, width), 0
        if (layer, "inside") in owner.visits:
            x, cost = self._visit(owner, call, layer, x)
        held = call.held
        now = whole if held is None else held.small
        call.trace.count("windows", layer, *(now.grid[0] * now.grid[1],) * 2)
        call.work[layer] = dense, self.flops(now, width) + cost
        if held is None:
            return type(self.block).forward(self.block, x, *args, **kwargs)
        out = self.compute(x, held.small)
        if self.last:
            out, call.held = rebuilt(out, held), None
        return out

    def _visit(
        self, owner: WindowWrapping, call: WindowCall, layer: int, x: Tensor
    ) -> tuple[Tensor, int]:
        """Let methods merge or rebuild in front of the block; returns its input and what it cost."""
        full = x if call.held is None else rebuilt(x, call.held)
        windows = WindowGrid((full.shape[1], full.shape[2]), (self.side, self.side))
        found: Reduction | None = owner.visit(call, layer, "inside", full, windows)
        if found is None:
            return x, 0
        call.held = None
        if found.merging is None or found.grid is None:
            return full, 0
        rows, columns = found.grid
        small = WindowGrid((windows.count[0] * rows, windows.count[1] * columns), (rows, columns))
        call.held = MergedTokens(windows, small, found.merging)
        merged = found.tokens
        if merged is None:
            merged = found.merging.merge(windows.split(full).flatten(0, 1))
        merged = merged.to(x.dtype).reshape(len(x), small.number, small.area, -1)
        return small.join(merged), int(getattr(found.merging, "flops", 0))

    def compute(self, x: Tensor, windows: WindowGrid) -> Tensor:
        """Compute the block on merged tokens x (B, rows, columns, C)."""
        first, second = (getattr(self.block, name) for name in self.norms)
        given = first(x)
        if self.block.window_size > 0:
            pieces = windows.split(given).reshape(-1, *windows.size, x.shape[-1])
            given = windows.join(
                self.attend(pieces).reshape(len(x), windows.number, windows.area, -1)
            )
        else:
            given = self.attend(given)
        x = x + given
        return x + self.feed(second(x))

    def flops(self, windows: WindowGrid, width: int) -> int:
        """FLOPs of the block for a sample whose tokens have these windows."""
        block, tokens = self.block, windows.grid[0] * windows.grid[1]
        number, area = (windows.number, windows.area) if block.window_size > 0 else (1, tokens)
        # The two products of relative positions: a row of the window for each query, and a column.
        high, wide = windows.size if block.window_size > 0 else windows.grid
        positions = 2 * (high + wide) * width if block.attn.use_rel_pos else 0
        attention = area * (linear_flops(block.attn) + positions) + 4 * area * area * width
        return number * attention + tokens * linear_flops(block.mlp)


class TransformersSam(SamRunner):
    """A SamVisionLayer of transformers."""

    norms = ("layer_norm1", "layer_norm2")

    def attend(self, x: Tensor) -> Tensor:
        out: Tensor = self.block.attn(hidden_states=x)[0]
        return out

    def feed(self, x: Tensor) -> Tensor:
        out: Tensor = self.block.mlp(x)
        return out


def rebuilt(x: Tensor, held: MergedTokens) -> Tensor:
    """Rebuild all tokens (B, rows, columns, C) from merged ones."""
    made = held.merging.restore(held.small.split(x).flatten(0, 1))
    return held.windows.join(made.reshape(len(x), held.windows.number, held.windows.area, -1))
