"""ToMe against the described algorithm (arXiv 2210.09461, section 3), token by token, in paper order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtr
from tests.tiny import images, site, vit
from vtr.methods.common.matching import bipartite_soft_matching

Groups = list[list[int]]


def match(metric: Tensor, r: int, prefix: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Pairs (source, destination) and the order of what is left, for a sequence (T, D) as it stands.

    Positions 0, 2, 4... are A, 1, 3, 5... are B. The class token (position 0) is never a source, the
    distillation token (position 1) never a destination.
    """
    metric = metric.double()
    metric = metric / metric.norm(dim=1, keepdim=True)
    tokens = metric.shape[0]
    a, b = list(range(0, tokens, 2)), list(range(1, tokens, 2))
    best: list[tuple[float, int]] = []
    for i in a:
        choice = [-math.inf if prefix > 1 and j == 1 else float(metric[i] @ metric[j]) for j in b]
        top = max(range(len(b)), key=lambda m: (choice[m], -m))
        best.append((-math.inf if prefix > 0 and i == 0 else choice[top], b[top]))
    r = min(r, (tokens - prefix) // 2)
    rank = sorted(range(len(a)), key=lambda m: (-best[m][0], m))
    moved, stay = rank[:r], rank[r:]
    if prefix > 0:
        stay = sorted(stay)
    pairs = [(a[m], best[m][1]) for m in moved]
    rest = [a[m] for m in stay]
    if prefix > 1:  # class token, distillation token, rest of A, rest of B
        return pairs, [rest[0], b[0], *rest[1:], *b[1:]]
    return pairs, [*rest, *b]


def literal(
    model: Any, x: Tensor, schedule: tuple[int, ...], prop_attn: bool
) -> tuple[Groups, Tensor, Tensor]:
    """One image through the network in paper order: members, features and sizes of what is left."""
    h = model._pos_embed(model.patch_embed(x))[0]
    prefix = model.num_prefix_tokens
    groups: Groups = [[t] for t in range(h.shape[0])]
    size = torch.ones(h.shape[0])
    for block, r in zip(model.blocks, schedule, strict=True):
        normed = block.norm1(h)
        tokens, width = normed.shape
        q, k, v = block.attn.qkv(normed).reshape(tokens, 3, 3, -1).permute(1, 2, 0, 3)
        logits = q @ k.transpose(-1, -2) * (width // 3) ** -0.5
        if prop_attn:
            logits = logits + size.log()
        h = h + block.attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(tokens, width))
        pairs, order = match(k.mean(0), r, prefix)
        if pairs:
            total, weight, members = h * size[:, None], size.clone(), [list(g) for g in groups]
            for source, target in pairs:
                total[target] += h[source] * size[source]
                weight[target] += size[source]
                members[target] += groups[source]
            h = (total / weight[:, None])[order]
            size, groups = weight[order], [sorted(members[i]) for i in order]
        h = h + block.mlp(block.norm2(h))
    return groups, h, size


MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "class and distillation token": {"reg_tokens": 1},
    "no prefix": {"class_token": False, "global_pool": "avg"},
    "odd number of tokens": {"img_size": 56},
}


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("r", [5, (9, 0, 7, 2, 0, 4), 30])
def test_groups_and_features_of_the_paper(kind: str, prop_attn: bool, r: Any) -> None:
    model = vit(**MODELS[kind])
    x = images(2, size=MODELS[kind].get("img_size", 64))
    method = vtr.ToMe(r=r, prop_attn=prop_attn)
    with vtr.apply(model, method) as handle, torch.no_grad():
        got = model.forward_features(x)
        total = handle.trace.stages[-1].total
    prefix, n = model.num_prefix_tokens, total.n_in
    for b in range(2):
        with torch.no_grad():
            groups, h, size = literal(model, x[b : b + 1], method.schedule(6, n), prop_attn)
            h = model.norm(h)
        expected = {tuple(t - prefix for t in g): i for i, g in enumerate(groups) if g[0] >= prefix}
        mine = {
            tuple(j for j in range(n) if total.source[b, j] == slot): slot
            for slot in range(total.n_out)
        }
        assert set(mine) == set(expected)
        for group, slot in mine.items():
            i = expected[group]
            assert total.size[b, slot] == size[i] == len(group)
            torch.testing.assert_close(got[b, prefix + slot], h[i], atol=3e-4, rtol=3e-4)
        torch.testing.assert_close(got[b, :prefix], h[:prefix], atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("prop_attn", [True, False])
def test_the_mean_counts_tokens_by_size(prop_attn: bool) -> None:
    """As in the authors' patch of MAE models: the sum of size times feature, over the tokens of the input."""
    model, x = vit(global_pool="avg"), images(2)
    with vtr.apply(model, vtr.ToMe(r=7, prop_attn=prop_attn)), torch.no_grad():
        got = model(x)
    for b in range(2):
        with torch.no_grad():
            _, h, size = literal(model, x[b : b + 1], (7,) * 6, prop_attn)
            mean = (h * size[:, None])[1:].sum(0) / 64
            expected = model.head(model.fc_norm(mean))
        torch.testing.assert_close(got[b], expected, atol=3e-4, rtol=3e-4)


@given(
    st.integers(2, 25), st.integers(0, 14), st.integers(0, 3), st.integers(0, 999), st.booleans()
)
def test_matching(n: int, r: int, prefix: int, seed: int, shuffled: bool) -> None:
    """The matching alone, also over a sequence whose order is no longer the raster."""
    g = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, n, 4, generator=g)
    order = torch.stack([torch.randperm(n, generator=g) for _ in range(2)]) if shuffled else None
    r = min(r, n // 2)
    if prefix == 3:
        return  # registers behind the class token do not exist in the paper
    step, after = bipartite_soft_matching(metric, r, order, prefix)
    for b in range(2):
        now = list(range(n)) if order is None else order[b].tolist()
        # Prefix tokens in front shift the alternation; being protected, they take no part.
        front = torch.randn(prefix, 4, generator=g)
        whole = torch.cat([front, metric[b, now]])
        pairs, left = match(whole, r, prefix) if _prefix_is_idle(whole, r, prefix) else (None, None)
        if pairs is None:
            continue
        where = {now[i - prefix]: now[j - prefix] for i, j in pairs}
        assert step.n_out == n - len(pairs)
        expected = [where.get(j, j) for j in range(n)]
        got = [int(step.kept[b, step.source[b, j]]) for j in range(n)]
        assert got == expected
        slots = [int(step.kept[b, s]) for s in after[b]]
        assert slots == [now[i - prefix] for i in left if i >= prefix]


def _prefix_is_idle(whole: Tensor, r: int, prefix: int) -> bool:
    """Whether no visual token picks the (unprotected) prefix token at an odd place: only with a
    distillation token the paper protects it, and with a class token alone there is none."""
    pairs, _ = match(whole, r, prefix)
    return all(j >= prefix for _, j in pairs)


def test_schedules() -> None:
    assert vtr.ToMe(r=8).schedule(3, 100) == (8, 8, 8)
    assert vtr.ToMe(r=(4, 2)).schedule(4, 100) == (4, 2, 0, 0)
    assert sum(vtr.ToMe(keep=0.25).schedule(12, 196)) == 147
    assert sum(vtr.ToMe(keep=10).schedule(7, 196)) == 186
    steps = vtr.ToMe(keep=98).schedule(7, 196)
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("inflection", "expected"),
    [(-1.0, (16, 12, 8, 4, 0)), (1.0, (0, 4, 8, 12, 16)), (0.0, (8,) * 5)],
)
def test_inflection(inflection: float, expected: tuple[int, ...]) -> None:
    """-1 falls from 2 r to 0 (the paper's decreasing schedule), 1 rises."""
    assert vtr.ToMe(r=8, inflection=inflection).schedule(5, 100) == expected


def test_token_counts_of_the_paper() -> None:
    """12 blocks from 197 tokens: r = 16 ends at 11 (the last block can only merge 10)."""
    for r, left in ((16, 11), (13, 41)):
        model = vit(img_size=112, depth=12)
        with vtr.apply(model, vtr.ToMe(r=r)) as handle, torch.no_grad():
            model(images(1, size=112))
        assert handle.trace.stages[-1].tokens_out == left - 1


def test_budget_is_reached() -> None:
    model = vit()
    for keep, left in ((0.5, 32), (0.3, 20), (9, 9)):
        with vtr.apply(model, vtr.ToMe(keep=keep)) as handle, torch.no_grad():
            model(images())
        assert handle.trace.stages[-1].tokens_out == left


@given(st.integers(1, 700), st.integers(1, 24), st.integers(1, 700))
def test_a_reachable_budget_is_reached_exactly(tokens: int, depth: int, keep: int) -> None:
    method = vtr.ToMe(keep=keep)
    if min(keep, tokens) * 2**depth < tokens:
        with pytest.raises(ValueError, match="at most half reach no fewer than"):
            method.schedule(depth, tokens)
        return
    now = tokens
    for r in method.schedule(depth, tokens):
        assert 0 <= r <= now // 2
        now -= r
    assert now == min(keep, tokens)


def test_prefix_tokens_stay() -> None:
    model = vit(reg_tokens=4)
    with vtr.apply(model, vtr.ToMe(r=40)) as handle, torch.no_grad():
        features = model.forward_features(images())
    last = handle.trace.stages[-1].total
    assert features.shape[1] == 5 + last.n_out and (last.size.sum(1) == 64).all()


def test_merged_tokens_weigh_by_size() -> None:
    size = torch.tensor([[3.0, 1, 2, 1], [1, 1, 1, 5]])
    s = site(n=4, prefix=0)
    s.map.size = size
    got = vtr.ToMe(r=(1, 0, 0, 0, 0, 0)).reduce(s)
    assert got is not None and got.map is not None
    merged = got.map.merge(s.hidden, got.weights)
    for b in range(2):
        for slot in range(3):
            members = [j for j in range(4) if got.map.source[b, j] == slot]
            w = size[b, members]
            expected = (w[:, None] * s.hidden[b, members]).sum(0) / w.sum()
            torch.testing.assert_close(merged[b, slot], expected)
