"""The layers and denoising steps that a method leaves dense."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

from vtr.core.method import Method
from vtr.core.site import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Scheduled(Method):
    """Base of the methods that act inside a diffusion transformer.

    Options are given by name, except the one that says how much is computed, which a subclass makes
    positional with ``field(default=..., kw_only=False)``.

    Attributes:
        dense_layers: layers left dense: the first n (int), or these (tuple of 0-based numbers).
        dense_steps: denoising steps left dense at the start of a run: the first n (int), or a
            fraction of the steps (float in [0, 1), rounded down). For a pipeline of several
            transformers (the experts of Wan 2.2) a tuple has a number, or a fraction of all steps,
            for each of them, counted from the step in which it takes over; one number counts
            through all of them. In training mode there are no steps and nothing is dense on their
            account.
    """

    dense_layers: int | tuple[int, ...] = 0
    dense_steps: float | tuple[float, ...] = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        named = [f.name for f in dataclasses.fields(cls) if f.init and not f.kw_only]
        if len(args) > len(named):
            rest = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in named]
            raise TypeError(
                f"{cls.__name__} takes {', '.join(named) or 'nothing'} without a name, and got "
                f"{len(args)} values; give the others by name: {', '.join(f'{n}=' for n in rest)}"
            )
        return super().__new__(cls)

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
        if isinstance(steps, list):
            steps = tuple(steps)
            self._set("dense_steps", steps)
        each = steps if isinstance(steps, tuple) else (steps,)
        if not each or not all(_whole(n) or _fraction(n) for n in each):
            raise ValueError(
                "dense_steps must be a number of first steps (int from 0 on), a fraction of the "
                "steps (float in [0, 1)), or a tuple of these with one for each transformer of the "
                f"pipeline, got {steps!r}"
            )

    def working_layers(self, info: ModelInfo, site: str) -> list[int]:
        """The layers that are not dense. Raises ``ValueError`` for layers, or transformers, that do
        not exist."""
        depth = info.depth.get(site, 0)
        experts = info.experts
        if isinstance(self.dense_steps, tuple) and len(self.dense_steps) != experts:
            raise ValueError(
                f"dense_steps={self.dense_steps} is for {len(self.dense_steps)} transformers, "
                f"{info.family} has {experts} here: give a number for each, or one for all of them"
            )
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
        """Tell whether this step is left dense.

        Args:
            site: what has ``step``, ``steps`` and ``training``, and for a tuple ``expert`` and
                ``expert_step``.

        Raises:
            RuntimeError: ``dense_steps`` is a fraction and nobody says how many steps there are.
        """
        if site.training:
            return False
        dense, step = self.dense_steps, site.step
        if isinstance(dense, tuple):
            dense, step = dense[site.expert], site.expert_step
        if isinstance(dense, float) and dense:
            if site.steps is None:
                raise RuntimeError(
                    f"{self.name}: dense_steps={dense} is a fraction of the steps, and "
                    "their number is not known here: apply the method to the pipeline, or with "
                    "vtr.apply(..., steps=50), or give dense_steps as an int"
                )
            dense = int(dense * site.steps + 1e-9)
        return bool(step < dense)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _fraction(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and 0 <= value < 1
