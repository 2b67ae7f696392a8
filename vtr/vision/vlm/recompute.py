"""Activation checkpointing of a language model: layers that run again in the backward pass.

Cuts before and after a layer are done outside of what is checkpointed: the layer runs again with the
shorter sequence that it was given. (transformers before 5.24 checkpoints a layer's hooks as well: they are
run before.) A cut between attention and MLP is part of it, and is repeated as the method chose it first.
Methods inside its attention are asked again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from vtr.compat.transformers import checkpoints_around
from vtr.core.method import Reduction
from vtr.core.recompute import adopt, check_unchanged, release
from vtr.core.wrapping import Entry

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall
    from vtr.vision.vlm.language import LanguageSession


class Checkpointed:
    """The checkpointing function of one layer while a method is applied."""

    def __init__(self, session: LanguageSession, layer: int) -> None:
        self.session, self.layer = session, layer

    def checkpointed(self, function: Any, block: Any, *args: Any) -> Any:
        """Run ``block``, a layer with all arguments but ``args``, as ``function`` does."""
        session, i = self.session, self.layer
        call = session.running()
        if call is not None and checkpoints_around():
            made = session.before_layer(i, session.layers[i], args, block.keywords)
            if made is not None:
                args, kwargs = made
                block = functools.partial(block.func, *block.args, **kwargs)
            call.outside = i
        if call is None:
            return function(LayerPass(session, block, None), *args)
        cuts = ("decoder", i, "middle") in session.visits and call.visual is not None
        attends = i in session.owner.attention.by_layer and call.marks is not None
        made = LayerPass(session, block, call if cuts or attends else None, cuts)
        return function(made, *args)


class Layers:
    """The checkpointing functions of all layers."""

    def __init__(self, session: LanguageSession) -> None:
        self.parts = [(Checkpointed(session, i), x) for i, x in enumerate(session.layers)]

    def adopt(self) -> None:
        """Take those that were set since the last call."""
        for part, layer in self.parts:
            adopt(part, layer)

    def remove(self) -> None:
        """Methods change or go: as the hooks do, which end by this name."""
        for part, layer in self.parts:
            release(part, layer)


class LayerPass:
    """A layer whose runs after the first are those of the backward pass.

    Args:
        block: the layer with its arguments.
        call: the running call if methods act inside of the layer.
        cuts: whether they shorten the sequence there.
    """

    def __init__(
        self,
        session: LanguageSession,
        block: Callable[..., Any],
        call: LanguageCall | None,
        cuts: bool = False,
    ) -> None:
        self.session, self.block, self.cuts = session, block, cuts
        self.entries: list[Entry] | None = None
        self.first, self.state = call, None if call is None else call.repeat()
        self.call: LanguageCall | None = None

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any) -> Any:
        owner, first = self.session.owner, self.first
        if self.entries is None:
            self.entries, self.first = owner.active, None
            return self._run(first, args)
        if self.state is not None:
            check_unchanged(owner, self.entries)
            self.call = self.state.repeat()
        outer, owner.again = owner.again, self
        try:
            return self._run(self.call, args)
        finally:
            owner.again, self.call = outer, None

    def _run(self, call: LanguageCall | None, args: tuple[Any, ...]) -> Any:
        if call is None:
            return self.block(*args)
        call.inside = True
        call.hidden = args[0] if args else None
        try:
            output = self.block(*args)
            if not self.cuts:
                return output
            # The tokens that are left are part of what the function returns, or reentrant checkpointing loses it.
            short = self.session.middle.halves(call, output)
        finally:
            call.inside = False
        return output if short is None else short


def chosen(
    choose: Callable[[Tensor], Reduction | None], hidden: Tensor, name: str
) -> Reduction | None:
    """Ask a method for its choice inside of a layer that will run again, and then repeats the choice.

    Its gradients are kept as they are computed here: their tensors are none of those that the second run
    computes anew. Reentrant checkpointing computes none here.

    Args:
        choose: the method, given the hidden states that it sees.
        name: of the method.

    Raises:
        RuntimeError: reentrant checkpointing would lose gradients of the method.
    """
    if torch.is_grad_enabled():
        with saved_tensors_hooks(torch.Tensor.detach, lambda x: x):
            return choose(hidden)
    with torch.enable_grad():
        reduction = choose(hidden.detach().requires_grad_(hidden.is_floating_point()))
    if reduction is None:
        return None
    if any(x is not None and x.requires_grad for x in (reduction.weights, reduction.tokens)):
        raise RuntimeError(
            f"{name} merges tokens inside of a layer by values with gradients, which reentrant checkpointing "
            'cuts off: checkpoint with gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
    return reduction


def outside(layer: nn.Module) -> RuntimeError:
    """The error of a layer that something else runs again."""
    return RuntimeError(
        f"a {type(layer).__name__} of a wrapped language model runs again in a backward pass, where its "
        "tokens are not known: let transformers do it (model.gradient_checkpointing_enable(), "
        "activation_checkpointing_enable() from 5.24), not a checkpoint around the layer"
    )
