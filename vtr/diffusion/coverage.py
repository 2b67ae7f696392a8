"""List the transformers of the installed diffusers: wrapped, refused, not wrapped yet."""

from __future__ import annotations

from typing import Literal, NamedTuple

from vtr.compat.diffusers import transformer_classes
from vtr.diffusion.families import FAMILIES, LATER, REFUSED

State = Literal["wrapped", "refused", "not yet", "unknown"]


class Covered(NamedTuple):
    """One transformer class of diffusers.

    Attributes:
        name: of the class.
        state: ``"wrapped"``; ``"refused"``, as it cannot work; ``"not yet"``, as nobody has written its
            entry; ``"unknown"`` for a class that is newer than this version of vtr.
        about: the family, or the reason.
    """

    name: str
    state: State
    about: str = ""


def coverage() -> tuple[Covered, ...]:
    """List the transformer classes of the installed diffusers, in alphabetical order.

    Raises:
        ImportError: diffusers is not installed.
    """
    return tuple(_covered(name) for name in transformer_classes())


def _covered(name: str) -> Covered:
    for family in FAMILIES:
        if name in family.classes:
            return Covered(name, "wrapped", family.name)
    if name in REFUSED:
        return Covered(name, "refused", REFUSED[name])
    return Covered(name, "not yet" if name in LATER else "unknown")


def markdown() -> str:
    """The same as a table for ``docs/diffusion.md``: wrapped classes first."""
    order: tuple[State, ...] = ("wrapped", "refused", "not yet", "unknown")
    rows = sorted(coverage(), key=lambda row: order.index(row.state))
    lines = ["| class of diffusers | state | family, or why not |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| `{r.name}` | {r.state} | {r.about} |" for r in rows)])
