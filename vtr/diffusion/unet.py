"""UNets: transformer blocks at several resolutions, each block on its own grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn


class UNetBlock(NamedTuple):
    """One transformer block of a UNet.

    Attributes:
        block: it works on tokens, (B, N, C).
        holder: the model around it, which is given (B, C, H, W) and makes the tokens: N = H * W.
        downsample: rows (or columns) of the latents for one of the block's grid: 1, 2, 4...
    """

    block: nn.Module
    holder: nn.Module
    downsample: int


def unet_blocks(model: Any) -> list[UNetBlock]:
    """Return the transformer blocks in the order in which they compute: down, middle, up."""
    return list(_walk(model))


def _walk(model: Any) -> Iterator[UNetBlock]:
    factor = 1
    for stage in model.down_blocks:
        yield from _held(stage, factor)
        factor *= 1 if getattr(stage, "downsamplers", None) is None else 2
    yield from _held(model.mid_block, factor)
    for stage in model.up_blocks:
        yield from _held(stage, factor)
        factor //= 1 if getattr(stage, "upsamplers", None) is None else 2


def _held(stage: Any, factor: int) -> Iterator[UNetBlock]:
    """The blocks of one stage; other kinds of attention have no list of them."""
    for holder in getattr(stage, "attentions", None) or ():
        for block in getattr(holder, "transformer_blocks", ()):
            yield UNetBlock(block, holder, factor)
