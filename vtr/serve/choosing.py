"""From the field ``vtr`` of a request to a method."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from vtr.core.method import Method
from vtr.core.plan import Plan
from vtr.core.registry import create, registry
from vtr.serve.errors import RequestError
from vtr.serve.schema import WantedReduction

Choice = Method | Plan | tuple[Method | Plan, ...] | None
"""The methods for one request; None leaves the model dense."""

DENSE = "dense"


def chosen(wanted: WantedReduction | None, default: Choice) -> Choice:
    """Choose what a request is answered with.

    Options that are words may name files of the server (``weights``), so that only ``site`` is taken from a client.

    Args:
        default: the server's own choice, for requests that name no method.

    Raises:
        RequestError: status 400, with the reason of vtr.
    """
    if wanted is None:
        return default
    options = {name: _value(name, value) for name, value in wanted.options.items()}
    if wanted.keep is not None:
        options["keep"] = _value("keep", wanted.keep)
    if wanted.method is None:
        return _changed(default, options)
    if wanted.method == DENSE:
        if options:
            raise RequestError("vtr: dense has no options", param="vtr")
        return None
    if wanted.method not in registry():
        known = ", ".join([DENSE, *registry()])
        raise RequestError(
            f"vtr.method: there is no method {wanted.method!r}; there are: {known}",
            param="vtr.method",
        )
    try:
        return create(wanted.method, **options)
    except (ValueError, TypeError) as error:
        raise RequestError(f"vtr: {error}", param="vtr") from error


def _changed(default: Choice, options: dict[str, Any]) -> Choice:
    """Change options of the server's method."""
    if not options:
        return default
    if not isinstance(default, Method):
        what = "has no method" if default is None else "has a plan or several methods"
        raise RequestError(
            f"vtr: name the method too: the server {what}, so that {', '.join(options)} belongs to none",
            param="vtr.method",
        )
    known = {field.name for field in fields(default) if field.init}  # type: ignore[arg-type]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise RequestError(
            f"vtr: {default.name} has no option {', '.join(unknown)}; it has: {', '.join(sorted(known))}",
            param="vtr",
        )
    try:
        return replace(default, **options)  # type: ignore[type-var]
    except (ValueError, TypeError) as error:
        raise RequestError(f"vtr: {error}", param="vtr") from error


def _value(name: str, value: Any) -> Any:
    if isinstance(value, str) and name != "site":
        raise RequestError(
            f"vtr.options.{name}: only numbers, lists of numbers, and site are taken from a client",
            param=f"vtr.options.{name}",
        )
    return tuple(value) if isinstance(value, list) else value
