"""What a method costs and saves on a model: side by side, in one process, against an honest baseline."""

from __future__ import annotations

import json
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vtr.api import MethodLike, apply
from vtr.flops import count_flops

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        name: the method, or ``dense``.
        latency_ms: median time of one call.
        best_ms: fastest call.
        throughput: samples per second, from the fastest call.
        flops: of one call, counted on the operations that ran.
        peak_bytes: most memory held by tensors made in the call (beside weights and inputs).
        kv_bytes: of the KV cache that the call returned, or None.
        speedup: dense fastest / this fastest.
        achieved: speedup / (dense FLOPs / these FLOPs); 1 is all that the saved work can give.
        tokens: visual tokens alive at the end, or None for dense.
    """

    name: str
    latency_ms: float
    best_ms: float
    throughput: float
    flops: int
    peak_bytes: int
    kv_bytes: int | None
    speedup: float
    achieved: float
    tokens: int | None


@dataclass(frozen=True)
class Profile:
    """The rows of :func:`profile`, dense first, and where they were measured."""

    rows: tuple[Row, ...]
    batch: int
    device: str
    threads: int

    def verdict(self) -> str:
        """In words: what was worth it."""
        good = [r for r in self.rows[1:] if r.speedup >= 1.05]
        if not good:
            return (
                f"not worth it at batch {self.batch} on {self.device}: no method is 5 % faster than dense"
            )
        top = max(good, key=lambda r: r.speedup)
        return f"fastest at batch {self.batch} on {self.device}: {top.name}, {top.speedup:.2f}x dense"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [asdict(r) for r in self.rows], "verdict": self.verdict()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title=f"batch {self.batch}, {self.device}", caption=self.verdict())
        columns = ("method", "tokens", "GFLOPs", "ms", "samples/s", "speed-up", "achieved", "peak MiB")
        cache = any(r.kv_bytes is not None for r in self.rows)
        for column in (*columns, *(("KV MiB",) if cache else ())):
            table.add_column(column, justify="left" if column == "method" else "right")
        for r in self.rows:
            cells = [
                r.name,
                "all" if r.tokens is None else str(r.tokens),
                f"{r.flops / 1e9:.3f}",
                f"{r.latency_ms:.1f}",
                f"{r.throughput:.1f}",
                f"{r.speedup:.2f}",
                f"{r.achieved:.2f}",
                f"{r.peak_bytes / 2**20:.1f}",
            ]
            if cache:
                cells.append("" if r.kv_bytes is None else f"{r.kv_bytes / 2**20:.2f}")
            table.add_row(*cells)
        return table

    def __rich__(self) -> Table:
        return self.table()


def profile(
    model: nn.Module,
    inputs: Any,
    methods: Sequence[MethodLike] | MethodLike,
    *,
    warmup: int = 1,
    repeats: int = 5,
    call: Callable[..., Any] | None = None,
    progress: bool = False,
    **options: Any,
) -> Profile:
    """Measure a model dense and with each method, alternating, so that noise hits all alike.

    The dense model runs as it is given: with the fused attention that its library chooses.

    Args:
        model: anything that :func:`vtr.apply` takes and that can be called.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        methods: each is measured alone (a list inside the list is applied together).
        warmup, repeats: calls before and during the measurement.
        call: what to time instead of ``model``, e.g. ``model.generate``.
        progress: show a progress bar.
        options: of :func:`vtr.apply`.

    Raises:
        ValueError: nothing to measure, or the model is wrapped already.
    """
    from vtr.api import handles

    single = isinstance(methods, (str, Mapping)) or not isinstance(methods, Sequence)
    chosen: list[Any] = [methods] if single else list(methods)  # type: ignore[arg-type]
    if not chosen or repeats < 1:
        raise ValueError("give at least one method and repeats >= 1")
    if handles(model):
        raise ValueError("the model is wrapped already; remove its handles before profiling")
    args, kwargs = _arguments(inputs)
    first = next((t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)), None)
    device = first.device if first is not None else torch.device("cpu")
    function = model if call is None else call

    def run() -> Any:
        return function(*args, **kwargs)

    wrapped: list[Any] = []
    try:
        for method in chosen:
            handle = apply(model, method, **options)
            handle.pause()
            wrapped.append(handle)
        facts = []
        times: list[list[float]] = [[] for _ in range(len(chosen) + 1)]
        with torch.no_grad():
            for handle in (None, *wrapped):
                with _on(handle):
                    facts.append(_facts(run, handle))
                    for _ in range(warmup):
                        run()
            for _ in _track(repeats, progress):
                for slot, handle in enumerate((None, *wrapped)):
                    with _on(handle):
                        times[slot].append(_clock(run, device))
    finally:
        for handle in wrapped:
            handle.remove()
    batch = first.shape[0] if first is not None and first.dim() else 1
    dense = min(times[0])
    rows = []
    for slot, handle in enumerate((None, *wrapped)):
        fastest = min(times[slot])
        flops, peak, cache, tokens = facts[slot]
        speed = dense / fastest
        rows.append(
            Row(
                name="dense" if handle is None else " + ".join(map(str, handle.methods)),
                latency_ms=statistics.median(times[slot]) * 1e3,
                best_ms=fastest * 1e3,
                throughput=batch / fastest,
                flops=flops,
                peak_bytes=peak,
                kv_bytes=cache,
                speedup=speed,
                achieved=speed * flops / max(1, facts[0][0]),
                tokens=tokens,
            )
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Profile(tuple(rows), int(batch), name, torch.get_num_threads())


class _on:
    """A handle resumed for the time of a block; None stands for dense."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __enter__(self) -> None:
        if self.handle is not None:
            self.handle.resume()

    def __exit__(self, *error: Any) -> None:
        if self.handle is not None:
            self.handle.pause()


class PeakMemory(TorchDispatchMode):
    """Counts the bytes held by tensors that operations made, and their peak (any device)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_iter(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in given or key in self._seen:
                continue
            size = storage.nbytes()
            self._seen[key] = weakref.finalize(storage, self._free, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.now -= size


def _facts(run: Callable[[], Any], handle: Any) -> tuple[int, int, int | None, int | None]:
    flops = count_flops(run)
    with PeakMemory() as memory:
        out = run()
    cache = getattr(out, "past_key_values", None)
    if cache is None and isinstance(out, Mapping):
        cache = out.get("past_key_values")
    stages = handle.trace.stages if handle is not None else []
    return flops, memory.peak, _cache_bytes(cache), stages[-1].tokens_out if stages else None


def _cache_bytes(cache: Any) -> int | None:
    layers = getattr(cache, "layers", None)
    if not layers:
        return None
    total = 0
    for layer in layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            total += tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0
    return total


def _clock(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def _track(repeats: int, progress: bool) -> Any:
    if not progress:
        return range(repeats)
    from rich.progress import track

    return track(range(repeats), description="measuring", transient=True)
