"""``vtr demo``: the main job on the built-in models, with tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from vtr.cli import demo_diffusion, demo_video, demo_vit, demo_vlm

# Each writes its pictures into a folder, and returns its results and its tables as text.
PARTS = {
    "vit": demo_vit.run,
    "vlm": demo_vlm.run,
    "diffusion": demo_diffusion.run,
    "video": demo_video.run,
}


def run(parts: Sequence[str], out: Path, console: Console) -> dict[str, Any]:
    """Run the parts; write ``out/table.txt``, ``out/results.json`` and the pictures.

    Args:
        parts: names of :data:`PARTS`; all of them if empty.

    Raises:
        ValueError: if there is no part of a name.
    """
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        raise ValueError(f"there is no demo {unknown[0]!r}; there are: {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    text: list[str] = []
    for part in parts or PARTS:
        console.rule(f"[bold]{part}")
        results[part], lines = PARTS[part](out, console)
        text.append(lines)
    (out / "table.txt").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(escape(f"wrote {out}/table.txt, {out}/results.json and the pictures"))
    return results
