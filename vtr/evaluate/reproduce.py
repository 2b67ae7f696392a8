"""Published rows, run again: ``vtr eval --preset flowcut/llava-1.5-7b/64``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vtr.core.method import Method
from vtr.core.registry import create, with_presets
from vtr.evaluate.cells import Cell
from vtr.evaluate.compare import COLUMNS, PublishedRow, PublishedTable, beside, number, tables
from vtr.evaluate.results import Results


class Weights(NamedTuple):
    """A model of published rows.

    Attributes:
        id: on the Hugging Face hub, in a form that transformers loads; None without one.
        frames: of a video in those rows; None for a model of images, or if it is not told.
    """

    id: str | None
    frames: int | None = None


MODELS = {
    "llava-1.5-7b": Weights("llava-hf/llava-1.5-7b-hf"),
    "llava-1.5-13b": Weights("llava-hf/llava-1.5-13b-hf"),
    "llava-next-7b": Weights("llava-hf/llava-v1.6-vicuna-7b-hf"),
    "llava-next-13b": Weights("llava-hf/llava-v1.6-vicuna-13b-hf"),
    "llava-onevision-7b": Weights("llava-hf/llava-onevision-qwen2-7b-ov-hf", 32),
    "llava-video-7b": Weights(None, 64),
    "video-llava-7b": Weights("LanguageBind/Video-LLaVA-7B-hf", 8),
    "qwen2-vl-7b": Weights("Qwen/Qwen2-VL-7B-Instruct"),
    "qwen2.5-vl-7b": Weights("Qwen/Qwen2.5-VL-7B-Instruct"),
    "qwen3-vl-8b": Weights("Qwen/Qwen3-VL-8B-Instruct", 64),
    "qwen3-vl-32b": Weights("Qwen/Qwen3-VL-32B-Instruct"),
}
"""By the name that presets call a model."""


@dataclass(frozen=True)
class Wanted:
    """A published setting, and the rows of published tables that have it.

    Attributes:
        method: the setting.
        preset: its name, such as ``"llava-1.5-7b/64"``.
        rows: rows of its method, model and budget, each with its table; may be empty.
    """

    method: Method
    preset: str
    rows: tuple[tuple[PublishedTable, PublishedRow], ...]

    def __str__(self) -> str:
        return f"{self.method.name}/{self.preset}"

    @property
    def model(self) -> str:
        return self.preset.partition("/")[0]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the rows have a number for, in their order."""
        return tuple(dict.fromkeys(c for _, row in self.rows for c in row.scores))


class Setting(NamedTuple):
    """The facts that a sweep needs to run published rows again."""

    model: str
    tasks: str
    frames: int | None


def find(text: str) -> list[Wanted]:
    """Find the published settings of ``"flowcut/llava-1.5-7b/64,fastvid/llava-onevision-7b"``.

    METHOD/PRESET is one setting, METHOD/MODEL all that were published for a model.

    Raises:
        ValueError: an unknown method or preset; the message lists the known ones.
    """
    found: list[Wanted] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, slash, preset = part.partition("/")
        some = with_presets()
        title = create(name).name
        if not slash or title not in some:
            raise ValueError(
                f"{part!r} is no METHOD/PRESET; methods with presets: {', '.join(some)} "
                "(vtr methods --presets lists them)"
            )
        whole = some[title].presets()
        chosen = [p for p in whole if p == preset or p.startswith(f"{preset}/")]
        made = {p: whole[p] for p in chosen} or {preset: some[title].preset(preset)}
        for key, method in made.items():
            assert isinstance(method, Method)
            found.append(Wanted(method, key, tuple(_rows(method, key))))
    if not found:
        raise ValueError("name at least one preset, as METHOD/PRESET")
    return list({str(w): w for w in found}.values())


def _rows(method: Method, preset: str) -> list[tuple[PublishedTable, PublishedRow]]:
    model, _, budget = preset.partition("/")
    found = []
    for table in tables():
        if re.search(table.match, model):
            found += [
                (table, row)
                for row in table.rows
                if _plain(row.method) == _called(method, budget)
                and _amount(row.tokens) == _amount(budget)
            ]
    return found


def _called(method: Method, budget: str) -> str:
    """A setting's method as published tables write it, plainly: ``sparsevlm+``, ``fastv+both``."""
    inner = getattr(method, "method", None)
    if isinstance(inner, Method):  # Debias, with both of its corrections
        return f"{_plain(inner.name)}+both"
    return _plain(method.name) + ("+" if budget.endswith("-plus") else "")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def _amount(tokens: str) -> tuple[float, bool] | None:
    """``"64"``, ``"17.0%"`` and ``"128-fastv"`` as a number, and whether it is a share."""
    found = re.fullmatch(r"([0-9.]+)(%?)(-[a-z]+)?", tokens)
    return (float(found[1]), bool(found[2])) if found else None


def setting(wanted: list[Wanted], model: str | None, tasks: str, frames: int | None) -> Setting:
    """Model, tasks and frames of published rows, if they are not given.

    Raises:
        ValueError: the rows are of several models, their model cannot be loaded, or they name no task.
    """
    names = list(dict.fromkeys(w.model for w in wanted))
    known = [MODELS.get(n, Weights(None)) for n in names]
    if model is None:
        if len(names) > 1:
            raise ValueError(
                f"the presets are of several models ({', '.join(names)}): run them one model at a time"
            )
        if known[0].id is None:
            raise ValueError(
                f"no weights are known that transformers loads as {names[0]}: name some with --model"
            )
        model = known[0].id
    if not tasks:
        columns = dict.fromkeys(c for w in wanted for c in w.columns)
        tasks = ",".join(dict.fromkeys(COLUMNS[c][0] for c in columns if c in COLUMNS))
        if not tasks:
            raise ValueError(
                f"no published table has a row of {', '.join(map(str, wanted))} with a task of "
                "lmms-eval: name tasks with --tasks"
            )
    if frames is None:
        frames = next((k.frames for k in known if k.frames is not None), None)
    return Setting(model, tasks, frames)


@dataclass(frozen=True)
class Reproduced:
    """The rows of one published table beside ours.

    Attributes:
        wanted: the setting.
        table, rows: the published table and rows; several rows if sources differ.
        ours, dense: our scores in the units of the columns, of the setting and of the full model.
        remarks: differences of the two by construction.
    """

    wanted: Wanted
    table: PublishedTable
    rows: tuple[PublishedRow, ...]
    ours: dict[str, float]
    dense: dict[str, float]
    remarks: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.wanted}: {self.table.model}, {self.table.family}"

    def grid(self) -> list[list[str]]:
        """Format heading and rows as text: ours, the published ones with our difference, the full models."""
        columns = [c for c in self.table.columns if any(c in row.scores for row in self.rows)]
        out = [["", *columns], ["vtr", *(number(self.ours.get(c)) for c in columns)]]
        for i, row in enumerate(self.rows):
            end = f" {i + 1}" if len(self.rows) > 1 else ""
            apart = {c: f"{self.ours[c] - v:+.1f}" for c, v in row.scores.items() if c in self.ours}
            out.append([f"published{end}", *(number(row.scores.get(c)) for c in columns)])
            out.append([f"vtr - published{end}", *(apart.get(c, "") for c in columns)])
        if self.dense:
            out.append(["full model, vtr", *(number(self.dense.get(c)) for c in columns)])
        for row in self.table.rows:
            if row.method == "vanilla":
                cells = (number(row.scores.get(c)) for c in columns)
                out.append(["full model, published", *cells])
        return out

    def notes(self) -> list[str]:
        many = len(self.rows) > 1
        sources = [f"{f'{i + 1}: ' if many else ''}{r.source}" for i, r in enumerate(self.rows)]
        return [f"Published in: {'; '.join(sources)}. {self.table.note}", *self.remarks]

    def __rich__(self) -> Any:
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        head, *rows = self.grid()
        made = Table(
            title=escape(self.title),
            caption=escape("\n".join(self.notes())),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for i, name in enumerate(head):
            made.add_column(escape(name), justify="right" if i else "left")
        for row in rows:
            made.add_row(*map(escape, row), style="bold" if row[0] == "vtr" else "")
        return made

    def markdown(self) -> str:
        head, *rows = self.grid()
        lines = [f"### {self.title}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([*lines, "", *self.notes()]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        return {
            "preset": str(self.wanted),
            "table": self.table.name,
            "published": [{"source": r.source, "scores": r.scores} for r in self.rows],
            "ours": self.ours,
            "full": self.dense,
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``reproduced-METHOD-MODEL-BUDGET-TABLE.md``."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        name = str(self.wanted).replace("/", "-")
        path = target / f"reproduced-{name}-{self.table.name}.md"
        path.write_text(self.markdown(), encoding="utf-8")
        return path


def reproduced(results: Results, wanted: list[Wanted]) -> list[Reproduced]:
    """Put the published rows of every setting beside our results, table by table."""
    out = []
    for one in wanted:
        by_table: dict[str, list[PublishedRow]] = {}
        whole = {table.name: table for table, _ in one.rows}
        for table, row in one.rows:
            by_table.setdefault(table.name, []).append(row)
        for name, rows in by_table.items():
            compared = beside(whole[name], results)
            scores = {line.method: found for line, found in compared.ours}
            known = [c for c in whole[name].columns if any(c in r.scores for r in rows)]
            mine = scores.get(str(Cell((one.method,))), {})
            ours = {c: mine[c] for c in known if c in mine}
            remarks = list(compared.remarks) if ours else []
            if missing := [c for c in known if c not in ours]:
                remarks.append(f"Not run here: {', '.join(missing)}.")
            dense = {c: v for c, v in scores.get("dense", {}).items() if c in known}
            out.append(Reproduced(one, whole[name], tuple(rows), ours, dense, tuple(remarks)))
    return out
