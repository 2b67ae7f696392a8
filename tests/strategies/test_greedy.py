"""G-Search is optimal under its assumption, against all schedules; curves and their solved parameter."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise
from typing import Any

import pytest

import vtr
from vtr.core.schedulable import Schedulable
from vtr.core.site import ModelInfo
from vtr.strategies.greedy import counts, greedy
from vtr.strategies.sigmoid import sigmoid
from vtr.strategies.space import Space


def space(tokens: int = 6, depth: int = 4, layers: Any = None, most: float = 1.0) -> Space:
    info = ModelInfo("none", {"encoder": depth}, {"encoder": frozenset()}, tokens=tokens)
    layers = range(depth) if layers is None else layers
    return Space(vtr.EViT(), info, Schedulable("encoder", tuple(layers), most), tokens)


def schedules(here: Space) -> list[tuple[int, ...]]:
    """All schedules that can be followed."""
    every = itertools.product(range(1, here.tokens + 1), repeat=here.depth)
    return [k for k in every if here.repaired(k) == k]


@pytest.mark.parametrize("layers", [None, (1, 2, 3), (1, 3)])
@pytest.mark.parametrize("most", [1.0, 0.5])
def test_no_schedule_within_the_tolerance_is_cheaper(layers, most):
    """The assumption: each layer has a number of essential tokens, which does not rise with depth."""
    here = space(layers=layers, most=most)
    every = schedules(here)
    tried = 0
    for needed in itertools.product(range(1, 7), repeat=4):
        if any(b > a for a, b in pairwise(needed)):
            continue

        def fits(kept: tuple[int, ...], needed: tuple[int, ...] = needed) -> bool:
            return all(k >= n for k, n in zip(kept, needed, strict=True))

        within = [k for k in every if fits(k)]
        found = greedy(here, range(1, 7), fits)
        assert found in within
        # Of every cost that rises with tokens: attention has squares, other layers do not.
        for cost in (sum, lambda k: sum(n * n for n in k), lambda k: sum(math.sqrt(n) for n in k)):
            assert cost(found) == min(map(cost, within))
        tried += 1
    assert tried == 126


def test_a_bisection_asks_few_questions():
    here, asked = space(tokens=64, depth=6), []

    def fits(kept: tuple[int, ...]) -> bool:
        asked.append(kept)
        return all(k >= n for k, n in zip(kept, (40, 31, 31, 9, 5, 2), strict=True))

    assert greedy(here, counts(here, None), fits) == (40, 31, 31, 9, 5, 2)
    assert len(asked) <= 6 * 7


def test_levels_are_evenly_spaced_and_hold_both_ends():
    here = space(tokens=64)
    assert counts(here, None) == list(range(1, 65))
    assert counts(here, 4) == [1, 22, 43, 64]
    assert counts(here, 100) == list(range(1, 65))


def test_the_curve_is_the_formula():
    for slope, middle, high, low in ((1.0, 0.5, 1.0, 0.0), (20.0, 0.2, 0.9, 0.3)):
        for x in (0.0, 0.3, 1.0):
            wanted = low + (high - low) / (1 + math.exp(slope * (x - middle)))
            assert sigmoid(x, slope, middle, high, low) == pytest.approx(wanted)
    assert sigmoid(0.5, 5.0, 0.5, 0.8, 0.2) == pytest.approx(0.5)
    assert sigmoid(1.0, 50.0, -100.0, 1.0, 0.0) == pytest.approx(0.0, abs=1e-20)
