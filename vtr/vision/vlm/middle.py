"""Cuts between the attention and the MLP of a decoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtr.core.wrapping import Bound

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall
    from vtr.vision.vlm.language import LanguageSession


class MiddleCuts:
    """Visits methods between the halves of layers.

    A layer adds the MLP's output to a residual that no hook can reach. So the sum of what is left is
    computed beside it, and takes the place of the layer's output.
    """

    def __init__(self, session: LanguageSession) -> None:
        self.session = session

    def install(self) -> None:
        """Set the hooks of the layers that are visited in the middle."""
        session = self.session
        hook = session.owner.hook
        for i, layer in enumerate(session.layers):
            if ("decoder", i, "middle") not in session.visits:
                continue
            norm, mlp = layer.post_attention_layernorm, layer.mlp
            hook(norm.register_forward_pre_hook(Bound(self, "before_mlp", i)))
            hook(mlp.register_forward_hook(Bound(self, "after_mlp")))
            hook(layer.register_forward_hook(Bound(self, "after_layer"), prepend=True))

    def before_mlp(self, i: int, module: Any, args: tuple[Any, ...]) -> Any:
        call = self.session.running()
        if call is None or call.visual is None:
            return None
        hidden = args[0]
        call.to(hidden.device)
        call.full, before = hidden.shape, call.layout.slots.shape[1]
        for entry, name in self.session.visits["decoder", i, "middle"]:
            hidden = call.visit(entry, name, i, "middle", hidden)
        call.half = None if hidden is args[0] else hidden
        if call.again:
            return (hidden,)
        if call.last is not None:
            call.last.halved[i] = call.layout.valid
        self.session.owner.tracing.count("decoder", i, before, call.layout.slots.shape[1])
        return (hidden,)

    def after_mlp(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        call = self.session.running()
        if call is None or call.half is None:
            return None
        call.half = call.half + output
        return output.new_zeros(()).expand(call.full)

    def after_layer(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        call = self.session.running()
        return None if call is None else self.halves(call, output)

    def halves(self, call: LanguageCall, output: Any) -> Any:
        """The output of a layer that was cut in its middle; None for others."""
        if call.half is None:
            return None
        half, call.half = call.half, None
        return (half, *output[1:]) if isinstance(output, tuple) else half
