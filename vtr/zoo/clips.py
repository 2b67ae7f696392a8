"""Clips of two or three coloured digits that appear, move and disappear: the data of the built-in
video model.

A clip lasts :data:`SECONDS` seconds. A digit is there or not for whole seconds, from one to three
times. One that is seen over at least three seconds may move: it rests in its first and in its last
second, and goes in a straight line in between, so that "where was it first" has one answer whichever
moment of that second a decoder picked. The camera does not move; the background is a photograph or one
colour, and the noise of the sensor is new in every frame.

A batch is a description, :class:`Clips`, and pixels only when they are asked for (:func:`render`), at
any moments: a frame a second to train on, more to write a file (:func:`write`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.errors import missing
from vtr.zoo import data
from vtr.zoo.scenes import COLOURS, PALETTE, QUADRANTS

SECONDS = 8
MOST = 3  # digits in a clip
BOX = (26.0, 34.0)  # pixels, side of a digit's box

_HALF = data.IMAGE // 2
_FLICKER = 0.03  # largest standard deviation of the sensor's noise
_PLAIN = 0.4  # share of clips in front of one colour
_MOVES = 0.6  # share of digits that move, of those that are seen for long enough
_TRIES = 8  # paths that are drawn for every clip; the one with the least overlap is taken


class Clips(NamedTuple):
    """A batch of clips, described. Columns from ``number`` on are empty: -1, and never seen.

    Attributes:
        number: ``(n,)`` int64, 2 or 3.
        digits: ``(n, 3)`` int64, 0 to 9, different in a clip.
        colours: ``(n, 3)`` int64, indices into :data:`COLOURS`, different in a clip.
        seen: ``(n, 3, 8)`` bool, in which seconds a digit is there. The first seconds of a clip's
            digits differ, and so do the last ones.
        places: ``(n, 3, 2)`` int64, indices into :data:`QUADRANTS`, the first and the last quadrant of a digit.
        path: ``(n, 3, 2, 2)`` float32, its first and its last centre (x, y) in pixels.
        shape: ``(n, 3, 2)`` float32, side of the box in pixels and angle in radians.
        glyphs: ``(n, 3)`` int64, which handwritten digits.
        paint: ``(n, 3, 3)`` float32, RGB in [0, 1].
        backgrounds: ``(n, 3, 96, 96)`` float16, RGB, not normalised.
        flicker: ``(n,)`` float32, standard deviation of the noise of a frame.
    """

    number: Tensor
    digits: Tensor
    colours: Tensor
    seen: Tensor
    places: Tensor
    path: Tensor
    shape: Tensor
    glyphs: Tensor
    paint: Tensor
    backgrounds: Tensor
    flicker: Tensor

    def take(self, index: Tensor | slice | list[int]) -> Clips:
        """Some clips of the batch."""
        return Clips(*(column[index] for column in self))

    def first(self) -> Tensor:
        """``(n, 3)`` int64, the second in which a digit appears first; 8 for an empty column."""
        return torch.where(self.seen.any(-1), self.seen.int().argmax(-1), SECONDS)

    def last(self) -> Tensor:
        """``(n, 3)`` int64, the last second in which a digit is seen; -1 for an empty column."""
        return torch.where(self.seen.any(-1), SECONDS - 1 - self.seen.flip(-1).int().argmax(-1), -1)

    def times(self) -> Tensor:
        """``(n, 3)`` int64, how often a digit appears."""
        before = torch.nn.functional.pad(self.seen, (1, 0))[..., :-1]
        return (self.seen & ~before).sum(-1)


@lru_cache(maxsize=1)
def _patterns() -> tuple[Tensor, Tensor]:
    """Every way to be seen from one to three times, ``(m, 8)`` bool, and its probability: the number
    of times first, then the second of the first appearance, then the pattern, all uniform."""
    bits = torch.arange(1, 2**SECONDS)[:, None] >> torch.arange(SECONDS) & 1
    runs = (torch.diff(bits, dim=1, prepend=torch.zeros(len(bits), 1)) == 1).sum(1)
    keep = (runs <= 3) & (bits.sum(1) >= 2)
    bits, runs = bits[keep].bool(), runs[keep]
    first = bits.int().argmax(1)
    weight = torch.zeros(len(bits))
    for times in range(1, 4):
        of_times = runs == times
        onsets = first[of_times].unique()
        for onset in onsets:
            of_both = of_times & (first == onset)
            weight[of_both] = 1 / (3 * len(onsets) * of_both.sum())
    return bits, weight


def _timelines(number: Tensor, generator: torch.Generator) -> Tensor:
    """``(n, 3, 8)`` bool: when digits are seen; no two of a clip come or go for good together."""
    bits, weight = _patterns()
    n = len(number)
    present = torch.arange(MOST) < number[:, None]
    seen = torch.zeros(n, MOST, SECONDS, dtype=torch.bool)
    wrong = torch.arange(n)
    empty = torch.arange(MOST)  # other values for empty columns, so that they never agree
    while len(wrong):
        drawn = torch.multinomial(weight, len(wrong) * MOST, True, generator=generator)
        drawn_seen = bits[drawn].view(-1, MOST, SECONDS) & present[wrong][..., None]
        seen[wrong] = drawn_seen
        first = torch.where(present[wrong], drawn_seen.int().argmax(-1), 100 + empty)
        last = torch.where(present[wrong], drawn_seen.flip(-1).int().argmax(-1), 100 + empty)
        differ = torch.ones(len(wrong), dtype=torch.bool)
        for i in range(MOST):
            for j in range(i):
                differ &= (first[:, i] != first[:, j]) & (last[:, i] != last[:, j])
        wrong = wrong[~differ]
    return seen


def _along(path: Tensor, seen: Tensor, moments: Tensor) -> Tensor:
    """Centres at moments (in seconds): path ``(..., 2, 2)``, seen ``(..., 8)`` -> ``(..., T, 2)``."""
    first = seen.int().argmax(-1)[..., None]
    last = SECONDS - 1 - seen.flip(-1).int().argmax(-1)[..., None]
    share = ((moments - first - 1) / (last - first - 1).clamp(min=1)).clamp(0, 1)[..., None]
    return torch.lerp(path[..., :1, :], path[..., 1:, :], share)


def _clash(path: Tensor, seen: Tensor, side: Tensor) -> Tensor:
    """Return how far boxes overlap in seconds in which both digits are seen, in pixels: ``(n,)``."""
    centres = _along(path, seen, torch.arange(SECONDS) + 0.5)
    worst = torch.zeros(len(path))
    for i in range(MOST):
        for j in range(i):
            apart = (centres[:, i] - centres[:, j]).abs().amax(-1)
            needed = (side[:, i] + side[:, j]) * data.HALF_EXTENT
            overlap = (needed[:, None] - apart).clamp(min=0)
            both = seen[:, i] & seen[:, j]
            worst = torch.maximum(worst, (overlap * both).amax(1))
    return worst


def clips(
    n: int,
    generator: torch.Generator,
    split: data.Split = "train",
    *,
    most: int = MOST,
    box: tuple[float, float] = BOX,
) -> Clips:
    """Clips with two to ``most`` digits each.

    Args:
        n: number of clips, at least 1.
        generator: source of all randomness; the same state gives the same clips.
        split: which handwritten digits to draw from.
        most: largest number of digits in a clip, 2 or 3; each number is equally frequent.
        box: smallest and largest side of a digit's box in pixels; at most 48, so that a digit rests
            within a quadrant.

    Raises:
        ValueError: ``n``, ``split``, ``most`` or ``box`` is out of range.
        ImportError: scikit-learn is not installed.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 2 <= most <= MOST:
        raise ValueError(f"most must be 2 or {MOST}, got {most}")
    if not 8 <= box[0] <= box[1] <= _HALF:
        raise ValueError(f"box must be (low, high) with 8 <= low <= high <= {_HALF}, got {box}")
    indices = data.split_indices(split)
    number = torch.randint(2, most + 1, (n,), generator=generator)
    present = torch.arange(MOST) < number[:, None]
    digits, colours = (
        torch.rand(n, k, generator=generator).argsort(1)[:, :MOST] for k in (10, len(COLOURS))
    )
    labels = data.digit_labels()[indices]
    of_class = (labels == digits.flatten()[:, None]).float()
    glyphs = indices[torch.multinomial(of_class, 1, generator=generator)[:, 0]].view(n, MOST)
    seen = _timelines(number, generator)

    side, angle = torch.rand(2, n, MOST, generator=generator)
    side = box[0] + (box[1] - box[0]) * side
    angle = 0.3 * (angle - 0.5)
    extent = SECONDS - seen.int().argmax(-1) - seen.flip(-1).int().argmax(-1)
    margin = (side * data.HALF_EXTENT)[..., None, None]
    path = torch.zeros(n, MOST, 2, 2)
    places = torch.zeros(n, MOST, 2, dtype=torch.long)
    least = torch.full((n,), torch.inf)
    for _ in range(_TRIES):
        drawn = torch.rand(n, 4, generator=generator).argsort(1)[:, :MOST]
        step = torch.randint(1, 4, (n, MOST), generator=generator)
        moves = (torch.rand(n, MOST, generator=generator) < _MOVES) & (extent >= 3)
        tried = torch.stack([drawn, (drawn + step * moves) % 4], -1)
        corner = torch.stack([tried % 2, tried // 2], -1) * _HALF
        spread = torch.rand(n, MOST, 2, 2, generator=generator)
        spread[:, :, 1] = torch.where(moves[..., None], spread[:, :, 1], spread[:, :, 0])
        line = corner + margin + (_HALF - 2 * margin) * spread
        clash = _clash(line, seen, side)
        better = clash < least
        least = torch.where(better, clash, least)
        path[better], places[better] = line[better], tried[better]

    shade = 0.8 + 0.2 * torch.rand(n, MOST, 1, generator=generator)
    backgrounds = data.backgrounds(n, generator, brightness=0.45)
    plain = torch.rand(n, generator=generator) < _PLAIN
    one_colour = 0.45 * torch.rand(n, 3, 1, 1, generator=generator)
    backgrounds = torch.where(plain[:, None, None, None], one_colour, backgrounds)
    return Clips(
        number=number,
        digits=digits.masked_fill(~present, -1),
        colours=colours.masked_fill(~present, -1),
        seen=seen,
        places=places.masked_fill(~present[..., None], -1),
        path=path,
        shape=torch.stack([side, angle], -1),
        glyphs=glyphs,
        paint=torch.tensor(PALETTE)[colours] * shade,
        backgrounds=backgrounds.half(),
        flicker=_FLICKER * torch.rand(n, generator=generator),
    )


def reverse(batch: Clips, which: Tensor) -> Clips:
    """The batch with the clips marked in ``which``, ``(n,)`` bool, played backwards."""
    seen = torch.where(which[:, None, None], batch.seen.flip(-1), batch.seen)
    places = torch.where(which[:, None, None], batch.places.flip(-1), batch.places)
    path = torch.where(which[:, None, None, None], batch.path.flip(-2), batch.path)
    return batch._replace(seen=seen, places=places, path=path)


def masks(batch: Clips, moments: Tensor) -> Tensor:
    """Opacity of every digit at moments in seconds, ``(T,)``: ``(n, T, 3, 96, 96)`` in [0, 1]."""
    n, count = len(batch.number), len(moments)
    centres = _along(batch.path, batch.seen, moments).transpose(1, 2)  # (n, T, 3, 2)
    there = batch.seen[..., moments.long().clamp(0, SECONDS - 1)].transpose(1, 2)
    glyphs = batch.glyphs[:, None].expand(n, count, MOST)
    shape = batch.shape[:, None].expand(n, count, MOST, 2)
    out = torch.zeros(n, count, MOST, data.IMAGE, data.IMAGE)
    side, angle = shape[there].unbind(-1)
    x, y = centres[there].unbind(-1)
    out[there] = data.digit_masks(glyphs[there], x, y, side, angle)[:, 0]
    return out


def render(
    batch: Clips, moments: Tensor | Sequence[float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Frames of clips.

    Args:
        batch: n clips.
        moments: T moments in seconds, from 0 to :data:`SECONDS`.
        generator: of the sensor's noise.

    Returns:
        frames ``(n, T, 3, 96, 96)`` float32 in [0, 1], and ink ``(n, T, 144)`` float32, the share of
        each 8 x 8 patch that digits cover.

    Raises:
        ValueError: a moment is outside the clip.
    """
    at = torch.as_tensor(moments, dtype=torch.float32)
    if len(at) == 0 or at.min() < 0 or at.max() > SECONDS:
        raise ValueError(f"moments must lie between 0 and {SECONDS} seconds, got {moments}")
    opacity = masks(batch, at)
    n, count = opacity.shape[:2]
    frames = batch.backgrounds[:, None].float().expand(-1, count, -1, -1, -1)
    for slot in range(MOST):
        paint = batch.paint[:, None, slot, :, None, None]
        frames = torch.lerp(frames, paint, opacity[:, :, slot, None])
    noise = torch.randn(frames.shape, generator=generator)
    frames = (frames + noise * batch.flicker[:, None, None, None, None]).clamp(0, 1)
    covered = opacity.amax(2).view(n * count, 1, data.IMAGE, data.IMAGE)
    return frames, data.coverage(covered).view(n, count, -1)


def seconds() -> Tensor:
    """The middle of every second, ``(8,)``: the moments that the built-in model was trained on."""
    return torch.arange(SECONDS) + 0.5


def pictures(batch: Clips, generator: torch.Generator, per_second: int = 1) -> Tensor:
    """Clips as a camera stores them: ``(n, 8 * per_second, 96, 96, 3)`` uint8."""
    moments = (torch.arange(SECONDS * per_second) + 0.5) / per_second
    frames, _ = render(batch, moments, generator)
    return (frames * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


def write(
    path: str | Path,
    frames: Tensor,
    *,
    rate: int = 8,
    scale: int = 4,
    codec: str = "libx264",
    quality: int = 18,
) -> Path:
    """Write one clip as a file.

    Args:
        path: of the file; its suffix names the container (``.mp4``).
        frames: ``(T, h, w, 3)`` uint8.
        rate: frames a second.
        scale: how many pixels of the file one pixel of ``frames`` becomes, each way. A codec keeps
            colour at half the resolution, which small coloured digits would not survive.
        codec: as FFmpeg calls it.
        quality: constant rate factor of the codec; lower is better.

    Returns:
        ``path``.

    Raises:
        MissingDependencyError: PyAV is not installed.
        ValueError: ``frames`` has another shape or type.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            f"frames must be (T, h, w, 3) uint8, got {tuple(frames.shape)} {frames.dtype}"
        )
    try:
        import av
    except ImportError as error:
        raise missing("av", "video", "writing a video") from error
    large = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, options={"crf": str(quality)})
        stream.height, stream.width = large.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in large:
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


__all__ = [
    "BOX",
    "COLOURS",
    "MOST",
    "QUADRANTS",
    "SECONDS",
    "Clips",
    "clips",
    "masks",
    "pictures",
    "render",
    "reverse",
    "seconds",
    "write",
]
