"""Flow-guided search of VFlowOpt's rates and parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vtr.core.budget import check_count
from vtr.core.method import Method
from vtr.core.site import ModelInfo
from vtr.errors import UnsupportedMethodError
from vtr.methods.vflowopt import VFlowOpt
from vtr.strategies.base import Candidate, Searcher, Strategy
from vtr.strategies.solving import solved
from vtr.strategies.study import SAMPLERS, make_sampler
from vtr.strategies.target import Target

LOWEST = 0.2 / 0.375  # of R2
THRESHOLD, CELL, ALPHA = (0.0, 50.0), (3.0, 24.0), (-1.0, 1.0)


@dataclass(frozen=True)
class FlowGuided(Strategy):
    """Tune VFlowOpt on unlabelled data (ICCV 2025, arXiv 2508.05211, section 3.4).

    The loss is 1 - cosine of the last prompt token's last hidden state to that of the dense model (unless another
    objective is given). For a mean share R of the visual tokens: R1 in [R, 1.5 R], R2 in [0.533, 1], threshold t in
    [0, 50], cell a in [3, 24], and the weight alpha of the entropy in [-1, 1] if the method has ``pixel_mean`` and
    ``pixel_std``; R3 is solved from R. These are the authors' ranges at R = 0.25, with R1's and R2's written as
    shares. Points with R3 <= 0 are rejected; the authors' code does not check them. R is solved for the target, so
    that budgets of FLOPs or KV bytes work as one of tokens does.

    The paper uses a Gaussian process with expected improvement and 50 evaluations, of which the authors' code draws
    27 at random.

    Args:
        trials: that have ended when the search ends, in all processes together.
        sampler_name: ``"gp"`` or ``"tpe"``.
        start: trials at random in the beginning.
    """

    name: ClassVar[str] = "flow-guided"
    samples: ClassVar[bool] = True
    objective: ClassVar[str | None] = "cosine"

    trials: int = 50
    sampler_name: str = "gp"
    start: int = 27

    def validate(self) -> None:
        check_count(self.trials, "trials")
        check_count(self.start, "start")
        if self.sampler_name not in SAMPLERS:
            raise ValueError(
                f"sampler_name must be one of {', '.join(SAMPLERS)}, got {self.sampler_name!r}"
            )

    def check(self, method: Method, target: Target) -> None:
        if not isinstance(method, VFlowOpt):
            raise UnsupportedMethodError(
                f"FlowGuided searches the parameters of vflowopt, got {method.name}: use PSigmoid or GSearch"
            )

    def sampler(self, seed: int) -> Any:
        return make_sampler(self.sampler_name, seed, self.start)

    def run(self, search: Searcher) -> None:
        search.sample(self.trials, lambda trial: self.build(search, trial))

    def build(self, search: Searcher, trial: Any) -> Candidate | None:
        """Turn a trial of Optuna into a candidate that reaches the target; None if none does."""
        first = trial.suggest_float("r1", 1.0, 1.5)  # over R
        second = trial.suggest_float("r2", LOWEST, 1.0)
        method = search.method
        assert isinstance(method, VFlowOpt)
        changes: dict[str, Any] = {
            "threshold": round(trial.suggest_float("threshold", *THRESHOLD), 4),
            "cell": round(trial.suggest_float("cell", *CELL), 4),
        }
        if method.pixel_mean is not None and method.pixel_std is not None:
            changes["alpha"] = round(trial.suggest_float("alpha", *ALPHA), 4)

        def made(share: float) -> Candidate:
            rates = rates_of(share, min(1.0, first * share), second, search.runner.info, method)
            return Candidate(method.replace(keep=tuple(round(r, 6) for r in rates), **changes))

        low = next(
            (r / 1000 for r in range(1, 1001) if _possible(r / 1000, first, second, search)), 1.0
        )
        return solved(search, made, low, 1.0, steps=16)


def rates_of(
    share: float, r1: float, r2: float, info: ModelInfo, method: VFlowOpt
) -> tuple[float, float, float]:
    """Solve R3 from the mean share R = (R1 L1 + R1 R2 L2 + R1 R2 R3 L3) / L.

    Raises:
        ValueError: R3 would not be above 0: the first two stages use more than the budget.
    """
    a, b, c = method.stage_layers(info)
    r3 = ((a + b + c) * share - r1 * a - r1 * r2 * b) / (r1 * r2 * c)
    if r3 <= 1e-6:
        raise ValueError(f"R1={r1:.4g} and R2={r2:.4g} leave nothing for the last stage")
    return r1, r2, min(1.0, r3)


def _possible(share: float, first: float, second: float, search: Searcher) -> bool:
    method = search.method
    assert isinstance(method, VFlowOpt)
    try:
        rates_of(share, min(1.0, first * share), second, search.runner.info, method)
    except ValueError:
        return False
    return True
