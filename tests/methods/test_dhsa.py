"""DHSA: chunks, their scores and the vertical and slash mode, in loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from tests.methods.prefill_sites import double, marks, probabilities, seen_blocks, site, tensors
from vtr.methods.common.chunks import chunk_scores, chunk_starts
from vtr.methods.common.key_blocks import BlockGrid
from vtr.methods.dhsa import DHSA


def runs(found, sample, keys, method):
    """The chunks of a sample as (first, end)."""
    if not method.chunk:
        return [(c, min(c + method.key_block, keys)) for c in range(0, keys, method.key_block)]
    kinds = list(zip(*(m[sample].tolist() for m in found), strict=True))
    chunks, first = [], 0
    for end in range(1, keys + 1):
        if end == keys or kinds[end] != kinds[first]:
            parts = math.ceil((end - first) / method.chunk)
            size = end - first
            cuts = [first + math.ceil(p * size / parts) for p in range(parts + 1)]
            chunks += itertools.pairwise(cuts)
            first = end
    return chunks


def brute_force(method, qkv, found=None, window=None):
    """The mask (B, H, NQ, NK), one head and one block of rows after the other, in float64."""
    q, k = map(double, qkv[:2])
    (batch, heads, rows, _), (_, groups, keys, _) = q.shape, k.shape
    bm, bn = method.sides
    seen = seen_blocks(rows, keys, (bm, bn), window)
    found = marks(torch.ones(batch, keys, dtype=torch.bool)) if found is None else found
    number = max(1, int(method.density * seen.shape[1]))
    keep = np.zeros((batch, heads, *seen.shape), bool)
    for b, h in np.ndindex(batch, heads):
        key = k[b, h // (heads // groups)]
        scores = np.zeros(seen.shape)
        if method.mode == "vs":
            scores = lines(method, q[b, h], key, seen.shape, number * bn, window)
        else:
            for r, c in np.ndindex(*seen.shape):
                row = q[b, h, r * bm : (r + 1) * bm].mean(0)
                scores[r, c] = max(
                    row @ key[first:end].mean(0) * math.sqrt(end - first)
                    for first, end in runs(found, b, keys, method)
                    if first < (c + 1) * bn and end > c * bn
                )
        for r in range(seen.shape[0]):
            inside = np.flatnonzero(seen[r])
            best = scores[r].copy()
            if method.mode != "topk":
                best[[0, inside[-1]]] = np.inf
            dense = method.mode == "vs" and (
                r * bm + keys - rows < number * bn or r == seen.shape[0] - 1
            )
            order = inside[np.argsort(-best[inside], kind="stable")]
            keep[b, h, r, order if dense else order[:number]] = True
    return keep


def lines(method, q, k, shape, budget, window):
    """The sums of the strongest columns and diagonals that cross each block."""
    (rows, keys), (bm, bn) = (len(q), len(k)), method.sides
    last = list(range(max(0, rows - bm), rows))
    seen = probabilities(q, k, last, window)
    column, diagonal = seen.sum(0), np.zeros(keys)
    for n, i in enumerate(last):
        for j in range(keys - rows + i + 1):
            diagonal[keys - rows + i - j] += seen[n, j]
    scores = np.zeros(shape)
    for j in np.argsort(-column, kind="stable")[: budget // 2]:
        scores[:, j // bn] += column[j]
    for o in np.argsort(-diagonal, kind="stable")[: budget - budget // 2]:
        crossed = {
            (i // bm, (keys - rows + i - o) // bn) for i in range(rows) if keys - rows + i >= o
        }
        for r, c in crossed:
            scores[r, c] += diagonal[o]
    return scores


@pytest.mark.parametrize("size", [(300, 300), (70, 300)], ids=str)
@pytest.mark.parametrize("method", [
    DHSA(0.3, block=32, key_block=16),
    DHSA(0.25, block=32, key_block=16, chunk=20, mode="a-shape"),
    DHSA(0.3, block=32, key_block=32, chunk=0, mode="a-shape"),
    DHSA(0.25, block=32, key_block=16, mode="vs"),
], ids=str)  # fmt: skip
def test_the_mask_is_that_of_the_paper(method, size):
    qkv = tensors(*size, batch=2, heads=4, key_heads=2)
    blocks = method.blocks(site(qkv))
    assert (blocks.numpy() == brute_force(method, qkv)).all()


@pytest.mark.parametrize("mode", ["topk", "a-shape", "vs"])
def test_a_sliding_window_layer_chooses_from_what_it_sees(mode):
    qkv, method = tensors(300), DHSA(0.2, block=32, key_block=16, mode=mode)
    blocks = method.blocks(site(qkv, window=120))
    assert (blocks.numpy() == brute_force(method, qkv, window=120)).all()


def test_samples_of_a_batch_have_their_own_chunks():
    """The same prompt length, frames of other sizes."""
    qkv = tensors(300, batch=2)
    one = torch.ones(1, 300, dtype=torch.bool)
    both = [
        torch.cat(pair) for pair in zip(marks(one), marks(one, first=11, frame=33), strict=True)
    ]
    method = DHSA(0.2, block=16, key_block=16, chunk=40)
    here = site(qkv, found=lambda valid: type(marks(one))(*both))
    assert (method.blocks(here).numpy() == brute_force(method, qkv, both)).all()


def test_chunks_end_with_frames_and_are_equal_parts():
    valid = torch.ones(1, 5 + 4 * 49 + 20, dtype=torch.bool)
    starts = chunk_starts(tuple(marks(valid)), 25)[0].nonzero().flatten().tolist()
    frames = [5 + 49 * f + s for f in range(4) for s in (0, 25)]
    assert starts == [0, *frames, 5 + 4 * 49]


def test_long_chunks_are_not_scored_too_low():
    """The mean of many keys of noise is short; the root of their number makes up for it."""
    q, k, _ = tensors(1024, heads=8, dim=32)
    grid, column = BlockGrid(1024, 1024, (16, 16), q.device), torch.arange(1024)[None]
    spread = [chunk_scores(q, k, column % n == 0, grid).std() for n in (16, 64, 256)]
    assert max(spread) / min(spread) < 1.15


@pytest.mark.parametrize("mode", ["topk", "a-shape"])
def test_a_far_frame_is_found(mode):
    q, k, v = tensors(300, dim=32)
    want = torch.zeros(32)
    want[3] = 3.0
    q[:, :, 200:] += want
    k[:, :, 54:103] += want  # the second frame
    blocks = DHSA(0.3, block=16, key_block=16, mode=mode).blocks(site((q, k, v)))
    assert blocks[:, :, 13:, 4:6].all()


@pytest.mark.parametrize("kind", ["column", "diagonal"])
def test_a_hot_line_is_found(kind):
    """All rows want one key, or each the key 60 before it."""
    q, k, v = tensors(300, heads=2, dim=64, seed=5)
    if kind == "column":
        q[..., 0], k[:, :, 70, 0] = 8.0, 12.0
    else:
        q[:, :, 60:] = q[:, :, 60:] * 0.2 + 4 * k[:, :, :-60]
    blocks = DHSA(0.3, block=16, key_block=16, mode="vs").blocks(site((q, k, v)))
    for r in range(7, 18):
        at = [70 // 16] if kind == "column" else [(r * 16 - 60) // 16, (r * 16 + 15 - 60) // 16]
        assert blocks[:, :, r, at].all()


def test_all_blocks_are_all_that_rows_see():
    for mode in "topk", "a-shape", "vs":
        blocks = DHSA(1.0, block=32, key_block=16, mode=mode).blocks(site(tensors(100, 300)))
        assert (blocks.numpy() == seen_blocks(100, 300, (32, 16))).all()


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        DHSA(0.0)
    with pytest.raises(ValueError, match="mode must be one of topk, a-shape, vs"):
        DHSA(mode="slash")
    with pytest.raises(ValueError, match="chunk must be an int >= 0"):
        DHSA(chunk=-1)
    with pytest.raises(ValueError, match="key_block must be 16, 32, 64 or 128"):
        DHSA(key_block=24)
