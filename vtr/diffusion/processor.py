"""The attention processor that shows its attention call to a wrapping.

The library's own processor code runs, with one name of its module seen differently: the function that
computes attention. Nothing global changes, so that other models, threads and processors are not
touched; projections, norms, rotary embeddings, LoRA layers and image branches stay the library's.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.compat.diffusers import DISPATCH, SDPA, known_as
from vtr.diffusion import compiled
from vtr.diffusion.original import entry_of, function_of


class SiteProcessor:
    """Takes the place of an attention processor; reads and writes of its attributes reach the original.

    Its own attributes have names that begin with ``vtr_``.
    """

    vtr_original: Any
    vtr_attend: Any
    vtr_around: Any
    vtr_looks: bool
    vtr_run: Callable[..., Any] | None
    vtr_number: Tensor

    def __init__(self, original: Any, attend: Any, around: Any = None, looks: bool = False) -> None:
        """``attend(function, args, kwargs)`` is called in place of the attention function, for
        which it gets what the processor would have called; ``around`` likewise in place of the
        whole processor. With ``looks`` a fourth argument of ``attend`` is the hidden states that the
        processor was given."""
        self.vtr_original = original
        self.vtr_attend = attend
        self.vtr_around = around
        self.vtr_looks = looks
        self.vtr_run = None
        self.vtr_number = compiled.number_of(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("vtr_") or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.vtr_original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("vtr_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.vtr_original, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is created at run time: it is found again by that of the original.
        return _blank, (type(self.vtr_original),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        # The rebuilt function refers to this very object: a copy builds its own.
        return {**self.__dict__, "vtr_run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.vtr_number = compiled.number_of(self)

    def vtr_function(self) -> Callable[..., Any]:
        """The processor's function with its attention call led to :meth:`vtr_intercept`."""
        if self.vtr_run is None:
            self.vtr_run = rebuilt(type(self.vtr_original), self.vtr_intercept)
        return self.vtr_run

    def vtr_intercept(self, *args: Any, **kwargs: Any) -> Any:
        function = function_of(self.vtr_original)
        if self.vtr_looks:
            return self.vtr_attend(function, args, kwargs, _HIDDEN.get())
        return self.vtr_attend(function, args, kwargs)


def rebuilt(kind: Any, intercept: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a class of processors, with its attention function replaced."""
    body = kind.forward if issubclass(kind, nn.Module) else kind.__call__
    name, seen = DISPATCH, intercept
    if DISPATCH not in body.__code__.co_names:
        name, seen = "F", cast(Any, types.ModuleType(F.__name__))
        seen.__dict__.update(F.__dict__)
        seen.__dict__[SDPA] = intercept
    # Its own code object: compilers keep their results by code object, whatever globals it
    # ran with. Without __name__ they do not look these globals up in the module.
    names = {k: v for k, v in body.__globals__.items() if k != "__name__"}
    run = types.FunctionType(
        body.__code__.replace(), {**names, name: seen}, body.__name__, body.__defaults__,
        body.__closure__,
    )  # fmt: skip
    run.__kwdefaults__ = body.__kwdefaults__
    return run


@functools.cache
def _class_for(kind: Any) -> type[SiteProcessor]:
    """A class whose call has the signature of ``kind``: diffusers reads it to choose arguments."""

    def __call__(self: SiteProcessor, *args: Any, **kwargs: Any) -> Any:
        args = (self.vtr_original, *args)
        if self.vtr_around is not None:
            return self.vtr_around(self.vtr_function(), args, kwargs)
        hidden = _hidden(args, kwargs) if self.vtr_looks else None
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            compiled.TRACING.processor, compiled.TRACING.hidden = self, hidden
            out = traced(*args, **kwargs)
            compiled.TRACING.hidden = None
            return out
        if hidden is None:
            return self.vtr_function()(*args, **kwargs)
        return _looking(self.vtr_function(), hidden, args, kwargs)

    body = kind.forward if issubclass(kind, nn.Module) else kind.__call__
    # One function for all layers, so that blocks that are compiled one by one share their graph.
    traced = rebuilt(kind, compiled.intercept)
    __call__.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]
    made = type(f"Site{kind.__name__}", (SiteProcessor,), {"__call__": __call__})
    known_as(kind, made)
    return made


# The hidden states that the running processor was given.
_HIDDEN: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("hidden", default=None)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a processor: (processor, attention module, hidden, ...)."""
    found: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[2]
    return found


@torch.compiler.disable(recursive=False)
def _looking(function: Any, hidden: Tensor, args: Any, kwargs: Any) -> Any:
    token = _HIDDEN.set(hidden)
    try:
        return function(*args, **kwargs)
    finally:
        _HIDDEN.reset(token)


def _blank(kind: Any) -> SiteProcessor:
    made = _class_for(kind)
    return made.__new__(made)


def site_processor(
    original: Any, attend: Any, around: Any = None, looks: bool = False
) -> SiteProcessor:
    """Wrap a processor; :class:`SiteProcessor` says what ``attend`` and
    ``around`` get.

    Raises:
        UnsupportedModelError: it does not compute attention in a way that can be shown.
    """
    entry_of(original)
    kind: Any = type(original)
    return _class_for(kind)(original, attend, around, looks)
