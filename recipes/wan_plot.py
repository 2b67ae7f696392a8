"""The plot of quality against attention work, from the rows of :mod:`recipes.evaluate_wan`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHARE = 0.2  # of the steps dense
#: Colours that differ without colour vision (Okabe and Ito), and markers beside them.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
MARKERS = "osD^vPX<>*hp"
BEST, BARE = "top of the dense map", "random"
STATIC = ("radial", "Re-ttention of it", "neighbourhood", "own frame", "SearchedTile")
PANELS = (
    ("digit", "digit right (%)", 100),
    ("direction", "direction right (%)", 100),
    ("psnr", "PSNR to dense (dB)", 1),
)


def kind(label: str) -> str:
    """The kind of a method: ``"bound"``, ``"static"``, ``"trained"`` or ``"chosen"`` at run time."""
    if label in (BEST, BARE):
        return "bound"
    if label in STATIC:
        return "static"
    return "trained" if label.endswith("fine-tuned") else "chosen"


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The look of each line: colour and marker by its place, the dashes by its kind."""
    dashes = {"static": ":", "trained": "-.", "chosen": "-"}
    found: dict[str, dict[str, Any]] = {}
    for n, label in enumerate(x for x in labels if kind(x) != "bound"):
        found[label] = {
            "color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)],
            "ls": dashes[kind(label)], "lw": 2.2 if kind(label) == "trained" else 1.3, "ms": 6,
        }  # fmt: skip
    found[BEST] = {"color": "0.25", "ls": "--", "lw": 2.2, "marker": ""}
    found[BARE] = {"color": "0.6", "ls": "--", "lw": 2.2, "marker": ""}
    return found


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw digit, direction and PSNR against work, a line for each method.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    from vtr.errors import missing

    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise missing("matplotlib", "plots", "the plot") from error
    dense = next(row for row in rows if row["attention"] == "dense")
    chosen = [row for row in rows if row["dense_steps"] == SHARE]
    order = {"bound": 0, "static": 1, "chosen": 2, "trained": 3}
    labels = sorted(dict.fromkeys(row["attention"] for row in chosen), key=lambda x: order[kind(x)])
    looks = styles(labels)
    figure, axes = pyplot.subplots(1, 3, figsize=(16, 6.2), layout="constrained")
    for panel, (key, title, factor) in zip(axes, PANELS, strict=True):
        if dense[key] is not None:
            panel.axhline(factor * dense[key], color="0.4", lw=1, label="dense")
        for label in labels:
            points = sorted(
                (r["work"], factor * r[key])
                for r in chosen
                if r["attention"] == label and r[key] is not None
            )
            if not points:
                continue
            panel.plot(*zip(*points, strict=True), label=label, **looks[label])
        panel.set(xlabel="attention work of the run (dense = 1)", title=title)
        panel.grid(alpha=0.25)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=9)
    figure.suptitle(
        "Built-in video generator, first 20 % of the steps dense. Dotted: static masks; solid: chosen at run time;\n"
        "dash-dotted: fine-tuned; dashed: the best blocks of the dense map, and random ones"
    )
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
