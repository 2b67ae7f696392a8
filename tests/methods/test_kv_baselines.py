"""The baselines of KV caches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import vtr

from .kv_sites import KINDS, Cache
from .test_h2o import run


def slow_hash(x: int) -> int:
    """The last rounds of the 32-bit hash, in Python's integers."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 15


def test_random_entries_follow_the_hash() -> None:
    cache = Cache(*KINDS, layer=3)
    site = cache.call(14)
    kept = vtr.RandomKV(3, seed=5).compress(site).kept & site.visual
    start = (5 * 1_000_003 + 3) * 0x85EBCA6B
    for b, h, columns in cache.live():
        visual = [(n, c) for n, c in enumerate(columns) if cache.marks.kind[b, c]]
        rank = {c: slow_hash(((2 * n + h + 1) * 0x9E3779B9 + start) % 2**32) for n, c in visual}
        wanted = sorted(rank, key=lambda c: -rank[c])[: (3, 6)[b]]
        assert site.columns[b, h][kept[b, h]].tolist() == sorted(wanted)


def test_random_entries_differ_by_seed_layer_and_head_and_are_uniform() -> None:
    found, times = set(), Counter[int]()
    for seed in range(20):
        for layer in range(4):
            site = Cache("tvvvvvvvvvvtt", layer=layer).call(13)
            kept = vtr.RandomKV(5, seed=seed).compress(site).kept
            for h in range(2):
                columns = tuple(kept[0, h, 1:11].nonzero().flatten().tolist())
                found.add(columns)
                times.update(columns)
    assert len(found) > 100  # of 160 draws among 252 subsets
    assert all(80 - 30 < times[c] < 80 + 30 for c in range(10))  # five deviations are 32


@pytest.mark.parametrize("method", [vtr.RandomKV(0.5), vtr.RecentKV(0.5)])
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(method: vtr.Method) -> None:
    cache = Cache("..ttvvvvvvvvttttttt", "tvvvvvvvvttt..ttttt")
    *_, (site, _, _) = run(cache, method)
    kept = method.compress(site).kept
    for b in range(2):
        alone, prompt = cache.alone(b), int(cache.tokens[b, :14].sum())
        *_, (own, _, _) = run(alone, method, (prompt, 1, 2, 1, 1))
        assert torch.equal(kept[b : b + 1, :, cache.tokens[b]], method.compress(own).kept)


def test_a_smaller_budget_keeps_a_subset() -> None:
    site = Cache(*KINDS).call(14)
    for cls in (vtr.RandomKV, vtr.RecentKV):
        many, few = (cls(n).compress(site).kept for n in (5, 2))
        assert torch.equal(many & few, few) and many.sum() > few.sum()


def test_the_newest_visual_tokens_stay() -> None:
    site = Cache(*KINDS).call(14)
    kept = vtr.RecentKV(3).compress(site).kept
    gone = ({4, 5, 6, 7, 8}, {1, 2, 3, 4, 5, 6})  # 3 of 8; 6 of 12, which are the second image
    for b in range(2):
        for h in range(2):
            assert set((~kept[b, h] & site.valid[b, h]).nonzero().flatten().tolist()) == gone[b]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"seed must be an int, got 1\.5"):
        vtr.RandomKV(seed=1.5)
