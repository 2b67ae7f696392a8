"""The head of a wrapped model: the loss of the tokens that were left, and the last ones' logits."""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtr.vision.vlm.arguments import has_features, named
from vtr.vision.vlm.sequence import follow
from vtr.wrapping import Bound, PerThread

if TYPE_CHECKING:
    from vtr.vision.vlm.wrapping import VLMWrapping


class Loss:
    """Takes the labels out of a call, and computes the loss where the logits are shorter.

    Attributes:
        last_only: whether the coming call asks for the logits of the last column alone, as generate does:
            each sample's last token must then stand there.
        generating: whether generate makes the coming call of this thread, of a model that cannot be asked
            for some logits only.
    """

    generating = PerThread[bool](False)

    def __init__(self, owner: VLMWrapping) -> None:
        self.owner = owner
        self.own = threading.local()
        self.labels: Tensor | None = None
        self.last_only = False

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "labels": None}
        return {k: v for k, v in state.items() if k != "own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.own = threading.local()

    def install(self) -> None:
        root: Any = self.owner.root
        if "logits_to_keep" not in inspect.signature(type(root).forward).parameters:
            bound = Bound(self, "prepare")
            # generate reads the signature to know which inputs to pass.
            bound.__dict__["__signature__"] = inspect.signature(root.prepare_inputs_for_generation)
            self.owner.patch(root, "prepare_inputs_for_generation", bound)
        before = root.register_forward_pre_hook(Bound(self, "before"), with_kwargs=True)
        self.owner.hook(before)
        self.owner.hook(root.register_forward_hook(Bound(self, "after"), with_kwargs=True))

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """generate makes the inputs of a call, and reads the last column of its logits."""
        self.generating = True
        root: Any = self.owner.root
        return type(root).prepare_inputs_for_generation(root, *args, **kwargs)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.labels = None
        given = named(module, args, kwargs)
        wanted = given.get("logits_to_keep")
        self.last_only = self.generating or (isinstance(wanted, int) and wanted == 1)
        self.generating = False
        if given.get("labels") is None or not has_features(given):
            return None
        self.labels = given["labels"]
        return (), {**given, "labels": None}

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        labels, self.labels = self.labels, None
        if labels is None:
            return None
        logits = output[0] if isinstance(output, tuple) else output.logits
        last = self.owner.language.last
        if last is not None and last.layout is not None:
            labels = follow(labels, last.layout.index, ~last.layout.live, -100)
        if logits.shape[1] != labels.shape[1]:
            raise ValueError(
                f"labels cannot be combined with logits_to_keep: {logits.shape[1]} logits for "
                f"{labels.shape[1]} tokens"
            )
        extra = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
        vocab = module.config.get_text_config().vocab_size
        loss = module.loss_function(logits=logits, labels=labels, vocab_size=vocab, **extra)
        if isinstance(output, tuple):
            return (loss, *output)
        output["loss"] = loss
        return output
