"""Pictures of sparse attention: which key blocks each block of queries sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vtr.kernels import BlockMask

if TYPE_CHECKING:
    from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

NOTHING, FULL, PARTIAL = (255, 255, 255), (31, 58, 95), (122, 162, 200)
TEXT, FRAMES, BORDER = (226, 135, 40), ((150, 150, 150), (205, 205, 205)), (214, 96, 77)
RULER = 8  # pixels of the strips beside a map that show what its tokens are
APART = 8  # frames of fewer pixels have no line between them, only their strip


@dataclass(frozen=True)
class Marks:
    """Kinds of the tokens of one sample, for the strips beside a map.

    Attributes:
        frame: (S,) int64 frame of each key, counted through the prompt; -1 for text.
        rows: how many of the last keys are the queries.
    """

    frame: Tensor
    rows: int

    @property
    def ends(self) -> list[int]:
        """Keys after which a frame, or a run of text, ends."""
        return ((self.frame[1:] != self.frame[:-1]).nonzero().flatten() + 1).tolist()

    def strip(self, size: int, first: int, tokens: int) -> Pixels:
        """(size, 3) colours of ``tokens`` tokens from ``first`` on."""
        frame = self.frame[first + _places(size, tokens)].numpy()
        colours = np.array([*FRAMES, TEXT], np.uint8)
        # Text between two frames has its own colour; frames alternate.
        return colours[np.where(frame < 0, 2, frame % 2)]


def _places(size: int, tokens: int) -> Tensor:
    """(size,) the token under each pixel."""
    return (torch.arange(size, device="cpu") * tokens // size).clamp(max=tokens - 1)


def levels(mask: BlockMask, sample: int, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Shares (NQ, NK) float of ``heads`` that see each block, and of them the partial blocks."""
    (nq, nk), (samples, own) = mask.grid, mask.pattern.shape
    row = torch.searchsorted(
        mask.row_ptr[1:].cpu(), torch.arange(mask.col.numel(), device="cpu"), right=True
    )
    kind = torch.zeros(mask.patterns * nq, nk, dtype=torch.int64, device="cpu")
    kind[row, mask.col.long().cpu()] = torch.where(mask.tile < 0, 1, 2).cpu()
    line = mask.pattern[sample if samples > 1 else 0].cpu().long()
    which = line[torch.tensor(heads, device="cpu") if own > 1 else torch.zeros(1, dtype=torch.long)]
    found = kind.view(mask.patterns, nq, nk)[which]
    return (found > 0).double().mean(0), (found == 2).double().mean(0)


def paint(
    mask: BlockMask, sample: int, heads: Sequence[int], size: int, marks: Marks | None
) -> Image.Image:
    """Draw a map of blocks, queries down and keys across, with strips for frames and text."""
    from PIL import Image

    seen, partial = (x.numpy()[..., None] for x in levels(mask, sample, heads))
    full = seen - partial
    colours = (1 - seen) * np.array(NOTHING) + full * np.array(FULL) + partial * np.array(PARTIAL)
    longest = max(mask.q_len, mask.k_len)
    height, width = (max(1, round(size * n / longest)) for n in (mask.q_len, mask.k_len))
    rows = _places(height, mask.q_len) // mask.block[0]
    columns = _places(width, mask.k_len) // mask.block[1]
    pixels = colours[rows[:, None], columns[None]].round().astype(np.uint8)
    if marks is None:
        return Image.fromarray(pixels)
    first = mask.k_len - mask.q_len
    spans = [0, *marks.ends, mask.k_len]
    for a, b in zip(spans[1:-1], spans[2:], strict=True):
        if (b - a) * width >= APART * mask.k_len:
            pixels[:, a * width // mask.k_len] = BORDER
            if a > first:
                pixels[(a - first) * height // mask.q_len] = BORDER
    out = np.full((RULER + height, RULER + width, 3), 255, np.uint8)
    out[RULER:, RULER:] = pixels
    out[: RULER - 2, RULER:] = marks.strip(width, 0, mask.k_len)[None]
    out[RULER:, : RULER - 2] = marks.strip(height, first, mask.q_len)[:, None]
    return Image.fromarray(out)
