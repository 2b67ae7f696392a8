"""Cut-out photographs and drawings pasted on photographs: the truth of each pixel is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from packages import folder, stamps  # beside this script
from PIL import Image
from torch import Tensor

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@dataclass(frozen=True)
class Stamp:
    """One picture: its class is the folder that holds it."""

    file: Path
    kind: str

    def cut_out(self, side: int) -> Image.Image:
        """The picture with its alpha, its longer side scaled to ``side`` pixels."""
        image = Image.open(self.file).convert("RGBA")
        image = image.crop(image.getchannel("A").getbbox())
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(size, Image.Resampling.BICUBIC)


def listed() -> list[Stamp]:
    """All pictures with something on them, in the order of their names."""
    found = [Stamp(f, f.parent.name) for f in sorted(stamps().rglob("*.png"))]
    return [s for s in found if Image.open(s.file).convert("RGBA").getchannel("A").getbbox()]


def classes(least: int) -> list[Stamp]:
    """Pictures of the classes that have ``least`` of them or more."""
    found = listed()
    counts: dict[str, int] = {}
    for stamp in found:
        counts[stamp.kind] = counts.get(stamp.kind, 0) + 1
    return [s for s in found if counts[s.kind] >= least]


def _photographs() -> list[Image.Image]:
    files = sorted((folder("foolbox") / "foolbox" / "data").glob("imagenet_*.jpg"))
    return [Image.open(f).convert("RGB") for f in files]


def normalised(image: Image.Image) -> Tensor:
    """(3, H, W) floats with the mean and deviation that the model was trained with."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
    return (pixels - MEAN) / STD


def white(stamp: Stamp, size: int) -> Image.Image:
    """A stamp in the middle of a white picture."""
    canvas = Image.new("RGB", (size, size), "white")
    cut = stamp.cut_out(size)
    canvas.paste(cut, ((size - cut.width) // 2, (size - cut.height) // 2), cut)
    return canvas


def on_white(stamp: Stamp, size: int) -> Tensor:
    """The picture of :func:`white` as the model takes it, (3, size, size)."""
    return normalised(white(stamp, size))


def on_photographs(chosen: list[Stamp], size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Paste each stamp somewhere on a piece of a photograph.

    Returns:
        Pictures (B, 3, size, size), and what the stamps cover (B, size, size) bool.
    """
    draw = np.random.default_rng(seed)
    backgrounds, pictures, covers = _photographs(), [], []
    for stamp in chosen:
        ground = backgrounds[draw.integers(len(backgrounds))]
        side = int(min(ground.size) * draw.uniform(0.5, 1.0))
        x, y = (int(draw.integers(n - side + 1)) for n in ground.size)
        canvas = ground.crop((x, y, x + side, y + side)).resize((size, size))
        cut = stamp.cut_out(int(size * draw.uniform(0.35, 0.65)))
        corner = tuple(int(draw.integers(size - n + 1)) for n in cut.size)
        canvas.paste(cut, corner, cut)
        cover = Image.new("L", (size, size), 0)
        cover.paste(cut.getchannel("A"), corner)
        pictures.append(normalised(canvas))
        covers.append(torch.from_numpy(np.asarray(cover) >= 128))
    return torch.stack(pictures), torch.stack(covers)
