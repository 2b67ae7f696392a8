"""The results of a sweep, which can be shown and saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtr.evaluate import table as shown
from vtr.evaluate.outcomes import Outcomes


@dataclass(frozen=True)
class Results(Outcomes):
    """The findings of a sweep, with its tables and its plot."""

    def table(self) -> Any:
        """A rich table; printing results in a rich console shows it."""
        return shown.rich_table(self)

    def __rich__(self) -> Any:
        return self.table()

    def __str__(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """The table in Markdown."""
        return shown.markdown(self)

    def csv(self) -> str:
        """The table as comma-separated values, with every metric of lmms-eval."""
        return shown.csv_text(self)

    def save(self, folder: Any, name: str = "evaluation") -> list[Any]:
        """Write CSV, Markdown and the plot into a folder; returns the paths."""
        return shown.save(self, folder, name)
