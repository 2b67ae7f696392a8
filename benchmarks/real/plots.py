"""A plot for each task: score against the share of the encoder's FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(rows: list[dict[str, Any]], task: Any, out: Path) -> None:
    """Write ``TASK.png`` into ``out``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["task"] == task.name and "refused" not in row:
            found.setdefault(row["method"], []).append(row)
    (dense,) = found.pop("dense")
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.axhline(dense["score"], color="black", linewidth=0.8, linestyle=":")
    axes.text(1.0, dense["score"], "dense", va="bottom", ha="right")
    colours = pyplot.get_cmap("tab20").colors
    for i, (name, group) in enumerate(found.items()):
        group = sorted(group, key=lambda r: r["flops"])
        axes.errorbar(
            [r["flops"] for r in group], [r["score"] for r in group],
            [r.get("spread_of_seeds", r["standard_error"]) for r in group],
            label=name, marker="ox"["random" in name], color="grey" if "random" in name else colours[i % 20],
            linestyle="--" if "random" in name else "-", capsize=2, linewidth=1,
        )  # fmt: skip
    axes.set_xlabel("FLOPs of the encoder, share of dense")
    axes.set_ylabel(f"{task.name}, {task.unit}")
    axes.legend(fontsize=7, loc="lower right", ncols=2)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / f"{task.name}.png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)
