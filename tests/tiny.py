"""Tiny encoders with random weights whose attention is not flat, shared by the tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import vtr
from vtr.core.method import TokenMethod
from vtr.core.registry import registry
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap
from vtr.testing.examples import examples
from vtr.testing.models.encoders import images as images
from vtr.testing.models.encoders import spread as spread
from vtr.testing.models.encoders import vit as vit
from vtr.testing.remains import ours as ours


def interrupted(call: Callable[[], Any], inside: nn.Module, other: Callable[[], Any]) -> Any:
    """``call()``; when it enters ``inside`` it waits for another thread that calls ``other()``."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                other()
        except BaseException as error:
            errors.append(error)

    def give_way(module: nn.Module, args: Any) -> None:
        hook.remove()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    hook = inside.register_forward_pre_hook(give_way)
    with torch.no_grad():
        out = call()
    assert not errors, errors
    return out


def site(
    *,
    n: int,
    prefix: int = 1,
    batch: int = 2,
    heads: int = 2,
    dim: int = 8,
    layer: int = 0,
    depth: int = 6,
    map: TokenMap | None = None,
    memory: dict[str, Any] | None = None,
    seed: int = 0,
    has_cls: bool = True,
) -> Site:
    """A place of a model that does not exist: random q, k, v and features."""
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + n
    q, k, v = (torch.randn(batch, heads, tokens, dim, generator=generator) for _ in range(3))
    hidden = torch.randn(batch, n, heads * dim, generator=generator)
    info = ModelInfo(
        family="none",
        depth={"encoder": depth},
        signals={"encoder": frozenset()},
        prefix=prefix,
        has_cls=has_cls,
        dim=heads * dim,
        heads=heads,
    )
    map = TokenMap.identity(batch, n) if map is None else map
    return Site(
        site="encoder",
        layer=layer,
        info=info,
        hidden=hidden,
        map=map,
        memory={} if memory is None else memory,
        valid=map.valid if map.has_padding else None,
        qkv=lambda: (q, k, v),
        scale=dim**-0.5,
        prefix=prefix,
        outputs=lambda: (q @ k.transpose(-2, -1) * dim**-0.5).softmax(-1) @ v,
    )


def cutters(model: Any) -> list[TokenMethod]:
    """A setting of every method that cuts tokens in this encoder."""
    # Where samples have different numbers of tokens, padding is masked, and not every block can be opened.
    with vtr.apply(model, vtr.Random()) as handle:
        masks = "keys" in handle._wrapping.info.signals["encoder"]
    found = []
    for entry in vtr.supported(model):
        cls = registry()[entry.name]
        if entry.supported and issubclass(cls, TokenMethod):
            method: Any = examples(cls).some[0]
            if masks or not method.data_dependent:
                found.append(method)
    return found


def applied(model: Any, method: Any) -> vtr.Handle:
    """Apply a method; modules that are new have the same numbers every time."""
    torch.manual_seed(1)
    return vtr.apply(model, method)


class Watch:
    """Remembers a model, and checks that it is exactly as it was."""

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        self.model, self.x = model, x
        self.keys = list(model.state_dict())
        self.attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
        self.classes = {n: type(m) for n, m in model.named_modules()}
        with torch.no_grad():
            self.out = model(x)

    def check(self) -> None:
        assert list(self.model.state_dict()) == self.keys
        assert ours(self.model) == []
        assert {n: sorted(m.__dict__) for n, m in self.model.named_modules()} == self.attributes
        with torch.no_grad():
            assert torch.equal(self.model(self.x), self.out)

    def check_wrapped(self) -> None:
        """State and classes are untouched while wrapped, too."""
        assert list(self.model.state_dict()) == self.keys
        assert {n: type(m) for n, m in self.model.named_modules()} == self.classes
