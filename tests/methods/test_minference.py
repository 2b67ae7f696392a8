"""MInference's patterns against their definitions in loops, planted lines, and tables of heads."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import vtr
from tests.methods.prefill_sites import (
    allowed,
    attention,
    attention_site,
    live_blocks,
    tensors,
    turning,
    weights,
    widened,
)


def parts(keys, block):
    return [slice(n, min(n + block, keys)) for n in range(0, keys, block)]


def brute_force(q, k, scale, *, pattern, vertical, slash, pooled=0, block=16, window=None):
    """The causal blocks of one head, q (L, D) and k (S, D); sizes in tokens."""
    length, keys = len(q), len(k)
    offset, part = keys - length, parts(keys, block)
    causal = np.zeros((length, keys), dtype=bool)
    for i in range(length):
        for j in range(keys):
            apart = offset + i - j
            causal[i, j] = apart >= 0 and (window is None or apart < window)
    live = live_blocks(causal, (block, block))
    if pattern == "block-sparse":
        found = np.zeros_like(live)
        for n in range(len(found)):
            logits = (
                q[n * block : (n + 1) * block].mean(0) @ np.array([k[p].mean(0) for p in part]).T
            )
            logits = logits * scale + np.log([len(k[p]) for p in part])
            logits[~live[n]] = -np.inf
            found[n, np.argsort(-logits, kind="stable")[: math.ceil(pooled / block)]] = True
        return found & live
    keep = np.zeros_like(causal)
    if pattern == "a-shape":
        columns, groups = (range(math.ceil(size / block)) for size in (vertical, slash))
    else:
        last = weights(q[-64:], k, scale, window)
        sums, distances = last.sum(0), np.zeros(keys)
        for r in range(len(last)):
            for j in range(keys - len(last) + r + 1):
                distances[keys - len(last) + r - j] += last[r, j]
        sums[:30] = distances[:100] = np.inf
        columns, groups = (
            np.argsort([-mass[p].sum() for p in part], kind="stable")[: math.ceil(size / block)]
            for mass, size in ((sums, vertical), (distances, slash))
        )
    for n in columns:
        if n < len(part):
            keep[:, part[n]] = True
    for n in groups:
        for apart in range(n * block, min((n + 1) * block, keys)):
            for i in range(length):
                if offset + i - apart >= 0:
                    keep[i, offset + i - apart] = True
    return live_blocks(keep, (block, block)) & live


def blocks_of(method, q, k, **more):
    site = attention_site(q, k, torch.zeros_like(k), **more)
    found = method.blocks(site)
    seen = live_blocks(allowed(site.valid, q.shape[2], site.window)[0].numpy(), method.sides)
    return found & torch.from_numpy(seen), site


@pytest.mark.parametrize(
    ("length", "keys", "window"), [(300, 300, None), (131, 300, None), (300, 300, 170)]
)
@pytest.mark.parametrize("pattern", ["vertical-slash", "a-shape", "block-sparse"])
def test_blocks_are_those_of_the_pattern(pattern, length, keys, window):
    q, k, _ = tensors(length, keys, heads=4, key_heads=2, sharp=3.0)
    options = {"pattern": pattern, "vertical": 60, "slash": 130, "pooled": 50, "block": 16}
    found, site = blocks_of(vtr.MInference(**options), q, k, window=window)
    for head in range(4):
        mine = q[0, head].numpy(), k[0, head // 2].numpy(), site.scale
        expected = brute_force(*mine, window=window, **options)
        shown = found[0, head if found.shape[1] > 1 else 0].numpy()
        np.testing.assert_array_equal(shown, expected)
    assert not expected[-1].all()


def test_shares_count_keys():
    q, k, _ = tensors(300)
    share, _ = blocks_of(vtr.MInference(0.2, 0.5, block=16), q, k)
    number, _ = blocks_of(vtr.MInference(60, 150, block=16), q, k)
    assert torch.equal(share, number)


def test_a_hot_column_and_a_hot_diagonal_are_kept():
    q, k, _ = tensors(300, heads=1, seed=3)
    q, k = q * 0.1, k * 0.1
    k[..., 133, 0], q[..., 0] = 40.0, 4.0
    found, _ = blocks_of(vtr.MInference(64, 16, block=16), q, k)
    assert bool(widened(found, 300, 300, (16, 16))[0, 0, 133:, 133].all())

    q, k = turning(300, 150)
    found, _ = blocks_of(vtr.MInference(32, 128, block=16), q, k)
    assert bool(widened(found, 300, 300, (16, 16))[0, 0].diagonal(-150).all())
    assert found.float().mean() < 0.45


def test_a_table_gives_each_head_its_pattern():
    q, k, _ = tensors(300, heads=3, key_heads=3, sharp=3.0)
    table = [
        {"0": ["vertical_and_slash", 40, 120, 0.9], "1": ["stream_llm", 33, 70, 0.8], "2": ["block_sparse", 8, 1, 0.7]},
        {"0": ["stream_llm", 16, 16, 0.9], "1": ["stream_llm", 16, 16, 0.9], "2": ["stream_llm", 16, 16, 0.9]},
    ]  # fmt: skip
    file = json.dumps(table)
    patterns = [[h[str(i)][:3] for i in range(len(h))] for h in json.loads(file)]
    method = vtr.MInference(patterns=patterns, pooled=64, block=16)
    assert method.patterns[0][1] == ("a-shape", 33, 70)
    found, site = blocks_of(method, q, k)
    for head, (pattern, vertical, slash) in enumerate(method.patterns[0]):
        expected = brute_force(
            q[0, head].numpy(), k[0, head].numpy(), site.scale,
            pattern=pattern, vertical=vertical, slash=slash, pooled=64,
        )  # fmt: skip
        np.testing.assert_array_equal(found[0, head].numpy(), expected)
    again, _ = blocks_of(method, q, k, layer=1)
    near = brute_force(
        q[0, 0].numpy(), k[0, 0].numpy(), site.scale, pattern="a-shape", vertical=16, slash=16
    )
    assert all(np.array_equal(again[0, head].numpy(), near) for head in range(3))


def test_a_table_for_another_model_is_refused():
    q, k, v = tensors(100, heads=2)
    site = attention_site(q, k, v, layers=2)
    head = ("a-shape", 16, 16)
    with pytest.raises(ValueError, match="2 layers and 2 query heads of this model; got 1 layers"):
        vtr.MInference(patterns=[[head, head]]).blocks(site)
    with pytest.raises(ValueError, match="got 2 layers of \\[3\\] heads"):
        vtr.MInference(patterns=[[head] * 3] * 2).blocks(site)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"pattern": "a-shape"}, {"pattern": "block-sparse"}])
def test_everything_is_dense(dtype, options):
    q, k, v = (x.to(dtype) for x in tensors(150, 190, batch=2, heads=4, key_heads=2))
    valid = torch.ones(2, 190, dtype=torch.bool)
    valid[1, :50] = False
    site = attention_site(q, k, v, valid=valid)
    method = vtr.MInference(1.0, 1.0, pooled=1.0, block=16, last_rows=1, **options)
    expected = attention(q, k, v, allowed(valid, 150)[:, None], site.scale)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(
        method.attend(site).float(), expected.float(), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vertical": 0}, "vertical must be"),
        ({"slash": 1.5}, "slash must be"),
        ({"pooled": True}, "pooled must be"),
        ({"pattern": "diagonal"}, "pattern must be one of vertical-slash, a-shape, block-sparse"),
        ({"patterns": [[("a-shape", 1)]]}, "an entry must be"),
        ({"patterns": [[("a-shape", 1, 0)]]}, "a size in patterns must be"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        vtr.MInference(**options)
