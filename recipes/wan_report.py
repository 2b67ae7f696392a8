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


def chosen_at_run_time(rows: list[Row]) -> list[str]:
    """Explain the rows of methods that choose at run time, as far as they are in the rows."""
    labels = {row["attention"] for row in rows}
    lines = []
    found = [row for row in rows if row.get("searched")]
    if found:
        values = [
            f"{row['attention']} at {row['target']:g}: "
            + ", ".join(f"`{k}={v:g}`" for k, v in row["searched"].items())
            + f" (density {row['density']:.2f})"
            for row in found
        ]
        lines.append(
            "- Methods that adapt have no option for a density: the value of theirs was searched on four videos, "
            "for the mean density of the sparse steps, which is the one in the table. The nearest value "
            f"is taken if none reaches it. {'; '.join(values)}."
        )
    if "Jenga" in labels:
        lines.append(
            "- *Jenga* keeps its best blocks alone: with its neighbours it cannot be sparse here."
        )
    if "SVG2" in labels:
        lines.append(
            "- *SVG2* has clusters of about 16 tokens here, which are filled up to blocks of 16: half of the work is in "
            "empty places, and its rows are compared at equal work. On ten of these videos, "
            "`SVG2(density=0.25)`, which counts tokens, has 80 % of the digits, all directions and 16.5 dB at density 0.23, "
            "for a work of 0.57. At the authors' sizes a cluster has about 75 tokens, and little is filled up."
        )
    if "AdaSpa" in labels:
        lines.append("- *AdaSpa* searches in two steps; the first is dense (see *work*).")
    if any(label.endswith("fine-tuned") for label in labels):
        lines.append(
            "- *fine-tuned*: all weights, by `python -m recipes.train_sparse`, under the mask of that density, for 600 "
            "steps (`SLA`, `TopKSparse`) or 1000 (`VSA`; 88 % and 93 % after 600); the dense "
            "videos are those of other weights, so that there may be no PSNR."
        )
    return lines


def markdown(
    rows: list[Row],
    judge: dict[str, float],
    videos: int,
    machines: list[str] | None = None,
    chosen: str = "",
) -> str:
    """The page: how it was measured, a table per share of dense steps, what is recovered."""
    dense = rows[0]
    error = 100 * (0.25 / videos) ** 0.5
    lines = [
        "# Sparse attention on the built-in video generator",
        "",
        f"`python -m recipes.evaluate_wan --sparse --videos {videos}` wrote this page. {videos} videos "
        "of 5 frames of 16 x 32 pixels (640 tokens), the same prompts and noise in every row, 12 "
        "steps, guidance 4.5, bfloat16, blocks of 16 tokens, one thread of "
        f"{' and '.join(machines or [processor()])}, torch {torch.__version__.partition('+')[0]}.",
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
        *chosen_at_run_time(rows),
        "",
        "![contact sheet](diffusion-digits.png)",
        "",
        "The picture has the first two videos of rows of the first table.",
    ]
    if chosen:
        lines += ["", f"![contact sheet of methods that choose at run time]({chosen})"]
    for share in sorted({row["dense_steps"] for row in rows[1:]}):
        here = [row for row in rows[1:] if row["dense_steps"] == share]
        lines += ["", f"## The first {share:.0%} of the steps dense", ""]
        lines += table([dense])
        for target in sorted({row["target"] for row in here}, reverse=True):
            lines += table([row for row in here if row["target"] == target])[2:]
        lines += ["", *recovered(here, dense)]
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
    path = out.with_suffix(".json")
    # Rows of an earlier page are of its machine, and have no videos: its picture stays.
    before = json.loads(path.read_text()).get("machines", []) if path.is_file() else []
    machines = list(dict.fromkeys([*before, processor()]))
    content = {"judge": judge, "videos": videos, "machines": machines, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    shown = f" {rows[1]['dense_steps']:g}"
    strips = [
        (name.removesuffix(shown), strip(found[:2]))
        for name, found in sheets.items()
        if name == "dense" or name.endswith(shown)
    ]
    picture = out.with_suffix(".png")
    if "dense" not in sheets:
        picture = out.with_name(f"{out.name}-chosen.png")
    if strips:
        sheet(strips).save(picture, optimize=True)
    chosen = picture.name if picture.stem.endswith("-chosen") and picture.is_file() else ""
    out.with_suffix(".md").write_text(markdown(rows, judge, videos, machines, chosen))
