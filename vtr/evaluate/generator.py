"""The built-in generator, dense and with sparse attention: its videos and their quality."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtr.api import apply
from vtr.core.method import Method
from vtr.evaluate.digit_judge import grey_levels, judge
from vtr.zoo.videos import DIRECTIONS, fitting

SEED = 3
BATCH = 20


def asked(n: int, frames: int = 5, height: int = 16, width: int = 32) -> tuple[Tensor, Tensor]:
    """Digits and directions of ``n`` prompts, each ``(n,)`` int64; every pair as often as another."""
    possible = torch.tensor(fitting(frames, height, width))
    index = torch.arange(n)
    return index % 10, possible[(index // 10 + index) % len(possible)]


def generate(
    pipe: Any,
    digits: Tensor,
    directions: Tensor,
    seed: int = SEED,
    *,
    steps: int | None = None,
    frames: int = 5,
    tick: Callable[[], object] = lambda: None,
) -> Tensor:
    """One video for each prompt, ``(n, 1, frames, 16, 32)`` float32 in about [-1, 1].

    The noise depends on the seed and the place of a prompt in the list only.
    """
    options: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    found = []
    for start in range(0, len(digits), BATCH):
        pairs = zip(digits[start : start + BATCH], directions[start : start + BATCH], strict=True)
        out = pipe(
            [f"a {int(digit)} moving {DIRECTIONS[int(way)]}" for digit, way in pairs],
            num_frames=frames,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="latent",
            **options,
        )
        found.append(out.frames.float())
        tick()
    return torch.cat(found)


def psnr(videos: Tensor, reference: Tensor) -> float:
    """Mean over videos of the peak signal-to-noise ratio in dB, pixels in [0, 1]; at most 90."""
    difference = grey_levels(videos) - grey_levels(reference)
    error = difference.square().mean((1, 2, 3)).clamp(min=1e-9)
    return float((-10 * error.log10()).mean())


def density_of(handle: Any) -> float:
    """Mean density of the sparse calls that a handle saw."""
    notes = handle.trace.notes.get("attention", {})
    seen = [entry["density"] for entry in notes.values() if "density" in entry]
    return float(sum(seen) / len(seen)) if seen else 1.0


def measure(
    pipe: Any,
    method: Method | None,
    n: int,
    reference: Tensor | None,
    *,
    seed: int = SEED,
    steps: int | None = None,
    frames: int = 5,
    tick: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Any], Tensor]:
    """A row of the comparison and the videos it is about.

    Returns:
        the row: the fields of :class:`vtr.evaluate.digit_judge.Verdict`, ``density`` of the sparse calls,
        ``work``, the part of dense attention that the last batch's whole run computed, ``psnr`` to ``reference`` in dB, ``seconds`` of the calling thread's processor time per
        video (all of the work where torch has one thread); and the videos.
    """
    digits, directions = asked(n, frames)
    options: dict[str, Any] = {"seed": seed, "steps": steps, "frames": frames, "tick": tick}
    start = time.thread_time()
    density = work = 1.0
    if method is None:
        videos = generate(pipe, digits, directions, **options)
    else:
        with apply(pipe, method) as handle:
            videos = generate(pipe, digits, directions, **options)
            density = density_of(handle)
            whole, done = handle.report().flops["attention, this run"]
            work = done / whole
    seconds = (time.thread_time() - start) / n
    verdict = judge(videos, digits, directions)
    row = {
        "density": round(density, 3),
        "work": round(work, 3),
        **{key: round(value, 3) for key, value in verdict._asdict().items()},
        "psnr": None if reference is None else round(psnr(videos, reference), 2),
        "seconds": round(seconds, 3),
    }
    return row, videos


def strip(videos: Tensor, scale: int = 3) -> np.ndarray:
    """Frames of videos side by side, ``(height, width)`` uint8: ``videos`` is ``(n, 1, F, H, W)``."""
    grey = (grey_levels(videos) * 255).round().byte().numpy()
    frames = grey.reshape(-1, *grey.shape[-2:])
    framed = np.pad(frames, ((0, 0), (1, 1), (1, 1)), constant_values=90)
    return np.concatenate(list(framed.repeat(scale, 1).repeat(scale, 2)), 1)


def sheet(strips: list[tuple[str, np.ndarray]], margin: int = 170) -> Any:
    """Strips with their names at the left, a PIL image."""
    from PIL import Image, ImageDraw

    height = sum(picture.shape[0] + 4 for _, picture in strips)
    width = margin + max(picture.shape[1] for _, picture in strips)
    image = Image.new("RGB", (width, height), (32, 32, 32))
    draw = ImageDraw.Draw(image)
    top = 0
    for name, picture in strips:
        draw.text((6, top + picture.shape[0] // 2 - 6), name, fill=(230, 230, 230))
        image.paste(Image.fromarray(picture).convert("RGB"), (margin, top))
        top += picture.shape[0] + 4
    return image
