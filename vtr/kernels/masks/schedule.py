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
    for one in chosen:
        if isinstance(one, float):
            if steps is None:
                raise RuntimeError(
                    f"{one} is a share of the steps, and their number is not known here: apply the "
                    "method to the pipeline, or with vtr.apply(..., steps=50), or give numbers of steps"
                )
            one = int(one * steps + 1e-9)
        if one == step:
            return True
    return False
