"""Options that the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterable


def named(option: str, text: str | None, known: Iterable[str]) -> list[str]:
    """Split ``text`` at commas into known names; all of them without a text. Ends the program for others."""
    known = list(known)
    names = [name.strip() for name in text.split(",")] if text else known
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{option}: no {', '.join(unknown)}; there are {', '.join(known)}")
    return names
