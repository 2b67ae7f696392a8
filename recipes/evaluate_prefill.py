"""``python -m recipes.evaluate_prefill``: the built-in model for long videos on held-out clips of 64
frames, dense and with every sparse prefill and every edit of the attention.

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
from vtr.evaluate.prefill import (
    BASELINES,
    BLOCK,
    PrefillResult,
    at_density,
    evaluate,
    is_edit,
    methods,
    questions,
    table,
)
from vtr.zoo.slide_questions import KINDS

QUESTIONS = 24
SEEDS = (99, 100, 101)
COMMAND = "python -m recipes.evaluate_prefill --out docs/prefill-digits"


def _peers(r: PrefillResult, results: Sequence[PrefillResult]) -> list[str]:
    peers = [at_density(results, name, r.density) for name in BASELINES]
    return ["" if p is None else f"{p:.1%}" for p in peers]


def markdown(results: Sequence[PrefillResult], facts: Mapping[str, Any]) -> str:
    """The page of results."""
    dense, *others = results
    total = facts["questions"] * len(facts["seeds"])
    more = "" if facts["questions"] == QUESTIONS else f" --questions {facts['questions']}"
    sparse = [r for r in others if r.name not in facts["edits"]]
    edits = [r for r in others if r.name in facts["edits"]]
    lines = [
        "# Built-in model for long videos: accuracy against density",
        "",
        f"{facts['questions']} questions about {facts['questions'] // len(KINDS)} held-out clips for each "
        f"of {len(facts['seeds'])} seeds (`{COMMAND}{more}`): whole answers, freely generated, in float32. "
        f"Clips have 64 frames and 1025 visual tokens. Dense: {dense.accuracy:.1%} right. The standard error of "
        f"a number is about {100 * (0.25 / total) ** 0.5:.1f} points at 50 % and "
        f"{100 * (0.09 / total) ** 0.5:.1f} at 90 %, somewhat more because the questions about a clip fail "
        "together.",
        "",
        "![accuracy against density](prefill-digits.png)",
        "",
        "Density is the share of the causal pairs of query and key that the prefill computes, mean over "
        f"layers and questions; rows of text and the last rows, which are always dense, count. Blocks have "
        f"{BLOCK} tokens, as many as a frame. The columns *random* and *window* are the accuracies of random "
        "blocks and of a local window at the density of the row, on straight lines between their own rows. "
        "± is the standard deviation over seeds.",
        "",
        "| method | density | right | random | window | " + " | ".join(KINDS) + " |",
        "| --- |" + " ---: |" * (len(KINDS) + 4),
    ]
    for r in [dense, *sparse]:
        cells = [
            f"{r.density:.0%}",
            f"{r.accuracy:.1%} ± {100 * r.spread:.1f}",
            *_peers(r, results),
        ]
        cells += [f"{r.kinds[k]:.0%}" for k in KINDS]
        lines.append(f"| {r.name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Questions ask about a digit that appears twice, at least 12 frames apart, except half of *how often*. To "
        "find it, visual tokens compare their frame with all before it; a guess among the digits of a colour is "
        "right in about a third of *which twice*, and in half of *how often*. *Colour last* and *where last* "
        "can be answered by rows of text alone, which are dense. Settings were chosen by their densities, with "
        "6 questions of another seed (thresholds of *sale* with these questions); methods with numbers from data are calibrated on 12 questions about "
        "clips of the training split, except SALE, whose thresholds are given.",
        "",
    ]
    if edits:
        lines += [
            "Edits change attention and skip no pair:",
            "",
            "| edit | right | " + " | ".join(KINDS) + " |",
            "| --- |" + " ---: |" * (len(KINDS) + 1),
        ]
        for r in edits:
            kinds = " | ".join(f"{r.kinds[k]:.0%}" for k in KINDS)
            lines.append(f"| {r.name} | {r.accuracy:.1%} ± {100 * r.spread:.1f} | {kinds} |")
        lines.append("")
    lines += ["Settings, in the order of the rows:", ""]
    lines += [f"- {r.name}, density {r.density:.0%}: `{r.method}`" for r in [*sparse, *edits]]
    return "\n".join(lines) + "\n"


def plot(results: Sequence[PrefillResult], edits: Sequence[str], path: str | Path) -> None:
    """Accuracy against density, one line per method."""
    from vtr.errors import missing

    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise missing("matplotlib", "plots", "the plot") from error
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    axes.axhline(100 * results[0].accuracy, color="0.6", lw=1, ls="--", label="dense")
    names = dict.fromkeys(r.name for r in results[1:] if r.name not in edits)
    for i, name in enumerate(names):
        points = sorted((r.density, 100 * r.accuracy) for r in results if r.name == name)
        style: dict[str, Any] = {"ls": "-", "lw": 1.3, "color": pyplot.get_cmap("tab20")(i % 20)}
        if name in BASELINES:
            style = {"ls": ":", "lw": 2, "color": "0.2" if name == BASELINES[0] else "0.55"}
        axes.plot(*zip(*points, strict=True), marker="osv^D"[i % 5], ms=4, label=name, **style)
    axes.set(
        xlabel="density: share of the causal pairs that the prefill computes",
        ylabel="whole answers right (%)",
        title="Built-in model for long videos: accuracy against density",
        xlim=(0, 1.02),
    )
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, ncol=2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def read(path: Path) -> list[PrefillResult]:
    """Read the results that a run stored."""
    return [row(r) for r in json.loads(path.read_text())["results"]]


def row(held: Mapping[str, Any]) -> PrefillResult:
    """One stored result."""
    return PrefillResult(**{**held, "seeds": tuple(held["seeds"])})


def write_csv(results: Sequence[PrefillResult], path: Path) -> None:
    """Results as a table of numbers, a row for each configuration."""
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        head = ("method", "setting", "density", "accuracy", "spread", *BASELINES, *KINDS, "seconds")
        out.writerow(head)
        for r in results:
            peers = [at_density(results, name, r.density) for name in BASELINES]
            numbers = [r.density, r.accuracy, r.spread, *peers, *(r.kinds[k] for k in KINDS)]
            cells = ["" if x is None else f"{x:.4f}" for x in numbers]
            out.writerow([r.name, r.method, *cells, f"{r.seconds:.1f}"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.evaluate_prefill", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--weights", default="digits-long", help="a name or a run's folder")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="for each seed")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--methods", nargs="*", help="names of methods; default: all")
    parser.add_argument("--out", type=Path, help="write PREFIX.json, .csv, .md and .png")
    options = parser.parse_args(arguments)

    from rich.console import Console

    from vtr.zoo import load_vlm

    everything = methods()
    wanted = choose(parser, everything, options.methods, "sparse prefill or edit")
    console = Console()
    facts: dict[str, Any] = {
        "weights": options.weights,
        "dtype": "float32",
        "questions": options.questions,
        "seeds": options.seeds,
        "edits": [n for n, found in everything.items() if is_edit(type(found[0]))],
    }
    store = Store(parser, options.out, facts, row, beside=("edits",))
    model, processor = load_vlm(options.weights, torch.float32)

    results = evaluate(
        model,
        processor,
        questions(processor, options.questions, options.seeds),
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
        plot(together, facts["edits"], store.path.with_suffix(".png"))
        console.print(f"wrote {store.path.with_suffix('')}.json, .csv, .md and .png")


if __name__ == "__main__":
    main()
