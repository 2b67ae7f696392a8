"""Scores on easy and on difficult questions; easy ones can be answered from a smaller picture.

VTC-Bench (arXiv 2510.07143): most questions of common benchmarks are answered as well from a smaller
picture, so that they say little about a method. Of the questions that the dense model answers correctly,
those that it also answers correctly from a picture with as many tokens as the method keeps
(:class:`vtr.Downsample`) are *easy*, the others are *difficult*. Questions that the dense model gets wrong
are in neither group, as in the authors' released code.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtr.core.budget import Keep
from vtr.evaluate.cells import Cell, keep_of
from vtr.evaluate.outcomes import Outcome
from vtr.evaluate.results import Results
from vtr.evaluate.store import Store
from vtr.methods.downsample import Downsample

GROUPS = ("easy", "difficult")
RIGHT = 0.5
"""The score from which an answer counts as right, as in the authors' code: some tasks give shares."""

# Names under which tasks without a score per sample give what was answered and what is true.
_PAIRS = (
    ("pred", "answer"),
    ("pred_answer", "answer"),
    ("parsed_pred", "answer"),
    ("prediction", "answer"),
    ("prediction", "ground_truth"),
)


@dataclass(frozen=True)
class Share:
    """The share of a group's questions that a method answers: mean over seeds, and standard deviation."""

    mean: float
    spread: float | None = None


@dataclass(frozen=True)
class Split:
    """The questions of one task at one budget.

    Attributes:
        task, keep: the task and the budget.
        sizes: number of easy and of difficult questions.
        left_out: questions that the dense model answers wrongly.
        scores: per method the share of right answers in each group, None for an empty group.
    """

    task: str
    keep: Keep
    sizes: tuple[int, int]
    left_out: int
    scores: dict[str, tuple[Share | None, Share | None]]


@dataclass(frozen=True)
class ByDifficulty:
    """The splits of a sweep.

    Attributes:
        splits: by budget and task, in the order of the sweep.
        remarks: tasks and methods that could not be split, with the reason.
    """

    splits: tuple[Split, ...]
    remarks: tuple[str, ...]

    def grid(self) -> list[list[str]]:
        """Head and rows of the table."""
        tasks = list(dict.fromkeys(s.task for s in self.splits))
        rows = [["budget", "method", *(f"{t}, {g}" for t in tasks for g in GROUPS)]]
        for keep in dict.fromkeys(s.keep for s in self.splits):
            here = {s.task: s for s in self.splits if s.keep == keep}
            sizes = [here[t].sizes if t in here else ("", "") for t in tasks]
            rows.append([str(keep), "questions", *(str(n) for pair in sizes for n in pair)])
            for method in dict.fromkeys(m for s in here.values() for m in s.scores):
                cells: list[str] = []
                for task in tasks:
                    found = here[task].scores.get(method) if task in here else None
                    cells += map(_text, found or (None, None))
                rows.append(["", method, *cells])
        return rows

    def notes(self) -> list[str]:
        out = [
            "Of the questions that the dense model answers rightly, in percent. easy: Downsample with "
            "the same budget answers them too; difficult: it does not (VTC-Bench, arXiv 2510.07143)."
        ]
        lost = {
            s.task: s.left_out for s in self.splits
        }  # the same at every budget: the dense model's
        out += [
            f"{task}: {n} questions that the dense model gets wrong are left out."
            for task, n in lost.items()
        ]
        return [*out, *self.remarks]

    def __rich__(self) -> Any:
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        head, *rows = self.grid()
        table = Table(
            title="By difficulty",
            caption=escape("\n".join(self.notes())),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for name in head:
            left = name in ("budget", "method")
            table.add_column(escape(name), justify="left" if left else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row), style="bold" if row[0] else "")
        return table

    def markdown(self) -> str:
        """The table and its notes in Markdown."""
        head, *rows = self.grid()
        rule = ["---" if name in ("budget", "method") else "---:" for name in head]
        lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
        return "\n".join([*lines, "", "  \n".join(self.notes())]) + "\n"

    def csv(self) -> str:
        """One row per budget, task and method, unrounded."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        counts = [f"{g}_questions" for g in GROUPS]
        shares = [name for g in GROUPS for name in (g, f"{g}_deviation")]
        writer.writerow(["keep", "task", "method", *counts, "left_out", *shares])
        for s in self.splits:
            for method, pair in s.scores.items():
                numbers = [n for x in pair for n in (("", "") if x is None else (x.mean, x.spread))]
                writer.writerow(
                    [
                        s.keep,
                        s.task,
                        method,
                        *s.sizes,
                        s.left_out,
                        *("" if n is None else n for n in numbers),
                    ]
                )
        return out.getvalue()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Splits as plain values for JSON."""
        return [
            {
                "keep": s.keep,
                "task": s.task,
                **dict(zip(GROUPS, s.sizes, strict=True)),
                "left_out": s.left_out,
                "scores": {
                    method: {
                        g: None if x is None else x.mean for g, x in zip(GROUPS, pair, strict=True)
                    }
                    for method, pair in s.scores.items()
                },
            }
            for s in self.splits
        ]

    def save(self, folder: str | Path, name: str = "evaluation") -> list[Path]:
        """Write ``NAME-by-difficulty.csv`` and ``.md``; returns the paths."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        paths = [target / f"{name}-by-difficulty.{end}" for end in ("csv", "md")]
        for path, text in zip(paths, (self.csv(), self.markdown()), strict=True):
            path.write_text(text, encoding="utf-8")
        return paths


def with_downsample(cells: Sequence[Cell]) -> list[Cell]:
    """Add the cells that a split needs to those of a sweep: the smaller picture at each budget.

    Raises:
        ValueError: the dense model is not among them, or no method has one budget.
    """
    if Cell() not in cells:
        raise ValueError("a split by difficulty needs the dense model: leave --no-dense out")
    keeps = dict.fromkeys(k for k in map(keep_of, _methods(cells)) if k is not None)
    if not keeps:
        raise ValueError(
            "a split by difficulty needs methods with one budget keep, such as --method flowcut --keep 64"
        )
    return list(dict.fromkeys([*cells, *(Cell((Downsample(keep=k),)) for k in keeps)]))


def _methods(cells: Iterable[Cell]) -> list[Cell]:
    """Those that are neither the dense model nor the smaller picture alone."""
    return [c for c in cells if c.methods and not _plain(c)]


def _plain(cell: Cell) -> bool:
    return len(cell.methods) == 1 and type(cell.methods[0]) is Downsample


def by_difficulty(results: Results, store: Store) -> ByDifficulty:
    """Split the results of a sweep, from the scores per sample in its store.

    A question counts if it was put to the dense model, the smaller picture and the method.

    Args:
        results: of :func:`vtr.evaluate.runner.run`, prepared with ``by_difficulty=True``.
        store: the store of the sweep.
    """
    outcomes: dict[tuple[Cell, str], Outcome] = {(o.cell, o.task): o for o in results.outcomes}
    remarks: list[str] = []
    rights: dict[tuple[Cell, str], dict[int, bool]] = {}

    def right_of(cell: Cell, task: str) -> dict[int, bool] | None:
        """Tell whether each question was answered rightly; None if that is not known."""
        outcome = outcomes.get((cell, task))
        if outcome is None or outcome.failure:
            return None
        if (cell, task) not in rights:
            found = store.scores(outcome.name, task)
            wanted = [d for d in found if results.limit is None or d < results.limit]
            told = {d: is_right(found[d]) for d in wanted}
            if None in told.values():
                return None
            rights[cell, task] = {d: bool(x) for d, x in told.items()}
        return rights[cell, task]

    cells = list(dict.fromkeys(o.cell for o in results.outcomes))
    methods = _methods(cells)
    splits = []
    for keep in dict.fromkeys(k for k in map(keep_of, methods) if k is not None):
        for task in results.tasks:
            dense, small = right_of(Cell(), task), right_of(Cell((Downsample(keep=keep),)), task)
            if dense is None or small is None:
                why = "the dense model or the smaller picture has no scores that say what is right"
                remarks.append(f"{task} at {keep} is not split: {why}.")
                continue
            asked = dense.keys() & small.keys()
            groups = [{d for d in asked if dense[d] and small[d] == easy} for easy in (True, False)]
            shares: dict[str, list[list[float | None]]] = {}
            for cell in methods:
                found = right_of(cell, task) if keep_of(cell) == keep else None
                if found is not None:
                    pair = [_share(found[d] for d in sorted(g & found.keys())) for g in groups]
                    shares.setdefault(str(cell), []).append(pair)
            scores = {
                m: (_mean(p[0] for p in ps), _mean(p[1] for p in ps)) for m, ps in shares.items()
            }
            sizes = (len(groups[0]), len(groups[1]))
            splits.append(Split(task, keep, sizes, len(asked) - sum(sizes), scores))
    odd = dict.fromkeys(str(c) for c in methods if keep_of(c) is None)
    if odd:
        remarks.append(
            f"Without one budget for the whole picture, and so not split: {', '.join(odd)}."
        )
    return ByDifficulty(tuple(splits), tuple(remarks))


def is_right(score: Mapping[str, Any]) -> bool | None:
    """Tell whether a sample was answered rightly, by the first of its scores that says so; None without one.

    A share (GQA's ``exact_match``, VQAv2's agreement) counts from :data:`RIGHT` on, alone or as the
    ``score`` of a record; a record of answer and truth, if they are alike.
    """
    for value in score.values():
        share = value.get("score") if isinstance(value, Mapping) else value
        if isinstance(share, (bool, int, float)) and 0 <= share <= 1:
            return share >= RIGHT
        if not isinstance(value, Mapping):
            continue
        for given, truth in _PAIRS:
            if isinstance(value.get(given), str) and isinstance(value.get(truth), str):
                return _letters(value[given]) == _letters(value[truth])
    return None


def _letters(text: str) -> str:
    return text.replace(".", "").strip().lower()


def _share(answers: Iterable[bool]) -> float | None:
    found = list(answers)
    return sum(found) / len(found) if found else None


def _mean(shares: Iterable[float | None]) -> Share | None:
    found = [x for x in shares if x is not None]
    if not found:
        return None
    return Share(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)


def _text(share: Share | None) -> str:
    if share is None:
        return ""
    text = f"{100 * share.mean:.1f}"
    return text if share.spread is None else f"{text} ± {100 * share.spread:.1f}"
