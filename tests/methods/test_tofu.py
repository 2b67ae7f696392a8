"""ToFu against its description (arXiv 2312.01026, section 3): pairs of ToMe, dropped first, merged with MLERP later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.methods.test_tome import match
from tests.tiny import images, vit


def literal(model: Any, x: Tensor, schedule: Any, dropping: set[int]) -> tuple[Any, Tensor]:
    """One image in the order of tokens of ToMe: members of what is left, and features."""
    h = model._pos_embed(model.patch_embed(x))[0]
    prefix = model.num_prefix_tokens
    groups = [[t] for t in range(h.shape[0])]
    size = torch.ones(h.shape[0], dtype=h.dtype)
    for i, (block, r) in enumerate(zip(model.blocks, schedule, strict=True)):
        normed = block.norm1(h)
        tokens, width = normed.shape
        q, k, v = block.attn.qkv(normed).reshape(tokens, 3, 3, -1).permute(1, 2, 0, 3)
        logits = q @ k.transpose(-1, -2) * (width // 3) ** -0.5 + size.log()
        h = h + block.attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(tokens, width))
        pairs, order = match(k.mean(0), r, prefix)
        new, weight, members = h.clone(), size.clone(), [list(g) for g in groups]
        for target in {t for _, t in pairs}:
            sources = [s for s, t in pairs if t == target]
            group = [target, *sources]
            weight[target] = size[group].sum()
            members[target] = sorted(t for j in group for t in groups[j])
            if i not in dropping:
                mean = (h[group] * size[group, None]).sum(0)
                new[target] = mean / mean.norm() * h[group].norm(dim=1).max()
        h, size, groups = new[order], weight[order], [members[j] for j in order]
        h = h + block.mlp(block.norm2(h))
    return [tuple(g) for g in groups], model.norm(h)


@pytest.mark.parametrize(
    ("drop_layers", "dropping"), [(None, {0, 1, 2}), (0, set()), ((1, 5), {1, 5})], ids=str
)
def test_tokens_and_features_of_the_paper(drop_layers: Any, dropping: set[int]) -> None:
    model, x = vit().double(), images(2).double()
    method = vtr.ToFu(r=9, drop_layers=drop_layers)
    with vtr.apply(model, method) as handle, torch.no_grad():
        got = model.forward_features(x)
        total = handle.trace.stages[-1].total
    for b in range(2):
        with torch.no_grad():
            groups, h = literal(model, x[b : b + 1], (9,) * 6, dropping)
        expected = {tuple(t - 1 for t in g): i for i, g in enumerate(groups) if g[0] >= 1}
        mine = {
            tuple(j for j in range(64) if total.source[b, j] == slot): slot
            for slot in range(total.n_out)
        }
        assert set(mine) == set(expected)
        for group, slot in mine.items():
            torch.testing.assert_close(got[b, 1 + slot], h[expected[group]])
        torch.testing.assert_close(got[b, 0], h[0])


def test_it_is_tome_with_two_options() -> None:
    model, x = vit(), images()
    same = vtr.ToMe(keep=0.3, drop_layers=None, keep_norm=True)
    assert same.dropped(12) == vtr.ToFu().dropped(12) == 6
    with torch.no_grad():
        with vtr.apply(model, vtr.ToFu(keep=0.3)):
            got = model(x)
        with vtr.apply(model, same):
            assert torch.equal(model(x), got)


def test_everything_is_the_model() -> None:
    model, x = vit(), images()
    with torch.no_grad():
        wanted = model(x)
        with vtr.apply(model, vtr.ToFu(keep=1.0)):
            assert torch.equal(model(x), wanted)


def test_gradients() -> None:
    model, x = vit().train(), images(2).requires_grad_()
    with vtr.apply(model, vtr.ToFu(keep=0.4)):
        model(x).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="drop_layers must be a number of first layers"):
        vtr.ToFu(drop_layers=-1)
    with pytest.raises(ValueError, match="do not exist"):
        vtr.apply(vit(), vtr.ToFu(drop_layers=(7,)))
