"""SVG2: k-means, choice of clusters and attention, against loops over heads and tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.methods.sites import TOLERANCE, Run, attention, tensors, visible
from vtr.methods import SVG2
from vtr.methods.common.clustered import densest_clusters, lay_out
from vtr.methods.common.k_means import Clusters, euclidean_k_means

GRID = (3, 4, 5)
FEW = {"query_clusters": 5, "key_clusters": 9, "block": 16, "key_block": 16, "rounds": 4}


def slow_k_means(x, centres, rounds):
    """Labels and centres of one head: lists of Python floats, float64."""
    x, centres = x.detach().double(), [c.detach().double() for c in centres]
    for _ in range(rounds):
        label = []
        for token in x:
            apart = [float((token - c).square().sum()) for c in centres]
            label.append(apart.index(min(apart)))
        for c in range(len(centres)):
            own = [i for i, n in enumerate(label) if n == c]
            if own:
                centres[c] = sum(x[i] for i in own) / len(own)
    return label, centres


def spaced(x, number):
    return [x[n * len(x) // number] for n in range(number)]


def slow_choice(queries, keys, scale, p, least):
    """Which clusters of keys each cluster of queries sees, by the paper's rule."""
    labels, centres = keys
    sizes = [labels.count(d) for d in range(len(centres))]
    seen = []
    for c in queries[1]:
        weight = [n * math.exp(scale * float(c @ d)) for n, d in zip(sizes, centres, strict=True)]
        share = [w / sum(weight) for w in weight]
        falling = sorted(range(len(share)), key=lambda d: -share[d])
        kept, running = [], 0.0
        for d in falling:
            if running > p and len(kept) >= int(least * len(share)):
                break
            kept.append(d)
            running += share[d]
        seen.append(set(kept))
    return seen


def brute_force(method, qkv, grid, text=0, text_first=False, text_valid=None, centres=None):
    """The output, the share of pairs that is seen, and the centres by (sample, head), of one step."""
    q, k, v = qkv
    tokens, scale, group = torch.Size(grid).numel(), q.shape[3] ** -0.5, q.shape[1] // k.shape[1]
    first = text if text_first else 0
    words = list(range(text)) if text_first else list(range(tokens, tokens + text))
    mask = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    mask[:, :, words] = True
    mask[..., words] = True
    kept = {}
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            own = []
            for name, x, number in (
                ("q", q[b, h], method.query_clusters),
                ("k", k[b, h // group], method.key_clusters),
            ):
                x = x[first : first + tokens]
                start, rounds = spaced(x, min(number, tokens)), method.rounds
                if centres is not None:
                    start, rounds = centres[name, b, h], method.later_rounds
                own.append(slow_k_means(x, start, rounds))
                kept[name, b, h] = own[-1][1]
            seen = slow_choice(*own, scale, method.p, method.least)
            for i in range(tokens):
                for j in range(tokens):
                    mask[b, h, first + i, first + j] = own[1][0][j] in seen[own[0][0][i]]
    density = float(mask.float().mean())
    mask &= visible(grid, text, text_first, text_valid, q.shape[0])[:, None, None]
    return attention(q, k, v, mask, scale)[0], density, kept


def padded(text):
    valid = torch.ones(2, text, dtype=torch.bool)
    valid[0, 3:], valid[1, 0] = False, False
    return valid


CASES = {
    "video only": {},
    "text last": {"text": 7},
    "text first, padded": {"text": 21, "text_first": True, "text_valid": padded(21)},
    "text last, padded": {"text": 18, "text_valid": padded(18)},
    "fewer keys": {"text": 5, "key_heads": 1},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("p", [0.3, 0.8])
def test_equals_the_loops_over_steps(case, p):
    case = dict(case)
    key_heads = case.pop("key_heads", None)
    method = SVG2(p, least=0.25, later_rounds=1, **FEW)
    run, centres = Run(method, GRID, **case), None
    for step in range(2):
        qkv = tensors(GRID, case.get("text", 0), key_heads=key_heads, seed=step // 2)
        out = run(qkv, step)
        expected, density, centres = brute_force(method, qkv, GRID, **case, centres=centres)
        valid = visible(
            GRID, case.get("text", 0), case.get("text_first", False), case.get("text_valid"), 2
        )
        rows = valid[:, None, :, None]
        torch.testing.assert_close(out.double() * rows, expected * rows, atol=1e-5, rtol=1e-5)
        assert float(run.notes["density"]) == pytest.approx(density)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes_and_singles(dtype):
    method = SVG2(0.6, **FEW)
    qkv = tensors(GRID, 6, dtype=dtype)
    out = Run(method, GRID, 6)(qkv)
    assert out.dtype == dtype
    expected = brute_force(method, qkv, GRID, 6)[0]
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for b in range(2):
        alone = Run(method, GRID, 6)([t[b : b + 1] for t in qkv])
        torch.testing.assert_close(alone[0], out[b])


def test_identical_tokens_are_clusters_and_the_choice_is_that_of_the_dense_map():
    """Four kinds of queries and six of keys, scattered: the estimate is exact."""
    tokens, grid = 48, (3, 4, 4)
    g = torch.Generator().manual_seed(3)
    kinds_q, kinds_k = (
        torch.randn(1, 1, 4, 16, generator=g) * 2,
        torch.randn(1, 1, 6, 16, generator=g),
    )
    at_q, at_k = torch.randperm(tokens, generator=g) % 4, torch.randperm(tokens, generator=g) % 6
    q, k, v = kinds_q[:, :, at_q], kinds_k[:, :, at_k], torch.randn(1, 1, tokens, 16, generator=g)
    method = SVG2(0.7, query_clusters=24, key_clusters=24, block=16, key_block=16, least=0.0)
    out = Run(method, grid)([q, k, v])
    dense = torch.softmax(q.double() @ k.double().mT / 4, -1)[0, 0]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        mass = [float(dense[i, at_k == d].sum()) for d in range(6)]
        falling, running = sorted(range(6), key=lambda d: -mass[d]), 0.0
        for d in falling:
            if running > 0.7:
                break
            mask[i, at_k == d] = True
            running += mass[d]
    assert 0.1 < mask.float().mean() < 0.9
    expected, _ = attention(q, k, v, mask, 0.25)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_order_of_tokens_does_not_matter_under_known_centres():
    method = SVG2(0.5, **FEW)
    qkv = tensors(GRID)
    first, second = Run(method, GRID), Run(method, GRID)
    first(qkv)
    second.state = dict(first.state)
    order = torch.randperm(60)
    moved = tensors(GRID, seed=1)
    out = first(moved, 1)
    other = second([t[:, :, order] for t in moved], 1)
    torch.testing.assert_close(other, out[:, :, order])


def test_everything_is_dense_and_reduced_work_is_counted():
    qkv = tensors(GRID, 7)
    seen = torch.ones(67, 67, dtype=torch.bool)
    expected, _ = attention(*qkv, seen, 0.25)
    for method in (SVG2(1.0, **FEW), SVG2(density=1.0, **FEW)):
        run = Run(method, GRID, 7)
        torch.testing.assert_close(run(qkv).double(), expected, atol=1e-5, rtol=1e-5)
        assert float(run.notes["density"]) == 1
        assert float(run.notes["work"]) > 1  # empty places are work


def test_layout_gives_each_cluster_whole_blocks():
    label = torch.randint(0, 6, (2, 3, 50), generator=torch.Generator().manual_seed(1))
    label[0, 0] = 5
    sizes = torch.stack([(label == c).sum(-1) for c in range(6)], -1)
    places = lay_out(Clusters(label, torch.zeros(2, 3, 6, 4), sizes), 16)
    for b in range(2):
        for h in range(3):
            back, cluster = places.back[b, h], places.cluster[b, h]
            assert len(set(back.tolist())) == 50
            assert torch.equal(cluster[back // 16], label[b, h])
            assert torch.equal(places.order[b, h][back], torch.arange(50))
            inside = torch.zeros(cluster.numel() * 16, dtype=torch.int64)
            inside[back] = 1
            expected = torch.arange(16) < places.filled[b, h, :, None]
            assert torch.equal(inside.view(-1, 16).bool(), expected)
            assert int((places.filled[b, h] > 0).sum()) == int((-(-sizes[b, h] // 16)).sum())


def test_budget_by_tokens():
    shares = torch.tensor([0.05, 0.5, 0.15, 0.3])
    sizes = torch.tensor([10, 60, 10, 20])  # per key: .005, .0083, .015, .015
    one = densest_clusters(shares[None], sizes, 0.3)[0]
    assert one.tolist() == [False, False, True, True]
    assert densest_clusters(shares[None], sizes, 0.01)[0].tolist() == [False, False, True, False]
    assert densest_clusters(shares[None], sizes, 1.0).all()


def test_k_means_in_parts_and_with_empty_clusters(monkeypatch):
    from vtr.methods.common import k_means as module

    x = torch.randn(2, 3, 40, 5)
    start = torch.cat([x[:, :, :4], torch.full((2, 3, 1, 5), 1e3)], 2)
    found = euclidean_k_means(x, start, 3)
    for b in range(2):
        for h in range(3):
            label, centres = slow_k_means(x[b, h], start[b, h], 3)
            assert found.label[b, h].tolist() == label
            torch.testing.assert_close(found.centres[b, h].double(), torch.stack(centres))
    assert not found.sizes[..., 4].any() and (found.centres[:, :, 4] == 1e3).all()
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    again = euclidean_k_means(x, start, 3)
    assert torch.equal(again.label, found.label)
    torch.testing.assert_close(again.centres, found.centres)
    assert euclidean_k_means(x, 40, 1).label.equal(torch.arange(40).expand(2, 3, -1))


def test_guidance_that_is_switched_off_starts_anew():
    method = SVG2(0.5, **FEW)
    qkv = tensors(GRID)
    run = Run(method, GRID)
    run(qkv)
    half = [t[1:] for t in qkv]
    torch.testing.assert_close(run(half, 1), Run(method, GRID)(half))
    assert run.state["q"].shape[0] == 1


def test_training_keeps_nothing_and_has_gradients():
    method = SVG2(0.6, **FEW)
    qkv = [t.requires_grad_() for t in tensors(GRID, 6)]
    run = Run(method, GRID, 6)
    site = run.site(qkv, training=True)
    out = method.attend(site)
    assert not run.state
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    own = [t.detach().double().requires_grad_() for t in qkv]
    expected = brute_force(method, own, GRID, 6)[0]
    (expected * weight).sum().backward()
    for got, wanted in zip(qkv, own, strict=True):
        torch.testing.assert_close(got.grad.double(), wanted.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0}, r"p must be in \(0, 1\], got 0"),
        ({"density": 2}, r"density must be in \(0, 1\], got 2"),
        ({"least": -0.1}, "least must be a number from 0 to 1, got -0.1"),
        ({"query_clusters": 0}, "query_clusters must be an int >= 1, got 0"),
        ({"key_clusters": 1.5}, "key_clusters must be an int >= 1, got 1.5"),
        ({"rounds": 0}, "rounds must be an int >= 1"),
        ({"later_rounds": 0}, "later_rounds must be an int >= 1"),
        ({"key_block": 8}, "key_block must be 16, 32, 64 or 128 tokens, got 8"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SVG2(**options)
