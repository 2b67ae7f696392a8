"""EViT against its formula (arXiv 2202.07800, sections 3.1 and 3.2), written out token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtr
from tests.tiny import images, site, vit
from vtr.core.method import Reduction
from vtr.core.site import Site
from vtr.core.tokens import TokenMap, top_indices


def scores(s: Site, b: int) -> list[float]:
    """Mean over heads of the class token's softmax row, without its own entry, not normalised again."""
    q, k, _ = (t.double() for t in s.qkv)
    heads, tokens, dim = q.shape[1:]
    rows = []
    for h in range(heads):
        logits = [float(q[b, h, 0] @ k[b, h, j]) / math.sqrt(dim) for j in range(tokens)]
        total = sum(math.exp(x) for x in logits)
        rows.append([math.exp(x) / total for x in logits[s.prefix :]])
    return [sum(row[j] for row in rows) / heads for j in range(s.n)]


@given(st.integers(3, 20), st.floats(0.1, 0.95), st.integers(0, 999), st.sampled_from([1, 2, 5]))
def test_kept_tokens_and_the_fused_value(n: int, keep: float, seed: int, prefix: int) -> None:
    s = site(n=n, prefix=prefix, layer=3, depth=12, seed=seed)
    k = math.ceil(keep * n - 1e-9)
    for fuse in (True, False):
        got = vtr.EViT(keep=keep, fuse=fuse).reduce(s)
        if k == n or (fuse and k == n - 1):
            assert got is None
            continue
        assert got is not None and got.map is not None
        if fuse:
            assert got.weights is not None and not got.normalize
            merged = got.map.merge(s.hidden, got.weights, got.normalize)
        for b in range(2):
            score = scores(s, b)
            order = sorted(range(n), key=lambda j: (-score[j], j))
            best, rest = order[:k], order[k:]
            if not fuse:
                assert got.map.kept[b].tolist() == sorted(best)
                continue
            # The fused token stands where the best of the inattentive stood.
            assert got.map.kept[b].tolist() == sorted([*best, rest[0]])
            for slot, j in enumerate(got.map.kept[b].tolist()):
                if j == rest[0]:
                    expected = sum(score[i] * s.hidden[b, i].double() for i in rest)
                    assert got.map.size[b, slot] == len(rest)
                else:
                    expected = s.hidden[b, j].double()
                    assert got.map.size[b, slot] == 1
                torch.testing.assert_close(merged[b, slot].double(), expected, atol=1e-5, rtol=1e-4)


def test_counts_of_the_paper() -> None:
    """196 -> 138 + 1 -> 98 + 1 -> 70 + 1 at 0.7: the fused token is counted at the next stage."""
    model = vit(img_size=112, depth=12)
    with vtr.apply(model, vtr.EViT(keep=0.7)) as handle, torch.no_grad():
        model(images(1, size=112))
    assert [(s.layer, s.tokens_in, s.tokens_out) for s in handle.trace.stages] == [
        (3, 196, 139),
        (6, 139, 99),
        (9, 99, 71),
    ]


def literal(model: torch.nn.Module, x: Tensor, keep: float, layers: tuple[int, ...]) -> Tensor:
    """The paper's network in its own order: kept tokens by falling score, the fused one last."""
    h = model._pos_embed(model.patch_embed(x))  # type: ignore[operator]
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        normed = block.norm1(h)
        batch, tokens, width = normed.shape
        q, k, v = block.attn.qkv(normed).reshape(batch, tokens, 3, 3, -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) * (width // 3) ** -0.5).softmax(-1)
        h = h + block.attn.proj((attention @ v).transpose(1, 2).reshape(batch, tokens, width))
        if i in layers:
            score = attention[:, :, 0, 1:].mean(1)
            number = math.ceil(keep * (tokens - 1))
            best = score.topk(number).indices
            gone = torch.ones_like(score, dtype=torch.bool).scatter(1, best, False)
            patches = h[:, 1:]
            fused = ((score * gone)[..., None] * patches).sum(1, keepdim=True)
            kept = patches.gather(1, best[..., None].expand(-1, -1, width))
            h = torch.cat([h[:, :1], kept, fused], 1)
        h = h + block.mlp(block.norm2(h))
    return model.head(model.norm(h)[:, 0])  # type: ignore[operator]


@pytest.mark.parametrize("keep", [0.4, 0.7])
def test_the_network_equals_the_papers(keep: float) -> None:
    """Outputs do not depend on the order of tokens: three stages of the paper's own arrangement."""
    model, x = vit(), images(3)
    with vtr.apply(model, vtr.EViT(keep=keep, layers=(1, 3, 4))), torch.no_grad():
        got = model(x)
    with torch.no_grad():
        torch.testing.assert_close(got, literal(model, x, keep, (1, 3, 4)), atol=2e-4, rtol=2e-4)


def test_a_number_is_reached_geometrically() -> None:
    model = vit()
    with (
        vtr.apply(model, vtr.EViT(keep=8, layers=(1, 2, 3), fuse=False)) as handle,
        torch.no_grad(),
    ):
        model(images())
    assert [s.tokens_out for s in handle.trace.stages] == [32, 16, 8]


def test_gradients_reach_the_scores() -> None:
    s = site(n=8, layer=3, depth=12)
    q, k, _ = (t.requires_grad_() for t in s.qkv)
    got = vtr.EViT(keep=0.5).reduce(s)
    assert got is not None and got.map is not None
    got.map.merge(s.hidden, got.weights, got.normalize).sum().backward()
    assert q.grad is not None and q.grad[:, :, 0].abs().sum() > 0 and k.grad is not None


@dataclass(frozen=True)
class Uneven(vtr.CLSAttention):
    """Keeps what gets more than the mean attention: a number of each image's own."""

    def reduce(self, site: Site) -> Reduction | None:
        score = site.cls_attention()
        number = (score > score.mean(1, keepdim=True)).sum(1)
        kept, padded = top_indices(score, number)
        return Reduction(TokenMap.keep(kept, site.n, padded))


@pytest.mark.parametrize("keep", [0.5, (0.7, 5), 6])
def test_a_rate_is_of_the_samples_own_tokens(keep: Any) -> None:
    model, x = vit(), images(4)
    chain = [Uneven(layers=(0,)), vtr.EViT(keep=keep, layers=(2, 4), fuse=False)]
    with vtr.apply(model, chain) as handle, torch.no_grad():
        together, numbers = model(x), []
        assert handle.trace.stages[0].map.has_padding
        valid = handle.trace.stages[-1].total.valid.sum(1).tolist()
        for b in range(4):
            torch.testing.assert_close(
                model(x[b : b + 1]), together[b : b + 1], atol=1e-4, rtol=1e-4
            )
            numbers.append(handle.trace.stages[-1].tokens_out)
    assert numbers == valid
    fusing = [chain[0], vtr.EViT(keep=0.5, layers=(2,))]
    with vtr.apply(model, fusing), pytest.raises(ValueError, match="different numbers of tokens"):
        model(x)
