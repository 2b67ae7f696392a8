"""A plan: methods with their budgets, as a JSON file that can be saved, shared and applied."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtr.core.method import Method
from vtr.core.registry import create

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Methods to apply together, with free-form ``notes`` (where the plan comes from).

    >>> Plan((vtr.EViT(keep=0.7),)).save("plan.json")
    >>> vtr.apply(model, vtr.Plan.load("plan.json"))
    """

    methods: tuple[Method, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: Any = self.methods
        methods = (given,) if isinstance(given, Method) else given
        methods = tuple(methods) if isinstance(methods, Iterable) else ()
        if not methods or not all(isinstance(m, Method) for m in methods):
            raise ValueError("methods must be a method or a non-empty sequence of methods")
        if not isinstance(self.notes, Mapping):
            raise ValueError(f"notes must be a mapping, got {self.notes!r}")
        object.__setattr__(self, "methods", methods)

    def to_dict(self) -> dict[str, Any]:
        return {
            "vtr_plan": VERSION,
            "methods": [m.to_dict() for m in self.methods],
            "notes": dict(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Take back what :meth:`to_dict` made. Raises ``ValueError`` for anything else."""
        if data.get("vtr_plan") != VERSION:
            raise ValueError(f"not a plan of version {VERSION}: vtr_plan={data.get('vtr_plan')!r}")
        methods, notes = data.get("methods"), data.get("notes", {})
        if not isinstance(methods, Sequence) or isinstance(methods, str):
            raise ValueError(f"methods must be a list, got {methods!r}")
        for m in methods:
            if not isinstance(m, Mapping) or "name" not in m:
                raise ValueError(f"a method must be an object with its name and options, got {m!r}")
        if not isinstance(notes, Mapping):
            raise ValueError(f"notes must be an object, got {notes!r}")
        return cls(tuple(create(**m) for m in methods), dict(notes))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. Raises ``ValueError`` for a file that is none, naming the file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise ValueError("the file holds no JSON object")
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
