"""Schedules over the steps of a training run: of learning rates, and of the share of tokens that is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vtr.core.method import Method

RATES = ("constant", "cosine", "linear")
SHRINKS = ("cosine", "linear", "step")


def rate_factor(
    step: int, steps: int, shape: str = "cosine", warmup: int = 0, final: float = 0.01
) -> float:
    """Return the factor of the learning rates at a step, counted from 0.

    Args:
        steps: of the run.
        shape: ``"constant"``, or ``"cosine"`` or ``"linear"``, which fall from 1 to ``final``.
        warmup: steps in which the factor rises linearly, ``(step + 1) / warmup`` times the shape's.
    """
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if shape == "constant":
        return rising
    left = 1 - step / steps if shape == "linear" else 0.5 * (1 + math.cos(math.pi * step / steps))
    return rising * (final + (1 - final) * left)


@dataclass(frozen=True)
class Shrink:
    """A schedule of a method's ``keep``: all tokens first, then fewer, down to the method's own share.

    The share at progress x in [0, 1] is ``keep + (1 - keep) w(x)``:

    - ``"cosine"``: w = (1 + cos(pi x)) / 2 (EViT, arXiv 2202.07800: 100 of 300 epochs, after 10 with all tokens);
    - ``"linear"``: w = 1 - x;
    - ``"step"``: w falls by 1 / ``levels`` at the end of each of so many equal parts.

    Attributes:
        steps: in which the share falls.
        shape: of the fall.
        begin: steps before with all tokens.
        levels: of ``"step"``.

    Raises:
        ValueError: a value that cannot be; the message names it.
    """

    steps: int
    shape: str = "cosine"
    begin: int = 0
    levels: int = 4

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("begin", 0), ("levels", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        if self.shape not in SHRINKS:
            raise ValueError(f"shape must be one of {', '.join(SHRINKS)}, got {self.shape!r}")

    def weight(self, step: int) -> float:
        """Return w at a step, counted from 0: 1 at first, 0 in the end."""
        x = min(max(step - self.begin, 0) / self.steps, 1.0)
        if self.shape == "cosine":
            return 0.5 * (1 + math.cos(math.pi * x))
        if self.shape == "linear":
            return 1 - x
        return 1 - math.floor(x * self.levels) / self.levels

    def check(self, method: Method) -> None:
        """Raise ``ValueError`` if a method has no ``keep``, or one that counts tokens."""
        keep = getattr(method, "keep", None)
        parts = keep if isinstance(keep, tuple) else (keep,)
        if not all(isinstance(k, float) for k in parts):
            raise ValueError(
                f"shrink needs a method whose keep is a share of the tokens (a float), and {method.name} has "
                f"keep={keep!r}"
            )

    def at(self, step: int, method: Any) -> Any:
        """Return the method with the ``keep`` that it has at a step."""
        w = self.weight(step)
        if w == 0:
            return method
        keep = method.keep
        now = [min(k + (1 - k) * w, 1.0) for k in (keep if isinstance(keep, tuple) else (keep,))]
        return method.replace(keep=tuple(now) if isinstance(keep, tuple) else now[0])
