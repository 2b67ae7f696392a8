"""Cells of a sweep: methods with budgets and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vtr.core.budget import Keep, check_keep
from vtr.core.method import Method
from vtr.core.plan import Plan
from vtr.core.registry import create, registry
from vtr.core.text import parse

DRAWS = 16
"""Different random subsets that the samples of one seed share: sample ``n`` gets number ``n % 16``.

A draw belongs to the sample and not to its batch, so that neither the batch size, nor the number of
processes, nor where a run was resumed changes an answer."""

Group = tuple[Method, ...] | Plan
"""Methods that are applied together, or a plan for one model, which has their calibrated numbers too."""


@dataclass(frozen=True)
class Cell:
    """One configuration of a sweep.

    Attributes:
        methods: applied together; empty for the dense model.
        seed: of methods that draw random tokens, None if no method does.
        plan: the calibrated plan that the methods come from, None without one.
    """

    methods: tuple[Method, ...] = ()
    seed: int | None = None
    plan: Plan | None = None

    def __str__(self) -> str:
        return " + ".join(map(spelled, self.methods)) or "dense"

    @property
    def label(self) -> str:
        """Names of the methods alone."""
        return " + ".join(map(title, self.methods)) or "dense"

    def draw(self, doc: int) -> tuple[Method, ...]:
        """Return the methods for one sample, with the sample's own seed."""
        if self.seed is None:
            return self.methods
        return tuple(
            m.replace(seed=self.seed * DRAWS + doc % DRAWS) if is_random(m) else m
            for m in self.methods
        )

    def to_dict(self) -> dict[str, Any]:
        """Return methods, seed and the hash of calibrated numbers as plain JSON values."""
        plain = {"methods": [m.to_dict() for m in self.methods], "seed": self.seed}
        return plain if self.plan is None else {**plain, "tables": self.plan.tables_hash}


def spelled(method: Method) -> str:
    """Write a method with its budget and the options that differ from their defaults."""
    shown = []
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        if isinstance(value, Method):
            shown.append(spelled(value))
        elif f.init and (f.name == "keep" or value != f.default):
            shown.append(f"{f.name}={value!r}")
    return f"{type(method).__name__}({', '.join(shown)})"


def title(method: Method) -> str:
    """A name for a table: ``fastv``, ``debias(fastv)``, ``random@encoder``."""
    inner = _inner(method)
    if inner is not None:
        return f"{method.name}({title(getattr(method, inner))})"
    site = method.to_dict().get("site")  # an option; some classes have one site for all
    return method.name if site is None else f"{method.name}@{site}"


def is_random(method: Method) -> bool:
    """Tell whether a method draws random tokens and has no seed."""
    return getattr(method, "seed", 0) is None


def _inner(method: Method) -> str | None:
    """The field of a method that holds another method."""
    for f in dataclasses.fields(method):
        if isinstance(getattr(method, f.name), Method):
            return f.name
    return None


def with_keep(method: Method, keep: Keep) -> Method:
    """A method at another budget.

    Raises:
        ValueError: the method has no budget ``keep``, or not this one.
    """
    names = {f.name for f in dataclasses.fields(method) if f.init}
    inner = _inner(method)
    if inner is not None:
        return method.replace(**{inner: with_keep(getattr(method, inner), keep)})
    if "keep" not in names:
        raise ValueError(
            f"{method.name} has no budget 'keep'; its options are: {', '.join(sorted(names))}. Give "
            "it with its options and without keep"
        )
    return method.replace(keep=keep)


def keep_of(cell: Cell) -> Keep | None:
    """The one budget of a cell's methods; None if they have no budget, several, or one per stage."""
    found = {_keep(method) for method in cell.methods}
    return found.pop() if len(found) == 1 else None


def _keep(method: Method) -> Keep | None:
    inner = _inner(method)
    keep = _keep(getattr(method, inner)) if inner else getattr(method, "keep", None)
    return keep if isinstance(keep, (int, float)) else None


def parse_keeps(text: str | Keep | Iterable[Any] | None) -> tuple[Keep, ...]:
    """``"256,128,0.5"`` -> (256, 128, 0.5): ints are tokens, floats shares."""
    if text is None:
        return ()
    parts: list[Any]
    if isinstance(text, str):
        parts = text.split(",")
    else:
        parts = list(text) if isinstance(text, Iterable) else [text]
    out: list[Keep] = []
    for part in parts:
        value: Any = part
        if isinstance(part, str):
            try:
                value = int(part)
            except ValueError:
                try:
                    value = float(part)
                except ValueError:
                    raise ValueError(
                        f"--keep takes numbers of tokens or shares such as 128,64 or 0.5, got {part!r}"
                    ) from None
        out.append(check_keep(value))
    return tuple(out)


def parse_methods(text: str) -> list[Any]:
    """``"flowcut,fastv:layer=2,positions=1"`` -> the items, each with its own options.

    A comma begins a new method unless an option follows it. ``debias(fastv)`` wraps a method.
    """
    items: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        option = "=" in part and ":" not in part.split("=", 1)[0]
        if option and items and ":" in items[-1]:
            items[-1] += f",{part}"
        elif option:
            raise ValueError(f"{part!r} is an option of no method: write name:{part}")
        else:
            items.append(part)
    if not items:
        raise ValueError("name at least one method")
    return [parse_method(item) for item in items]


def parse_method(text: str) -> Any:
    """A method, ``None`` for ``dense``, a plan for a file (``plan.json``)."""
    return None if text == "dense" else parse(text)


def as_methods(given: Any) -> list[Group]:
    """Turn what a user calls methods into one group for each configuration."""
    if given is None:
        return []
    if isinstance(given, str):
        given = parse_methods(given)
    elif isinstance(given, (Method, Plan, dict)) or not isinstance(given, Iterable):
        given = [given]
    out: list[Group] = []
    for item in given:
        if isinstance(item, Plan):
            out.append(item.methods if item.fingerprint is None else item)
        elif isinstance(item, str):
            out += as_methods(item)
        elif isinstance(item, dict) and "name" in item:
            out.append((create(**item),))
        elif item is None:
            out.append(())
        elif isinstance(item, Method):
            out.append((item,))
        else:
            group = tuple(item) if isinstance(item, Iterable) else ()
            if not group or not all(isinstance(m, Method) for m in group):
                raise ValueError(
                    "a configuration is a method or a sequence of methods; give names or instances, "
                    f"and instances in a sequence, got {item!r}"
                )
            out.append(group)
    return out


def sweep(
    methods: Sequence[Group],
    keeps: Sequence[Keep] = (),
    seeds: Sequence[int] = (0,),
    dense: bool = True,
) -> list[Cell]:
    """Every method at every budget, and with every seed if it draws random tokens.

    Args:
        methods: of each configuration; with ``keeps`` every method of it gets the budget.
        keeps: budgets; none leaves each method the budget that it has.
        seeds: of random methods.
        dense: put the dense model first.
    """
    cells = [Cell()] if dense else []
    for given in methods:
        group, plan = (given.methods, given) if isinstance(given, Plan) else (given, None)
        variants = [tuple(with_keep(m, k) for m in group) for k in keeps] if group else []
        for variant in variants or [group]:
            random = any(map(is_random, variant))
            drawn = seeds if random else (None,)
            cells += [Cell(variant, seed, plan) for seed in drawn]
    return list(dict.fromkeys(cells))


def all_methods(model: Any) -> list[tuple[Method, ...]]:
    """List registered methods with a budget that work on a vision-language model without training or
    calibration."""
    from vtr import api

    out: list[tuple[Method, ...]] = []
    works = {s.name for s in api.supported(model) if s.supported}
    for name, cls in registry().items():
        if name not in works or cls.training == "required":
            continue
        method = cls()
        if method.calibrated:
            continue
        try:
            with_keep(method, 0.5)
        except ValueError:
            continue
        out.append((method,))
    return out
