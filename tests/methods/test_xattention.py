"""XAttention against its definition in loops, planted lines, and thresholds of heads."""

from __future__ import annotations

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
    widened,
)
from vtr.methods.common import antidiagonal


def brute_force(q, k, scale, *, threshold, stride, block, window=None):
    """The causal blocks of one head, q (L, D) and k (S, D)."""
    length, keys = len(q), len(k)
    offset, runs = keys - length, -(-keys // stride)
    rows, columns = -(-length // block), -(-keys // block)
    mass = np.zeros((rows, columns))
    for a in range(-(-length // stride)):
        score = np.full(runs, -np.inf)
        first, last = offset + a * stride, min(offset + (a + 1) * stride, keys) - 1
        for b in range(runs):
            if b * stride > last or (window and first - (b * stride + stride - 1) >= window):
                continue
            total = 0.0
            for t in range(stride):
                i, j = a * stride + stride - 1 - t, b * stride + t
                if i < length and j < keys:
                    total += q[i].astype(np.float64) @ k[j]
            score[b] = total * scale / stride
        weight = np.exp(score - score.max())
        weight /= weight.sum()
        for b in range(runs):
            mass[a * stride // block, b * stride // block] += weight[b]
    found = np.zeros((rows, columns), dtype=bool)
    for i in range(rows):
        found[i, 0] = True
        for j in range(columns):
            begin, end = offset + i * block, min(offset + (i + 1) * block, keys)
            found[i, j] |= j * block < end and (j + 1) * block > begin
        reached, goal = mass[i][found[i]].sum(), threshold * mass[i].sum()
        for j in np.argsort(-mass[i], kind="stable"):
            if not found[i, j] and reached < goal:
                found[i, j] = True
                reached += mass[i, j]
    return found & live_blocks(allowed_tokens(length, keys, window), (block, block))


def allowed_tokens(length, keys, window):
    return allowed(torch.ones(1, keys, dtype=torch.bool), length, window)[0].numpy()


def blocks_of(method, q, k, window=None, **more):
    site = attention_site(q, k, torch.zeros_like(k), window=window, **more)
    seen = live_blocks(allowed_tokens(q.shape[2], k.shape[2], window), method.sides)
    return method.blocks(site) & torch.from_numpy(seen), site


@pytest.mark.parametrize(
    ("length", "keys", "block", "stride", "window"),
    [
        (300, 300, 32, 8, None),
        (300, 300, 16, 4, None),
        (131, 300, 32, 8, None),  # rows begin inside a run of keys
        (300, 300, 32, 16, 130),
        (5, 300, 32, 16, None),
    ],
)
def test_blocks_are_those_of_the_paper(length, keys, block, stride, window, monkeypatch):
    q, k, _ = tensors(length, keys, heads=4, key_heads=2, sharp=6.0)
    method = vtr.XAttention(0.7, stride=stride, block=block)
    found, site = blocks_of(method, q, k, window)
    for head in range(4):
        expected = brute_force(
            q[0, head].numpy(), k[0, head // 2].numpy(), site.scale,
            threshold=0.7, stride=stride, block=block, window=window,
        )  # fmt: skip
        np.testing.assert_array_equal(found[0, head].numpy(), expected)
    assert not expected[-1].all()
    monkeypatch.setattr(antidiagonal, "_CHUNK", 1)  # a block of rows at a time
    assert torch.equal(blocks_of(method, q, k, window)[0], found)


def test_planted_lines_are_kept():
    q, k, _ = tensors(300, heads=1, seed=3)
    q, k = q * 0.1, k * 0.1
    k[..., 77, 0], q[..., 0] = 80.0, 8.0
    method = vtr.XAttention(0.8, stride=4, block=16)
    found, _ = blocks_of(method, q, k)
    assert bool(widened(found, 300, 300, (16, 16))[0, 0, 80:, 77].all())
    assert found.float().mean() < 0.25

    k = torch.eye(304)[None, None]
    found, _ = blocks_of(method, k.roll(101, 2) * 1e3, k)  # row i looks at key i - 101
    assert bool(widened(found, 304, 304, (16, 16))[0, 0].diagonal(-101).all())
    assert found.float().mean() < 0.45


def test_antidiagonals_meet_odd_distances_alone():
    """As the docstring says: with an even stride, row minus key is odd on the antidiagonal of a tile."""
    for distance, met in ((100, False), (101, True)):
        k = torch.eye(304)[None, None]
        q = k.roll(distance, 2) * 1e3  # row i looks at key i - distance
        mass = antidiagonal.antidiagonal_mass(q, k, stride=4, sides=(16, 16), scale=1.0)
        uniform = antidiagonal.antidiagonal_mass(k * 0, k, stride=4, sides=(16, 16), scale=1.0)
        assert torch.equal(mass, uniform) != met


def test_a_far_key_with_a_huge_score_is_kept():
    q, k = torch.zeros(1, 1, 300, 16), torch.zeros(1, 1, 300, 16)
    k[..., 36, 0], q[..., 299, 0] = 1000.0, 1000.0  # on the antidiagonal of their tile
    method = vtr.XAttention(0.3, stride=4, block=16)
    found, site = blocks_of(method, q, k)
    assert bool(found[0, 0, 18, 2])
    assert bool(torch.isfinite(method.attend(site)).all())


def test_thresholds_of_heads():
    q, k, _ = tensors(300, heads=3, key_heads=3, sharp=4.0)
    table = ((0.0, 0.5, 0.9), (0.9, 0.9, 0.9))
    method = vtr.XAttention(table, stride=8, block=32)
    found, _ = blocks_of(method, q, k)
    for head, threshold in enumerate(table[0]):
        alone, _ = blocks_of(vtr.XAttention(threshold, stride=8, block=32), q, k)
        assert torch.equal(found[0, head], alone[0, head])
    # With 0 the first block and the row's own are left.
    assert torch.equal(found[0, 0], torch.eye(10, dtype=torch.bool) | (torch.arange(10) == 0))
    site = attention_site(q, k, k, layers=3)
    with pytest.raises(ValueError, match="3 layers and 3 query heads of this model; got 2 layers"):
        method.blocks(site)
    assert vtr.XAttention([[0.5]]) == vtr.XAttention(((0.5,),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threshold_one_is_dense(dtype):
    q, k, v = (x.to(dtype) for x in tensors(150, 190, batch=2, heads=4, key_heads=2, sharp=9.0))
    valid = torch.ones(2, 190, dtype=torch.bool)
    valid[1, :50] = False
    site = attention_site(q, k, v, valid=valid)
    out = vtr.XAttention(1.0, stride=4, block=16, last_rows=1).attend(site)
    expected = attention(q, k, v, allowed(valid, 150)[:, None], site.scale)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}[dtype]
    torch.testing.assert_close(out.float(), expected.float(), atol=tolerance, rtol=tolerance)


def test_the_output_is_attention_under_the_blocks():
    q, k, v = tensors(300, heads=4, key_heads=2, sharp=3.0)
    method = vtr.XAttention(0.5, stride=8, block=32, last_rows=8)
    site = attention_site(q, k, v)
    seen = widened(method.blocks(site), 300, 300, (32, 32)).clone()
    seen[:, :, -8:] = True
    expected = attention(q, k, v, seen & allowed(site.valid, 300)[:, None], site.scale)
    torch.testing.assert_close(method.attend(site), expected, atol=1e-5, rtol=1e-5)
    assert site.notes["spent"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.2}, "threshold must be a number from 0 to 1"),
        ({"threshold": [[0.5, 2]]}, "each threshold must be a number from 0 to 1"),
        ({"stride": 3}, "stride must be"),
        ({"stride": 32, "block": 16}, "divide block \\(16\\)"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        vtr.XAttention(**options)
