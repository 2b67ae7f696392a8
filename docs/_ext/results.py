"""Show committed measurements: the directive ``results`` reads a CSV or JSON file and shows a plot and a table of it.

No number of the page of benchmarks is typed. A file that has lost a column which the page shows is an error of the
build.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

Row = dict[str, Any]


def value(text: Any) -> Any:
    """Read a cell: a number if it is one."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def read(path: Path, key: str = "") -> tuple[list[str], list[Row]]:
    """Read a file; returns its comments and its rows.

    Args:
        path: a CSV file, whose comments begin with "#", or a JSON file.
        key: of a JSON file, the name of the list of rows in it; empty if the file is the list.

    Raises:
        ValueError: the file is neither, or holds no rows.
    """
    text = path.read_text(encoding="utf-8")
    comments: list[str] = []
    if path.suffix == ".csv":
        lines = text.splitlines()
        comments = [line.lstrip("# ") for line in lines if line.startswith("#")]
        rows = [dict(row) for row in csv.DictReader(x for x in lines if not x.startswith("#"))]
        rows = [{name: value(cell) for name, cell in row.items()} for row in rows]
    elif path.suffix == ".json":
        rows = json.loads(text)
        rows = rows[key] if key else rows
    else:
        raise ValueError(f"results are in .csv or .json files, got {path.name}")
    if not rows:
        raise ValueError(f"{path.name} holds no rows")
    return comments, rows


def shown(cell: Any) -> str:
    """Write a cell for readers, numbers with four digits."""
    if cell is None:
        return ""
    if not isinstance(cell, (int, float)):
        return str(cell)
    if float(cell).is_integer():
        return f"{cell:.0f}"
    return f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.0f}"


def needed(rows: Sequence[Row], columns: Iterable[str], path: Path) -> None:
    """Check that rows have columns; raises ValueError, which names those that are missing."""
    have = {name for row in rows for name in row}
    if lost := [name for name in columns if name not in have]:
        raise ValueError(f"{path.name} has no column {lost}; it has {sorted(have)}")


def grouped(rows: Sequence[Row], x: str, y: str, by: str) -> dict[str, list[tuple[float, float]]]:
    """Sort the points of a plot into its lines: those of one method, whatever its options."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if isinstance(row.get(x), (int, float)) and isinstance(row.get(y), (int, float)):
            name = str(row.get(by, "")).partition("(")[0] or "dense"
            lines.setdefault(name, []).append((row[x], row[y]))
    return {name: sorted(points) for name, points in lines.items()}


def draw(rows: Sequence[Row], axes: tuple[str, str, str], diagonal: bool, path: Path) -> None:
    """Draw one column against another, a line for each value of a third, as an SVG file."""
    from matplotlib import rcParams
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    x, y, by = axes
    rcParams["svg.hashsalt"] = path.name  # the same file from the same numbers
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    plot = figure.add_subplot()
    lines = grouped(rows, x, y, by)
    colours = [f"C{i}" for i in range(10)]
    for i, (name, points) in enumerate(lines.items()):
        style: dict[str, Any] = {
            "marker": "osD^vPX*"[i // 10 % 8],
            "color": colours[i % 10],
            "markersize": 5,
        }
        if len({x for x, _ in points}) < len(points):  # seeds or options of a method: no line
            style["linestyle"] = "none"
        plot.plot(*zip(*points, strict=True), label=name, linewidth=1, **style)
    if diagonal:
        largest = max(x for points in lines.values() for x, _ in points)
        plot.plot([1, largest], [1, largest], "k--", linewidth=0.8, label="ideal")
    plot.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    plot.grid(alpha=0.3)
    columns = 1 + len(lines) // 22
    figure.legend(loc="outside right upper", fontsize=7, frameon=False, ncols=columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def table(rows: Sequence[Row], columns: Sequence[str]) -> nodes.table:
    """Build the table of some columns."""
    group = nodes.tgroup(cols=len(columns))
    group += [nodes.colspec(colwidth=1) for _ in columns]

    def line(cells: Iterable[nodes.Node]) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))

    heads = (nodes.Text(name.replace("_", " ")) for name in columns)
    group += nodes.thead("", line(heads))
    body = nodes.tbody()
    for row in rows:
        cells = ((name, shown(row.get(name))) for name in columns)
        body += line(
            nodes.literal("", text)
            if "(" in text and name in ("method", "cache")
            else nodes.Text(text)
            for name, text in cells
        )
    group += body
    return nodes.table("", group)


class Results(SphinxDirective):
    """Show a file of results: its comments, a plot if axes are given, and its rows."""

    required_arguments = 1
    option_spec = {
        "columns": directives.unchanged_required,
        "key": directives.unchanged,
        "x": directives.unchanged,
        "y": directives.unchanged,
        "by": directives.unchanged,
        "diagonal": directives.flag,
        "alt": directives.unchanged,
    }

    def run(self) -> list[nodes.Node]:
        """Build the nodes."""
        name = self.arguments[0]
        root = Path(self.env.srcdir)
        path = root / name
        self.env.note_dependency(str(path))
        comments, rows = read(path, self.options.get("key", ""))
        columns = [column.strip() for column in self.options["columns"].split(",")]
        x, y, by = (self.options.get(option, "") for option in ("x", "y", "by"))
        needed(rows, [*columns, *filter(None, (x, y, by))], path)

        source = nodes.paragraph("", "", nodes.literal("", name))
        if comments:
            source += nodes.Text(": " + "; ".join(comments))
        found: list[nodes.Node] = [source]
        if x and y:
            picture = Path("build/docs-plots") / f"{path.stem}-{x}-{y}.svg".replace(" ", "-")
            draw(rows, (x, y, by), "diagonal" in self.options, root / picture)
            alt = self.options.get("alt", f"{y} against {x} of {name}".replace("_", " "))
            found.append(nodes.image("", uri=f"/{picture}", alt=alt))
        summary = f"<details><summary>{len(rows)} rows</summary>"
        found += [
            nodes.raw("", summary, format="html"),
            table(rows, columns),
            nodes.raw("", "</details>", format="html"),
        ]
        return found


def setup(app: Any) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.add_directive("results", Results)
    return {"parallel_read_safe": True}
