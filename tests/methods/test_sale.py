"""SALE against loops over heads, rows, keys and blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import vtr
from tests.methods.prompts import (
    INFO,
    TOLERANCE,
    attention,
    check_padding,
    dense,
    qkv,
    seen,
    site_of,
)
from vtr.kernels import product
from vtr.kernels.int8 import quantized
from vtr.methods.common import lowbit
from vtr.methods.common.lowbit import LowBit, relative_scores
from vtr.methods.common.thresholds import Thresholds

SMALL = {"block": 32, "local": 32, "min_length": 0, "last_rows": 1}


def four_bits(x, groups):
    """Round the tokens of each group to integers times a step, the largest of their numbers over 7."""
    out = np.zeros_like(x)
    for group in groups:
        step = np.abs(x[group]).max() / 7
        out[group] = np.round(x[group] / step) * step
    return out


def brute_force(q, k, *, scale, thresholds, bm, bn, local, window=None):
    """The blocks (H, NQ, NK) that are read, of one sample in float64 (sections 3.1 to 3.3)."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (heads, rows, _), (kv, columns, _) = q.shape, k.shape
    sees, offset = seen(rows, columns, window), columns - rows
    kept = np.zeros((heads, -(-rows // bm), -(-columns // bn)), bool)
    for h in range(heads):
        smooth, mean = k[h * kv // heads] - k[h * kv // heads].mean(0), q[h].mean(0)
        of_row, of_key = {}, {}
        for i in range(rows):  # rows r and r + 8 of 16 share a step
            of_row.setdefault((i // 16, i % 8), []).append(i)
        for j in range(columns):  # of a block of keys, those of equal j % 8 // 2
            of_key.setdefault((j // bn, j % 8 // 2), []).append(j)
        low_q = four_bits(q[h] - mean, of_row.values())
        low_k = four_bits(smooth, of_key.values())
        exact = np.where(sees, scale * q[h] @ smooth.T, -np.inf)
        estimate = scale * (low_q @ low_k.T + smooth @ mean)
        for a in range(kept.shape[1]):
            mine = slice(a * bm, min((a + 1) * bm, rows))
            end = offset + mine.stop
            first = max(0, end - local) // bn
            kept[h, a, first : -(-end // bn)] = True
            kept[h, a, 0] = True
            near = exact[mine][:, [*range(bn if first else 0), *range(first * bn, end)]]
            m = near.max(1)
            total = np.exp(near - m[:, None]).sum(1)
            for b in range(1, first):
                relative = (
                    np.exp(estimate[mine, b * bn : (b + 1) * bn] - m[:, None]) / total[:, None]
                )
                kept[h, a, b] = relative.max() >= thresholds[h]
    return kept


def expected(method, site, b=0, thresholds=None):
    """The output (H, L, D) of sample b of a site without padding."""
    q, k, v = site.q[b], site.k[b], site.v[b]
    (bm, bn), thresholds = method.sides, thresholds or [method.threshold] * len(q)
    blocks = brute_force(
        q, k, scale=site.scale, thresholds=thresholds, bm=bm, bn=bn, local=method.local,
        window=site.window,
    )  # fmt: skip
    if method.heads == "kv":
        group = len(q) // len(k)
        blocks = blocks.reshape(len(k), group, *blocks.shape[1:]).any(1).repeat(group, 0)
    sees = seen(q.shape[1], k.shape[1], site.window)
    kept = blocks.repeat(bm, 1).repeat(bn, 2)[:, : q.shape[1], : k.shape[1]] & sees
    apart = site.row_mask(site.text)[b].numpy().copy()
    apart[-method.last_rows :] = True
    kept[:, apart] = sees[apart]
    return attention(q, k, v, site.scale, kept)


@pytest.mark.parametrize("heads", ["query", "kv"])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("rows, columns", [(300, 300), (128, 128), (70, 300), (33, 105), (5, 5)])
def test_equals_the_paper_block_by_block(rows, columns, window, heads):
    site = site_of(*qkv(rows, columns), window=window)
    method = vtr.SALE(0.4, heads=heads, **SMALL)
    want = brute_force(
        site.q[0],
        site.k[0],
        scale=0.25,
        thresholds=[0.4] * 4,
        bm=32,
        bn=16,
        local=32,
        window=window,
    )
    causal = np.zeros_like(want)
    for a in range(want.shape[1]):
        causal[:, a, : -(-min(columns, columns - rows + (a + 1) * 32) // 16)] = True
    found = method.blocks(site)[0].numpy() & causal
    assert (found == want).all()
    if columns == 300:
        assert 0.2 < want.sum() / causal.sum() < 0.9
    np.testing.assert_allclose(method.attend(site)[0], expected(method, site), atol=1e-5)


@pytest.mark.parametrize("sides", [(64, 32), (16, 16)])
def test_other_blocks(sides):
    site = site_of(*qkv(300, 300))
    method = vtr.SALE(0.4, block=sides[0], local=128, min_length=0, last_rows=1)
    assert method.sides == sides
    np.testing.assert_allclose(method.attend(site)[0], expected(method, site), atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, columns", [(300, 300), (40, 130), (1, 50)])
def test_threshold_0_is_dense(rows, columns, dtype):
    site = site_of(*qkv(rows, columns, batch=2, dtype=dtype))
    out = vtr.SALE(0.0, **SMALL).attend(site)
    assert out.dtype == dtype
    torch.testing.assert_close(out, dense(site), atol=TOLERANCE[dtype], rtol=0)


def test_threshold_inf_sees_the_local_window_and_the_first_block():
    site = site_of(*qkv(200, 200))
    found = vtr.SALE(math.inf, **SMALL).blocks(site)
    for a, end in enumerate([32, 64, 96, 128, 160, 192, 200]):
        live = {0, *range((end - 32) // 16, -(-end // 16))}
        assert (found[0, :, a, : -(-end // 16)].sum(1) == len(live)).all()
        assert found[0, :, a, sorted(live)].all()


def test_a_far_key_with_a_large_score_is_kept():
    q, k, v = (x * 0.1 for x in qkv(300, 300))
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, :, 77, 0] = 8.0
    found = vtr.SALE(0.5, **SMALL).blocks(site_of(q, k, v))[0]
    for a in range(4, 9):
        assert found[:, a, : a * 2].any(0).nonzero().flatten().tolist() == [0, 77 // 16]


def test_a_table_has_a_threshold_for_each_head():
    table = torch.tensor([[0.0] * 4, [0.0, 0.2, 0.5, math.inf]])
    site = site_of(*qkv(150, 150), table={"thresholds": table})
    method = vtr.SALE(0.9, **SMALL)
    found = method.attend(site)
    np.testing.assert_allclose(
        found[0], expected(method, site, thresholds=table[1].tolist()), atol=1e-5
    )
    torch.testing.assert_close(found[:, 0], dense(site)[:, 0], atol=1e-5, rtol=0)


def test_padded_samples_equal_the_samples_alone():
    check_padding(vtr.SALE(0.4, **SMALL))


def test_prompts_below_the_least_length_are_dense():
    site = site_of(*qkv(100, 100))
    assert torch.equal(vtr.SALE(0.9).attend(site), site.dense())


# ---- the estimate -----------------------------------------------------------------------------------


def test_rounding_to_4_bits():
    x = torch.randn(2, 37, 8)
    level, step = quantized(x, (2, 8, 1), 7)
    assert level.shape == x.shape and step.shape == (2, 37, 1)
    assert torch.equal(level, level.round()) and level.abs().max() == 7
    assert ((level * step - x).abs() <= step / 2 * 1.0001).all()
    assert torch.equal(step[:, :8], step[:, 8:16])
    assert not quantized(torch.zeros(1, 16, 8), (2, 8, 1), 7)[
        0
    ].any()  # no step is 0, and nothing NaN


@pytest.mark.parametrize("rows, columns, dim", [(130, 130, 16), (40, 150, 24)])
def test_integers_and_floats_estimate_the_same(rows, columns, dim):
    q, k, _ = qkv(rows, columns, batch=2, dim=dim)
    sizes = LowBit(rows, columns, 32, 16, 32)
    found = [torch.cat(list(relative_scores(q, k, sizes, 0.25, n)), 2) for n in (False, True)]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(found[0]).any()


@pytest.mark.gpu
def test_a_gpu_estimates_in_integers_what_a_cpu_does_in_floats():
    q, k, _ = qkv(130, 150, batch=2, dim=32)
    sizes = LowBit(130, 150, 32, 16, 32)
    here, there = (
        torch.cat(list(relative_scores(x, y, sizes, 0.25)), 2).cpu()
        for x, y in ((q, k), (q.cuda(), k.cuda()))
    )
    torch.testing.assert_close(there, here, atol=1e-3, rtol=1e-3)


def test_integer_products_are_exact():
    a, b = (torch.randint(-128, 128, (n, 64), dtype=torch.int8) for n in (33, 40))
    assert torch.equal(product.integer_product(a, b), (a.int()[:, None] * b.int()).sum(-1).int())


def test_the_steps_of_the_search_decide_nothing(monkeypatch):
    site = site_of(*qkv(200, 260, batch=2))
    method = vtr.SALE(0.4, **SMALL)
    whole = method.blocks(site)
    monkeypatch.setitem(lowbit.SCORES, "cpu", 1)
    assert torch.equal(method.blocks(site), whole)


# ---- calibration ------------------------------------------------------------------------------------


def by_halving(sites, method):
    """The threshold of each head, as the authors' script finds it."""
    found = [0.008] * 4
    for site in sites:
        for b in range(site.q.shape[0]):
            at = site.valid[b].numpy()
            q, k, v = (x[b][:, at] for x in (site.q, site.k, site.v))
            sees = seen(at.sum(), at.sum())
            whole = attention(q, k, v, site.scale, sees[None].repeat(4, 0))
            for h in range(4):
                while found[h]:
                    blocks = brute_force(
                        q, k, scale=site.scale, thresholds=found, bm=32, bn=16, local=32
                    )[h]
                    kept = sees & blocks.repeat(32, 0).repeat(16, 1)[: at.sum(), : at.sum()]
                    out = attention(
                        q[h : h + 1],
                        k[h // 2 : h // 2 + 1],
                        v[h // 2 : h // 2 + 1],
                        site.scale,
                        kept[None],
                    )
                    if np.abs(out[0] - whole[h]).sum() < method.error * at.sum():
                        break
                    found[h] = 0.0 if found[h] / 2 <= 1e-4 else found[h] / 2
    return found


def test_thresholds_are_halved_until_the_output_is_close():
    method = vtr.SALE(error=3e-5, **SMALL)
    prompts = []
    for seed in range(2):
        q, k, v = qkv(128, 128, batch=2, seed=seed)
        q[..., 0] = torch.tensor([2.0, 6.0, 12.0, 24.0])[
            :, None
        ]  # how fast scores fall with distance
        q, k[..., 0] = q / 2, torch.arange(128) / 16
        valid = torch.ones(2, 128, dtype=torch.bool)
        valid[1, :13] = False
        prompts.append(site_of(q, k, v, valid=valid))
    found = method.calibrator(INFO)
    for site in prompts:
        found.see(site)
    table = found.finish()["thresholds"]
    assert table.shape == (2, 4) and table.dtype == torch.float32
    assert table[0].tolist() == [0.0] * 4  # layer 0 was not seen
    np.testing.assert_allclose(table[1], by_halving(prompts, method), rtol=1e-6)
    assert [0 < t < 0.008 for t in table[1].tolist()] == [False, False, True, False]
    assert table[1, 0] > table[1, 3] == 0


def test_a_calibration_without_long_prompts_is_refused():
    found = Thresholds(vtr.SALE(), INFO)
    found.see(site_of(*qkv(100, 100)))
    with pytest.raises(ValueError, match="min_length=1025 tokens: calibrate on longer prompts"):
        found.finish()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": -0.1}, "threshold must be a number"),
        ({"error": math.nan}, "error must be a number"),
        ({"local": 32}, "local must be at least block=64, got 32"),
        ({"local": 64.0}, "local must be an int >= 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        vtr.SALE(**options)
