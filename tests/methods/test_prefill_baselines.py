"""The baselines of sparse prefill: how many blocks they keep, and which."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods.prefill_sites import always_blocks, seen_blocks, site, tensors
from vtr.methods.prefill_baselines import LocalWindow, RandomBlocks

SIZES = [(300, 300), (288, 288), (130, 300), (17, 17)]


def brute_force(method, qkv, layer=0, window=None):
    """The mask of either baseline from its definition, block by block: (H, NQ, NK), H = 1 for the window."""
    q, k = qkv[:2]
    rows, keys = q.shape[2], k.shape[2]
    sides = (method.block, method.block)
    seen, keep = (f(rows, keys, sides, window) for f in (seen_blocks, always_blocks))
    if isinstance(method, RandomBlocks):
        return chosen(method, seen, keep, q.shape[1], layer)
    if method.window is not None:
        for i in range(rows):
            column = keys - rows + i
            for j in range(max(0, column - method.window + 1), column + 1):
                keep[i // method.block, j // method.block] = True
        return (keep & seen)[None]
    counts = [int(n) for n in seen.sum(1)]
    goal = int(np.floor(method.density * sum(counts) + 0.5))
    width = max(w for w in range(max(counts) + 1) if sum(min(w, c) for c in counts) <= goal)
    left = goal - sum(min(width, c) for c in counts)
    for r, count in enumerate(counts):
        number = min(count, width + (r >= len(counts) - left))
        near = number if number == count else max(number - seen[r, 0], 1)
        keep[r, np.flatnonzero(seen[r])[count - near :]] = True
    return keep[None]


def chosen(method, seen, always, heads, layer):
    """Of each row's blocks that may be left out those with the largest random numbers."""
    g = torch.Generator().manual_seed(method.seed * 10_007 + layer)
    rank = torch.rand(heads, *seen.shape, generator=g).numpy()
    free = seen & ~always
    share = max(0.0, method.density * seen.sum() - always.sum()) / max(1, free.sum())
    keep = np.stack([always] * heads)
    given, total = 0, 0
    for r, row in enumerate(free):
        total += share * row.sum()
        number = int(np.floor(total + 0.5)) - given
        given += number
        for h in range(heads):
            best = sorted(np.flatnonzero(row), key=lambda c: -rank[h, r, c])[:number]
            keep[h, r, best] = True
    return keep


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("method", [
    LocalWindow(0.3, block=16), LocalWindow(0.05, block=16), LocalWindow(1.0, block=16),
    LocalWindow(window=1, block=16), LocalWindow(window=40, block=32),
    RandomBlocks(0.4, block=16), RandomBlocks(0.1, block=16, seed=3), RandomBlocks(1.0, block=32),
], ids=str)  # fmt: skip
def test_the_mask_is_as_defined(method, size):
    qkv = tensors(*size, batch=2, heads=4, key_heads=2)
    blocks = method.blocks(site(qkv, layer=2))
    expected = brute_force(method, qkv, layer=2)
    assert blocks.shape == (2, *expected.shape) and blocks.dtype == torch.bool
    assert (blocks.numpy() == expected).all()


@pytest.mark.parametrize("method", [
    LocalWindow(0.5, block=16), LocalWindow(window=40, block=16), RandomBlocks(0.5, block=16),
], ids=str)  # fmt: skip
def test_in_a_sliding_window_layer_the_share_is_of_what_it_sees(method):
    qkv = tensors(300, heads=4, key_heads=2)
    blocks = method.blocks(site(qkv, window=100)).numpy()
    assert (blocks[0] == brute_force(method, qkv, window=100)).all()


@pytest.mark.parametrize("density", [0.15, 0.3, 0.5, 0.8, 1.0])
def test_both_have_the_density(density):
    """Over the whole mask, in whole blocks: 76 rows of blocks, where one block is 0.0003 of all."""
    qkv = tensors(1216, heads=3, dim=4)
    seen = seen_blocks(1216, 1216, (16, 16))
    for method in RandomBlocks(density, block=16), LocalWindow(density, block=16):
        blocks = method.blocks(site(qkv)).numpy()
        assert not (blocks & ~seen).any()
        assert abs(blocks.mean((0, 2, 3)) / seen.mean() - density).max() < 0.0004


def test_random_blocks_differ_between_heads_layers_and_seeds_and_are_repeated():
    qkv = tensors(300, batch=2, heads=4)

    def blocks(seed=0, layer=0):
        return RandomBlocks(0.3, seed=seed, block=16).blocks(site(qkv, layer=layer))

    first = blocks()
    assert first.equal(blocks()) and first[0].equal(first[1])
    assert not first[0, 0].equal(first[0, 1])
    others = [blocks(layer=1), blocks(seed=1), blocks(seed=1, layer=1)]
    assert all(not first.equal(other) for other in others)


def test_random_blocks_are_equally_likely():
    """800 masks; the share of a block has a standard deviation of at most 0.018."""
    qkv, found = tensors(160, heads=8, dim=4), 0
    for seed in range(100):
        found = found + RandomBlocks(0.5, seed=seed, block=16).blocks(site(qkv)).double().mean(
            (0, 1)
        )
    found = (found / 100).numpy()
    free = seen_blocks(160, 160, (16, 16)) & ~always_blocks(160, 160, (16, 16))
    for row, open_ in zip(found, free, strict=True):
        if open_.any():
            assert np.abs(row[open_] - row[open_].mean()).max() < 0.09


def test_bad_options_are_refused():
    for wrong in 0, 1.5, None, True:
        for cls in RandomBlocks, LocalWindow:
            with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
                cls(wrong)
    with pytest.raises(ValueError, match="seed must be an int >= 0"):
        RandomBlocks(seed=-1)
    with pytest.raises(ValueError, match="window must be an int >= 1 or None"):
        LocalWindow(window=0)
