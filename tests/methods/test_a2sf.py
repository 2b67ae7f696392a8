"""A2SF: forgetting, between TOVA and H2O. Its scores in loops are in test_h2o.py."""

from __future__ import annotations

import pytest
import torch

import vtr

from .kv_sites import KINDS, Cache
from .test_h2o import CALLS, run


@pytest.mark.parametrize("scoring", ["fair", "mean", "sum"])
def test_alpha_1_is_h2o(scoring: str) -> None:
    pairs = (
        run(Cache(*KINDS), method, evict=True)
        for method in (
            vtr.A2SF(0.5, alpha=1, scoring=scoring, evict="all", every=1, first=1, recent=1),
            vtr.H2O(0.5, scoring=scoring, evict="all", every=1, first=1, recent=1),
        )
    )
    number = 0
    for (site, _, score), (other, _, same) in zip(*pairs, strict=True):
        assert torch.equal(site.columns, other.columns) and torch.equal(score, same)
        number += 1
    assert number == len(CALLS)


def test_alpha_0_is_tova() -> None:
    """TOVA ranks by the attention of the newest row alone."""
    cache = Cache(*KINDS)
    for site, held, score in run(cache, vtr.A2SF(alpha=0)):
        for b in range(2):
            row = held[b][-1][1] - 1
            for h in range(2):
                columns = held[b][-1][2][h]
                rows = [cache.attention(b, n, row, columns) for n in cache.heads_of(h)]
                for c, x in cache.table(score, b, h).items():
                    assert x == pytest.approx(sum(r[c] for r in rows), abs=1e-6)
        assert site.length == row + 1


def test_rows_that_weigh_nothing_are_not_computed() -> None:
    cache = Cache("t" + "v" * 40 + "t" * 40)
    site = cache.call(81)
    for alpha, wanted in ((0.0, 1), (0.3, 18), (0.7, 41), (1.0, 41)):
        asked = []

        def count(rows, *, decay=None, asked=asked, whole=site.column_sums):
            asked.append(rows.shape[1])
            return whole(rows, decay=decay)

        site.column_sums = count  # type: ignore[method-assign]
        vtr.A2SF(alpha=alpha).watch(site)
        assert asked == [wanted]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"alpha must be a number in \[0, 1\], got 1.5"):
        vtr.A2SF(alpha=1.5)
