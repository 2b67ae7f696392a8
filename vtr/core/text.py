"""Methods and plans from their text form, as on a command line."""

from __future__ import annotations

import re
from typing import Any

from vtr.core.plan import Plan
from vtr.core.registry import create


def parse(text: str) -> Any:
    """Make a method from its text form: ``evit:keep=0.5,layers=1+2+3``. A '+' joins a tuple.

    ``debias(fastv:keep=64):strength=2`` wraps a method. The name of a file, ``plan.json`` or
    ``plan.safetensors``, gives the :class:`vtr.Plan` saved in it.

    Raises:
        ValueError: the text has an option without a value, or :func:`create` refuses what it names.
    """
    # An option may end so as well: tofe:weights=modules.safetensors.
    if text.endswith(".json") or (text.endswith(".safetensors") and "=" not in text):
        return Plan.load(text)
    options: dict[str, Any] = {}
    wrapped = re.fullmatch(r"([^(:]*)\((.*)\)(?::([^()]*))?", text)
    if wrapped:
        name, rest = wrapped[1], wrapped[3] or ""
        options["method"] = parse(wrapped[2])
    else:
        name, _, rest = text.partition(":")
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--method {text!r}: write options as name=value, got {part!r}")
        options[key.strip()] = _value(value.strip())
    return create(name.strip(), **options)


def _value(text: str) -> Any:
    if "+" in text:
        return tuple(_value(part) for part in text.split("+"))
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
