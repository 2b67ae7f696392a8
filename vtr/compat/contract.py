"""Expectations of other libraries, as data, and the check of an installed library against them.

A module of ``vtr/compat/contracts/`` lists them for each library. Those that need no model are the import part, which
``vtr doctor`` runs; the tests look for attributes of instances in tiny models (``pytest -m contract``).
Nothing here imports a library before its contract is checked.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from vtr.compat.tested import TESTED, explain, installed
from vtr.errors import UnsupportedModelError

#: Libraries with a contract, by the names of their packages.
LIBRARIES = (
    *("torch", "transformers", "timm", "open_clip", "diffusers"),
    *("accelerate", "peft", "lmms_eval", "flash_attn"),
)


@dataclass(frozen=True)
class Expectation:
    """One object of a library, and the names that vtr uses of it.

    Every name may give alternatives, ``"cache|past_key_values"``, of which one is enough.

    Attributes:
        where: ``"package.module:Class.method"``; alternatives are whole places.
        used: the file of vtr that relies on it.
        has: attributes of the object itself.
        takes: names of parameters.
        starts: names of the first parameters, in order: they are passed by position.
        calls: names that the code of the function, or of the class's methods, mentions. If vtr replaces
            a method that the library no longer calls by that name, the replacement silently has no
            effect.
        built: attributes of the class's instances, also of their parts (``"patch_embed.grid_size"``).
    """

    where: str
    used: str
    has: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    built: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        return self.where.partition(":")[0].partition(".")[0]


class Gone(Exception):
    """An expected object does not exist; the message says which one, and where it was expected."""


def contract(library: str) -> tuple[Expectation, ...]:
    """Load the expectations of one of :data:`LIBRARIES`; the library itself is not imported."""
    made: tuple[Expectation, ...] = importlib.import_module(
        f"vtr.compat.contracts.{library}"
    ).CONTRACT
    return made


def find(where: str) -> Any:
    """Find the object at ``"package.module:Class.method"``, or at the first alternative that exists.

    Raises:
        Gone: there is no such object, or its module cannot be imported.
    """
    return _located(where)[1]


def _located(where: str) -> tuple[str, Any]:
    """Find the first alternative that exists, and the object there."""
    first: Gone | None = None
    for one in where.split("|"):
        try:
            return one, _find(one)
        except Gone as error:
            first = first or error
    assert first is not None
    raise first


def required(where: str) -> Any:
    """Find the object at a place, for an adapter that needs it.

    Raises:
        UnsupportedModelError: the installed library has no such object.
    """
    try:
        return find(where)
    except Gone as error:
        package = where.partition(":")[0].partition(".")[0]
        name = TESTED[package].name if package in TESTED else package
        raise UnsupportedModelError(
            explain(package, f"{error}, which vtr needs for models of {name}")
        ) from error


def _find(where: str) -> Any:
    path, _, names = where.partition(":")
    try:
        found = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and (path == error.name or path.startswith(f"{error.name}.")):
            raise Gone(f"there is no module {error.name}") from None
        raise Gone(f"{path} cannot be imported ({error})") from error
    except Exception as error:  # any error that a library raises when it is imported
        reason = " ".join(str(error).split())[:200]
        raise Gone(f"{path} cannot be imported ({type(error).__name__}: {reason})") from error
    done = path
    for name in filter(None, names.split(".")):
        try:
            found = getattr(found, name)
        except Exception:  # a lazy module imports the name here, and may fail as it likes
            raise Gone(f"{done} has no {name}") from None
        done = name if done == path else f"{done}.{name}"
    return found


def missing(expected: Expectation, found: Any, name: str = "") -> Iterator[str]:
    """List the names that the object of an expectation lacks, as short sentences about ``name``."""
    name = name or _name(expected.where)
    for wanted in expected.has:
        if not _any(found, wanted):
            yield f"{name} has no {_or(wanted)}"
    if expected.takes or expected.starts:
        parameters = list(inspect.signature(found).parameters)
        for wanted in expected.takes:
            if not set(wanted.split("|")) & set(parameters):
                yield f"{name} has no {_or(wanted)}"
        if parameters[:1] in (["self"], ["cls"]):
            parameters = parameters[1:]
        for i, wanted in enumerate(expected.starts):
            if i >= len(parameters) or parameters[i] not in wanted.split("|"):
                got = ", ".join(parameters[: len(expected.starts)])
                yield f"{name} begins with ({got}), not with {_or(wanted)} as number {i + 1}"
                break
    if expected.calls:
        names = set(_mentioned(found))
        for wanted in expected.calls:
            if not set(wanted.split("|")) & names:
                yield f"{name} does not call {_or(wanted)}"


def moved(
    expectations: Iterable[Expectation], instances: Mapping[type, Any] | None = None
) -> list[str]:
    """List, in one line each, the names that an installed library does not have where vtr looks for them.

    Args:
        expectations: of libraries that are installed.
        instances: class -> an instance of it, for :attr:`Expectation.built`, which is otherwise left
            out.
    """
    lines: list[str] = []
    for expected in expectations:
        try:
            where, found = _located(expected.where)
            problems = list(missing(expected, found, _name(where)))
            if instances is not None and expected.built:
                problems += _unbuilt(expected, found, instances)
        except Gone as error:
            problems = [str(error)]
        title = TESTED[expected.package].name if expected.package in TESTED else expected.package
        version = installed(expected.package)
        lines += [f"{title} {version}: {problem} (used by {expected.used})" for problem in problems]
    return list(dict.fromkeys(lines))


def _unbuilt(expected: Expectation, cls: Any, instances: Mapping[type, Any]) -> Iterator[str]:
    name = _name(expected.where)
    found = instances.get(cls)
    if found is None:
        found = next((x for kind, x in instances.items() if issubclass(kind, cls)), None)
    if found is None:
        yield f"no model of the tests holds a {name}"
        return
    for wanted in expected.built:
        if not _any(found, wanted):
            yield f"a {name} has no {_or(wanted)}"


def _any(found: Any, wanted: str) -> bool:
    return any(_reaches(found, name) for name in wanted.split("|"))


def _reaches(found: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def _mentioned(found: Any) -> Iterator[str]:
    """Collect the names in the code of a function (below its decorators) or of a class's functions."""
    functions = [found]
    if isinstance(found, type):
        package = found.__module__.partition(".")[0]
        bases = [c for c in found.__mro__ if c.__module__.partition(".")[0] == package]
        functions = [f for c in bases for f in vars(c).values()]
    waiting = [code for f in functions if isinstance(code := _code(f), CodeType)]
    while waiting:
        code = waiting.pop()
        yield from code.co_names
        yield from code.co_freevars
        waiting += [c for c in code.co_consts if isinstance(c, CodeType)]
        yield from (c for c in code.co_consts if isinstance(c, str))
        for names in (c for c in code.co_consts if isinstance(c, tuple)):  # of keyword arguments
            yield from (name for name in names if isinstance(name, str))


def _code(function: Any) -> Any:
    function = getattr(function, "fget", None) or getattr(function, "__func__", function)
    return getattr(inspect.unwrap(function), "__code__", None)


def _name(where: str) -> str:
    """Format a name for a message: ``LlamaDecoderLayer.forward``."""
    return where.partition("|")[0].rpartition(":")[2] or where.partition("|")[0].rstrip(":")


def _or(wanted: str) -> str:
    return wanted.replace("|", " or ")
