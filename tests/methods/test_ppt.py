"""PPT against the authors' algorithm (arXiv 2310.01812, section 3.4), image by image, in their order of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vtr
from tests.methods.test_tome import match
from tests.tiny import images, site, vit


def scores(q: Any, k: Any, v: Any, size: Any, prefix: int) -> Any:
    """Class attention, summed over heads, times the norm of the value over all heads; they sum to 1."""
    heads, tokens, dim = q.shape
    total = np.zeros(tokens)
    for h in range(heads):
        logits = [q[h, 0] @ k[h, j] / np.sqrt(dim) + np.log(size[j]) for j in range(tokens)]
        weights = np.exp(np.array(logits) - max(logits))
        total += weights / weights.sum()
    norm = [np.sqrt((v[:, j] ** 2).sum()) for j in range(tokens)]
    score = (total * norm)[prefix:]
    return score / score.sum()


def literal(
    model: Any, x: Tensor, layers: dict[int, int], threshold: float, prop_attn: bool = True
) -> tuple[list[tuple[int, ...]], Tensor, list[float]]:
    """One image: members of the tokens that are left, their features, and the variances of the scores."""
    h = model._pos_embed(model.patch_embed(x))[0]
    prefix = model.num_prefix_tokens
    groups = [[t] for t in range(h.shape[0])]
    size, variances = torch.ones(h.shape[0], dtype=h.dtype), []
    for i, block in enumerate(model.blocks):
        normed = block.norm1(h)
        tokens, width = normed.shape
        q, k, v = block.attn.qkv(normed).reshape(tokens, 3, 3, -1).permute(1, 2, 0, 3)
        weigh = size if prop_attn else torch.ones_like(size)
        logits = q @ k.transpose(-1, -2) * (width // 3) ** -0.5 + weigh.log()
        h = h + block.attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(tokens, width))
        if i in layers:
            r = layers[i]
            score = scores(*(t.double().numpy() for t in (q, k, v)), weigh.numpy(), prefix)
            variances.append(float(score.var(ddof=1)))
            if variances[-1] >= threshold:
                order = sorted(range(len(score)), key=lambda j: -score[j])[: len(score) - r]
                stay = [*range(prefix), *(prefix + j for j in order)]
                h, size, groups = h[stay], size[stay], [groups[j] for j in stay]
            else:
                pairs, stay = match(k.mean(0), r, prefix)
                total, weight, members = h * size[:, None], size.clone(), [list(g) for g in groups]
                for source, target in pairs:
                    total[target] += h[source] * size[source]
                    weight[target] += size[source]
                    members[target] += groups[source]
                h = (total / weight[:, None])[stay]
                size, groups = weight[stay], [sorted(members[j]) for j in stay]
        h = h + block.mlp(block.norm2(h))
    return [tuple(g) for g in groups], h, variances


def split(model: Any, x: Tensor, layer: int) -> float:
    """A threshold that some of the images reach at the first layer, and some do not."""
    found = sorted(literal(model, image[None], {layer: 0}, 1)[2][0] for image in x)
    return (found[len(x) // 2 - 1] + found[len(x) // 2]) / 2


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 1}], ids=["class", "class and distillation"]
)
@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("limit", [0.0, 1.0, "split"])
def test_tokens_and_features_of_the_paper(options: Any, prop_attn: bool, limit: Any) -> None:
    model, x = vit(**options).double(), images(4).double()
    layers = {1: 12, 3: 9, 4: 14}
    with torch.no_grad():
        threshold = split(model, x, 1) if limit == "split" else limit
        method = vtr.PPT(
            r=(12, 9, 14),
            layers=(1, 3, 4),
            threshold=threshold / (196 / 64) ** 2,
            prop_attn=prop_attn,
        )
        with vtr.apply(model, method) as handle:
            got = model.forward_features(x)
            total = handle.trace.stages[-1].total
        seen = set()
        for b in range(4):
            groups, h, variances = literal(model, x[b : b + 1], layers, threshold, prop_attn)
            seen.update(value >= threshold for value in variances)
            prefix, h = model.num_prefix_tokens, model.norm(h)
            expected = {
                tuple(t - prefix for t in g): i for i, g in enumerate(groups) if g[0] >= prefix
            }
            mine = {
                tuple(j for j in range(64) if total.source[b, j] == slot): slot
                for slot in range(total.n_out)
            }
            assert set(mine) == set(expected)
            for group, slot in mine.items():
                assert total.size[b, slot] == len(group)
                torch.testing.assert_close(got[b, prefix + slot], h[expected[group]])
            torch.testing.assert_close(got[b, :prefix], h[:prefix])
    assert seen == ({True, False} if limit == "split" else {limit == 0})


def test_a_batch_gives_each_image_what_it_gets_alone() -> None:
    model, x = vit(), images(4)
    with torch.no_grad():
        threshold = split(model, x, 1) / (196 / 64) ** 2
        with vtr.apply(model, vtr.PPT(keep=25, threshold=threshold)):
            both = model(x)
            for b in range(4):
                torch.testing.assert_close(
                    model(x[b : b + 1]), both[b : b + 1], atol=1e-4, rtol=1e-4
                )


def test_the_papers_numbers() -> None:
    """r = 50 at blocks 3, 6, 9 of 12, of which the last can remove 48 only, and is the default."""
    model = vit(img_size=112, depth=12)
    for method in (vtr.PPT(), vtr.PPT(r=50), vtr.PPT.preset("deit-small")):
        with vtr.apply(model, method) as handle, torch.no_grad():
            model(images(1, size=112))
        cuts = [(s.layer, s.tokens_in, s.tokens_out) for s in handle.trace.stages]
        assert cuts == [(3, 196, 146), (6, 146, 96), (9, 96, 48)]


def test_the_threshold_follows_the_number_of_tokens() -> None:
    """The limit is that of 196 tokens, times (196 / N)^2."""
    s = site(n=49, layer=3, depth=12)  # seed 0, as the sites below
    value = scores(*(t[0].double().numpy() for t in s.qkv), np.ones(50), 1).var(ddof=1)
    for factor, drops in ((0.999, True), (1.001, False)):
        got = vtr.PPT(r=5, threshold=value * factor / 16).reduce(site(n=49, layer=3, depth=12))
        assert got is not None and got.map is not None
        assert bool((got.map.source[0] < 0).any()) == drops


def test_gradients_reach_the_tokens_that_are_left() -> None:
    model, x = vit(), images(2).requires_grad_()
    with vtr.apply(model.train(), vtr.PPT(keep=0.5)):
        model(x).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad != 0).any()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5, "r": 3}, "either r or keep"),
        ({"r": -1}, "r must be an int >= 0"),
        ({"threshold": 2.0}, "threshold must be a number in"),
        ({"prop_attn": 1}, "prop_attn must be True or False"),
        ({"layers": (3, 1)}, "strictly ascending"),
    ],
)
def test_wrong_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtr.PPT(**options)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="2 entries for the 3 layers"):
        vtr.apply(vit(), vtr.PPT(r=(3, 4)))
    with pytest.raises(vtr.UnsupportedMethodError, match="no class token"):
        vtr.apply(vit(class_token=False, global_pool="avg"), vtr.PPT())
    chain = [vtr.ATS(layers=(0,)), vtr.PPT(layers=(2,))]
    model = vit()
    with vtr.apply(model, chain), pytest.raises(ValueError, match="ppt cannot merge after"):
        model(images(4))


def test_one_token_and_tiny_grids() -> None:
    model = vit()
    with vtr.apply(model, vtr.PPT(keep=1, layers=tuple(range(6)))) as handle, torch.no_grad():
        assert model(images()).isfinite().all()
    assert handle.trace.stages[-1].tokens_out == 1
    with pytest.raises(ValueError, match="reach no fewer than"), vtr.apply(model, vtr.PPT(keep=1)):
        model(images())
    small = vit(img_size=16)
    with vtr.apply(small, vtr.PPT(r=3, layers=(1, 2, 3))) as handle, torch.no_grad():
        assert small(images(2, size=16)).isfinite().all()
    assert [s.tokens_out for s in handle.trace.stages] == [2, 1]
