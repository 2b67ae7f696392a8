"""The objects of diffusers that can be wrapped: the transformer, or the transformers, of a pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtr.compat.around import unwrapped
from vtr.compat.diffusers import TRANSFORMERS
from vtr.compat.tested import explain
from vtr.diffusion.families import FAMILIES, DiffusionFamily, family_of, layers_of, refusal_of
from vtr.errors import UnsupportedModelError

_EXPERTS = "_vtr_experts"


class Experts(nn.Module):
    """The transformers of a pipeline that has several (Wan 2.2); only carries the wrapping."""

    def __init__(self, members: tuple[nn.Module, ...]) -> None:
        super().__init__()
        # A list, not submodules: they belong to the pipeline.
        self.__dict__["members"] = list(members)


def locate(target: Any) -> nn.Module | None:
    """The transformer of a pipeline (or one object for its two), or the transformer itself.

    Raises:
        UnsupportedModelError: an object of diffusers that cannot be wrapped, with the reason.
    """
    from diffusers import DiffusionPipeline, ModularPipeline

    if not isinstance(target, (DiffusionPipeline, ModularPipeline)):
        if not isinstance(target, nn.Module):
            return None
        model = unwrapped(target)
        supported(model)
        return model
    found: dict[str, Any] = {
        name: unwrapped(getattr(target, name))
        for name in TRANSFORMERS
        if isinstance(getattr(target, name, None), nn.Module)
    }
    if not found:
        why = "it has no transformer"
        if isinstance(target, ModularPipeline):
            why = "it has no transformer yet: load_components() or update_components() first"
        raise UnsupportedModelError(_refuse(type(target).__name__, why))
    for model in found.values():
        supported(model)
    if len(found) == 1:
        return next(iter(found.values()))
    experts = target.__dict__.get(_EXPERTS)
    members = tuple(found.values())
    if experts is None or [id(m) for m in experts.members] != [id(m) for m in members]:
        if len({type(m) for m in members}) != 1:
            names = ", ".join(type(m).__name__ for m in members)
            raise UnsupportedModelError(_refuse(type(target).__name__, f"it mixes {names}"))
        experts = target.__dict__[_EXPERTS] = Experts(members)
    return experts


def supported(model: Any) -> DiffusionFamily:
    family = family_of(model)
    if family is None:
        raise UnsupportedModelError(_refuse(type(model).__name__, refusal_of(model)))
    if family.unet and not layers_of(family, model):
        reason = "its attention is not in transformer blocks, so that there are no tokens to merge"
        raise UnsupportedModelError(_refuse(type(model).__name__, reason))
    if not layers_of(family, model):
        problem = (
            f"the blocks of this {type(model).__name__} ({', '.join(family.blocks)}) hold no attention "
            f"({', '.join(family.attention)}): if something has put other modules in their place (a "
            "cache that is not diffusers' own), apply the method before that"
        )
        raise UnsupportedModelError(explain("diffusers", problem))
    return family


def _refuse(name: str, why: str) -> str:
    return (
        f"{name} is not supported{': ' + why if why else ''}. Supported families: "
        f"{', '.join(f.name for f in FAMILIES)}; a further one is an entry of "
        "vtr/diffusion/families.py"
    )
