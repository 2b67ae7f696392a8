"""``vtr demo``: the main job on the built-in models, with tables and pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from vtr.errors import missing

# Packages of each part with the names that they are imported by. scikit-learn has the digits of all parts.
PARTS = {
    "vit": {"timm": "timm", "scikit-learn": "sklearn"},
    "vlm": {
        "transformers": "transformers",
        "scikit-learn": "sklearn",
        "torchvision": "torchvision",
    },
    "video": {
        "transformers": "transformers",
        "scikit-learn": "sklearn",
        "torchvision": "torchvision",
        "av": "av",
    },
    "diffusion": {
        "diffusers": "diffusers",
        "accelerate": "accelerate",
        "transformers": "transformers",
        "scikit-learn": "sklearn",
    },
}


def run(parts: Sequence[str], out: Path, console: Console, *, full: bool = False) -> dict[str, Any]:
    """Run the parts; write ``out/table.txt``, ``out/results.json`` and the pictures.

    torch computes with one thread meanwhile: the models are tiny, and a second thread costs three to seven
    times the processor time if something else runs on its core, because both wait for each other after
    every operation.

    Args:
        parts: names of :data:`PARTS`; all of them if empty.
        full: measure on as many samples as the tables of the documentation, several times as long.

    Raises:
        ValueError: if there is no part of a name.
        MissingDependencyError: if a part needs a package that is not installed.
    """
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        raise ValueError(f"there is no demo {unknown[0]!r}; there are: {', '.join(PARTS)}")
    chosen = list(parts or PARTS)
    for part in chosen:
        for package, module in PARTS[part].items():
            if find_spec(module) is None:
                raise missing(package, "demo", f"vtr demo {part}")
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    text: list[str] = []
    start = time.monotonic()
    with _one_thread():
        for number, part in enumerate(chosen, 1):
            console.rule(f"[bold]{part}, part {number} of {len(chosen)}")
            with console.status("loading libraries and models ..."):
                measure = _part(part)
            results[part], lines = measure(out, console, full)
            text.append(lines)
            console.print(f"{part} done, {time.monotonic() - start:.0f} s since the start")
    (out / "table.txt").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(escape(f"wrote {out}/table.txt, {out}/results.json and the pictures"))
    return results


def _part(name: str) -> Any:
    """Import one part: a function of folder, console and ``full`` that returns results and tables as text."""
    if name == "vit":
        from vtr.cli.demo_vit import run
    elif name == "vlm":
        from vtr.cli.demo_vlm import run
    elif name == "video":
        from vtr.cli.demo_video import run
    else:
        from vtr.cli.demo_diffusion import run
    return run


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
