"""Activation checkpointing of encoders: a block that runs again belongs to the call that it was part of.

timm and open_clip checkpoint a block from outside, and so may the caller: the block's input tells which
call it is (:class:`vtr.core.recompute.Inputs`). The layers of newer transformers do so in their own forward,
in place of which the session's runs: it is done by hand, with :class:`BlockPass`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vtr.compat.torch import in_backward
from vtr.core.recompute import Guard, Inputs, check_unchanged, storage
from vtr.core.wrapping import PerThread, Threaded, Wrapping
from vtr.vision.encoders.blocks import EncoderRun


class BlockPass:
    """A pass through a block for a checkpointing function; see :class:`vtr.core.recompute.Again`."""

    def __init__(
        self, block: Callable[..., Any], layer: int, run: EncoderRun, kwargs: dict[str, Any]
    ) -> None:
        self.block, self.layer, self.run, self.kwargs = block, layer, run, kwargs

    def __call__(self, x: Tensor) -> Any:
        return self.block(self.layer, self.run, x, self.kwargs)

    def facts(self) -> EncoderRun:
        return self.run

    @contextmanager
    def repeating(self, facts: EncoderRun) -> Iterator[None]:
        now, self.run = self.run, facts.again(self.layer)
        try:
            yield
        finally:
            self.run = now


class Passes(Threaded):
    """Tells the passes of calls through the blocks of an encoder from those of backward passes.

    Attributes:
        inputs: of blocks that may run again.
        late: the last run of this thread in a backward pass.
    """

    late = PerThread[EncoderRun | None]()

    def __init__(self, owner: Wrapping) -> None:
        super().__init__()
        self.owner = owner
        self.inputs = Inputs()

    def watch(self, run: EncoderRun, layer: int, x: Tensor) -> None:
        """At the entry of a block: remember what a second pass will have to know, if gradients may come.

        Raises:
            RuntimeError: the gradients of a method would be lost.
        """
        grad = torch.is_grad_enabled()
        if not (grad or x.requires_grad or run.watched):
            return
        if layer == 0:
            self.inputs.purge()
        run.watched = True
        run.enter(layer)
        self.inputs.note(x, layer, run)
        if grad or not x.requires_grad:
            return
        # A block without gradients whose input has some: the first pass of reentrant checkpointing.
        for entry in run.entries:
            if getattr(entry.method, "carries_gradients", False):
                raise RuntimeError(
                    f"{entry.method.name} hands values with gradients from block to block, which reentrant "
                    "checkpointing cuts off: checkpoint with use_reentrant=False (transformers: "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}; timm: '
                    "timm.layers.set_reentrant_ckpt(False))"
                )
        x.register_hook(Guard(self.owner, run.entries))

    def leave(self, run: EncoderRun, layer: int, x: Tensor) -> None:
        """At the end of a block, with its output."""
        if run.late:
            self.late, run.after = run, (layer + 1, storage(x))
        if run.first is not None or not run.watched:
            return
        if not torch.is_grad_enabled():
            run.output = weakref.ref(x)
        elif run.checkpointed and x.requires_grad:
            x.register_hook(Guard(self.owner, run.entries))

    def remove(self) -> None:
        """Methods change: the last block of reentrant checkpointing, whose output had no graph at the
        time, is guarded now. (The name is that of a hook's end, as which the owner calls it.)"""
        for run in self.inputs.values():
            if not isinstance(run, EncoderRun):
                continue
            output = None if run.output is None else run.output()
            if output is not None and output.grad_fn is not None:
                output.register_hook(Guard(self.owner, run.entries))
            run.output = None

    def again(self, layer: int, x: Tensor) -> EncoderRun | None:
        """The run of a call as it was at this block, which a backward pass runs again; None outside of
        backward passes, and if one runs the whole encoder.

        Raises:
            RuntimeError: no call has given the block this input, or methods have changed since.
        """
        if not in_backward():
            return None
        run: EncoderRun | None = self.inputs.find(x, layer)
        if run is not None:
            check_unchanged(self.owner, run.entries)
            return run.again(layer)
        late = self.late
        if late is not None and late.after is not None:
            number, given = late.after
            if number == layer and given is not None and given == storage(x):
                return late if late.first is None else late.first.again(layer)
        if layer == 0:
            return None
        raise RuntimeError(
            f"block {layer} of a wrapped encoder runs in a backward pass with an input that no call gave it. "
            "Activation checkpointing must run it again with the tensor of the first pass, not with a "
            "copy (save_on_cpu, or another offloading of activations), and blocks of one checkpoint one "
            "behind the other; and methods may not be exchanged before the backward pass"
        )
