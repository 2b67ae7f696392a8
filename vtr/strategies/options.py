"""Search of options: all of a grid, or one number that is solved for the target."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from vtr.core.method import Method
from vtr.errors import UnsupportedMethodError
from vtr.strategies.base import Candidate, Searcher, Strategy
from vtr.strategies.solving import solved
from vtr.strategies.target import Target

BUDGETS = {"keep": 1, "density": 1, "drop": -1}
"""Options that say how much is computed, and whether a larger one computes more (1) or less (-1)."""


@dataclass(frozen=True)
class Grid(Strategy):
    """Try every combination of options.

    Args:
        options: name of an option to the values to try: ``{"density": (0.2, 0.3), "order": ("hilbert", "raster")}``.
            Combinations that the method refuses, and those over the budget, are left out.
    """

    name: ClassVar[str] = "grid"

    options: Mapping[str, Sequence[Any]] = ()  # type: ignore[assignment]

    def validate(self) -> None:
        given = self.options
        if not isinstance(given, Mapping) or not given:
            raise ValueError(
                f"options must map names to values, {{'keep': (0.5, 0.25)}}, got {given!r}"
            )
        for name, values in given.items():
            if not isinstance(values, (list, tuple)) or not values:
                raise ValueError(f"options[{name!r}] must be a list of values, got {values!r}")

    def check(self, method: Method, target: Target) -> None:
        known = [f.name for f in fields(method) if f.init]
        for name in self.options:
            if name not in known:
                raise ValueError(
                    f"{method.name} has no option {name!r}; it has: {', '.join(known)}"
                )

    def to_dict(self) -> dict[str, Any]:
        options = {name: list(values) for name, values in self.options.items()}
        return {"name": self.name, "options": options}

    def run(self, search: Searcher) -> None:
        refused = []
        for values in itertools.product(*self.options.values()):
            changes = dict(zip(self.options, values, strict=True))
            try:
                method = search.method.replace(**changes)
                candidate = Candidate(method)
                if search.over(candidate) <= 1:
                    search.measure(candidate, changes)
            except UnsupportedMethodError:
                raise
            except ValueError as error:
                refused.append(f"{changes}: {error}")
        if refused and not search.study.trials():
            raise ValueError(f"no combination of options works, for example {refused[0]}")


@dataclass(frozen=True)
class Uniform(Strategy):
    """Solve the method's one budget for the target, and leave the distribution over layers to the method.

    The baseline of a search: ``keep``, ``density`` or ``drop`` of the method as one number, the largest within
    the budget, or the smallest within the tolerated loss.

    Args:
        option: name of the option; None is the first of ``keep``, ``density`` and ``drop`` that the method has.
    """

    name: ClassVar[str] = "uniform"

    option: str | None = None

    def check(self, method: Method, target: Target) -> None:
        self._option(method)

    def _option(self, method: Method) -> str:
        known = {f.name for f in fields(method) if f.init}
        if self.option is not None:
            if self.option not in known:
                raise ValueError(f"{method.name} has no option {self.option!r}")
            return self.option
        for name in BUDGETS:
            if name in known:
                return name
        raise UnsupportedMethodError(
            f"{method.name} has none of the options {', '.join(BUDGETS)}: name the one that says how much is "
            "computed, vtr.strategies.Uniform(option), or try values, vtr.strategies.Grid({option: values})"
        )

    def run(self, search: Searcher) -> None:
        name = self._option(search.method)
        sign = BUDGETS.get(name, 1)

        def made(value: float) -> Candidate:
            share = round(value if sign > 0 else 1 - value, 4)
            changes: dict[str, Any] = {name: share}
            if name == "keep" and hasattr(search.method, "r"):
                changes["r"] = None
            return Candidate(search.method.replace(**changes))

        found = solved(search, made, 0.001, 1.0, steps=14)
        if found is not None:
            search.measure(found)
