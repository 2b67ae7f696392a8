"""The model around the inner one: who calls it, its logits and its loss."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtr.compat.transformers import FIRST, LOSS, LOSS_ARGUMENTS
from vtr.core.wrapping import Bound, PerThread, Threaded
from vtr.vision.vlm.arguments import named

if TYPE_CHECKING:
    from vtr.vision.vlm.outputs import Exit
    from vtr.vision.vlm.wrapping import VLMWrapping


@dataclass(frozen=True)
class Purpose:
    """The purpose of a call of the model.

    Attributes:
        generating: whether generate makes it. generate reads the last column: each sample's last token
            must be there.
        first: whether it is the first one of a generate.
        keep: ``logits_to_keep``.
    """

    generating: bool = False
    first: bool = False
    keep: int | Tensor = 0

    @property
    def everything(self) -> bool:
        """Tell whether logits of all columns are wanted."""
        return isinstance(self.keep, int) and self.keep == 0

    @property
    def last(self) -> bool:
        """Tell whether the last column's logits alone are wanted."""
        return self.generating or (isinstance(self.keep, int) and self.keep == 1)


@dataclass(frozen=True)
class Made:
    """Inputs that generate has made for its coming call."""

    ids: Any
    embeds: Any
    first: bool

    def are(self, given: dict[str, Any]) -> bool:
        """Tell whether a call was given these."""
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        return ids is self.ids and embeds is self.embeds


class Head(Threaded):
    """Computes logits and loss from the tokens that were left, whatever columns the outputs have.

    The head of a language model is the costliest part for columns that hold nothing: it runs on what is
    left, and its logits are put into their columns afterwards. So does the loss.
    """

    made = PerThread[Made | None]()
    purpose = PerThread[Purpose | None]()  # inside of a call of the model
    short = PerThread[Tensor | None]()

    def __init__(self, owner: VLMWrapping) -> None:
        super().__init__()
        self.owner = owner

    def install(self) -> None:
        owner = self.owner
        root: Any = owner.root
        self.forget()
        if hasattr(root, "prepare_inputs_for_generation"):
            bound = Bound(self, "prepare")
            # generate reads the signature to know which inputs to pass.
            bound.__dict__["__signature__"] = inspect.signature(root.prepare_inputs_for_generation)
            owner.patch(root, "prepare_inputs_for_generation", bound)
        owner.hook(root.register_forward_pre_hook(Bound(self, "before"), with_kwargs=True))
        owner.hook(root.register_forward_hook(Bound(self, "leave"), always_call=True))
        head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
        if head is not None:
            owner.hook(head.register_forward_pre_hook(Bound(self, "shorten")))
            owner.hook(head.register_forward_hook(Bound(self, "widen"), prepend=True))
            owner.patch(root, LOSS, Bound(self, "loss", root.loss_function))

    # ---- who calls --------------------------------------------------------------------------

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """generate makes the inputs of its coming call."""
        root: Any = self.owner.root
        made = type(root).prepare_inputs_for_generation(root, *args, **kwargs)
        first = bool(kwargs.get(FIRST))
        self.made = Made(made.get("input_ids"), made.get("inputs_embeds"), first)
        return made

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = named(module, args, kwargs)
        made, self.made = self.made, None
        keep = given.get("logits_to_keep")
        generating = made is not None and made.are(given)
        first = made is not None and generating and made.first
        self.purpose, self.short = Purpose(generating, first, 0 if keep is None else keep), None

    def leave(self, *_: Any) -> None:
        """At the end of a call of the model, also after an exception."""
        self.purpose = self.short = None

    # ---- logits and loss --------------------------------------------------------------------

    def _way(self) -> Exit | None:
        """The exit of the running call's sequence from the language model; None if nothing was cut."""
        return None if self.purpose is None else self.owner.language.way

    def shorten(self, module: Any, args: tuple[Any, ...]) -> Any:
        """The head enters: it is given what is left."""
        way, self.short = self._way(), None
        if way is None or not way.aligned or self.purpose is None or not self.purpose.everything:
            return None
        hidden = args[0]
        if hidden.dim() != 3 or hidden.shape[1] != way.length or way.width == way.length:
            return None
        self.short = short = way.shorten(hidden)
        return (short, *args[1:])

    def widen(self, module: Any, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        """The head leaves: its logits take their columns."""
        way = self._way()
        if self.short is None or way is None:
            return None
        self.short = logits
        return way.widen(logits)

    def loss(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """``model.loss_function``: the loss of the tokens that are left, each predicted by the one before."""
        given = {**dict(zip(LOSS_ARGUMENTS, args, strict=False)), **kwargs}
        way, logits, labels = self._way(), given.get("logits"), given.get("labels")
        if way is None or logits is None or labels is None:
            return function(*args, **kwargs)
        width = way.length if way.aligned else way.width
        if logits.shape[1] != width or labels.shape[1] != way.length:
            raise ValueError(
                f"labels cannot be combined with logits_to_keep: {logits.shape[1]} logits for "
                f"{labels.shape[1]} tokens"
            )
        if way.aligned:
            logits = way.shorten(logits) if self.short is None else self.short
        given |= {"logits": logits, "labels": way.targets(labels)}
        if given.get("shift_labels") is not None:
            given["shift_labels"] = way.shorten(given["shift_labels"], -100)
        return function(**given)
