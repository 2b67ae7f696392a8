"""``python -m recipes.evaluate_video``: the built-in video model on held-out clips, dense and with every
method for video, at several numbers of tokens.

With ``--out PREFIX`` it writes PREFIX.json, PREFIX.md and PREFIX.png. A run that was stopped continues:
configurations that PREFIX.json holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vtr.evaluate.clips import SHARES, ClipsResult, evaluate, table
from vtr.zoo.video_questions import KINDS, video_qa

CLIPS = 36


def markdown(results: Sequence[ClipsResult], questions: int) -> str:
    """The page of results."""
    dense = results[0]
    shares = sorted({r.share for r in results[1:]}, reverse=True)
    names = list(dict.fromkeys(r.name for r in results[1:]))
    by = {(r.name, r.share): r for r in results}
    lines = [
        "# Built-in video model: accuracy against tokens",
        "",
        f"{questions} questions about {questions // len(KINDS)} held-out clips "
        f"(`python -m recipes.evaluate_video --out docs/video-digits`): whole answers, freely generated, in bfloat16. "
        f"Dense: {dense.tokens:.0f} tokens, {dense.accuracy:.1%} right. Tokens keep their positions. "
        f"The standard error of a number is about {100 * (0.25 / questions) ** 0.5:.1f} points at 50 % "
        f"and {100 * (0.09 / questions) ** 0.5:.1f} at 90 %, somewhat more because the questions about a "
        "clip fail together.",
        "",
        "![accuracy against tokens](video-digits.png)",
        "",
        "| method | " + " | ".join(f"{s:.0%} of tokens" for s in shares) + " |",
        "| --- |" + " ---: |" * len(shares),
    ]
    for name in names:
        cells = []
        for share in shares:
            r = by.get((name, share))
            cells.append("" if r is None else f"{r.accuracy:.1%} ({r.tokens:.0f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "In brackets: visual tokens, mean over the layers of the language model. FLOPs are those of its "
        "prefill; FrameFusion merges inside layers, so that its tokens, counted at the entry of a layer, "
        "are more than its cost. Whole frames and EVS, which keeps the first frame, cannot go below 36 "
        "tokens: at 10 % EVS knows little but the first second. HoliTom, PruneVid and DyCoke are shown "
        "with only their cut before the language model, and with the later cut as well. The model was "
        "trained with random subsets of tokens, never with merged tokens. By kind of question:",
        "",
        "| method | tokens | " + " | ".join(KINDS) + " | FLOPs |",
        "| --- | ---: |" + " ---: |" * (len(KINDS) + 1),
    ]
    for r in results:
        cost = "100 %" if r.flops is None else f"{100 * r.flops[1] / r.flops[0]:.0f} %"
        cells = [f"{100 * r.kinds[k]:.0f} %" for k in KINDS]
        lines.append(f"| {r.name} | {r.tokens:.0f} | " + " | ".join([*cells, cost]) + " |")
    lines += ["", "Settings:", ""]
    lines += [f"- {r.name}, {r.share:.0%}: `{r.method}`" for r in results[1:]]
    return "\n".join(lines) + "\n"


def plot(results: Sequence[ClipsResult], path: str | Path) -> None:
    """Accuracy against tokens, one line per method."""
    from vtr.errors import missing

    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise missing("matplotlib", "plots", "the plot") from error
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.axhline(100 * results[0].accuracy, color="0.6", lw=1, ls="--", label="dense")
    for i, name in enumerate(dict.fromkeys(r.name for r in results[1:])):
        points = sorted((r.tokens, 100 * r.accuracy) for r in results if r.name == name)
        style = ":" if name.startswith(("random", "uniform")) else "-"
        axes.plot(
            *zip(*points, strict=True), marker="osv^D"[i % 5], ms=4, lw=1.5, ls=style, label=name
        )
    axes.set(
        xlabel="visual tokens, mean over layers of the language model (of 289)",
        ylabel="whole answers right (%)",
        title="Built-in video model: accuracy against tokens",
    )
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def read(path: Path) -> list[ClipsResult]:
    """The results that :func:`write` stored."""
    rows = json.loads(path.read_text())["results"]
    return [ClipsResult(**{**r, "flops": tuple(r["flops"]) if r["flops"] else None}) for r in rows]


def write(results: Sequence[ClipsResult], path: Path, facts: dict[str, Any]) -> None:
    """Results as JSON, with what they were measured on."""
    content = {**facts, "results": [asdict(r) for r in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.evaluate_video", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--weights", default="digits-video", help="a name or a run's folder")
    parser.add_argument("--clips", type=int, default=CLIPS, help="seven questions about each")
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument("--shares", type=float, nargs="*", default=list(SHARES))
    parser.add_argument("--out", type=Path, help="write PREFIX.json, PREFIX.md, PREFIX.png")
    options = parser.parse_args(arguments)

    from rich.console import Console

    from vtr.zoo import load_vlm

    console = Console()
    model, processor = load_vlm(options.weights, torch.bfloat16)
    samples = video_qa(options.clips * len(KINDS), seed=options.seed)
    facts: dict[str, Any] = {
        "weights": options.weights,
        "dtype": "bfloat16",
        "clips": options.clips,
        "seed": options.seed,
    }
    store = None if options.out is None else Path(f"{options.out}.json")
    known: list[ClipsResult] = []
    if store is not None and store.is_file():
        content = json.loads(store.read_text())
        if any(content.get(key) != value for key, value in facts.items()):
            parser.error(
                f"{store} was measured on something else: delete it, or give another --out"
            )
        known = read(store)

    def keep(done: Sequence[ClipsResult]) -> None:
        """With what was measured at other shares, or before this run was asked to stop."""
        if store is not None:
            write([*done, *(r for r in known if r not in done)], store, facts)

    results = evaluate(
        model,
        processor,
        samples,
        options.shares,
        known=known,
        report=keep,
        progress=console.is_terminal,
    )
    console.print(table(results, f"{options.weights}, {len(samples)} held-out questions"))
    if store is not None:
        keep(results)
        store.with_suffix(".md").write_text(markdown(results, len(samples)))
        plot(results, store.with_suffix(".png"))
        console.print(f"wrote {store.with_suffix('')}.json, .md and .png")


if __name__ == "__main__":
    main()
