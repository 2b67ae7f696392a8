"""Pictures of what a method did: which tokens lived, which were merged, which are frozen."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vtr.trace import StageRecord

if TYPE_CHECKING:
    from PIL import Image

DIM = 0.22  # brightness of a dropped token
HATCHED = 0.5
MERGED, TINT = 0.5, 0.28  # merged tokens stand back behind those that are still themselves


def draw(
    what: Any,
    image: Any = None,
    *,
    sample: int = 0,
    panels: int = 6,
    size: int = 288,
    show_input: bool = True,
) -> Image.Image:
    """Draw the last call of a wrapped model, one panel per stage, or a block mask.

    Kept tokens are bright, dropped ones dark, merged ones outlined and tinted in the colour of their
    group, frozen ones hatched. Every panel shows the state after its stage, on the model's input.

    Args:
        what: a handle, a trace, or a block mask of :mod:`vtr.kernels`.
        image: the picture that the model saw: a PIL image, an (H, W, 3) array, a (3, H, W) tensor or
            a (B, 3, H, W) batch of them; uint8, or floats that are scaled to their own range if they
            leave [0, 1]. None draws on grey.
        sample: which one of the batch.
        panels: draw at most so many stages, evenly chosen, the last one among them.
        size: pixels per side of a panel.
        show_input: begin with a panel of the picture itself (where there is one).

    Raises:
        ValueError: nothing was reduced yet, ``sample`` is out of range, the grid is not known (several
            images in one prompt, packed crops, frames), or ``image`` is no picture.
    """
    if hasattr(what, "picture"):
        return what.picture()
    trace = getattr(what, "trace", what)
    stages: list[StageRecord] = list(getattr(trace, "stages", ()))
    if not stages:
        raise ValueError("nothing to draw: no reduction took place (call the wrapped model first)")
    if not 0 <= sample < stages[0].total.batch:
        raise ValueError(f"sample must be in 0..{stages[0].total.batch - 1}, got {sample}")
    for name, value in (("panels", panels), ("size", size)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if len(stages) > panels:
        chosen = np.unique(np.linspace(len(stages) - 1, 0, panels).round().astype(int))
        stages = [stages[i] for i in chosen]
    if isinstance(image, Tensor) and image.dim() == 4:
        if image.shape[0] != stages[0].total.batch:
            raise ValueError(
                f"image is a batch of {image.shape[0]}, the call had {stages[0].total.batch} samples: "
                "give the one picture"
            )
        image = image[sample]
    drawn = [_panel(stage, image, sample, size) for stage in stages]
    if image is not None and show_input:
        drawn.insert(0, _titled(_canvas(image, size), "input"))
    return row(drawn)


def _panel(stage: StageRecord, image: Any, sample: int, size: int) -> Image.Image:
    from PIL import Image, ImageDraw

    grid = stage.grid_of(sample)
    if grid is None or len(grid) != 2:
        raise ValueError(
            f"the grid of {stage.total.n_in} tokens of sample {sample} at {stage.site}[{stage.layer}] is "
            "not a known rectangle; draw needs height x width tokens (in a vision-language model: one "
            "image in the prompt, whose crops are not packed together)"
        )
    rows, columns = grid
    pixels = _canvas(image, size)
    # Samples with fewer tokens than others of the batch are padded at the end.
    n = rows * columns
    source = stage.total.source[sample, :n].cpu()
    kept = stage.total.kept[sample].cpu()
    sizes = stage.total.size[sample].cpu()
    frozen = stage.total.frozen
    cold = (
        torch.zeros_like(source, dtype=torch.bool) if frozen is None else frozen[sample, :n].cpu()
    )
    grouped = (source >= 0) & (sizes[source.clamp(min=0)] > 1)
    bright = np.where((source >= 0).numpy(), 1.0, np.where(cold.numpy(), HATCHED, DIM))
    y = np.minimum(np.arange(size) * rows // size, rows - 1)
    x = np.minimum(np.arange(size) * columns // size, columns - 1)
    cell = y[:, None] * columns + x[None]
    out = pixels * bright[cell][..., None]
    stripes = (np.arange(size)[:, None] + np.arange(size)[None]) % 8 < 2
    out[stripes & cold.numpy()[cell]] = 0.75
    # A group is named by its representative, so that it keeps its colour while that stays the same.
    name = kept[source.clamp(min=0)]
    colours = np.array([_colour(int(g)) for g in name])
    tint = grouped.numpy()[cell]
    out[tint] = MERGED * out[tint] + TINT * colours[cell][tint]
    panel = Image.fromarray((out.clip(0, 1) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(panel)
    group = torch.where(grouped, name, -1).reshape(rows, columns)
    for r in range(rows):
        for c in range(columns):
            if group[r, c] < 0:
                continue
            ink = tuple(int(255 * v) for v in _colour(int(group[r, c])))
            left, top = c * size // columns, r * size // rows
            right, bottom = (c + 1) * size // columns - 1, (r + 1) * size // rows - 1
            edges = (
                (r, c - 1, (left, top, left, bottom)),
                (r, c + 1, (right, top, right, bottom)),
                (r - 1, c, (left, top, right, top)),
                (r + 1, c, (left, bottom, right, bottom)),
            )
            for nr, nc, line in edges:
                inside = 0 <= nr < rows and 0 <= nc < columns
                if not inside or group[nr, nc] != group[r, c]:
                    pen.line(line, fill=ink, width=2)
    alive = int(stage.total.valid[sample].sum())
    return _titled(
        panel, f"{stage.method}, {stage.site} {stage.layer}: {alive} of {rows * columns}"
    )


def _canvas(image: Any, size: int) -> np.ndarray:
    """(size, size, 3) float in [0, 1]."""
    from PIL import Image

    if image is None:
        return np.full((size, size, 3), 0.7)
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        pixels = pixels.float() if pixels.is_floating_point() else pixels
        array = pixels.permute(1, 2, 0).numpy() if pixels.shape[0] in (1, 3) else pixels.numpy()
    else:
        array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.dtype.kind not in "buif" or array.shape[-1] not in (1, 3, 4):
        raise ValueError(
            "image must be a PIL image, an (H, W, 3) array or a (3, H, W) tensor, got "
            + (f"shape {tuple(array.shape)}" if array.ndim else repr(image))
        )
    if array.shape[-1] == 1:
        array = array.repeat(3, -1)
    array = array[..., :3]
    if array.dtype == np.uint8:
        array = array / 255.0
    elif array.min() < 0 or array.max() > 1:
        array = (array - array.min()) / max(float(array.max() - array.min()), 1e-6)
    picture = Image.fromarray((array * 255).clip(0, 255).astype(np.uint8))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) / 255.0


def _colour(group: int) -> tuple[float, float, float]:
    """Neighbouring groups differ: the golden ratio walks round the colour circle."""
    return colorsys.hsv_to_rgb((group * 0.618034) % 1.0, 0.85, 1.0)


def _titled(picture: Any, title: str) -> Image.Image:
    from PIL import Image, ImageDraw, ImageFont

    if isinstance(picture, np.ndarray):
        picture = Image.fromarray((picture * 255).astype(np.uint8))
    out = Image.new("RGB", (picture.width, picture.height + 24), "white")
    out.paste(picture, (0, 24))
    points = 14.0
    while points > 7 and ImageFont.load_default(points).getlength(title) > picture.width - 4:
        points -= 0.5
    ImageDraw.Draw(out).text((2, 4), title, fill="black", font=ImageFont.load_default(points))
    return out


def row(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures beside each other."""
    from PIL import Image

    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    out = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        out.paste(picture, (left, 0))
        left += picture.width + gap
    return out


def stack(pictures: Sequence[Image.Image], gap: int = 10) -> Image.Image:
    """Pictures below each other, for a sheet that compares methods."""
    from PIL import Image

    height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    out = Image.new("RGB", (max(p.width for p in pictures), height), "white")
    top = 0
    for picture in pictures:
        out.paste(picture, (0, top))
        top += picture.height + gap
    return out
