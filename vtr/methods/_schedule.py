"""Which layers and denoising steps a method leaves dense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vtr.method import Method
from vtr.signals import ModelInfo


@dataclass(frozen=True)
class Scheduled(Method):
    """Base of the methods that act inside a diffusion transformer.

    Attributes:
        dense_layers: layers left dense: the first n (int), or these (tuple of 0-based numbers).
        dense_steps: denoising steps left dense at the start of a run: the first n (int), or a
            fraction of the steps (float in [0, 1), rounded down). In training mode there are no
            steps and nothing is dense on their account.
    """

    dense_layers: int | tuple[int, ...] = 0
    dense_steps: int | float = 0

    def validate(self) -> None:
        layers = self.dense_layers
        if isinstance(layers, list):
            layers = tuple(layers)
            self._set("dense_layers", layers)
        numbers = layers if isinstance(layers, tuple) else (layers,)
        if any(not _whole(n) for n in numbers):
            raise ValueError(
                "dense_layers must be a number of first layers (int from 0 on) or a tuple of 0-based "
                f"layers, got {layers!r}"
            )
        steps = self.dense_steps
        fraction = isinstance(steps, float) and math.isfinite(steps) and 0 <= steps < 1
        if not (fraction or _whole(steps)):
            raise ValueError(
                "dense_steps must be a number of first steps (int from 0 on) or a fraction of the "
                f"steps (float in [0, 1)), got {steps!r}"
            )

    def working_layers(self, info: ModelInfo, site: str) -> list[int]:
        """The layers that are not dense. Raises ``ValueError`` for layers that do not exist."""
        depth = info.depth.get(site, 0)
        if isinstance(self.dense_layers, tuple):
            missing = [n for n in self.dense_layers if n >= depth]
            if missing:
                raise ValueError(
                    f"dense_layers {missing} do not exist: {info.family} has {depth} {site} "
                    f"layers, 0 to {depth - 1}"
                )
            return [n for n in range(depth) if n not in self.dense_layers]
        if depth and self.dense_layers >= depth:
            raise ValueError(
                f"dense_layers={self.dense_layers} leaves nothing to do: {info.family} has {depth} "
                f"{site} layers"
            )
        return list(range(self.dense_layers, depth))

    def is_dense(self, site: Any) -> bool:
        """Whether this step is left dense.

        Args:
            site: what has ``step``, ``steps`` and ``training``.

        Raises:
            RuntimeError: ``dense_steps`` is a fraction and nobody says how many steps there are.
        """
        if site.training or not self.dense_steps:
            return False
        if isinstance(self.dense_steps, float):
            if site.steps is None:
                raise RuntimeError(
                    f"{self.name}: dense_steps={self.dense_steps} is a fraction of the steps, and "
                    "their number is not known here: apply the method to the pipeline, or with "
                    "vtr.apply(..., steps=50), or give dense_steps as an int"
                )
            return bool(site.step < int(self.dense_steps * site.steps + 1e-9))
        return bool(site.step < self.dense_steps)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
