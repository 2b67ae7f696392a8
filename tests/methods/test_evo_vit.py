"""Evo-ViT against the authors' network (arXiv 2108.01390, section 3), image by image, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.tiny import images, vit


def literal(
    model: Any, x: Tensor, starts: dict[int, int], momentum: float, rejoin: bool
) -> tuple[Tensor, list[list[int]]]:
    """One image: the features of all tokens (or of those that evolved), and the tokens of each stage."""
    h = model._pos_embed(model.patch_embed(x))[0]
    p = model.num_prefix_tokens
    importance, chosen, stages = None, list(range(h.shape[0] - p)), []
    for i, block in enumerate(model.blocks):
        if i in starts:
            assert importance is not None
            best = sorted(range(len(importance)), key=lambda j: (-importance[j], j))
            chosen = sorted(best[: starts[i]])
            stages.append(chosen)
        rows = [*range(p), *(p + j for j in chosen)]
        part = h[rows]
        normed = block.norm1(part)
        tokens, width = normed.shape
        q, k, v = block.attn.qkv(normed).reshape(tokens, 3, 3, -1).permute(1, 2, 0, 3)
        attention = (q @ k.transpose(-1, -2) * (width // 3) ** -0.5).softmax(-1)
        part = part + block.attn.proj((attention @ v).transpose(0, 1).reshape(tokens, width))
        h = h.clone()
        h[rows] = part + block.mlp(block.norm2(part))
        new = attention[:, 0, p:].sum(0).tolist()
        if importance is None:
            importance = new
        else:
            for j, value in zip(chosen, new, strict=True):
                importance[j] = (1 - momentum) * importance[j] + momentum * value
    return h if rejoin else h[rows], stages


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}], ids=["class", "registers"])
@pytest.mark.parametrize(
    ("layers", "keep"), [((2, 4), 0.5), ((1, 2, 5), (40, 10, 30)), ((3,), 1)], ids=str
)
@pytest.mark.parametrize("rejoin", [True, False])
def test_the_network_of_the_authors(options: Any, layers: Any, keep: Any, rejoin: bool) -> None:
    model, x = vit(**options).double(), images(3).double()
    numbers = keep if isinstance(keep, tuple) else (32 if keep == 0.5 else 1,) * len(layers)
    method = vtr.EvoViT(keep=keep, layers=layers, momentum=0.3, final_rejoin=rejoin)
    with vtr.apply(model, method) as handle, torch.no_grad():
        got = model.forward_features(x)
        records = handle.trace.stages
    assert len(records) == len(layers) + rejoin
    for b in range(3):
        with torch.no_grad():
            h, stages = literal(
                model, x[b : b + 1], dict(zip(layers, numbers, strict=True)), 0.3, rejoin
            )
            torch.testing.assert_close(got[b], model.norm(h))
        for record, chosen in zip(records, stages, strict=False):
            assert record.total.kept[b].tolist() == chosen


def test_defaults_are_the_papers() -> None:
    """Half of the tokens in blocks 4 to 7 and 8 to 11 of 12; all are there in the end."""
    model = vit(img_size=112, depth=12)
    with vtr.apply(model, vtr.EvoViT()) as handle, torch.no_grad():
        assert model.forward_features(images(1, size=112)).shape[1] == 197
        tokens = handle.trace.tokens["encoder"]
    assert [tokens[i][0] for i in range(12)] == [196] * 4 + [98] * 8
    assert [(s.layer, s.tokens_out) for s in handle.trace.stages] == [(3, 98), (7, 98), (11, 196)]


def test_tokens_come_back_in_the_second_stage() -> None:
    model = vit()
    with vtr.apply(model, vtr.EvoViT(keep=(0.3, 0.5))) as handle, torch.no_grad():
        model(images(4))
        first, second = (s.total.kept for s in handle.trace.stages[:2])
    assert any(set(b.tolist()) - set(a.tolist()) for a, b in zip(first, second, strict=True))


def test_everything_is_the_model() -> None:
    model, x = vit(), images()
    with torch.no_grad():
        wanted = model(x)
        with vtr.apply(model, vtr.EvoViT(keep=(1.0, 64))) as handle:
            assert torch.equal(model(x), wanted) and not handle.trace.stages


def test_gradients_reach_the_tokens_that_wait() -> None:
    """A placeholder's features of the first blocks are those that it rejoins with."""
    model, x = vit(global_pool="avg").train(), images(2).requires_grad_()
    with vtr.apply(model, vtr.EvoViT(keep=1, layers=(2,))):
        model(x).square().sum().backward()
    assert x.grad is not None
    patches = x.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum((1, 4, 5))
    assert (patches > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0, 3)}, "layers must be >= 1"),
        ({"momentum": 1.5}, "momentum must be a number in"),
        ({"final_rejoin": 0}, "final_rejoin must be True or False"),
        ({"keep": (0.5, 0.4), "layers": (3,)}, "one entry per stage"),
    ],
)
def test_wrong_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtr.EvoViT(**options)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="3 entries for the 2 layers"):
        vtr.apply(vit(), vtr.EvoViT(keep=(0.5, 0.4, 0.3)))
    with pytest.raises(vtr.UnsupportedMethodError, match="no class token"):
        vtr.apply(vit(class_token=False, global_pool="avg"), vtr.EvoViT())
    with pytest.raises(ValueError, match="cannot be combined"):
        vtr.apply(vit(), [vtr.EvoViT(layers=(2,)), vtr.EViT(layers=(4,))])
