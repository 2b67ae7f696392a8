"""Pictures or a clip that a model is shown: uploaded, or one of the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

SAMPLES = 6
"""Samples of each built-in model."""
SEED = 11


@dataclass(frozen=True, eq=False)
class Shown:
    """Pictures or a clip.

    Attributes:
        pictures: PIL images in RGB.
        clip: the bytes of a video file, or a :class:`vtr.video.Video`; None for pictures.
        names: of the uploaded files.
        sample: (model, number) of a sample; None for uploads.
        text: the question about a sample, or the prompt.
        answer: the right one, if it is known.
        seconds: that reading a clip may take.
        found: results of the dense model, which do not depend on methods (see :meth:`remembered`).
    """

    pictures: tuple[Any, ...] = ()
    clip: Any = None
    names: tuple[str, ...] = ()
    sample: tuple[str, int] | None = None
    text: str = ""
    answer: str = ""
    seconds: float = 600.0
    found: dict[tuple[str, ...], Any] = field(default_factory=dict, repr=False)

    def remembered(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned for ``key`` before, or call it; the last 8 results are kept."""
        if key not in self.found:
            self.found[key] = make()
            while len(self.found) > 8:
                del self.found[next(iter(self.found))]
        return self.found[key]

    def video(self, frames: int) -> Any:
        """Return the clip as a :class:`vtr.video.Video` of at most ``frames`` frames.

        Raises:
            ValueError: it cannot be read.
        """
        if not isinstance(self.clip, bytes):
            return self.clip
        from vtr.video import VideoError, load

        try:
            return load(self.clip, frames, time_limit=self.seconds, memory_limit=2**31)
        except VideoError as error:
            raise ValueError(f"{self.names[0]} cannot be read: {error}") from error

    def thumbnails(self, most: int = 12, side: int = 160) -> list[Any]:
        """Return small PIL images of the pictures, or of frames of the clip."""
        from PIL import Image

        if self.clip is None:
            found = list(self.pictures)
        else:
            frames = self.video(8).frames
            found = [Image.fromarray(frame) for frame in frames]
        small = []
        for picture in found[:most]:
            copy = picture.copy()
            copy.thumbnail((side, side))
            small.append(copy)
        return small


@lru_cache(maxsize=64)
def sample(model: str, number: int = 0) -> Shown:
    """Return a sample of a built-in model: held-out data that it was not trained on.

    Args:
        model: ``"digits-vit"``, ``"digits-llava"``, ``"digits-chat"``, ``"digits-video"``, ``"digits-long"`` or
            ``"digits-wan"``. Other models get the pictures of ``"digits-llava"`` without the question.
        number: 0-based, below :data:`SAMPLES`.

    Raises:
        ValueError: there is no such sample.
    """
    if not 0 <= number < SAMPLES:
        raise ValueError(f"number must be in 0..{SAMPLES - 1}, got {number}")
    key: dict[str, Any] = {"sample": (model, number)}
    if model == "digits-vit":
        picture, label = _digits()[number]
        return Shown(pictures=(picture,), answer=str(label), **key)
    if model == "digits-wan":
        from vtr.zoo.videos import DIRECTIONS, fitting
        from vtr.zoo.wan import FRAMES, HEIGHT, WIDTH

        ways = fitting(FRAMES, HEIGHT, WIDTH)
        way = DIRECTIONS[ways[number % len(ways)]]
        return Shown(text=f"a {(3 * number + 7) % 10} moving {way}", **key)
    if model == "digits-chat":
        from vtr.zoo import chat_qa

        chat = chat_qa(SAMPLES, "pictures", seed=SEED)[number]
        turn = chat.turns[0]
        return Shown(_pil(chat.pictures), text=turn.question, answer=turn.answer, **key)
    if model in ("digits-video", "digits-long"):
        clip = _clips(model)[number]
        return Shown(clip=_video(clip.frames), text=clip.question, answer=clip.answer, **key)
    found = _questions()[number]
    known = {"text": found.question, "answer": found.answer} if model == "digits-llava" else {}
    return Shown(pictures=(found.image.convert("RGB"),), **known, **key)


@lru_cache(maxsize=1)
def _questions() -> list[Any]:
    """Questions about light pictures, on which the eye can see what tokens show."""
    from PIL import ImageStat

    from vtr.zoo import vqa

    def plain(found: Any) -> float:
        stat = ImageStat.Stat(found.image.convert("RGB").resize((12, 12)))
        return -sum(stat.mean) - sum(stat.stddev)

    return sorted(vqa(60, seed=SEED), key=plain)[:SAMPLES]


@lru_cache(maxsize=1)
def _digits() -> list[tuple[Any, int]]:
    """Colourful pictures, on which the eye can see what tokens show, with the class of the digit."""
    import torch

    from vtr.zoo import data, samples

    pixels, labels = samples("digits-vit", 60, seed=SEED)
    views = data.denormalise(pixels)
    blurred = torch.nn.functional.avg_pool2d(views, 8)
    colour = blurred.std(1).mean((1, 2)) + blurred.mean(1).std((1, 2)) + blurred.mean((1, 2, 3))
    light = colour.argsort(descending=True)[:SAMPLES]
    whole = (views[light].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return list(zip(_pil(whole), labels[light].tolist(), strict=True))


@lru_cache(maxsize=2)
def _clips(model: str) -> list[Any]:
    from vtr.zoo import slides_qa, video_qa

    if model == "digits-long":
        return slides_qa(SAMPLES, seed=SEED)
    every = video_qa(7 * SAMPLES, seed=SEED)  # seven questions about each clip
    return [every[8 * n % len(every)] for n in range(SAMPLES)]


def _pil(pictures: Any) -> tuple[Any, ...]:
    """(N, H, W, 3) uint8 as PIL images."""
    from PIL import Image

    return tuple(Image.fromarray(picture.numpy()) for picture in pictures)


def _video(frames: Any) -> Any:
    """(T, H, W, 3) uint8, one frame a second, as a :class:`vtr.video.Video`."""
    import numpy as np

    from vtr.video import Video, VideoMetadata

    count, height, width = frames.shape[:3]
    facts = VideoMetadata("a sample", "", "", width, height, 0, count, float(count), 1.0, False)
    return Video(
        frames=frames.numpy(),
        timestamps=np.arange(count, dtype=np.float64),
        indices=np.arange(count),
        metadata=facts,
    )
