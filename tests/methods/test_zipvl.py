"""ZipVL against loops over heads, probe rows and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vtr
from tests.methods.prompts import TOLERANCE, attention, check_padding, dense, qkv, seen, site_of
from vtr.methods import zipvl
from vtr.methods.common.token_sets import (
    attention_among,
    earlier_mask,
    important,
    least_number,
    probe_rows,
)

SMALL = {"recent": 8, "random": 8, "last_rows": 1, "block": 16}


def brute_force(q, k, *, scale, rows, tau, always, window=None):
    """The important tokens (S,) of one sample, float64, from its probe rows (section 4)."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (heads, length, _), (kv, columns, _) = q.shape, k.shape
    sees = seen(length, columns, window)
    total, count = np.zeros(columns), np.zeros(columns, int)
    for i in rows:
        at = np.flatnonzero(sees[i])
        count[at] += 1
        for h in range(heads):
            scores = scale * k[h * kv // heads, at] @ q[h, i]
            weight = np.exp(scores - scores.max())
            total[at] += weight / weight.sum() / heads
    number, reached = 0, 0.0
    for mass in sorted(total, reverse=True):
        number, reached = number + 1, reached + mass
        if reached >= tau * total.sum():
            break
    mean = [total[j] / max(1, count[j]) for j in range(columns)]
    best = sorted(range(columns), key=lambda j: -mean[j])[:number]
    chosen = np.array(always)
    chosen[best] = True
    return chosen


def expected(method, site, b=0):
    """The tokens of sample b of a site without padding, its output (H, L, D), and the share of pairs."""
    q, k, v = site.q[b], site.k[b], site.v[b]
    always = site.text[b].numpy().copy()
    always[[0, -1]] = True
    rows = probe_rows(q.shape[1], method.recent, method.random, method.seed + site.layer)
    chosen = brute_force(
        q,
        k,
        scale=site.scale,
        rows=rows.tolist(),
        tau=method.tau,
        always=always,
        window=site.window,
    )
    sees = seen(q.shape[1], k.shape[1], site.window)
    kept = sees & chosen
    if method.skip_rows:
        kept &= chosen[k.shape[1] - q.shape[1] :, None]
    apart = site.row_mask(site.text)[b].numpy().copy()
    apart[-method.last_rows :] = True
    kept[apart] = sees[apart]
    out = attention(q, k, v, site.scale, kept[None].repeat(len(q), 0))
    return chosen, out, kept.sum() / sees.sum()


@pytest.mark.parametrize("skip_rows", [True, False])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("rows, columns", [(300, 300), (128, 128), (70, 300), (33, 105), (5, 5)])
def test_equals_the_paper_token_by_token(rows, columns, window, skip_rows):
    site = site_of(*qkv(rows, columns), window=window)
    method = vtr.ZipVL(0.7, skip_rows=skip_rows, **SMALL)
    chosen, want, share = expected(method, site)
    assert method.tokens(site)[0].tolist() == chosen.tolist()
    np.testing.assert_allclose(method.attend(site)[0], want, atol=1e-5)
    assert float(site.notes["work"] / site.pairs) == pytest.approx(share)
    if columns == 300:
        assert 0.2 < chosen.mean() < 0.8


def test_other_tokens_get_zeros():
    site = site_of(*qkv(300, 300))
    method = vtr.ZipVL(0.5, **SMALL)
    out, chosen = method.attend(site), method.tokens(site)
    assert torch.equal(out[0].abs().sum((0, 2)) > 0, chosen[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("skip_rows", [True, False])
@pytest.mark.parametrize("rows, columns", [(300, 300), (40, 130), (1, 50)])
def test_tau_1_is_dense(rows, columns, skip_rows, dtype):
    site = site_of(*qkv(rows, columns, batch=2, dtype=dtype))
    out = vtr.ZipVL(1.0, skip_rows=skip_rows, block=16).attend(site)
    assert out.dtype == dtype
    torch.testing.assert_close(out, dense(site), atol=TOLERANCE[dtype], rtol=0)


def test_sums_decide_how_many_and_means_which():
    # Token 0 has the larger sum, of four rows; token 4 has the larger mean, of the one row that sees it.
    mass = torch.tensor([[3.6, 0.05, 0.05, 0.05, 0.95, 0.3]])
    rows = torch.tensor([[8, 8, 8, 8, 1, 1]])
    nothing = torch.zeros(1, 6, dtype=torch.bool)
    assert least_number(mass, 0.7).tolist() == [1]
    assert important(mass, rows, 0.7, nothing)[0].tolist() == [False] * 4 + [True, False]
    # By sums of means two would be needed for a share of 0.7, of 0.95, 0.45, 0.3 and three small ones.
    assert least_number(mass / rows, 0.7).tolist() == [2]


def test_a_late_token_of_few_rows_beats_an_early_one_of_the_same_sum():
    mass = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    found = important(mass, torch.tensor([[9, 9, 9, 2]]), 0.5, torch.zeros(1, 4, dtype=torch.bool))
    assert found[0].tolist() == [False, False, False, True]


def test_one_token_with_all_attention_is_kept_beside_those_that_always_are():
    q, k, v = (x * 0.1 for x in qkv(200, 200, batch=2))
    q[..., 0], k[..., 0] = 20.0, 0.0
    k[0, :, 50, 0], k[1, :, 120, 0] = 20.0, 20.0
    site = site_of(q, k, v)
    always = [0, 1, 2, *range(195, 200)]
    # The rows before 120 do not see it: they spread their attention over all.
    method = vtr.ZipVL(0.9, recent=8, random=0, last_rows=1, block=16)
    found = [row.nonzero().flatten().tolist() for row in method.tokens(site)]
    assert found == [sorted([*always, 50]), sorted([*always, 120])]
    for b in range(2):
        np.testing.assert_allclose(method.attend(site)[b], expected(method, site, b)[1], atol=1e-5)


def test_counts_differ_between_samples_and_layers():
    site = site_of(*qkv(200, 200, batch=3))
    site.q[1] *= 4
    method = vtr.ZipVL(0.8, **SMALL)
    numbers = method.tokens(site).sum(1).tolist()
    assert len(set(numbers)) == 3
    other = site_of(site.q, site.k, site.v, layer=0)
    assert not torch.equal(method.tokens(other), method.tokens(site))  # other rows are drawn
    for b in range(3):
        np.testing.assert_allclose(method.attend(site)[b], expected(method, site, b)[1], atol=1e-5)


@pytest.mark.parametrize("skip_rows", [True, False])
def test_the_picture_has_the_blocks_of_tokens(skip_rows):
    site = site_of(*qkv(100, 150), before=40, after=40)
    method = vtr.ZipVL(0.2, skip_rows=skip_rows, recent=1, random=0, last_rows=20, block=16)
    method.attend(site)
    chosen = method.tokens(site)[0].numpy()
    found = site.notes["mask"].to_dense(blocks=True)
    for a, start in enumerate(range(0, 100, 16)):
        rows = range(start, min(100, start + 16))
        apart = all(50 + i < 40 or i >= 60 for i in rows)
        some = not apart and (not skip_rows or chosen[50 + rows.start : 50 + rows.stop].any())
        for b in range(10):
            causal = b * 16 <= 50 + rows.stop - 1
            assert found[..., a, b].all() == (
                some and causal and chosen[b * 16 : b * 16 + 16].any()
            )


def test_last_rows_that_are_all_rows_are_dense_and_counted_once():
    site = site_of(*qkv(50, 90))
    torch.testing.assert_close(vtr.ZipVL(0.5).attend(site), dense(site), atol=1e-5, rtol=0)
    assert float(site.notes["work"] / site.pairs) == 1.0


def test_padded_samples_equal_the_samples_alone():
    check_padding(vtr.ZipVL(0.7, **SMALL))


def test_probe_rows_are_the_last_and_some_earlier_ones():
    rows = probe_rows(1000, 64, 64, 3)
    assert rows[64:].tolist() == list(range(936, 1000))
    earlier = rows[:64].tolist()
    assert earlier == sorted(set(earlier)) and earlier[-1] < 936
    assert torch.equal(rows, probe_rows(1000, 64, 64, 3))
    assert not torch.equal(rows, probe_rows(1000, 64, 64, 4))
    assert probe_rows(70, 64, 64, 0).tolist() == list(range(70))
    assert probe_rows(5, 64, 64, 0).tolist() == list(range(5))


def test_probe_rows_a_few_at_a_time_choose_the_same(monkeypatch):
    site = site_of(*qkv(200, 200, batch=2))
    method = vtr.ZipVL(0.8, **SMALL)
    whole = method.tokens(site)
    monkeypatch.setattr(zipvl, "SCORES", 1)
    assert torch.equal(method.tokens(site), whole)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("rows, keys", [(48, 80), (50, 33), (1, 90), (7, 1)])
def test_the_mask_of_two_sets_pair_by_pair(rows, keys, window):
    g = torch.Generator().manual_seed(rows)
    row, key = (torch.randperm(100, generator=g)[:n].sort().values for n in (rows, keys))
    want = key <= row[:, None]
    if window is not None:
        want &= key > row[:, None] - window
    mask = earlier_mask(row, key, block=16, window=window)
    assert torch.equal(mask.to_dense(), want)


def test_a_row_before_all_keys_gets_zeros():
    q, k, v = qkv(3, 2, heads=2)
    rows, keys = torch.tensor([1, 4, 9]), torch.tensor([3, 8])
    out = attention_among(q, k, v, rows, keys, scale=0.25, block=16)
    assert not out[:, :, 0].any()
    torch.testing.assert_close(out[:, :, 1], v[:, :, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tau": 0.0}, r"tau must be in \(0, 1\], got 0.0"),
        ({"tau": 1.5}, r"tau must be in \(0, 1\], got 1.5"),
        ({"recent": 0}, "recent must be an int >= 1"),
        ({"random": -1}, "random must be an int >= 0"),
        ({"seed": 0.5}, "seed must be an int >= 0"),
        ({"skip_rows": 1}, "skip_rows must be"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        vtr.ZipVL(**options)
