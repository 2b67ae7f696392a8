"""The report of a handle: the last call, dense against reduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from vtr.core.method import Method
    from vtr.core.wrapping import Wrapping


@dataclass(frozen=True)
class CacheReport:
    """The contents of a KV cache for all samples of a call, with methods that choose its entries.

    Attributes:
        length: columns of the sequence, padding and dropped tokens counted.
        bytes: of all tensors that the cache holds: keys and values, columns, what methods note of entries, and
            room for entries to come.
        full: bytes of keys and values of all columns in the model's dtype.
        dtypes: name of a dtype to the bytes of the tensors that have it.
        heads: bytes per KV head, all layers together. Methods' tensors that belong to no head are in ``bytes``
            alone.
        entries: layer to the entries that each KV head holds, mean over samples.
    """

    length: int
    bytes: int
    full: int
    dtypes: dict[str, int]
    heads: tuple[int, ...]
    entries: dict[int, tuple[float, ...]]

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "heads": list(self.heads),
            "entries": {layer: list(found) for layer, found in self.entries.items()},
        }


@dataclass(frozen=True)
class Report:
    """Numbers of the last call, per sample.

    Attributes:
        methods: what was applied.
        stages: one dict per reduction (site, layer, method, tokens_in, tokens_out).
        flops: per part of the model, ``(dense, reduced)`` FLOPs (two per multiply-add), from the
            layers' own shapes and the tokens that went through them.
        kv_bytes: ``(dense, reduced)`` bytes of the KV cache after the last prompt with pictures, or None
            without a cache.
        cache: the KV cache after the last call, decoding steps included, for all samples together; None
            without methods that choose its entries.
        finding: ``(FLOPs, seconds)`` that finding the masks of sparse attention took, or None without
            such masks. The FLOPs are a part of ``flops["language"]``; the seconds are those of the whole
            batch, None if they were not measured.
    """

    methods: tuple[str, ...]
    stages: tuple[dict[str, Any], ...]
    flops: dict[str, tuple[int, int]] = field(default_factory=dict)
    kv_bytes: tuple[int, int] | None = None
    finding: tuple[int, float | None] | None = None
    cache: CacheReport | None = None

    @classmethod
    def of(cls, wrapping: Wrapping, methods: Sequence[Method]) -> Report:
        """Of the last call; ``methods`` names those of a handle that is paused or removed by now."""
        trace = wrapping.trace
        costs = wrapping.costs()
        if costs is None:
            raise RuntimeError(
                "the model has not been called since vtr.apply, or in its last call not with a picture; "
                "call it, then report()"
            )
        return cls(
            tuple(map(str, [e.method for e in wrapping.active] or methods)),
            tuple(
                {
                    "site": s.site,
                    "layer": s.layer,
                    "method": s.method,
                    "tokens_in": s.tokens_in,
                    "tokens_out": s.tokens_out,
                }
                for s in trace.stages
            ),
            {k: v for k, v in costs.items() if k not in ("kv_bytes", "finding", "cache")},
            costs.get("kv_bytes"),
            (costs["finding"], trace.finding) if "finding" in costs else None,
            costs.get("cache"),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "methods": list(self.methods),
            "stages": list(self.stages),
            "flops": {k: {"dense": d, "reduced": r} for k, (d, r) in self.flops.items()},
            "kv_bytes": None
            if self.kv_bytes is None
            else {"dense": self.kv_bytes[0], "reduced": self.kv_bytes[1]},
            "finding": None
            if self.finding is None
            else {"flops": self.finding[0], "seconds": self.finding[1]},
            "cache": None if self.cache is None else self.cache.to_dict(),
        }

    def table(self) -> Table:
        """A rich table; printing a report in a rich console shows it."""
        from rich.table import Table

        table = Table(title=" + ".join(self.methods) or "nothing applied")
        for column in ("what", "dense", "reduced", "ratio"):
            table.add_column(column, justify="left" if column == "what" else "right")
        for stage in self.stages:
            n, m = stage["tokens_in"], stage["tokens_out"]
            table.add_row(
                f"tokens {stage['site']}[{stage['layer']}]", str(n), str(m), f"{m / n:.2f}"
            )
        for part, (dense, reduced) in self.flops.items():
            table.add_row(
                f"GFLOPs {part}",
                f"{dense / 1e9:.3f}",
                f"{reduced / 1e9:.3f}",
                f"{reduced / dense:.2f}" if dense else "",  # a run of a generator that is over
            )
        if self.finding is not None:
            flops, seconds = self.finding
            took = "" if seconds is None else f"{1e3 * seconds:.1f} ms"
            table.add_row("of these, finding masks", "", f"{flops / 1e9:.3f}", took)
        if self.kv_bytes is not None:
            dense, reduced = self.kv_bytes
            table.add_row(
                "KV MiB", f"{dense / 2**20:.2f}", f"{reduced / 2**20:.2f}", f"{reduced / dense:.2f}"
            )
        if self.cache is not None:
            _add_cache(table, self.cache)
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return as_text(self)


def _add_cache(table: Table, cache: CacheReport) -> None:
    full, held = cache.full / 2**20, cache.bytes / 2**20
    share = f"{cache.bytes / cache.full:.2f}" if cache.full else ""
    table.add_row("KV MiB held, all samples", f"{full:.2f}", f"{held:.2f}", share)
    if len(cache.dtypes) > 1:
        for name, size in sorted(cache.dtypes.items(), key=lambda x: -x[1]):
            table.add_row(f"of these, {name}", "", f"{size / 2**20:.2f}", "")
    found = [n for layer in cache.entries.values() for n in layer]
    if found:
        low, high = min(found), max(found)
        shown = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"
        table.add_row("entries per KV head", str(cache.length), shown, "")


def as_text(shown: Any, width: int = 120) -> str:
    """Render a table as a rich console does, for ``print``: no colours, at most ``width`` columns."""
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    Console(file=out, width=width, color_system=None).print(shown)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
