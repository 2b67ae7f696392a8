"""Compare the results of a run on a GPU with what was predicted in ``predictions.toml``.

    python benchmarks/predictions.py gpu_first                                  # writes gpu_first/predictions.md
    python benchmarks/predictions.py benchmarks/results/gpu-h200-2026-11-28 --print

Reads the rows of ``sweep.jsonl`` (and those of 2026-11-28, which had other names, with ``gluon.jsonl`` beside it).
Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("predictions.toml")
OUTCOMES = ("held", "did not hold", "not measured")
Row = dict[str, Any]


def rows_of(folder: Path) -> list[Row]:
    """The rows of a folder with point, pass and kernel, in today's names.

    Of 2026-11-28, letters are tiles of the Triton kernel as it was ("first"), and with a prime of the same with the
    next index read ahead ("ahead").
    """
    found = [row for row in _lines(folder / "sweep.jsonl") if len(row["point"]) == 3]
    rows = []
    for row in found:
        row.setdefault("pass", "forward")
        if "config" in row:  # of 2026-11-28
            tiles = "x".join(map(str, row["config"] or ()))
            letter = row["kernel"]
            row["kernel"] = letter if not tiles else f"{'ahead' if letter[1:] else 'first'} {tiles}"
        rows.append(row)
    for row in _lines(folder / "gluon.jsonl"):
        tokens, dim, kind = row["gluon"][:3]
        point = [tokens, dim, str(kind)]
        dense = [r["ms"] for r in rows if r["point"] == point and r["kernel"].startswith("dense")]
        efficiency = round(min(dense) / row["ms"] * kind, 3) if dense else None
        row |= {"point": point, "pass": "forward", "kernel": "gluon prototype"}
        rows.append({**row, "efficiency": efficiency})
    return rows


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _wanted(rule: Row, row: Row) -> bool:
    """Tell whether a row is of the points and the pass that a prediction speaks of."""
    tokens, dim, kind = row["point"]
    if row["pass"] != rule.get("pass", "forward"):
        return False
    if rule.get("without") and "behind" not in rule and rule["without"] in row["kernel"]:
        return False
    if rule.get("points") and [tokens, dim, kind] not in rule["points"]:
        return False
    if rule.get("dims") and dim not in rule["dims"]:
        return False
    # The radial mask of the sweep has density 0.56.
    density = 0.56 if kind == "radial" else float(kind)
    return density >= rule.get("at_least", 0.0)


def best(rows: Iterable[Row], rule: Row, kernel: str, number: str) -> dict[tuple[Any, ...], float]:
    """The best number of the matching kernels by point: the largest, or the least error, time or cost; the other
    way round with ``worst``."""
    values: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        value = row.get(number)
        if value is None or not fnmatchcase(row["kernel"], kernel) or not _wanted(rule, row):
            continue
        values.setdefault(tuple(row["point"]), []).append(value)
    most = (number in ("efficiency", "tflops")) != rule.get("worst", False)
    return {point: (max if most else min)(found) for point, found in values.items()}


def judge(rule: Row, rows: list[Row]) -> tuple[str, str, str]:
    """Say what was predicted, what was measured, and whether it held."""
    number = rule.get("number", "efficiency")
    if "kernel" in rule:
        found = best(rows, rule, rule["kernel"], number)
        low, high = rule["low"], rule["high"]
        unit = {"efficiency": "", "tflops": " TFLOP/s"}.get(number, f" {number}")
        name = rule["kernel"] + (f" but {rule['without']}" if "without" in rule else "")
        said = f"{name}: {low:g} to {high:g}{unit}"
    else:
        without = rule.get("without")
        others = [row for row in rows if not without or without not in row["kernel"]]
        front = best(rows, rule, rule["ahead"], number)
        back = best(others, rule, rule["behind"], number)
        found = {p: front[p] / back[p] for p in front if back.get(p)}
        low, high, by = rule.get("by", 1.0), float("inf"), rule.get("by", 1.0)
        behind = rule["behind"] + (f" but {without}" if without else "")
        said = f"{rule['ahead']} over {behind}: {by:g} or more"
    if not found:
        return said, "", OUTCOMES[2]
    right = [point for point, value in found.items() if low <= value <= high]
    least, most = min(found.values()), max(found.values())
    shown = f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
    if len(right) == len(found):
        return said, f"{shown} at {_points(len(found))}", OUTCOMES[0]
    return said, f"{shown}; right at {len(right)} of {_points(len(found))}", OUTCOMES[1]


def _points(number: int) -> str:
    return f"{number} point{'s' * (number != 1)}"


def where(rule: Row) -> str:
    """The points of a prediction in words."""
    parts = [" / ".join(map(str, point)) for point in rule.get("points", [])]
    if rule.get("dims"):
        parts.append("head dim " + ", ".join(map(str, rule["dims"])))
    if rule.get("at_least"):
        parts.append(f"density {rule['at_least']:g} and more")
    if rule.get("pass"):
        parts.append(str(rule["pass"]))
    return "; ".join(parts) or "every point"


def predictions(date: str) -> list[Row]:
    """Predictions that existed on a date: later ones knew the results."""
    found = tomllib.loads(FILE.read_text(encoding="utf-8"))
    every = [rule for rule in [*found["range"], *found["order"]] if rule["made"] <= date]
    return sorted(every, key=lambda rule: rule["made"])  # stable: in the order of the file


def table(folder: Path) -> str:
    """A Markdown table of all predictions and what a folder of results says of them."""
    rows, lines, counts = rows_of(folder), [], dict.fromkeys(OUTCOMES, 0)
    environment = folder / "env.json"
    facts = json.loads(environment.read_text()) if environment.exists() else {}
    if str(facts.get("name")).startswith("CPU"):  # a dry run: its times are not measured
        rows = []
    dated = re.search(r"\d{4}-\d\d-\d\d", folder.name)
    date = facts.get("date") or (dated[0] if dated else "9999")
    for rule in predictions(date):
        said, measured, outcome = judge(rule, rows)
        counts[outcome] += 1
        lines.append(f"| {rule['made']} | {said} | {where(rule)} | {measured} | {outcome} |")
    device = ", ".join(str(facts[k]) for k in ("name", "torch", "triton") if k in facts)
    title = f"# Predictions for Hopper, and {device or 'no device'}"
    total = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    head = ["| made | prediction | where | measured | outcome |", "|---|---|---|---|---|"]
    note = (
        "Efficiency if no unit is given: (fastest dense ms / ms) * density. With a star the best of the kernels of "
        "that name counts. Reasons are in `benchmarks/predictions.toml`."
    )
    return "\n".join([title, "", f"{total}. {note}", "", *head, *lines, ""])


def report(folder: Path) -> Path:
    """Write predictions.md into a folder of results."""
    path = folder / "predictions.md"
    path.write_text(table(folder), encoding="utf-8")
    return path


def sweep_table(folder: Path) -> str:
    """The rows of the sweep, one line each, for the terminal."""
    lines = []
    for row in rows_of(folder):
        shown = [row.get(key) for key in ("ms", "tflops", "efficiency", "adds", "failed")]
        texts = [row["pass"], row["kernel"], *(x for x in shown if x is not None)]
        lines.append(" ".join(map(str, [*row["point"], *texts])))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--print", action="store_true", help="to the terminal, write nothing")
    args = parser.parse_args()
    if args.print:
        print(table(args.folder))
    else:
        print(f"wrote {report(args.folder)}")


if __name__ == "__main__":
    main()
