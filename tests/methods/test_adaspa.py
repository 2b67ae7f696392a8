"""AdaSpa against the dense map written out, in loops over rows, heads and steps in float64."""

from __future__ import annotations

import pytest
import torch

from tests.methods.sites import TOLERANCE, Run, attention, tensors, visible
from vtr.kernels.masks.budgets import top_k_by_recall
from vtr.kernels.masks.schedule import at_steps, steps_due
from vtr.methods import AdaSpa

GRID = (3, 5, 5)  # 75 tokens: four blocks of 16 and a shorter one


def slow_groups(mass, density, recall):
    """(H, NQ, NK) bool of one sample, by the rule of the paper."""
    heads, rows, total = mass.shape
    order = [[sorted(range(total), key=lambda c: -float(mass[h, r, c])) for r in range(rows)]
             for h in range(heads)]  # fmt: skip

    def keep(h, number):
        kept = torch.zeros(rows, total, dtype=torch.bool)
        for r in range(rows):
            kept[r, order[h][r][:number]] = True
        return kept

    def number(d):
        return max(1, round(round(d * total, 9)))

    share = [
        float((mass[h] * keep(h, number(density))).sum() / mass[h].sum()) for h in range(heads)
    ]
    n = min(sum(s > recall for s in share), heads // 2)
    best = sorted(range(heads), key=lambda h: -share[h])
    step = min(density / 2, 1 - density)
    out = []
    for h in range(heads):
        d = density
        if h in best[:n]:
            d -= step
        elif h in best[heads - n :]:
            d += step
        out.append(keep(h, number(d)))
    return torch.stack(out)


def brute_force(q, k, grid, lse, method, first):
    """(B, H, N, N) bool over the grid's tokens, from the map under an LSE (B, H, S)."""
    tokens, group, block = torch.Size(grid).numel(), q.shape[1] // k.shape[1], method.block
    blocks = -(-tokens // block)
    mask = torch.zeros(*q.shape[:2], tokens, tokens, dtype=torch.bool)
    for b in range(q.shape[0]):
        mass = torch.zeros(q.shape[1], blocks, blocks, dtype=torch.float64)
        for h in range(q.shape[1]):
            rows, columns = (
                t[first : first + tokens].double() for t in (q[b, h], k[b, h // group])
            )
            own = lse[b, h, first : first + tokens].double()
            weights = torch.exp(rows @ columns.T * q.shape[3] ** -0.5 - own[:, None])
            for i in range(tokens):
                for j in range(tokens):
                    mass[h, i // block, j // block] += weights[i, j]
        kept = slow_groups(mass, method.density, method.recall)
        at = torch.arange(tokens) // block
        mask[b] = kept[:, at][:, :, at]
    return mask


def around(mask, text, text_first, text_valid, batch):
    """The mask with text, dense both ways, and without its padding."""
    tokens = mask.shape[-1]
    whole = torch.ones(batch, mask.shape[1], tokens + text, tokens + text, dtype=torch.bool)
    first = text if text_first else 0
    whole[:, :, first : first + tokens, first : first + tokens] = mask
    grid = (1, 1, tokens)
    return whole & visible(grid, text, text_first, text_valid, batch)[:, None, None]


def padded(text):
    valid = torch.ones(2, text, dtype=torch.bool)
    valid[0, 3:], valid[1, 0] = False, False
    return valid


CASES = {
    "video only": {},
    "text last": {"text": 7},
    "text first, padded": {"text": 21, "text_first": True, "text_valid": padded(21)},
    "text last, padded": {"text": 18, "text_valid": padded(18)},
    "fewer keys": {"text": 5, "key_heads": 2},
}


def sharp(case, seed, heads=4):
    """Heads whose attention is in few tokens, and heads in which it is not."""
    q, k, v = tensors(
        GRID, case.get("text", 0), heads=heads, key_heads=case.get("key_heads"), seed=seed
    )
    return [q * torch.tensor([4.0, 0.5, 2.0, 1.0])[:heads, None, None], k, v]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_loops_over_a_run(case):
    """Dense, search, reuse, search under the old LSE, reuse."""
    text, key = case.get("text", 0), {k: v for k, v in case.items() if k != "key_heads"}
    first = text if case.get("text_first") else 0
    method = AdaSpa(0.4, search=(1, 3), recall=0.5, block=16)
    run, sparse = Run(method, GRID, **key, steps=5), None
    lse = mask = None
    everything = torch.ones(1, 1, 75, 75, dtype=torch.bool)
    seen = around(everything, text, case.get("text_first"), case.get("text_valid"), 2)
    valid = visible(GRID, text, case.get("text_first"), case.get("text_valid"), 2)[:, None, :, None]
    for step in range(5):
        q, k, v = sharp(case, step)
        out = run((q, k, v), step)
        expected, whole = attention(q, k, v, seen, 0.25)
        if step == 1:
            lse = whole
        if step in (1, 3):
            grid = brute_force(q, k, GRID, lse, method, first)
            assert grid.float().mean((2, 3)).unique().numel() > 1, "heads with different budgets"
            mask = around(grid, text, case.get("text_first"), case.get("text_valid"), 2)
        if step > 1:
            expected, _ = attention(q, k, v, mask, 0.25)
        torch.testing.assert_close(out.double() * valid, expected * valid, atol=1e-5, rtol=1e-5)
        density = float(run.notes["density"])
        assert density == 1 if step < 2 else density < 1
        sparse = sparse or step > 1
    assert sparse and run.state["searches"] == 2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes_and_singles(dtype):
    method = AdaSpa(0.4, search=(0,), block=16)
    runs = [Run(method, GRID, 6) for _ in range(3)]
    for step in range(2):
        qkv = [t.to(dtype) for t in sharp({"text": 6}, step)]
        out = runs[0](qkv, step)
        assert out.dtype == dtype
        for b in range(2):
            alone = runs[1 + b]([t[b : b + 1] for t in qkv], step)
            torch.testing.assert_close(
                alone[0], out[b], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
            )


@pytest.mark.parametrize(
    ("density", "recall"), [(0.2, 0.5), (0.5, 0.6), (0.8, 0.9), (1.0, 0.8), (0.4, 1.0)]
)
def test_head_groups(density, recall):
    mass = (
        torch.rand(3, 5, 4, 10, dtype=torch.float64)
        ** torch.tensor([1, 2, 4, 8, 16])[:, None, None]
    )
    got = top_k_by_recall(mass, density, recall)
    for b in range(3):
        assert torch.equal(got[b], slow_groups(mass[b], density, recall))
    counts = got.sum(-1)
    assert (counts == counts[:, :, :1]).all(), "the same number in every row of a head"
    assert counts.float().mean().item() == pytest.approx(density * 10)  # in every sample
    assert got.all() if density == 1 else not got.all()
    if recall == 1:
        assert (counts == 4).all()


def test_one_head_and_a_map_without_mass():
    assert top_k_by_recall(torch.rand(2, 1, 3, 8), 0.25).sum(-1).eq(2).all()
    assert top_k_by_recall(torch.zeros(2, 2, 3, 8), 0.25).sum(-1).eq(2).all()


def test_a_search_that_a_cache_has_skipped_comes_later():
    method = AdaSpa(0.4, search=(0, 3), block=16)
    run = Run(method, GRID)
    for step, searches in ((0, 1), (2, 1), (5, 2), (6, 2)):
        run(tensors(GRID, seed=step), step)
        assert run.state["searches"] == searches
    late = Run(method, GRID)  # such as the second expert of Wan 2.2
    late(tensors(GRID), 7)
    assert late.state["searches"] == 2 and float(late.notes["density"]) == 1


def test_guidance_that_is_switched_off_searches_anew():
    method = AdaSpa(0.4, search=(0,), block=16)
    run = Run(method, GRID)
    run(tensors(GRID), 0)
    half = [t[1:] for t in tensors(GRID, seed=1)]
    expected, _ = attention(*half, torch.ones(75, 75, dtype=torch.bool), 0.25)
    torch.testing.assert_close(run(half, 1).double(), expected, atol=1e-5, rtol=1e-5)
    run([t[1:] for t in tensors(GRID, seed=2)], 2)
    assert float(run.notes["density"]) < 1


def test_training_searches_in_every_call_and_keeps_nothing():
    method = AdaSpa(0.4, recall=0.5, block=16)
    qkv = [t.requires_grad_() for t in sharp({"text": 6}, 0)]
    run = Run(method, GRID, 6)
    out = method.attend(run.site(qkv, training=True))
    assert not run.state
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    own = [t.detach().double().requires_grad_() for t in qkv]
    everything = torch.ones(81, 81, dtype=torch.bool)
    lse = attention(*own, everything, 0.25)[1].detach()
    grid = brute_force(own[0].detach(), own[1].detach(), GRID, lse, method, 0)
    expected, _ = attention(*own, around(grid, 6, False, None, 2), 0.25)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    (expected * weight).sum().backward()
    for got, wanted in zip(qkv, own, strict=True):
        torch.testing.assert_close(got.grad.double(), wanted.grad, atol=1e-5, rtol=1e-4)


def test_steps_of_a_search():
    assert [s for s in range(50) if at_steps(s, 50, (0.2, 0.6))] == [10, 30]
    assert [steps_due(s, 50, (0.2, 0.6)) for s in (9, 10, 29, 30, 49)] == [0, 1, 1, 2, 2]
    assert steps_due(4, None, (0, 3)) == 2
    run = Run(AdaSpa(block=16), GRID, steps=None)
    with pytest.raises(
        RuntimeError, match=r"0\.2 is a share of the steps.*vtr\.apply\(\.\.\., steps=50\)"
    ):
        run(tensors(GRID))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"density must be in \(0, 1\], got 0"),
        ({"recall": 1.5}, r"recall must be in \(0, 1\], got 1.5"),
        ({"search": ()}, r"search must be steps in rising order .*got \(\)"),
        ({"search": (3, 1)}, "search must be steps in rising order"),
        ({"search": (1.5,)}, "search must be steps in rising order"),
        ({"search": 3}, "search must be steps in rising order .*got 3"),
    ],
)  # fmt: skip
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        AdaSpa(**options)


def test_some_of_the_heads_cannot_exchange_blocks():
    """Under context parallelism a process computes some heads of a layer."""
    method = AdaSpa(0.4, search=(0,), block=16)
    site = Run(method, GRID).site(tensors(GRID))
    site.all_heads = 2 * site.q.shape[1]
    with pytest.raises(RuntimeError, match=r"moves blocks from heads to others.*recall=1"):
        method.attend(site)
    method.replace(recall=1.0).attend(site)
