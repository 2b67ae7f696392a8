"""Settings of a method that the laws use: some that reduce tiny inputs, and some that keep everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vtr.core.method import Method

EVERYTHING = {"keep": 1.0, "density": 1.0}
SOME = {"keep": 0.4, "density": 0.4}
# Fractions of a tiny model's tokens need small blocks and few dense rows, and a method that draws needs a seed.
COMMON = {"block": 16, "last_rows": 4, "seed": 3}


KEYS = ("some", "everything", "counted")


class Settings(NamedTuple):
    """The settings of one method that laws use.

    Attributes:
        some: settings that reduce.
        everything: settings that leave the model as it is; empty if the class declares that it has none.
        counted: settings whose ``keep`` is what is left in the end, exactly.
    """

    some: tuple[Method, ...]
    everything: tuple[Method, ...]
    counted: tuple[Method, ...]


def examples(method: type[Method] | Method) -> Settings:
    """Find settings of a method for the laws.

    A class may say them itself in :meth:`vtr.Method.examples`, a mapping with the keys ``"some"``,
    ``"everything"`` and ``"counted"`` to sequences of methods. What it does not say follows from its options: ``keep`` and
    ``density`` are 0.4 for some and 1.0 for everything, ``block`` is 16, ``last_rows`` is 4 and ``seed`` is 3. An
    option that holds a method gets that one's. Exact counts are asked of ``keep`` at 0.4 and 5, unless the
    method acts inside attention.

    Args:
        method: a class, or an instance, which is then what reduces.

    Raises:
        AssertionError: no option says how much is kept, and the class has no ``examples()``.
    """
    cls = method if isinstance(method, type) else type(method)
    told: Mapping[str, Sequence[Method]] = cls.examples()
    unknown = sorted(set(told) - set(KEYS))
    if unknown:
        raise AssertionError(
            f"{cls.__name__}.examples() has the keys {', '.join(unknown)}; it may have "
            f"{', '.join(KEYS)}"
        )
    if isinstance(method, Method):
        some: Sequence[Method] = (method,)
    else:
        some = told["some"] if "some" in told else (_derived(cls, SOME),)
    everything = told["everything"] if "everything" in told else _whole(cls)
    if "counted" in told:
        counted: Sequence[Method] = told["counted"]
    elif "attention" not in cls.sites and "keep" in {f.name for f in dataclasses.fields(cls)}:
        counted = [_derived(cls, {"keep": keep}) for keep in (0.4, 5)]
    else:
        counted = ()
    return Settings(tuple(some), tuple(everything), tuple(counted))


def _derived(cls: type[Method], budgets: Mapping[str, Any]) -> Method:
    options = {}
    for field in dataclasses.fields(cls):
        if field.init and field.name in {**COMMON, **budgets}:
            options[field.name] = {**COMMON, **budgets}[field.name]
        elif field.init and isinstance(field.default, Method):
            inner = examples(type(field.default))
            options[field.name] = (inner.everything if budgets is EVERYTHING else inner.some)[0]
    return cls(**options)


def _whole(cls: type[Method]) -> tuple[Method, ...]:
    fields = [f for f in dataclasses.fields(cls) if f.init]
    if not any(f.name in EVERYTHING or isinstance(f.default, Method) for f in fields):
        raise AssertionError(
            f"{cls.__name__} has no option {' or '.join(EVERYTHING)}: say with a classmethod "
            "examples() which settings reduce ('some') and which keep everything ('everything', empty if "
            "none does)"
        )
    return (_derived(cls, EVERYTHING),)
