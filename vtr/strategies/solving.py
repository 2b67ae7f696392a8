"""One parameter of a candidate, solved for the target of a search by bisection."""

from __future__ import annotations

from collections.abc import Callable

from vtr.errors import UnsupportedMethodError
from vtr.strategies.base import Candidate, Searcher

STEPS = 24  # of a bisection


def solved(
    search: Searcher,
    made: Callable[[float], Candidate],
    low: float,
    high: float,
    steps: int = STEPS,
) -> Candidate | None:
    """Solve one parameter for the target.

    Args:
        search: the search.
        made: parameter to candidate; a larger one keeps more.
        low, high: the range of the parameter.
        steps: of the bisection.

    Returns:
        With a budget, the candidate of the largest parameter within it; with a tolerated loss, that of the smallest
        parameter within it. None if none is.
    """
    wanted = search.target.loss
    seen: dict[str, bool] = {}
    refused: list[float] = []

    def fits(value: float) -> bool:
        candidate = made(value)
        key = repr(candidate.plain())
        if key not in seen:
            try:
                if wanted is None:
                    seen[key] = search.over(candidate) <= 1
                else:
                    loss = search.runner.evaluate(search.plan_of(candidate)).loss
                    seen[key] = loss <= wanted
            except UnsupportedMethodError:
                raise
            except ValueError:  # the method refuses it: so few tokens cannot be left
                refused.append(value)
                seen[key] = wanted is None
        return seen[key]

    good, bad = (low, high) if wanted is None else (high, low)
    if fits(bad):
        good = bad
    elif not fits(good):
        return None
    for _ in range(steps if good != bad else 0):
        middle = (good + bad) / 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return None if good in refused else made(good)
