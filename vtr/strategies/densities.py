"""Densities of block-sparse attention in a diffusion transformer, for each group of steps, layer and head."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtr.core.method import Method, Stage
from vtr.core.site import ModelInfo
from vtr.methods.common.attention import AttentionMethod
from vtr.methods.common.dynamic import TABLE, DynamicAttention
from vtr.strategies.base import Candidate, Searcher
from vtr.strategies.solving import solved

if TYPE_CHECKING:
    from vtr.diffusion.site import DiffusionAttentionSite

LEVELS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Densities at which heads are measured."""

GROUPS = 4  # of steps
SOLVING = 7  # steps of the bisection, each a run


def at_density(method: Method, density: float) -> Method:
    """Return a method with one density everywhere."""
    if hasattr(method, "drop"):
        return method.replace(drop=1 - density)
    return method.replace(density=density)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sensitivity(AttentionMethod):
    """Leaves attention dense, and measures how far each head is from it at each density.

    Attributes:
        method: whose blocks are tried.
        levels: densities.
        groups: of steps.
        errors: (group, layer) to (H, V) float64, the squared difference over the square of the layer's dense
            output, summed over calls.
        calls: (group, layer) to the number of calls.
    """

    name: ClassVar[str] = "search-densities"
    paper: ClassVar[str] = "vtr.search"

    method: DynamicAttention
    levels: tuple[float, ...]
    groups: int
    errors: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    calls: dict[tuple[int, int], int] = field(default_factory=dict)

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        return self.method.requirements(info)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return self.method.stages(info)

    def is_dense(self, site: Any) -> bool:
        return self.method.is_dense(site)

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        """Return dense attention, and note what each density would have changed."""
        out: Tensor = site.dense()
        rows = slice(site.first, site.first + site.tokens)
        dense = out[:, :, rows].double()
        found = []
        for level in self.levels:
            tried = at_density(self.method, level)
            assert isinstance(tried, DynamicAttention)
            view = tried.view(site)
            sparse = view.restore(tried.compute(view, tried.choose(view)))[:, :, rows].double()
            found.append((sparse - dense).square().sum((2, 3)).mean(0))
        errors = torch.stack(found, -1) / dense.square().sum((1, 2, 3)).mean().clamp(min=1e-30)
        steps = site.steps or 1
        place = (
            min(self.groups - 1, site.step * self.groups // max(steps, site.step + 1)),
            site.layer,
        )
        self.errors[place] = self.errors.get(place, 0.0) + errors.cpu()
        self.calls[place] = self.calls.get(place, 0) + 1
        return out


def sensitivity(search: Searcher, groups: int, levels: tuple[float, ...]) -> Tensor:
    """Measure all heads in dense runs: (G, L, H, V) float64, the relative squared error; NaN where the method
    leaves attention dense."""
    assert isinstance(search.method, DynamicAttention)
    info = search.runner.info
    watcher = Sensitivity(method=search.method, levels=levels, groups=groups)
    search.runner.watch(watcher)
    shape = (groups, info.depth["attention"], info.heads or 1, len(levels))
    table = torch.full(shape, math.nan, dtype=torch.float64)
    for (group, layer), errors in watcher.errors.items():
        table[group, layer] = errors / watcher.calls[group, layer]
    return table


def allocate(errors: Tensor, levels: tuple[float, ...], mean: float) -> Tensor:
    """Divide a mean density among cells so that the sum of their errors is least.

    Greedy: the cell gets the next density whose error falls most for its price, on the lower convex hull of
    each cell's errors, until the mean is spent. For errors that are convex in the density no division at these
    levels with the same mean has a smaller sum.

    Args:
        errors: (..., V) float64 at the levels; cells with NaN are left out, and get 1.
        levels: V densities, rising.
        mean: of the densities of the other cells.

    Returns:
        (...) float32, the density of each cell.
    """
    flat = errors.flatten(0, -2)
    counted = ~flat.isnan().any(-1)
    steps = []
    for cell in counted.nonzero().flatten().tolist():
        hull = _hull(levels, flat[cell].tolist())
        for (a, low), (b, high) in itertools.pairwise(hull):
            steps.append(((low - high) / (levels[b] - levels[a]), cell, a, b))
    # Steps of one cell become flatter, so that sorting leaves them in order.
    steps.sort(key=lambda step: (-step[0], step[2], step[1]))
    out = torch.full(flat.shape[:1], levels[0], dtype=torch.float64)
    left = (mean - levels[0]) * int(counted.sum())
    for _, cell, a, b in steps:
        price = levels[b] - levels[a]
        if price > left + 1e-9:
            out[cell] += max(0.0, left)  # the last step in part
            break
        out[cell] = levels[b]
        left -= price
    out[~counted] = 1.0
    return out.float().view(errors.shape[:-1])


def _hull(levels: tuple[float, ...], errors: list[float]) -> list[tuple[int, float]]:
    """The lower convex hull of a curve that does not rise: (index, error)."""
    falling: list[float] = []
    for error in errors:
        falling.append(min(error, falling[-1]) if falling else error)
    hull: list[tuple[int, float]] = []
    for i, error in enumerate(falling):
        while len(hull) > 1:
            (a, first), (b, second) = hull[-2:]
            slope = (error - first) / (levels[i] - levels[a])
            if second < first + slope * (levels[b] - levels[a]):
                break
            hull.pop()
        hull.append((i, error))
    return hull


def candidate(search: Searcher, table: Tensor) -> Candidate:
    """Return the method with densities (G, L, H)."""
    table = (table * 1e4).round().div(1e4).clamp(1e-4, 1.0)
    facts = {
        "site": "attention",
        "groups": table.shape[0],
        "density": [[round(float(x), 4) for x in row] for row in table.mean(2)],
    }
    return Candidate(search.method, {TABLE: table}, facts)


def by_sensitivity(search: Searcher) -> None:
    """Measure the best division of the target by the errors of the heads, and one density everywhere."""
    errors = sensitivity(search, groups_of(search), LEVELS)
    shape = errors.shape[:-1]
    for made in (
        lambda mean: candidate(search, allocate(errors, LEVELS, max(mean, LEVELS[0]))),
        lambda mean: candidate(search, torch.full(shape, mean)),
    ):
        found = solved(search, made, LEVELS[0], 1.0, steps=SOLVING)
        if found is not None:
            search.measure(found)


def groups_of(search: Searcher) -> int:
    """Groups of steps: one for a transformer that is called without its pipeline."""
    return GROUPS if search.runner.kind == "pipeline" else 1


def by_curve(search: Searcher, trial: Any, errors: Tensor) -> Candidate | None:
    """Turn a trial of Optuna into densities that reach the target; None if none does.

    The density of a cell is ``mean * exp(layer u + bend (u^2 - 1/12) + step w) * (share of the allocation)^heads``,
    clipped to [1/16, 1], where u and w are the places of its layer and group of steps, from -1/2 to 1/2. ``mean``
    is solved for the target. This parametrisation is ours.
    """
    layer = trial.suggest_float("layer", -3.0, 3.0)
    bend = trial.suggest_float("bend", -6.0, 6.0)
    step = trial.suggest_float("step", -3.0, 3.0)
    heads = trial.suggest_float("heads", 0.0, 1.0)
    groups, layers = errors.shape[:2]
    u, w = _places(layers), _places(groups)
    curve = (layer * u + bend * (u.square() - 1 / 12))[None] + (step * w)[:, None]

    def made(mean: float) -> Candidate:
        division = allocate(errors, LEVELS, mean).double() / mean
        table = mean * curve.exp()[..., None] * division**heads
        return candidate(search, table.clamp(LEVELS[0], 1.0).float())

    return solved(search, made, LEVELS[0], 1.0, steps=SOLVING)


def _places(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64) / max(1, count - 1) - (
        0.5 if count > 1 else 0.0
    )
