"""Write the list of commands and options into ``docs/cli.md``, below its marker: ``python -m recipes.cli_page``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
MARKER = "<!-- Below: python -m recipes.cli_page -->"


def commands() -> str:
    """Describe every command and option, as typer's own tool for documentation does, in Markdown."""
    command = ["-m", "typer", "vtr.cli.commands", "utils", "docs", "--name", "vtr"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    # The page has its own title: each heading goes one level down.
    lines = (f"#{line}" if line.startswith("#") else line for line in done.stdout.splitlines())
    return "\n".join(lines).strip()


def renewed(page: str) -> str:
    """Return the text of the page with its part below the marker written again.

    Raises:
        ValueError: if the page has no marker.
    """
    head, marker, _ = page.partition(MARKER)
    if not marker:
        raise ValueError(f"{PAGE} has no line {MARKER}")
    return f"{head}{MARKER}\n\n{commands()}\n"


def main(arguments: list[str] | None = None) -> None:
    """Write the page."""
    argparse.ArgumentParser(prog="python -m recipes.cli_page", description=__doc__).parse_args(
        arguments
    )
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
