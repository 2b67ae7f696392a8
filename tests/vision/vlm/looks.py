"""What a method sees, shown to a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import vtr
from tests.vision.vlm.picks import PROMPT, Pick
from vtr.core.method import Stage
from vtr.core.site import ModelInfo


@dataclass(frozen=True)
class Look(Pick):
    """Hands every site to a function."""

    see: Callable[[Any], Any] = print
    cuts: bool = True

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage(*a, cuts=self.cuts) for a in self.at)

    def reduce(self, site: Any) -> Any:
        return self.see(site)


def look(
    model: Any, at: tuple[Any, ...], see: Callable[[Any], Any], inputs: Any, **options: Any
) -> Any:
    with vtr.apply(model, Look(at, see=see, cuts=False)) as handle:
        model(**inputs, **options)
        return handle.trace


def seen(model: Any, inputs: Any, at: Any = PROMPT.at, **options: Any) -> Any:
    found: list[Any] = []
    with vtr.apply(model, Look(at, see=found.append, cuts=False), **options):
        model(**inputs)
    return found[-1]
