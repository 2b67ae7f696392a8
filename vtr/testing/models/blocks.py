"""Finding the layers of a model."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

BLOCKS = (nn.ModuleList, nn.Sequential)


def layers_of(model: nn.Module, path: str) -> Any:
    """Return the list of layers whose path in the model ends so."""
    for name, module in model.named_modules():
        if isinstance(module, BLOCKS) and re.fullmatch(rf"(.+\.)?{path}", name):
            return module
    raise AssertionError(f"a {type(model).__name__} has no list of layers {path!r}")
