"""Pictures of sparse attention: which key blocks each block of queries sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vtr.core.trace import Trace
from vtr.kernels import BlockMask

if TYPE_CHECKING:
    from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

NOTHING, FULL, PARTIAL = (255, 255, 255), (31, 58, 95), (122, 162, 200)
TEXT, FRAMES, BORDER = (226, 135, 40), ((150, 150, 150), (205, 205, 205)), (240, 196, 188)
RULER = 8  # pixels of the strips beside a map that show what its tokens are
APART = 6  # frames of fewer pixels have no line between them, only their strip


@dataclass(frozen=True)
class Strip:
    """The keys of one sample without padding, for the strips beside a map.

    Attributes:
        frame: (S,) int64 frame of each visual token, counted through the prompt, 0 if frames are not
            known; -1 for text and for separators.
    """

    frame: Tensor

    @property
    def starts(self) -> list[int]:
        """Keys with which a frame, or a run of text, begins; the first one is not among them."""
        return ((self.frame[1:] != self.frame[:-1]).nonzero().flatten() + 1).tolist()

    def colours(self, size: int, first: int, tokens: int) -> Pixels:
        """(size, 3) colours of ``tokens`` tokens from ``first`` on; frames alternate."""
        frame = self.frame[first + places(size, tokens)].numpy()
        return np.array([*FRAMES, TEXT], np.uint8)[np.where(frame < 0, 2, frame % 2)]


def strip_of(trace: Trace, layer: int, sample: int) -> Strip | None:
    """The keys of a sample in a layer of a language model; None for a generator."""
    known = [c for c in trace.notes.get("columns", ()) if c[0] <= layer]
    if not known:
        return None
    _, valid, marks = known[-1]
    frame, image = marks.frame[sample], marks.image[sample]
    if not bool((image >= 0).any()):  # not known: only what is visual is
        frame = marks.kind[sample].clamp(max=1) - 1
    return Strip(frame[valid[sample]].cpu())


def mask_of(note: dict[str, Any], sample: int) -> tuple[BlockMask, int]:
    """The mask of a sample in a layer, and its number in the mask's batch.

    Raises:
        ValueError: the sample does not exist, or has no mask.
    """
    if "masks" not in note:
        mask = note["mask"]
        own = mask.pattern.shape[0]
        if own > 1 and not 0 <= sample < own:
            raise ValueError(f"sample must be in 0..{own - 1}, got {sample}")
        return mask, sample if own > 1 else 0
    for samples, mask in note["masks"]:
        if samples is None:
            if 0 <= sample < mask.pattern.shape[0]:
                return mask, sample
        elif sample in (rows := samples.tolist()):
            return mask, rows.index(sample)
    raise ValueError(f"no mask was found for sample {sample}")


def places(size: int, tokens: int) -> Tensor:
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
    mask: BlockMask, sample: int, heads: Sequence[int], size: int, strip: Strip | None
) -> Image.Image:
    """Draw a map of blocks, queries down and keys across, with strips for frames and text beside it.

    A row of a language model without a block is one that attends to all keys: its block is drawn so.
    """
    from PIL import Image

    seen, partial = (x.numpy()[..., None] for x in levels(mask, sample, heads))
    if strip is not None:
        first = mask.k_len - mask.q_len
        end = (np.arange(mask.grid[0]) * mask.block[0]).clip(max=mask.q_len - 1) + first
        before = np.arange(mask.grid[1]) * mask.block[1] <= end[:, None]
        seen = np.where((seen == 0).all(1, keepdims=True), before[..., None], seen)
    full = seen - partial
    colours = (1 - seen) * np.array(NOTHING) + full * np.array(FULL) + partial * np.array(PARTIAL)
    longest = max(mask.q_len, mask.k_len)
    height, width = (max(1, round(size * n / longest)) for n in (mask.q_len, mask.k_len))
    rows = places(height, mask.q_len).numpy() // mask.block[0]
    columns = places(width, mask.k_len).numpy() // mask.block[1]
    pixels = colours[rows[:, None], columns[None]].round().astype(np.uint8)
    if strip is None:
        return Image.fromarray(pixels)
    for a, b in itertools.pairwise([*strip.starts, mask.k_len]):
        if (b - a) * width >= APART * mask.k_len:
            pixels[:, a * width // mask.k_len] = BORDER
            if a > first:
                pixels[(a - first) * height // mask.q_len] = BORDER
    out = np.full((RULER + height, RULER + width, 3), 255, np.uint8)
    out[RULER:, RULER:] = pixels
    out[: RULER - 2, RULER:] = strip.colours(width, 0, mask.k_len)[None]
    out[RULER:, : RULER - 2] = strip.colours(height, first, mask.q_len)[:, None]
    return Image.fromarray(out)
