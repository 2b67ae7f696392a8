"""Scenes of one to three coloured digits on photographs: the data of the built-in image-text model.

Every picture has quadrants; a digit is in one of them, and the digits of a picture differ in
class, in colour and in quadrant, so that each of the three names a digit without doubt.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vtr.zoo import data

COLOURS = ("red", "green", "blue", "yellow")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
MOST = 3  # digits in a picture
BOX = (17.0, 25.0)  # pixels, side of a digit's box
NO_DIGIT = 10  # class of a patch without ink
NO_COLOUR = 4
UNCLEAR = -100  # a patch that a digit barely touches; what torch's cross-entropy ignores

PALETTE = ((1.0, 0.15, 0.15), (0.15, 1.0, 0.2), (0.3, 0.45, 1.0), (1.0, 1.0, 0.15))
_HALF = data.IMAGE // 2


class Scenes(NamedTuple):
    """A batch of pictures with one to three digits each.

    The columns of ``digits``, ``colours`` and ``quadrants`` belong together; columns from
    ``number`` on are empty and hold -1.

    Attributes:
        images: ``(n, 3, 96, 96)`` float32, normalised as in :mod:`vtr.zoo.data`.
        number: ``(n,)`` int64, 1 to 3.
        digits: ``(n, 3)`` int64, classes 0 to 9.
        colours: ``(n, 3)`` int64, indices into :data:`COLOURS`.
        quadrants: ``(n, 3)`` int64, indices into :data:`QUADRANTS`.
        patch_digits: ``(n, 144)`` int64, the class of the digit in each patch, :data:`NO_DIGIT`
            without ink, :data:`UNCLEAR` in between.
        patch_colours: the same for colours, with :data:`NO_COLOUR`.
        ink: ``(n, 144)`` float32 in [0, 1], share of each patch covered by digits.
    """

    images: Tensor
    number: Tensor
    digits: Tensor
    colours: Tensor
    quadrants: Tensor
    patch_digits: Tensor
    patch_colours: Tensor
    ink: Tensor


@lru_cache(maxsize=2)
def _by_class(split: data.Split) -> tuple[Tensor, Tensor]:
    """Indices of a split's digits, one row a class, padded: ``(10, m)``, and the rows' lengths."""
    indices = data.split_indices(split)
    labels = data.digit_labels()[indices]
    rows = [indices[labels == digit] for digit in range(10)]
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return table, torch.tensor([len(row) for row in rows])


def _distinct(choices: int, n: int, generator: torch.Generator) -> Tensor:
    """``(n, MOST)`` int64: different numbers below ``choices`` in each row."""
    return torch.rand(n, choices, generator=generator).argsort(1)[:, :MOST]


def scenes(
    n: int,
    generator: torch.Generator,
    split: data.Split = "train",
    *,
    most: int = MOST,
    box: tuple[float, float] = BOX,
) -> Scenes:
    """Pictures with one to ``most`` digits each.

    Args:
        n: number of pictures, at least 1.
        generator: source of all randomness; the same state gives the same pictures.
        split: which handwritten digits to draw from.
        most: largest number of digits in a picture, 1 to 3; each number is equally frequent.
        box: smallest and largest side of a digit's box in pixels; at most 56, so that a digit
            stays in its quadrant.

    Raises:
        ValueError: ``n``, ``split``, ``most`` or ``box`` is out of range.
        ImportError: scikit-learn is not installed.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 1 <= most <= MOST:
        raise ValueError(f"most must be 1 to {MOST}, got {most}")
    if not 8 <= box[0] <= box[1] <= 56:
        raise ValueError(f"box must be (low, high) with 8 <= low <= high <= 56, got {box}")
    data.split_indices(split)  # refuses an unknown split before the cache sees it
    number = torch.randint(1, most + 1, (n,), generator=generator)
    digits, colours, quadrants = (_distinct(k, n, generator) for k in (10, 4, 4))

    table, lengths = _by_class(split)
    side, u, v, w, which = torch.rand(5, n, MOST, generator=generator)
    index = table[digits, (which * lengths[digits]).long()]
    side = box[0] + (box[1] - box[0]) * side
    margin = side * data.HALF_EXTENT
    room = _HALF - 2 * margin
    x = quadrants % 2 * _HALF + margin + room * u
    y = quadrants // 2 * _HALF + margin + room * v
    angle = 0.3 * (w - 0.5)
    flat = (t.flatten() for t in (index, x, y, side, angle))
    masks = data.digit_masks(*flat).view(n, MOST, 1, data.IMAGE, data.IMAGE)
    present = torch.arange(MOST) < number[:, None]
    masks = masks * present[:, :, None, None, None]

    shade = 0.8 + 0.2 * torch.rand(n, MOST, 1, generator=generator)
    paint = (torch.tensor(PALETTE)[colours] * shade)[..., None, None]
    pixels = data.backgrounds(n, generator, brightness=0.45)
    for slot in range(MOST):
        pixels = torch.lerp(pixels, paint[:, slot], masks[:, slot])

    covered = data.coverage(masks.flatten(0, 1)).view(n, MOST, -1)
    ink = covered.sum(1).clamp(max=1)
    clear = covered > 0.06
    owner = covered.argmax(1)
    patch_digits = digits.gather(1, owner)
    patch_colours = colours.gather(1, owner)
    is_clear, is_empty = clear.any(1), ink < 0.01
    for labels, nothing in ((patch_digits, NO_DIGIT), (patch_colours, NO_COLOUR)):
        labels.masked_fill_(~is_clear, UNCLEAR).masked_fill_(is_empty, nothing)
    return Scenes(
        images=data.normalise(pixels),
        number=number,
        digits=digits.masked_fill(~present, -1),
        colours=colours.masked_fill(~present, -1),
        quadrants=quadrants.masked_fill(~present, -1),
        patch_digits=patch_digits,
        patch_colours=patch_colours,
        ink=ink,
    )
