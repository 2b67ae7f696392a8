"""``vtr demo video``: a file is written, decoded, asked about; dense and with few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import vtr
from vtr.cli.shared import PAGE
from vtr.core.report import as_text
from vtr.evaluate import clips
from vtr.inspect.drawing import stack
from vtr.zoo import load_vlm
from vtr.zoo.clips import write
from vtr.zoo.video_questions import KINDS, VideoSample, answers, video_qa

MODEL = "digits-video"
SEED = 5
SHARE = 0.25
# Clips behind the table of accuracies, seven questions about each: by default, and with --full.
CLIPS, ALL_CLIPS = 3, 8


def methods() -> dict[str, Any]:
    """The methods of the demo, by the names of its tables."""
    every = clips.methods_at(SHARE)
    return {
        name: every[name]
        for name in ("random tokens", "uniform frames", "DyCoke", "EVS", "FastVID")
    }


def run(out: Path, console: Console, full: bool = False) -> tuple[Any, str]:
    """Ask the built-in video model about a generated file and about held-out clips."""
    model, processor = load_vlm(MODEL)
    asked = video_qa(len(KINDS), seed=SEED, per_second=8)
    file = write(out / "video.mp4", asked[0].frames)
    seen = vtr.video.load(file, frames=8)
    frames = torch.from_numpy(seen.frames)
    samples = [VideoSample(frames, s.question, s.answer, s.kind) for s in asked]

    chosen = methods()
    said = {"dense": answers(model, processor, samples)}
    sheets: list[Any] = []
    for name, method in chosen.items():
        with vtr.apply(model, method, positions="original") as handle:
            said[name] = answers(model, processor, samples)
            sheets.append(vtr.draw(handle, seen, size=96, show_input=not sheets))
    stack(sheets).save(out / "video.png")

    table = Table(
        title=f"{file.name}, {seen.metadata.codec}, {len(seen)} frames; {SHARE:.0%} of tokens"
    )
    for column in ("question", "answer", *said):
        table.add_column(column)
    for i, sample in enumerate(samples):
        row = (_mark(told[i], sample.answer) for told in said.values())
        table.add_row(sample.question, sample.answer, *row)
    console.print(table)

    held_out = video_qa((ALL_CLIPS if full else CLIPS) * len(KINDS), seed=SEED + 1)
    results = clips.evaluate(
        model,
        processor,
        held_out,
        (SHARE,),
        methods=lambda share: chosen,
        progress=console.is_terminal,
    )
    accuracy = clips.table(
        results, f"built-in video model, {len(held_out)} held-out questions", kinds=()
    )
    console.print(accuracy)
    found = {
        "file": {"frames": len(seen), "codec": seen.metadata.codec, "answers": said},
        "right": [s.answer for s in samples],
        "held out": [
            {"method": r.name, "tokens": r.tokens, "accuracy": r.accuracy} for r in results
        ],
    }
    return found, f"{as_text(table, PAGE)}\n{as_text(accuracy, PAGE)}"


def _mark(said: str, right: str) -> str:
    return "✓" if said == right else f"[red]{said}[/red]"
