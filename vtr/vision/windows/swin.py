"""Blocks of Swin and Swin V2: whole windows skip them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vtr.compat.timm import POSITION_MLP as TIMM_POSITION_MLP
from vtr.compat.timm import windows_mask
from vtr.compat.transformers import (
    POSITION_MLP,
    SWIN_ARGUMENTS,
    SWINV2_ARGUMENTS,
    swin_windows,
)
from vtr.core.window_site import WindowGrid
from vtr.vision.encoders.blocks import linear_flops
from vtr.vision.windows.wrapping import WindowCall, WindowWrapping


class SwinRunner:
    """Computes a block of Swin on the windows that are kept; the others keep the block's input.

    Args:
        block: the module.
        stage: its 0-based stage.
        post_norm: whether the norms are behind attention and MLP (Swin V2).
    """

    #: names of the modules in front of or behind attention, and of the MLP
    norms = ("norm1", "norm2")
    attention = "attn"
    position_mlp = TIMM_POSITION_MLP
    #: arguments of the block behind its input
    arguments: tuple[str, ...] = ()

    def __init__(self, block: nn.Module, stage: int, post_norm: bool) -> None:
        self.block: Any = block
        self.stage = stage
        self.post_norm = post_norm

    # ---- what differs between libraries -------------------------------------------------------

    def named(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """Give the arguments of the block behind its input their names."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}

    def windows(self, x: Tensor, kwargs: Any) -> WindowGrid:
        """Say how the block cuts its input in this call."""
        block = self.block
        grid = x.shape[1], x.shape[2]
        return WindowGrid(grid, tuple(block.window_size), tuple(block.shift_size), pads_first=False)

    def mask(self, windows: WindowGrid, like: Tensor) -> Tensor | None:
        """(number, area, area) added to the logits of each window, or None."""
        return windows_mask(self.block, like.new_empty(1, *windows.padded, 1))

    def attend(self, x: Tensor, mask: Tensor | None, kwargs: Any) -> tuple[Tensor, Any]:
        """Attention of windows x (M, area, C), and its weights, if asked for."""
        return self.block.attn(x, mask=mask), None

    def feed(self, x: Tensor) -> Tensor:
        """The MLP."""
        out: Tensor = self.block.mlp(x)
        return out

    def drop(self, x: Tensor, half: int) -> Tensor:
        """Stochastic depth of a half of the block, on (B, tokens, C)."""
        out: Tensor = (self.block.drop_path1, self.block.drop_path2)[half](x)
        return out

    def mlp(self) -> list[nn.Module]:
        """The modules of the MLP."""
        return [self.block.mlp]

    def returned(self, x: Tensor, weights: Any, kwargs: Any) -> Any:
        """Pack the output x (B, rows, columns, C) as the block's own forward does."""
        return x

    # ---- the block ----------------------------------------------------------------------------

    def run(
        self, owner: WindowWrapping, call: WindowCall, layer: int, x: Tensor, args: Any, kwargs: Any
    ) -> Any:
        kwargs = self.named(args, kwargs)
        windows = self.windows(x, kwargs)
        grid = x.reshape(len(x), *windows.grid, x.shape[-1])
        found = owner.visit(call, layer, "whole", grid, windows)
        dense = self.flops(windows, windows.number, windows.grid[0] * windows.grid[1], x.shape[-1])
        if found is None or found.map is None:
            call.trace.count("windows", layer, windows.number, windows.number)
            call.work[layer] = dense, dense
            return type(self.block).forward(self.block, x, **kwargs)
        kept = found.map.kept
        number = kept.shape[1]
        call.trace.count("windows", layer, number, number)
        call.work[layer] = (
            dense,
            self.flops(windows, number, number * windows.area, x.shape[-1]),
        )
        pieces = windows.split(grid)
        index = kept[:, :, None, None].expand(-1, -1, *pieces.shape[2:])
        made, weights = self.compute(pieces.gather(1, index), windows, kept, kwargs)
        out = windows.join(pieces.scatter(1, index, made))
        return self.returned(out, weights, kwargs)

    def compute(
        self, pieces: Tensor, windows: WindowGrid, kept: Tensor, kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Compute the block on windows (B, K, area, C), whose numbers are ``kept`` (B, K)."""
        batch, number, area, width = pieces.shape
        first, second = (getattr(self.block, name) for name in self.norms)
        mask = self.mask(windows, pieces)
        rows = None if mask is None else mask[kept].flatten(0, 1)
        x = pieces.flatten(0, 1)
        given = x if self.post_norm else first(x)
        real = windows.real(x.device)
        if real is not None and not self.post_norm:
            # The model pads behind the norm, so that padding is zero there.
            given = given * real[kept].flatten(0, 1)[..., None]
        attended, weights = self.attend(given, rows, kwargs)
        if self.post_norm:
            attended = first(attended)
        x = x.reshape(batch, number * area, width)
        x = x + self.drop(attended.reshape(x.shape), 0)
        fed = second(self.feed(x)) if self.post_norm else self.feed(second(x))
        return (x + self.drop(fed, 1)).reshape(pieces.shape), weights

    def flops(self, windows: WindowGrid, number: int, tokens: int, width: int) -> int:
        """FLOPs of a sample with ``number`` windows in attention and ``tokens`` tokens in the MLP."""
        attention = getattr(self.block, self.attention)
        linear = linear_flops(attention)
        for name, module in attention.named_modules():
            # It computes the positions' biases once, not for every token.
            if name.rpartition(".")[2] == self.position_mlp:
                linear -= linear_flops(module)
        square = 4 * windows.area * windows.area * width
        return number * (windows.area * linear + square) + tokens * sum(
            map(linear_flops, self.mlp())
        )


class TransformersSwin(SwinRunner):
    """A SwinLayer of transformers."""

    norms = ("layernorm_before", "layernorm_after")
    attention = "attention"
    position_mlp = POSITION_MLP
    arguments = SWIN_ARGUMENTS

    def windows(self, x: Tensor, kwargs: Any) -> WindowGrid:
        grid = kwargs["input_dimensions"]
        size, shift = swin_windows(self.block, grid, kwargs.get("always_partition", False))
        return WindowGrid(tuple(grid), (size, size), (shift, shift))

    def mask(self, windows: WindowGrid, like: Tensor) -> Tensor | None:
        found: Tensor | None = self.block.get_attn_mask(
            *windows.padded, dtype=like.dtype, device=like.device
        )
        return found

    def attend(self, x: Tensor, mask: Tensor | None, kwargs: Any) -> tuple[Tensor, Any]:
        more = {k: v for k, v in kwargs.items() if k not in self.arguments}
        out, weights = self.block.attention(x, mask, **more)
        return self.block.dropout(out), weights

    def feed(self, x: Tensor) -> Tensor:
        out: Tensor = self.block.dropout(self.block.mlp(x))
        return out

    def drop(self, x: Tensor, half: int) -> Tensor:
        return x if half else self.block.drop_path(x)  # its MLP has none

    def returned(self, x: Tensor, weights: Any, kwargs: Any) -> Any:
        return x.flatten(1, 2), weights


class TransformersSwinV2(TransformersSwin):
    """A Swinv2Layer of transformers."""

    arguments = SWINV2_ARGUMENTS

    def windows(self, x: Tensor, kwargs: Any) -> WindowGrid:
        grid = kwargs["input_dimensions"]
        size, shift = self.block.window_size, self.block.shift_size
        return WindowGrid(tuple(grid), (size, size), (shift, shift))

    def mask(self, windows: WindowGrid, like: Tensor) -> Tensor | None:
        found = self.block.get_attn_mask(*windows.padded, like.dtype)
        return None if found is None else found.to(like.device)

    def attend(self, x: Tensor, mask: Tensor | None, kwargs: Any) -> tuple[Tensor, Any]:
        asked = bool(kwargs.get("output_attentions"))
        out = self.block.attention(x, mask, output_attentions=asked)
        return out[0], out[1:]

    def feed(self, x: Tensor) -> Tensor:
        out: Tensor = self.block.output(self.block.intermediate(x))
        return out

    def drop(self, x: Tensor, half: int) -> Tensor:
        out: Tensor = self.block.drop_path(x)
        return out

    def mlp(self) -> list[nn.Module]:
        return [self.block.intermediate, self.block.output]

    def returned(self, x: Tensor, weights: Any, kwargs: Any) -> Any:
        return (x.flatten(1, 2), *weights)
