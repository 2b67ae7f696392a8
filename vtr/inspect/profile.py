"""Measure what a method costs and saves on a model: in one process, against a fair baseline.

The baseline is the same model with its fastest stock attention (fused ``scaled_dot_product_attention``,
which is flash attention if the device has it): a reduced model that only beats eager attention has
won nothing. Calls alternate, so that noise and clock changes hit all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtr.api import Handle, MethodLike, apply, handles
from vtr.compat.around import unwrapped
from vtr.compat.timm import FUSED
from vtr.compat.torch import tree_iter, tree_map
from vtr.compat.transformers import attention_implementation, cache_of
from vtr.inspect.flops import cache_bytes, count_flops, reduced_flops
from vtr.inspect.memory import PeakMemory
from vtr.inspect.profile_rows import Profile, ProfileRow, verdict


def profile(
    model: Any,
    inputs: Any,
    methods: Sequence[MethodLike | Sequence[MethodLike]] | MethodLike,
    *,
    batch: int | Sequence[int] | None = None,
    warmup: int = 1,
    repeats: int = 5,
    call: Callable[..., Any] | None = None,
    progress: bool = False,
    **options: Any,
) -> Profile:
    """Measure a model dense and with each method, alternating, so that noise hits all alike.

    Args:
        model: anything that :func:`vtr.apply` takes and that can be called, in eval mode.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        methods: each is measured alone (a list inside the list is applied together).
        batch: batch sizes to measure at; the samples of ``inputs`` are repeated or left out to reach
            them. None takes ``inputs`` as they are. Size 1 measures latency, a large one throughput.
        warmup, repeats: calls before and during the measurement.
        call: function to time instead of ``model``, e.g. ``model.generate``.
        progress: show a progress bar.
        options: of :func:`vtr.apply`.

    Eager attention is switched to fused attention for the time of the measurement, for the dense
    model and the reduced ones alike.

    Raises:
        ValueError: nothing to measure, the model trains or is wrapped already, or ``inputs`` cannot
            be brought to another batch size.
        UnsupportedModelError, UnsupportedMethodError: as :func:`vtr.apply`.
    """
    single = isinstance(methods, (str, Mapping)) or not isinstance(methods, Sequence)
    chosen: list[Any] = [methods] if single else list(methods)  # type: ignore[arg-type]
    if not chosen:
        raise ValueError("methods must hold at least one method")
    if warmup < 0 or repeats < 1:
        raise ValueError(f"warmup must be >= 0 and repeats >= 1, got {warmup} and {repeats}")
    sizes = _sizes(batch)
    if handles(model):
        raise ValueError("the model is wrapped already; remove its handles before profiling")
    if getattr(unwrapped(model), "training", False):
        raise ValueError(
            "the model is in training mode, in which methods act differently: call eval()"
        )
    function = model if call is None else call
    notes: list[str] = []
    rows: list[ProfileRow] = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_fastest_attention(unwrapped(model), notes))
        wrapped: list[Handle | None] = [None]
        for method in chosen:
            handle = apply(model, method, **options)
            stack.callback(handle.remove)
            handle.pause()
            wrapped.append(handle)
        for size in sizes:
            args, kwargs = _arguments(inputs if size is None else _at_batch(inputs, size))
            rows += _measure(_Call(function, args, kwargs), wrapped, warmup, repeats, progress)
    return Profile(
        type(unwrapped(model)).__name__,
        tuple(rows),
        *_where(unwrapped(model), inputs),
        torch.get_num_threads(),
        tuple(notes),
    )


class _Call:
    """A call with its arguments, its device and its number of samples."""

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        tensors = _tensors((args, kwargs))
        ids = kwargs.get("input_ids")  # pixel values of a VLM count patches or crops, not samples
        first = ids if isinstance(ids, Tensor) else tensors[0] if tensors else None
        self.batch = 1 if first is None else int(first.shape[0])
        self.device = torch.device("cpu") if first is None else first.device

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)

    def seconds(self) -> float:
        self._wait()
        start = time.perf_counter()
        self()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _measure(
    call: _Call, wrapped: Sequence[Handle | None], warmup: int, repeats: int, progress: bool
) -> list[ProfileRow]:
    facts: list[tuple[int, int, int | None, int | None]] = []
    times: list[list[float]] = [[] for _ in wrapped]
    finding: list[list[float]] = [[] for _ in wrapped]
    for handle in wrapped:
        with _on(handle):
            facts.append(_facts(call, handle, facts[0][0] if facts else 0))
            for _ in range(warmup):
                call()
    for _ in _track(repeats, f"batch size {call.batch}", progress):
        for slot, handle in enumerate(wrapped):
            with _on(handle):
                times[slot].append(call.seconds())
                found = None if handle is None else handle.trace.finding
                if found is not None:
                    finding[slot].append(found)
    rows: list[ProfileRow] = []
    every = zip(wrapped, times, finding, facts, strict=True)
    for handle, seconds, masks, (flops, peak, cache, tokens) in every:
        best = min(seconds)
        row = ProfileRow(
            name="dense" if handle is None else " + ".join(map(str, handle.methods)),
            batch=call.batch,
            latency_ms=statistics.median(seconds) * 1e3,
            best_ms=best * 1e3,
            throughput=call.batch / best,
            flops=flops,
            peak_bytes=peak,
            kv_bytes=cache,
            tokens=tokens,
            finding_ms=statistics.median(masks) * 1e3 if masks else None,
        )
        if rows:
            speedup, ideal = rows[0].best_ms / row.best_ms, rows[0].flops / max(1, flops)
            row = replace(
                row,
                speedup=speedup,
                ideal=ideal,
                achieved=speedup / max(ideal, 1e-9),
                verdict=verdict(speedup, ideal, call.batch),
            )
        rows.append(row)
    return rows


@contextmanager
def _on(handle: Handle | None) -> Iterator[None]:
    """Resume a handle inside the block; the switch itself is not timed. None is the dense model."""
    if handle is None:
        yield
        return
    handle.resume()
    try:
        yield
    finally:
        handle.pause()


def _facts(
    call: _Call, handle: Handle | None, dense: int
) -> tuple[int, int, int | None, int | None]:
    """Measure FLOPs, peak bytes, cache bytes and tokens left of one call; ``dense``: the dense FLOPs."""
    flops = count_flops(call)
    if handle is not None:
        flops = reduced_flops(handle, flops, dense, call.batch)
    with PeakMemory() as memory:
        out = call()
    cache = cache_of(out)
    stages = handle.trace.stages if handle is not None else []
    return (
        flops,
        memory.peak,
        None if cache is None else cache_bytes(cache),
        stages[-1].tokens_out if stages else None,
    )


# ---- the baseline ---------------------------------------------------------------------------


@contextmanager
def _fastest_attention(model: Any, notes: list[str]) -> Iterator[None]:
    """Switch the whole model to fused attention inside the block; the original attention is restored."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    eager: list[Any] = [m for m in modules if getattr(m, FUSED, None) is False]
    stuck = attention_implementation(model) == "eager"
    switch = getattr(model, "set_attn_implementation", None) if stuck else None
    if stuck and switch is None:
        notes.append("the model runs eager attention and cannot be switched: dense could be faster")
    try:
        for module in eager:
            setattr(module, FUSED, True)
        if switch is not None:
            switch("sdpa")
        if eager or switch is not None:
            notes.append(
                "the model ran eager attention; all rows are measured with fused attention"
            )
        yield
    finally:
        for module in eager:
            setattr(module, FUSED, False)
        if switch is not None:
            switch("eager")


# ---- inputs ---------------------------------------------------------------------------------


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_iter(tree) if isinstance(t, Tensor) and t.dim() > 0]


def _sizes(batch: int | Sequence[int] | None) -> list[int | None]:
    sizes: list[Any] = list(batch) if isinstance(batch, Sequence) else [batch]
    wrong = [s for s in sizes if s is not None and (type(s) is not int or s < 1)]
    if wrong or not sizes:
        raise ValueError(f"batch must be an int >= 1 or a sequence of them, got {batch!r}")
    return sizes


def _at_batch(inputs: Any, size: int) -> Any:
    # transformers hands out mappings that pytree does not know.
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    now = {int(t.shape[0]) for t in _tensors(inputs)}
    if len(now) != 1:
        raise ValueError(
            f"the tensors of inputs have the first dimensions {sorted(now)}, so that they cannot be "
            f"brought to batch size {size}: pass inputs of the size that you want, and batch=None"
        )
    rows = torch.arange(size, device="cpu") % now.pop()

    def sized(leaf: Any) -> Any:
        return leaf[rows.to(leaf.device)] if isinstance(leaf, Tensor) and leaf.dim() > 0 else leaf

    return tree_map(sized, inputs)


def _where(model: Any, inputs: Any) -> tuple[str, str]:
    """Name the device and the model's dtype."""
    device = _Call(model, *_arguments(inputs)).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    dtype = getattr(model, "dtype", None)
    if dtype is None and isinstance(model, nn.Module):
        dtype = next((p.dtype for p in model.parameters()), None)
    return name, str(dtype).removeprefix("torch.")


def _track(repeats: int, label: str, progress: bool) -> Iterator[int]:
    if not progress:
        yield from range(repeats)
        return
    from rich.console import Console
    from rich.progress import track

    # Standard error: a pipe that reads the result must not see the bar.
    yield from track(range(repeats), label, console=Console(stderr=True), transient=True)
