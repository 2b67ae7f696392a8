"""Activation checkpointing: a block that runs again in the backward pass sees the call it was part of.

By then the transformer may have been called again, with another step, size or text (gradients through
several denoising steps, or two losses and one backward pass).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vtr.compat.diffusers import CHECKPOINT
from vtr.trace import Trace
from vtr.wrapping import Bound, Entry

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


def adopt(wrapping: DiffusionWrapping, member: Any) -> None:
    """Lead the function by which diffusers checkpoints a block through :meth:`Again.__call__`."""
    held = member.__dict__.get(CHECKPOINT)
    if held is not None and not isinstance(held, Bound):
        member.__dict__[CHECKPOINT] = Bound(wrapping, "checkpointed", held)


def release(wrapping: DiffusionWrapping, member: Any) -> None:
    """The function that was there, or that was set since."""
    held = member.__dict__.get(CHECKPOINT)
    if isinstance(held, Bound) and held.owner is wrapping:
        member.__dict__[CHECKPOINT] = held.bound[0]


class Again:
    """A block whose calls after the first are those of the backward pass."""

    def __init__(self, wrapping: DiffusionWrapping, block: Callable[..., Any]) -> None:
        self.wrapping, self.block = wrapping, block
        self.facts: dict[str, Any] | None = None
        self.entries: list[Entry] = []

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = {name: getattr(self.wrapping, name) for name in _FACTS}
        if self.facts is None:
            self.facts, self.entries = now, self.wrapping.active
            return self.block(*args, **kwargs)
        if self.wrapping.active != self.entries:
            raise RuntimeError(
                "methods were applied, paused or removed between a call of the transformer and its "
                "backward pass, in which activation checkpointing runs its blocks again: go backward "
                "first (inside of `with vtr.apply(...)`)"
            )
        # Nothing of it is counted twice.
        fresh = {
            "sample": {}, "memory": {}, "reduced": {}, "costed": [0.0, 0.0], "again": True,
            "_trace": Trace(notes={"attention": {}}),
        }  # fmt: skip
        self.wrapping.__dict__.update({**self.facts, **fresh})
        try:
            return self.block(*args, **kwargs)
        finally:
            self.wrapping.__dict__.update(now)
