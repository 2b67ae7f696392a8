"""Pictures of a searched plan: the schedule, and the measured candidates with their Pareto front."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vtr.core.plan import Plan
from vtr.errors import missing


def plot_curve(plan: Plan, path: str | Path) -> None:
    """Draw what a searched plan keeps in each layer, and write the picture.

    Tokens left after each layer; or for densities a map of the layers and groups of steps, mean over heads.

    Raises:
        ValueError: the plan has no schedule.
        MissingDependencyError: matplotlib is not installed.
    """
    schedule = _measured(plan).get("schedule") or {}
    if "kept" not in schedule and "density" not in schedule:
        raise ValueError(
            "the plan has no schedule to draw: its method has one number for all layers"
        )
    with _axes(path) as axes:
        if "kept" in schedule:
            kept = [schedule["tokens"], *schedule["kept"]]
            axes.step(range(len(kept)), kept, where="post", lw=1.8)
            axes.set(ylim=(0, 1.05 * schedule["tokens"]), ylabel="visual tokens left")
            axes.set(xlabel=f"layers of the {schedule['site']} passed")
            axes.grid(alpha=0.25)
        else:
            drawn = axes.imshow(schedule["density"], aspect="auto", vmin=0, vmax=1, cmap="viridis")
            axes.set(xlabel="layer", ylabel="group of steps")
            axes.figure.colorbar(drawn, ax=axes, label="density, mean over heads")
        axes.set(title=_title(plan))


def plot_front(plan: Plan, path: str | Path, cost: str | None = None) -> None:
    """Draw the loss of all measured candidates against a cost, with the Pareto front, and write the picture.

    Args:
        plan: from :func:`vtr.search`.
        path: of the picture.
        cost: ``"flops"``, ``"tokens"``, ``"kv"`` or ``"latency"``; None is the target's.

    Raises:
        ValueError: the plan has no measured candidates, or not this cost.
        MissingDependencyError: matplotlib is not installed.
    """
    found = _measured(plan)
    points = found.get("points", [])
    target = found.get("target", {})
    names = [n for n in ("flops", "tokens", "kv", "latency") if points and n in points[0]]
    if cost is None:
        cost = next((n for n in names if n in target), target.get("minimise"))
    if cost not in names:
        raise ValueError(f"cost must be one of {', '.join(names) or 'none'}, got {cost!r}")
    pairs = [(point[cost], point["loss"]) for point in points]
    with _axes(path) as axes:
        axes.scatter(*zip(*pairs, strict=True), s=14, alpha=0.5, label="measured")
        axes.step(*zip(*front(pairs), strict=True), where="post", lw=1.5, label="Pareto front")
        chosen = found["costs"][cost]["share"], found["loss"]
        axes.scatter(*chosen, s=70, marker="*", zorder=3, label="the plan")
        axes.set(xlabel=f"{cost}, share of the dense model", ylabel=f"loss ({found['objective']})")
        axes.set(title=_title(plan))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)


def front(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the pairs (cost, loss) that no other pair beats in both, by rising cost."""
    best: list[tuple[float, float]] = []
    for cost, loss in sorted(set(pairs)):
        if not best or loss < best[-1][1]:
            best.append((cost, loss))
    return best


def _measured(plan: Plan) -> Mapping[str, Any]:
    if not plan.measured:
        raise ValueError("the plan has no measured results: vtr.search returns plans with some")
    return plan.measured


def _title(plan: Plan) -> str:
    budget = ", ".join(
        f"{name} {value:g}" for name, value in plan.measured["target"].items() if name != "minimise"
    )
    return f"{plan.methods[0].name}, {plan.measured['strategy']['name']}, target {budget}"


@contextmanager
def _axes(path: str | Path) -> Iterator[Any]:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise missing("matplotlib", "plots", "the plot") from error
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    try:
        yield axes
        figure.savefig(path, dpi=130)
    finally:
        pyplot.close(figure)
