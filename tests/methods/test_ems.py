"""EMS in loops: the global and local score, the three classes, and what merged entries hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from vtr.methods.ems import EMS

from .kv_sites import Cache
from .test_d2o import received
from .test_kv_merge import cosine
from .test_snapkv import window_rows

KINDS = ("..ttvvvvvvvvvttvvvvvttt", "tvvvvvvvvvvvvvttttttttt")


def similar(*kinds: str, **options: Any) -> Cache:
    """Entries of a few kinds with some noise, so that some are redundant."""
    cache = Cache(*kinds, **options)
    g = torch.Generator().manual_seed(5)
    for x in (cache.k, cache.v):
        batch, heads, number, dim = x.shape
        kind = torch.randint(0, 3, (batch, heads, number), generator=g)[..., None]
        centres = torch.randn(batch, heads, 3, dim, generator=g).to(x.dtype)
        x.mul_(0.5).add_(centres.gather(2, kind.expand_as(x)))
    cache.v.copy_((cache.v + cache.k) / 2)
    return cache


def local(cache: Cache, b: int, h: int, held: list[int], number: int) -> dict[int, float]:
    rows = window_rows(cache, b, number=number)
    found, heads = dict.fromkeys(held, 0.0), cache.heads_of(h)
    for head in heads:
        for row in rows:
            for column, weight in cache.attention(b, head, row, held).items():
                found[column] += weight / len(heads) if column < rows[0] else 0.0
    return found


def brute_force(
    cache: Cache, b: int, h: int, held: list[int], always: set[int], number: int, method: Any
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The entries that stay in one head, by column, with their keys and values."""
    everywhere, near = received(cache, b, h, held), local(cache, b, h, held, method.window)
    moving = [c for c in held if c not in always]
    factor = np.mean([everywhere[c] for c in moving]) / np.mean([near[c] for c in moving])
    score = {c: everywhere[c] + factor * near[c] for c in held}
    ranked = sorted(moving, key=lambda c: -score[c])
    important, others = ranked[:number], ranked[number:]
    centres = important if method.evict == "visual" else [*always, *important]
    to_merge = others[: math.floor(method.merge * len(centres))]
    k, v = cache.k[b, h].double().numpy(), cache.v[b, h].double().numpy()
    classes: dict[int, list[tuple[float, int]]] = {c: [(1.0, c)] for c in [*always, *important]}
    for c in to_merge:
        redundancy = {
            m: max(0, cosine(cache.k[b, h, c], cache.k[b, h, m]))
            * max(0, cosine(cache.v[b, h, c], cache.v[b, h, m]))
            for m in centres
        }
        best = max(centres, key=lambda m: redundancy[m])
        if redundancy[best] >= method.threshold:  # else the zero class
            classes[best].append((redundancy[best], c))
    out = {}
    for centre, parts in classes.items():
        total = sum(w for w, _ in parts)
        direction = sum(w * k[c] / np.linalg.norm(k[c]) for w, c in parts)
        norm = sum(w / total * np.linalg.norm(k[c]) for w, c in parts)
        out[centre] = (
            norm * direction / np.linalg.norm(direction),
            sum(w / total * v[c] for w, c in parts),
        )
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.3},
        {"keep": 0.3, "merge": 0.5, "threshold": 0.6},
        {"keep": 0.2, "merge": 10.0, "threshold": 0.2, "window": 4},
        {"keep": 0.4, "merge": 0.0},
        {"keep": 12, "evict": "all", "recent": 4, "first": 2},
    ],
)
def test_a_prompt_is_settled_as_by_the_loops(options: dict[str, Any]) -> None:
    cache, method = similar(*KINDS), EMS(scoring="sum", **options)
    site = cache.call(23)
    method.watch(site)
    change = method.compress(site)
    assert change.k is not None and change.v is not None
    merges = 0
    for b, h, held in cache.live():
        visual = [c for c in held if cache.marks.kind[b, c]]
        if method.evict == "visual":
            always = set(held) - set(visual)
            number = math.ceil(options["keep"] * len(visual) - 1e-9)
        else:
            always = {*held[: method.first], *held[-method.recent :]}
            number = options["keep"] - len(always)
        expected = brute_force(cache, b, h, held, always, number, method)
        assert {c for c in held if change.kept[b, h, c]} == expected.keys()
        for c, (key, value) in expected.items():
            np.testing.assert_allclose(change.k[b, h, c], key, atol=1e-5)
            np.testing.assert_allclose(change.v[b, h, c], value, atol=1e-5)
            merges += not np.allclose(value, cache.v[b, h, c], atol=1e-5)
            if np.allclose(value, cache.v[b, h, c], atol=1e-7):
                assert torch.equal(change.k[b, h, c], cache.k[b, h, c])
    assert (merges > 0) == (method.merge > 0)


def test_the_window_moves_on_while_an_answer_is_written() -> None:
    cache, method = similar(*KINDS), EMS(0.3, every=2, window=3)
    for rows in (19, 1, 1, 1, 1):
        site = cache.call(rows)
        method.watch(site)
        if method.due(site):
            change = method.compress(site)
            cache.keep(change.kept)
    assert site.state["window_columns"].tolist() == [[20, 21, 22], [20, 21, 22]]
    assert all(
        sum(bool(cache.marks.kind[b, c]) for c in held) == (5, 4)[b] for b, h, held in cache.live()
    )


def test_equal_entries_are_left_as_they_are() -> None:
    cache = Cache("ttvvvvvvvvtt")
    cache.k[:, :, 2:10] = cache.k[:, :, 2:3].clone()
    cache.v[:, :, 2:10] = cache.v[:, :, 2:3].clone()
    site = cache.call(12)
    EMS(3).watch(site)
    change = EMS(3).compress(site)
    assert change.k is not None and change.v is not None
    torch.testing.assert_close(change.k, site.k)
    torch.testing.assert_close(change.v, site.v)


def test_keys_keep_their_length() -> None:
    """The mean of two keys of one length is shorter than both; the merged key is not."""
    cache = similar(*KINDS)
    cache.k /= cache.k.norm(dim=-1, keepdim=True)
    site, method = cache.call(23), EMS(0.3, threshold=0.05)
    method.watch(site)
    change = method.compress(site)
    assert change.k is not None and not torch.equal(change.k, site.k)
    torch.testing.assert_close(change.k.norm(dim=-1), torch.ones(2, 2, 23))


def test_everything_stays_with_the_whole_budget() -> None:
    site = Cache(*KINDS).call(23)
    EMS(1.0).watch(site)
    change = EMS(1.0).compress(site)
    assert change.kept[site.valid].all() and change.k is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    site, method = similar(*KINDS, dtype=dtype).call(23), EMS(0.3)
    method.watch(site)
    change = method.compress(site)
    assert change.k is not None and change.v is not None
    assert change.k.dtype == change.v.dtype == dtype and not change.k.isnan().any()


def test_options() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"window": 0}, "window must be an int >= 1"),
        ({"merge": -1}, "merge must be a number in"),
        ({"threshold": 0}, "threshold must be a number in"),
    )
    for options, words in cases:
        with pytest.raises(ValueError, match=words):
            EMS(**options)
