"""What of a diffusion transformer's call a block needs that runs again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vtr.core.trace import Trace

if TYPE_CHECKING:
    from vtr.diffusion.adapter import DiffusionWrapping

# What of a wrapping belongs to one forward call of the transformer.
_FACTS = (
    "call",
    "batch",
    "rows",
    "text",
    "sample",
    "memory",
    "reduced",
    "costed",
    "again",
    "_trace",
)


def facts(wrapping: DiffusionWrapping) -> dict[str, Any]:
    """The facts of the running call."""
    return {name: getattr(wrapping, name) for name in _FACTS}


@contextlib.contextmanager
def repeating(wrapping: DiffusionWrapping, known: dict[str, Any]) -> Iterator[None]:
    """Put the facts of an earlier call in place, and back those of the last one."""
    now = facts(wrapping)
    # Nothing of it is counted twice.
    fresh = {
        "sample": {}, "memory": {}, "reduced": {}, "costed": [0.0, 0.0], "again": True,
        "_trace": Trace(notes={"attention": {}}),
    }  # fmt: skip
    wrapping.__dict__.update({**known, **fresh})
    try:
        yield
    finally:
        wrapping.__dict__.update(now)
