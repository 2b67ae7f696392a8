"""The hidden states that a method sees are what enters the attention module of its layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtr
from tests.diffusion.models import CASES, Fixed


@dataclass(frozen=True)
class Gate(Fixed):
    """Adds to the output what depends on the hidden states of the grid."""

    needs: ClassVar = {"attention": frozenset({"qkv", "denoising", "hidden"})}

    seen: list[Any] = field(default_factory=list, compare=False)

    def attend(self, site: Any) -> Tensor:
        self.seen.append((site.layer, site.hidden))
        gate = site.hidden.mean(-1)[:, None, :, None]
        out = super().attend(site)
        rows = out[:, :, site.first : site.first + site.tokens]
        rows.add_(gate.to(out.dtype))
        return out


def tokens_of(entered: list[Tensor], case: Any) -> Tensor:
    """The grid's rows of what modules were given, which may have the text in it."""
    found = entered[0]
    if found.shape[1] == case.tokens:
        return found
    first = found.shape[1] - case.tokens if case.text_first else 0
    return found[:, first : first + case.tokens]


@pytest.mark.parametrize("name", CASES)
def test_the_hidden_states_are_those_that_enter_the_module(name: str) -> None:
    case = CASES[name]
    model, method = case.build(), Gate()
    entered: dict[int, list[Tensor]] = {}

    def look(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            entered.setdefault(layer, []).append(given)

        return hook

    for layer, path in enumerate(case.attention):
        model.get_submodule(path).register_forward_pre_hook(look(layer), with_kwargs=True)
    with torch.no_grad(), vtr.apply(model, method):
        model(**case.call())
    layers = {layer for layer, _ in method.seen}
    assert layers == set(range(len(case.attention)))
    for layer in layers:
        seen = torch.cat([hidden for at, hidden in method.seen if at == layer])
        assert torch.equal(seen, tokens_of(entered[layer], case))


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_a_compiled_model_shows_them_as_well(name: str) -> None:
    case = CASES[name]
    model = case.build()
    with torch.no_grad(), vtr.apply(model, Gate()):
        want = model(**case.call())[0]
        compiled = torch.compile(model, backend="eager")
        found = [compiled(**case.call())[0] for _ in range(2)]
    torch._dynamo.reset()
    for one in found:
        torch.testing.assert_close(one, want, atol=2e-6, rtol=1e-6)


def test_others_get_none() -> None:
    case, seen = CASES["wan"], []

    @dataclass(frozen=True)
    class Look(Fixed):
        def attend(self, site: Any) -> Tensor:
            seen.append(site.hidden)
            return super().attend(site)

    model = case.build()
    with torch.no_grad(), vtr.apply(model, Look()):
        model(**case.call())
    assert seen and all(one is None for one in seen)
