"""P-Sigmoid: a curve of few parameters over the layers, tuned by Bayesian optimisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from vtr.core.budget import check_count
from vtr.strategies.base import Candidate, Searcher, Strategy
from vtr.strategies.densities import LEVELS, by_curve, groups_of, sensitivity
from vtr.strategies.solving import solved
from vtr.strategies.study import SAMPLERS, make_sampler


@dataclass(frozen=True)
class PSigmoid(Strategy):
    """A sigmoid over the layers, tuned by Bayesian optimisation (P-Sigmoid, CVPR 2025, arXiv 2412.00556, scenario II).

    The share of tokens that layer l keeps is ``low + (high - low) / (1 + exp(slope (x - middle)))``, where x is the
    place of l among the layers that can be cut, from 0 to 1. ``middle`` is eliminated by the target: with a
    budget, the largest whose schedule is within it is found by bisection; with a tolerated loss, the
    smallest whose loss is within it. Optuna tunes the other three.

    In a diffusion transformer, four parameters bend the density of a method (``tabled``) over layers, steps and
    heads (:func:`vtr.strategies.densities.by_curve`), and the mean is eliminated. This is ours.

    The paper is known to us by its abstract and a reader's note, and has no code. This parametrisation is
    ours; the paper's own is not known.

    Args:
        trials: that have ended when the search ends, in all processes together.
        sampler: ``"tpe"``, or ``"gp"``: a Gaussian process with expected improvement (needs scipy).
        start: trials at random in the beginning.
    """

    name: ClassVar[str] = "p-sigmoid"
    samples: ClassVar[bool] = True

    trials: int = 40
    sampler_name: str = "tpe"
    start: int = 10

    def validate(self) -> None:
        check_count(self.trials, "trials")
        check_count(self.start, "start")
        if self.sampler_name not in SAMPLERS:
            raise ValueError(
                f"sampler_name must be one of {', '.join(SAMPLERS)}, got {self.sampler_name!r}"
            )

    def sampler(self, seed: int) -> Any:
        return make_sampler(self.sampler_name, seed, self.start)

    def run(self, search: Searcher) -> None:
        if search.method.tabled:
            errors = sensitivity(search, groups_of(search), LEVELS)
            search.sample(self.trials, lambda trial: by_curve(search, trial, errors))
            return
        search.sample(self.trials, lambda trial: self.build(search, trial))

    def build(self, search: Searcher, trial: Any) -> Candidate | None:
        """Turn a trial of Optuna into a candidate that reaches the target; None if none does."""
        slope = trial.suggest_float("slope", 1.0, 50.0, log=True)
        high = trial.suggest_float("high", 0.5, 1.0)
        low = trial.suggest_float("low", 0.0, 0.5)
        space = search.space

        def made(middle: float) -> Candidate:
            curve = [
                sigmoid(space.place(layer), slope, middle, high, low) * space.tokens
                for layer in range(space.depth)
            ]
            return search.scheduled(space.repaired(curve))

        return solved(search, made, -6 / slope, 1 + 6 / slope)


def sigmoid(x: float, slope: float, middle: float, high: float, low: float) -> float:
    """Compute a falling sigmoid from ``high`` to ``low``, half way at ``middle``."""
    power = max(-60.0, min(60.0, slope * (x - middle)))
    return low + (high - low) / (1 + math.exp(power))
