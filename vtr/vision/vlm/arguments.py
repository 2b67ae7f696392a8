"""Arguments of a model's forward: by their names, and those that bring images or videos."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from vtr.compat.transformers import ENCODED, ENCODER_OUTPUTS, PIXELS

FEATURES = (*PIXELS, *ENCODED, ENCODER_OUTPUTS)


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of a module by their names."""
    if not args:
        return kwargs
    cls: Any = type(module)
    return {**dict(zip(_names(cls), args, strict=False)), **kwargs}


@lru_cache(maxsize=256)
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def has_any(given: dict[str, Any], names: tuple[str, ...]) -> bool:
    return any(given.get(name) is not None for name in names)


def has_features(given: dict[str, Any]) -> bool:
    """Tell whether a call of the model brings images or videos."""
    values = [given.get(name) for name in FEATURES]
    return any(isinstance(v, Tensor) or bool(v) for v in values)
