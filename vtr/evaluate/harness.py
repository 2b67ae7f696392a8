"""Faults of the evaluation harness: the package that does not fit, and the version to install."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from types import ModuleType, TracebackType

from vtr.compat import lmms_eval as compat
from vtr.compat.tested import TESTED, Library
from vtr.errors import HarnessError

BESIDE = {
    "datasets": "5.2.0",
    "filelock": "4.2.12",
    "huggingface-hub": "2.4.0",
    "loguru": "0.7.3",
    "numpy": "2.4.6",
    "pillow": "13.0.0",
    "pyarrow": "26.0.1",
    "tenacity": "9.2.1",
    "tqdm": "4.70.1",
}
"""Versions with which the tests of the evaluation ran, of what lmms-eval imports whatever the task; those of
the libraries that vtr itself uses are in :mod:`vtr.compat.tested`."""


@contextmanager
def named() -> Iterator[None]:
    """Turn what :func:`fault` recognises into a :class:`~vtr.errors.HarnessError`."""
    try:
        yield
    except Exception as error:
        raise_fault(error)
        raise


def raise_fault(error: BaseException) -> None:
    """Raise a :class:`~vtr.errors.HarnessError` if an exception is a fault of the harness."""
    message = fault(error)
    if message is not None:
        raise HarnessError(message) from error


def rehearse() -> None:
    """Do what lmms-eval does before its first evaluation, so that a fault shows before weights are loaded.

    Raises:
        HarnessError: it does not work with a package that is installed here.
    """
    with named():
        compat.prepare()


def fault(error: BaseException) -> str | None:
    """Word an exception by which lmms-eval asks a package for what it does not have.

    Import errors and missing attributes are recognised, for any package, if lmms-eval's code (or a
    task's, which it calls) is on the way; others give None. They would fail in every evaluation.
    """
    for link in _chain(error):
        module = _module(link)
        if module is None or not _passes(link.__traceback__):
            continue
        package = module.partition(".")[0]
        if package in sys.stdlib_module_names or package in ("vtr", "__main__"):
            continue
        return _message(package, " ".join(str(link).split()))
    return None


def _message(package: str, why: str) -> str:
    name = next(iter(packages_distributions().get(package, ())), package)
    name = name.lower().replace("_", "-")  # as it is asked for, not as its metadata writes it
    harness = f"lmms-eval {_version('lmms-eval')}"
    found, tested = _version(name), _tested(name)
    if found is None:
        return (
            f"{harness} or a task of it needs the package {name}, which is not installed ({why}): pip "
            f"install '{name if tested is None else tested.requirement}'"
        )
    if tested is None:
        told = f"install another version of {name}, or all of them anew: pip install 'vtr[eval]'"
    elif tested.place(found) == "tested":
        return (
            f"{name} {found} is not whole here ({why}), and vtr was tested with this version: pip "
            f"install --force-reinstall '{name}=={found}'"
        )
    else:
        told = f"vtr was tested with {name} {tested.versions}: pip install '{tested.requirement}'"
    return f"{harness} does not work with {name} {found} ({why}); {told}"


def _tested(name: str) -> Library | None:
    """Return the tested versions of a distribution, None if vtr names no version."""
    if name in BESIDE:
        version = BESIDE[name]
        return Library(name, name, version, version, f"{version}.1")
    return next((one for one in TESTED.values() if one.name == name), None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes; an exception that tenacity retried is in its last attempt."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop(0)
        if link is None or any(link is x for x in seen):
            continue
        seen.append(link)
        yield link
        attempt = getattr(link, "last_attempt", None)
        waiting += [attempt.exception() if attempt is not None else None]
        waiting += [link.__cause__, link.__context__]


def _module(error: BaseException) -> str | None:
    """Find the module that lacks a name, for an import or an attribute that failed."""
    if isinstance(error, ImportError):
        return error.name
    if not isinstance(error, AttributeError) or error.obj is None:
        return None
    owner = error.obj
    if isinstance(owner, ModuleType):
        return owner.__name__
    if isinstance(owner, type):
        return owner.__module__
    # Of an object only if lmms-eval itself asks: a task's function may have read odd data.
    asks = _frames(error.__traceback__)[-1:]
    core = asks and asks[0].startswith("lmms_eval.") and not asks[0].startswith("lmms_eval.tasks.")
    return type(owner).__module__ if core else None


def _passes(traceback: TracebackType | None) -> bool:
    """Tell whether code of lmms-eval is on the way to an exception, and vtr's not behind it."""
    packages = [name.partition(".")[0] for name in _frames(traceback)]
    return next((p for p in reversed(packages) if p in ("lmms_eval", "vtr")), "") == "lmms_eval"


def _frames(traceback: TracebackType | None) -> list[str]:
    """List the modules in a traceback, outermost first."""
    names = []
    while traceback is not None:
        names.append(str(traceback.tb_frame.f_globals.get("__name__", "")))
        traceback = traceback.tb_next
    return names
