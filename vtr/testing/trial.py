"""One trial: a method on a kind of model, what was computed so far, and how a broken law is told."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtr
from vtr.core.method import Method
from vtr.core.trace import StageRecord, Trace
from vtr.testing.examples import Settings
from vtr.testing.kinds import Inputs, Kind


@dataclass(frozen=True)
class Ran:
    """The result of a call: one row per sample, and the trace."""

    out: Tensor
    trace: Trace


class Trial:
    """A method's settings on one kind of model. Laws share what they compute.

    Attributes:
        kind: of model.
        settings: of the method.
        method: the first that reduces.
        native: output of the batch without a method.
    """

    def __init__(self, kind: Kind, settings: Settings) -> None:
        self.kind = kind
        self.settings = settings
        self.method = settings.some[0]
        self.native = kind.native  # of the batch, while no method is applied
        self.talks: dict[Any, Any] = {}  # conversations by method and padding

    def run(self, method: Method, inputs: Inputs, model: Any = None) -> Ran:
        """Call the model under a method that is taken off again."""
        with self.applied(method, model) as handle:
            return self.again(handle, inputs, model)

    @contextlib.contextmanager
    def applied(self, method: Method, model: Any = None) -> Iterator[vtr.Handle]:
        """Apply a method to the kind's model, or to another one like it."""
        model = self.kind.model if model is None else model
        handle = vtr.apply(model, self.planned(method, model), **self.kind.options)
        try:
            yield handle
        finally:
            handle.remove()

    def planned(self, method: Method, model: Any = None) -> Method | vtr.Plan:
        """The method; if it does not work without calibrated numbers, a plan with those of the batch."""
        if not method.calibrated:
            return method
        model = self.kind.model if model is None else model
        plans, dtype = self.kind.plans, next(model.parameters()).dtype
        key = json.dumps(method.to_dict()), dtype
        if key not in plans:
            try:
                vtr.apply(model, method, **self.kind.options).remove()
                plans[key] = None
            except vtr.UnsupportedMethodError:
                batches = self.kind.calls(self.kind.cast(self.batch, dtype))
                plans[key] = vtr.calibrate(model, batches, method, **self.kind.options)
        plan = plans[key]
        return method if plan is None else dataclasses.replace(plan, methods=(method,))

    def again(self, handle: vtr.Handle, inputs: Inputs, model: Any = None) -> Ran:
        """Call a model that a method is applied to."""
        out = self.call(inputs, model)
        return Ran(out, handle.trace)

    def call(self, inputs: Inputs, model: Any = None) -> Tensor:
        """Call the model as it is."""
        torch.manual_seed(7)  # methods may draw from the global generator
        with torch.no_grad():
            return self.kind.call(self.kind.model if model is None else model, inputs)

    @property
    def batch(self) -> Inputs:
        return self.kind.whole

    @functools.cached_property
    def reduced(self) -> Ran:
        """The result of the batch under the method."""
        return self.run(self.method, self.batch)

    @functools.cached_property
    def alone(self) -> list[Ran]:
        """The result of each sample alone under the method."""
        return [self.run(self.method, sample) for sample in self.kind.samples]

    def own(self, trace: Trace) -> list[StageRecord]:
        """The records of a trace with one row per sample."""
        return [r for r in trace.stages if r.site in self.kind.rows]


def require(fact: object, message: str) -> None:
    """Raise ``AssertionError`` unless ``fact`` holds (also under ``python -O``)."""
    if not fact:
        raise AssertionError(message)


def equal(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raise ``AssertionError`` unless two tensors have the same bits."""
    require(
        found.shape == wanted.shape,
        f"{what}: the shape is {tuple(found.shape)}, not {tuple(wanted.shape)}",
    )
    if not torch.equal(found, wanted):
        far = float((found.float() - wanted.float()).abs().max())
        raise AssertionError(
            f"{what}: {int((found != wanted).sum())} values differ, by up to {far:.3g}"
        )


def close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Raise ``AssertionError`` unless two tensors agree within an absolute and relative tolerance."""
    require(
        found.shape == wanted.shape,
        f"{what}: the shape is {tuple(found.shape)}, not {tuple(wanted.shape)}",
    )
    if not torch.allclose(found, wanted, atol=tolerance, rtol=tolerance):
        far = float((found.float() - wanted.float()).abs().max())
        raise AssertionError(
            f"{what}: the largest difference is {far:.3g}, more than {tolerance:g}"
        )


def kept(record: StageRecord, sample: int) -> list[int]:
    """The tokens of the model's input that a sample has after a stage."""
    row = record.total.kept[sample]
    found: list[int] = row[row >= 0].tolist()
    return found


class Interruption(RuntimeError):
    """Raised by a law inside a model."""


def instead(method: Method, name: str, value: Callable[..., Any]) -> Method:
    """A copy of a method that has ``value`` in the place of one of its functions."""
    other = copy.copy(method)
    object.__setattr__(other, name, value)  # methods are frozen
    return other
