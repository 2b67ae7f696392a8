"""Sites of a detector's encoder with numbers drawn at random, for tests of methods without a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtr.core.detector_site import DetectorCall, DetectorSite, Levels
from vtr.core.site import ModelInfo
from vtr.core.tokens import TokenMap

LEVELS: Levels = ((6, 8), (3, 4), (2, 2))


def info(depth: int = 3, levels: int = len(LEVELS), **more: Any) -> ModelInfo:
    """Build the facts of a detector of width 16 that shows all signals."""
    signals = {"detector": frozenset({"hidden", "class_logits", "sampling"})}
    return ModelInfo(
        "a detector", {"detector": depth}, signals, dim=16, heads=4, levels=levels, **more
    )


def padded(levels: Levels, tall: float, wide: float) -> Tensor:
    """(L,) bool: the tokens of a picture that fills a share of the height and of the width of each level."""
    parts = []
    for height, width in levels:
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[: max(1, round(tall * height)), : max(1, round(wide * width))] = True
        parts.append(mask.flatten())
    return torch.cat(parts)


def site(
    layer: int = 0,
    *,
    levels: Levels = LEVELS,
    valid: Tensor | None = None,
    modules: nn.Module | None = None,
    training: bool = False,
    classes: Any = None,
    depth: int = 3,
    seed: int = 0,
    **more: Any,
) -> DetectorSite:
    """Build a site of two pictures, with float32 tokens of width 16."""
    draw = torch.Generator().manual_seed(seed)
    n = sum(height * width for height, width in levels)
    first, hidden, positions = (torch.randn(2, n, 16, generator=draw) for _ in range(3))
    counts = [n, n] if valid is None else valid.sum(1).tolist()
    return DetectorSite(
        call=DetectorCall(levels, valid, counts),
        first=first,
        positions=positions,
        reference_points=None,
        classes=classes,
        layer=layer,
        info=info(depth, len(levels)),
        hidden=hidden,
        map=TokenMap.identity(2, n),
        memory=more.pop("memory", {}),
        modules=modules,
        training=training,
        notes=more.pop("notes", {}),
    )
