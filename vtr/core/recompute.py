"""Activation checkpointing: a block runs again in the backward pass, and repeats what its call did.

By then the model may have been called again, with other images, lengths or steps (gradients summed over
several calls, or two losses and one backward pass). Two ways lead back to the call:

- :class:`Again` goes in place of the function that a library gives to its checkpointing function. It is
  created once per call and block, so that everything it remembers is of that call (transformers, diffusers).
- :class:`Inputs` recognises a block's input by its storage, if no function can be put in between (timm,
  open_clip, ``torch.utils.checkpoint`` and ``checkpoint_wrapper`` by the caller).

The owner decides what is repeated: a snapshot of its state at the block's entry
(:func:`copied`), and the cuts inside the block (:func:`repeated`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from vtr.compat.diffusers import CHECKPOINT  # transformers has the same
from vtr.core.method import Reduction
from vtr.core.tokens import TokenMap
from vtr.core.wrapping import Bound, Entry, Wrapping

# ---- methods may not change in between ---------------------------------------------------------------


def check_unchanged(wrapping: Wrapping, entries: Sequence[Entry]) -> None:
    """Raise ``RuntimeError`` if the active methods are not those of the call any more."""
    if wrapping.active != list(entries):
        raise RuntimeError(
            f"methods were applied, paused or removed between a call of the {wrapping.info.family} model "
            "and its backward pass, in which activation checkpointing runs its blocks again: go backward "
            "first (inside of `with vtr.apply(...)`)"
        )


class Guard:
    """A hook of a tensor that checks so before the blocks behind it run again.

    It lives in the autograd graph, so that it works after the methods were removed: a block without
    its patch would run again as it is, and reentrant checkpointing would not notice.
    """

    def __init__(self, wrapping: Wrapping, entries: Sequence[Entry]) -> None:
        self.wrapping, self.entries = wrapping, entries

    def __call__(self, gradient: Tensor) -> None:
        check_unchanged(self.wrapping, self.entries)


# ---- which call a block belongs to -------------------------------------------------------------------


class Owner(Protocol):
    """The owner of a call that :class:`Again` repeats."""

    def facts(self) -> Any:
        """Return the state of the running call, as it is now."""

    def repeating(self, facts: Any) -> AbstractContextManager[Any]:
        """Put these facts in place, and back what was there."""


class Again:
    """A function whose calls after the first are those of the backward pass.

    Args:
        wrapping: its active methods must be the same in all calls.
        owner: gives the facts of the first call, and puts them in place for the others.
        function: what is checkpointed.
    """

    def __init__(self, wrapping: Wrapping, owner: Owner, function: Callable[..., Any]) -> None:
        self.wrapping, self.owner, self.function = wrapping, owner, function
        self.facts: Any = None
        self.entries: list[Entry] | None = None

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.entries is None:
            self.facts, self.entries = self.owner.facts(), self.wrapping.active
            return self.function(*args, **kwargs)
        check_unchanged(self.wrapping, self.entries)
        with self.owner.repeating(self.facts):
            return self.function(*args, **kwargs)


def adopt(owner: Any, module: Any) -> None:
    """Lead a module's checkpointing function through ``owner.checkpointed(function, block, ...)``.

    To be called at the start of every call: the function may be set after ``apply``.
    """
    held = module.__dict__.get(CHECKPOINT)
    if held is not None and not isinstance(held, Bound):
        module.__dict__[CHECKPOINT] = Bound(owner, "checkpointed", held)


def release(owner: Any, module: Any) -> None:
    """Put back the function that was there, or that was set since."""
    held = module.__dict__.get(CHECKPOINT)
    if isinstance(held, Bound) and held.owner is owner:
        module.__dict__[CHECKPOINT] = held.bound[0]


class Inputs:
    """The inputs of blocks in calls whose backward pass may come, each with what its owner noted of it.

    Checkpointing keeps the input of what it runs again, and gives a tensor of the same storage. A
    storage is only looked at while it lives: notes of calls whose graph is gone are dropped.
    """

    def __init__(self) -> None:
        self._notes: dict[tuple[Any, Hashable], tuple[StorageWeakRef, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_notes": {}}  # a copy of the model has made no calls

    def note(self, x: Tensor, block: Hashable, value: Any) -> None:
        """Remember ``value`` for the input ``x`` of a block, whose name or number is its own."""
        reference = storage(x)
        if reference is not None:
            self._notes[reference.cdata, block] = (reference, value)

    def find(self, x: Tensor, block: Hashable) -> Any:
        """Find the note on the input of which ``x`` is a view or a detached copy; None without one."""
        reference = storage(x)
        found = None if reference is None else self._notes.get((reference.cdata, block))
        return None if found is None or found[0].expired() else found[1]

    def values(self) -> list[Any]:
        """List the notes, once each."""
        return list({id(value): value for _, value in list(self._notes.values())}.values())

    def purge(self) -> None:
        """Forget inputs that do not exist any more."""
        for key, (reference, _) in list(self._notes.items()):
            if reference.expired():
                self._notes.pop(key, None)


def storage(x: Tensor) -> StorageWeakRef | None:
    """A weak reference to a tensor's storage; None for tensors without one (of ``torch.func``, say)."""
    try:
        return StorageWeakRef(x.untyped_storage())
    except (RuntimeError, NotImplementedError):
        return None


# ---- what is repeated --------------------------------------------------------------------------------


def copied(value: Any) -> Any:
    """The containers in ``value`` (dicts, lists) anew, with the same tensors and objects in them."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, list):
        return [copied(part) for part in value]
    return value


def repeated(
    method: str, reduction: Reduction | None, first: TokenMap | None, sizes: Tensor
) -> Reduction | None:
    """Give the reduction of a second pass the cut of the first one.

    A second pass may choose differently: random numbers that were not kept
    (``preserve_rng_state=False``), or kernels that do not always round alike. The tokens of the first
    pass are then still gathered, or averaged by size.

    Args:
        method: for the message.
        reduction: of the second pass.
        first: the map of the first pass, None if there was no cut.
        sizes: of the tokens here; weights that are these do not depend on the choice.

    Raises:
        RuntimeError: they differ, and the method's weights or tokens belong to its own map.
    """
    made = None if reduction is None else reduction.map
    if reduction is None or made is None or first is None:
        if made is None and first is None:
            return reduction
    elif made.n_out == first.n_out and made.has_padding == first.has_padding:
        free = reduction.weights is None or reduction.weights is sizes
        if free and reduction.tokens is None and reduction.mass is None:
            return reduction._replace(map=first)
        if torch.equal(made.kept, first.kept) and torch.equal(made.source, first.source):
            return reduction
    raise RuntimeError(
        f"{method} chose other tokens when activation checkpointing ran its block again: random numbers "
        "must be the same in both passes (leave preserve_rng_state=True), and so must be the weights"
    )
