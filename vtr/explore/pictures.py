"""Pictures of the explorer: tokens stage by stage, masks, and attention over a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vtr
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.site import ModelInfo, Site
from vtr.core.trace import StageRecord, Trace
from vtr.inspect.heatmap_drawing import overlays

SIDE = 240
"""Pixels per side of a picture with its tokens."""
PANELS = 6
Titled = tuple[str, Any]


def stages(trace: Trace, canvas: Any, video: Any = None) -> tuple[tuple[Titled, ...], str]:
    """Draw the tokens that are left after each stage of a call.

    Args:
        trace: of the call.
        canvas: a list of pictures, as :func:`vtr.draw` takes them; None draws on grey.
        video: a :class:`vtr.video.Video` in their place.

    Returns:
        captions with PIL images, at most 6 stages of a picture; and why nothing is drawn, or "".
    """
    drawn: list[Titled] = []
    why = ""
    canvas = [video] if video is not None else canvas
    whole = canvas or [None]
    for number, picture in enumerate(whole):
        found = []
        for stage in trace.stages:
            try:
                found.append(_stage(stage, picture, number, len(whole), video is not None))
            except ValueError as error:
                why = str(error)
        sheets = bool(found) and found[0][1].width > SIDE
        drawn += _chosen(found, PANELS if len(whole) == 1 and not sheets else 2)
    return tuple(drawn), "" if drawn else why


def _stage(stage: StageRecord, picture: Any, number: int, count: int, video: bool) -> Titled:
    prompt = stage.frames is not None  # pictures are those of one prompt, not samples of a batch
    where: dict[str, Any] = (
        {"which": number} if prompt and count > 1 else {"sample": 0 if prompt else number}
    )
    if not prompt and count > 1 and stage.total.batch != count:
        raise ValueError(f"the pictures of {stage.site} {stage.layer} are not told apart")
    image = vtr.draw(
        Trace([stage]), picture, show_input=False, size=72 if video else SIDE, columns=4, **where
    )
    caption = f"{stage.site} {stage.layer}"
    if count > 1:
        caption = f"picture {number + 1}, {caption}"
    if not video and image.width == SIDE:
        alive = int(stage.total.valid[where.get("sample", 0)].sum())
        if count == 1 or not prompt:
            caption += f": {alive} of {stage.total.n_in}"
        image = image.crop((0, image.height - SIDE, SIDE, image.height))  # its title is the caption
    return caption, image


def _chosen(found: list[Titled], most: int) -> list[Titled]:
    """Choose evenly, the last one among them."""
    if len(found) <= most:
        return found
    return [found[i] for i in sorted(set(np.linspace(len(found) - 1, 0, most).round().astype(int)))]


def masks(trace: Trace) -> tuple[Titled, ...]:
    """Draw the masks of sparse attention of a call, if it kept some."""
    layers = trace.notes.get("attention", {})
    if not any(isinstance(n, dict) and n.get("mask") is not None for n in layers.values()):
        return ()
    alone = Trace([], trace.tokens, trace.batch, trace.notes)
    return (("computed pairs: queries down, keys across", vtr.draw(alone, size=160, panels=2)),)


def over(grids: Tensor, picture: Any, name: str) -> tuple[Titled, ...]:
    """Draw maps (N, H, W) over a picture, each scaled to its own range."""
    image = _pil(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    drawn = []
    for i, grid in enumerate(grids.float()):
        low, high = grid.min(), grid.max()
        scaled = (grid - low) / (high - low).clamp(min=1e-12)
        panel = overlays({f"{name} {i}": scaled[None]}, [image], 0.8)[0]
        drawn.append((f"{name} {i}", panel.crop((0, panel.height - SIDE, SIDE, panel.height))))
    return tuple(_chosen(drawn, PANELS))


def class_attention(model: Any, pixels: Tensor, canvas: Sequence[Any]) -> tuple[Titled, ...]:
    """Draw where the class token of an encoder attends, layer by layer; without one, which tokens get attention.

    Raises:
        UnsupportedMethodError: the encoder shows neither.
    """
    with vtr.apply(model, AttentionWatch()) as handle:
        model(pixels)
        rows, grid = handle.trace.notes["watched"], handle.trace.notes["watched grid"]
    drawn: list[Titled] = []
    for i, picture in enumerate(canvas):
        whole = torch.stack([row[i] for row in rows])
        if grid is None or grid[-1] * grid[-2] != whole.shape[1]:
            return ()
        found = over(whole.reshape(len(whole), grid[-2], grid[-1]), picture, "layer")
        drawn += (
            found if len(canvas) == 1 else [(f"picture {i + 1}, {c}", p) for c, p in found[-1:]]
        )
    return tuple(drawn)


@dataclass(frozen=True)
class AttentionWatch(TokenMethod):
    """Cut nothing, and note the attention of each layer of an encoder."""

    name: ClassVar[str] = "attention-watch"
    paper: ClassVar[str] = "a diagnostic"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        return {"encoder": frozenset({"cls_attention" if info.has_cls else "attention_received"})}

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("encoder", i, cuts=False) for i in range(info.depth["encoder"]))

    def reduce(self, site: Site) -> Reduction | None:
        row = site.cls_attention() if site.info.has_cls else site.attention_received()
        site.notes.setdefault("watched", []).append(row.float().cpu())
        site.notes["watched grid"] = site.grid
        return None


def strip(frames: Sequence[Any], height: int = 96) -> Any:
    """Join PIL frames beside each other, enlarged by a whole factor to about ``height``."""
    from vtr.inspect.drawing import row

    factor = max(1, height // frames[0].height)
    large = [f.convert("RGB").resize((f.width * factor, f.height * factor), 0) for f in frames]
    return row(large, 4)


def _pil(picture: Any) -> Any:
    """A picture of any kind that :func:`vtr.draw` takes, as a PIL image."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    from vtr.inspect.drawing import _pixels

    return Image.fromarray((_pixels(picture) * 255).clip(0, 255).astype(np.uint8))
