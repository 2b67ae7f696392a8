"""TPS against its formula (arXiv 2304.10716, section 3.3), token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtr
from tests.methods.test_evit import scores
from tests.tiny import images, site, vit


@given(st.integers(2, 20), st.floats(0.1, 0.95), st.integers(0, 999), st.sampled_from([1, 2, 5]))
def test_kept_tokens_and_what_is_squeezed_into_them(
    n: int, keep: float, seed: int, prefix: int
) -> None:
    s = site(n=n, prefix=prefix, layer=3, depth=12, seed=seed)
    number = math.ceil(keep * n - 1e-9)
    got = vtr.TPS(keep=keep).reduce(s)
    if number == n:
        assert got is None
        return
    assert got is not None and got.map is not None and got.weights is not None
    merged = got.map.merge(s.hidden, got.weights, got.normalize)
    for b in range(2):
        score, x = scores(s, b), s.hidden[b].double()
        order = sorted(range(n), key=lambda j: (-score[j], j))
        best, rest = sorted(order[:number]), order[number:]
        assert got.map.kept[b].tolist() == best
        total, weight = {i: math.e * x[i] for i in best}, dict.fromkeys(best, math.e)
        for j in rest:
            cosine = [float(x[j] @ x[i] / (x[j].norm() * x[i].norm())) for i in best]
            i = best[cosine.index(max(cosine))]
            total[i] = total[i] + math.exp(max(cosine)) * x[j]
            weight[i] += math.exp(max(cosine))
        for slot, i in enumerate(best):
            wanted = total[i] / weight[i]
            torch.testing.assert_close(merged[b, slot].double(), wanted, atol=1e-5, rtol=1e-4)


def test_sizes_are_not_counted() -> None:
    """The attention behind a cut is that of tokens that count once each, and so is the mean."""
    model, x = vit(global_pool="avg"), images()
    with vtr.apply(model, vtr.TPS(layers=(5,), keep=0.5)) as handle, torch.no_grad():
        features = model.forward_features(x)
        wanted = model.head(model.fc_norm(features[:, 1:].mean(1)))
        torch.testing.assert_close(model(x), wanted)
    assert handle.trace.stages[0].tokens_out == 32


def test_dropping_is_evit_without_fusing() -> None:
    model, x = vit(), images()
    with torch.no_grad():
        with vtr.apply(model, vtr.TPS(fuse=False)):
            got = model(x)
        with vtr.apply(model, vtr.EViT(fuse=False)):
            assert torch.equal(model(x), got)


def test_gradients_reach_the_squeezed_tokens() -> None:
    model, x = vit().train(), images(2).requires_grad_()
    with vtr.apply(model, vtr.TPS(keep=1, layers=(2,))):
        model(x).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None for p in model.parameters())


def test_refusals() -> None:
    model = vit()
    chain: list[Any] = [vtr.ATS(layers=(0,)), vtr.TPS(layers=(2,))]
    with vtr.apply(model, chain), pytest.raises(ValueError, match="tps cannot fuse after"):
        model(images(4))
    with pytest.raises(vtr.UnsupportedMethodError, match="no class token"):
        vtr.apply(vit(class_token=False, global_pool="avg"), vtr.TPS())
