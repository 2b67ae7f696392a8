"""Clips of 64 slides, on a few of which coloured digits appear, some of them twice: the data of the
built-in model for long videos.

Every slide has a separate background and lasts one frame. Ten slides show a digit, in one of four
quadrants: four digits are seen once, and three come back after at least :data:`FAR` frames, written by
the same hand, in another colour and at another place. Nothing in a single frame tells that a digit comes
back: a frame has to be compared with all that came before it.

A batch is a description, :class:`Slides`, and pixels only when they are asked for (:func:`render`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtr.zoo import data
from vtr.zoo.scenes import COLOURS, PALETTE

FRAMES = 64
IMAGE = 32  # pixels, side of a frame
FAR = 12  # frames, at least, between the two appearances of a digit
TWICE, ONCE = 3, 4  # digits of a clip that appear twice, and once
DIGITS = TWICE + ONCE
BOX = (18.0, 19.0)  # pixels, side of a digit's box

_HALF = IMAGE // 2
_BRIGHTNESS = 0.3
_PLAIN = 0.4  # share of frames in front of one colour


class Slides(NamedTuple):
    """A batch of clips, described. The first three digits of a clip appear twice, the others once.

    Attributes:
        digits: ``(n, 7)`` int64, 0 to 9, different in a clip.
        frames: ``(n, 7, 2)`` int64, ascending, in which frames a digit appears; -1 as the second
            one of a digit that appears once. No two digits share a frame.
        colours: ``(n, 7, 2)`` int64, indices into :data:`~vtr.zoo.scenes.COLOURS`, or -1. The two of
            a digit differ, and so do the last ones of the digits that appear twice.
        places: ``(n, 7, 2)`` int64, indices into :data:`~vtr.zoo.scenes.QUADRANTS`, or -1. The two
            of a digit differ.
        glyphs: ``(n, 7)`` int64, which handwritten digits.
    """

    digits: Tensor
    frames: Tensor
    colours: Tensor
    places: Tensor
    glyphs: Tensor

    def take(self, index: Tensor | slice | list[int]) -> Slides:
        """Some clips of the batch."""
        return Slides(*(column[index] for column in self))


def _when(n: int, generator: torch.Generator) -> Tensor:
    """``(n, 7, 2)`` int64: frames of digits, all different."""
    out = torch.full((n, DIGITS, 2), -1)
    wrong = torch.arange(n)
    while len(wrong):
        drawn = torch.rand(len(wrong), FRAMES, generator=generator).argsort(1)
        pairs = drawn[:, : 2 * TWICE].view(-1, TWICE, 2).sort(-1).values
        out[wrong, :TWICE] = pairs
        out[wrong, TWICE:, 0] = drawn[:, 2 * TWICE : 2 * TWICE + ONCE]
        wrong = wrong[((pairs[..., 1] - pairs[..., 0]) < FAR).any(1)]
    return out


def _two(choices: int, last: Tensor, generator: torch.Generator) -> Tensor:
    """``(n, 7, 2)``: ``last`` as the second, and before it another number below ``choices``."""
    step = torch.randint(1, choices, last.shape, generator=generator)
    return torch.stack([(last + step) % choices, last], -1)


def slides(n: int, generator: torch.Generator, split: data.Split = "train") -> Slides:
    """Draw clips.

    Args:
        n: number of clips, at least 1.
        generator: source of all randomness; the same state gives the same clips.
        split: which handwritten digits to draw from.

    Raises:
        ValueError: ``n`` or ``split`` is out of range.
        ImportError: scikit-learn is not installed.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    indices = data.split_indices(split)
    digits = torch.rand(n, 10, generator=generator).argsort(1)[:, :DIGITS]
    frames = _when(n, generator)
    there = frames >= 0
    last = torch.randint(len(COLOURS), (n, DIGITS), generator=generator)
    last[:, :TWICE] = torch.rand(n, len(COLOURS), generator=generator).argsort(1)[:, :TWICE]
    colours = _two(len(COLOURS), last, generator)
    places = _two(4, torch.randint(4, (n, DIGITS), generator=generator), generator)
    of_class = (data.digit_labels()[indices] == digits.flatten()[:, None]).float()
    glyphs = indices[torch.multinomial(of_class, 1, generator=generator)[:, 0]].view(n, DIGITS)
    colours, places = (c.masked_fill(~there, -1) for c in (colours, places))
    return Slides(digits, frames, colours, places, glyphs)


class Looks(NamedTuple):
    """Frames with one digit each, ``(m,)`` int64 each: what a frame of a clip is drawn from."""

    glyphs: Tensor
    colours: Tensor
    places: Tensor


def backgrounds(n: int, generator: torch.Generator) -> Tensor:
    """Frames without a digit, ``(n, 3, 32, 32)`` float32 in [0, 1]: crops of photographs, or plain
    colours, with noise."""
    photos = data.backgrounds(n, generator, brightness=_BRIGHTNESS, size=IMAGE)
    plain = torch.rand(n, generator=generator) < _PLAIN
    colour = _BRIGHTNESS * torch.rand(n, 3, 1, 1, generator=generator)
    colour = colour + 0.03 * torch.randn(n, 3, IMAGE, IMAGE, generator=generator)
    return torch.where(plain[:, None, None, None], colour, photos).clamp(0, 1)


def draw(looks: Looks, frames: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw digits over frames.

    Args:
        looks: m digits.
        frames: ``(m, 3, 32, 32)`` in [0, 1].
        generator: of size, place within the quadrant, angle and shade.

    Returns:
        the frames, and the opacity of the digits, ``(m, 1, 32, 32)`` float32 in [0, 1].
    """
    return draw_with(looks, frames, torch.rand(5, len(looks.glyphs), generator=generator))


def draw_with(looks: Looks, frames: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Draw as :func:`draw` does, with given random numbers ``(5, m)`` in [0, 1)."""
    side, u, v, angle, shade = chance
    side = BOX[0] + (BOX[1] - BOX[0]) * side
    margin = side * data.HALF_EXTENT
    room = _HALF - 2 * margin
    x = looks.places % 2 * _HALF + margin + room * u
    y = looks.places // 2 * _HALF + margin + room * v
    opacity = data.digit_masks(looks.glyphs, x, y, side, 0.3 * (angle - 0.5), size=IMAGE)
    paint = torch.tensor(PALETTE)[looks.colours] * (0.8 + 0.2 * shade[:, None])
    return torch.lerp(frames, paint[:, :, None, None], opacity), opacity


def render(batch: Slides, generator: torch.Generator) -> Tensor:
    """Frames of clips, ``(n, 64, 3, 32, 32)`` float32 in [0, 1].

    Args:
        batch: n clips.
        generator: of backgrounds, and of all that the description leaves open.
    """
    n = len(batch.digits)
    frames = backgrounds(n * FRAMES, generator)
    row, slot, turn = (batch.frames >= 0).nonzero(as_tuple=True)
    at = row * FRAMES + batch.frames[row, slot, turn]
    looks = Looks(
        batch.glyphs[row, slot], batch.colours[row, slot, turn], batch.places[row, slot, turn]
    )
    frames[at], _ = draw(looks, frames[at], generator)
    return frames.view(n, FRAMES, 3, IMAGE, IMAGE)


def pictures(batch: Slides, generator: torch.Generator) -> Tensor:
    """Clips as a camera stores them: ``(n, 64, 32, 32, 3)`` uint8."""
    frames = render(batch, generator)
    return (frames * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
