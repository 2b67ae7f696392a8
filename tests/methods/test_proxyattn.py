"""ProxyAttn: the ranking of the proxy heads and the budget of each head, in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.methods.prefill_sites import double, probabilities, seen_blocks, site, tensors
from vtr.methods.proxyattn import ProxyAttn


def brute_force(method, qkv, window=None):
    """The mask (B, H, NQ, NK), one head after the other, in float64."""
    q, k = map(double, qkv[:2])
    (batch, heads, rows, _width), (_, groups, keys, _) = q.shape, k.shape
    bm, bn = method.sides
    seen = seen_blocks(rows, keys, (bm, bn), window)
    found = np.zeros((batch, heads, *seen.shape), bool)
    for b, h in np.ndindex(batch, heads):
        size = heads // method.proxies
        first = h // size * size
        members = range(first, first + size)
        mean_q = sum(q[b, m] for m in members) / size
        mean_k = sum(k[b, m // (heads // groups)] for m in members) / size
        ranking = np.zeros(seen.shape)
        for r in range(seen.shape[0]):
            index = list(range(r * bm, min((r + 1) * bm, rows), method.stride))
            p = probabilities(mean_q, mean_k, index, window)
            for c in range(seen.shape[1]):
                ranking[r, c] = p[:, c * bn : (c + 1) * bn].max()
        last = probabilities(
            q[b, h],
            k[b, h // (heads // groups)],
            range(max(0, rows - bm), rows, method.stride),
            window,
        ).mean(0)
        mass = sorted(
            (last[c * bn : (c + 1) * bn].sum() for c in range(seen.shape[1])), reverse=True
        )
        number = next(n for n in range(1, len(mass) + 1) if sum(mass[:n]) >= method.gamma)
        for r in range(seen.shape[0]):
            count = int(seen[r].sum())
            budget = math.ceil(number / seen[-1].sum() * count - 1e-6)
            order = np.argsort(-np.where(seen[r], ranking[r], -1), kind="stable")
            found[b, h, r, order[: min(budget, count)]] = True
    return found


@pytest.mark.parametrize("size", [(300, 300), (288, 288), (70, 300)], ids=str)
@pytest.mark.parametrize("method", [
    ProxyAttn(0.7, block=32, stride=1),
    ProxyAttn(0.5, block=16, proxies=1),
    ProxyAttn(0.9, block=32, proxies=4, stride=5),
], ids=str)  # fmt: skip
def test_the_mask_is_that_of_the_paper(method, size):
    qkv = tensors(*size, batch=2, heads=4, key_heads=2)
    blocks = method.blocks(site(qkv))
    assert (blocks.numpy() == brute_force(method, qkv)).all()


def test_a_sliding_window_layer_ranks_what_it_sees():
    qkv, method = tensors(300, heads=4, key_heads=2), ProxyAttn(0.7, block=16)
    blocks = method.blocks(site(qkv, window=90))
    assert (blocks.numpy() == brute_force(method, qkv, window=90)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_scored_in_float32(dtype):
    qkv = tensors(200, dtype=dtype)
    method = ProxyAttn(0.6, block=16)
    blocks = torch.from_numpy(brute_force(method, qkv))
    assert (method.blocks(site(qkv)) == blocks).float().mean() > 0.999


def test_heads_of_a_group_share_the_ranking_and_not_the_budget():
    """One head looks at one place, the other everywhere: the few blocks of the first are among the others."""
    q, k, v = tensors(320, heads=2, dim=32, seed=2)
    q[:, 0] *= 4
    q[:, 1] *= 0.1
    blocks = ProxyAttn(0.6, block=16, proxies=1).blocks(site((q, k, v)))
    few, many = blocks[0, :, 5:].sum(-1)
    assert (few < many).all() and not (blocks[:, 0] & ~blocks[:, 1]).any()


def test_a_far_key_with_a_huge_score_is_found():
    """Token by token: what one key of a block has is not lost in the mean of the block."""
    q, k, v = tensors(320, heads=4, dim=32)
    want = torch.zeros(32)
    want[3] = 12.0
    q[:, :, 100:] += want
    k[:, :, 37] += want
    blocks = ProxyAttn(0.5, block=16, stride=1).blocks(site((q, k, v)))
    assert blocks[:, :, 7:, 37 // 16].all()


def test_the_map_is_cut_into_pieces_that_change_nothing(monkeypatch):
    from vtr.methods.common import key_blocks

    here = site(tensors(300, heads=4))
    whole = ProxyAttn(0.7, block=16).blocks(here)
    pieces = key_blocks.BlockGrid.pieces
    monkeypatch.setattr(key_blocks.BlockGrid, "pieces", lambda self, n: pieces(self, n, 3 * n))
    assert ProxyAttn(0.7, block=16).blocks(here).equal(whole)


def test_all_of_the_mass_is_dense():
    assert ProxyAttn(1.0, block=16).blocks(site(tensors(100))) is None


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\]"):
        ProxyAttn(0.0)
    with pytest.raises(ValueError, match="proxies must be an int >= 1"):
        ProxyAttn(proxies=0)
    with pytest.raises(ValueError, match="stride must be an int >= 1"):
        ProxyAttn(stride=0)
    qkv = tensors(40, heads=12, key_heads=4)
    for wrong in 3, 5, 6:
        with pytest.raises(ValueError, match=f"divide the 12 query heads.*got {wrong}"):
            ProxyAttn(proxies=wrong).blocks(site(qkv))
