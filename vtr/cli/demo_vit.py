"""``vtr demo vit``: the built-in ViT on held-out digits, dense and with every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

import vtr
from vtr.cli.shared import PAGE
from vtr.core.report import as_text
from vtr.evaluate import digits
from vtr.inspect.drawing import row, stack
from vtr.zoo import data, load, samples

IMAGES, ALL_IMAGES = 200, 1000  # by default, and with --full


def run(out: Path, console: Console, full: bool = False) -> tuple[Any, str]:
    """Draw, then measure the built-in ViT on held-out digits, dense and with every method."""
    number = ALL_IMAGES if full else IMAGES
    model = load("digits-vit")
    pixels, labels = samples("digits-vit", number, seed=123)
    methods = digits.demo_methods()
    # The pictures show digits on something that the eye can see; the table counts all of them.
    light = [i for i, p in enumerate(pixels) if data.denormalise(p).mean() > 0.25]
    busy = max(light or [0], key=lambda i: float(pixels[i].std()))
    _photo(model, pixels[busy]).save(out / "photo.png")
    console.print(escape(f"wrote {out}/photo.png; drawing more ..."))
    stages, compared = _sheets(model, methods, pixels[(light or [0])[:4]])
    stages.save(out / "vit-stages.png")
    compared.save(out / "vit.png")
    console.print(escape(f"wrote {out}/vit.png and vit-stages.png; counting on {number} images"))
    results = digits.evaluate(model, methods, pixels, labels, progress=console.is_terminal)
    title = f"built-in ViT, {number} held-out digits, CPU, 1 thread"
    table = digits.table(results, title)
    console.print(table)
    return digits.to_dicts(results), as_text(table, PAGE)


def _photo(model: Any, pixels: torch.Tensor) -> Any:
    """Draw one picture and its tokens after the last cut of three methods, side by side."""
    shown: list[Any] = []
    with torch.inference_mode():
        for method in (
            vtr.CLSAttention(keep=0.12, layers=(1,)),
            vtr.EViT(keep=0.4, layers=(1, 2, 3)),
            vtr.ToMe(r=(48, 32, 16, 8, 8)),
        ):
            with vtr.apply(model, method) as handle:
                model(pixels[None])
                last = vtr.Trace([handle.trace.stages[-1]])
            view = data.denormalise(pixels)
            shown.append(vtr.draw(last, view, size=192, show_input=not shown))
    return row(shown)


def _sheets(model: Any, methods: Sequence[Any], pixels: torch.Tensor) -> tuple[Any, Any]:
    """Two pictures: one digit, every stage of every method; and several digits, one panel per method."""
    views = [data.denormalise(p) for p in pixels]
    stages: list[Any] = []
    columns: list[Any] = []
    with torch.inference_mode():
        for method in methods:
            with vtr.apply(model, method) as handle:
                model(pixels)
                trace = handle.trace
            stages.append(vtr.draw(trace, views[0], panels=4, size=192))
            # If frozen tokens come back at the end, the stage to see is the one before.
            least = min(reversed(trace.stages), key=lambda stage: stage.tokens_out)
            one = vtr.Trace([least])
            first = not columns
            columns.append(
                stack(
                    [
                        vtr.draw(one, view, sample=i, size=144, show_input=first)
                        for i, view in enumerate(views)
                    ]
                )
            )
    return stack(stages), row(columns)
