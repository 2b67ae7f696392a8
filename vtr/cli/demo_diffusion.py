"""The generator's part of ``vtr demo``: videos with all of the attention beside some with a part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.console import Console

VIDEOS = 10
DENSE_STEPS = 0.4


def methods() -> dict[str, Any]:
    """What the demo compares, by label; None is dense."""
    import vtr

    common: dict[str, Any] = {"block": 16, "dense_steps": DENSE_STEPS, "backend": "sdpa"}
    radial = vtr.RadialAttention(decay=0.05, sink=False, **common)
    return {
        "dense": None,
        "radial": radial,
        "Re-ttention of it": vtr.Rettention(mask=radial, refresh=3, **common),
        "random": vtr.RandomSparse(density=0.5, **common),
    }


def diffusion(out: Path, console: Console) -> tuple[Any, str]:
    """The built-in generator, dense and with about half of the attention.

    Writes ``out/diffusion.png``: the first videos of each, side by side.

    Returns:
        the rows, and their table as text.
    """
    from rich.progress import Progress
    from rich.table import Table

    from recipes import evaluate_wan, wan_report
    from vtr.cli.demo import plain
    from vtr.zoo import load_pipeline

    pipe = load_pipeline("digits-wan", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    rows: list[dict[str, Any]] = []
    strips = []
    reference = None
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("videos", total=len(methods()))
        for name, method in methods().items():
            row, found = evaluate_wan.measure(pipe, method, VIDEOS, reference)
            reference = found if method is None else reference
            rows.append({"attention": name, **row})
            strips.append((name, wan_report.strip(found[:3])))
            progress.advance(task)
    wan_report.sheet(strips).save(out / "diffusion.png")
    table = Table(title=f"built-in generator, {VIDEOS} videos of 640 tokens, CPU")
    headings = ("attention", "density", "digit", "direction", "PSNR to dense")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right")
    for row in rows:
        near = "" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        shares = (f"{row[key]:.0%}" for key in ("digit", "direction"))
        table.add_row(row["attention"], f"{row['density']:.2f}", *shares, near)
    console.print(table)
    return rows, plain(table)
