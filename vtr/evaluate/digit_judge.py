"""Judge of generated moving digits: reads the digit and its direction.

The digit of a frame is read by a support vector machine (scikit-learn's ``SVC``) that was fitted on
the training digits, on the 8 x 8 window with the most ink; the digit of a video is the majority of
its frames. The direction is that of the centre of mass from the first frame to the last.
Both are wrong at times: :func:`accuracy` measures how often, on real videos of held-out digits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.zoo.data import scikit_learn
from vtr.zoo.videos import GLYPH, SPEED, STEPS, Videos, glyphs, videos

# A generated background is not exactly black. Unless it is set to black, faint noise decides between
# windows that hold the same digit, and the classifier sees shifted ones.
BLACK = 0.15


class Verdict(NamedTuple):
    """The verdict on generated videos, as shares in [0, 1] over all of them.

    Attributes:
        digit: the majority of a video's frames shows the digit asked for.
        per_frame: frames that show it.
        agreement: frames that show what the majority of their video shows.
        direction: the way is in the direction asked for, of the four.
        halfway: it is, and is more than half as long as it should be.
    """

    digit: float
    per_frame: float
    agreement: float
    direction: float
    halfway: float


def windows(frames: Tensor) -> Tensor:
    """The 8 x 8 window with the most ink of each frame.

    Args:
        frames: ``(n, height, width)`` in [0, 1].

    Returns:
        ``(n, 64)`` in [0, 1].
    """
    ink = torch.where(frames < BLACK, 0.0, frames)[:, None]
    best = F.avg_pool2d(ink, GLYPH, 1).flatten(1).argmax(1)
    found: Tensor = F.unfold(ink, GLYPH).transpose(1, 2)[torch.arange(len(best)), best]
    return found


@lru_cache(maxsize=1)
def classifier() -> Any:
    """The fitted ``SVC``. Shifted by a pixel each way as well, since a window may be off by one.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    scikit_learn()
    from sklearn.svm import SVC

    images, labels = glyphs("train")
    wide = F.pad(images, (4, 4, 4, 4))
    shifts = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    moved = [wide[:, 4 + y : 4 + y + GLYPH, 4 + x : 4 + x + GLYPH].flatten(1) for y, x in shifts]
    samples = torch.cat([windows(wide), *moved])
    return SVC(C=5).fit(samples.numpy(), labels.repeat(len(moved) + 1).numpy())


def read(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Digit of every frame, ``(n, frames)``, and of every video, ``(n,)``, both int64.

    Args:
        pixels: ``(n, 1, frames, height, width)`` in [-1, 1].
    """
    grey = grey_levels(pixels)
    n, frames, height, width = grey.shape
    said = classifier().predict(windows(grey.reshape(-1, height, width)).numpy())
    of_frames = torch.as_tensor(said).view(n, frames)
    votes = F.one_hot(of_frames, 10).sum(1)
    return of_frames, votes.argmax(1)


def way(pixels: Tensor) -> Tensor:
    """Way of the centre of mass from the first frame to the last, ``(n, 2)``: x and y in pixels."""
    ink = (grey_levels(pixels) - BLACK).clamp(min=0) + 1e-6
    mass = ink.sum((2, 3))
    x = (ink.sum(2) * torch.arange(ink.shape[3])).sum(-1) / mass
    y = (ink.sum(3) * torch.arange(ink.shape[2])).sum(-1) / mass
    centre = torch.stack([x, y], -1)
    return centre[:, -1] - centre[:, 0]


def judge(pixels: Tensor, digits: Tensor, directions: Tensor) -> Verdict:
    """Compare videos with what was asked for.

    Args:
        pixels: ``(n, 1, frames, height, width)`` in [-1, 1], at least two frames.
        digits: ``(n,)`` int64.
        directions: ``(n,)`` int64.

    Raises:
        ValueError: there is one frame only, which has no direction.
    """
    if pixels.shape[2] < 2:
        raise ValueError("a direction needs at least two frames")
    of_frames, of_videos = read(pixels)
    along = way(pixels) @ STEPS.float().T
    asked = along.gather(1, directions[:, None])[:, 0]
    right = along.argmax(1) == directions
    half = SPEED * (pixels.shape[2] - 1) / 2
    share = lambda hits: hits.float().mean().item()  # noqa: E731
    return Verdict(
        digit=share(of_videos == digits),
        per_frame=share(of_frames == digits[:, None]),
        agreement=share(of_frames == of_videos[:, None]),
        direction=share(right),
        halfway=share(right & (asked > half)),
    )


def accuracy(
    n: int = 720, seed: int = 0, frames: int = 5, height: int = 16, width: int = 32
) -> Verdict:
    """Judge real videos of held-out digits: one minus the judge's own mistakes."""
    real: Videos = videos(
        n, torch.Generator().manual_seed(seed), frames, height, width, split="heldout"
    )
    return judge(real.pixels, real.digits, real.directions)


def grey_levels(pixels: Tensor) -> Tensor:
    """``(n, 1, frames, height, width)`` in about [-1, 1] to ``(n, frames, height, width)`` float32
    in [0, 1], on the CPU."""
    return ((pixels[:, 0].float().cpu() + 1) / 2).clamp(0, 1)
