"""The state of one run of a diffusion model, and of one call of its transformer.

A wrapping holds what belongs to the model: its family, its layers, the methods, their masks. A run is
one generation (:class:`DiffusionRun`); a run consists of calls (:class:`DiffusionCall`), one for each
denoising step and branch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vtr.core.method import Reduction
from vtr.core.trace import Trace
from vtr.diffusion.site import CallFacts


class DiffusionRun:
    """One generation: its length, the states of methods, and what it has cost so far.

    Attributes:
        number: 0-based, counted since ``vtr.apply``; -1 before the first.
        steps: denoising steps according to the schedule, or None if it does not say.
        states: dicts of methods by (method, transformer, branch, layer). They may hold gigabytes.
        costs: FLOPs of attention per sample, dense and computed; the second may be a 0-dim tensor.
    """

    def __init__(self, number: int = -1, steps: int | None = None) -> None:
        self.number, self.steps = number, steps
        self.states: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.costs: list[Any] = [0.0, 0.0]
        self._first: dict[int, int] = {}  # transformer -> its first step
        self._last: dict[int, int] = {}  # transformer -> its last step
        self._samples: dict[tuple[Any, ...], int] = {}  # state -> samples of the calls it is of

    def enter(self, transformer: int, step: int) -> int:
        """Register a call of a transformer; return its step counted from its own first one.

        Lets go of the states of the transformers whose part of the run is over.
        """
        self._last[transformer] = step
        first = self._first.setdefault(transformer, step)
        for other, last in self._last.items():
            if last < step - 1:
                for key in [k for k in self.states if k[1] == other]:
                    del self.states[key]
        return step - first

    def state(
        self, samples: int, method: int, transformer: int, branch: str, *place: Any
    ) -> dict[str, Any]:
        """The dict of a method for one place in the model; empty when the run starts, and when the number
        of samples changes (guidance is switched off, a cache leaves some out): which are left is not known."""
        key = (method, transformer, branch, *place)
        if self._samples.setdefault(key, samples) != samples:
            self._samples[key] = samples
            self.states.pop(key, None)
        return self.states.setdefault(key, {})

    def release(self, method: int, transformer: int, branch: str, *place: Any) -> None:
        """Let go of what :meth:`state` gave."""
        self.states.pop((method, transformer, branch, *place), None)


@dataclass
class DiffusionCall:
    """One forward call of a transformer, from its start to that of the next one.

    Attributes:
        facts: what methods may know of it.
        batch: samples in the call.
        rows: samples that reach the blocks; fewer than ``batch`` if a cache leaves some out.
        trace: what the call did.
        costs: of its run (see :class:`DiffusionRun`).
        text: joint text tokens, once an attention layer has shown them.
        reduced: by block, how its tokens are merged.
        memory: dicts by method for this call.
        again: a block runs again for its backward pass.
        grids: the grid of each block of a UNet, by its number.
    """

    facts: CallFacts
    batch: int
    rows: int
    trace: Trace
    costs: list[Any]
    text: int | None = None
    reduced: dict[int, Reduction] = field(default_factory=dict)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    again: bool = False
    grids: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    _samples: dict[int, int] = field(default_factory=dict)  # layer -> samples computed one by one

    def facts_at(self, block: int) -> CallFacts:
        """Return the facts of this call with the grid of a block."""
        grid = self.grids.get(block)
        return self.facts if grid is None else replace(self.facts, grid=grid)

    def next_sample(self, layer: int) -> int:
        """The sample of this attention call, in families whose processor calls it once for each."""
        number = self._samples.get(layer, 0)
        self._samples[layer] = number + 1
        return self.batch - self.rows + number % max(self.rows, 1)

    def repeated(self) -> DiffusionCall:
        """This call for a block that runs again for its backward pass: nothing is counted twice."""
        trace = Trace(notes={"attention": {}})
        return DiffusionCall(
            self.facts,
            self.batch,
            self.rows,
            trace,
            [0.0, 0.0],
            self.text,
            again=True,
            grids=self.grids,
        )

    def notes(self, layer: int) -> dict[str, Any]:
        """Return the trace's notes of an attention layer."""
        notes: dict[str, Any] = self.trace.notes["attention"].setdefault(layer, {})
        return notes

    def record(self, layer: int, q: Tensor, k: Tensor, merged: Reduction | None) -> None:
        """Count an attention call: per sample, what dense attention costs and what was computed.

        Args:
            q, k: (B, H, S, D) as attention saw them.
            merged: how the tokens of the block were merged around it.
        """
        tokens, notes = q.shape[2], self.notes(layer)
        gone = merged.map.n_in - merged.map.n_out if merged is not None and merged.map else 0
        self.trace.count("attention", layer, tokens, tokens)
        dense = 4.0 * q.shape[1] * q.shape[3] * (tokens + gone) * (k.shape[2] + gone)
        if gone:
            share = tokens * k.shape[2] / ((tokens + gone) * (k.shape[2] + gone))
        else:
            share = notes.get("work", notes.get("density", 1.0))
        notes["flops"] = (dense, dense * share)
        part = dense * q.shape[0] / max(self.batch, 1)
        self.costs[:] = self.costs[0] + part, self.costs[1] + part * share


class Paddings:
    """The last eight paddings of text, so that an equal one is the same tensor: what a method derives
    from a padding is kept by object."""

    def __init__(self) -> None:
        self._known: list[Tensor] = []

    def same(self, valid: Tensor | None) -> Tensor | None:
        """``valid`` (B, T) bool, or the equal tensor of an earlier call."""
        if valid is None:
            return None
        for known in self._known:
            same = known.shape == valid.shape and known.device == valid.device
            if same and torch.equal(known, valid):
                return known
        with torch.inference_mode(False):
            valid = valid.clone()
        self._known = [valid, *self._known[:7]]
        return valid
