"""The layers and denoising steps that a method leaves dense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vtr.core.site import ModelInfo
from vtr.methods.common.layers import Layered, is_whole


@dataclass(frozen=True, kw_only=True)
class Scheduled(Layered):
    """Base of the methods that act inside a diffusion transformer.

    Attributes (beside those of :class:`Layered`):
        dense_steps: denoising steps left dense at the start of a run: the first n (int), or a
            fraction of the steps (float in [0, 1), rounded down). For a pipeline of several
            transformers (the experts of Wan 2.2) a tuple has a number, or a fraction of all steps,
            for each of them, counted from the step in which it takes over; one number counts
            through all of them. In training mode there are no steps and nothing is dense on their
            account.
    """

    dense_steps: float | tuple[float, ...] = 0

    def validate(self) -> None:
        super().validate()
        steps = self.dense_steps
        if isinstance(steps, list):
            steps = tuple(steps)
            self._set("dense_steps", steps)
        each = steps if isinstance(steps, tuple) else (steps,)
        if not each or not all(map(is_step, each)):
            raise ValueError(
                "dense_steps must be a number of first steps (int from 0 on), a fraction of the "
                "steps (float in [0, 1)), or a tuple of these with one for each transformer of the "
                f"pipeline, got {steps!r}"
            )

    def working_layers(self, info: ModelInfo, site: str) -> list[int]:
        """The layers that are not dense. Raises ``ValueError`` for layers, or transformers, that do
        not exist."""
        experts = info.experts
        if isinstance(self.dense_steps, tuple) and len(self.dense_steps) != experts:
            raise ValueError(
                f"dense_steps={self.dense_steps} is for {len(self.dense_steps)} transformers, "
                f"{info.family} has {experts} here: give a number for each, or one for all of them"
            )
        return super().working_layers(info, site)

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


def is_step(value: object) -> bool:
    """Tell whether this is a number of steps (int from 0 on) or a share of them (float in [0, 1))."""
    share = isinstance(value, float) and math.isfinite(value) and 0 <= value < 1
    return share or is_whole(value)
