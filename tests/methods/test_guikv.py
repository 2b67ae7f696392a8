"""GUI-KV against the paper in loops: saliency, redundancy, and SnapKV without both."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.methods import test_snapkv
from tests.methods.kv_sites import Cache
from vtr.methods.common.kv_frames import first_basis, principal_basis, residual
from vtr.methods.guikv import GUIKV
from vtr.methods.snapkv import SnapKV

SCREENS = ("..tvvvvvvvtvvvvvvtvvvvvvvvtttt", "ttvvvvvvvvvvvvttvvvvvvvvtttttt")
"""Three screenshots, and two."""


def basis(keys: np.ndarray, method: Any, rank: int) -> np.ndarray:
    """An orthonormal basis (D, R) of keys (n, D)."""
    if method.basis == "principal":
        return np.linalg.svd(keys.T)[0][:, : min(rank, len(keys))]
    found: list[np.ndarray] = []
    for key in keys[:rank]:  # Gram and Schmidt
        rest = key - sum((key @ u) * u for u in found)
        found.append(rest / np.linalg.norm(rest))
    return np.stack(found, 1)


def brute_force(
    cache: Cache,
    b: int,
    h: int,
    held: list[int],
    rows: list[int],
    start: int,
    method: Any,
    number: int,
) -> dict[int, float]:
    """Scores of the entries of one head by column."""
    score = test_snapkv.brute_force(cache, b, h, held, rows, method)
    frame = {c: int(cache.marks.frame[b, c]) for c in held}
    last = max(frame.values())
    current = [c for c in held if frame[c] == last]
    fresh = [c for c in current if c >= start]
    if method.spatial and fresh:
        norm = np.array([np.linalg.norm(cache.hidden[b, c].double().numpy()) for c in fresh])
        z = (norm - norm.mean()) / max(norm.std(), 1e-3 * norm.mean())
        weight = np.exp(z / method.temperature)
        for c, w in zip(fresh, weight / weight.sum(), strict=True):
            score[c] += method.spatial * w
    earlier = [c for c in held if 0 <= frame[c] < last]
    if method.temporal and earlier:
        keys = cache.k[b, h].double().numpy()
        rank = method.rank or cache.k.shape[3] // 4
        span = basis(keys[current], method, rank)
        rest = {c: np.linalg.norm(keys[c] - span @ (span.T @ keys[c])) for c in earlier}
        if method.evict == "visual":
            candidates = sum(bool(cache.marks.kind[b, c]) for c in held)
        else:
            candidates = len(held)
        share = min(1.0, number / candidates)
        for c in sorted(earlier, key=lambda c: rest[c])[
            : math.floor((1 - share) * len(earlier) + 1e-9)
        ]:
            score[c] = 0.0 if math.isfinite(score[c]) else score[c]
    return score


def check(cache: Cache, site: Any, method: Any, start: int) -> None:
    scores = method.score(site)
    number = method.number(site).tolist()
    for b, h, held in cache.live():
        rows = test_snapkv.window_rows(cache, b, number=method.window, start=start)
        expected = brute_force(cache, b, h, held, rows, start, method, number[b])
        found = cache.table(scores, b, h)
        np.testing.assert_allclose([found[c] for c in held], [expected[c] for c in held], atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.3},
        {"keep": 0.6, "spatial": 0.1, "temperature": 1.0, "rank": 3},
        {"keep": 2, "temporal": False, "kernel": 1},
        {"keep": 0.3, "spatial": 0, "basis": "principal", "rank": 5},
        {"keep": 12, "evict": "all"},
        {"keep": 1.0},
    ],
)
def test_scores_are_those_of_the_loops(options: dict[str, Any]) -> None:
    cache, method = Cache(*SCREENS), GUIKV(**options)
    check(cache, cache.call(30), method, 0)


@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_screenshots_of_earlier_turns_are_compared(keep: float) -> None:
    """What is left of them in each head; screenshots come one by one, and a question without one."""
    cache, method = Cache(*SCREENS), GUIKV(keep)
    start = 0
    for rows in (11, 6, 9, 4):
        site = cache.call(rows)
        check(cache, site, method, start)
        start = cache.length
        change = method.compress(site)
        assert change is not None
        kept = change.kept
        kept[:, 0] &= (site.columns[:, 0] % 5 > 0) | ~site.visual[:, 0]  # heads differ in number
        cache.keep(kept)
    assert (cache.columns < 0).any()


def test_without_both_terms_it_is_snapkv() -> None:
    options: dict[str, Any] = {"window": 4, "kernel": 3, "pooling": "max"}
    for seed in range(3):
        site = Cache(*SCREENS, seed=seed).call(30)
        plain = GUIKV(0.3, spatial=0, temporal=False, **options)
        assert torch.equal(plain.score(site), SnapKV(0.3, **options).score(site))
        # One screenshot: nothing comes before it.
        site = Cache("ttvvvvvvvvvvtttttt", seed=seed).call(18)
        assert torch.equal(
            GUIKV(0.3, spatial=0, **options).score(site), SnapKV(0.3, **options).score(site)
        )
    info = site.info
    assert "hidden" in GUIKV().requirements(info)["kv"]
    assert "hidden" not in GUIKV(spatial=0).requirements(info)["kv"]


def test_norms_that_are_equal_up_to_rounding_are_equal() -> None:
    cache = Cache("ttvvvvvvvvvvtttttt")
    cache.hidden /= cache.hidden.norm(dim=-1, keepdim=True)
    site = cache.call(18)
    plain, salient = (GUIKV(0.3, spatial=x).score(site)[site.visual] for x in (0.0, 1.0))
    torch.testing.assert_close(salient - plain, torch.full_like(plain, 0.1), atol=1e-5, rtol=0)


def test_the_published_subspace_is_that_of_the_first_keys() -> None:
    """At the published size: 32 of 128 dimensions."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 200, 128, generator=g)
    inside = torch.ones(1, 2, 200, dtype=torch.bool)
    inside[:, :, :50] = False
    rest = residual(keys, first_basis(keys, inside, 32)) / keys.norm(dim=-1)
    assert rest[:, :, 50:82].max() < 1e-5
    assert rest[:, :, 82:].min() > 0.7 and rest[:, :, :50].min() > 0.7
    full = np.linalg.qr(keys[0, 1, 50:].double().numpy().T)[0][:, :32]
    theirs = np.linalg.norm(keys[0, 1].double().numpy() @ (np.eye(128) - full @ full.T), axis=1)
    np.testing.assert_allclose(rest[0, 1] * keys[0, 1].norm(dim=-1), theirs, atol=2e-5)


@pytest.mark.parametrize("find", [first_basis, principal_basis])
def test_few_keys_span_what_they_span(find: Any) -> None:
    keys = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(2))
    inside = torch.tensor([[[True, False, True, False, False, False]]])
    span = find(keys, inside, 5)
    assert span.square().sum() == pytest.approx(2, abs=1e-5)
    rest = residual(keys, span)[0, 0]
    assert rest[[0, 2]].max() < 1e-5 and rest[[1, 3, 4, 5]].min() > 0.1
    assert not find(keys, torch.zeros_like(inside), 5).any()
    keys[:, :, 2] = keys[:, :, 0]  # a screen of one colour
    assert residual(keys, find(keys, inside, 5))[0, 0, [0, 2]].max() < 1e-5


def test_an_unchanged_screen_goes_before_a_changed_one() -> None:
    """The second screenshot repeats the first half of the first one."""
    cache = Cache("tvvvvvvvvtvvvvvvvvttt", sharp=0.0, dim=16)
    cache.k[:, :, 10:14] = cache.k[:, :, 1:5]
    change = GUIKV(0.5, spatial=0.0, kernel=1, rank=4).compress(cache.call(21))
    assert change is not None and not change.kept[:, :, 1:5].any()
    assert change.kept[:, :, 5:9].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_in_half_precision(dtype: torch.dtype) -> None:
    score = GUIKV(0.3).score(Cache(*SCREENS, dtype=dtype).call(30))
    assert score.dtype == torch.float32 and not score.isnan().any()


def test_options() -> None:
    for options, words in (
        ({"spatial": -1}, "spatial must be a number in"),
        ({"temperature": 0}, "temperature must be a number in"),
        ({"temporal": 1}, "temporal must be True or False, got 1"),
        ({"basis": "pca"}, "basis must be 'first' or 'principal', got 'pca'"),
        ({"rank": 0}, "rank must be an int >= 1 or None, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            GUIKV(**options)
    with pytest.raises(ValueError, match="rank must be below the width of a head, which is 8 here"):
        GUIKV(rank=8).score(Cache(*SCREENS).call(30))
