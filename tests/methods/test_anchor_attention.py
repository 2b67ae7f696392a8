"""AnchorAttention against loops over heads, groups and keys."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import vtr
from tests.methods.prompts import TOLERANCE, attention, check_padding, dense, qkv, seen, site_of
from vtr.methods.common import stripes

SMALL = {"block": 16, "group": 32, "last_rows": 1}


def brute_force(q, k, *, scale, theta, block, group, first=1, window=None, heads="query"):
    """The pairs (H, L, S) that the paper computes (sections 3.2 to 3.4), for one sample in float64."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (number, rows, _), (kv, columns, _) = q.shape, k.shape
    per, offset, sees = number // kv, columns - rows, seen(rows, columns, window)
    kept = np.zeros((number, rows, columns), bool)
    for start in range(0, rows, group):
        mine = range(start, min(start + group, rows))
        anchor = np.zeros(columns, bool)
        anchor[: first * block] = True
        anchor[(offset + start) // block * block :] = True
        found = []
        for h in range(number):
            chosen = set()
            for at in range(start, mine.stop, block):
                part = range(at, min(at + block, mine.stop))
                maxima = [
                    max(scale * q[h, i] @ k[h // per, j] for j in np.flatnonzero(anchor & sees[i]))
                    for i in part
                ]
                pooled = sum(q[h, i] for i in part) / len(part)
                for j in np.flatnonzero(~anchor):
                    if scale * pooled @ k[h // per, j] >= sum(maxima) / len(part) - theta:
                        chosen.add(j)
            found.append(chosen)
        for h in range(number):
            same = range(h // per * per, h // per * per + per) if heads == "kv" else [h]
            chosen = sorted(set().union(*(found[n] for n in same)))
            kept[h, mine.start : mine.stop, anchor] = True
            kept[h, mine.start : mine.stop, chosen] = True
    return kept & sees


def expected(method, site, b=0):
    """The output (H, L, D) of sample b of a site without padding, and the share of the pairs."""
    q, k, v = site.q[b], site.k[b], site.v[b]
    kept = brute_force(
        q, k, scale=site.scale, theta=method.theta, block=method.block, group=method.group,
        first=method.first, window=site.window, heads=method.heads,
    )  # fmt: skip
    sees = seen(q.shape[1], k.shape[1], site.window)
    apart = site.row_mask(site.text)[b].numpy().copy()
    apart[-method.last_rows :] = True
    kept[:, apart] = sees[apart]
    return attention(q, k, v, site.scale, kept), kept.mean(0).sum() / sees.sum()


@pytest.mark.parametrize("heads", ["query", "kv"])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("rows, columns", [(300, 300), (128, 128), (70, 300), (33, 105), (5, 5)])
def test_equals_the_paper_pair_by_pair(rows, columns, window, heads):
    site = site_of(*qkv(rows, columns), window=window)
    method = vtr.AnchorAttention(1.4, heads=heads, **SMALL)
    want, share = expected(method, site)
    np.testing.assert_allclose(method.attend(site)[0], want, atol=1e-5)
    assert float(site.notes["work"] / site.pairs) == pytest.approx(share)


def test_there_are_some_stripes_and_not_all():
    q, k, _ = qkv(300, 300)
    sizes = {"scale": 0.25, "block": 16, "group": 32}
    none, some, every = (
        brute_force(q[0], k[0], theta=theta, **sizes).sum() for theta in (-math.inf, 1.6, math.inf)
    )
    assert none * 1.1 < some < every * 0.8
    assert every == 4 * seen(300, 300).sum()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, columns", [(300, 300), (256, 256), (32, 96), (40, 130), (1, 50)])
def test_theta_inf_is_dense(rows, columns, dtype):
    site = site_of(*qkv(rows, columns, batch=2, dtype=dtype))
    out = vtr.AnchorAttention(math.inf, **SMALL).attend(site)
    assert out.dtype == dtype
    torch.testing.assert_close(out, dense(site), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_theta_minus_inf_sees_the_anchors_alone(dtype):
    site = site_of(*qkv(130, 200, dtype=dtype), before=0, after=0)
    kept = seen(130, 200)
    for i in range(129):
        kept[i, 16 : (70 + i // 32 * 32) // 16 * 16] = False  # the first row is column 70
    want = attention(
        *(x[0].double() for x in (site.q, site.k, site.v)), 0.25, kept[None].repeat(4, 0)
    )
    out = vtr.AnchorAttention(-math.inf, **SMALL).attend(site)
    np.testing.assert_allclose(out[0].double(), want, atol=TOLERANCE[dtype])


def test_a_far_key_with_a_large_score_is_the_only_stripe():
    q, k, v = (x * 0.1 for x in qkv(300, 300))
    q[..., 0] = 5.0
    k[..., 0] = 0.0
    k[:, :, 77, 0] = 4.0
    found = brute_force(q[0], k[0], scale=0.25, theta=-2.0, block=16, group=32)
    plain = brute_force(q[0], k[0], scale=0.25, theta=-math.inf, block=16, group=32)
    assert (found & ~plain).any((0, 1)).nonzero()[0].tolist() == [77]
    site = site_of(q, k, v)
    method = vtr.AnchorAttention(-2.0, **SMALL)
    np.testing.assert_allclose(method.attend(site)[0], expected(method, site)[0], atol=1e-5)


def test_the_picture_has_the_blocks_of_anchors_and_stripes():
    site = site_of(*qkv(100, 150))
    vtr.AnchorAttention(1.4, **SMALL).attend(site)
    kept = brute_force(site.q[0], site.k[0], scale=0.25, theta=1.4, block=16, group=32)
    apart = site.row_mask(site.text)[0].numpy().copy()
    apart[-1] = True
    found = site.notes["mask"].to_dense(blocks=True)[0]
    for a, start in enumerate(range(0, 100, 16)):
        rows = slice(start, start + 16)
        for b in range(10):
            some = kept[:, rows, b * 16 : b * 16 + 16].any((1, 2)) & (not apart[rows].all())
            assert found[:, a, b].tolist() == some.tolist()


def test_last_rows_that_are_all_rows_are_dense_and_counted_once():
    site = site_of(*qkv(50, 90))
    torch.testing.assert_close(
        vtr.AnchorAttention(0.0).attend(site), dense(site), atol=1e-5, rtol=0
    )
    assert float(site.notes["work"] / site.pairs) == 1.0


def test_padded_samples_equal_the_samples_alone():
    check_padding(vtr.AnchorAttention(1.4, **SMALL), expected)


def test_the_steps_of_the_search_decide_nothing(monkeypatch):
    site = site_of(*qkv(200, 260, batch=2))
    method = vtr.AnchorAttention(1.4, **SMALL)
    whole = method.attend(site)
    monkeypatch.setitem(stripes.SCORES, "cpu", 1)
    monkeypatch.setattr(stripes, "GATHERED", 1)
    torch.testing.assert_close(method.attend(site), whole, atol=1e-6, rtol=0)


def test_gradients_are_those_of_the_kept_pairs():
    site = site_of(*(x.requires_grad_() for x in qkv(100, 100)))
    method = vtr.AnchorAttention(1.2, **SMALL)
    given = site.q, site.k, site.v
    kept = brute_force(
        *(x[0].detach() for x in given[:2]), scale=0.25, theta=1.2, block=16, group=32
    )
    apart = site.text[0].clone()
    apart[-1] = True
    kept = torch.from_numpy(kept) | (apart[:, None] & torch.from_numpy(seen(100, 100)))
    k, v = (x.repeat_interleave(2, 1) for x in given[1:])
    scores = (given[0] @ k.mT * 0.25).masked_fill(~kept, -math.inf)
    weight = torch.randn(1, 4, 100, 16)
    want = torch.autograd.grad((torch.softmax(scores, -1) @ v * weight).sum(), given)
    found = torch.autograd.grad((method.attend(site) * weight).sum(), given)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"theta": math.nan}, "theta must be a number"),
        ({"theta": "12"}, "theta must be a number"),
        ({"group": 200}, "group must be a multiple of block=128, got 200"),
        ({"group": 0}, "group must be an int >= 1"),
        ({"first": 0}, "first must be an int >= 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        vtr.AnchorAttention(**options)
