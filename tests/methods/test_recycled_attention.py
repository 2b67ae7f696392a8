"""Recycled Attention against its paper, read slowly, through prompts, steps, turns, crops and beams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vtr
from tests.methods.decode_sites import alone, always, attention, others, read, seen
from tests.methods.prompts import TOLERANCE, dense, qkv, site_of
from vtr.core.language_attention import LanguageAttentionSite

KIND = torch.zeros(200, dtype=torch.int64)
KIND[3:40] = 1
KIND[70:90] = 1


class Cache:
    """A layer's cache that grows from call to call."""

    def __init__(self, batch: int = 2, padding: int = 6, window: int | None = None,
                 dtype: torch.dtype = torch.float32, similar: float = 1.0) -> None:  # fmt: skip
        q, self.k, self.v = qkv(200, 200, batch=batch, dtype=dtype, seed=5)
        first = q[:, :, :1]
        self.q = first * similar + q  # queries are more alike
        self.valid = torch.arange(200) >= torch.tensor([0, padding, 3])[:batch, None]
        self.window, self.state, self.length = window, {}, 0

    def call(self, rows: int, let_go: int = 0) -> LanguageAttentionSite:
        """The site of a call with so many rows; the oldest columns are let go of if there is a window."""
        start, self.length = self.length, self.length + rows
        oldest = max(0, start - (self.window or 999) + 1)
        span = slice(oldest, self.length)
        kind = KIND[span].expand(len(self.q), -1) * self.valid[:, span]
        marks = type("M", (), {"kind": kind})
        return site_of(
            self.q[:, :, start : self.length], self.k[:, :, span], self.v[:, :, span],
            valid=self.valid[:, span], state=self.state, window=self.window,
            phase="decode" if rows == 1 else "turn" if start else "prefill",
            marks=lambda places: marks,
        )  # fmt: skip


def best(method: vtr.RecycledAttention, site: Any, b: int, h: int) -> set[int]:
    """The visual columns that a key head of a sample chooses by the last row."""
    last = LanguageAttentionSite.__new__(LanguageAttentionSite)
    last.__dict__.update(site.__dict__)
    last.q = site.q[:, :, -1:]
    group, weight = site.q.shape[1] // site.k.shape[1], attention(last)[b]
    columns, reach = weight.shape[1], method.kernel // 2
    score = {
        c: max(
            weight[g, n]
            for g in range(h * group, (h + 1) * group)
            for n in range(max(0, c - reach), min(columns, c + reach + 1))
        )
        for c in others(last, b, method.recent)
    }
    number = method.keys
    if isinstance(number, float):
        number = int(np.ceil(number * len(score) - 1e-9))
    return set(sorted(score, key=lambda c: (-score[c], c))[:number])


def brute_force(method: vtr.RecycledAttention, sites: list[Any]) -> list[Any]:
    """Outputs of the decoding steps among calls that follow each other, (B, H, 1, D) each; None for others.

    Columns are numbered through the conversation.
    """
    batch, heads = sites[0].k.shape[:2]
    kept: dict[tuple[int, int], set[int]] = {}
    since, query, out, end = [0] * batch, [None] * batch, [], 0
    for site in sites:
        end += site.q.shape[2]
        gone = end - site.k.shape[2]
        if site.q.shape[2] > 1:
            for b in range(batch):
                since[b], query[b] = end, site.q[b, :, -1].double().numpy().ravel()
                for h in range(heads):
                    kept[b, h] = {c + gone for c in best(method, site, b, h)}
            out.append(None)
            continue
        sets = []
        for b in range(batch):
            new = site.q[b, :, 0].double().numpy().ravel()
            full = end - since[b] >= method.stride
            if full:
                since[b] = end
                if method.similarity is not None:
                    cosine = new @ query[b] / np.linalg.norm(new) / np.linalg.norm(query[b])
                    full = cosine < method.similarity
            everything = set(np.flatnonzero(seen(site)[b]).tolist())
            row = []
            for h in range(heads):
                known = {c - gone for c in kept[b, h]}
                row.append(
                    everything if full else always(site, b, method.recent) | known & everything
                )
                if full:
                    kept[b, h] = {c + gone for c in best(method, site, b, h)}
            if full:
                query[b] = new
            sets.append(row)
        out.append(read(site, sets))
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "method",
    [
        vtr.RecycledAttention(4, stride=3),
        vtr.RecycledAttention(0.25, stride=50, kernel=5),
        vtr.RecycledAttention(5, stride=2, similarity=0.8, kernel=3),
        vtr.RecycledAttention(5, stride=1, similarity=0.8, recent=12),
    ],
    ids=str,
)
def test_steps_read_what_the_last_full_step_chose(
    method: vtr.RecycledAttention, dtype: torch.dtype
) -> None:
    """A prompt, steps, a turn with another picture, steps."""
    cache = Cache(dtype=dtype, similar=2.0)
    sites = [cache.call(n) for n in (60, *[1] * 7, 30, *[1] * 7)]
    wanted = brute_force(method, sites)
    for site, expected in zip(sites, wanted, strict=True):
        found = method.attend(site)
        if expected is None:
            assert torch.equal(found, dense(site))
        else:
            np.testing.assert_allclose(found.double(), expected, atol=TOLERANCE[dtype])
    shares = [float(s.notes["work"] / s.pairs) for s in sites if s.phase == "decode"]
    assert min(shares) < 0.6 and (max(shares) > 0.7) == (method.stride < 50)


def test_samples_of_a_batch_decide_alone() -> None:
    """With a similarity between those of two samples, one of them has a full step and the other has not."""
    method = vtr.RecycledAttention(4, stride=1, similarity=0.8)
    cache = Cache(similar=2.0)
    sites = [cache.call(n) for n in (60, *[1] * 8)]
    out = [method.attend(site) for site in sites]
    mixed = 0
    for b in range(2):
        state: dict[str, Any] = {}
        for site, both in zip(sites, out, strict=True):
            kind = site.visual[b, site.valid[b]][None].long()
            marks = type("M", (), {"kind": kind})
            own = alone(site, b, state=state, phase=site.phase, marks=lambda places, m=marks: m)
            if site.phase == "prefill":
                own.q = site.q[b : b + 1, :, site.valid[b]]
                method.attend(own)
                continue
            torch.testing.assert_close(both[b : b + 1], method.attend(own), atol=1e-6, rtol=0)
            mixed += 0 < float(site.notes["work"] / site.pairs) < 1
    assert mixed


def test_what_a_full_window_lets_go_of_moves_the_columns() -> None:
    method = vtr.RecycledAttention(6, stride=9)
    cache = Cache(window=50)
    sites = [cache.call(n) for n in (42, *[1] * 25)]
    for site, expected in zip(sites, brute_force(method, sites), strict=True):
        found = method.attend(site)
        if expected is not None:
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_cropped_cache() -> None:
    """Cropped behind the row that chose, its choice is read; cropped before it, the next step is full."""
    method, cache = vtr.RecycledAttention(4, stride=50), Cache()
    sites = [cache.call(n) for n in (60, 1, 1, 1, 5)]  # the last one is a draft
    for site in sites[:4]:
        method.attend(site)
    chosen = cache.state["columns"]
    cache.length = 61  # without two of the steps
    site = cache.call(1)
    sparse = method.attend(site)
    assert not torch.allclose(sparse, dense(site), atol=1e-4)
    assert torch.equal(cache.state["columns"], chosen)
    method.attend(sites[4])
    cache.length = 64  # one drafted token is right: the row that chose is gone
    site = cache.call(1)
    torch.testing.assert_close(method.attend(site), dense(site), atol=1e-6, rtol=0)
    assert cache.state["since"] == 65
    assert not torch.allclose(method.attend(cache.call(1)), dense(site), atol=1e-4)


def test_bad_options() -> None:
    for options, message in (
        ({"stride": 0}, "stride must be an int >= 1, got 0"),
        ({"kernel": 4}, "kernel must be odd, got 4"),
        ({"kernel": 0}, "kernel must be an int >= 1"),
        ({"similarity": 1.5}, r"similarity must be a number in \[-1, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            vtr.RecycledAttention(**options)
