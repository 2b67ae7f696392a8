"""Wrapped encoders compile to one graph, and never hold a map of all pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import vtr
from tests.tiny import images, vit
from vtr.core.method import Method

COUNTED = [
    vtr.CLSAttention(keep=0.4, layers=(1, 3)),
    vtr.CLSAttention(keep=0.4, layers=(3,), ensemble=3),
    vtr.Downsample(keep=0.4),
    vtr.EViT(keep=0.6),
    vtr.EViT(keep=0.6, fuse=False),
    vtr.ToMe(r=5),
    vtr.ToMe(keep=0.3, prop_attn=False),
    vtr.Random(keep=0.4, seed=3),
    vtr.Random(keep=0.4),
    vtr.ToFe(keep=0.5),
    vtr.ToFe(keep=(0.5, 0.6, 0.3), trained=True, final_rejoin=False),
]


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", COUNTED, ids=repr)
def test_compiles_to_one_graph(method: Method) -> None:
    model, x = vit(depth=4), images()
    torch._dynamo.reset()
    with vtr.apply(model, method), torch.no_grad():
        torch.manual_seed(0)
        eager = model(x)
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(2):
            torch.manual_seed(0)
            assert torch.equal(compiled(x), eager)
        assert counter.frame_count == 1  # nothing that a call leaves behind compiles it again
    torch._dynamo.reset()


def test_compiled_training_step_is_one_graph() -> None:
    torch._dynamo.reset()
    model, x = vit(depth=2), images()
    with vtr.apply(model, vtr.EViT(keep=0.5, layers=(0,))):
        model(x).sum().backward()
        eager = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.grad, eager[n], atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.slow
def test_inductor_gives_the_same() -> None:
    torch._dynamo.reset()
    model, x = vit(depth=2), images()
    with vtr.apply(model, vtr.EViT(keep=0.5, layers=(0,))), torch.no_grad():
        eager = model(x)
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(x), eager, atol=1e-4, rtol=1e-4
        )
    torch._dynamo.reset()


# ---- memory --------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the numbers of elements that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, str]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.sizes.append((t.numel(), str(func)))
        return out


def _large(make: Callable[[], Method]) -> tuple[nn.Module, Largest]:
    model = vit(
        img_size=512, patch_size=16, embed_dim=1024, depth=3, num_heads=16
    )  # ViT-L/16's blocks
    watch = Largest()
    with vtr.apply(model, make()), torch.no_grad(), watch:
        model(images(1, size=512))
    return model, watch


@pytest.mark.parametrize(
    "make",
    [
        lambda: vtr.CLSAttention(keep=0.25, layers=(0,)),
        lambda: vtr.EViT(keep=0.5, layers=(0, 1)),
        lambda: vtr.FlowCut(keep=0.25),
        lambda: vtr.ToFe(keep=0.5, layers=(1,)),
    ],
    ids=["cls-attention", "evit", "flowcut", "tofe"],
)
def test_no_map_of_all_pairs(make: Callable[[], Method]) -> None:
    """ViT-L/16 at 512 pixels has 1025 tokens: nothing holds 1025 x 1025 elements per head, nor does
    the largest tensor exceed what the dense model's own MLP has."""
    _, watch = _large(make)
    n, heads, width = 1025, 16, 1024
    largest = max(watch.sizes)
    assert largest[0] < heads * n * n, largest
    assert largest[0] <= n * 4 * width, largest
    assert any("scaled_dot_product" in name for _, name in watch.sizes), "the fused kernel is on"
    extra = [s for s in watch.sizes if s[0] == n * n or s[0] == heads * n * n]
    assert not extra, extra
