"""The rows of committed measurements that are about one method, for ``recipes.method_pages``."""

from __future__ import annotations

import csv
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS = 12  # of one file on a page; the file has the others
Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Source:
    """A committed file of measurements.

    Attributes:
        path: of the file, in the repository.
        page: of the documentation that explains it, in docs; empty if the file has none.
        about: what was measured.
        dense: key of a row to the value that names the dense model in it; that row is shown too.
        columns: title of a column to how a cell is written, in order; the first column is the setting.
        key: of a row, where the method is.
        part: of a JSON file, where the rows are.
    """

    path: str
    page: str
    about: str
    columns: Mapping[str, Callable[[Row], str]]
    key: str = "method"
    part: str = ""
    dense: str = "dense"

    def rows(self) -> list[Row]:
        """Read the rows of the file."""
        path = ROOT / self.path
        if path.suffix == ".csv":
            lines = [
                x for x in path.read_text(encoding="utf-8").splitlines() if not x.startswith("#")
            ]
            return list(csv.DictReader(lines))
        found = json.loads(path.read_text(encoding="utf-8"))
        rows: list[Row] = found[self.part] if self.part else found
        return rows


def percent(name: str) -> Callable[[Row], str]:
    return lambda row: f"{100 * float(row[name]):.1f} %"


def share(name: str, of: str) -> Callable[[Row], str]:
    return lambda row: f"{float(row[name]) / float(row[of]):.2f}"


def number(name: str, digits: int = 0) -> Callable[[Row], str]:
    def write(row: Row) -> str:
        return f"{float(row[name]):.{digits}f}" if row.get(name) not in (None, "") else ""

    return write


def text(name: str) -> Callable[[Row], str]:
    return lambda row: str(row[name])


def _flops(row: Row) -> str:
    cost = row["flops"]
    return "1.00" if cost is None else f"{cost[1] / cost[0]:.2f}"


VIT_DENSE = 356750848  # FLOPs of the dense built-in ViT, as both files have them
SOURCES: Sequence[Source] = (
    Source(
        "docs/vit-accuracy-flops.json",
        "results.md",
        "The built-in ViT on held-out digits.",
        {
            "accuracy": percent("accuracy"),
            "tokens left": number("tokens"),
            "FLOPs of dense": lambda row: f"{row['flops'] / VIT_DENSE:.2f}",
        },
    ),
    Source(
        "docs/evaluation.csv",
        "evaluation.md",
        "The built-in LLaVA on held-out questions.",
        {
            "accuracy": percent("accuracy"),
            "mean tokens": number("mean_tokens"),
            "FLOPs of dense": share("flops", "flops_dense"),
            "KV cache of dense": share("kv", "kv_dense"),
        },
    ),
    Source(
        "docs/video-digits.json",
        "video-digits.md",
        "The built-in video model on held-out clips.",
        {
            "accuracy": percent("accuracy"),
            "tokens": number("tokens"),
            "FLOPs of dense": _flops,
        },
        part="results",
    ),
    Source(
        "docs/prefill-digits.json",
        "prefill-digits.md",
        "The built-in model for long videos on held-out clips of 64 frames.",
        {"accuracy": percent("accuracy"), "density": percent("density")},
        part="results",
    ),
    Source(
        "docs/cache-digits.json",
        "cache-digits.md",
        "The built-in model for chats on held-out chats about twelve pictures.",
        {
            "accuracy": percent("accuracy"),
            "KiB of the cache": lambda row: f"{row['bytes'] / 1024:.0f}",
        },
        part="results",
        dense="full",
    ),
    Source(
        "docs/detection-digits.json",
        "detection-digits.md",
        "The built-in detector on held-out pictures.",
        {
            "mAP": percent("map"),
            "mAP at 0.5": percent("map50"),
            "FLOPs of the encoder": number("encoder", 2),
        },
        part="results",
    ),
    Source(
        "docs/diffusion-digits.json",
        "diffusion-digits.md",
        "The built-in video generator: what a classifier reads in 100 videos, and the difference from the dense "
        "videos (PSNR in dB).",
        {
            "density": number("density", 2),
            "right digit": percent("digit"),
            "right direction": percent("direction"),
            "PSNR": number("psnr", 1),
        },
        part="rows",
    ),
    Source(
        "docs/search-digits.json",
        "search-digits.md",
        "At a given share of the FLOPs (of the pairs, for a generator): the method's own schedule, and a "
        "searched one.",
        {
            "share": number("target", 2),
            "schedule": text("schedule"),
            "score": number("score", 1),
            "seed": text("seed"),
        },
        dense="",
    ),
    Source(
        "benchmarks/results/diffusion_methods_cpu.csv",
        "speed.md",
        "Attention of one head on one CPU thread.",
        {
            "shape": text("shape"),
            "tokens": text("tokens"),
            "share computed": number("work", 2),
            "speedup": number("speedup", 2),
        },
        dense="",
    ),
    Source(
        "benchmarks/results/prefill-cpu-x86_64.csv",
        "language-attention.md",
        "Time to the first token on one CPU thread, layers of random weights.",
        {
            "model": text("shape"),
            "visual tokens": text("visual"),
            "density": number("density", 2),
            "speedup": number("speedup", 2),
            "of the ideal": number("achieved_over_ideal", 2),
        },
        dense="",
    ),
    Source(
        "benchmarks/results/cache-cpu-x86_64.csv",
        "cache.md",
        "A decoding step on one CPU thread, layers of random weights.",
        {
            "model": text("shape"),
            "entries": text("entries"),
            "bytes of the full cache": number("of_full", 2),
            "speedup": number("speedup", 2),
        },
        key="cache",
        dense="",
    ),
    Source(
        "benchmarks/results/vit-cpu-x86_64.csv",
        "speed.md",
        "Encoders on one CPU thread.",
        {
            "model": text("model"),
            "batch": text("batch"),
            "speedup": number("speedup", 2),
            "of the ideal": number("achieved_over_ideal", 2),
        },
        dense="",
    ),
    Source(
        "benchmarks/results/vlm-cpu-x86_64.csv",
        "speed.md",
        "Vision-language models on one CPU thread.",
        {
            "model": text("model"),
            "first token, speedup": number("ttft_speedup", 2),
            "prefill, speedup": number("prefill_speedup", 2),
            "of the ideal": number("achieved_over_ideal", 2),
        },
        dense="",
    ),
    Source(
        "benchmarks/results/video-prefill-cpu-x86_64.csv",
        "speed.md",
        "The prefill of a video on two CPU threads.",
        {
            "share": number("share", 2),
            "tokens at the end": text("tokens_at_end"),
            "speedup": number("speedup", 2),
            "of the ideal": number("achieved_over_ideal", 2),
        },
        dense="",
    ),
    Source(
        "benchmarks/results/gpu-h200-2026-11-28/vit-nvidia-h200.csv",
        "speed.md",
        "An encoder on an NVIDIA H200.",
        {
            "model": text("model"),
            "batch": text("batch"),
            "speedup": number("speedup", 2),
            "of the ideal": number("achieved_over_ideal", 2),
        },
        dense="",
    ),
    Source(
        "benchmarks/results/gpu-h200-2026-11-28/vlm-nvidia-h200.csv",
        "speed.md",
        "Vision-language models on an NVIDIA H200.",
        {
            "model": text("model"),
            "batch": text("batch"),
            "first token, speedup": number("ttft_speedup", 2),
            "prefill, speedup": number("prefill_speedup", 2),
        },
        dense="",
    ),
)
"""All files, in the order of a page."""


@functools.cache
def _read(source: Source) -> tuple[Row, ...]:
    return tuple(source.rows())


def _is_of(row: Row, key: str, cls: str) -> bool:
    """Tell whether a row is about a method, by the name of the class, or its registered name in old rows."""
    said = str(row.get(key) or "")
    return re.match(rf"{re.escape(cls)}\b(?!\.)", said) is not None


def tables(cls: str) -> Iterator[tuple[Source, list[Row], int]]:
    """Yield each file that has rows about a class, with these rows (a dense one first) and the number left out."""
    for source in SOURCES:
        rows = [r for r in _read(source) if _is_of(r, source.key, cls)]
        if rows:
            shown = rows[:ROWS]
            first = [
                r
                for r in _read(source)
                if source.dense and (r.get(source.key) or r.get("attention")) == source.dense
            ]
            yield source, first[:1] + shown, len(rows) - len(shown)


def markdown(cls: str, up: str) -> str:
    """Write the tables of a class; ``up`` leads from the page to docs."""
    parts = []
    for source, rows, rest in tables(cls):
        about = source.about
        if source.page:
            about = f"[{about.rstrip('.')}]({up}{source.page})."
        titles = ["setting", *source.columns]
        lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(source.columns)]
        for row in rows:
            said = row.get(source.key) or row.get("attention")
            setting = source.dense if said == source.dense else f"`{said}`"
            cells = [setting, *(write(row) for write in source.columns.values())]
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        more = f" {rest} more rows are in the file." if rest else ""
        parts.append(f"{about} From `{source.path}`.{more}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)
