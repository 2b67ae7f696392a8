"""Schedules: the steps at which a mask is chosen. The last of six parts of a mask chosen at run time."""

from __future__ import annotations

from collections.abc import Sequence


def at_steps(step: int, steps: int | None, chosen: Sequence[int | float]) -> bool:
    """Tell whether a step is one of those at which a mask is chosen.

    Args:
        step: 0-based. steps: of the run, or None if nobody knows.
        chosen: 0-based steps (int), or shares of the run (float in [0, 1), rounded down).

    Raises:
        RuntimeError: a share is given, and the number of steps is not known.
    """
    return step in _numbers(steps, chosen)


def steps_due(step: int, steps: int | None, chosen: Sequence[int | float]) -> int:
    """Count the steps at which a mask is chosen up to this one: a cache may have skipped one of them.

    Arguments and errors as :func:`at_steps`.
    """
    return sum(number <= step for number in _numbers(steps, chosen))


def _numbers(steps: int | None, chosen: Sequence[int | float]) -> list[int]:
    numbers = []
    for one in chosen:
        if isinstance(one, float):
            if steps is None:
                raise RuntimeError(
                    f"{one} is a share of the steps, and their number is not known here: apply the "
                    "method to the pipeline, or with vtr.apply(..., steps=50), or give numbers of steps"
                )
            one = int(one * steps + 1e-9)
        numbers.append(one)
    return numbers
