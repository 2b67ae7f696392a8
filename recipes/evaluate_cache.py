"""``python -m recipes.evaluate_cache``: the built-in model for chats on held-out chats about twelve pictures or
screenshots, with its whole KV cache and with every method that decides what the cache holds.

With ``--out PREFIX`` it writes PREFIX.json, PREFIX.csv, PREFIX.md and PREFIX.png. A run that was stopped
continues: configurations that PREFIX.json holds are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.comparison import Store, choose
from vtr.evaluate.chats import (
    BASELINES,
    COLUMNS,
    CacheResult,
    at_bytes,
    draw,
    evaluate,
    methods,
    table,
)
from vtr.zoo.chat_questions import KINDS

PER_CHAT = sum(map(len, KINDS.values()))  # questions about a chat of each task
QUESTIONS = 50 * PER_CHAT
SEEDS = (99, 100, 101)
COMMAND = "python -m recipes.evaluate_cache --out docs/cache-digits"


def _peers(r: CacheResult, results: Sequence[CacheResult]) -> list[str]:
    peers = [at_bytes(results, name, r.bytes) for name in BASELINES]
    return ["" if p is None else f"{p:.1%}" for p in peers]


def markdown(results: Sequence[CacheResult], facts: Mapping[str, Any]) -> str:
    """Write the page of results."""
    full = results[0]
    chats, seeds = facts["questions"] // PER_CHAT, len(facts["seeds"])
    total = facts["questions"] * seeds
    more = "" if facts["questions"] == QUESTIONS else f" --questions {facts['questions']}"
    lines = [
        "# Built-in model for chats: accuracy against bytes of the KV cache",
        "",
        f"{facts['questions']} questions in {chats} held-out chats of each task for each of {seeds} seeds "
        f"(`{COMMAND}{more}`): whole answers, freely generated, in bfloat16. With the whole cache: "
        f"{full.accuracy:.1%} right, {full.bytes / 2**10:.0f} KiB. The standard error of a number of the column "
        f"*right* is about {100 * (0.25 / total) ** 0.5:.1f} points at 50 % and "
        f"{100 * (0.09 / total) ** 0.5:.1f} at 90 %, somewhat more because the questions about a chat fail "
        "together.",
        "",
        "![accuracy against bytes of the cache](cache-digits.png)",
        "",
        "A chat has five turns on one KV cache. The first one brings twelve pictures of 16 visual tokens each, and "
        "asks about the last of them. Methods choose what the cache holds behind this prompt, before they know the "
        "later questions, most of which come back to earlier pictures. In *pictures* every picture is another one; "
        "in *screens* a single button changes from one shot to the next, and questions about an earlier shot are "
        "about a button that shows another digit now. *Now* are the questions about the last picture, *back* those "
        "about an earlier one.",
        "",
        "Bytes are those of all tensors of the cache behind the last turn, per chat: keys, values, which tokens "
        "they are of, and what a method notes of them. The columns *random* and *recent* are the accuracies of "
        f"`{BASELINES[0]}` and `{BASELINES[1]}` with as many bytes as the row, on straight lines between their own "
        "rows. ± is the standard deviation over seeds; in all chats of a seed "
        "random entries have the same places.",
        "",
        "| method | KiB | of full | right | random | recent | " + " | ".join(COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 5),
    ]
    for r in results:
        cells = [
            f"{r.bytes / 2**10:.0f}",
            f"{r.bytes / full.bytes:.0%}",
            f"{r.accuracy:.1%} ± {100 * r.spread:.1f}",
            *_peers(r, results),
            *(f"{share:.0%}" for share in r.columns.values()),
        ]
        lines.append(f"| {r.name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Methods that drop entries rank them by the prompt: by the attention of its rows (those of the pictures, and of "
        "a question about the last one), by keys, or by age. This says little about later questions, and most of "
        "these methods lose more than random entries, which each head and layer draws for itself. In *pictures* they "
        "keep what the first question needs, and random entries do not; in *screens* the last question asks about "
        "the last shot again, and about another button. Methods that store all entries with fewer bits do not have to "
        "choose. They pack keys and values of 16 bits. VASparse sums the entries that leave in clusters, and the sums "
        "draw the attention of this model; *vasparse-drop* is without them. Settings are for a prompt of two hundred "
        "tokens; none was tuned with these questions.",
        "",
        "Settings, in the order of the rows:",
        "",
    ]
    lines += [
        f"- {r.name}, {r.bytes / full.bytes:.0%} of the bytes: `{r.method}`" for r in results[1:]
    ]
    return "\n".join(lines) + "\n"


def plot(results: Sequence[CacheResult], path: str | Path) -> None:
    """Draw accuracy against bytes, one line per method, later questions about earlier pictures apart."""
    from vtr.errors import missing

    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise missing("matplotlib", "plots", "the plot") from error
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
    names = list(dict.fromkeys(r.name for r in results[1:]))
    for axes, column in zip(panels, [c for c in COLUMNS if c.endswith("back")], strict=True):
        axes.axhline(100 * results[0].columns[column], color="0.6", lw=1, ls="--", label="full")
        for i, name in enumerate(names):
            points = sorted(
                (r.bytes / 2**10, 100 * r.columns[column]) for r in results if r.name == name
            )
            style: dict[str, Any] = {"ls": "-", "lw": 1.3}
            style["color"] = pyplot.get_cmap("tab20")(i % 20)
            if name in BASELINES:
                style = {"ls": ":", "lw": 2, "color": "0.2" if name == BASELINES[0] else "0.55"}
            axes.plot(*zip(*points, strict=True), marker="osv^D"[i % 5], ms=4, label=name, **style)
        axes.set(xlabel="KiB of the KV cache behind the last turn", title=column)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("whole answers right (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle("Built-in model for chats: questions that come back to an earlier picture")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def read(path: Path) -> list[CacheResult]:
    """Read the results that a run stored."""
    return [row(r) for r in json.loads(path.read_text())["results"]]


def row(held: Mapping[str, Any]) -> CacheResult:
    """Make a result from what JSON holds of it."""
    return CacheResult(**{**held, "seeds": tuple(held["seeds"])})


def write_csv(results: Sequence[CacheResult], path: Path) -> None:
    """Write results as a table of numbers, a row for each configuration."""
    kinds = list(results[0].kinds)
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        head = ("method", "setting", "bytes", "share", "accuracy", "spread", *BASELINES)
        out.writerow([*head, *COLUMNS, *kinds, "seconds"])
        for r in results:
            peers = [at_bytes(results, name, r.bytes) for name in BASELINES]
            numbers = [r.bytes / results[0].bytes, r.accuracy, r.spread, *peers]
            numbers += [*r.columns.values(), *(r.kinds[k] for k in kinds)]
            cells = ["" if x is None else f"{x:.4f}" for x in numbers]
            out.writerow([r.name, r.method, f"{r.bytes:.0f}", *cells, f"{r.seconds:.1f}"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.evaluate_cache", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--weights", default="digits-chat", help="a name or a run's folder")
    parser.add_argument(
        "--questions",
        type=int,
        default=QUESTIONS,
        help=f"for each seed, a multiple of {PER_CHAT}: those of a chat of each task",
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--methods", nargs="*", help="names of methods; default: all")
    parser.add_argument("--out", type=Path, help="write PREFIX.json, .csv, .md and .png")
    options = parser.parse_args(arguments)
    if options.questions < 1 or options.questions % PER_CHAT:
        parser.error(f"--questions must be a multiple of {PER_CHAT}, got {options.questions}")

    from rich.console import Console

    from vtr.zoo import load_vlm

    wanted = choose(parser, methods(), options.methods, "method for the KV cache")
    console = Console()
    facts: dict[str, Any] = {
        "weights": options.weights,
        "dtype": "bfloat16",
        "questions": options.questions,
        "seeds": options.seeds,
    }
    store = Store(parser, options.out, facts, row)
    model, processor = load_vlm(options.weights, torch.bfloat16)
    results = evaluate(
        model,
        processor,
        draw(options.questions // PER_CHAT, options.seeds),
        wanted,
        known=store.known,
        report=store.keep,
        progress=console.is_terminal,
    )
    count = options.questions * len(options.seeds)
    console.print(table(results, f"{options.weights}, {count} held-out questions"))
    together = store.finish(results, everything=options.methods is None)
    if store.path is not None:
        write_csv(together, store.path.with_suffix(".csv"))
        store.path.with_suffix(".md").write_text(markdown(together, facts))
        plot(together, store.path.with_suffix(".png"))
        console.print(f"wrote {store.path.with_suffix('')}.json, .csv, .md and .png")


if __name__ == "__main__":
    main()
