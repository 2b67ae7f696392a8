"""G-Search: the fewest tokens that each layer can do with, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vtr.core.budget import check_count
from vtr.strategies.base import Searcher, Strategy
from vtr.strategies.densities import by_sensitivity
from vtr.strategies.space import Space, bisect

Schedule = tuple[int, ...]


@dataclass(frozen=True)
class GSearch(Strategy):
    """Greedy search from the first layer to the last (G-Search, CVPR 2025, arXiv 2412.00556, scenario I).

    In each layer, the smallest number of tokens is taken for which the loss stays within the tolerance, with that
    number in all layers behind. The paper's assumption is that the ranking of tokens is the same in all layers
    and that the number of essential ones does not rise with depth: each layer has a number below which the loss
    passes the tolerance, whatever the other layers keep. Then no schedule within the tolerance keeps fewer tokens
    in any layer, and the one that is found is optimal for every cost that rises with the number of tokens.

    The paper is known to us by its abstract and a reader's note, and has no code. Our reading: the search in a
    layer is a bisection (the note says Bayesian optimisation, which needs more evaluations if the loss is
    monotone), and the tolerance is in units of the objective.

    With a budget in place of a tolerance, the smallest tolerance whose schedule fits the budget is found by
    bisection, and what is left of the budget is filled up between the two last schedules.

    In a diffusion transformer a method with densities (``tabled``) has no order of layers in which less is needed.
    There a dense run measures the error of each head at eight densities, in each layer and in each of four groups of
    steps; the densities with the least sum of relative errors are chosen (:func:`vtr.strategies.densities.allocate`).
    One density everywhere is measured as well, and the better one is the result. This is ours.

    Args:
        levels: different numbers of tokens to choose from, evenly spaced; None is every number.
        rounds: tolerances that are tried for a budget.
    """

    name: ClassVar[str] = "g-search"

    levels: int | None = None
    rounds: int = 8

    def validate(self) -> None:
        check_count(self.levels, "levels", low=2, none=True)
        check_count(self.rounds, "rounds")

    def run(self, search: Searcher) -> None:
        target = search.target
        if search.method.tabled:
            by_sensitivity(search)
            return
        if target.loss is not None:
            self.within(search, target.loss)
            return
        space = search.space
        every = search.scheduled(space.full)
        if search.over(every) <= 1:
            search.measure(every)
            return
        least = search.scheduled(space.repaired([space.can.least] * space.depth))
        if search.over(least) > 1:
            return
        high = math.log(max(search.measure(least).loss or 0.0, 1e-12))
        low, dear, cheap = high - math.log(1e5), space.full, tuple(least.schedule["kept"])
        for _ in range(self.rounds):
            middle = (low + high) / 2
            kept = self.within(search, math.exp(middle))
            if search.over(search.scheduled(kept)) <= 1:
                high, cheap = middle, kept
            else:
                low, dear = middle, kept
        search.measure(search.scheduled(filled(search, cheap, dear)))

    def within(self, search: Searcher, tolerance: float) -> Schedule:
        """Find the schedule for a tolerated loss, and measure it."""

        def fits(kept: Schedule) -> bool:
            loss = search.measure(search.scheduled(kept)).loss
            return loss is not None and loss <= tolerance

        return greedy(search.space, counts(search.space, self.levels), fits)


def counts(space: Space, levels: int | None) -> list[int]:
    """List the numbers of tokens to choose from, rising."""
    least, most = space.can.least, space.tokens
    if levels is None or levels > most - least:
        return list(range(least, most + 1))
    return sorted({round(least + (most - least) * i / (levels - 1)) for i in range(levels)})


def greedy(space: Space, numbers: Sequence[int], fits: Callable[[Schedule], bool]) -> Schedule:
    """Find the smallest number of tokens of each layer, from the first layer on.

    Args:
        space: the schedules.
        numbers: of tokens to choose from, rising.
        fits: tells whether a schedule is within the tolerance; the full one is taken to be.
    """
    found = space.full
    for layer in space.can.layers:
        before = found[layer - 1] if layer else space.tokens

        def tried(number: int, start: Schedule = found[:layer]) -> Schedule:
            return space.repaired([*start, *[number] * (space.depth - len(start))])

        lowest = tried(0)[layer]
        here = [*(n for n in numbers if lowest <= n < before), before]
        last = len(here) - 1  # which keeps what the layer before has left

        def works(i: int, here: list[int] = here, tried: Callable[[int], Schedule] = tried) -> bool:
            return i == len(here) - 1 or fits(tried(here[i]))

        found = tried(here[bisect(0, last, works)])
    return found


def filled(search: Searcher, cheap: Schedule, dear: Schedule) -> Schedule:
    """Find the dearest schedule on the way from one within the budget to one over it that is within it."""
    space = search.space

    def between(step: int) -> Schedule:
        part = step / 64
        return space.repaired([a + (b - a) * part for a, b in zip(cheap, dear, strict=True)])

    # The first step that no longer fits, less one.
    first = bisect(0, 64, lambda i: i == 64 or search.over(search.scheduled(between(i))) > 1)
    return between(max(0, first - 1))
