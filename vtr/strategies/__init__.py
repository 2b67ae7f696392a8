"""Search of schedules: how much a method keeps in which layer, found on data for one model.

>>> plan = vtr.search(model, batches, vtr.EViT(), target={"flops": 0.5})
>>> plan.save("half.json")
>>> vtr.apply(model, vtr.Plan.load("half.json"))

:func:`vtr.search` runs one of the strategies of this package. Optuna is imported when a search begins.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> module. Resolved on first use: `import vtr` stays cheap.
_PUBLIC = {
    "Candidate": "vtr.strategies.base",
    "DiffRateSearch": "vtr.strategies.rates",
    "FlowGuided": "vtr.strategies.flow",
    "GSearch": "vtr.strategies.greedy",
    "Grid": "vtr.strategies.options",
    "PSigmoid": "vtr.strategies.sigmoid",
    "Strategy": "vtr.strategies.base",
    "Target": "vtr.strategies.target",
    "Uniform": "vtr.strategies.options",
    "answered": "vtr.strategies.answers",
    "plot_curve": "vtr.strategies.plots",
    "plot_front": "vtr.strategies.plots",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
