"""Calls inside of calls, and compiled code: what a wrapped model refuses, and what it forgets."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from vtr.compat import torch as compat
from vtr.core.wrapping import PerThread, Threaded

ROOT, INNER, LANGUAGE = range(3)  # levels of a call, from the outside in


class Nesting(Threaded):
    """Refuses to call a wrapped model inside its own call (in a hook, say), in the same thread.

    What methods see of a call is kept per thread while the call runs: an inner call would overwrite it.
    A call has levels (the model, the inner model, the language model), each of which is entered once. An
    interrupted call (``KeyboardInterrupt`` runs no hooks) leaves its levels behind, so that a level that
    is taken is looked up on the thread's stack before its module is refused.
    """

    levels = PerThread[set[int]](make=set)
    refused = PerThread[int](0)

    @torch.compiler.disable
    def enter(self, level: int, module: nn.Module, *_: Any) -> None:
        """At the start of a level; a pre-hook of its module, before all others.

        Raises:
            RuntimeError: the module is called inside its own call.
        """
        if level not in self.levels:
            self.levels.add(level)
            return
        frame = sys._getframe(1)
        while frame is not None and not _is_forward(frame, module):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is None:  # the call before was interrupted
            self.levels, self.refused = {level}, 0
            return
        self.refused += 1
        raise RuntimeError(
            f"a wrapped {type(module).__name__} was called inside its own call (by a hook, say), where what "
            "methods see of the outer call would be lost: call it afterwards"
        )

    @torch.compiler.disable
    def leave(self, level: int, *_: Any) -> None:
        """At the end of a level, also after an exception; a hook of its module, after all others."""
        if self.refused:
            self.refused -= 1
        else:
            self.levels.discard(level)


def _is_forward(frame: Any, module: nn.Module) -> bool:
    return frame.f_code.co_name == "forward" and frame.f_locals.get("self") is module


def forget_compiled() -> None:
    """Drop what ``torch.compile`` made before hooks were set.

    Code that was compiled for a module without hooks does not look for hooks afterwards
    (``torch._dynamo.config.skip_nnmodule_hook_guards``): a model that had run compiled would run on
    without any cut. It is compiled again at its next call.
    """
    compat.forget_compiled()
