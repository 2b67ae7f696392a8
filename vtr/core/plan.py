"""A plan: methods with their budgets and calibrated numbers, as a file that can be saved, shared and applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vtr.core import plan_files
from vtr.core.calibration import Fingerprint, Table
from vtr.core.method import Method
from vtr.core.registry import create

VERSION = 1
CALIBRATED = 2
"""Version of a plan for one model; releases that do not know tables must not read it."""


@dataclass(frozen=True)
class Plan:
    """Methods to apply together, with free-form ``notes`` (where the plan comes from).

    >>> Plan((vtr.EViT(keep=0.7),)).save("plan.json")
    >>> vtr.apply(model, vtr.Plan.load("plan.json"))

    :func:`vtr.calibrate` returns plans with the last four:

    Attributes:
        methods: applied together.
        notes: free-form.
        fingerprint: the model that the plan is for; None if it is for any.
        tables: calibrated numbers, name to tensor on the CPU: one table per method, or none at all.
        data: description of the data that the tables come from.
        versions: of the libraries that computed them.
    """

    methods: tuple[Method, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None
    tables: tuple[Table, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: Any = self.methods
        methods = (given,) if isinstance(given, Method) else given
        methods = tuple(methods) if isinstance(methods, Iterable) else ()
        if not methods or not all(isinstance(m, Method) for m in methods):
            raise ValueError("methods must be a method or a non-empty sequence of methods")
        for name in ("notes", "data", "versions"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a mapping, got {getattr(self, name)!r}")
        object.__setattr__(self, "methods", methods)
        object.__setattr__(self, "tables", tuple(map(_checked, self.tables)))
        if len(self.tables) not in (0, len(methods)):
            raise ValueError(
                f"tables must have one table per method, {len(methods)}, got {len(self.tables)}"
            )
        if self.tables and self.fingerprint is None:
            raise ValueError(
                "tables belong to one model and need its fingerprint: vtr.calibrate returns a plan with both"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        same = self.methods == other.methods and self.tables_hash == other.tables_hash
        return same and self._described() == other._described()

    def __hash__(self) -> int:
        return hash(self.methods)

    @property
    def tables_hash(self) -> str:
        """SHA-256 of the tables: names, dtypes, shapes and numbers, in hexadecimal. Empty without tables."""
        return plan_files.tables_hash(self.tables) if self.tables else ""

    def parts(self) -> list[tuple[Method, Table]]:
        """Return the methods, each with its table (empty without one)."""
        return list(zip(self.methods, self.tables or [{}] * len(self.methods), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values, tables with all their numbers."""
        return self._described() | (
            {"tables": [plan_files.listed(t) for t in self.tables]} if self.tables else {}
        )

    def _described(self) -> dict[str, Any]:
        """The plan as plain JSON values without its tables."""
        plain = {
            "vtr_plan": VERSION if self.fingerprint is None else CALIBRATED,
            "methods": [m.to_dict() for m in self.methods],
            "notes": dict(self.notes),
        }
        if self.fingerprint is None:
            return plain
        origin = {"data": dict(self.data), "versions": dict(self.versions)}
        return {**plain, "model": self.fingerprint.to_dict(), **origin}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Take back what :meth:`to_dict` returned. Raises ``ValueError`` for anything else."""
        return cls._from(data, [plan_files.tensors(t) for t in _listed(data, "tables", ())])

    @classmethod
    def _from(cls, data: Mapping[str, Any], tables: Sequence[Table]) -> Plan:
        version = data.get("vtr_plan")
        if version not in (VERSION, CALIBRATED):
            raise ValueError(
                f"not a plan of version {VERSION} or {CALIBRATED}: vtr_plan={version!r}"
            )
        methods = _listed(data, "methods")
        for m in methods:
            if not isinstance(m, Mapping) or "name" not in m:
                raise ValueError(f"a method must be an object with its name and options, got {m!r}")
        free = {name: data.get(name, {}) for name in ("notes", "data", "versions")}
        for name, value in free.items():
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} must be an object, got {value!r}")
        model = Fingerprint.from_dict(data.get("model")) if version == CALIBRATED else None
        made = tuple(create(**m) for m in methods)
        return cls(
            made, fingerprint=model, tables=tuple(tables), **{k: dict(v) for k, v in free.items()}
        )

    def save(self, path: str | Path) -> None:
        """Write the plan: as safetensors if the file's name ends in ``.safetensors``, else as JSON.

        Raises:
            ValueError: the tables have too many numbers for JSON, more than
                :data:`vtr.core.plan_files.LIMIT`.
        """
        if Path(path).suffix == plan_files.ENDING:
            plan_files.write_tensors(path, self._described(), self.tables)
        else:
            plan_files.write_json(path, self.to_dict, self.tables)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. Raises ``ValueError`` for a file that is none, naming the file."""
        try:
            if Path(path).suffix == plan_files.ENDING:
                return cls._from(*plan_files.read_tensors(path))
            return cls.from_dict(plan_files.read_json(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _listed(data: Mapping[str, Any], name: str, default: Any = None) -> Sequence[Any]:
    found = data.get(name, default)
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ValueError(f"{name} must be a list, got {found!r}")
    return found


def _checked(table: Any) -> Table:
    if not isinstance(table, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in table.items()
    ):
        raise ValueError(f"a table must map names to tensors, got {table!r}")
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in table.items()}
