"""The methods that choose their blocks at run time, as :mod:`recipes.evaluate_wan` compares them.

Each is set so that it keeps a given share of the blocks of the built-in generator (a grid of 5 x 8 x 16 tokens in
blocks of 16). A method that adapts to what it sees has no such option: the option that it has is searched for the
value that keeps this share on the average of the sparse steps, on a few videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import vtr
from vtr.core.method import Method

BLOCK = 16
ROUNDS = 7  # of the search: the value is known to 1 / 128 of its range
VIDEOS = 4  # of the search
NEAR = 0.02  # share of the target that ends the search


@dataclass(frozen=True)
class Searched:
    """The option of an adaptive method that is searched, from its sparsest to its densest value."""

    option: str
    sparsest: float
    densest: float

    def at(self, place: float) -> float:
        """The value at a place in [0, 1] between the two ends, in four digits."""
        return round(self.sparsest + place * (self.densest - self.sparsest), 4)


@dataclass(frozen=True)
class RunTime:
    """One method at one density: ``method`` as it is, or with the option of ``searched`` still to be found."""

    label: str
    density: float
    method: Method
    searched: Searched | None = None


def run_time(dense_steps: float, densities: tuple[float, ...]) -> Iterator[RunTime]:
    """List the methods at one share of dense steps."""
    # A fixed backend: time must not depend on whether a compiler is at hand.
    common: dict[str, Any] = {"block": BLOCK, "dense_steps": dense_steps, "backend": "sdpa"}
    for density in densities:
        share: dict[str, Any] = {"density": density, **common}
        yield RunTime("AdaSpa", density, vtr.AdaSpa(search=(dense_steps, 0.6), **share))
        if density >= 0.25:  # at 0, the sparsest threshold, it still keeps more than a quarter
            lite = vtr.LiteAttention(**common)
            yield RunTime("LiteAttention", density, lite, Searched("threshold", 0.0, -12.0))
        yield RunTime(
            "SVG2",
            density,
            # 16 tokens a cluster, as many as a block has.
            vtr.SVG2(
                query_clusters=40, key_clusters=40, rounds=10, key_block=BLOCK, least=0.0, **common
            ),
            Searched("p", 0.001, 1.0),
        )
        yield RunTime("SpargeAttn", density, vtr.SpargeAttn(key_block=BLOCK, **share))
        yield RunTime(
            "XAttentionDiT",
            density,
            vtr.XAttentionDiT(stride=4, **common),
            Searched("threshold", 0.0, 1.0),
        )
        yield RunTime("DraftAttention", density, vtr.DraftAttention(patch=(4, 4), **share))
        # Its neighbours alone are more than an eighth of so small a grid.
        jenga = vtr.Jenga(1 - density, p=0.0, neighbours=False, **common)
        yield RunTime("Jenga", density, jenga)
        yield RunTime("VSA, untrained", density, vtr.VSA(tile=(1, 4, 4), gate=None, **share))
        if density == 0.25:  # every second row and column
            yield RunTime("ToDo", density, vtr.ToDo(2, dense_steps=dense_steps))


def mean_density(work: float, dense: float) -> float:
    """The mean density of the sparse steps of a run, from its work and its share of dense steps."""
    return (work - dense) / (1 - dense)


def search(case: RunTime, dense: float, work: Callable[[Method], float]) -> Method:
    """Find the value of a searched option at which the sparse steps keep the density of the case, by bisection.

    Args:
        case: with ``searched``.
        dense: the share of the steps that is dense.
        work: the work of a run with a method, over that of the dense model.

    Returns:
        the method, with the sparsest value if that keeps more than the density.
    """
    found = case.searched
    assert found is not None
    with_ = lambda place: case.method.replace(**{found.option: found.at(place)})  # noqa: E731
    low, high, best = 0.0, 1.0, (float("inf"), with_(0.0))
    for place in [0.0, *[None] * ROUNDS]:
        here = (low + high) / 2 if place is None else place
        method = with_(here)
        reached = mean_density(work(method), dense)
        best = min(best, (abs(reached - case.density), method), key=lambda pair: pair[0])
        if (place == 0.0 and reached >= case.density) or best[0] <= NEAR * case.density:
            break
        if place is None:
            low, high = (here, high) if reached < case.density else (low, here)
    return best[1]
