"""Write the reference: ``<!-- names: PACKAGE PART -->`` in a page becomes the entries of the public names.

Without PART they are those of the package's ``__all__``, so that a new public name is in the reference without a line
here. PART chooses among the names of ``vtr``: ``methods`` (what ``vtr.apply`` takes), ``errors`` or ``rest``; or it lists
names of a module.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

MARK = re.compile(r"<!-- names: (?P<package>[\w.]+)(?P<chosen>[\w ]*) -->")
PARTS = ("methods", "errors", "rest")


def part_of(name: str, value: Any) -> str:
    """Return the part of the reference that a public name of ``vtr`` belongs to."""
    from vtr.methods import TABLE

    if name in TABLE:
        return "methods"
    return "errors" if inspect.isclass(value) and issubclass(value, Exception) else "rest"


def names(package: str, part: str = "") -> list[str]:
    """List the public names of a package that are no modules, in alphabetical order."""
    module = importlib.import_module(package)
    found = {name: getattr(module, name) for name in module.__all__ if not name.startswith("_")}
    chosen = (
        name
        for name, value in found.items()
        if not inspect.ismodule(value) and part in ("", part_of(name, value))
    )
    return sorted(chosen, key=str.lower)


def entry(package: str, name: str) -> str:
    """Write the heading and the directive of a public name."""
    value = getattr(importlib.import_module(package), name)
    directive = f".. autofunction:: {package}.{name}"
    if inspect.isclass(value):
        kind = "exception" if issubclass(value, Exception) else "class"
        directive = f".. auto{kind}:: {package}.{name}"
    elif isinstance(value, dict):
        keys = ", ".join(f"``{key}``" for key in value)
        directive = f".. py:data:: {package}.{name}\n\n   A dict with the keys {keys}."
    elif not callable(value):
        raise TypeError(f"{package}.{name} is neither a class, nor a function, nor a dict")
    return f"## {name}\n\n```{{eval-rst}}\n{directive}\n```\n"


def replace(match: re.Match[str]) -> str:
    """Write the entries of a mark."""
    package, chosen = match["package"], match["chosen"].split()
    if not chosen or chosen[0] in PARTS:
        chosen = names(package, *chosen)
    return "\n".join(entry(package, name) for name in chosen)


def read(app: Any, page: str, source: list[str]) -> None:
    """Replace the marks of a page that Sphinx has read."""
    source[0] = MARK.sub(replace, source[0])


def attributes(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn "Attributes (beside those of X):" into a sentence and a section that napoleon knows."""
    for number, line in enumerate(lines):
        if found := re.fullmatch(r"Attributes \(beside those of (.+)\):", line):
            lines[number : number + 1] = [f"Beside those of {found[1]}:", "", "Attributes:"]


def setup(app: Any) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.connect("autodoc-process-docstring", attributes, priority=400)  # before napoleon
    app.connect("source-read", read)
    return {"parallel_read_safe": True}
