"""Twelve pictures or screenshots of one chat: the data of the built-in model for chats.

There are two tasks. In ``"pictures"`` every picture has its own background and shows one digit in one of
four quadrants; no two pictures of a chat show the same digit in the same colour. In ``"screens"`` the
pictures are shots of one screen with a button in every quadrant and a digit on every button. From one shot
to the next a single button changes, and all else stays, pixel by pixel.

A batch is a description, :class:`Chats`, and pixels only when they are asked for (:func:`render`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtr.zoo import data
from vtr.zoo.scenes import COLOURS
from vtr.zoo.slides import IMAGE, Looks, backgrounds, draw_with

TASKS = ("pictures", "screens")
PICTURES = 12  # of a chat
PLACES = 4  # quadrants of a picture

_HALF = IMAGE // 2
_EDGE = 1  # pixels between a button and the edge of its quadrant
_GREY = (0.15, 0.3)  # brightness of buttons


class Chats(NamedTuple):
    """A batch of chats with P pictures each, described. Columns hold -1 for a quadrant without a digit.

    Attributes:
        digits: ``(n, P, 4)`` int64, 0 to 9; different within a picture.
        colours: ``(n, P, 4)`` int64, indices into :data:`~vtr.zoo.scenes.COLOURS`.
        glyphs: ``(n, P, 4)`` int64, which handwritten digits.
        since: ``(n, P, 4)`` int64, the picture from which on the quadrant has looked as it does.
        screens: ``(n,)`` bool, whether the pictures are shots of one screen.
    """

    digits: Tensor
    colours: Tensor
    glyphs: Tensor
    since: Tensor
    screens: Tensor

    def take(self, index: Tensor | slice | list[int]) -> Chats:
        """Some chats of the batch."""
        return Chats(*(column[index] for column in self))


def chats(
    n: int,
    task: str,
    generator: torch.Generator,
    split: data.Split = "train",
    *,
    pictures: int = PICTURES,
) -> Chats:
    """Draw chats of a task.

    Args:
        n: number of chats, at least 1.
        task: one of :data:`TASKS`.
        generator: source of all randomness; the same state gives the same chats.
        split: which handwritten digits to draw from.
        pictures: of a chat, 1 to 12.

    Raises:
        ValueError: an argument is out of range.
        ImportError: scikit-learn is not installed.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if not 1 <= pictures <= PICTURES:
        raise ValueError(f"pictures must be 1 to {PICTURES}, got {pictures}")
    indices = data.split_indices(split)
    pair = torch.rand(n, 10 * len(COLOURS), generator=generator).argsort(1)[:, :pictures]
    place = torch.randint(PLACES, (n, pictures), generator=generator)
    at = torch.arange(pictures).expand(n, -1)
    if task == "pictures":
        shape = (n, pictures, PLACES)
        columns = [torch.full(shape, -1) for _ in range(3)]
        for column, values in zip(columns, (pair % 10, pair // 10, at), strict=True):
            column.scatter_(2, place[..., None], values[..., None])
        digits, colours, since = columns
    else:
        digits, colours, since = _screens(place, generator)
    there = digits >= 0
    labels = data.digit_labels()[indices]
    of_class = (labels == digits[there][:, None]).float()
    glyphs = torch.full_like(digits, -1)
    glyphs[there] = indices[torch.multinomial(of_class, 1, generator=generator)[:, 0]]
    if task == "screens":
        glyphs = glyphs.gather(1, since)  # a button keeps its hand
    return Chats(digits, colours, glyphs, since, torch.full((n,), task == "screens"))


def _screens(changed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Digits, colours and since of screens of which the button ``changed``, ``(n, P)``, is new in a shot."""
    n, pictures = changed.shape
    rows = torch.arange(n)
    now = torch.rand(n, 10, generator=generator).argsort(1)[:, :PLACES]
    colour = torch.randint(len(COLOURS), (n, PLACES), generator=generator)
    start = torch.zeros(n, PLACES, dtype=torch.long)
    shots = [(now, colour, start)]
    for at in range(1, pictures):
        now, colour, start = (column.clone() for column in shots[-1])
        place = changed[:, at]
        free = torch.rand(n, 10, generator=generator).scatter(1, now, -1.0)
        now[rows, place] = free.argmax(1)
        colour[rows, place] = torch.randint(len(COLOURS), (n,), generator=generator)
        start[rows, place] = at
        shots.append((now, colour, start))
    digits, colours, since = (torch.stack(column, 1) for column in zip(*shots, strict=True))
    return digits, colours, since


def render(batch: Chats, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the pictures of chats.

    Args:
        batch: n chats with P pictures each.
        generator: of backgrounds, and of all that the description leaves open.

    Returns:
        pictures ``(n, P, 3, 32, 32)`` float32 in [0, 1], and the opacity of the digit in each quadrant,
        ``(n, P, 4, 32, 32)`` float32 in [0, 1].
    """
    n, count = batch.digits.shape[:2]
    screen = batch.screens[:, None, None, None, None]
    frames = backgrounds(n * count, generator).view(n, count, 3, IMAGE, IMAGE)
    frames = torch.where(screen, frames[:, :1], frames)
    low, high = _GREY
    grey = low + (high - low) * torch.rand(n, 1, 3, 1, 1, generator=generator)
    line = torch.arange(IMAGE)
    inside = line % _HALF
    inside = (inside >= _EDGE) & (inside < _HALF - _EDGE)
    frames = torch.where(screen & inside[:, None] & inside, grey, frames).flatten(0, 1)
    # The look of a button is drawn once, when it changes.
    chance = torch.rand(5, n, count, PLACES, generator=generator)
    chance = chance.gather(2, batch.since.clamp(min=0).expand(5, -1, -1, -1))
    opacity = torch.zeros(n * count, PLACES, IMAGE, IMAGE)
    for place in range(PLACES):
        at = (batch.digits[..., place] >= 0).flatten()
        if not at.any():
            continue
        looks = Looks(
            batch.glyphs[..., place].flatten()[at],
            batch.colours[..., place].flatten()[at],
            torch.full((int(at.sum()),), place),
        )
        drawn, mask = draw_with(looks, frames[at], chance[..., place].flatten(1)[:, at])
        # A large digit that is turned reaches a little over its quadrant.
        own = (line // _HALF == place // 2)[:, None] & (line // _HALF == place % 2)
        frames[at] = torch.where(own, drawn, frames[at])
        opacity[at, place] = mask[:, 0] * own
    return frames.view(n, count, 3, IMAGE, IMAGE), opacity.view(n, count, PLACES, IMAGE, IMAGE)
