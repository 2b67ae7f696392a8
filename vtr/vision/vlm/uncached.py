"""generate without a KV cache: every call runs the prompt, and what was chosen in the first one holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vtr.core.method import Reduction

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall
    from vtr.vision.vlm.wrapping import VLMWrapping


class Held:
    """Choices of methods in the first call of a generate without a cache, whose calls all run the prompt.

    Args:
        shape: (samples, visual tokens) of the prompt.
        choices: of every visit, and of the tower's cut; filled by the first call.

    Attributes:
        notes: of the methods.
        done: whether the first call has ended.
    """

    def __init__(self, shape: torch.Size, choices: dict[Any, Reduction | None]) -> None:
        self.shape, self.choices = shape, choices
        self.notes: dict[str, Any] = {}
        self.done = False

    def again(self, shape: torch.Size) -> None:
        """A later call begins.

        Raises:
            RuntimeError: it has other samples or images.
        """
        if shape != self.shape:
            raise RuntimeError(
                f"generate without a cache began with {self.shape[0]} samples of up to {self.shape[1]} "
                f"visual tokens and continues with {shape[0]} of up to {shape[1]}, for which nothing was "
                "chosen: use use_cache=True"
            )


def hold(owner: VLMWrapping, call: LanguageCall) -> None:
    """A call with a prompt begins: lead it to the choices of the first call of its generate, if it runs
    without a cache.

    Raises:
        UnsupportedMethodError: a method frees the cache, and generate has none.
        RuntimeError: the call has other samples or images than the first one.
    """
    if not call.purpose.generating:
        return
    if call.cache is not None:
        owner.held = None
        return
    owner.kv.check(call.cache)
    shape, held = call.layout.slots.shape, owner.held
    if held is None or not held.done or call.purpose.first:
        call.held = owner.held = Held(shape, call.choices)
        return
    held.again(shape)
    call.held, call.repeats = held, held.choices
    owner.tracing.notes.update(held.notes)
