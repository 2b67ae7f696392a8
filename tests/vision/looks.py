"""Methods that look into a tower and change nothing, and what they must see."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import vtr
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import take


@dataclass(frozen=True)
class Look(TokenMethod):
    """Opens the attention of every layer and changes nothing."""

    name: ClassVar[str] = "look"
    paper: ClassVar[str] = "none"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar = {"encoder": frozenset({"keys"})}

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("encoder", i) for i in range(info.depth["encoder"]))

    def reduce(self, site: Site) -> Reduction | None:
        q, k, v = site.qkv
        assert q.shape == k.shape == v.shape
        return None


def check_keys(model: Any, layers: Iterable[Any], call: Callable[[], Any]) -> Any:
    """Keys made of a layer's input alone (``site.keys_of``) are those of its attention, at any tokens.

    Returns:
        what ``call`` gives while the method looks.
    """
    inputs: dict[int, Tensor] = {}
    seen: list[int] = []
    index = torch.tensor([[3, 9, 60], [0, 63, 5]])

    @dataclass(frozen=True)
    class Keys(Look):
        def reduce(self, site: Site) -> Reduction | None:
            assert site.keys_of is not None
            got = site.keys_of(take(inputs[site.layer][:, site.prefix :], index), index)
            want = take(site.keys.transpose(1, 2), index).transpose(1, 2)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            seen.append(site.layer)
            return None

    hooks = [
        layer.register_forward_pre_hook(lambda m, a, i=i: inputs.__setitem__(i, a[0]))
        for i, layer in enumerate(layers)
    ]
    with vtr.apply(model, Keys()), torch.no_grad():
        out = call()
    for hook in hooks:
        hook.remove()
    assert seen == list(range(len(hooks)))
    return out
