"""Laws of methods in encoders with windows."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vtr.testing.kinds import Windowed
from vtr.testing.maps import check_record
from vtr.testing.trial import Trial, close, equal, instead, require


def everything(trial: Trial) -> None:
    """Keep everything is the model, bit by bit."""
    for method in trial.settings.everything:
        found = trial.run(method, trial.batch)
        require(not found.trace.stages, f"{method} reduces: {found.trace.summary()}")
        equal(found.out, trial.native, f"{method}")


def skipped(trial: Trial) -> None:
    """A block's output is its input in windows that skip it, and what it computes without a method in the others."""
    for method in trial.settings.some:
        visits: dict[int, tuple[Any, Any]] = {}
        plain: Any = method.reduce  # type: ignore[attr-defined]

        def reduce(site: Any, plain: Any = plain, visits: Any = visits) -> Any:
            made = plain(site)
            if made is not None and made.merging is None and made.map is not None:
                visits[site.layer] = site, made.map
            return made

        probe = instead(method, "reduce", reduce)
        with trial.applied(probe), _passes(trial) as passes:
            trial.call(trial.batch)
            for layer, (site, kept) in visits.items():
                block, args, kwargs, out = passes[layer]
                with torch.no_grad():
                    dense = type(block).forward(block, *args, **kwargs)
                made, before = (
                    site.windows.split(_first(x).reshape(site.hidden.shape))
                    for x in (dense, args[0])
                )
                ran = (kept.source >= 0)[:, :, None, None]
                wanted = site.windows.join(torch.where(ran, made, before))
                found = _first(out).reshape(site.hidden.shape)
                close(found, wanted, trial.kind.tolerance, f"{method}, block {layer}")


def whole(trial: Trial) -> None:
    """Maps are whole, and the output has all tokens."""
    for method in trial.settings.some:
        found = trial.run(method, trial.batch)
        require(found.trace.stages, f"{method} reduces nothing")
        require(
            found.out.shape == trial.native.shape,
            f"{method}: the output is {tuple(found.out.shape)}, not {tuple(trial.native.shape)}",
        )
        require(bool(found.out.isfinite().all()), f"{method}: the output is not finite")
        for record in found.trace.stages:
            check_record(record)


def truth(trial: Trial) -> None:
    """The trace says how many windows, or merged tokens, the blocks really computed."""
    batch = len(trial.kind.samples)
    for method in trial.settings.some:
        with trial.applied(method) as handle, _counting(trial) as seen:
            trial.call(trial.batch)
            for layer, (said, after) in handle.trace.tokens["windows"].items():
                require(
                    said == after and seen[layer] == batch * said,
                    f"{method}: block {layer} computed {seen[layer]} of {batch} samples, and the trace says {said}",
                )


def _first(x: Any) -> Tensor:
    """The tensor of a block's output."""
    found: Tensor = x[0] if isinstance(x, tuple) else x
    return found


def _blocks(trial: Trial) -> list[Any]:
    assert isinstance(trial.kind, Windowed)
    path = rf"(.+\.)?{trial.kind.path}"
    return [m for name, m in trial.kind.model.named_modules() if re.fullmatch(path, name)]


@contextlib.contextmanager
def _passes(trial: Trial) -> Iterator[dict[int, tuple[Any, ...]]]:
    """Keep what each block is given and returns."""
    seen: dict[int, tuple[Any, ...]] = {}

    def at(layer: int) -> Any:
        def hook(block: Any, args: Any, kwargs: Any, out: Any) -> None:
            seen[layer] = block, args, kwargs, out

        return hook

    hooks = [
        block.register_forward_hook(at(i), with_kwargs=True)
        for i, block in enumerate(_blocks(trial))
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _counting(trial: Trial) -> Iterator[dict[int, int]]:
    """Count the windows, or tokens, that the kind's inner module of each block is given."""
    seen: dict[int, int] = {}
    assert isinstance(trial.kind, Windowed)
    inner = trial.kind.inner
    tokens = inner == "mlp"

    def at(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            x = args[0]
            seen[layer] = x.numel() // x.shape[-1] if tokens else len(x)

        return hook

    hooks = [
        block.get_submodule(inner).register_forward_pre_hook(at(i), with_kwargs=True)
        for i, block in enumerate(_blocks(trial))
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
