"""Parts of the commands that compare methods: the choice of methods, and results that a stopped run left."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from vtr.core.method import Method
from vtr.evaluate.configurations import Result

R = TypeVar("R", bound=Result)


def choose(
    parser: argparse.ArgumentParser,
    everything: Mapping[str, list[Method]],
    names: Sequence[str] | None,
    what: str,
) -> dict[str, list[Method]]:
    """Return the methods that are called ``names``, all for None; an unknown name ends the command.

    Args:
        parser: of the command.
        everything: methods in their settings, by name.
        names: as the user gave them.
        what: kind of the methods, for the message.
    """
    if names is None:
        return dict(everything)
    unknown = sorted(set(names) - set(everything))
    if unknown:
        parser.error(
            f"no {what} is called {', '.join(unknown)}; there are: {', '.join(everything)}"
        )
    return {name: everything[name] for name in names}


class Store(Generic[R]):
    """Results in PREFIX.json, with the facts that they were measured on.

    Args:
        parser: of the command; results that were measured on other facts end it.
        prefix: None stores nothing.
        facts: what the results depend on.
        row: makes a result from its dictionary in the JSON file.
        beside: facts that may differ from those of the stored results.

    Attributes:
        path: of the JSON file, or None.
        known: results that were there.
    """

    def __init__(
        self,
        parser: argparse.ArgumentParser,
        prefix: Path | None,
        facts: Mapping[str, Any],
        row: Callable[[Mapping[str, Any]], R],
        *,
        beside: Sequence[str] = (),
    ) -> None:
        self.path = None if prefix is None else Path(f"{prefix}.json")
        self.facts = facts
        self.known: list[R] = []
        if self.path is not None and self.path.is_file():
            held = json.loads(self.path.read_text())
            if any(held.get(k) != v for k, v in facts.items() if k not in beside):
                parser.error(
                    f"{self.path} was measured on something else: delete it, or give another --out"
                )
            self.known = [row(r) for r in held["results"]]

    def keep(self, done: Sequence[R]) -> list[R]:
        """Write results, with those of methods that this run has not come to or does not run."""
        together = [*done, *(r for r in self.known if r not in done)]
        self._write(together)
        return together

    def finish(self, done: Sequence[R], *, everything: bool) -> list[R]:
        """Write the last results; of a run of everything, results of other settings are left out."""
        if not everything:
            return self.keep(done)
        self._write(done)
        return list(done)

    def _write(self, results: Sequence[R]) -> None:
        if self.path is None:
            return
        content = {**self.facts, "results": [asdict(r) for r in results]}  # type: ignore[call-overload]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1) + "\n")
