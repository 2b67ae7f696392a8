"""FlexPrefill against its definition in loops, planted structures, and its ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import vtr
from tests.methods.prefill_sites import (
    allowed,
    attention,
    attention_site,
    fewest,
    live_blocks,
    tensors,
    turning,
    weights,
    widened,
)


def js(p, q):
    total = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        total += a * math.log(a / middle) / 2 if a else 0.0
        total += b * math.log(b / middle) / 2 if b else 0.0
    return math.sqrt(max(total, 0.0))


def softmax(x):
    weight = np.exp(x - x.max())
    return weight / weight.sum()


def brute_force(q, k, scale, *, gamma, tau, block, min_budget, max_budget=None, window=None):
    """The causal blocks of one head, q (L, D) and k (S, D), and the distance of both estimates."""
    length, keys = len(q), len(k)
    rows, columns, offset = -(-length // block), -(-keys // block), keys - length
    part = [slice(n * block, (n + 1) * block) for n in range(columns)]
    last = weights(q[-block:], k, scale, window)
    count = len(last)
    vertical, slash = last.mean(0), np.zeros(keys)
    for r in range(count):
        for j in range(keys):
            apart = keys - count + r - j
            if apart >= 0:
                slash[apart] += last[r, j] / count
    causal = np.zeros((length, keys), dtype=bool)
    for i in range(length):
        for j in range(keys):
            apart = offset + i - j
            causal[i, j] = apart >= 0 and (window is None or apart < window)
    size = np.array([len(k[p]) for p in part])
    means = np.array([k[p].mean(0) for p in part])

    def estimate(queries, seen):
        logits = queries.mean(0) @ means.T * scale + np.log(size)
        return softmax(np.where(seen, logits, -np.inf))

    exact = np.array([vertical[p].sum() for p in part])
    seen = live_blocks(causal[-count:], (count, block))[0]
    distance = js(estimate(q[-block:], seen), exact)
    aware = distance < tau

    least = -(-min_budget // block)
    most = columns if max_budget is None else -(-max_budget // block)

    def best(mass):
        number = min(max(len(fewest(mass, gamma)) // block + 1, least), most)
        sums = np.array([mass[p].sum() for p in part])
        return np.argsort(-sums, kind="stable")[: least if aware else number]

    keep = np.zeros((length, keys), dtype=bool)
    for block_index in best(vertical):
        keep[:, part[block_index]] = True
    for group in best(slash):
        for i in range(length):
            for apart in range(keys)[part[group]]:
                if offset + i - apart >= 0:
                    keep[i, offset + i - apart] = True
    found = live_blocks(keep, (block, block))
    if aware:
        live = live_blocks(causal, (block, block))
        share = np.stack([
            estimate(q[n * block : (n + 1) * block], live[n]) for n in range(rows)
        ])  # fmt: skip
        found.flat[fewest(share.flatten(), gamma)] = True
    return found & live_blocks(causal, (block, block)), distance


def blocks_of(method, q, k, window=None):
    site = attention_site(q, k, torch.zeros_like(k), window=window)
    found = method.blocks(site)
    seen = allowed(site.valid, q.shape[2], window)[0].numpy()
    return found & torch.from_numpy(live_blocks(seen, method.sides)), site


@pytest.mark.parametrize(
    ("length", "keys", "block", "window"),
    [
        (300, 300, 32, None),
        (300, 300, 16, None),
        (131, 300, 32, None),
        (300, 300, 32, 150),
        (20, 300, 16, None),
    ],
)
def test_blocks_are_those_of_the_paper(length, keys, block, window):
    q, k, _ = tensors(length, keys, heads=4, key_heads=2, sharp=3.0)
    q[:, ::2] *= 0.1  # flat heads, whose pooled estimate is right
    scale = q.shape[-1] ** -0.5
    options = {"gamma": 0.63, "min_budget": 40, "block": block}

    def expected(head, tau):
        mine = q[0, head].numpy(), k[0, head // 2].numpy(), scale
        return brute_force(*mine, tau=tau, window=window, **options)

    far = sorted(expected(head, 0.0)[1] for head in range(4))
    tau = (far[1] + far[2]) / 2  # two heads are query-aware
    found, _ = blocks_of(vtr.FlexPrefill(tau=tau, **options), q, k, window)
    for head in range(4):
        blocks = expected(head, tau)[0]
        np.testing.assert_array_equal(found[0, head].numpy(), blocks)
    assert not blocks.all()


def planted(kind, length=300, dim=16):
    """q and k of one head in which all rows look at key 77, at the key 100 back, or the last at key 5."""
    q, k, _ = tensors(length, heads=1, dim=dim, seed=3)
    q, k = q * 0.1, k * 0.1
    if kind == "column":
        k[..., 77, 0], q[..., 0] = 40.0, 4.0
    elif kind == "diagonal":
        return turning(length, 100, dim)
    else:
        k[..., 5, 0], q[..., -1, 0] = 100.0, 100.0
    return q, k


@pytest.mark.parametrize("tau", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["column", "diagonal", "far"])
def test_planted_structures_are_kept(kind, tau):
    q, k = planted(kind)
    method = vtr.FlexPrefill(0.8, tau=tau, min_budget=1, block=16)
    found, _ = blocks_of(method, q, k)
    tokens = widened(found, 300, 300, (16, 16))[0, 0]
    if kind == "column":
        assert bool(tokens[77:, 77].all())
    elif kind == "diagonal":
        assert bool(tokens.diagonal(-100).all())
    else:
        assert bool(tokens[299, 5])
    assert kind == "far" or found.float().mean() < 0.45


def test_a_uniform_map_is_kept_up_to_the_budget():
    q, k = torch.zeros(1, 1, 320, 16), torch.zeros(1, 1, 320, 16)
    found, _ = blocks_of(vtr.FlexPrefill(0.5, min_budget=16, block=16), q, k)
    # Query-aware: half of the pairs of blocks by share, the first block and the nearest distances.
    assert 0.3 < found.sum() / (20 * 21 / 2) < 0.8
    whole, _ = blocks_of(vtr.FlexPrefill(0.999, min_budget=16, block=16), q, k)
    assert bool(whole.tril().sum() == 20 * 21 / 2)


def test_probabilities_that_underflow_give_no_nan():
    """A gap of 110 logits: exp(-110) is 0 in float32, and the head still is query-aware."""
    q, k = torch.zeros(1, 1, 300, 16), torch.zeros(1, 1, 300, 16)
    q[..., 0] = 440.0
    k[..., :16, 0] = 1.0  # a whole block, so that its mean is as large: logits 110 and 0
    method = vtr.FlexPrefill(0.9, min_budget=16, block=16)
    found, site = blocks_of(method, q, k)
    expected, distance = brute_force(
        q[0, 0].double().numpy(), k[0, 0].double().numpy(), site.scale,
        gamma=0.9, tau=0.1, min_budget=16, block=16,
    )  # fmt: skip
    assert distance < 0.1
    np.testing.assert_array_equal(found[0, 0].numpy(), expected)
    assert bool(torch.isfinite(method.attend(site)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gamma_one_is_dense(dtype):
    q, k, v = (x.to(dtype) for x in tensors(190, 210, batch=2, heads=4, key_heads=2))
    valid = torch.ones(2, 210, dtype=torch.bool)
    valid[0, :30] = False
    image = torch.zeros(2, 210, dtype=torch.int64)
    image[:, 200:] = -1
    site = attention_site(q, k, v, valid=valid, image=image)
    out = vtr.FlexPrefill(1.0, min_budget=16, block=16, last_rows=1).attend(site)
    expected = attention(q, k, v, allowed(valid, 190)[:, None], site.scale)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(out.float(), expected.float(), atol=tolerance, rtol=tolerance)


def test_the_output_is_attention_under_the_blocks():
    q, k, v = tensors(300, heads=4, key_heads=2, sharp=3.0)
    method = vtr.FlexPrefill(0.5, min_budget=16, block=32, last_rows=8)
    site = attention_site(q, k, v)
    found = method.blocks(site)
    always = torch.eye(10, dtype=torch.bool)
    always[:, 0] = True
    seen = widened(found | always, 300, 300, (32, 32)).clone()
    seen[:, :, -8:] = True
    expected = attention(q, k, v, seen & allowed(site.valid, 300)[:, None], site.scale)
    torch.testing.assert_close(method.attend(site), expected, atol=1e-5, rtol=1e-5)
    assert site.notes["spent"] > 0


@pytest.mark.parametrize(
    "method",
    [
        vtr.FlexPrefill(0.5, tau=0.5, min_budget=16, block=16),
        vtr.MInference(0.2, 0.2, block=16),
        vtr.XAttention(0.5, stride=4, block=16),
    ],
)
def test_gradients_flow_through_the_blocks(method):
    """Finding the blocks is outside of the graph; attention over them is inside."""
    q, k, v = (x.requires_grad_() for x in tensors(120, heads=4, key_heads=2))
    site = attention_site(q, k, v)
    assert not method.blocks(site).requires_grad
    method.attend(site).sum().backward()
    assert all(bool(torch.isfinite(x.grad).all()) and bool(x.grad.any()) for x in (q, k, v))


def test_short_prompts_are_dense():
    q, k, v = tensors(512)
    assert vtr.FlexPrefill().blocks(attention_site(q, k, v)) is None
    q, k, v = tensors(513)
    assert vtr.FlexPrefill().blocks(attention_site(q, k, v)) is not None


def test_max_budget_bounds_both_parts():
    q, k, _ = tensors(320, sharp=0.1)
    q, k = q[:, :1], k[:, :1]
    free, _ = blocks_of(vtr.FlexPrefill(0.95, tau=0, min_budget=16, block=16), q, k)
    tight, _ = blocks_of(vtr.FlexPrefill(0.95, tau=0, min_budget=16, max_budget=32, block=16), q, k)
    assert tight.sum() < free.sum()
    # Two key blocks, and two groups of distances, each on two diagonals of blocks.
    assert int(tight[0, 0, -1].sum()) <= 2 + 2 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "gamma must be in"),
        ({"tau": 1.5}, "tau must be"),
        ({"min_budget": 0}, "min_budget must be"),
        ({"max_budget": 100}, "max_budget must be an int >= 512 or None"),
        ({"max_budget": 0.5}, "max_budget must be"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        vtr.FlexPrefill(**options)
