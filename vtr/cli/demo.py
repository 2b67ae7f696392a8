"""``vtr demo``: the main job on the built-in models, with tables and pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

PARTS = ("vit", "vlm", "diffusion", "video")
IMAGES = 1000
QUESTIONS = 200


def run(parts: Sequence[str], out: Path, console: Console) -> dict[str, Any]:
    """Run the parts, write ``out/table.txt``, ``out/results.json`` and the pictures."""
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        raise ValueError(f"there is no demo {unknown[0]!r}; there are: {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    text: list[str] = []
    for part in parts or PARTS:
        console.rule(f"[bold]{part}")
        show = {"vit": vit, "vlm": vlm, "diffusion": diffusion, "video": video}[part]
        results[part], lines = show(out, console)
        text.append(lines)
    (out / "table.txt").write_text("\n".join(text), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(escape(f"wrote {out}/table.txt, {out}/results.json and the pictures"))
    return results


def vit(out: Path, console: Console) -> tuple[Any, str]:
    """The built-in ViT on held-out digits, dense and with every method."""
    from vtr.evaluate import digits
    from vtr.zoo import data, load, samples

    model = load("digits-vit")
    pixels, labels = samples("digits-vit", IMAGES, seed=123)
    methods = digits.demo_methods()
    results = digits.evaluate(model, methods, pixels, labels, progress=console.is_terminal)
    title = f"built-in ViT, {IMAGES} held-out digits, CPU, {torch.get_num_threads()} threads"
    table = digits.table(results, title)
    console.print(table)
    # The pictures show digits on something that the eye can see; the table counts all of them.
    light = [i for i, p in enumerate(pixels) if data.denormalise(p).mean() > 0.25]
    stages, compared = _sheets(model, methods, pixels[(light or [0])[:4]])
    stages.save(out / "vit-stages.png")
    compared.save(out / "vit.png")
    return digits.to_dicts(results), plain(table)


def _sheets(model: Any, methods: Sequence[Any], pixels: torch.Tensor) -> tuple[Any, Any]:
    """Two pictures: one digit, every stage of every method; and several digits, one panel per method."""
    import vtr
    from vtr.inspect.drawing import row, stack
    from vtr.zoo import data

    views = [data.denormalise(p) for p in pixels]
    stages: list[Any] = []
    columns: list[Any] = []
    with torch.inference_mode():
        for method in methods:
            with vtr.apply(model, method) as handle:
                model(pixels)
                trace = handle.trace
            stages.append(vtr.draw(trace, views[0], panels=4, size=192))
            # Where frozen tokens come back at the end, the stage to see is the one before.
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


def vlm(out: Path, console: Console) -> tuple[Any, str]:
    """The built-in LLaVA on held-out questions, dense and with an eighth of the visual tokens."""
    import vtr
    from vtr.evaluate import vlm as questions
    from vtr.inspect.drawing import row, stack
    from vtr.zoo import load_vlm
    from vtr.zoo.questions import prompt, vqa

    model, processor = load_vlm("digits-llava")
    methods = questions.methods_at(17)
    samples = vqa(QUESTIONS, seed=123)
    results = questions.evaluate(model, processor, methods, samples, progress=console.is_terminal)
    table = questions.table(
        results, f"built-in LLaVA, {QUESTIONS} held-out questions, 17 of 144 tokens"
    )
    console.print(table)
    columns: list[Any] = []
    asked = samples[0], samples[6]
    for method in methods:
        with vtr.apply(model, method, positions="original") as handle, torch.no_grad():
            inputs = prompt(processor, list(asked))
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
            least = min(reversed(handle.trace.stages), key=lambda stage: stage.tokens_out)
            one, first = vtr.Trace([least]), not columns
            columns.append(
                stack(
                    [
                        vtr.draw(one, s.image, sample=i, size=144, show_input=first)
                        for i, s in enumerate(asked)
                    ]
                )
            )
    row(columns).save(out / "vlm.png")
    return questions.to_dicts(results), plain(table)


def diffusion(out: Path, console: Console) -> tuple[Any, str]:
    """The built-in video generator, dense and with half of the attention."""
    from vtr.cli import demo_diffusion

    return demo_diffusion.diffusion(out, console)


def video(out: Path, console: Console) -> tuple[Any, str]:
    """The built-in video model on a file, dense and with a quarter of the visual tokens."""
    from vtr.cli import demo_video

    return demo_video.video(out, console)


def plain(table: Any) -> str:
    """A rich table as text."""
    console = Console(width=110, record=True, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.export_text()
