"""Candidates, strategies, and the search that measures them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from vtr.core import plan_files
from vtr.core.calibration import Table
from vtr.core.method import Method
from vtr.core.plan import Plan
from vtr.core.registry import create
from vtr.errors import UnsupportedMethodError
from vtr.strategies.runs import Runner
from vtr.strategies.space import Space
from vtr.strategies.study import Pruned, Study, TrialRecord
from vtr.strategies.target import Target


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method with its options, its numbers, and its schedule.

    Attributes:
        method: with all options.
        table: numbers that the plan gives it; often empty.
        schedule: for people and plots: ``{"site": "encoder", "tokens": 144, "kept": [...]}``.
    """

    method: Method
    table: Table = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "method": self.method.to_dict(),
            "table": plan_files.listed(self.table),
            "schedule": dict(self.schedule),
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Candidate:
        """Take back what :meth:`plain` returned."""
        return cls(create(**plain["method"]), plan_files.tensors(plain["table"]), plain["schedule"])


@dataclass(frozen=True)
class Strategy:
    """Base of the strategies: a frozen dataclass of options with :meth:`run`.

    Class attributes:
        name: for plans and command lines.
        samples: whether Optuna proposes its trials.
        objective: the loss if the caller names none; None is that of the model's kind.
    """

    name: ClassVar[str] = ""
    samples: ClassVar[bool] = False
    objective: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check the options; raise ``ValueError``."""

    def check(self, method: Method, target: Target) -> None:
        """Raise ``UnsupportedMethodError`` or ``ValueError`` for a method or target that it cannot search."""

    def sampler(self, seed: int) -> Any:
        """Return the sampler of Optuna for one trial."""
        return None

    def run(self, search: Searcher) -> None:
        """Measure candidates; the best of them is the result."""
        raise NotImplementedError(f"{type(self).__name__} must define run(search)")

    def to_dict(self) -> dict[str, Any]:
        """Return its name and options as plain values."""
        return {"name": self.name, **asdict(self)}


class Searcher:
    """One search: measures candidates, and writes them down in the study.

    Attributes:
        runner: the model with its data.
        method: that is searched, with the options that are not searched.
        target: the aim.
        study: all trials.
        seen: called after every trial.
    """

    def __init__(
        self, runner: Runner, method: Method, target: Target, study: Study,
        seen: Callable[[Study], object] = lambda study: None,
    ) -> None:  # fmt: skip
        self.runner, self.method, self.target, self.study, self.seen = (
            runner, method, target, study, seen,
        )  # fmt: skip
        self._space: Space | None = None
        self._costs: dict[str, dict[str, dict[str, float]]] = {}
        self._alike = True

    # ---- schedules of tokens ----------------------------------------------------------------

    @property
    def space(self) -> Space:
        """The schedules of tokens per layer of this method. Raises ``UnsupportedMethodError`` without any."""
        if self._space is None:
            can = self.method.schedulable(self.runner.info)
            tokens = self.runner.tokens(can.site)
            if not tokens or min(tokens) < 1:
                raise ValueError(
                    f"a sample has no visual tokens at the {can.site}: give data with images"
                )
            self._alike = min(tokens) == max(tokens)
            language = can.site != "encoder"
            self._space = Space(
                self.method, self.runner.info, can, max(tokens), shares=language or not self._alike
            )
        return self._space

    def scheduled(self, kept: tuple[int, ...]) -> Candidate:
        """Return the candidate with so many tokens left after each layer."""
        space = self.space
        facts = {"site": space.can.site, "tokens": space.tokens, "kept": list(kept)}
        return Candidate(space.applied(kept), {}, facts)

    # ---- measuring --------------------------------------------------------------------------

    def plan_of(self, candidate: Candidate) -> Method | Plan:
        """Return what is applied to the model."""
        if not candidate.table:
            return candidate.method
        return Plan((candidate.method,), {}, self.runner.fingerprint, (candidate.table,))

    def over(self, candidate: Candidate) -> float:
        """Return how much of its budget a candidate needs, measured on the first sample (on all, if samples differ
        in their number of tokens); more than 1 is too much."""
        key = repr(candidate.plain())
        if key not in self._costs:
            costs = self.runner.cost(self.plan_of(candidate), everything=not self._alike)
            self._check_costs(costs)
            self._costs[key] = self._with_latency(candidate, costs)
        return self.target.over(self._costs[key])

    def measure(self, candidate: Candidate, params: Mapping[str, Any] | None = None) -> TrialRecord:
        """Measure a candidate, or find what a process has measured of it before."""
        plain = candidate.plain()
        known = self.study.find(plain)
        if known is not None:
            return known
        with self.study.trial() as trial:
            return self._measured(trial, candidate, params or {})

    def sample(self, trials: int, build: Callable[[Any], Candidate | None]) -> None:
        """Measure sampled candidates until ``trials`` trials have ended, in all processes together.

        Args:
            trials: how many.
            build: a trial of Optuna to a candidate; None if its parameters lead to none within the budget.
        """
        for trial in self.study.sample(trials):
            candidate = build(trial)
            if candidate is None:
                self._tell(trial, TrialRecord(trial.number, "infeasible"))
                continue
            known = self.study.find(candidate.plain())
            if known is not None:  # other parameters lead to the same schedule
                self._tell(trial, known)
                continue
            self._measured(trial, candidate, {}, pruned=True)

    def _measured(
        self, trial: Any, candidate: Candidate, params: Mapping[str, Any], pruned: bool = False
    ) -> TrialRecord:
        mean = [0.0]

        def tell(batch: int, loss: float) -> None:
            mean[0] = loss
            if pruned and self.target.loss is None and len(self.runner.batches) > 1:
                trial.report(loss, batch)
                if batch + 1 < len(self.runner.batches) and trial.should_prune():
                    raise Pruned

        try:
            found = self.runner.evaluate(self.plan_of(candidate), tell)
        except Pruned:
            return self._tell(
                trial, TrialRecord(trial.number, "pruned", params, mean[0], plain=candidate.plain())
            )
        self._check_costs(found.costs)
        loss, costs = found.loss, self._with_latency(candidate, found.costs)
        return self._tell(
            trial,
            TrialRecord(
                trial.number, "complete", params, loss, costs, self.target.allows(loss, costs),
                self.target.value(loss, costs), candidate.plain(), found.kept,
            ),
        )  # fmt: skip

    def _tell(self, trial: Any, facts: TrialRecord) -> TrialRecord:
        self.study.tell(trial, facts)
        self.seen(self.study)
        return facts

    def _with_latency(
        self, candidate: Candidate, costs: dict[str, dict[str, float]]
    ) -> dict[str, dict[str, float]]:
        if "latency" not in self.target.measured:
            return costs
        return {**costs, "latency": self.runner.latency(self.plan_of(candidate))}

    def _check_costs(self, costs: Mapping[str, Any]) -> None:
        for name in self.target.measured:
            if name != "latency" and name not in costs:
                raise UnsupportedMethodError(
                    f"the target {name!r} cannot be measured: {self.method.name} on {self.runner.info.family} has "
                    f"the costs {', '.join([*costs, 'latency'])}"
                )
