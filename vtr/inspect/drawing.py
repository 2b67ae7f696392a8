"""Pictures of what a method did: which tokens are left, which were merged, which are frozen."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vtr.core.trace import StageRecord, Trace
from vtr.inspect.drawing_cells import Picture, pictures_of
from vtr.inspect.drawing_masks import mask_of, paint, strip_of

if TYPE_CHECKING:
    from PIL import Image

DIM = 0.22  # brightness of a dropped token
HATCHED = 0.5
NOTHING = "no reduction took place (call the wrapped model first)"
KEPT_NO_MASK = (
    "no attention layer kept a mask: all of them were dense in the last call, or the method makes its "
    "masks anew in every call (handle.trace.summary() has the density of each layer)"
)
MERGED, TINT = 0.5, 0.28  # merged tokens are drawn weaker than those that are still themselves


def draw(
    what: Any,
    image: Any = None,
    *,
    sample: int = 0,
    which: int | None = None,
    panels: int = 6,
    size: int | None = None,
    columns: int = 8,
    show_input: bool = True,
    heads: Sequence[int] | None = None,
) -> Image.Image:
    """Draw the last call of a wrapped model, one panel per stage, or a block mask.

    Kept tokens are bright, dropped ones dark, merged ones outlined and tinted in the colour of their
    group, frozen ones hatched. Every panel shows the state after its stage, on the model's input. A
    video becomes a contact sheet: one small panel per frame, and one block of them per stage; a group
    that was merged over time has one colour in all its frames.

    If an image has no single grid, its parts are drawn: LLaVA-NeXT's and LLaVA-OneVision's base
    crop and their joined crops, InternVL's tiles and their thumbnail. Tiles are drawn on ``image`` in
    the rows that fit its shape best, as the processor chose them; without an image, or if they may
    be of several images (Idefics3, SmolVLM), they are drawn beside each other on grey, in their order.

    A diffusion transformer whose tokens were merged shows them in its grid, on grey; one with sparse
    attention shows the mask of each layer: queries down, keys across, dark for blocks that are
    computed in full, light for partial ones.

    A language model with sparse attention shows its masks likewise. The strips above and on the left
    of a map show what the tokens are: text is orange, frames alternate in grey, and lines separate them if there
    is room. Blocks that only some heads see are drawn as light as their share; ``heads`` draws heads
    one by one. If tokens were cut between layers as well, the cuts are drawn, and with ``heads`` the masks.

    Args:
        what: a handle, a trace, or a block mask of :mod:`vtr.kernels`.
        image: the picture that the model saw: a PIL image, an (H, W, 3) array, a (3, H, W) tensor or
            a (B, 3, H, W) batch of them; uint8, or floats that are scaled to their own range if they
            leave [0, 1]. For a video the frames that the model saw: a (T, H, W, 3) uint8 array or
            tensor, or a :class:`vtr.video.Video`; if the model turns several frames into one
            (Qwen's temporal patches), the first of them is shown. None draws on grey.
        sample: number of the sample in the batch (sparse attention: all share a mask, unless each has one).
        which: number of the image or video of the sample, counted through the prompt; needed if the
            sample has several.
        panels: draw at most this many stages (or different masks), evenly chosen, including the last one.
        size: pixels per side of a panel; None is 288 for a picture and 112 for a frame.
        columns: frames beside each other.
        show_input: begin with a panel of the picture itself (if there is one).
        heads: query heads whose masks are drawn, each in a row; None draws the mean over all heads.

    Raises:
        ValueError: nothing was reduced yet, ``sample`` or ``which`` is out of range, the grid is not known,
            ``image`` is no picture, or the frames are not those that the model saw.
    """
    if hasattr(what, "picture"):
        return what.picture()
    trace = getattr(what, "trace", what)
    if not isinstance(trace, Trace):
        raise ValueError(
            f"draw takes a handle, a trace or a block mask, got a {type(what).__name__}"
        )
    stages = list(trace.stages)
    for name, value in (("panels", panels), ("size", size), ("columns", columns)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not stages or heads is not None:
        return _masks(trace, sample, heads, panels, size or 288)
    frames = _frames(image)
    wants = None if image is None else "image" if frames is None else "video"
    stages = _of_prompts(stages, which)
    samples = max(stage.total.batch for stage in stages)
    if not 0 <= sample < samples:
        raise ValueError(f"sample must be in 0..{samples - 1}, got {sample}")
    if isinstance(image, Tensor) and image.dim() == 4 and frames is None:
        if image.shape[0] != samples:
            raise ValueError(
                f"image is a batch of {image.shape[0]}, the call had {samples} samples: "
                "give the one picture"
            )
        image = image[sample]
    shape = None if image is None or frames is not None else _pixels(image).shape
    pictures = [(stage, pictures_of(stage, sample, which, wants, shape)) for stage in stages]
    pictures = _chosen(pictures, panels)
    if len(pictures[0][1][0].cells) > 1 or frames is not None:
        return _sheet(pictures, frames, sample, size or 112, columns, show_input)
    size = size or 288
    pixels, grey = _canvas(image, size), _canvas(None, size)
    drawn = []
    for stage, parts in pictures:
        for part in parts:
            on = pixels if part.whole else grey
            panel, alive = _paint(stage, sample, part.cells[0], part.grid, on)
            title = f"{stage.method}, {stage.site} {stage.layer}: {alive} of {part.tokens}"
            drawn.append(titled(panel, f"{part.name}, {title}" if part.name else title))
    if image is not None and show_input:
        drawn.insert(0, titled(pixels, "input"))
    return row(drawn)


def _of_prompts(stages: list[StageRecord], which: int | None) -> list[StageRecord]:
    """Stages whose samples are those of the prompt.

    A tower counts crops or frames. They are the samples if each has one image of one crop; else the
    first stage in the prompt shows what the tower has cut.
    """
    known = [stage for stage in stages if stage.frames is not None]
    if not known or which is not None:
        return known or stages
    samples, spans = known[0].total.batch, known[0].frames.videos  # type: ignore[union-attr]
    plain = all(len(s) == 1 and s[0].grid is not None and s[0].frames == 1 for s in spans)
    return [s for s in stages if s.frames is not None or (plain and s.total.batch == samples)]


def _frames(image: Any) -> np.ndarray | None:
    """Convert the given picture to (T, H, W, 3) uint8 if it is a video."""
    image = getattr(image, "frames", image)
    if not isinstance(image, (np.ndarray, Tensor)) or image.ndim != 4 or image.shape[-1] != 3:
        return None
    if isinstance(image, Tensor):
        if image.shape[1] == 3:
            return None
        image = image.detach().cpu().numpy()
    if image.dtype != np.uint8:
        raise ValueError(
            f"frames must be (T, H, W, 3) uint8, as vtr.video.load makes them, got {image.dtype}"
        )
    return image


def _chosen(stages: list[Any], number: int) -> list[Any]:
    if len(stages) <= number:
        return stages
    order = np.unique(np.linspace(len(stages) - 1, 0, number).round().astype(int))
    return [stages[i] for i in order]


def _masks(
    trace: Trace, sample: int, heads: Sequence[int] | None, panels: int, size: int
) -> Image.Image:
    """Draw the masks of sparse attention, one panel for all layers that share one; one row for each of
    the heads."""
    layers = trace.notes.get("attention", {})
    groups: dict[int, tuple[Any, list[int]]] = {}
    for layer, note in layers.items():
        if note.get("mask") is not None:
            groups.setdefault(id(note["mask"]), (note, []))[1].append(layer)
    if not groups:
        what = KEPT_NO_MASK if layers else NOTHING
        raise ValueError(f"nothing to draw: {what}")
    chosen = _chosen(list(groups.values()), panels)
    lines = []
    for head in [None] if heads is None else heads:
        drawn = []
        for note, names in chosen:
            mask, number = mask_of(note, sample)
            own = mask.pattern.shape[1]
            if head is not None and (head < 0 or 1 < own <= head):
                raise ValueError(f"heads must be in 0..{own - 1} in layer {names[0]}, got {head}")
            strip = strip_of(trace, names[0], sample)
            these = range(own) if head is None else [head]
            picture = paint(mask, number, these, size, strip)
            run = len(names) > 1 and names == [*range(names[0], names[-1] + 1)]
            where = f"{names[0]}..{names[-1]}" if run else ", ".join(map(str, names))
            which = "" if head is None else f", head {head}"
            share = 100 * float(note.get("density", 1.0))
            pairs = "the pairs" if strip is None else "the causal pairs"
            title = f"attention {where}{which}: {share:.1f} % of {pairs}"
            drawn.append(titled(picture, title))
        lines.append(row(drawn))
    return stack(lines)


def _sheet(
    pictures: list[tuple[StageRecord, list[Picture]]],
    frames: np.ndarray | None,
    sample: int,
    size: int,
    columns: int,
    show_input: bool,
) -> Image.Image:
    """Draw a block of frames for the input, and one per stage."""
    number = len(pictures[0][1][0].cells)
    if frames is None:
        canvas = [_canvas(None, size)] * number
    else:
        step = -(-len(frames) // number)
        if step > 4 or -(-len(frames) // step) != number:
            raise ValueError(
                f"image has {len(frames)} frames, the model saw {number} (or a fixed number of frames "
                "for each of them): give the frames that its processor sampled"
            )
        canvas = [_canvas(frame, size) for frame in frames[::step]]
    blocks = []
    if frames is not None and show_input:
        blocks.append(titled(_lines([_image(c) for c in canvas], columns), "input"))
    for stage, (part, *_) in pictures:
        drawn, total = [], 0
        for i, (cells, pixels) in enumerate(zip(part.cells, canvas, strict=True)):
            panel, alive = _paint(stage, sample, cells, part.grid, pixels)
            total += alive
            at = f"frame {i}" if part.times is None else f"{part.times[i]:.1f} s"
            drawn.append(titled(panel, f"{at}: {alive}", 16, 11.0))
        title = f"{stage.method}, {stage.site} {stage.layer}: {total} of {part.cells.numel()}"
        blocks.append(titled(_lines(drawn, columns), title))
    return stack(blocks)


def _lines(pictures: list[Image.Image], columns: int) -> Image.Image:
    lines = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    return stack([row(line, 4) for line in lines], 4)


def _paint(
    stage: StageRecord, sample: int, cells: Tensor, grid: tuple[int, int], pixels: np.ndarray
) -> tuple[Image.Image, int]:
    """Draw what happened to the tokens ``cells`` (rows * columns,); count the slots that hold them."""
    from PIL import Image, ImageDraw

    rows, columns = grid
    size = pixels.shape[0]
    there = cells >= 0
    source = stage.total.source[sample].cpu()[cells.clamp(min=0)].masked_fill(~there, -1)
    kept = stage.total.kept[sample].cpu()
    sizes = stage.total.size[sample].cpu()
    cold = torch.zeros_like(there)
    if stage.total.frozen is not None:
        cold = stage.total.frozen[sample].cpu()[cells.clamp(min=0)] & there
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
    mine = torch.isin(kept, cells[there]) & (kept >= 0)
    return panel, int(mine.sum())


def _image(pixels: np.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray((pixels * 255).astype(np.uint8))


def _canvas(image: Any, size: int) -> np.ndarray:
    """Resize a picture to (size, size, 3) float in [0, 1]; grey for None."""
    from PIL import Image

    if image is None:
        return np.full((size, size, 3), 0.7)
    picture = Image.fromarray((_pixels(image) * 255).clip(0, 255).astype(np.uint8))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) / 255.0


def _pixels(image: Any) -> np.ndarray:
    """Convert a picture of any kind to (H, W, 3) float in [0, 1]."""
    from PIL import Image

    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        pixels = pixels.float() if pixels.is_floating_point() else pixels
        array = pixels.permute(1, 2, 0).numpy() if pixels.shape[0] in (1, 3) else pixels.numpy()
    elif isinstance(image, Image.Image) and (image.mode == "F" or image.mode.startswith("I")):
        array = np.asarray(image)  # convert would cut everything above 255 off
        array = array / 65535.0 if array.dtype.kind in "ui" else array
    else:
        array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.ndim == 2:
        array = array[..., None]
    known = array.ndim == 3 and array.dtype.kind in "buif" and array.shape[-1] in (1, 3, 4)
    if not known or not array.size:
        raise ValueError(
            "image must be a PIL image, an (H, W, 3) array or a (3, H, W) tensor, got "
            + (f"shape {tuple(array.shape)}" if array.ndim else repr(image))
        )
    if array.shape[-1] == 1:
        array = array.repeat(3, -1)
    array = array[..., :3]
    if not np.isfinite(array).all():
        raise ValueError("image holds numbers that are not finite")
    if array.dtype == np.uint8:
        array = array / 255.0
    elif array.min() < 0 or array.max() > 1:
        array = (array - array.min()) / max(float(array.max() - array.min()), 1e-6)
    return np.asarray(array)


def _colour(group: int) -> tuple[float, float, float]:
    """Choose a colour for a group; steps of the golden ratio make neighbouring groups differ."""
    return colorsys.hsv_to_rgb((group * 0.618034) % 1.0, 0.85, 1.0)


def titled(picture: Any, title: str, height: int = 24, points: float = 14.0) -> Image.Image:
    """Put a line of text above a picture."""
    from PIL import Image, ImageDraw, ImageFont

    if isinstance(picture, np.ndarray):
        picture = _image(picture)
    out = Image.new("RGB", (picture.width, picture.height + height), "white")
    out.paste(picture, (0, height))
    while points > 7 and ImageFont.load_default(points).getlength(title) > picture.width - 4:
        points -= 0.5
    ImageDraw.Draw(out).text((2, 4), title, fill="black", font=ImageFont.load_default(points))
    return out


def row(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Join pictures beside each other."""
    from PIL import Image

    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    out = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        out.paste(picture, (left, 0))
        left += picture.width + gap
    return out


def stack(pictures: Sequence[Image.Image], gap: int = 10) -> Image.Image:
    """Join pictures below each other, for a sheet that compares methods."""
    from PIL import Image

    height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    out = Image.new("RGB", (max(p.width for p in pictures), height), "white")
    top = 0
    for picture in pictures:
        out.paste(picture, (0, top))
        top += picture.height + gap
    return out
