"""vtr: visual token reduction for vision and video models, behind one verb.

>>> with vtr.apply(model, vtr.ToMe(r=8)) as handle:
...     model(images)
>>> handle.trace.summary()
"""

from __future__ import annotations

import importlib
from typing import Any

from vtr.core.version import VERSION as __version__
from vtr.methods import TABLE

# Public name -> module. Resolved on first use, so that `import vtr` stays cheap. Type checkers read the same
# names in __init__.pyi, which `python recipes/public_names.py` writes.
_PUBLIC = {
    "apply": "vtr.api",
    "handles": "vtr.api",
    "Handle": "vtr.api",
    "list_methods": "vtr.api",
    "register_adapter": "vtr.core.adapters",
    "supported": "vtr.api",
    "create": "vtr.core.registry",
    "register": "vtr.core.registry",
    "Method": "vtr.core.method",
    "Reduction": "vtr.core.method",
    "Stage": "vtr.core.method",
    "TokenMethod": "vtr.core.method",
    "ScoredMethod": "vtr.methods.base",
    "AttentionMethod": "vtr.methods.base",
    "Site": "vtr.core.site",
    "ModelInfo": "vtr.core.site",
    "TokenMap": "vtr.core.tokens",
    "Trace": "vtr.core.trace",
    "Plan": "vtr.core.plan",
    "calibrate": "vtr.inspect.calibrate",
    "search": "vtr.strategies.searching",
    "profile": "vtr.inspect.profile",
    "draw": "vtr.inspect.drawing",
    "heatmap": "vtr.inspect.heatmap",
    "sinks": "vtr.inspect.sinks",
    "VtrError": "vtr.errors",
    "MissingDependencyError": "vtr.errors",
    "UnsupportedModelError": "vtr.errors",
    "UnsupportedMethodError": "vtr.errors",
    **{name: f"vtr.methods.{module}" for name, module in TABLE.items()},
}

_PACKAGES = frozenset(
    {"evaluate", "kernels", "methods", "strategies", "testing", "train", "video", "zoo"}
)

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"vtr.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vtr' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
