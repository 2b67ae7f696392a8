"""StreamingLLM: the first tokens and the newest, by positions alone."""

from __future__ import annotations

import vtr

from .kv_sites import KINDS, Cache
from .test_h2o import run


def brute_force(tokens: list[int], number: int, sinks: int) -> set[int]:
    """The columns that stay of all tokens of a sample so far."""
    if len(tokens) <= number:
        return set(tokens)
    return {*tokens[:sinks], *tokens[len(tokens) - number + sinks :]}


def test_the_published_cache_holds_sinks_and_a_window() -> None:
    method = vtr.StreamingLLM(6, evict="all", every=1, first=2, recent=0)
    cache = Cache(*KINDS)
    for site, _, _ in run(cache, method, (14, 1, 1, 1, 1, 1), evict=True):
        assert method.due(site)
        kept = method.compress(site).kept
        for b in range(2):
            tokens = [c for c in range(site.length) if cache.tokens[b, c]]
            for h in range(2):
                columns = site.columns[b, h][kept[b, h]].tolist()
                assert set(columns) == brute_force(tokens, 6, 2)


def test_text_stays_by_default_and_sinks_may_be_visual() -> None:
    cache = Cache("vvvvvvvvtttt", "..ttvvvvtttt")
    site = cache.call(12)
    kept = vtr.StreamingLLM(3, first=2).compress(site).kept
    assert kept[0, 0].tolist() == [c in (0, 1, 7, 8, 9, 10, 11) for c in range(12)]
    assert kept[1, 1].tolist() == [c in (2, 3, 5, 6, 7, 8, 9, 10, 11) for c in range(12)]
