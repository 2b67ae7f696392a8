"""Maps of words drawn over pictures and frames."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vtr.inspect.drawing import row, stack, titled

LEAST = 128  # pixels, height of a panel at least: small pictures are enlarged by a whole factor
TOKEN = 16  # pixels of a token on grey
ANIMATIONS = (".gif", ".webp", ".apng")
FRAMES = 8  # of a sheet at most
# From dark blue over red to light yellow, equal steps of lightness: readable without colour vision.
COLOURS = np.array(
    [(20, 11, 53), (87, 16, 110), (148, 38, 103), (207, 68, 70), (243, 120, 25), (251, 182, 26),
     (252, 255, 164)]
)  # fmt: skip


def pictures(images: Any, sample: int, video: bool) -> list[Image.Image]:
    """The frames of one sample of what a pipeline returned: PIL, arrays or tensors in [0, 1].

    Args:
        images: (B) PIL, (B, H, W, 3) or (B, 3, H, W), each with frames behind B for videos.
        sample: number of the sample.
        video: there are frames.
    """
    one = images[sample]
    frames = list(one) if video else [one]
    return [frame if isinstance(frame, Image.Image) else _picture(frame) for frame in frames]


def _picture(pixels: Any) -> Image.Image:
    if isinstance(pixels, Tensor):
        pixels = pixels.detach().float().cpu().permute(1, 2, 0).numpy()
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8:
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[..., :3].repeat(3 // min(pixels.shape[-1], 3), -1))


def coloured(values: np.ndarray) -> np.ndarray:
    """Colours (..., 3) in [0, 255] of values in [0, 1]."""
    place = values.clip(0, 1) * (len(COLOURS) - 1)
    low = np.minimum(place.astype(int), len(COLOURS) - 2)
    part = (place - low)[..., None]
    return COLOURS[low] * (1 - part) + COLOURS[low + 1] * part


def frame_of(number: int, pictures: int, frames: int) -> int:
    """The frame of tokens that has picture ``number`` of a video.

    Video autoencoders encode the first picture alone if (pictures - 1) divides by (frames - 1), and equal
    parts otherwise.
    """
    if frames > 1 and (pictures - 1) % (frames - 1) == 0:
        return -(-number * (frames - 1) // (pictures - 1))
    return number * frames // pictures


def overlays(
    maps: Mapping[str, Tensor], frames: list[Image.Image] | None, strength: float
) -> list[Image.Image]:
    """Draw maps over each frame, a titled panel for each word.

    Args:
        maps: word to (F, H, W) in [0, 1].
        frames: the pictures; None draws on grey.
        strength: opacity of the colour where a map is 1; it falls with the map.
    """
    count, height, width = next(iter(maps.values())).shape
    if frames is None:
        frames = [Image.new("RGB", (width * TOKEN, height * TOKEN), (128, 128, 128))] * count
    drawn = []
    for number, frame in enumerate(frames):
        factor = -(-LEAST // frame.height) if frame.height < LEAST else 1
        size = (frame.width * factor, frame.height * factor)
        under = np.asarray(frame.convert("RGB").resize(size, Image.Resampling.NEAREST), dtype=float)
        panels = []
        for word, values in maps.items():
            one = values[frame_of(number, len(frames), count)].float().numpy()
            large = Image.fromarray(one).resize(size, Image.Resampling.BILINEAR)
            value = np.asarray(large)
            alpha = (strength * value.clip(0, 1))[..., None]
            mixed = under * (1 - alpha) + coloured(value) * alpha
            panels.append(titled(Image.fromarray(mixed.round().astype(np.uint8)), word))
        drawn.append(row(panels))
    return drawn


def checked(path: Path) -> Path:
    """The path, of which Pillow knows the suffix.

    Raises:
        ValueError: it does not.
    """
    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(
            f"{path}: name a picture (.png, .jpg) or an animation ({', '.join(ANIMATIONS)})"
        )
    return path


def animate(path: Path, frames: list[Image.Image], fps: float) -> None:
    """Write an animation."""
    frames[0].save(
        path, "PNG" if path.suffix.lower() == ".apng" else None, save_all=True,
        append_images=frames[1:], duration=round(1000 / fps), loop=0,
    )  # fmt: skip


def sheet(videos: list[list[Image.Image]]) -> Image.Image:
    """Join videos below each other, at most :data:`FRAMES` frames of each, evenly chosen."""
    count = len(videos[0])
    chosen = [round(n) for n in np.linspace(0, count - 1, min(FRAMES, count))]
    return stack([row([_small(video[n]) for n in chosen]) for video in videos])


def _small(frame: Image.Image) -> Image.Image:
    most = LEAST + 24  # with its title
    if frame.height <= most:
        return frame
    return frame.resize((max(1, round(frame.width * most / frame.height)), most))
