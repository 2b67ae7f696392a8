"""Several handwritten digits on a photograph, with their boxes: the data of the built-in detector.

A picture has one to five digits of different sizes on one background of :mod:`vtr.zoo.data`, from
the same sources and with the same split: ``"heldout"`` pictures show digits that training never
shows. The box of a digit is read off its own opacity before it is drawn, so it is exact; a later
digit may cover a little of an earlier one.

Everything is a function of the seeded ``torch.Generator`` handed in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtr.zoo import data

IMAGE = 160  # pixels
MOST = 5  # digits in a picture
SIDE = (26.0, 64.0)  # pixels, side of a digit's square with its empty border
OVERLAP = 0.1  # of the smaller of two boxes, the most that the other one may cover
OPAQUE = 0.3  # a pixel of at least this opacity belongs to the digit

_WINDOW = 80  # pixels, holds the largest digit at any angle
_TRIES = 8  # places drawn for a digit; it is left out if all of them overlap too much


class LabelledPictures(NamedTuple):
    """A batch of pictures with one to five digits each.

    Columns of ``labels`` and ``boxes`` belong together. Those without a digit come last.

    Attributes:
        images: ``(n, 3, 160, 160)`` float32, normalised as in :mod:`vtr.zoo.data`.
        labels: ``(n, 5)`` int64, 0 to 9; -1 in columns without a digit.
        boxes: ``(n, 5, 4)`` float32, left, top, right, bottom in pixels; the right and the bottom edge
            lie behind the last pixel. Zero in columns without a digit.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor


def _bounds(seen: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last true entry of every row of ``(m, size)``, int64."""
    size = seen.shape[1]
    first = seen.int().argmax(1)
    return first, size - seen.flip(1).int().argmax(1)


def _covered(places: Tensor, placed: Tensor) -> Tensor:
    """Share of the smaller box that the other one covers: ``(..., 4), (..., 4)`` -> ``(...)``."""
    low = torch.maximum(places[..., :2], placed[..., :2])
    high = torch.minimum(places[..., 2:], placed[..., 2:])
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (places, placed)]
    return (high - low).clamp(min=0).prod(-1) / torch.minimum(*areas).clamp(min=1)


def _place(sizes: Tensor, wanted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places for digits, one after the other, the first of some random ones that is free.

    Args:
        sizes: ``(n, 5, 2)`` int64, width and height of the digits' boxes.
        wanted: ``(n, 5)`` bool.
        generator: source of all randomness.

    Returns:
        boxes ``(n, 5, 4)`` int64, and which of the wanted digits found a place, ``(n, 5)`` bool.
    """
    n, most, _ = sizes.shape
    draws = torch.rand(_TRIES, n, most, 2, generator=generator, dtype=torch.float64)
    corners = (draws * (IMAGE - sizes + 1)).long()
    places = torch.cat([corners, corners + sizes], -1)  # (tries, n, most, 4)
    boxes, found = torch.zeros(n, most, 4, dtype=torch.int64), wanted.clone()
    for k in range(most):
        overlaps = _covered(places[:, :, k, None], boxes[None, :, :k]) > OVERLAP
        free = ~overlaps.any(
            -1
        )  # (tries, n); an absent digit has an empty box, which covers nothing
        found[:, k] &= free.any(0)
        chosen = places[free.int().argmax(0), torch.arange(n), k]
        boxes[:, k] = chosen * found[:, k, None]
    return boxes, found


def pictures(n: int, generator: torch.Generator, split: data.Split = "train") -> LabelledPictures:
    """Pictures of 160 x 160 pixels with one to five digits each.

    Args:
        n: number of pictures, at least 1.
        generator: source of all randomness; the same state gives the same pictures.
        split: which handwritten digits to draw from.

    Raises:
        ValueError: ``n`` or ``split`` is out of range.
        ImportError: scikit-learn is not installed.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    choices = data.split_indices(split)
    pixels = data.backgrounds(n, generator, size=IMAGE)
    count, which, side, angle = torch.rand(4, n, MOST, generator=generator, dtype=torch.float64)
    index = choices[(which * len(choices)).long()].flatten()
    wanted = torch.arange(MOST) <= (count[:, :1] * MOST).long()
    side = (SIDE[0] + (SIDE[1] - SIDE[0]) * side).float().flatten()
    middle = torch.full_like(side, _WINDOW / 2)
    angle = (0.5 * (angle.float() - 0.5)).flatten()
    masks = data.digit_masks(index, middle, middle, side, angle, size=_WINDOW)[:, 0]
    opaque = masks >= OPAQUE
    (left, right), (top, bottom) = _bounds(opaque.any(1)), _bounds(opaque.any(2))
    sizes = torch.stack([right - left, bottom - top], 1).view(n, MOST, 2)
    boxes, found = _place(sizes, wanted, generator)
    colours = 0.75 + 0.25 * torch.rand(n, MOST, 3, 1, 1, generator=generator)
    offset = boxes[..., :2] - torch.stack([left, top], 1).view(n, MOST, 2)  # of the window
    for i, k in found.nonzero().tolist():
        x, y = offset[i, k].tolist()
        rows, columns = slice(max(y, 0), y + _WINDOW), slice(max(x, 0), x + _WINDOW)
        part = pixels[i, :, rows, columns]
        mask = masks[i * MOST + k, max(-y, 0) :, max(-x, 0) :][: part.shape[1], : part.shape[2]]
        part.lerp_(colours[i, k].expand_as(part), mask.expand_as(part))
    order = (~found).int().argsort(dim=1, stable=True)
    labels = torch.where(found, data.digit_labels()[index].view(n, MOST), -1)
    return LabelledPictures(
        data.normalise(pixels),
        labels.gather(1, order),
        boxes.gather(1, order[..., None].expand(-1, -1, 4)).float(),
    )
