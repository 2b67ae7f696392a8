"""Moving digits: the data of the built-in video generator, made from scikit-learn's ``load_digits``.

A video is one handwritten digit of 8 x 8 pixels, in grey on black, that moves two pixels per frame
in one of four directions and never leaves the picture. Two pixels are one patch of the generator
(:mod:`vtr.zoo.wan`): what moves is the content of tokens from frame to frame.

Digits are split into ``"train"`` and ``"heldout"`` as in :mod:`vtr.zoo.data`; a held-out digit is
in no training video. Everything is a function of the seeded ``torch.Generator`` handed in.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vtr.zoo import data

GLYPH = 8  # pixels, side of a digit
SPEED = 2  # pixels per frame
DIRECTIONS = ("right", "left", "down", "up")
STEPS = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])  # x, y of each direction


class Videos(NamedTuple):
    """A batch of videos with one digit each.

    Attributes:
        pixels: ``(n, 1, frames, height, width)`` float32 in [-1, 1], -1 is black.
        digits: ``(n,)`` int64, 0 to 9.
        directions: ``(n,)`` int64, index into :data:`DIRECTIONS`.
    """

    pixels: Tensor
    digits: Tensor
    directions: Tensor


@lru_cache(maxsize=1)
def _glyphs() -> tuple[Tensor, Tensor]:
    digits = data.scikit_learn().datasets.load_digits()
    return torch.tensor(digits.images / 16.0, dtype=torch.float32), torch.tensor(digits.target)


def glyphs(split: data.Split) -> tuple[Tensor, Tensor]:
    """Digits of a split, ``(m, 8, 8)`` float32 in [0, 1], and their classes, ``(m,)`` int64.

    Raises:
        ValueError: ``split`` is neither ``"train"`` nor ``"heldout"``.
        ImportError: scikit-learn is not installed.
    """
    index = data.split_indices(split)
    images, labels = _glyphs()
    return images[index], labels[index]


def fitting(frames: int, height: int, width: int) -> list[int]:
    """The directions in which a digit can move for so many frames without leaving the picture."""
    path = GLYPH + SPEED * (frames - 1)
    return [i for i, (x, _) in enumerate(STEPS.tolist()) if path <= (width if x != 0 else height)]


def videos(
    n: int,
    generator: torch.Generator,
    frames: int = 5,
    height: int = 16,
    width: int = 32,
    split: data.Split = "train",
) -> Videos:
    """Draw ``n`` videos; digit, direction and start are uniformly random among those whose path fits.

    Raises:
        ValueError: no direction fits, or ``split`` is neither ``"train"`` nor ``"heldout"``.
        ImportError: scikit-learn is not installed.
    """
    possible = fitting(frames, height, width)
    if not possible:
        raise ValueError(
            f"a digit that moves {SPEED} pixels per frame leaves a picture of {height} x {width} "
            f"pixels within {frames} frames; give fewer frames or a larger picture"
        )
    images, labels = glyphs(split)
    chosen = torch.randint(len(images), (n,), generator=generator)
    directions = torch.tensor(possible)[torch.randint(len(possible), (n,), generator=generator)]
    path = (frames - 1) * SPEED * STEPS[directions]
    low = (-path).clamp(min=0)
    high = torch.tensor([width - GLYPH, height - GLYPH]) - path.clamp(min=0)
    start = low + (torch.rand(n, 2, generator=generator) * (high - low + 1)).long()
    time = torch.arange(frames)[None, :, None]
    corner = start[:, None] + STEPS[directions][:, None] * SPEED * time  # (n, frames, 2)
    y = torch.arange(height)[:, None] - corner[..., 1, None, None]
    x = torch.arange(width)[None, :] - corner[..., 0, None, None]
    y, x = torch.broadcast_tensors(y, x)
    inside = (y >= 0) & (y < GLYPH) & (x >= 0) & (x < GLYPH)
    which = chosen[:, None, None, None]
    pixels = images[which, y.clamp(0, GLYPH - 1), x.clamp(0, GLYPH - 1)] * inside
    return Videos(pixels[:, None] * 2 - 1, labels[chosen], directions)
