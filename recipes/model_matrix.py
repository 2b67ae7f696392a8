"""Write the support matrix into ``docs/models.md`` (ten minutes of one core; ``--kind`` for a part of it).

python -m recipes.model_matrix
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vtr.compat.tested import installed
from vtr.testing.matrix import KINDS_OF_ROWS, Row, matrix, table
from vtr.vision.vlm.coverage import markdown

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
#: Kind -> the libraries that have its classes.
LIBRARIES = {
    "tower": ("timm", "open_clip", "transformers"),
    "dit": ("diffusers",),
    "unet": ("diffusers",),
}


def markers(kind: str) -> tuple[str, str]:
    """The lines of the page around the table of a kind."""
    if kind == "vlm":
        return "<!-- vtr models -->\n", "\n<!-- vtr models: end -->"
    return f"<!-- vtr models --kind {kind} -->\n", f"\n<!-- vtr models --kind {kind}: end -->"


def section(kind: str, rows: Sequence[Row]) -> str:
    """The table of a kind, with the versions and the numbers above it."""
    versions = ", ".join(f"{name} {installed(name)}" for name in LIBRARIES[kind])
    counts = {state: sum(r.state == state for r in rows) for state in ("works", "partly")}
    return (
        f"{versions}: of {len(rows)} classes {counts['works']} work, {counts['partly']} partly\n\n"
        f"{table(rows)}"
    )


def vlms() -> str:
    """The table of vision-language models, with the version above it."""
    return f"transformers {installed('transformers')}\n\n{markdown()}"


def tried(kind: str) -> list[Row]:
    """The rows of a kind; says on stderr how far it is."""
    rows = []
    for row in matrix(kind):
        rows.append(row)
        print(f"{kind} {row.name}: {row.state}", file=sys.stderr)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Replace the tables of the page."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.model_matrix", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--kind", action="append", choices=list(KINDS_OF_ROWS))
    for kind in parser.parse_args(argv).kind or KINDS_OF_ROWS:
        made = vlms() if kind == "vlm" else section(kind, tried(kind))
        start, end = markers(kind)
        before, found, rest = PAGE.read_text(encoding="utf-8").partition(start)
        if not found:
            raise SystemExit(f"{PAGE} has no line {start.strip()}")
        after = rest.partition(end)[2]
        PAGE.write_text(f"{before}{start}{made}{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
