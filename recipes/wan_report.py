"""The results of :mod:`recipes.evaluate_wan` as JSON, Markdown and a picture."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtr.evaluate.generator import sheet, strip

Row = dict[str, Any]

_HEAD = (
    "attention", "density", "work", "digit", "frames", "direction", "half the way", "PSNR", "s per video",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    shares = (f"{100 * row[key]:.0f} %" for key in ("digit", "per_frame", "direction", "halfway"))
    near = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
    return (
        row["attention"],
        f"{row['density']:.2f}",
        f"{row['work']:.2f}",
        *shares,
        near,
        f"{row['seconds']:.2f}",
    )


def table(rows: list[Row]) -> list[str]:
    """Rows as lines of a Markdown table."""
    lines = [f"| {' | '.join(_HEAD)} |", "| --- |" + " ---: |" * (len(_HEAD) - 1)]
    return lines + [f"| {' | '.join(_cells(row))} |" for row in rows]


def recovered(rows: list[Row], dense: Row) -> list[str]:
    """For each bare mask and the method that reshapes it: the part of the loss that comes back."""
    lines = []
    for bare, reshaped in (("radial", "Re-ttention of it"), ("its bare mask", "rectified")):
        for target in sorted({row["target"] for row in rows}, reverse=True):
            pair = [
                next((r for r in rows if r["attention"] == name and r["target"] == target), None)
                for name in (bare, reshaped)
            ]
            if None in pair:
                continue
            before, after = pair
            parts = []
            for key, name in (("digit", "digit"), ("direction", "direction")):
                lost = dense[key] - before[key]  # type: ignore[index]
                back = after[key] - before[key]  # type: ignore[index]
                share = f" ({back / lost:.0%} of what the mask lost)" if lost >= 0.05 else ""
                parts.append(
                    f"{name} {before[key]:.0%} to {after[key]:.0%}{share}"  # type: ignore[index]
                )
            what = "Re-ttention" if bare == "radial" else "Rectification"
            gain = after["psnr"] - before["psnr"]  # type: ignore[index]
            lines.append(f"- {what} at {target:g}: {', '.join(parts)}, PSNR {gain:+.1f} dB.")
    return lines


def markdown(rows: list[Row], judge: dict[str, float], videos: int) -> str:
    """The page: how it was measured, a table per share of dense steps, what is recovered."""
    dense = rows[0]
    error = 100 * (0.25 / videos) ** 0.5
    lines = [
        "# Sparse attention on the built-in video generator",
        "",
        f"`python -m recipes.evaluate_wan --sparse --videos {videos}` wrote this page. {videos} videos "
        "of 5 frames of 16 x 32 pixels (640 tokens), the same prompts and noise in every row, 12 "
        "steps, guidance 4.5, bfloat16, blocks of 16 tokens, one thread of "
        f"{processor()}, torch {torch.__version__.partition('+')[0]}.",
        "",
        "- *digit*: the majority of a video's frames shows the digit asked for (chance 10 %); "
        "*frames*: share of frames that do. *direction*: the digit moves in the direction asked for, "
        "of four (chance 25 %); *half the way*: and at least half as far as it should.",
        f"- The judge finds the digit in {judge['digit']:.1%} and the direction in "
        f"{judge['direction']:.1%} of real videos of held-out digits. The standard error of a share "
        f"is up to {error:.1f} points.",
        "- *density*: live key blocks in the sparse calls; *work*: all attention of a run, dense steps "
        "included, against dense. *PSNR*: to the dense videos, in dB.",
        "- *s per video*: processor time. At 640 tokens attention is a small part of the work and "
        "blocks of 16 are too small to be fast, so no time is saved here; `docs/kernels.md` has "
        "the speed of the kernels at real sizes.",
        "- *radial*: at half density `RadialAttention(decay=0.05, sink=False)`, the least that its "
        "formula keeps of five frames; below that, the nearest blocks in its order (rows apart times "
        "two to the power of frames apart), which is not a published setting.",
        "- *Re-ttention of it*: `Rettention(mask=...)` with the mask of the row above, measured again at the "
        "first step after the dense ones and at every fifth from there; such a step computes both the dense "
        "and the sparse attention (see *work*).",
        "- *rectified* chooses its blocks by pooled scores; *its bare mask* leaves out the "
        "rectification. *top of the dense map* keeps, for every head and query block, the key blocks with "
        "the most attention; finding them needs the dense map.",
        "- *own frame*: the nearest rows of the same frame; a fifth of all is the whole frame.",
        "",
        "![contact sheet](diffusion-digits.png)",
        "",
        "The picture has the first two videos of each row of the first table.",
    ]
    for share in sorted({row["dense_steps"] for row in rows[1:]}):
        chosen = [row for row in rows[1:] if row["dense_steps"] == share]
        lines += ["", f"## The first {share:.0%} of the steps dense", ""]
        lines += table([dense])
        for target in sorted({row["target"] for row in chosen}, reverse=True):
            lines += table([row for row in chosen if row["target"] == target])[2:]
        lines += ["", *recovered(chosen, dense)]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(
    out: Path, rows: list[Row], sheets: dict[str, Tensor], judge: dict[str, float], videos: int
) -> None:
    """``out`` with the endings .json, .md and .png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"judge": judge, "videos": videos, "rows": rows}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(rows, judge, videos))
    shown = f" {rows[1]['dense_steps']:g}"
    strips = [
        (name.removesuffix(shown), strip(found[:2]))
        for name, found in sheets.items()
        if name == "dense" or name.endswith(shown)
    ]
    sheet(strips).save(out.with_suffix(".png"), optimize=True)
