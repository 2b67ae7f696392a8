"""Threads and compiled code: who may be inside a wrapped model, and what was compiled without its hooks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vtr.compat import torch as compat

ROOT, INNER, LANGUAGE, FEATURES = range(4)  # levels of a call, from the outside in


class Gate:
    """Lets one thread at a time run a wrapped model; others wait for the end of its forward call.

    What methods see of a call lives on the wrapping while the call runs. A thread holds the gate from
    its outermost level (the model, the inner model, the language model, whatever is called) to that
    level's end; it may not call a level again inside. A call that was interrupted (``KeyboardInterrupt``
    runs no hooks) does not hold it: what counts is whether the thread's stack has one of the modules on
    it.

    Args:
        inside: gives what stands as ``self`` on the stack of a thread that runs the model.
    """

    def __init__(self, inside: Callable[[], tuple[Any, ...]]) -> None:
        self.inside = inside
        self._fresh()

    def _fresh(self) -> None:
        self.changed = threading.Condition()
        self.thread: int | None = None
        self.levels: set[int] = set()  # where the thread is inside
        self.refused = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"inside": self.inside}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    @torch.compiler.disable
    def enter(self, level: int, module: nn.Module, *_: Any) -> None:
        """At the start of a level; a pre-hook of its module, before all others.

        Raises:
            RuntimeError: the module is called inside its own call.
        """
        if self.take(level):
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
        with self.changed:
            if self.thread != threading.get_ident():
                return
            if self.refused:
                self.refused -= 1
                return
            self.levels.discard(level)
            if not self.levels:
                self.thread = None
                self.changed.notify()

    @torch.compiler.disable
    def take(self, level: int) -> bool:
        """Wait for the other threads; whether this one is not inside this level yet."""
        me = threading.get_ident()
        with self.changed:
            while self.thread not in (None, me) and self._runs():
                self.changed.wait(0.05)
            if self.thread != me:
                self.thread, self.levels, self.refused = me, set(), 0
            outside = level not in self.levels
            self.levels.add(level)
            return outside

    def _runs(self) -> bool:
        """Whether the thread that entered is inside still."""
        frame = sys._current_frames().get(self.thread or 0)
        inside = self.inside()
        while frame is not None:
            if any(frame.f_locals.get("self") is module for module in inside):
                return True
            frame = frame.f_back
        return False


def _is_forward(frame: Any, module: nn.Module) -> bool:
    return frame.f_code.co_name == "forward" and frame.f_locals.get("self") is module


def forget_compiled() -> None:
    """Drop what ``torch.compile`` made before hooks were set.

    Code that was compiled for a module without hooks does not look for hooks afterwards
    (``torch._dynamo.config.skip_nnmodule_hook_guards``): a model that had run compiled would go on
    without any cut. It is compiled again at its next call.
    """
    compat.forget_compiled()
