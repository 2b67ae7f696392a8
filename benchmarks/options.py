"""Options that the benchmarks share, and their tables on disk."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def named(option: str, text: str | None, known: Iterable[str]) -> list[str]:
    """Split ``text`` at commas into known names; all of them without a text. Ends the program for others."""
    known = list(known)
    names = [name.strip() for name in text.split(",")] if text else known
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{option}: no {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def save(path: Path, where: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write a CSV file of all rows so far, below comments that name the machine and the versions.

    Called whenever a row is there, so that a benchmark that is stopped leaves what it measured. The file changes
    in one step. Columns that only later rows have come last.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.part")
    with half.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {line}\n" for line in where)
        fields = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, fields, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(half, path)


class Limit:
    """Seconds that a benchmark has; it begins no case that would not fit."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.monotonic()
        self.before, self.longest = self.start, 0.0

    def left(self, what: str) -> bool:
        """Tell whether another case fits that takes as long as the longest so far; prints the name of one that
        does not."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.before)
        self.before = now
        if now - self.start + self.longest <= self.seconds:
            return True
        print(f"{what}: left out, no time (--limit {self.seconds:g})", flush=True)
        return False
