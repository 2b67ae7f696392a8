"""Runs of many configurations on the same questions: one after the other, resumable, compared with baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, Protocol, TypeVar

from vtr.core.method import Method


class Result(Protocol):
    """A result of one configuration: it has the name of the method, and the method with its settings."""

    @property
    def name(self) -> str: ...
    @property
    def method(self) -> str: ...


R = TypeVar("R", bound=Result)


def measure_all(
    bare: str,
    chosen: Mapping[str, Sequence[Method]],
    measure: Callable[[str, Method | None], R],
    *,
    known: Sequence[R] = (),
    report: Callable[[list[R]], object] = lambda results: None,
    progress: bool = False,
) -> list[R]:
    """Measure the bare model, then every method in each of its settings.

    Args:
        bare: name and setting of the bare model in the results.
        chosen: methods by their names.
        measure: called with the name, and the method or None for the bare model.
        known: results that need not be measured again.
        report: called with all results after each new one.
        progress: draw a progress bar.
    """
    from rich.progress import Progress

    jobs: list[tuple[str, Method | None]] = [(bare, None)]
    jobs += [(name, method) for name, settings in chosen.items() for method in settings]
    have = {(r.name, r.method): r for r in known}
    results = []
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("held-out questions", total=len(jobs))
        for name, method in jobs:
            bar.update(task, description=name)
            key = (name, bare if method is None else str(method))
            new = have.get(key) or measure(name, method)
            results.append(new)
            if key not in have:
                report(results)
            bar.advance(task)
    return results


def seeded(method: Method | None, seed: int) -> Any:
    """Return the method with this seed if it draws, else the method itself."""
    if method is not None and any(f.name == "seed" for f in fields(method)):  # type: ignore[arg-type]
        return replace(method, seed=seed)  # type: ignore[call-arg]
    return method


def on_the_line(points: Iterable[tuple[float, float]], at: float) -> float | None:
    """Read y at ``at`` off the straight lines between points (x, y); None outside of them."""
    for (low, below), (high, above) in pairwise(sorted(set(points))):
        if low <= at <= high:
            return below if low == high else below + (above - below) * (at - low) / (high - low)
    return None
