"""HiP: the search in loops, what it finds, and what it is allowed to miss."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.methods.prefill_sites import double, seen_blocks, site, tensors
from vtr.methods.hip import HiP


def tree(score, low, high, groups, probes, place, side, keys):
    """The key blocks that halving finds in a range; ``score(token)`` is the largest of the rows."""

    def judge(run):
        first, end = run[0] * side, min(run[1] * side, keys)
        size = end - first
        if place == "first":
            tokens = [first + p for p in range(probes)]
        elif place == "center":
            tokens = [first + max(0, size - probes) // 2 + p for p in range(probes)]
        else:
            tokens = [first + (2 * p + 1) * size // (2 * probes) for p in range(probes)]
        return max(score(min(t, end - 1)) for t in tokens)

    if high <= low:
        return []
    cuts = [low + (high - low) * g // groups for g in range(groups + 1)]
    runs = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
    while any(b - a > 1 for a, b in runs):
        halves = []
        for a, b in runs:
            middle = (a + b + 1) // 2
            halves += [(a, middle)] + ([(middle, b)] if b > middle else [])
        runs = sorted(halves, key=judge, reverse=True)[:groups]
    return [a for a, _ in runs]


def staged(score, low, high, stages, side, keys):
    """The key blocks that the stages of InfiniteHiP find in a range."""

    def represent(start, chunk):
        first, end = start * side, min(start * side + chunk, high * side, keys)
        while end - first > 1:
            middle = (first + end + 1) // 2
            if score(middle) > score(first):
                first = middle
            else:
                end = middle
        return score(first)

    starts = list(range(low, high, stages[0][0] // side))
    for n, (chunk, keep) in enumerate(stages):
        if n:
            starts = [
                s + i * chunk // side for s in starts for i in range(stages[n - 1][0] // chunk)
            ]
            starts = [s for s in starts if s < high]
        starts = sorted(starts, key=lambda s: represent(s, chunk), reverse=True)[: keep // chunk]
    return starts


def brute_force(method, qkv, window=None):
    """The mask (B, H, NQ, NK), one head and one block of rows after the other."""
    q, k = map(double, qkv[:2])
    (batch, heads, rows, _), (_, groups, keys, _) = q.shape, k.shape
    bm, bn = method.sides
    found = np.zeros((batch, heads, *seen_blocks(rows, keys, (bm, bn)).shape), bool)
    number = method.keys if isinstance(method.keys, int) else int(np.ceil(method.keys * keys))
    for b, h, r in np.ndindex(found.shape[:3]):
        first, last = r * bm, min((r + 1) * bm, rows) - 1
        products = q[b, h, first : last + 1 : method.stride] @ k[b, h // (heads // groups)].T
        # Blocks of the window: those with a key that is among the last ones of a row.
        recent = max(0, first + keys - rows - method.window + 1) // bn
        sinks = -(-method.sink // bn)
        seen = (last + keys - rows) // bn + 1
        oldest = max(0, first + keys - rows - (window or keys) + 1) // bn
        found[b, h, r, :seen] = [c < sinks or c >= recent for c in range(seen)]
        found[b, h, r, :oldest] = False

        def score(token, products=products):
            return products[:, token].max()

        if method.pruning:
            chosen = staged(score, max(sinks, oldest), recent, method.pruning, bn, keys)
        else:
            chosen = tree(
                score,
                max(sinks, oldest),
                recent,
                -(-number // bn),
                method.probes,
                method.place,
                bn,
                keys,
            )
        found[b, h, r, chosen] = True
    return found


SMALL = {"block": 16, "rows": 32, "window": 20}
METHODS = [
    HiP(48, **SMALL),
    HiP(16, **SMALL, probes=4, place="center", stride=1),
    HiP(0.2, **SMALL, probes=3, place="even", sink=20),
    HiP(500, **SMALL),
    HiP(**SMALL, pruning=((64, 128), (32, 64), (16, 32)), sink=16),
    HiP(**SMALL, pruning=((32, 1024), (16, 48)), stride=3),
]


@pytest.mark.parametrize("size", [(300, 300), (288, 288), (75, 300)], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_search_is_that_of_the_paper(method, size):
    qkv = tensors(*size, batch=1 + (method is METHODS[0]), heads=4, key_heads=2)
    blocks = method.blocks(site(qkv))
    assert (blocks.numpy() == brute_force(method, qkv)).all()


@pytest.mark.parametrize("method", METHODS[2:5], ids=str)
def test_the_search_stays_in_a_sliding_window(method):
    qkv = tensors(300)
    blocks = method.blocks(site(qkv, window=150))
    assert (blocks.numpy() == brute_force(method, qkv, window=150)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_searched_in_float32(dtype):
    qkv = tensors(200, dtype=dtype)
    for method in METHODS[0], METHODS[4]:
        assert (method.blocks(site(qkv)).numpy() == brute_force(method, qkv)).all()


def planted(at, width, keys=1024):
    """Noise, and a key that every row from 600 on wants; its neighbours resemble it up to ``width`` away."""
    q, k, v = (0.3 * x for x in tensors(keys, dim=32, seed=3))
    g = torch.Generator().manual_seed(1)
    want = torch.nn.functional.normalize(torch.randn(32, generator=g), dim=0)
    near = (1 - (torch.arange(keys) - at).abs() / width).clamp(min=0)
    q[:, :, 600:] = q[:, :, 600:] + 8 * want
    k = k + 8 * near[:, None] * want
    return q, k, v


@pytest.mark.parametrize("at", [307, 420])
@pytest.mark.parametrize("method", [
    HiP(64, block=16, rows=16, window=16),
    HiP(64, block=16, rows=16, window=16, probes=4, place="even"),
    HiP(block=16, rows=16, window=16, pruning=((128, 512), (32, 256), (16, 64))),
], ids=str)  # fmt: skip
def test_a_far_key_with_a_huge_score_is_found(method, at):
    """4 of up to 62 blocks are looked for; what is wanted is anywhere in its block."""
    blocks = method.blocks(site(planted(at, width=128)))
    assert blocks[:, :, 600 // 16 + 1 :, at // 16].all()
    assert blocks[:, :, -1].sum(-1).max() <= 4 + 2


def test_a_lone_key_may_be_missed():
    """A key that nothing near it resembles is seen if it is judged, and only then."""
    method = HiP(64, block=16, rows=16, window=16, probes=1)
    hit, miss = (method.blocks(site(planted(at, width=1)))[:, :, 40:] for at in (0, 301))
    assert hit[..., 0].all() and miss[..., 301 // 16].float().mean() < 0.5


def test_everything_fits_and_nothing_is_skipped():
    qkv = tensors(300, heads=4, key_heads=2)
    seen = torch.from_numpy(seen_blocks(300, 300, (32, 16)))
    for method in (HiP(300, **SMALL), HiP(1.0, **SMALL), HiP(**SMALL, pruning=((16, 304),))):
        assert (method.blocks(site(qkv)) == seen).all()


def test_the_preset_is_what_was_published():
    method = HiP.preset("llama-3.1-8b/infinitehip")
    assert [keep for _, keep in method.pruning] == [32768, 8192, 2048]
    assert (method.sink, method.window, method.dense_layers) == (256, 1024, (0, 1, 2, 3, 31))


def test_the_cost_of_the_search_is_noted():
    """4 runs of at most 4 key blocks, then 4 second halves twice, 2 keys of each, against 16 of 32 rows."""
    here = site(tensors(256, dim=16))
    HiP(64, block=16, rows=32, window=1).blocks(here)
    heads, blocks = 2, 256 // 32
    assert here.notes["spent"] == 2 * (4 + 4 + 4) * 2 * 16 * 16 * heads * blocks


@pytest.mark.parametrize(("options", "message"), [
    ({"keys": 0}, "keys must be an int >= 1"),
    ({"rows": 48}, "rows must be 16, 32, 64 or 128"),
    ({"window": 0}, "window must be an int >= 1"),
    ({"sink": -1}, "sink must be an int >= 0"),
    ({"probes": 0}, "probes must be an int >= 1"),
    ({"place": "last"}, "place must be one of first, center, even"),
    ({"pruning": ((64, 64), (48, 64))}, "pruning must be pairs"),
    ({"pruning": ((64, 64), (32, 64))}, "last chunk equal to block"),
    ({"pruning": ((64, 32),)}, "keep at least a chunk"),
    ({"pruning": (64,)}, "pruning must be pairs"),
    ({"pruning": ()}, "pruning must be pairs"),
])  # fmt: skip
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HiP(**options)
