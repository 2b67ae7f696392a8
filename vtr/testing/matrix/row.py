"""One row of the support matrix, and what is asked of vtr for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch

import vtr
from vtr.api import _wrapping
from vtr.core.registry import registry

State = Literal["works", "partly", "refused"]


class Row(NamedTuple):
    """One class of models.

    Attributes:
        kind: ``"vlm"``, ``"tower"``, ``"dit"`` or ``"unet"``.
        library: that has the class.
        name: of the class.
        state: ``"works"``; ``"partly"``, if something that its kind usually has is closed; ``"refused"``.
        sites: those where methods work.
        methods: how many of the registered methods do.
        about: what is closed, or why the class is refused.
    """

    kind: str
    library: str
    name: str
    state: State
    sites: tuple[str, ...] = ()
    methods: int = 0
    about: str = ""


def refusal(model: Any) -> str:
    """Return the reason why ``vtr.apply`` takes a model with no method, shortened; empty if it takes it with some."""
    try:
        found = vtr.supported(model)
    except vtr.UnsupportedModelError as error:
        text = " ".join(str(error).split())
        text = re.sub(r"^(?:\w+ )?\w+ is not supported: ", "", text)
        text = re.sub(r"^no adapter for [\w.]+\.(\w+)\.", r"no adapter for \1.", text)
        return re.split(r"\.? (?:Supported|Supported families): ", text)[0].rstrip(".")
    return "" if any(row.supported for row in found) else found[0].reason


def working(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites at which registered methods work on a model, and the names of these methods."""
    names = tuple(row.name for row in vtr.supported(model) if row.supported)
    info = _wrapping(model).info
    sites = {stage.site: None for name in names for stage in registry()[name]().stages(info)}
    return tuple(sites), names


def broken(laws: Mapping[str, Callable[[], None]]) -> str:
    """Run laws; return which do not hold, and how."""
    found = []
    for name, check in laws.items():
        try:
            with torch.no_grad():
                check()
        except AssertionError as error:
            found.append(f"law {name!r} does not hold: {error}")
        except Exception as error:
            found.append(f"law {name!r} raised {type(error).__name__}: {error}")
    return "; ".join(found)
