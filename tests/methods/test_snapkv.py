"""SnapKV against the paper in loops, and its window through later turns and decoding steps."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from tests.methods.kv_sites import KINDS, Cache
from vtr.methods.common.kv_window import pooled
from vtr.methods.snapkv import SnapKV

LONG = ("..tttvvvvvvvvttvvvvtttttt", "tvvvvvvvvvvttttvvvvvttttt")


def window_rows(cache: Cache, b: int, *, number: int, start: int = 0) -> list[int]:
    """The last tokens of a sample since ``start``, those behind its last visual token if there are any."""
    tokens = [c for c in range(start, cache.length) if cache.tokens[b, c]]
    last = max([c for c in tokens if cache.marks.kind[b, c]], default=-1)
    return [c for c in tokens[-number:] if c > last] or tokens[-number:]


def brute_force(
    cache: Cache, b: int, h: int, held: list[int], rows: list[int], method: Any
) -> dict[int, float]:
    """Scores of the entries of one head by column; the entries of the window have inf."""
    mass = dict.fromkeys(held, 0.0)
    heads = cache.heads_of(h)
    for head in heads:
        for row in rows:
            for column, weight in cache.attention(b, head, row, held).items():
                if column < rows[0]:
                    mass[column] += weight / len(heads)
    score, half = {}, method.kernel // 2
    for i, column in enumerate(held):
        near = [mass[held[j]] for j in range(max(0, i - half), min(len(held), i + half + 1))]
        score[column] = sum(near) / method.kernel if method.pooling == "avg" else max(near)
    return {c: float("inf") if c >= rows[0] else s for c, s in score.items()}


def check(cache: Cache, site: Any, method: Any, rows: Any) -> None:
    scores = method.score(site)
    assert scores.dtype == torch.float32
    for b, h, held in cache.live():
        expected = brute_force(cache, b, h, held, rows(b), method)
        found = cache.table(scores, b, h)
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-6)


@pytest.mark.parametrize("kinds", [KINDS, LONG, ("tvvvvvvvv",)])
@pytest.mark.parametrize(
    "options",
    [{"window": 3}, {"window": 64, "kernel": 1}, {"window": 4, "kernel": 3, "pooling": "max"}],
)
def test_scores_are_those_of_the_loops(kinds: tuple[str, ...], options: dict[str, Any]) -> None:
    cache, method = Cache(*kinds), SnapKV(**options)
    site = cache.call(len(kinds[0]))
    check(cache, site, method, lambda b: window_rows(cache, b, number=method.window))


def test_a_later_turn_scores_what_is_held() -> None:
    """Heads hold entries of different tokens, and different numbers of them."""
    cache, method = Cache(*LONG), SnapKV(window=3, kernel=3)
    site = cache.call(14)
    g = torch.Generator().manual_seed(1)
    cache.keep(site.valid & (site.text | (torch.rand(site.columns.shape, generator=g) < 0.6)))
    site = cache.call(11)
    assert site.phase == "turn" and (site.columns < 0).any()
    check(cache, site, method, lambda b: window_rows(cache, b, number=3, start=14))


def test_the_window_moves_on_while_an_answer_is_written() -> None:
    cache, method = Cache(*LONG), SnapKV(window=4, every=1)
    start = 0
    for rows in (13, 7, 1, 1, 1, 1, 1):
        site = cache.call(rows)
        method.watch(site)
        start = cache.length - rows if site.visited else start
        check(cache, site, method, functools.partial(window_rows, cache, number=4, start=start))
    assert site.state["window_queries"].shape[2] == 4


def test_a_sample_is_scored_as_it_is_alone() -> None:
    kinds = ("...ttvvvvvvttttt", "tvvvvvvvttttt...", "ttvvvvvvvvvvvttt")
    cache, method = Cache(*kinds), SnapKV(window=4)
    together = method.score(cache.call(16))
    for b in range(3):
        alone = cache.alone(b)
        score = method.score(alone.call(len(alone.kinds[0])))
        for h in range(2):
            columns = [c for c in range(16) if cache.tokens[b, c]]
            found = cache.table(together, b, h)
            np.testing.assert_allclose(
                [found[c] for c in columns], list(alone.table(score, 0, h).values()), atol=1e-6
            )


def test_what_the_window_attends_to_stays() -> None:
    """A planted entry that all rows attend to is kept with its neighbours, in its own head alone."""
    cache = Cache("ttvvvvvvvvvvvvtttt", sharp=0.0)
    cache.q[:, :2] = 1.0
    cache.k[0, 0, 7] = 5.0
    change = SnapKV(3, window=3, kernel=3).compress(cache.call(18))
    assert change is not None
    kept = change.kept[0]
    assert [c for c in range(2, 14) if kept[0, c]] == [6, 7, 8]
    assert kept.sum(-1).tolist() == [9, 9] and kept[:, [0, 1, 14, 15, 16, 17]].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_in_half_precision(dtype: torch.dtype) -> None:
    cache = Cache(*LONG, dtype=dtype)
    score = SnapKV(window=4).score(cache.call(25))
    assert score.dtype == torch.float32 and not score.isnan().any()


def test_pooling_skips_what_is_no_token() -> None:
    mass = torch.tensor([[[9.0, 3.0, 9.0, 6.0, 0.0, 9.0]]])
    valid = torch.tensor([[[False, True, False, True, True, False]]])
    assert pooled(mass, valid, 3, "avg").tolist() == [[[0.0, 3.0, 0.0, 3.0, 2.0, 0.0]]]
    assert pooled(mass, valid, 3, "max").tolist() == [[[0.0, 6.0, 0.0, 6.0, 6.0, 0.0]]]


def test_options() -> None:
    with pytest.raises(ValueError, match="window must be an int >= 1"):
        SnapKV(window=0)
    with pytest.raises(ValueError, match="kernel must be an int >= 1"):
        SnapKV(kernel=0)
    with pytest.raises(ValueError, match="kernel must be odd, so that it has a middle, got 4"):
        SnapKV(kernel=4)
    with pytest.raises(ValueError, match="pooling must be 'avg' or 'max', got 'sum'"):
        SnapKV(pooling="sum")
