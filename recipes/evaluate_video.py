"""``python -m recipes.evaluate_video``: the built-in video model on held-out clips, dense and with every
method for video, at several numbers of tokens.

Writes PREFIX.json, PREFIX.md and PREFIX.png where ``--out PREFIX`` is given. A run that was stopped goes
on where it left: configurations that PREFIX.json holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

import vtr
from vtr.core.method import Method, Reduction, Stage
from vtr.core.site import ModelInfo, Site
from vtr.methods._vlm import language, prune
from vtr.zoo.video_questions import KINDS, VideoSample, answers, score, video_qa

if TYPE_CHECKING:
    from rich.table import Table

SHARES = (0.5, 0.25, 0.1)
CLIPS = 36


@dataclass(frozen=True)
class RandomFrames(Method):
    """Baseline: whole frames drawn by chance, as many as :class:`vtr.UniformFrames` would keep.

    Drawn per sample from torch's global generator; prompts with one video. Separators stay.

    Args:
        keep: budget per video, in tokens or as a fraction of them.
    """

    name: ClassVar[str] = "random-frames"
    paper: ClassVar[str] = "baseline: whole frames by chance"
    sites: ClassVar[tuple[str, ...]] = ("prompt",)

    keep: int | float = 0.25

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        return {"prompt": frozenset()}

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("prompt", 0),)

    def reduce(self, site: Site) -> Reduction | None:
        here = language(site)
        chances = torch.full(here.frame.shape, 2.0, device=here.device)
        number = (here.frame < 0).sum(1)
        for i, frame in enumerate(here.frame):
            count, each = int(frame.max()) + 1, int((frame == 0).sum())
            drawn = torch.rand(count).to(here.device)
            chances[i] = torch.where(frame < 0, chances[i], drawn[frame.clamp(min=0)])
            number[i] += vtr.UniformFrames(keep=self.keep).retained(count, each)
        return prune(here, chances, number)


def methods_at(share: float) -> dict[str, Method]:
    """Every method for video, with a share of the tokens left, under the name that tables show.

    HoliTom and PruneVid are there with their cut at the entry of the language model alone, and with
    the one inside it, which comes on top; so is DyCoke with its cut of the cache while it answers. DyCoke
    keeps a quarter of the frames whole, so that it cannot go below; at a quarter it keeps one token of
    each other frame.
    """
    per_frame: int | float = (4 * share - 1) / 3 if share > 0.25 else 1
    methods: dict[str, Method] = {
        "random tokens": vtr.Random(keep=share, site="prompt"),
        "random frames": RandomFrames(keep=share),
        "uniform frames": vtr.UniformFrames(keep=share),
        "DyCoke": vtr.DyCoke(keep=per_frame, kv=None),
        "DyCoke, cache too": vtr.DyCoke(keep=per_frame),
        "EVS": vtr.EVS(keep=share),
        "FastVID": vtr.FastVID(keep=share),
        "HoliTom": vtr.HoliTom(keep=share, inner=None),
        "HoliTom, inner too": vtr.HoliTom(keep=share),
        "PruneVid": vtr.PruneVid(keep=share, inner=None),
        "PruneVid, inner too": vtr.PruneVid(keep=share),
        "FrameFusion": vtr.FrameFusion(keep=share),
        "ToMe over time": vtr.VideoToMe(keep=share),
    }
    if share < 0.25:
        del methods["DyCoke"], methods["DyCoke, cache too"]
    return methods


@dataclass(frozen=True)
class Result:
    """One configuration.

    Attributes:
        name: of the method; ``dense`` for the bare model.
        method: with its settings.
        share: of the visual tokens that was asked for.
        tokens: visual tokens, mean over the layers of the language model, of the last batch.
        accuracy: share of whole, freely generated answers that are right.
        kinds: the same per kind of question.
        flops: (dense, reduced) of the language model's prefill, per sample of the last batch.
        seconds: time of all questions.
    """

    name: str
    method: str
    share: float
    tokens: float
    accuracy: float
    kinds: dict[str, float] = field(default_factory=dict)
    flops: tuple[int, int] | None = None
    seconds: float = 0.0


def measure(
    model: Any,
    processor: Any,
    samples: list[VideoSample],
    name: str,
    method: Method | None,
    share: float = 1.0,
) -> Result:
    """One configuration on samples; positions of tokens are kept, whatever the paper's default."""
    start = time.perf_counter()
    torch.manual_seed(0)
    applied = nullcontext() if method is None else vtr.apply(model, method, positions="original")
    with applied as handle:
        scores = score(samples, answers(model, processor, samples))
        seconds = time.perf_counter() - start
        tokens, flops = 289.0, None
        if handle is not None:
            layers = handle.trace.tokens["decoder"].values()
            tokens = sum(entering for entering, _ in layers) / len(layers)
            flops = handle.report().flops["language"]
    text = "dense" if method is None else str(method)
    return Result(name, text, share, tokens, scores.pop("mean"), scores, flops, seconds)


def evaluate(
    model: Any,
    processor: Any,
    samples: list[VideoSample],
    shares: Sequence[float] = SHARES,
    *,
    methods: Callable[[float], dict[str, Method]] = methods_at,
    known: Sequence[Result] = (),
    report: Callable[[list[Result]], None] = lambda results: None,
    progress: bool = False,
) -> list[Result]:
    """Dense, then every method at every share.

    Args:
        known: results that need not be measured again.
        report: called with all results after each new one.
    """
    from rich.progress import Progress

    jobs: list[tuple[str, Method | None, float]] = [("dense", None, 1.0)]
    jobs += [(name, m, share) for share in shares for name, m in methods(share).items()]
    have = {(r.name, r.method, r.share): r for r in known}
    results = []
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("held-out questions", total=len(jobs))
        for name, method, share in jobs:
            key = (name, "dense" if method is None else str(method), share)
            new = have.get(key) or measure(model, processor, samples, name, method, share)
            results.append(new)
            if key not in have:
                report(results)
            bar.advance(task)
    return results


def table(results: Sequence[Result], title: str, kinds: Sequence[str] = KINDS) -> Table:
    """A rich table, with a column for each of the kinds of question."""
    from rich.table import Table

    out = Table(title=title)
    out.add_column("method", no_wrap=True)
    for name in ("tokens", "answers", *kinds, "FLOPs"):
        out.add_column(name, justify="right")
    for r in results:
        cost = "100 %" if r.flops is None else f"{r.flops[1] / r.flops[0]:.0%}"
        shares = (f"{r.kinds[k]:.0%}" for k in kinds)
        out.add_row(r.name, f"{r.tokens:.0f}", f"{r.accuracy:.1%}", *shares, cost)
    return out


def markdown(results: Sequence[Result], questions: int) -> str:
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
        "prefill; FrameFusion merges inside layers, so that its tokens, counted where they enter a layer, "
        "are more than its cost. Whole frames and EVS, which keeps the first frame, cannot go below 36 "
        "tokens: at 10 % EVS knows little but the first second. HoliTom, PruneVid and DyCoke are shown "
        "with their cut before the language model alone, and with the later one on top. The model was "
        "trained with random subsets of tokens, with merged tokens never. By kind of question:",
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


def plot(results: Sequence[Result], path: str | Path) -> None:
    """Accuracy against tokens, one line per method."""
    from vtr.errors import missing

    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise missing("matplotlib", "ui", "the plot") from error
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


def read(path: Path) -> list[Result]:
    """The results that :func:`write` stored."""
    rows = json.loads(path.read_text())["results"]
    return [Result(**{**r, "flops": tuple(r["flops"]) if r["flops"] else None}) for r in rows]


def write(results: Sequence[Result], path: Path, facts: dict[str, Any]) -> None:
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
    known: list[Result] = []
    if store is not None and store.is_file():
        content = json.loads(store.read_text())
        if any(content.get(key) != value for key, value in facts.items()):
            parser.error(
                f"{store} was measured on something else: delete it, or give another --out"
            )
        known = read(store)

    def keep(done: Sequence[Result]) -> None:
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
