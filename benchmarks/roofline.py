"""Draw the roofline of a run on a GPU: what the attention kernels reach, and what bounds them.

    python benchmarks/roofline.py                                 # of the newest committed run, into docs/
    python benchmarks/roofline.py gpu_first --out roofline.png

Reads ``env.json`` (the measured product of matrices and copy of memory) and the rows of the sweep. On the left,
FLOPs are divided by the bytes that must move (q, k, v, output and LSE once); on the right by the bytes that do move
between the second-level cache and the processors: a tile of ``block_m`` queries reads its keys and values once, which
is ``block_m`` FLOPs per byte in bfloat16. Kernels above the slanted line on the right owe that to the cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import predictions  # beside this script

HERE = Path(__file__).resolve().parent
HEADS = 12  # of the sweep
Row = dict[str, Any]
# Name, whether a kernel is of it, colour. The best tile counts.
FAMILIES: list[tuple[str, Callable[[str], bool], str]] = [
    ("dense, cuDNN", lambda k: k == "dense cudnn", "#888888"),
    ("dense, FlashAttention 2", lambda k: k == "dense flash", "#bbbbbb"),
    ("FlexAttention", lambda k: k == "flex", "#d95f02"),
    ("Triton before", lambda k: k.startswith("first "), "#a6cee3"),
    ("Triton, index read ahead", lambda k: k.startswith("ahead "), "#1f78b4"),
    ("Triton", lambda k: k.startswith("triton ") and "persistent" not in k, "#1f78b4"),
    ("Triton, persistent", lambda k: k.endswith("persistent"), "#6a3d9a"),
    ("Gluon prototype", lambda k: k == "gluon prototype", "#33a02c"),
    ("Gluon", lambda k: k == "gluon", "#33a02c"),
    ("flash-attn-4", lambda k: k == "flash", "#e7298a"),
]
FLOOR = 120  # TFLOP/s at which the axis begins
MARKERS = {128: "o", 64: "s", 72: "^"}


def must_move(row: Row) -> float:
    """Bytes of q, k, v and the output in bfloat16, and of the LSE in float32."""
    tokens, dim, _ = row["point"]
    return float(HEADS * tokens * (4 * dim * 2 + 4))


def flops(row: Row) -> float:
    return float(row["tflops"] * 1e9 * row["ms"])


def queries_of(kernel: str) -> int | None:
    """Queries of a tile, None for kernels whose tiles are not known."""
    name, _, tile = kernel.partition(" ")
    if name in ("first", "ahead", "triton"):
        return int(tile.split("x")[0])
    return 128 if kernel in ("flex", "gluon", "gluon prototype") else None


def best(rows: list[Row], wanted: Callable[[str], bool]) -> list[Row]:
    """The fastest row of a family at each point."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["pass"] != "forward" or "ms" not in row or not wanted(row["kernel"]):
            continue
        point = tuple(row["point"])
        if point not in found or row["ms"] < found[point]["ms"]:
            found[point] = row
    return sorted(found.values(), key=lambda row: flops(row) / must_move(row))


def short(point: tuple[Any, ...]) -> str:
    tokens, _, kind = point
    return f"{tokens / 1000:.0f}k, radial" if kind == "radial" else f"{tokens // 1024}k, {kind}"


def roofs(axis: Any, facts: Row, left: float, right: float) -> None:
    """The measured ceilings."""
    peak, memory = facts["bf16_tflops"], facts["copy_gb_s"] / 1e3
    ridge = peak / memory
    axis.plot([left, ridge, right], [left * memory, peak, peak], color="black", linewidth=1.4)
    axis.annotate(
        f"product of matrices: {peak:.0f} TFLOP/s", (right, peak), (-4, 4), textcoords="offset points",
        ha="right", fontsize=9,
    )  # fmt: skip
    axis.annotate(
        f"memory: {memory:.2f} TB/s", (left, left * memory), (7, -2), textcoords="offset points",
        va="top", fontsize=9,
    )  # fmt: skip


def draw(folder: Path, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    facts = json.loads((folder / "env.json").read_text())
    rows = predictions.rows_of(folder)
    figure, (must, does) = plt.subplots(
        1, 2, figsize=(13.5, 6.2), sharey=True, gridspec_kw={"width_ratios": [1.7, 1]}
    )
    families = [(name, best(rows, wanted), colour) for name, wanted, colour in FAMILIES]
    families = [family for family in families if family[1]]
    blocked = [f for f in families if any(queries_of(row["kernel"]) for row in f[1])]
    for name, found, colour in families:
        for dim, marker in MARKERS.items():
            some = [row for row in found if row["point"][1] == dim]
            xs = [flops(row) / must_move(row) for row in some]
            ys = [row["tflops"] for row in some]
            line = "-" if dim == 128 and not name.startswith("dense") else "none"
            must.plot(
                xs, ys, linestyle=line, marker=marker, color=colour, markersize=6, linewidth=1,
                label=name if dim == 128 else None,
            )  # fmt: skip
    for number, (name, _, colour) in enumerate(blocked):
        wanted = next(w for n, w, _ in FAMILIES if n == name)
        for row in rows:
            if row["pass"] != "forward" or "ms" not in row or not wanted(row["kernel"]):
                continue
            # Beside each other, not on one line.
            x = queries_of(row["kernel"]) * 2 ** (0.11 * (number - (len(blocked) - 1) / 2))
            marker = MARKERS[row["point"][1]]
            does.plot(x, row["tflops"], marker, color=colour, markersize=5, alpha=0.85)
    named: dict[float, list[str]] = {}
    for row in (row for name, found, _ in families if "dense" not in name for row in found):
        x, text = flops(row) / must_move(row), short(tuple(row["point"]))
        near = next((other for other in named if abs(x / other - 1) < 0.05), x)
        if text not in named.setdefault(near, []):
            named[near].append(text)
    for x, texts in named.items():
        must.axvline(x, color="#cccccc", linewidth=0.8, linestyle=":", zorder=0)
        must.annotate(
            "\n".join(texts), (x, FLOOR), (3, 5), textcoords="offset points", rotation=90,
            fontsize=8.5, color="#444444", va="bottom",
        )  # fmt: skip
    roofs(must, facts, 60, 4e4)
    roofs(does, facts, 40, 300)
    must.set_xlim(60, 4e4)
    does.set_xlim(40, 300)
    must.set(
        xlabel="FLOPs per byte that must move",
        ylabel="TFLOP/s",
        title="each call, with its best tile; names are tokens and density",
    )
    does.set(
        xlabel="FLOPs per byte that does move from the second-level cache\n(= queries of a tile)",
        title="every tile",
    )
    for axis in (must, does):
        axis.set(xscale="log", yscale="log", ylim=(FLOOR, 1.2 * facts["bf16_tflops"]))
        ticks = [150, 200, 300, 400, 500, 600, 700, 800]
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.yaxis.set_minor_locator(plt.NullLocator())
        axis.grid(alpha=0.25)
    does.set_xticks([64, 128], ["64", "128"])
    does.xaxis.set_minor_locator(plt.NullLocator())
    shapes = [
        plt.Line2D([], [], color="#444444", marker=m, linestyle="", label=f"head dim {d}")
        for d, m in MARKERS.items()
    ]
    handles, _ = must.get_legend_handles_labels()
    figure.legend(handles=[*handles, *shapes], fontsize=9, loc="lower center", ncol=5)
    figure.suptitle(
        f"Attention forward on {facts['name']}, bfloat16, {HEADS} heads (torch {facts['torch']}, Triton "
        f"{facts['triton']})",
        fontsize=12,
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(out, dpi=100)
    print(f"wrote {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of results; default: the newest run")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "kernels-roofline.png")
    args = parser.parse_args()
    runs = sorted(HERE.glob("results/gpu-*"), key=lambda path: path.name[-10:])
    draw(args.folder or runs[-1], args.out)


if __name__ == "__main__":
    main()
