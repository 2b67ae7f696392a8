"""Merging entries that leave into those that stay, against loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vtr.methods.common import kv_merge
from vtr.methods.common.kv_merge import merged, nearest, receives


def drawn(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Keys, values, losers and targets of heads with different numbers of both; some have none."""
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(3, 2, 11, 4, generator=g).to(dtype) for _ in range(2))
    kind = torch.randint(0, 3, (3, 2, 11), generator=g)
    kind[0, 1][kind[0, 1] == 0] = 2  # no target
    kind[1, 0][kind[1, 0] == 1] = 2  # no loser
    return k, v, kind == 1, kind == 0


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("pairs", [1, 1 << 26])
def test_each_loser_finds_its_nearest_target(
    both: bool, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_merge, "_PAIRS", pairs)
    k, v, losers, targets = drawn()
    alike, target = nearest((k, v) if both else (k,), losers, targets)
    for b, h, j in np.ndindex(3, 2, 11):
        there = [m for m in range(11) if targets[b, h, m]]
        if not losers[b, h, j] or not there:
            assert target[b, h, j] == j and alike[b, h, j] == -float("inf")
            continue
        found = {}
        for m in there:
            found[m] = cosine(k[b, h, j], k[b, h, m])
            if both:
                found[m] = max(0, found[m]) * max(0, cosine(v[b, h, j], v[b, h, m]))
        best = max(found.values())
        assert float(alike[b, h, j]) == pytest.approx(best, abs=1e-6)
        assert found[int(target[b, h, j])] == pytest.approx(best, abs=1e-6)


def test_nothing_to_merge() -> None:
    k, _, losers, targets = drawn()
    for gone, there in ((losers & False, targets), (losers, targets & False)):
        alike, target = nearest((k,), gone, there)
        assert (alike == -float("inf")).all() and (target == torch.arange(11)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_entry_is_the_weighted_mean(dtype: torch.dtype) -> None:
    k, _, losers, targets = drawn(1, dtype)
    _, target = nearest((k,), losers, targets)
    weight = torch.rand(losers.shape, generator=torch.Generator().manual_seed(3)) + 0.1
    weight[0, 0, ::2] *= (~losers[0, 0, ::2]).float()  # some are dropped
    out = merged(k, weight, target)
    assert out.dtype == dtype
    for b, h, m in np.ndindex(3, 2, 11):
        if losers[b, h, m]:
            continue
        comes = [j for j in range(11) if j != m and target[b, h, j] == m and weight[b, h, j] > 0]
        assert bool(receives(weight, target)[b, h, m]) == bool(comes)
        if not comes:
            assert torch.equal(out[b, h, m], k[b, h, m])
            continue
        parts = [(float(weight[b, h, j]), k[b, h, j].double().numpy()) for j in [m, *comes]]
        mean = sum(w * x for w, x in parts) / sum(w for w, _ in parts)
        atol = 1e-6 if dtype == torch.float32 else 8e-3 * np.abs(mean).max()
        np.testing.assert_allclose(out[b, h, m].double(), mean, atol=atol)


def test_equal_entries_stay_what_they_are() -> None:
    row = torch.randn(1, 1, 1, 8)
    weight = torch.rand(1, 1, 6) + 0.5
    out = merged(row.expand(1, 1, 6, 8), weight, torch.zeros(1, 1, 6, dtype=torch.int64))
    torch.testing.assert_close(out[:, :, :1], row, atol=1e-6, rtol=1e-6)
