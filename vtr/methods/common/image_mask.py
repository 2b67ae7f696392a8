"""The mask of prompts whose images do not see each other, exact to the token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtr.kernels import BlockMask, masks

# A larger number than that of any image or column.
_NONE = 1 << 40


class PromptImages(NamedTuple):
    """The images of a prompt, and the rows of a call.

    Attributes:
        image: (S,) int64 on the CPU, the image of each key, -1 for text.
        rows: L, the query rows, which are those of the last L columns.
        sinks: first tokens of every image that all later rows see, as they see text.
        window: keys that a row of a sliding-window layer sees; None is all.
    """

    image: Tensor
    rows: int
    sinks: int = 0
    window: int | None = None

    @property
    def row_image(self) -> Tensor:
        """(L,) the image of each row."""
        return self.image[self.image.shape[0] - self.rows :]

    @property
    def shared(self) -> Tensor:
        """(S,) bool, the keys that all later rows see: text, and the first tokens of each image."""
        image = self.image
        column = torch.arange(image.shape[0], device="cpu")
        begins = torch.cat([image.new_ones(1, dtype=torch.bool), image[1:] != image[:-1]])
        place = column - torch.where(begins, column, 0).cummax(0).values
        return (image < 0) | (place < self.sinks)


def image_mask(prompt: PromptImages, sides: tuple[int, int]) -> tuple[Tensor, BlockMask]:
    """Build the causal mask in which a visual row sees its own image, and text.

    Text is scattered between the images, so that nearly every block of neighbouring keys would hold some.
    The mask is therefore of reordered keys: those that all later rows see come first. Attention does not
    depend on the order of keys. Rows of text see text and sinks alone: their true attention is dense, and is
    computed apart.

    Args:
        sides: (bm, bn), query and key tokens per block.

    Returns:
        order (S,) int64, and the mask of L rows and S reordered keys, both on the CPU: key p of the mask is
        column ``order[p]``.
    """
    offset, window, row_image = prompt.image.shape[0] - prompt.rows, prompt.window, prompt.row_image
    order = torch.argsort(~prompt.shared, stable=True)
    image, shared = prompt.image[order], prompt.shared[order]

    def rule(i: Tensor, p: Tensor) -> Tensor:
        j, row = order[p], i + offset
        seen = (j <= row) & (shared[p] | (image[p] == row_image[i]))
        return seen if window is None else seen & (row - j < window)

    maybe, surely = _blocks_of(prompt, order, sides)
    keys = order.shape[0]
    return order, masks.exact(rule, prompt.rows, keys, block=sides, maybe=maybe, surely=surely)


def image_blocks(prompt: PromptImages, sides: tuple[int, int]) -> Tensor:
    """Find the blocks of a prompt, in its own order, in which a pair is seen: (NQ, NK) bool.

    Of blocks with several images, some are found in which no pair is seen.
    """
    return _blocks_of(prompt, torch.arange(prompt.image.shape[0], device="cpu"), sides)[0]


def _blocks_of(
    prompt: PromptImages, order: Tensor, sides: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Tell of blocks of reordered keys whether a pair may be seen, and whether all surely are, (NQ, NK)
    each: by the smallest and largest image and column of each block."""
    bm, bn = sides
    image, shared, row_image = prompt.image[order], prompt.shared[order], prompt.row_image
    low, high = (x[:, None] for x in _range(row_image, row_image >= 0, bm))
    key_low, key_high = _range(image, ~shared, bn)
    row = torch.arange(prompt.image.shape[0], device="cpu")[-prompt.rows :]
    first, last = (x[:, None] for x in _range(row, None, bm))
    key_first, key_last = _range(order, None, bn)
    no_text = _blocks(row_image >= 0, bm, fill=1).all(1)[:, None]
    same = no_text & (low == high) & (key_low == low) & (key_high == low)
    meet = (key_low <= high) & (key_high >= low)
    maybe = (key_first <= last) & (_blocks(shared, bn).any(1) | meet)
    surely = (key_last <= first) & ((key_low == _NONE) | same)
    if prompt.window is not None:
        maybe &= first - key_last < prompt.window
        surely &= last - key_first < prompt.window
    return maybe, surely


def _blocks(values: Tensor, block: int, fill: int = 0) -> Tensor:
    pad = values.new_full((-values.shape[0] % block,), fill)
    return torch.cat([values, pad]).view(-1, block)


def _range(values: Tensor, valid: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest valid value of each block; without one ``_NONE`` and -1."""
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    low = _blocks(values.masked_fill(~valid, _NONE), block, fill=_NONE).amin(1)
    high = _blocks(values.masked_fill(~valid, -1), block, fill=-1).amax(1)
    return low, high
