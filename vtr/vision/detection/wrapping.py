"""A wrapped detector of transformers."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from vtr.compat.detectors import DETECTORS, LAYERS, PROPOSALS, SAMPLER, DetectorNames
from vtr.compat.tested import explain
from vtr.core.site import ModelInfo
from vtr.core.wrapping import Bound, Wrapping
from vtr.errors import UnsupportedModelError
from vtr.vision.detection.layers import layer_of
from vtr.vision.detection.session import DetectorSession


def family_of(target: Any) -> tuple[DetectorNames, str] | None:
    """Find the family of a detector and the name of its class; None for other models."""
    for cls in type(target).__mro__:
        if cls.__module__.startswith("transformers."):
            for family in DETECTORS.values():
                if cls.__name__ in family.models:
                    return family, cls.__name__
    return None


class DetectorWrapping(Wrapping):
    """A wrapped detector, whose layers compute the chosen tokens and give all back.

    Raises:
        UnsupportedModelError: the model has no encoder, or its layers are not understood.
    """

    def __init__(self, root: nn.Module) -> None:
        found = family_of(root)
        assert found is not None
        self.family, name = found
        base = _at(root, self.family.models[name], name)
        encoder = self._encoder(root, base, name)
        items = getattr(encoder, LAYERS, ())
        layers = [layer_of(_at(item, self.family.inside, name), self.family) for item in items]
        if not layers:
            raise UnsupportedModelError(
                f"this {name} has no layers in its encoder to compute less of"
            )
        self.head = _head(root, base, self.family)
        decoder = _at(base, self.family.decoder, name) if self.family.decoder else ()
        samplers = [_at(layer, SAMPLER, name) for layer in decoder]
        signals = {"hidden"}
        signals |= {"class_logits"} if self.head is not None else set()
        signals |= {"sampling"} if samplers else set()
        info = ModelInfo(
            family=f"transformers {name}",
            depth={"detector": len(layers)},
            signals={"detector": frozenset(signals)},
            dim=_width(layers[0].layer),
            heads=layers[0].heads,
            levels=layers[0].levels,
        )
        super().__init__(root, info)
        projection = self.family.projection
        self.session = DetectorSession(
            self,
            self.family,
            encoder,
            layers,
            None if self.head is None else Bound(self, "classify"),
            samplers,
            _at(base, projection, name) if projection else None,
        )

    def _encoder(self, root: Any, base: Any, name: str) -> nn.Module:
        stages = getattr(getattr(base, "encoder", None), "aifi", None)
        if stages is not None and len(stages) != 1:
            raise UnsupportedModelError(
                f"this {name} has {len(stages)} feature maps with self-attention in its encoder, not one"
            )
        return _at(base, self.family.encoder, name)

    def classify(self, x: Tensor) -> Tensor:
        """Give the class logits of tokens (B, N, C), for a sigmoid."""
        assert self.head is not None
        for part in self.head:
            x = part(x)
        return x[..., :-1] - x[..., -1:] if self.family.background else x

    def install(self) -> None:
        self.session.install()

    def costs(self) -> dict[str, Any] | None:
        return {"encoder": self.session.flops()} if self.trace.tokens else None


def _head(root: Any, base: Any, family: DetectorNames) -> list[Callable[[Tensor], Tensor]] | None:
    """The modules that classify a token of the encoder, one after the other; None if the model has no such head."""
    if not family.classifier:
        return None
    try:
        output, norm, classes = (attrgetter(path)(base) for path in PROPOSALS)
        if classes is not None:
            return [output, norm, classes[-1]]
    except AttributeError:
        pass  # a model of one stage
    head = getattr(root, family.classifier, None)
    if head is None:
        return None
    return [head[-1] if isinstance(head, nn.ModuleList) else head]


def _at(module: Any, path: str, name: str) -> Any:
    try:
        return attrgetter(path)(module) if path else module
    except AttributeError:
        raise UnsupportedModelError(explain("transformers", f"{name} has no {path}")) from None


def _width(layer: Any) -> int:
    return int(layer.final_layer_norm.weight.shape[0])
