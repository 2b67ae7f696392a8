"""One file per published method. Importing this package registers them all.

``vtr.methods`` is also the function that lists them: the package can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from vtr.methods.cls_attention import CLSAttention
from vtr.methods.evit import EViT
from vtr.methods.flowcut import FlowCut
from vtr.methods.random import Random
from vtr.methods.tofe import ToFe
from vtr.methods.tome import ToMe

__all__ = ["CLSAttention", "EViT", "FlowCut", "Random", "ToFe", "ToMe"]


class _Callable(ModuleType):
    """`vtr.methods()` is public, and importing the package of that name would hide it."""

    def __call__(self) -> list[Any]:
        from vtr.api import methods

        return methods()


sys.modules[__name__].__class__ = _Callable
