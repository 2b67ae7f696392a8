"""A plan: methods with their budgets and calibrated numbers, as a file that can be saved, shared and applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vtr.core import plan_files, plan_hub
from vtr.core.calibration import Fingerprint, Table
from vtr.core.method import Method
from vtr.core.registry import create

VERSION = 1
CALIBRATED = 2
"""Version of a plan for one model; releases that do not know tables must not read it."""
SEARCHED = 3
"""Version of a plan with measured results."""


@dataclass(frozen=True)
class Plan:
    """Methods to apply together, with free-form ``notes`` (where the plan comes from).

    >>> Plan((vtr.EViT(keep=0.7),)).save("plan.json")
    >>> vtr.apply(model, vtr.Plan.load("plan.json"))

    :func:`vtr.calibrate` returns plans with the next four, and :func:`vtr.search` those with all:

    Attributes:
        methods: applied together.
        notes: free-form.
        fingerprint: the model that the plan is for; None if it is for any.
        tables: calibrated numbers, name to tensor on the CPU: one table per method, or none at all.
        data: description of the data that the tables and results come from.
        versions: of the libraries that computed them.
        measured: the result of a search, and how it was measured: loss, costs, schedule, objective, target,
            strategy, seed, trials.
    """

    methods: tuple[Method, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None
    tables: tuple[Table, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: Any = self.methods
        methods = (given,) if isinstance(given, Method) else given
        methods = tuple(methods) if isinstance(methods, Iterable) else ()
        if not methods or not all(isinstance(m, Method) for m in methods):
            raise ValueError("methods must be a method or a non-empty sequence of methods")
        for name in ("notes", "data", "versions", "measured"):
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
        version = VERSION if self.fingerprint is None else CALIBRATED
        plain = {
            "vtr_plan": SEARCHED if self.measured else version,
            "methods": [m.to_dict() for m in self.methods],
            "notes": dict(self.notes),
        }
        if self.measured:
            plain["measured"] = dict(self.measured)
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
        if version not in (VERSION, CALIBRATED, SEARCHED):
            raise ValueError(
                f"not a plan of version {VERSION}, {CALIBRATED} or {SEARCHED}: vtr_plan={version!r}"
            )
        methods = _listed(data, "methods")
        for m in methods:
            if not isinstance(m, Mapping) or "name" not in m:
                raise ValueError(f"a method must be an object with its name and options, got {m!r}")
        free = {name: data.get(name, {}) for name in ("notes", "data", "versions", "measured")}
        for name, value in free.items():
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} must be an object, got {value!r}")
        known = version == CALIBRATED or (version == SEARCHED and "model" in data)
        model = Fingerprint.from_dict(data.get("model")) if known else None
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

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        message: str = "Upload a plan",
    ) -> str:
        """Upload the plan to the Hugging Face hub, with a card that has a table of what was measured.

        The files are ``plan.json`` (``plan.safetensors`` with tables that are too large for JSON) and ``README.md``.
        The address of the hub is that in the environment variable ``HF_ENDPOINT``.

        Args:
            repo_id: ``"name/repository"``; it is created if it does not exist.
            private: of a new repository.
            token: of the hub; None is the one that was logged in with.
            revision: branch; None is the main one.
            message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            MissingDependencyError: huggingface_hub is not installed.
        """
        numbers = sum(tensor.numel() for table in self.tables for tensor in table.values())
        return plan_hub.push(
            self.save, self._described(), repo_id, large=numbers > plan_files.LIMIT, private=private,
            token=token, revision=revision, message=message,
        )  # fmt: skip

    @classmethod
    def from_hub(
        cls, repo_id: str, *, revision: str | None = None, token: str | None = None
    ) -> Plan:
        """Download a plan that :meth:`push_to_hub` has uploaded. Only JSON and safetensors are read, never code.

        Raises:
            ValueError: the repository does not exist, or has no plan.
            MissingDependencyError: huggingface_hub is not installed.
        """
        return cls.load(plan_hub.fetch(repo_id, revision=revision, token=token))


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
