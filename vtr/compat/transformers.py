"""Names of transformers that are not promised to stay, and what replaced them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

# The argument, and the field of outputs, that holds the KV cache: ``cache`` from 5.24 on,
# ``past_key_values`` before. The older name still works there, with a warning of deprecation.
CACHE = ("cache", "past_key_values")


def cache_name(function: Callable[..., Any]) -> str | None:
    """The name of a function's argument for the KV cache; None if it takes no cache."""
    names = inspect.signature(function).parameters
    return next((name for name in CACHE if name in names), None)


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a call, by either of its names; None if it is not given."""
    return next((kwargs[name] for name in CACHE if kwargs.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The KV cache in a model's output; None if it has none."""
    return next((c for c in (getattr(output, name, None) for name in CACHE) if c is not None), None)


def with_cache(function: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a KV cache to a function.

    Raises:
        TypeError: the function takes no cache by a name that is known here.
    """
    name = cache_name(function)
    if name is None:
        raise TypeError(f"{getattr(function, '__qualname__', function)} takes no {CACHE[0]}")
    return {name: cache}
