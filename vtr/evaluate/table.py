"""The results of a sweep as a rich table, CSV, Markdown and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtr.evaluate.official import HEADLINE

if TYPE_CHECKING:
    from vtr.evaluate.outcomes import Line, Outcomes


def score_text(
    task: str, value: float | None, spread: float | None = None, scale: float | None = None
) -> str:
    """``93.4``, ``93.4 ± 0.3``, ``1510``: shares are shown in percent.

    ``scale`` is that of the task's column; None takes a value up to 1 for a share.
    """
    if value is None:
        return "failed"
    if scale is None:
        scale = 100.0 if abs(value) <= 1 else 1.0
    digits = 0 if abs(value) > 200 else 1
    text = f"{scale * value:.{digits}f}"
    return text if spread is None else f"{text} ± {scale * spread:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, scale: float = 1.0) -> str:
    if value is None:
        return ""
    value /= scale
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def columns(results: Outcomes) -> list[tuple[str, Callable[[Line], str]]]:
    """The headings of the table, each with the text of a line below it."""

    def score(task: str) -> Callable[[Line], str]:
        # One for the whole column: below 1 a score out of 100 is no share.
        found = [abs(line.scores[task]) for line in results.lines() if task in line.scores]
        factor = 100.0 if max(found, default=0.0) <= 1 else 1.0
        return lambda line: score_text(task, line.scores.get(task), line.spread.get(task), factor)

    scale, unit = _flops_unit(results)
    kv_scale, kv_unit = _bytes_unit(results)
    out: list[tuple[str, Callable[[Line], str]]] = [("method", lambda x: x.method)]
    out += [(task, score(task)) for task in results.tasks]
    out += [
        ("of dense", lambda x: _percent(x.share)),
        ("tokens", lambda x: _number(x.tokens)),
        ("mean tokens", lambda x: _number(x.mean_tokens)),
        (unit, lambda x: _number(x.flops, scale)),
        ("FLOPs of dense", lambda x: _percent(x.of_flops)),
        ("ms", lambda x: _number(x.ms)),
        ("tokens per s", lambda x: _number(x.tokens_per_s)),
        (f"KV {kv_unit}", lambda x: _number(x.kv, kv_scale)),
        ("KV of dense", lambda x: _percent(x.of_kv)),
    ]
    if any(x.errors for x in results.lines()):
        out.append(("raised", lambda x: str(x.errors)))
    if any(x.empty for x in results.lines()):
        out.append(("empty", lambda x: str(x.empty)))
    return out


def _flops_unit(results: Outcomes) -> tuple[float, str]:
    most = max((line.flops or 0 for line in results.lines()), default=0)
    return (1e12, "TFLOPs") if most >= 1e12 else (1e9, "GFLOPs")


def _bytes_unit(results: Outcomes) -> tuple[float, str]:
    most = max((line.kv or 0 for line in results.lines()), default=0)
    units = [(2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")]
    return next((u for u in units if most >= u[0]), (1.0, "bytes"))


def notes(results: Outcomes) -> list[str]:
    """List what a reader of the table must know."""
    lines = results.lines()
    samples = max((line.samples for line in lines), default=0)
    out = [
        f"Model {results.model} ({results.fingerprint}), {samples} samples"
        + (f" ({results.limit} of each task)" if results.limit else "")
        + "."
    ]
    shown = [f"{t}: {' + '.join(HEADLINE[t])}" for t in results.tasks if t in HEADLINE]
    if shown:
        out.append(f"Scores: {'; '.join(shown)}.")
    batches = sorted({line.batch for line in lines if line.batch})
    if batches:
        size = str(batches[0]) if len(batches) == 1 else f"{batches[0]} to {batches[-1]}"
        out.append(
            f"ms: median per sample of the whole answer in calls of {size} samples; at other sizes it "
            "is another number. With one thread on the CPU it is processor time. tokens per s: of answers, "
            "over all of that time. KV: bytes of a sample's cache after the prompt."
        )
    seeds = max((line.seeds for line in lines), default=1)
    if seeds > 1:
        out.append(f"Methods that draw random tokens: mean ± standard deviation of {seeds} seeds.")
    for line in lines:
        for task, why in line.failures.items():
            out.append(f"{line.method} failed on {task}: {why}")
    raised = [f"{line.method} {line.errors}" for line in lines if line.errors]
    if raised:
        out.append(f"Samples that raised count as wrong answers: {', '.join(raised)}.")
    idle = [line.method for line in lines if line.label != "dense" and _cut_nothing(line)]
    if idle:
        out.append(
            f"Cut nothing in any sample (methods for videos do not act on pictures): {', '.join(idle)}."
        )
    if any(line.empty for line in lines):
        out.append("empty: answers without a word, scored as they are.")
    return out


def _cut_nothing(line: Line) -> bool:
    return line.of_tokens == 1 and line.of_flops == 1 and line.of_kv in (None, 1)


def rich_table(results: Outcomes) -> Any:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        caption=escape("\n".join(notes(results))),
        caption_justify="left",
        padding=(0, 1, 0, 0),
    )
    shown = columns(results)
    for name, _ in shown:
        left = name == "method"
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for line in results.lines():
        table.add_row(*(escape(text(line)) for _, text in shown))
    return table


def markdown(results: Outcomes) -> str:
    """The table and its notes in Markdown."""
    shown = columns(results)
    rule = ["---" if name == "method" else "---:" for name, _ in shown]
    rows = [[name for name, _ in shown], rule]
    rows += [[text(line) for _, text in shown] for line in results.lines()]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes(results))]).rstrip() + "\n"


def csv_text(results: Outcomes) -> str:
    """One row per cell and task: every metric of lmms-eval, every cost, unrounded."""
    metrics = list(dict.fromkeys(k for o in results.outcomes for k in o.metrics))
    costs = list(dict.fromkeys(k for o in results.outcomes for k in o.costs))
    head = [
        "model",
        "fingerprint",
        "task",
        "method",
        "seed",
        "samples",
        "errors",
        "empty",
        "failure",
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, *costs, *metrics])
    for o in results.outcomes:
        seed = "" if o.cell.seed is None else o.cell.seed
        facts = [results.model, results.fingerprint, o.task, str(o.cell), seed]
        facts += [o.samples, o.errors, o.empty, o.failure or ""]
        numbers = [o.costs.get(k, "") for k in costs] + [o.metrics.get(k, "") for k in metrics]
        writer.writerow([*facts, *numbers])
    return out.getvalue()


def plot(results: Outcomes, path: str | Path) -> None:
    """Score against FLOPs and against tokens, one line per method, the best trade-offs marked.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: no row has both a score and FLOPs.
    """
    from vtr.errors import missing

    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise missing("matplotlib", "plots", "the plot") from error
    relative, points = _points(results)
    if not points:
        raise ValueError("there is nothing to plot: no configuration has a score and FLOPs")
    figure, (whole, near) = pyplot.subplots(
        1, 2, figsize=(13, 5.4), layout="constrained", width_ratios=(5, 4)
    )
    dense = points.pop("dense", [])
    looks = styles(list(points))
    for axes, cost in ((whole, 0), (near, 2)):
        for point in dense:
            axes.axhline(point[1], color="0.6", lw=1, label="dense")
        for name, found in points.items():
            xs, ys = zip(*sorted((p[cost], p[1]) for p in found), strict=True)
            axes.plot(xs, ys, ms=4.5, lw=1.3, label=name, alpha=0.9, **looks[name])
        best = pareto([(p[cost], p[1]) for found in points.values() for p in found])
        if len(best) > 1:
            axes.plot(
                *zip(*best, strict=True), color="k", lw=4, alpha=0.12, label="best trade-offs"
            )
        axes.grid(alpha=0.25)
    unit = "score (% of dense)" if relative else "score"
    title = f"{results.model}: {', '.join(results.tasks)}"
    whole.set(xlabel="FLOPs of tower and prefill (% of dense)", ylabel=unit, title=title)
    near.set(xlabel="visual tokens, mean over layers", ylabel=unit, xscale="log")
    highest = max(p[1] for found in (*points.values(), dense) for p in found)
    lowest = min(p[1] for found in (*points.values(), dense) for p in found)
    if relative and lowest < highest - NEAR:
        near.set(ylim=(highest - NEAR, highest + 1), title=f"the best {NEAR} points alone")
    near.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


NEAR = 12  # points that the second half of the plot shows: methods lie close there


def _points(results: Outcomes) -> tuple[bool, dict[str, list[tuple[float, float, float]]]]:
    """Tell whether scores are shares of dense; per method FLOPs in percent, score, mean tokens."""
    lines = results.lines()
    relative = any(line.share is not None for line in lines)
    points: dict[str, list[tuple[float, float, float]]] = {}
    for line in lines:
        high = _mean_score(line) if not relative else line.share and 100 * line.share
        if high is not None and line.of_flops is not None and line.mean_tokens:
            point = (100 * line.of_flops, high, line.mean_tokens)
            points.setdefault(line.label, []).append(point)
    return relative, points


# Seven colours that people with any colour vision tell apart (Okabe and Ito's, without yellow).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = "osD^v<>PX*hp"


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each method: no two are alike in both, up to 84 of them."""
    lines = ("-", "--", ":", "-.")
    return {
        name: {
            "color": _COLOURS[i % 7],
            "marker": _MARKS[i % 12],  # 7 and 12 share no factor: a pair comes again after 84
            "ls": lines[i // 7 % 4],
        }
        for i, name in enumerate(names)
    }


def _mean_score(line: Line) -> float | None:
    return sum(line.scores.values()) / len(line.scores) if line.scores else None


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Select the (cost, score) that no other beats in both, by ascending cost."""
    best: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or score > best[-1][1]:
            best.append((cost, score))
    return best


BEGIN, END = "<!-- vtr eval: table -->", "<!-- vtr eval: end -->"


def save(results: Outcomes, folder: str | Path, name: str = "evaluation") -> list[Path]:
    """Write ``NAME.csv``, ``NAME.md`` and ``NAME.png`` into a folder.

    A ``NAME.md`` that is there and holds the two comment lines :data:`BEGIN` and :data:`END` keeps its
    text: only what is between them is replaced.

    Without any score there is no plot. Returns the paths of what was written.

    Raises:
        ValueError: of the two lines one is missing, or they are in the wrong order.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = [target / f"{name}.{end}" for end in ("csv", "md", "png")]
    page = markdown(results)
    if paths[1].is_file():
        page = _within(paths[1].read_text(encoding="utf-8"), page, paths[1])
    paths[0].write_text(csv_text(results), encoding="utf-8")
    paths[1].write_text(page, encoding="utf-8")
    if not _points(results)[1]:
        return paths[:2]
    plot(results, paths[2])
    return paths


def _within(text: str, table: str, path: Path) -> str:
    """Replace the table of a page; returns the table alone if the page has no place for it."""
    found = [text.count(line) for line in (BEGIN, END)]
    if found == [0, 0]:
        return table
    if found != [1, 1] or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} must hold one line {BEGIN} and after it one line {END}")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{head}{BEGIN}\n\n{table}\n{END}{tail}"
