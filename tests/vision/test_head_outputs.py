"""What a method sees of the outputs of heads is what the block joins; what it decides in training is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import vtr
from tests.tiny import images, spread, vit
from tests.vision import timm_models, towers
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.site import ModelInfo, Site

SEEN: dict[int, Tensor] = {}


@dataclass(frozen=True)
class Look(vtr.Random):
    """Random cuts, beside which it looks at the outputs of the heads."""

    needs: ClassVar = {"encoder": frozenset({"head_outputs"})}

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        return dict(self.needs)

    def reduce(self, site: Site) -> Reduction | None:
        SEEN[site.layer] = site.head_outputs
        return super().reduce(site)


def timm_vit() -> tuple[nn.Module, list[nn.Module]]:
    model = vit()
    return model, [b.attn.proj for b in model.blocks]


def timm_eva() -> tuple[nn.Module, list[nn.Module]]:
    model = timm_models.build("eva02_tiny_patch14_224", {"img_size": 56, "patch_size": 14})
    return model, [b.attn.proj for b in model.blocks]


def tower(name: str) -> tuple[nn.Module, list[nn.Module]]:
    model = towers.build(name)
    attentions = [towers.attention_of(layer) for layer in towers.layers_of(model)]
    names = ("out_proj", "projection_layer")
    return model, [getattr(a, next(n for n in names if hasattr(a, n))) for a in attentions]


def clip() -> tuple[nn.Module, list[nn.Module]]:
    return tower("clip")


def internvl() -> tuple[nn.Module, list[nn.Module]]:
    return tower("internvl")


@pytest.mark.parametrize("make", [timm_vit, timm_eva, clip, internvl])
def test_heads_are_seen_before_they_are_joined(
    make: Callable[[], tuple[nn.Module, list[nn.Module]]],
) -> None:
    model, joins = make()
    given: dict[int, Tensor] = {}
    for layer, join in enumerate(joins):
        join.register_forward_pre_hook(
            lambda module, args, layer=layer: given.update({layer: args[0]})
        )
    size = {timm_vit: 0, timm_eva: 56}.get(make, 32)
    x = torch.randn(2, 3, size, size) if size else images(2)
    with vtr.apply(model, Look(keep=0.5, layers=(0, 1, 2))) as handle, torch.no_grad():
        model(x)
        prefix = handle._wrapping.info.prefix
    for layer in (0, 1, 2):
        joined = SEEN[layer].transpose(1, 2).flatten(2)
        assert torch.equal(joined, given[layer][:, prefix:])


@dataclass(frozen=True)
class Half(TokenMethod):
    """The first half of the tokens are keys behind block 0, all of them again behind block 2."""

    name: ClassVar[str] = "half"
    paper: ClassVar[str] = "a test"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("encoder", 0), Stage("encoder", 1, "end"), Stage("encoder", 2, "end"))

    def reduce(self, site: Site) -> Reduction | None:
        if site.layer != 0:
            return Reduction(None) if site.layer == 2 else None
        policy = torch.ones(site.batch, site.n, requires_grad=True)
        return Reduction(None, policy=policy * (torch.arange(site.n) < site.n // 2))


def test_policies_are_recorded() -> None:
    model = spread(vit()).train()
    with vtr.apply(model, Half()) as handle:
        model(images(2))
        first, last = handle.trace.policies
        assert (first.layer, first.place, first.method) == (0, "middle", "half")
        assert first.policy is not None and first.policy.requires_grad
        assert first.policy.sum(1).tolist() == [first.policy.shape[1] // 2] * 2
        assert (last.layer, last.place, last.policy) == (2, "end", None)
        model(images(2))
        assert len(handle.trace.policies) == 2
