"""Rectified SpaAttn against the formulas written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from tests.methods.sites import Run, tensors
from vtr.core.registry import create
from vtr.kernels.masks import always as always_on
from vtr.kernels.masks import hilbert_order
from vtr.kernels.masks.layouts import Layout
from vtr.methods.common import rectify
from vtr.methods.common.order import grid_order, select_wide
from vtr.methods.rectified import RectifiedSparse

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _qkv(batch=2, heads=2, tokens=75, dim=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, batch, heads, tokens, dim, generator=g)
    # Neighbours alike and means away from zero, so that some blocks are worth pooling.
    x = (
        x * 0.4
        + torch.randn(3, batch, heads, -(-tokens // 8), dim, generator=g).repeat_interleave(8, 3)[
            ..., :tokens, :
        ]
    )
    return x.to(dtype)


class Forced(RectifiedSparse):
    """With blocks of any size, and given blocks that are always critical."""

    def always(self, grid, layout):
        return self.forced


def view_of(q, k, v, *, text=0, text_valid=None, scale=0.25, block=16, always=None, **options):
    """Tokens in a row, with text behind them, as the method sees them."""
    method = Forced(order="raster", neighbours=False, **options)
    method._set("block", block)
    method._set("forced", always)
    run = Run(method, (1, 1, q.shape[2] - text), text_valid=text_valid)
    site = run.site((q, k, v))
    site.scale = scale
    return method, site


def rectified_attention(q, k, v, **options):
    method, site = view_of(q, k, v, **options)
    return method.attend(site)


def choice(q, k, v, **options):
    """The critical blocks, and those that are worth pooling."""
    method, site = view_of(q, k, v, **options)
    view = method.view(site)
    trusted = rectify.gains_outweigh_errors(
        view.q, view.k, view.q_means, view.k_means, method.block
    )
    return method.choose(view).live, trusted


def _by_token(q, k, v, text, valid, scale, block, p, drop, always):
    """The method in plain loops, float64, for one sample and head."""
    q, k, v = q.double(), k.double(), v.double()
    n = q.shape[0] - text
    parts = [range(i, min(i + block, n)) for i in range(0, n, block)]
    words = [n + t for t in range(text) if valid is None or bool(valid[t])]
    out = torch.zeros_like(q)
    for i in range(n, q.shape[0]):
        keys = [*range(n), *words]
        out[i] = torch.softmax(scale * k[keys] @ q[i], 0) @ v[keys]
    for number, rows in enumerate(parts):
        mean_q = sum(q[i] for i in rows) / len(rows)
        spread_q = sum((q[i] - mean_q).abs() for i in rows) / len(rows)
        weight, trusted = [], []
        for columns in parts:
            mean_k = sum(k[j] for j in columns) / len(columns)
            spread_k = sum((k[j] - mean_k).abs() for j in columns) / len(columns)
            weight.append(len(columns) * math.exp(scale * float(mean_q @ mean_k)))
            error = abs(float(spread_q @ mean_k)) + abs(float(mean_q @ spread_k))
            trusted.append(abs(float(mean_q @ mean_k)) > error)
        said = sum(math.exp(scale * float(mean_q @ k[t])) for t in words)
        total = sum(weight) + said
        share = [w / total for w in weight] + [said / total]
        falling = sorted(range(len(share)), key=lambda j: -share[j])
        running = 0.0
        number_of = 1
        for j in falling:
            running += share[j]
            number_of += running <= p
        least = int((1 - drop) * len(parts))
        chosen = falling[: max(number_of, least)] if least < len(parts) else range(len(parts))
        critical = {j for j in chosen if j < len(parts)}
        critical |= {j for j in range(len(parts)) if always is not None and bool(always[number, j])}
        pooled = [j for j in range(len(parts)) if j not in critical and trusted[j]]
        factor = 1 - sum(share[j] for j in pooled)
        extra = sum((share[j] * v[list(parts[j])].mean(0) for j in pooled), torch.zeros_like(v[0]))
        keys = [t for j in sorted(critical) for t in parts[j]] + words
        for i in rows:
            out[i] = factor * (torch.softmax(scale * k[keys] @ q[i], 0) @ v[keys]) + extra
    return out


CASES = {
    "video only": (64, 0, False, False),
    "ragged": (75, 0, False, True),
    "text": (64, 21, False, True),
    "ragged text": (75, 21, False, False),
    "padded text": (75, 21, True, True),
    "fewer than a block": (9, 5, True, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_equals_the_formulas_token_by_token(case, backend):
    tokens, text, padded, forced = CASES[case]
    q, k, v = _qkv(tokens=tokens + text)
    block, p, drop, scale = 16, 0.4, 0.6, 0.25
    valid = None
    if padded:
        valid = torch.ones(2, text, dtype=torch.bool)
        valid[0, 3:] = False
        valid[1, 0] = False
    blocks = -(-tokens // block)
    always = torch.eye(blocks, dtype=torch.bool) if forced else None
    out = rectified_attention(
        q, k, v, text=text, text_valid=valid, scale=scale, block=block, p=p, drop=drop,
        always=always, backend=backend,
    )  # fmt: skip
    for b in range(2):
        for h in range(2):
            one = None if valid is None else valid[b]
            expected = _by_token(
                q[b, h], k[b, h], v[b, h], text, one, scale, block, p, drop, always
            )
            torch.testing.assert_close(out[b, h].double(), expected, atol=1e-5, rtol=1e-5)


def _with_zeros(q, k, block, p, drop, scale):
    """The choice of blocks by the released code without text, where zeros fill the last block and
    count in its mean: the critical blocks, and those that are not pooled."""
    n = q.shape[2]
    blocks = -(-n // block)
    cut = [
        torch.nn.functional.pad(x.double(), (0, 0, 0, -n % block)).unflatten(2, (blocks, block))
        for x in (q, k)
    ]
    mean_q, mean_k = (x.mean(3) for x in cut)
    spread_q, spread_k = ((x - x.mean(3, keepdim=True)).abs().mean(3) for x in cut)
    scores = mean_q @ mean_k.mT
    falling, order = torch.softmax(scores * scale, -1).sort(dim=-1, descending=True)
    number = ((falling.cumsum(-1) <= p).sum(-1, keepdim=True) + 1).clamp(
        min=int((1 - drop) * blocks)
    )
    critical = torch.zeros(scores.shape, dtype=torch.bool)
    critical.scatter_(-1, order, torch.arange(blocks) < number)
    loss = (spread_q @ mean_k.mT).abs() + (mean_q @ spread_k.mT).abs()
    return critical, ~(scores.abs() > loss)


@pytest.mark.parametrize("ragged", [0, 1, 64, 127])
def test_a_ragged_block_and_the_zeros_of_the_released_code(ragged):
    """On whole blocks the choices are the same; else about one in a hundred differs (of 7,442: 87 or
    fewer of those that are critical)."""
    block = 128
    q, k, v = _qkv(batch=1, tokens=60 * block + ragged, seed=1)
    critical, trusted = choice(q, k, v, block=block, p=0.3, drop=0.75)
    found = critical, ~trusted
    differ = [a != b for a, b in zip(found, _with_zeros(q, k, block, 0.3, 0.75, 0.25), strict=True)]
    if not ragged:
        assert not any(bool(d.any()) for d in differ)
        return
    assert 0 < differ[0].float().mean() < 0.015 and differ[1].float().mean() < 0.01


def test_the_case_is_not_trivial():
    """The loops above meet critical, pooled and excluded blocks."""
    critical, trusted = choice(*_qkv(tokens=75), p=0.4, drop=0.6)
    assert critical.any() and (~critical & trusted).any() and (~critical & ~trusted).any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("text", [0, 7])
def test_nothing_dropped_is_dense(dtype, text):
    q, k, v = _qkv(tokens=75 + text, dtype=dtype)
    out = rectified_attention(q, k, v, text=text, scale=0.25, block=16, drop=0.0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), scale=0.25
    )
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_close_to_float32_with_the_same_choice(dtype):
    """Choices of blocks may differ where scores nearly tie; with p = 0 and a forced map the only
    choice left is whether to pool, which decides little when it is close."""
    q, k, v = _qkv(dtype=dtype)
    always = torch.eye(5, dtype=torch.bool)
    options = {"scale": 0.25, "block": 16, "p": 0.0, "drop": 0.5, "always": always}
    out = rectified_attention(q, k, v, **options)
    expected = rectified_attention(q.float(), k.float(), v.float(), **options)
    limit = TOLERANCE[dtype] * expected.abs().max()
    assert ((out.float() - expected).abs().amax(dim=(2, 3)) < limit).float().mean() >= 0.5
    assert (out.float() - expected).abs().mean() < limit


def test_a_batch_is_its_samples():
    q, k, v = _qkv(tokens=96)
    valid = torch.rand(2, 21) > 0.5
    options = {"text": 21, "scale": 0.25, "block": 16, "drop": 0.6}
    both = rectified_attention(q, k, v, text_valid=valid, **options)
    for i in range(2):
        one = rectified_attention(
            *(t[i : i + 1] for t in (q, k, v)), text_valid=valid[i : i + 1], **options
        )
        torch.testing.assert_close(both[i : i + 1], one, atol=1e-6, rtol=1e-6)


def test_pooling_recovers_what_the_bare_mask_loses():
    """Keys and values that are alike within a block, as neighbours in an image are."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 1, 4, 16, 16, generator=g) + 0.3).repeat_interleave(16, 3)
    k = k + 0.05 * torch.randn(k.shape, generator=g)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.1)
    bare, rectified = (
        rectified_attention(q, k, v, scale=0.1, block=16, drop=0.75, rectify=r) - dense
        for r in (False, True)
    )
    assert rectified.norm() < 0.2 * bare.norm()


def test_gradients_reach_q_k_and_v():
    tensors = [t.double().requires_grad_() for t in _qkv(batch=1, heads=1, tokens=21, dim=4)]

    def call(q, k, v):
        return rectified_attention(q, k, v, text=5, scale=0.5, block=8, drop=0.5, p=0.0)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 9, 4), (2, 16, 16), (1, 1, 1), (3, 1, 8)])
@pytest.mark.parametrize("order", ["hilbert", "raster", (2, 4, 4)])
def test_orders_are_permutations(shape, order):
    found = grid_order(shape, order)
    assert torch.equal(found.sort().values, torch.arange(torch.Size(shape).numel()))


def test_the_hilbert_curve_takes_single_steps_in_a_cube():
    place = torch.stack(torch.unravel_index(hilbert_order((8, 8, 8)), (8, 8, 8)), 1)
    assert ((place[1:] - place[:-1]).abs().sum(1) == 1).all()


@pytest.mark.parametrize("order", ["hilbert", (2, 2, 2)])
def test_neighbours_are_those_of_the_tokens(order):
    shape, block = (3, 4, 5), 8
    places = grid_order(shape, order)
    point = torch.stack(torch.unravel_index(places, shape), 1)
    near = (point[:, None] - point[None]).abs().amax(-1) <= 1
    of = torch.arange(60) // block
    expected = torch.zeros(8, 8, dtype=torch.bool)
    i, j = near.nonzero(as_tuple=True)
    expected[of[i], of[j]] = True
    assert torch.equal(always_on.neighbours(shape, Layout(places, (block, block))), expected)


@pytest.mark.parametrize("order", ["hilbert", "raster", (1, 2, 4)])
@pytest.mark.parametrize("text_first", [False, True])
def test_in_the_models_order_of_tokens(order, text_first):
    """At a site the tokens stand in raster order, with text before or behind them."""
    grid, text, block = (3, 6, 8), 6, 16
    method = RectifiedSparse(p=0.3, drop=0.6, order=order, block=block, first_frame=True)
    valid = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    run = Run(method, grid, text_first=text_first, text_valid=valid)
    g = torch.Generator().manual_seed(3)
    qkv = [t + torch.randn(2, 2, 1, 16, generator=g) * 0.5 for t in tensors(grid, text)]
    out = method.attend(run.site(qkv))
    places = grid_order(grid, order)
    always = always_on.neighbours(grid, Layout(places, (block, block)))
    always[:3, :3] = True  # 9 blocks of 3 frames
    first = text if text_first else 0
    words = torch.arange(text) + (0 if text_first else 144)
    index = torch.cat([places + first, words])
    for b in range(2):
        for h in range(2):
            q, k, v = (t[b, h, index] for t in qkv)
            expected = _by_token(q, k, v, text, valid[b], 0.25, block, 0.3, 0.6, always)
            torch.testing.assert_close(out[b, h, index].double(), expected, atol=1e-5, rtol=1e-5)


def test_fewer_key_heads():
    grid = (2, 4, 8)
    method = RectifiedSparse(drop=0.6, block=16)
    q, k, v = tensors(grid, 5, heads=4, key_heads=2)
    out = Run(method, grid)((q, k, v))
    expected = Run(method, grid)((q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dense_steps_and_a_full_density_at_a_site(dtype):
    method = RectifiedSparse(drop=0.0, dense_steps=1, block=16)
    run = Run(method, (2, 4, 8), text_first=True)
    qkv = tensors((2, 4, 8), 5, dtype=dtype)
    expected = run.site(qkv).dense()
    assert torch.equal(run(qkv, 0), expected)
    out = run(qkv, 1)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert float(run.notes["density"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "options", [{"p": 1.5}, {"drop": -0.1}, {"order": "zigzag"}, {"order": (2, 4)}, {"drop": "all"}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        RectifiedSparse(**options)


def test_the_authors_settings():
    """Blocks of 128, p of 0.3, a curve, neighbours; per model: drop, dense layers and steps."""
    want = {
        "hunyuanvideo": (0.8, 0, 0), "wan2.1-t2v": (0.75, 2, 5), "wan2.1-i2v": (0.75, 2, 0),
        "wan2.2-t2v-a14b": (0.85, 2, (3, 1)), "wan2.2-i2v-a14b": (0.85, 2, 0), "wan2.2-ti2v": (0.75, 2, 5),
        "cogvideox1.5-t2v": (0.85, 0, 5), "cogvideox1.5-i2v": (0.75, 0, 5),
        "flux": (0.9, tuple(range(37, 57)), 0),
    }  # fmt: skip
    for name in RectifiedSparse.PRESETS:
        method = RectifiedSparse.preset(name)
        assert (method.drop, method.dense_layers, method.dense_steps) == want.pop(name)
        assert (method.p, method.block, method.order, method.neighbours) == (
            0.3,
            128,
            "hilbert",
            True,
        )
        assert method.first_frame == name.startswith("wan")
    assert not want


def test_is_written_and_read():
    for name in RectifiedSparse.PRESETS:
        method = RectifiedSparse.preset(name, order=(4, 4, 8))
        assert create(**method.to_dict()) == method


def test_autocast_does_not_change_the_choice_of_blocks():
    grid = (4, 8, 8)
    qkv = [x.bfloat16() for x in _qkv(tokens=256)]
    method = RectifiedSparse(block=16)
    want = Run(method, grid)(qkv)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Run(method, grid)(qkv), want)


# ---- what takes other ways on a GPU ------------------------------------------------------------


@pytest.mark.parametrize("tokens", [48, 50, 7])
def test_the_spread_of_blocks_by_a_norm(monkeypatch, tokens):
    x = _qkv(tokens=tokens)[0]
    mean = torch.stack([part.mean(2) for part in x.split(16, 2)], 2)
    wanted = [
        (part - own[:, :, None]).abs().mean(2)
        for part, own in zip(x.split(16, 2), mean.unbind(2), strict=True)
    ]
    torch.testing.assert_close(rectify._spread(x, mean, 16), torch.stack(wanted, 2))
    found = []
    monkeypatch.setattr(
        rectify,
        "_absolute_mean",
        lambda part, dtype: found.append(part) or rectify._norm_mean(part, dtype),
    )
    torch.testing.assert_close(rectify._spread(x, mean, 16), torch.stack(wanted, 2))
    assert found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [16, 72, 5])
def test_tokens_are_reordered_in_words_of_any_width(dtype, dim):
    index = torch.randperm(11)
    for x in (
        torch.randn(2, 3, 11, dim).to(dtype),
        torch.randn(2, 11, 3, dim).to(dtype).transpose(1, 2),  # heads behind tokens
        torch.randn(2, 3, 11, dim + 1).to(dtype)[..., 1:],  # rows that begin anywhere
        torch.randn(2, 3, dim, 11).to(dtype).mT,  # columns
    ):
        found = select_wide(x, index)
        assert found.dtype == dtype and found.is_contiguous()
        assert torch.equal(found, x[:, :, index])
