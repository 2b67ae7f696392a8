"""DiffRate: rates that gradients find."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from vtr.core.budget import check_count, check_number
from vtr.core.method import Method
from vtr.errors import UnsupportedMethodError
from vtr.methods.diffrate import DiffRate
from vtr.strategies.base import Candidate, Searcher, Strategy
from vtr.strategies.target import Target


@dataclass(frozen=True)
class DiffRateSearch(Strategy):
    """Learn the numbers of DiffRate by gradient (ICCV 2023, arXiv 2305.17997, section 3.4).

    Every block has a number for pruning and one for merging, expectations over candidates, trained with AdamW while
    the weights of the model stay as they are. The loss is the objective's training form, the KL divergence to the
    dense model or the cross-entropy of labels, and the method's own term for the budget. After every epoch the
    numbers are read as a static method and measured if they are within the budget.

    Differences from the authors' code: no labels are needed; if no epoch ends within the budget, learning starts
    again with a goal that is smaller by what was too much, up to ``rounds`` times. Learning itself is not written to the
    study: a search that is resumed learns again, with the same result.

    Args:
        epochs: passes over the data; the authors take 3 over ImageNet.
        rate: of AdamW, falling to a tenth along a cosine (theirs: 0.01 to 0.001).
        rounds: goals that are tried.
    """

    name: ClassVar[str] = "diffrate"

    epochs: int = 3
    rate: float = 0.01
    rounds: int = 4

    def validate(self) -> None:
        check_count(self.epochs, "epochs")
        check_count(self.rounds, "rounds")
        check_number(self.rate, "rate", 1e-8, 10.0)

    def check(self, method: Method, target: Target) -> None:
        if not isinstance(method, DiffRate):
            raise UnsupportedMethodError(
                f"DiffRateSearch learns the numbers of diffrate, got {method.name}: use PSigmoid or GSearch"
            )
        if set(target.budgets) != {"flops"} or target.budgets["flops"] > 1:
            raise ValueError(
                f"DiffRateSearch needs a share of the FLOPs as target, {{'flops': 0.5}}, got {target.to_dict()}"
            )

    def run(self, search: Searcher) -> None:
        wanted = goal = search.target.budgets["flops"]
        for _ in range(self.rounds):
            least = self._learn(search, goal)
            if any(trial.reached for trial in search.study.trials()):
                return
            goal = max(0.01, goal - (least - wanted) - 0.01)

    def _learn(self, search: Searcher, goal: float) -> float:
        """Learn numbers for a share of the cost; returns the least share that an epoch ended with."""
        runner, shares = search.runner, []
        assert isinstance(search.method, DiffRate)
        method = dataclasses.replace(
            search.method, keep=None, prune=None, merge=None, learn=True, target=goal
        )
        steps = self.epochs * len(runner.batches)
        found = []
        with runner.learning(method) as (handle, loss):
            modules = handle.modules[0]
            optimiser = torch.optim.AdamW(modules.parameters(), lr=self.rate, weight_decay=0.0)
            falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, self.rate / 10)
            for _ in range(self.epochs):
                for number in range(len(runner.batches)):
                    total = loss(number)
                    for term in method.training_losses(handle.trace, modules).values():
                        total = total + term
                    optimiser.zero_grad()
                    total.backward()
                    optimiser.step()
                    falling.step()
                found.append(DiffRate.from_modules(modules))
        for numbers in dict.fromkeys(found):
            candidate = Candidate(numbers)
            over = search.over(candidate)
            shares.append(over * search.target.budgets["flops"])
            if over <= 1:
                search.measure(candidate, {"goal": goal})
        return min(shares)
