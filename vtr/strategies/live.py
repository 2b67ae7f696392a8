"""The live table of a search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from vtr.strategies.study import Study, TrialRecord
    from vtr.strategies.target import Target

ROWS = 5


@contextmanager
def showing(
    study: Study, target: Target, title: str, progress: bool
) -> Iterator[Callable[[Study], object]]:
    """Show the trials of a study while it runs, on the standard error; yields what is called after each."""
    if not progress:
        yield lambda study: None
        return
    from rich.console import Console
    from rich.live import Live

    # Standard error: a pipe that reads the result must not see the table.
    with Live(table(study, target, title), console=Console(stderr=True), transient=True) as live:
        yield lambda study: live.update(table(study, target, title))


def table(study: Study, target: Target, title: str) -> Table:
    """Build a table of the best trials, with the numbers of all."""
    from rich.markup import escape
    from rich.table import Table

    trials = study.trials()
    states = Counter(trial.state for trial in trials)
    numbers = (
        ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no trial yet"
    )
    out = Table(title=f"{escape(title)}, {escape(str(target.to_dict()))}", caption=numbers)
    names = [n for n in ("flops", "tokens", "kv", "latency") if any(n in t.costs for t in trials)]
    for column in ("trial", "loss", *names):
        out.add_column(column, justify="right")
    out.add_column("tokens left after each layer")
    for trial in ranked(trials)[:ROWS]:
        shares = [f"{trial.costs[n]['share']:.3f}" if n in trial.costs else "" for n in names]
        kept = trial.plain.get("schedule", {}).get("kept", ())
        out.add_row(str(trial.number), f"{trial.loss:.4g}", *shares, shortened(kept))
    return out


def ranked(trials: list[TrialRecord]) -> list[TrialRecord]:
    """Sort the measured trials: those that have reached the target first, then by value."""
    found = [t for t in trials if t.state == "complete" and t.value is not None]
    return sorted(found, key=lambda t: (not t.reached, t.value, t.number))


def shortened(kept: object, most: int = 12) -> str:
    """Write the numbers of a schedule, of a deep model some of them."""
    numbers = list(kept) if isinstance(kept, (list, tuple)) else []
    step = max(1, -(-len(numbers) // most))
    return " ".join(str(n) for n in numbers[::step])
