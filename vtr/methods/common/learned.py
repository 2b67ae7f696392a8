"""The base of attention methods with learned modules, one in each attention layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from vtr.core.calibration import Fingerprint
from vtr.core.module_files import ModuleFile
from vtr.core.site import ModelInfo
from vtr.errors import UnsupportedMethodError
from vtr.methods.common.attention import AttentionMethod

if TYPE_CHECKING:
    from vtr.diffusion.site import DiffusionAttentionSite


class LayerModules(nn.Module):
    """One module for each attention layer that a method computes.

    New modules are written so that all their parameters are zero, which is how they are told from
    trained ones.
    """

    def __init__(self, modules: dict[int, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(layer): module for layer, module in modules.items()})
        self._trained = False

    def at(self, layer: int) -> Any:
        """Return the module of a layer."""
        return self.layers[str(layer)]

    @property
    def trained(self) -> bool:
        """Tell whether any parameter differs from zero. Once it does, nothing more is read from the device."""
        if not self._trained:
            self._trained = any(bool(p.detach().any()) for p in self.parameters())
        return self._trained


@dataclass(frozen=True, kw_only=True)
class LearnedAttention(AttentionMethod):
    """Base of attention methods that learn. The author writes :meth:`module`, and reads it with :meth:`of`.

    The modules belong to the handle (``handle.modules``). They are new, or those given as ``modules=`` to
    ``apply``, or those in ``weights``. New ones compute in training mode alone
    (:class:`vtr.train.sla.SparseTuner` trains them), unless ``untrained`` allows it.

    Attributes (beside those of :class:`AttentionMethod`):
        weights: the folder that :mod:`vtr.train.sla` has written, or the ``modules.safetensors`` in it. The
            model's own weights were trained together with the modules: ``vtr.train.sla.load(pipe, folder)``
            loads both.
        untrained: compute with new modules outside of training too.
    """

    training: ClassVar[str] = "required"
    learned: ClassVar[bool] = True

    weights: str | None = None
    untrained: bool = False

    def validate(self) -> None:
        super().validate()
        if self.weights is not None and not isinstance(self.weights, str):
            raise ValueError(f"weights must be the path of a folder or file, got {self.weights!r}")
        if not isinstance(self.untrained, bool):
            raise ValueError(f"untrained must be True or False, got {self.untrained!r}")

    def module(self, info: ModelInfo) -> nn.Module:
        """Return a new module of one layer, in float32, all its parameters zero."""
        raise NotImplementedError(f"{type(self).__name__} must define module(info)")

    def build(self, info: ModelInfo) -> LayerModules:
        if info.experts > 1:
            raise UnsupportedMethodError(
                f"{self.name} has modules for one transformer, and this pipeline has {info.experts}: "
                "apply it to each transformer apart, with its own weights"
            )
        layers = self.working_layers(info, "attention")
        built = LayerModules({layer: self.module(info) for layer in layers})
        if self.weights is not None:
            self._load(built, self.weights)
        return built

    def origin(self) -> Fingerprint | None:
        return None if self.weights is None else ModuleFile.read(self.weights).model

    def of(self, site: DiffusionAttentionSite) -> Any:
        """Return the module of this layer.

        Raises:
            UnsupportedMethodError: it was never trained, and this is no training.
        """
        modules = site.modules
        assert isinstance(modules, LayerModules)
        if not (site.training or self.untrained or modules.trained):
            raise UnsupportedMethodError(
                f"{self.name} computes with modules that are trained with the model, and these are new: give "
                "weights= (a folder of vtr.train.sla) or modules=, or train them with "
                "vtr.train.sla.SparseTuner. topk-sparse needs no training"
            )
        return modules.at(site.layer)

    def _load(self, modules: LayerModules, weights: str) -> None:
        file = ModuleFile.read(weights)
        if file.method.get("name") != self.name:
            raise ValueError(
                f"weights: {weights} was trained for {file.method.get('name')}, not for {self.name}"
            )
        tensors = {name: tensor.float() for name, tensor in file.tensors.items()}
        try:
            with torch.no_grad():
                modules.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(
                f"weights: the modules in {weights} are for other layers or another head dim: {error}"
            ) from error
