"""LiteAttention against loops over tiles, rows and steps in float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_block_mass import scores_of, slow_live
from tests.methods.sites import TOLERANCE, Run, attention, tensors, visible
from tests.methods.test_adaspa import CASES, around
from vtr.methods import LiteAttention

GRID = (3, 5, 5)


def drawn(text, seed, first=0, heads=4, key_heads=None):
    """Tokens of two kinds, which take turns by blocks of the grid: the kinds hardly see each other."""
    q, k, v = tensors(GRID, text, heads=heads, key_heads=key_heads, seed=seed)
    kind = ((torch.arange(75 + text) - first) // 16 % 2 * 2 - 1).float()
    for t in (q, k):
        t[..., 0] += 2.5 * kind * (1 + torch.arange(t.shape[1])[:, None] / 2)
    return [q, k, v]


def brute_force(steps, method, text=0, text_first=False, text_valid=None):
    """The outputs of a run, and the share of blocks of the grid that each step visits."""
    visited, outputs, shares = None, [], []
    first, side = (text if text_first else 0), method.block
    at = torch.arange(75) // side
    for q, k, v in steps:
        if visited is None:
            visited = torch.ones(*q.shape[:2], -(-75 // side), -(-75 // side), dtype=torch.bool)
        for start, stop in method.must_do:
            visited[..., start // side : (stop - 1) // side + 1] = True
        mask = around(visited[:, :, at][..., at], text, text_first, text_valid, q.shape[0])
        outputs.append(attention(q, k, v, mask, 0.25)[0])
        shares.append(float(visited.float().mean()))
        grid = slice(first, first + 75)
        scores = scores_of(q[:, :, grid], k[:, :, grid])
        visited = slow_live(scores, visited, (side, side), method.threshold)
    return outputs, shares


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_loops_over_a_run(case):
    text, key = case.get("text", 0), {k: v for k, v in case.items() if k != "key_heads"}
    method = LiteAttention(-1.0, block=16, must_do=((16, 33),) if text else ())
    first = text if case.get("text_first") else 0
    steps = [drawn(text, s, first, key_heads=case.get("key_heads")) for s in range(4)]
    expected, shares = brute_force(steps, method, **key)
    assert shares[0] == 1 and shares[0] > shares[1] > shares[3]
    run = Run(method, GRID, **key)
    valid = visible(GRID, text, case.get("text_first"), case.get("text_valid"), 2)[:, None, :, None]
    for step, qkv in enumerate(steps):
        out = run(qkv, step)
        torch.testing.assert_close(
            out.double() * valid, expected[step] * valid, atol=1e-5, rtol=1e-5
        )
        assert float(run.notes["density"]) <= 1


def test_skipped_tiles_never_come_back():
    run, seen = Run(LiteAttention(0.0, block=16), GRID), None
    for step in range(4):
        run(drawn(0, step), step)
        live = run.state["live"]
        assert seen is None or not (live & ~seen).any()
        assert live.any(-1).all(), "no row is left without a tile"
        seen = live
    assert seen.float().mean() < 0.9


def test_a_low_threshold_skips_nothing():
    run = Run(LiteAttention(-100.0, block=16), GRID)
    for step in range(3):
        qkv = drawn(0, step)
        out = run(qkv, step)
        expected, _ = attention(*qkv, torch.ones(75, 75, dtype=torch.bool), 0.25)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes_and_singles(dtype):
    method = LiteAttention(-1.0, block=16)
    runs = [Run(method, GRID, 6) for _ in range(3)]
    for step in range(3):
        qkv = [t.to(dtype) for t in drawn(6, step)]
        out = runs[0](qkv, step)
        assert out.dtype == dtype
        for b in range(2):
            alone = runs[1 + b]([t[b : b + 1] for t in qkv], step)
            torch.testing.assert_close(
                alone[0], out[b], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
            )


def test_guidance_that_is_switched_off_starts_anew():
    run = Run(LiteAttention(0.0, block=16), GRID)
    run(drawn(0, 0), 0)
    run([t[1:] for t in drawn(0, 1)], 1)
    assert float(run.notes["density"]) == 1 and run.state["live"].shape[0] == 1


def test_training_is_refused():
    method = LiteAttention(block=16)
    with pytest.raises(RuntimeError, match=r"no such steps: call model\.eval\(\)"):
        method.attend(Run(method, GRID).site(drawn(0, 0), training=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, r"threshold must be a number in \[-1000000.0, 0\], got 1.0"),
        ({"must_do": 5}, r"must_do must be ranges of grid tokens .* got 5"),
        ({"must_do": ((5, 5),)}, "must_do must be ranges of grid tokens"),
        ({"must_do": ((-1, 5),)}, "must_do must be ranges of grid tokens"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        LiteAttention(**options)


def test_must_do_behind_the_grid():
    with pytest.raises(
        ValueError, match=r"must_do has tokens up to 80, and the grid of \(3, 5, 5\).* has 75"
    ):
        Run(LiteAttention(must_do=((70, 80),), block=16), GRID)(drawn(0, 0))
