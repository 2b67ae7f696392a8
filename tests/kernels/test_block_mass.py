"""Mass of tiles, and tiles near the maximum of their rows, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from vtr.kernels import block_sparse_attention
from vtr.kernels import mass as module
from vtr.kernels.blockmask import BlockMask
from vtr.kernels.mass import block_mass, live_tiles

SHAPES = {
    "ragged": dict(heads=(4, 2), lengths=(50, 37), sides=(16, 8)),
    "whole": dict(heads=(2, 2), lengths=(64, 32), sides=(16, 16)),
    "shorter than a tile": dict(heads=(3, 1), lengths=(5, 7), sides=(16, 32)),
    "wide keys": dict(heads=(2, 1), lengths=(33, 70), sides=(8, 64)),
}


def draw(heads, lengths, dtype=torch.float32, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads[0], lengths[0], 8, generator=generator) * 2
    k = torch.randn(batch, heads[1], lengths[1], 8, generator=generator) * 2
    return q.to(dtype), k.to(dtype)


def scores_of(q, k, keys=None):
    """(B, H, Sq, Sk) float64, -inf for keys that are not seen."""
    found = torch.empty(*q.shape[:3], k.shape[2], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        for j in range(k.shape[2]):
            found[:, h, :, j] = (q[:, h].double() * k[:, h // group, None, j].double()).sum(-1)
    found /= math.sqrt(q.shape[3])
    return found if keys is None else found.masked_fill(~keys[:, None, None], -math.inf)


def slow_mass(scores, lse, sides, queries=None):
    bq, bk = sides
    nq, nk = -(-scores.shape[2] // bq), -(-scores.shape[3] // bk)
    out = torch.zeros(*scores.shape[:2], nq, nk, dtype=torch.float64)
    for b in range(scores.shape[0]):
        for i in range(scores.shape[2]):
            if queries is not None and not queries[b, i]:
                continue
            for j in range(scores.shape[3]):
                out[b, :, i // bq, j // bk] += torch.exp(scores[b, :, i, j] - lse[b, :, i])
    return out


def slow_live(scores, visited, sides, threshold, queries=None):
    bq, bk = sides
    live = torch.zeros_like(visited)
    for b, h, n, _ in visited.any(-1, keepdim=True).nonzero().tolist():
        for i in range(n * bq, min((n + 1) * bq, scores.shape[2])):
            if queries is not None and not queries[b, i]:
                continue
            running = -math.inf
            for m in reversed(range(visited.shape[3])):
                own = float(scores[b, h, i, m * bk : (m + 1) * bk].max())
                if not visited[b, h, n, m] or own == -math.inf:
                    continue
                if running == -math.inf or (own - running) / math.log(2) > threshold:
                    live[b, h, n, m] = True
                running = max(running, own)
    return live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mass(shape, dtype):
    q, k = draw(shape["heads"], shape["lengths"], dtype)
    scores = scores_of(q, k)
    lse = scores.logsumexp(-1)
    got = block_mass(q, k, lse.float(), sides=shape["sides"])
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), slow_mass(scores, lse, shape["sides"]), atol=1e-4, rtol=1e-4
    )
    rows = [
        min(shape["sides"][0], shape["lengths"][0] - n * shape["sides"][0])
        for n in range(got.shape[2])
    ]
    torch.testing.assert_close(got.sum(-1), torch.tensor(rows).float().expand(2, q.shape[1], -1))


def test_mass_without_padding_and_without_places():
    q, k = draw((4, 2), (50, 37))
    keys = torch.rand(2, 37) > 0.3
    keys[1, 8:16] = False
    queries = torch.rand(2, 50) > 0.3
    scores = scores_of(q, k, keys)
    lse = scores.logsumexp(-1)
    got = block_mass(q, k, lse.float(), sides=(16, 8), queries=queries, keys=keys)
    expected = slow_mass(scores, lse, (16, 8), queries)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)
    assert not got[1, :, :, 1].any()


def test_mass_in_parts(monkeypatch):
    q, k = draw((4, 2), (50, 37))
    lse = scores_of(q, k).logsumexp(-1).float()
    whole = block_mass(q, k, lse, sides=(16, 8))
    everywhere = torch.ones(2, 4, 4, 5, dtype=torch.bool)
    live = live_tiles(q, k, everywhere, sides=(16, 8), threshold=-2.0)
    monkeypatch.setattr(module, "_AT_ONCE", 1)  # one row of tiles of one key head
    torch.testing.assert_close(block_mass(q, k, lse, sides=(16, 8)), whole)
    assert torch.equal(live_tiles(q, k, everywhere, sides=(16, 8), threshold=-2.0), live)


def test_mass_under_the_lse_of_the_kernel_and_of_another_step():
    q, k = draw((2, 2), (48, 48))
    mask = BlockMask.from_blocks(torch.ones(3, 3, dtype=torch.bool), q_len=48, k_len=48, block=16)
    _, lse = block_sparse_attention(q, k, torch.randn_like(k), mask, return_lse=True)
    got = block_mass(q, k, lse, sides=(16, 16))
    torch.testing.assert_close(got.sum(-1), torch.full((2, 2, 3), 16.0))
    # Another LSE is a factor of each query.
    twice = block_mass(q, k, lse - math.log(2), sides=(16, 16))
    torch.testing.assert_close(twice, 2 * got)
    far = block_mass(q, k, lse - 1e4, sides=(16, 16))
    assert far.isfinite().all() and (far > 0).all()


def test_rows_without_keys_have_no_mass():
    q, k = draw((1, 1), (16, 16))
    lse = torch.full((2, 1, 16), -torch.inf)
    assert not block_mass(q, k, lse, sides=(8, 8)).any()


@pytest.mark.parametrize("threshold", [-10.0, -3.0, 0.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_live_tiles(shape, threshold):
    q, k = draw(shape["heads"], shape["lengths"])
    scores = scores_of(q, k)
    sides, (rows, columns) = shape["sides"], shape["lengths"]
    size = (2, q.shape[1], -(-rows // sides[0]), -(-columns // sides[1]))
    visited = torch.rand(size, generator=torch.Generator().manual_seed(1)) > 0.3
    got = live_tiles(q, k, visited, sides=sides, threshold=threshold)
    assert torch.equal(got, slow_live(scores, visited, sides, threshold))
    assert not (got & ~visited).any()
    assert torch.equal(got.any(-1), visited.any(-1))  # the first tile of a row is live
    lower = live_tiles(q, k, visited, sides=sides, threshold=threshold - 1)
    assert not (got & ~lower).any()


def test_live_tiles_without_padding_and_without_places():
    q, k = draw((4, 2), (50, 37))
    keys = torch.rand(2, 37) > 0.3
    keys[0, 24:] = False  # the first tiles that are visited
    queries = torch.rand(2, 50) > 0.3
    queries[1, 16:32] = False
    visited = torch.ones(2, 4, 4, 5, dtype=torch.bool)
    got = live_tiles(q, k, visited, sides=(16, 8), threshold=-1.0, queries=queries, keys=keys)
    expected = slow_live(scores_of(q, k, keys), visited, (16, 8), -1.0, queries)
    assert torch.equal(got, expected)
    assert not got[0, :, :, 3:].any() and not got[1, :, 1].any()


def test_errors():
    q, k = draw((4, 2), (50, 37))
    lse = torch.zeros(2, 4, 50)
    with pytest.raises(
        ValueError, match=r"lse must be \(B, H, Sq\) = \(2, 4, 50\), got \(2, 4, 49\)"
    ):
        block_mass(q, k, lse[..., :49], sides=(16, 16))
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3 key heads"):
        block_mass(q, k[:, [0, 1, 1]], lse, sides=(16, 16))
    with pytest.raises(ValueError, match=r"need q \(B, H, Sq, D\)"):
        block_mass(q, k[:1], lse, sides=(16, 16))
    with pytest.raises(ValueError, match="sides must be two positive ints"):
        block_mass(q, k, lse, sides=(16, 0))
    with pytest.raises(ValueError, match=r"visited must be bool \(B, H, NQ, NK\) = \(2, 4, 4, 3\)"):
        live_tiles(q, k, torch.ones(2, 4, 4, 4, dtype=torch.bool), sides=(16, 16))
