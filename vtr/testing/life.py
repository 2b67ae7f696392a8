"""Laws of the life of a wrapped model: it comes off without a trace, and lives a normal life while on."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import torch

import vtr
from vtr.core.registry import registry
from vtr.testing.contrast import contrasts
from vtr.testing.maps import check_trace
from vtr.testing.models.blocks import BLOCKS, layers_of
from vtr.testing.remains import Facts, ours
from vtr.testing.trial import Interruption, Trial, close, equal, instead, require


def off(trial: Trial) -> None:
    """Off is bit-identical: paused, and after remove; keys and classes never change."""
    model, native = trial.kind.model, trial.native
    before = Facts(model)
    handle = vtr.apply(model, trial.planned(trial.method), **trial.kind.options)
    try:
        first = trial.call(trial.batch)
        require(
            Facts(model).state() == before.state(), "state_dict keys or classes changed while on"
        )
        handle.pause()
        equal(trial.call(trial.batch), native, "the paused model")
        handle.resume()
        equal(trial.call(trial.batch), first, "the resumed model")
    finally:
        handle.remove()
    _clean(trial, before)


def _clean(trial: Trial, before: Facts) -> None:
    model = trial.kind.model
    left = [name for name in ours(model) if name not in before.ours]
    require(not left, f"remove left {', '.join(left)}")
    after = Facts(model)
    require(after.state() == before.state(), "state_dict keys or classes changed")
    require(after.attributes == before.attributes, f"remove left attributes: {after.new(before)}")
    equal(trial.call(trial.batch), trial.native, "the model after remove")


def exception(trial: Trial) -> None:
    """An exception inside, of the method or of a layer, leaves the model usable."""
    before = Facts(trial.kind.model)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise Interruption

    sites = trial.method.sites
    entry = "attend" if "attention" in sites else "compress" if "kv" in sites else "reduce"
    if contrasts(trial.method):
        entry = "contrast"
    with trial.applied(instead(trial.method, entry, fail)):
        _fails(trial)
    _clean(trial, before)
    expected = trial.reduced
    with trial.applied(trial.method) as handle:
        hook = _deep(trial).register_forward_pre_hook(fail)
        try:
            require(_fails(trial), "the layer did not run")
        finally:
            hook.remove()
        found = trial.again(handle, trial.batch)
        equal(found.out, expected.out, "the call after an exception")
        require(found.trace.tokens == expected.trace.tokens, "the trace after an exception differs")
    _clean(trial, before)


def _fails(trial: Trial) -> bool:
    try:
        trial.call(trial.batch)
    except Interruption:
        return True
    return False


def _deep(trial: Trial) -> Any:
    """The last layer of the model."""
    model, layers = trial.kind.model, list(trial.kind.layers.values())
    if layers:
        return layers_of(model, layers[-1].path)[-1]
    lists = [m for m in model.modules() if isinstance(m, BLOCKS) and len(m) > 1]
    return lists[-1][-1]


def deepcopy(trial: Trial) -> None:
    """A deep copy of a wrapped model is wrapped itself, and independent."""
    model = trial.kind.model
    with trial.applied(trial.method) as handle:
        reduced = trial.again(handle, trial.batch)
        twin = copy.deepcopy(model)
        equal(trial.call(trial.batch, twin), reduced.out, "the copy")
        others = vtr.handles(twin)
        require(len(others) == 1, f"the copy carries {len(others)} methods")
        require(
            len(others[0].trace.stages) == len(reduced.trace.stages),
            "the copy's trace has other stages",
        )
        others[0].remove()
        equal(trial.call(trial.batch, twin), trial.native, "the copy after remove")
        equal(trial.call(trial.batch), reduced.out, "the original after the copy was unwrapped")


def precision(trial: Trial) -> None:
    """bfloat16 and float16: finite, of that type, and close if the same tokens are kept."""
    for dtype, model in trial.kind.lowered.items():
        found = trial.run(trial.method, trial.kind.cast(trial.batch, dtype), model)
        require(found.out.dtype in (dtype, torch.float32), f"{dtype} became {found.out.dtype}")
        require(bool(found.out.isfinite().all()), f"{dtype}: the output is not finite")
        check_trace(found.trace, trial.kind.rows)
        if not all(
            m.size.dtype == torch.float32 for r in found.trace.stages for m in (r.map, r.total)
        ):
            raise AssertionError(f"{dtype}: sizes must stay float32")
        if _same_tokens(found.trace, trial.reduced.trace):
            wanted = trial.kind.steady(trial.reduced.out)
            out = trial.kind.steady(found.out).float()
            error = float((out - wanted).norm() / wanted.norm())
            require(error < 0.15, f"{dtype}: the relative error is {error:.2g}")


def _same_tokens(a: vtr.Trace, b: vtr.Trace) -> bool:
    pairs = list(zip(a.stages, b.stages, strict=False))
    return len(a.stages) == len(b.stages) and all(
        torch.equal(x.total.source, y.total.source) for x, y in pairs
    )


def compiles(trial: Trial) -> None:
    """torch.compile (the eager backend) gives what the model gives."""
    torch.compiler.reset()
    try:
        with trial.applied(trial.method) as handle:
            sample = trial.kind.batch(trial.kind.samples)
            torch.manual_seed(7)
            with torch.no_grad():
                wanted = trial.kind.forward(trial.kind.model, sample)
                tokens = handle.trace.tokens
                compiled = torch.compile(trial.kind.model, backend="eager")
                torch.manual_seed(7)
                found = trial.kind.forward(compiled, sample)
            close(found, wanted, trial.kind.tolerance, "the compiled model")
            require(handle.trace.tokens == tokens, "the compiled model's trace has other counts")
    finally:
        torch.compiler.reset()


def repeated(trial: Trial) -> None:
    """The same call twice gives the same."""
    equal(trial.run(trial.method, trial.batch).out, trial.reduced.out, "the second call")


def plain(trial: Trial) -> None:
    """A method is a value: its options as JSON make an equal one."""
    method = trial.method
    told = json.loads(json.dumps(method.to_dict()))
    if registry().get(method.name) is type(method):
        again = vtr.create(**told)
    else:
        told.pop("name")
        again = type(method)(**{k: tuple(v) if isinstance(v, list) else v for k, v in told.items()})
    require(again == method and repr(again) == repr(method), f"to_dict() makes {again!r}")
    require(hash(again) == hash(method), "equal methods have other hashes")
    try:
        method.name_of_no_option = 1  # type: ignore[attr-defined]
    except dataclasses.FrozenInstanceError:
        return
    raise AssertionError(f"{type(method).__name__} is not frozen: @dataclass(frozen=True)")
