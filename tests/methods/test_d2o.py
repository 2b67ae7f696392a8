"""D2O against the paper in loops: budgets of layers, the threshold, and what merged entries hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.methods.kv_sites import Cache
from tests.methods.test_kv_merge import cosine
from vtr.methods.common.kv_budget import variance_shares
from vtr.methods.d2o import D2O

KINDS = ("..ttvvvvvvvvvttvvvvvttt", "tvvvvvvvvvvvvvttttttttt")
LAYERS = 3


def conversation(seed: int = 0, **options: Any) -> list[Cache]:
    """The layers of a model."""
    return [
        Cache(*KINDS, layer=i, layers=LAYERS, seed=seed + i, sharp=0.5 + 2 * i, **options)
        for i in range(LAYERS)
    ]


def watch(caches: list[Cache], method: Any, rows: int) -> list[Any]:
    """A call of the model: the sites of its layers after all have been watched."""
    memory: dict[str, Any] = {}
    sites = [cache.call(rows, memory=memory) for cache in caches]
    for site in sites:
        method.watch(site)
    for site in sites:
        site.q = None
    return sites


def received(cache: Cache, b: int, h: int, held: list[int]) -> dict[int, float]:
    """The plain sums of attention over all rows of a first call."""
    found = dict.fromkeys(held, 0.0)
    for head in cache.heads_of(h):
        for row in held:
            for column, weight in cache.attention(b, head, row, held).items():
                found[column] += weight
    return found


def settled(
    cache: Cache,
    b: int,
    held: list[list[int]],
    kept: list[set[int]],
    threshold: float | None,
    method: Any,
) -> tuple[dict[Any, Any], float]:
    """What the entries of a sample hold after a choice, by (head, column), and the threshold."""
    pairs = []
    for h, columns in enumerate(held):
        targets = [
            c for c in columns if c in kept[h] and (method.evict == "all" or cache.marks.kind[b, c])
        ]
        for c in columns:
            if c not in kept[h] and targets:
                found = {t: cosine(cache.k[b, h, c], cache.k[b, h, t]) for t in targets}
                best = max(found, key=lambda t: found[t])
                pairs.append((h, c, best, found[best]))
    mean = float(np.mean([u for *_, u in pairs]))
    threshold = mean if threshold is None else method.decay * threshold + (1 - method.decay) * mean
    out = {}
    for h, columns in enumerate(held):
        for c in columns:
            if c not in kept[h]:
                continue
            parts = [(math.e, c)]
            parts += [
                (math.exp(u), j) for g, j, t, u in pairs if (g, t) == (h, c) and u >= threshold
            ]
            total = sum(w for w, _ in parts)
            out[h, c] = [
                sum(w / total * x[b, h, j].double().numpy() for w, j in parts)
                for x in (cache.k, cache.v)
            ]
    return out, threshold


@pytest.mark.parametrize(
    "options", [{"keep": 0.3}, {"keep": 4}, {"keep": 0.4, "evict": "all", "recent": 4}]
)
def test_a_prompt_is_settled_as_by_the_loops(options: dict[str, Any]) -> None:
    caches, method = conversation(), D2O(scoring="sum", first=1, **{"recent": 4, **options})
    sites = watch(caches, method, 23)
    variance, mass = [], {}
    for cache in caches:
        of_heads: Any = {}
        for b, h, held in cache.live():
            mass[cache.layer, b, h] = received(cache, b, h, held)
            of_heads.setdefault(b, []).append(
                np.var(list(mass[cache.layer, b, h].values()), ddof=1)
            )
        variance.append([of_heads[b] for b in range(2)])
    for cache, site in zip(caches, sites, strict=True):
        change = method.compress(site)
        assert change is not None and change.k is not None and change.v is not None
        for b in range(2):
            tokens = [c for c in range(23) if cache.tokens[b, c]]
            visual = [c for c in tokens if cache.marks.kind[b, c]]
            every = visual if method.evict == "visual" else tokens
            images = [int(i) for i in cache.marks.image[b] if i >= 0]
            keep = options["keep"]
            if isinstance(keep, float):
                number = math.ceil(keep * len(every) - 1e-9)
            else:
                number = sum(min(keep, images.count(i)) for i in set(images))
            share = torch.tensor([number / len(every)])
            shares = variance_shares(torch.tensor(variance)[:, b : b + 1], share)[:, 0]
            number = max(1, round(float(shares[cache.layer]) * len(every)))
            if method.evict == "visual":
                always = {c for c in tokens if c not in visual}
            else:
                always = {*tokens[:1], *tokens[-4:]}
                number -= len(always)
            kept = []
            for h in range(2):
                sums = mass[cache.layer, b, h]
                moving = sorted((c for c in tokens if c not in always), key=lambda c: -sums[c])
                kept.append(always | set(moving[: max(0, number)]))
                assert {c for c in tokens if change.kept[b, h, c]} == kept[h]
            expected, threshold = settled(cache, b, [tokens, tokens], kept, None, method)
            assert float(site.state["threshold"][b]) == pytest.approx(threshold, abs=1e-5)
            for (h, c), (key, value) in expected.items():
                np.testing.assert_allclose(change.k[b, h, c], key, atol=1e-5)
                np.testing.assert_allclose(change.v[b, h, c], value, atol=1e-5)


def test_layers_that_attend_evenly_keep_more() -> None:
    method = D2O(0.3, merge=False)
    sites = watch(conversation(), method, 23)
    numbers = torch.stack([method.number(site) for site in sites])
    variances = torch.stack([site.state["variance"].mean(-1) for site in sites])
    assert (variances[:, 0].argsort() == numbers[:, 0].argsort(descending=True)).all()
    assert (numbers.sum(0) - LAYERS * torch.tensor([5, 4])).abs().max() <= LAYERS / 2  # rounding
    assert len(set(numbers[:, 0].tolist())) > 1
    change = method.compress(sites[0])
    assert change is not None and change.k is None


def test_everything_stays_with_the_whole_budget() -> None:
    for site in watch(conversation(), D2O(1.0), 23):
        change = D2O(1.0).compress(site)
        assert change is not None and change.kept[site.valid].all() and change.k is None


def test_the_threshold_moves_on() -> None:
    """Through a second choice in a later turn; a sample that loses nothing keeps its own."""
    caches, method = conversation(), D2O(0.4, scoring="sum", decay=0.25)
    first = watch(caches, method, 15)
    for cache, site in zip(caches, first, strict=True):
        change = method.compress(site)
        assert change is not None and change.k is not None and change.v is not None
        cache.keep(change.kept)
    before = [site.state["threshold"].clone() for site in first]
    for cache, site, old in zip(caches, watch(caches, method, 8), before, strict=True):
        held = {(b, h): columns for b, h, columns in cache.live()}
        change = method.compress(site)
        assert change is not None
        at = site.columns
        for b in range(2):
            kept = [
                {int(c) for c, stays in zip(at[b, h], change.kept[b, h], strict=True) if stays}
                for h in range(2)
            ]
            if all(kept[h] == set(held[b, h]) for h in range(2)):
                assert site.state["threshold"][b] == old[b]
                continue
            columns = [held[b, h] for h in range(2)]
            _, threshold = settled(cache, b, columns, kept, float(old[b]), method)
            assert float(site.state["threshold"][b]) == pytest.approx(threshold, abs=1e-5)


def test_equal_entries_are_left_as_they_are() -> None:
    """The released rule shrinks them."""
    cache = Cache("ttvvvvvvvvtt", layer=0, layers=1)
    cache.k[:, :, 2:10] = cache.k[:, :, 2:3].clone()
    cache.v[:, :, 2:10] = cache.v[:, :, 2:3].clone()
    (site,) = watch([cache], D2O(3), 12)
    change = D2O(3).compress(site)
    assert change is not None and change.k is not None and change.v is not None
    assert int(change.kept[0, 0, 2:10].sum()) == 3
    torch.testing.assert_close(change.k, site.k)
    torch.testing.assert_close(change.v, site.v)


def test_a_sample_is_settled_as_it_is_alone() -> None:
    caches, method = conversation(), D2O(0.3)
    together = [method.compress(site) for site in watch(caches, method, 23)]
    for b in range(2):
        lonely = [cache.alone(b) for cache in caches]
        sites = watch(lonely, method, len(lonely[0].kinds[0]))
        for change, site, cache in zip(together, sites, caches, strict=True):
            alone = method.compress(site)
            tokens = cache.tokens[b]
            assert change is not None and alone is not None
            assert torch.equal(change.kept[b][:, tokens], alone.kept[0])
            for x, y in ((change.k, alone.k), (change.v, alone.v)):
                assert x is not None and y is not None
                torch.testing.assert_close(x[b][:, tokens], y[0], atol=1e-5, rtol=0)


def test_options() -> None:
    for options, words in (
        ({"merge": 1}, "merge must be True or False, got 1"),
        ({"decay": 2}, "decay must be a number in"),
        ({"bytes": "1MB"}, "D2O divides keep among the layers itself"),
        ({"depth": "pyramid"}, "D2O divides keep among the layers itself"),
    ):
        with pytest.raises(ValueError, match=words):
            D2O(**options)
