"""The result of :func:`vtr.profile`: rows of numbers, a table of them, and their meaning in words."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.table import Table

# A smaller gain drowns in the noise of a real machine, and accuracy was paid for it.
WORTH_IT = 1.05


@dataclass(frozen=True)
class ProfileRow:
    """One way of running the model at one batch size.

    Attributes:
        name: the method, or ``dense``.
        batch: samples per call.
        latency_ms: median time of one call.
        best_ms: fastest call.
        throughput: samples per second, from the fastest call.
        flops: of one call, counted on the operations that ran; with sparse attention in a language
            model, the dense ones less what the report says is saved, so that both count causal
            attention as full attention.
        peak_bytes: most memory held by tensors allocated in the call (beside weights and inputs).
        kv_bytes: of the KV cache that the call returned, or None.
        tokens: visual tokens left at the end, or None for dense.
        speedup: dense fastest / this fastest.
        ideal: dense FLOPs / these FLOPs.
        achieved: speedup / ideal; 1 if the time falls as much as the FLOPs.
        verdict: the meaning of the speed-up, in words.
        finding_ms: median time of finding the masks of sparse attention, a part of ``latency_ms``;
            None without such masks.
    """

    name: str
    batch: int
    latency_ms: float
    best_ms: float
    throughput: float
    flops: int
    peak_bytes: int
    kv_bytes: int | None
    tokens: int | None
    speedup: float = 1.0
    ideal: float = 1.0
    achieved: float = 1.0
    verdict: str = "the baseline"
    finding_ms: float | None = None


@dataclass(frozen=True)
class Profile:
    """The measurements of :func:`vtr.profile`.

    Attributes:
        model: class of the model.
        rows: for each batch size, dense first.
        device: name of the device.
        dtype: of the model's parameters.
        threads: CPU threads of torch.
        notes: conditions of the measurement that a reader must know.
    """

    model: str
    rows: tuple[ProfileRow, ...]
    device: str
    dtype: str
    threads: int
    notes: tuple[str, ...] = ()

    def verdict(self) -> str:
        """Name the best method at each batch size, in words."""
        lines = []
        for batch in dict.fromkeys(r.batch for r in self.rows):
            reduced = [r for r in self.rows if r.batch == batch][1:]
            good = [r for r in reduced if r.speedup >= WORTH_IT and r.ideal > 1]
            if good:
                top = max(good, key=lambda r: r.speedup)
                lines.append(f"fastest at batch size {batch}: {top.name}, {top.speedup:.2f}x dense")
            elif reduced:
                lines.append(
                    f"not worth it at batch size {batch}: no method is 5 % faster than dense"
                )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> Table:
        """A rich table; printing a profile in a rich console shows it."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        where = f"{self.device}, {self.dtype}, {self.threads} threads, torch {torch.__version__}"
        reduced = [r for r in self.rows if r.name != "dense"]
        several = len({r.batch for r in self.rows}) > 1
        lines = [f"{r.name}{f', batch {r.batch}' if several else ''}: {r.verdict}" for r in reduced]
        lines += self.notes
        table = Table(
            title=escape(f"{self.model} ({where})"),
            caption=escape("\n".join(lines)),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        cache = any(r.kv_bytes is not None for r in self.rows)
        masks = any(r.finding_ms is not None for r in self.rows)
        table.add_column("method", overflow="fold")
        heads = ["batch", "tokens", "GFLOPs", "ms", *["masks\nms"] * masks, "per s", "peak\nMiB"]
        # Two-line heads: the table fits 80 columns.
        for head in (*heads, *["KV\nMiB"] * cache, "speed\n-up", "ideal", "of\nideal"):
            table.add_column(head, justify="right", no_wrap=True)
        for r, after in zip(self.rows, (*self.rows[1:], None), strict=True):
            cells = [
                str(r.batch),
                "all" if r.tokens is None else str(r.tokens),
                _short(r.flops / 1e9),
                _short(r.latency_ms),
                *["" if r.finding_ms is None else _short(r.finding_ms)] * masks,
                _short(r.throughput),
                _short(r.peak_bytes / 2**20),
            ]
            if cache:
                cells.append("" if r.kv_bytes is None else _short(r.kv_bytes / 2**20))
            cells += [f"{r.speedup:.2f}", f"{r.ideal:.2f}", f"{r.achieved:.2f}"]
            last = after is not None and after.batch != r.batch
            table.add_row(escape(r.name), *cells, end_section=last)
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        from vtr.core.report import as_text

        return as_text(self)


def _short(value: float) -> str:
    """Format three significant digits without an exponent: 0.0123, 1.23, 123, 12345."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def verdict(speedup: float, ideal: float, batch: int) -> str:
    """Say in plain words what a speed-up means.

    Args:
        speedup: dense time / reduced time.
        ideal: dense FLOPs / reduced FLOPs.
        batch: samples per call.
    """
    where = f"at batch size {batch}"
    if speedup < 1 / WORTH_IT:
        return f"not worth it {where}: {1 / speedup:.2f}x slower than dense"
    if speedup < WORTH_IT:
        return f"not worth it {where}: no faster than dense"
    if ideal <= 1:  # the noise of a small model or of few repeats
        return f"not worth it {where}: nothing was saved, so that {speedup:.2f}x is chance"
    if speedup < 0.8 * ideal:
        return f"{speedup:.2f}x faster, {speedup / ideal:.0%} of what the saved FLOPs promise"
    return f"worth it: {speedup:.2f}x faster"
