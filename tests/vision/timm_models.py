"""Small members of timm's families, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import timm

import vtr
from tests.tiny import spread

SMALL: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 7,
}


def build(name: str, more: dict[str, Any] | None = None) -> Any:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    return spread(timm.create_model(name, **{**SMALL, **(more or {})}))


def works(model: Any) -> list[str]:
    return [s.name for s in vtr.supported(model) if s.supported]
