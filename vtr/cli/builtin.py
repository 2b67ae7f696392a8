"""``vtr demo`` and ``vtr plot``: the built-in models, dense and reduced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtr.cli import shared


def demo(
    parts: Annotated[
        list[str] | None, typer.Argument(help="vit, vlm, video, diffusion; all by default")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder")] = Path("demo"),
    full: Annotated[
        bool, typer.Option("--full", help="as many samples as the tables of the documentation")
    ] = False,
    as_json: shared.JsonOption = False,
) -> None:
    """Run the built-in models dense and reduced; write tables and pictures (about a minute of one core)."""
    from vtr.cli import demo as demos

    console = Console(quiet=True) if as_json else shared.console
    results = demos.run(parts or [], out, console, full=full)
    if as_json:
        print(json.dumps(results, indent=2))


def plot(
    what: Annotated[str, typer.Argument(help="vit")] = "vit",
    out: Annotated[Path, typer.Option("--out", "-o", help="folder")] = Path("docs"),
    images: Annotated[int, typer.Option(min=100)] = 1000,
    as_json: shared.JsonOption = False,
) -> None:
    """Plot accuracy against FLOPs of every method on a built-in model."""
    if what != "vit":
        raise ValueError(f"there is no plot {what!r}; there is: vit")
    from vtr.evaluate import digits
    from vtr.zoo import load, samples

    out.mkdir(parents=True, exist_ok=True)  # before the work of minutes
    model = load("digits-vit")
    pixels, labels = samples("digits-vit", images, seed=321)
    sweep = digits.sweep_methods()
    flat = [m for group in sweep.values() for m in group]
    results = digits.evaluate(model, flat, pixels, labels, passes=1, progress=not as_json)
    dense, rest = results[0], iter(results[1:])
    groups = {name: [next(rest) for _ in group] for name, group in sweep.items()}
    path = out / "vit-accuracy-flops.png"
    digits.plot(groups, dense, str(path))
    # One pass per setting: enough for accuracy and FLOPs, no measurement of time.
    rows = [{k: v for k, v in r.items() if k != "speedup"} for r in digits.to_dicts(results)]
    text = json.dumps(rows, indent=2)
    (out / "vit-accuracy-flops.json").write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
        return
    table = Table(title=f"{images} held-out digits")
    for column in ("method", "accuracy", "FLOPs of dense"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for r in results:
        table.add_row(escape(r.method), f"{r.accuracy:.1%}", f"{r.flops / dense.flops:.0%}")
    shared.console.print(table)
    shared.console.print(f"wrote {escape(str(path))}", highlight=False)
