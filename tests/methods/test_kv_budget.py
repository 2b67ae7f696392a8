"""Shares of a cache budget among heads and layers, against slow readings of the papers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from vtr.methods.common.kv_budget import adaptive_heads, pyramid, variance_shares

SHARE = 1 << 20


def brute_force(
    scores: np.ndarray, allowed: np.ndarray, number: int, floor: float
) -> tuple[list[int], list[int], list[int]]:
    """The counts of AdaKV for one sample, then those of the pooled order and those divided evenly."""
    heads, columns = scores.shape
    candidates = [int(allowed[h].sum()) for h in range(heads)]
    total = min(number * heads, sum(candidates))
    order = sorted(
        ((h, j) for h in range(heads) for j in range(columns) if allowed[h, j]),
        key=lambda pair: -float(scores[pair]),
    )
    pooled = [0] * heads
    for h, _ in order[:total]:
        pooled[h] += 1
    even = [0] * heads
    while sum(even) < total:
        h = min((h for h in range(heads) if even[h] < candidates[h]), key=lambda h: (even[h], h))
        even[h] += 1
    share = Fraction(round(floor * SHARE), SHARE)
    exact = [share * e + (1 - share) * p for e, p in zip(even, pooled, strict=True)]
    counts = [int(x) for x in exact]
    first = sorted(range(heads), key=lambda h: counts[h] - exact[h])
    for h in first[: total - sum(counts)]:
        counts[h] += 1
    return counts, pooled, even


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_heads_get_what_the_loops_give_them(heads: int, floor: float) -> None:
    rng = np.random.default_rng(heads)
    batch, columns = 12, 17
    scores = rng.normal(size=(batch, heads, columns)).astype(np.float32)
    scores[1] = scores[1].round()  # ties
    allowed = rng.random((batch, heads, columns)) < rng.random((batch, heads, 1)) * 1.3
    allowed[2] = True
    allowed[3, 0] = False
    number = rng.integers(0, columns + 3, batch)
    number[4] = 0
    got = adaptive_heads(
        torch.from_numpy(scores), torch.from_numpy(allowed), torch.from_numpy(number), floor
    )
    assert got.dtype == torch.int64 and got.shape == (batch, heads)
    for b in range(batch):
        counts, pooled, even = brute_force(scores[b], allowed[b], int(number[b]), floor)
        assert got[b].tolist() == counts
        assert sum(counts) == min(number[b] * heads, allowed[b].sum())
        assert all(c <= n for c, n in zip(counts, allowed[b].sum(-1), strict=True))
        assert all(c >= int(floor * e) for c, e in zip(counts, even, strict=True))
        assert counts == {0.0: pooled, 1.0: even}.get(floor, counts)


def test_a_head_without_mass_keeps_its_floor() -> None:
    scores = torch.stack([torch.ones(10), torch.zeros(10)])[None]
    allowed, number = torch.ones(1, 2, 10, dtype=torch.bool), torch.tensor([5])
    assert adaptive_heads(scores, allowed, number, 0.0).tolist() == [[10, 0]]
    assert adaptive_heads(scores, allowed, number, 0.2).tolist() == [[9, 1]]
    assert adaptive_heads(scores, allowed, number, 1.0).tolist() == [[5, 5]]


def test_entries_that_may_not_compete_are_not_counted() -> None:
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[[inf, inf, 1.0, nan], [-inf, -inf, -inf, 0.5]]])
    allowed = torch.tensor([[[False, False, True, True], [True, True, True, True]]])
    assert adaptive_heads(scores, allowed, torch.tensor([1]), 0.0).tolist() == [[1, 1]]
    assert adaptive_heads(scores, allowed, torch.tensor([9]), 0.0).tolist() == [[2, 4]]


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.55, 0.9, 1.0])
@pytest.mark.parametrize("layers", [1, 2, 7, 32])
@pytest.mark.parametrize("beta", [1, 2.5, 20])
def test_layers_decrease_in_equal_steps(share: float, layers: int, beta: float) -> None:
    shares = pyramid(share, layers, beta)
    assert len(shares) == layers and all(0 < s <= 1 for s in shares)
    assert np.mean(shares) == pytest.approx(share, abs=1e-12)
    steps = -np.diff(shares)
    assert np.ptp(steps) < 1e-12 if layers > 2 else True
    assert all(steps >= 0)
    if layers > 1:
        low = share / beta if share * (2 - 1 / beta) <= 1 else 2 * share - 1
        assert shares[-1] == pytest.approx(low, abs=1e-12)


def test_a_pyramid_by_hand() -> None:
    assert pyramid(0.2, 3) == pytest.approx([0.39, 0.2, 0.01])
    assert pyramid(0.75, 3) == pytest.approx([1.0, 0.75, 0.5])
    assert pyramid(0.3, 1) == [0.3]


def test_layers_that_attend_evenly_keep_more() -> None:
    rng = np.random.default_rng(0)
    layers, heads = 4, 5
    share = np.array([0.0, 0.05, 0.4, 0.7, 0.9, 1.0])
    variance = rng.random((layers, len(share), heads)) ** 3 * 100
    got = variance_shares(torch.from_numpy(variance).float(), torch.from_numpy(share)).numpy()
    assert got.dtype == np.float64
    cut = 0
    for b in range(len(share)):
        v = np.array([np.mean(variance[layer, b]) for layer in range(layers)])
        spread = (v - min(v)) / (max(v) - min(v))
        weight = np.exp(-spread)
        weight /= weight.sum()
        expected, full = weight * layers * share[b], np.zeros(layers, bool)
        while (expected > 1 + 1e-9).any():  # what is cut off goes to the layers that are not full
            full |= expected > 1 + 1e-9
            rest = share[b] * layers - full.sum()
            expected = np.where(full, 1.0, weight / max(weight[~full].sum(), 1e-300) * rest)
            cut += 1
        np.testing.assert_allclose(got[:, b], expected, rtol=1e-5)
        assert got[:, b].mean() == pytest.approx(share[b], abs=1e-12)
        assert all(np.diff(got[np.argsort(spread), b]) <= 0)
    assert cut > 1 and (got[:, -1] == 1).all()


def test_equal_layers_share_alike() -> None:
    for variance in (torch.rand(1, 2, 3).expand(6, -1, -1), torch.zeros(6, 2, 1)):
        got = variance_shares(variance, torch.full((2,), 0.3))
        expected = torch.full((6, 2), 0.3, dtype=torch.float64)
        torch.testing.assert_close(got, expected, atol=1e-7, rtol=0)
    assert variance_shares(torch.rand(1, 2, 3), torch.full((2,), 0.3)).shape == (1, 2)
