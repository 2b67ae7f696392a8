"""Traces of the package in a model, which must be gone after ``remove()``."""

from __future__ import annotations

from typing import Any

from torch import nn


def ours(model: nn.Module) -> list[str]:
    """Return the names of all that the package could have left behind in a model: attributes and hooks."""
    found = []
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if "vtr" in key or type(value).__module__.startswith("vtr"):
                found.append(f"{name}.{key}")
            if key.endswith("hooks") and value:
                found.append(f"{name}.{key}")
    return found


class Facts:
    """The parts of a model: state_dict keys, and the class and attributes of every module."""

    def __init__(self, model: nn.Module) -> None:
        self.keys = list(model.state_dict())
        self.classes = {n: type(m) for n, m in model.named_modules()}
        self.attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
        self.ours = ours(model)

    def state(self) -> tuple[Any, ...]:
        """Return the facts that an applied method must leave alone."""
        return self.keys, self.classes

    def new(self, before: Facts) -> str:
        """Names of the attributes that were not there before, or are no longer."""
        return ", ".join(
            f"{name}.{key}"
            for name in self.attributes
            for key in sorted(set(self.attributes[name]) ^ set(before.attributes.get(name, ())))
        )
