"""The findings of ``vtr doctor``, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

GOOD, ABSENT, UNTESTED, BROKEN = "ok", "not here", "not tested", "broken"


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: a library, a device, a backend.
        status: ``"ok"``; ``"not here"`` (something optional); ``"not tested"`` (a version that the
            tests have not run on); ``"broken"``.
        detail: versions, sizes, errors, and advice.
    """

    name: str
    status: str
    detail: str = ""


@dataclass
class Diagnosis:
    """The findings of ``vtr doctor``, part by part."""

    parts: dict[str, list[Finding]] = field(default_factory=dict)

    @property
    def broken(self) -> list[str]:
        """List what does not work, of what vtr needs and of the optional libraries that are installed."""
        return [
            f"{part}: {f.name}: {f.detail}"
            for part, found in self.parts.items()
            for f in found
            if f.status == BROKEN
        ]

    def to_json(self) -> str:
        """The findings by part, and whether nothing is broken."""
        parts = {part: [asdict(f) for f in found] for part, found in self.parts.items()}
        return json.dumps({**parts, "ok": not self.broken}, indent=2)

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title="vtr doctor", title_justify="left")
        for column in ("", "name", "status", "detail"):
            table.add_column(column, no_wrap=column in ("name", "status"))
        colours = {GOOD: "green", ABSENT: "dim", UNTESTED: "yellow", BROKEN: "bold red"}
        for part, found in self.parts.items():
            for i, f in enumerate(found):
                shown = f"[{colours[f.status]}]{f.status}[/]"
                table.add_row("" if i else part, f.name, shown, escape(f.detail))
            table.add_section()
        return table
