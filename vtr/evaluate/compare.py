"""Comparison of the papers' numbers with ours, one table for each group of comparable numbers.

Papers on LLaVA-1.5 copy each other's rows in two lineages that do not agree with one another (other
token counts, another MME, other runs of the same methods). Rows of different tables are never put
into one.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from vtr.evaluate.outcomes import Line, Outcome
from vtr.evaluate.results import Results

Reading = Callable[[dict[str, float]], float | None]


def _percent(name: str) -> Reading:
    return lambda m: 100 * m[name] if name in m else None


def _points(*names: str) -> Reading:
    return lambda m: sum(m[n] for n in names) if all(n in m for n in names) else None


COLUMNS: dict[str, tuple[str, Reading, str]] = {
    "GQA": ("gqa", _percent("exact_match"), ""),
    "POPE": ("pope", _percent("pope_f1_score"), "F1 of all questions; papers report the mean F1 of three thirds"),
    "SQA": ("scienceqa_img", _percent("exact_match"), ""),
    "TextVQA": ("textvqa_val", _percent("exact_match"), "the papers' prompt of LLaVA-1.5 holds OCR tokens, lmms-eval's does not"),
    "VQAv2": ("vqav2_val", _percent("exact_match"), "papers report test-dev, ours is validation"),
    "VizWiz val": ("vizwiz_vqa_val", _percent("exact_match"), ""),
    "MME": ("mme", _points("mme_perception_score", "mme_cognition_score"), ""),
    "MME-P": ("mme", _points("mme_perception_score"), ""),
    "MMB": ("mmbench_en_dev_static", _points("gpt_eval_score"), "options are read by rules alone"),
    "MMMU": ("mmmu_val", _percent("mmmu_acc"), ""),
    "MMStar": ("mmstar", _percent("average"), ""),
    "ChartQA": ("chartqa", _percent("relaxed_overall"), ""),
    "DocVQA": ("docvqa_val", _percent("anls"), "ours is validation"),
    "SEED": ("seedbench", _percent("seed_all"), ""),
    "SEED-I": ("seedbench", _percent("seed_image"), ""),
    "VideoMME": ("videomme", _points("videomme_perception_score"), "without subtitles"),
    "VideoMME w/ subtitles": ("videomme_w_subtitle", _points("videomme_perception_score"), ""),
    "MLVU": ("mlvu_dev", _points("mlvu_percetion_score"), ""),
    "MVBench": ("mvbench", _points("mvbench_accuracy"), "answers that cannot be read are left out"),
    "LongVideoBench": ("longvideobench_val_v", _percent("lvb_acc"), ""),
    "EgoSchema subset": ("egoschema_subset", _percent("score"), ""),
    "NExT-QA": ("nextqa_mc_test", _percent("exact_match"), ""),
    "PerceptionTest": ("perceptiontest_val_mc", _percent("accuracy"), ""),
}  # fmt: skip
"""Column of a published table -> lmms-eval's task, our number in the column's unit, and what differs."""

PARTS = {"mvbench": 20}
"""Tasks whose number is the mean over so many others, which have its name and an ending."""


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table: ``tokens`` as printed (``"64"``, ``"25%"``), scores by column."""

    method: str
    tokens: str
    scores: dict[str, float]
    average: float | None
    source: str


@dataclass(frozen=True)
class PublishedTable:
    """A table whose rows may be compared with one another.

    Attributes:
        name: of the file.
        model: as the papers call it.
        match: regular expression that names of the model match, in lower case.
        family: what the rows have in common.
        average: what the last column is.
        note: how to read it.
        columns: in order.
        rows: vanilla first, if it is quoted.
    """

    name: str
    model: str
    match: str
    family: str
    average: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[PublishedRow, ...]


@lru_cache(maxsize=1)
def tables() -> tuple[PublishedTable, ...]:
    """All published tables that ship with the package."""
    folder = resources.files("vtr.evaluate.published")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".csv")), key=lambda f: f.name)
    return tuple(_parse(f.name[:-4], f.read_text(encoding="utf-8")) for f in files)


def _parse(name: str, text: str) -> PublishedTable:
    lines = text.splitlines()
    head = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
    facts = {key: value for key, _, value in head}
    reader = csv.DictReader([line for line in lines if not line.startswith("# ")])
    rows = []
    for found in reader:
        scores = {
            k: float(v)
            for k, v in found.items()
            if v and k not in ("tokens", "method", "source", "avg")
        }
        average = float(found["avg"]) if found.get("avg") else None
        rows.append(
            PublishedRow(found["method"], found["tokens"], scores, average, found["source"])
        )
    columns = [c for c in reader.fieldnames or () if c not in ("tokens", "method", "source", "avg")]
    return PublishedTable(
        name,
        facts["model"],
        facts["match"],
        facts["family"],
        facts["average"],
        facts["note"],
        tuple(columns),
        tuple(rows),
    )


@dataclass(frozen=True)
class Comparison:
    """One published table with our rows.

    Attributes:
        table: the published table.
        columns: those that both have, or all of the table if we have none of them.
        ours: our rows, with the scores in the units of the columns.
        remarks: differences of the two by construction.
    """

    table: PublishedTable
    columns: tuple[str, ...]
    ours: tuple[tuple[Line, dict[str, float]], ...]
    remarks: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.table.model}, {self.table.family}"

    def grid(self) -> list[list[str]]:
        """Format heading and rows as text: the published ones, then ours."""
        head = ["who", "method", "tokens", *self.columns, "avg", "source"]
        out = [head]
        for row in self.table.rows:
            cells = [number(row.scores.get(c)) for c in self.columns]
            average = number(row.average)
            out.append(["published", row.method, row.tokens, *cells, average, row.source])
        for line, scores in self.ours:
            cells = [number(scores.get(c)) for c in self.columns]
            tokens = "" if line.mean_tokens is None else f"{line.mean_tokens:.0f}"
            out.append(["vtr", line.method, tokens, *cells, "", "this run"])
        return out

    def notes(self) -> list[str]:
        return [
            (f"avg: {self.table.average}. " if self.table.average else "") + self.table.note,
            "Tokens of our rows: mean over the layers of the language model and over the samples.",
            *self.remarks,
        ]

    def __rich__(self) -> Any:
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        head, *rows = self.grid()
        table = Table(
            title=escape(self.title),
            caption=escape("\n".join(self.notes())),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for name in head:
            table.add_column(
                name, justify="left" if name in ("who", "method", "source") else "right"
            )
        for row in rows:
            table.add_row(*map(escape, row), style="bold" if row[0] == "vtr" else "")
        return table

    def markdown(self) -> str:
        head, *rows = self.grid()
        lines = [f"### {self.title}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([*lines, "", *self.notes()]) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write ``published-NAME.md``."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        path = target / f"published-{self.table.name}.md"
        path.write_text(self.markdown(), encoding="utf-8")
        return path


def matching(model: str) -> list[PublishedTable]:
    """The published tables of a model, by its name or folder.

    Raises:
        ValueError: the model has no table; the message names the models that have one.
    """
    found = [t for t in tables() if re.search(t.match, model.lower())]
    if not found:
        known = ", ".join(dict.fromkeys(t.model for t in tables()))
        raise ValueError(f"no published numbers of {model} are known; there are some of: {known}")
    return found


def compared(results: Results) -> list[Comparison]:
    """Put our results beside every published table of the model, one by one."""
    return [beside(table, results) for table in matching(results.model)]


def beside(table: PublishedTable, results: Results) -> Comparison:
    """Put our results beside one published table."""
    by_method: dict[str, list[Outcome]] = {}
    for outcome in results.outcomes:
        if not outcome.failure:
            by_method.setdefault(str(outcome.cell), []).append(outcome)
    ours = []
    for line in results.lines():
        scores = {}
        for column in table.columns:
            values = _ours(column, by_method.get(line.method, []))
            if values:
                scores[column] = sum(values) / len(values)
        if scores:
            ours.append((line, scores))
    shared = tuple(c for c in table.columns if any(c in scores for _, scores in ours))
    columns = shared or table.columns
    remarks = [f"{c}: {COLUMNS[c][2]}." for c in shared if COLUMNS[c][2]]
    if results.limit is not None and shared:
        remarks.append(f"Ours are the first {results.limit} samples, the papers' are all.")
    if not shared:
        tasks = ", ".join(COLUMNS[c][0] for c in table.columns if c in COLUMNS)
        remarks.append(f"None of our tasks is in this table; it has: {tasks}.")
    return Comparison(table, columns, tuple(ours), tuple(remarks))


def _ours(column: str, outcomes: list[Outcome]) -> list[float]:
    if column not in COLUMNS:
        return []
    task, reading, _ = COLUMNS[column]
    ours = [o for o in outcomes if o.task == task]
    if task in PARTS:
        ours = [o for o in outcomes if o.task.startswith(f"{task}_")]
        if len({o.task for o in ours}) != PARTS[task]:  # a mean of others would not compare
            return []
    values = (reading(o.metrics) for o in ours)
    return [v for v in values if v is not None]


def number(value: float | None) -> str:
    """``64.3``, ``1744``, or nothing."""
    return "" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
