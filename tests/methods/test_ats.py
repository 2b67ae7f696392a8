"""ATS against its formulas (arXiv 2111.15667, sections 3.1 and 3.2), written out sample by sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtr
from tests.methods.test_ppt import scores
from tests.tiny import images, site, vit
from vtr.methods.common.inverse_sampling import inverse_transform_sample


def sampled(score: Any, samples: int) -> set[int]:
    """The tokens whose place in the cumulative distribution is nearest to each of the samples."""
    order = sorted(range(len(score)), key=lambda j: (score[j], j))
    total, place = 0.0, []
    for j in order:
        total += float(score[j])
        place.append(total)
    low, high = place[0], place[-1]
    if high == low:
        return {order[0]}
    place = [(c - low) / (high - low) for c in place]
    start = min(c for c in place if c > 0)
    wanted = (
        [start + (1 - start) * i / (samples - 1) for i in range(samples)] if samples > 1 else [1.0]
    )
    taken = set()
    for y in wanted:
        gap = [abs(y - c) for c in place]
        taken.add(order[gap.index(min(gap))])
    return taken


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 999), st.sampled_from([1, 3, 8]))
def test_samples(n: int, samples: int, seed: int, power: int) -> None:
    score = torch.rand(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    score = score**power
    got = inverse_transform_sample(score, samples)
    for b in range(3):
        assert set(got[b].nonzero()[:, 0].tolist()) == sampled(score[b].tolist(), samples)
        assert 1 <= int(got[b].sum()) <= samples


def test_scores_of_zero() -> None:
    for row, samples in (
        ([0.0, 0, 0, 1], 4),
        ([0.0, 0, 0, 0], 3),
        ([0.0, 0.5, 0, 0.5], 4),
        ([1.0], 2),
    ):
        score = torch.tensor([row], dtype=torch.float64)
        got = inverse_transform_sample(score, samples)[0].nonzero()[:, 0].tolist()
        assert set(got) == sampled(row, samples)


@given(st.integers(2, 20), st.integers(1, 20), st.integers(0, 99), st.integers(1, 6))
def test_padding_changes_nothing(n: int, samples: int, seed: int, padding: int) -> None:
    g = torch.Generator().manual_seed(seed)
    score = torch.rand(2, n, generator=g, dtype=torch.float64)
    rest = torch.rand(2, padding, generator=g, dtype=torch.float64)
    valid = torch.arange(n + padding).expand(2, -1) < n
    got = inverse_transform_sample(torch.cat([score, rest], 1), samples, valid)
    assert torch.equal(got[:, :n], inverse_transform_sample(score, samples))
    assert not got[:, n:].any()


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize(("keep", "samples"), [(1.0, 24), (0.5, 12), (6, 6), (1, 1)])
def test_tokens_of_the_paper(prefix: int, keep: Any, samples: int) -> None:
    s = site(n=24, prefix=prefix, layer=3, depth=12, batch=4)
    got = vtr.ATS(keep=keep).reduce(s)
    assert got is not None and got.map is not None and got.weights is None
    for b in range(4):
        q, k, v = (t[b].double().numpy() for t in s.qkv)
        expected = sampled(scores(q, k, v, np.ones(24 + prefix), prefix), samples)
        assert [j for j in got.map.kept[b].tolist() if j >= 0] == sorted(expected)


def literal(
    model: Any, x: Tensor, layers: tuple[int, ...], samples: int
) -> tuple[list[int], Tensor]:
    """One image through the paper's network: only the sampled rows of the attention are computed."""
    h = model._pos_embed(model.patch_embed(x))[0]
    index, prefix = list(range(h.shape[0])), model.num_prefix_tokens
    for i, block in enumerate(model.blocks):
        normed = block.norm1(h)
        tokens, width = normed.shape
        q, k, v = block.attn.qkv(normed).reshape(tokens, 3, 3, -1).permute(1, 2, 0, 3)
        rows = list(range(tokens))
        if i in layers:
            score = scores(*(t.double().numpy() for t in (q, k, v)), np.ones(tokens), prefix)
            rows = [*range(prefix), *sorted(prefix + j for j in sampled(score, samples))]
        attention = (q[:, rows] @ k.transpose(-1, -2) * (width // 3) ** -0.5).softmax(-1)
        out = (attention @ v).transpose(0, 1).reshape(len(rows), width)
        h, index = h[rows] + block.attn.proj(out), [index[j] for j in rows]
        h = h + block.mlp(block.norm2(h))
    return [j - prefix for j in index[prefix:]], model.norm(h)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}], ids=["class", "registers"])
def test_a_batch_gives_each_image_the_papers_tokens(options: Any) -> None:
    model, x = vit(**options).double(), images(4).double()
    with vtr.apply(model, vtr.ATS()) as handle, torch.no_grad():
        got = model.forward_features(x)
        total = handle.trace.stages[-1].total
    assert [s.layer for s in handle.trace.stages] == [1, 2, 3, 4, 5]
    prefix, counts = model.num_prefix_tokens, set()
    for b in range(4):
        with torch.no_grad():
            index, h = literal(model, x[b : b + 1], (1, 2, 3, 4, 5), 64)
        counts.add(len(index))
        assert [j for j in total.kept[b].tolist() if j >= 0] == index
        torch.testing.assert_close(got[b, : prefix + len(index)], h)
    assert len(counts) > 1 and total.has_padding


def test_gradients_pass_the_padding() -> None:
    model, x = vit().train(), images(4).requires_grad_()
    with vtr.apply(model, vtr.ATS()) as handle:
        model(x).square().sum().backward()
        assert handle.trace.stages[-1].total.has_padding
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_budget_per_layer() -> None:
    model = vit()
    with vtr.apply(model, vtr.ATS(keep=(20, 8), layers=(1, 4))) as handle, torch.no_grad():
        model(images(3))
    assert [s.layer for s in handle.trace.stages] == [1, 4]
    assert all(s.tokens_out <= most for s, most in zip(handle.trace.stages, (20, 8), strict=True))


def test_a_single_token_stays() -> None:
    small = vit(img_size=8)
    with vtr.apply(small, vtr.ATS()) as handle, torch.no_grad():
        assert small(images(2, size=8)).isfinite().all()
    assert not handle.trace.stages


def test_refusals() -> None:
    with pytest.raises(ValueError, match="2 entries for the 5 layers"):
        vtr.apply(vit(), vtr.ATS(keep=(0.5, 0.4)))
    with pytest.raises(ValueError, match="keep must be an int >= 1"):
        vtr.ATS(keep=0)
    with pytest.raises(vtr.UnsupportedMethodError, match="no class token"):
        vtr.apply(vit(class_token=False, global_pool="avg"), vtr.ATS())
