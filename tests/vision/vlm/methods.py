"""Every method of the registry, with a budget that cuts short prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import vtr
from vtr.core.registry import registry


def method_of(name: str) -> vtr.Method:
    if name == "debias":
        return vtr.Debias(vtr.FastV(keep=0.3))
    names = {field.name for field in dataclasses.fields(registry()[name])}
    options: dict[str, Any] = {"keep": 0.3} if "keep" in names else {}
    if name == "random":
        options["seed"] = 3
    return vtr.create(name, **options)


def cutting(model: Any) -> Iterator[vtr.Method]:
    """Those that a model supports, of the methods that decide about tokens."""
    for support in vtr.supported(model):
        cls = registry()[support.name]
        if support.supported and issubclass(cls, vtr.TokenMethod) and cls.training != "required":
            yield method_of(support.name)
