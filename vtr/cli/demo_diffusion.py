"""``vtr demo diffusion``: videos with dense and with sparse attention, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import vtr
from vtr.cli.shared import PAGE
from vtr.core.report import as_text
from vtr.evaluate import generator
from vtr.zoo import load_pipeline

VIDEOS, ALL_VIDEOS = 4, 10  # by default, and with --full
DENSE_STEPS = 0.4


def methods() -> dict[str, Any]:
    """Return the methods to compare by label; None is the dense model."""
    common: dict[str, Any] = {"block": 16, "dense_steps": DENSE_STEPS, "backend": "sdpa"}
    radial = vtr.RadialAttention(decay=0.05, sink=False, **common)
    return {
        "dense": None,
        "radial": radial,
        "Re-ttention of it": vtr.Rettention(mask=radial, refresh=3, **common),
        "random": vtr.RandomSparse(density=0.5, **common),
    }


def run(out: Path, console: Console, full: bool = False) -> tuple[Any, str]:
    """Run the built-in generator, dense and with about half of the attention.

    Writes ``out/diffusion.png``: the first videos of each, side by side.

    Returns:
        the rows, and their table as text.
    """
    number = ALL_VIDEOS if full else VIDEOS
    # In float32, which every processor has: without instructions for bfloat16 the same work takes twice as long.
    pipe = load_pipeline("digits-wan")
    pipe.set_progress_bar_config(disable=True)
    rows: list[dict[str, Any]] = []
    strips = []
    reference = None
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("videos", total=len(methods()))
        for name, method in methods().items():
            row, found = generator.measure(pipe, method, number, reference)
            reference = found if method is None else reference
            rows.append({"attention": name, **row})
            strips.append((name, generator.strip(found[:3])))
            progress.advance(task)
    generator.sheet(strips).save(out / "diffusion.png")
    table = Table(title=f"built-in generator, {number} videos of 640 tokens, CPU")
    headings = ("attention", "density", "digit", "direction", "PSNR to dense")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right")
    for row in rows:
        near = "" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        shares = (f"{row[key]:.0%}" for key in ("digit", "direction"))
        table.add_row(row["attention"], f"{row['density']:.2f}", *shares, near)
    console.print(table)
    return rows, as_text(table, PAGE)
